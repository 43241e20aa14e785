"""An `Evaluation` to one self-contained HTML page; imports no torch.

The page is `evaluation.html.j2`, rendered with autoescape: names and paths come from strangers' files.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from lowrank_probe import __version__, words
from lowrank_probe.columns import EVALUATION, FUNCTIONAL
from lowrank_probe.evaluation_figures import evaluation_specs, merit_word
from lowrank_probe.evaluation_runs import interval_word, rank_word
from lowrank_probe.evaluation_terminal import text_line, tolerance_line
from lowrank_probe.reports import (
    flat_facts,
    page_figure,
    page_side,
    page_table,
    page_template,
    plotly_js,
    run_line,
    versions_of,
)

if TYPE_CHECKING:
    from lowrank_probe.evaluation_runs import Evaluation

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "loss": (
        "What does a rank cost the model?",
        "A line is the loss with one layer type's update truncated to rank r and all else as tuned; the grey one has "
        "all of them truncated. In the green strip it is within the tolerance of the tuned model, the dashed line.",
    ),
    "ranks": (
        "What rank is enough?",
        "The smallest rank from which on the loss is within the tolerance of the tuned model's, and where it lies in "
        "95 % of resampled texts; an arrow: beyond the largest rank that was tried.",
    ),
    "leave_out": (
        "Which layer type is it that costs?",
        "A line has every type truncated but one: the further it lies below the grey line, the more of the loss is "
        "that type's.",
    ),
    "kl": (
        "How far are the outputs from the tuned model's?",
        "KL divergence sees changes that the loss averages away; a straight fall means that each doubling of the rank "
        "buys the same factor.",
    ),
}
FUNCTIONAL_MAIN: Final = tuple(FUNCTIONAL)
TABLE_MAIN: Final = (
    "group", "how", "rank", "n_matrices", "parameters", "loss", "excess", "excess_low", "excess_high", "kept_gain",
    "perplexity", "kl_nats",
)  # fmt: skip


def render(found: "Evaluation") -> str:
    """The report as one HTML page, plotly.js included: no file beside it, no network."""
    facts = found.facts
    figures = [page_figure(name, spec, READING[name], False) for name, spec in evaluation_specs(found).items()]
    named = found.table.assign(group=found.table["group"].where(found.table["group"] != "", found.table["how"]))
    return page_template("evaluation.html.j2").render(
        sides=[page_side(word, facts[word]) for word in ("base", "tuned")],
        headline=_headline(found),
        told=[merit_word(found), text_line(facts), tolerance_line(facts)],
        run=run_line(facts),
        notes=[str(note) for note in facts.get("notes") or ()],
        ends=[
            {"word": word, "loss": words.number(row["loss"]), "perplexity": words.number(row["perplexity"]),
             "kl": words.number(row["kl_nats"])} for word in ("base", "tuned") for row in [found.row(word)]
        ],
        cards=[_card(found, row) for row in found.functional.to_dict("records") if row["how"] != "leave out"],
        figures=figures,
        functional=page_table(found.functional, FUNCTIONAL, FUNCTIONAL_MAIN),
        states=page_table(named, EVALUATION, TABLE_MAIN),
        facts=list(flat_facts({key: value for key, value in facts.items() if key != "notes"})),
        version=versions_of(facts).get("lowrank_probe", __version__),
        plotly_js=plotly_js(),
    )  # fmt: skip


def _headline(found: "Evaluation") -> str:
    every = found.functional[found.functional["how"] == "all"].iloc[0]
    rank = rank_word(every["functional_rank"], every["largest_rank"])
    allowed, gain = found.facts["tolerance"], found.facts["gain"]
    share = f" ({words.number(100 * allowed / gain)} % of the {words.number(gain)} gained)" if gain > 0 else ""
    told = f"{words.number(allowed)}{share}"
    return f"All layer types together need rank {rank} to be within {told} of the tuned model's loss."


def _card(found: "Evaluation", row: Mapping[Any, Any]) -> dict[str, Any]:
    """One group: its functional rank, interval, and what rank 0 costs."""
    rows = found.table[(found.table["group"] == row["group"]) & (found.table["how"] == row["how"])]
    least = rows.iloc[0]
    reached = not pd.isna(row["functional_rank"])
    scale = math.log2(1 + max(1, int(row["largest_rank"])))
    ends = [row["largest_rank"] if pd.isna(row[end]) else row[end] for end in ("low", "high")]
    start, stop = (100 * math.log2(1 + int(end)) / scale for end in ends)
    return {
        "name": "all together" if row["how"] == "all" else row["group"],
        "n": words.count(int(row["n_matrices"]), "matrix", "matrices"),
        "rank": rank_word(row["functional_rank"], row["largest_rank"]),
        "interval": interval_word(row["low"], row["high"], row["largest_rank"]),
        "parameters": f"{int(row['parameters']):,}" if reached else "–",
        "largest": str(row["largest_rank"]), "start": start, "width": max(stop - start, 1.5),
        "least": f"rank {least['rank']}", "costs": words.number(float(least["excess"])),
    }  # fmt: skip
