"""A `Trajectory` to one self-contained HTML page beside those of its steps, which it links to; imports no torch.

The page is `trajectory.html.j2`, with page.css.j2 and page.js.j2, rendered with autoescape: labels and paths come from
strangers' files.
"""

from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from lowrank_probe import __version__, words
from lowrank_probe.reports import page_environment, plotly_js
from lowrank_probe.trajectory_figures import all_figures

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "relative_update": (
        "How large does the update get?",
        "The median ‖ΔW‖/‖W‖ of a layer type at each step: a line that still climbs is a type that still learns.",
    ),
    "r90": (
        "Does the update's rank grow?",
        "Each bar spans the possible values of r90, the rank that keeps 90 % of ‖ΔW‖² (median over a type); the dashed "
        "line is the r90 of noise of that shape, “?” undecidable in storage noise, and “–” that no such matrix moved.",
    ),
    "signal_rank": (
        "How many directions stand out of the storage noise?",
        "The median number of singular values above the noise edge: at least so many directions are real; in float32 "
        "that is nearly all of them, and a type that is missing is undecidable, or did not change.",
    ),
    "similarity": (
        "Do the steps move in the same directions?",
        "Each cell is the median φ(i, i) of two steps: 1 means the same i-dimensional subspace, and the value beside "
        "the type's name is what two random subspaces have; “?” marks pairs whose directions storage noise or a "
        "missing gap leaves open.",
    ),
    "grid": (
        "How many directions are shared?",
        "φ(i, j) of one matrix: a row that stays bright to the right means that A's first i directions lie inside B's "
        "first j, and the random control beside it is what such subspaces have when drawn at random; “?” as above.",
    ),
    "amplification": (
        "Does the update amplify what the base already does?",
        "The median of ‖ΔW‖/‖UᵀWV‖ over a type, in ΔW's own r directions: above 1 (dotted) the update outweighs what W "
        "does in them; a hollow point rests on directions that storage noise leaves open.",
    ),
}


def render(trajectory: "Trajectory") -> str:
    """The report as one HTML page, plotly.js included: no file beside it but the steps' own reports, no network."""
    figures = [
        {"name": name, "heading": READING[name][0], "sentence": READING[name][1], "json": Markup(figure.to_json())}
        for name, figure in all_figures(trajectory).items()
    ]
    facts = trajectory.facts
    paths = {step["label"]: step["path"] for step in facts["steps"]}
    steps = [
        {
            "label": label, "href": f"{quote(label)}/report.html", "path": paths[label],
            "n": len(result.table), "findings": [found["statement"] for found in result.facts.get("findings") or ()],
            "warnings": result.facts.get("warnings") or [],
        }
        for label, result in trajectory.results.items()
    ]  # fmt: skip
    return _template().render(
        base=PurePosixPath(facts["base"]["path"]).name, base_path=facts["base"]["path"], steps=steps, figures=figures,
        notes=facts.get("notes") or (),
        grid_matrix=facts.get("grid_matrix"), rows=trajectory.table.to_dict("records"), table7=_table7(trajectory),
        last=steps[-1]["label"], version=__version__, plotly_js=plotly_js() if figures else "",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = page_environment()
    environment.filters |= {"number": words.number, "rank": words.rank}
    environment.globals["bracket"] = words.bracket
    return environment.get_template("trajectory.html.j2")


def _table7(trajectory: "Trajectory") -> list[dict[str, Any]]:
    """Hu et al.'s Table 7 by layer type, for the last step at r = 4 and at the largest r."""
    table = trajectory.amplification_by_type
    table = table[table["step"] == list(trajectory.results)[-1]]
    return list(table[table["r"].isin({4, table["r"].max()})].to_dict("records"))
