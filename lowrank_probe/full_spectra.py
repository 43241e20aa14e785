"""All singular values of a matrix, with the error of each: by its Gram matrix, or by an SVD of the matrix itself.

Legend: A (m, n) any real 2-D tensor; k = min(m, n); G = the (k, k) Gram matrix of A's short side, in float64; λ its
eigenvalues, σ = √λ.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe.float64 import EPS64, eigvalsh, gram

RELATIVE_BAR: Final = 1e-6


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
    lam = eigvalsh(gram(A, half=True))
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


def eigenvalue_error(largest: float, shape: tuple[int, ...]) -> float:
    """Bound on |λ̂ − λ| of a float64 Gram matrix of this shape (see `full_spectrum`)."""
    return (2 * math.sqrt(max(shape)) + 4 * math.sqrt(min(shape))) * EPS64 * largest


def _from_eigenvalues(
    lam: NDArray[np.float64], shape: tuple[int, ...], norm: float | None, method: str
) -> SingularValues:
    lam = np.maximum(lam.astype(np.float64), 0.0)
    rounding = eigenvalue_error(float(lam[0]), shape)
    values = np.sqrt(lam)
    # |σ̂ − σ| = |λ̂ − λ|/(σ̂ + σ), and never more than √|λ̂ − λ|.
    with np.errstate(over="ignore"):
        error = np.minimum(np.sqrt(rounding), rounding / np.maximum(values, 1e-300))
    total = norm**2 if norm else float(lam.sum())
    return SingularValues(values, method, "float64", error, len(lam) * rounding / total if total else 0.0)


def _nothing(method: str, dtype: str) -> SingularValues:
    return SingularValues(np.zeros(0), method, dtype, np.zeros(0), 0.0)
