"""A real Ray cluster of two nodes on this machine: the same tables, and workers, nodes and drivers that die."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
from evaluated import llama, moved, saved, texts
from pairs import add_update, llama_tensors, write
from test_cli import ENVIRONMENT, PROBE, fails, probe

import lowrank_probe as lp
from lowrank_probe import cluster
from lowrank_probe.calibration import Calibration
from lowrank_probe.demo_text import read_prose
from lowrank_probe.errors import ProbeError
from lowrank_probe.rank_choice import RankChoice

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

# Of what the clock and the machine put in.
CLOCKED = ["seconds"]


@contextmanager
def nodes(*cpus):
    """A cluster with a node each, so many cores; this process is its driver."""
    from ray.cluster_utils import Cluster

    ray.shutdown()  # from the cluster of another test
    made = Cluster()
    try:
        for number in cpus:
            made.add_node(num_cpus=number, object_store_memory=80 << 20)
        made.wait_for_nodes()
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def two():
    with nodes(1, 1) as made:
        yield made


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("sides")
    base = llama_tensors()
    tuned = add_update(base)
    return write(root / "base", base), write(root / "tuned", tuned)


def same(found, expected):
    a, b = (one.table.drop(columns=CLOCKED) for one in (found, expected))
    assert a.drop(columns="compute_dtype").equals(b.drop(columns="compute_dtype"))
    assert found.ledger.equals(expected.ledger)
    for name, values in expected.singular_values.items():
        assert np.array_equal(found.singular_values[name], values)


def test_a_spectrum_is_that_of_one_machine(two, sides, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SHARES", 1)  # several matrices a task
    found = lp.spectrum(*sides, ray=two.address, out=tmp_path / "run")
    torch.set_num_threads(1)
    same(found, lp.spectrum(*sides, device="cpu"))
    assert found.facts["device"] == {"type": "cpu", "name": "Ray cluster", "n_threads": 1}
    phases = found.timeline
    assert (phases["stop_s"] >= phases["start_s"]).all()
    assert phases["start_s"].min() >= 0


def test_an_adapter_is_that_of_one_machine(two, sides, tmp_path):
    options = lp.Options(ray=two.address)
    lp.extract(*sides, tmp_path / "a", ranks=[2, 4], options=options)
    torch.set_num_threads(1)
    lp.extract(*sides, tmp_path / "b", ranks=[2, 4], options=lp.Options(device="cpu"))
    for name in ("r2", "r4"):
        file = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("choice", [{"ranks": (2, 4)}, {"budget": {"parameters": 12_000}}])
def test_a_calibrated_adapter_is_that_of_one_machine(two, choice, tmp_path):
    torch.set_num_threads(1)
    pair = saved(tmp_path, *moved(lambda: llama(tie_word_embeddings=False), scale=0.2))
    text = tmp_path / "calibration.txt"
    text.write_text("\n\n".join(read_prose(120_000)[:40]), encoding="utf-8")
    asked = {
        "ranks": RankChoice(**choice), "targets": ("everything",), "calibration": Calibration(text, ((True, 0.01),)),
    }  # fmt: skip
    found = lp.extract(*pair, tmp_path / "a", options=lp.Options(ray=two.address), **asked)
    expected = lp.extract(*pair, tmp_path / "b", options=lp.Options(device="cpu"), **asked)
    assert found.facts["calibration"] == expected.facts["calibration"]
    assert any(way["weighted_by"] == "inputs and gradients" for way in found.facts["calibration"]["tried"])
    for label in found.adapters:
        files = (tmp_path / side / label / "adapter_model.safetensors" for side in "ab")
        assert next(files).read_bytes() == next(files).read_bytes()


def test_functional_ranks_are_those_of_one_machine(two, tmp_path):
    pair = saved(tmp_path, *moved(llama, scale=0.2))
    asked = {"ranks": [0, 2, "full"], "leave_out": False, "length": 32, "sequences": 8}
    text = texts(tmp_path)
    found = lp.evaluate(*pair, text, ray=two.address, out=tmp_path / "run", **asked)
    torch.set_num_threads(1)
    expected = lp.evaluate(*pair, text, device="cpu", **asked)
    assert found.table.equals(expected.table)
    assert found.functional.equals(expected.functional)
    assert lp.load(tmp_path / "run").table.equals(expected.table)


def test_paths_are_relative_to_the_drivers_directory_and_a_name_is_an_address(tmp_path, monkeypatch):
    sides = [path.name for path in saved(tmp_path, *moved(llama, scale=0.2))]
    text = texts(tmp_path)
    with nodes(1) as made:
        monkeypatch.chdir(tmp_path)  # not the nodes'
        address = f"localhost:{made.address.rpartition(':')[2]}"
        assert len(lp.spectrum(*sides, ray=address).table)
        lp.extract(*sides, "adapter", ranks=2, options=lp.Options(ray=address))
        assert lp.evaluate(*sides, text, ranks=[0, "full"], leave_out=False, length=32, ray=address).facts["gain"]


def test_a_trajectory_is_that_of_one_machine(two, sides):
    found = lp.trajectory(sides[0], [sides[1]], ray=two.address)
    same(found.results["tuned"], lp.spectrum(*sides, device="cpu"))
    assert len(found.amplification)


def test_what_a_job_raises_is_raised_here(two, sides, tmp_path):
    broken = {name: tensor.clone() for name, tensor in add_update(llama_tensors()).items()}
    broken["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    with pytest.raises(ProbeError, match=r"layers\.1\.mlp\.up_proj\.weight .*: contains 1 NaN"):
        lp.spectrum(sides[0], write(tmp_path / "broken", broken), ray=two.address)


def run(items, compute, together=cluster.TOGETHER):
    """The jobs of items of one size, here."""
    return cluster.cluster_jobs(items, lambda i: 64, lambda i: i, compute, torch.device("cpu"), together=together)


def test_what_a_task_did_before_it_failed_is_not_lost(two, monkeypatch):
    monkeypatch.setattr(cluster, "SHARES", 1)
    cluster.join(two.address, "auto")

    def compute(item, _):
        if item == 3:
            raise KeyError("no three")
        return item

    found = []
    with pytest.raises(KeyError, match="no three"):
        found.extend(run(range(8), compute))  # 0 to 3 by one task, 4 to 7 by another
    assert {0, 1, 2} <= set(found)


def test_a_worker_that_is_killed_costs_its_own_task_alone(two, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SHARES", 1)
    cluster.join(two.address, "auto")

    def compute(item, _):
        with open(tmp_path / f"{item}", "a") as file:
            file.write("begun\n")
        if item == 2 and len((tmp_path / "2").read_text().splitlines()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    assert sorted(run(range(12), compute)) == [*range(12)]
    times = [len((tmp_path / f"{item}").read_text().splitlines()) for item in range(12)]
    assert times == [2, 2, 2, *[1] * 9]


def test_arrays_can_be_written_to_and_hold_no_place_in_the_clusters_memory(two):
    cluster.join(two.address, "auto")

    def compute(item, _):
        return np.full(1 << 18, float(item))  # 2 MiB, of 80 MiB a node

    found = []
    for values in run(range(100), compute, together=0):
        values += 1
        found.append(values)
    assert sorted(values[0] for values in found) == [*range(1, 101)]


class Waiting:
    """Four jobs that say where they run, and wait there until they are let go; run by a thread."""

    def __init__(self, folder):
        self.go = folder / "go"
        self.folder = folder

        # A function of its own, which is pickled as it is: the workers cannot import this file.
        def compute(item, _):
            node = ray.get_runtime_context().get_node_id()
            (folder / f"began-{item}-{os.getpid()}-{node}").touch()
            deadline = time.monotonic() + 120
            while not (folder / "go").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            return item, node

        def work():
            return sorted(cluster.cluster_jobs(range(4), lambda i: 1 + i, lambda i: i, compute, torch.device("cpu")))

        self.found = ThreadPoolExecutor(1).submit(work)

    def begun(self, count):
        """(item, process, node) of each that began, once there are so many."""
        deadline = time.monotonic() + 120
        while len(begun := sorted(self.folder.glob("began-*"))) < count:
            assert time.monotonic() < deadline
            assert not self.found.done(), self.found.result()
            time.sleep(0.01)
        return [path.name.split("-")[1:] for path in begun]


def test_a_worker_that_is_killed_is_replaced(two, tmp_path):
    cluster.join(two.address, "auto")
    jobs = Waiting(tmp_path)
    os.kill(int(jobs.begun(2)[0][1]), signal.SIGKILL)
    jobs.begun(3)
    jobs.go.touch()
    assert [item for item, _ in jobs.found.result(timeout=120)] == [0, 1, 2, 3]
    assert len(list(tmp_path.glob("began-*"))) == 5  # one of them twice


def test_a_job_whose_worker_always_dies_is_named(two, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 1)
    cluster.join(two.address, "auto")

    def compute(item, _):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProbeError, match="its worker died 2 times"):
        list(cluster.cluster_jobs(["lm_head.weight"], len, str, compute, torch.device("cpu")))


# A driver that stops while a job that it did not ask for yet ends badly. One job, which leaves the other core of the
# cluster to the one that is asked for: two that wait could hold both.
STOPPING = """
import os, sys, time
import torch
from lowrank_probe import cluster
cluster.join(sys.argv[1], "auto")
cluster.RETRIES = 0
yielded = sys.argv[2]
def compute(item, _):
    if item:
        while not os.path.exists(yielded):
            time.sleep(0.01)
        {end}
    return item
jobs = cluster.cluster_jobs(range(2), lambda i: 2 - i, lambda i: i, compute, torch.device("cpu"))
assert next(jobs) == 0
open(yielded, "w").close()
time.sleep(3)
jobs.close()
del jobs
time.sleep(1)
"""


@pytest.mark.parametrize("end", ["raise ValueError('of a job')", "os.kill(os.getpid(), 9)"])
def test_jobs_that_end_badly_unseen_are_not_printed(two, end, tmp_path):
    command = [sys.executable, "-c", STOPPING.format(end=end), two.address, str(tmp_path / "yielded")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=200)
    told = [line for line in done.stderr.splitlines() if "A worker died or was killed" not in line]  # Ray's own
    assert (done.returncode, told) == (0, [])


def test_a_failed_command_says_one_line(two, sides, tmp_path):
    broken = {name: tensor.clone() for name, tensor in add_update(llama_tensors()).items()}
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        broken[name][3, 4] = float("nan")
    tuned = write(tmp_path / "broken", broken)
    _, told = probe("spectrum", sides[0], tuned, "--ray", two.address, "--out", tmp_path / "run", code=1)
    assert re.fullmatch(r"error: \S+ in \S+: contains 1 NaN .*\n", told), told


def test_a_killed_driver_goes_on_where_it_was(two, tmp_path):
    base = llama_tensors(n_layers=16)
    sides = write(tmp_path / "base", base), write(tmp_path / "tuned", add_update(base))
    out = tmp_path / "run"
    command = [PROBE, "spectrum", *map(str, sides), "--ray", two.address, "--out", str(out), "--json"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out / ".unfinished" / "log"
    while process.poll() is None and not (log.exists() and log.stat().st_size > 20_000):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "facts.json").exists()
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stderr
    torch.set_num_threads(1)
    same(lp.load(out), lp.spectrum(*sides, device="cpu"))


def test_what_cannot_be_is_one_line(two, sides, tmp_path):
    fails("spectrum", *sides, "--ray", "127.0.0.1:1", "--out", tmp_path / "a", words=["--ray 127.0.0.1:1", "ray start"])
    fails(
        "extract", *sides, "--rank", 2, "--ray", two.address, "--device", "cuda", "--out", tmp_path / "a",
        words=["--device cuda with --ray", "no GPU"],
    )  # fmt: skip
    assert not (tmp_path / "a").exists()
    with pytest.raises(ProbeError, match="a model in memory is not where the nodes are"):
        lp.evaluate(*moved(llama), texts(tmp_path), ray=two.address)
    cluster.join(two.address, "auto")
    with pytest.raises(ProbeError, match=r"--ray 127.0.0.1:2: this process is in the cluster at "):
        cluster.join("127.0.0.1:2", "auto")


def test_a_node_that_goes_leaves_its_work_to_the_others(tmp_path):
    with nodes(1, 1) as made:
        cluster.join(made.address, "auto")
        jobs = Waiting(tmp_path)
        workers = {node: int(process) for _, process, node in jobs.begun(2)}
        assert len(workers) == 2
        gone = made.list_all_nodes()[-1]
        made.remove_node(gone, allow_graceful=False)
        deadline = time.monotonic() + 60
        while psutil.pid_exists(workers[gone.node_id]) and time.monotonic() < deadline:
            time.sleep(0.01)
        jobs.go.touch()
        results = jobs.found.result(timeout=180)
        assert [item for item, _ in results] == [0, 1, 2, 3]
        assert gone.node_id not in {node for _, node in results}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("Failed to connect to Ray cluster at 127.0.0.1:{port}", "does not let this process in"),
        ("Failed to connect to Ray cluster at 127.0.0.1:1", "no cluster answers"),
        ("Token authentication is enabled but no token was found", "RAY_AUTH_TOKEN"),
        ("Could not find any running Ray instance.", "start one with ray start --head"),
    ],
)
def test_why_a_cluster_cannot_be_joined(said, words):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        told = cluster._why_not("auto", ConnectionAbortedError(said.format(port=listening.getsockname()[1])))
    assert words in told
