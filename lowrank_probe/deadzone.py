"""The dead-zone model: what a stored difference tells about the update, when both sides lie on one storage grid.

With the base on the grid, a stored entry is exactly Q = u·round(ΔW/u), u its own ulp: a known quantizer, not noise.
Entries smaller than u/2 are swallowed, so that a raw spectrum of Q is that of what survived. The model:

1.  ΔW_ij = S_ij·z_ij with S_ij² = s²·a_i·b_j. The scales a (rows) and b (columns) are fitted so that Σ E[Q²] over each
    row and column is what is seen.
2.  The law of z is not assumed: small weights have a fine grid, so that entries with u ≪ S show ΔW itself. Their z are
    the sample from which every expectation is taken (updates of Adam are flatter than a Gaussian: E z⁴ ≈ 2.2).
3.  Z_ij = E[ΔW_ij | Q_ij, u_ij] is the posterior mean, ρ(u/S) = E[Z²]/E[ΔW²] the share of energy it resolves.
4.  Y_ij = Z_ij/ρ̃_ij, ρ̃_ij = ρ_i·ρ_j/ρ̄ (row, column and whole mean of ρ), is ΔW plus independent errors of known
    variance S²(ρ/ρ̃² − 2ρ/ρ̃ + 1): a matrix whose singular values can be denoised as under plain noise.
5.  ‖ΔW‖_F²: geometric mean of Σ S² and of the same sum rescaled by the finely resolved entries (Q² − u²/12).

Legend: m out, n in; level = |Q|/u; ratio = u/S; all per-entry work goes by row chunks.
Source: ours; that z does not depend on u was checked on full fine-tunes of SmolLM2-135M (benchmarks/smollm2_truth.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

N_SAMPLES: Final = 16384
MIN_SAMPLES: Final = 1024
N_LEVELS: Final = 64
ROUNDS: Final = 3
MAX_STEP: Final = 4.0
LEAST_GAIN: Final = 0.25
# The estimated ‖ΔW‖_F stays within this factor of the stored one wherever the model holds (0.87 … 1.06 was seen).
MAX_NORM_RATIO: Final = 1.5
# log2(u/S) is tabulated from LOW to HIGH; below, rounding is so fine that Z = Q and ρ = 1 − ratio²/12.
LOW, HIGH, STEP = -2.5, 6.0, 0.125
CHUNK: Final = 1 << 19


@dataclass(frozen=True)
class DeadZone:
    """The corrected update. Y: (m, n) float32; error_std: (m, n) bfloat16, its standard error at each entry.

    fro_norm: estimate of the true ‖ΔW‖_F. resolved: ρ̄, the share of its energy that the stored entries resolve.
    """

    Y: Tensor
    error_std: Tensor
    fro_norm: float
    resolved: float


def correct(Q: Tensor, u: Tensor) -> DeadZone | None:
    """Fit the model to a stored difference Q (m, n) with grid steps u (m, n); None where it does not apply:
    too few entries have a fine grid, or the norm it gives contradicts the stored one.

    Q is overwritten by Y, to spare a copy.
    """
    Q = Q.float() if Q.dtype != torch.float32 else Q
    fit = _fit(Q, u)
    if fit is None:
        return None
    s2, a, b, tables = fit
    resolved_row, total_row = torch.zeros_like(a), torch.zeros_like(a)
    resolved_col, total_col = torch.zeros_like(b), torch.zeros_like(b)
    fine_seen = fine_expected = 0.0
    for rows in _chunks(Q):
        S2 = s2 * a[rows, None] * b[None, :]
        u_part = u[rows]
        rho = tables.rho(_log_ratio(u_part, S2))
        weight = rho * S2
        resolved_row[rows], total_row[rows] = weight.sum(1), S2.sum(1)
        resolved_col += weight.sum(0)
        total_col += S2.sum(0)
        fine = u_part**2 <= S2
        fine_seen += float((Q[rows] ** 2 - u_part**2 / 12)[fine].sum(dtype=torch.float64))
        fine_expected += float(S2[fine].sum(dtype=torch.float64))
    energy = float(total_row.sum(dtype=torch.float64))
    stored = sum(float((Q[rows] ** 2).sum(dtype=torch.float64)) for rows in _chunks(Q))
    correction = fine_seen / fine_expected if fine_expected > 0 and fine_seen > 0 else 1.0
    norm = math.sqrt(energy * math.sqrt(correction))
    if not 1 / MAX_NORM_RATIO <= norm / math.sqrt(stored) <= MAX_NORM_RATIO:
        return None
    resolved = float(resolved_row.sum(dtype=torch.float64)) / energy
    rho_row = resolved_row / total_row.clamp(min=1e-38)
    rho_col = resolved_col / total_col.clamp(min=1e-38)
    error_std = torch.empty(Q.shape, dtype=torch.bfloat16, device=Q.device)
    for rows in _chunks(Q):
        S2 = s2 * a[rows, None] * b[None, :]
        log_ratio = _log_ratio(u[rows], S2)
        rho = tables.rho(log_ratio)
        # A row or column that is almost dead keeps a small bias rather than drown the rest in amplified noise.
        gain = (rho_row[rows, None] * rho_col[None, :] / resolved).clamp_(min=LEAST_GAIN * resolved)
        Z = tables.posterior(Q[rows], u[rows], log_ratio, S2)
        Q[rows] = Z / gain
        error_std[rows] = (S2 * (rho / gain**2 - 2 * rho / gain + 1)).clamp_(min=0).sqrt_().to(torch.bfloat16)
    return DeadZone(Q, error_std, norm, resolved)


@dataclass(frozen=True)
class _Tables:
    """Expectations over the sample of |z|, against log2(u/S): E[round(z/r)²]r², ρ, and E[|z| | level]."""

    square: Tensor
    share: Tensor
    mean: Tensor

    def second_moment(self, log_ratio: Tensor) -> Tensor:
        """E[Q²]/S²; above the table (u ≫ S) nothing survives, below it E[Q²] = S² + u²/12."""
        i, f = _position(log_ratio)
        inside = torch.lerp(self.square[i], self.square[i + 1], f)
        return torch.where(log_ratio < LOW, 1 + torch.exp2(2 * log_ratio) / 12, inside)

    def rho(self, log_ratio: Tensor) -> Tensor:
        i, f = _position(log_ratio)
        inside = torch.lerp(self.share[i], self.share[i + 1], f)
        return torch.where(log_ratio < LOW, 1 - torch.exp2(2 * log_ratio) / 12, inside)

    def posterior(self, Q: Tensor, u: Tensor, log_ratio: Tensor, S2: Tensor) -> Tensor:
        level = torch.round(Q.abs() / u)
        i, f = _position(log_ratio)
        index = level.clamp(max=N_LEVELS - 1).long()
        inside = torch.lerp(self.mean[i, index], self.mean[i + 1, index], f) * S2.sqrt() * Q.sign()
        return torch.where((log_ratio < LOW) | (level >= N_LEVELS), Q, inside)


def _tabulate(z: Tensor) -> _Tables:
    """The tables of a sample of |z|: counts and sums of each level by sorting, on the host (small, and repeatable)."""
    sample = z.double().cpu().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), sample.cumsum(0)])
    n_steps = round((HIGH - LOW) / STEP) + 1
    ratio = 2.0 ** (LOW + STEP * torch.arange(n_steps, dtype=torch.float64))[:, None]
    grid = torch.arange(N_LEVELS, dtype=torch.float64) * ratio
    start = torch.searchsorted(sample, grid - ratio / 2)
    start[:, 0] = 0
    stop = torch.cat([start[:, 1:], torch.full((n_steps, 1), len(sample))], dim=1)
    count = (stop - start).double()
    conditional = torch.where(count >= 4, (sums[stop] - sums[start]) / count.clamp(min=1), grid)
    conditional[:, 0] = 0.0  # the sign is unknown there
    square = (count * grid**2).sum(1) / len(sample)
    share = (count * conditional**2).sum(1) / len(sample)
    return _Tables(*(table.float().to(z.device) for table in (square, share, conditional)))


def _fit(Q: Tensor, u: Tensor) -> tuple[float, Tensor, Tensor, _Tables] | None:
    """(s², a (m,), b (n,), tables) with mean(a) = mean(b) = 1 over what moved; None where no sample can be had."""
    m, n = Q.shape
    row, col = torch.zeros(m, device=Q.device), torch.zeros(n, device=Q.device)
    for rows in _chunks(Q):
        square = Q[rows] ** 2
        row[rows] = square.sum(1)
        col += square.sum(0)
    s2 = _global_scale(Q, u, float(row.sum(dtype=torch.float64)) / (m * n))
    a, b = (row > 0).float(), (col > 0).float()
    tables = None
    for _ in range(ROUNDS):
        z = _sample(Q, u, s2, a, b)
        if z is None:
            return None
        tables = _tabulate(z)
        for axis in (1, 0):
            predicted = _predict(u, s2, a, b, tables, axis)
            # Bounded: where nearly nothing survives, a single entry would blow the scale up.
            if axis == 1:
                a = a * (row / predicted.clamp(min=1e-38)).clamp_(max=MAX_STEP)
            else:
                b = b * (col / predicted.clamp(min=1e-38)).clamp_(max=MAX_STEP)
        scale = float(a.mean()) * float(b.mean())
        a, b, s2 = a / a.mean(), b / b.mean(), s2 * scale
    assert tables is not None
    return s2, a, b, tables


def _global_scale(Q: Tensor, u: Tensor, start: float) -> float:
    """A first s²: mean of Q² − u²/12 over the entries with u ≤ s, to a fixed point."""
    s2 = start
    for _ in range(4):
        total, count = 0.0, 0
        for rows in _chunks(Q):
            fine = u[rows] ** 2 <= s2
            total += float((Q[rows] ** 2 - u[rows] ** 2 / 12)[fine].sum(dtype=torch.float64))
            count += int(fine.sum())
        if count == 0 or total <= 0:
            break
        s2 = total / count
    return s2


def _sample(Q: Tensor, u: Tensor, s2: float, a: Tensor, b: Tensor) -> Tensor | None:
    """|z| of entries whose grid is fine, u ≤ S/8 where there are enough, else S/4, S/2; scaled to E z² = 1."""
    found: dict[int, list[Tensor]] = {8: [], 4: [], 2: []}
    for rows in _chunks(Q):
        S2 = s2 * a[rows, None] * b[None, :]
        ratio2 = u[rows] ** 2 / S2.clamp(min=1e-38)
        z = (Q[rows] / S2.clamp(min=1e-38).sqrt()).abs()
        for fineness, parts in found.items():
            parts.append(z[(ratio2 <= fineness**-2.0) & (S2 > 0)])
    for parts in found.values():
        z = torch.cat(parts)
        if len(z) >= (N_SAMPLES // 2 if parts is not found[2] else MIN_SAMPLES):
            z = z[:: max(1, len(z) // N_SAMPLES)][:N_SAMPLES]
            rms = float((z**2).mean().sqrt())
            return z / rms if rms > 0 else None
    return None


def _predict(u: Tensor, s2: float, a: Tensor, b: Tensor, tables: _Tables, axis: int) -> Tensor:
    """Σ E[Q²] over the columns (axis 1) or rows (axis 0) under the present scales."""
    out = torch.zeros(u.shape[1 - axis], device=u.device)
    for rows in _chunks(u):
        S2 = s2 * a[rows, None] * b[None, :]
        expected = S2 * tables.second_moment(_log_ratio(u[rows], S2))
        if axis == 1:
            out[rows] = expected.sum(1)
        else:
            out += expected.sum(0)
    return out


def _log_ratio(u: Tensor, S2: Tensor) -> Tensor:
    return torch.log2(u) - 0.5 * torch.log2(S2.clamp(min=1e-38))


def _position(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    x = ((log_ratio - LOW) / STEP).clamp_(0.0, (HIGH - LOW) / STEP - 1e-3)
    i = x.long()
    return i, x - i


def _chunks(A: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // A.shape[1])
    for start in range(0, A.shape[0], step):
        yield slice(start, min(start + step, A.shape[0]))
