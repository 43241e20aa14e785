"""The figures over layer types and spectra, as plain dicts: distribution, energy curves, one spectrum.

`figures` documents each.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.figure_data import (
    doubtful,
    energies,
    finite,
    five_numbers,
    group_of,
    groups,
    layers_of,
    null_energy,
    spectrum_points,
)
from lowrank_probe.figure_layers import METRICS, button, known_metric, trusted_by
from lowrank_probe.figure_style import (
    COLOURS,
    DASHES,
    INK,
    NULL_LINE,
    THRESHOLD_LINE,
    Spec,
    faint,
    menu,
    numbers,
    shown_names,
    spec,
)
from lowrank_probe.figure_style import text as plain_text
from lowrank_probe.runs import Result

MAX_DOTS: Final = 60  # of one layer type in `distribution`
MAX_SPECTRA: Final = 400  # in the menu of `singular_values`
MAX_POINTS: Final = 120  # of one spectrum; half of it where a page holds thousands


def points_for(n: int) -> int:
    """Points of each spectrum on a page of n."""
    return MAX_POINTS if n <= 1000 else MAX_POINTS // 2


def distribution_spec(table: pd.DataFrame, metric: str) -> Spec:
    """`figures.distribution`."""
    names = groups(table)
    group = group_of(table)
    members = {name: np.flatnonzero(group == name) for name in names}
    data: list[Spec] = []
    owners: list[str] = []
    for name in METRICS:
        traces = _distribution_traces(table, name, members, shown=name == known_metric(metric))
        data += traces
        owners += [name] * len(traces)

    def title(name: str) -> Spec:
        return {"yaxis.title.text": METRICS[name].label, "yaxis.tickformat": ".2~%" if METRICS[name].percent else "~g"}

    buttons = [
        button(METRICS[name].label, {"visible": [name == owner for owner in owners]}, title(name)) for name in METRICS
    ]
    x = {
        "tickvals": list(range(len(names))),
        "ticktext": names,
        "range": [-0.6, len(names) - 0.4],
        "showgrid": False,
        "automargin": True,
    }
    y = {"title": METRICS[metric].label, "tickformat": title(metric)["yaxis.tickformat"], "rangemode": "tozero"}
    updatemenus = [menu(buttons, list(METRICS).index(metric))]
    return spec(
        data, "How do the layer types differ?", 440, x, y, updatemenus=updatemenus, showlegend=False
    )  # fmt: skip


def energy_curves_spec(result: Result) -> Spec:
    """`figures.energy_curves`."""
    traces: list[Spec] = []
    table = result.table
    unsure = doubtful(table)
    shapes = dict(
        zip(table["name"], zip(table["rows"].astype(int), table["cols"].astype(int), strict=True), strict=True)
    )
    norms = {name: float(norm) for name, norm in zip(table["name"], table["fro_norm"], strict=True)}
    members = table["name"].groupby(group_of(table)).agg(list)
    for i, group in enumerate(groups(table)):
        names = [name for name in members[group] if name in result.singular_values and norms[name] > 0]
        if not names:
            continue
        shape = Counter(shapes[name] for name in names).most_common(1)[0][0]
        ranks, curves = energies([(result.singular_values[n], norms[n]) for n in names], min(shape))
        low, middle, high = np.percentile(curves, [10, 50, 90], axis=0)
        line = {"color": COLOURS[i % len(COLOURS)], "width": 2.4, "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
        common = {"type": "scatter", "legendgroup": group, "mode": "lines", "x": numbers(ranks)}
        label = f"{group} ?" if group in unsure else group
        if len(names) > 1:
            there, back = numbers(np.concatenate([ranks, ranks[::-1]])), numbers(np.concatenate([high, low[::-1]]))
            fill = {"fill": "toself", "fillcolor": faint(str(line["color"])), "line": {"width": 0}}
            traces.append(
                {**common, **fill, "x": there, "y": back, "name": "band", "hoverinfo": "skip", "showlegend": False}
            )
        hover = f"{label}: rank %{{x}} keeps %{{y:.1%}}<extra></extra>"
        traces.append({**common, "name": label, "y": numbers(middle), "line": line, "hovertemplate": hover})
        hover = f"noise, {shape[0]}×{shape[1]}: rank %{{x}} keeps %{{y:.1%}}<extra></extra>"
        dashed = {**line, "width": 1.2, "dash": "dash"}
        null = numbers(null_energy(ranks, shape))
        traces.append({**common, "name": f"{group} null", "y": null, "line": dashed, "hovertemplate": hover,
                       "showlegend": False})  # fmt: skip
    name = "noise of the same shape"
    traces.append({"type": "scatter", "x": [None], "y": [None], "mode": "lines", "line": NULL_LINE, "name": name})
    level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0.9, "y1": 0.9, "line": THRESHOLD_LINE}
    return spec(
        traces, "How much of the update does rank r keep?", 480, {"type": "log", "title": "rank r", "dtick": 1},
        {"title": "share of ‖ΔW‖²", "tickformat": ".0%", "range": [0, 1.03]}, shapes=[level],
    )  # fmt: skip


def singular_values_spec(result: Result, name: str | None = None, *, with_menu: bool = False) -> Spec:
    """`figures.singular_values`; without a menu unless asked for."""
    table = result.table[result.table["name"].isin(result.singular_values.keys())]
    shown = even_selection(table, MAX_SPECTRA) if with_menu else table
    first = opening(shown) if name is None else int((shown["name"] == name).to_numpy().argmax())
    if not with_menu:
        shown, first = shown[first : first + 1], 0
    rows: list[Mapping[Any, Any]] = shown.to_dict("records")
    points = [spectrum_points(result, row, MAX_POINTS) for row in rows]
    x, y = points[first] if points else ([[]] * 5, [[]] * 5)
    dots = {"mode": "lines+markers", "marker": {"size": 4}}
    grey = {"fill": "tozeroy", "fillcolor": "rgba(128,128,128,.2)", "line": {"color": INK, "width": 1}}
    styles: dict[str, Spec] = {
        "storage noise alone (Marchenko–Pastur)": {"mode": "lines", **grey},
        "σ, as stored": {**dots, "line": {"color": COLOURS[0], "width": 2}},
        "σ, denoised": {**dots, "line": {"color": COLOURS[1], "width": 2}, "marker": {"size": 5, "symbol": "diamond"}},
        "noise edge": {"mode": "lines", "line": NULL_LINE},
        "signal above (1.05 × edge)": {"mode": "lines", "line": {"color": COLOURS[3], "width": 1.4, "dash": "dot"}},
    }
    data = [
        {"type": "scatter", "x": x[i], "y": y[i], "name": label, "hovertemplate": "σ at %{x}: %{y:.4~g}", **style}
        for i, (label, style) in enumerate(styles.items())
    ]
    title = "What does one spectrum look like?"
    if points and not with_menu:
        (drawn,) = shown_names([str(rows[first]["name"])], 80).values()
        title += f"  {drawn}"
    found = spec(
        data, title, 500, {"type": "log", "title": "index", "dtick": 1},
        {"type": "log", "title": "singular value σ of ΔW", "exponentformat": "power", "nticks": 5},
    )  # fmt: skip
    if with_menu:
        buttons = [
            {"label": plain_text(row["name"]), "method": "restyle", "args": [{"x": x, "y": y}]}
            for row, (x, y) in zip(rows, points, strict=True)
        ]
        found["layout"]["updatemenus"] = [menu(buttons, first)]
    return found


def _distribution_traces(table: pd.DataFrame, name: str, members: dict[str, Any], shown: bool) -> list[Spec]:
    metric = METRICS[name]
    values = np.where(trusted_by(table, metric), finite(table, name), np.nan)
    layer = layers_of(table)
    boxes: dict[str, list[Any]] = {"x": []}
    x: list[float | None] = []
    y: list[float | None] = []
    where: list[str] = []
    unsure: list[tuple[int, str]] = []
    for i, rows in enumerate(members.values()):
        kept = rows[np.isfinite(values[rows])]
        if len(kept) < len(rows):
            unsure.append((i, f"{len(rows) - len(kept)} of {len(rows)} undecidable, or not reached"))
        if not len(kept):
            continue
        boxes["x"].append(i)
        for key, value in five_numbers(values[kept]).items():
            boxes.setdefault(key, []).append(float(f"{value:.6g}"))
        kept = kept[np.argsort(values[kept], kind="stable")]
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MAX_DOTS)).round().astype(int))]
        # A golden-ratio sequence spreads the dots evenly, the same way each time.
        x += numbers(i + 0.56 * ((np.arange(len(kept)) * 0.618034) % 1 - 0.5))
        y += numbers(values[kept])
        where += ["outside the blocks" if n < 0 else f"layer {n}" for n in layer[kept]]
    common: Spec = {"visible": shown, "showlegend": False}
    ends = [-0.6, len(members) - 0.4]
    dots = {"color": COLOURS[0], "size": 5, "opacity": 0.6}
    traces: list[Spec] = [
        {"type": "box", "name": "box", **boxes, "width": 0.66, "line": {"color": COLOURS[0], "width": 1.6},
         "fillcolor": faint(COLOURS[0]), "hoverinfo": "y", "boxpoints": False, **common},
        {"type": "scatter", "name": "matrices", "mode": "markers", "x": x, "y": y, "customdata": where, "marker": dots,
         "hovertemplate": f"%{{customdata}}: %{{y:{metric.form}}}<extra></extra>", **common},
        {"type": "scatter", "name": "unknown", "mode": "text", "x": [i for i, _ in unsure], "y": [0] * len(unsure),
         "text": ["?"] * len(unsure), "textposition": "top center", "textfont": {"color": INK, "size": 15},
         "hovertext": [words for _, words in unsure], "hovertemplate": "%{hovertext}<extra></extra>", **common},
    ]  # fmt: skip
    if metric.colours == "relative":
        lines = {"x": [*ends, None, *ends, None, *ends], "y": [0.5, 0.5, None, 0.75, 0.75, None, 1.0, 1.0]}
        traces.append({"type": "scatter", "name": "thresholds", "mode": "lines", **lines, "line": THRESHOLD_LINE,
                       "hoverinfo": "skip", **common})  # fmt: skip
    return traces


def opening(table: pd.DataFrame) -> int:
    """Position of the matrix to open on: the first whose r90 is decidable, preferring one inside the blocks."""
    sure = table["decidable_r90"].to_numpy(dtype=bool)
    inside = sure & table["layer"].notna().to_numpy()
    return int((inside if inside.any() else sure).argmax()) if len(table) else 0


def even_selection(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows: as many of each layer type, evenly spread over its layers."""
    names = groups(table)
    each = max(1, limit // max(1, len(names)))
    label = group_of(table)
    parts = []
    for name in names[:limit]:
        part = table[label == name].sort_values("layer", kind="stable")
        take = np.arange(len(part)) if len(table) <= limit else np.linspace(0, len(part) - 1, min(each, len(part)))
        parts.append(part.iloc[take.round().astype(int)])
    return pd.concat(parts) if parts else table
