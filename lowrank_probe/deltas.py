"""Read a pair of matrices, or one adapter's factors: one `Delta` a matrix that changed, else its line of the ledger.

Legend: m out, n in; ΔW = W_tuned − W_base, upcast first and subtracted after: float64 where a side is stored in
float32 or wider, else float32: exact for two bf16 or two fp16 values of similar size, and what is lost of others is
measured.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import NumericsError
from lowrank_probe.float64 import CHUNK_ENTRIES, DEVICE_ENTRIES, row_chunks
from lowrank_probe.layers import Place
from lowrank_probe.layouts import Part
from lowrank_probe.ledger import ledger_line
from lowrank_probe.matching import Pair
from lowrank_probe.torch_dtypes import TORCH_DTYPES

# Entries taken at a time on a GPU. Of sides that are read run by run: few, as they wait beside what is computed.
READ_ENTRIES: Final = DEVICE_ENTRIES // 8
# Of sides that lie there whole: many, as every launch waits for those of an eigen-solver.
PART_ENTRIES: Final = DEVICE_ENTRIES // 2
# Parts of (ΔW, the base, the tuned), of which the first is still to be set.
Runs = Iterator[tuple[Tensor, Tensor, Tensor]]


@dataclass(eq=False)
class Delta:
    """One matrix of an update. Who needs ΔW or the sides no more sets them to None, and they are freed.

    shape: (m, n) as (out, in). dense: (m, n) float32 or float64, or None for an adapter, which stays `factors` =
    (B (m, r), A (r, n), scaling). base, tuned: the stored values as (m, n), None for an adapter or an absent base.
    cosine: of both sides; dot: ⟨ΔW, W_base⟩, summed in the precision of ΔW; both NaN for an adapter, and where the
    sides were not kept.
    quantized: at least one side was dequantized, so that its rounding is not that of its values' type.
    lost: ‖E‖_F of what rounding to float32 left out of ΔW; 0 where the sides were not kept.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    base_dtype: str
    tuned_dtype: str
    fro_norm: float
    base_norm: float
    cosine: float
    dense: Tensor | None = None
    factors: tuple[Tensor, Tensor, float] | None = None
    base: Tensor | None = None
    tuned: Tensor | None = None
    quantized: bool = False
    dot: float = math.nan
    lost: float = 0.0

    @property
    def relative_update(self) -> float:
        """‖ΔW‖_F / ‖W_base‖_F; NaN without a base or for a base of zeros."""
        return self.fro_norm / self.base_norm if self.base_norm > 0 else math.nan


def read_pair(
    pair: Pair, base: Checkpoint | None, tuned: Checkpoint, device: torch.device, W: Tensor | None = None,
    *, thin: bool = False, sides: bool = True,
) -> Delta | dict[str, Any]:  # fmt: skip
    """Read one pair: a `Delta` for a changed matrix, else its ledger line (unchanged, vector).

    W: the base's matrix (m, n) as stored, where it was read before. thin: whether a matrix with a side of 1 is a
    `Delta` too, not a vector. sides: whether the stored values are kept beside ΔW; without them (and without cosine
    and dot) it takes half of the memory, where they lie in a file as they are (`streams`) also while it is read.

    Raises `NumericsError` naming tensor and file for NaN or Inf, `CheckpointError` for a dtype that is no float.
    """
    if pair.lora is not None:
        return _read_lora(pair, base, tuned, device, W)
    assert base is not None
    before, after = base.tensors[pair.name], tuned.tensors[pair.tuned_name]
    a = b = None
    if sides or W is not None or not streams(pair, base, tuned):
        a = read_part(base, pair.name, pair.part, device) if W is None else W
        b = read_part(tuned, pair.tuned_name, pair.part, device)
        delta = spilling.empty(b.shape, _wide(a.dtype, b.dtype), device)
        parts: Runs = zip(_parts(delta), _parts(a), _parts(b), strict=True)
    else:
        delta, parts = _streamed(pair, base, tuned, device)
    narrow = sides and delta.dtype == torch.float32
    sums = torch.zeros(3 + sides + narrow, dtype=torch.float64, device=device)
    products, squares = sums[0], sums[1:]
    for out, y, x in parts:
        x, y = x.to(delta.dtype), y.to(delta.dtype)
        torch.sub(x, y, out=out)
        norms = [_norm(y), _norm(out)]
        if sides:
            norms.append(_norm(x))
            products += torch.dot(out.reshape(-1), y.reshape(-1))
        if narrow:
            norms.append(_norm(_lost(x, y, out)))
        squares += torch.stack(norms).square_()
    told = sums.tolist()
    dot, base_sq, delta_sq, tuned_sq = [*told, math.nan][:4]
    if not math.isfinite(base_sq + delta_sq):  # and so the tuned
        _raise_not_finite([(base, pair.name), (tuned, pair.tuned_name)], pair.part)
    norm, base_norm = math.sqrt(delta_sq), math.sqrt(base_sq)
    relative = norm / base_norm if base_norm > 0 else math.nan
    if norm == 0.0:
        return ledger_line(pair, "unchanged", fro_norm=0.0, relative=0.0)
    if delta.ndim < 2 or (min(delta.shape) == 1 and not thin):
        return ledger_line(pair, "vector", fro_norm=norm, relative=relative)
    product = math.sqrt(base_sq * tuned_sq)
    cosine = max(-1.0, min(1.0, (base_sq + tuned_sq - delta_sq) / (2 * product))) if product > 0 else math.nan
    return Delta(
        pair.key, pair.place, (delta.shape[0], delta.shape[1]), before.dtype, after.dtype, norm, base_norm, cosine,
        dense=delta, base=a if sides else None, tuned=b if sides else None,
        quantized=before.quantized or after.quantized, lost=math.sqrt(told[4]) if narrow else 0.0,
        dot=dot if sides else math.nan,
    )  # fmt: skip


def streams(pair: Pair, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether both sides can be read run by run: in a file as they are, in the same order, and nothing between."""
    stored = [(base, pair.name), (tuned, pair.tuned_name)]
    if not all(side.lies_flat(name) for side, name in stored):
        return False
    shape = base.tensors[pair.name].shape
    if len(shape) < 2 or tuned.tensors[pair.tuned_name].shape != shape:
        return False
    return pair.part.span(shape)[1] == math.prod(pair.part.shape(shape))


def _streamed(pair: Pair, base: Checkpoint, tuned: Checkpoint, device: torch.device) -> tuple[Tensor, Runs]:
    """(ΔW (m, n), its entries still to be set; the runs of it, of the base and of the tuned, read one by one)."""
    shape = base.tensors[pair.name].shape
    first, count = pair.part.span(shape)
    dtype = _wide(*(TORCH_DTYPES[side.dtype] for side in (base.tensors[pair.name], tuned.tensors[pair.tuned_name])))
    flat = spilling.empty((count,), dtype, device)
    outs = torch.split(flat, CHUNK_ENTRIES if flat.is_cpu else READ_ENTRIES)
    counts = [len(out) for out in outs]
    runs = (side.read_runs(name, first, counts, device) for side, name in ((base, pair.name), (tuned, pair.tuned_name)))
    return pair.part.take_span(flat, shape), zip(outs, *runs, strict=True)


def _wide(*stored: torch.dtype) -> torch.dtype:
    return torch.float64 if max(dtype.itemsize for dtype in stored) >= 4 else torch.float32


def read_part(side: Checkpoint, name: str, part: Part, device: torch.device) -> Tensor:
    """One matrix of one side, (m, n), in its stored dtype; reads nothing else of the file where it is in one piece."""
    stored = side.tensors[name].shape
    if len(stored) < 2:
        return side.read(name, device)
    return part.take_span(side.read(name, device, part.span(stored)), stored)


def find_tied(pairs: Sequence[Pair], base: Checkpoint, tuned: Checkpoint) -> dict[str, str]:
    """name → the earlier tensor it equals on both sides: an lm_head that is a copy of the embedding."""
    tied: dict[str, str] = {}
    for head in (p for p in pairs if p.place.layer_type == "lm_head"):
        for table in (p for p in pairs if p.place.layer_type == "embedding"):
            sides = ((base, head.name, table.name), (tuned, head.tuned_name, table.tuned_name))
            headers = [(side.tensors[x], side.tensors[y]) for side, x, y in sides]
            same_header = all(x.shape == y.shape and x.dtype == y.dtype for x, y in headers)
            if same_header and all(_same(*side) for side in sides):
                tied[head.name] = table.name
    return tied


def _same(side: Checkpoint, a: str, b: str, block: int = 1 << 21) -> bool:
    """Whether two tensors of one checkpoint hold the same numbers; stops at the first block that differs."""
    if side.tensors[a].quantized or a in side.loaders:
        return torch.equal(side.read(a), side.read(b))
    count = math.prod(side.tensors[a].shape)
    for first in range(0, count, block):
        span = (first, min(block, count - first))
        if not torch.equal(side.read(a, span=span), side.read(b, span=span)):
            return False
    return True


def _read_lora(
    pair: Pair, base: Checkpoint | None, adapter: Checkpoint, device: torch.device, W: Tensor | None
) -> Delta | dict[str, Any]:
    assert pair.lora is not None
    module = pair.lora
    B, A = module.read(adapter, device)
    # ‖BA‖_F² = tr((BᵀB)(AAᵀ)), r×r only.
    B64, A64 = B.double(), A.double()
    square = float(((B64.T @ B64) * (A64 @ A64.T)).sum())
    norm = abs(module.scaling) * math.sqrt(max(0.0, square))
    base_norm = math.nan
    if base is not None:
        W = read_part(base, pair.name, pair.part, device) if W is None else W
        base_norm = math.sqrt(_sum_squares(W))
        if not math.isfinite(base_norm):
            _raise_not_finite([(base, pair.name)], pair.part)
    if norm == 0.0:
        return ledger_line(pair, "unchanged", "the adapter's product B·A is zero", 0.0, 0.0)
    return Delta(
        pair.key, pair.place, (B.shape[0], A.shape[1]), base.tensors[pair.name].dtype if base else "",
        adapter.tensors[module.name_A].dtype, norm, base_norm, math.nan, factors=(B, A, module.scaling),
    )  # fmt: skip


def _lost(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x − y − out, exactly, for out = fl(x − y) in their precision. Source: Knuth, TAOCP 2, 4.2.2 (TwoSum)."""
    minus_y = out - x
    lost = out - minus_y
    torch.sub(x, lost, out=lost)
    return lost.sub_(minus_y.add_(y))


def _sum_squares(A: Tensor) -> float:
    return sum(float(_norm(part)) ** 2 for part in _parts(A))


def _norm(part: Tensor) -> Tensor:
    """‖part‖_F, () float64."""
    norm: Tensor = torch.linalg.vector_norm(part, dtype=torch.float64)
    return norm


def _parts(A: Tensor) -> Iterable[Tensor]:
    return row_chunks(A.unsqueeze(1) if A.ndim == 1 else A, device_entries=PART_ENTRIES) if A.ndim else (A,)


def _raise_not_finite(tensors: Sequence[tuple[Checkpoint, str]], part: Part) -> NoReturn:
    for side, name in tensors:
        tensor = read_part(side, name, part, torch.device("cpu"))
        nan, inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
        if nan or inf:
            what = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "Inf")) if count)
            raise NumericsError(
                f"{name} in {side.tensors[name].file}: contains {what} (expected finite weights); "
                f"leave it out with --exclude {name}"
            )
    raise NumericsError(f"{tensors[0][1]}: its norm or its difference overflows although every entry is finite")
