"""The leading eigenvectors of AᵀA found and proven in float32, then refined in float64: half the work on a CPU.

Legend: A (long, k) with k the short side, G = AᵀA (k, k), r wanted, p ≥ r kept. By numpy, whose BLAS is the faster one
on a CPU. A bound on a largest eigenvalue need not be sharp, so that float32 serves to prove that nothing was missed,
although it could not give the eigenvalues.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.definite import positive_definite
from lowrank_probe.float64 import eigh, fro_norm, mm, product, qr
from lowrank_probe.krylov import ENERGY_BAR, cut, upper_bounds

Matrix = NDArray[np.float32]
EPS32: Final = 2.0**-24
# Sums of squares outside of which float32 may under- or overflow: G² is formed too.
TRACE_RANGE: Final = (1e-15, 1e17)
# More rounds than this and float64 does not cost more.
ROUNDS: Final = 4


def certified(
    tall: Tensor, r: int, *, oversample: int = 16, seed: int = 0, tail_bar: float
) -> tuple[NDArray[np.float64], Tensor, Tensor] | float:
    """(upper bounds of the r largest eigenvalues of G, their Ritz vectors V (k, r), A·V) in float64; where float32 does
    not prove Σ of them within tail_bar of what they leave of tr G, nor within 5e-7·tr G, how many rounds it would take
    in float64, at the rate of the first two (0: not known).

    tall: A, (long, k) on the CPU, r < k ≤ long. As `svd.top_spectrum`, whose bounds these are, but μ is proven with the
    float32 Gram matrix Ĝ and its Cholesky factorisation, and rounding is added to it: ‖Ĝ − G‖ ≤ 4√long·u·tr G (Higham &
    Mary 2019), 8p·u·λ₁ for the deflation, 8k·u·μ for the factorisation. Those are bounds for roundings that do not
    conspire, not for the worst case; μ counts them twice. θ and the residual ‖GV − VΘ‖ come from A in float64.
    """
    single = _single(tall).numpy()
    G: Matrix = np.matmul(single.T, single)  # numpy sees the symmetry and does half the work (syrk)
    k, trace = G.shape[0], float(np.trace(G, dtype=np.float64))
    if not TRACE_RANGE[0] < trace < TRACE_RANGE[1]:
        return 0.0
    q = min(k, r + oversample)
    drawn = torch.randn(k, q, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis: Matrix = np.linalg.qr(drawn.numpy().astype(np.float32))[0]
    GX: Matrix = G @ basis
    before = math.inf
    open_: list[float] = []  # after each round, log of what is unproven over what may be
    for left in reversed(range(ROUNDS)):
        # One Krylov step: span{X, GX, G²X}, then its q best Ritz vectors.
        wide = np.linalg.qr(np.concatenate([basis, GX, G @ GX], axis=1)[:, : min(k, 3 * q)])[0]
        GW = G @ wide
        ritz, W = np.linalg.eigh(wide.T @ GW)
        theta, W = ritz[::-1].astype(np.float64), W[:, ::-1][:, :q]
        basis, GX = wide @ W, GW @ W
        p = cut(theta, r, q)
        off = float(np.linalg.norm(GX[:, :p] - basis[:, :p] * theta[:p].astype(np.float32)))
        rounding = 4 * math.sqrt(len(tall)) * EPS32 * trace + 8 * p * EPS32 * float(theta[0])
        # The Ritz value of the rest is from below; any bound well below θᵣ does.
        shift = float(theta[p] + max(1e-3 * theta[p], 0.25 * (theta[r - 1] - theta[p]))) + rounding
        mu = shift * (1 + 8 * k * EPS32) + rounding
        total = trace
        if trace - float(theta[:r].sum()) < 1e-3 * trace:  # float32 does not say what is left
            total = fro_norm(tall if tall.is_contiguous() else tall.T) ** 2
        if total - float(theta[:r].sum()) < 1e-6 * total:  # the update has this rank: two rounds show it in float64
            return 2.0
        bar = max(_bar(total, theta[:r], tail_bar), 1e-300)
        open_.append(math.log(max(_slack(theta[:r], mu, off), 1e-300)) - math.log(bar))
        if open_[-1] > 0:
            # As good as float32 makes it, or too slow.
            if off > 0.5 * before or (len(open_) > 1 and open_[-1] > left * (open_[0] - open_[1])):
                break
            before = off
            continue
        lower, V, AV, off = _refined(tall, basis[:, :p])
        upper = upper_bounds(lower[:r], mu, off)
        enough = float((upper - lower[:r]).sum()) <= _bar(total, lower[:r], tail_bar)
        if enough and _bounded_by(G, V, shift):
            return upper, V[:, :r], AV[:, :r]
    if len(open_) < 2 or open_[0] <= 0:
        return 0.0
    return 1 + open_[0] / (open_[0] - open_[1]) if open_[0] > open_[1] else math.inf


def _single(A: Tensor) -> Tensor:
    """A in float32, laid out as it is."""
    if A.dtype == torch.float32:
        return A
    if A.stride(1) != 1:
        return _single(A.T).T
    return spilling.empty(A.shape, torch.float32).copy_(A)


def _bar(total: float, theta: NDArray[np.float64], tail_bar: float) -> float:
    """By how much Σλᵢ may stay open; never more than rounding in θ where nothing is left of tr G."""
    return min(0.5 * ENERGY_BAR * total, max(0.0, tail_bar * (total - float(theta.sum()))))


def _slack(theta: NDArray[np.float64], mu: float, off: float) -> float:
    return float((upper_bounds(theta, mu, off) - theta).sum())


def _refined(tall: Tensor, basis: Matrix) -> tuple[NDArray[np.float64], Tensor, Tensor, float]:
    """(Θ descending (p,), V (k, p), AV, ‖GV − VΘ‖_F): Rayleigh–Ritz in float64 on the span of `basis` (k, p)."""
    V = qr(torch.from_numpy(basis).double())[0]
    Y = product(tall, V)
    theta, W = eigh(mm(Y.T, Y), V.shape[1])
    V, AV = mm(V, W), mm(Y, W)
    residual = product(tall.T, AV) - V * torch.from_numpy(theta)
    return theta, V, AV, float(torch.linalg.matrix_norm(residual))


def _bounded_by(G: Matrix, V: Tensor, mu: float) -> bool:
    """Whether the float32 Cholesky factorisation of μI − (I − VVᵀ)G(I − VVᵀ) succeeds; it reads the lower half."""
    Q = V.numpy().astype(np.float32)
    GQ = G @ Q
    H = Q @ (Q.T @ GQ) - GQ
    shifted = -(G + np.concatenate([H, -Q], axis=1) @ np.concatenate([Q, GQ], axis=1).T)
    shifted[np.diag_indices_from(shifted)] += np.float32(mu)
    return positive_definite(shifted)
