"""The summary of a `Result` for a terminal. Formatting only."""

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from lowrank_probe import words
from lowrank_probe.console import LONGEST, console
from lowrank_probe.errors import printable
from lowrank_probe.metrics import ENERGY_RANKS

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

WIDE = 108  # columns that the whole table needs; a narrower terminal shows the energy of rank 16 only
_STYLES = {"low-rank": "green", "not low-rank": "magenta", "undecidable": "yellow", "unrelated": "red"}


def print_summary(result: "Result") -> None:
    """One line a layer type: counts, medians, brackets beside their null, energies in per cent, verdict."""
    out = console()
    ranks = ENERGY_RANKS if out.width >= WIDE else (16,)
    out.print(ledger_words(result))
    if result.table.empty:
        out.print("\n".join([empty_words(result), *finding_words(result)]))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    heads = ("type", "n", "‖ΔW‖/‖W‖", "stable", "signal", "r50", "null", "r90", "null")
    for head in heads:
        table.add_column(head, justify="left" if head == "type" else "right", no_wrap=True, max_width=LONGEST)
    for r in ranks:
        table.add_column(f"E{r}%", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for row in result.summary.to_dict("records"):
        table.add_row(
            printable(row["layer_type"]), str(row["n_matrices"]), words.number(row["relative_update"]),
            words.number(row["stable_rank"]), words.rank(row["signal_rank"]),
            words.bracket(row["r50_low"], row["r50_high"]), words.rank(row["null_r50"]),
            words.bracket(row["r90_low"], row["r90_high"]), words.rank(row["null_r90"]),
            *(words.percent(row[f"energy_{r}"]) for r in ranks), styled(str(row["verdict"])),
        )  # fmt: skip
    out.print(table)
    out.print(
        "r50, r90: lower–upper end of the true rank that holds 50 %, 90 % of ‖ΔW‖²; ? undecidable; null: Gaussian "
        "noise of that shape. stable, E (energy kept by rank r, in %): of ΔW as stored. Medians over n matrices.",
        style="dim",
    )
    for line in finding_words(result):
        out.print(line)


def styled(verdict: str) -> Text:
    """A verdict in its colour."""
    return Text(verdict, style=next((style for start, style in _STYLES.items() if verdict.startswith(start)), ""))


def ledger_words(result: "Result") -> str:
    """How many tensors ended how."""
    return "ledger: " + ", ".join(f"{count} {status}" for status, count in result.facts.get("counts", {}).items())


def finding_words(result: "Result") -> list[str]:
    """What kind of update it is, a line each; that nothing moved says `empty_words`."""
    findings = result.facts.get("findings") or ()
    return [f"kind: {printable(found['statement'])}" for found in findings if found["kind"] != "identical"]


def empty_words(result: "Result") -> str:
    """Why no matrix was analysed."""
    counts = result.facts.get("counts", {})
    compared = sum(counts.get(status, 0) for status in ("unchanged", "vector", "tied"))
    beside = {k: n for k, n in counts.items() if k not in ("unchanged", "vector", "tied", "excluded", "not a weight")}
    others = ", ".join(f"{n} {status}" for status, n in beside.items())
    if not compared:
        return f"No matrix was compared{f': {others}' if others else ''} (see the ledger)."
    if counts.get("vector"):
        only = f"only {words.count(counts['vector'], 'vector')} moved"
        say = f"No matrix differs among the tensors compared, {only}: nothing to analyse"
    else:
        say = "The two checkpoints are identical in every tensor compared: there is no update to analyse"
    return f"{say}; not compared: {others} (see the ledger)." if others else f"{say}."
