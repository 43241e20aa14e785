"""The summary of a `Result` for a terminal. Formatting only."""

import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_probe.errors import printable
from lowrank_probe.metrics import ENERGY_RANKS

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

WIDE = 108  # columns that the whole table needs; a narrower terminal shows the energy of rank 16 only
_STYLES = {"low-rank": "green", "not low-rank": "magenta", "undecidable": "yellow", "unrelated": "red"}


def print_summary(result: "Result") -> None:
    """One line a layer type: counts, medians, brackets beside their null, energies in per cent, verdict."""
    width = shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120
    console = Console(width=max(width, 80), highlight=False, markup=False, soft_wrap=False)
    ranks = ENERGY_RANKS if width >= WIDE else (16,)
    counts = result.facts.get("counts", {})
    console.print("ledger: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if result.table.empty:
        console.print(_empty(counts))
        _print_findings(result, console)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    heads = ("type", "n", "‖ΔW‖/‖W‖", "stable", "signal", "r50", "null", "r90", "null")
    for head in heads:
        table.add_column(head, justify="left" if head == "type" else "right", no_wrap=True)
    for r in ranks:
        table.add_column(f"E{r}%", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in result.summary.to_dict("records"):
        verdict = str(row["verdict"])
        style = next((s for start, s in _STYLES.items() if verdict.startswith(start)), "")
        table.add_row(
            printable(row["layer_type"]), str(row["n_matrices"]), _number(row["relative_update"]),
            _number(row["stable_rank"]), _rank(row["signal_rank"]),
            _bracket(row["r50_low"], row["r50_high"]), _rank(row["null_r50"]),
            _bracket(row["r90_low"], row["r90_high"]), _rank(row["null_r90"]),
            *(_percent(row[f"energy_{r}"]) for r in ranks), Text(verdict, style=style),
        )  # fmt: skip
    console.print(table)
    console.print(
        "r50, r90: lower–upper end of the true rank that holds 50 %, 90 % of ‖ΔW‖²; ? undecidable; null: Gaussian "
        "noise of that shape. stable, E (energy kept by rank r, in %): of ΔW as stored. Medians over n matrices.",
        style="dim",
    )
    _print_findings(result, console)


def _print_findings(result: "Result", console: Console) -> None:
    """What kind of update it is, a line each."""
    for finding in result.facts.get("findings") or ():
        if finding["kind"] != "identical":  # said already
            console.print(f"kind: {printable(finding['statement'])}")


def _empty(counts: dict[str, int]) -> str:
    if counts.get("unchanged") and not counts.get("analysed"):
        differing = {k: v for k, v in counts.items() if k not in ("unchanged", "excluded", "not a weight", "tied")}
        if not differing:
            return "The two checkpoints are identical in every tensor compared: there is no update to analyse."
    return "No matrix differs between the two: nothing to analyse (see the ledger)."


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _rank(value: float) -> str:
    """A rank, or the median of several, as a whole number; halves go up, as in the figures."""
    return str(math.floor(value + 0.5)) if math.isfinite(value) else "?"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}" if math.isfinite(value) else "–"


def _bracket(low: Any, high: Any) -> str:
    if math.isnan(low) and math.isnan(high):
        return "?"
    if _rank(low) == _rank(high):
        return _rank(low)
    return f"{_rank(low)}–{_rank(high)}"
