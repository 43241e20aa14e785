"""The best approximation of a matrix by one of rank r, with a proof of how near to the optimum it is.

Legend: m out, n in, r rank, k = min(m, n).
"""

import threading
from contextlib import nullcontext
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
# Floating-point operations of a matrix product that take as long as all eigenvectors, in units of k³.
EIGH_COST: Final = 8
_turns: Final[dict[torch.device, threading.Lock]] = {}


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
    (`top_spectrum`), which falls back on them: the error is then within 5e-5 of the optimum, or within 1e-6·‖A‖_F, or
    as near as float64 proves, where next to nothing is left.

    r is cut to min(m, n). The last step is a Rayleigh–Ritz on A itself, so that what is kept is exact and small values
    keep the digits that squaring costs. Deterministic for a given seed.
    """
    k = min(A.shape)
    r = min(r, k)
    tall = A if A.shape[0] > A.shape[1] else A.T  # as `gram` chooses
    found = _leading(tall, r, seed) if k > KRYLOV_FROM and r <= k // 8 else None
    upper, basis = found[:2] if found is not None else _eigenvectors(A, r)
    upper = np.maximum(upper, 0.0) + eigenvalue_error(float(upper[0]), A.shape)
    Q, R = qr(found[2] if found is not None else product(tall, basis))
    W, s, Zh = small_svd(R)
    left, right = mm(Q, W), mm(basis, Zh.T)
    U, V = (left, right) if tall is A else (right, left)
    return Truncation(U, s, V.T, upper, "eigh" if found is None else "krylov")


def _eigenvectors(A: Tensor, r: int) -> tuple[NDArray[np.float64], Tensor]:
    """The r largest eigenvalues of the Gram matrix and their vectors; on a GPU one matrix at a time: the solver takes
    several times the Gram matrix, and two of them beside each other are no faster."""
    with nullcontext() if A.is_cpu else _turns.setdefault(A.device, threading.Lock()):
        return eigh(gram(A), r)


def _leading(tall: Tensor, r: int, seed: int) -> tuple[NDArray[np.float64], Tensor, Tensor] | None:
    """(upper bounds, V, tall·V) of the r largest eigenvalues of tallᵀ·tall by block Krylov; None without a proof."""
    if tall.is_cpu:
        found = single_precision.certified(tall, r, seed=seed, tail_bar=TAIL_BAR)
        if isinstance(found, tuple):
            return found
        if found * _round_cost(tall.shape[1], r) > EIGH_COST * tall.shape[1] ** 3:
            return None
    G = gram(tall.T)
    wide = certified(G, r, seed=seed, tail_bar=TAIL_BAR) if float(torch.diagonal(G).sum()) > 0 else None
    return None if wide is None else (wide[1], wide[2], product(tall, wide[2]))


def _round_cost(k: int, r: int) -> int:
    """Operations of one round of `krylov.certified`: six products with G, QR and eigenvectors of three blocks."""
    q = r + 32
    return 12 * k**2 * q + 4 * k * (3 * q) ** 2 + EIGH_COST * (3 * q) ** 3
