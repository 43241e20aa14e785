"""Small configs of every family of `shape_families.FAMILIES`, with the switches that change what a model is made of."""

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
OLD = {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 4}
BLOOM = {"vocab_size": 32, "hidden_size": 16, "n_layer": 3, "n_head": 4}
OPT = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
FALCON = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "d_kv": 6, "num_layers": 3, "num_heads": 4}
GROUPED = {"num_key_value_heads": 2}
WIDE = {"num_key_value_heads": 2, "head_dim": 6}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
MOE = {"num_experts_per_tok": 2, **GROUPED}
QWEN_MOE = {"num_experts": 3, "moe_intermediate_size": 12, **MOE}
SHARED = {"shared_expert_intermediate_size": 20}

# The first of each family is the one that real PEFT adapts.
CONFIGS = {
    "llama": (SIZES | GROUPED, [
        {}, TIED, {"attention_bias": True, "mlp_bias": True}, WIDE, {"num_key_value_heads": None},
    ]),
    "mistral": (SIZES | GROUPED, [{}, TIED, WIDE]),
    "qwen2": (SIZES | GROUPED, [{}, TIED, WIDE]),
    "qwen3": (SIZES | GROUPED, [{}, TIED, WIDE | {"attention_bias": True}]),
    "gemma": (SIZES | GROUPED, [{}, UNTIED, WIDE, {"attention_bias": True}]),
    "gemma2": (SIZES | GROUPED, [{}, UNTIED, WIDE, {"attention_bias": True}]),
    "gemma3_text": (SIZES | GROUPED, [{}, UNTIED, WIDE, {"attention_bias": True}]),
    "olmo2": (SIZES | GROUPED, [{}, TIED, {"attention_bias": True}]),
    "starcoder2": (SIZES | GROUPED, [{}, UNTIED, {"use_bias": False}]),
    "phi": (SIZES | GROUPED, [{}, TIED, {"qk_layernorm": True}]),
    "phi3": (SIZES | GROUPED, [{}, TIED]),
    "gpt2": (OLD, [{}, UNTIED, {"n_inner": 20, "n_positions": 8}, {"n_inner": None}]),
    "gptj": (OLD, [{}, TIED, {"n_inner": 20}]),
    "gpt_neox": (SIZES, [{}, TIED, {"attention_bias": False}]),
    "falcon": (FALCON, [
        {}, {"new_decoder_architecture": True, "num_kv_heads": 2}, {"bias": True, "ffn_hidden_size": 20} | UNTIED,
        {"multi_query": False, "parallel_attn": False, "alibi": True},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ]),
    "bloom": (BLOOM, [{}, UNTIED]),
    "opt": (OPT, [
        {}, {"word_embed_proj_dim": 8, "do_layer_norm_before": False}, {"_remove_final_layer_norm": True} | UNTIED,
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "max_position_embeddings": 10},
    ]),
    "mixtral": (SIZES | MOE | {"num_local_experts": 3}, [{}, TIED | WIDE]),
    "qwen2_moe": (SIZES | QWEN_MOE | SHARED, [
        {}, {"decoder_sparse_step": 2, "qkv_bias": False}, {"mlp_only_layers": [1], "head_dim": 6},
    ]),
    "qwen3_moe": (SIZES | QWEN_MOE, [{}, {"mlp_only_layers": [0], "head_dim": 6, "attention_bias": True}]),
    "bert": (SIZES, [{}, UNTIED, {"type_vocab_size": 3, "max_position_embeddings": 9}]),
    "roberta": (SIZES, [{}, UNTIED]),
    "t5": (T5, [{}, {"num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}]),
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "q_lora_rank": 6, "kv_lora_rank": 6, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "image_size": 16, "patch_size": 4,
}  # fmt: skip
# Architectures that are in no table: three mixtures, cross-attention, a model of several towers.
OTHERS = [
    {"model_type": "stablelm", "architectures": ["StableLmForCausalLM"], **_TOKENS, **SIZES, **GROUPED},
    {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], **_TOKENS, **SIZES, **MOE, "num_experts": 3},
    {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **_TOKENS, **SIZES, **_DEEPSEEK},
    {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], **_TOKENS, **SIZES, **MOE, "num_local_experts": 3,
     "head_dim": 4},
    {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **_TOKENS, **OLD, "add_cross_attention": True},
    {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "vision_config": _VISION,
     "text_config": {"model_type": "gemma3_text", "head_dim": 4, **_TOKENS, **SIZES, **GROUPED},
     "mm_tokens_per_image": 4},
]  # fmt: skip


def configs(model_type):
    """Every config of a family, the plain one first."""
    base, variants = CONFIGS[model_type]
    return [{"model_type": model_type, **_TOKENS, **base, **variant} for variant in variants]
