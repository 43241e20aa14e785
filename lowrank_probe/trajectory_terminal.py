"""A `Trajectory` for a terminal: each step in a line, a table of steps by layer type, one of φ. Formatting only."""

from itertools import pairwise
from typing import TYPE_CHECKING

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from lowrank_probe import words
from lowrank_probe.console import console
from lowrank_probe.errors import printable
from lowrank_probe.terminal import empty_words, finding_words, ledger_words, styled

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory


def print_trajectory(trajectory: "Trajectory") -> None:
    """What each step is; a block a layer type, a line a step; φ from step to step and first to last, with chance."""
    out = console()
    for label, result in trajectory.results.items():
        out.print(f"{printable(label)}: {ledger_words(result)}")
        if result.table.empty:
            out.print(f"  {empty_words(result)}")
        for line in finding_words(result):
            out.print(f"  {line}")
    table = trajectory.table
    if table.empty:
        return
    shown = _table("type", "step", "n", "‖ΔW‖/‖W‖", "stable", "signal", "r90", "null", "verdict")
    for kind in dict.fromkeys(table["layer_type"]):
        rows = table[table["layer_type"] == kind].to_dict("records")
        for number, row in enumerate(rows):
            shown.add_row(
                printable(kind) if number == 0 else "", printable(row["step"]), str(row["n_matrices"]),
                words.number(row["relative_update"]), words.number(row["stable_rank"]), words.rank(row["signal_rank"]),
                words.bracket(row["r90_low"], row["r90_high"]), words.rank(row["null_r90"]),
                styled(str(row["verdict"])), end_section=number == len(rows) - 1,
            )  # fmt: skip
    out.print(shown)
    similarity = trajectory.similarity_by_type
    if not similarity.empty:
        _print_similarity(out, trajectory, similarity)


def _print_similarity(out: Console, trajectory: "Trajectory", table: pd.DataFrame) -> None:
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
        shown.add_row(printable(kind), *cells, _sides(table[table["layer_type"] == kind], "phi_random"))
    out.print(shown)
    out.print(
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
