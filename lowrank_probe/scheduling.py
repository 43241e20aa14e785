"""Run per-matrix jobs: on a CPU in worker threads, or small ones in processes; on a GPU a few at a time, while the
next ones are being read.

Linear algebra of small matrices does not fill several cores, so matrices run beside each other, each on its share of
the cores. How many may be in memory at once is bounded by the largest one: beside each other, matrices never hold more
than 72 % of its entries, so that it alone sets the memory needed, unless all are small.
"""

import bisect
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Final

import torch
from threadpoolctl import threadpool_limits

from lowrank_probe.device_jobs import Card, Done, Host, Item, Loaded, Memory, beside_each_other, device_jobs
from lowrank_probe.devices import computing, started
from lowrank_probe.malloc import KEPT, TRIMMED_FROM, set_malloc, trim
from lowrank_probe.process_jobs import Processes, pays

MAX_WORKERS: Final = 4
# Matrices of so many entries are small: up to MAX_SMALL go beside each other, which is what Python keeps busy.
SMALL: Final = 1 << 18
MAX_SMALL: Final = 8
SHARE_OF_LARGEST: Final = 0.72
# For so long a thread keeps Python while another waits for it; 5 ms is Python's own.
TURN_S: Final = 1e-4
# So many entries may be beside each other however small the largest matrix is: 100 MB in all.
TOGETHER: Final = 1 << 22


def run_jobs(
    items: Sequence[Item],
    entries: Callable[[Item], int],
    load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done],
    device: torch.device,
    memory: Memory | None = None,
    largest: int = 0,
    every: Sequence[int] = (),
    cluster: bool = False,
    others: Sequence[Card[Item, Loaded, Done]] = (),
    host: Host[Item, Loaded, Done] | None = None,
    forks: bool = False,
) -> Generator[Done, None, None]:
    """Yield compute(item, load(item)) for every item as they finish, largest first; an exception ends the run.

    entries: the size of an item's matrix. memory: what is held on the device, where that is bounded. largest: entries
    of the largest matrix that the run reads at all, where that is none of the items; every: of all matrices of the
    run, where some are finished already. On a CPU they set how many go beside each other, and so the threads of each,
    with which the last digits move: not by what is left to do. cluster: as tasks of Ray (`cluster`). others: further
    GPUs of the same kind, which take items from the same queue. host: what the CPU does beside them. forks: whether
    load and compute may run in forked processes, where many matrices are small (`process_jobs`): those come after the
    large ones. Closing the iterator (Ctrl-C) waits for what is running and drops the rest.
    """
    if cluster:
        from lowrank_probe.cluster import cluster_jobs

        computing()
        yield from cluster_jobs(items, entries, load, compute, device, memory)
        return
    with ExitStack() as stack:
        stack.enter_context(_quick_turns())
        queue = sorted(items, key=entries, reverse=True)
        if device.type == "cpu":
            processes = stack.enter_context(_processes(forks, every or [*map(entries, queue)], load, compute, memory))
            yield from _cpu_jobs(queue, entries, load, compute, memory, largest, every, processes)
            return
        set_malloc(TRIMMED_FROM)
        mine, streams = queue, []
        if host is not None:
            mine = [item for item in queue if not host.takes(item)]
            if on_host := [item for item in queue if host.takes(item)]:
                processes = stack.enter_context(
                    _processes(host.forks, host.every, host.load, host.compute, host.memory)
                )
                streams.append(
                    _cpu_jobs(on_host, entries, host.load, host.compute, host.memory, 0, host.every, processes)
                )
        if mine:
            streams.append(device_jobs(mine, entries, [(load, compute, device), *others], memory))
        yield from beside_each_other(streams)


def _processes(
    forks: bool, every: Sequence[int], load: Callable[[Item], Loaded], compute: Callable[[Item, Loaded], Done],
    memory: Memory | None,
) -> AbstractContextManager[Processes | None]:  # fmt: skip
    """Processes for the small ones of all matrices of a run, of so many entries each; None where they do not pay, or
    the system has none left.

    By all of them, not by what is left to do: their linear algebra has one thread there.
    """
    cores = torch.get_num_threads()
    if not forks or not pays(sum(size for size in every if size <= SMALL), cores, memory):
        return nullcontext()
    started()
    try:
        return Processes(load, compute, cores)
    except OSError:
        return nullcontext()


def _cpu_jobs(
    queue: list[Item],
    entries: Callable[[Item], int],
    load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done],
    memory: Memory | None,
    largest: int,
    every: Sequence[int],
    processes: Processes | None,
) -> Generator[Done, None, None]:
    """`run_jobs` on the CPU; queue: largest first, used up; processes: for the small ones."""
    if processes is not None:
        n_large = sum(entries(item) > SMALL for item in queue)
        large, small = queue[:n_large], queue[n_large:]
        yield from _cpu_jobs(large, entries, load, compute, memory, largest, every, None)
        yield from processes.run(small)
        return
    cores = torch.get_num_threads()
    sizes = [entries(item) for item in queue]
    every = sorted(every or sizes, reverse=True)
    largest = max([largest, *every[:1]])
    limit = max(SHARE_OF_LARGEST * largest, TOGETHER)
    workers, share = _workers(every, limit, cores)

    def job(item: Item) -> Done:
        loaded = load(item)
        computing()
        return compute(item, loaded)

    if workers == 1:
        torch.set_num_threads(1)  # numpy's BLAS has the cores; torch's threads would spin beside it
        try:
            with _freed_memory_kept():
                for item in queue:
                    yield job(item)
        finally:
            torch.set_num_threads(cores)
        return
    running: dict[Future[Done], Item] = {}
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
                    fits = sum(map(entries, running.values())) + entries(item) <= limit
                    if not running or (fits and (memory is None or memory.holds([*running.values(), item]))):
                        queue.remove(item)
                        running[pool.submit(job, item)] = item
                if not queue:
                    set_malloc(TRIMMED_FROM)
                for future in finished:  # while the next ones compute
                    yield future.result()
                finished = wait(running, return_when=FIRST_COMPLETED).done
                for future in finished:
                    del running[future]
        finally:
            for future in running:
                future.cancel()
            torch.set_num_threads(cores)


_turns, _n_quick, _usual_turn_s = threading.Lock(), 0, 0.0


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Within it a thread that comes back to Python waits for it a fiftieth as long as it would.

    What launches kernels or calls BLAS comes back after every one of them, which took three times as long beside a
    thread that only runs Python, as importing does.
    """
    global _n_quick, _usual_turn_s
    with _turns:
        if not _n_quick:
            _usual_turn_s = sys.getswitchinterval()
            sys.setswitchinterval(TURN_S)
        _n_quick += 1
    try:
        yield
    finally:
        with _turns:
            _n_quick -= 1
            if not _n_quick:
                sys.setswitchinterval(_usual_turn_s)


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
    set_malloc(KEPT)
    try:
        yield
    finally:
        set_malloc(TRIMMED_FROM)
        trim()  # all but the top of a thread's heap, which goes as the last matrices are freed


def _workers(sizes: Sequence[int], limit: float, cores: int) -> tuple[int, int]:
    """(how many go beside each other, the threads of each); limit: entries of all together.

    As many as fit most of the time. Of small matrices one a core: their linear algebra has nothing to share out. sizes:
    descending; what is typical is where half of all entries is reached, so that vectors say nothing of matrices.
    """
    if not sizes:
        return 1, cores
    sums = list(itertools.accumulate(sizes))
    typical = sizes[bisect.bisect_left(sums, sums[-1] / 2)]
    most = MAX_SMALL if typical <= SMALL else MAX_WORKERS
    workers = max(1, min(cores, most, int(limit / max(1, typical))))
    return workers, 1 if typical <= SMALL else max(1, cores // workers)
