"""What a budget says in sentences: per card or in total, which phase peaks and why, why LoRA is not always smaller."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from lowrank_probe.accelerators import Accelerator
from lowrank_probe.activations import activations
from lowrank_probe.budget_fits import cards_by_stage
from lowrank_probe.budgets import Budget
from lowrank_probe.errors import ProbeError


def both(n_bytes: float) -> str:
    """GB as on a spec sheet, and GiB."""
    return f"{gb(n_bytes)} GB ({gib(n_bytes)} GiB)"


def gb(n_bytes: float) -> str:
    """In units of 10⁹ bytes, with four digits or one place."""
    return _number(n_bytes / 1e9)


def gib(n_bytes: float) -> str:
    """In units of 2³⁰ bytes."""
    return _number(n_bytes / 2**30)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def file_size(n_bytes: int) -> str:
    """Of a file, in powers of ten: 167.8 MB."""
    unit, scale = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)
    return f"{n_bytes / scale:,.1f} {unit}"


def percent(share: float) -> str:
    """A share with four digits where it is small, as PEFT prints it."""
    return f"{100 * share:.4f} %" if share < 0.1 else f"{100 * share:.1f} %"


def run_names(budgets: Sequence[Budget]) -> list[str]:
    """A name for each run: its label, with what else differs among them."""
    several = {
        "r": len({one.step.rank for one in budgets if one.counts.adapter}) > 1,
        "s": len({one.step.seq for one in budgets}) > 1,
    }
    names = []
    for one in budgets:
        rank = f", r={one.step.rank}" if several["r"] and one.counts.adapter else ""
        names.append(one.label + rank + (f", {one.step.seq:,} tokens" if several["s"] else ""))
    return names


def trained(found: Budget) -> str:
    """How many parameters are trained, and the share of all, which includes the adapter's own."""
    counts = found.counts
    if not counts.adapter:
        return f"{counts.total:,} trainable"
    return f"{counts.adapter:,} trainable ({percent(counts.adapter / (counts.total + counts.adapter))} of all)"


NO_BF16: Final = "†: no bf16 in hardware"


def card(found: Budget, one: Accelerator) -> str:
    """The card's label, marked where the run computes in bf16 and the card does not."""
    return one.label + ("†" if found.step.needs_bf16 and not one.bf16 else "")


def bf16_note(budgets: Sequence[Budget], cards: Sequence[Accelerator | None]) -> str:
    """What the mark means, where one of these runs has it on one of these cards; else ""."""
    marked = any(one.step.needs_bf16 for one in budgets) and any(one is not None and not one.bf16 for one in cards)
    return f" {NO_BF16}." if marked else ""


def on_cards(found: Budget, gpu: Accelerator) -> str:
    """Whether it fits on one such card, and on how many together: memory of cards does not add up by itself."""
    need = both(found.total_bytes) + ("" if found.knows_activations else " without activations")
    if not found.runs_on(gpu):
        what = "QLoRA" if found.step.method == "qlora" else "8-bit Adam"
        return f"{gpu.label} does not run it: {what} needs bitsandbytes, which has no kernels for it."
    fits = found.fits(gpu)
    many = found.sharding.gpus > 1
    first = (
        f"{'Each of the cards' if many else 'One card'} needs {need}; {card(found, gpu)} has "
        f"{gib(gpu.usable_bytes)} GiB for it ({FROM.get(gpu.usable_from, gpu.usable_from)}): "
        f"{'fits' if fits else 'does not fit'}."
    )
    mark = bf16_note([found], [gpu])
    if fits and not many:
        return f"{first} That is on one card: a second one only takes another batch.{mark}"
    cards = cards_by_stage(found, gpu)
    if cards[3] == 1:
        return first + mark
    rest = ", ".join(f"{n} with stage {stage}" for stage, n in cards.items() if stage and n is not None)
    together = (
        f"spread by ZeRO or FSDP it takes {rest}" if rest else "no number of them is enough: activations are not spread"
    )
    return f"{first} Cards do not add up by themselves: with DDP each holds everything; {together}.{mark}"


def measured(n_bytes: int, phase: str, gpu: Accelerator) -> str:
    """What a measured step needs with the reserve, and whether a card has it."""
    return (
        f"The {PHASE_WORDS[phase]} peaks; with the reserve a card needs {both(n_bytes)}; {gpu.label} has "
        f"{gib(gpu.usable_bytes)} GiB for it: {'fits' if n_bytes <= gpu.usable_bytes else 'does not fit'}."
    )


def peak(found: Budget) -> str:
    """Which phase peaks and what it is made of."""
    phase, total = found.peak_phase, found.total_bytes
    if not found.knows_activations:
        return "Activations and logits are unknown: they depend on --seq and --batch."
    parts = sorted(found.components, key=lambda one: -one.at[phase])[:3]
    made = ", ".join(f"{one.name} {100 * one.at[phase] / total:.0f} %" for one in parts)
    return f"The {PHASE_WORDS[phase]} peaks, at {both(total)} a card: {made}."


LEGEND: Final = (
    "T = batch·seq, s sequence, h hidden, q heads·head_dim, K key/value heads·head_dim, n heads, f intermediate, "
    "V vocabulary, r rank"
)
FROM: Final = {"PyTorch": "the total that PyTorch names", "XLA": "what XLA compiles for"}
PHASE_WORDS: Final = {
    "forward": "forward pass", "loss": "loss", "backward": "backward pass", "step": "optimizer's step",
    "states": "sum of what stays",
}  # fmt: skip


def lora_against_full(found: Budget) -> str:
    """Where an adapter's activations come near full fine-tuning's or above: why, with both numbers; else ""."""
    if found.activations is None or found.step.method == "full":
        return ""
    step = replace(found.step, method="full")
    try:
        full = activations(found.shape, step).saved
    except ProbeError:
        return ""
    own = found.activations.saved
    if found.step.checkpointing:
        return (
            f"With checkpointing an adapter keeps as much for the backward pass as full fine-tuning, {gib(own)} and "
            f"{gib(full)} GiB: what it saves is gradients and optimizer states."
        )
    if own < 0.7 * full:
        return ""
    if found.step.method == "qlora":
        return ""
    share = percent(found.counts.adapter / (found.counts.total + found.counts.adapter))
    least = found.changed(rank=1)
    return (
        f"LoRA trains {share} but keeps {gib(own)} GiB of activations for the backward pass, full fine-tuning "
        f"{gib(full)}: "
        "a frozen layer passes gradients on too, and every adapted one keeps its input for the adapter, in its type. "
        f"The rank matters little (rank 1: {gib(least.total_bytes)} GiB); targets, tokens, checkpointing do."
    )


def qlora_against_lora(found: Budget) -> str:
    """What 4-bit weights save and what they do not; "" for other methods."""
    if found.step.method != "qlora":
        return ""
    lora = found.changed(method="lora")
    weights = found.sharding.on_card(lora.counts.total * (2.0 - found.frozen_each), 3)
    return (
        f"QLoRA saves {gib(weights)} GiB of LoRA's weights, nothing else. The activations are LoRA's at best: tables "
        "and norms upcast to fp32 make what passes between the layers fp32 too, and weights are unpacked to bf16 where "
        "they are used. So it can take more than LoRA where activations are most of it; the reserve is larger for that."
    )


def cautions(budgets: Sequence[Budget]) -> list[str]:
    """What cannot be run as it is asked for, each once."""
    return list(dict.fromkeys(one.caution for one in budgets if one.caution))


def estimated(budgets: Sequence[Budget]) -> str:
    """Why the activations are an estimate; "" where none is."""
    return next((one.activations.estimated for one in budgets if one.activations), "")


def unlike_checkpointing(budgets: Sequence[Budget]) -> str:
    """Which of several methods have gradient checkpointing, where not all do; "" where they are alike."""
    known = [one for one in budgets if one.knows_activations]
    with_it = dict.fromkeys(one.step.method for one in known if one.step.checkpointing)
    if not with_it or all(one.step.checkpointing for one in known):
        return ""
    return (
        f" {', '.join(with_it)}: with gradient checkpointing, as PEFT prepares it; the others without "
        "(--checkpointing, --no-checkpointing: all alike)."
    )
