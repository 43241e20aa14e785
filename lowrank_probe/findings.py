"""A finding, and the words that the sentences of all findings share.

The sentences themselves: `kind_entries` (what the entries show), `kind_spectra` (low rank), `kind_roundings` (QLoRA),
`kind_ledger` (which parts moved); `kinds` decides which of them hold.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lowrank_probe.layers import sort_key
from lowrank_probe.verdicts import SHARE


@dataclass(frozen=True)
class Finding:
    """What was recognised: its kind, one sentence for a user, the numbers it rests on, the layer types or tensors."""

    kind: str
    statement: str
    evidence: dict[str, Any] = field(default_factory=dict)
    scope: tuple[str, ...] = ()


def types_of(names: Iterable[Any]) -> tuple[str, ...]:
    """The distinct layer types, in the order of `layers.sort_key`."""
    return tuple(sorted({str(name) for name in names}, key=sort_key))


def scope_of(part: pd.DataFrame, table: pd.DataFrame) -> tuple[str, ...]:
    """Layer types of which at least `SHARE` are in `part`, else the tensors."""
    share = part["layer_type"].value_counts() / table["layer_type"].value_counts()
    types = types_of(share.index[share >= SHARE])
    return types if part["layer_type"].isin(types).all() else tuple(part["name"])


def where(part: pd.DataFrame, table: pd.DataFrame) -> str:
    """Which of the changed matrices `part` is, in words."""
    if len(part) == len(table):
        return f"all {len(part)} changed matrices" if len(part) > 1 else f"{part['name'].iloc[0]}"
    scope = scope_of(part, table)
    return f"{len(part)} of {len(table)} changed matrices ({listed(scope, 6 if '.' not in scope[0] else 2)})"


def listed(names: Iterable[Any], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    words = [str(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def spans_of(layers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1–3, 7"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}–{b}" if b > a else str(a) for a, b in spans)


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def percent(share: float) -> str:
    """A share in per cent, two significant digits below 1."""
    if not math.isfinite(share):
        return "an unknown share"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
