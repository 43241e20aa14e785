"""An evaluation to plotly figures as plain dicts, one function a question; imports no torch.

Names come from strangers' files: every one that becomes plotly text goes through `figure_style.text`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.evaluation_runs import interval_word, rank_word
from lowrank_probe.figure_style import (
    COLOURS,
    DASHES,
    INK,
    NOT_GREY,
    Spec,
    faint,
    numbers,
    rank_axis,
    rank_places,
    spec,
    text,
)

if TYPE_CHECKING:
    from lowrank_probe.evaluation_runs import Evaluation

# All together have the ink's colour.
_ALL: Final = "all together"
_WORDS: Final = {"alone": "alone", "leave out": "all but one"}


def loss_spec(found: "Evaluation") -> Spec:
    """What does rank r cost the model? The loss with one layer type truncated, and with all, between base and tuned.

    The band is the 95 % interval of the paired difference to the tuned model, put on its loss.
    """
    return _lines(found, "alone", "Loss with one layer type truncated to rank r")


def leave_out_spec(found: "Evaluation") -> Spec:
    """Which layer type costs most? The loss with all but one type truncated, against "all together"."""
    return _lines(found, "leave out", "Loss with all but one layer type truncated")


def kl_spec(found: "Evaluation") -> Spec:
    """How far are the outputs from the tuned model's? KL(tuned ‖ truncated) at rank r, on a log scale."""
    table = found.table[~found.table["full"]]
    data: list[Spec] = []
    for name, colour, dash, rows in _groups(table, "alone"):
        rows = rows[rows["kl_nats"] > 0]
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": rank_places(rows["rank"]),
            "y": numbers(rows["kl_nats"]),
            "line": {"color": colour, "width": 2, "dash": dash}, "marker": {"size": 5}, "customdata": _ranks(rows),
            "hovertemplate": f"{name}, rank %{{customdata}}: %{{y:.4g}} nats<extra></extra>",
        })  # fmt: skip
    unit = f"KL(tuned ‖ truncated), nats, {found.facts['n_kl_tokens']:,} outputs"
    return spec(
        data,
        "How far are the outputs from the tuned model's?",
        460,
        _axis(table),
        {"title": unit, "type": "log", "dtick": 1, "exponentformat": "power"},
    )


def ranks_spec(found: "Evaluation") -> Spec:
    """What rank is enough? The functional rank of each group with its 95 % interval; an arrow: beyond the grid."""
    table = found.functional
    rows = ["all", *reversed([name for name in dict.fromkeys(table["group"]) if name != "all"])]
    data: list[Spec] = []
    for how, colour, symbol, aside in (
        ("alone", COLOURS[0], "circle", 0.12),
        ("leave out", COLOURS[1], "diamond", -0.12),
    ):
        part = table[table["how"].isin([how, "all"] if how == "alone" else [how])]
        if not len(part):
            continue
        x, low, high = (
            np.array(rank_places(part[name].fillna(part["largest_rank"])))
            for name in ("functional_rank", "low", "high")
        )
        symbols = ["triangle-right" if beyond else symbol for beyond in part["functional_rank"].isna()]
        told = [_told(row) for row in part.to_dict("records")]
        data.append({
            "type": "scatter", "mode": "markers", "name": _WORDS[how], "x": numbers(x), "customdata": told,
            "y": [rows.index(group) + (aside if group != "all" else 0) for group in part["group"]],
            "marker": {"color": colour, "size": 10, "symbol": symbols},
            "error_x": {"type": "data", "symmetric": False, "color": colour, "thickness": 2, "width": 5,
                        "array": numbers(high - x), "arrayminus": numbers(x - low)},
            "hovertemplate": "%{customdata}<extra></extra>",
        })  # fmt: skip
    y = {"tickvals": list(range(len(rows))), "ticktext": [_name(group) for group in rows], "ticksuffix": "  "}
    height = 170 + 34 * max(4, len(rows))
    return spec(data, "What rank is enough?", height, _axis(found.table, "functional rank"), y)


def evaluation_specs(found: "Evaluation") -> dict[str, Spec]:
    """The report's figures by name, in its order; those without anything to show are left out."""
    figures = {"loss": loss_spec(found), "ranks": ranks_spec(found)}
    if (found.functional["how"] == "leave out").any():
        figures["leave_out"] = leave_out_spec(found)
    if (found.table["kl_nats"] > 0).any():
        figures["kl"] = kl_spec(found)
    return figures


def _lines(found: "Evaluation", how: str, title: str) -> Spec:
    table = found.table
    tuned, base = (float(found.row(side)["loss"]) for side in ("tuned", "base"))
    data: list[Spec] = []
    for name, colour, dash, rows in _groups(table, how):
        x, group = rank_places(rows["rank"]), {"legendgroup": name}
        band = numbers([*(tuned + rows["excess_high"]), *(tuned + rows["excess_low"])[::-1]])
        data.append({
            "type": "scatter", "x": [*x, *x[::-1]], "y": band, "fill": "toself", "fillcolor": faint(colour),
            "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip", "showlegend": False, "name": name, **group,
        })  # fmt: skip
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": numbers(rows["loss"]),
            "line": {"color": colour, "width": 2, "dash": dash}, "marker": {"size": 5}, **group,
            "customdata": _ranks(rows), "hovertemplate": f"{name}, rank %{{customdata}}: %{{y:.5g}}<extra></extra>",
        })  # fmt: skip
    shapes = [
        {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": value, "y1": value, "layer": "below",
         "line": {"color": INK, "width": 1.4, "dash": dash}} for value, dash in ((base, "dot"), (tuned, "dash"))
    ]  # fmt: skip
    shapes.append(
        {"type": "rect", "x0": 0, "x1": 1, "xref": "paper", "y0": tuned, "y1": tuned + float(found.facts["tolerance"]),
         "layer": "below", "line": {"width": 0}, "fillcolor": faint("#009e73")}
    )  # fmt: skip
    notes = [
        {"text": f"{word} {value:.4g}", "x": 1, "xref": "paper", "y": value, "xanchor": "right", "yanchor": "bottom",
         "showarrow": False, "font": {"size": 12}} for value, word in ((base, "base"), (tuned, "tuned"))
    ]  # fmt: skip
    y = {"title": merit_word(found)}
    return spec(data, title, 500, _axis(table), y, shapes=shapes, annotations=notes)


def merit_word(found: "Evaluation") -> str:
    """What the loss is, with its unit."""
    merit = str(found.facts["merit"])
    if merit.endswith("loss"):
        return f"{merit}, nats a token"
    return f"{merit}, nats" if merit.startswith("KL") else merit


def _groups(table: pd.DataFrame, how: str) -> list[tuple[str, str, str, pd.DataFrame]]:
    """(name, colour, dash, rows) of each group, and of all together."""
    part = table[table["how"] == how]
    found = [
        (text(name), NOT_GREY[i % len(NOT_GREY)], DASHES[i // len(NOT_GREY) % len(DASHES)], part[part["group"] == name])
        for i, name in enumerate(dict.fromkeys(part["group"]))
    ]
    return [*found, (_ALL, INK, "solid", table[table["how"] == "all"])]


def _name(group: str) -> str:
    return _ALL if group == "all" else text(group)


def _ranks(rows: pd.DataFrame) -> list[str]:
    full = zip(rows["rank"].tolist(), rows["full"].tolist(), strict=True)
    return [f"{rank} (full)" if whole else str(rank) for rank, whole in full]


def _told(row: Mapping[Any, Any]) -> str:
    who = {"alone": f"{text(row['group'])} alone", "all": _ALL, "leave out": f"all but {text(row['group'])}"}[
        row["how"]
    ]
    rank = rank_word(row["functional_rank"], row["largest_rank"])
    return f"{who}: rank {rank}, 95 %: {interval_word(row['low'], row['high'], row['largest_rank'])}"


def _axis(table: pd.DataFrame, title: str = "rank") -> Spec:
    return rank_axis(max(table["rank"].dropna().astype(int), default=1), title)
