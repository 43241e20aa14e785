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
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_probe.device_jobs import Memory
from lowrank_probe.errors import WorkerDiedError
from lowrank_probe.malloc import KEPT, set_malloc

# Entries of all small matrices from which processes pay: those of 128 of 256 × 256 take a core a second.
MANY: Final = 1 << 23
# For more, the process that takes the results has no time.
MAX_PROCESSES: Final = 16
# Items given to each beyond the one that it does.
AHEAD: Final = 2
_PDEATHSIG: Final = 1  # of prctl
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def pays(entries: int, cores: int, memory: Memory | None) -> bool:
    """Whether small matrices of so many entries in all go to processes; not where memory is bounded, which is that of
    one process, and not where this one may have none (`multiprocessing.Pool`'s workers)."""
    bounded = memory is not None and not math.isinf(memory.limit)
    alone = multiprocessing.current_process().daemon
    return sys.platform == "linux" and cores > 1 and entries >= MANY and not bounded and not alone


class Processes:
    """Worker processes, forked at once: to be made before threads compute, and closed.

    load, compute: as of `run_jobs`; linear algebra has one thread in each. They leave Ctrl-C to this process, and end
    with the thread that made them. Raises OSError where the system has no more processes.
    """

    def __init__(self, load: Callable[[Any], Any], compute: Callable[[Any, Any], Any], cores: int) -> None:
        self.count = min(cores, MAX_PROCESSES)
        fork = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(self.count, fork, _begin, (load, compute, os.getpid()))
        try:
            with _held_back(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
                begun = self._pool.submit(os.getpid)  # which forks them all
            begun.result()
        except BrokenProcessPool as error:
            self._end()
            raise self._died() from error
        except BaseException:
            self._end()
            raise

    def run(self, items: Sequence[Any]) -> Generator[Any, None, None]:
        """Yield compute(item, load(item)) for every item as they finish; what one raises is raised.

        Raises `WorkerDiedError` where a process dies.
        """
        todo, running = deque(items), set[Future[bytes]]()
        try:
            while todo or running:
                while todo and len(running) < self.count * (1 + AHEAD):
                    running.add(self._pool.submit(_do, todo.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pickle.loads(future.result())
        except BrokenProcessPool as error:
            raise self._died() from error
        finally:
            for future in running:
                future.cancel()

    def _died(self) -> WorkerDiedError:
        return WorkerDiedError(
            f"one of {self.count} worker processes died (killed, or out of memory?); with --memory matrices stay in "
            "one process"
        )

    def _end(self) -> None:
        for process in [*(self._pool._processes or {}).values()]:
            process.kill()
            process.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)


_job: list[Callable[..., Any]] = []


def _begin(load: Callable[[Any], Any], compute: Callable[[Any, Any], Any], parent: int) -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    set_malloc(KEPT)
    torch.set_num_threads(1)
    threadpool_limits(1)
    _job[:] = load, compute


def _do(item: Any) -> bytes:
    load, compute = _job
    found = io.BytesIO()
    try:
        _Pickler(found, pickle.HIGHEST_PROTOCOL).dump(compute(item, load(item)))
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # those that cannot be pickled raise what they like
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        raise
    return found.getvalue()


@contextmanager
def _held_back() -> Iterator[None]:
    """Within it this thread, and a process forked by it, holds Ctrl-C and SIGTERM back: a new process still has what
    this one does on them, and the pool ends it by SIGTERM where another one died."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pickler(pickle.Pickler):
    """Tensors as their bytes: torch's own way is a file in shared memory each."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            flat = obj.detach().cpu().contiguous()
            return _tensor, (flat.reshape(-1).view(torch.uint8).numpy(), flat.dtype, tuple(flat.shape))
        return NotImplemented


def _tensor(values: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(values).view(dtype).reshape(shape)
