"""A `Training` to one self-contained HTML page; imports no torch.

The page is `training.html.j2`, rendered with autoescape: names and paths come from strangers' files.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from lowrank_probe import __version__, words
from lowrank_probe.columns import EQUAL_PARAMETERS, HYPOTHESIS, TRAINING
from lowrank_probe.evaluation_runs import interval_word, rank_word
from lowrank_probe.figure_style import Spec
from lowrank_probe.reports import (
    flat_facts,
    page_figure,
    page_table,
    page_template,
    plotly_js,
    run_line,
    versions_of,
)
from lowrank_probe.training_figures import training_specs
from lowrank_probe.training_words import model_word, recommendation_words, summary_words, tolerance_words

if TYPE_CHECKING:
    from lowrank_probe.training_runs import Training

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "loss": (
        "Is LoRA of rank r as good as full fine-tuning?",
        "A line is the held-out loss of LoRA on one group of layers, mean over seeds, with the range of the seeds "
        "around it; where it meets the dashed line and its band, an update of that rank on that group does the job.",
    ),
    "ranks": (
        "Do the three kinds of evidence agree?",
        "Trained: LoRA from that rank on is as good as full. Functional: the full run's update can be truncated to it. "
        "Spectral: it holds 90 % of ‖ΔW‖². Bars are 95 % intervals, for r90 the bracket of its true value; ▶: beyond "
        "the largest rank that was tried.",
    ),
    "parameters": (
        "Where are parameters best spent?",
        "The lower of two lines at the same number of parameters is the better place for them.",
    ),
    "curves": (
        "How did the runs learn?",
        "Held-out loss on the way, from the base's at step 0; dotted, the training loss of the same run: a held-out "
        "line that rises while its dotted one falls is overfitting. Click a name to hide it, twice to see it alone.",
    ),
    "search": (
        "Which learning rate?",
        "Held-out loss after a short run; the lowest point of a line is the rate that all runs of that method had.",
    ),
    "memory": (
        "Was the memory predicted?",
        "What `probe budget` says that the run allocates, beside torch.cuda.max_memory_allocated.",
    ),
    "subspaces": (
        "Do two adapters learn the same directions?",
        "φ(i, i) of the leading i directions on the output side, median over matrices: 1 is the same subspace, the "
        "dotted line of the same colour is what random subspaces have.",
    ),
    "amplification": (
        "Does the update amplify what the base already does?",
        "‖ΔW‖/‖UᵀWV‖ in the update's own directions, median over a type: above 1 the update outweighs what the base "
        "does in them.",
    ),
}
WIDE: Final = ("memory",)
MOST_NAMES: Final = 8  # in a legend, which of more leaves no room for the plot on a phone
# What is evident and what is missing is on the cards.
VERDICT_MAIN: Final = (
    "layer_type", "verdict", "decided_by", "trained_rank", "trained_low", "trained_high", "own_rank", "functional_rank",
    "functional_low", "functional_high", "r90_low", "r90_high", "break_even_rank",
)  # fmt: skip
RUNS_MAIN: Final = (
    "label", "lr", "n_trained", "loss", "excess", "lowest_loss", "diverged", "seconds", "tokens_per_s", "peak_bytes",
    "predicted_bytes", "health",
)  # fmt: skip


def render(found: "Training") -> str:
    """The report as one HTML page, plotly.js included: no file beside it, no network."""
    facts = found.facts
    figures = [
        page_figure(name, one, READING[name], name in WIDE or _n_names(one) > MOST_NAMES)
        for name, one in training_specs(found).items()
    ]
    return page_template("training.html.j2").render(
        model=model_word(found), path=facts["model"]["path"], headline=summary_words(found),
        run=run_line(facts), notes=[str(note) for note in facts.get("notes") or ()],
        cards=[_card(row) for row in found.verdict.to_dict("records")],
        recommendation=facts["recommendation"], recommended=recommendation_words(found),
        tolerance=tolerance_words(found),
        health=facts["health"], figures=figures,
        verdict=page_table(found.verdict, HYPOTHESIS, VERDICT_MAIN),
        runs=page_table(found.runs, TRAINING, RUNS_MAIN),
        equal=page_table(found.equal_parameters, EQUAL_PARAMETERS, tuple(EQUAL_PARAMETERS)),
        has_equal=len(found.equal_parameters) > 0,
        facts=list(flat_facts({k: v for k, v in facts.items() if k not in ("notes", "health", "recommendation")})),
        version=versions_of(facts).get("lowrank_probe", __version__), plotly_js=plotly_js(),
    )  # fmt: skip


def _n_names(spec: Spec) -> int:
    """Names in its legend."""
    return sum(one.get("showlegend", True) and one.get("visible", True) for one in spec["data"])


def _card(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One group: its verdict and what each kind of evidence says."""
    verdict, n = str(row["verdict"]), int(row["n_matrices"])
    style = "low-rank" if verdict.startswith("low-rank") else "not-low-rank" if verdict.startswith("not") else "unknown"
    parts = []
    for kind, title in (("trained", "trained rank"), ("functional", "functional rank")):
        largest = row[f"{kind}_largest"]
        if not pd.isna(largest):
            rank = rank_word(row[f"{kind}_rank"], largest)
            between = interval_word(row[f"{kind}_low"], row[f"{kind}_high"], largest)
            parts.append((title, rank if between == rank else f"{rank} ({between})"))
    if not pd.isna(row["r90_high"]):
        parts.append(("r90", words.bracket(row["r90_low"], row["r90_high"])))
    return {
        "name": row["layer_type"], "n": words.count(n, "matrix", "matrices") if n else "", "verdict": verdict,
        "style": style, "parts": parts, "decided_by": row["decided_by"], "missing": row["missing"],
        "evidence": row["evidence"],
    }  # fmt: skip
