"""Per-matrix jobs on GPUs: on each card the next ones are read while a few compute, all from one queue."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from queue import Queue
from typing import Any, Final, Generic, TypeVar

import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Done = TypeVar("Done")
# (load, compute, device): what is done on one card.
Card = tuple[Callable[[Item], Loaded], Callable[[Item, Loaded], Done], torch.device]

# Matrices read, copied and subtracted on a GPU's side while another is computed.
READ_AHEAD: Final = 4
# Computed beside each other there: one in the eigen-solver, the others in what follows it.
COMPUTING: Final = 3


@dataclass(frozen=True)
class Memory:
    """What jobs hold on a device, in bytes. limit: of all together; one that needs more goes alone.

    Of an item, loading: while its matrix is read; waiting: when it is; computing: in `compute`.
    """

    limit: float
    loading: Callable[[Any], float]
    waiting: Callable[[Any], float]
    computing: Callable[[Any], float]

    def most(self, item: Any) -> float:
        """Of one item, from its reading to its end."""
        return max(self.loading(item), self.computing(item))

    def holds(self, items: Sequence[Any]) -> bool:
        """Whether these may be in the works at once."""
        return math.isinf(self.limit) or sum(map(self.most, items)) <= self.limit


@dataclass(frozen=True)
class Host(Generic[Item, Loaded, Done]):
    """What the CPU does beside the cards. takes: whether an item is for it; memory, every, forks: as of `run_jobs`."""

    takes: Callable[[Item], bool]
    load: Callable[[Item], Loaded]
    compute: Callable[[Item, Loaded], Done]
    memory: Memory | None = None
    every: Sequence[int] = ()
    forks: bool = False


def device_jobs(
    queue: Sequence[Item],
    entries: Callable[[Item], int],
    cards: Sequence[Card[Item, Loaded, Done]],
    memory: Memory | None,
) -> Generator[Done, None, None]:
    """Yield compute(item, load(item)) for every item as they finish; queue: largest first; entries: of its matrix."""
    todo = _Queue(small_ones_first(queue, entries))
    here = [_read_ahead(todo, *card, memory) for card in cards]
    yield from beside_each_other(here)


def _read_ahead(
    todo: "_Queue[Item]",
    load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done],
    device: torch.device,
    memory: Memory | None,
) -> Generator[Done, None, None]:
    """READ_AHEAD threads read and copy the next items while COMPUTING others compute, each on a CUDA stream of its own.

    Several streams, because every matrix leaves the device waiting for the host (noise, deconvolution) for a while.
    """
    own = threading.local()

    def read(item: Item) -> Loaded:
        loaded = load(item)
        if device.type == "cuda":  # whoever computes does so on another stream
            torch.cuda.current_stream(device).synchronize()
        return loaded

    def job(item: Item, loaded: list[Future[Loaded]]) -> Done:
        # Taken out of the list, so that it is freed before anyone learns that it is done.
        matrix = loaded.pop().result()
        if device.type != "cuda":
            done = compute(item, matrix)
            del matrix
            return done
        if not hasattr(own, "stream"):
            own.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(own.stream):
            done = compute(item, matrix)
            # What was read belongs to another stream: nothing may run on it any more when it is freed.
            own.stream.synchronize()
        del matrix
        return done

    coming: dict[Future[Loaded], Item] = {}
    running: dict[Future[Done], Item] = {}
    room = _Room(memory, coming, running)

    with ThreadPoolExecutor(READ_AHEAD) as readers, ThreadPoolExecutor(COMPUTING) as computers:

        def refill() -> set[Future[Loaded]]:
            """Compute what is read and read what comes next, as far as there is room; small ones fill the gaps.

            Returns what is read and has to wait.
            """
            waiting = set()
            for loaded in [one for one in coming if one.done()]:
                if len(running) < COMPUTING and room.to_compute(loaded):
                    item = coming.pop(loaded)
                    running[computers.submit(job, item, [loaded])] = item
                else:
                    waiting.add(loaded)
            while len(coming) + len(running) < READ_AHEAD + COMPUTING:
                taken = todo.take(room.to_read)
                if taken is None:
                    break
                coming[readers.submit(read, taken)] = taken
            return waiting

        try:
            waiting = refill()
            while coming or running:
                pending: list[Future[Any]] = [*running, *(one for one in coming if one not in waiting)]
                waiting.clear()  # what they hold is to be freed
                wait(pending, return_when=FIRST_COMPLETED)
                del pending
                done = [one for one in running if one.done()]
                for one in done:
                    del running[one]
                waiting = refill()  # before whoever consumes takes its time
                for one in done:
                    yield one.result()
                if done:
                    waiting = refill()  # what was read meanwhile
        finally:
            dropped: list[Future[Any]] = [*coming, *running]
            for future in dropped:
                future.cancel()


class _Queue(Generic[Item]):
    """What is still to do, for whoever takes it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items, self.taking = deque(items), threading.Lock()

    def take(self, fits: Callable[[Item], bool]) -> Item | None:
        """The next one that fits; the last, which is the smallest, where the first does not. None without any."""
        with self.taking:
            if self.items and fits(self.items[0]):
                return self.items.popleft()
            if self.items and fits(self.items[-1]):
                return self.items.pop()
            return None


def beside_each_other(streams: Sequence[Generator[Done, None, None]]) -> Iterator[Done]:
    """What several generators yield, each in a thread of its own; the first exception ends them all.

    No more than a few results of each wait for whoever consumes them.
    """
    found: Queue[tuple[Any, BaseException | None] | None] = Queue(COMPUTING * len(streams))
    stop = threading.Event()

    def run(stream: Generator[Done, None, None]) -> None:
        try:
            with closing(stream):
                for done in stream:
                    found.put((done, None))
                    if stop.is_set():
                        break
        except BaseException as error:
            found.put((None, error))
        finally:
            found.put(None)

    threads = [
        threading.Thread(target=run, args=(one,), name=f"device-{i}", daemon=True) for i, one in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    left = len(threads)
    try:
        while left:
            told = found.get()
            if told is None:
                left -= 1
                continue
            done, error = told
            if error is not None:
                raise error
            yield done
    finally:
        stop.set()
        while left:  # one that waits for room in the queue gets it
            left -= found.get() is None
        for thread in threads:
            thread.join()


class _Room:
    """Whether another item fits on the device, beside what is coming and running there."""

    def __init__(
        self, memory: Memory | None, coming: Mapping[Future[Any], Any], running: Mapping[Future[Any], Any]
    ) -> None:
        self.memory, self.coming, self.running = memory, coming, running

    def to_compute(self, loaded: Future[Any]) -> bool:
        """Whether one that was read may be computed: beside all else, or as the first of what was read, alone."""
        if self.memory is None or (not self.running and loaded is next(iter(self.coming))):
            return True
        more = self.memory.computing(self.coming[loaded]) - self._held(loaded)
        return self._computing() + more + self._coming() <= self.memory.limit

    def to_read(self, item: Any) -> bool:
        """Whether one may be read, so that all that was read can still be computed, one after the other."""
        if self.memory is None or not (self.coming or self.running):
            return True
        left = self.memory.limit - self.memory.loading(item)
        if self._computing() + self._coming() > left:
            return False
        for loaded in reversed([*self.coming]):  # each beside those that were read after it
            if self.memory.computing(self.coming[loaded]) > left:
                return False
            left -= self._held(loaded)
        return True

    def _computing(self) -> float:
        assert self.memory is not None
        return sum(self.memory.computing(item) for item in self.running.values())

    def _coming(self) -> float:
        return sum(self._held(loaded) for loaded in self.coming)

    def _held(self, loaded: Future[Any]) -> float:
        assert self.memory is not None
        item = self.coming[loaded]
        return self.memory.waiting(item) if loaded.done() else self.memory.loading(item)


def small_ones_first(queue: Sequence[Item], entries: Callable[[Item], int]) -> list[Item]:
    """Largest first, behind a few of the smallest, which compute while it is read.

    No more than make up one largest together, and one fewer than a card computes at once, so that it need not wait for
    them all.
    """
    order = deque(queue)
    first, left = list[Item](), entries(queue[0]) if queue else 0
    while order and left > 0 and len(first) < COMPUTING - 1:
        first.append(order.pop())
        left -= entries(first[-1])
    return [*first, *order]
