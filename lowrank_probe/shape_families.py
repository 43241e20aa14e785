"""Config → every weight, family by family: names in memory, shapes and defaults as transformers 5 has them.

A family is a function from `Fields` to its `Weight`s. What a config leaves out has transformers' default where that
follows from the rest or is a switch; a size that a model cannot be without is asked for by name.
Source: the configuration and modelling files of transformers 5; a test builds each on the meta device and compares.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.layers import place
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight


@dataclass(frozen=True)
class Fields:
    """A config, read with its family's defaults; what is missing or no size is a `CheckpointError` that names it."""

    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def size(self, *names: str, default: int | None = None, null: int | None = None) -> int:
        """The positive integer under the first of `names` that the config has; `null` where that is null."""
        name = next((name for name in names if name in self.config), names[0])
        value = self.config.get(name, default)
        if value is None and name in self.config:
            value = default if null is None else null
        if value is None:
            raise CheckpointError(
                f"config of model type {self.model_type!r} has no {' or '.join(names)}: expected a positive integer, "
                "found none; give the model's own config.json"
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config: {name} is {value!r}, expected a positive integer")
        return value

    def number(self, *names: str, default: int) -> int:
        """As `size`, where 0 is allowed."""
        value = next((self.config[name] for name in names if self.config.get(name) is not None), default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CheckpointError(f"config: {names[0]} is {value!r}, expected a whole number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return default if value is None else bool(value)


def _weight(
    name: str, kind: Kind, shape: tuple[int, ...], bias: bool = False, layers: range | tuple[int, ...] | None = None,
    tied: bool = False,
) -> Weight:  # fmt: skip
    """A weight outside the blocks, or, with `layers`, one in each of these; its bias has as many entries as it outputs."""
    count = 1 if layers is None else len(layers)
    layer_type = place(name.replace("*", "0")).layer_type
    return Weight(name, kind, layer_type, shape, shape[0] if bias else 0, count, tuple(layers or ()), tied)


@dataclass(frozen=True)
class _Sizes:
    """What every decoder has, once read."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool = True


def _decoder_sizes(
    f: Fields, *, kv_heads: int | None = None, head_dim: int | None = None, tied: bool = False
) -> _Sizes:
    """Sizes under Llama's names. kv_heads, head_dim: the family's defaults where they are numbers of their own."""
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    return _Sizes(
        hidden, f.size("num_hidden_layers"), heads,
        f.size("num_key_value_heads", default=heads if kv_heads is None else kv_heads, null=heads),
        f.size("head_dim", default=head_dim or max(1, hidden // heads)),
        f.size("intermediate_size"), f.size("vocab_size"), f.flag("tie_word_embeddings", tied),
    )  # fmt: skip


def _head(name: str, s: _Sizes, bias: bool = False) -> Weight:
    return _weight(name, "linear", (s.vocab, s.hidden), bias, tied=s.tied)


def _attention(prefix: str, s: _Sizes, qkv_bias: bool, o_bias: bool, o: str = "o_proj") -> list[Weight]:
    q, kv, blocks = s.heads * s.head_dim, s.kv_heads * s.head_dim, range(s.layers)
    return [
        _weight(f"{prefix}.q_proj", "linear", (q, s.hidden), qkv_bias, blocks),
        _weight(f"{prefix}.k_proj", "linear", (kv, s.hidden), qkv_bias, blocks),
        _weight(f"{prefix}.v_proj", "linear", (kv, s.hidden), qkv_bias, blocks),
        _weight(f"{prefix}.{o}", "linear", (s.hidden, q), o_bias, blocks),
    ]


def _gated_mlp(prefix: str, hidden: int, width: int, bias: bool, blocks: range | tuple[int, ...]) -> list[Weight]:
    return [
        _weight(f"{prefix}.gate_proj", "linear", (width, hidden), bias, blocks),
        _weight(f"{prefix}.up_proj", "linear", (width, hidden), bias, blocks),
        _weight(f"{prefix}.down_proj", "linear", (hidden, width), bias, blocks),
    ]


def _norms(names: tuple[str, ...], width: int, bias: bool, blocks: range | None = None) -> list[Weight]:
    return [_weight(name, "norm", (width,), bias, blocks) for name in names]


def _llama_like(f: Fields) -> tuple[_Sizes, list[Weight]]:
    """Llama, Mistral, Qwen 2: separate projections, a gated MLP, RMSNorm."""
    t = f.model_type
    s = _decoder_sizes(f, kv_heads={"mistral": 8, "qwen2": 32}.get(t))
    bias = t == "qwen2" or (t == "llama" and f.flag("attention_bias", False))
    block = "model.layers.*"
    return s, [
        _weight("model.embed_tokens", "embedding", (s.vocab, s.hidden)),
        *_attention(f"{block}.self_attn", s, bias, bias and t != "qwen2"),
        *_gated_mlp(
            f"{block}.mlp", s.hidden, s.intermediate, t == "llama" and f.flag("mlp_bias", False), range(s.layers)
        ),
        *_norms((f"{block}.input_layernorm", f"{block}.post_attention_layernorm"), s.hidden, False, range(s.layers)),
        *_norms(("model.norm",), s.hidden, False),
        _head("lm_head", s),
    ]


def _gpt2(f: Fields) -> tuple[_Sizes, list[Weight]]:
    hidden, heads = f.size("n_embd", "hidden_size"), f.size("n_head", "num_attention_heads")
    s = _Sizes(
        hidden, f.size("n_layer", "num_hidden_layers"), heads, heads, max(1, hidden // heads),
        f.size("n_inner", default=4 * hidden), f.size("vocab_size"), f.flag("tie_word_embeddings", True), False,
    )  # fmt: skip
    block, blocks = "transformer.h.*", range(s.layers)
    return s, [
        _weight("transformer.wte", "embedding", (s.vocab, hidden)),
        _weight(
            "transformer.wpe", "embedding", (f.size("n_positions", "max_position_embeddings", default=1024), hidden)
        ),
        _weight(f"{block}.attn.c_attn", "conv1d", (3 * hidden, hidden), True, blocks),
        _weight(f"{block}.attn.c_proj", "conv1d", (hidden, hidden), True, blocks),
        _weight(f"{block}.mlp.c_fc", "conv1d", (s.intermediate, hidden), True, blocks),
        _weight(f"{block}.mlp.c_proj", "conv1d", (hidden, s.intermediate), True, blocks),
        *_norms((f"{block}.ln_1", f"{block}.ln_2"), hidden, True, blocks),
        *_norms(("transformer.ln_f",), hidden, True),
        _head("lm_head", s),
    ]


def _gpt_neox(f: Fields) -> tuple[_Sizes, list[Weight]]:
    hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
    s = _Sizes(
        hidden, f.size("num_hidden_layers"), heads, heads, max(1, hidden // heads), f.size("intermediate_size"),
        f.size("vocab_size"), f.flag("tie_word_embeddings", False), False,
    )  # fmt: skip
    block, blocks, bias = "gpt_neox.layers.*", range(s.layers), f.flag("attention_bias", True)
    return s, [
        _weight("gpt_neox.embed_in", "embedding", (s.vocab, hidden)),
        _weight(f"{block}.attention.query_key_value", "linear", (3 * hidden, hidden), bias, blocks),
        _weight(f"{block}.attention.dense", "linear", (hidden, hidden), bias, blocks),
        _weight(f"{block}.mlp.dense_h_to_4h", "linear", (s.intermediate, hidden), True, blocks),
        _weight(f"{block}.mlp.dense_4h_to_h", "linear", (hidden, s.intermediate), True, blocks),
        *_norms((f"{block}.input_layernorm", f"{block}.post_attention_layernorm"), hidden, True, blocks),
        *_norms(("gpt_neox.final_layer_norm",), hidden, True),
        _head("lm_head", s),
    ]


_Family = Callable[[Fields], tuple[_Sizes, list[Weight]]]
# Model type → (the architecture that it stands for, its weights).
FAMILIES: Final[dict[str, tuple[str, _Family]]] = {
    "llama": ("LlamaForCausalLM", _llama_like),
    "mistral": ("MistralForCausalLM", _llama_like),
    "qwen2": ("Qwen2ForCausalLM", _llama_like),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gpt_neox": ("GPTNeoXForCausalLM", _gpt_neox),
}


def family_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a model whose type `FAMILIES` knows, from its config alone.

    Raises `CheckpointError` naming a field that is missing or no size.
    """
    f = Fields(config)
    sizes, weights = FAMILIES[f.model_type][1](f)
    total = sum(weight.n_parameters for weight in weights)
    head = next((weight.name for weight in weights if weight.layer_type == "lm_head"), "")
    return ModelShape(
        f.model_type, "config.json", tuple(weights), sizes.hidden, sizes.layers, sizes.heads, sizes.kv_heads,
        sizes.head_dim, sizes.intermediate, sizes.vocab, sizes.gated, sizes.tied, dict(config), total, head,
    )  # fmt: skip
