"""4-bit rounding inside an update: QLoRA trains beside a base in nf4 or fp4, and its merged adapter is seen through it.

bitsandbytes gives 64 entries, consecutive as stored, the nearest of 16 multiples of their absmax: Q. Either side of a
pair may be the rounded one, B·A being what was trained:

    "tuned"   the adapter was merged into the dequantized base             ΔW = Q(W) − W + B·A
    "base"    the base is dequantized, and the adapter was merged into     ΔW = V + B·A − Q(V)
              the weights V that it was made of

The first is known by the base's own rounding error, which ΔW follows entry by entry; the second by the size of ΔW in
the cells of the codebook, whose widths differ by 2.7 ×: rounding fills each, an update knows nothing of them.

Legend: W (m, n) the base, T the tuned values; a block is 64 entries of a row or of a column.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.float64 import row_chunks
from lowrank_probe.grids import SAMPLE, Lines, pick, to_numpy
from lowrank_probe.svd import leading_singular_values

if TYPE_CHECKING:
    from lowrank_probe.deltas import Delta

BLOCK: Final = 64
# Entries of a first look.
FEW: Final = 512
# Source: Dettmers et al. 2023, appendix E (nf4); the table of bitsandbytes (fp4).
CODEBOOKS: Final[dict[str, tuple[float, ...]]] = {
    "nf4": (
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    "fp4": (
        -1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 192, 0.0, 1 / 192, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0,
    ),
}  # fmt: skip
# ‖ΔW‖/‖W‖ from which 4-bit rounding may be in it: it is 0.09 for Gaussian weights, 0.05 for uniform ones.
LEAST_UPDATE: Final = 0.03
# Correlation of ΔW with the base's rounding error: 0 ± 0.02 for any other update, 0.2 with an adapter 4.9 × its size.
FOLLOWS: Final = 0.2
# A base is on a codebook where rounding moves it by less than this share of its norm (bfloat16 storage: 0.002).
ON_CODEBOOK: Final = 0.01
# Misfit of rounding plus a constant, and how much better than a constant alone. Of 74 real and planted pairs 70 have
# rounding alone below 15, 100 to 800 × better; with an adapter of 2/3 of its size 8 to 120 ×. Updates of Adam, SGD,
# sparse ones and those in proportion to the weights, of 0.03 to 1 of ‖W‖: at most 5.6 × where it is below 15 at all.
# Of cells of so many entries.
MISFIT: Final = 15.0
BETTER: Final = 10.0
CELL_ENTRIES: Final = 50


def find_rounding(delta: "Delta", seed: int = 0) -> dict[str, Any]:
    """The columns `rounded_…` and `rounding_…` of one `Delta`; {} where no 4-bit rounding is seen.

    A few rows and columns exclude other updates. Where it is found, one more float32 matrix is needed.
    """
    W, T = delta.base, delta.tuned
    if W is None or T is None or not delta.relative_update >= LEAST_UPDATE:
        return {}
    for axis in (1, 0):
        if W.shape[axis] % BLOCK:
            continue  # blocks would run on over the ends of rows
        few = _blocks(W, T, axis, FEW)
        for name in CODEBOOKS:
            if not _side(*few, name):
                continue
            w, D = _blocks(W, T, axis, SAMPLE)
            side = _side(w, D, name)
            if side == "tuned" or (side == "base" and _fills_cells(w, D, name)):
                exact = T if side == "base" else W  # rounding it gives the errors, but for what was trained
                energy, edge = _extent(exact if axis == 1 else exact.T, name, seed)
                return {
                    "rounded_to": name, "rounded_side": side, "rounding_edge": edge,
                    "rounding_energy": min(1.0, energy / delta.fro_norm**2),
                }  # fmt: skip
    return {}


def _blocks(W: Tensor, T: Tensor, axis: int, entries: int) -> tuple[Lines, Lines]:
    """(w, t − w) in blocks of a few lines, over the absmax of w; blocks of zeros are left out."""
    w, t = (to_numpy(pick(A, axis, entries)).reshape(-1, BLOCK) for A in (W, T))
    absmax = np.abs(w).max(axis=1, keepdims=True)
    if not absmax.all():
        alive = absmax[:, 0] > 0
        w, t, absmax = w[alive], t[alive], absmax[alive]
    w = w / absmax
    return w, t / absmax - w


def _side(w: Lines, D: Lines, name: str) -> str:
    """ "tuned" where D follows the rounding of w, "base" where w is rounded already, else ""."""
    E = _values(name)[np.searchsorted(_middles(name), w)] - w
    error = float(np.vdot(E, E))
    if error <= ON_CODEBOOK**2 * float(np.vdot(w, w)):
        return "base"
    return "tuned" if float(np.vdot(D, E)) > FOLLOWS * math.sqrt(float(np.vdot(D, D)) * error) else ""


def _fills_cells(w: Lines, D: Lines, name: str) -> bool:
    """Whether the mean squares of D in the cells are those of rounding plus a constant, and no constant alone."""
    fit, constant = _misfits(w, D, name)
    return fit <= MISFIT and constant >= BETTER * max(1.0, fit)


def _misfits(w: Lines, D: Lines, name: str) -> tuple[float, float]:
    """χ² for each cell of the mean squares of D: against rounding plus a constant, and against a constant alone.

    The ends of the codebook are left out, since extremes are exact. (∞, 0) where too few cells have enough entries.
    """
    rounding, codes = _mean_squares(name), np.searchsorted(_middles(name), w).ravel()
    square = (D.ravel() ** 2).astype(np.float64)
    n, total, total4 = (np.bincount(codes, of, len(rounding)) for of in (None, square, square**2))
    known = (n >= CELL_ENTRIES) & (rounding >= rounding[1:-1].max() / 16)
    known[[0, -1]] = False
    if known.sum() < 4:
        return math.inf, 0.0
    n, mean, rounding = n[known], total[known] / n[known], rounding[known]
    variance = np.maximum((total4[known] / n - mean**2) / n, 1e-30)

    def misfit(shape: NDArray[np.float64]) -> float:
        model = shape + max(0.0, float(np.average(mean - shape, weights=n)))
        return float(((mean - model) ** 2 / variance).mean())

    return misfit(rounding), misfit(np.zeros_like(rounding))


@cache
def _values(name: str) -> NDArray[np.float32]:
    return np.asarray(CODEBOOKS[name], np.float32)


@cache
def _middles(name: str) -> NDArray[np.float32]:
    """The bounds of the cells."""
    return np.asarray((_values(name)[1:] + _values(name)[:-1]) / 2, np.float32)


@cache
def _mean_squares(name: str) -> NDArray[np.float64]:
    """Mean square rounding error at each value of a codebook: of Gaussian numbers of absmax 1, which is 2.4 σ of 64."""
    x = np.linspace(-1, 1, 40001)
    codes, mass = np.searchsorted(_middles(name), x), np.exp(-((2.4 * x) ** 2) / 2)
    square = np.bincount(codes, mass * (_values(name)[codes] - x) ** 2)
    return np.asarray(square / np.bincount(codes, mass), np.float64)


def _extent(X: Tensor, name: str, seed: int) -> tuple[float, float]:
    """(‖E‖², σ₁(E)) of E = Q(X) − X, for X (m, n) with its blocks along rows; σ₁ from below, within 2 %."""
    middles = torch.from_numpy(_middles(name)).to(X.device)
    codebook = torch.tensor(CODEBOOKS[name], device=X.device)
    E = spilling.empty(X.shape, torch.float32, X.device)
    energy = 0.0
    for out, part in zip(row_chunks(E), row_chunks(X), strict=True):
        blocks = part.float().contiguous().reshape(len(part), -1, BLOCK)
        absmax = blocks.abs().amax(dim=2, keepdim=True).clamp(min=1e-30)
        out.copy_((codebook[torch.bucketize(blocks / absmax, middles)] * absmax - blocks).reshape(part.shape))
        energy += float(torch.linalg.vector_norm(out, dtype=torch.float64)) ** 2
    generator = torch.Generator(device=X.device).manual_seed(seed)
    return energy, float(leading_singular_values(E, generator)[0])
