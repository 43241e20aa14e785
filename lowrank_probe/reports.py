"""Tables, figures and run facts → one self-contained HTML page that works from file:// with no network.

The page is `report.html.j2`, with page.css.j2 and page.js.j2, rendered with autoescape: paths, tensor names and notes
come from strangers' files.
"""

import html
import importlib
import math
import os
import webbrowser
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import jinja2
import pandas as pd
from jinja2 import meta
from markupsafe import Markup

from lowrank_probe import __version__, words
from lowrank_probe.columns import LEDGER, TABLE, Column
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.extraction_runs import Extraction, extraction_directory
from lowrank_probe.figure_data import packed_spectra
from lowrank_probe.figure_spectra import opening, points_for
from lowrank_probe.figure_style import Spec
from lowrank_probe.figures import specs, write
from lowrank_probe.outputs import write_directory
from lowrank_probe.runs import Result, load
from lowrank_probe.strict_json import plain
from lowrank_probe.training_runs import Training
from lowrank_probe.verdicts import verdict_alone

# Figure name → heading, and the one sentence on how to read it.
READING: Final[dict[str, tuple[str, str]]] = {
    "heatmap": (
        "Where is the update low-rank?",
        "Each cell is one layer and type: blue means far fewer directions than noise of that shape would need, orange "
        "about as many, and a grey “?” that storage rounding leaves the number undecidable.",
    ),
    "bracket": (
        "What is the true r90, layer by layer?",
        "Each bar spans the possible values of r90, the rank that keeps 90 % of ‖ΔW‖²: well below the dashed line is "
        "low-rank, near it no more so than noise; “?” is undecidable.",
    ),
    "distribution": (
        "How do the layer types differ?",
        "A dot is one matrix and a box the middle half of its type: types whose boxes do not overlap really differ, "
        "and “?” says that some matrices were left out as undecidable.",
    ),
    "relative_update": (
        "How large is the update, layer by layer?",
        "A point is ‖ΔW‖ as a share of ‖W‖ (the median where a layer has several of a type): the fine-tune worked "
        "hardest where a line is high.",
    ),
    "energy_curves": (
        "How much of the update does rank r keep?",
        "A line is the median matrix of a type as stored (band: 10th to 90th percentile), its dashed twin noise of the "
        "same shape: the further the line runs above its twin, the more a LoRA of that rank can keep.",
    ),
    "singular_values": (
        "What does one spectrum look like?",
        "Read the blue line against the grey area, which storage rounding alone would fill: only singular values above "
        "the dotted line are told from rounding, and a straight steep fall there is a low-rank update, a shelf is not.",
    ),
}
WIDE: Final = ("heatmap", "bracket", "relative_update")  # scroll sideways on a phone

# A column of the page alone, beside the table's own.
ALONE: Final = Column("the verdict's rule on this matrix alone: low-rank, not low-rank, between or undecidable")

MAIN: Final = (
    "name", "layer_type", "layer", "rows", "cols", "verdict_alone", "relative_update", "stable_rank", "signal_rank",
    "r50_low", "r50_high", "r90", "r90_low", "r90_high", "null_r90", "relative_r90", "energy_16", "unchanged_fraction",
)  # fmt: skip
LEDGER_MAIN: Final = ("name", "status", "layer_type", "base_shape", "tuned_shape", "note")

# A column that is only as good as its flag: shown dimmed with "?" where the flag is false.
FLAGS: Final = {
    "signal_rank": "decidable_signal_rank",
    **dict.fromkeys(("r50", "relative_r50", "r50_denoised", "r50_low", "r50_high"), "decidable_r50"),
    **dict.fromkeys(("r90", "relative_r90", "r90_denoised", "r90_low", "r90_high"), "decidable_r90"),
}


def report(
    run_dir: str | os.PathLike[str], open_browser: bool = False, figures_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Render a run directory's report.html anew from its tables; returns the page's path.

    Of a trajectory also the steps' own, to which its page links; of an extraction that in its `probe/`.
    figures_dir: also write every figure there as SVG and PNG (needs kaleido and a Chromium).
    Raises `CheckpointError` where `run_dir` is no run directory, `OutputError` where a page cannot be written,
    `ProbeError` where the figures cannot be drawn.
    """
    from lowrank_probe import evaluation_reports, extraction_reports, training_reports, trajectory_reports
    from lowrank_probe.budget_runs import BudgetRun

    root = Path(run_dir).absolute()
    root = extraction_directory(root) or root
    found = load(root)
    if isinstance(found, Result):
        pages = {root: render(found)}
    elif isinstance(found, Extraction):
        pages = {root: extraction_reports.render(found)}
    elif isinstance(found, Evaluation):
        pages = {root: evaluation_reports.render(found)}
    elif isinstance(found, Training):
        pages = {root: training_reports.render(found)}
    elif isinstance(found, BudgetRun):
        pages = {root: found.page()}
    else:
        pages = {root / label: render(result) for label, result in found.results.items()}
        pages[root] = trajectory_reports.render(found)
    if figures_dir is not None:
        write(found, figures_dir)
    for directory, page in pages.items():
        write_directory(directory, {"report.html": partial(Path.write_text, data=page, encoding="utf-8")})
    path = root / "report.html"
    if open_browser:
        webbrowser.open(path.as_uri())
    return path


def prepare() -> None:
    """What the page and the terminal's table need once, so that it need not be done at the end (`devices.start`)."""
    prepare_page("report.html.j2", "lowrank_probe.terminal")


def prepare_page(name: str, *modules: str) -> None:
    """A page's template compiled, with what it includes, and modules imported, plotly and Parquet among them."""
    environment = page_template(name).environment
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, name)
    for part in meta.find_referenced_templates(environment.parse(source)):
        environment.get_template(str(part))
    for module in ("plotly.offline", "pyarrow.parquet", *modules):
        importlib.import_module(module)


def render(result: Result) -> str:
    """The report as one HTML page, plotly.js included: no file beside it, no network."""
    facts = result.facts
    cards = [_card(row) for row in result.summary.to_dict("records")]
    figures = [page_figure(name, spec, READING[name], name in WIDE) for name, spec in specs(result).items()]
    table = result.table.assign(verdict_alone=verdict_alone(result.table))
    drawn = result.table["name"].isin(result.singular_values.keys())
    return page_template("report.html.j2").render(
        sides=[
            page_side(word, facts.get(key)) for word, key in (("base", "base"), ("tuned", "tuned")) if facts.get(key)
        ],
        dtypes=_dtypes(result.table),
        run=run_line(facts),
        related=facts.get("related", True),
        cosine=facts.get("median_cosine"),
        interrupted=facts.get("status") == "interrupted",
        notes=[str(note) for note in facts.get("notes") or ()],
        headline=_headline(cards),
        findings=facts.get("findings") or (),
        cards=cards,
        figures=figures,
        n_matrices=len(result.table),
        n_tensors=len(result.ledger),
        matrices=page_table(table, {**TABLE, "verdict_alone": ALONE}, MAIN),
        spectra=packed_spectra(result, points_for(len(table))) if figures else None,
        first_spectrum=str(result.table[drawn].iloc[opening(result.table[drawn])]["name"]) if drawn.any() else None,
        ledger=page_table(result.ledger, LEDGER, LEDGER_MAIN),
        facts=list(flat_facts({key: value for key, value in facts.items() if key != "findings"})),
        version=versions_of(facts).get("lowrank_probe", __version__),
        plotly_js=plotly_js() if figures else "",
    )


def page_figure(name: str, spec: Spec, reading: tuple[str, str], wide: bool) -> dict[str, Any]:
    """One figure for the page, which has its own heading and turns the figure's menu into a <select>."""
    layout = {key: value for key, value in spec["layout"].items() if key not in ("title", "updatemenus")}
    layout["margin"] = layout["margin"] | {"t": 56 if layout["showlegend"] else 40}
    menu = spec["layout"].get("updatemenus", [{"buttons": [], "active": 0}])[0]
    return {
        "name": name, "heading": reading[0], "sentence": reading[1], "height": layout["height"],
        "wide": wide, "active": menu["active"],
        "labels": [html.unescape(button["label"]) for button in menu["buttons"]],
        "spec": {"data": spec["data"], "layout": layout, "buttons": [button["args"] for button in menu["buttons"]]},
    }  # fmt: skip


def page_environment() -> jinja2.Environment:
    """The templates beside this module, with autoescape: paths, names and notes come from strangers' files."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip


@lru_cache
def page_template(name: str) -> jinja2.Template:
    """A page's template, whose JSON is strict and short."""
    environment = page_environment()
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    environment.filters["number"] = words.number
    environment.filters["rank"] = words.rank
    environment.filters["percent"] = lambda value: f"{words.number(100 * value)} %" if words.is_known(value) else "–"
    return environment.get_template(name)


def plotly_js() -> Markup:
    """plotly.js as the text of a <script>."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def _card(row: Mapping[Any, Any]) -> dict[str, Any]:
    """One layer type for the page: its summary row, the kind of its verdict, and its bracket in % of the null."""
    verdict = str(row["verdict"])
    kind = next((k for k in ("low-rank", "not low-rank", "undecidable") if verdict.startswith(k)), "unrelated")
    null, low, high = row["null_r90"], row["r90_low"], row["r90_high"]
    bar = None
    if words.is_known(low) and words.is_known(null) and null > 0 and words.is_known(high) and kind != "unrelated":
        start = min(98.5, 100 * low / null)
        bar = {"start": start, "width": max(1.5, min(100.0, 100 * high / null) - start)}
    return {**row, "kind": kind.replace(" ", "-"), "bar": bar}


def _headline(cards: list[dict[str, Any]]) -> str:
    """The verdicts counted, in a sentence."""
    if not cards:
        return "No matrix was analysed."
    counts = {kind: sum(card["kind"] == kind for card in cards) for kind in ("low-rank", "not-low-rank", "undecidable")}
    if not any(counts.values()):
        return "No verdict: the two sides are not a base and its fine-tune."
    parts = [f"{n} {kind.replace('not-low', 'not low')}" for kind, n in counts.items() if n]
    return f"Of {words.count(len(cards), 'layer type')}: {', '.join(parts)}."


def page_side(word: str, side: Any) -> dict[str, str]:
    """One side of the comparison, from its facts (a dict, or only a path)."""
    side = side if isinstance(side, Mapping) else {"path": side}
    path = str(side.get("path", "?"))
    details = [str(side[key]) for key in ("kind", "model_type") if side.get(key)]
    if side.get("n_tensors"):
        details.append(words.count(side["n_tensors"], "tensor"))
    if side.get("n_bytes"):
        details.append(words.size(side["n_bytes"]))
    return {"word": word, "path": path, "name": PurePosixPath(path).name or path, "details": " · ".join(details)}


def run_line(facts: Mapping[str, Any]) -> list[str]:
    """When, on what and how long, as far as the facts say."""
    device, seconds = facts.get("device"), facts.get("seconds")
    if isinstance(device, Mapping):
        device = device.get("name") or device.get("type")
    if isinstance(seconds, Mapping):
        seconds = sum(value for value in seconds.values() if words.is_known(value))
    date = str(facts.get("time", "")).replace("T", " ").replace("+00:00", " UTC")
    took = f"{words.number(seconds)} s" if words.is_known(seconds) else ""
    version = versions_of(facts).get("lowrank_probe")
    return [part for part in (date, str(device or ""), took, f"lowrank_probe {version}" if version else "") if part]


def versions_of(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Package → version, as far as the facts say."""
    versions = facts.get("versions")
    return versions if isinstance(versions, Mapping) else {}


def _dtypes(table: pd.DataFrame) -> str:
    """What the two sides are stored as, where it is one pair for all; else the most common one "and others"."""
    pairs = table[["base_dtype", "tuned_dtype", "storage"]].astype(str).value_counts(sort=True)
    if pairs.empty:
        return ""
    base, tuned, storage = pairs.index[0]
    text = f"{base} → {tuned}" + (f" (really {storage})" if storage not in ("", "nan", "None", tuned) else "")
    return text + (" and others" if len(pairs) > 1 else "")


def page_table(table: pd.DataFrame, columns: Mapping[str, Column], main: tuple[str, ...]) -> dict[str, Any]:
    """A table as the page's script reads it: described columns, and rows with ∞ as a string and unknown as null."""
    shown = [name for name in (*main, *columns) if name in table.columns]
    shown = list(dict.fromkeys(shown))
    described = [
        {
            "key": name,
            "title": columns[name].meaning + (f" [{columns[name].unit}]" if columns[name].unit else ""),
            "main": name in main,
            "numeric": bool(pd.api.types.is_numeric_dtype(table[name]) and not pd.api.types.is_bool_dtype(table[name])),
            "flag": shown.index(FLAGS[name]) if FLAGS.get(name) in shown else None,
        }
        for name in shown
    ]
    values = [_cells(table[name]) for name in shown]
    return {"columns": described, "rows": [list(row) for row in zip(*values, strict=True)]}


def _cells(column: "pd.Series[Any]") -> list[Any]:
    """`_cell` of every value, once for those that are the same."""
    values = column.to_numpy().tolist()
    if column.dtype == object:  # where 1 and True are the same, and lists have no hash
        return [_cell(value) for value in values]
    known = {value: _cell(value) for value in set(values)}
    return [known[value] for value in values]


def _cell(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
    return "∞" if isinstance(value, float) and value == math.inf else plain(value)


def flat_facts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (dotted key, text) lines."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from flat_facts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, 1):
            yield from flat_facts(item, f"{key}.{number}")
    elif isinstance(value, list | tuple):
        yield key, ", ".join(map(str, value)) or "–"
    elif key.endswith("n_bytes") and words.is_known(value):
        yield key, f"{value} ({words.size(value)})"
    else:
        yield key, "–" if value is None else str(value)
