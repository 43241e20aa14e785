"""Small matrices in forked processes: the results of one process, its errors, and nobody left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pairs import add_update, llama_tensors, write
from test_interrupts import ENVIRONMENT, PROBE

import lowrank_probe as lp
from lowrank_probe import outputs, process_jobs, scheduling, spectrum_work
from lowrank_probe.device_jobs import Host, Memory
from lowrank_probe.errors import NumericsError, WorkerDiedError
from lowrank_probe.scheduling import run_jobs

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
MOE = 360


def identity(item):
    return item


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def few(monkeypatch):
    """Processes from three entries on."""
    monkeypatch.setattr(process_jobs, "MANY", 3)


def forked(items, compute, memory=None, **more):
    return run_jobs(items, identity, identity, compute, CPU, memory, forks=True, **more)


def children():
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_small_ones_are_done_elsewhere_and_large_ones_here(few):
    items = [scheduling.SMALL * 2, scheduling.SMALL * 3, *range(1, 40)]
    found = dict(forked(items, lambda item, _: (item, os.getpid())))
    assert set(found) == set(items)
    here = os.getpid()
    assert [found[item] == here for item in items[:2]] == [True, True]
    assert here not in [found[item] for item in items[2:]]
    assert 1 <= len({found[item] for item in items[2:]}) <= 2
    assert not children()


@pytest.mark.parametrize(("n", "memory"), [(1, None), (20, Memory(1e9, identity, identity, identity))])
def test_not_for_few_and_not_where_memory_is_bounded(few, n, memory):
    found = list(forked(range(1, n + 1), lambda item, _: os.getpid(), memory))
    assert found == [os.getpid()] * n


def test_what_is_left_of_a_run_goes_where_all_of_it_would(few):
    found = list(forked([1], lambda item, _: os.getpid(), every=[1] * 9))
    assert found != [os.getpid()]


def test_beside_cards_too(few):
    host = Host(
        lambda item: item < 50, identity, lambda item, _: (item, os.getpid()), every=[*range(1, 50)], forks=True
    )
    found = dict(run_jobs([*range(1, 60)], identity, identity, lambda item, _: (item, 0), ELSEWHERE, host=host))
    assert [found[item] for item in range(50, 60)] == [0] * 10
    assert not {found[item] for item in range(1, 50)} & {0, os.getpid()}
    assert not children()


def test_what_a_job_raises_is_raised(few):
    def compute(item, _):
        if item == 5:
            raise NumericsError("a.weight: contains 1 NaN")
        return item

    with pytest.raises(NumericsError, match=r"^a\.weight: contains 1 NaN$"):
        list(forked(range(1, 30), compute))
    assert not children()


def test_a_killed_process_is_told(few):
    def compute(item, _):
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(WorkerDiedError, match="one of 2 worker processes died"):
        list(forked(range(1, 30), compute))
    assert not children()


class TwoArguments(Exception):  # noqa: N818
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_an_exception_that_cannot_be_pickled_comes_as_its_text(few):
    def compute(item, _):
        raise TwoArguments("this", "that")

    with pytest.raises(RuntimeError, match="TwoArguments: this and that"):
        list(forked(range(1, 30), compute))
    assert not children()


def test_where_the_system_has_no_more_processes_this_one_does_it_all(few, monkeypatch):
    fork, left = os.fork, [1]

    def refuse():
        if not left:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        left.pop()
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    assert list(forked(range(1, 9), lambda item, _: os.getpid())) == [os.getpid()] * 8
    assert not children()


def test_not_in_a_process_that_may_have_none(few, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert list(forked(range(1, 9), lambda item, _: os.getpid())) == [os.getpid()] * 8


def test_signals_of_the_program_are_not_its_workers(few, tmp_path):
    before = signal.signal(signal.SIGTERM, lambda *_: (tmp_path / "called").touch())
    try:
        with pytest.raises(WorkerDiedError):
            list(forked(range(1, 30), lambda item, _: os.kill(os.getpid(), signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "called").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_nor_those_of_a_worker_that_has_only_begun(few, tmp_path, monkeypatch):
    begin = process_jobs._begin

    def slow(*arguments):
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            time.sleep(1)
        begin(*arguments)

    monkeypatch.setattr(process_jobs, "_begin", slow)
    test_signals_of_the_program_are_not_its_workers(few, tmp_path)


def test_models_in_memory_stay_in_this_process(few, monkeypatch):
    monkeypatch.setattr(scheduling, "Processes", None)
    base = llama_tensors()
    assert len(lp.spectrum(base, add_update(base), device="cpu").table)


def test_what_is_finished_stays_where_a_worker_was_killed(few, tmp_path, monkeypatch):
    base = llama_tensors()
    sides = write(tmp_path / "base", base), write(tmp_path / "tuned", add_update(base))
    real = spectrum_work.Job.compute

    def compute(self, pair, loaded):
        if pair.name.endswith("1.mlp.down_proj.weight"):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, pair, loaded)

    wanted = tmp_path / "probe-runs" / "base-tuned"  # which the command chose
    monkeypatch.setattr(spectrum_work.Job, "compute", compute)
    with (
        pytest.raises(WorkerDiedError, match=r"the same command with --out \S+/base-tuned goes on from there$"),
        outputs.new_directory(wanted) as out,
    ):
        lp.spectrum(*sides, device="cpu", out=out)
    monkeypatch.setattr(spectrum_work.Job, "compute", real)
    assert lp.spectrum(*sides, device="cpu", out=wanted).facts["resumed"]["n_finished"] > 0


def test_closing_drops_the_rest(few, tmp_path):
    def compute(item, _):
        (tmp_path / str(item)).touch()
        return item

    stream = forked(range(1, 500), compute)
    next(stream)
    stream.close()
    assert len([*tmp_path.iterdir()]) < 100
    assert not children()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_tensors_come_whole_and_can_be_written_to(few, dtype):
    A = torch.randn(6, 4).to(dtype)
    for made in (A, A.T, A[1:3], A[:0], A[0, 0]):
        [first, *_] = forked([1, 2, 3], lambda item, _, made=made: {"a": made})
        assert first["a"].dtype == dtype
        assert torch.equal(first["a"], made)
        first["a"].zero_()


def test_spectrum_and_extract_give_what_one_process_gives(few, tmp_path, monkeypatch):
    base = llama_tensors(dtype=torch.bfloat16)
    sides = write(tmp_path / "base", base), write(tmp_path / "tuned", add_update(base, relative=0.2))
    forks = []
    real = scheduling.Processes
    monkeypatch.setattr(scheduling, "Processes", lambda *a: forks.append(a) or real(*a))
    apart = lp.spectrum(*sides, device="cpu")
    lp.extract(*sides, tmp_path / "apart", ranks=3, options=lp.Options(device="cpu"))
    assert len(forks) == 3  # spectra; factors, and the norms of what an adapter leaves out
    monkeypatch.setattr(process_jobs, "MANY", 10**9)
    here = lp.spectrum(*sides, device="cpu")
    lp.extract(*sides, tmp_path / "here", ranks=3, options=lp.Options(device="cpu"))
    assert len(forks) == 3
    assert apart.table.drop(columns="seconds").equals(here.table.drop(columns="seconds"))
    assert list(apart.singular_values) == list(here.singular_values)
    assert all(np.array_equal(values, here.singular_values[name]) for name, values in apart.singular_values.items())
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("apart", "here")]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A pair of so many experts that processes are made for them."""
    root = tmp_path_factory.mktemp("experts")
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.0.mlp.experts.{i}.up_proj.weight": 0.02 * torch.randn(160, 160, generator=generator)
        for i in range(MOE)
    }
    return write(root / "base", base), write(root / "tuned", add_update(base))


def begin(experts, out):
    command = [*PROBE, "spectrum", *map(str, experts), "--out", str(out), "--device", "cpu"]
    return subprocess.Popen(
        command, env=ENVIRONMENT | {"OMP_NUM_THREADS": "2"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0, told


def wait_for_work(process, out):
    """Until some matrices are finished; the workers' numbers."""
    log, deadline = out / ".unfinished" / "log", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 100_000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(found) == 2
    return found


def gone(pids, deadline_s=10):
    deadline = time.monotonic() + deadline_s
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.slow
def test_killed_no_process_stays_and_the_rerun_ends_in_the_same_files(experts, tmp_path):
    finish(begin(experts, tmp_path / "whole"))
    process = begin(experts, tmp_path / "run")
    workers = wait_for_work(process, tmp_path / "run")
    process.kill()
    process.communicate()
    assert gone(workers)
    finish(begin(experts, tmp_path / "run"))
    for name in ("ledger.csv", "summary.csv", "singular_values.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_reaches_all_and_keeps_what_is_finished(experts, tmp_path):
    process = begin(experts, tmp_path / "run")
    workers = wait_for_work(process, tmp_path / "run")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the command
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert gone(workers)
    assert 0 < len(lp.load(tmp_path / "run").table) < MOE
