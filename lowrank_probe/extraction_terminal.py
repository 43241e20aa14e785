"""What an extraction did, for a terminal. Formatting only."""

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from lowrank_probe import words
from lowrank_probe.check_tables import CheckTable, calibration_table, verification_table
from lowrank_probe.console import LONGEST, console
from lowrank_probe.errors import printable
from lowrank_probe.extraction_summary import ALL, extraction_totals

if TYPE_CHECKING:
    from lowrank_probe.extraction_runs import Extraction
    from lowrank_probe.verification import Verification


def print_extraction(found: "Extraction") -> None:
    """One line an adapter and layer type: ranks, energy kept, error beside the optimum; then what is not carried."""
    out = console()
    several = len(found.adapters) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for head in (*(("adapter",) if several else ()), "type", "n", "rank", "kept", "error", "optimum", "parameters"):
        left = head in ("adapter", "type")
        table.add_column(head, justify="left" if left else "right", no_wrap=True, max_width=LONGEST)
    summary = found.summary
    totals = {row["adapter"]: row for row in extraction_totals(found.ledger).to_dict("records")}
    for label in found.adapters:
        for row in (*summary[summary["adapter"] == label].to_dict("records"), totals[label]):
            if row["n_adapted"]:
                table.add_row(
                    *((label,) if several else ()), printable(row["layer_type"]), str(row["n_adapted"]),
                    words.bracket(row["rank_low"], row["rank_high"]), _percent(row["energy"]),
                    _percent(row["relative_error"]), _percent(row["optimal_error_low"]), f"{row['parameters']:,}",
                    end_section=row["layer_type"] == ALL,
                )  # fmt: skip
    out.print(table)
    out.print(
        "kept: share of these matrices' ‖ΔW‖² in the stored factors; error: ‖ΔW − BA‖/‖ΔW‖; optimum: no matrix of "
        "that rank has a smaller error.",
        style="dim",
    )
    for label in found.adapters:
        rules = found.ledger[(found.ledger["adapter"] == label) & (found.ledger["status"] == "adapted")]["rule"]
        if set(rules) - {"fixed", "energy", "denoised energy", "budget"}:
            counted = ", ".join(f"{rule} in {count}" for rule, count in rules.value_counts().items())
            out.print(f"{label + ': ' if label else ''}what bound the rank: {counted}")
    for label, directory in found.adapters.items():
        told = found.facts["adapters"][label]
        out.print(
            f"{directory}: base + adapter carries {_percent(told['carried'])} of ‖ΔW‖²"
            f" ({words.file_size(told['n_bytes'])}); not carried: {_percent(told['not_carried'])}"
        )
    _print_left_out(found, out)
    if "calibration" in found.facts:
        _print_calibration(found.facts["calibration"], out)


def _print_calibration(told: dict[str, Any], out: Console) -> None:
    """What was tried with its distance from the fine-tune on both parts; of several adapters, plain and chosen only."""
    several = len({row["adapter"] for row in told["tried"]}) > 1
    found = calibration_table(told, every=not several)
    out.print(_rich(found))
    out.print(f"{found.line} {printable(told['file'])}", style="dim")
    if told["plain"]:
        out.print(
            f"plain SVD for {len(told['plain'])} without inputs that are known, such as {printable(told['plain'][0])}"
        )


def print_verification(label: str, check: "Verification", other: str = "the tuned model") -> None:
    """One line a model: how far it is from the other one."""
    out = console()
    found = verification_table(check.facts())
    heads = [f"against {other}{', ' + label if label else ''}", *found.heads[1:]]
    out.print(_rich(found._replace(heads=heads)))
    out.print(found.line)


def _rich(found: CheckTable) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for i, head in enumerate(found.heads):
        table.add_column(head, justify="left" if i < found.n_words else "right", no_wrap=True)
    for row in found.rows:
        table.add_row(*row)
    return table


def _print_left_out(found: "Extraction", out: Console) -> None:
    first = next(iter(found.adapters))
    rows = found.ledger[(found.ledger["adapter"] == first) & (found.ledger["status"] == "not carried")]
    for note, group in rows.groupby("note", sort=False):
        names = ", ".join(printable(name) for name in group["name"].head(3))
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        out.print(
            f"not carried: {names}{more}: {_percent(group['share'].sum(skipna=False))} of ‖ΔW‖² ({printable(note)})"
        )


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f} %" if value < 0.1 else f"{100 * value:.1f} %"
