"""An extraction to plotly figures as plain dicts, one function a question; imports no torch.

Names come from strangers' files: every one that becomes plotly text goes through `figure_style.text`.
"""

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from lowrank_probe.extraction_summary import error_curves
from lowrank_probe.figure_data import cells_of, columns_of, finite, groups
from lowrank_probe.figure_layers import button, layer_axis
from lowrank_probe.figure_style import COLOURS, DASHES, INK, UNKNOWN, Spec, faint, menu, numbers, spec, text

if TYPE_CHECKING:
    from lowrank_probe.extraction_runs import Extraction

# Where ‖ΔW‖² goes: column of the summary → word, colour.
PARTS: Final = {
    "carried": ("carried by LoRA", "#0a84c1"),
    "carried_whole": ("carried whole", "#009e73"),
    "truncated": ("truncated away", "#e69f00"),
    "not_carried": ("not carried", "#8c8c8c"),
}
MAX_BARS: Final = 30  # of `where_spec`
_NUMBERS_UP_TO: Final = 16  # layers for which the cells of the map have room for numbers


def error_spec(found: "Extraction") -> Spec:
    """What does rank r cost? ‖ΔW − BA‖/‖ΔW‖ of the stored factors cut to rank r, a line a layer type.

    The area below a line ends at the error that no matrix of that rank is below. Dotted verticals are the adapters'
    ranks, where most matrices have the same.
    """
    data: list[Spec] = []
    last = 1
    for i, (label, ranks, stored, optimum) in enumerate(error_curves(found.curves)):
        colour, name, last = COLOURS[i % len(COLOURS)], text(label), max(last, int(ranks[-1]))
        line: Spec = {"color": colour, "width": 2, "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        common: Spec = {"type": "scatter", "x": ranks.tolist(), "legendgroup": name}
        data.append(common | {
            "name": f"{name}, optimum", "y": numbers(optimum), "mode": "lines", "showlegend": False,
            "line": {"color": colour, "width": 0}, "hoverinfo": "skip",
        })  # fmt: skip
        data.append(common | {
            "name": name, "y": numbers(stored), "mode": "lines" if len(ranks) > 1 else "markers", "line": line,
            "fill": "tonexty", "fillcolor": faint(colour), "marker": {"color": colour, "size": 8},
            "customdata": numbers(optimum),
            "hovertemplate": f"{name}, rank %{{x}}: %{{y:.4~%}}, optimum at least %{{customdata:.4~%}}<extra></extra>",
        })  # fmt: skip
    marks = [(rank, text(label)) for label, rank in _usual_ranks(found).items()]
    shapes = [
        {"type": "line", "x0": rank, "x1": rank, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
         "line": {"color": INK, "width": 1, "dash": "dot"}} for rank, _ in marks
    ]  # fmt: skip
    notes = [
        {"text": label, "x": float(np.log10(rank)), "y": 1, "yref": "paper", "yanchor": "top", "xanchor": "left",
         "showarrow": False, "font": {"size": 12}} for rank, label in marks if label
    ]  # fmt: skip
    ticks = [2**power for power in range(20) if 2**power <= 2 * last]
    x = {"title": "rank", "type": "log", "tickvals": ticks, "ticktext": [str(tick) for tick in ticks]}
    y = {"title": "‖ΔW − BA‖ / ‖ΔW‖", "tickformat": ".3~%", "rangemode": "tozero"}
    return spec(data, "What does a rank cost?", 460, x, y, shapes=shapes, annotations=notes)


def allotment_spec(found: "Extraction") -> Spec:
    """Who got which rank, and what does it keep? Layer type × layer; a menu chooses the adapter, rank or energy.

    A cell is the median of its matrices. "–" marks a matrix that did not change.
    """
    table = found.ledger[found.ledger["kind"] != ""]
    rows, columns = list(reversed(groups(table))), columns_of(table)
    drawn = [
        (label, metric, _map_traces(table[table["adapter"] == label], metric, rows, columns))
        for label in found.adapters
        for metric in ("rank", "energy")
    ]
    # One rank for all is no picture.
    start = 0 if drawn and table.loc[table["rank"] > 0, "rank"].nunique() > len(found.adapters) else 1
    owners = [number for number, (_, _, traces) in enumerate(drawn) for _ in traces]
    words = {"rank": "rank", "energy": "share of ‖ΔW‖² kept"}
    buttons = [
        button(f"{text(label)}: {words[metric]}".removeprefix(": "), {"visible": [owner == n for owner in owners]})
        for n, (label, metric, _) in enumerate(drawn)
    ]
    traces = [trace | {"visible": n == start} for n, (_, _, found_traces) in enumerate(drawn) for trace in found_traces]
    x = layer_axis(columns) | {"showgrid": False}
    y = {"type": "category", "categoryarray": rows, "categoryorder": "array", "showgrid": False, "ticksuffix": "  "}
    height = 170 + max(34 * min(len(rows), 14), 22 * len(rows))
    return spec(traces, "Who got which rank?", height, x, y, updatemenus=[menu(buttons, start)], showlegend=False)


def where_spec(found: "Extraction") -> Spec:
    """Where does ‖ΔW‖² go? Carried, carried whole, truncated away, not carried: a bar a layer type.

    A menu chooses the adapter, and shares of everything that changed or of the type alone.
    """
    summary = found.summary
    summary = summary[summary["share"] > 0]
    largest = summary.groupby("layer_type")["share"].max().nlargest(MAX_BARS).index
    labels = [label for label in dict.fromkeys(summary["layer_type"]) if label in set(largest)][::-1]
    buttons: list[Spec] = []
    for label in found.adapters:
        own = summary[summary["adapter"] == label].set_index("layer_type").reindex(labels)
        for word, unit in (("of all that changed", 1.0), ("of the layer type", own["share"])):
            x = [numbers(own[part] / unit) for part in PARTS]
            said = f"{text(label)}: share {word}".removeprefix(": ")
            buttons.append(button(said, {"x": x}, {"xaxis.title.text": f"share of ‖ΔW‖² {word}"}))
    names = [text(label) for label in labels]
    shown, title = buttons[0]["args"]
    data: list[Spec] = [
        {"type": "bar", "orientation": "h", "name": word, "y": names, "x": x, "marker": {"color": colour},
         "hovertemplate": f"%{{y}}, {word}: %{{x:.4~%}}<extra></extra>"}
        for (word, colour), x in zip(PARTS.values(), shown["x"], strict=True)
    ]  # fmt: skip
    y = {"type": "category", "showgrid": False, "ticksuffix": "  "}
    x_axis = {"title": title["xaxis.title.text"], "tickformat": ".3~%", "rangemode": "tozero"}
    height = 150 + 28 * max(4, len(labels))
    return spec(data, "Where does ‖ΔW‖² go?", height, x_axis, y, barmode="stack", bargap=0.3,
                updatemenus=[menu(buttons)], legend=LEGEND)  # fmt: skip


# The menu is above the figure's right end.
LEGEND: Final = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "traceorder": "normal"}


def extraction_specs(found: "Extraction") -> dict[str, Spec]:
    """The report's figures by name, in its order; those without anything to show are left out."""
    figures: dict[str, Spec] = {}
    if len(found.curves):
        figures["error"] = error_spec(found)
    if (found.ledger["kind"] != "").any():
        figures["allotment"] = allotment_spec(found)
    if (found.ledger["share"] > 0).any():
        figures["where"] = where_spec(found)
    return figures


def _usual_ranks(found: "Extraction") -> dict[str, int]:
    """Adapter → the rank that most of its matrices have, where most have one."""
    adapted = found.ledger[found.ledger["status"] == "adapted"]
    usual = {}
    for label in found.adapters:
        counts = adapted.loc[adapted["adapter"] == label, "rank"].value_counts()
        if len(counts) and 2 * counts.iloc[0] > counts.sum():
            usual[label] = int(counts.index[0])
    return usual


def _map_traces(table: pd.DataFrame, metric: str, rows: list[str], columns: list[str]) -> list[Spec]:
    cells = cells_of(table)
    moved = (table["status"] != "unchanged").to_numpy()
    values = cells.medians({name: np.where(moved, finite(table, name), np.nan) for name in ("rank", "energy")})
    at = pd.Index(rows).get_indexer(pd.Index(cells.row)), pd.Index(columns).get_indexer(pd.Index(cells.column))
    z, other, grey = (np.full((len(rows), len(columns)), np.nan) for _ in range(3))
    still = np.isnan(values["rank"])
    rank = metric == "rank"
    z[at], other[at] = values[metric], values["energy" if rank else "rank"]
    grey[at] = np.where(still, 1.0, np.nan)
    top = float(np.nanmax(values["rank"])) if not still.all() else 1.0
    gap = 2 if len(columns) < 50 else 1
    common: Spec = {"x": columns, "y": rows, "xgap": gap, "ygap": gap}
    room: Spec = {"texttemplate": "%{z:.0f}" if rank else "%{z:.0%}"} if len(columns) <= _NUMBERS_UP_TO else {}
    hover = "rank %{z:.0f}, keeps %{customdata:.4~%}" if rank else "keeps %{z:.4~%}, rank %{customdata:.0f}"
    return [
        {"type": "heatmap", "z": [numbers(row) for row in z], "customdata": [numbers(row) for row in other],
         "zmin": 0.0, "zmax": top if rank else 1.0, "colorscale": "Cividis", "hoverongaps": False,
         "colorbar": {"title": {"text": "rank" if rank else "share of ‖ΔW‖² kept", "side": "right"}, "thickness": 12,
                      "outlinewidth": 0, "len": 1.0, "tickformat": "~g" if rank else ".2~%"},
         "hovertemplate": f"%{{y}}, layer %{{x}}<br>{hover}<extra></extra>", **room, **common},
        {"type": "heatmap", "z": [numbers(row) for row in grey], "colorscale": [list(stop) for stop in UNKNOWN],
         "showscale": False, "hoverinfo": "skip", **common},
        {"type": "scatter", "x": cells.column[still].tolist(), "y": cells.row[still].tolist(), "mode": "text",
         "text": ["–"] * int(still.sum()), "showlegend": False, "textfont": {"color": INK, "size": 13},
         "hovertemplate": "%{y}, layer %{x}<br>unchanged<extra></extra>"},
    ]  # fmt: skip
