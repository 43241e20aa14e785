"""The weighted problem: which B·A of rank r minimises ‖Kᵀ(ΔW − BA)L‖_F, L Lᵀ = C + λ̄I and K Kᵀ = G + γ̄I.

Legend: ΔW (m, n); C (n, n) the second moments of the inputs, λ̄ = λ·tr C/n; G (m, m) those of the gradients at the
outputs, γ̄ = λ·tr G/m (K-FAC's curvature is C ⊗ G, Martens & Grosse 2015). One-sided: K = I. With M = KᵀΔWL and U_r its
leading left singular vectors the optimum is BA = K⁻ᵀU_r·U_rᵀKᵀΔW: KᵀBAL is the truncated SVD of M (Eckart–Young), and
K, L are invertible. λ → ∞ is the plain truncated SVD. Any other roots give the same; Cholesky's is the cheapest.
A table (rows, width) is looked up: K is of its inputs, L of its gradients (`moments`), and K a diagonal, kept as (m,).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_probe import svd
from lowrank_probe.errors import NumericsError
from lowrank_probe.moments import Moments

if TYPE_CHECKING:
    from lowrank_probe.extraction_jobs import Piece


def root(C: Tensor, ridge: float) -> Tensor:
    """L (n, n) lower, L·Lᵀ = C + ridge·(tr C/n)·I, float64; of a diagonal C, given as (n,), its diagonal (n,).

    Raises `NumericsError` where that is not positive.
    """
    n = C.shape[0]
    shifted = C.to(torch.float64, copy=True)
    if C.ndim == 1:
        return (shifted + ridge * shifted.mean()).sqrt()
    shifted.diagonal().add_(ridge * float(torch.diagonal(shifted).sum()) / n)
    L: Tensor
    L, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        raise NumericsError(f"second moments with a ridge of {ridge:g} are not positive definite: no inputs but 0?")
    return L


@dataclass(frozen=True)
class Roots:
    """L (n, n) and K (m, m), lower; K (m,) where it is diagonal; None where it is the identity."""

    L: Tensor | None = None
    K: Tensor | None = None

    def weighted(self, dense: Tensor) -> Tensor:
        """M = KᵀΔWL (m, n), float64."""
        return self.left(dense.double() if self.L is None else svd.product(dense, self.L))

    def left(self, B: Tensor) -> Tensor:
        """KᵀB (m, r) of B (m, r) float64."""
        if self.K is None:
            return B
        return self.K[:, None] * B if self.K.ndim == 1 else self.K.T @ B

    def right(self, A: Tensor) -> Tensor:
        """AL (r, n) of A (r, n) float64."""
        return A if self.L is None else A @ self.L

    def factors(self, dense: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
        """(B (m, r), A (r, n)), BA = K⁻ᵀU·UᵀKᵀΔW, for the leading left singular vectors U (m, r) of M."""
        if self.K is None:
            return U, svd.product(dense.T, U).T
        if self.K.ndim == 1:
            return U / self.K[:, None], svd.product(dense.T, self.K[:, None] * U).T
        return torch.linalg.solve_triangular(self.K.T, U, upper=True), svd.product(dense.T, self.K @ U).T


@dataclass(frozen=True)
class Weighting:
    """The roots for every piece of an extraction. ridge: λ > 0, finite; two_sided: G too.

    n_tokens: of the text; unseen_gradient: the mean of tr G/m over all pieces, for those that were not seen.
    """

    moments: Moments
    ridge: float
    two_sided: bool
    n_tokens: int
    unseen_gradient: float = 1.0

    @property
    def word(self) -> str:
        """Names what is computed with it, in the store."""
        return f"{self.moments.word}-{'two' if self.two_sided else 'one'}-{self.ridge:g}"

    def roots(self, piece: "Piece", device: torch.device) -> Roots | None:
        """Those of a piece; None where its inputs are not known: then the plain SVD is taken."""
        C = self.moments.inputs(piece, device)
        if C is None or not float((C if C.ndim == 1 else torch.diagonal(C)).sum()) > 0:
            return None
        G = self.moments.gradients(piece, device) if self.two_sided and self._flows(piece) else None
        inputs, gradients = root(C, self.ridge), None if G is None else root(G, self.ridge)
        return Roots(gradients, inputs) if piece.target.kind == "embedding" else Roots(inputs, gradients)

    def scale(self, piece: "Piece", roots: Roots | None) -> float:
        """What ‖KᵀΔWL‖_F² is multiplied by so that energies of different pieces compare under one budget.

        All are then N times the same estimate, what ΔW adds to the loss: Σ (gᵀΔWx)² ≈ tr(ΔW C ΔWᵀ G)/rows. So a piece
        that fewer rows pass than N, such as an expert, gets N/rows. tr G/m·I stands for a G that is not used or not
        kept. Where no inputs are known C is I a row, and a table's rows are each looked up once in m; an expert that no
        token of N met counts as met by one, as it is met by about 1/N of others.
        """
        table = piece.target.kind == "embedding"
        if roots is not None:
            gradients = roots.L if table else roots.K
            # One whose output the loss was not traced through (its inputs are no activations) has none.
            mean = (self.moments.mean_gradient(piece) or self.unseen_gradient) if gradients is None else 1.0
            return mean * self.n_tokens / self.moments.n_tokens(piece)
        rows = 1.0 if self.is_unmet(piece) else self.n_tokens / (piece.target.shape[0] if table else 1)
        return rows * self.unseen_gradient

    def is_unmet(self, piece: "Piece") -> bool:
        """Whether it is an expert to which no token of the text was routed."""
        return piece.target.copies > 1 and self.moments.has(piece) and self.moments.n_tokens(piece) == 0

    def _flows(self, piece: "Piece") -> bool:
        return self.moments.mean_gradient(piece) > 0
