"""Singular subspaces of updates: similarity φ(i, j), its chance and its ceiling under storage noise, amplification.

Legend: m out, n in; U (m, r), V (n, r) the leading singular directions of one ΔW; i, j, r numbers of directions.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import metrics, svd
from lowrank_probe.deltas import Delta
from lowrank_probe.metrics import Values

# Sines of the angle by which rounding may turn the first i directions, and the distance from the certified σ, for them
# to be settled.
SETTLED: Final = 1e-6


@dataclass(frozen=True)
class Directions:
    """The leading directions of one step's ΔW, and how far they can be trusted.

    U (m, r), V (n, r), s (r,), gap (r,) σᵢ/σᵢ₊₁. trusted (r,): whether the first i directions are. overlap_left,
    overlap_right (r,): cos² between a direction as stored and the true one, NaN where no model says it.
    random_left (m, r), random_right (n, r): the control. projected_own, projected_random (r,): ‖PᵀWQ‖_F of the first r.
    """

    U: Tensor
    V: Tensor
    s: Values
    gap: Values
    trusted: NDArray[np.bool_]
    overlap_left: Values
    overlap_right: Values
    random_left: Tensor
    random_right: Tensor
    projected_own: Values
    projected_random: Values
    fro_norm: float

    @property
    def r(self) -> int:
        return len(self.s)


def dimensions(rank: int) -> tuple[int, ...]:
    """1, 2, 4, … up to `rank`, and `rank` itself.

    >>> dimensions(12)
    (1, 2, 4, 8, 12)
    """
    powers = [2**e for e in range(rank.bit_length())]
    return tuple(dict.fromkeys([*powers, rank]))


def similarity(A: Tensor, B: Tensor) -> Values:
    """φ(i, j) = ‖A[:, :i]ᵀ B[:, :j]‖_F² / min(i, j) for all i ≤ r_A, j ≤ r_B: (r_A, r_B), entry [i − 1, j − 1].

    A (m, r_A), B (m, r_B): orthonormal columns. 1: the smaller subspace lies in the larger; 0: they are orthogonal.
    Source: Hu et al. 2021, eq. 4.
    """
    squares = ((A.T @ B) ** 2).cpu().numpy()
    sums = squares.cumsum(axis=0).cumsum(axis=1)
    i, j = np.indices(sums.shape) + 1
    return np.asarray(sums / np.minimum(i, j), dtype=np.float64)


def random_similarity(i: int, j: int, m: int) -> float:
    """E φ(i, j) = max(i, j)/m for independent, uniformly random subspaces of an m-dimensional space.

    For fixed a_l and uniform b on the sphere E (a_lᵀb)² = 1/m, because the m squared coordinates of b sum to 1 and are
    alike. ‖AᵀB‖_F² is the sum of i·j such terms, so that E φ = i·j/(m·min(i, j)) = max(i, j)/m.
    """
    return max(i, j) / m


def random_directions(rows: int, r: int, key: str) -> Tensor:
    """(rows, r) orthonormal columns of a uniformly random subspace, float64; the same for the same key."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    basis: Tensor = torch.linalg.qr(torch.randn(rows, r, generator=generator, dtype=torch.float64)).Q
    return basis


def true_overlap(s: Values, noise_edge: float, shape: tuple[int, int]) -> tuple[Values, Values]:
    """cos² between each singular direction of signal + noise and the signal's own, (left, right); 0 below the edge.

    With y = σ·(1 + √β)/edge, β = short/long side, θ² = (y² − 1 − β + √((y² − 1 − β)² − 4β))/2:
    short side 1 − β(1 + θ²)/(θ²(θ² + β)), long side 1 − (β + θ²)/(θ²(θ² + 1)).

    noise_edge: σ₁ of the noise alone; with the simulated edge of uneven noise it is a low estimate.
    Source: Benaych-Georges & Nadakuditi 2012, §3.1.
    """
    short, long = sorted(shape)
    beta = short / long
    if not noise_edge > 0:
        return np.ones(len(s)), np.ones(len(s))
    a = (s * (1 + math.sqrt(beta)) / noise_edge) ** 2 - 1 - beta
    theta = (a + np.sqrt(np.maximum(a**2 - 4 * beta, 0.0))) / 2
    above = (a > 2 * math.sqrt(beta)) & (theta > 0)
    theta = np.where(above, theta, 1.0)
    of_short = np.where(above, 1 - beta * (1 + theta) / (theta * (theta + beta)), 0.0)
    of_long = np.where(above, 1 - (beta + theta) / (theta * (theta + 1)), 0.0)
    return (of_short, of_long) if shape[0] <= shape[1] else (of_long, of_short)


def directions(delta: Delta, W: Tensor, rank: int, row: Mapping[str, Any], certified: Values, key: str) -> Directions:
    """The leading `rank` directions of one ΔW, with W (m, n) the stored base matrix.

    row: this matrix's line of the table of `spectrum` (noise edge and model). certified: its singular values; a
    triplet that the iteration missed shows as a difference from them. key: seeds the control.
    """
    if delta.factors is not None:
        found = svd.factored_triplets(*delta.factors, rank)
    else:
        assert delta.dense is not None
        found = svd.top_triplets(delta.dense, rank)
    s = found.s.cpu().numpy()
    U, V = found.U, found.Vh.T
    r, (m, n) = len(s), delta.shape
    following = np.append(s[1:], found.following)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = s / following
    residual = np.maximum.accumulate(found.residual.cpu().numpy())
    settled = (residual <= SETTLED * found.gaps) & (found.gaps > 0)
    known = min(r, len(certified))
    missed = np.abs(s[:known] - certified[:known]) > SETTLED * s[0]
    trusted = settled & (np.arange(r) < _signal(row, s, delta.shape)) & (np.cumsum(np.pad(missed, (0, r - known))) == 0)
    if row["noise_model"] == "none":
        overlap = np.ones(r), np.ones(r)
    elif row["noise_model"] == "rounding" and delta.dense is not None:
        moved = int(delta.dense.any(dim=1).sum())  # a row that did not move carries neither update nor error
        overlap = true_overlap(s, float(row["noise_edge"]), (moved, n))
    else:
        overlap = np.full(r, math.nan), np.full(r, math.nan)
    left, right = (random_directions(rows, r, f"{key} {side}").to(U.device) for rows, side in ((m, "U"), (n, "V")))
    own, by_chance = (_projected(W, P, Q) for P, Q in ((U, V), (left, right)))
    return Directions(U, V, s, gap, trusted, *overlap, left, right, own, by_chance, delta.fro_norm)


def similarity_rows(
    place: Mapping[str, Any], steps: Mapping[str, Directions], dims: Sequence[int], whole_grid: bool = False
) -> list[dict[str, Any]]:
    """Rows as `columns.SIMILARITY` for every pair of steps of one matrix: i = j in `dims`, or the whole grid."""
    labels, rows = list(steps), []
    for number, label_a in enumerate(labels):
        for label_b in labels[number + 1 :]:
            a, b = steps[label_a], steps[label_b]
            m, n = a.U.shape[0], a.V.shape[0]
            left, right = similarity(a.U, b.U), similarity(a.V, b.V)
            control = similarity(a.random_left, b.random_left), similarity(a.random_right, b.random_right)
            both = min(a.r, b.r)
            ceilings = [
                np.cumsum(x[:both] * y[:both]) / np.arange(1, both + 1)
                for x, y in ((a.overlap_left, b.overlap_left), (a.overlap_right, b.overlap_right))
            ]
            for i in (d for d in dims if d <= a.r):
                for j in (d for d in dims if d <= b.r and (whole_grid or d == i)):
                    at, least = (i - 1, j - 1), min(i, j) - 1
                    rows.append(
                        {
                            **place, "step_a": label_a, "step_b": label_b, "i": i, "j": j, "phi_left": left[at],
                            "phi_right": right[at], "phi_random_left": random_similarity(i, j, m),
                            "phi_random_right": random_similarity(i, j, n), "control_left": control[0][at],
                            "control_right": control[1][at], "phi_ceiling_left": ceilings[0][least],
                            "phi_ceiling_right": ceilings[1][least], "gap_a": a.gap[i - 1], "gap_b": b.gap[j - 1],
                            "trusted": bool(a.trusted[i - 1] and b.trusted[j - 1]),
                        }
                    )  # fmt: skip
    return rows


def amplification_rows(
    place: Mapping[str, Any], steps: Mapping[str, Directions], base_values: Values, dims: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows as `columns.AMPLIFICATION` for every step of one matrix; base_values: the leading singular values of W."""
    rows = []
    for label, found in steps.items():
        for r in (d for d in dims if d <= found.r):
            own = float(found.projected_own[r - 1])
            rows.append(
                {
                    **place, "step": label, "r": r, "fro_norm": found.fro_norm, "projected_own": own,
                    "projected_base": float(np.linalg.norm(base_values[:r])),
                    "projected_random": float(found.projected_random[r - 1]),
                    "factor": found.fro_norm / own if own > 0 else math.nan, "trusted": bool(found.trusted[r - 1]),
                }
            )  # fmt: skip
    return rows


def _signal(row: Mapping[str, Any], s: Values, shape: tuple[int, int]) -> int:
    """How many of s are above what storage (for an adapter: float32) leaves undecided."""
    if row["noise_model"] == "none":
        return int(metrics.numerical_rank(s, shape))
    if not row["decidable_r50"]:
        return 0
    counted = row["signal_rank"]
    if row["noise_model"] == "rounding":
        above = int(np.count_nonzero(s > metrics.SIGNAL_FACTOR["rounding"] * row["noise_edge"]))
        return above if math.isnan(counted) else min(above, int(counted))
    # The dead-zone model's edge belongs to the corrected ΔW; its count is what holds for the stored one too.
    return 0 if math.isnan(counted) else int(counted)


def _projected(W: Tensor, P: Tensor, Q: Tensor) -> Values:
    """‖P[:, :r]ᵀ W Q[:, :r]‖_F for r = 1, 2, …"""
    squares = ((P.T @ svd.product(W, Q)) ** 2).cpu().numpy()
    return np.asarray(np.sqrt(np.diagonal(squares.cumsum(axis=0).cumsum(axis=1))), dtype=np.float64)
