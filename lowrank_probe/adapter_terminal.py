"""Resized adapters and merged models for a terminal. Formatting only."""

import math
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from lowrank_probe.console import console
from lowrank_probe.errors import printable
from lowrank_probe.layers import sort_key
from lowrank_probe.words import file_size

if TYPE_CHECKING:
    from lowrank_probe.merging import Merged
    from lowrank_probe.resizing import Resized


def print_resized(found: "Resized") -> None:
    """One line a layer type: ranks before and after, energy, error against the optimum; then the whole adapter."""
    heads = ("type", "n", "rank", "new rank", "energy %", "error", "optimum")
    rows = []
    for layer_type, part in _by_type(found.table):
        squares = part["fro_norm"] ** 2
        total = float(squares.sum()) or math.nan
        energy = float((squares * part["energy"]).sum()) / total
        error, optimum = (math.sqrt(float((squares * part[x] ** 2).sum()) / total) for x in ("error", "optimum"))
        ranks = _span(part["rank_before"]), _span(part["rank"])
        rows.append((layer_type, len(part), *ranks, _percent(energy), _number(error), _number(optimum)))
    out = console()
    _print(out, heads, rows)
    facts = found.facts
    out.print(
        f"keeps {_percent(found.energy)} % of ‖ΔW‖², ‖ΔW − BA‖/‖ΔW‖ = {found.error:.6g} of the factors as stored; "
        f"{facts['n_parameters']:,} parameters, {file_size(facts['n_bytes'])}"
    )


def print_overlap(overlap: pd.DataFrame) -> None:
    """One line a layer type and two adapters: shared directions beside chance, cosine, conflicting signs; means."""
    out = console()
    if overlap.empty:
        out.print("no matrix is changed by two adapters: their updates do not overlap")
        return
    heads = ("adapters", "type", "n", "φ out", "random", "φ in", "random", "cosine", "signs against %")
    columns = ("phi_left", "control_left", "phi_right", "control_right", "cosine")
    rows = []
    for (a, b), pair in overlap.groupby(["adapter_a", "adapter_b"], sort=True):
        for layer_type, part in _by_type(pair):
            means = (_number(float(part[column].mean())) for column in columns)
            rows.append((f"{a}, {b}", layer_type, len(part), *means, _percent(float(part["sign_conflict"].mean()))))
    _print(out, heads, rows)


def print_merged(found: "Merged") -> None:
    """One line a layer type that changed: size of the change, what storing costs, the check."""
    heads = ("type", "n", "‖ΔW‖/‖W‖", "lost to rounding", "check")
    changed = found.table[found.table["change"] != ""]
    rows = [
        (layer_type, len(part), _number(float(part["relative_update"].median())),
         _number(float(part["rounding"].median())), _number(float(part["check"].max())))
        for layer_type, part in _by_type(changed)
    ]  # fmt: skip
    out = console()
    _print(out, heads, rows)
    out.print(
        f"{len(changed)} of {len(found.table)} tensors changed, {found.facts['n_bytes'] / 1e9:.3g} GB; each is base + "
        "Σ w·ΔW within the rounding of its type (check ≤ 1). lost: ‖rounding‖/‖ΔW‖, medians."
    )


def _by_type(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    parts = [(str(layer_type), part) for layer_type, part in table.groupby("layer_type", sort=False)]
    return sorted(parts, key=lambda one: sort_key(one[0]))


def _print(out: Console, heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for head in heads:
        table.add_column(head, justify="left" if head in ("type", "adapters") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    out.print(table)


def _span(ranks: "pd.Series[int]") -> str:
    low, high = int(ranks.min()), int(ranks.max())
    return str(low) if low == high else f"{low}–{high}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}" if math.isfinite(value) else "–"
