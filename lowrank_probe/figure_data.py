"""What the figures draw, from the table and the spectra: groups, curves, thinned spectra. numpy and pandas only."""

from typing import Final

import numpy as np
import pandas as pd

from lowrank_probe.figure_style import log_spaced, text
from lowrank_probe.layers import sort_key
from lowrank_probe.metrics import SIGNAL_FACTOR, Values, marchenko_pastur
from lowrank_probe.runs import Result

MAX_POINTS: Final = 250  # of one spectrum


def null_energy(ranks: Values, shape: tuple[int, int]) -> Values:
    """Energy that rank r keeps of i.i.d. Gaussian noise of this shape. Source: Marchenko & Pastur 1967."""
    share, kept = marchenko_pastur(min(shape) / max(shape))
    return np.interp(np.asarray(ranks) / min(shape), share, kept)


def group_of(table: pd.DataFrame) -> "pd.Series[str]":
    """Each matrix's layer type as shown, with its stack where the model has more than one."""
    label = table["layer_type"].astype(str).map(text)
    several = table["stack"].nunique() > 1
    return (table["stack"].astype(str) + " ").str.lstrip() + label if several else label


def groups(table: pd.DataFrame) -> list[str]:
    """The labels of `group_of`, in the order the data flows."""
    first = pd.DataFrame({"label": group_of(table), "type": table["layer_type"], "stack": table["stack"]})
    rows = first.drop_duplicates("label").itertuples()
    return [str(r.label) for r in sorted(rows, key=lambda r: (sort_key(str(r.type)), str(r.stack)))]


def energies(spectra: list[tuple[Values, float]], k: int) -> tuple[Values, Values]:
    """(ranks on a log grid up to k, energy of each (σ, ‖ΔW‖_F) at each rank); as far as truncated lists go."""
    limit = min([k, *(len(s) for s, norm in spectra if np.sum(s**2) < norm**2 * (1 - 1e-9))])
    ranks = log_spaced(limit, 80)
    curves = np.empty((len(spectra), len(ranks)))
    for row, (s, norm) in zip(curves, spectra, strict=True):
        row[:] = np.cumsum(s**2)[np.minimum(ranks, len(s)) - 1] / norm**2
    return ranks.astype(float), np.minimum(curves, 1.0)


def spectrum_points(result: Result, name: str, edge: float) -> tuple[list[list[float]], list[list[float]]]:
    """x and y of the four lines of `singular_values`: raw, denoised, edge, threshold."""
    raw = result.singular_values[name]
    denoised = result.denoised_values.get(name, np.empty(0))
    x: list[list[float]] = []
    y: list[list[float]] = []
    for values in (raw, denoised[: np.count_nonzero(denoised > 0)]):
        index = log_spaced(len(values), MAX_POINTS)
        index = index[values[index - 1] > 0]  # a log axis has no zero
        x.append([int(i) for i in index])
        y.append([float(f"{v:.5g}") for v in values[index - 1]])
    for level in (edge, SIGNAL_FACTOR["rounding"] * edge):
        drawn = np.isfinite(level) and level > 0
        x.append([1, len(raw)] if drawn else [])
        y.append([level, level] if drawn else [])
    return x, y


def even_selection(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows: as many of each layer type, evenly spread over its layers."""
    names = groups(table)
    each = max(1, limit // max(1, len(names)))
    parts = []
    for name in names[:limit]:
        part = table[group_of(table) == name].sort_values("layer", kind="stable")
        take = np.arange(len(part)) if len(table) <= limit else np.linspace(0, len(part) - 1, min(each, len(part)))
        parts.append(part.iloc[take.round().astype(int)])
    return pd.concat(parts) if parts else table


def doubtful(table: pd.DataFrame) -> set[str]:
    """The groups most of whose matrices have an undecidable r90."""
    share = table["decidable_r90"].astype(float).groupby(group_of(table)).mean()
    return {str(name) for name in share.index[share < 0.5]}
