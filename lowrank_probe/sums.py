"""One merged tensor: W + Σ w·ΔW in float64, a few rows at a time, rounded at the end, and checked on another way.

Legend: a stored tensor is looked at as a matrix of rows (a stack of experts (E, a, b) as (E·a, b), a convolution as
(out, in·kernel), a vector as a column); w a weight, M the result as stored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from lowrank_probe.changes import Change
from lowrank_probe.errors import NumericsError
from lowrank_probe.float64 import EPS64, row_chunks
from lowrank_probe.narrowing import all_finite, beyond

N_PROBES: Final = 2
Factors = Callable[[Change], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sum:
    """The merged tensor as stored, and what is known of it.

    fro_norm: ‖Σ w·ΔW‖_F; base_norm: ‖W‖_F; rounding: ‖M − (W + Σ w·ΔW)‖_F, which storing costs. check: at most 1 in a
    tensor that is what it says, the larger of two: |M − sum| over half a step of its type, entry by entry, and
    |sum·x − (W·x + Σ w·scaling·B(A·x))| over what float64 may err, row by row, for vectors x of ±1: a wrong entry of
    the sum is seen, and the product B·A is not used.
    """

    tensor: Tensor
    fro_norm: float
    base_norm: float
    rounding: float
    check: float


@dataclass(frozen=True)
class _LowRank:
    """L·R on the rows from `first` on: L (rows, r), R (r, columns), float64, weight and scaling in L."""

    first: int
    L: Tensor
    R: Tensor

    def on(self, start: int, stop: int) -> tuple[slice, Tensor]:
        """(the rows of the chunk it is on, its rows of L)."""
        a, b = max(start, self.first), min(stop, self.first + len(self.L))
        return slice(a - start, max(a, b) - start), self.L[a - self.first : max(a, b) - self.first]


@dataclass(frozen=True)
class _Replacing:
    """weight·(T − W) on all rows, or on the rows `rows`; T (rows, columns)."""

    weight: float
    T: Tensor
    rows: Tensor | None = None

    def on(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """(numbers of the rows in the chunk, their values)."""
        if self.rows is None:
            return torch.arange(stop - start), self.T[start:stop].double()
        inside = (self.rows >= start) & (self.rows < stop)
        return self.rows[inside] - start, self.T[inside].double()


def merged(name: str, W: Tensor, changes: Sequence[Change], dtype: torch.dtype, factors: Factors) -> Sum:
    """W + Σ w·ΔW, rounded to dtype. W: the base's tensor as stored; factors(change) → (lora_A, lora_B) as stored.

    Raises `NumericsError` naming the tensor where the sum overflows dtype, or W or an adapter's tensor is not finite,
    or where what comes out fails its check (a fault of ours, or of the machine).
    """
    columns = W.shape[-1] if W.ndim == 3 and any(change.part.expert is not None for change in changes) else None
    view = W.reshape(-1, columns) if columns else W.flatten(1) if W.ndim > 1 else W.reshape(-1, 1)
    low = [_low_rank(change, W.shape, factors) for change in changes if change.kind == "lora"]
    rest = [_replacing(change, view) for change in changes if change.kind in ("whole", "rows")]
    added = [_bias(change) for change in changes if change.kind == "bias"]
    out = torch.empty(view.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    X = torch.randint(0, 2, (view.shape[1], N_PROBES), generator=generator).double() * 2 - 1
    R_X = [term.R @ X for term in low]
    R_size = [term.R.abs().sum(dim=1, keepdim=True) for term in low]
    squares = torch.zeros(3, dtype=torch.float64)
    check, start = 0.0, 0
    alone = len(changes) == 1 and changes[0].kind == "whole" and changes[0].weight == 1
    for chunk in row_chunks(view):
        stop = start + len(chunk)
        base = chunk.double()
        total, seen, size = base.clone(), base @ X, base.abs().sum(dim=1, keepdim=True)
        for one in rest:
            rows, values = one.on(start, stop)
            total[rows] += one.weight * (values - base[rows])
            seen[rows] += one.weight * (values @ X - base[rows] @ X)
            size[rows] += abs(one.weight) * (values.abs() + base[rows].abs()).sum(dim=1, keepdim=True)
        if alone:  # exactly T, which W + (T − W) need not be
            total = rest[0].on(start, stop)[1]
        for bias in added:
            total += bias[start:stop]
            seen += bias[start:stop] @ X
            size += bias[start:stop].abs()
        for term, probe, weight in zip(low, R_X, R_size, strict=True):
            on, L = term.on(start, stop)
            total[on].addmm_(L, term.R)
            seen[on].addmm_(L, probe)
            size[on].addmm_(L.abs(), weight)
        M = total.to(dtype)
        out[start:stop] = M
        stored = M.double()
        if not bool(torch.isfinite(stored.sum())):
            raise _not_finite(name, base, total, dtype)
        squares += torch.stack([((total - base) ** 2).sum(), (base**2).sum(), ((stored - total) ** 2).sum()])
        check = max(check, _check(total, stored, seen, size, X, dtype))
        start = stop
    if check > 1:
        raise NumericsError(f"{name}: the merged tensor is not base + Σ w·scaling·B·A ({check:.3g} × its rounding)")
    moved, of_base, rounding = (math.sqrt(float(square)) for square in squares)
    return Sum(out.reshape(W.shape), moved, of_base, rounding, check)


def _check(total: Tensor, stored: Tensor, seen: Tensor, size: Tensor, X: Tensor, dtype: torch.dtype) -> float:
    """`Sum.check` of some rows. total: the sum; stored: M; seen: W·X + Σ w·scaling·B(A·X); size: Σ of magnitudes."""
    if not total.numel():
        return 0.0
    kind = torch.finfo(dtype)
    by_float32 = 2.0**-24 if kind.bits < 32 else 0.0  # torch's way from float64 to 16 bits
    half_step = (kind.eps / 2 + by_float32) * stored.abs() + kind.eps / 2 * kind.smallest_normal
    rounding = float(((stored - total).abs() / half_step).max())
    arithmetic = (len(X) + 64) * EPS64 * (size + total.abs().sum(dim=1, keepdim=True)) + 1e-300
    return max(rounding, float(((total @ X - seen).abs() / arithmetic).max()))


def _low_rank(change: Change, stored: tuple[int, ...], factors: Factors) -> _LowRank:
    assert change.module is not None
    B, A = change.module.of(*factors(change))
    L, R = B.double() * (change.weight * change.module.scaling), A.double()
    if change.conv1d or change.part.transposed:
        L, R = R.T * (change.weight * change.module.scaling), B.double().T
    expert = change.part.expert
    return _LowRank(0 if expert is None else expert * stored[1], L, R)


def whole(change: Change) -> Tensor:
    """T, the tensor that an adapter holds whole, as stored. Raises `NumericsError` naming it for NaN or Inf."""
    T = change.adapter.read(change.tensor)
    if not all_finite(T):
        raise NumericsError(f"{change.tensor} in {change.adapter.tensors[change.tensor].file}: contains NaN or Inf")
    return T


def _replacing(change: Change, view: Tensor) -> _Replacing:
    T = whole(change)
    rows = torch.tensor(change.rows) if change.kind == "rows" else None
    return _Replacing(change.weight, T.reshape(-1, view.shape[1]), rows)


def _bias(change: Change) -> Tensor:
    assert change.module is not None
    return (change.weight * change.module.scaling) * change.adapter.read(change.tensor).double().reshape(-1, 1)


def _not_finite(name: str, base: Tensor, total: Tensor, dtype: torch.dtype) -> NumericsError:
    if not bool(torch.isfinite(base).all()):
        return NumericsError(f"{name}: contains NaN or Inf in the base (expected finite weights)")
    return beyond(f"{name}: base + adapters reaches", total, dtype)
