"""Decoder blocks on a `Tape`, family by family, as transformers' modelling files put their layers together.

Local names are as there, since these keep tensors alive: a block's input until it returns, q, k and v until attention
does. A family without a block of its own is estimated from the linear layers that it has.

Legend: as in `taped_models`.
"""

from collections.abc import Callable, Mapping
from typing import Final

from lowrank_probe.errors import ProbeError
from lowrank_probe.model_shapes import ModelShape
from lowrank_probe.tape import Array
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
    if model.shape.model_type == "qwen3":
        q, k = model.norm(q), model.norm(k)
    q, k = model.rotate(q), model.rotate(k)
    out = model.attention(q, k, v)
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
        q, k = model.rotate(q), model.rotate(k)
    out = model.attention(q, k, v, dropout)
    return model.linear(out, "o", "h")


def _mlp(model: TapedModel, x: Array) -> Array:
    x = model.linear(x, "up", "f")
    x = model.activation(x)
    return model.linear(x, "down", "h")


def _any_block(model: TapedModel, x: Array) -> Array:
    """Two residual branches with whatever projections there are, rotary positions, an MLP of one-kernel operators."""
    tape = model.tape
    y = model.norm(x)
    y = _llama_attention(model, y) if "q" in model.weights else _fused_attention(model, y, "attention_dropout", True)
    x = tape.add(x, y)
    y = model.norm(x)
    return tape.add(x, _any_mlp(model, y))


def _any_mlp(model: TapedModel, x: Array) -> Array:
    if "gate_up" in model.weights:
        gate, up = model.tape.split(model.linear(x, "gate_up", "2f"), "ff")
        return model.linear(model.tape.multiply(model.activation(gate), up), "down", "h")
    return _gated_mlp(model, x) if "gate" in model.weights else _mlp(model, x)


_BLOCKS: Final[Mapping[str, Callable[[TapedModel, Array], Array]]] = {
    "gpt2": _gpt2_block, "gpt_neox": _gpt_neox_block, "phi3": _any_block, "starcoder2": _any_block,
    **dict.fromkeys(LLAMAS, _llama_block),
}  # fmt: skip
FAMILIES: Final = tuple(sorted(_BLOCKS))


def block_of(shape: ModelShape) -> tuple[Callable[[TapedModel, Array], Array], str]:
    """(block, "") of the model's family, or one of the linear layers that there are, and why it is an estimate."""
    if shape.model_type in _BLOCKS:
        return _BLOCKS[shape.model_type], ""
    there = {weight.layer_type for weight in shape.weights}
    if {"o", "down"} <= there and ({"q", "k", "v"} <= there or "qkv" in there) and there & {"up", "gate_up"}:
        return (
            _any_block,
            f"{shape.model_type} has no formulas of its own: an estimate from the linear layers that it has",
        )
    raise ProbeError(
        f"{shape.model_type}: no formula for its activations; there are some for {', '.join(FAMILIES)}, and estimates "
        "for models with one attention and one MLP a block; without a sequence length the rest can be told"
    )
