"""Marks that kinds of updates leave on the entries of one matrix: a scale, zeros, a grid, rounding; see `kinds`.

Legend: m out, n in, W (m, n) the base's matrix, T the tuned one, D = T − W.
"""

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lowrank_probe.float64 import row_chunks
from lowrank_probe.grids import find_grid
from lowrank_probe.roundings import find_rounding

if TYPE_CHECKING:
    from lowrank_probe.deltas import Delta

# Zeros below this share of the entries are looked at no further.
FEW_ZEROS: Final = 0.02


def measure(delta: "Delta") -> dict[str, Any]:
    """The columns that tell kinds of updates apart, from the entries of one `Delta`; {} where there are none (adapter).

    One pass over T where nothing is zero, and a few rows and columns in more depth. To be called before `delta.dense`
    is overwritten.
    """
    if delta.dense is None or delta.base is None or delta.tuned is None:
        return {}
    known = delta.base_norm > 0
    return {
        "scale": delta.dot / delta.base_norm**2 if known else math.nan,
        "base_alignment": _clip(delta.dot / (delta.base_norm * delta.fro_norm)) if known else math.nan,
        **_zeros(delta.dense, delta.base, delta.tuned, delta.fro_norm),
        "grid_axis": "", "rounded_to": "", "rounded_side": "",
        **(find_grid(delta.base, delta.tuned) or find_rounding(delta)),
    }  # fmt: skip


def _clip(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))


def _zeros(D: Tensor, W: Tensor, T: Tensor, norm: float) -> dict[str, Any]:
    """`zeroed_fraction`, `zeroed_energy` and `zero_pattern`: NaN where W is all zeros."""
    n_zero, n_zeroed, square = 0, 0, 0.0
    for d, w, t in zip(row_chunks(D), row_chunks(W), row_chunks(T), strict=True):
        if float(t.abs().min()) > 0:
            continue
        gone = t == 0
        n_zero += int(torch.count_nonzero(gone))
        gone &= w != 0
        n_zeroed += int(torch.count_nonzero(gone))
        square += float(torch.linalg.vector_norm(d[gone], dtype=torch.float64)) ** 2
    n_base = W.numel()
    if n_zero:
        n_base = sum(int(torch.count_nonzero(part)) for part in row_chunks(W))
    return {
        "zeroed_fraction": n_zeroed / n_base if n_base else math.nan,
        "zeroed_energy": min(1.0, square / norm**2),
        "zero_pattern": _zero_pattern(T, n_zero) if n_zeroed > FEW_ZEROS * T.numel() else "",
    }


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
