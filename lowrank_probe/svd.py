"""The numerical kernels: singular values with an error that is stated. Torch only; knows no model and no file.

Legend: A (m, n) any real 2-D tensor, m out, n in; k = min(m, n); G = the (k, k) Gram matrix of A's short side, in
float64; λ its eigenvalues, σ = √λ; r the number of values asked for; q the width of a search space.

    full_spectrum      all k values: float64 Gram + eigvalsh ("Tier 2")
    exact_spectrum     all k values with an accurate tail: float64 SVD of the matrix itself
    top_spectrum       the r largest, bracketed from both sides, or None where that was not reached ("Tier 1")
    factored_spectrum  the r values of scaling·B·A by QR of both factors: never a dense matrix
    leading_singular_values   σ₁ … of a noise matrix by a few Lanczos steps
    truncate           the best rank-r approximation, with a bracket on the optimum
    top_triplets       the r largest singular triplets (U, s, Vh), with the residual of each; `factored_triplets` the
                       same of scaling·B·A
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe.definite import positive_definite

EPS64: Final = 2.0**-53
RELATIVE_BAR: Final = 1e-6
ENERGY_BAR: Final = 1e-6
# Entries upcast to float64 at a time; bounds the working memory next to the matrix itself.
CHUNK_ENTRIES: Final = 1 << 17
# The same for the Gram matrix, where every block costs one more pass over G.
GRAM_ENTRIES: Final = 1 << 19
# On a GPU, where every chunk is a launch and many are a wait.
DEVICE_ENTRIES: Final = 1 << 24
# Up to this short side the eigenvectors of the Gram matrix cost less than a block Krylov iteration.
EIGH_LIMIT: Final = 1024
# A triplet is settled when ‖A v − σ u‖ is at most this share of σ₁.
TRIPLET_BAR: Final = 1e-10


@dataclass(frozen=True)
class SingularValues:
    """Singular values and what is certain about them.

    values: (k,) float64, descending, on the host.
    method: how they were computed; `dtype`: the arithmetic of the last step.
    error: (k,) float64, a bound on |σ̂ᵢ − σᵢ| for each value.
    energy_error: a bound on the error of every Σ_{i≤r} σ² / ‖A‖_F².
    """

    values: NDArray[np.float64]
    method: str
    dtype: str
    error: NDArray[np.float64]
    energy_error: float

    @property
    def resolved(self) -> int:
        """How many leading values are certain to 1e-6 of themselves."""
        bad = np.flatnonzero(self.error > RELATIVE_BAR * self.values)
        return int(bad[0]) if bad.size else len(self.values)


def fro_norm(A: Tensor) -> float:
    """‖A‖_F = √Σ a², summed in float64 from the entries: the exact denominator of every energy."""
    total = torch.zeros((), dtype=torch.float64, device=A.device)
    for chunk in row_chunks(A):
        total += torch.linalg.vector_norm(chunk.double()) ** 2
    return math.sqrt(float(total))


def gram(A: Tensor) -> Tensor:
    """The float64 Gram matrix of the short side, (k, k): A·Aᵀ for m ≤ n, else Aᵀ·A. Upcast chunk by chunk."""
    if A.shape[0] <= A.shape[1]:
        A = A.T
    k = A.shape[1]
    G = torch.zeros(k, k, dtype=torch.float64, device=A.device)
    product = torch.empty_like(G) if G.is_cpu else G
    buffer = torch.empty(0, dtype=torch.float64, device=A.device)
    for chunk in row_chunks(A, GRAM_ENTRIES):
        # One buffer for all blocks: glibc's heap grows when megabytes are allocated and freed over and over.
        block = buffer.resize_(chunk.shape).copy_(chunk)
        if G.is_cpu:  # numpy sees the symmetry and does half the work (syrk)
            np.matmul(block.numpy().T, block.numpy(), out=product.numpy())
            G += product
        else:
            G.addmm_(block.T, block)
    return G


def _eigvalsh(G: Tensor) -> NDArray[np.float64]:
    """Eigenvalues of a symmetric float64 matrix, descending, on the host (on a CPU numpy's LAPACK is the faster)."""
    lam = np.linalg.eigvalsh(G.numpy()) if G.is_cpu else torch.linalg.eigvalsh(G).cpu().numpy()
    return np.asarray(lam[::-1], dtype=np.float64)


def _mm(A: Tensor, B: Tensor) -> Tensor:
    """A·B in float64. On a CPU by numpy, as all heavy steps: its BLAS is the faster one, and the threads of two kinds
    of BLAS in turn wait for each other spinning."""
    return torch.from_numpy(np.matmul(A.numpy(), B.numpy())) if A.is_cpu else A @ B


def _qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of a float64 matrix."""
    if not A.is_cpu:
        Q, R = torch.linalg.qr(A)
        return Q, R
    q, r = np.linalg.qr(A.numpy())
    return torch.from_numpy(q), torch.from_numpy(r)


def _eigh(G: Tensor, count: int) -> tuple[NDArray[np.float64], Tensor]:
    """The `count` largest eigenvalues of a symmetric float64 matrix, descending, and their vectors (k, count)."""
    if G.is_cpu:
        lam, vectors = np.linalg.eigh(G.numpy())
        return lam[::-1][:count].copy(), torch.from_numpy(vectors[:, ::-1][:, :count].copy())
    values, W = torch.linalg.eigh(G)
    return values.flip(0)[:count].cpu().numpy(), W.flip(1)[:, :count]


def full_spectrum(A: Tensor, norm: float | None = None) -> SingularValues:
    """All singular values, σ = √eigvalsh(G) with G the float64 Gram matrix of the short side.

    A: (m, n), finite; `norm`: ‖A‖_F where known. Exact to 1e-6 relative down to about 2e-5·σ₁; `error` says so for
    each value. Raises nothing for zero or rank-deficient input.

    Source: the error of λ is absolute. Rounding in G: √long·ε·λ₁ (Higham & Mary 2019, probabilistic form, factor 2),
    eigvalsh: √k·ε·λ₁ with the usual small constant (LAPACK Users' Guide §4.7, here 4); compared with float64 SVD by
    `benchmarks/accuracy.py`.
    """
    if A.numel() == 0:
        return _nothing("gram", "float64")
    lam = _eigvalsh(gram(A))
    return _from_eigenvalues(lam, A.shape, norm, "gram")


def exact_spectrum(A: Tensor) -> SingularValues:
    """All singular values by a float64 SVD of A itself, so that the tail is accurate to ~1e-14·σ₁ absolute.

    A: (m, n), finite. Slower than `full_spectrum` (about 3 × on a CPU).
    Source: LAPACK's backward-stable bidiagonal SVD: |σ̂ − σ| ≤ p(k)·ε·σ₁, here p = 4√(m + n).
    """
    if A.numel() == 0:
        return _nothing("svd", "float64")
    A64 = A.double()
    # cuSOLVER's Jacobi default is both slow and inaccurate; gesvd is backward stable.
    s = torch.linalg.svdvals(A64, driver="gesvd" if A64.is_cuda else None)
    values = s.cpu().numpy().astype(np.float64)
    bound = 4 * math.sqrt(sum(A.shape)) * EPS64 * float(values[0])
    sum_squares = float((values**2).sum())
    return SingularValues(
        values, "svd", "float64", np.full(len(values), bound), 8 * len(values) * EPS64 if sum_squares else 0.0
    )


def factored_spectrum(B: Tensor, A: Tensor, scaling: float) -> SingularValues:
    """The r singular values of scaling·B·A for B (m, r), A (r, n): R-factors of B and Aᵀ, then an r×r SVD, float64.

    Never forms the (m, n) product. Values beyond r are zero and are not listed.
    """
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().T, mode="r").R
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
    found = _certified(G, r, oversample=oversample, rounds=rounds, seed=seed) if trace else None
    if found is None:
        return None
    lam, upper, _ = found
    rounding = _eigenvalue_error(float(lam[0]), A.shape)
    values = np.sqrt(np.maximum(lam, 0.0))
    error = (upper - lam + rounding) / np.maximum(values, 1e-300)
    total = norm**2 if norm else trace
    slack = float((upper - lam).sum())
    return SingularValues(values, "krylov", "float64", error, (slack + r * rounding) / total)


def _certified(
    G: Tensor, r: int, *, oversample: int = 32, rounds: int = 24, seed: int = 0, tail_bar: float | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], Tensor] | None:
    """(lower bounds, upper bounds, Ritz vectors (k, r)) of the r largest eigenvalues of G (k, k), as `top_spectrum`
    explains; None where Σ over the r was not bracketed within 1e-6·tr G, and within tail_bar of what it leaves of tr G
    (or 1e-12·tr G). The bounds leave rounding in G out."""
    k = G.shape[0]
    trace = float(torch.diagonal(G).sum())
    q = min(k, r + oversample)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(k, q, generator=generator, dtype=torch.float64).to(G.device)
    basis = _qr(block)[0]
    for _ in range(rounds):
        # One Krylov step: span{X, GX, G²X}, then keep its q best Ritz vectors (a restarted block Lanczos).
        GX = _mm(G, basis)
        wide = _qr(torch.cat([basis, GX, _mm(G, GX)], dim=1)[:, : min(k, 3 * q)])[0]
        ritz, W = _eigh(_mm(wide.T, _mm(G, wide)), wide.shape[1])
        theta = torch.from_numpy(ritz).to(G.device)
        basis = _mm(wide, W[:, :q])
        residual = _mm(G, basis) - basis * theta[:q]
        column = torch.linalg.vector_norm(residual, dim=0)
        p = _cut(theta.cpu().numpy(), r, q)
        off = float(torch.linalg.matrix_norm(residual[:, :p]))
        # A Ritz value errs by about its residual squared over the gap: small enough first for 1e-6 of each σ, down to
        # 2e-5·σ₁; the certificate below is what is claimed.
        counted = theta[:r] > 4e-10 * theta[0]
        if bool((column[:r] > 3e-4 * theta[:r])[counted].any()):
            continue
        mu = float(theta[p]) * (1 + 1e-3) + 1e-12 * trace
        upper = _upper_bounds(theta[:r].cpu().numpy(), mu, off)
        slack = float((upper - theta[:r].cpu().numpy()).sum())
        bar = 0.5 * ENERGY_BAR * trace
        if tail_bar is not None:
            bar = min(bar, max(tail_bar * (trace - float(theta[:r].sum())), 1e-12 * trace))
        if not slack <= bar:
            continue
        if not _bounded_by(G, basis[:, :p], mu):
            continue  # something was missed: search on
        return theta[:r].cpu().numpy(), upper, basis[:, :r]
    return None


def _cut(theta: NDArray[np.float64], r: int, q: int) -> int:
    """Where to split captured from deflated: the widest gap among the Ritz values r … q−1."""
    candidates = theta[r - 1 : q]
    gaps = candidates[:-1] - candidates[1:]
    return r + int(np.argmax(gaps[: max(1, len(gaps) * 3 // 4)]))


def _upper_bounds(theta: NDArray[np.float64], mu: float, off: float) -> NDArray[np.float64]:
    gap = theta - mu
    if np.any(gap <= 0):
        # No gap: Weyl. Every eigenvalue moves by at most ‖R‖, and none of the rest exceeds μ.
        return np.asarray(np.maximum(theta, mu) + off)
    return np.asarray((theta + mu) / 2 + np.sqrt(gap**2 / 4 + off**2))


def _bounded_by(G: Tensor, V: Tensor, mu: float) -> bool:
    """Proof that no eigenvalue of (I − VVᵀ)G(I − VVᵀ) exceeds mu: a Cholesky factorisation that succeeds."""
    k = G.shape[0]
    GV = _mm(G, V)
    # (VᵀGV)·Vᵀ is taken into one of the two products of k × p by p × k. Only the lower half is read below.
    X, Y = torch.cat([_mm(V, _mm(V.T, GV)) - GV, -V], dim=1), torch.cat([V, GV], dim=1)
    shifted = (G + _mm(X, Y.T)).neg_() if G.is_cpu else torch.addmm(G, X, Y.T, beta=-1, alpha=-1)
    # Backward error of the float64 factorisation and of forming it (Demmel 1989: ≈ k·ε·‖·‖).
    margin = 8 * k * EPS64 * (float(torch.diagonal(G).max()) + mu)
    shifted.diagonal().add_(mu - margin)
    if not shifted.is_cpu:
        return int(torch.linalg.cholesky_ex(shifted)[1]) == 0
    return positive_definite(shifted.numpy())


def leading_singular_values(E: Tensor, generator: torch.Generator, steps: int = 10) -> NDArray[np.float64]:
    """Ritz values of `steps` rounds of Golub–Kahan–Lanczos with full reorthogonalisation: σ₁(E) … from below.

    For a noise matrix E (m, n), whose edge is all that is asked for: 10 steps come within 2 % of σ₁ there.
    """
    steps = min(steps, *E.shape)
    v = torch.randn(E.shape[1], generator=generator, device=E.device, dtype=E.dtype)
    V = torch.zeros(steps, E.shape[1], device=E.device, dtype=E.dtype)
    U = torch.zeros(steps, E.shape[0], device=E.device, dtype=E.dtype)
    for j in range(steps):
        for _ in range(2):  # once is not enough in float32
            v = v - V[:j].T @ (V[:j] @ v)
        length = torch.linalg.vector_norm(v)
        if not float(length) > 0:
            break
        V[j] = v / length
        U[j] = E @ V[j]
        v = E.T @ U[j]
    lam = torch.linalg.eigvalsh((U @ U.T).double()).cpu().numpy()
    return np.asarray(np.sqrt(np.maximum(lam[::-1], 0.0)), dtype=np.float64)


@dataclass(frozen=True)
class Triplets:
    """The r largest singular triplets: A·Vhᵀ ≈ U·diag(s), A (m, n).

    U (m, r), s (r,) descending, Vh (r, n): float64 on A's device, with orthonormal columns (rows for Vh), whatever the
    rank of A. Of each uᵢ the entry of largest magnitude is positive.
    residual: (r,) the larger of ‖A vᵢ − σᵢ uᵢ‖ and ‖Aᵀuᵢ − σᵢ vᵢ‖, one of which is 0 by construction.
    following: σ_{r+1}, from below; 0 at r = k.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    residual: Tensor
    following: float

    @property
    def gaps(self) -> NDArray[np.float64]:
        """(r,) σᵢ − σᵢ₊₁: the first i directions turn by at most residual/gap (Wedin 1972), so 0 leaves them open."""
        s = np.append(self.s.cpu().numpy(), self.following)
        return np.asarray(s[:-1] - s[1:], dtype=np.float64)


def top_triplets(A: Tensor, r: int, *, oversample: int = 16, rounds: int = 40, seed: int = 0) -> Triplets:
    """The r largest singular triplets of A (m, n), in float64: eigenvectors of the Gram matrix, or block Krylov.

    min(m, n) ≤ 1024: `eigh` of the float64 Gram matrix of the short side. Larger: a block Krylov iteration restarted
    from its q = r + oversample best Ritz vectors, span{X, GX, G²X} a round, until ‖Aᵀu − σv‖ ≤ 1e-10·σ₁ for each of the
    r (1e-4·σ₁ for the next one), or `rounds` are spent (a flat spectrum): `residual` says what was reached. Either way
    the last step is a two-sided Rayleigh–Ritz on A itself, so that small σ keep the digits that squaring costs.
    A residual cannot notice a triplet that was missed: compare s with certified values (`full_spectrum`) for that.

    r is cut to min(m, n). Works on CPU and CUDA tensors; deterministic for a given seed. Memory: the Gram matrix
    (k ≤ 1024), or a few (m + n, 3q) blocks.
    Source: Halko, Martinsson & Tropp 2011, alg. 5.1; Musco & Musco 2015 (block Krylov).
    """
    r = min(r, *A.shape)
    tall = A if A.shape[0] > A.shape[1] else A.T  # as `gram` chooses
    k = tall.shape[1]
    q = min(k, r + oversample)
    if k <= EIGH_LIMIT:
        basis = _eigh(gram(A), q)[1]
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = _qr(torch.randn(k, q, generator=generator, dtype=torch.float64).to(A.device))[0]
        GX = product(tall.T, product(tall, basis))
        for _ in range(rounds):
            G2X = product(tall.T, product(tall, GX))
            wide = _qr(torch.cat([basis, GX, G2X], dim=1)[:, :k])[0]
            Q, R = _qr(product(tall, wide))
            W, s, Zh = _small_svd(R)
            basis = _mm(wide, Zh[:q].T)
            back = product(tall.T, _mm(Q, W[:, :q]))  # Aᵀu, from which both the residual and the next GX follow
            GX = back * s[:q]
            residual = torch.linalg.vector_norm(back - basis * s[:q], dim=0)
            if float(residual[:r].max()) <= TRIPLET_BAR * s[0] and float(residual[: r + 1].max()) <= 1e-4 * s[0]:
                break
    left, s, right = _two_sided(tall, basis)
    U, V = (left, right) if tall is A else (right, left)
    residual = torch.linalg.vector_norm(product(tall, right[:, :r]) - left[:, :r] * s[:r], dim=0)
    return _signed(U[:, :r], s[:r], V[:, :r], residual, float(s[r]) if len(s) > r else 0.0)


def factored_triplets(B: Tensor, A: Tensor, scaling: float, r: int) -> Triplets:
    """The r largest triplets of scaling·B·A for B (m, R), A (R, n): QR of both factors, then an R×R SVD, float64.

    Never forms the (m, n) product; r is cut to R.
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    core = scaling * (R_B @ R_A.T)
    W, s, Zh = _small_svd(core)
    r = min(r, len(s))
    residual = torch.linalg.vector_norm(core @ Zh[:r].T - W[:, :r] * s[:r], dim=0)
    return _signed(Q_B @ W[:, :r], s[:r], Q_A @ Zh[:r].T, residual, float(s[r]) if len(s) > r else 0.0)


def product(A: Tensor, X: Tensor) -> Tensor:
    """A·X in float64, (m, p), for A (m, n) in any dtype, X (n, p) float64; A is upcast chunk by chunk."""
    if A.T.is_contiguous() and not A.is_contiguous():  # by the rows that lie together in memory
        total = torch.zeros(A.shape[0], X.shape[1], dtype=torch.float64, device=A.device)
        at = 0
        for chunk in row_chunks(A.T, GRAM_ENTRIES):
            total += _mm(chunk.double().T, X[at : at + len(chunk)])
            at += len(chunk)
        return total
    return torch.cat([_mm(chunk.double(), X) for chunk in row_chunks(A, GRAM_ENTRIES)])


def _two_sided(A: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of A restricted to the range of A·basis: QR of A·basis, then SVD of QᵀA by QR of its transpose."""
    Q = _qr(product(A, basis))[0]
    P, R = _qr(product(A.T, Q))
    W, s, Zh = _small_svd(R.T)
    return _mm(Q, W), s, _mm(P, Zh.T)


def _small_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, Vh) of a matrix of a few hundred rows, on the host: cuSOLVER's Jacobi default is inaccurate."""
    U, s, Vh = np.linalg.svd(A.cpu().numpy(), full_matrices=False)
    return torch.from_numpy(U).to(A.device), torch.from_numpy(s).to(A.device), torch.from_numpy(Vh).to(A.device)


def _signed(U: Tensor, s: Tensor, V: Tensor, residual: Tensor, following: float) -> Triplets:
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return Triplets(U * sign, s, (V * sign).T.contiguous(), residual, following)


def row_chunks(A: Tensor, entries: int | None = None) -> Iterator[Tensor]:
    """Views of A by rows: about `entries` (`CHUNK_ENTRIES`) entries on a CPU, `DEVICE_ENTRIES` elsewhere."""
    rows = max(1, ((entries or CHUNK_ENTRIES) if A.is_cpu else DEVICE_ENTRIES) // max(1, A.shape[1]))
    for start in range(0, A.shape[0], rows):
        yield A[start : start + rows]


def _eigenvalue_error(largest: float, shape: tuple[int, ...]) -> float:
    """Bound on |λ̂ − λ| of a float64 Gram matrix of this shape (see `full_spectrum`)."""
    return (2 * math.sqrt(max(shape)) + 4 * math.sqrt(min(shape))) * EPS64 * largest


def _from_eigenvalues(
    lam: NDArray[np.float64], shape: tuple[int, ...], norm: float | None, method: str
) -> SingularValues:
    lam = np.maximum(lam.astype(np.float64), 0.0)
    rounding = _eigenvalue_error(float(lam[0]), shape)
    values = np.sqrt(lam)
    # |σ̂ − σ| = |λ̂ − λ|/(σ̂ + σ), and never more than √|λ̂ − λ|.
    error = np.minimum(np.sqrt(rounding), rounding / np.maximum(values, 1e-300))
    total = norm**2 if norm else float(lam.sum())
    return SingularValues(values, method, "float64", error, len(lam) * rounding / total if total else 0.0)


def _nothing(method: str, dtype: str) -> SingularValues:
    return SingularValues(np.zeros(0), method, dtype, np.zeros(0), 0.0)
