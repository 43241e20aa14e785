"""Per-matrix jobs: everything once, largest first, within the memory of the largest, and errors come out."""

import sys
import threading
import time
import weakref

import pytest
import torch

from lowrank_probe.cluster import grouped
from lowrank_probe.device_jobs import COMPUTING, READ_AHEAD, Host, Memory, small_ones_first
from lowrank_probe.scheduling import MAX_WORKERS, SHARE_OF_LARGEST, TOGETHER, TURN_S, run_jobs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads():
    """Pretend to four cores, so that workers run beside each other on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4, "run_jobs must give the threads back"
    torch.set_num_threads(before)


def identity(item):
    return item


def large(item):
    """Entries of an item that is not small, whatever its number."""
    return item * TOGETHER


def jobs(items, job, device, entries=identity):
    """`run_jobs` on items that are their own sizes, with nothing to load."""
    return run_jobs(items, entries, identity, lambda item, _: job(item), device)


@pytest.mark.parametrize("items", [[], [5], [3, 1, 2], [100, *range(1, 40)], [7] * 20, [0, 0, 0]], ids=str)
def test_every_item_comes_back_once(items):
    assert sorted(jobs(items, identity, CPU)) == sorted(items)


def test_one_after_the_other_largest_first_where_nothing_fits_beside():
    order = []
    assert list(jobs([3, 9, 9, 1], lambda item: order.append(item) or item, CPU, large)) == [9, 9, 3, 1]
    assert order == [9, 9, 3, 1]


def test_matrices_beside_each_other_stay_within_a_share_of_the_largest():
    sizes = [1000, *([200] * 12), *([50] * 12)]
    lock, running, peaks, most = threading.Lock(), [], [], []

    def job(size):
        with lock:
            running.append(size)
            if len(running) > 1:
                peaks.append(sum(running))
            most.append(len(running))
        time.sleep(0.005)
        with lock:
            running.remove(size)
        return size

    assert sorted(jobs(sizes, job, CPU, large)) == sorted(sizes)
    assert 1 < max(most) <= MAX_WORKERS
    assert max(peaks) <= SHARE_OF_LARGEST * 1000


def test_a_larger_matrix_elsewhere_lets_more_go_beside_each_other():
    lock, running, peaks = threading.Lock(), [], []

    def job(size):
        with lock:
            running.append(size)
            peaks.append(sum(running))
        time.sleep(0.005)
        with lock:
            running.remove(size)
        return size

    for largest, most in ((0, 10), (100, 40)):
        peaks.clear()
        stream = run_jobs([10] * 12, large, identity, lambda item, _: job(item), CPU, largest=large(largest))
        assert list(stream) == [10] * 12
        assert 10 <= max(peaks) <= most
    assert max(peaks) > 10


@pytest.mark.parametrize("sizes", [[10, 9, 8], [100] + [1] * 10], ids=["serial", "parallel"])
def test_an_error_of_a_job_ends_the_run(sizes):
    def job(size):
        if size == min(sizes):
            raise ValueError("planted")
        return size

    with pytest.raises(ValueError, match="planted"):
        list(jobs(sizes, job, CPU))


def test_closing_waits_for_what_runs_and_drops_the_rest():
    started, finished = [], []

    def job(size):
        started.append(size)
        time.sleep(0.01)
        finished.append(size)
        return size

    stream = jobs([100] + [1] * 50, job, CPU)
    next(stream)
    next(stream)
    stream.close()
    assert sorted(started) == sorted(finished)
    assert len(started) < 51


def test_workers_share_the_cores():
    def threads(sizes):
        return set(run_jobs(sizes, large, identity, lambda item, _: torch.get_num_threads(), CPU, largest=large(10)))

    assert threads([3] * 12) == {2}, "two beside each other, on half of the cores each"
    assert threads([1] * 12) == {1}
    assert threads([3] * 12 + [0] * 100) == {2}, "vectors say nothing of the matrices"


def test_what_is_left_of_a_run_has_the_threads_of_the_whole():
    def threads(left, every):
        jobs_left = run_jobs(
            left, large, identity, lambda item, _: torch.get_num_threads(), CPU, largest=large(10),
            every=[*map(large, every)],
        )  # fmt: skip
        return set(jobs_left)

    assert threads([1], [3] * 12 + [1]) == {2}
    assert threads([1], [1]) == {1}


def test_small_matrices_have_a_core_each():
    assert set(jobs([1 << 16] * 12, lambda _: torch.get_num_threads(), CPU)) == {1}


ELSEWHERE = torch.device("meta")  # any device that is no CPU: what runs there is the caller's business


@pytest.mark.parametrize("items", [[], [5], [3, 1, 2], [*range(40)]], ids=str)
def test_on_a_device_every_item_comes_back_once(items):
    assert sorted(jobs(items, identity, ELSEWHERE)) == sorted(items)


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        ([30, 20, 9, 8, 8, 7, 5, 1], [1, 5, 30, 20, 9, 8, 8, 7]),  # one place is left for the largest
        ([30, 29, 28], [28, 29, 30]), ([30, 30, 30], [30, 30, 30]), ([3], [3]), ([], []),
    ],
    ids=str,
)  # fmt: skip
def test_on_a_device_a_few_small_items_go_before_the_largest(sizes, order):
    assert COMPUTING == 3
    assert small_ones_first(sizes, identity) == order


@pytest.mark.parametrize("device", [CPU, ELSEWHERE], ids=str)
def test_threads_take_quick_turns_and_only_while_there_is_work(device):
    before = sys.getswitchinterval()
    assert [*jobs([1, 2], lambda _: sys.getswitchinterval(), device)] == pytest.approx([TURN_S, TURN_S])
    assert sys.getswitchinterval() == before
    first, second = (jobs([1, 2], identity, ELSEWHERE) for _ in range(2))
    assert {next(first), next(second)} <= {1, 2}
    first.close()
    assert sys.getswitchinterval() == pytest.approx(TURN_S), "the other still works"
    second.close()
    assert sys.getswitchinterval() == before


def test_on_a_device_some_are_computed_beside_each_other_while_the_next_are_read():
    begun, finished, lock = [], [], threading.Lock()
    together, enough = threading.Barrier(COMPUTING, timeout=10), threading.Event()

    def load(item):
        with lock:
            begun.append(item)
            assert len(begun) <= len(finished) + 2 * COMPUTING + READ_AHEAD
            if len(begun) == COMPUTING + READ_AHEAD:
                enough.set()
        return 10 * item

    def compute(item, loaded):
        assert loaded == 10 * item
        together.wait()
        assert enough.wait(10), "nothing was read ahead"
        with lock:
            finished.append(item)
        return item

    items = [7] * (6 * COMPUTING)
    assert sorted(run_jobs(items, identity, load, compute, ELSEWHERE)) == items


class Matrix:
    """What was read; alive as long as anyone holds it."""


def held_at_most(sizes, memory):
    """The most that was held at once, by the stages in which items were found until what was read of them was freed."""
    stages, most, lock = {}, [], threading.Lock()
    cost = {"loading": memory.loading, "waiting": memory.waiting, "computing": memory.computing}

    def now(name, stage):
        with lock:
            stages[name] = stage
            most.append(sum(cost[one](size) for (size, _), one in stages.items()))

    def load(name):
        now(name, "loading")
        time.sleep(0.002)
        now(name, "waiting")
        matrix = Matrix()
        weakref.finalize(matrix, stages.pop, name)
        return matrix

    def compute(name, matrix):
        now(name, "computing")
        time.sleep(0.002)
        return name

    names = list(zip(sizes, range(len(sizes)), strict=True))
    by_size = Memory(memory.limit, *(lambda name, f=f: f(name[0]) for f in cost.values()))
    done = list(run_jobs(names, lambda name: name[0], load, compute, ELSEWHERE, by_size))
    assert sorted(done) == sorted(names)
    return max(most)


@pytest.mark.parametrize("sizes", [[10, 10, 10, 10, 4, 3, 2, 1], [10] * 12, [*range(1, 11)] * 3], ids=str)
def test_on_a_device_no_more_is_held_than_asked_for(sizes):
    memory = Memory(60.0, lambda size: 2.5 * size, lambda size: size, lambda size: 3.0 * size)
    assert 30 <= held_at_most(sizes, memory) <= 60


@pytest.mark.parametrize("sizes", [[10] * 6 + [1], [7] * 5 + [10] * 5 + [1] * 3], ids=str)
def test_on_a_device_what_waits_is_counted_with_the_largest_that_is_computed(sizes):
    # Behind small ones more could be read than leaves room for the first large one.
    memory = Memory(50.0, identity, identity, lambda size: 3.0 * size)
    assert 30 <= held_at_most(sizes, memory) <= 50


def test_on_a_device_what_is_read_while_the_consumer_takes_its_time_is_computed_at_once():
    taken, third = threading.Event(), threading.Event()

    def load(item):
        return item != 3 or taken.wait(10)

    def compute(item, loaded):
        if item == 3:
            third.set()
        return item, loaded and (item != 2 or third.wait(2))

    stream = run_jobs([3, 2, 1], identity, load, compute, ELSEWHERE)
    assert next(stream) == (1, True)
    taken.set()
    time.sleep(0.1)
    assert sorted(stream) == [(2, True), (3, True)]


def test_on_a_device_one_that_needs_more_goes_alone():
    assert held_at_most([10, 10, 10], Memory(5.0, identity, identity, identity)) == 10


def test_on_a_device_an_error_of_reading_ends_the_run():
    def load(size):
        if size == 2:
            raise ValueError("planted")
        return size

    stream = run_jobs([5, 4, 3, 2, 1], identity, load, lambda item, _: item, ELSEWHERE)
    with pytest.raises(ValueError, match="planted"):
        list(stream)


def by_card(items, n_cards, work, **asked):
    """`run_jobs` on several devices; `work(card, item)` is what each computes."""
    cards = [(identity, lambda item, _, card=card: work(card, item), ELSEWHERE) for card in range(n_cards)]
    return run_jobs(items, identity, *cards[0], others=cards[1:], **asked)


@pytest.mark.parametrize("items", [[], [5], [3, 1, 2], [*range(40)]], ids=str)
def test_on_several_devices_every_item_comes_back_once(items):
    assert sorted(by_card(items, 3, lambda card, item: item)) == sorted(items)


def test_on_several_devices_all_of_them_compute_at_once():
    together = threading.Barrier(2, timeout=10)
    seen = set()

    def work(card, item):
        if card not in seen:
            seen.add(card)
            together.wait()  # passed only where the other one computes, too
        return item

    assert sorted(by_card([1] * 20, 2, work)) == [1] * 20
    assert seen == {0, 1}


def test_on_several_devices_each_has_its_own_memory():
    memory = Memory(10.0, identity, identity, identity)
    both = threading.Barrier(2, timeout=10)
    # One matrix fills a card: two at once are only possible on two cards.
    done = list(by_card([10, 10], 2, lambda card, item: both.wait() + item - item, memory=memory))
    assert sorted(done) == [0, 1]


def test_on_several_devices_an_error_on_one_ends_the_run():
    def work(card, item):
        if item == 7:
            raise ValueError("planted")
        return item

    with pytest.raises(ValueError, match="planted"):
        list(by_card([*range(200)], 3, work))
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


def test_on_several_devices_closing_stops_them_all():
    started = []
    stream = by_card([*range(500)], 2, lambda card, item: started.append(item) or item)
    next(stream)
    stream.close()
    n = len(started)
    assert n < 500
    time.sleep(0.05)
    assert len(started) == n
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


@pytest.mark.parametrize("items", [[12, 4, 30, 11, 10, 2], [12, 30], [4, 2], []], ids=str)
def test_beside_devices_the_cpu_does_what_is_its_own(items):
    host = Host(lambda item: item > 10, identity, lambda item, _: (item, "host"))
    done = list(run_jobs(items, identity, identity, lambda item, _: (item, "card"), ELSEWHERE, host=host))
    assert sorted(done) == sorted((item, "host" if item > 10 else "card") for item in items)
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


def test_beside_devices_the_cpu_computes_at_the_same_time():
    together = threading.Barrier(2, timeout=10)
    host = Host(lambda item: item == 7, identity, lambda item, _: together.wait() + item)
    done = run_jobs([7, 3], identity, identity, lambda item, _: together.wait() + item, ELSEWHERE, host=host)
    assert sum(done) == 7 + 3 + 1


def test_small_matrices_go_beside_each_other_however_small_the_largest_is():
    together = threading.Barrier(4, timeout=10)
    assert list(jobs([1 << 20] * 4, lambda item: together.wait() * 0 + item, CPU)) == [1 << 20] * 4


def test_matrices_beside_each_other_stay_within_the_memory_that_was_asked_for():
    lock, running, most = threading.Lock(), [], []

    def compute(item, _):
        with lock:
            running.append(item)
            most.append(sum(running))
        time.sleep(0.005)
        with lock:
            running.remove(item)
        return item

    memory = Memory(25.0, identity, identity, identity)
    items = [100, *[10] * 12]
    assert sorted(run_jobs(items, identity, identity, compute, CPU, memory)) == sorted(items)
    assert max(total for total in most if total != 100) <= 25


@pytest.mark.parametrize("broken", [None, 450])
def test_on_several_devices_few_results_wait_for_a_slow_consumer(broken):
    started = []

    def work(card, item):
        started.append(item)
        if item == broken:
            raise ValueError("planted")
        return item

    stream = by_card([*range(500)], 2, work)
    next(stream)
    before = 0
    while len(started) > before:
        before = len(started)
        time.sleep(0.2)
    assert before < 60
    if broken is None:
        stream.close()
    else:
        with pytest.raises(ValueError, match="planted"):
            list(stream)
    assert not [one for one in threading.enumerate() if one.name.startswith("device-")]


def test_small_matrices_share_a_task_of_a_cluster():
    def sizes(items, slots=1, together=1 << 22):
        groups = grouped(items, identity, slots, together)
        assert [item for group in groups for item in group] == sorted(items, reverse=True)
        return [len(group) for group in groups]

    experts = [512 * 512] * 400
    assert sizes(experts) == [16] * 25  # 4,194,304 entries each
    assert sizes(experts, slots=50) == [1] * 400  # enough for all
    assert sizes(experts, together=0) == [1] * 400
    assert sizes([8192 * 8192, *experts])[:2] == [1, 16]
    assert sizes([64] * 10_000, slots=2) == [512] * 19 + [272]  # 64 entries cost as much as `LEAST` do
    assert sizes([1, 2, 3]) == [1, 1, 1]
    assert sizes([]) == []
