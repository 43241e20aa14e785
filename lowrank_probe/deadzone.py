"""The dead-zone model: what a stored difference tells about the update, when both sides lie on one storage grid.

With the base on the grid, a stored entry is exactly Q = u·round(ΔW/u), u its own ulp: a known quantizer, not noise.
Entries smaller than u/2 are swallowed, so that a raw spectrum of Q is that of what survived. The model:

1.  ΔW_ij = S_ij·z_ij with S_ij² = s²·a_i·b_j. The scales a (rows) and b (columns) are fitted so that Σ E[Q²] over each
    row and column is what is seen.
2.  The law of z is not assumed: small weights have a fine grid, so that entries with u ≪ S show ΔW itself. Their z are
    the sample from which every expectation is taken (updates of Adam are flatter than a Gaussian: E z⁴ ≈ 2.2).
3.  Z_ij = E[ΔW_ij | Q_ij, u_ij] is the posterior mean, ρ(x) = E[Z²]/E[ΔW²] the share of energy it resolves.
4.  Y_ij = Z_ij/ρ̃_ij, ρ̃_ij = ρ_i·ρ_j/ρ̄ (row, column and whole mean of ρ), is ΔW plus independent errors of known
    variance S²(ρ/ρ̃² − 2ρ/ρ̃ + 1): a matrix whose singular values can be denoised as under plain noise.
5.  ‖ΔW‖_F²: geometric mean of Σ S² and of the same sum rescaled by the finely resolved entries (Q² − u²/12).

Legend: m out, n in; level = |Q|/u; x = log2(u/S). Steps are powers of two and S² is a product of a row's and a
column's scale, so that x is a sum of an exponent, a row's and a column's logarithm, and every sum over S²·f(x) is a
matrix–vector product. All per-entry work goes by row chunks.
Source: ours; that z does not depend on u was checked on full fine-tunes of SmolLM2-135M (benchmarks/smollm2_truth.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lowrank_probe import spilling

N_SAMPLES: Final = 16384
MIN_SAMPLES: Final = 1024
N_LEVELS: Final = 64
# Entries among which the sample is looked for.
MOST: Final = 1 << 26
ROUNDS: Final = 3
MAX_STEP: Final = 4.0
LEAST_GAIN: Final = 0.25
# The estimated ‖ΔW‖_F stays within this factor of the stored one wherever the model holds (0.87 … 1.06 was seen).
MAX_NORM_RATIO: Final = 1.5
# x is sampled from LOW to HIGH in steps of 1/8; below LOW, rounding is so fine that Z = Q and ρ = 1 − (u/S)²/12. The
# tables that are looked up reach down to FLOOR and are interpolated to steps of 1/64.
LOW, HIGH, FLOOR, COARSE, FINE = -2.5, 6.0, -8.0, 8, 64
TINY: Final = 1e-38
# The step that marks an entry known not to have moved; its square is still a float32.
MASKED: Final = 2.0**60


@dataclass(frozen=True)
class DeadZone:
    """The corrected update. Y: (m, n) float32; error_std: (m, n) bfloat16, its standard error at each entry.

    fro_norm: estimate of the true ‖ΔW‖_F. resolved: ρ̄, the share of its energy that the stored entries resolve.
    """

    Y: Tensor
    error_std: Tensor
    fro_norm: float
    resolved: float


@dataclass(frozen=True)
class _Scales:
    """S² = row_i·col_j: `row` (m,) = s²·a, `col` (n,) = b with mean 1; the mean of S² is the mean of `row`."""

    row: Tensor
    col: Tensor

    def log2(self) -> tuple[Tensor, Tensor]:
        """½log2 of both; −∞ is kept off by TINY."""
        return 0.5 * self.row.clamp(min=TINY).log2(), 0.5 * self.col.clamp(min=TINY).log2()

    def square(self, rows: slice) -> Tensor:
        return torch.outer(self.row[rows], self.col)


def correct(Q: Tensor, u: Tensor) -> DeadZone | None:
    """Fit the model to a stored difference Q (m, n) with grid steps u (m, n), bfloat16 powers of two.

    None where it does not apply: too few entries have a fine grid, the norm it gives contradicts the stored one, or
    nothing in Q is between 1e-35 and 1e35. Both are scratch memory: a float32 Q becomes Y, to spare a copy.
    """
    m, n = Q.shape
    largest = float(torch.linalg.vector_norm(Q, math.inf))
    if not 1e-35 < largest < 1e35:
        return None
    # A power of two, so exact: squares of very large or very small updates would leave float32's range.
    unit = 2.0 ** math.floor(math.log2(largest))
    scaled = Q if Q.dtype == torch.float32 else spilling.empty((m, n), torch.float32, Q.device)
    for rows in _chunks(Q):
        scaled[rows] = Q[rows].div_(unit)
        # A weight that is zero on both sides has the finest grid of all, and would show any update: there is none (a
        # mask).
        masked = (u[rows] <= 2.0**-126) & (scaled[rows] == 0)
        u[rows] = u[rows].div_(unit).clamp_(min=2.0**-126).masked_fill_(masked, MASKED)
    Q = scaled
    row, col = torch.zeros(m, device=Q.device), torch.zeros(n, device=Q.device)
    for rows in _chunks(Q):
        square = Q[rows] ** 2
        row[rows] = square.sum(1)
        col += square.sum(0)
    stored = float(row.sum(dtype=torch.float64))
    fit = _fit(Q, u, row, col)
    if fit is None:
        return None
    scales, tables = fit
    log_row, log_col = scales.log2()
    resolved_row, resolved_col = torch.zeros_like(row), torch.zeros_like(col)
    total_row, total_col = torch.zeros_like(row), torch.zeros_like(col)
    fine_seen = fine_expected = 0.0
    for rows in _chunks(Q):
        x = _log_ratio(u[rows], log_row[rows], log_col)
        rho = tables.share[_index(x, FLOOR)]
        resolved_row[rows] = rho @ scales.col
        resolved_col += scales.row[rows] @ rho
        alive = (u[rows] < MASKED).float()
        total_row[rows] = alive @ scales.col
        total_col += scales.row[rows] @ alive
        fine = (x <= 0).float()
        fine_seen += float((torch.square(Q[rows]) - torch.square(u[rows].float()).div_(12)).mul_(fine).sum())
        fine_expected += float(scales.row[rows] @ (fine @ scales.col))
    resolved_row, resolved_col = resolved_row * scales.row, resolved_col * scales.col
    total_row, total_col = total_row * scales.row, total_col * scales.col
    energy = float(total_row.sum(dtype=torch.float64))
    correction = fine_seen / fine_expected if fine_expected > 0 and fine_seen > 0 else 1.0
    norm = math.sqrt(energy * math.sqrt(correction))
    if not 1 / MAX_NORM_RATIO <= norm / math.sqrt(stored) <= MAX_NORM_RATIO:
        return None
    resolved = float(resolved_row.sum(dtype=torch.float64)) / energy
    rho_row = resolved_row / total_row.clamp(min=TINY)
    rho_col = resolved_col / total_col.clamp(min=TINY)
    error_std = spilling.empty(Q.shape, torch.bfloat16, Q.device)
    for rows in _chunks(Q):
        S2 = scales.square(rows)
        x = _log_ratio(u[rows], log_row[rows], log_col)
        rho = tables.share[_index(x, FLOOR)]
        # A row or column that is almost dead keeps a small bias rather than drown the rest in amplified noise.
        gain = torch.outer(rho_row[rows], rho_col / resolved).clamp_(min=LEAST_GAIN * resolved, max=1.0)
        Q[rows] = tables.posterior(Q[rows], u[rows], x, S2) / gain
        # S²·(ρ/gain² − 2ρ/gain + 1)
        variance = rho.div_(gain).mul_(gain.reciprocal_().sub_(2)).add_(1).mul_(S2)
        variance.masked_fill_(u[rows] >= MASKED, 0.0)
        error_std[rows] = variance.clamp_(min=0).sqrt_().to(torch.bfloat16)
    return DeadZone(Q.mul_(unit), error_std.mul_(unit), norm * unit, resolved)


@dataclass(frozen=True)
class _Tables:
    """Expectations over the sample of |z| by x = log2(u/S).

    square: E[Q²]/S² and share: ρ, both from FLOOR on; mean: E[|z| | level], from LOW on, one row an x.
    """

    square: Tensor
    share: Tensor
    mean: Tensor

    def posterior(self, Q: Tensor, u: Tensor, x: Tensor, S2: Tensor) -> Tensor:
        """E[ΔW | Q, u]; Q itself where the grid is fine or the level beyond the table."""
        level = Q.abs().div_(u).round_()
        exact = (x < LOW) | (level >= N_LEVELS)
        index = _index(x, LOW).mul_(N_LEVELS).add_(level.clamp_(max=N_LEVELS - 1).long())
        inside = self.mean.view(-1)[index].mul_(S2.sqrt()).mul_(Q.sign())
        return torch.where(exact, Q, inside)


def _tabulate(z: Tensor) -> _Tables:
    """The tables of a sample of |z|: counts and sums of each level by sorting, on the host (small, and repeatable)."""
    sample = z.double().cpu().sort().values
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), sample.cumsum(0)])
    n_steps = round((HIGH - LOW) * COARSE) + 1
    ratio = 2.0 ** (LOW + torch.arange(n_steps, dtype=torch.float64) / COARSE)[:, None]
    grid = torch.arange(N_LEVELS, dtype=torch.float64) * ratio
    start = torch.searchsorted(sample, grid - ratio / 2)
    start[:, 0] = 0
    stop = torch.cat([start[:, 1:], torch.full((n_steps, 1), len(sample))], dim=1)
    count = (stop - start).double()
    conditional = torch.where(count >= 4, (sums[stop] - sums[start]) / count.clamp(min=1), grid)
    conditional[:, 0] = 0.0  # the sign is unknown there
    square = (count * grid**2).sum(1) / len(sample)
    share = (count * conditional**2).sum(1) / len(sample)
    fine = 4.0 ** torch.arange(FLOOR, LOW, 1 / FINE, dtype=torch.float64) / 12
    square, share = (
        torch.cat([below, _refined(table)]) for below, table in ((1 + fine, square), (1 - fine, share))
    )  # fmt: skip
    return _Tables(*(table.float().to(z.device) for table in (square, share, _refined(conditional))))


def _refined(table: Tensor) -> Tensor:
    """A table with rows at steps of 1/COARSE, interpolated linearly to steps of 1/FINE."""
    position = torch.arange((table.shape[0] - 1) * FINE // COARSE + 1, dtype=torch.float64) * COARSE / FINE
    i = position.long().clamp(max=table.shape[0] - 2)
    weight = (position - i).reshape(-1, *[1] * (table.ndim - 1))
    return torch.lerp(table[i], table[i + 1], weight)


def _fit(Q: Tensor, u: Tensor, row: Tensor, col: Tensor) -> tuple[_Scales, _Tables] | None:
    """The scales and tables, from Q and its sums of squares by row (m,) and by column (n,); None without a sample."""
    m, n = Q.shape
    s2 = _global_scale(Q, u, float(row.sum(dtype=torch.float64)) / (m * n))
    scales = _Scales(s2 * (row > 0), (col > 0).float())
    tables = None
    for _ in range(ROUNDS):
        z = _sample(Q, u, scales)
        if z is None:
            return None
        tables = _tabulate(z)
        # Bounded steps: where nearly nothing survives, a single entry would blow the scale up.
        predicted = scales.row * _expected(u, scales, tables, axis=1)
        new_row = scales.row * (row / predicted.clamp(min=TINY)).clamp_(max=MAX_STEP)
        scales = _Scales(new_row, scales.col)
        predicted = scales.col * _expected(u, scales, tables, axis=0)
        new_col = scales.col * (col / predicted.clamp(min=TINY)).clamp_(max=MAX_STEP)
        scales = _Scales(scales.row * new_col.mean(), new_col / new_col.mean())
    assert tables is not None
    return scales, tables


def _global_scale(Q: Tensor, u: Tensor, start: float) -> float:
    """A first s²: mean of Q² − u²/12 over the entries with u ≤ s, to a fixed point."""
    s2 = start
    for _ in range(4):
        total, count = 0.0, 0
        for rows in _chunks(Q):
            step = u[rows].float()
            fine = (step <= math.sqrt(s2)).float()
            total += float((torch.square(Q[rows]) - torch.square(step).div_(12)).mul_(fine).sum())
            count += int(fine.sum())
        if count == 0 or total <= 0 or s2 == total / count:
            break
        s2 = total / count
    return s2


def _sample(Q: Tensor, u: Tensor, scales: _Scales) -> Tensor | None:
    """|z| of entries whose grid is fine, u ≤ S/8 where there are enough, else S/4, S/2; scaled to E z² = 1."""
    log_row, log_col = scales.log2()
    parts, fineness = [], []
    thin = -(-Q.numel() // MOST)  # of a larger matrix every second, third, … of its entries is enough
    for rows in _chunks(Q):
        x = _log_ratio(u[rows], log_row[rows], log_col)
        chosen = ((x <= -1) & (scales.row[rows, None] > 0) & (scales.col > 0)).flatten().nonzero().squeeze(1)[::thin]
        x, i, j = x.flatten()[chosen], chosen // Q.shape[1], chosen % Q.shape[1]
        fineness.append(x)
        parts.append(Q[rows].flatten()[chosen].abs_().mul_(torch.exp2(-log_row[rows][i] - log_col[j])))
    z, x = torch.cat(parts), torch.cat(fineness)
    for least, enough in ((-3.0, N_SAMPLES // 2), (-2.0, N_SAMPLES // 2), (-1.0, MIN_SAMPLES)):
        taken = z[x <= least]
        if len(taken) >= enough:
            even = torch.linspace(0, len(taken) - 1, min(len(taken), N_SAMPLES), device=taken.device)
            taken = taken[even.round().long()]
            rms = float((taken**2).mean().sqrt())
            return taken / rms if rms > 0 else None
    return None


def _expected(u: Tensor, scales: _Scales, tables: _Tables, axis: int) -> Tensor:
    """Σ E[Q²]/row_i over each row (axis 1), or Σ E[Q²]/col_j over each column (axis 0), under the present scales."""
    log_row, log_col = scales.log2()
    out = torch.zeros(u.shape[1 - axis], device=u.device)
    for rows in _chunks(u):
        moment = tables.square[_index(_log_ratio(u[rows], log_row[rows], log_col), FLOOR)]
        if axis == 1:
            out[rows] = moment @ scales.col
        else:
            out += scales.row[rows] @ moment
    return out


def _log_ratio(u: Tensor, log_row: Tensor, log_col: Tensor) -> Tensor:
    """x = log2(u/S); u's exponent is read from its bits."""
    exponent = (u.view(torch.int16) >> 7).sub_(127)
    return exponent.float().sub_(log_row[:, None]).sub_(log_col)


def _index(x: Tensor, first: float) -> Tensor:
    """The place of x, to the nearest 1/FINE, in a table that starts at `first`; its ends serve for what is beyond."""
    return (x - (first - 0.5 / FINE)).mul_(FINE).clamp_(0, (HIGH - first) * FINE).long()


def _chunks(A: Tensor) -> Iterator[slice]:
    # Small enough for a CPU's cache and for the memory beside a matrix; a GPU wants fewer, larger launches.
    step = max(1, (1 << 17 if A.is_cpu else 1 << 23) // A.shape[1])
    for start in range(0, A.shape[0], step):
        yield slice(start, min(start + step, A.shape[0]))
