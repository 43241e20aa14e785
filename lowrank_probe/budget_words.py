"""What a budget says in sentences: per card or in total, which phase peaks and why, why LoRA is not always smaller."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from lowrank_probe.accelerators import Accelerator
from lowrank_probe.activations import activations
from lowrank_probe.budget_fits import cards_by_stage, least_cards, storage
from lowrank_probe.budgets import Budget
from lowrank_probe.errors import ProbeError


@dataclass(frozen=True)
class Unit:
    """A unit of memory by its power of 2¹⁰, and its neighbour on spec sheets by the same power of 10³."""

    binary: str
    decimal: str
    power: int

    def of(self, n_bytes: float) -> float:
        """Bytes in the binary unit."""
        return n_bytes / 1024.0**self.power

    def text(self, n_bytes: float) -> str:
        """The same with four digits or one place."""
        return _number(self.of(n_bytes))

    def decimal_text(self, n_bytes: float) -> str:
        """In the decimal unit."""
        return _number(n_bytes / 1000**self.power)

    def cell(self, n_bytes: float) -> str:
        """For a table of parts: two places, and a dot for nothing."""
        return "·" if n_bytes == 0 else f"{self.of(n_bytes):,.2f}"


GIB: Final = Unit("GiB", "GB", 3)
_UNITS: Final = (GIB, Unit("MiB", "MB", 2), Unit("KiB", "kB", 1))


def unit(n_bytes: float) -> Unit:
    """GiB, or the smaller unit in which these bytes are 1 or more."""
    return next((one for one in _UNITS if n_bytes >= 1024**one.power), _UNITS[-1])


def unit_of(budgets: Sequence[Budget]) -> Unit:
    """One unit for all the numbers of several runs: by the largest, without the reserve, which none is below."""
    return unit(max(one.allocated_bytes for one in budgets))


def both(n_bytes: float) -> str:
    """GB as on a spec sheet, and GiB; of little, the smaller units."""
    return f"{decimal(n_bytes)} ({size(n_bytes)})"


def size(n_bytes: float) -> str:
    """With its unit: 18.0 GiB, 350.2 MiB."""
    return f"{unit(n_bytes).text(n_bytes)} {unit(n_bytes).binary}"


def decimal(n_bytes: float) -> str:
    """With its unit of powers of ten: 19.3 GB, 367.2 MB."""
    return f"{unit(n_bytes).decimal_text(n_bytes)} {unit(n_bytes).decimal}"


def gib(n_bytes: float) -> str:
    """In units of 2³⁰ bytes, with four digits or one place."""
    return GIB.text(n_bytes)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def file_size(n_bytes: int) -> str:
    """Of a file, in powers of ten: 167.8 MB."""
    name, scale = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6) if n_bytes >= 1e6 else ("kB", 1e3)
    return f"{n_bytes / scale:,.1f} {name}"


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


def card(found: Budget, one: Accelerator, brief: bool = False) -> str:
    """The card's label (its name, where brief), marked where the run computes in bf16 and the card does not."""
    return (one.name if brief else one.label) + ("†" if found.step.needs_bf16 and not one.bf16 else "")


def bf16_note(budgets: Sequence[Budget], cards: Sequence[Accelerator | None]) -> str:
    """What the mark means, where one of these runs has it on one of these cards; else ""."""
    marked = any(one.step.needs_bf16 for one in budgets) and any(one is not None and not one.bf16 for one in cards)
    return f" {NO_BF16}." if marked else ""


ALONE: Final = "That is on one card: a second one only takes another batch."
APART: Final = "Cards do not add up by themselves: with DDP each holds everything"


def on_cards(found: Budget, gpu: Accelerator, among: bool = False) -> str:
    """Whether it fits on one such card, and on how many together: memory of cards does not add up by itself.

    among: of several, of which `on_cards_of_all` says once what holds for each.
    """
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
        return f"{first}{'' if among else f' {ALONE}'}{mark}"
    cards = cards_by_stage(found, gpu)
    if cards[3] == 1:
        return first + mark
    rest = ", ".join(f"{n} with stage {stage}" for stage, n in cards.items() if stage and n is not None)
    together = (
        f"spread by ZeRO or FSDP it takes {rest}" if rest else "no number of them is enough: activations are not spread"
    )
    return f"{first} {f'{together[0].upper()}{together[1:]}' if among else f'{APART}; {together}'}.{mark}"


def on_cards_of_all(budgets: Sequence[Budget], names: Sequence[str], gpu: Accelerator) -> list[str]:
    """`on_cards` of each of several runs, and at the end what holds for all of them."""
    said = [f"{name}: {on_cards(one, gpu, among=True)}" for name, one in zip(names, budgets, strict=True)]
    return [*said, f"{APART}, and where one fits, a second one only takes another batch."]


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
            f"With checkpointing an adapter keeps as much for the backward pass as full fine-tuning, {size(own)} and "
            f"{size(full)}: what it saves is gradients and optimizer states."
        )
    if own < 0.7 * full:
        return ""
    if found.step.method == "qlora":
        return ""
    share = percent(found.counts.adapter / (found.counts.total + found.counts.adapter))
    least = found.changed(rank=1)
    return (
        f"LoRA trains {share} but keeps {size(own)} of activations for the backward pass, full fine-tuning "
        f"{size(full)}: "
        "a frozen layer passes gradients on too, and every adapted one keeps its input for the adapter, in its type. "
        f"The rank matters little (rank 1: {size(least.total_bytes)}); targets, tokens, checkpointing do."
    )


def qlora_against_lora(found: Budget) -> str:
    """What 4-bit weights save and what they do not; "" for other methods."""
    if found.step.method != "qlora":
        return ""
    lora = found.changed(method="lora")
    weights = found.sharding.on_card(lora.counts.total * (2.0 - found.frozen_each), 3)
    return (
        f"QLoRA saves {size(weights)} of LoRA's weights, nothing else. The activations are LoRA's at best: tables "
        "and norms upcast to fp32 make what passes between the layers fp32 too, and weights are unpacked to bf16 where "
        "they are used. So it can take more than LoRA where activations are most of it; the reserve is larger for that."
    )


@dataclass(frozen=True)
class Price:
    """What runs cost an hour on as many of one accelerator as they take, at a price of one."""

    card: Accelerator
    each: float

    def of(self, found: Budget) -> float | None:
        """None where no number of cards is enough."""
        n = least_cards(found, self.card)
        return None if n is None else n * self.each

    def text(self, found: Budget) -> str:
        """2 × 2.5 = 5.00, or –."""
        n = least_cards(found, self.card)
        return "–" if n is None else f"{n:,} × {self.each:g} = {n * self.each:,.2f}"

    @property
    def note(self) -> str:
        """What the number is of."""
        return (
            f"price: an hour of the least number of {self.card.cards} that hold it, at {self.each:g} each; "
            "–: no number of them does"
        )


def stored(budgets: Sequence[Budget], n: int) -> list[tuple[str, int, int]]:
    """(how n tuned variants are stored, bytes of one, bytes of all): full checkpoints, then each kind of adapter."""
    rows = storage(budgets, n)
    names = [", ".join(dict.fromkeys(one.step.method for one in row.budgets)) for row in rows]
    full = (f"{n:,} full checkpoints", rows[0].full_bytes // n, rows[0].full_bytes)
    return [
        full,
        *(
            (f"one base and {n:,} adapters, {name} r={row.budgets[0].step.rank}", row.file_bytes, row.adapter_bytes)
            for name, row in zip(names, rows, strict=True)
        ),
    ]


def cautions(budgets: Sequence[Budget]) -> list[str]:
    """What cannot be run as it is asked for, each once."""
    return list(dict.fromkeys(said for one in budgets for said in one.cautions))


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
