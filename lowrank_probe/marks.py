"""Marks that kinds of updates leave on the entries of one matrix: zeros, a scale, a grid. One pass; see `kinds`.

Legend: m out, n in, W (m, n) the base's matrix, T the tuned one, D = T − W, g consecutive entries that share one scale.
"""

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lowrank_probe.svd import row_chunks

if TYPE_CHECKING:
    from lowrank_probe.deltas import Delta

# So many entries of whole rows are looked at for a grid, in 4 to 16 rows.
SAMPLE: Final = 8192
GROUPS: Final = (32, 64, 128)
# Values on a grid against their base: a group of 32 random bf16 weights has 28 to 32 distinct values, a 4-bit one at
# most 16. The base must have this many times more, so that a base that is itself dequantized shows nothing.
LEVEL_RATIO: Final = 1.5
# Mean distance of w/step from the next integer, |w/step| ≤ 24.5: 0.25 for values on no grid, 0.18 with the best of
# three steps; 0.02 for 8-bit values stored in bf16; 0.13 where only every second group has the right step.
GRID_ERROR: Final = 0.08
OFF_GRID_ERROR: Final = 0.15
GRID_RANGE: Final = (0.5, 24.5)
# Zeros below this share of the entries are looked at no further.
FEW_ZEROS: Final = 0.02


def measure(delta: "Delta") -> dict[str, Any]:
    """The columns that tell kinds of updates apart, from the entries of one `Delta`; {} where there are none (adapter).

    One pass over the rows in chunks, and a few rows in more depth. To be called before `delta.dense` is overwritten.
    """
    if delta.dense is None or delta.base is None or delta.tuned is None:
        return {}
    dot, n_zeroed, n_zero, zeroed_square = 0.0, 0, 0, 0.0
    for D, W, T in zip(row_chunks(delta.dense), row_chunks(delta.base), row_chunks(delta.tuned), strict=True):
        D, W = D.reshape(-1), W.reshape(-1)
        dot += float(torch.dot(D, W.to(D.dtype)))
        zeros = T.numel() - int(torch.count_nonzero(T))
        if zeros:
            n_zero += zeros
            gone = (T.reshape(-1) == 0) & (W != 0)
            n_zeroed += int(torch.count_nonzero(gone))
            zeroed_square += float(torch.linalg.vector_norm(D[gone], dtype=torch.float64)) ** 2
    size, square = delta.dense.numel(), delta.fro_norm**2
    zeroed = 0.0 if delta.base_norm > 0 else math.nan
    if n_zeroed:
        zeroed = n_zeroed / sum(int(torch.count_nonzero(W)) for W in row_chunks(delta.base))
    found: dict[str, Any] = {
        "scale": dot / delta.base_norm**2 if delta.base_norm > 0 else math.nan,
        "base_alignment": _clip(dot / (delta.base_norm * delta.fro_norm)) if delta.base_norm > 0 else math.nan,
        "zeroed_fraction": zeroed,
        "zeroed_energy": min(1.0, zeroed_square / square),
        "zero_pattern": _zero_pattern(delta.tuned, n_zero) if n_zeroed > FEW_ZEROS * size else "",
    }
    n_rows = min(delta.shape[0], max(4, min(16, SAMPLE // delta.shape[1])))
    rows = torch.linspace(0, delta.shape[0] - 1, n_rows).long().to(delta.dense.device)
    grid = _grid(delta.base[rows].cpu(), delta.tuned[rows].cpu())  # hundreds of small steps: no work for a device
    if grid and grid["grid_group"] == math.inf:  # one scale for the matrix
        grid["grid_group"] = float(size)
    return found | grid


def _clip(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def _zero_pattern(T: Tensor, n_zero: int) -> str:
    """ "rows" or "columns" where the zeros of T (m, n) are whole ones, "2:4" where every four neighbours have two."""
    m, n = T.shape
    row, col, fours = 0, torch.zeros(n, dtype=torch.bool, device=T.device), n % 4 == 0
    for part in row_chunks(T):
        alive = part != 0
        row += int((~alive.any(dim=1)).sum())
        col |= alive.any(dim=0)
        fours = fours and bool((alive.reshape(-1, 4).sum(dim=1) <= 2).all())
    if row * n == n_zero:
        return "rows"
    if int((~col).sum()) * m == n_zero:
        return "columns"
    return "2:4" if fours else ""


def _grid(W: Tensor, T: Tensor) -> dict[str, Any]:
    """The quantization grid that the sampled tuned rows T lie on and the base's rows W do not; {} where there is none.

    Up to 4 bits by counting: at most 16 distinct values in every group. 8 bits by counting a row (or all that was
    sampled) where that is long enough, else by whether the values of a group are multiples of absmax/127, absmax/128
    or range/255.
    """
    n = T.shape[1]
    if n < GROUPS[0]:
        return {}
    T, W = T.double() if T.dtype == torch.float64 else T.float(), W.double() if W.dtype == torch.float64 else W.float()
    groups = (n, *(group for group in reversed(GROUPS) if group < n))
    # Almost every matrix is on no grid, and 512 entries show it: what is not on one there, is on none.
    few = T[: 512 // n + 1]
    if (
        _n_levels(few, groups[-1])[0] > 16
        and _n_levels(few, n)[0] > min(256, n / LEVEL_RATIO)
        and min(_grid_errors(few, groups)) >= GRID_ERROR
    ):
        return {}
    W = torch.where(T == 0, 0.0, W)  # what is pruned has fewer values, on either side
    if _n_levels(T, groups[-1])[0] <= 16:
        for group in (T.numel(), *groups):
            levels = _n_levels(T, group)[0]
            if levels <= 16 and (found := _on_grid(W, group, levels, T.numel())):
                return found
    levels = _n_levels(T, n)[0]
    if levels <= min(256, n / LEVEL_RATIO):
        whole = _n_levels(T, T.numel())[0]
        for group, count in ((T.numel(), whole), (n, levels)):
            if count <= 256 and (found := _on_grid(W, group, count, T.numel())):
                return found
    errors = _grid_errors(T, groups)
    error, group = min(zip(errors, groups, strict=True))
    if error < GRID_ERROR and not _grid_errors(W, (group,))[0] < OFF_GRID_ERROR:
        most, of_base = _n_levels(T, group)[0], _n_levels(W, group)[1]
        return {"grid_bits": 8.0, "grid_group": float(group), "grid_levels": most, "base_levels": of_base}
    return {}


def _on_grid(W: Tensor, group: int, levels: float, sampled: int) -> dict[str, Any]:
    of_base = _n_levels(W, group)[1]
    if levels < 2 or of_base < LEVEL_RATIO * levels:
        return {}
    bits = max(2, math.ceil(math.log2(levels))) if levels <= 16 else 8
    size = math.inf if group == sampled else float(group)
    return {"grid_bits": float(bits), "grid_group": size, "grid_levels": float(levels), "base_levels": of_base}


def _n_levels(A: Tensor, group: int) -> tuple[float, float]:
    """(most, median) number of distinct values in a group of so many consecutive entries of a row."""
    flat = A.reshape(1, -1) if group == A.numel() else A[:, : A.shape[1] // group * group].reshape(-1, group)
    ordered = flat.sort(dim=1).values
    counts = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1
    return float(counts.max()), float(counts.float().median())


def _grid_errors(A: Tensor, groups: tuple[int, ...]) -> list[float]:
    """For each group size: mean distance of w/step from the nearest integer where 0.5 ≤ |w/step| ≤ 24.5.

    Of three steps the one that fits best counts, for every 32 entries; ∞ where too few of these have four entries in
    range. The steps come from the largest and smallest value of the group.
    """
    short = GROUPS[0]
    n_short = min(A.shape[1] // group * group for group in groups) // short
    steps = []
    for group in groups:
        low, high = A[:, : A.shape[1] // group * group].reshape(A.shape[0], -1, group).aminmax(dim=2)
        largest = torch.maximum(high, -low)
        step = torch.stack([largest / 127, largest / 128, (high - low) / 255])
        steps.append(step.repeat_interleave(max(1, -(-group // short)), dim=2)[..., :n_short])
    blocks = A[:, : n_short * short].reshape(A.shape[0], n_short, short)
    q = (blocks / torch.stack(steps)[..., None]).abs_()  # (groups, 3, rows, n/32, 32)
    inside = (q >= GRID_RANGE[0]) & (q <= GRID_RANGE[1])
    count = inside.sum(dim=4)
    error = (q - q.round()).abs_().mul_(inside).nan_to_num_().sum(dim=4).div_(count)
    best = error.masked_fill_(count < 4, math.inf).amin(dim=1).flatten(1)
    known = best.isfinite()
    mean = best.masked_fill(~known, 0).sum(dim=1) / known.sum(dim=1)
    return [float(error) for error in mean.masked_fill(known.sum(dim=1) < 8, math.inf)]
