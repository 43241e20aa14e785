"""Config → every weight, family by family: names in memory, shapes and defaults as transformers 5 has them.

What a config leaves out has transformers' default where that follows from the rest or is a switch; a size that no model
can be without is asked for by name.
Source: the configuration and modelling files of transformers 5; a test builds each on the meta device and compares.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

from lowrank_probe.shape_encoders import bert, t5
from lowrank_probe.shape_fields import (
    Fields,
    Sizes,
    attention,
    decoder_sizes,
    gated_mlp,
    head,
    norms,
    plain_mlp,
    weight,
)
from lowrank_probe.shape_mixtures import active_parameters, mixtral, mixture_notes, qwen_moe
from lowrank_probe.weight_shapes import ModelShape, Weight

_BLOCK: Final = "model.layers.*."
_TWO: Final = ("input_layernorm", "post_attention_layernorm")
_FOUR: Final = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _ends(s: Sizes, head_bias: bool = False) -> list[Weight]:
    return [weight("model.embed_tokens", "embedding", (s.vocab, s.hidden)), head("lm_head", s, head_bias)]


def _llama(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, bias = decoder_sizes(f), f.flag("attention_bias", False)
    return s, [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, bias, bias),
        *gated_mlp(f"{_BLOCK}mlp", s, s.intermediate, f.flag("mlp_bias", False)),
        *norms(_BLOCK, _TWO, s.hidden, layers=s.blocks), *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip


def _mistral(f: Fields) -> tuple[Sizes, list[Weight]]:
    """Llama without biases, Qwen 2 with them on q, k and v."""
    qwen = f.model_type == "qwen2"
    s = decoder_sizes(f, kv_heads=32 if qwen else 8)
    return s, [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, qwen), *gated_mlp(f"{_BLOCK}mlp", s, s.intermediate),
        *norms(_BLOCK, _TWO, s.hidden, layers=s.blocks), *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip


def _qwen3(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, bias = decoder_sizes(f, kv_heads=32, head_dim=128), f.flag("attention_bias", False)
    return s, [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, bias, bias), *gated_mlp(f"{_BLOCK}mlp", s, s.intermediate),
        *norms(f"{_BLOCK}self_attn.", ["q_norm", "k_norm"], s.head_dim, layers=s.blocks),
        *norms(_BLOCK, _TWO, s.hidden, layers=s.blocks), *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip


def _gemma(f: Fields) -> tuple[Sizes, list[Weight]]:
    """Gemma 1 to 3: tied, heads of a width of their own; two norms more a block from 2 on, norms on q and k in 3."""
    version = {"gemma": 1, "gemma2": 2}.get(f.model_type, 3)
    s = decoder_sizes(f, kv_heads=16 if version == 1 else 4, head_dim=256, tied=True)
    bias = f.flag("attention_bias", False)
    found = [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, bias, bias), *gated_mlp(f"{_BLOCK}mlp", s, s.intermediate),
        *norms(_BLOCK, _TWO if version == 1 else _FOUR, s.hidden, layers=s.blocks),
        *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip
    if version == 3:
        found += norms(f"{_BLOCK}self_attn.", ["q_norm", "k_norm"], s.head_dim, layers=s.blocks)
    return s, found


def _olmo2(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, bias = decoder_sizes(f), f.flag("attention_bias", False)
    return s, [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, bias, bias), *gated_mlp(f"{_BLOCK}mlp", s, s.intermediate),
        *norms(f"{_BLOCK}self_attn.", ["q_norm"], s.heads * s.head_dim, layers=s.blocks),
        *norms(f"{_BLOCK}self_attn.", ["k_norm"], s.kv_heads * s.head_dim, layers=s.blocks),
        *norms(_BLOCK, ["post_attention_layernorm", "post_feedforward_layernorm"], s.hidden, layers=s.blocks),
        *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip


def _starcoder2(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, bias = decoder_sizes(f, kv_heads=2, tied=True, gated=False), f.flag("use_bias", True)
    return s, [
        *_ends(s), *attention(f"{_BLOCK}self_attn", s, bias, bias),
        *plain_mlp(f"{_BLOCK}mlp.", "c_fc", "c_proj", s, bias),
        *norms(_BLOCK, _TWO, s.hidden, True, s.blocks), *norms("model.", ["norm"], s.hidden, True),
    ]  # fmt: skip


def _phi(f: Fields) -> tuple[Sizes, list[Weight]]:
    s = decoder_sizes(f, gated=False)
    found = [
        *_ends(s, True), *attention(f"{_BLOCK}self_attn", s, True, True, "dense"),
        *plain_mlp(f"{_BLOCK}mlp.", "fc1", "fc2", s, True),
        *norms(_BLOCK, ["input_layernorm"], s.hidden, True, s.blocks),
        *norms("model.", ["final_layernorm"], s.hidden, True),
    ]  # fmt: skip
    if f.flag("qk_layernorm", False):
        found += norms(f"{_BLOCK}self_attn.", ["q_layernorm", "k_layernorm"], s.hidden // s.heads, True, s.blocks)
    return s, found


def _phi3(f: Fields) -> tuple[Sizes, list[Weight]]:
    s = decoder_sizes(f)
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return s, [
        *_ends(s),
        weight(f"{_BLOCK}self_attn.qkv_proj", "linear", (q + 2 * kv, s.hidden), layers=s.blocks),
        weight(f"{_BLOCK}self_attn.o_proj", "linear", (s.hidden, q), layers=s.blocks),
        weight(f"{_BLOCK}mlp.gate_up_proj", "linear", (2 * s.intermediate, s.hidden), layers=s.blocks),
        weight(f"{_BLOCK}mlp.down_proj", "linear", (s.hidden, s.intermediate), layers=s.blocks),
        *norms(_BLOCK, _TWO, s.hidden, layers=s.blocks), *norms("model.", ["norm"], s.hidden),
    ]  # fmt: skip


def _old_sizes(f: Fields, tied: bool) -> Sizes:
    """GPT-2's and GPT-J's names."""
    hidden, heads = f.size("n_embd", "hidden_size"), f.size("n_head", "num_attention_heads")
    return Sizes(
        hidden, f.size("n_layer", "num_hidden_layers"), heads, heads, f.share(hidden, heads),
        f.size("n_inner", default=4 * hidden), f.size("vocab_size"), f.flag("tie_word_embeddings", tied), False,
    )  # fmt: skip


def _gpt2(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, block = _old_sizes(f, True), "transformer.h.*."
    positions = f.size("n_positions", "max_position_embeddings", default=1024)
    return s, [
        weight("transformer.wte", "embedding", (s.vocab, s.hidden)),
        weight("transformer.wpe", "embedding", (positions, s.hidden)),
        weight(f"{block}attn.c_attn", "conv1d", (3 * s.hidden, s.hidden), True, s.blocks),
        weight(f"{block}attn.c_proj", "conv1d", (s.hidden, s.hidden), True, s.blocks),
        *plain_mlp(f"{block}mlp.", "c_fc", "c_proj", s, True, "conv1d"),
        *norms(block, ["ln_1", "ln_2"], s.hidden, True, s.blocks), *norms("transformer.", ["ln_f"], s.hidden, True),
        head("lm_head", s),
    ]  # fmt: skip


def _gptj(f: Fields) -> tuple[Sizes, list[Weight]]:
    s, block = _old_sizes(f, False), "transformer.h.*."
    return s, [
        weight("transformer.wte", "embedding", (s.vocab, s.hidden)),
        *attention(f"{block}attn", s, o="out_proj"), *plain_mlp(f"{block}mlp.", "fc_in", "fc_out", s, True),
        *norms(block, ["ln_1"], s.hidden, True, s.blocks), *norms("transformer.", ["ln_f"], s.hidden, True),
        head("lm_head", s, True),
    ]  # fmt: skip


def _gpt_neox(f: Fields) -> tuple[Sizes, list[Weight]]:
    hidden, heads, block = f.size("hidden_size"), f.size("num_attention_heads"), "gpt_neox.layers.*."
    s = Sizes(
        hidden, f.size("num_hidden_layers"), heads, heads, f.share(hidden, heads), f.size("intermediate_size"),
        f.size("vocab_size"), f.flag("tie_word_embeddings", False), False,
    )  # fmt: skip
    bias = f.flag("attention_bias", True)
    return s, [
        weight("gpt_neox.embed_in", "embedding", (s.vocab, hidden)),
        weight(f"{block}attention.query_key_value", "linear", (3 * hidden, hidden), bias, s.blocks),
        weight(f"{block}attention.dense", "linear", (hidden, hidden), bias, s.blocks),
        *plain_mlp(f"{block}mlp.", "dense_h_to_4h", "dense_4h_to_h", s, True),
        *norms(block, _TWO, hidden, True, s.blocks), *norms("gpt_neox.", ["final_layer_norm"], hidden, True),
        head("lm_head", s),
    ]  # fmt: skip


def _falcon(f: Fields) -> tuple[Sizes, list[Weight]]:
    """Falcon: one key/value head for all (7B), or groups of them (`new_decoder_architecture`: 40B, 180B)."""
    hidden, heads, block = f.size("n_embed", "hidden_size"), f.size("num_attention_heads"), "transformer.h.*."
    grouped, bias = f.flag("new_decoder_architecture", False), f.flag("bias", False)
    kv_heads = f.size("num_kv_heads", default=heads) if grouped else 1 if f.flag("multi_query", True) else heads
    s = Sizes(
        hidden, f.size("num_hidden_layers"), heads, kv_heads, f.share(hidden, heads),
        f.size("ffn_hidden_size", default=4 * hidden), f.size("vocab_size"), f.flag("tie_word_embeddings", True), False,
    )  # fmt: skip
    two = f.number("num_ln_in_parallel_attn", 2 if grouped else 1) == 2
    names = _TWO if not f.flag("parallel_attn", True) else ("ln_attn", "ln_mlp") if two else _TWO[:1]
    return s, [
        weight("transformer.word_embeddings", "embedding", (s.vocab, hidden)),
        weight(f"{block}self_attention.query_key_value", "linear", ((heads + 2 * kv_heads) * s.head_dim, hidden), bias,
               s.blocks),
        weight(f"{block}self_attention.dense", "linear", (hidden, hidden), bias, s.blocks),
        *plain_mlp(f"{block}mlp.", "dense_h_to_4h", "dense_4h_to_h", s, bias),
        *norms(block, names, hidden, True, s.blocks), *norms("transformer.", ["ln_f"], hidden, True),
        head("lm_head", s),
    ]  # fmt: skip


def _bloom(f: Fields) -> tuple[Sizes, list[Weight]]:
    hidden, heads = f.size("n_embed", "hidden_size"), f.size("n_head", "num_attention_heads")
    s = Sizes(
        hidden, f.size("n_layer", "num_hidden_layers"), heads, heads, f.share(hidden, heads), 4 * hidden,
        f.size("vocab_size"), f.flag("tie_word_embeddings", True), False,
    )  # fmt: skip
    block = "transformer.h.*."
    return s, [
        weight("transformer.word_embeddings", "embedding", (s.vocab, hidden)),
        *norms("transformer.", ["word_embeddings_layernorm", "ln_f"], hidden, True),
        weight(f"{block}self_attention.query_key_value", "linear", (3 * hidden, hidden), True, s.blocks),
        weight(f"{block}self_attention.dense", "linear", (hidden, hidden), True, s.blocks),
        *plain_mlp(f"{block}mlp.", "dense_h_to_4h", "dense_4h_to_h", s, True),
        *norms(block, _TWO, hidden, True, s.blocks), head("lm_head", s),
    ]  # fmt: skip


def _opt(f: Fields) -> tuple[Sizes, list[Weight]]:
    """OPT: positions from 2 on; the tables of its 350M are narrower than its blocks."""
    hidden, heads, bias = f.size("hidden_size"), f.size("num_attention_heads"), f.flag("enable_bias", True)
    s = Sizes(
        hidden, f.size("num_hidden_layers"), heads, heads, f.share(hidden, heads), f.size("ffn_dim"),
        f.size("vocab_size"), f.flag("tie_word_embeddings", True), False,
    )  # fmt: skip
    width, top, block = f.size("word_embed_proj_dim", default=hidden), "model.decoder.", "model.decoder.layers.*."
    found = [
        weight(f"{top}embed_tokens", "embedding", (s.vocab, width)),
        weight(f"{top}embed_positions", "embedding", (f.size("max_position_embeddings", default=2048) + 2, hidden)),
        *attention(f"{block}self_attn", s, bias, bias, "out_proj"), *plain_mlp(block, "fc1", "fc2", s, bias),
        weight("lm_head", "linear", (s.vocab, width), tied=s.tied),
    ]  # fmt: skip
    if width != hidden:
        found.append(weight(f"{top}project_in", "linear", (hidden, width)))
        found.append(weight(f"{top}project_out", "linear", (width, hidden)))
    if f.flag("layer_norm_elementwise_affine", True):
        found += norms(block, ["self_attn_layer_norm", "final_layer_norm"], hidden, True, s.blocks)
        if f.flag("do_layer_norm_before", True) and not f.flag("_remove_final_layer_norm", False):
            found += norms(top, ["final_layer_norm"], hidden, True)
    return s, found


Family = Callable[[Fields], tuple[Sizes, list[Weight]]]
# Model type → (the architecture it stands for, its weights).
FAMILIES: Final[dict[str, tuple[str, Family]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _mistral),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gemma": ("GemmaForCausalLM", _gemma),
    "gemma2": ("Gemma2ForCausalLM", _gemma),
    "gemma3_text": ("Gemma3ForCausalLM", _gemma),
    "olmo2": ("Olmo2ForCausalLM", _olmo2),
    "starcoder2": ("Starcoder2ForCausalLM", _starcoder2),
    "phi": ("PhiForCausalLM", _phi),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gptj": ("GPTJForCausalLM", _gptj),
    "gpt_neox": ("GPTNeoXForCausalLM", _gpt_neox),
    "falcon": ("FalconForCausalLM", _falcon),
    "bloom": ("BloomForCausalLM", _bloom),
    "opt": ("OPTForCausalLM", _opt),
    "mixtral": ("MixtralForCausalLM", mixtral),
    "qwen2_moe": ("Qwen2MoeForCausalLM", qwen_moe),
    "qwen3_moe": ("Qwen3MoeForCausalLM", qwen_moe),
    "bert": ("BertForMaskedLM", bert),
    "roberta": ("RobertaForMaskedLM", bert),
    "t5": ("T5ForConditionalGeneration", t5),
}
# Switches that change what a family's functions know of it.
_OTHERWISE: Final = ("add_cross_attention", "is_decoder")


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the table has the architecture: the model type with its usual head, without a decoder's extra parts."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return False
    architectures = config.get("architectures") or [FAMILIES[model_type][0]]
    return list(architectures)[:1] == [FAMILIES[model_type][0]] and not any(config.get(name) for name in _OTHERWISE)


def family_shape(config: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """The shape of a model that the table has (`is_known`), from its config alone.

    Raises `CheckpointError` naming a field that is missing or no size.
    """
    f = Fields(config)
    s, weights = FAMILIES[f.model_type][1](f)
    heads = [one.name for one in weights if one.layer_type == "lm_head" and one.kind == "linear"]
    return ModelShape(
        f.model_type, source, tuple(weights), s.hidden, s.layers, s.heads, s.kv_heads, s.head_dim, s.intermediate,
        s.vocab, s.gated, s.tied, dict(config), active_parameters(weights, s.per_token),
        heads[0], mixture_notes(f.model_type, weights, s.per_token),
    )  # fmt: skip
