"""What the figures draw, from the table and the spectra: groups, curves, thinned spectra. numpy and pandas only."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.figure_style import log_spaced, numbers, shown_names
from lowrank_probe.layers import labels, sort_key
from lowrank_probe.metrics import SIGNAL_FACTOR, Values, marchenko_pastur
from lowrank_probe.runs import Result

OUTSIDE: Final = "outside"  # the heat map's column of what is in no layer


def null_energy(ranks: Values, shape: tuple[int, int]) -> Values:
    """Energy that rank r keeps of i.i.d. Gaussian noise of this shape. Source: Marchenko & Pastur 1967."""
    share, kept = marchenko_pastur(min(shape) / max(shape))
    return np.interp(np.asarray(ranks) / min(shape), share, kept)


def null_values(index: NDArray[np.int64], shape: tuple[int, int]) -> Values:
    """σ_i of an i.i.d. matrix of unit variance at each index 1 ≤ i ≤ k: √(max·λ), λ the upper (i − ½)/k quantile.

    Indices above k = min(shape) are left out. Source: Marchenko & Pastur 1967.
    """
    index = index[index <= min(shape)]
    beta = min(shape) / max(shape)
    share, _ = marchenko_pastur(beta)
    eigenvalues = 1 + beta - 2 * math.sqrt(beta) * np.cos(np.linspace(math.pi, 0.0, len(share)))
    at = np.interp((index - 0.5) / min(shape), share, eigenvalues)
    return np.sqrt(max(shape) * at)


def group_of(table: pd.DataFrame) -> "pd.Series[str]":
    """Each matrix's layer type as shown (`layers.labels`), as plotly text."""
    shown = labels(*(table[name].astype(str).to_numpy() for name in ("stack", "layer_type")))
    names = shown_names(shown)
    return pd.Series([names[label] for label in shown], index=table.index, dtype=object)


def groups(table: pd.DataFrame) -> list[str]:
    """The labels of `group_of`, in the order the data flows."""
    first = pd.DataFrame({"label": group_of(table), "type": table["layer_type"], "stack": table["stack"]})
    rows = first.drop_duplicates("label").itertuples()
    return [str(r.label) for r in sorted(rows, key=lambda r: (sort_key(str(r.type)), str(r.stack)))]


def columns_of(table: pd.DataFrame) -> list[str]:
    """The layers as the figures' columns: "0", "1", …, and "outside" where a matrix is in none."""
    layers = sorted({int(n) for n in table["layer"].dropna()})
    return [*map(str, layers), *([OUTSIDE] if table["layer"].isna().any() else [])]


@dataclass(frozen=True)
class Cells:
    """The matrices by layer type and layer; several share a cell where a layer has several of a type, as experts.

    code: each matrix's cell. row, column: each cell's layer type and layer as shown. n: its matrices.
    """

    code: NDArray[np.int64]
    row: NDArray[Any]
    column: NDArray[Any]
    n: NDArray[np.int64]

    def medians(self, values: Mapping[str, Any]) -> dict[str, Values]:
        """Of each named column (one value a matrix), the median in every cell; NaN counts as missing."""
        return self._grouped(values, "median")

    def means(self, values: Mapping[str, Any]) -> dict[str, Values]:
        """As `medians`, the mean: of flags, the share."""
        return self._grouped(values, "mean")

    def _grouped(self, values: Mapping[str, Any], how: str) -> dict[str, Values]:
        frame = pd.DataFrame({name: np.asarray(column, dtype=float) for name, column in values.items()})
        found = frame.groupby(self.code).agg(how)
        return {name: found[name].to_numpy() for name in values}


def cells_of(table: pd.DataFrame) -> Cells:
    """The cells of a table, by layer type and then layer."""
    names, columns = groups(table), columns_of(table)
    row = pd.Index(names).get_indexer(pd.Index(group_of(table)))
    layer = [OUTSIDE if n < 0 else str(n) for n in layers_of(table).tolist()]
    column = pd.Index(columns).get_indexer(pd.Index(layer))
    found, code, n = np.unique(row * len(columns) + column, return_inverse=True, return_counts=True)
    return Cells(code, np.array(names, dtype=object)[found // len(columns)],
                 np.array(columns, dtype=object)[found % len(columns)], n)  # fmt: skip


def layers_of(table: pd.DataFrame) -> NDArray[np.int64]:
    """Each matrix's layer number, −1 outside the blocks."""
    return np.asarray(table["layer"].astype("Float64").fillna(-1), dtype=np.int64)


def finite(table: pd.DataFrame, name: str) -> Values:
    """A column as floats, NaN for ∞ and missing."""
    values = table[name].to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(values), values, np.nan)


def five_numbers(values: Values) -> dict[str, float]:
    """A box: quartiles, and as fences the outermost values within 1.5 interquartile ranges (Tukey)."""
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    reach = 1.5 * (q3 - q1)
    # A quartile bounds each: between two values one rounding apart it may lie outside of both.
    fences = {
        "lowerfence": float(np.min(values[values >= q1 - reach], initial=q1)),
        "upperfence": float(np.max(values[values <= q3 + reach], initial=q3)),
    }
    return {"q1": q1, "median": median, "q3": q3, **fences}


def energies(spectra: list[tuple[Values, float]], k: int) -> tuple[Values, Values]:
    """(ranks on a log grid up to k, energy of each (σ, ‖ΔW‖_F) at each rank); as far as truncated lists go."""
    limit = min([k, *(len(s) for s, norm in spectra if np.sum(s**2) < norm**2 * (1 - 1e-9))])
    ranks = log_spaced(limit, 80)
    curves = np.empty((len(spectra), len(ranks)))
    for row, (s, norm) in zip(curves, spectra, strict=True):
        row[:] = np.cumsum(s**2)[np.minimum(ranks, len(s)) - 1] / norm**2
    return ranks.astype(float), np.minimum(curves, 1.0)


def doubtful(table: pd.DataFrame) -> set[str]:
    """The groups most of whose matrices have an undecidable r90."""
    share = table["decidable_r90"].astype(float).groupby(group_of(table)).mean()
    return {str(name) for name in share.index[share < 0.5]}


def spectrum_points(result: Result, row: Mapping[Any, Any], points: int) -> tuple[list[Any], list[Any]]:
    """x and y of the five lines of one spectrum: storage noise alone, raw, denoised, noise edge, signal threshold.

    row: the matrix's row of the table. At most `points` points a line.
    """
    raw = result.singular_values[row["name"]]
    denoised = result.denoised_values.get(row["name"], np.empty(0))
    index = log_spaced(len(raw), points)
    std, edge = _noise(row)
    noise = std * null_values(index, _moved(row)) if std else np.empty(0)
    lines = [(index[: len(noise)], noise)]
    for values in (raw, denoised):
        kept = index[: _drawn(index, values)]
        lines.append((kept, values[kept - 1]))
    x = [at.tolist() for at, _ in lines]
    y = [numbers(values) for _, values in lines]
    for level in (edge, SIGNAL_FACTOR["rounding"] * edge):
        x.append([1, len(raw)] if level else [])
        y.append([level, level] if level else [])
    return x, y


def packed_spectra(result: Result, points: int) -> dict[str, Any]:
    """Every matrix's lines as `spectrum_points` draws them, in the table's order, for a page to unpack one at a time.

    types: each matrix's layer type as shown. grids: the distinct indices with the noise of unit variance there. rows:
    (grid, raw points, denoised points, noise_std, noise_edge) a matrix, grid −1 where there is no spectrum.
    values: raw, then denoised σ of one matrix after the other, as little-endian float32 in base64.
    """
    grids: dict[tuple[int, int, int], tuple[int, NDArray[np.int64], list[float | None]]] = {}
    rows: list[list[Any]] = []
    parts: list[Values] = []
    empty = np.empty(0)
    wanted = ("name", "rows", "cols", "noise_model", "noise_std", "noise_edge", "edge_ratio")
    for row in result.table[list(wanted)].to_dict("records"):
        raw = result.singular_values.get(row["name"])
        if raw is None:
            rows.append([-1, 0, 0, 0, 0])
            continue
        shape = _moved(row)
        key = (*shape, len(raw))
        if key not in grids:
            index = log_spaced(len(raw), points)
            grids[key] = (len(grids), index, numbers(null_values(index, shape)))
        number, index, _ = grids[key]
        denoised = result.denoised_values.get(row["name"], empty)
        n_raw, n_denoised = _drawn(index, raw), _drawn(index, denoised)
        parts += [raw[index[:n_raw] - 1], denoised[index[:n_denoised] - 1]]
        rows.append([number, n_raw, n_denoised, *numbers(_noise(row))])
    values = np.concatenate([empty, *parts]).astype("<f4")
    return {
        "types": labels(*(result.table[name].to_numpy() for name in ("stack", "layer_type"))),
        "grids": [{"index": index.tolist(), "noise": noise} for _, index, noise in grids.values()],
        "rows": rows,
        "values": base64.b64encode(values.tobytes()).decode("ascii"),
        "factor": SIGNAL_FACTOR["rounding"],
    }


def _drawn(index: NDArray[np.int64], values: Values) -> int:
    """How many of the indices have a positive value: a log axis has no zero."""
    return int(np.searchsorted(index, np.count_nonzero(values > 0), side="right"))


def _noise(row: Mapping[Any, Any]) -> tuple[float, float]:
    """(noise_std, noise_edge); 0 where there is none to draw.

    The dead-zone model's noise belongs to the corrected update, whose σ are drawn denoised only.
    """
    std, edge = float(row["noise_std"]), float(row["noise_edge"])
    known = row["noise_model"] == "rounding" and math.isfinite(std) and math.isfinite(edge)
    return (std, edge) if known else (0.0, 0.0)


def _moved(row: Mapping[Any, Any]) -> tuple[int, int]:
    """(rows that moved, n): what the storage noise is about. From edge_ratio = noise_edge / (noise_std·(√m + √n))."""
    m, n = int(row["rows"]), int(row["cols"])
    textbook = float(row["noise_std"]) * float(row["edge_ratio"])
    root = float(row["noise_edge"]) / textbook - math.sqrt(n) if textbook > 0 else math.nan
    return (min(m, max(1, round(root**2))), n) if math.isfinite(root) and root > 0 else (m, n)
