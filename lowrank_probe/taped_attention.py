"""Attention on a `Tape`: by the fused kernel that CUDA takes, with its scores of s², and the window's mask.

Legend: as in `taped_models`.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

from lowrank_probe.tape import Array
from lowrank_probe.taped_models import TapedModel
from lowrank_probe.training_steps import ACCUMULATOR, LSE_ROWS, up

# Model types that have the window wherever the config names one; others ask `use_sliding_window`.
_WINDOWED: Final = ("mistral", "phi3", "starcoder2")


def rotate(model: TapedModel, x: Array) -> Array:
    """Rotary positions, in the residual stream's dtype where that is wider; nothing of x is saved."""
    item = max(x.item, model.base)
    size = model.tape.size(x.symbol, item)
    return model.tape.op([x], x.symbol, item, scratch=3 * size, back_scratch=3 * size)


def attention(model: TapedModel, q: Array, k: Array, v: Array, dropout: str = "attention_dropout") -> Array:
    """softmax(q·kᵀ)·v by the kernel that CUDA takes (`as_on_cuda.attention`)."""
    if not model.step.flash:
        return _eager(model, q, k, v, dropout)
    tape, b, n, s = model.tape, model.step.batch, model.shape.n_heads, length(model)
    windowed = masked(model)
    if model.autocast:
        q, k, v = (tape.cast(x, 2) for x in (q, k, v))
    if windowed:
        k, v = _repeated(model, k), _repeated(model, v)
    elif q.item == 4 and grouped(model):
        return _math(model, q, k, v)
    flash, rows = q.item == 2 and not windowed, up(s, LSE_ROWS)
    mask = [tape.hold(b * s * s * q.item, text="mask")] if windowed else []
    lse = tape.hold(4 * b * n * (s if flash else rows), text="4n")
    # Beside the gradients: float32 sums, and the gradients of keys and values for each head.
    scratch = 4 * b * n * (up(s, ACCUMULATOR[0]) * (1 + up(model.shape.head_dim, ACCUMULATOR[1])) if flash else rows)
    scratch += 2 * tape.size("q", q.item) * (flash and grouped(model))
    return tape.op([q, k, v], "q", q.item, [q, k, v, *mask, lse], saves_out=True, back_scratch=scratch)


def length(model: TapedModel) -> int:
    """Tokens of a sequence."""
    return model.step.tokens // model.step.batch


def masked(model: TapedModel) -> bool:
    """Whether a sequence fills the sliding window, and so fused attention gets a mask."""
    return length(model) >= _window(model.config, model.shape.model_type)


def grouped(model: TapedModel) -> bool:
    """Whether several heads share keys and values."""
    return model.shape.n_kv_heads != model.shape.n_heads


def _repeated(model: TapedModel, x: Array) -> Array:
    """Keys or values for each head: repeated where grouped, else as they are."""
    return model.tape.op([x], "q", x.item) if grouped(model) else x


def _eager(model: TapedModel, q: Array, k: Array, v: Array, dropout: str) -> Array:
    """With every matrix of n·s scores a token; the softmax in float32, in GPT-2 in the dtype that there is."""
    tape, item, gpt2 = model.tape, q.item, model.shape.model_type == "gpt2"
    # A product of matrices copies what lies in a fused projection.
    q, k, v = (x if x.buffer.text[1:] != "c" else tape.op([x], "q", x.item) for x in (q, k, v))
    k, v = _repeated(model, k), _repeated(model, v)
    if model.autocast:
        q, k, v = (tape.cast(x, 2) for x in (q, k, v))
    scores = tape.op([q, k], "ns", q.item, [q, k])
    scores = tape.op([scores], "ns", q.item)
    scores = tape.op([scores], "ns", max(q.item, model.base))
    scores = tape.cast(scores, scores.item if gpt2 and not model.autocast else 4)
    scores = tape.op([scores], "ns", scores.item, saves_out=True)
    scores = tape.cast(scores, v.item if gpt2 else item)
    scores = model.dropout(scores, dropout, 0.1 * gpt2)
    scores = tape.cast(scores, v.item)
    return tape.op([scores, v], "q", v.item, [scores, v])


def _math(model: TapedModel, q: Array, k: Array, v: Array) -> Array:
    """What PyTorch falls back to for grouped queries in float32, which no fused kernel takes."""
    tape = model.tape
    k, v = _repeated(model, k), _repeated(model, v)
    q, k = tape.op([q], "q", 4), tape.op([k], "q", 4)
    scores = tape.op([q, k], "ns", 4, [q, k])
    scores = tape.op([scores], "ns", 4, saves_out=True)
    return tape.op([scores, v], "q", 4, [scores, v])


def _window(config: Mapping[str, Any], family: str) -> float:
    """The sliding window, from which on attention gets a mask; ∞ without."""
    if family not in _WINDOWED and not config.get("use_sliding_window", False):
        return math.inf
    return config.get("sliding_window", 4096 if family == "mistral" else None) or math.inf
