"""Per-matrix jobs on a Ray cluster (`--ray`): what `scheduling.run_jobs` does on one machine, as Ray tasks.

A task takes one GPU where the cluster has any, one core otherwise, and does one matrix, or several small ones in turn;
Ray does it again elsewhere where its worker or its node dies. Inputs and --out lie where every node sees them.
`pip install lowrank_probe[ray]`, the same version on every node.
"""

import logging
import math
import os
import re
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, Final

import torch

from lowrank_probe.device_jobs import Done, Item, Loaded, Memory
from lowrank_probe.devices import Choice
from lowrank_probe.errors import ProbeError, WorkerDiedError
from lowrank_probe.running_models import first_line

# Times that a task is started again after its worker or its node died.
RETRIES: Final = 5
# Tasks that wait in Ray for each that can run: the next is there when one ends, and no more results than these wait.
AHEAD: Final = 2
# Entries of the small matrices that one task does together: those of one matrix that takes about a second. A task by
# itself costs about 10 ms, which a matrix counts as in `LEAST`.
TOGETHER: Final = 1 << 22
LEAST: Final = 1 << 13
# Tasks of small matrices for each that can run, at least: the last to end is a small part of the whole.
SHARES: Final = 8
# Seconds for which a run that stops asks how a task ended that Ray says has ended.
ASKED_S: Final = 1.0
# Bytes that a task asks Ray for, an entry of its matrix: both sides, ΔW and scratch in float32.
BYTES_PER_ENTRY: Final = 20
# Ray's own address of the cluster that this process is in → the one that was given for it.
_joined: Final[dict[str, str]] = {}


def join(address: str, asked: str) -> Choice:
    """Join the cluster at an address ("auto": that of this machine); the device that its tasks compute on.

    asked: "auto" is a GPU where the cluster has any; "cpu"; "cuda". Raises `ProbeError` where there is no cluster, or
    none with such a device.
    """
    try:
        import ray
    except ImportError:
        raise ProbeError("--ray: Ray is not installed (pip install 'lowrank_probe[ray]')") from None
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here, _joined.get(here)) and not address.startswith("ray://"):
            raise ProbeError(
                f"--ray {address}: this process is in the cluster at {here} already; ray.shutdown() leaves it"
            )
    else:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # OSError, ValueError, RuntimeError, and what gRPC raises
            raise ProbeError(f"--ray {address}: {_why_not(address, error)}") from None
        if not address.startswith("ray://"):
            _joined[ray.get_runtime_context().gcs_address] = address
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if asked not in ("auto", "cpu", "cuda") or (asked == "cuda" and not has_gpu):
        expected = "auto, cpu or cuda" if has_gpu else "auto or cpu (the cluster has no GPU)"
        raise ProbeError(f"--device {asked} with --ray: expected {expected}")
    return Choice(torch.device("cuda" if has_gpu and asked != "cpu" else "cpu"), cluster=True)


def _why_not(address: str, error: Exception) -> str:
    """Why there is no cluster to join, and the mend."""
    said = first_line(error)
    found = re.search(r"\S+:\d+(?=\D*$)", said)
    if re.search("auth|token", said, re.IGNORECASE) or (found is not None and _listens(found[0])):
        return (
            f"the cluster does not let this process in ({said}); has it the same version of Ray and the same token "
            "(RAY_AUTH_MODE, RAY_AUTH_TOKEN or ~/.ray/auth_token)?"
        )
    return f"no cluster answers ({said}); start one with ray start --head"


def _listens(address: str) -> bool:
    try:
        _knock(address)
    except OSError:
        return False
    return True


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def cluster_jobs(
    items: Sequence[Item], entries: Callable[[Item], int], load: Callable[[Item], Loaded],
    compute: Callable[[Item, Loaded], Done], device: torch.device, memory: Memory | None = None,
    together: int = TOGETHER,
) -> Generator[Done, None, None]:  # fmt: skip
    """Yield compute(item, load(item)) for every item as their tasks finish, largest first; an exception ends the run.

    load, compute: as for `run_jobs`; they are pickled once, with what they hold, and run in this process's directory.
    A task asks Ray for `BYTES_PER_ENTRY`, or for what `memory` says that it computes in, where that is more. together:
    as in `grouped`. Closing the iterator cancels what is under way. Raises what a job raised, once all that its task
    did before was yielded, and `WorkerDiedError` for a task whose worker died again and again.
    """
    import ray

    on_gpu = device.type == "cuda"
    job = [ray.put((load, compute, os.getcwd()))]  # in a list, so that a worker gets it once and not with every task
    run = ray.remote(_run)
    asked = {"num_cpus": 0 if on_gpu else 1, "num_gpus": 1 if on_gpu else 0, "max_retries": RETRIES}
    most = _memory_of_a_node()
    todo = grouped(items, entries, _slots(on_gpu), together)[::-1]
    running: dict[Any, list[Item]] = {}
    try:
        while todo or running:
            while todo and len(running) < AHEAD * _slots(on_gpu):
                group = todo.pop()
                needed = max(
                    max(BYTES_PER_ENTRY * entries(item), memory.computing(item) if memory else 0) for item in group
                )
                task = run.options(**asked, memory=min(needed, most), scheduling_strategy="SPREAD").remote(job, group)
                running[task] = group
            ready, _ = ray.wait(list(running), num_returns=1)
            for one in ready:
                group = running.pop(one)
                results, error = _result(one, group)
                yield from results
                if error is not None:
                    raise error
                del one
    finally:
        for one in running:
            ray.cancel(one, force=True)
        ended, _ = ray.wait([*running], num_returns=len(running), timeout=0) if running else ([], [])
        for one in ended:  # whose worker died: Ray would print so
            with suppress(ray.exceptions.RayError):
                ray.get(one, timeout=ASKED_S)


def grouped(items: Sequence[Item], entries: Callable[[Item], int], slots: int, together: int) -> list[list[Item]]:
    """The items that each task does, largest first: alone, or several that have so many entries `together` at most.

    slots: tasks that can run at once; there are groups for `SHARES` times as many. An item counts as `LEAST` entries at
    least.

    >>> [len(group) for group in grouped([50_000, *[9000] * 30], int, slots=2, together=20_000)]
    [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    """
    order = sorted(items, key=entries, reverse=True)
    sizes = [max(LEAST, entries(item)) for item in order]
    limit = min(together, sum(sizes) // (SHARES * slots))
    groups: list[list[Item]] = []
    left = 0
    for item, size in zip(order, sizes, strict=True):
        if not groups or size > left:
            groups.append([])
            left = limit
        groups[-1].append(item)
        left -= size
    return groups


_jobs: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {}


def _run(job: list[Any], group: list[Any]) -> bytes:
    """One task, in a worker: what its items gave, up to the first that raised, and what that raised, pickled.

    One thread, so that as many tasks as there are cores run beside each other. Pickled here, because arrays that Ray
    itself unpickles cannot be written to and hold their place in its object store; and returned, because Ray prints the
    traceback of what a task raised where nobody asks for its result any more.
    """
    import ray
    from threadpoolctl import threadpool_limits

    key = job[0].hex()
    if key not in _jobs:
        _jobs.clear()
        load, compute, directory = ray.get(job[0])
        _jobs[key] = load, compute
        with suppress(OSError):  # relative paths are the driver's, where the node has that directory
            os.chdir(directory)
    load, compute = _jobs[key]
    torch.set_num_threads(1)
    done: list[Any] = []
    raised = None
    with threadpool_limits(1):
        try:
            for item in group:
                done.append(compute(item, load(item)))  # noqa: PERF401 - what is done is returned beside what was raised
        except Exception as error:
            raised = error
    return ray.cloudpickle.dumps((done, raised))  # type: ignore[no-any-return]


def _result(reference: Any, group: list[Any]) -> tuple[list[Any], Exception | None]:
    import ray

    try:
        return ray.cloudpickle.loads(ray.get(reference))  # type: ignore[no-any-return]
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
    except ray.exceptions.RayError as error:
        name = getattr(group[0], "name", group[0])
        others = f" or one of the {len(group) - 1} smaller ones of its task" if len(group) > 1 else ""
        raise WorkerDiedError(
            f"{name}{others}: its worker died {RETRIES + 1} times ({type(error).__name__}: {first_line(error)}); more "
            "memory for a worker, or fewer of them on a node?"
        ) from None


def _slots(on_gpu: bool) -> int:
    """Tasks that can run at once; nodes come and go."""
    import ray

    return max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))


def _memory_of_a_node() -> float:
    """Bytes that the largest node gives to tasks; ∞ where Ray does not say."""
    import ray

    found = [node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]]
    return max(found, default=0.0) or math.inf
