"""The numerical kernels: singular values with an error that is stated. Torch only; knows no model and no file.

Legend: A (m, n) any real 2-D tensor, m out, n in; k = min(m, n); G = the (k, k) Gram matrix of A's short side, in
float64; λ its eigenvalues, σ = √λ; r the number of values asked for; q the width of a search space.

    full_spectrum      all k values: float64 Gram + eigvalsh ("Tier 2")
    exact_spectrum     all k values with an accurate tail: float64 SVD of the matrix itself
    top_spectrum       the r largest, bracketed from both sides, or None where that was not reached ("Tier 1")
    factored_spectrum  the r values of scaling·B·A by QR of both factors: never a dense matrix
    leading_singular_values   σ₁ … of a noise matrix by a few Lanczos steps; `leading_triplet` with u and v of σ₁
    truncate           the best rank-r approximation, with a bracket on the optimum
    top_triplets       the r largest singular triplets (U, s, Vh), with the residual of each; `factored_triplets` the
                       same of scaling·B·A

Each algorithm has a file of its own (`full_spectra`, `krylov`, `truncation`, `triplets`, `factored`, on the steps of
`float64`).
"""

from lowrank_probe.factored import factored_spectrum, factored_triplets
from lowrank_probe.float64 import fro_norm, gram, product
from lowrank_probe.full_spectra import RELATIVE_BAR, SingularValues, exact_spectrum, full_spectrum
from lowrank_probe.krylov import leading_singular_values, leading_triplet, top_spectrum
from lowrank_probe.triplets import Triplets, top_triplets
from lowrank_probe.truncation import Truncation, truncate

__all__ = [
    "RELATIVE_BAR", "SingularValues", "Triplets", "Truncation", "exact_spectrum", "factored_spectrum",
    "factored_triplets", "fro_norm", "full_spectrum", "gram", "leading_singular_values", "leading_triplet", "product",
    "top_spectrum", "top_triplets", "truncate",
]  # fmt: skip
