"""The best approximation of a matrix by one of rank r, with a proof of how near to the optimum it is.

Legend: m out, n in, r rank, k = min(m, n).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import single_precision
from lowrank_probe.float64 import eigh, gram, mm, product, qr, small_svd
from lowrank_probe.full_spectra import eigenvalue_error
from lowrank_probe.krylov import certified

# From this short side on a few leading eigenvectors cost less by a block Krylov iteration.
KRYLOV_FROM: Final = 384
# By how much of the squared error a truncation may miss the optimum: (1 + 5e-5)² − 1, with a margin.
TAIL_BAR: Final = 5e-5


@dataclass(frozen=True)
class Truncation:
    """The best approximation of rank r: A (m, n) ≈ U·diag(s)·Vh, and how near to the optimum that is.

    U (m, r), s (r,) descending, Vh (r, n): float64 on A's device; U and Vhᵀ have orthonormal columns. Cut to j < r
    columns it is the best of rank j, as near.
    upper: (r,) proven upper bounds on σᵢ²: Σ_{i≤j} sᵢ² is what rank j keeps of ‖A‖_F², exactly, and no matrix of that
    rank keeps more than Σ_{i≤j} upper (Eckart & Young 1936).
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    upper: NDArray[np.float64]
    method: str


def truncate(A: Tensor, r: int, *, seed: int = 0) -> Truncation:
    """The truncated SVD of rank r of A (m, n), bracketed: eigenvectors of the float64 Gram matrix of the short side, or
    for r ≤ k/8 a certified block Krylov iteration, on a CPU in float32 first (`single_precision`), else in float64
    (`top_spectrum`), which falls back on them: the error is then within 5e-5 of the optimum, or within 1e-6·‖A‖_F.

    r is cut to min(m, n). The last step is a Rayleigh–Ritz on A itself, so that what is kept is exact and small values
    keep the digits that squaring costs. Deterministic for a given seed.
    """
    k = min(A.shape)
    r = min(r, k)
    found = _leading(A, r, seed) if k > KRYLOV_FROM and r <= k // 8 else None
    _, upper, basis = found if found is not None else (None, *eigh(gram(A), r))
    upper = np.maximum(upper, 0.0) + eigenvalue_error(float(upper[0]), A.shape)
    tall = A if A.shape[0] > A.shape[1] else A.T  # as `gram` chooses
    Q, R = qr(product(tall, basis))
    W, s, Zh = small_svd(R)
    left, right = mm(Q, W), mm(basis, Zh.T)
    U, V = (left, right) if tall is A else (right, left)
    return Truncation(U, s, V.T, upper, "eigh" if found is None else "krylov")


def _leading(A: Tensor, r: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64], Tensor] | None:
    """(lower, upper, basis) of the r largest eigenvalues of the Gram matrix by block Krylov; None without a proof."""
    if A.is_cpu:
        found = single_precision.certified(A, r, seed=seed, tail_bar=TAIL_BAR)
        if found is not None:
            return found
    G = gram(A)
    return certified(G, r, seed=seed, tail_bar=TAIL_BAR) if float(torch.diagonal(G).sum()) > 0 else None
