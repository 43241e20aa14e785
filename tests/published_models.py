"""Configs of published models beyond the reference file and the typical ones, and their numbers of parameters.

Both were set down from memory, not read from the models' pages; that each config gives its count to the last digit is
the check.
"""


def _sizes(hidden, layers, heads, kv_heads, intermediate, vocab, **others):
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab, **others,
    }  # fmt: skip


_FALCON = {"model_type": "falcon", "vocab_size": 65024, "bias": False, "parallel_attn": True}
_BLOOM = {"model_type": "bloom", "vocab_size": 250880}
_OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
_BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_T5 = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64}
_QWEN2_MOE = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
_QWEN3_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}

COUNTS = {
    "falcon-7b": (
        _FALCON | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True},
        6_921_720_704,
    ),
    "falcon-40b": (
        _FALCON | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
                   "new_decoder_architecture": True},
        41_303_293_952,
    ),
    "bloom-560m": (_BLOOM | {"n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}, 559_214_592),
    "bloom-7b1": (_BLOOM | {"n_embed": 4096, "n_layer": 30, "num_attention_heads": 32}, 7_069_016_064),
    "bloom": (_BLOOM | {"hidden_size": 14336, "n_layer": 70, "n_head": 112}, 176_247_271_424),
    "opt-125m": (
        _OPT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072}, 125_239_296,
    ),
    "opt-350m": (
        _OPT | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096,
                "word_embed_proj_dim": 512, "do_layer_norm_before": False},
        331_196_416,
    ),
    "opt-6.7b": (
        _OPT | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384},
        6_658_473_984,
    ),
    "phi-2": (_sizes(2560, 32, 32, None, 10240, 51200, model_type="phi"), 2_779_683_840),
    "Phi-3-mini": (_sizes(3072, 32, 32, 32, 8192, 32064, model_type="phi3"), 3_821_079_552),
    "gemma-2b": (_sizes(2048, 18, 8, 1, 16384, 256000, model_type="gemma", head_dim=256), 2_506_172_416),
    "gemma-7b": (_sizes(3072, 28, 16, 16, 24576, 256000, model_type="gemma", head_dim=256), 8_537_680_896),
    "gemma-3-1b": (_sizes(1152, 26, 4, 1, 6912, 262144, model_type="gemma3_text", head_dim=256), 999_885_952),
    "gpt-j-6b": (
        {"model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}, 6_050_882_784,
    ),
    "Qwen3-0.6B": (
        _sizes(1024, 28, 16, 8, 3072, 151936, model_type="qwen3", head_dim=128, tie_word_embeddings=True), 596_049_920,
    ),
    "Qwen3-8B": (_sizes(4096, 36, 32, 8, 12288, 151936, model_type="qwen3", head_dim=128), 8_190_735_360),
    "Qwen1.5-MoE-A2.7B": (
        _sizes(2048, 24, 16, 16, 5632, 151936, model_type="qwen2_moe", shared_expert_intermediate_size=5632)
        | _QWEN2_MOE,
        14_315_784_192,
    ),
    "Qwen3-30B-A3B": (
        _sizes(2048, 48, 32, 4, 6144, 151936, model_type="qwen3_moe", head_dim=128) | _QWEN3_MOE, 30_532_122_624,
    ),
    "starcoder2-3b": (_sizes(3072, 30, 24, 2, 12288, 49152, model_type="starcoder2"), 3_030_371_328),
    "OLMo-2-7B": (_sizes(4096, 32, 32, 32, 11008, 100352, model_type="olmo2"), 7_298_617_344),
    "bert-base-uncased": (_BERT | {"model_type": "bert", "vocab_size": 30522}, 109_514_298),
    "roberta-base": (
        _BERT | {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        124_697_433,
    ),
    "t5-small": (_T5 | {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}, 60_506_624),
    "t5-base": (_T5 | {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}, 222_903_552),
}  # fmt: skip
