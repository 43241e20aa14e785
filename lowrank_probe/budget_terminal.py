"""Budgets for a terminal: the comparison of methods, one run in full, a sweep. Formatting only."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from lowrank_probe import budget_words as words
from lowrank_probe.accelerators import Accelerator, accelerators, find_accelerator
from lowrank_probe.budget_components import CONTEXT, FRAGMENTATION, QLORA_FRAGMENTATION
from lowrank_probe.budget_fits import cards_by_stage, largest, least_cards, mends, smallest_card
from lowrank_probe.budget_measured import beside, measured_total
from lowrank_probe.console import console, plain_table
from lowrank_probe.errors import printable

if TYPE_CHECKING:
    from lowrank_probe.budgets import Budget
    from lowrank_probe.training_steps import Measured


def print_comparison(budgets: Sequence["Budget"], gpu: Accelerator | None, price: float | None = None) -> None:
    """One line a method: bytes a parameter by component with its recipe, GB and GiB, adapter file, what holds it."""
    out, first = console(), budgets[-1]
    _print_model(out, first)
    known = first.knows_activations
    card, unit = gpu or find_accelerator("H100"), words.unit_of(budgets)
    priced = None if price is None else words.Price(card, price)
    table = plain_table()
    left = ("method and recipe", "bytes a parameter", "one card")
    counted = card.plural if len(card.plural) <= 6 else "cards"  # a line has room for no more
    heads = ["method and recipe", "bytes a parameter", unit.decimal, unit.binary, "adapter", "one card", counted]
    for head in (*heads, *(("price",) if priced else ())):
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    for one in budgets:
        size, small = one.total_bytes if known else one.state_bytes, smallest_card(one)
        file = words.file_size(one.adapter_file_bytes) if one.counts.adapter else "–"
        table.add_row(one.label, one.bytes_each, unit.decimal_text(size), unit.text(size), file,
                      words.card(one, small, bool(priced)) if small else "none", _count(cards_by_stage(one, card)[3]),
                      *((_price(priced.of(one)),) if priced else ()))  # fmt: skip
    out.print(table)
    if known:
        out.print(
            f"{unit.decimal}, {unit.binary}: the peak of one card at {first.step.batch} × {first.step.seq:,} tokens, "
            "with a reserve (CUDA context, fragmentation). --method shows one of them by component and phase."
            f"{words.unlike_checkpointing(budgets)}",
            style="dim",
        )
    else:
        out.print(
            f"{unit.decimal}, {unit.binary}: weights, gradients and optimizer states. Not in it: activations and "
            "logits, unknown without --seq and --batch, and a reserve, which the cards have beside them: "
            f"{CONTEXT // 2**20} MiB and {FRAGMENTATION:.0%} (QLoRA {QLORA_FRAGMENTATION:.0%}).".replace("%", " %"),
            style="dim",
        )
    out.print(
        "bytes a parameter: weights (+ fp32 master) + gradients + optimizer. one card: the smallest that holds it. "
        f"{counted}: how many {card.cards} hold it spread by ZeRO stage 3; with DDP each holds everything."
        f"{f' {priced.note}.' if priced else ''}"
        f"{words.bf16_note(budgets, [smallest_card(one) for one in budgets])}",
        style="dim",
    )
    _print_estimated(out, budgets)
    if gpu is not None:
        for said in words.on_cards_of_all(budgets, [one.label for one in budgets], gpu):
            out.print(said)


def print_budget(found: "Budget", gpu: Accelerator | None, explain: bool, price: float | None) -> None:
    """One run by component and phase, the cards it fits on, what each switch would save, and the answer in words."""
    out = console()
    _print_model(out, found)
    out.print(f"{_run(found)}; {found.recipe.name}, {found.bytes_each} B a parameter")
    table, unit = plain_table(), words.unit_of([found])
    table.add_column(f"{unit.binary} on one card", no_wrap=True)
    for phase in found.phases:
        mark = " ◂" if phase == found.peak_phase and found.knows_activations else ""
        table.add_column(phase + mark, justify="right", no_wrap=True)
    table.add_column("how" if not explain else "formula", overflow="fold")
    for one in found.components:
        how = one.formula if not explain else f"{one.formula}  [{one.source}]"
        table.add_row(one.name, *(unit.cell(one.at[phase]) for phase in found.phases), how,
                      end_section=one is found.components[-1])  # fmt: skip
    table.add_row("sum", *(unit.cell(found.phases[phase]) for phase in found.phases), "")
    out.print(table)
    if found.knows_activations:
        out.print(words.LEGEND, style="dim")
    out.print(words.peak(found))
    for told in (words.lora_against_full(found), words.qlora_against_lora(found)):
        if told:
            out.print(told)
    out.print(words.on_cards(found, gpu or find_accelerator("H100")))
    _print_cards(out, found, [gpu] if gpu else [one for one in accelerators() if one.common], price)
    _print_mends(out, found, gpu)
    out.print("; ".join(said for said in found.assumptions if said not in found.cautions), style="dim")
    for said in words.cautions([found]):
        out.print(f"note: {said}")


def print_sweep(budgets: Sequence["Budget"], gpu: Accelerator | None, price: float | None = None) -> None:
    """One line a method, rank and sequence length: parameters, share, file, peak, and whether it fits."""
    out = console()
    _print_model(out, budgets[0], adapter=False)
    table, unit = plain_table(), words.unit_of(budgets)
    priced = None if price is None else words.Price(gpu or find_accelerator("H100"), price)
    heads = ["method", "rank", "seq", "trainable", "% of all", "file", unit.decimal, unit.binary, "peaks in"]
    heads += ["one card", *(("fits" if priced else gpu.name,) if gpu else ())]
    heads += ["cards", "price"] if priced else []
    for head in heads:
        table.add_column(head, justify="left" if head in ("method", "peaks in", "one card") else "right", no_wrap=True)
    for one in budgets:
        counts, lora, small = one.counts, bool(one.counts.adapter), smallest_card(one)
        share = 100 * counts.trained / (counts.total + counts.adapter)
        table.add_row(
            one.step.method, str(one.step.rank) if lora else "–", f"{one.step.seq:,}" if one.step.seq else "–",
            f"{counts.trained:,}", f"{share:.4f}" if lora else "100",
            words.file_size(one.adapter_file_bytes or one.checkpoint_bytes), unit.decimal_text(one.total_bytes),
            unit.text(one.total_bytes), one.peak_phase, words.card(one, small, bool(priced)) if small else "none",
            *(("fits" if one.fits(gpu) else "no",) if gpu else ()),
            *((_count(least_cards(one, priced.card)), _price(priced.of(one))) if priced else ()),
        )  # fmt: skip
    out.print(table)
    known = budgets[0].knows_activations
    out.print(
        f"{unit.decimal}, {unit.binary}: on one card, "
        f"{'at the peak' if known else 'without activations (give --seq)'}, with the reserve. "
        f"file: of the adapter as PEFT saves it, or of the model.{words.unlike_checkpointing(budgets)}"
        f"{words.bf16_note(budgets, [smallest_card(one) for one in budgets])}{f' {priced.note}.' if priced else ''}",
        style="dim",
    )
    _print_estimated(out, budgets)


def print_storage(budgets: Sequence["Budget"], n: int) -> None:
    """What n tuned variants take as full checkpoints, and as one base with n adapters of each kind."""
    table, rows = plain_table(), words.stored(budgets, n)
    for head in (f"storage of {n:,} tuned variants", "one file", "all", "less by"):
        table.add_column(head, justify="left" if head.startswith("storage") else "right", no_wrap=True)
    for how, each, n_bytes in rows:
        less = f"{rows[0][2] / n_bytes:,.1f} ×" if how != rows[0][0] else "–"
        table.add_row(how, words.file_size(each), words.both(n_bytes), less)
    console().print(table)


def print_measured(found: "Budget", measured: "Measured", gpu: Accelerator | None) -> None:
    """Formula and measurement by component and phase, how far the sums are apart; or the measurement alone."""
    out, table, rows, unit = console(), plain_table(), beside(found, measured), words.unit(measured.peak)
    table.add_column(f"{unit.binary}, measured" if rows is None else f"{unit.binary}: formula, measured", no_wrap=True)
    for phase in measured.peaks:
        table.add_column(phase, justify="right", no_wrap=True)
    if rows is None:
        for name in dict.fromkeys(name for parts in measured.components.values() for name in parts):
            table.add_row(name, *(unit.cell(parts.get(name, 0)) for parts in measured.components.values()))
        table.add_row("sum", *map(unit.cell, measured.peaks.values()))
    else:
        for name, row in rows.items():
            table.add_row(name, *(f"{unit.cell(own)} {unit.cell(real):>6}" for own, real in row.values()))
        off = (f"{100 * (own / real - 1):+.2f} %" for own, real in rows["sum"].values())
        table.add_row("off by", *off)
    out.print(table)
    out.print(f"measured by {measured.how} in {measured.seconds:.0f} s; the reserve is not in it", style="dim")
    if rows is None:
        out.print(words.measured(measured_total(measured), measured.phase, gpu or find_accelerator("H100")))


def _print_model(out: Console, found: "Budget", adapter: bool = True) -> None:
    shape = found.shape
    name = f"{found.name}: " if found.name else ""
    out.print(printable(f"{name}{found.counts.total:,} parameters ({shape.source})"))
    for note in shape.notes:
        out.print(printable(note), style="dim")
    if found.n_parameters is None:
        by_type = " · ".join(f"{name} {n:,}" for name, n in shape.by_type().items())
        out.print(printable(by_type), style="dim")
        if shape.n_active != shape.n_parameters:
            out.print(f"{shape.n_active:,} of them meet a token (experts by their share, all else whole)", style="dim")
    if adapter and found.counts.adapter:
        targets = found.step.targets if isinstance(found.step.targets, str) else ", ".join(found.step.targets)
        out.print(printable(f"adapter: rank {found.step.rank} on {targets}, {words.trained(found)}"))


def _run(found: "Budget") -> str:
    step = found.step
    size = f"{step.batch} × {step.seq:,} tokens a card" if step.seq else "batch and sequence not given"
    return f"{found.label}; {size}, {found.sharding.label}"


def _print_cards(out: Console, found: "Budget", cards: Sequence[Accelerator], price: float | None) -> None:
    table, known = plain_table(), found.knows_activations
    heads = ["card", "GiB to use", "one card", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
    heads += ["largest batch", "largest seq"] if known else []
    heads += ["price an hour"] if price is not None else []
    for head in heads:
        table.add_column(head, justify="left" if head == "card" else "right", no_wrap=True)
    for card in cards:
        stages = cards_by_stage(found, card)
        cells = [words.card(found, card), words.gib(card.usable_bytes) + ("*" if card.is_estimate else "")]
        fits = "fits" if found.fits(card) else "no" if found.runs_on(card) else "no‡"
        cells += [fits, *(_count(stages[stage]) for stage in (1, 2, 3))]
        if known:
            cells += [_count(largest(found, what, card)) for what in ("batch", "seq")]
        if price is not None:
            cells.append(words.Price(card, price).text(found))
        table.add_row(*cells)
    out.print(table)
    out.print(
        "ZeRO 1, 2, 3: the least number of cards at that stage."
        + (" largest: the other of batch and sequence as given." if known else "")
        + (" *: an estimate." if any(card.is_estimate for card in cards) else "")
        + words.bf16_note([found], cards)
        + ("" if all(map(found.runs_on, cards)) else " ‡: no kernels of bitsandbytes, which this run needs."),
        style="dim",
    )


def _print_mends(out: Console, found: "Budget", gpu: Accelerator | None) -> None:
    saved = mends(found, gpu)
    if not saved:
        return
    table, unit = plain_table(), words.unit_of([found])
    for head in ("what would save memory", "option", f"saves {unit.binary}", f"leaves {unit.binary}"):
        table.add_column(head, justify="right" if head.endswith(unit.binary) else "left", no_wrap=True)
    for one in saved:
        table.add_row(one.name, one.option, unit.cell(one.saved_bytes), unit.cell(one.total_bytes))
    out.print(table)


def _print_estimated(out: Console, budgets: Sequence["Budget"]) -> None:
    if said := words.estimated(budgets):
        out.print(printable(f"activations are an {said}"), style="dim")
    for said in words.cautions(budgets):
        out.print(f"note: {said}")


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _price(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"
