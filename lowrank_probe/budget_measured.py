"""A budget beside one real step of the same run, by component and phase. Torch only where it measures."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from lowrank_probe.budget_components import CONTEXT, FRAGMENTATION, autocast
from lowrank_probe.budgets import Budget
from lowrank_probe.errors import ProbeError

if TYPE_CHECKING:
    from lowrank_probe.training_steps import Measured

# What a measurement names → the components of a budget that it is.
_SAME: Final[Mapping[str, tuple[str, ...]]] = {
    "weights": ("weights", "fp32 master weights"), "adapter": ("adapter",), "gradients": ("gradients",),
    "optimizer": ("optimizer states",), "activations": ("activations",), "logits": ("logits",),
    "working": ("working memory",), "step transient": ("optimizer step",), "inputs": (),
}  # fmt: skip
# Under autocast the 16-bit weights are casts, which a measurement cannot tell from activations.
_CASTS: Final = {"weights": ("fp32 master weights",), "activations": ("activations", "weights")}
# On a GPU only sums are known.
_ON_GPU: Final = {
    "before the step": ("weights", "fp32 master weights", "adapter", "optimizer states"),
    "the rest": ("gradients", "activations", "logits", "working memory", "optimizer step"),
}
_ON_GPU_CASTS: Final = {
    "before the step": ("fp32 master weights", "optimizer states"),
    "the rest": (*_ON_GPU["the rest"], "weights"),
}


def measured_step(found: Budget, seq: int | None = None) -> "Measured":
    """One real step of this run: on a GPU where there is one, else by fake tensors. Errors as `measuring`.

    seq: where the budget has none, since it has no formula for its activations.
    """
    step = found.step if found.knows_activations else replace(found.step, seq=seq)
    if step.seq is None:
        raise ProbeError("--measure needs --seq (and --batch): it runs one step")
    if found.sharding.gpus > 1:
        raise ProbeError("--measure runs on one card: leave --gpus, --zero and --fsdp out")
    if found.n_parameters is not None:
        raise ProbeError("--measure needs a model, not a size: give its directory or config.json")
    if not found.shape.config:
        raise ProbeError("--measure needs the model's config.json: headers alone do not say how it runs")
    import torch

    from lowrank_probe.measuring import measure_cuda, measure_fake

    return (measure_cuda if torch.cuda.is_available() else measure_fake)(found.shape.config, step)


def measured_total(measured: "Measured") -> int:
    """The measured peak with the reserve that a budget has: what a card needs."""
    return round(measured.peak + CONTEXT + FRAGMENTATION * measured.peak)


def beside(found: Budget, measured: "Measured") -> dict[str, dict[str, tuple[int, int]]] | None:
    """Component as it was measured → phase → bytes (by formula, measured), and "sum"; without the reserve.

    None where the budget has no formula for its activations.
    """
    if not found.knows_activations:
        return None
    casts = found.step.method == "full" and autocast(found.recipe, found.sharding)
    gpu = any("the rest" in parts for parts in measured.components.values())
    same = (_ON_GPU_CASTS if casts else _ON_GPU) if gpu else {**_SAME, **(_CASTS if casts else {})}
    own = {one.name: one.at for one in found.components[:-1]}
    rows = {
        name: {
            phase: (sum(own[part][phase] for part in parts if part in own), measured.components[phase].get(name, 0))
            for phase in measured.peaks
        }
        for name, parts in same.items()
    }
    kept = {name: row for name, row in rows.items() if any(any(pair) for pair in row.values())}
    total = {phase: (sum(at[phase] for at in own.values()), n_bytes) for phase, n_bytes in measured.peaks.items()}
    return kept | {"sum": total}
