"""Run per-matrix jobs: in worker threads on a CPU; on a GPU a few at a time, while the next ones are being read.

Linear algebra of small matrices does not fill several cores, so matrices run beside each other, each on its share of
the cores. How many may be in memory at once is bounded by the largest one: beside each other, matrices never hold more
than 72 % of its entries, so that it alone sets the memory needed.
"""

import ctypes
import math
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Done = TypeVar("Done")

MAX_WORKERS: Final = 4
# Matrices read, copied and subtracted on a GPU's side while another is computed.
READ_AHEAD: Final = 4
# Computed beside each other there: one in the eigen-solver, the others in what follows it.
COMPUTING: Final = 3
SHARE_OF_LARGEST: Final = 0.72
# glibc: bytes from which a block is mapped by itself, and its default for giving the top of a heap back.
MAPPED_FROM: Final = 10_000_000
TRIMMED_FROM: Final = 1 << 17
_glibc = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt") else None


def run_jobs(
    items: Sequence[Item],
    entries: Callable[[Item], int],
    load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done],
    device: torch.device,
    in_flight: float = math.inf,
    largest: int = 0,
    cluster: bool = False,
) -> Generator[Done, None, None]:
    """Yield compute(item, load(item)) for every item as they finish, largest first; an exception ends the run.

    entries: the size of an item's matrix. in_flight: on a GPU no more entries are held at once than this many times
    those of the largest item. largest: entries of the largest matrix that the run reads at all, where that is none of
    the items: on a CPU it sets how many go beside each other. cluster: as tasks of Ray (`cluster`). Closing the
    iterator (Ctrl-C) waits for what is running and drops the rest.
    """
    if cluster:
        from lowrank_probe.cluster import cluster_jobs

        yield from cluster_jobs(items, entries, load, compute, device)
        return
    queue = sorted(items, key=entries, reverse=True)
    cores = torch.get_num_threads()
    sizes = [entries(item) for item in queue]
    largest = max([largest, *sizes[:1]])
    workers = _workers(sizes, largest, cores) if device.type == "cpu" else 1
    if device.type != "cpu":
        _set_malloc(TRIMMED_FROM)
        order = _small_ones_first(queue, entries)
        yield from _read_ahead(order, load, compute, device, entries, in_flight * entries(queue[0]) if queue else 0)
        return

    def job(item: Item) -> Done:
        return compute(item, load(item))

    if workers == 1:
        torch.set_num_threads(1)  # numpy's BLAS has the cores; torch's threads would spin beside it
        try:
            with _freed_memory_kept():
                for item in queue:
                    yield job(item)
        finally:
            torch.set_num_threads(cores)
        return
    share = max(1, cores // workers)
    limit = SHARE_OF_LARGEST * largest
    running: dict[Future[Done], int] = {}
    finished: set[Future[Done]] = set()
    with (
        _freed_memory_kept(),
        threadpool_limits(share),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool,
    ):
        try:
            while queue or running or finished:
                # The largest that fits beside what is running.
                for item in list(queue):
                    if len(running) == workers:
                        break
                    if not running or sum(running.values()) + entries(item) <= limit:
                        queue.remove(item)
                        running[pool.submit(job, item)] = entries(item)
                if not queue:
                    _set_malloc(TRIMMED_FROM)
                for future in finished:  # while the next ones compute
                    yield future.result()
                finished = wait(running, return_when=FIRST_COMPLETED).done
                for future in finished:
                    del running[future]
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(cores)


def _read_ahead(
    queue: Sequence[Item],
    load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done],
    device: torch.device,
    entries: Callable[[Item], int],
    limit: float,
) -> Iterator[Done]:
    """READ_AHEAD threads read and copy the next items while COMPUTING others compute, each on a CUDA stream of its own.

    Several streams, because every matrix leaves the device waiting for the host (noise, deconvolution) for a while.
    """
    own = threading.local()

    def read(item: Item) -> Loaded:
        loaded = load(item)
        if device.type == "cuda":  # whoever computes does so on another stream
            torch.cuda.current_stream(device).synchronize()
        return loaded

    def job(item: Item, loaded: Future[Loaded]) -> Done:
        if device.type != "cuda":
            return compute(item, loaded.result())
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(own.stream):
            done = compute(item, loaded.result())
            # What was read belongs to another stream: nothing may run on it any more when it is freed.
            own.stream.synchronize()
        return done

    todo = deque(queue)
    coming: deque[tuple[Item, Future[Loaded]]] = deque()
    running: dict[Future[Done], Item] = {}

    def fits(item: Item) -> bool:
        held = [*running.values(), *(item for item, _ in coming)]
        return not held or (len(held) < READ_AHEAD + COMPUTING and sum(map(entries, held)) + entries(item) <= limit)

    with ThreadPoolExecutor(READ_AHEAD) as readers, ThreadPoolExecutor(COMPUTING) as computers:
        try:
            while True:
                while todo and fits(todo[0]):
                    item = todo.popleft()
                    coming.append((item, readers.submit(read, item)))
                while coming and len(running) < COMPUTING:
                    item, loaded = coming.popleft()
                    running[computers.submit(job, item, loaded)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    yield future.result()
        finally:
            for _, loaded in coming:
                loaded.cancel()
            for future in running:
                future.cancel()


def _small_ones_first(queue: Sequence[Item], entries: Callable[[Item], int]) -> list[Item]:
    """Largest first, behind the smallest ones that together make up one largest: they compute while it is read."""
    order = deque(queue)
    first, left = [], entries(queue[0]) if queue else 0
    while order and left > 0:
        first.append(order.pop())
        left -= entries(first[-1])
    return [*first, *order]


@contextmanager
def interruptible(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C only asks to stop, between two matrices; the function yielded says whether it was pressed.

    A second Ctrl-C raises at once; if `patient`, none does. Outside of the main thread Ctrl-C keeps its meaning.
    """
    asked = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and not patient:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _freed_memory_kept() -> Iterator[None]:
    """Within it what a matrix frees serves the next one; at its end the system gets it back.

    Every page that comes from the system is cleared first, which takes a tenth of the time of matrices of 1024 × 1024.
    """
    _set_malloc(1 << 30)
    try:
        yield
    finally:
        _set_malloc(TRIMMED_FROM)
        if _glibc is not None:
            _glibc.malloc_trim(0)  # all but the top of a thread's heap, which goes as the last matrices are freed


def _set_malloc(trimmed_from: int) -> None:
    """Have glibc map large matrices by themselves and unmap them when freed, and give the top of a heap back to the
    system when so many bytes of it are free."""
    if _glibc is not None:
        _glibc.mallopt(-1, trimmed_from)  # M_TRIM_THRESHOLD
        _glibc.mallopt(-3, MAPPED_FROM)  # M_MMAP_THRESHOLD; by default up to 32 MiB, as it finds fit
        _glibc.mallopt(-8, 1)  # M_ARENA_MAX: worker threads share one heap


def _workers(sizes: Sequence[int], largest: int, cores: int) -> int:
    """As many as fit beside each other most of the time, within the largest matrix's memory."""
    if not sizes:
        return 1
    typical = sorted(sizes)[len(sizes) // 2]
    return max(1, min(cores, MAX_WORKERS, int(SHARE_OF_LARGEST * largest / max(1, typical))))
