"""Decoder blocks on a `Tape`, family by family, as transformers' modelling files put their layers together.

Local names are as there, since these keep tensors alive: a block's input until it returns, q, k and v until attention
does. A family without a block of its own has that of `taped_estimates`.

Legend: as in `taped_models`.
"""

from collections.abc import Callable, Mapping
from typing import Final

from lowrank_probe.tape import Array
from lowrank_probe.taped_attention import attention, rotate
from lowrank_probe.taped_models import TapedModel

# Model types that are run as Llama is; what sets them apart is in the config.
LLAMAS: Final = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def _llama_block(model: TapedModel, x: Array) -> Array:
    tape, residual = model.tape, x
    x = model.norm(x)
    x = _llama_attention(model, x)
    x = tape.add(residual, x)
    residual = x
    x = model.norm(x)
    x = _gated_mlp(model, x)
    return tape.add(residual, x)


def _llama_attention(model: TapedModel, x: Array) -> Array:
    q, k, v = (model.linear(x, kind, symbol) for kind, symbol in (("q", "q"), ("k", "K"), ("v", "K")))
    if "q_norm" in model.weights:
        q, k = model.norm(q), model.norm(k)
    q, k = rotate(model, q), rotate(model, k)
    out = attention(model, q, k, v)
    return model.linear(out, "o", "h")


def _gated_mlp(model: TapedModel, x: Array) -> Array:
    gate = model.activation(model.linear(x, "gate", "f"))
    return model.linear(model.tape.multiply(gate, model.linear(x, "up", "f")), "down", "h")


def _gpt2_block(model: TapedModel, x: Array) -> Array:
    tape, residual = model.tape, x
    x = model.norm(x)
    x = model.dropout(_fused_attention(model, x, "attn_pdrop", rotary=False), "resid_pdrop", 0.1)
    x = tape.add(x, residual)
    residual = x
    x = model.norm(x)
    x = model.dropout(_mlp(model, x), "resid_pdrop", 0.1)
    return tape.add(residual, x)


def _gpt_neox_block(model: TapedModel, x: Array) -> Array:
    tape = model.tape
    attended = model.dropout(_fused_attention(model, model.norm(x), "attention_dropout", rotary=True), "hidden_dropout")
    if not model.config.get("use_parallel_residual", True):
        x = attended = tape.add(attended, x)
        return tape.add(model.dropout(_mlp(model, model.norm(attended)), "hidden_dropout"), attended)
    x_of_mlp = model.dropout(_mlp(model, model.norm(x)), "hidden_dropout")
    return tape.add(tape.add(x_of_mlp, attended), x)


def _fused_attention(model: TapedModel, x: Array, dropout: str, rotary: bool) -> Array:
    fused = model.linear(x, "qkv", "c")
    q, k, v = model.tape.split(fused, "qKK")
    if rotary:
        q, k = rotate(model, q), rotate(model, k)
    out = attention(model, q, k, v, dropout)
    return model.linear(out, "o", "h")


def _mlp(model: TapedModel, x: Array) -> Array:
    x = model.linear(x, "up", "f")
    x = model.activation(x)
    return model.linear(x, "down", "h")


def gated_by_one(model: TapedModel, x: Array) -> Array:
    """An MLP whose gate and up projections are one."""
    gate, up = model.tape.split(model.linear(x, "gate_up", "2f"), "ff")
    return model.linear(model.tape.multiply(model.activation(gate), up), "down", "h")


def sequential_block(model: TapedModel, x: Array) -> Array:
    """Attention, then an MLP, each on a norm of the stream; with whatever projections there are."""
    tape = model.tape
    x = tape.add(x, attend(model, model.norm(x)))
    return tape.add(x, feed_forward(model, model.norm(x)))


def attend(model: TapedModel, x: Array) -> Array:
    """Attention by q, k and v, or by the one projection of them."""
    return _llama_attention(model, x) if "q" in model.weights else _fused_attention(model, x, "attention_dropout", True)


def feed_forward(model: TapedModel, x: Array) -> Array:
    """The MLP, gated where there is a gate."""
    if "gate_up" in model.weights:
        return gated_by_one(model, x)
    return _gated_mlp(model, x) if "gate" in model.weights else _mlp(model, x)


BLOCKS: Final[Mapping[str, Callable[[TapedModel, Array], Array]]] = {
    "gpt2": _gpt2_block, "gpt_neox": _gpt_neox_block, "phi3": sequential_block, "starcoder2": sequential_block,
    **dict.fromkeys(LLAMAS, _llama_block),
}  # fmt: skip
FAMILIES: Final = tuple(sorted(BLOCKS))
