"""Singular values (1-D float64, descending) to numbers. Pure numpy: knows no model, no tensor, no file.

Legend: m out, n in, k = min(m, n), s the singular values of ΔW, `fro_norm` = ‖ΔW‖_F computed from the entries.
A list s may be truncated (len(s) < k). Energy fractions stay exact then, because the denominator comes from the
entries; metrics that need the tail return NaN, and are never computed from a truncated list.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

ENERGY_LEVELS = (0.5, 0.9, 0.95, 0.99)
ENERGY_RANKS = (4, 8, 16, 32, 64)
# A direction is signal above this many times the noise edge. The dead-zone model's errors are fitted, not known: on 235
# planted rank-8 updates the largest σ of its pure noise was 1.07 × the edge, under plain rounding 1.04 ×.
SIGNAL_FACTOR = {"rounding": 1.05, "dead-zone": 1.1}


def energy(s: Values, fro_norm: float, r: int) -> float:
    """Energy kept by rank r: Σ_{i≤r} σ² / ‖ΔW‖_F² (in [0, 1]; NaN if ΔW = 0 or r > len(s) of a truncated list).

    Source: Eckart & Young 1936; used for ΔW by Biderman et al. 2024 (arXiv 2405.09673).
    """
    if fro_norm == 0.0 or (r > len(s) and not _is_whole(s, fro_norm)):
        return math.nan
    return min(1.0, float(np.sum(s[:r] ** 2)) / fro_norm**2)


def energy_rank(s: Values, fro_norm: float, p: float) -> float:
    """Smallest r with energy(r) ≥ p (an integer as float; NaN where a truncated list does not reach p, or ΔW = 0).

    Source: as `energy`.
    """
    if fro_norm == 0.0:
        return math.nan
    cumulative = np.cumsum(s**2)
    target = p * fro_norm**2
    # Rounding may leave the whole sum a few ulp short of p·‖ΔW‖²; that is "reached".
    reached = np.flatnonzero(cumulative >= target * (1 - 1e-13))
    return float(reached[0] + 1) if reached.size else math.nan


def stable_rank(s: Values, fro_norm: float) -> float:
    """‖ΔW‖_F² / σ₁², in [1, k]; NaN for ΔW = 0. Source: Rudelson & Vershynin 2007."""
    return fro_norm**2 / float(s[0]) ** 2 if len(s) and s[0] > 0 else math.nan


def effective_rank(s: Values) -> float:
    """exp H(σ/Σσ), the entropy rank of the singular values; needs the whole list. Source: Roy & Vetterli 2007."""
    return _entropy_rank(s)


def energy_effective_rank(s: Values) -> float:
    """exp H(σ²/Σσ²), the entropy rank of the energies; needs the whole list. Source: Roy & Vetterli 2007, on σ²."""
    return _entropy_rank(s**2)


def participation_ratio(s: Values) -> float:
    """(Σσ²)² / Σσ⁴, in [1, k]; needs the whole list; NaN for ΔW = 0."""
    if not len(s) or s[0] == 0:
        return math.nan
    x = (s / s[0]) ** 2
    return float(x.sum() ** 2 / (x**2).sum())


def numerical_rank(s: Values, shape: tuple[int, int]) -> float:
    """#{σ > σ₁·max(m, n)·ε(float32)}; needs the whole list, or a truncated one that passes the threshold.

    Source: the LAPACK/numpy convention, at the precision of float32.
    """
    if not len(s) or s[0] == 0:
        return 0.0
    return float(np.count_nonzero(s > s[0] * max(shape) * np.finfo(np.float32).eps))


def hard_threshold_rank(s: Values, shape: tuple[int, int]) -> float:
    """#{σ > ω(β)·median σ}, ω(β) ≈ 0.56β³ − 0.95β² + 1.82β + 1.43, β = min/max; needs the whole list.

    The optimal hard threshold for low rank plus white noise of unknown level. Source: Gavish & Donoho 2014.
    """
    if not len(s) or s[0] == 0:
        return 0.0
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return float(np.count_nonzero(s > omega * np.median(s)))


def nuclear_norm(s: Values) -> float:
    """Σσ; needs the whole list."""
    return float(s.sum())


def break_even_rank(shape: tuple[int, int]) -> float:
    """mn/(m + n): at this rank the factors B (m, r) and A (r, n) are as large as ΔW itself."""
    m, n = shape
    return m * n / (m + n)


@lru_cache(maxsize=4096)
def null_energy_rank(shape: tuple[int, int], p: float) -> float:
    """r_p of an i.i.d. Gaussian matrix of this shape: "no more low-rank than noise" (≥ 1).

    From the Marchenko–Pastur density of λ = σ²/(max σ_q²): the share q of the largest eigenvalues that carry the
    fraction p of Σλ, times k. A yardstick, not a noise model. Source: Marchenko & Pastur 1967.
    """
    beta = min(shape) / max(shape)
    top_share, top_energy = marchenko_pastur(beta)
    return max(1.0, float(np.ceil(np.interp(p, top_energy, top_share) * min(shape) - 1e-9)))


@lru_cache(maxsize=256)
def marchenko_pastur(beta: float) -> tuple[Values, Values]:
    """(share of the largest eigenvalues, share of the energy they carry), both rising from 0 to 1, of an i.i.d. matrix.

    beta: min/max of its shape. Source: Marchenko & Pastur 1967.
    """
    # λ = 1 + β − 2√β·cos t, t from π (upper edge) to 0: the substitution removes both square-root edges.
    t = np.linspace(math.pi, 0.0, 20001)
    lam = 1 + beta - 2 * math.sqrt(beta) * np.cos(t)
    weight = np.sin(t) ** 2
    density = np.divide(weight, lam, out=np.full_like(t, 1.0 if beta == 1 else 0.0), where=lam > 1e-14)
    step = math.pi / 20000

    def cumulative(y: Values) -> Values:
        total = np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * step)])
        return np.asarray(total / total[-1], dtype=np.float64)

    return cumulative(density), cumulative(weight)


def denoise(s: Values, noise_std: float, shape: tuple[int, int]) -> Values:
    """Isolated singular values of ΔW from those of ΔW + N, N white of standard deviation `noise_std`; 0 below the edge.

    With y = σ/(noise_std·√max) and β = min/max, the inverse of y² = (x² + 1)(x² + β)/x² above y = 1 + √β. (Not the
    Frobenius shrinkage of Gavish & Donoho 2017, which is smaller by the cosines of the rotated singular vectors: that
    is what a reconstruction needs, this is where the clean value lies.)
    Source: Benaych-Georges & Nadakuditi 2012, §3.1; Shabalin & Nobel 2013.
    """
    if noise_std == 0.0:
        return s.copy()
    scale = noise_std * math.sqrt(max(shape))
    beta = min(shape) / max(shape)
    y = s / scale
    t = y**2 - beta - 1
    above = y > 1 + math.sqrt(beta)
    x2 = (t + np.sqrt(np.maximum(t**2 - 4 * beta, 0.0))) / 2
    return np.asarray(np.where(above, scale * np.sqrt(np.maximum(x2, 0.0)), 0.0))


def energy_rank_bracket(
    clean: Values, fro_norm: float, p: float, *, slack: float, noise_energy: float = 0.0
) -> tuple[float, float]:
    """Lower and upper end of the true r_p, from the denoised singular values (k,) and the clean ‖ΔW‖_F.

    The true energy curve is taken to lie between C(r) + slack and C(r) − slack − noise_energy, C(r) = Σ_{i≤r} σ²/‖ΔW‖²;
    `noise_energy`: what uneven noise may add to C beyond what `clean` was cleared of. (NaN, NaN) for ΔW = 0.
    """
    if fro_norm <= 0.0:
        return math.nan, math.nan
    curve = np.cumsum(clean**2) / fro_norm**2
    low = int(np.searchsorted(curve + slack, p)) + 1
    high = int(np.searchsorted(curve - slack - noise_energy, p)) + 1
    return float(min(low, len(clean))), float(min(high, len(clean)))


def _entropy_rank(weights: Values) -> float:
    total = float(weights.sum())
    if total == 0.0:
        return math.nan
    q = weights / total
    q = q[q > 0]
    return float(np.exp(-np.sum(q * np.log(q))))


def _is_whole(s: Values, fro_norm: float) -> bool:
    """Whether the list carries all of ‖ΔW‖_F² already, so that more values could add nothing."""
    return bool(np.sum(s**2) >= fro_norm**2 * (1 - 1e-12))
