"""Budgets as one self-contained HTML page, and the tables behind it; imports no torch.

The page is `budget.html.j2`, rendered with autoescape: names and paths come from strangers' files.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from lowrank_probe import __version__
from lowrank_probe import budget_words as words
from lowrank_probe.accelerators import Accelerator, accelerators, find_accelerator
from lowrank_probe.budget_figures import MAX_BARS, PARTS, budget_specs, chosen
from lowrank_probe.budget_fits import cards_by_stage, counted, largest, least_cards, mends, smallest_card
from lowrank_probe.budget_measured import beside, measured_total
from lowrank_probe.budget_words import run_names
from lowrank_probe.budgets import Budget
from lowrank_probe.columns import BUDGET, BUDGET_CARDS, BUDGET_COMPONENTS
from lowrank_probe.reports import flat_facts, page_figure, page_table, page_template, plotly_js
from lowrank_probe.training_steps import Measured

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "bars": (
        "What does it need?",
        "A bar is one card's memory{when}. A dotted line is what a card, or a node of them, has for a "
        "process: a bar that ends left of a card's line fits on it; one that ends left of a node's fits there only "
        "where the training is spread.",
    ),
    "phases": (
        "Which phase peaks?",
        "Activations come in the forward pass and go in the backward pass, while gradients come; the tallest decides.",
    ),
    "ranks": (
        "What does a rank cost?",
        "Parameters and file are proportional to the rank. The memory of training is nearly flat: it is the frozen "
        "weights and the activations that take it.",
    ),
    "seqs": (
        "What does a longer sequence cost?",
        "Activations and logits grow with every token. Where a line crosses a card's, that card is full.",
    ),
}
COMPONENTS_MAIN: Final = (
    "component", "run", "forward_gib", "loss_gib", "backward_gib", "step_gib", "states_gib", "formula",
)  # fmt: skip
RUNS_MAIN: Final = (
    "run", "n_trainable", "trainable_share", "bytes_per_frozen", "bytes_per_trained", "state_bytes", "peak_phase",
    "total_gib", "total_gb", "adapter_file_bytes", "smallest_card", "n_cards_priced", "price_per_hour",
)  # fmt: skip
MAX_CARDS: Final = 12  # runs that have a card on the page
MAX_SAID: Final = 8  # runs of which the answer is a sentence too; the table has them all


def runs_table(budgets: Sequence[Budget], price: words.Price | None = None) -> pd.DataFrame:
    """One row a run, columns as `columns.BUDGET`; without a price not those of it."""
    rows = []
    for name, one in zip(run_names(budgets), budgets, strict=True):
        counts, step, small = one.counts, one.step, smallest_card(one)
        rows.append({
            "run": name, "method": step.method, "recipe": one.recipe.name,
            "rank": step.rank if counts.adapter else None, "batch": step.batch, "seq": step.seq,
            "n_parameters": counts.total, "n_trainable": counts.trained,
            "trainable_share": counts.trained / (counts.total + counts.adapter),
            "bytes_per_trained": one.recipe.total - one.recipe.optimizer + one.optimizer_each,
            "bytes_per_frozen": one.frozen_each, "state_bytes": one.state_bytes, "peak_phase": one.peak_phase,
            "total_bytes": one.total_bytes, "total_gib": one.total_bytes / 2**30, "total_gb": one.total_bytes / 1e9,
            "adapter_file_bytes": one.adapter_file_bytes or None,
            "smallest_card": words.card(one, small) if small else "",
            "source": one.recipe.source,
        })  # fmt: skip
        if price is not None:
            rows[-1]["priced_card"] = price.card.label
            rows[-1]["n_cards_priced"] = least_cards(one, price.card)
            rows[-1]["price_per_hour"] = price.of(one)
    whole = ("rank", "seq", "adapter_file_bytes", "n_cards_priced")
    table = pd.DataFrame(rows, columns=list(BUDGET)).astype(dict.fromkeys(whole, "Int64"))
    if price is not None:
        return table.astype({"price_per_hour": "float64"})
    return table.drop(columns=["priced_card", "n_cards_priced", "price_per_hour"])


def components_table(budgets: Sequence[Budget]) -> pd.DataFrame:
    """One row a run and component, columns as `columns.BUDGET_COMPONENTS`."""
    rows = [
        {"component": part.name, "run": name, "formula": part.formula, "source": part.source}
        | {f"{phase}_gib": n_bytes / 2**30 for phase, n_bytes in part.at.items()}
        for name, one in zip(run_names(budgets), budgets, strict=True)
        for part in one.components
    ]
    return pd.DataFrame(rows, columns=list(BUDGET_COMPONENTS)).dropna(axis="columns", how="all")


def cards_table(budgets: Sequence[Budget]) -> pd.DataFrame:
    """One row a run and accelerator, columns as `columns.BUDGET_CARDS`."""
    rows = []
    for name, one in zip(run_names(budgets), budgets, strict=True):
        for card in accelerators():
            stages = cards_by_stage(one, card)
            row = {"card": words.card(one, card), "run": name, "usable_gib": card.usable_bytes / 2**30}
            row |= {"bf16": card.bf16, "runs": one.runs_on(card), "fits": one.fits(card)}
            row |= {"usable_from": card.usable_from} | {f"stage_{stage}": stages[stage] for stage in (1, 2, 3)}
            if one.knows_activations and card.common:
                row |= {f"largest_{what}": largest(one, what, card) for what in ("batch", "seq")}
            rows.append(row)
    table = pd.DataFrame(rows, columns=list(BUDGET_CARDS)).dropna(axis="columns", how="all")
    whole = [name for name in table.columns if name.startswith(("stage_", "largest_"))]
    return table.astype(dict.fromkeys(whole, "Int64"))


def render(
    budgets: Sequence[Budget], n_stored: int | None = None, measured: Measured | None = None,
    facts: Mapping[str, Any] | None = None, price: words.Price | None = None,
) -> str:  # fmt: skip
    """The report as one HTML page, plotly.js included: no file beside it, no network.

    measured: one step of the first run. facts: versions and time, for the page's foot.
    """
    first, h100 = budgets[0], find_accelerator("H100")
    names, several = run_names(budgets), len(budgets) > 1
    tables = {
        "runs": (runs_table(budgets, price), BUDGET, RUNS_MAIN),
        "components": (components_table(budgets), BUDGET_COMPONENTS, COMPONENTS_MAIN),
        "cards": (cards_table(budgets), BUDGET_CARDS, tuple(BUDGET_CARDS)),
    }
    shape = first.shape
    shown = {
        "model": {"source": shape.source, "model_type": shape.model_type, "n_parameters": first.counts.total,
                  **{key: value for key, value in counted(first).items() if value is not None}},
        **(facts or {}),
    }  # fmt: skip
    sentences = [] if several else [words.peak(first)]
    for why in (words.lora_against_full, words.qlora_against_lora):
        said = [f"{name}: {text}" if several else text for name, one in zip(names, budgets, strict=True)
                if (text := why(one))]  # fmt: skip
        sentences += said[:1]
    when = " at the run's peak" if first.knows_activations else ", without activations and logits, which are unknown"
    reading = READING | {"bars": (READING["bars"][0], READING["bars"][1].format(when=when))}
    for name in ("bars", "phases"):
        reading[name] = (reading[name][0], " ".join(filter(None, [reading[name][1], _left_out(budgets, MAX_BARS)])))
    picked = [(names[i], budgets[i]) for i in chosen(budgets, MAX_CARDS)]
    unit = words.unit_of(budgets)
    return page_template("budget.html.j2").render(
        title=first.name or f"{first.counts.total:,} parameters",
        source=f"{first.counts.total:,} parameters, from {shape.source}", headline=_headline(budgets, names),
        assumptions=[*shape.notes, *_assumptions(budgets, names)],
        parts=[{"word": word, "colour": colour} for word, colour in PARTS.items()
               if any(part.name == word for one in budgets for part in one.components)],
        runs=[_run(name, one, price) for name, one in picked], left_out=_left_out(budgets, MAX_CARDS),
        known=first.knows_activations, legend=words.LEGEND, sentences=sentences, no_bf16=words.NO_BF16,
        on_cards=_on_cards(budgets, names, h100), priced=f"P{price.note[1:]}" if price else "",
        figures=[page_figure(name, found, reading[name], False) for name, found in budget_specs(budgets).items()],
        mends=[{"run": name, "rows": _mends(one, unit)} for name, one in picked], unit=unit.binary,
        n_stored=n_stored, stored=[] if n_stored is None else [
            {"how": how, "each": words.file_size(each), "all": words.both(all_of)}
            for how, each, all_of in words.stored(budgets, n_stored)
        ],
        measured=_measured(first, measured, h100), facts=list(flat_facts(shown)), version=__version__,
        plotly_js=plotly_js(),
        **{f"{key}_table": page_table(*of) for key, of in tables.items()},
    )  # fmt: skip


def _left_out(budgets: Sequence[Budget], most: int) -> str:
    """Which runs of many are shown, and where the others are; "" where all are."""
    if len(budgets) <= most:
        return ""
    n_full = sum(one.step.method == "full" for one in budgets)
    full = "every full fine-tune, and others from everywhere" if 0 < n_full <= most else "from everywhere"
    return (
        f"{most} of the {len(budgets)} runs are shown here, {full}; the table “Runs” and budgets.csv have all, and "
        "fewer ranks, lengths or methods show each."
    )


def _on_cards(budgets: Sequence[Budget], names: Sequence[str], card: Accelerator) -> list[str]:
    """The answer in sentences: of one run, of each of a few, or where it is of many."""
    if len(budgets) == 1:
        return [words.on_cards(budgets[0], card)]
    if len(budgets) <= MAX_SAID:
        return words.on_cards_of_all(budgets, names, card)
    return [f"The table has the answer of each of the {len(budgets)} runs. {words.APART}."]


def _headline(budgets: Sequence[Budget], names: Sequence[str]) -> str:
    """From the least to the most, in a sentence."""
    if len(budgets) == 1:
        return f"{names[0]}: {words.both(budgets[0].total_bytes)} on one card."
    low, high = (pick(range(len(budgets)), key=lambda i: budgets[i].total_bytes) for pick in (min, max))
    return (
        f"From {words.both(budgets[low].total_bytes)} on one card with {names[low]} to "
        f"{words.both(budgets[high].total_bytes)} with {names[high]}."
    )


def _assumptions(budgets: Sequence[Budget], names: Sequence[str]) -> list[str]:
    """What the numbers take for granted; before a sentence that is of one run only, which one."""
    of: dict[str, list[str]] = {}
    for name, one in zip(names, budgets, strict=True):
        for said in one.assumptions:
            of.setdefault(said, []).append(name)
    return [f"{runs[0]}: {said}" if len(runs) == 1 < len(budgets) else said for said, runs in of.items()]


def _run(name: str, one: Budget, price: words.Price | None) -> dict[str, Any]:
    """One run for the page: its numbers, and the parts of its peak as a bar."""
    bar, start, total = [], 0.0, one.total_bytes
    for part in one.components:
        share = 100 * part.at[one.peak_phase] / total
        bar.append({"start": start, "width": share, "colour": PARTS[part.name]})
        start += share
    said = ", ".join(f"{part.name} {words.size(n)}" for part in one.components if (n := part.at[one.peak_phase]))
    small = smallest_card(one)
    return {
        "name": name, "total": words.both(total), "phase": words.PHASE_WORDS[one.peak_phase], "bar": bar, "said": said,
        "each": one.bytes_each, "recipe": one.recipe.name, "source": one.recipe.source,
        "trained": f"{one.counts.trained:,}", "states": words.decimal(one.state_bytes),
        "file": words.file_size(one.adapter_file_bytes) if one.counts.adapter else "–",
        "card": words.card(one, small) if small else "none", "price": price.text(one) if price else "",
    }  # fmt: skip


def _measured(first: Budget, measured: Measured | None, card: Accelerator) -> dict[str, Any] | None:
    """The measured step for the page: a row a part with both numbers of each phase, how far the sums are apart."""
    if measured is None:
        return None
    found, phases, unit = beside(first, measured), list(measured.peaks), words.unit(measured.peak)
    own = found or {}
    if found is None:
        names = dict.fromkeys(name for parts in measured.components.values() for name in parts)
        rows = [[name, *(unit.cell(measured.components[phase].get(name, 0)) for phase in phases)] for name in names]
        rows.append(["sum", *(unit.cell(measured.peaks[phase]) for phase in phases)])
    else:
        rows = [
            [name, *(cell for phase in phases for cell in map(unit.cell, row[phase]))] for name, row in found.items()
        ]
    off = [f"{phase} {100 * (a / b - 1):+.2f} %" for phase, (a, b) in own.get("sum", {}).items()]
    seq = f"{measured.batch} × {measured.seq:,} tokens" if measured.seq else "one step"
    return {
        "phases": phases, "unit": unit.binary, "both": found is not None, "rows": rows, "off": ", ".join(off),
        "how": f"{seq}, measured by {measured.how} in {measured.seconds:.0f} s; the reserve is not in it.",
        "said": "" if found else words.measured(measured_total(measured), measured.phase, card),
    }  # fmt: skip


def _mends(one: Budget, unit: words.Unit) -> list[dict[str, str]]:
    return [
        {
            "name": mend.name,
            "option": mend.option,
            "saved": unit.text(mend.saved_bytes),
            "left": unit.text(mend.total_bytes),
        }
        for mend in mends(one)
    ]
