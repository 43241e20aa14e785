"""ΔW → the factors of a LoRA as they are stored, with the error of what is stored and a proof of how good it could be.

Legend: m out, n in, r rank; B (m, r), A (r, n), ΔW ≈ B·A (scaling 1). Cut to j < r columns they are the LoRA of rank j.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from lowrank_probe import svd
from lowrank_probe.errors import NumericsError
from lowrank_probe.metrics import Values

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Factored:
    """The factors of one matrix on the host in their stored dtype, and per rank j = 1 … r, all (r,) float64:

    kept: Σ_{i≤j} σᵢ², what rank j keeps of ‖ΔW‖_F² before rounding. upper: what no matrix of rank j keeps more than.
    stored: ‖ΔW − B_j·A_j‖_F² of the rounded factors. method: of `svd.truncate`.
    """

    B: Tensor
    A: Tensor
    kept: Values
    upper: Values
    stored: Values
    method: str


def factorise(dense: Tensor, fro_norm: float, r: int, dtype: torch.dtype, name: str, *, seed: int = 0) -> Factored:
    """The best rank-r factors of ΔW (m, n) with √σ in each, rounded to dtype; r is cut to min(m, n).

    fro_norm: ‖ΔW‖_F. Raises `NumericsError` naming the matrix where a factor overflows the dtype.
    The stored error is ‖ΔW‖² − 2⟨ΔW, BA⟩ + ‖BA‖² in float64, so that errors below 3e-8·‖ΔW‖_F are seen as that.
    """
    found = svd.truncate(dense, r, seed=seed)
    root = found.s.sqrt()
    B, A = (found.U * root).to(dtype), (root[:, None] * found.Vh).to(dtype)
    if not bool(torch.isfinite(B).all() and torch.isfinite(A).all()):
        largest = max(float((found.U * root).abs().max()), float((root[:, None] * found.Vh).abs().max()))
        beyond = str(dtype).removeprefix("torch.")
        raise NumericsError(
            f"{name}: its factors reach {largest:.3g}, beyond {beyond}; use --dtype float32 or bfloat16"
        )
    B64, A64 = B.double(), A.double()
    along = (svd.product(dense.T, B64).T * A64).sum(dim=1).cpu().numpy()
    square = (svd.product(B64.T, B64) * svd.product(A64, A64.T)).cpu().numpy()
    inside = np.diagonal(np.cumsum(np.cumsum(square, axis=0), axis=1))
    stored = np.maximum(fro_norm**2 - 2 * np.cumsum(along) + inside, 0.0)
    kept = np.cumsum(found.s.cpu().numpy() ** 2)
    return Factored(B.cpu(), A.cpu(), kept, np.cumsum(found.upper), stored, found.method)


def relative(square: float, fro_norm: float) -> float:
    """√(square)/‖ΔW‖_F, NaN for ΔW = 0."""
    return math.sqrt(max(0.0, square)) / fro_norm if fro_norm > 0 else math.nan
