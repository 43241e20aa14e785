"""The safetensors format: files written, and read one tensor at a time.

An 8-byte length, a JSON header (`safetensors_headers`), raw little-endian data: a tensor is
read with positioned reads into memory that we own, and every fault of a file becomes one clear line.
Source: the safetensors specification, version 0.4.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_files import fill, open_span
from lowrank_probe.staged_reads import staged_runs
from lowrank_probe.tensor_info import WIDTHS, TensorInfo
from lowrank_probe.torch_dtypes import TORCH_DTYPES


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
    [found] = read_runs(info, first, [count], device)
    return found


def read_runs(
    info: TensorInfo, first: int, counts: Sequence[int], device: str | torch.device = "cpu"
) -> Iterator[Tensor]:
    """As `read_entries`, one run of `counts` entries after the other, each (count,) in memory of its own."""
    dtype = TORCH_DTYPES[info.dtype]
    if not sum(counts):
        yield from (torch.empty(0, dtype=dtype, device=device) for _ in counts)
        return
    start, sizes = info.start + first * dtype.itemsize, [count * dtype.itemsize for count in counts]
    device = torch.device(device)
    try:
        with closing(open_span(info.file, start, start + sum(sizes))) as handle:
            if device.type == "cuda":
                with closing(staged_runs(handle, start, sizes, device)) as runs:  # before the file
                    for out in runs:
                        yield out.view(dtype)
                return
            for count in counts:
                out = spilling.empty((count,), dtype, device)
                fill(memoryview(out.view(torch.uint8).numpy().data), handle)
                yield out
    except EOFError:
        raise CheckpointError(f"{info.file}: ends inside tensor {info.name} (changed while it was read?)") from None
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot read tensor {info.name}: {error.strerror}") from None
