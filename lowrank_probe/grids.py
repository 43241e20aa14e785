"""Quantization grids: do the tuned values coincide, and are they multiples of a step, as the base's are not?

A quantizer gives g consecutive entries of a row (of a column, where the weight was stored transposed) one scale, and
each entry one of at most 2^bits values. Seen are uniform grids of 2 to 8 bits whose zero point is a multiple of the
step and that their extremes reach, and other codebooks (nf4, float8) by counting. Only sampled lines are read; in
numpy, whose calls on a thousand entries cost a fifth of torch's.

Legend: T (m, n) the tuned values, W (m, n) the base's; a line is a row or a column; g entries share one step.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe.float64 import row_chunks

Lines = NDArray[Any]
Ends = tuple[float, float]

# About so many entries of at least two whole lines are looked at; a first look takes FEW.
SAMPLE: Final = 8192
FEW: Final = 2048
GROUPS: Final = (128, 64, 32)
# Equal neighbours among 32 sorted values: 0.3 to 0.7 in bf16 weights, 0.06 in fp16 ones, 1.8 to 4 in int8 ones with a
# scale for each 32, more in any coarser grid.
OFTEN: Final = 1.0
# Rounding to the nearest moves no value by more than itself, unless to 0. An update far larger than the weights makes
# them alike: ± the learning rate, after one step of Adam. At most this share may have moved so far.
MOVED: Final = 0.25
# Distinct values: 32 random bf16 weights have 28 to 32, those of a 4-bit codebook at most 16. The base must have this
# many times more, so that a base that is itself dequantized shows nothing.
LEVEL_RATIO: Final = 1.5
# Mean distance of w/step from the next integer, |w/step| ≤ 24.5: 0.25 for values on no grid, 0.18 with the best of
# three steps; 0.02 for 8-bit values stored in bf16; 0.13 where only every second group has the right step.
GRID_ERROR: Final = 0.08
OFF_GRID_ERROR: Final = 0.15
GRID_RANGE: Final = (0.5, 24.5)
UNIFORM_BITS: Final = (5, 6, 7, 8)
# Groups whose errors differ by less fit alike.
ALIKE: Final = 0.01


def find_grid(W: Tensor, T: Tensor) -> dict[str, Any]:
    """The columns `grid_…` and `base_levels`: the grid that T (m, n) lies on and the base W does not; {} for none.

    A few entries of T exclude almost every matrix: on any grid, values coincide. Rows are looked at before columns.
    """
    for axis, name in ((1, "row"), (0, "column")):
        if T.shape[axis] < GROUPS[-1] or _coincidences(to_numpy(pick(T, axis, FEW))) < OFTEN:
            continue
        found = _best(*_sample(W, T, axis), _extremes(W), _extremes(T))
        if found and found["grid_group"] == math.inf:
            return found | {"grid_axis": "", "grid_group": float(T.numel())}
        if found:
            return found | {"grid_axis": name}
    return {}


def _best(w: Lines, t: Lines, ends_w: Ends, ends_t: Ends) -> dict[str, Any]:
    """The grid of the sampled lines t; ends: smallest and largest value of the whole matrices.

    Up to 4 bits values are counted, since a coarse grid often misses its own extremes in a small group, and since nf4
    is not uniform. Finer grids are told by their steps, and float8 by counting again.
    """
    if np.count_nonzero((t != 0) & (np.abs(t - w) > np.abs(w))) > MOVED * np.count_nonzero(t):
        return {}
    n = t.shape[1]
    groups = (math.inf, n, *(group for group in GROUPS if group < n))
    return (
        _codebook(w, t, groups, 16)
        or _float8(w, t)
        or _uniform(w, t, ends_w, ends_t, groups)
        or (_codebook(w, t, groups[:2], 256) if _levels(t, n)[0] <= n / LEVEL_RATIO else {})
    )


def pick(A: Tensor, axis: int, entries: int) -> Tensor:
    """Rows (axis 1) or columns (axis 0) of A (m, n) with about so many entries: a view (lines, length).

    Rows are evenly spaced. Columns are neighbours: each entry of a single one costs a read of its own from memory.
    """
    count = max(2, entries // A.shape[axis])
    if axis == 1:
        return A[:: max(1, (len(A) - 1) // (count - 1))][:count]
    first = max(0, (A.shape[1] - count) // 2)
    return A[:, first : first + count].T


def to_numpy(A: Tensor) -> Lines:
    """A small tensor on the host, in float32, or float64 where it is that."""
    return (A if A.dtype == torch.float64 else A.float()).cpu().numpy()


def _sample(W: Tensor, T: Tensor, axis: int) -> tuple[Lines, Lines]:
    """Lines of both, the base's as T's storage would hold them, and 0 where T is: what is pruned has fewer values."""
    w, t = pick(W, axis, SAMPLE), pick(T, axis, SAMPLE)
    for narrow in (torch.bfloat16, torch.float16):
        if t.dtype == narrow or (t.dtype.itemsize > 2 and torch.equal(t.to(narrow).to(t.dtype), t)):
            w = w.to(narrow)
            break
    before, after = to_numpy(w), to_numpy(t)
    return (before if after.all() else np.where(after == 0, after, before)), after


def _coincidences(A: Lines) -> float:
    """Equal neighbours among 32 sorted values, zeros apart (these are as many on either side): the mean count."""
    ordered = np.sort(_groups(A, GROUPS[-1]), axis=1)
    equal = ordered[:, 1:] == ordered[:, :-1]
    return (np.count_nonzero(equal) - np.count_nonzero(equal & (ordered[:, 1:] == 0))) / len(ordered)


def _groups(A: Lines, group: float) -> Lines:
    """(groups, group): consecutive entries of the lines; a line's rest is dropped. ∞: all that was sampled."""
    if group == math.inf:
        return A.reshape(1, -1)
    return A[:, : A.shape[1] // int(group) * int(group)].reshape(-1, int(group))


def _extremes(A: Tensor) -> Ends:
    bounds = [part.aminmax() for part in row_chunks(A)]
    return min(float(low) for low, _ in bounds), max(float(high) for _, high in bounds)


def _float8(w: Lines, t: Lines) -> dict[str, Any]:
    """One of the two 8-bit floats, as a cast without a scale leaves it."""
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        of_t, of_w = (np.array_equal(torch.from_numpy(A).to(dtype).double().numpy(), A) for A in (t, w))
        if of_t and not of_w:
            return _columns(8, math.inf, _levels(t, t.shape[1])[0], _levels(w, w.shape[1])[1])
    return {}


def _uniform(w: Lines, t: Lines, ends_w: Ends, ends_t: Ends, groups: Sequence[float]) -> dict[str, Any]:
    """The uniform grid of fewest bits that t fits and w does not, with the largest of the groups that fit alike."""
    few = t[: max(2, FEW // t.shape[1])]
    for b in UNIFORM_BITS:
        errors = [_step_error(few, b, group, ends_t) for group in groups]
        group = next(group for group, error in zip(groups, errors, strict=True) if error <= min(errors) + ALIKE)
        if (
            min(errors) < GRID_ERROR
            and _step_error(t, b, group, ends_t) < GRID_ERROR
            and OFF_GRID_ERROR <= _step_error(w, b, group, ends_w) < math.inf
        ):
            return _columns(b, group, _levels(t, group)[0], _levels(w, group)[1])
    return {}


def _step_error(A: Lines, bits: int, group: float, ends: Ends) -> float:
    """Mean distance of a/step from the nearest integer where 0.5 ≤ |a/step| ≤ 24.5, for groups of one step (∞: all).

    Steps: absmax/(2^(bits−1) − 1), absmax/2^(bits−1) and range/(2^bits − 1) of the group; the one that fits best
    counts, for every 32 entries. ∞ where fewer than half of these, or than 8, have four entries in range.
    """
    length = A.shape[1] if group == math.inf else A.shape[1] // int(group) * int(group)
    short = GROUPS[-1]
    blocks = A[:, : length // short * short].reshape(len(A), -1, short)
    if group == math.inf:
        low, high = (np.full(blocks.shape[:2], end) for end in ends)
    else:
        grouped = A[:, :length].reshape(len(A), -1, int(group))
        repeat = -(-int(group) // short)
        low, high = (
            np.repeat(bound, repeat, axis=1)[:, : blocks.shape[1]]
            for bound in (grouped.min(axis=2), grouped.max(axis=2))
        )
    largest = np.maximum(high, -low)
    steps = np.stack([largest / max(1, 2 ** (bits - 1) - 1), largest / 2 ** (bits - 1), (high - low) / (2**bits - 1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.abs(blocks / steps[..., None])  # (3, lines, blocks, 32)
        inside = (q >= GRID_RANGE[0]) & (q <= GRID_RANGE[1])
        count = inside.sum(axis=3)
        errors = np.where(inside, np.abs(q - np.rint(q)), 0.0).sum(axis=3) / count
    best = np.where(count >= 4, errors, math.inf).min(axis=0)
    known = best[np.isfinite(best)]
    return float(known.mean()) if len(known) >= max(8, best.size / 2) else math.inf


def _codebook(w: Lines, t: Lines, groups: Sequence[float], most: int) -> dict[str, Any]:
    """Of the groups that hold at most so many distinct values, on any grid: fewest bits, then the largest."""
    found, in_larger = [], math.inf
    for group in groups:
        levels, of_base = _levels(t, group)[0], _levels(w, group)[1]
        # Where a larger group has hardly more values, its entries share the scale, and these are too few to count.
        own, in_larger = in_larger >= LEVEL_RATIO * levels, levels
        if 2 <= levels <= most and own and of_base >= LEVEL_RATIO * levels:
            # Of more than 64 values not all may have been seen, nor of more than 16 where few entries show each.
            counted = levels <= 16 or (levels <= 64 and _groups(t, group).shape[1] >= 8 * levels)
            bits = max(2, math.ceil(math.log2(levels))) if counted else 8
            found.append(_columns(bits, group, levels, of_base))
    return min(found, key=lambda columns: columns["grid_bits"], default={})


def _levels(A: Lines, group: float) -> tuple[float, float]:
    """(most, median) number of distinct values in a group."""
    ordered = np.sort(_groups(A, group), axis=1)
    counts = np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1) + 1
    return float(counts.max()), float(np.median(counts))


def _columns(bits: int, group: float, levels: float, of_base: float) -> dict[str, Any]:
    return {"grid_bits": float(bits), "grid_group": float(group), "grid_levels": levels, "base_levels": of_base}
