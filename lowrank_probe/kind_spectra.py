"""Low rank: an adapter's factors, or spectra that all end at one rank, above nothing but rounding.

Legend: m out, n in, k = min(m, n); r the rank at which a spectrum ends.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.findings import Finding, digits, listed, types_of
from lowrank_probe.verdicts import SHARE

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

# What a spectrum holds beyond its signal directions, against rounding alone. Adapters of rank 8 and 64 merged into
# SmolLM2's weights: 0.95 to 1.01 × the rounding's energy (plain rounding), at most 1.9 % of the update (dead-zone).
# Real full fine-tunes in bf16 and fp16 (SmolLM2 at three learning rates; three encoder–decoders and a BERT at 1, 0.3
# and 0.1 of their update; 205 matrices whose count is below half): from 1.47 ×, from 2.1 %.
TAIL_ENERGY: Final = 1.15
TAIL_SHARE: Final = 0.04
# … or below what float32 products resolve: σ of the tail together under 1e-5 of ‖ΔW‖.
TAIL_EXACT: Final = 1e-10
# σ_r/σ_{r+1} at the signal rank: at most 1.15 in those fine-tunes, from 1.25 where all merged directions were seen.
GAP: Final = 1.2
# Below this gap a further direction could hide just under the rounding: the rank is given as "≥ r".
WHOLE_GAP: Final = 2.0
# The rounding of an update of a few directions is not independent of it: further values then stand up to 1.35 × above
# the others, and well below the update. They are not counted here, where `explained_ranks` has not left them out.
BULK: Final = 1.35
CLEAR_GAP: Final = 3.0
# Where weak directions are lost in rounding the counts differ, but not by much (53 to 64 of 64).
SPREAD: Final = 1.5
# Fewer matrices show a low rank, not that an adapter was merged.
ENOUGH_MATRICES: Final = 3
# An end beyond half of the possible rank is no low rank.
LOW_PART: Final = 0.5


@dataclass(frozen=True)
class _End:
    """Where the spectrum of one matrix ends: after `rank` values; `gap` = σ_r/σ_{r+1}; nothing but rounding beyond."""

    rank: int
    gap: float
    tail: float


# What `_end` reads of a row.
_TOLD_BY: Final = (
    "name", "rows", "cols", "storage", "noise_model", "noise_std", "fro_norm", "denoised_fro_norm", "resolved",
    "unchanged_fraction", "signal_rank", "decidable_signal_rank", "numerical_rank",
)  # fmt: skip


def _end(row: dict[str, Any], s: Any, denoised: Any) -> _End | None:
    """The end of one spectrum; None where it has none, or where storage noise does not let it be seen."""
    rank = row["signal_rank"]
    if not row["decidable_signal_rank"] or not math.isfinite(rank) or s is None or not len(s):
        return None
    m, n = row["rows"], row["cols"]
    alive = min(m, m * (1 - row["unchanged_fraction"])) if row["noise_model"] == "rounding" else m
    # fp32 sides: what float32's products and the Gram matrix cannot resolve is not counted.
    if row["storage"] in ("F32", "F64") and math.isfinite(row["numerical_rank"]):
        rank = min(rank, row["numerical_rank"])
    r = int(rank)
    if not 0 < r < LOW_PART * min(alive, n) or r >= len(s):
        return None
    clear = int(np.count_nonzero(s > BULK * s[r]))
    if 0 < clear < r and s[clear - 1] > CLEAR_GAP * s[clear]:
        r = clear
    norm2 = row["fro_norm"] ** 2
    whole = len(s) == min(m, n)
    tail = float((s[r:] ** 2).sum()) if whole else max(0.0, norm2 - float((s[:r] ** 2).sum()))
    gap = float(s[r - 1] / s[r]) if s[r] > 0 else math.inf
    if tail <= TAIL_EXACT * norm2:
        return _End(r, gap, tail / norm2)
    if row["noise_model"] == "rounding":
        # Rows that did not move carry no rounding: ‖ΔW‖² without denoised_fro_norm² is that of the others.
        if 1 - row["resolved"] > 1e-6:
            m = min(m, (norm2 - row["denoised_fro_norm"] ** 2) / (n * row["noise_std"] ** 2))
        excess = tail / max(1.0, (m - r) * (n - r)) / row["noise_std"] ** 2
        return _End(r, gap, excess) if excess <= TAIL_ENERGY else None
    if denoised is None or not row["denoised_fro_norm"] > 0:
        return None
    left = 1 - float((denoised[:r] ** 2).sum()) / row["denoised_fro_norm"] ** 2
    return _End(r, gap, left) if left <= TAIL_SHARE else None


def find_low_rank(result: "Result", table: pd.DataFrame) -> list[Finding]:
    """Merged adapters: layer types whose spectra all end at one rank r, with a gap, above nothing but rounding.

    Marks the matrices of `table` that it speaks of. Where only the strongest directions are above the rounding, the
    counts differ; then it is called low-rank if besides nothing else moved, and only "of rank ≥ r".
    """
    whole: dict[int, list[str]] = {}
    part: dict[str, int] = {}
    ends: dict[str, _End] = {}
    open_ = table[table["kind"] == ""]
    for layer_type, group in open_.groupby("layer_type", sort=False):
        seen = group[group["decidable_signal_rank"].astype(bool)]
        found = [
            _end(row, result.singular_values.get(row["name"]), result.denoised_values.get(row["name"]))
            for row in seen[list(_TOLD_BY)].to_dict("records")
        ]
        known = [end for end in found if end is not None]
        if (
            not known
            or len(known) < SHARE * len(seen)
            or len(group) < SHARE * (table["layer_type"] == layer_type).sum()
        ):
            continue
        ends.update({name: end for name, end in zip(seen["name"], found, strict=True) if end is not None})
        ranks = np.array([end.rank for end in known])
        top, gap = int(ranks.max()), float(np.median([end.gap for end in known if end.rank == ranks.max()]))
        if (ranks == top).sum() >= SHARE * len(seen) and gap >= GAP:
            whole.setdefault(top, []).append(str(layer_type))
        elif top <= SPREAD * float(np.median(ranks)):
            part[str(layer_type)] = top
    # Beside types that show the whole rank, others may have lost a few directions of the same adapter.
    for layer_type, top in dict(part).items():
        rank = min((rank for rank in whole if top <= rank <= SPREAD * top), default=None)
        if rank is not None:
            whole[rank].append(layer_type)
            del part[layer_type]
    findings = []
    for rank, types in sorted(whole.items(), key=lambda item: -len(item[1])):
        rows = open_[open_["layer_type"].isin(types)]
        at = [end for name in rows["name"] if (end := ends.get(name)) is not None and end.rank == rank]
        gap = float(np.median([end.gap for end in at]))
        targets = types_of(types)
        evidence = {
            "rank": rank, "n_at_rank": len(at), "n_matrices": len(rows), "median_gap": gap,
            "exact": gap >= WHOLE_GAP, "max_rank": max(ends[name].rank for name in rows["name"] if name in ends),
        }  # fmt: skip
        proof = (
            f"the spectrum ends at {rank} in {len(at)} of {len(rows)} matrices (σ_{rank}/σ_{rank + 1} = "
            f"{digits(gap)}), beyond is only rounding"
        )
        few = len(at) < SHARE * len(rows)
        proof += "; the others have fewer directions above it." if few else "."
        least = "" if gap >= WHOLE_GAP else "≥ "
        if len(at) >= ENOUGH_MATRICES:
            say = f"A merged LoRA of rank {least}{rank} on {listed(targets, 12)}: {proof}"
            findings.append(Finding("merged LoRA", say, evidence, targets))
        else:
            say = f"A low-rank update of rank {least}{rank} on {listed(targets, 12)}: {proof}"
            findings.append(Finding("low-rank", say, evidence, targets))
        table.loc[rows.index, "kind"] = "low-rank"
    rows = open_[open_["layer_type"].isin(part)]
    # A full fine-tune moves the norms and the other types too.
    still = result.ledger["status"].eq("unchanged").any() and not result.ledger["status"].eq("vector").any()
    only_these = set(table["layer_type"]) <= {*part, *(name for types in whole.values() for name in types)}
    # One adapter has one rank; of a decaying spectrum, larger matrices show more.
    alike = bool(part) and max(part.values()) <= SPREAD * min(part.values())
    if len(rows) >= ENOUGH_MATRICES and still and only_these and alike:
        at = [ends[name] for name in rows["name"] if name in ends]
        top, low = max(end.rank for end in at), min(end.rank for end in at)
        targets = types_of(part)
        say = (
            f"Consistent with a merged low-rank adapter of rank ≥ {top} on {listed(targets, 12)}: {low} to {top} "
            f"directions stand above the rounding in {len(at)} of {len(rows)} matrices, and nothing is left beyond."
        )
        evidence = {"rank_at_least": top, "min_rank": low, "n_seen": len(at), "n_matrices": len(rows)}
        findings.append(Finding("low-rank", say, evidence, targets))
        table.loc[rows.index, "kind"] = "low-rank"
    return findings


def find_adapter(table: pd.DataFrame) -> list[Finding]:
    """The tuned side is an adapter: its ranks and the types it adapts."""
    factored = table[table["method"] == "factored_qr"]
    if factored.empty:
        return []
    found = []
    ranks = factored.groupby("layer_type")["n_kept"].agg(lambda ranks: tuple(sorted(set(ranks))))
    for kept in sorted(set(ranks)):
        types = types_of(ranks.index[[value == kept for value in ranks]])
        part = factored[factored["layer_type"].isin(types)]
        rank = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        used = float(part["numerical_rank"].median())
        say = f"A LoRA adapter of rank {rank} on {listed(types, 12)}, {len(part)} matrices."
        if used < kept[0]:
            say = say[:-1] + f"; its products have rank {used:.0f} (median)."
        evidence = {"rank": kept[-1], "n_matrices": len(part), "median_numerical_rank": used}
        found.append(Finding("adapter", say, evidence, types))
    return found
