"""Table and spectra to plotly figures, one function a question; imports no torch.

Each figure works alone (in a notebook, in either colour theme) and in the report, which turns its menus into page
controls. What storage noise makes undecidable is drawn as "?", never as a number. Tensor names are untrusted: every
name that becomes plotly text goes through `text`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_probe.errors import ProbeError
from lowrank_probe.figure_data import doubtful, energies, even_selection, group_of, groups, null_energy, spectrum_points
from lowrank_probe.figure_style import (
    COLOURS,
    DASHES,
    DIVERGING,
    INK,
    UNKNOWN,
    faint,
    menu,
    numbers,
    styled,
    text,
)
from lowrank_probe.runs import Result

MAX_SPECTRA: Final = 400  # in the chooser of `singular_values`
MAX_PANELS: Final = 24  # of `bracket`

_NULL_LINE: Final = {"color": INK, "width": 1.4, "dash": "dash"}
_THRESHOLD_LINE: Final = {"color": INK, "width": 1, "dash": "dot"}


@dataclass(frozen=True)
class Metric:
    """How a column is shown on the heat map: its label, the flag that says whether it can be trusted, its colours.

    colours: "relative" diverges about the verdict's thresholds, "share" runs from 0 to 1, "size" from 0 to the largest.
    """

    label: str
    flag: str = ""
    colours: Literal["relative", "share", "size"] = "size"
    percent: bool = False


METRICS: Final[dict[str, Metric]] = {
    "relative_r90": Metric("r90 ÷ noise's r90", "decidable_r90", "relative"),
    "r90": Metric("r90, as stored", "decidable_r90"),
    "r90_denoised": Metric("r90, denoised", "decidable_r90"),
    "r50": Metric("r50, as stored", "decidable_r50"),
    "signal_rank": Metric("signal rank", "decidable_signal_rank"),
    "stable_rank": Metric("stable rank"),
    "energy_16": Metric("energy kept by rank 16", "", "share", percent=True),
    "relative_update": Metric("size of the update", percent=True),
    "unchanged_fraction": Metric("unchanged share", "", "share", percent=True),
}


def heatmap(table: pd.DataFrame, metric: str = "relative_r90") -> go.Figure:
    """Where in the model is the update low-rank? Layer type × layer, coloured by `metric`; a menu changes the metric.

    A cell is the median of its matrices (several only where a layer has several of a type, as experts). "?" marks what
    storage noise makes undecidable, "–" a value that was not reached or not computed. Raises `ProbeError`.
    """
    if metric not in METRICS:
        raise ProbeError(f"unknown metric {metric!r}; one of {', '.join(METRICS)}")
    rows = list(reversed(groups(table)))
    layers = sorted({int(n) for n in table["layer"].dropna()})
    columns = [*map(str, layers), *(["outside"] if table["layer"].isna().any() else [])]
    traces: list[Any] = []
    for name in METRICS:
        traces += _heatmap_traces(table, name, rows, columns, shown=name == metric)
    per_metric = len(traces) // len(METRICS)
    buttons = [
        {
            "label": spec.label,
            "method": "restyle",
            "args": [{"visible": [name == other for other in METRICS for _ in range(per_metric)]}],
        }
        for name, spec in METRICS.items()
    ]
    figure = styled(go.Figure(traces), "Where is the update low-rank?", height=170 + 34 * len(rows))
    figure.update_layout(updatemenus=[menu(buttons, list(METRICS).index(metric))])
    step = max(1, len(layers) // 24)
    ticks = [name for i, name in enumerate(columns) if name == "outside" or i % step == 0]
    words = [name if name != "outside" else "<br>outside" for name in ticks]  # a line lower, clear of the last layer
    figure.update_xaxes(type="category", categoryarray=columns, categoryorder="array", title="layer")
    figure.update_xaxes(tickvals=ticks, ticktext=words)
    figure.update_xaxes(showgrid=False, tickangle=0, range=[-0.5, len(columns) - 0.5])
    figure.update_yaxes(type="category", categoryarray=rows, categoryorder="array", showgrid=False, ticksuffix="  ")
    return figure


def energy_curves(result: Result) -> go.Figure:
    """How much of the update does rank r keep? Energy against rank for each layer type, beside noise of its shape.

    Lines are medians over the matrices of a type, bands their 10th to 90th percentile, dashed lines the
    Marchenko–Pastur energy of the type's most common shape. ΔW is as stored.
    """
    traces: list[Any] = []
    table = result.table
    unsure = doubtful(table)
    shapes = dict(
        zip(table["name"], zip(table["rows"].astype(int), table["cols"].astype(int), strict=True), strict=True)
    )
    norms = {name: float(norm) for name, norm in zip(table["name"], table["fro_norm"], strict=True)}

    def curve(y: Any, name: str, **kwargs: Any) -> Any:
        return go.Scatter(y=numbers(y), name=name, **kwargs)

    members = table["name"].groupby(group_of(table)).agg(list)
    for i, group in enumerate(groups(table)):
        names = [name for name in members[group] if name in result.singular_values and norms[name] > 0]
        if not names:
            continue
        shape = Counter(shapes[name] for name in names).most_common(1)[0][0]
        ranks, curves = energies([(result.singular_values[n], norms[n]) for n in names], min(shape))
        low, middle, high = np.percentile(curves, [10, 50, 90], axis=0)
        line = {"color": COLOURS[i % len(COLOURS)], "width": 2.4, "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        common = {"legendgroup": group, "mode": "lines", "x": numbers(ranks)}
        label = f"{group} ?" if group in unsure else group
        if len(names) > 1:
            band = {**common, "x": numbers(np.concatenate([ranks, ranks[::-1]])), "hoverinfo": "skip"}
            fill = {"fill": "toself", "fillcolor": faint(str(line["color"])), "line": {"width": 0}}
            traces.append(curve(np.concatenate([high, low[::-1]]), "band", **band, **fill, showlegend=False))
        hover = f"{label}: rank %{{x}} keeps %{{y:.1%}}<extra></extra>"
        traces.append(curve(middle, label, **common, line=line, hovertemplate=hover))
        dashed = {**line, "width": 1.2, "dash": "dash"}
        hover = f"noise, {shape[0]}×{shape[1]}: rank %{{x}} keeps %{{y:.1%}}<extra></extra>"
        noise = null_energy(ranks, shape)
        traces.append(curve(noise, f"{group} null", **common, line=dashed, hovertemplate=hover, showlegend=False))
    dashed = {"color": INK, "width": 1.2, "dash": "dash"}
    traces.append(go.Scatter(x=[None], y=[None], mode="lines", line=dashed, name="noise of the same shape"))
    figure = styled(go.Figure(traces), "How much of the update does rank r keep?", height=480)
    figure.add_hline(y=0.9, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_xaxes(type="log", title="rank r", dtick=1)
    figure.update_yaxes(title="share of ‖ΔW‖²", tickformat=".0%", range=[0, 1.03])
    return figure


def bracket(result: Result) -> go.Figure:
    """What is the true r90, layer by layer? The bracket's lower to upper end beside the r90 of noise, a panel a type.

    An open upper end ("more than the signal rank") is a triangle at the noise's r90; "?" marks undecidable matrices.
    Dotted lines are the verdict's thresholds, half and three quarters of the null.
    """
    table = result.table.assign(group=group_of(result.table))
    names = groups(result.table)
    if len(names) > MAX_PANELS:  # the most populated types, still in the order of the data flow
        kept = set(table["group"].value_counts().index[:MAX_PANELS])
        names = [name for name in names if name in kept]
    wide = min(3, len(names))
    high = -(-len(names) // wide)
    gap = {"horizontal_spacing": 0.075, "vertical_spacing": min(0.2, 0.3 / high)}
    figure = make_subplots(rows=high, cols=wide, subplot_titles=names, **gap)
    for i, name in enumerate(names):
        place = {"row": i // wide + 1, "col": i % wide + 1}
        colour = COLOURS[i % len(COLOURS)]
        part = table[table["group"] == name]
        top = float(part["null_r90"].median())
        for trace in _bracket_traces(part, colour, top):
            figure.add_trace(trace, **place)
        figure.update_yaxes(range=[-0.06 * top, 1.14 * top], **place)
        if part["layer"].isna().all():
            figure.update_xaxes(tickvals=[-1], ticktext=["outside the blocks"], range=[-2, 0], **place)
    styled(figure, "What is the true r90, layer by layer?", height=110 + 235 * high)
    figure.update_annotations(font_size=14)
    figure.update_layout(legend={"y": 1 + 34 / (235 * high)})  # above the panels' titles
    figure.add_traces(_bracket_legend() if names else [])
    return figure


def singular_values(result: Result) -> go.Figure:
    """What does one ΔW's spectrum look like? σ against its index, raw and denoised, beside the storage noise's edge.

    A menu chooses the matrix. Spectra are thinned to 250 log-spaced points; of more than 400 matrices, an even
    selection of each layer type is offered.
    """
    table = result.table[result.table["name"].isin(result.singular_values.keys())]
    chosen = even_selection(table, MAX_SPECTRA)
    styles: Sequence[tuple[str, dict[str, Any]]] = (
        ("σ, as stored", {"mode": "lines+markers", "line": {"color": COLOURS[0], "width": 2}, "marker": {"size": 4}}),
        ("σ, denoised", {"mode": "lines+markers", "line": {"color": COLOURS[1], "width": 2}, "marker": {"size": 4}}),
        ("noise edge", {"mode": "lines", "line": {"color": INK, "width": 1.4, "dash": "dash"}}),
        ("signal above (1.05 × edge)", {"mode": "lines", "line": {"color": COLOURS[3], "width": 1.4, "dash": "dot"}}),
    )
    buttons: list[dict[str, Any]] = []
    # The dead-zone model's edge belongs to the corrected update, whose σ are drawn denoised only.
    edges = chosen["noise_edge"].astype(float).where(chosen["noise_model"] == "rounding")
    for name, edge in zip(chosen["name"], edges, strict=True):
        x, y = spectrum_points(result, name, edge)
        buttons.append({"label": text(name), "method": "restyle", "args": [{"x": x, "y": y}]})
    active = int(chosen["decidable_r90"].to_numpy(dtype=bool).argmax()) if buttons else 0
    first = buttons[active]["args"][0] if buttons else {"x": [[]] * 4, "y": [[]] * 4}
    hover = "σ at %{x}: %{y:.4~g}"
    traces = [
        go.Scatter(x=first["x"][i], y=first["y"][i], name=name, hovertemplate=hover, **style)
        for i, (name, style) in enumerate(styles)
    ]
    figure = styled(go.Figure(traces), "What does one spectrum look like?", height=480)
    figure.update_layout(updatemenus=[menu(buttons, active)])
    figure.update_xaxes(type="log", title="index", dtick=1)
    figure.update_yaxes(type="log", title="singular value σ of ΔW", exponentformat="power", nticks=5)
    return figure


def all_figures(result: Result) -> dict[str, go.Figure]:
    """The report's figures by name, in its order; empty where no matrix was analysed."""
    table = result.table
    if not len(table):
        return {}
    metric = "relative_r90" if table["decidable_r90"].any() else "signal_rank"
    if not table[METRICS[metric].flag].any():
        metric = "relative_update"
    figures = {"heatmap": heatmap(table, metric), "bracket": bracket(result)}
    if result.singular_values:
        figures |= {"energy_curves": energy_curves(result), "singular_values": singular_values(result)}
    return figures


def _heatmap_traces(table: pd.DataFrame, name: str, rows: list[str], columns: list[str], shown: bool) -> list[Any]:
    metric = METRICS[name]
    values = table[name].astype(float).replace([np.inf, -np.inf], np.nan)
    trusted = table[metric.flag].astype(bool) if metric.flag else pd.Series(True, index=table.index)
    layer = table["layer"].map(lambda n: "outside" if pd.isna(n) else str(int(n)))
    cells = pd.DataFrame({"row": group_of(table), "column": layer, "value": values.where(trusted), "trusted": trusted})
    cells = cells.groupby(["row", "column"], as_index=False).agg({"value": "median", "trusted": "mean"})
    cells.loc[cells["trusted"] < 0.5, "value"] = np.nan  # most of its experts are undecidable: so is the cell
    z = np.full((len(rows), len(columns)), np.nan)
    at = cells["row"].map(rows.index).to_numpy(), cells["column"].map(columns.index).to_numpy()
    z[at] = cells["value"]
    grey = np.full(z.shape, np.nan)
    grey[at] = np.where(cells["value"].isna(), 1.0, np.nan)
    marks = cells[cells["value"].isna()]
    noisy = marks["trusted"] < 0.5
    top = float(cells["value"].max())
    limit = 1.0 if metric.colours != "size" or not top > 0 else top
    bar = {"title": {"text": metric.label, "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 1.0,
           "tickformat": ".2~%" if metric.percent else "~g"}  # fmt: skip
    common = {"x": columns, "y": rows, "xgap": 2, "ygap": 2, "visible": shown}
    form = ".1%" if metric.percent else ".4~g"
    return [
        go.Heatmap(
            z=[numbers(row) for row in z], zmin=0.0, zmax=limit, colorbar=bar, hoverongaps=False,
            colorscale=DIVERGING if metric.colours == "relative" else "Cividis",
            hovertemplate=f"%{{y}}, layer %{{x}}<br>{metric.label}: %{{z:{form}}}<extra></extra>", **common,
        ),
        go.Heatmap(z=[numbers(row) for row in grey], colorscale=UNKNOWN, showscale=False, hoverinfo="skip", **common),
        go.Scatter(
            x=marks["column"].tolist(), y=marks["row"].tolist(), mode="text", visible=shown, showlegend=False,
            text=np.where(noisy, "?", "–").tolist(), textfont={"color": INK, "size": 13},
            hovertext=np.where(noisy, "undecidable: storage noise", "not reached, or not computed").tolist(),
            hovertemplate="%{y}, layer %{x}<br>%{hovertext}<extra></extra>",
        ),
    ]  # fmt: skip


def _bracket_traces(part: pd.DataFrame, colour: str, top: float) -> list[Any]:
    layers = part["layer"].astype("Float64").fillna(-1).astype(float)
    known = part["decidable_r90"].astype(bool) & part["r90_low"].notna()
    ends = pd.DataFrame(
        {
            "x": layers,
            "low": part["r90_low"].astype(float).where(known),
            "high": part["r90_high"].astype(float).fillna(np.inf).where(known),
            "known": known,
        }
    )
    ends = ends.groupby("x", as_index=False).agg({"low": "median", "high": "median", "known": "mean"})
    unknown, ends = ends[ends["known"] < 0.5], ends[ends["known"] >= 0.5]
    closed, open_ = ends[np.isfinite(ends["high"])], ends[np.isinf(ends["high"])]
    peak = np.maximum(open_["low"], top)
    null_x = [layers.min() - 0.6, layers.max() + 0.6]

    def bars(low: Any, high: Any) -> dict[str, Any]:
        return {"type": "data", "symmetric": False, "array": numbers(high - low), "arrayminus": [0] * len(low),
                "color": colour, "thickness": 3, "width": 0}  # fmt: skip

    def scatter(x: Any, y: Any, name: str, **kwargs: Any) -> Any:
        return go.Scatter(x=numbers(x), y=numbers(y), name=name, showlegend=False, **kwargs)

    dot = {"color": colour, "size": 5}
    arrow = {"color": colour, "size": 10, "symbol": "triangle-up"}
    between = "layer %{x}: r90 between %{y:.5~g} and %{customdata:.5~g}<extra></extra>"
    beyond = "layer %{x}: r90 at least %{customdata:.5~g}, upper end open<extra></extra>"
    noise = "layer %{x}: undecidable, storage noise<extra></extra>"
    return [
        scatter(closed["x"], closed["low"], "closed", mode="markers", marker=dot, customdata=numbers(closed["high"]),
                error_y=bars(closed["low"], closed["high"]), hovertemplate=between),
        scatter(open_["x"], open_["low"], "open", mode="markers", marker=dot, customdata=numbers(open_["low"]),
                error_y=bars(open_["low"], peak), hovertemplate=beyond),
        scatter(open_["x"], peak, "open end", mode="markers", marker=arrow, customdata=numbers(open_["low"]),
                hovertemplate=beyond),
        scatter(unknown["x"], np.zeros(len(unknown)), "undecidable", mode="text", text=["?"] * len(unknown),
                textfont={"color": INK, "size": 13 if len(unknown) < 25 else 8}, hovertemplate=noise),
        scatter(null_x, [top, top], "null", mode="lines", line=_NULL_LINE),
        scatter([*null_x, np.nan, *null_x], [0.5 * top] * 2 + [np.nan] + [0.75 * top] * 2, "thresholds",
                mode="lines", line=_THRESHOLD_LINE, hoverinfo="skip"),
    ]  # fmt: skip


def _bracket_legend() -> list[Any]:
    """Entries of their own: a panel's trace may be empty, and plotly then leaves out its entry."""
    entries: dict[str, dict[str, Any]] = {
        "lower to upper end": {"mode": "markers", "marker": {"color": INK, "symbol": "line-ns-open", "size": 11}},
        "upper end open": {"mode": "markers", "marker": {"color": INK, "symbol": "triangle-up", "size": 10}},
        "r90 of noise": {"mode": "lines", "line": _NULL_LINE},
        "½ and ¾ of it": {"mode": "lines", "line": _THRESHOLD_LINE},
    }
    entries["lower to upper end"]["marker"]["line"] = {"width": 3}
    return [go.Scatter(x=[None], y=[None], name=name, **style) for name, style in entries.items()]
