"""The safetensors format: headers, and one tensor at a time.

An 8-byte length, a JSON header, raw little-endian data: the header tells everything that matching needs, a tensor is
read with positioned reads into memory that we own, and every fault of a file becomes one clear line.
Source: the safetensors specification, version 0.4.
"""

import io
import itertools
import json
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError
from lowrank_probe.tensor_info import TORCH_DTYPES, WIDTHS, TensorInfo

MAX_HEADER: Final = 100_000_000
STAGE_BYTES: Final = 1 << 23


def read_header(file: Path) -> dict[str, TensorInfo]:
    """name → `TensorInfo` of one safetensors file, checked against each tensor's shape, the others and the file's size.

    As in the official library the tensors must fill the file from the header to its end without hole or overlap.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER:
                raise CheckpointError(f"{file}: not a safetensors file (no valid header length in its first 8 bytes)")
            if 8 + length > size:
                raise CheckpointError(
                    f"{file}: its header says {8 + length} bytes but the file has {size}; truncated? download it again"
                )
            raw = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {
            name: TensorInfo(
                name, tuple(map(int, entry["shape"])), str(entry["dtype"]), file,
                8 + length + int(entry["data_offsets"][0]), 8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{file}: not a safetensors file (its header is not the JSON the format asks for)"
        ) from None
    for info in infos.values():
        expected = _n_bytes(info)
        if info.start < 8 + length or info.n_bytes != expected:
            raise CheckpointError(
                f"{file}: tensor {info.name} {info.dtype} {info.shape} takes {expected} bytes, not {info.n_bytes}"
            )
        if info.stop > size:
            raise CheckpointError(
                f"{file}: tensor {info.name} ends at byte {info.stop} of {size}; truncated? download it again"
            )
    _check_layout(file, infos, 8 + length, size)
    return infos


def _check_layout(file: Path, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Raise `CheckpointError` unless the tensors follow each other from byte `start` to byte `size`, the end."""
    end, before = start, "the header"
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.start < end:
            raise CheckpointError(f"{file}: tensors {before} and {info.name} overlap; damaged? download it again")
        if info.start > end:
            hole = f"{info.start - end} bytes between {before} and tensor {info.name} belong to no tensor"
            raise CheckpointError(f"{file}: {hole}; damaged? download it again")
        end, before = info.stop, info.name
    if end < size:
        raise CheckpointError(
            f"{file}: {size - end} bytes after its last tensor belong to no tensor (it should end at byte {end}); "
            "damaged? download it again"
        )


def write_file(
    file: Path,
    infos: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> int:
    """Write one safetensors file, tensor by tensor: never more than one of them in memory. Returns its bytes.

    infos: (name, dtype such as "BF16", shape) in the order in which `tensors` gives them; a tensor of another dtype or
    shape than announced is a ValueError. The caller writes aside and renames.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in infos:
        n_bytes = int(math.prod(shape) * WIDTHS[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for (name, dtype, shape), tensor in zip(infos, tensors, strict=True):
            if tensor.dtype != TORCH_DTYPES.get(dtype, tensor.dtype) or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: announced as {dtype} {shape}, given {tensor.dtype} {tuple(tensor.shape)}")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)
    return 8 + len(raw) + at


def read_entries(info: TensorInfo, first: int, count: int, device: str | torch.device = "cpu") -> Tensor:
    """`count` entries from entry `first` of a tensor's flat data, (count,), in its stored dtype, in memory of our own.

    Raises `CheckpointError` where the file cannot be read, or ends inside.
    """
    dtype = TORCH_DTYPES[info.dtype]
    out = torch.empty(count, dtype=dtype, device=device)
    if count:
        fill = _fill_from_host if out.is_cuda else _fill
        try:
            with open(info.file, "rb", buffering=0) as handle:
                handle.seek(info.start + first * dtype.itemsize)
                fill(out.view(torch.uint8), handle)
        except EOFError:
            raise CheckpointError(f"{info.file}: ends inside tensor {info.name} (changed while it was read?)") from None
        except OSError as error:
            raise CheckpointError(f"{info.file}: cannot read tensor {info.name}: {error.strerror}") from None
    return out


def _fill(out: Tensor, handle: io.FileIO) -> None:
    view = memoryview(out.numpy().data)
    filled = 0
    while filled < len(view):
        got = handle.readinto(view[filled:])
        if not got:
            raise EOFError
        filled += got


_own = threading.local()


def _fill_from_host(out: Tensor, handle: io.FileIO) -> None:
    """Through two small page-locked buffers a thread, one filled while the other is copied.

    Page-locking memory of the tensor's own size stops the whole device for as long as reading it takes.
    """
    if not hasattr(_own, "stages"):
        stages = [torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        _own.stages = [(stage, torch.cuda.Event()) for stage in stages]  # type: ignore[no-untyped-call]
    for piece, (stage, copied) in zip(torch.split(out, STAGE_BYTES), itertools.cycle(_own.stages), strict=False):
        copied.synchronize()
        _fill(stage[: len(piece)], handle)
        piece.copy_(stage[: len(piece)], non_blocking=True)
        copied.record()


def _n_bytes(info: TensorInfo) -> int:
    if info.dtype not in WIDTHS:
        raise CheckpointError(f"{info.file}: tensor {info.name} has unknown dtype {info.dtype}")
    count = 1
    for length in info.shape:
        if length < 0:
            raise CheckpointError(f"{info.file}: tensor {info.name} has a negative length in its shape {info.shape}")
        count *= length
    return int(count * WIDTHS[info.dtype])
