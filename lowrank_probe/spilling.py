"""Matrices that do not fit in memory: their tensors in files on disk, mapped, so that the system keeps what it can.

A file has no name, goes with its tensor, and nothing stays behind where the process is killed. Results are what they
are in memory, to the last bit for a tall matrix; the Gram matrix of a wide one is summed in larger blocks.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lowrank_probe.errors import OutputError
from lowrank_probe.words import file_size

# Below this many bytes a tensor is in memory anyway.
LEAST: Final = 1 << 22
_folder: Final[ContextVar[Path | None]] = ContextVar("folder", default=None)


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Within it, in this thread, what `empty` gives for the CPU lies in files of a folder."""
    before = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(before)


def active() -> bool:
    """Whether this thread is within `on_disk`."""
    return _folder.get() is not None


def empty(shape: Sequence[int], dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor:
    """torch.empty of a contiguous tensor; within `on_disk` a mapped file where it is for the CPU and not small.

    Raises `OutputError` naming the folder where the disk has no room for it.
    """
    folder, n_bytes = _folder.get(), math.prod(shape) * dtype.itemsize
    if folder is None or torch.device(device).type != "cpu" or n_bytes < LEAST:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), n_bytes)
            mapped = mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        raise OutputError(
            f"{folder}: no room for {file_size(n_bytes)} of a matrix that is larger than --memory ({error.strerror}); "
            "give --out on a larger disk, or more --memory"
        ) from None
    return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))


def _reserve(file: int, n_bytes: int) -> None:
    """Blocks of the disk, now: writing to a mapped page for which there is none would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, n_bytes)
    else:
        os.truncate(file, n_bytes)
