"""The largest singular triplets of a matrix.

Legend: A (m, n) any real 2-D tensor; k = min(m, n); r the number of triplets asked for; q the width of a search space.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe.float64 import eigh, gram, mm, product, qr, small_svd

# Up to this short side the eigenvectors of the Gram matrix cost less than a block Krylov iteration.
EIGH_LIMIT: Final = 1024
# A triplet is settled when ‖A v − σ u‖ is at most this share of σ₁.
TRIPLET_BAR: Final = 1e-10


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
        basis = eigh(gram(A), q)[1]
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = qr(torch.randn(k, q, generator=generator, dtype=torch.float64).to(A.device))[0]
        GX = product(tall.T, product(tall, basis))
        for _ in range(rounds):
            G2X = product(tall.T, product(tall, GX))
            wide = qr(torch.cat([basis, GX, G2X], dim=1)[:, :k])[0]
            Q, R = qr(product(tall, wide))
            W, s, Zh = small_svd(R)
            basis = mm(wide, Zh[:q].T)
            back = product(tall.T, mm(Q, W[:, :q]))  # Aᵀu, from which both the residual and the next GX follow
            GX = back * s[:q]
            residual = torch.linalg.vector_norm(back - basis * s[:q], dim=0)
            if float(residual[:r].max()) <= TRIPLET_BAR * s[0] and float(residual[: r + 1].max()) <= 1e-4 * s[0]:
                break
    left, s, right = _two_sided(tall, basis)
    U, V = (left, right) if tall is A else (right, left)
    residual = torch.linalg.vector_norm(product(tall, right[:, :r]) - left[:, :r] * s[:r], dim=0)
    return signed(U[:, :r], s[:r], V[:, :r], residual, float(s[r]) if len(s) > r else 0.0)


def _two_sided(A: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of A restricted to the range of A·basis: QR of A·basis, then SVD of QᵀA by QR of its transpose."""
    Q = qr(product(A, basis))[0]
    P, R = qr(product(A.T, Q))
    W, s, Zh = small_svd(R.T)
    return mm(Q, W), s, mm(P, Zh.T)


def signed(U: Tensor, s: Tensor, V: Tensor, residual: Tensor, following: float) -> Triplets:
    """The triplets from U, s and V (n, r), each pair turned so that the largest entry of u is positive."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return Triplets(U * sign, s, (V * sign).T.contiguous(), residual, following)
