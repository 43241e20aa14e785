"""Activations of one training step in closed form: bytes by phase, and their formulas. Imports no torch.

A few blocks of the model are run on sizes alone (`taped_blocks`), once with three and once with four of them: all
further blocks are alike, so every sum is linear in their number and follows exactly. Formulas are written from the same
list of saved tensors that the numbers come from.

Legend: as in `taped_models`; L blocks.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Final

from lowrank_probe.model_shapes import ModelShape
from lowrank_probe.tape import HEAD, Tape, saved
from lowrank_probe.taped_ends import embed, loss_of
from lowrank_probe.taped_estimates import EAGER, block_of
from lowrank_probe.taped_models import TapedModel
from lowrank_probe.training_steps import CHUNKS, PHASES, Step

__all__ = ["Activations", "Held", "Step", "activations"]

_FEW: Final = 4
# What does not grow with the tokens alone: the text of such a buffer → its name.
_WHOLE: Final = {"mask": "mask", "2W": "adapted stacks of experts", "4W": "adapted stacks of experts"}


@dataclass(frozen=True)
class Held:
    """Bytes at the peak of one phase, beside weights, adapter and optimizer states.

    gradients: of trained weights, as far as they are there already. casts: autocast's bf16 copies of weights.
    activations: made by the forward pass. logits: made by head and loss, forward and backward. working: made by the
    rest of the backward pass, recomputed layers included.
    """

    gradients: int = 0
    casts: int = 0
    activations: int = 0
    logits: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.casts + self.activations + self.logits + self.working


_PARTS: Final = tuple(field.name for field in fields(Held))


@dataclass(frozen=True)
class Activations:
    """What a step's activations hold, in bytes.

    saved: for backward at the end of the forward pass, without the logits. logits: at the loss peak. recomputed: the
    tensors of one recomputed block, 0 without checkpointing. peaks: phase → `Held`. formulas: component → formula.
    estimated: why this is an estimate, "" for a family whose formulas were compared with real steps.
    """

    saved: int
    logits: int
    recomputed: int
    peaks: Mapping[str, Held]
    formulas: Mapping[str, str]
    estimated: str = ""


def activations(shape: ModelShape, step: Step) -> Activations:
    """The activations of one step, by phase. Raises `NoFormulaError` where the model has no closed form.

    A family that is not among `taped_blocks.FAMILIES` is estimated (`taped_estimates`), and `estimated` says so; no
    bound on its error is known.
    """
    if shape.model_type in EAGER:
        step = replace(step, flash=False)
    n = shape.n_layers
    exact = _Run(shape, step, min(n, _FEW))
    parts = {mark: Counter(moment.parts) for mark, moment in exact.tape.moments.items()}
    if n > _FEW:
        fewer = _Run(shape, step, _FEW - 1).tape.moments
        for (phase, place), more in parts.items():
            if less := fewer.get((phase, place)):
                for part in _PARTS:
                    more[part] += (n - _FEW) * (more[part] - less.parts[part])
    peaks = {}
    for phase in PHASES:
        held = [Held(**{part: found[part] for part in _PARTS}) for (at, _), found in parts.items() if at == phase]
        peaks[phase] = max(held, key=lambda one: one.total)
    first, block = exact.saved("first"), exact.saved("last" if n > 1 else "first")
    ends = exact.saved("start", "end", HEAD)
    total = first.total() + (n - 1) * block.total() + ends.total()
    again = _Run(shape, replace(step, checkpointing=False), 2).saved("last") if step.checkpointing else Counter()
    formulas = {
        "activations": _plus(
            f"{n - 1} × {exact.formula(block)}" if first != block and n > 1 else f"{n} × {exact.formula(block)}",
            exact.formula(first) if first != block else "",
            exact.formula(ends),
        ),
        "logits": _logits_formula(step, exact.model.wide_loss),
        "working": f"one recomputed block, {exact.formula(again)}, and the gradients on their way through it"
        if again
        else "the gradients on their way through one block",
        "gradients": "bytes an entry × the trained weights that backward has passed",
        "symbols": exact.symbols(),
    }
    if step.precision == "mixed":
        formulas["casts"] = "2 × each float32 weight of a linear layer, from its use to its backward pass"
    return Activations(total, peaks["loss"].logits, again.total(), peaks, formulas, exact.estimated)


class _Run:
    """One step of the model with `n_layers` blocks on a tape: its moments, and what its forward pass saved."""

    def __init__(self, shape: ModelShape, step: Step, n_layers: int) -> None:
        self.tape = tape = Tape(step.tokens, _widths(shape, step))
        self.model = model = TapedModel(shape, step, tape)
        block, self.estimated = block_of(shape)
        run = partial(block, model)
        x = embed(model)
        for i in range(n_layers):
            with tape.at("first" if i == 0 else "last" if i == n_layers - 1 else "second" if i == 1 else "middle"):
                x = tape.checkpoint(run, x) if step.checkpointing else run(x)
        with tape.at("end"):
            x = model.norm(x)
        tape.phase = "loss"
        with tape.at(HEAD):
            loss = loss_of(model, x)
            del x
            self._saved = saved(loss, "activations")
            model.leave_autocast()
            tape.backward(loss, tape.hold(4))
            del loss
        model.held = None
        tape.phase, tape.place = "step", "end"
        tape.compare()

    def saved(self, *places: str) -> "Counter[str]":
        """What these parts of the model saved: bytes an entry and symbol ("4h") → bytes."""
        found: Counter[str] = Counter()
        for (place, text), n_bytes in self._saved.items():
            if place in places:
                found[text] += n_bytes
        return found

    def symbols(self) -> str:
        """What the symbols of the formulas stand for here."""
        step, widths = self.model.step, self.tape.widths
        names = {"h": "hidden", "q": "heads × head size", "K": "key/value heads × head size", "f": "intermediate",
                 "n": "heads", "s": "sequence", "r": "rank", "V": "vocabulary"}  # fmt: skip
        sizes = {**widths, "s": step.tokens // step.batch}
        told = [
            f"{symbol} = {sizes[symbol]} {name}"
            for symbol, name in names.items()
            if sizes[symbol] and (step.adapted or symbol != "r")
        ]
        return f"T = {step.batch} × {sizes['s']} tokens; " + ", ".join(told) + "; c = q + 2K"

    def formula(self, parts: "Counter[str]") -> str:
        """T·(16h + 4q + …) of what was saved; a mask's b·s² apart."""
        sums: Counter[str] = Counter()
        for text, n_bytes in parts.items():
            if text not in _WHOLE and n_bytes:
                sums[text[1:]] += n_bytes
        terms = []
        order = list(self.tape.widths)
        for symbol in sorted(sums, key=lambda one: order.index(one) if one in order else len(order) + int(one)):
            factor = sums[symbol] / (self.tape.tokens * self.tape.widths[symbol])
            times = "·" if symbol == "ns" or symbol.isdecimal() else ""
            terms.append(f"{factor:.6g}" if symbol == "1" else f"{factor:.6g}{times}{symbol}")
        a_token = f"({' + '.join(terms)})" if len(terms) > 1 else "".join(terms)
        whole = (f"{parts[text]:,} ({said})" for text, said in _WHOLE.items() if parts[text])
        return _plus(f"T·{a_token}" if terms else "", *whole)


def _plus(*terms: str) -> str:
    """The terms that there are, with + between them."""
    return " + ".join(term for term in terms if term)


class _Widths(dict[str, int]):
    """symbol → entries a token; a number is its own."""

    def __missing__(self, symbol: str) -> int:
        return int(symbol)


def _widths(shape: ModelShape, step: Step) -> _Widths:
    """By the config, and by the weights where it does not tell."""
    of = {weight.layer_type: weight for weight in shape.weights if weight.layers and len(weight.shape) > 1}
    q = shape.n_heads * shape.head_dim or (of["o"].sides[1] if "o" in of else 0)
    K = shape.n_kv_heads * shape.head_dim
    if not K:
        K = of["k"].sides[0] if "k" in of else (of["qkv"].sides[0] - q) // 2 if "qkv" in of else 0
    f = of["down"].sides[1] if "down" in of else shape.intermediate
    e, wide = shape.experts_per_token, of["expert_down"].sides[1] if "expert_down" in of else 0
    return _Widths({
        "h": shape.hidden, "q": q, "K": K, "c": q + 2 * K, "f": f, "2f": 2 * f, "r": step.rank, "V": shape.vocab,
        "ns": shape.n_heads * (step.tokens // step.batch), "n": shape.n_heads, "k": shape.n_kv_heads,
        "eh": e * shape.hidden, "ef": e * wide, "2ef": 2 * e * wide,
        "E": of["expert_down"].copies if "expert_down" in of else 0, "1": 1,
    })  # fmt: skip


def _logits_formula(step: Step, wide: bool) -> str:
    """Bytes of the logits at the loss peak: in the backward pass of the log-softmax."""
    tokens = f"T/{CHUNKS}" if step.chunked_loss else "T"
    held = (4 if step.precision == "fp32" else 2) * (step.held_outputs and not step.chunked_loss)
    kept = f" + {held} (the logits, kept by the caller)" if held else ""
    each = 4 if wide or step.precision != "bf16" else 2
    return f"{tokens}·V·({each} (log-softmax) + {each} (its gradient) + {each} (the logits' gradient){kept})"
