"""A `Trajectory` for a terminal: a table of steps by layer type, and a short one of φ. Formatting only."""

import shutil
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_probe.terminal import _STYLES, _bracket, _number, _rank

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory


def print_trajectory(trajectory: "Trajectory") -> None:
    """A block a layer type with a line a step; then φ from step to step and from the first to the last, with chance."""
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
    console = Console(width=max(width, 80), highlight=False, markup=False, soft_wrap=False)
    table = trajectory.table
    if table.empty:
        console.print("No matrix differs between the base and any step: nothing to analyse (see the ledgers).")
        return
    shown = _table("type", "step", "n", "‖ΔW‖/‖W‖", "stable", "signal", "r90", "null", "verdict")
    for kind in dict.fromkeys(table["layer_type"]):
        rows = table[table["layer_type"] == kind].to_dict("records")
        for number, row in enumerate(rows):
            verdict = str(row["verdict"])
            style = next((s for start, s in _STYLES.items() if verdict.startswith(start)), "")
            shown.add_row(
                kind if number == 0 else "", str(row["step"]), str(row["n_matrices"]), _number(row["relative_update"]),
                _number(row["stable_rank"]), _rank(row["signal_rank"]), _bracket(row["r90_low"], row["r90_high"]),
                _rank(row["null_r90"]), Text(verdict, style=style), end_section=number == len(rows) - 1,
            )  # fmt: skip
    console.print(shown)
    similarity = trajectory.similarity_by_type
    if not similarity.empty:
        _print_similarity(console, trajectory, similarity)


def _print_similarity(console: Console, trajectory: "Trajectory", table: pd.DataFrame) -> None:
    labels = list(trajectory.results)
    i = trajectory.shown_dimension
    table = table[table["i"] == i]
    following = pd.Series(list(zip(table["step_a"], table["step_b"], strict=True)), index=table.index, dtype=object)
    spans = {"first–last": following == (labels[0], labels[-1])}
    if len(labels) > 2:
        spans = {"step–next": following.isin(list(pairwise(labels)))} | spans
    shown = _table("type", *(f"φ({i}, {i}) {span}" for span in spans), "random")
    for kind in dict.fromkeys(table["layer_type"]):
        cells = []
        for chosen in spans.values():
            part = table[(table["layer_type"] == kind) & chosen]
            doubt = " ?" if len(part) and part["trusted"].median() < 0.5 else ""
            cells.append(_sides(part, "phi") + doubt)
        shown.add_row(kind, *cells, _sides(table[table["layer_type"] == kind], "phi_random"))
    console.print(shown)
    console.print(
        "r90: lower–upper end of the rank that holds 90 % of ‖ΔW‖²; null: noise of that shape. φ, output / input side: "
        "1 the same subspace, random: the mean of random ones; ? undecidable in storage noise. Medians over matrices.",
        style="dim",
    )


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for head in heads:
        left = head in ("type", "step", "verdict")
        # Long names of steps and types fold before numbers are cut.
        table.add_column(head, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    return table


def _sides(part: pd.DataFrame, column: str) -> str:
    if part.empty:
        return "–"
    return f"{part[f'{column}_left'].median():.2f} / {part[f'{column}_right'].median():.2f}"
