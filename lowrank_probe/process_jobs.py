"""Small matrices in processes of their own: what is done for each is a hundred short calls, for which threads of one
process mostly wait for each other (two of them take as long as one).

The processes are forked, with the jobs and whatever these hold; only items and results pass between. Linux only.
"""

import ctypes
import io
import math
import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_probe.device_jobs import Memory
from lowrank_probe.errors import ProbeError

# Fewer small matrices than this are done before the processes pay.
MANY: Final = 200
# For more, the process that takes the results has no time.
MAX_PROCESSES: Final = 16
# Items given to each beyond the one that it does.
AHEAD: Final = 2
_PDEATHSIG: Final = 1  # of prctl
_KEPT: Final = 1 << 30  # bytes of freed memory that a process keeps for the next matrix
_TRIM_THRESHOLD: Final = -1  # of mallopt


def pays(n_small: int, cores: int, memory: Memory | None) -> bool:
    """Whether so many small matrices go to processes; not where memory is bounded, which is that of one process."""
    bounded = memory is not None and not math.isinf(memory.limit)
    return sys.platform == "linux" and cores > 1 and n_small >= MANY and not bounded


class Processes:
    """Worker processes, forked at once: to be made before threads compute, and closed.

    load, compute: as of `run_jobs`; linear algebra has one thread in each. They leave Ctrl-C to this process and end
    with it.
    """

    def __init__(self, load: Callable[[Any], Any], compute: Callable[[Any, Any], Any], cores: int) -> None:
        self.count = min(cores, MAX_PROCESSES)
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(self.count, fork, _begin, (load, compute, os.getpid()))
        self._pool.submit(os.getpid).result()  # which forks them all

    def run(self, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield compute(item, load(item)) for every item as they finish; what one raises is raised.

        Raises `ProbeError` where a process dies.
        """
        todo, running = deque(items), set[Future[bytes]]()
        try:
            while todo or running:
                while todo and len(running) < self.count * (1 + AHEAD):
                    running.add(self._pool.submit(_do, todo.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pickle.loads(future.result())
        except BrokenProcessPool:
            raise ProbeError(
                f"one of {self.count} worker processes died (killed, or out of memory?); give --memory, with which "
                "matrices stay in one process"
            ) from None
        finally:
            for future in running:
                future.cancel()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


_job: list[Callable[..., Any]] = []


def _begin(load: Callable[[Any], Any], compute: Callable[[Any, Any], Any], parent: int) -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    torch.set_num_threads(1)
    threadpool_limits(1)
    _job[:] = load, compute


def _do(item: Any) -> bytes:
    load, compute = _job
    found = io.BytesIO()
    _Pickler(found, pickle.HIGHEST_PROTOCOL).dump(compute(item, load(item)))
    return found.getvalue()


class _Pickler(pickle.Pickler):
    """Tensors as their bytes: torch's own way is a file in shared memory each."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            flat = obj.detach().cpu().contiguous()
            return _tensor, (flat.reshape(-1).view(torch.uint8).numpy(), flat.dtype, tuple(flat.shape))
        return NotImplemented


def _tensor(values: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(values).view(dtype).reshape(shape)
