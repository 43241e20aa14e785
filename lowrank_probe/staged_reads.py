"""A file's bytes to a GPU: some threads read ahead into small page-locked buffers, from where they are copied in order.

One thread reads 1.5 to 3 GB/s of what the system has cached, a tenth of what a card takes. Page-locking memory of a
tensor's own size would stop the whole device for as long as reading it takes.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.remote_files import fill
from lowrank_probe.remote_store import Span

STAGE_BYTES: Final = 1 << 23
READERS: Final = 8
# Buffers that are being filled, or are full, for one tensor at a time.
AHEAD: Final = 4


@dataclass(frozen=True)
class _Stage:
    """A buffer, and the event after which what it held is on the device; None where that is the CPU."""

    buffer: Tensor
    copied: Any


# By device: an event is of one.
_free: dict[torch.device, deque[_Stage]] = {}


@cache
def _pool(device: torch.device) -> ThreadPoolExecutor:
    """Those of one card: another that is held up must not wait for them."""
    return ThreadPoolExecutor(READERS, thread_name_prefix="read")


def staged_runs(span: Span, start: int, sizes: Sequence[int], device: torch.device) -> Generator[Tensor, None, None]:
    """The bytes of an open file from `start` on, (size,) uint8 on the device for each of the sizes in turn.

    span: opened at `start`, to be closed when this has ended; what comes over a network is read by this thread, and not
    ahead. Each tensor is allocated when it is its turn, and copied on the stream that is current then. Raises OSError,
    and EOFError where the file ends before.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    _free.setdefault(device, deque())
    places = _pieces(start, sizes)
    coming: deque[Future[_Stage]] = deque()

    def next_one() -> _Stage:
        if not isinstance(span, FileIO):
            stage = _take(device)
            fill(_view(stage, next(places)[1]), span)
            return stage
        while len(coming) < AHEAD and (place := next(places, None)) is not None:
            coming.append(_pool(device).submit(_read, span.fileno(), *place, device))
        return coming.popleft().result()

    try:
        for size in sizes:
            out = torch.empty(size, dtype=torch.uint8, device=device)
            for piece in torch.split(out, STAGE_BYTES) if size else ():
                stage = next_one()
                piece.copy_(stage.buffer[: len(piece)], non_blocking=True)
                if stage.copied is not None:
                    stage.copied.record(torch.cuda.current_stream(device))
                _free[device].append(stage)
            yield out
    finally:
        left = [future for future in coming if not future.cancel()]
        wait(left)  # they read from the file
        _free[device].extend(future.result() for future in left if future.exception() is None)


def _pieces(start: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first byte, number of bytes) of every part of a buffer's size."""
    for size in sizes:
        for at in range(0, size, STAGE_BYTES):
            yield start + at, min(STAGE_BYTES, size - at)
        start += size


def _read(fd: int, at: int, count: int, device: torch.device) -> _Stage:
    """A buffer that begins with `count` bytes of the file from `at`."""
    stage = _take(device)
    view = _view(stage, count)
    while view:
        got = os.preadv(fd, [view], at)
        if not got:
            raise EOFError
        view, at = view[got:], at + got
    return stage


def _take(device: torch.device) -> _Stage:
    """A buffer that may be filled."""
    with suppress(IndexError):
        stage = _free[device].popleft()  # that which was copied from first
        if stage.copied is not None:
            stage.copied.synchronize()
        return stage
    on_gpu = device.type == "cuda"
    buffer = torch.empty(STAGE_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
    return _Stage(buffer, torch.cuda.Event(blocking=True) if on_gpu else None)  # type: ignore[no-untyped-call]


def _view(stage: _Stage, count: int) -> memoryview:
    return memoryview(stage.buffer.numpy().data)[:count]
