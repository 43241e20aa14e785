"""A `Training` to plotly figures as plain dicts, one function a question; imports no torch.

Names come from strangers' options: every one that becomes plotly text goes through `figure_style.text`.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.figure_style import (
    COLOURS,
    DASHES,
    INK,
    NOT_GREY,
    SYMBOLS,
    Spec,
    faint,
    menu,
    numbers,
    rank_axis,
    rank_places,
    spec,
    text,
)

if TYPE_CHECKING:
    from lowrank_probe.training_runs import Training

_NATS: Final = "held-out loss, nats a token"
CURVES: Final = "loss, nats a token"


def training_specs(found: "Training") -> dict[str, Spec]:
    """The report's figures by name, in its order; those without anything to show are left out."""
    made = {
        "loss": loss_spec(found), "ranks": ranks_spec(found), "parameters": parameters_spec(found),
        "curves": curves_spec(found), "search": search_spec(found), "memory": memory_spec(found),
        "subspaces": subspaces_spec(found), "amplification": amplification_spec(found),
    }  # fmt: skip
    return {name: one for name, one in made.items() if one is not None}


def loss_spec(found: "Training") -> Spec | None:
    """Is LoRA of rank r as good as full fine-tuning? Mean loss over seeds, the range of the seeds as band."""
    data: list[Spec] = []
    ranks = sorted(set(found.runs.loc[found.runs["rank"] > 0, "rank"]))
    if not ranks:
        return None
    ends = [ranks[0], ranks[-1]] if len(ranks) > 1 else [ranks[0] / 2, ranks[0] * 2]
    full = found.sound.loc[found.sound["method"] == "full", "loss"]
    if len(full):
        data += _band(ends, [full.min()] * 2, [full.max()] * 2, INK)
        data.append(_flat("full fine-tune", ends, found.full_loss, "dash"))
    data.append(_flat("base", ends, found.base_loss, "dot"))
    for name, style, group in _groups(found):
        by_rank = group.groupby("rank")["loss"]
        x = [int(rank) for rank in by_rank.mean().index]
        data += _band(x, by_rank.min(), by_rank.max(), style["line"]["color"])
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": numbers(by_rank.mean()), **style,
            "hovertemplate": f"{name}, rank %{{x}}: %{{y:.4f}}<extra></extra>",
        })  # fmt: skip
    return spec(data, "Is LoRA of rank r as good as full fine-tuning?", 480, _ranks_axis(ranks), {"title": _NATS})


def ranks_spec(found: "Training") -> Spec | None:
    """Do the three kinds of evidence agree? Trained, functional and spectral rank of each group, with intervals."""
    table = found.verdict
    if table.empty:
        return None
    names = list(table["layer_type"])[::-1]
    data: list[Spec] = []
    furthest = 1.0
    for number, (kind, title) in enumerate(
        (("trained", "trained: as good as full"), ("functional", "functional: ΔW truncated"), ("r90", "spectral: r90"))
    ):
        x, low, high, symbols, y, told = [], [], [], [], [], []
        for row in table.to_dict("records"):
            largest = row.get(f"{kind}_largest")
            if kind != "r90" and pd.isna(largest):
                continue
            ends = [row[f"{kind}_{end}"] for end in ("low", "high")]
            if kind == "r90" and pd.isna(ends[0]):
                continue
            at = ends[1] if kind == "r90" else row[f"{kind}_rank"]
            beyond = pd.isna(at)
            reached = [float(largest if pd.isna(one) else one) for one in (at, *ends)]
            middle, first, last = rank_places((reached[0], min(reached[:2]), max(reached[0], reached[2])))
            x.append(middle)
            low.append(middle - first)
            high.append(last - middle)
            furthest = max(furthest, *reached)
            symbols.append("triangle-right" if beyond else SYMBOLS[number])
            y.append(names.index(row["layer_type"]) + 0.22 * (1 - number))
            said = f"> {largest}" if beyond else f"{at:g}"
            told.append(f"{text(str(row['layer_type']))}, {kind}: {said}")
        data.append({
            "type": "scatter", "mode": "markers", "name": title, "x": numbers(x), "y": numbers(y), "customdata": told,
            "marker": {"color": COLOURS[number], "size": 10, "symbol": symbols},
            "error_x": {"type": "data", "symmetric": False, "array": numbers(high), "arrayminus": numbers(low),
                        "color": COLOURS[number], "thickness": 2, "width": 4},
            "hovertemplate": "%{customdata}<extra></extra>",
        })  # fmt: skip
    if not any(one["x"] for one in data):
        return None
    y_axis = {"tickvals": list(range(len(names))), "ticktext": [text(str(one)) for one in names],
              "range": [-0.6, len(names) - 0.4]}  # fmt: skip
    x_axis = rank_axis(furthest, "rank (▶: beyond the largest tried)")
    return spec(data, "Do the three kinds of evidence agree?", 150 + 44 * len(names), x_axis, y_axis)


def parameters_spec(found: "Training") -> Spec | None:
    """Where are parameters best spent? Mean loss against trained parameters, a line a group."""
    data: list[Spec] = []
    for name, style, group in _groups(found):
        means = group.groupby("rank")[["n_trained", "loss"]].mean()
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": numbers(means["n_trained"]),
            "y": numbers(means["loss"]), **style, "customdata": [int(rank) for rank in means.index],
            "hovertemplate": f"{name}, rank %{{customdata}}, %{{x:,}} parameters: %{{y:.4f}}<extra></extra>",
        })  # fmt: skip
    if not data:
        return None
    x = [value for one in data for value in one["x"] if value]
    if math.isfinite(found.full_loss):
        data.append(_flat("full fine-tune", [min(x), max(x)], found.full_loss, "dash"))
    axis = {"title": "trained parameters", "type": "log", "exponentformat": "SI"}
    return spec(data, "Where are parameters best spent?", 440, axis, {"title": _NATS})


def curves_spec(found: "Training") -> Spec | None:
    """How did the runs learn? Held-out and training loss over the steps, of the first seed; a menu of the groups.

    A held-out loss begins at step 0, where every run is the base.
    """
    seed = found.runs["seed"].min()
    picked = found.runs[found.runs["seed"] == seed]
    full, adapters = picked[picked["method"] == "full"], picked[picked["method"] != "full"]
    ranks = sorted(set(adapters["rank"]))
    data: list[Spec] = []
    shown: dict[str, list[int]] = {}  # entry of the menu → its traces

    def add(row: Any, name: str, colour: str, width: float, symbol: str) -> None:
        history = found.histories[found.histories["label"] == row.label]
        line = {"color": colour, "width": width}
        told = f"{text(str(row.label))}, step %{{x}}: %{{y:.4f}}"
        for column, start, title, more in (
            ("eval_loss", [found.base_loss], name,
             {"mode": "lines+markers", "line": line, "marker": {"size": 7, "symbol": symbol}}),
            ("loss", [], f"{name}, training", {"mode": "lines", "line": line | {"width": 1.2, "dash": "dot"},
                                               "showlegend": False}),
        ):  # fmt: skip
            rows = history[history[column].notna()]
            data.append({
                "type": "scatter", "name": title, "x": numbers([*[0] * len(start), *rows["step"]]),
                "y": numbers([*start, *rows[column]]), "legendgroup": text(str(row.label)), **more,
                "hovertemplate": f"{told} ({'held out' if start else 'training'})<extra></extra>",
            })  # fmt: skip

    for row in full.itertuples():
        add(row, "full fine-tune", INK, 3, "circle")
    always = list(range(len(data)))
    several = len(set(adapters["method"])) > 1
    for (method, targets), rows in adapters.groupby(["method", "targets"], sort=False):
        first = len(data)
        for row in rows.sort_values("rank").itertuples():
            place = ranks.index(row.rank)
            add(row, f"r={row.rank}", NOT_GREY[place % len(NOT_GREY)], 2, SYMBOLS[place % len(SYMBOLS)])
        shown[_name(method, targets, several)] = [*always, *range(first, len(data))]
    entries = list(shown.items())
    buttons = [
        {"label": name, "method": "update", "args": [{"visible": [i in members for i in range(len(data))]}, {}]}
        for name, members in entries
    ]
    if entries:
        for i, trace in enumerate(data):
            trace["visible"] = i in entries[0][1]
    more = {"updatemenus": [menu(buttons)]} if len(buttons) > 1 else {}
    return spec(data, f"How did the runs of seed {seed} learn?", 480, {"title": "step"}, {"title": CURVES}, **more)


def search_spec(found: "Training") -> Spec | None:
    """Which learning rate? The loss after a short run at each rate, a line a method."""
    if found.searches.empty:
        return None
    data: list[Spec] = []
    for number, (method, rows) in enumerate(found.searches.groupby("method", sort=False)):
        rows = rows.sort_values("lr")
        name = text(str(method))
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": numbers(rows["lr"]),
            "y": numbers(rows["loss"]), "line": {"color": COLOURS[number % len(COLOURS)], "width": 2},
            "hovertemplate": f"{name}, %{{x:.0e}}: %{{y:.4f}}<extra></extra>",
        })  # fmt: skip
    axis = {"title": "learning rate", "type": "log", "dtick": 1, "exponentformat": "power"}
    return spec(data, "Which learning rate?", 400, axis, {"title": _NATS})


def memory_spec(found: "Training") -> Spec | None:
    """Was the memory predicted? `probe budget` beside the measured peak, of the first seed."""
    rows = found.runs[found.runs["peak_bytes"].notna() & (found.runs["seed"] == found.runs["seed"].min())]
    if rows.empty:
        return None
    data: list[Spec] = [
        {
            "type": "bar", "name": title, "x": [text(str(one)) for one in rows["label"]],
            "y": numbers(rows[column] / 2**30), "marker": {"color": colour},
            "hovertemplate": "%{x}: %{y:.3g} GiB<extra></extra>",
        }
        for column, title, colour in (
            ("predicted_bytes", "predicted", COLOURS[5]), ("peak_bytes", "measured", COLOURS[0])
        )
    ]  # fmt: skip
    axes: tuple[Spec, Spec] = ({"automargin": True}, {"title": "allocated at the peak, GiB", "rangemode": "tozero"})
    return spec(data, "Was the memory predicted?", 460, *axes, barmode="group")


def subspaces_spec(found: "Training") -> Spec | None:
    """Do two adapters learn the same directions? φ(i, i) over i, median over matrices, against random subspaces."""
    if found.subspaces is None or found.subspaces.similarity.empty:
        return None
    table = found.subspaces.similarity
    table = table[table["i"] == table["j"]]
    short = _short(found)
    data: list[Spec] = []
    for number, ((a, b), rows) in enumerate(table.groupby(["step_a", "step_b"], sort=False)):
        if a == b:
            continue
        medians = rows.groupby("i")[["phi_left", "control_left"]].median()
        name, colour = text(f"{short.get(a, a)} and {short.get(b, b)}"), COLOURS[number % len(COLOURS)]
        for column, dash, title in (("phi_left", "solid", name), ("control_left", "dot", f"{name}, random")):
            data.append({
                "type": "scatter", "mode": "lines+markers", "name": title, "x": [int(i) for i in medians.index],
                "y": numbers(medians[column]), "line": {"color": colour, "width": 2, "dash": dash},
                "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7}, "showlegend": column == "phi_left",
                "hovertemplate": f"{title}, i = %{{x}}: %{{y:.3f}}<extra></extra>",
            })  # fmt: skip
    ranks = sorted(set(table["i"]))
    axes = _ranks_axis(ranks) | {"title": "i, leading directions of both"}
    return spec(data, "Do two adapters learn the same directions?", 460, axes, {"title": "φ(i, i)", "range": [0, 1.05]})


def amplification_spec(found: "Training") -> Spec | None:
    """Does the update amplify what the base already does? ‖ΔW‖/‖UᵀWV‖ at the adapter's rank, by layer type."""
    if found.subspaces is None or found.subspaces.amplification.empty:
        return None
    table, short = found.subspaces.amplification_by_type, _short(found)
    data: list[Spec] = []
    for number, (step, rows) in enumerate(table.groupby("step", sort=False)):
        name = text(short.get(step, str(step)))
        last = rows[rows["r"] == rows["r"].max()]
        data.append({
            "type": "bar", "name": name,
            "x": [text(str(one)) for one in last["layer_type"]], "y": numbers(last["factor"]),
            "marker": {"color": COLOURS[number % len(COLOURS)]},
            "hovertemplate": f"{name}, %{{x}}: %{{y:.3g}}<extra></extra>",
        })  # fmt: skip
    title = "Does the update amplify what the base already does?"
    return spec(data, title, 420, {}, {"title": "‖ΔW‖ / ‖UᵀWV‖", "rangemode": "tozero"}, barmode="group")


def _groups(found: "Training") -> Iterator[tuple[str, Spec, pd.DataFrame]]:
    """(name, line and marker, rows) of each variant and group of targets, without the runs that diverged.

    A colour is a group; of several variants a variant and group, and the marker says which variant.
    """
    adapters = found.runs[found.runs["method"] != "full"]
    variants = list(dict.fromkeys(adapters["method"]))
    sound = found.sound
    for i, (method, group) in enumerate(dict.fromkeys(zip(adapters["method"], adapters["targets"], strict=True))):
        rows = sound[(sound["method"] == method) & (sound["targets"] == group)]
        dash = DASHES[i // len(NOT_GREY) % len(DASHES)]
        symbol = SYMBOLS[variants.index(method) % len(SYMBOLS)]
        style = {
            "line": {"color": NOT_GREY[i % len(NOT_GREY)], "width": 2, "dash": dash},
            "marker": {"size": 8 if len(variants) > 1 else 6, "symbol": symbol},
        }
        if len(rows):
            yield _name(method, group, len(variants) > 1), style, rows


def _name(method: object, group: object, several: bool) -> str:
    """A group of targets; of several variants with the variant before it."""
    return text(f"{method} {group}" if several else str(group))


def _short(found: "Training") -> dict[str, str]:
    """Label → rank and seed, which tell the adapters apart whose subspaces are compared: all are of one group."""
    return {str(row.label): f"r={row.rank} seed {row.seed}" for row in found.runs.itertuples()}


def _ranks_axis(ranks: list[int]) -> Spec:
    return {"title": "rank", "type": "log", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}


def _flat(name: str, x: list[float], y: float, dash: str) -> Spec:
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": numbers(x), "y": numbers([y, y]),
        "line": {"color": INK, "width": 1.6, "dash": dash}, "hovertemplate": f"{name}: %{{y:.4f}}<extra></extra>",
    }  # fmt: skip


def _band(x: list[Any], low: Any, high: Any, colour: str) -> list[Spec]:
    """The area between two lines."""
    y = numbers([*np.asarray(high, dtype=float), *np.asarray(low, dtype=float)[::-1]])
    return [{
        "type": "scatter", "mode": "lines", "x": [*x, *x[::-1]], "y": y, "fill": "toself", "fillcolor": faint(colour),
        "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False,
    }]  # fmt: skip
