"""scaling·B·A from its factors alone: QR of both, then an R×R SVD; never a dense matrix.

Legend: m out, n in, R the rank of B (m, R) and A (R, n), r ≤ R the one asked for; s (R,) the singular values.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_probe.float64 import EPS64, small_svd
from lowrank_probe.full_spectra import SingularValues
from lowrank_probe.triplets import Triplets, signed


def factored_spectrum(B: Tensor, A: Tensor, scaling: float) -> SingularValues:
    """The r singular values of scaling·B·A for B (m, r), A (r, n): R-factors of B and Aᵀ, then an r×r SVD, float64.

    Never forms the (m, n) product. Values beyond r are zero and are not listed.
    """
    R_B, R_A = _triangles(B.double(), A.double())
    s = abs(scaling) * torch.linalg.svdvals(R_B @ R_A.T)
    values = s.cpu().numpy().astype(np.float64)
    # QR and the small product are backward stable: absolute error a modest multiple of ε‖B‖‖A‖.
    scale = abs(scaling) * float(torch.linalg.matrix_norm(R_B)) * float(torch.linalg.matrix_norm(R_A))
    bound = 8 * math.sqrt(sum(B.shape) + A.shape[1]) * EPS64 * scale
    total = float((values**2).sum())
    return SingularValues(
        values,
        "factored_qr",
        "float64",
        np.full(len(values), bound),
        2 * bound * float(values.sum()) / total if total else 0.0,
    )


def factored_triplets(B: Tensor, A: Tensor, scaling: float, r: int) -> Triplets:
    """The r largest triplets of scaling·B·A for B (m, R), A (R, n): QR of both factors, then an R×R SVD, float64.

    Never forms the (m, n) product; r is cut to R.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    core = scaling * (R_B @ R_A.T)
    W, s, Zh = small_svd(core)
    r = min(r, len(s))
    residual = torch.linalg.vector_norm(core @ Zh[:r].T - W[:, :r] * s[:r], dim=0)
    return signed(Q_B @ W[:, :r], s[:r], Q_A @ Zh[:r].T, residual, float(s[r]) if len(s) > r else 0.0)


@dataclass(frozen=True)
class Core:
    """scaling·B·A = Q_B·W·diag(s)·Zh·Q_Aᵀ by QR of B (m, R) and Aᵀ, then an R×R SVD, in float64; Q is never formed.

    With R_B, R_A the triangular factors: U = Q_B·W = B·R_Aᵀ·Zhᵀ·scaling/s, Vh = Zh·Q_Aᵀ = Wᵀ·R_B·A·scaling/s. Both
    err by about ε·‖B‖·‖A‖/s, as s does itself; values of s that are all rounding count as 0.
    """

    B: Tensor
    A: Tensor
    left: Tensor
    s: Tensor
    right: Tensor

    @classmethod
    def of(cls, B: Tensor, A: Tensor, scaling: float) -> "Core":
        B, A = B.double(), A.double()
        R_B, R_A = _triangles(B, A)
        W, s, Zh = torch.linalg.svd(scaling * (R_B @ R_A.T), full_matrices=False)
        rounding = abs(scaling) * float(torch.linalg.norm(R_B) * torch.linalg.norm(R_A)) * len(A) * EPS64
        return cls(B, A, scaling * (R_A.T @ Zh.T), torch.where(s > rounding, s, 0.0), scaling * (W.T @ R_B))

    def factors(self, r: int) -> tuple[Tensor, Tensor]:
        """(U_r·√s_r (m, r), √s_r·Vh_r (r, n))."""
        root = torch.where(self.s[:r] > 0, self.s[:r].rsqrt(), 0.0)
        return self.B @ (self.left[:, :r] * root), (root[:, None] * self.right[:r]) @ self.A


def _triangles(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(R_B, R_A) (R, R): the triangular factors of B and Aᵀ. Their bases are not formed: that is half of the cost."""
    return torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.T, mode="r").R


def distance(B: Tensor, A: Tensor, stored_B: Tensor, stored_A: Tensor) -> float:
    """‖B·A − B̃·Ã‖_F = ‖(B − B̃)·A + B̃·(A − Ã)‖_F by Gram matrices of the factors: no dense matrix, no cancellation."""
    X = torch.cat([B - stored_B, stored_B.double()], dim=1)
    Y = torch.cat([A, A - stored_A])
    return math.sqrt(max(0.0, float(((X.T @ X) * (Y @ Y.T)).sum())))
