"""Findings that rest on the entries of a matrix: its grid, its zeros, its scale, its size against rounding or noise.

Each function says what holds for `part`, the matrices of one kind, of all changed ones in `table`.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.findings import Finding, digits, listed, percent, scope_of, where
from lowrank_probe.verdicts import SHARE

# What rounding alone makes has its r90 where noise has it; with half of that there is an update besides.
MOSTLY_NOISE: Final = 0.5


def say_unrelated(table: pd.DataFrame) -> Finding:
    """Two models that are not a base and its fine-tune."""
    n = int((table["kind"] == "re-initialised").sum())
    cosine = float(table["cosine"].median())
    say = (
        f"Unrelated weights: in {n} of {len(table)} matrices the two sides have nothing in common (median cosine "
        f"{cosine:+.3f}); their difference is no update."
    )
    return Finding("unrelated", say, {"n_unrelated": n, "n_matrices": len(table), "median_cosine": cosine})


def _say_reinitialised(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    rest = table.drop(part.index)["cosine"]
    names = tuple(part["name"])
    others = f", the others {float(rest.median()):.2f}" if len(rest) else ""
    say = (
        f"Re-initialised or foreign: {len(part)} of {len(table)} changed matrices have nothing in common with the base "
        f"(cosine {float(part['cosine'].median()):+.3f}{others}): {listed(names)}."
    )
    evidence = {
        "n_matrices": len(part), "median_cosine": float(part["cosine"].median()),
        "median_cosine_elsewhere": float(rest.median()) if len(rest) else math.nan,
    }  # fmt: skip
    return Finding("re-initialised", say, evidence, names)


def _say_pruned(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    share, energy = float(part["zeroed_fraction"].median()), float(part["zeroed_energy"].median())
    patterns = part["zero_pattern"].value_counts()
    pattern = str(patterns.index[0]) if patterns.iloc[0] >= SHARE * len(part) else ""
    shape = {"2:4": " in a 2:4 pattern", "rows": " as whole rows", "columns": " as whole columns"}.get(pattern, "")
    # Of weights zeroed at random, the share of the energy is the share of the entries.
    small = float((part["relative_update"] ** 2 * part["zeroed_energy"] / part["zeroed_fraction"]).median()) < 0.6
    which = "the smallest weights" if small and pattern not in ("rows", "columns") else "weights"
    say = f"Pruned{shape}: {100 * share:.0f} % of {which} are exactly 0 now, in {where(part, table)}; "
    say += (
        "there ΔW = −W, and nothing else moved."
        if energy > 0.999
        else f"these make {100 * energy:.0f} % of ‖ΔW‖², the rest was trained or rounded."
    )
    evidence = {
        "zeroed_fraction": share, "zeroed_energy": energy, "zero_pattern": pattern, "n_matrices": len(part)
    }  # fmt: skip
    return Finding("pruned", say, evidence, scope_of(part, table))


def _say_quantized(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    bits = float(part["grid_bits"].mode().iloc[0])
    same = part[part["grid_bits"] == bits]
    group = str(pd.Series([_group(row) for row in same.to_dict("records")]).mode().iloc[0])
    like_null = float((same["r90"] / same["null_r90"]).median())
    levels, before = float(same["grid_levels"].median()), float(same["base_levels"].median())
    size = float(same["relative_update"].median())
    article = "An" if bits == 8 else "A"
    what, end = ("copy", ".") if like_null >= MOSTLY_NOISE else ("fine-tune", ", so that more than rounding moved.")
    say = (
        f"{article} {bits:.0f}-bit quantized {what} ({group}): {where(part, table)} hold {levels:.0f} distinct values "
        f"where the base has {before:.0f}; the difference ({percent(size)} of ‖W‖) has r90 at {like_null:.2f} × "
        f"noise{end}"
    )
    evidence = {
        "bits": bits, "group": group, "grid_levels": levels, "base_levels": before, "r90_over_null": like_null,
        "relative_update": size, "n_matrices": len(part),
    }  # fmt: skip
    return Finding("quantized", say, evidence, scope_of(part, table))


def _group(row: dict[str, Any]) -> str:
    """Which entries share a scale, in words."""
    if row["grid_axis"] == "":
        return "one scale a matrix"
    columns = row["grid_axis"] == "column"
    if row["grid_group"] == (row["rows"] if columns else row["cols"]):
        return f"one scale a {row['grid_axis']}"
    return f"groups of {row['grid_group']:.0f}" + (" along columns" if columns else "")


def _say_restored(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    storage, wide = str(part["storage"].mode().iloc[0]), str(part["base_dtype"].mode().iloc[0])
    rounding = part["noise_std"] * np.sqrt(part["rows"] * part["cols"])
    ratio = float((part["fro_norm"] / rounding).median())
    say = (
        f"The same weights rounded from {wide} to {storage}: in {where(part, table)} ‖ΔW‖ is {ratio:.2f} × what that "
        "rounding does."
    )
    return Finding("re-stored", say, {"norm_over_rounding": ratio, "n_matrices": len(part)}, scope_of(part, table))


def _say_scaled(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    factor = 1 + part["scale"]
    low, high = float(factor.min()), float(factor.max())
    by = f"by {digits(float(factor.median()))}"
    if high - low > 0.02 * abs(float(factor.median()) - 1):
        by = f"each by its own factor, {digits(low)} to {digits(high)}"
    alignment = float(part["base_alignment"].abs().min())
    least = math.floor(1e4 * alignment) / 1e4
    say = f"Plain scaling: {where(part, table)} were multiplied {by} (|cos(ΔW, W)| ≥ {least})."
    evidence = {"factor_min": low, "factor_max": high, "min_alignment": alignment, "n_matrices": len(part)}
    return Finding("scaled", say, evidence, scope_of(part, table))


def say_noise(part: pd.DataFrame, table: pd.DataFrame) -> Finding:
    """ΔW with the spectrum of Gaussian noise."""
    ratio, size = float((part["r90"] / part["null_r90"]).median()), float(part["relative_update"].median())
    say = (
        f"Noise: in {where(part, table)} ΔW ({percent(size)} of ‖W‖) has the spectrum of Gaussian noise (r90 "
        f"{ratio:.2f} × null, no direction above its edge): added noise, or rounding to a grid that was not recognised."
    )
    evidence = {"r90_over_null": ratio, "relative_update": size, "n_matrices": len(part)}
    return Finding("noise", say, evidence, scope_of(part, table))


SAY: Final[dict[str, Callable[[pd.DataFrame, pd.DataFrame], Finding]]] = {
    "quantized": _say_quantized, "pruned": _say_pruned, "re-stored": _say_restored, "scaled": _say_scaled,
    "re-initialised": _say_reinitialised,
}  # fmt: skip
