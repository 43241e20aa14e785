"""A `Trajectory` to plotly figures, one function a question; imports no torch.

Step labels and tensor names are untrusted: all plotly text goes through `figure_style.text`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lowrank_probe import words
from lowrank_probe.figure_style import COLOURS, DASHES, INK, UNKNOWN, axis, menu, numbers, shown_names, spec, text

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory

MAX_PANELS: Final = 24
MAX_WRITTEN: Final = 8  # steps up to which a heat map's cells carry their number


def steps_lines(trajectory: "Trajectory", column: str, title: str) -> go.Figure:
    """A column of the table over the steps, one line a layer type; a logarithmic axis."""
    table, labels = trajectory.table, _labels(trajectory)
    figure = go.Figure()
    for number, (kind, name) in enumerate(shown_names(_types(table)).items()):
        part = table[table["layer_type"] == kind].set_index("step").reindex(list(trajectory.results))
        figure.add_trace(_line(labels, part[column].astype(float).where(lambda v: v > 0), name, number))
    _styled(figure, title, height=430)
    ticks = _log_ticks([v for trace in figure.data for v in trace.y], percent=column == "relative_update")
    return figure.update_yaxes(title=title, type="log", **ticks)


def r90_steps(trajectory: "Trajectory") -> go.Figure:
    """The bracket of r90 over the steps beside the r90 of noise, a panel a layer type."""
    table, labels = trajectory.table, _labels(trajectory)
    kinds = _types(table)[:MAX_PANELS]
    figure, places, height = _panels(list(shown_names(kinds).values()))
    for number, kind in enumerate(kinds):
        part = table[table["layer_type"] == kind].set_index("step").reindex(list(trajectory.results))
        low, high = part["r90_low"].astype(float), part["r90_high"].astype(float)
        null = float(part["null_r90"].median())
        still = part["n_matrices"].isna()
        unknown = (low.isna() | high.isna()) & ~still
        colour = COLOURS[number % len(COLOURS)]
        bars = {"type": "data", "symmetric": False, "array": numbers(high - low), "arrayminus": [0] * len(low),
                "color": colour, "thickness": 3, "width": 0}  # fmt: skip
        hover = [
            "no matrix of this type moved" if s else f"r90 {words.bracket(a, b)}, noise {words.rank(null)}"
            for a, b, s in zip(low, high, still, strict=True)
        ]
        common: dict[str, Any] = {
            "x": labels,
            "showlegend": False,
            "hovertext": hover,
            "hovertemplate": "%{x}: %{hovertext}<extra></extra>",
        }
        dashed = {"color": INK, "width": 1.4, "dash": "dash"}
        for trace in (
            go.Scatter(y=numbers(low), mode="lines+markers", marker={"color": colour, "size": 6},
                       line={"color": colour, "width": 1}, error_y=bars, **common),
            go.Scatter(y=numbers(np.where(unknown | still, 0.0, np.nan)), mode="text", text=np.where(still, "–", "?"),
                       textfont={"color": INK, "size": 13}, **common),
            go.Scatter(x=labels, y=[null] * len(labels), mode="lines", line=dashed, hoverinfo="skip", showlegend=False),
        ):  # fmt: skip
            figure.add_trace(trace, **places[number])
        figure.update_yaxes(range=[-0.06 * null, 1.14 * null], **places[number])
    _styled(figure, "Does the update's rank grow?", height=height)
    figure.update_annotations(font_size=14)
    figure.update_xaxes(categoryorder="array", categoryarray=labels, range=[-0.4, len(labels) - 0.6])
    return figure.update_xaxes(automargin=True, **_short_ticks(labels))


def similarity_heatmap(trajectory: "Trajectory") -> go.Figure:
    """φ(i, i) between all steps, steps × steps, a panel a layer type; a menu chooses i and the side.

    The expectation for random subspaces stands beside each type's name.
    """
    table, labels = trajectory.similarity_by_type, _labels(trajectory)
    steps = list(trajectory.results)
    kinds = _types(table)[:MAX_PANELS]
    figure, places, height = _panels(kinds, square=True)
    names = shown_names(kinds)
    dims = sorted(table["i"].unique())
    written = len(steps) <= MAX_WRITTEN
    buttons: list[dict[str, Any]] = []
    for side, word in (("left", "output side"), ("right", "input side")):
        for i in dims:
            z, words, titles = [], [], []  # two traces a panel: the values, and grey cells for what is undecidable
            for kind in kinds:
                part = table[(table["layer_type"] == kind) & (table["i"] == i)]
                values, trusted = _square(part, steps, f"phi_{side}"), _square(part, steps, "trusted") >= 0.5
                doubtful = np.isfinite(values) & ~trusted
                z.append([numbers(row) for row in np.where(trusted, values, np.nan)])
                z.append([numbers(row) for row in np.where(doubtful, values, np.nan)])
                # An empty word, where the cell is the other trace's: plotly writes on empty cells too.
                number = np.vectorize(lambda v: f"{v:.2f}" if written else "", otypes=[object])(values)
                words += [np.where(trusted, number, "").tolist(), np.where(doubtful, "?", "").tolist()]
                chance = float(part[f"phi_random_{side}"].median())
                titles.append(f"{names[kind]} · chance {chance:.2g}" if len(part) else f"{names[kind]} · i > rank")
            layout = {f"annotations[{n}].text": title for n, title in enumerate(titles)}
            buttons.append({"label": f"i = {i}, {word}", "method": "update", "args": [{"z": z, "text": words}, layout]})
    active = dims.index(trajectory.shown_dimension)
    first = buttons[active]["args"]
    bar = {"title": {"text": "φ(i, i)", "side": "right"}, "thickness": 12, "outlinewidth": 0}
    for number in range(len(kinds)):
        for trace, colours, note in ((2 * number, "Cividis", ""), (2 * number + 1, UNKNOWN, ", undecidable")):
            figure.add_trace(
                go.Heatmap(
                    x=labels, y=labels, z=first[0]["z"][trace], text=first[0]["text"][trace], texttemplate="%{text}",
                    zmin=0, zmax=1, colorscale=colours, xgap=2, ygap=2, showscale=trace == 0, colorbar=bar,
                    hoverongaps=False, hovertemplate=f"%{{y}} and %{{x}}<br>φ = %{{z:.3f}}{note}<extra></extra>",
                ), **places[number],
            )  # fmt: skip
        figure.data[-1].textfont = {"color": INK, "size": 13}
        figure.layout.annotations[number].text = first[1][f"annotations[{number}].text"]
    _styled(figure, "Do the steps move in the same directions?", height=height)
    figure.update_annotations(font_size=14)
    figure.update_layout(updatemenus=[menu(buttons, active)])
    figure.update_xaxes(type="category", showgrid=False, automargin=True, **_short_ticks(labels))
    return figure.update_yaxes(type="category", showgrid=False, autorange="reversed", **_short_ticks(labels))


def similarity_grid(trajectory: "Trajectory") -> go.Figure:
    """φ(i, j) of one matrix for every i and j: left, right, and the random control; a menu chooses the pair of steps.

    Source: Hu et al. 2021, figures 3 and 4.
    """
    table = trajectory.similarity
    table = table[table["name"] == trajectory.facts.get("grid_matrix")]
    columns = {"phi_left": "output side", "phi_right": "input side", "control_left": "random, output side"}
    figure = make_subplots(cols=3, subplot_titles=list(columns.values()), shared_yaxes=True, horizontal_spacing=0.05)
    buttons: list[dict[str, Any]] = []
    trust: list[int] = []
    for (step_a, step_b), part in table.groupby(["step_a", "step_b"], sort=False):
        grids = [part.pivot(index="i", columns="j", values=column) for column in columns]
        data: dict[str, list[Any]] = {
            "z": [[numbers(row) for row in grid.to_numpy()] for grid in grids],
            "x": [[str(j) for j in grid.columns] for grid in grids],
            "y": [[str(i) for i in grid.index] for grid in grids],
            "text": [],
        }
        doubt = ~part.pivot(index="i", columns="j", values="trusted").to_numpy(dtype=bool)
        for grid, marked in zip(grids, (doubt, doubt, np.zeros_like(doubt)), strict=True):
            number = np.vectorize(lambda v: f"{v:.2f}", otypes=[object])(grid.to_numpy())
            data["text"].append(np.where(marked, number + " ?", number).tolist())
        trust.append(int((~doubt).sum()))
        label = f"{text(step_a)} (A), {text(step_b)} (B)"
        buttons.append({"label": label, "method": "restyle", "args": [data]})
    active = trust.index(max(trust)) if trust else 0
    for panel in range(3 if buttons else 0):
        chosen = {key: values[panel] for key, values in buttons[active]["args"][0].items()}
        figure.add_trace(
            go.Heatmap(
                **chosen, zmin=0, zmax=1, colorscale="Cividis", xgap=2, ygap=2, showscale=panel == 0,
                texttemplate="%{text}", hovertemplate="i = %{y}, j = %{x}: %{z:.3f}<extra></extra>",
                colorbar={"title": {"text": "φ(i, j)", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            ), row=1, col=panel + 1,
        )  # fmt: skip
    _styled(figure, f"How many directions are shared? {text(str(trajectory.facts.get('grid_matrix')))}", height=430)
    figure.update_annotations(font_size=14)
    figure.update_layout(updatemenus=[menu(buttons, active)])
    figure.update_xaxes(type="category", showgrid=False, title="j, directions of B")
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure.update_yaxes(title="i, directions of A", col=1)


def amplification_lines(trajectory: "Trajectory") -> go.Figure:
    """The amplification factor over the steps, one line a layer type; a menu chooses r."""
    table, labels = trajectory.amplification_by_type, _labels(trajectory)
    kinds = _types(table)
    buttons: list[dict[str, Any]] = []
    for r in sorted(table["r"].unique()):
        y: list[list[float | None]] = []
        symbols = []
        for kind in kinds:
            part = table[(table["layer_type"] == kind) & (table["r"] == r)].set_index("step")
            part = part.reindex(list(trajectory.results))
            y.append(numbers(part["factor"].astype(float)))
            symbols.append(["circle-open" if share < 0.5 else "circle" for share in part["trusted"].astype(float)])
        ticks = _log_ticks([1.0, *(v for line in y for v in line)])
        layout = {f"yaxis.{key}": value for key, value in ticks.items()}
        args = [{"y": y, "marker.symbol": symbols}, layout]
        buttons.append({"label": f"r = {r}", "method": "update", "args": args})
    active = min(2, len(buttons) - 1)  # r = 4, as in the source
    first, layout = buttons[active]["args"]
    names = shown_names(kinds).values()
    figure = go.Figure([_line(labels, y, name, n) for n, (name, y) in enumerate(zip(names, first["y"], strict=True))])
    for trace, symbols in zip(figure.data, first["marker.symbol"], strict=True):
        trace.marker.symbol = symbols
    _styled(figure, "Does the update amplify what the base already does?", height=430)
    figure.update_layout(updatemenus=[menu(buttons, active)])
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"})
    ticks = {key.removeprefix("yaxis."): value for key, value in layout.items()}
    return figure.update_yaxes(title="‖ΔW‖ / ‖UᵀWV‖", type="log", **ticks)


def all_figures(trajectory: "Trajectory") -> dict[str, go.Figure]:
    """The report's figures by name, in its order; those without anything to show are left out."""
    figures: dict[str, go.Figure] = {}
    if len(trajectory.table):
        figures["relative_update"] = steps_lines(trajectory, "relative_update", "‖ΔW‖ / ‖W‖")
        figures["r90"] = r90_steps(trajectory)
        figures["signal_rank"] = steps_lines(trajectory, "signal_rank", "signal rank")
    if len(trajectory.similarity):
        figures["similarity"] = similarity_heatmap(trajectory)
        figures["grid"] = similarity_grid(trajectory)
    if len(trajectory.amplification):
        figures["amplification"] = amplification_lines(trajectory)
    return figures


def _labels(trajectory: "Trajectory") -> list[str]:
    return [text(label) for label in trajectory.results]


def _short_ticks(labels: Sequence[str]) -> dict[str, Any]:
    """Ticks for a small panel: the labels without the words they all begin with, at most 8 of them."""
    words = [label.split("-") for label in labels]
    same = 0
    while all(len(w) > same + 1 and w[same] == words[0][same] for w in words):
        same += 1
    short = ["-".join(w[same:]) for w in words]
    step = -(-len(labels) // 8)
    cut = [name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}" for name in short]
    return {"tickvals": list(labels[::step]), "ticktext": cut[::step]}


def _log_ticks(values: Sequence[float | None], percent: bool = False) -> dict[str, Any]:
    """Ticks of a logarithmic axis: 1, 2 and 5 of every decade, or four over a span that holds fewer than three."""
    known = [v for v in values if v]
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
    if sum(low <= tick <= high for tick in ticks) < 3:
        ticks = sorted({float(f"{v:.3g}") for v in np.geomspace(low, high, 4)})
    return {"tickvals": ticks, "ticktext": [f"{100 * v:g}%" if percent else f"{v:g}" for v in ticks]}


def _types(table: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(table["layer_type"]))


def _line(x: Sequence[str], y: Any, name: str, number: int) -> Any:
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return go.Scatter(
        x=x, y=numbers(y), name=name, mode="lines+markers", marker={"size": 7},
        line={"color": COLOURS[number % len(COLOURS)], "width": 2.2, "dash": dash},
        hovertemplate=f"{name}, %{{x}}: %{{y:.3~g}}<extra></extra>",
    )  # fmt: skip


def _panels(titles: Sequence[str], square: bool = False) -> tuple[go.Figure, list[dict[str, int]], int]:
    """(figure of one panel a title, row and column of each, height)."""
    wide = max(1, min(3, len(titles)))
    high = max(1, -(-len(titles) // wide))
    each = 300 if square else 235
    spacing = {"horizontal_spacing": 0.13 if square else 0.075, "vertical_spacing": min(0.25, 0.4 / high)}
    figure = make_subplots(rows=high, cols=wide, subplot_titles=titles, **spacing)
    places = [{"row": n // wide + 1, "col": n % wide + 1} for n in range(len(titles))]
    return figure, places, 110 + each * high


def _square(part: pd.DataFrame, steps: list[str], column: str) -> Any:
    """The symmetric steps × steps matrix of a column, 1 on the diagonal of a step that changed; NaN where none did."""
    values = np.full((len(steps), len(steps)), np.nan)
    for step in {*part["step_a"], *part["step_b"]}:
        values[steps.index(step), steps.index(step)] = 1.0
    for a, b, value in zip(part["step_a"], part["step_b"], part[column], strict=True):
        at = steps.index(a), steps.index(b)
        values[at] = values[at[::-1]] = value
    return values


def _styled(figure: go.Figure, title: str, height: int) -> go.Figure:
    """The figure with the report's look."""
    layout = spec([], title, height, {}, {})["layout"]
    figure.update_layout({key: value for key, value in layout.items() if key not in ("xaxis", "yaxis")})
    figure.update_xaxes(**axis())
    figure.update_yaxes(**axis())
    return figure
