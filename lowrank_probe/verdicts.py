"""Table (one row a matrix) → summary (one row a layer type) with a verdict from spectral evidence. pandas only.

The low-rank hypothesis is a claim about a layer type, not about a matrix. The rule, for the matrices of one type:

    fewer than half decidable for r90                               undecidable (storage noise)
    r90's upper end ≤ 0.5 × null r90 and < mn/(m + n)               low-rank at r = that upper end
    r90's lower end ≥ 0.75 × null r90                               not low-rank
    anything else                                                   undecidable (not enough evidence)

where a condition must hold for at least three quarters of the decidable matrices, and the r that is named is the
upper quartile of their upper ends: a rank that keeps 90 % of the energy of at least three matrices in four. A model of
several stacks (vision and text, encoder and decoder) is judged stack by stack: `layers.labels`.
"""

import math
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import SUMMARY
from lowrank_probe.layers import labels, sort_key
from lowrank_probe.metrics import ENERGY_RANKS

# A verdict, and a kind, holds for a layer type where it does in this share of its matrices.
SHARE: Final = 0.75
LOW_RANK: Final = 0.5
NOT_LOW_RANK: Final = 0.75
_LOW_RANK_AT: Final = "low-rank at r="


def summarise(table: pd.DataFrame, *, related: bool = True, apart: bool | None = None) -> pd.DataFrame:
    """One row a layer type, columns as `columns.SUMMARY`, in the order data flows through a block.

    `related=False` (the two checkpoints are not one model's base and fine-tune) replaces every verdict. apart: as
    `layers.labels`.
    """
    if table.empty:
        return pd.DataFrame(columns=list(SUMMARY))
    label = np.array(labels(table["stack"], table["layer_type"], apart), dtype=object)
    places = dict(zip(label, zip(table["stack"], table["layer_type"], strict=True), strict=True))

    def flow(name: str) -> tuple[Any, ...]:
        stack, layer_type = places[name]
        return (stack if name != layer_type else "", sort_key(layer_type))

    return pd.DataFrame([_row(name, table[label == name], related) for name in sorted(places, key=flow)])


def _row(name: str, group: pd.DataFrame, related: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"layer_type": name, "n_matrices": len(group)}
    for column in ("relative_update", "stable_rank", "null_r50", "null_r90", "unchanged_fraction"):
        row[column] = _median(group[column])
    row["signal_rank"] = _decided(group, "signal_rank", "decidable_signal_rank").median()
    for rank in ("r50", "r90"):
        decided = group[group[f"decidable_{rank}"]]
        enough = len(decided) * 2 >= len(group)
        for end in ("low", "high"):
            row[f"{rank}_{end}"] = _median(decided[f"{rank}_{end}"]) if enough else math.nan
    for r in ENERGY_RANKS:
        row[f"energy_{r}"] = _median(group[f"energy_{r}"])
    row["verdict"], row["evidence"] = verdict(group) if related else ("unrelated weights", _unrelated(group))
    return {column: row[column] for column in SUMMARY}


def verdict(group: pd.DataFrame) -> tuple[str, str]:
    """(verdict, the numbers it rests on) for the matrices of one layer type."""
    decided = group[group["decidable_r90"]]
    n, total = len(decided), len(group)
    unchanged = f"{100 * group['unchanged_fraction'].median():.0f} % of the entries unchanged in storage"
    if 2 * n < total:
        return "undecidable (storage noise)", f"r90 decidable in {n} of {total} matrices; {unchanged}"
    if decided["r90_high"].isna().any():
        return "undecidable (not enough evidence)", "the whole spectrum was not computed (--top); r90 was not reached"
    null, high, low = decided["null_r90"], decided["r90_high"], decided["r90_low"]
    is_low, is_high = _conditions(decided)
    ratio = f"r90 {(low / null).median():.2f}–{(high / null).median():.2f} × null"
    if is_low.mean() >= SHARE:
        r = math.ceil(high.sort_values().iloc[math.ceil(SHARE * n) - 1])
        return f"{_LOW_RANK_AT}{r}", f"{ratio}; holds in {int(is_low.sum())} of {n} matrices"
    if is_high.mean() >= SHARE:
        return "not low-rank", f"{ratio}; holds in {int(is_high.sum())} of {n} matrices"
    return (
        "undecidable (not enough evidence)",
        f"{ratio}; ≤ {LOW_RANK} in {int(is_low.sum())}, ≥ {NOT_LOW_RANK} in {int(is_high.sum())} of {n} matrices",
    )


def named_rank(verdict: str) -> int | None:
    """The r that a verdict of `verdict` names; None where it is not low-rank."""
    return int(verdict.removeprefix(_LOW_RANK_AT)) if verdict.startswith(_LOW_RANK_AT) else None


def verdict_alone(table: pd.DataFrame) -> NDArray[Any]:
    """The rule on each matrix alone: "low-rank", "not low-rank", "between" or "undecidable"."""
    known = table["decidable_r90"].astype(bool) & table["r90_low"].notna() & table["r90_high"].notna()
    is_low, is_high = _conditions(table)
    return np.select([~known, is_low, is_high], ["undecidable", "low-rank", "not low-rank"], "between")


def _conditions(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Whether each matrix is low-rank, and whether it is not; neither where its bracket lies between."""
    null, high, low = table["null_r90"], table["r90_high"], table["r90_low"]
    return (high <= LOW_RANK * null) & (high < table["break_even_rank"]), low >= NOT_LOW_RANK * null


def _median(values: pd.Series) -> float:
    """NaN as soon as one value is: with --top, those that were reached are the smallest, not a sample."""
    return float(values.median(skipna=False))


def _decided(group: pd.DataFrame, column: str, flag: str) -> pd.Series:
    values = group.loc[group[flag], column]
    return values if 2 * len(values) >= len(group) else values.iloc[:0]


def _unrelated(group: pd.DataFrame) -> str:
    return f"cosine of the weights {group['cosine'].median():+.2f}: not a base and its fine-tune"
