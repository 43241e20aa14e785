"""Findings where ΔW holds the 4-bit rounding of one side (`roundings`): a QLoRA adapter seen through it, or nothing.

What stands above the largest σ of the rounding was trained; what lies below cannot be seen.
"""

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.findings import Finding, digits, listed, percent, scope_of, types_of, where
from lowrank_probe.kind_spectra import ENOUGH_MATRICES, GAP, LOW_PART, SPREAD
from lowrank_probe.metrics import SIGNAL_FACTOR
from lowrank_probe.verdicts import SHARE

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

_SIDE: Final = {
    "tuned": "the base's own rounding to {} (an adapter was merged into the dequantized base)",
    "base": "the rounding of the base, a dequantized {} copy of what the tuned side was made of",
}


def find_roundings(result: "Result", table: pd.DataFrame) -> list[Finding]:
    """Merged QLoRA adapters, by the rank they show; then what shows no low rank, or nothing but rounding."""
    rounded = table[table["kind"] == "rounded"]
    if rounded.empty:
        return []
    seen = [_above(row, result.singular_values.get(row["name"])) for row in rounded.to_dict("records")]
    rounded = rounded.assign(directions=[count for count, _ in seen], gap=[gap for _, gap in seen])
    # A full fine-tune moves the vectors too.
    still = not result.ledger["status"].eq("vector").any()
    ranks: dict[int, list[str]] = {}
    loose: dict[str, int] = {}
    for layer_type, group in rounded.groupby("layer_type", sort=False):
        counts, top = group["directions"], int(group["directions"].max())
        at = group[counts == top]
        low = top <= LOW_PART * group[["rows", "cols"]].min(axis=1).min()
        if not top or not low:
            continue
        if len(at) >= SHARE * len(group) and at["gap"].median() >= GAP:
            ranks.setdefault(top, []).append(str(layer_type))
        elif still and (counts > 0).mean() >= SHARE and top <= SPREAD * counts[counts > 0].median():
            loose[str(layer_type)] = top
    # Beside types that show the whole rank, others may have lost a few directions of the same adapter.
    for layer_type, top in dict(loose).items():
        rank = min((rank for rank in ranks if top <= rank <= SPREAD * top), default=None)
        if rank is not None:
            ranks[rank].append(layer_type)
            del loose[layer_type]
    findings = [
        _adapter(rounded[rounded["layer_type"].isin(types)], rank)
        for rank, types in sorted(ranks.items(), key=lambda item: -len(item[1]))
    ]
    part = rounded[rounded["layer_type"].isin(loose)]
    if len(part) >= ENOUGH_MATRICES and max(loose.values()) <= SPREAD * min(loose.values()):
        findings.append(_adapter(part, None))
    named = {name for finding in findings for name in finding.scope}
    rest = rounded[~rounded["layer_type"].isin(named)]
    return findings if rest.empty else [*findings, _only_rounding(rest, table)]


def _above(row: dict[str, Any], s: Any) -> tuple[int, float]:
    """How many σ stand above the rounding, and σ_r/σ_{r+1} at the last of them."""
    count = 0 if s is None else int(np.count_nonzero(s > SIGNAL_FACTOR["rounding"] * row["rounding_edge"]))
    return count, float(s[count - 1] / s[count]) if 0 < count < len(s) and s[count] > 0 else 1.0


def _evidence(part: pd.DataFrame) -> dict[str, Any]:
    return {
        "rounded_to": str(part["rounded_to"].mode().iloc[0]), "rounded_side": str(part["rounded_side"].mode().iloc[0]),
        "rounding_energy": float(part["rounding_energy"].median()), "n_matrices": len(part),
        "min_directions": int(part["directions"].min()), "max_directions": int(part["directions"].max()),
    }  # fmt: skip


def _adapter(part: pd.DataFrame, rank: int | None) -> Finding:
    """An adapter of one rank, or (None) of at least the largest number of directions seen."""
    evidence, targets = _evidence(part), types_of(part["layer_type"])
    low, top = evidence["min_directions"], evidence["max_directions"]
    at = part[part["directions"] == top]
    evidence |= {"rank_at_least": top, "n_at_rank": len(at), "median_gap": float(at["gap"].median())}
    what = "Consistent with a merged QLoRA adapter" if rank is None else "A merged QLoRA adapter"
    above = (
        f"{low} to {top} directions stand above it in {len(part)} matrices"
        if rank is None
        else f"above it the spectrum ends at {top} in {len(at)} of {len(part)} matrices (σ_{top}/σ_{top + 1} = "
        f"{digits(evidence['median_gap'])})"
    )
    say = (
        f"{what} of rank ≥ {top} on {listed(targets, 12)}: {percent(evidence['rounding_energy'])} of ‖ΔW‖² is "
        f"{_SIDE[evidence['rounded_side']].format(evidence['rounded_to'])}; {above}."
    )
    return Finding("merged QLoRA", say, evidence, targets)


def _only_rounding(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    evidence = _evidence(part) | {"relative_update": float(part["relative_update"].median())}
    low, top = evidence["min_directions"], evidence["max_directions"]
    above = f"{low} to {top} directions stand" if top else "no direction stands"
    say = (
        f"4-bit rounding: in {where(part, table)} {percent(evidence['rounding_energy'])} of ‖ΔW‖² "
        f"({percent(evidence['relative_update'])} of ‖W‖) is "
        f"{_SIDE[evidence['rounded_side']].format(evidence['rounded_to'])}; {above} above it, and what lies below "
        "cannot be seen."
    )
    return Finding("4-bit rounding", say, evidence, scope_of(part, table))
