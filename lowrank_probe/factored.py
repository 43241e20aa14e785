"""scaling·B·A at a lower rank, from its factors alone: QR of both, then an R×R SVD; never a dense matrix.

Legend: m out, n in, R the rank of B (m, R) and A (R, n), r ≤ R the one asked for; s (R,) the singular values.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_probe.svd import EPS64


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
        R_B = torch.linalg.qr(B, mode="r").R
        R_A = torch.linalg.qr(A.T, mode="r").R
        W, s, Zh = torch.linalg.svd(scaling * (R_B @ R_A.T), full_matrices=False)
        rounding = abs(scaling) * float(torch.linalg.norm(R_B) * torch.linalg.norm(R_A)) * len(A) * EPS64
        return cls(B, A, scaling * (R_A.T @ Zh.T), torch.where(s > rounding, s, 0.0), scaling * (W.T @ R_B))

    def factors(self, r: int) -> tuple[Tensor, Tensor]:
        """(U_r·√s_r (m, r), √s_r·Vh_r (r, n))."""
        root = torch.where(self.s[:r] > 0, self.s[:r].rsqrt(), 0.0)
        return self.B @ (self.left[:, :r] * root), (root[:, None] * self.right[:r]) @ self.A


def distance(B: Tensor, A: Tensor, stored_B: Tensor, stored_A: Tensor) -> float:
    """‖B·A − B̃·Ã‖_F = ‖(B − B̃)·A + B̃·(A − Ã)‖_F by Gram matrices of the factors: no dense matrix, no cancellation."""
    X = torch.cat([B - stored_B, stored_B.double()], dim=1)
    Y = torch.cat([A, A - stored_A])
    return math.sqrt(max(0.0, float(((X.T @ X) * (Y @ Y.T)).sum())))
