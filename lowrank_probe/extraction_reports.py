"""An `Extraction` to one self-contained HTML page; imports no torch.

The page is `extraction.html.j2`, rendered with autoescape: names and paths come from strangers' files.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from lowrank_probe import __version__, words
from lowrank_probe.check_tables import calibration_table, verification_table
from lowrank_probe.columns import EXTRACTION, EXTRACTION_SUMMARY
from lowrank_probe.extraction_figures import PARTS, extraction_specs
from lowrank_probe.extraction_summary import extraction_totals
from lowrank_probe.model_card import command, model_name, percent
from lowrank_probe.reports import (
    flat_facts,
    page_figure,
    page_side,
    page_table,
    page_template,
    plotly_js,
    prepare_page,
    run_line,
    versions_of,
)

if TYPE_CHECKING:
    from lowrank_probe.extraction_runs import Extraction

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "error": (
        "What does a rank cost?",
        "A line is ‖ΔW − BA‖/‖ΔW‖ of a layer type at rank r, or at its matrices' own largest rank; the area below it, "
        "seldom wide enough to be seen, ends where no matrices of that rank can be. Where a line is flat, a higher "
        "rank buys little.",
    ),
    "allotment": (
        "Who got which rank?",
        "Each cell is one layer and type; choose whether it shows the rank or the share of ‖ΔW‖² that this rank keeps.",
    ),
    "where": (
        "Where does ‖ΔW‖² go?",
        "The orange part is what a higher rank would add, the grey part what no rank adds: tensors that the adapter "
        "leaves as they are in the base.",
    ),
}
WIDE: Final = ("allotment",)  # scrolls sideways on a phone
TYPES_MAIN: Final = (
    "layer_type", "adapter", "n_adapted", "rank_low", "rank_high", "parameters", "energy", "relative_error",
    "optimal_error_low", "share", "carried", "carried_whole", "truncated", "not_carried",
)  # fmt: skip
LEDGER_MAIN: Final = (
    "name", "adapter", "status", "layer_type", "layer", "rank", "rule", "share", "energy", "relative_error",
    "optimal_error_low", "optimal_error_high", "note",
)  # fmt: skip


def prepare() -> None:
    """As `reports.prepare`."""
    prepare_page("extraction.html.j2", "lowrank_probe.extraction_terminal")


def render(found: "Extraction") -> str:
    """The report as one HTML page, plotly.js included: no file beside it, no network."""
    facts = found.facts
    totals = {row["adapter"]: row for row in extraction_totals(found.ledger).to_dict("records")}
    adapters = [_adapter(found, label, totals[label]) for label in found.adapters]
    figures = [page_figure(name, spec, READING[name], name in WIDE) for name, spec in extraction_specs(found).items()]
    several = len(adapters) > 1
    types, ledger = ([name for name in main if several or name != "adapter"] for main in (TYPES_MAIN, LEDGER_MAIN))
    return page_template("extraction.html.j2").render(
        sides=[page_side(word, facts[word]) | {"name": model_name(facts[word]["path"])} for word in ("base", "tuned")],
        headline=_headline(adapters),
        asked=command(facts, "…"),
        run=run_line(facts),
        notes=[str(note) for note in facts.get("notes") or ()],
        parts=[{"word": word, "colour": colour} for word, colour in PARTS.values()],
        adapters=adapters,
        figures=figures,
        checks=list(_checks(found)),
        types=page_table(found.summary, EXTRACTION_SUMMARY, tuple(types)),
        ledger=page_table(found.ledger, EXTRACTION, tuple(ledger)),
        facts=list(flat_facts(_listed(facts))),
        version=versions_of(facts).get("lowrank_probe", __version__),
        plotly_js=plotly_js() if figures else "",
    )


def _checks(found: "Extraction") -> Iterator[dict[str, Any]]:
    """What was tried with a calibration text and what a verification found, a table each."""
    if told := found.facts.get("calibration"):
        made = calibration_table(told)
        yield {
            "name": "calibration", "title": "Which weighting is nearest to the fine-tune?", "table": made,
            "lead": "Every way was tried at the same ranks, or under the same budget. The plain SVD stays unless a "
            'gain in "to choose by" is beyond chance: its whole 95 % interval, over resampled documents, is below 0. '
            'Of those the one with the least distance was taken. "to report" is other text, which decided nothing.',
            "notes": (),
        }  # fmt: skip
    for label, told in (found.facts.get("verification") or {}).items():
        yield {
            "name": f"verification{'-' + label if label else ''}", "table": verification_table(told),
            "title": f"Base + adapter against the fine-tune{', ' + label if label else ''}",
            "lead": "By their weights, as the models were not run." if told["measure"] == "weights"
            else f"Through PEFT, on text, by their {told['measure']}.",
            "notes": [*told["problems"], *told["notes"]],
        }  # fmt: skip


def _listed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without those that have tables of their own."""
    listed = {key: value for key, value in facts.items() if key != "verification"}
    if "calibration" in facts:
        tables = ("tried", "base")
        listed["calibration"] = {key: value for key, value in facts["calibration"].items() if key not in tables}
    return listed


def _adapter(found: "Extraction", label: str, total: dict[Any, Any]) -> dict[str, Any]:
    """One adapter for the page: its numbers, and where ‖ΔW‖² goes as the parts of a bar."""
    told = found.facts["adapters"][label]
    bar, start, said = [], 0.0, []
    for part, (word, colour) in PARTS.items():
        share = float(total[part])
        bar.append({"start": 100 * start, "width": 100 * share, "colour": colour})
        start += share
        if share > 0:
            said.append(f"{percent(share)} {word}")
    return {
        "name": found.adapters[label].absolute().name, "size": words.file_size(told["n_bytes"]),
        "carried": percent(told["carried"]),
        "bar": bar, "said": ", ".join(said), "error": percent(total["relative_error"]),
        "optimum": percent(total["optimal_error_low"]), "parameters": f"{int(told['n_parameters']):,}",
        "rank": words.bracket(total["rank_low"], total["rank_high"]) if total["n_adapted"] else "–",
        "n": words.count(int(total["n_adapted"]), "matrix", "matrices"),
    }  # fmt: skip


def _headline(adapters: list[dict[str, Any]]) -> str:
    """What is carried, in a sentence."""
    if len(adapters) == 1:
        one = adapters[0]
        return f"Base and adapter carry {one['carried']} of ‖ΔW‖²: {one['n']} at rank {one['rank']}, {one['size']}."
    return "Carried of ‖ΔW‖²: " + ", ".join(f"{one['carried']} by {one['name']}" for one in adapters) + "."
