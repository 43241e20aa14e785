"""What a budget means for hardware: cards by stage, the largest batch and sequence, what switches would save, storage.

All of it asks `Budget` again under other conditions; nothing here knows a formula.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lowrank_probe.accelerators import Accelerator, accelerators, find_accelerator
from lowrank_probe.budget_measured import beside, measured_total
from lowrank_probe.budgets import SCHEMA_VERSION, Budget

if TYPE_CHECKING:
    from lowrank_probe.training_steps import Measured

MOST_CARDS: Final = 65536
MOST_SEQUENCES: Final = 2**20
MOST_TOKENS: Final = 2**24


def cards_by_stage(found: Budget, gpu: Accelerator) -> dict[int, int | None]:
    """Stage → the least number of cards on each of which it fits; None where no number of them is enough.

    1 for every stage where one card holds it. Stage 0 (DDP) never gets below what one card needs. None too for a card
    that cannot run it.
    """
    if not found.runs_on(gpu):
        return dict.fromkeys(range(4))
    if found.over(1, 0).fits(gpu):
        return dict.fromkeys(range(4), 1)
    stages: dict[int, int | None] = {0: None}
    for stage in (1, 2, 3):
        stages[stage] = _cards(found, gpu, stage)
    return stages


def largest(found: Budget, what: str, gpu: Accelerator) -> int | None:
    """The largest batch ("batch") or sequence ("seq") that fits on the card; None where 1 does not, or nothing runs.

    A sequence has at most as many tokens as the model has positions. Needs a budget that knows its activations.
    """
    if not found.runs_on(gpu):
        return None
    most = MOST_SEQUENCES if what == "batch" else found.positions or MOST_TOKENS
    return _most(most, gpu.usable_bytes, partial(found.total_at, what))


def smallest_card(found: Budget) -> Accelerator | None:
    """The smallest of the common GPUs that holds it alone."""
    cards = [one for one in accelerators() if one.common and one.vendor in ("NVIDIA", "AMD") and found.fits(one)]
    return min(cards, key=lambda one: one.usable_bytes, default=None)


@dataclass(frozen=True)
class Mend:
    """One switch and the bytes that a card would need with it."""

    name: str
    option: str
    total_bytes: int
    saved_bytes: int


def mends(found: Budget, gpu: Accelerator | None = None) -> tuple[Mend, ...]:
    """What each switch that is still off would save at this run's peak, the largest first; only what `gpu` runs."""
    step = found.step
    tried: list[tuple[str, str, dict[str, Any]]] = []
    if found.knows_activations:
        if not step.checkpointing:
            tried.append(("checkpointing (about a third more time)", "--checkpointing", {"checkpointing": True}))
        if not step.chunked_loss:
            tried.append(("chunked loss", "--loss chunked", {"chunked_loss": True}))
        if not step.flash:
            tried.append(("fused attention", "--flash", {"flash": True}))
        assert step.seq is not None
        if step.seq > 1:
            tried.append(("half the sequence length", f"--seq {step.seq // 2}", {"seq": step.seq // 2}))
        if step.batch > 1:
            tried.append(
                ("half the batch, accumulated twice", f"--batch {step.batch // 2}", {"batch": step.batch // 2})
            )
    if step.precision == "fp32" and step.method != "qlora":
        fused = " and fused attention" if found.unfused else ""
        tried.append((f"bf16 in place of fp32{fused}", "--precision bf16", {"precision": "bf16"}))
        tried.append((f"mixed precision{fused}", "--precision mixed", {"precision": "mixed"}))
    if step.optimizer.startswith("adamw") and step.optimizer != "adamw-8bit":
        tried.append(("8-bit Adam", "--optimizer adamw-8bit", {"optimizer": "adamw-8bit"}))
    if step.optimizer == "adamw-foreach":
        tried.append(("fused Adam", "--optimizer adamw", {"optimizer": "adamw"}))
    if step.method == "qlora" and not step.double_quant:
        tried.append(("double quantization", "--double-quant", {"double_quant": True}))
    if step.method != "full" and step.adapter_dtype == "float32":
        tried.append(("adapter in bf16", "--dtype bfloat16", {"adapter_dtype": "bfloat16"}))
    if step.method != "full" and step.rank > 1:
        tried.append(("half the rank", f"--rank {step.rank // 2}", {"rank": step.rank // 2}))
    if step.method in ("lora", "rslora"):
        # --method qlora alone turns checkpointing on: where the run has none, the option says so too.
        on = " --checkpointing" if found.knows_activations and not step.checkpointing else ""
        name = f"4-bit base (QLoRA){' with checkpointing' if on else ''}"
        tried.append((name, f"--method qlora{on}", {"method": "qlora", "checkpointing": True}))
    made = []
    for name, option, change in tried:
        changed = found.changed(**change)
        total = changed.total_bytes
        if total < found.total_bytes and (gpu is None or changed.runs_on(gpu)):
            made.append(Mend(name, option, total, found.total_bytes - total))
    return tuple(sorted(made, key=lambda one: -one.saved_bytes))


@dataclass(frozen=True)
class Stored:
    """What n tuned variants take: full_bytes as full checkpoints, adapter_bytes as one base and n adapters.

    budgets: the runs whose adapter has this file of file_bytes; other batches, lengths and bases do not change it.
    """

    budgets: tuple[Budget, ...]
    file_bytes: int
    full_bytes: int
    adapter_bytes: int


def storage(budgets: Sequence[Budget], n: int) -> list[Stored]:
    """One a kind of adapter, as the runs come; of LoRA where all of them are full fine-tunes."""
    kinds: dict[tuple[int, int], list[Budget]] = {}
    for one in [one for one in budgets if one.counts.adapter] or [budgets[0].changed(method="lora")]:
        kinds.setdefault((one.step.rank, one.adapter_file_bytes), []).append(one)
    return [
        Stored(tuple(found), size, n * found[0].checkpoint_bytes, found[0].checkpoint_bytes + n * size)
        for (_, size), found in kinds.items()
    ]


def told(
    budgets: Sequence[Budget], gpu: Accelerator | None, price: float | None, n_stored: int | None,
    measured: "Measured | None", priced: Accelerator | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything as one JSON object. priced: the card that the price is of; that of `gpu`, or an H100."""
    first, priced = budgets[0], priced or gpu or find_accelerator("H100")
    shape = first.shape
    cards = [gpu] if gpu else [one for one in accelerators() if one.common]
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": first.name, "source": shape.source, "model_type": shape.model_type,
            "n_parameters": first.counts.total, **counted(first), "notes": list(shape.notes),
        },
        "budgets": [_told_one(one, cards, price, gpu, priced) for one in budgets],
        "price": None if price is None else {"card": priced.name, "one_card_an_hour": price},
        "gpu": None if gpu is None else {
            "name": gpu.name, "nominal_gb": gpu.nominal_gb, "usable_bytes": gpu.usable_bytes, "bf16": gpu.bf16,
            "bitsandbytes": gpu.bitsandbytes, "usable_from": gpu.usable_from,
            "fits": [one.fits(gpu) for one in budgets],
        },
    }  # fmt: skip
    if n_stored is not None:
        rows = storage(budgets, n_stored)
        found["storage"] = {
            "n": n_stored, "full_bytes": rows[0].full_bytes,
            "adapters": [
                {"methods": list(dict.fromkeys(one.step.method for one in row.budgets)),
                 "rank": row.budgets[0].step.rank, "file_bytes": row.file_bytes, "adapter_bytes": row.adapter_bytes}
                for row in rows
            ],
        }  # fmt: skip
    if measured is not None:
        told = {"beside_formula": beside(first, measured), "total_bytes": measured_total(measured)}
        found["measured"] = asdict(measured) | told
    return found


def counted(found: Budget) -> dict[str, Any]:
    """Parameters by layer type, and those that one token meets; of a size, only those of the model it stands for."""
    shape = found.shape
    told = {"n_active": shape.n_active, "by_type": shape.by_type()}
    if found.n_parameters is None:
        return {**told, "typical": None}
    return {**dict.fromkeys(told), "typical": {"n_parameters": shape.n_parameters, **told}}


def _told_one(
    found: Budget, cards: Sequence[Accelerator], price: float | None, gpu: Accelerator | None, priced: Accelerator
) -> dict[str, Any]:
    rows = []
    for card in cards:
        stages = cards_by_stage(found, card)
        row: dict[str, Any] = {"name": card.name, "usable_bytes": card.usable_bytes, "fits": found.fits(card)}
        row |= {"bf16": card.bf16, "runs": found.runs_on(card)}
        row["cards_by_stage"] = {str(stage): n for stage, n in stages.items()}
        if found.knows_activations:
            row |= {f"largest_{what}": largest(found, what, card) for what in ("batch", "seq")}
        if price is not None:
            n = least_cards(found, card)
            row["price_per_hour"] = None if n is None else n * price
        rows.append(row)
    saved = [
        {"option": m.option, "saved_bytes": m.saved_bytes, "total_bytes": m.total_bytes} for m in mends(found, gpu)
    ]
    told = found.as_dict() | {"cards": rows, "mends": saved}
    if price is not None:
        n = least_cards(found, priced)
        told |= {"n_cards_priced": n, "price_per_hour": None if n is None else n * price}
    return told


def least_cards(found: Budget, card: Accelerator) -> int | None:
    """The cards that a run takes: as many as it has where it fits on them, else the least of any stage."""
    if found.fits(card):
        return found.sharding.gpus
    return min((n for n in cards_by_stage(found, card).values() if n is not None), default=None)


def _most(last: int, room: int, size: Callable[[int], int]) -> int | None:
    """The largest n in 1 … last of which the size, which grows with n, is at most `room`; None where there is none.

    Doubles n, then interpolates: a size that is linear in n takes a few calls.
    """
    low, low_size = 1, size(1)
    if low_size > room:
        return None
    high, high_size = low, low_size
    while high_size <= room:
        low, low_size = high, high_size
        if low == last:
            return last
        high = min(2 * high, last)
        high_size = size(high)
    while high - low > 1:
        guess = low + (room - low_size) * (high - low) // (high_size - low_size)
        middle = min(max(guess, low + 1), high - 1)
        found = size(middle)
        if found <= room:
            low, low_size = middle, found
            if low + 1 < high and (found := size(low + 1)) > room:  # the guess was right
                return low
        else:
            high, high_size = middle, found
    return low


def _cards(found: Budget, gpu: Accelerator, stage: int) -> int | None:
    """The least n ≥ 2 with a + b/n bytes at most the card's in every phase; None above `MOST_CARDS`."""
    n = 2
    for a, b in found.stage_lines[stage]:
        room = gpu.usable_bytes - a
        if room <= 0:
            return None
        n = max(n, math.ceil(b / room))
    if not found.over(n, stage).fits(gpu):  # by the rounding to bytes
        n += 1
    return n if n <= MOST_CARDS else None
