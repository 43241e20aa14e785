"""The figures over layers, as plain dicts: heat map, size of the update, brackets of r90. `figures` documents each."""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from lowrank_probe.errors import ProbeError
from lowrank_probe.figure_data import (
    OUTSIDE,
    Cells,
    cells_of,
    columns_of,
    finite,
    group_of,
    groups,
)
from lowrank_probe.figure_style import (
    COLOURS,
    DASHES,
    DIVERGING,
    INK,
    NULL_LINE,
    SYMBOLS,
    THRESHOLD_LINE,
    UNKNOWN,
    Spec,
    axis,
    menu,
    numbers,
    spec,
)
from lowrank_probe.verdicts import LOW_RANK, NOT_LOW_RANK

MAX_PANELS: Final = 24  # of `bracket`

_PANEL: Final = 235  # pixels a row of panels, its title and its axis included


@dataclass(frozen=True)
class Metric:
    """How a column is shown: its label, the flag that says whether it can be trusted, its colours on the heat map.

    colours: "relative" diverges about the verdict's thresholds, "share" runs from 0 to 1, "size" from 0 to the largest.
    whole: a rank, whose medians are written as whole numbers.
    """

    label: str
    flag: str = ""
    colours: Literal["relative", "share", "size"] = "size"
    percent: bool = False
    whole: bool = False

    @property
    def form(self) -> str:
        """The d3 format of one value."""
        if self.whole:
            return ".0f"
        return ".1%" if self.percent and self.colours == "share" else ".2~%" if self.percent else ".4~g"


METRICS: Final[dict[str, Metric]] = {
    "relative_r90": Metric("r90 ÷ noise's r90", "decidable_r90", "relative"),
    "r90": Metric("r90, as stored", "decidable_r90", whole=True),
    "r90_denoised": Metric("r90, denoised", "decidable_r90", whole=True),
    "r50": Metric("r50, as stored", "decidable_r50", whole=True),
    "signal_rank": Metric("signal rank", "decidable_signal_rank", whole=True),
    "stable_rank": Metric("stable rank"),
    "energy_16": Metric("energy kept by rank 16", "", "share", percent=True),
    "relative_update": Metric("size of the update", percent=True),
    "unchanged_fraction": Metric("unchanged share", "", "share", percent=True),
}


def known_metric(metric: str) -> str:
    """The metric itself. Raises `ProbeError` naming the others where there is no such one."""
    if metric not in METRICS:
        raise ProbeError(f"unknown metric {metric!r}; one of {', '.join(METRICS)}")
    return metric


def trusted_by(table: pd.DataFrame, metric: Metric) -> Any:
    """Whether each matrix's value can be trusted, by the metric's flag."""
    return table[metric.flag].to_numpy(dtype=bool) if metric.flag else np.ones(len(table), dtype=bool)


def button(label: str, *args: Spec) -> Spec:
    """A menu entry: args are plotly's restyle, and relayout where there are two."""
    return {"label": label, "method": "update" if len(args) > 1 else "restyle", "args": list(args)}


def heatmap_spec(table: pd.DataFrame, metric: str) -> Spec:
    """`figures.heatmap`."""
    rows = list(reversed(groups(table)))
    columns = columns_of(table)
    found = cells_of(table)
    trusted = {name: trusted_by(table, spec) for name, spec in METRICS.items()}
    values = found.medians({name: np.where(trusted[name], finite(table, name), np.nan) for name in METRICS})
    shares = found.means(trusted)
    drawn = {
        name: _heatmap_traces(
            name, found, values[name], shares[name], rows, columns, shown=name == known_metric(metric)
        )
        for name in METRICS
    }
    owners = [name for name, traces in drawn.items() for _ in traces]
    buttons = [button(METRICS[name].label, {"visible": [name == owner for owner in owners]}) for name in METRICS]
    x = layer_axis(columns) | {"showgrid": False}
    y = {"type": "category", "categoryarray": rows, "categoryorder": "array", "showgrid": False, "ticksuffix": "  "}
    height = 170 + max(34 * min(len(rows), 14), 22 * len(rows))
    traces = [trace for traces in drawn.values() for trace in traces]
    updatemenus = [menu(buttons, list(METRICS).index(metric))]
    return spec(traces, "Where is the update low-rank?", height, x, y, updatemenus=updatemenus, showlegend=False)


def relative_update_spec(table: pd.DataFrame) -> Spec:
    """`figures.relative_update`."""
    relative = bool(table["relative_update"].notna().any())
    found = cells_of(table)
    values = found.medians({"value": finite(table, "relative_update" if relative else "fro_norm")})["value"]
    columns = columns_of(table)
    form = ".3~%" if relative else ".4~g"
    traces: list[Spec] = []
    for i, group in enumerate(groups(table)):
        part = np.flatnonzero((found.row == group) & np.isfinite(values))
        colour = COLOURS[i % len(COLOURS)]
        symbol = SYMBOLS[(i + i // len(COLOURS)) % len(SYMBOLS)]
        n = [f", median of {n}" if n > 1 else "" for n in found.n[part]]
        traces.append({
            "type": "scatter", "mode": "lines+markers" if len(part) > 1 else "markers", "name": group,
            "x": found.column[part].tolist(), "y": numbers(values[part]), "customdata": n,
            "line": {"color": colour, "width": 1.8, "dash": DASHES[i // len(COLOURS) % len(DASHES)]},
            "marker": {"color": colour, "symbol": symbol, "size": 7 if len(columns) < 60 else 5},
            "hovertemplate": f"{group}, layer %{{x}}: %{{y:{form}}}%{{customdata}}<extra></extra>",
        })  # fmt: skip
    positive = values[values > 0]
    # A type an order of magnitude away would flatten all others on a linear axis.
    wide = len(positive) > 0 and bool(positive.max() > 12 * np.median(positive))
    y: Spec = {"title": "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖", "tickformat": ".2~%" if relative else "~g"}
    y |= {"type": "log", "nticks": 6} if wide else {"rangemode": "tozero"}
    return spec(traces, "How large is the update, layer by layer?", 440, layer_axis(columns), y)


def bracket_spec(table: pd.DataFrame) -> Spec:
    """`figures.bracket`."""
    group = group_of(table)
    names = groups(table)
    if len(names) > MAX_PANELS:  # the most populated types, still in the order of the data flow
        kept = set(group.value_counts().index[:MAX_PANELS])
        names = [name for name in names if name in kept]
    wide = min(3, len(names))
    high = -(-len(names) // wide)
    gap_x, gap_y = 0.075, min(0.24, 0.32 / high)
    width, height = (1 - gap_x * (wide - 1)) / wide, (1 - gap_y * (high - 1)) / high
    found = cells_of(table)
    low, high_end, sure = (
        finite(table, "r90_low"),
        finite(table, "r90_high"),
        table["decidable_r90"].to_numpy(dtype=bool),
    )
    known = sure & np.isfinite(low) & np.isfinite(high_end)
    null = finite(table, "null_r90")
    ends = found.medians({"low": np.where(known, low, np.nan), "high": np.where(known, high_end, np.nan)})
    shares = found.means({"known": known, "sure": sure})
    data: list[Spec] = []
    axes: Spec = {}
    titles: list[Spec] = []
    for i, name in enumerate(names):
        here = found.row == name
        layers = np.array([-1 if column == OUTSIDE else int(column) for column in found.column[here]])
        top = float(np.median(null[group == name]))
        x, y = f"x{i + 1}" if i else "x", f"y{i + 1}" if i else "y"
        part = {key: values[here] for key, values in (ends | shares).items()}
        data += [
            trace | {"xaxis": x, "yaxis": y} for trace in _bracket_traces(layers, part, COLOURS[i % len(COLOURS)], top)
        ]
        left, above = (i % wide) * (width + gap_x), 1 - (i // wide) * (height + gap_y)
        span: Spec = {"range": [int(layers.min()) - 0.8, int(layers.max()) + 0.8]}
        span |= _layer_ticks(layers)
        axes[f"xaxis{x[1:]}"] = axis(anchor=y, domain=[left, left + width], **span)
        tall: Spec = {"domain": [max(0.0, above - height), above], "range": [-0.06 * top, 1.14 * top], "nticks": 6}
        axes[f"yaxis{y[1:]}"] = axis(anchor=x, automargin=True, **tall)
        titles.append({
            "text": name, "x": left + width / 2, "y": above, "xref": "paper", "yref": "paper", "showarrow": False,
            "xanchor": "center", "yanchor": "bottom", "font": {"size": 14},
        })  # fmt: skip
    drawn = spec([*data, *(_bracket_legend() if names else [])], "What is the true r90, layer by layer?",
                 110 + _PANEL * high, {}, {}, annotations=titles)  # fmt: skip
    drawn["layout"] |= axes
    drawn["layout"]["legend"]["y"] = 1 + 34 / (_PANEL * high)  # above the panels' titles
    return drawn


def _layer_ticks(layers: Any) -> Spec:
    """At most 8 ticks of a numeric axis, all of them layers: plotly's own fall between them where there are few."""
    blocks = layers[layers >= 0].tolist()
    ticks = blocks[:: max(1, -(-len(blocks) // 8))]
    words = [str(n) for n in ticks]
    if len(blocks) < len(layers):
        ticks, words = [-1, *ticks], [OUTSIDE if blocks else "outside the blocks", *words]
    return {"tickvals": ticks, "ticktext": words}


def layer_axis(columns: list[str]) -> Spec:
    """The category axis of layers: at most 24 ticks, "outside" a line lower, clear of the last layer."""
    step = max(1, -(-(len(columns) - (OUTSIDE in columns)) // 24))
    ticks = [name for i, name in enumerate(columns) if name == OUTSIDE or i % step == 0]
    words = [name if name != OUTSIDE else f"<br>{OUTSIDE}" for name in ticks]
    return {
        "title": "layer", "type": "category", "categoryarray": columns, "categoryorder": "array", "tickvals": ticks,
        "ticktext": words, "tickangle": 0, "range": [-0.5, len(columns) - 0.5],
    }  # fmt: skip


def _heatmap_traces(
    name: str, found: Cells, values: Any, trusted: Any, rows: list[str], columns: list[str], shown: bool
) -> list[Spec]:
    metric = METRICS[name]
    values = np.where(trusted < 0.5, np.nan, values)  # most of its experts are undecidable: so is the cell
    at = pd.Index(rows).get_indexer(pd.Index(found.row)), pd.Index(columns).get_indexer(pd.Index(found.column))
    z = np.full((len(rows), len(columns)), np.nan)
    z[at] = values
    grey = np.full(z.shape, np.nan)
    grey[at] = np.where(np.isnan(values), 1.0, np.nan)
    marks = np.isnan(values)
    noisy = trusted[marks] < 0.5
    top = float(np.nanmax(values)) if not marks.all() else 0.0
    limit = 1.0 if metric.colours != "size" or not top > 0 else top
    bar = {"title": {"text": metric.label, "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 1.0,
           "tickformat": ".2~%" if metric.percent else "~g"}  # fmt: skip
    scale = [list(stop) for stop in DIVERGING] if metric.colours == "relative" else "Cividis"
    gap = 2 if len(columns) < 50 else 1
    common = {"x": columns, "y": rows, "xgap": gap, "ygap": gap, "visible": shown}
    return [
        {"type": "heatmap", "z": [numbers(row) for row in z], "zmin": 0.0, "zmax": limit, "colorbar": bar,
         "hoverongaps": False, "colorscale": scale,
         "hovertemplate": f"%{{y}}, layer %{{x}}<br>{metric.label}: %{{z:{metric.form}}}<extra></extra>", **common},
        {"type": "heatmap", "z": [numbers(row) for row in grey], "colorscale": [list(stop) for stop in UNKNOWN],
         "showscale": False, "hoverinfo": "skip", **common},
        {"type": "scatter", "x": found.column[marks].tolist(), "y": found.row[marks].tolist(), "mode": "text",
         "visible": shown, "showlegend": False, "text": np.where(noisy, "?", "–").tolist(),
         "textfont": {"color": INK, "size": 13 if len(columns) < 40 else 10},
         "hovertext": np.where(noisy, "undecidable: storage noise", "not reached, or not computed").tolist(),
         "hovertemplate": "%{y}, layer %{x}<br>%{hovertext}<extra></extra>"},
    ]  # fmt: skip


def _bracket_traces(layers: Any, part: dict[str, Any], colour: str, top: float) -> list[Spec]:
    known = part["known"] >= 0.5
    unknown = layers[~known]
    noisy = part["sure"][~known] < 0.5
    low, high = part["low"][known], part["high"][known]
    null_x = [float(layers.min()) - 0.6, float(layers.max()) + 0.6]
    bars = {"type": "data", "symmetric": False, "array": numbers(high - low), "arrayminus": [0] * len(low),
            "color": colour, "thickness": 3, "width": 0}  # fmt: skip

    def scatter(x: Any, y: Any, name: str, **more: Any) -> Spec:
        return {"type": "scatter", "x": x, "y": y, "name": name, "showlegend": False, **more}

    return [
        scatter(layers[known].tolist(), numbers(low), "bracket", mode="markers", error_y=bars,
                marker={"color": colour, "size": 5}, customdata=numbers(high),
                hovertemplate="layer %{x}: r90 between %{y:.0f} and %{customdata:.0f}<extra></extra>"),
        scatter(unknown.tolist(), [0] * len(unknown), "undecidable", mode="text",
                text=np.where(noisy, "?", "–").tolist(),
                textfont={"color": INK, "size": 13 if len(unknown) < 25 else 8},
                hovertext=np.where(noisy, "undecidable, storage noise", "not reached by --top").tolist(),
                hovertemplate="layer %{x}: %{hovertext}<extra></extra>"),
        scatter(null_x, numbers([top, top]), "null", mode="lines", line=NULL_LINE),
        scatter([*null_x, None, *null_x], numbers([LOW_RANK * top] * 2 + [np.nan] + [NOT_LOW_RANK * top] * 2),
                "thresholds", mode="lines", line=THRESHOLD_LINE, hoverinfo="skip"),
    ]  # fmt: skip


def _bracket_legend() -> list[Spec]:
    """Entries of their own: a panel's trace may be empty, and plotly then leaves out its entry."""
    bar = {"color": INK, "symbol": "line-ns-open", "size": 11, "line": {"width": 3}}
    entries: dict[str, Spec] = {
        "lower to upper end": {"mode": "markers", "marker": bar},
        "r90 of noise": {"mode": "lines", "line": NULL_LINE},
        "½ and ¾ of it": {"mode": "lines", "line": THRESHOLD_LINE},
    }
    return [{"type": "scatter", "x": [None], "y": [None], "name": name, **style} for name, style in entries.items()]
