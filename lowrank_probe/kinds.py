"""What kind of update is it? A result → findings: sentences for a user, with the numbers they rest on.

Each changed matrix gets at most one kind, the most specific that its numbers carry; what then holds for the model or
for whole layer types is said.

    identical, adapter            nothing differs; the tuned side is the factors themselves
    unrelated, re-initialised     cosine of the weights ≈ 0: everywhere, or in some matrices
    quantized                     the tuned values lie on a coarse grid that the base's do not
    pruned                        entries set to exactly 0, and which pattern they make
    re-stored, scaled             the base only rounded; ΔW = c·W
    merged LoRA, low-rank         the spectra of a type end at one rank, above nothing but rounding
    noise                         ΔW has the spectrum of Gaussian noise
    embedding-only … norm-only    from the ledger: all that moved is of one part
    partially frozen              from the ledger: only some layers or types moved
    full fine-tune, fine-tune     none of these; the rest beside one of these

The numbers of a single matrix are columns of the table (`marks.measure`, `rows.describe`).

Legend: m out, n in, k = min(m, n); r the rank at which a spectrum ends.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.layers import sort_key

if TYPE_CHECKING:
    from lowrank_probe.runs import Result


@dataclass(frozen=True)
class Finding:
    """What was recognised: its kind, one sentence for a user, the numbers it rests on, the layer types or tensors."""

    kind: str
    statement: str
    evidence: dict[str, Any] = field(default_factory=dict)
    scope: tuple[str, ...] = ()


# A kind holds for a layer type where this share of its matrices has it, as for verdicts.
SHARE: Final = 0.75
# Independent weights have cosine 0 ± 1/√(mn), ±0.05 at 400 entries; the real fine-tunes tried have 0.6 and more, but
# for a pooler that was never trained in its base.
UNRELATED: Final = 0.1
UNRELATED_ENTRIES: Final = 400
# Pruning: this share of the weights became 0, and they carry most of ‖ΔW‖². A 4-bit copy also zeroes 10 to 15 % of its
# entries, but these carry about that share of ‖ΔW‖².
PRUNED_FROM: Final = 0.05
PRUNED_ENERGY: Final = 0.5
PRUNED_MANY: Final = 0.3
# |cos(ΔW, W)|: 98 % of ‖ΔW‖² lies along W. Scaling by 0.9 stored in bf16 gives 0.9999.
SCALED: Final = 0.99
# Only rounded: ‖ΔW‖² within 20 % of what rounding to the tuned storage does.
RESTORED: Final = (0.8, 1.2)
# Gaussian noise: r50 and r90 at the null (pure noise came within 3 %), σ₁ at the edge; 90 % of it not from storage.
LIKE_NULL: Final = 0.95
LIKE_EDGE: Final = 1.15
MOSTLY_RESOLVED: Final = 0.9
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
# The rounding of a rank-1 update is not quite independent of it: one or two values then stand up to 1.15 × above the
# others, and 50 × below the update. They are not counted.
BULK: Final = 1.35
CLEAR_GAP: Final = 3.0
# Where weak directions are lost in rounding the counts differ, but not by much (53 to 64 of 64).
SPREAD: Final = 1.5
# Fewer matrices show a low rank, not that an adapter was merged.
ENOUGH_MATRICES: Final = 3
# An end beyond half of the possible rank is no low rank.
LOW_PART: Final = 0.5

_EMBEDDINGS: Final = ("embedding", "position_embedding", "token_type_embedding")
_NORM: Final = re.compile(r"norm|(?:^|[._])ln(?:[._]|\d|$)", re.IGNORECASE)
_HEAD: Final = re.compile(r"(?:^|\.)(?:lm_head|classifier|score|cls|head|qa_outputs|predictions|embed_out)(?:\.|$)")


def recognise(result: "Result") -> list[Finding]:
    """What kind of update a result shows, the most specific finding first; empty for an interrupted run."""
    if result.facts.get("status", "complete") != "complete":
        return []
    ledger = result.ledger
    moved = ledger[ledger["status"].isin(["analysed", "vector"])]
    if moved.empty:
        return _nothing_moved(ledger)
    if (result.facts.get("tuned") or {}).get("kind") == "adapter":
        return _adapter(result.table)
    table = result.table.assign(kind=[_kind(row) for row in result.table.to_dict("records")])
    # −W has cosine −1: not related as a fine-tune, but not foreign either.
    if not result.facts.get("related", True) and 2 * (table["kind"] == "re-initialised").sum() >= len(table):
        return [_unrelated(table)]
    low_rank = _low_rank(result, table)
    found = [
        *(
            finding
            for kind, say in _SAY.items()
            if (part := table[table["kind"] == kind]).size and (finding := say(part, table)) is not None
        ),
        *low_rank,
    ]
    noise = table[table["kind"] == "noise"]
    if len(noise):
        found.append(_noise(noise, table))
    ends = _only_some_parts(moved, ledger)
    frozen = [] if ends else _partially_frozen(table, ledger, low_rank)
    plain = table[table["kind"] == ""]
    return [*found, *ends, *frozen, *_fine_tune(plain, table, moved, ledger, bool(found), bool(ends or frozen))]


def _kind(row: dict[str, Any]) -> str:
    """The kind of one matrix from its own row, but for low rank, which is a matter of several; "" for none."""
    if abs(row["cosine"]) < UNRELATED and row["rows"] * row["cols"] >= UNRELATED_ENTRIES:
        return "re-initialised"
    if row["grid_bits"] > 0:
        return "quantized"
    zeroed = row["zeroed_fraction"]
    if (zeroed >= PRUNED_FROM and row["zeroed_energy"] >= PRUNED_ENERGY) or zeroed >= PRUNED_MANY:
        return "pruned"
    rounding = row["noise_std"] * math.sqrt(row["rows"] * row["cols"])
    if (
        row["base_dtype"] in ("F32", "F64") and row["storage"] in ("BF16", "F16") and row["noise_model"] == "rounding"
        and RESTORED[0] * rounding**2 <= row["fro_norm"] ** 2 <= RESTORED[1] * rounding**2
    ):  # fmt: skip
        return "re-stored"
    if abs(row["base_alignment"]) >= SCALED:
        return "scaled"
    return "noise" if _is_noise(row) else ""


def _is_noise(row: dict[str, Any]) -> bool:
    m, n = row["rows"], row["cols"]
    edge = row["fro_norm"] / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))
    return bool(
        min(m, n) >= 16
        and row["resolved"] >= MOSTLY_RESOLVED
        and row["r50"] >= LIKE_NULL * row["null_r50"]
        and row["r90"] >= LIKE_NULL * row["null_r90"]
        and row["spectral_norm"] <= LIKE_EDGE * edge
    )


# ------------------------------------------------------------------------------------------------ nothing, adapter


def _nothing_moved(ledger: pd.DataFrame) -> list[Finding]:
    compared = int(ledger["status"].isin(["unchanged", "tied"]).sum())
    if not compared:
        return []
    new = ledger[ledger["status"].isin(["only in tuned", "shape differs"])]
    evidence = {"n_unchanged": compared, "n_only_in_tuned": len(new)}
    if len(new) and all(_HEAD.search(str(name)) for name in new["tuned_name"]):
        names = _listed(new["tuned_name"])
        say = f"A new head on the base as it was: all {compared} shared tensors are identical; new are {names}."
        return [Finding("head-only", say, evidence, tuple(new["tuned_name"]))]
    beside = f"; {len(new)} more are only in the tuned side or of another shape" if len(new) else ""
    return [Finding("identical", f"The two are identical in all {compared} tensors compared{beside}.", evidence)]


def _adapter(table: pd.DataFrame) -> list[Finding]:
    factored = table[table["method"] == "factored_qr"]
    if factored.empty:
        return []
    found = []
    ranks = factored.groupby("layer_type")["n_kept"].agg(lambda ranks: tuple(sorted(set(ranks))))
    for kept in sorted(set(ranks)):
        types = _types(ranks.index[[value == kept for value in ranks]])
        part = factored[factored["layer_type"].isin(types)]
        rank = str(kept[0]) if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
        used = float(part["numerical_rank"].median())
        say = f"A LoRA adapter of rank {rank} on {_listed(types, 12)}, {len(part)} matrices."
        if used < kept[0]:
            say = say[:-1] + f"; its products have rank {used:.0f} (median)."
        evidence = {"rank": kept[-1], "n_matrices": len(part), "median_numerical_rank": used}
        found.append(Finding("adapter", say, evidence, types))
    return found


# ------------------------------------------------------------------------------------------------ by matrix


def _unrelated(table: pd.DataFrame) -> Finding:
    n = int((table["kind"] == "re-initialised").sum())
    cosine = float(table["cosine"].median())
    say = (
        f"Unrelated weights: in {n} of {len(table)} matrices the two sides have nothing in common (median cosine "
        f"{cosine:+.3f}); their difference is no update."
    )
    return Finding("unrelated", say, {"n_unrelated": n, "n_matrices": len(table), "median_cosine": cosine})


def _reinitialised(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    rest = table.drop(part.index)["cosine"]
    names = tuple(part["name"])
    others = f", the others {float(rest.median()):.2f}" if len(rest) else ""
    say = (
        f"Re-initialised or foreign: {len(part)} of {len(table)} changed matrices have nothing in common with the base "
        f"(cosine {float(part['cosine'].median()):+.3f}{others}): {_listed(names)}."
    )
    evidence = {
        "n_matrices": len(part), "median_cosine": float(part["cosine"].median()),
        "median_cosine_elsewhere": float(rest.median()) if len(rest) else math.nan,
    }  # fmt: skip
    return Finding("re-initialised", say, evidence, names)


def _pruned(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    share, energy = float(part["zeroed_fraction"].median()), float(part["zeroed_energy"].median())
    patterns = part["zero_pattern"].value_counts()
    pattern = str(patterns.index[0]) if patterns.iloc[0] >= SHARE * len(part) else ""
    shape = {"2:4": " in a 2:4 pattern", "rows": " as whole rows", "columns": " as whole columns"}.get(pattern, "")
    # Of weights zeroed at random, the share of the energy is the share of the entries.
    small = float((part["relative_update"] ** 2 * part["zeroed_energy"] / part["zeroed_fraction"]).median()) < 0.6
    which = "the smallest weights" if small and pattern not in ("rows", "columns") else "weights"
    say = f"Pruned{shape}: {100 * share:.0f} % of {which} are exactly 0 now, in {_where(part, table)}; "
    say += (
        "there ΔW = −W, and nothing else moved."
        if energy > 0.999
        else f"these make {100 * energy:.0f} % of ‖ΔW‖², the rest was trained or rounded."
    )
    evidence = {
        "zeroed_fraction": share, "zeroed_energy": energy, "zero_pattern": pattern, "n_matrices": len(part)
    }  # fmt: skip
    return Finding("pruned", say, evidence, _scope(part, table))


def _quantized(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    bits = float(part["grid_bits"].mode().iloc[0])
    same = part[part["grid_bits"] == bits]
    per_row, whole = same["grid_group"] == same["cols"], same["grid_group"] == same["rows"] * same["cols"]
    if per_row.mean() >= 0.5:
        group = "one scale a row"
    elif whole.mean() >= 0.5:
        group = "one scale a matrix"
    else:
        group = f"groups of {float(same['grid_group'].mode().iloc[0]):.0f}"
    like_null = float((same["r90"] / same["null_r90"]).median())
    levels, before = float(same["grid_levels"].median()), float(same["base_levels"].median())
    size = float(same["relative_update"].median())
    say = (
        f"A {bits:.0f}-bit quantized copy ({group}): {_where(part, table)} hold {levels:.0f} distinct values where the "
        f"base has {before:.0f}; the difference ({_percent(size)} of ‖W‖) has r90 at {like_null:.2f} × noise."
    )
    evidence = {
        "bits": bits, "group": group, "grid_levels": levels, "base_levels": before, "r90_over_null": like_null,
        "relative_update": size, "n_matrices": len(part),
    }  # fmt: skip
    return Finding("quantized", say, evidence, _scope(part, table))


def _restored(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    storage, wide = str(part["storage"].mode().iloc[0]), str(part["base_dtype"].mode().iloc[0])
    rounding = part["noise_std"] * np.sqrt(part["rows"] * part["cols"])
    ratio = float((part["fro_norm"] / rounding).median())
    say = (
        f"The same weights rounded from {wide} to {storage}: in {_where(part, table)} ‖ΔW‖ is {ratio:.2f} × what that "
        "rounding does."
    )
    return Finding("re-stored", say, {"norm_over_rounding": ratio, "n_matrices": len(part)}, _scope(part, table))


def _scaled(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    factor = 1 + part["scale"]
    low, high = float(factor.min()), float(factor.max())
    by = f"by {_digits(float(factor.median()))}"
    if high - low > 0.02 * abs(float(factor.median()) - 1):
        by = f"each by its own factor, {_digits(low)} to {_digits(high)}"
    alignment = float(part["base_alignment"].abs().min())
    least = math.floor(1e4 * alignment) / 1e4
    say = f"Plain scaling: {_where(part, table)} were multiplied {by} (|cos(ΔW, W)| ≥ {least})."
    evidence = {"factor_min": low, "factor_max": high, "min_alignment": alignment, "n_matrices": len(part)}
    return Finding("scaled", say, evidence, _scope(part, table))


def _noise(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    ratio, size = float((part["r90"] / part["null_r90"]).median()), float(part["relative_update"].median())
    say = (
        f"Noise: in {_where(part, table)} ΔW ({_percent(size)} of ‖W‖) has the spectrum of Gaussian noise (r90 "
        f"{ratio:.2f} × null, no direction above its edge): added noise, or rounding to a grid that was not recognised."
    )
    evidence = {"r90_over_null": ratio, "relative_update": size, "n_matrices": len(part)}
    return Finding("noise", say, evidence, _scope(part, table))


_SAY: Final[dict[str, Callable[[pd.DataFrame, pd.DataFrame], Finding]]] = {
    "quantized": _quantized, "pruned": _pruned, "re-stored": _restored, "scaled": _scaled,
    "re-initialised": _reinitialised,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ low rank


@dataclass(frozen=True)
class _End:
    """Where the spectrum of one matrix ends: after `rank` values; `gap` = σ_r/σ_{r+1}; nothing but rounding beyond."""

    rank: int
    gap: float
    tail: float


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


def _low_rank(result: "Result", table: pd.DataFrame) -> list[Finding]:
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
            for row in seen.to_dict("records")
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
        targets = _types(types)
        evidence = {
            "rank": rank, "n_at_rank": len(at), "n_matrices": len(rows), "median_gap": gap,
            "exact": gap >= WHOLE_GAP, "max_rank": max(ends[name].rank for name in rows["name"] if name in ends),
        }  # fmt: skip
        proof = (
            f"the spectrum ends at {rank} in {len(at)} of {len(rows)} matrices (σ_{rank}/σ_{rank + 1} = "
            f"{_digits(gap)}), beyond is only rounding"
        )
        few = len(at) < SHARE * len(rows)
        proof += "; the others have fewer directions above it." if few else "."
        least = "" if gap >= WHOLE_GAP else "≥ "
        if len(at) >= ENOUGH_MATRICES:
            say = f"A merged LoRA of rank {least}{rank} on {_listed(targets, 12)}: {proof}"
            findings.append(Finding("merged LoRA", say, evidence, targets))
        else:
            say = f"A low-rank update of rank {least}{rank} on {_listed(targets, 12)}: {proof}"
            findings.append(Finding("low-rank", say, evidence, targets))
        table.loc[rows.index, "kind"] = "low-rank"
    rows = open_[open_["layer_type"].isin(part)]
    # A full fine-tune moves the norms and the other types too.
    still = result.ledger["status"].eq("unchanged").any() and not result.ledger["status"].eq("vector").any()
    only_these = set(table["layer_type"]) <= {*part, *(name for types in whole.values() for name in types)}
    if len(rows) >= ENOUGH_MATRICES and still and only_these:
        at = [ends[name] for name in rows["name"] if name in ends]
        top, low = max(end.rank for end in at), min(end.rank for end in at)
        targets = _types(part)
        say = (
            f"Consistent with a merged low-rank adapter of rank ≥ {top} on {_listed(targets, 12)}: {low} to {top} "
            f"directions stand above the rounding in {len(at)} of {len(rows)} matrices, and nothing is left beyond."
        )
        evidence = {"rank_at_least": top, "min_rank": low, "n_seen": len(at), "n_matrices": len(rows)}
        findings.append(Finding("low-rank", say, evidence, targets))
        table.loc[rows.index, "kind"] = "low-rank"
    return findings


# ------------------------------------------------------------------------------------------------ from the ledger


def _only_some_parts(moved: pd.DataFrame, ledger: pd.DataFrame) -> list[Finding]:
    """Embedding-only, head-only, norm-only, bias-only: all that moved is of one part, and something else did not."""
    still = ledger[ledger["status"] == "unchanged"]
    if still.empty:
        return []
    parts = {_part(line) for line in moved.to_dict("records")}
    names = {
        frozenset({"embedding"}): ("embedding-only", "the embeddings"),
        frozenset({"head"}): ("head-only", "the head"),
        frozenset({"embedding", "head"}): ("embedding-only", "the embeddings and the head"),
        frozenset({"norm"}): ("norm-only", "the norms"),
        frozenset({"norm", "bias"}): ("vectors-only", "norms and biases"),
    }
    found = names.get(frozenset(parts))
    if all(str(name).endswith("bias") for name in moved["name"]):
        found = ("bias-only", "the biases")
    if found is None or any(_part(line) in parts for line in still.to_dict("records") if found[0] == "vectors-only"):
        return []
    kind, what = found
    size = float(moved["relative_update"].median())
    say = (
        f"Only {what} moved: {len(moved)} tensors (median {_percent(size)} of their norm); the other {len(still)} are "
        "identical."
    )
    evidence = {"n_moved": len(moved), "n_unchanged": len(still), "relative_update": size}
    return [Finding(kind, say, evidence, tuple(sorted(set(moved["layer_type"]), key=sort_key)))]


def _part(line: dict[str, Any]) -> str:
    name, vector = str(line["name"]), line["status"] == "vector" or "×" not in str(line["base_shape"])
    if line["layer_type"] in _EMBEDDINGS and not vector:
        return "embedding"
    if _HEAD.search(name) or line["layer_type"] == "lm_head":
        return "head"
    if vector and _NORM.search(name):
        return "norm"
    return "bias" if vector and name.endswith("bias") else "other"


def _partially_frozen(table: pd.DataFrame, ledger: pd.DataFrame, low_rank: Sequence[Finding]) -> list[Finding]:
    """Which layers, or which types, are all that moved among the matrices."""
    matrices = ledger[
        ledger["base_shape"].astype(str).str.contains("×") & ledger["status"].isin(["analysed", "unchanged"])
    ]
    moved = matrices["status"] == "analysed"
    if moved.all() or not moved.any():
        return []
    evidence = {
        "n_moved": int(moved.sum()), "n_matrices": len(matrices),
        "relative_update": float(table["relative_update"].median()),
    }  # fmt: skip
    by_type = moved.groupby(matrices["layer_type"]).mean()
    if by_type.isin([0, 1]).all():
        types, frozen = _types(by_type.index[by_type == 1]), _types(by_type.index[by_type == 0])
        if set(types) == {name for finding in low_rank for name in finding.scope}:
            return []  # the adapter's targets say it
        say = f"Partially frozen: only {_listed(types, 12)} moved; {_listed(frozen, 12)} are identical."
        return [Finding("partially frozen", say, evidence, types)]
    layers = matrices["layer"].notna()
    by_layer = moved[layers].groupby(matrices["layer"][layers].astype(int)).mean()
    if len(by_layer) and by_layer.isin([0, 1]).all() and not by_layer.eq(1).all():
        span = _spans([int(layer) for layer in by_layer.index[by_layer == 1]])
        outside = moved[~layers]
        besides = ""
        if len(outside):
            of = matrices["layer_type"][~layers]
            besides = "".join(
                f"; {_listed(_types(set(of[outside == state])), 12)} {word}"
                for state, word in ((True, "moved too"), (False, "identical"))
                if (outside == state).any()
            )
        inside = f"layers {span} of {len(by_layer)}" if span else "what is outside the blocks"
        say = f"Partially frozen: only {inside} moved{besides}."
        return [Finding("partially frozen", say, evidence, (f"layers {span}",) if span else ())]
    say = f"Partially frozen: {evidence['n_moved']} of {len(matrices)} matrices moved, the others are identical."
    return [Finding("partially frozen", say, evidence, tuple(matrices["name"][moved]))]


def _fine_tune(
    plain: pd.DataFrame, table: pd.DataFrame, moved: pd.DataFrame, ledger: pd.DataFrame, special: bool, partial: bool
) -> list[Finding]:
    """The default: what moved without a structure of its own."""
    if plain.empty or (partial and not special):
        return []
    sizes = plain.groupby("layer_type")["relative_update"].median().dropna()
    size = float(plain["relative_update"].median())
    evidence: dict[str, Any] = {"relative_update": size, "n_matrices": len(plain)}
    spread = ""
    if len(sizes) > 1:
        most, least = str(sizes.idxmax()), str(sizes.idxmin())
        spread = f", most in {most} ({_percent(float(sizes.max()))}), least in {least} ({_percent(float(sizes.min()))})"
    hidden = 2 * int(plain["decidable_signal_rank"].astype(bool).sum()) < len(plain)
    if special:
        say = f"The rest, {_where(plain, table)}, moved as in plain fine-tuning: {_percent(size)} of ‖W‖{spread}."
        return [Finding("fine-tune", say, evidence, _types(plain["layer_type"]))]
    n_matrices = len(table) + int(
        (ledger["status"].eq("unchanged") & ledger["base_shape"].astype(str).str.contains("×")).sum()
    )
    what = f"all {len(plain)}" if len(plain) == n_matrices else f"{len(plain)} of {n_matrices}"
    say = f"A full fine-tune: {what} matrices moved, by {_percent(size)} of ‖W‖ (median{spread})"
    say += (
        "; storage rounding hides any finer structure."
        if hidden
        else ", with no structure of a simpler kind of update."
    )
    evidence["n_vectors_moved"] = int(moved["status"].eq("vector").sum())
    return [Finding("full fine-tune", say, evidence, _types(plain["layer_type"]))]


# ------------------------------------------------------------------------------------------------ words


def _types(names: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted({str(name) for name in names}, key=sort_key))


def _scope(part: pd.DataFrame, table: pd.DataFrame) -> tuple[str, ...]:
    """Layer types of which at least `SHARE` are in `part`, else the tensors."""
    share = part["layer_type"].value_counts() / table["layer_type"].value_counts()
    types = _types(share.index[share >= SHARE])
    return types if part["layer_type"].isin(types).all() else tuple(part["name"])


def _where(part: pd.DataFrame, table: pd.DataFrame) -> str:
    if len(part) == len(table):
        return f"all {len(part)} changed matrices" if len(part) > 1 else f"{part['name'].iloc[0]}"
    scope = _scope(part, table)
    return f"{len(part)} of {len(table)} changed matrices ({_listed(scope, 6 if '.' not in scope[0] else 2)})"


def _listed(names: Iterable[Any], most: int = 3) -> str:
    words = [str(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _spans(layers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1–3, 7"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(f"{a}–{b}" if b > a else str(a) for a, b in spans)


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.1e}"


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "an unknown share"
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
