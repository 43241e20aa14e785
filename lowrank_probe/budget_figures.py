"""Budgets to plotly figures as plain dicts, one function a question; imports no torch."""

from collections.abc import Callable, Sequence
from typing import Final

from lowrank_probe.accelerators import find_accelerator
from lowrank_probe.budget_words import Unit, run_names, unit_of
from lowrank_probe.budgets import Budget
from lowrank_probe.figure_layers import button
from lowrank_probe.figure_style import COLOURS, DASHES, INK, SYMBOLS, Spec, menu, numbers, spec, text

# Component → colour; what is made of weights is blue, what training adds orange, what the data adds violet.
PARTS: Final = {
    "weights": "#0a84c1", "fp32 master weights": "#56b4e9", "gathered weights": "#8fc3e3",
    "quantization constants": "#3d6f91", "fp32 upcasts": "#2aa198",
    "unpacked weight": "#6c8cbf", "adapter": "#009e73", "gradients": "#e69f00",
    "gradient buckets": "#f2c869", "optimizer states": "#d55e00", "optimizer step": "#a57c1b", "activations": "#cc79a7",
    "logits": "#8a4f9e", "working memory": "#e3b1cd", "reserve": "#8c8c8c",
}  # fmt: skip
RANKS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEQS: Final = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MAX_BARS: Final = 48
_GOLDEN: Final = (5**0.5 - 1) / 2
_CARDS: Final = ("T4", "RTX 4090", "RTX 5090", "L40S", "H100", "H200", "B200", "MI355X")
_ROW: Final = 46  # pixels of a bar and its name above it
_LABELS: Final = 115  # pixels above the bars for the cards' names
_BELOW: Final = 230  # pixels around the plot, the legend's below it with them
_NODES: Final = (
    ("8 × H100", 8, "H100"),
    ("16 × H100", 16, "H100"),
    ("8 × B200", 8, "B200"),
    ("8 × MI355X", 8, "MI355X"),
)


def chosen(budgets: Sequence[Budget], most: int) -> list[int]:
    """Which of many runs are shown where `most` have room: every full fine-tune, and others from everywhere.

    Multiples of the golden ratio, modulo 1, lie apart from each other, and in step with no list of ranks or lengths.
    """

    def spread(found: list[int], n: int) -> list[int]:
        places = (int(len(found) * (k * _GOLDEN % 1)) for k in range(99 * len(found)))
        return [found[i] for i in list(dict.fromkeys(places))[:n]]

    full = spread([i for i, one in enumerate(budgets) if one.step.method == "full"], most)
    others = [i for i, one in enumerate(budgets) if one.step.method != "full"]
    return sorted([*full, *spread(others, most - len(full))])


def bars_spec(budgets: Sequence[Budget]) -> Spec:
    """What does each run need, and of what? A stacked bar a run at its peak, card sizes as dotted lines.

    A run's name is above its bar, so that the bar has the whole width, on a narrow screen too.
    """
    every, unit = run_names(budgets), unit_of(budgets)
    picked = chosen(budgets, MAX_BARS)[::-1]
    names, shown, data = [text(every[i]) for i in picked], [budgets[i] for i in picked], list[Spec]()
    for part, colour in PARTS.items():
        x = [next((one.at[found.peak_phase] for one in found.components if one.name == part), 0) for found in shown]
        if any(x):
            data.append({
                "type": "bar", "orientation": "h", "name": part, "y": names, "x": numbers([unit.of(v) for v in x]),
                "marker": {"color": colour},
                "hovertemplate": f"%{{y}}<br>{part}: %{{x:.3~f}} {unit.binary}<extra></extra>",
            })  # fmt: skip
    most = unit.of(max(found.total_bytes for found in shown))
    shapes, notes = _card_lines(most, "x", unit)
    above = _LABELS if notes else 0
    notes += [
        {"text": name, "x": 0, "xref": "paper", "xanchor": "left", "y": i, "yref": "y", "yanchor": "bottom",
         "yshift": 0.2 * _ROW, "showarrow": False, "font": {"size": 12}}
        for i, name in enumerate(names)
    ]  # fmt: skip
    bars = _ROW * max(2, len(shown))
    x_axis = {"title": f"{unit.binary} on one card", "range": [0, 1.1 * most]}
    y = {"type": "category", "showgrid": False, "showticklabels": False, "domain": [0, bars / (bars + above)]}
    return spec(data, "What does it need?", bars + above + _BELOW, x_axis, y, barmode="stack", bargap=0.6,
                shapes=shapes, annotations=notes, legend=_legend(bars + above),
                margin={"l": 20, "r": 20, "t": 80, "b": 50})  # fmt: skip


def phases_spec(budgets: Sequence[Budget]) -> Spec:
    """Which phase peaks? A stacked bar a phase; a menu chooses the run."""
    budgets = [one for one in budgets if one.knows_activations]
    unit, every = unit_of(budgets), run_names(budgets)
    picked = chosen(budgets, MAX_BARS)
    budgets, names = [budgets[i] for i in picked], [every[i] for i in picked]
    phases, buttons, traces = list(budgets[0].phases), list[Spec](), list[Spec]()
    parts = [part for part in PARTS if any(one.name == part for found in budgets for one in found.components)]
    for name, found in zip(names, budgets, strict=True):
        at = {one.name: one.at for one in found.components}
        y = [numbers([unit.of(at.get(part, {}).get(phase, 0)) for phase in phases]) for part in parts]
        buttons.append(button(text(name), {"y": y}))
    for part, y in zip(parts, buttons[0]["args"][0]["y"], strict=True):
        traces.append({
            "type": "bar", "name": part, "x": phases, "y": y, "marker": {"color": PARTS[part]},
            "hovertemplate": f"%{{x}}<br>{part}: %{{y:.3~f}} {unit.binary}<extra></extra>",
        })  # fmt: skip
    y_axis = {"title": f"{unit.binary} on one card", "rangemode": "tozero"}
    return spec(traces, "Which phase peaks?", 320 + _BELOW, {"showgrid": False}, y_axis, barmode="stack", bargap=0.45,
                updatemenus=[menu(buttons)], legend=_legend(320))  # fmt: skip


def rank_spec(budgets: Sequence[Budget]) -> Spec:
    """What does a rank cost? Parameters, share, file and peak against rank, a line a method; a menu chooses which."""
    lines, unit = _by_line([one for one in budgets if one.counts.adapter], "rank", RANKS), unit_of(budgets)
    read: dict[str, Callable[[Budget], float]] = {
        "trainable parameters": lambda one: one.counts.adapter,
        "share of all parameters": lambda one: one.counts.adapter / (one.counts.total + one.counts.adapter),
        "adapter file, MB": lambda one: one.adapter_file_bytes / 1e6,
        f"{'peak on one card' if budgets[0].knows_activations else 'on one card without activations'}, {unit.binary}": (
            lambda one: unit.of(one.total_bytes)
        ),
    }
    formats = ["~s", ".3~%", "~s", "~s"]
    buttons = [
        button(text(title), {"y": [numbers([value(one) for one in line]) for line in lines.values()]},
               {"yaxis.title.text": title, "yaxis.tickformat": form})
        for (title, value), form in zip(read.items(), formats, strict=True)
    ]  # fmt: skip
    data = [
        _line(i, name, [one.step.rank for one in line], y, "rank")
        for i, ((name, line), y) in enumerate(zip(lines.items(), buttons[0]["args"][0]["y"], strict=True))
    ]
    ranks = sorted({one.step.rank for line in lines.values() for one in line})
    x = {"title": "rank", "type": "log", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}
    y_axis = {"title": next(iter(read)), "tickformat": "~s", "rangemode": "tozero"}
    return spec(data, "What does a rank cost?", 420, x, y_axis, updatemenus=[menu(buttons)])


def seq_spec(budgets: Sequence[Budget]) -> Spec:
    """What does a longer sequence cost? The peak on one card, a line a run, card sizes as dotted lines."""
    lines = _by_line([one for one in budgets if one.knows_activations], "seq", SEQS)
    data, most, first, unit = list[Spec](), 0.0, next(iter(lines.values())), unit_of(budgets)
    for i, (name, line) in enumerate(lines.items()):
        y = [unit.of(one.total_bytes) for one in line]
        most = max(most, *y)
        data.append(_line(i, name, [one.step.seq or 0 for one in line], numbers(y), "tokens"))
    shapes, notes = _card_lines(most, "y", unit)
    seqs = [one.step.seq or 0 for one in first]
    x = {"title": "tokens a sequence", "type": "log", "tickvals": seqs, "ticktext": [f"{seq:,}" for seq in seqs]}
    y_axis = {"title": f"peak on one card, {unit.binary}", "range": [0, 1.06 * most]}
    return spec(data, "What does a longer sequence cost?", 480, x, y_axis, shapes=shapes, annotations=notes)


def budget_specs(budgets: Sequence[Budget]) -> dict[str, Spec]:
    """The page's figures by name, in its order; those without anything to show are left out."""
    figures = {"bars": bars_spec(budgets)}
    if any(one.knows_activations for one in budgets):
        figures["phases"] = phases_spec(budgets)
    if any(one.counts.adapter for one in budgets):
        figures["ranks"] = rank_spec(budgets)
    if any(one.knows_activations for one in budgets):
        figures["seqs"] = seq_spec(budgets)
    return figures


def _legend(height: int) -> Spec:
    """Below the plot of that many pixels and its axis's title."""
    return {"orientation": "h", "yanchor": "top", "y": -66 / height, "x": 0, "traceorder": "normal"}


def _by_line(budgets: Sequence[Budget], what: str, usual: Sequence[int]) -> dict[str, list[Budget]]:
    """Line → its budgets, ascending: those that were asked for where they are several, else the usual ones."""
    lines: dict[str, list[Budget]] = {}
    other = "seq" if what == "rank" else "rank"
    several = len({getattr(one.step, other) for one in budgets}) > 1
    for one in budgets:
        value = getattr(one.step, other)
        name = one.label + (f", {'r=' if other == 'rank' else ''}{value:,}{' tokens' if other == 'seq' else ''}" if (
            several and value is not None and (other == "seq" or one.counts.adapter)) else "")  # fmt: skip
        lines.setdefault(name, []).append(one)
    if max(len(line) for line in lines.values()) == 1:
        limit = budgets[0].positions if what == "seq" else None
        few = {value for value in usual if limit is None or value <= limit} or {limit or usual[0]}
        values = sorted(few | {getattr(one.step, what) for one in budgets if getattr(one.step, what)})
        lines = {name: [line[0].changed(**{what: value}) for value in values] for name, line in lines.items()}
    return {name: sorted(line, key=lambda one: getattr(one.step, what)) for name, line in lines.items()}


def _line(i: int, name: str, x: list[int], y: list[float | None], unit: str) -> Spec:
    colour = COLOURS[i % len(COLOURS)]
    return {
        "type": "scatter", "mode": "lines+markers", "name": text(name), "x": x, "y": y,
        "line": {"color": colour, "width": 2, "dash": DASHES[i % len(DASHES)]},
        "marker": {"color": colour, "size": 7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        "hovertemplate": f"{text(name)}, %{{x}} {unit}: %{{y:.4~g}}<extra></extra>",
    }  # fmt: skip


def _card_lines(most: float, axis: str, unit: Unit) -> tuple[list[Spec], list[Spec]]:
    """Dotted lines at what cards have for a process, below `most`: those cards whose names have room beside others."""
    sizes = [(find_accelerator(name).label, unit.of(find_accelerator(name).usable_bytes)) for name in _CARDS]
    sizes += [(label, unit.of(n * find_accelerator(name).usable_bytes)) for label, n, name in _NODES]
    sizes = sorted((one for one in sizes if one[1] <= 1.05 * most), key=lambda one: one[1])
    other = "y" if axis == "x" else "x"
    shapes, notes, last = list[Spec](), list[Spec](), -most
    line = {"type": "line", "line": {"color": INK, "width": 1, "dash": "dot"}, f"{other}ref": f"{other} domain"}
    for label, size in sizes:
        if size - last >= (0.045 if axis == "x" else 0.05) * most:
            shapes.append(line | {f"{axis}0": size, f"{axis}1": size, f"{other}0": 0, f"{other}1": 1})
            place = {"y": 1, "yanchor": "bottom", "xanchor": "center", "textangle": -90} if axis == "x" else {
                "x": 1, "xanchor": "right", "yanchor": "bottom"}  # fmt: skip
            notes.append(
                {"text": label, axis: size, f"{other}ref": f"{other} domain", "showarrow": False, "font": {"size": 11}}
                | place
            )
            last = size
    return shapes, notes
