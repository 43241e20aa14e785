"""The look of the figures, and how values and names become plotly's: palette, axes, menus, text. Plain dicts only."""

import html
import math
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Spec = dict[str, Any]  # a plotly figure as its JSON: {"data": [trace, …], "layout": {…}}

INK: Final = "#7d8594"  # readable on white and on near-black
# Okabe & Ito's colour-blind-safe set without black and yellow, which vanish on one of the two themes.
COLOURS: Final = ("#0a84c1", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c", "#a57c1b")
# Beside lines of `INK` no grey, which is near it.
NOT_GREY: Final = tuple(colour for colour in COLOURS if colour != "#8c8c8c")
DASHES: Final = ("solid", "dashdot", "dot")
SYMBOLS: Final = ("circle", "square", "diamond", "triangle-up", "x", "triangle-down", "cross", "star")
# 0.625 lies between the verdict's thresholds 0.5 (low-rank) and 0.75 (not low-rank).
DIVERGING: Final = ((0.0, "#0868a6"), (0.5, "#8fc3e3"), (0.625, "#ece7dc"), (0.75, "#f2b26b"), (1.0, "#c04d00"))
UNKNOWN: Final = ((0.0, "rgba(128,128,128,.22)"), (1.0, "rgba(128,128,128,.22)"))
NULL_LINE: Final = {"color": INK, "width": 1.4, "dash": "dash"}
THRESHOLD_LINE: Final = {"color": INK, "width": 1, "dash": "dot"}


def spec(data: list[Spec], title: str, height: int, x: Spec, y: Spec, **layout: Any) -> Spec:
    """A figure with the common look: no background of its own and a mid-grey ink, for light and dark pages.

    height: pixels. x, y: the properties of the two axes beyond the common ones.
    """
    common = {
        "template": {}, "title": {"text": title, "x": 0, "xref": "paper"}, "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        "margin": {"l": 70, "r": 20, "t": 80, "b": 50}, "hoverlabel": {"align": "left"}, "showlegend": True,
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "xaxis": axis(**x), "yaxis": axis(automargin=True, **y),
    }  # fmt: skip
    return {"data": data, "layout": common | layout}


def axis(title: str = "", **more: Any) -> Spec:
    """A quiet axis: a faint grid, a thin line, no zero line."""
    line = {"gridcolor": "rgba(128,128,128,.18)", "zeroline": False, "linecolor": "rgba(128,128,128,.5)"}
    return line | ({"title": {"text": title}} if title else {}) | more


def menu(buttons: list[Spec], active: int = 0) -> Spec:
    """A drop-down above the figure's right end. Plotly lights the active entry, hence the dark text on every theme."""
    return {"buttons": buttons, "active": active, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom",
            "bgcolor": "#ffffff", "bordercolor": "#c5cad3", "font": {"color": "#22262e"}}  # fmt: skip


def rank_places(ranks: Iterable[Any]) -> list[float]:
    """Where ranks are drawn: log₂(1 + r), so that 0 has a place."""
    return [math.log2(1 + float(rank)) for rank in ranks]


def rank_axis(largest: float, title: str = "rank") -> Spec:
    """The axis of `rank_places`: ticks at 0 and the powers of 2."""
    ticks = [rank for rank in (0, *(2**power for power in range(20))) if rank <= max(largest, 1)]
    return {"title": title, "tickvals": rank_places(ticks), "ticktext": [str(tick) for tick in ticks]}


def numbers(values: Any) -> list[float | None]:
    """Six digits of each value, which make a smaller page than float64 in full; None for NaN and ∞."""
    values = np.asarray(values, dtype=float)
    return [float(f"{v:.6g}") if ok else None for v, ok in zip(values.tolist(), np.isfinite(values), strict=True)]


def log_spaced(k: int, points: int) -> NDArray[np.int64]:
    """At most `points` distinct integers from 1 to k, log-spaced; empty for k = 0."""
    return np.unique(np.geomspace(1, k, points).round().astype(np.int64)) if k else np.empty(0, dtype=np.int64)


def faint(colour: str) -> str:
    """A "#rrggbb" colour as a transparent fill."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},.12)"


def shown_names(names: Iterable[str], limit: int = 40) -> dict[str, str]:
    """Each name as plotly text: cut in the middle to `limit` characters, numbered where two would then be alike.

    >>> list(shown_names(["q", "abc-1-xyz", "abc-2-xyz"], 6).values())
    ['q', 'abc…xyz', 'abc…xyz (2)']
    """
    half = limit // 2
    shown: dict[str, str] = {}
    for name in dict.fromkeys(names):
        cut = name if len(name) <= limit else f"{name[:half]}…{name[-half:]}"
        number = sum(other == cut or other.startswith(f"{cut} (") for other in shown.values())
        shown[name] = f"{cut} ({number + 1})" if number else cut
    return {name: text(cut) for name, cut in shown.items()}


def text(name: str) -> str:
    """An untrusted name as plotly text, which would read tags as markup."""
    return html.escape(name, quote=False)
