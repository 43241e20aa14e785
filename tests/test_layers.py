"""Layer types: every matrix of the families we name, from checkpoints that transformers itself writes."""

import pytest
import torch
import transformers as hf
from pairs import llama_tensors

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.layers import ORDER, Place, is_conv1d, matches, module_of, place, sort_key

DECODER = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
ENCODER = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "type_vocab_size": 2,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SPLIT, LLAMA_MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


def block(*types, n=2):
    return dict.fromkeys(types, n)


# family: (model, how many matrices of each type its checkpoint holds, those of other types by their last name)
FAMILIES = {
    "llama": (
        hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER), {**block(*SPLIT, *LLAMA_MLP), "embedding": 1, "lm_head": 1},
    ),
    "mistral": (
        hf.MistralForCausalLM, hf.MistralConfig(**DECODER), {**block(*SPLIT, *LLAMA_MLP), "embedding": 1, "lm_head": 1},
    ),
    "qwen2": (
        hf.Qwen2ForCausalLM, hf.Qwen2Config(**DECODER), {**block(*SPLIT, *LLAMA_MLP), "embedding": 1, "lm_head": 1},
    ),
    "gemma": (
        hf.GemmaForCausalLM, hf.GemmaConfig(**DECODER | {"tie_word_embeddings": True}),
        {**block(*SPLIT, *LLAMA_MLP), "embedding": 1},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2), {**block("qkv", "o", "up", "down"), "embedding": 1,
                                              "position_embedding": 1},
    ),
    "gpt2-cross": (
        hf.GPT2LMHeadModel, hf.GPT2Config(**GPT2, add_cross_attention=True),
        {**block("qkv", "o", "up", "down", "cross_q", "cross_kv", "cross_o"), "embedding": 1,
         "position_embedding": 1},
    ),
    "bert": (
        hf.BertForPreTraining, hf.BertConfig(**ENCODER),
        {**block(*SPLIT, "up", "down"), "embedding": 1, "position_embedding": 1, "token_type_embedding": 1,
         "pooler": 1, "dense": 1, "seq_relationship": 1},
    ),
    "roberta": (
        hf.RobertaForMaskedLM, hf.RobertaConfig(**ENCODER),
        {**block(*SPLIT, "up", "down"), "embedding": 1, "position_embedding": 1, "token_type_embedding": 1,
         "dense": 1},
    ),
    "t5": (
        hf.T5ForConditionalGeneration, hf.T5Config(**T5),
        {**block(*SPLIT, "up", "down", n=4), **block("cross_q", "cross_k", "cross_v", "cross_o"), "embedding": 1,
         "relative_attention_bias": 2},
    ),
    "t5-gated": (
        hf.T5ForConditionalGeneration, hf.T5Config(**T5, feed_forward_proj="gated-gelu"),
        {**block(*SPLIT, *LLAMA_MLP, n=4), **block("cross_q", "cross_k", "cross_v", "cross_o"), "embedding": 1,
         "relative_attention_bias": 2},
    ),
    "bart": (
        hf.BartForConditionalGeneration, hf.BartConfig(**BART),
        {**block(*SPLIT, "up", "down", n=4), **block("cross_q", "cross_k", "cross_v", "cross_o"), "embedding": 1,
         "position_embedding": 2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(checkpoint as transformers saves it, the model in memory, expected counts)."""
    kind, config, expected = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(config)
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return open_checkpoint(directory), model, expected


def test_every_matrix_of_a_family_has_its_type(family):
    checkpoint, _, expected = family
    found = {}
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 2 and not name.endswith("bias"):
            found.setdefault(place(name).layer_type, []).append(name)
    assert {layer_type: len(names) for layer_type, names in found.items()} == expected, found


def test_every_matrix_of_a_block_has_its_number_and_stack(family):
    checkpoint, model, _ = family
    for name, info in checkpoint.tensors.items():
        where = place(name)
        blocks = any(f".{i}." in name for i in range(2))
        assert (where.layer is not None) == blocks, name
        if model.config.is_encoder_decoder and blocks and len(info.shape) == 2:
            assert where.stack in ("encoder", "decoder")
            assert where.stack + "." in name


def test_conv1d_is_told_by_the_model_itself(family):
    checkpoint, model, _ = family
    modules = dict(model.named_modules())
    for name, info in checkpoint.tensors.items():
        if len(info.shape) != 2:
            continue
        module = modules.get(module_of(name))
        stored_in_out = type(module).__name__ == "Conv1D"
        assert is_conv1d(name, model.config.model_type) == stored_in_out, name
        assert is_conv1d(name, None) == stored_in_out, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("q", 3, "")),
        ("model.layers.31.mlp.gate_up_proj.weight", Place("gate_up", 31, "")),
        ("model.layers.0.self_attn.qkv_proj.weight", Place("qkv", 0, "")),
        ("gpt_neox.layers.2.attention.query_key_value.weight", Place("qkv", 2, "")),
        ("gpt_neox.layers.2.attention.dense.weight", Place("o", 2, "")),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h.weight", Place("down", 2, "")),
        ("distilbert.transformer.layer.1.attention.q_lin.weight", Place("q", 1, "")),
        ("distilbert.transformer.layer.1.attention.out_lin.weight", Place("o", 1, "")),
        ("distilbert.transformer.layer.1.ffn.lin2.weight", Place("down", 1, "")),
        ("model.layers.4.block_sparse_moe.gate.weight", Place("router", 4, "")),
        ("model.layers.4.block_sparse_moe.experts.7.w1.weight", Place("gate", 4, "")),
        ("model.layers.4.block_sparse_moe.experts.7.w2.weight", Place("down", 4, "")),
        ("model.layers.4.block_sparse_moe.experts.7.w3.weight", Place("up", 4, "")),
        ("encoder.layer.0.attention.self.key.weight", Place("k", 0, "encoder")),
        ("lm_head.weight", Place("lm_head", None, "")),
        ("score.weight", Place("score", None, "")),
        ("classifier.3.weight", Place("classifier", 3, "")),
        ("anything", Place("anything", None, "")),
    ],
)
def test_place_by_hand(name, expected):
    assert place(name) == expected


def test_conv1d_names_of_another_family_are_not_conv1d():
    assert not is_conv1d("transformer.h.0.attn.c_proj.weight", "llama")
    assert not is_conv1d("blocks.0.attn.c_proj.weight", None)


@pytest.mark.parametrize(
    ("pattern", "selects"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj.weight"),
        ("q", "model.layers.0.self_attn.q_proj.weight"),
        ("embedding", "model.embed_tokens.weight"),
        ("layers.1", "model.layers.1.mlp.up_proj.weight"),
        ("*mlp*", "model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("layers.*.mlp", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_patterns_select(pattern, selects):
    assert matches(selects, pattern)
    others = [name for name in llama_tensors() if not matches(name, pattern)]
    assert others, "a pattern that selects everything tests nothing"


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("layers.1", "model.layers.11.mlp.up_proj.weight"),
        ("proj", "model.layers.0.self_attn.q_proj.weight"),
        ("norm", "model.layers.0.input_layernorm.weight"),
        ("ayers.1", "model.layers.1.mlp.up_proj.weight"),
        ("layers.1.mlp", "model.layers.1xmlp.weight"),
    ],
)
def test_patterns_keep_to_whole_components(pattern, name):
    assert not matches(name, pattern)


def test_types_sort_as_data_flows_and_unknown_ones_before_the_head():
    assert sorted(["lm_head", "dense", "down", "q", "embedding"], key=sort_key) == [
        "embedding", "q", "down", "dense", "lm_head",
    ]  # fmt: skip
    assert sorted(ORDER, key=sort_key) == list(ORDER)
