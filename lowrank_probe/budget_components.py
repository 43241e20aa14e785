"""The parts of a training run's memory on one card, each with its formula and source, phase by phase.

Legend: N parameters of the model, A of the adapter, n cards. Phases: forward; loss (logits and their gradients);
backward; step (the optimizer's). Where batch and sequence are not given, the only phase is "states": what stays,
without activations.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from lowrank_probe.activations import Activations
from lowrank_probe.budget_counts import Counts
from lowrank_probe.recipes import (
    EIGHT_BIT,
    NF4_ABSMAX,
    NF4_CODES,
    NF4_DOUBLE_ABSMAX,
    NF4_DOUBLE_TENSOR,
    NF4_SOURCE,
    NF4_TENSOR,
    ZERO_PAPER,
    Recipe,
    frozen_bytes,
)
from lowrank_probe.sharding import Sharding
from lowrank_probe.training_steps import PHASES, Step

STATES: Final = "states"

# Not known beforehand, hence a reserve: the CUDA context (as measured on one H200, docs/benchmarks-budget-gpu.md; other
# cards were not measured), and what the allocator holds without using it (2 to 7 % in PEFT's published runs; QLoRA was
# 10 to 16 % above this sum in a published curve).
CONTEXT: Final = 767 * 2**20
FRAGMENTATION: Final = 0.05
QLORA_FRAGMENTATION: Final = 0.16


@dataclass(frozen=True)
class Component:
    """One part: its bytes on one card in each phase, how they come about, and where that is from."""

    name: str
    at: Mapping[str, int]
    formula: str
    source: str

    @property
    def largest(self) -> int:
        return max(self.at.values())


def components(
    counts: Counts, step: Step, recipe: Recipe, sharding: Sharding, found: Activations | None, unfused: bool = False
) -> tuple[Component, ...]:
    """Every part of the run that is not 0 in all phases; the last is the reserve.

    unfused: attention falls back to PyTorch's math kernel (`Budget.unfused`), which the sources then say.
    """
    phases = (STATES,) if found is None else PHASES
    parts = _full(counts, recipe, sharding, found) if step.method == "full" else _frozen(counts, step, sharding)
    if step.method != "full":
        parts += _adapter(counts, step, recipe)
    parts += _training(counts, recipe, sharding, found)
    if found is not None:
        # Autocast's copies are the weights of full fine-tuning; beside an adapter they are few.
        parts += _activations(found, casts=bool(counts.adapter), unfused=unfused)
    made = [one for part in parts if any((one := _component(part, phases)).at.values())]
    return (*made, _reserve(made, step, phases))


Part = tuple[str, "float | Mapping[str, float]", str, str]


def _component(part: Part, phases: Iterable[str]) -> Component:
    name, at, formula, source = part
    known = at if isinstance(at, Mapping) else dict.fromkeys(phases, at)
    return Component(name, {phase: round(known.get(phase, 0)) for phase in phases}, formula, source)


def _full(counts: Counts, recipe: Recipe, sharding: Sharding, found: Activations | None) -> list[Part]:
    """Weights that are all trained."""
    n, parts = counts.total, list[Part]()
    if sharding.is_fsdp and sharding.gpus > 1:
        own = recipe.master or recipe.weights
        name = "fp32 master weights" if recipe.master else "weights"
        parts.append((name, own * n / sharding.gpus, f"{own:g} B × {n:,} / {sharding.gpus} cards", recipe.source))
        return [*parts, _gathered(counts, recipe.weights, sharding, gradients=True)]
    held = recipe.weights * n
    at: float | Mapping[str, float] = sharding.on_card(held, 3)
    if autocast(recipe, sharding):
        at = {STATES: held}
        if found is not None:  # casts come and go with the graph
            at = {phase: found.peaks[phase].casts for phase in PHASES}
    parts.append(("weights", at, f"{recipe.weights:g} B × {n:,}{sharding.over(3)}", recipe.source))
    parts.append((
        "fp32 master weights", sharding.on_card(recipe.master * n, 1), f"{recipe.master:g} B × {n:,}{sharding.over(1)}",
        recipe.source,
    ))  # fmt: skip
    if sharding.spreads(3):
        parts.append(_gathered(counts, recipe.weights, sharding, gradients=True))
    return parts


def autocast(recipe: Recipe, sharding: Sharding) -> bool:
    """Whether 16-bit weights are casts of the fp32 ones; DeepSpeed, FSDP and the ZeRO paper keep them as weights."""
    return bool(recipe.master) and recipe != ZERO_PAPER and not sharding.spreads(1)


def _frozen(counts: Counts, step: Step, sharding: Sharding) -> list[Part]:
    """A base that is not trained: as loaded, or in 4 bits."""
    spread, parts = (sharding.is_fsdp and sharding.gpus > 1) or sharding.spreads(3), list[Part]()
    over, share = (f" / {sharding.gpus} cards", 1 / sharding.gpus) if spread else ("", 1.0)
    each = frozen_bytes(step.precision)
    if step.method != "qlora":
        parts.append(
            ("weights", share * each * counts.total, f"{each:g} B × {counts.total:,}{over}", "frozen, as loaded")
        )
    else:
        rest, codes = counts.total - counts.quantizable, counts.quantizable
        stacks = "stacks of experts, " if counts.stacks else ""
        parts.append((
            "weights", share * (NF4_CODES * codes + 2 * rest),
            f"({NF4_CODES:g} B × {codes:,} in 4 bits + 2 B × {rest:,} loaded in bf16){over}", NF4_SOURCE,
        ))  # fmt: skip
        absmax, tensor = (NF4_DOUBLE_ABSMAX, NF4_DOUBLE_TENSOR) if step.double_quant else (NF4_ABSMAX, NF4_TENSOR)
        doubled = "with double quantization" if step.double_quant else "without double quantization"
        parts.append((
            "quantization constants", absmax * codes + tensor * counts.n_quantizable,
            f"{absmax:.5g} B × {codes:,} + {tensor:,} B × {counts.n_quantizable} tensors", f"{NF4_SOURCE}, {doubled}",
        ))  # fmt: skip
        parts.append((
            "fp32 upcasts", share * 2 * rest, f"2 B × {rest:,} more: {stacks}tables, output head, norms, biases{over}",
            "peft.prepare_model_for_kbit_training",
        ))  # fmt: skip
        parts.append((
            "unpacked weight", dict.fromkeys(("forward", "backward"), 2.0 * counts.largest_quantizable),
            f"2 B × {counts.largest_quantizable:,} of the largest 4-bit weight, while it is used",
            "bitsandbytes' MatMul4Bit",
        ))  # fmt: skip
        each = 4.0  # of what is not in 4 bits, with its upcast
    if spread:
        parts.append(_gathered(counts, each, sharding, gradients=False))
    return parts


def _adapter(counts: Counts, step: Step, recipe: Recipe) -> list[Part]:
    formula = f"{recipe.weights:g} B × {counts.adapter:,} parameters at rank {step.rank}"
    return [("adapter", recipe.weights * counts.adapter, formula, recipe.source)]


def _training(counts: Counts, recipe: Recipe, sharding: Sharding, found: Activations | None) -> list[Part]:
    """Gradients, the optimizer's states and what its step takes beyond them, of what is trained."""
    n, whole = counts.trained, recipe.gradients * counts.trained
    if recipe.master and not counts.adapter and not sharding.is_fsdp and sharding.spreads(1):
        # DeepSpeed: gradients in 16 bits until they are reduced, then an fp32 partition.
        buffers = 0.0 if sharding.stage == 3 else 2.0 * n
        held = buffers + whole / sharding.gpus
        formula = f"2 B × {n:,} + " if buffers else ""
        formula += f"{recipe.gradients:g} B × {n:,} / {sharding.gpus} cards"
    else:
        held = sharding.on_card(whole, 2)
        formula = f"{recipe.gradients:g} B × {n:,}{sharding.over(2)}"
    at: float | Mapping[str, float] = held
    if found is not None:
        whole = found.peaks["step"].gradients
        at = {phase: held * found.peaks[phase].gradients / whole for phase in PHASES}
    states, said = optimizer_bytes(counts, recipe), f"{recipe.optimizer:.6g} B × {n:,}"
    if states != recipe.optimizer * n:
        said = f"({recipe.optimizer:.6g} B × {n - counts.tables:,} + 8 B × {counts.tables:,} of embedding tables)"
    parts: list[Part] = [
        ("gradients", at, formula, recipe.source),
        ("optimizer states", sharding.on_card(states, 1), said + sharding.over(1), recipe.source),
        ("optimizer step", {phase: sharding.on_card(recipe.transient * n, 1) for phase in ("step", STATES)},
         f"{recipe.transient:g} B × {n:,} while it runs{sharding.over(1)}", recipe.source),
    ]  # fmt: skip
    if sharding.gpus > 1 and sharding.stage == 0:
        parts.append((
            "gradient buckets", recipe.gradients * n, f"{recipe.gradients:g} B × {n:,}",
            "torch's DDP: a second copy of the gradients, unless gradient_as_bucket_view",
        ))  # fmt: skip
    return parts


def optimizer_bytes(counts: Counts, recipe: Recipe) -> float:
    """Bytes of the optimizer's states of everything that is trained.

    With 8-bit states transformers' `Trainer` keeps those of embedding tables in fp32 (Trainer.create_optimizer).
    """
    if recipe.optimizer == EIGHT_BIT and not counts.adapter:
        return recipe.optimizer * (counts.total - counts.tables) + 8 * counts.tables
    return recipe.optimizer * counts.trained


def _activations(found: Activations, casts: bool, unfused: bool) -> list[Part]:
    """What the forward pass saves (with autocast's copies of weights, where `casts`), logits, working memory."""
    source = "closed form of transformers' and PEFT's layers, checked against measured steps"
    scores = "; ns: scores of PyTorch's math attention, its only kernel for grouped queries in float32"
    return [
        (
            name,
            {
                phase: float(getattr(found.peaks[phase], part))
                + (found.peaks[phase].casts if casts and part == "activations" else 0)
                for phase in PHASES
            },
            found.formulas[part],
            source + (scores if unfused and "·ns" in found.formulas[part] else ""),
        )
        for name, part in (("activations", "activations"), ("logits", "logits"), ("working memory", "working"))
    ]


def _gathered(counts: Counts, each: float, sharding: Sharding, *, gradients: bool) -> Part:
    """Weights that a card has in full while it needs them, as they are stored: `each` bytes, or 4 bits."""
    if sharding.is_fsdp and sharding.stage == 2:
        n_bytes = counts.whole.n_bytes(each)
        formula = f"{counts.whole.formula(each)}, whole between forward and backward"
    elif sharding.is_fsdp:
        units = 3 if gradients else 2
        n_bytes = units * counts.largest_block.n_bytes(each)
        formula = f"{units} × {counts.largest_block.formula(each)}: a block, the next one" + (
            " and its gradient" if gradients else ""
        )
    else:
        units = 2 if gradients else 1
        n_bytes = units * counts.largest_module.n_bytes(each)
        formula = f"{f'{units} × ' * (units > 1)}{counts.largest_module.formula(each)} of the largest module"
    source = "torch.distributed.fsdp, one unit a block" if sharding.is_fsdp else "DeepSpeed's estimate for stage 3"
    return "gathered weights", n_bytes, formula, source


def _reserve(made: list[Component], step: Step, phases: Iterable[str]) -> Component:
    share = QLORA_FRAGMENTATION if step.method == "qlora" else FRAGMENTATION
    at = {phase: round(CONTEXT + share * sum(one.at[phase] for one in made)) for phase in phases}
    why = "QLoRA took 10 to 16 % more than this sum in a published curve" if step.method == "qlora" else (
        "the allocator held 2 to 7 % more than it used in PEFT's published runs, 2 to 25 % on an H200"
    )  # fmt: skip
    why = f"the context as measured on one H200 (other cards: not measured); {why}"
    return Component("reserve", at, f"{CONTEXT // 2**20} MiB CUDA context + {100 * share:.0f} % of the rest", why)
