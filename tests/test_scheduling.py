"""Per-matrix jobs: everything once, largest first, within the memory of the largest, and errors come out."""

import threading
import time

import pytest
import torch

from lowrank_probe.scheduling import MAX_WORKERS, SHARE_OF_LARGEST, run_jobs

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


@pytest.mark.parametrize("items", [[], [5], [3, 1, 2], [100, *range(1, 40)], [7] * 20, [0, 0, 0]], ids=str)
def test_every_item_comes_back_once(items):
    assert sorted(run_jobs(items, identity, identity, CPU)) == sorted(items)


def test_one_after_the_other_largest_first_where_nothing_fits_beside():
    order = []
    assert list(run_jobs([3, 9, 9, 1], identity, lambda item: order.append(item) or item, CPU)) == [9, 9, 3, 1]
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

    assert sorted(run_jobs(sizes, identity, job, CPU)) == sorted(sizes)
    assert 1 < max(most) <= MAX_WORKERS
    assert max(peaks) <= SHARE_OF_LARGEST * 1000


@pytest.mark.parametrize("sizes", [[10, 9, 8], [100] + [1] * 10], ids=["serial", "parallel"])
def test_an_error_of_a_job_ends_the_run(sizes):
    def job(size):
        if size == min(sizes):
            raise ValueError("planted")
        return size

    with pytest.raises(ValueError, match="planted"):
        list(run_jobs(sizes, identity, job, CPU))


def test_closing_waits_for_what_runs_and_drops_the_rest():
    started, finished = [], []

    def job(size):
        started.append(size)
        time.sleep(0.01)
        finished.append(size)
        return size

    stream = run_jobs([100] + [1] * 50, identity, job, CPU)
    next(stream)
    next(stream)
    stream.close()
    assert sorted(started) == sorted(finished)
    assert len(started) < 51


def test_workers_share_the_cores():
    seen = set(run_jobs([100] + [1] * 10, identity, lambda _: torch.get_num_threads(), CPU))
    assert seen <= {1, 4}
    assert 1 in seen
