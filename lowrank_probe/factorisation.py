"""ΔW → the factors of a LoRA as they are stored, with the error of what is stored and a proof of how good it could be.

Legend: m out, n in, r rank; B (m, r), A (r, n), ΔW ≈ B·A (scaling 1). Cut to j < r columns they are the LoRA of rank j.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_probe import svd
from lowrank_probe.metrics import Values
from lowrank_probe.narrowing import narrowed
from lowrank_probe.truncation import truncate
from lowrank_probe.weighting import Roots


@dataclass(frozen=True)
class Factored:
    """The factors of one matrix on the host in their stored dtype, and per rank j = 1 … r, all (r,) float64:

    kept: what rank j keeps of ‖ΔW‖_F² before rounding (Σ_{i≤j} σᵢ² for the SVD). upper: what no matrix of rank j keeps
    more than. stored: ‖ΔW − B_j·A_j‖_F² of the rounded factors. method: of `truncation.truncate`.
    With roots: upper and weighted = ‖Kᵀ(ΔW − B_j·A_j)L‖_F² are of KᵀΔWL, weighted_norm = ‖KᵀΔWL‖_F; kept is after.
    """

    B: Tensor
    A: Tensor
    kept: Values
    upper: Values
    stored: Values
    method: str
    weighted: Values | None = None
    weighted_norm: float = math.nan


def factorise(
    dense: Tensor, fro_norm: float, r: int, dtype: torch.dtype, name: str, *, seed: int = 0, roots: Roots | None = None
) -> Factored:
    """The best rank-r factors of ΔW (m, n), each column of B as long as its row of A, rounded to dtype.

    r is cut to min(m, n). fro_norm: ‖ΔW‖_F. Best in ‖ΔW − BA‖_F, or with roots in ‖Kᵀ(ΔW − BA)L‖_F (`weighting`).
    Raises `NumericsError` naming the matrix where a factor overflows the dtype.
    The stored error is ‖ΔW‖² − 2⟨ΔW, BA⟩ + ‖BA‖² in float64, so that errors below 3e-8·‖ΔW‖_F are seen as that.
    """
    M = dense if roots is None else roots.weighted(dense)
    found = truncate(M, r, seed=seed)
    long_B, long_A = (found.U, found.s[:, None] * found.Vh) if roots is None else roots.factors(dense, found.U)
    lengths = torch.linalg.vector_norm(long_B, dim=0), torch.linalg.vector_norm(long_A, dim=1)
    nothing = (lengths[0] == 0) | (lengths[1] == 0)
    balance = torch.where(nothing, 1.0, lengths[1] / torch.where(nothing, 1.0, lengths[0])).sqrt()
    long_B, long_A = torch.where(nothing, 0.0, long_B * balance), long_A / balance[:, None]
    B, A = (narrowed(factor, dtype, f"{name}: its factors reach") for factor in (long_B, long_A))
    B64, A64 = B.double(), A.double()
    stored = _errors(dense, fro_norm, B64, A64)
    kept, upper = np.cumsum(found.s.cpu().numpy() ** 2), np.cumsum(found.upper)
    if roots is None:
        return Factored(B.cpu(), A.cpu(), kept, upper, stored, found.method)
    norm = svd.fro_norm(M)
    weighted = _errors(M, norm, roots.left(B64), roots.right(A64))
    return Factored(B.cpu(), A.cpu(), fro_norm**2 - stored, upper, stored, found.method, weighted, norm)


def warm_up(device: torch.device) -> None:
    """Load libraries and kernels by factorising a small matrix: the first use of each takes a part of a second."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(1024, 8, generator=generator) @ torch.randn(8, 512, generator=generator)
    A += torch.randn(1024, 512, generator=generator)
    factorise(A.to(device), svd.fro_norm(A), 8, torch.float32, "warm")


def _errors(dense: Tensor, norm: float, B: Tensor, A: Tensor) -> Values:
    """(r,) ‖dense − B_j·A_j‖_F² for j = 1 … r, norm = ‖dense‖_F, in float64."""
    along = (svd.product(dense.T, B).T * A).sum(dim=1).cpu().numpy()
    square = (svd.product(B.T, B) * svd.product(A, A.T)).cpu().numpy()
    inside = np.diagonal(np.cumsum(np.cumsum(square, axis=0), axis=1))
    return np.asarray(np.maximum(norm**2 - 2 * np.cumsum(along) + inside, 0.0))


def relative(square: float, fro_norm: float) -> float:
    """√(square)/‖ΔW‖_F, NaN for ΔW = 0."""
    return math.sqrt(max(0.0, square)) / fro_norm if fro_norm > 0 else math.nan
