"""The largest singular values by Krylov methods: certified from both sides, or the first ones of a noise matrix.

Legend: A (m, n) any real 2-D tensor; k = min(m, n); G = the (k, k) Gram matrix of A's short side, in float64; r the
number of values asked for; q the width of a search space.
"""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe.definite import positive_definite
from lowrank_probe.float64 import EPS64, eigh, gram, mm, qr
from lowrank_probe.full_spectra import SingularValues, eigenvalue_error

ENERGY_BAR: Final = 1e-6
# Where the square of what is left of a vector, all directions found before taken out, is less than this of its own,
# that is rounding: it must not become a direction.
DUST: Final = 1e-9
# Added to squares in float32, so that 0 is not divided by 0.
TINY: Final = 1e-37


def top_spectrum(
    A: Tensor, r: int, norm: float | None = None, *, oversample: int = 32, rounds: int = 24, seed: int = 0
) -> SingularValues | None:
    """The r largest singular values, certified; None where the certificate was not reached (take `full_spectrum`).

    Block Krylov on the float64 Gram matrix G (k, k), q = r + oversample columns a block, Rayleigh–Ritz after every
    round. With V the p ≥ r leading Ritz vectors, Θ their Ritz values, R = GV − VΘ and μ a proven bound on the
    largest eigenvalue of (I − VVᵀ)G(I − VVᵀ):

        θᵢ ≤ λᵢ ≤ (θᵢ + μ)/2 + √((θᵢ − μ)²/4 + ‖R‖²)       for each i ≤ r with θᵢ ≥ μ

    (Mathias 1998; Li & Li 2005). μ is proven by a Cholesky factorisation of μI − (I − VVᵀ)G(I − VVᵀ) in float64 with
    a rounding margin: it fails if a value was missed, which no residual can notice. Done when Σ_{i≤r} λᵢ is bracketed
    within 1e-6·‖A‖_F². The values returned are the lower bounds θ, `error` the distance to the upper ones.

    A: (m, n), finite, 1 ≤ r. Deterministic for a given seed.
    """
    k = min(A.shape)
    if r >= k // 3 or k < 64:
        return None
    G = gram(A)
    trace = float(torch.diagonal(G).sum())
    found = certified(G, r, oversample=oversample, rounds=rounds, seed=seed) if trace else None
    if found is None:
        return None
    lam, upper, _ = found
    rounding = eigenvalue_error(float(lam[0]), A.shape)
    values = np.sqrt(np.maximum(lam, 0.0))
    error = (upper - lam + rounding) / np.maximum(values, 1e-300)
    total = norm**2 if norm else trace
    slack = float((upper - lam).sum())
    return SingularValues(values, "krylov", "float64", error, (slack + r * rounding) / total)


def certified(
    G: Tensor, r: int, *, oversample: int = 32, rounds: int = 24, seed: int = 0, tail_bar: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], Tensor] | None:
    """(lower bounds, upper bounds, Ritz vectors (k, r)) of the r largest eigenvalues of G (k, k), as `top_spectrum`
    explains; None where Σ over the r was not bracketed within 1e-6·tr G, and within tail_bar of what it leaves of tr G
    (or 1e-12·tr G, or what float64 proves at best: 32·k·r·ε·max diag G). The bounds leave rounding in G out."""
    k = G.shape[0]
    trace = float(torch.diagonal(G).sum())
    q = min(k, r + oversample)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(k, q, generator=generator, dtype=torch.float64).to(G.device)
    basis = qr(block)[0]
    largest = float(torch.diagonal(G).max())
    for _ in range(rounds):
        # One Krylov step: span{X, GX, G²X}, then keep its q best Ritz vectors (a restarted block Lanczos).
        GX = mm(G, basis)
        wide = qr(torch.cat([basis, GX, mm(G, GX)], dim=1)[:, : min(k, 3 * q)])[0]
        ritz, W = eigh(mm(wide.T, mm(G, wide)), wide.shape[1])
        theta = torch.from_numpy(ritz).to(G.device)
        basis = mm(wide, W[:, :q])
        residual = mm(G, basis) - basis * theta[:q]
        column = torch.linalg.vector_norm(residual, dim=0)
        p = cut(theta.cpu().numpy(), r, q)
        off = float(torch.linalg.matrix_norm(residual[:, :p]))
        # A Ritz value errs by about its residual squared over the gap: small enough first for 1e-6 of each σ, down to
        # 2e-5·σ₁; the certificate below is what is claimed.
        counted = theta[:r] > 4e-10 * theta[0]
        if bool((column[:r] > 3e-4 * theta[:r])[counted].any()):
            continue
        mu = float(theta[p]) * (1 + 1e-3)
        margin = _margin(k, largest, mu)
        mu += 2 * margin
        upper = upper_bounds(theta[:r].cpu().numpy(), mu, off)
        slack = float((upper - theta[:r].cpu().numpy()).sum())
        bar = 0.5 * ENERGY_BAR * trace
        if tail_bar is not None:
            bar = min(bar, max(tail_bar * (trace - float(theta[:r].sum())), 1e-12 * trace, 4 * r * margin))
        if not slack <= bar:
            continue
        if not _bounded_by(G, basis[:, :p], mu):
            continue  # something was missed: search on
        return theta[:r].cpu().numpy(), upper, basis[:, :r]
    return None


def cut(theta: NDArray[np.float64], r: int, q: int) -> int:
    """Where to split captured from deflated: the widest gap among the Ritz values r … q−1."""
    candidates = theta[r - 1 : q]
    gaps = candidates[:-1] - candidates[1:]
    return r + int(np.argmax(gaps[: max(1, len(gaps) * 3 // 4)]))


def upper_bounds(theta: NDArray[np.float64], mu: float, off: float) -> NDArray[np.float64]:
    """Upper bounds of the eigenvalues whose Ritz values are theta, as `top_spectrum` explains; off is ‖R‖_F."""
    gap = theta - mu
    if np.any(gap <= 0):
        # No gap: Weyl. Every eigenvalue moves by at most ‖R‖, and none of the rest exceeds μ.
        return np.asarray(np.maximum(theta, mu) + off)
    return np.asarray((theta + mu) / 2 + np.sqrt(gap**2 / 4 + off**2))


def _bounded_by(G: Tensor, V: Tensor, mu: float) -> bool:
    """Proof that no eigenvalue of (I − VVᵀ)G(I − VVᵀ) exceeds mu: a Cholesky factorisation that succeeds."""
    k = G.shape[0]
    GV = mm(G, V)
    X, Y = torch.cat([mm(V, mm(V.T, GV)) - GV, -V], dim=1), torch.cat([V, GV], dim=1)
    shifted = (G + mm(X, Y.T)).neg_() if G.is_cpu else torch.addmm(G, X, Y.T, beta=-1, alpha=-1)
    shifted.diagonal().add_(mu - _margin(k, float(torch.diagonal(G).max()), mu))
    if not shifted.is_cpu:
        failed = torch.empty((), dtype=torch.int32, device=shifted.device)
        torch.linalg.cholesky_ex(shifted, out=(shifted, failed))  # in place
        return int(failed) == 0
    return positive_definite(shifted.numpy())


def _margin(k: int, largest: float, mu: float) -> float:
    """Backward error of the float64 factorisation and of forming it (Demmel 1989: ≈ k·ε·‖·‖); largest: of diag G."""
    return 8 * k * EPS64 * (largest + mu)


def leading_singular_values(E: Tensor, generator: torch.Generator, steps: int = 10) -> NDArray[np.float64]:
    """The values of `leading_triplet`."""
    return leading_triplet(E, generator, steps)[0]


def leading_triplet(
    E: Tensor, generator: torch.Generator, steps: int = 10
) -> tuple[NDArray[np.float64], Tensor, Tensor]:
    """Ritz values of `steps` rounds of Golub–Kahan–Lanczos with full reorthogonalisation, σ₁(E) … from below; and the
    Ritz vectors u (m,), v (n,) of the first, float32, of length 1 (zeros for E = 0).

    For a noise matrix E (m, n) in float32 with σ₁ well above 1e-9 (or 0), whose edge is all that is asked for: 10 steps
    come within 2 % of σ₁ there.
    """
    steps = min(steps, E.shape[0] + 1, E.shape[1])  # one more for what the first v has outside of the rows
    A: Any = E
    v: Any = torch.randn(E.shape[1], generator=generator, device=E.device, dtype=E.dtype)
    V: Any = torch.zeros(steps, E.shape[1], device=E.device, dtype=E.dtype)
    U: Any = torch.zeros(steps, E.shape[0], device=E.device, dtype=E.dtype)
    if E.is_cpu:  # numpy's calls cost a fifth of torch's, which is what small matrices take
        A, v, V, U = A.numpy(), v.numpy(), V.numpy(), U.numpy()
    library: Any = np if E.is_cpu else torch
    for j in range(steps):
        least = DUST * (v @ v) + TINY
        for _ in range(2 if j else 0):  # once is not enough in float32
            v = v - V[:j].T @ (V[:j] @ v)
        length = (v @ v + least) ** 0.5  # more than 0 where nothing is left; to ask whether it is, a GPU would wait
        library.divide(v, length, out=V[j])
        library.matmul(A, V[j], out=U[j])
        v = A.T @ U[j]
    U, V = torch.as_tensor(U), torch.as_tensor(V)
    lam, Y = np.linalg.eigh((U @ U.T).double().cpu().numpy())
    values = np.sqrt(np.maximum(lam[::-1], 0.0))
    y = torch.from_numpy(Y[:, -1].astype(np.float32)).to(E.device)
    u = (y @ U) / values[0] if values[0] > 0 else torch.zeros_like(U[0])
    return np.asarray(values, dtype=np.float64), u, y @ V
