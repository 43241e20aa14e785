"""What storage rounding does to ΔW: the noise edge, the unchanged fraction, and what can still be decided.

Legend: m out, n in; ulp(w) the distance between neighbouring storage values at w; W_tuned = stored values.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import deadzone, spilling
from lowrank_probe.deltas import Delta
from lowrank_probe.explained_ranks import explained_rank
from lowrank_probe.float64 import mm, row_chunks
from lowrank_probe.metrics import Values
from lowrank_probe.svd import leading_triplet

# storage type → (bits of the significand after the leading one, exponent of the smallest step)
_FORMATS: Final = {"BF16": (7, -133), "F16": (10, -24), "F32": (23, -149), "F64": (52, -1074)}
_ORDER: Final = ("BF16", "F16", "F32", "F64")
# Up to this share of unchanged entries the rounding errors of a pair behave as independent noise.
DEAD_ZONE_FROM: Final = 0.25
# Rounding errors that carry less than this share of ‖ΔW‖² cannot have swallowed a quarter of the entries.
LEAST_NOISE: Final = 1e-4
# Draws of the noise whose largest σ is its edge. Where one draw says that σ₁ moves by a share of at most STEADY, to
# first order, that largest is RISE of it above the one, within 2 % (tests/test_precision.py): less than the first order
# says, since u and v follow. Simulated: 0.2 to 0.35 for even and uneven noise, 0.4 (normal: 0.6) for one coarse row.
# The coarsest entry counts as if u and v had COARSEST of their weight on it: its error may be small in this one draw.
DRAWS: Final = 3
STEADY: Final = 0.1
RISE: Final = 0.33
COARSEST: Final = 0.3
_STD: Final = {"uniform": 12**-0.5, "normal": 1.0}
_SEED: Final = 0x10_0A4B_E000
# The lowest bit of each 16: without even numbers the steps lie evenly around 0.
_ODD: Final = np.uint64(0x0001_0001_0001_0001)


@dataclass(frozen=True)
class StorageNoise:
    """What storing W_tuned in `storage` did to ΔW.

    model: "none" (an adapter: its factors are the update), "rounding" (independent errors, uniform in ±ulp/2),
    "dead-zone" (a known quantizer; then `corrected` (m, n) is ΔW plus errors of known size) or "quantized" (a side was
    dequantized: its errors are not known here, and nothing is decided).
    noise_std: rms error of an entry; noise_edge: the largest σ those errors produce alone; edge_ratio: that edge over
    noise_std·(√m + √n); outliers: those of its ten largest σ that lie beyond that textbook edge. fro_norm: ‖ΔW‖_F
    without the error. resolved: the share of ‖ΔW‖² that the stored entries resolve. Both are NaN where the model does
    not apply. shape: (rows, columns that moved at all), the matrix that all of this is about: a row of zeros carries
    neither update nor error. explained: the least rank that explains ΔW as it is stored (`explained_ranks`); None where
    none was found, and for larger ones.
    """

    storage: str
    model: str
    unchanged_fraction: float
    noise_std: float
    noise_edge: float
    edge_ratio: float
    outliers: NDArray[np.float64]
    fro_norm: float
    resolved: float
    shape: tuple[int, int]
    corrected: Tensor | None = None
    explained: int | None = None


def storage_of(W: Tensor) -> str:
    """The precision the values really have: a bf16 model saved as float32 says "BF16"."""
    if W.dtype == torch.bfloat16:
        return "BF16"
    if W.dtype == torch.float16:
        return "F16"
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        if W.dtype == dtype or all(torch.equal(c.to(dtype).to(c.dtype), c) for c in row_chunks(W)):
            return name
    return "F64"


def ulp(W: Tensor, storage: str) -> Tensor:
    """The distance between neighbouring values of `storage` at each entry of W, (m, n); at 0, the smallest.

    2^(⌊log₂|w|⌋ − bits): bf16 keeps 7 bits after the leading one, fp16 10, fp32 23. bfloat16, which holds every power
    of two above 2^−126 exactly; smaller steps are given as that.
    """
    bits, smallest = _FORMATS[storage]
    steps = spilling.empty(W.shape, torch.bfloat16, W.device)
    for out, part in zip(row_chunks(steps), row_chunks(W), strict=True):
        # The exponent field of a float32 is 2^⌊log₂|w|⌋ once the significand is masked out.
        power = (part.float().view(torch.int32) & 0x7F800000).view(torch.float32)
        out.copy_(power.mul_(2.0**-bits).clamp_(min=2.0 ** max(smallest, -126)))
    return steps


@dataclass(frozen=True)
class Stored:
    """What of both sides the noise depends on: with it they can be freed.

    storage: of the tuned side. steps: (m, n) bfloat16, the width of each error. square: mean square error of an entry.
    n_moved: entries that moved; moved: (rows, columns) where anything did, of which all of this is; None: everywhere.
    on_grid: whether training started from stored values, so that each entry of ΔW is known to half a step; of fp32 and
    wider asked only where much was swallowed. dead_zone: that and much swallowed: the errors are a known quantizer's.
    """

    storage: str
    steps: Tensor
    square: float
    n_moved: int
    moved: tuple[Tensor, Tensor] | None
    on_grid: bool
    dead_zone: bool


def look(delta: Delta, *, base_rounded: bool = False) -> Stored | None:
    """What `assess` needs of both sides of one `Delta`; None where it needs none (an adapter, a quantized side).

    base_rounded: training started from a wider base than the one stored, so that the base's own rounding counts too.
    """
    if delta.quantized or delta.dense is None or delta.tuned is None or delta.base is None:
        return None
    moved, n_moved = _where_moved(delta.dense)
    tuned, base = (side if moved is None else _taken(side, *moved) for side in (delta.tuned, delta.base))
    storage = storage_of(tuned)
    steps = ulp(tuned, storage)
    square, entries = _mean_square(steps) / 12, steps.numel()
    # Zeros that rounding cannot have made (a frozen half, in fp32) are part of the update.
    hidden = (entries - n_moved) / entries
    swallowed = hidden > DEAD_ZONE_FROM and entries * square > LEAST_NOISE * delta.fro_norm**2
    if base_rounded:
        for both, other in zip(row_chunks(steps), row_chunks(ulp(base, storage_of(base))), strict=True):
            both.copy_(torch.hypot(both, other))
        square = _mean_square(steps) / 12
    known = not base_rounded and (swallowed or storage in ("BF16", "F16")) and on_grid(base, storage)
    return Stored(storage, steps, square, n_moved, moved, known, known and swallowed)


def assess(delta: Delta, stored: Stored | None, values: Values, seed: int = 0) -> StorageNoise:
    """Measure the storage noise of one `Delta`. stored: what `look` gave; values: the singular values of ΔW as stored.
    Where there is any, ΔW is overwritten, and `delta.dense` is None afterwards."""
    nan = math.nan
    if delta.quantized:
        return StorageNoise(
            delta.tuned_dtype, "quantized", _unchanged(delta), nan, nan, nan, np.zeros(0), nan, 0.0, delta.shape
        )
    if stored is None or delta.dense is None:
        return StorageNoise(
            "exact", "none", math.nan, 0.0, 0.0, math.nan, np.zeros(0), delta.fro_norm, 1.0, delta.shape
        )
    storage, steps, square = stored.storage, stored.steps, stored.square
    dense = delta.dense if stored.moved is None else _taken(delta.dense, *stored.moved)
    delta.dense = None
    m, n = dense.shape
    entries = math.prod(delta.shape)
    unchanged = (entries - stored.n_moved) / entries
    explained = None
    if stored.on_grid:
        # Of independent errors no edge is lower; those of a quantizer are corrected first, and known after only.
        least = 0.0 if stored.dead_zone else math.sqrt(square) * (math.sqrt(m) + math.sqrt(n))
        explained = explained_rank(dense, steps, values, delta.fro_norm, square, counted_from=least)
    if stored.dead_zone:
        found = deadzone.correct(dense, steps)
        if found is None:
            return StorageNoise(storage, "dead-zone", unchanged, nan, nan, nan, np.zeros(0), nan, nan, (m, n))
        scratch = spilling.empty((m, n), torch.float32, dense.device)
        edge, outliers = noise_edge(scratch, found.error_std, "normal", seed)
        square = _mean_square(found.error_std)
        return _noise(
            storage, "dead-zone", unchanged, square, edge, outliers, (m, n), found.fro_norm, found.resolved, found.Y,
            explained,
        )  # fmt: skip
    # ΔW itself is not needed any more: its memory serves for the draws.
    scratch = dense.view(torch.float32).reshape(-1)[: m * n].view(m, n)
    edge, outliers = noise_edge(scratch, steps, "uniform", seed)
    clean = max(0.0, delta.fro_norm**2 - m * n * square)
    share = clean / delta.fro_norm**2 if delta.fro_norm > 0 else 0.0
    return _noise(
        storage, "rounding", unchanged, square, edge, outliers, (m, n), math.sqrt(clean), share, None, explained
    )


def _unchanged(delta: Delta) -> float:
    return math.nan if delta.dense is None else 1 - int(torch.count_nonzero(delta.dense)) / delta.dense.numel()


def _where_moved(dense: Tensor) -> tuple[tuple[Tensor, Tensor] | None, int]:
    """((rows, columns) where anything moved (an embedding trains the rows it saw), or None where everything did; how
    many entries moved)."""
    in_rows = []
    columns = torch.zeros(dense.shape[1], dtype=torch.bool, device=dense.device)
    for part in row_chunks(dense):
        moved = part != 0
        in_rows.append(_count_by_rows(moved))
        if not bool(columns.all()):
            columns |= moved.any(dim=0)
    counts = torch.cat(in_rows)
    rows, n_moved = counts > 0, int(counts.sum())
    return (None if bool(rows.all()) and bool(columns.all()) else (rows, columns)), n_moved


def _taken(A: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The rows (m,) and columns (n,) of A (m, n) that are marked, a few rows at a time."""
    out = spilling.empty((int(rows.sum()), int(columns.sum())), A.dtype, A.device)
    at = start = 0
    for part in row_chunks(A):
        found = part[rows[start : start + len(part)]][:, columns]
        out[at : at + len(found)] = found
        at, start = at + len(found), start + len(part)
    return out


def _count_by_rows(marked: Tensor) -> Tensor:
    """How many of each row are true, (rows,); numpy's takes a fifth of the time of torch's."""
    if not marked.is_cpu:
        return torch.count_nonzero(marked, dim=1)
    return torch.from_numpy(np.asarray(np.count_nonzero(marked.numpy(), axis=1)))


def _noise(
    storage: str, model: str, unchanged: float, square: float, edge: float, outliers: NDArray[np.float64],
    shape: tuple[int, int], fro_norm: float, resolved: float, corrected: Tensor | None, explained: int | None,
) -> StorageNoise:  # fmt: skip
    std = math.sqrt(square)
    textbook = std * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    ratio = edge / textbook if textbook > 0 else math.nan
    return StorageNoise(
        storage, model, unchanged, std, edge, ratio, outliers[outliers > textbook], fro_norm, resolved, shape,
        corrected, explained,
    )  # fmt: skip


def on_grid(W: Tensor, storage: str) -> bool:
    """Whether every value of W is one that `storage` can hold, as where training started from the stored base."""
    return _ORDER.index(storage_of(W)) <= _ORDER.index(storage) and (storage_of(W), storage) != ("BF16", "F16")


def noise_edge(
    scratch: Tensor, scale: Tensor, law: Literal["uniform", "normal"], seed: int = 0
) -> tuple[float, NDArray[np.float64]]:
    """(edge, leading σ) of a matrix (m, n) of independent errors: the largest σ that is expected of `DRAWS` of it, and
    one draw's leading σ.

    scratch: (m, n) float32, overwritten by the draws. scale: (m, n), the errors' width: ulp for the uniform law (errors
    in ±ulp/2), standard deviation for the normal one. Simulated with each entry's own scale, because rows and columns
    of real weights round unevenly and the textbook edge misses by up to 3 ×. One draw says how far it would move in
    others; where that is much (a few coarse entries) the others are made. An error in ±ulp/2 is never more than half
    of the largest step, so that the edge is at least that: no single entry's error is a signal. Seeded: a run repeats.
    """
    E = scratch
    # Away from the seeds people give their models: the very draws that made W would not be independent of its steps.
    generator, bits = torch.Generator(device=E.device).manual_seed(_SEED + seed), np.random.SFC64(_SEED + seed)
    unit = float(scale.max())
    if unit == 0.0:
        return 0.0, np.zeros(0)
    least = unit / 2 if law == "uniform" else 0.0
    draw_values: list[NDArray[np.float64]] = []
    while len(draw_values) < DRAWS:
        # Relative to the largest scale: squares of the steps of tiny weights underflow in float32.
        if law == "uniform" and E.is_cpu:
            _draw_uniform(E, scale, unit, bits)
        else:
            E.uniform_(-0.5, 0.5, generator=generator) if law == "uniform" else E.normal_(generator=generator)
            for out, part in zip(row_chunks(E), row_chunks(scale), strict=True):
                out.mul_(part.float() / unit)
        values, u, v = leading_triplet(E, generator)
        if not draw_values and values[0] > 0:
            along, error = _along(scale, unit, u, v), _STD[law] / float(values[0])
            if max(along, COARSEST) * error <= STEADY:
                return max(least, float(values[0]) * unit * (1 + RISE * along * error)), values * unit
        draw_values.append(values * unit)
    return max(least, *(float(values[0]) for values in draw_values)), draw_values[0]


def _along(scale: Tensor, unit: float, u: Tensor, v: Tensor) -> float:
    """√Σ u_i²·(scale_ij/unit)²·v_j²: what errors of that standard deviation add to uᵀEv."""
    v2 = v.square()
    rows = [mm((part.float() / unit).square_(), v2) for part in row_chunks(scale)]
    return math.sqrt(float(u.square() @ torch.cat(rows)))


def _draw_uniform(E: Tensor, scale: Tensor, unit: float, bits: np.random.SFC64) -> None:
    """E_ij uniform in ±½·scale_ij/unit: the odd ones of 2¹⁶ steps, which costs a quarter of what torch's numbers do."""
    for out, part in zip(row_chunks(E), row_chunks(scale), strict=True):
        raw = bits.random_raw(-(-out.numel() // 4))
        raw |= _ODD
        steps = raw.view(np.int16)[: out.numel()].reshape(out.shape)
        np.multiply(steps, (part.float() * (1 / (65536 * unit))).numpy(), out=out.numpy())


def _mean_square(scale: Tensor) -> float:
    total = sum(float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2 for part in row_chunks(scale))
    return total / scale.numel()
