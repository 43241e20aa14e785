"""Which device computes: asked for by name, and kept only where its float64 beats the CPU's, which is measured.

Every spectrum here rests on float64. A laptop's GPU may have none (Apple's), or one that is slower than the CPU
(many consumer cards): that is found by doing the job itself in small on both, not by the card's name.
"""

import contextlib
import importlib
import math
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from lowrank_probe.errors import ProbeError
from lowrank_probe.svd import full_spectrum

EXPECTED: Final = "expected auto, cpu, cuda, cuda:N or mps"
# (m, n) of the matrix whose spectrum is timed on both.
PROBED: Final = (2048, 1024)
# No CPU does that in less (65 ms and more were seen), so that a device that does need not be compared with it.
FAST_S: Final = 0.05


@dataclass(frozen=True)
class Choice:
    """device: where spectra are computed. note: why that is not the device asked for, or "". others: further cards of
    the same kind, which take matrices from the same queue.

    float64_s: device → seconds of one float64 spectrum of a `PROBED` matrix there, ∞ where it has no float64; empty
    where there was nothing to compare. cluster: matrices are Ray's tasks, and the device is that of its workers.
    """

    device: torch.device
    note: str = ""
    float64_s: dict[str, float] = field(default_factory=dict)
    cluster: bool = False
    others: tuple[torch.device, ...] = ()


_choices: dict[str, Choice] = {}
_choosing = threading.Lock()


def choose_device(asked: str, ray: str | None = None) -> Choice:
    """The device for "auto" (CUDA cards like the first one, or MPS, else the CPU), "cpu", "cuda", "cuda:1" or "mps".

    Once per process; raises `ProbeError` for a device that is not there. ray: the address of a cluster to join, whose
    devices count instead (`cluster.join`).
    """
    if ray is not None:
        from lowrank_probe.cluster import join

        return join(ray, asked)
    with _choosing:
        if asked not in _choices:
            found = _choose(find_device(asked))
            _choices[asked] = replace(found, others=_cards_like(found.device)) if asked == "auto" else found
        return _choices[asked]


_starting: list[threading.Thread] = []
_computing = threading.Event()


def start(asked: str, work: str, then: str) -> None:
    """Find, probe and warm up the device in the background, while the caller imports and reads headers.

    work: the module of what is to be done, whose `warm_up(device)` is for a device other than a CPU. then: the module
    that is wanted at the end (the report's, with pandas); imported, with its `prepare()`, while the device computes: on
    a CPU once the first matrix is read (`computing`), beside which there is a core to spare. Sooner it would only take
    turns with what the caller imports, and with the many short steps of reading.
    """

    def quietly() -> None:
        with contextlib.suppress(Exception):  # raised again where the device, or the page, is needed
            device = choose_device(asked).device
            if device.type != "cpu":
                importlib.import_module(work).warm_up(device)
            else:
                _computing.wait()
            importlib.import_module(then).prepare()

    _starting.append(threading.Thread(target=quietly, daemon=True))
    _starting[-1].start()


def computing() -> None:
    """The CPU's first matrix is read, and computed from now on."""
    _computing.set()


def started() -> None:
    """Wait until what `start` began is done: a process that is forked while it imports could not import any more."""
    computing()
    for thread in _starting:
        thread.join()


def find_device(asked: str) -> torch.device:
    """The device of that name, whatever its float64 is like. Raises `ProbeError` where it is not there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if _has_mps() else "cpu")
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise ProbeError(f"--device {asked}: {EXPECTED}") from None
    if found.type not in ("cpu", "cuda", "mps"):
        raise ProbeError(f"--device {asked}: {EXPECTED}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ProbeError(f"--device {asked}: found {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if found.type == "mps" and not _has_mps():
        raise ProbeError(f"--device {asked}: found no Apple GPU (MPS); use --device cpu")
    return found


def _cards_like(first: torch.device) -> tuple[torch.device, ...]:
    """The other visible cards of the first one's name, so that results do not depend on which card a matrix went to.

    One that others use, so that less than half of it is free, is left to them.
    """
    if first.type != "cuda":
        return ()
    found = []
    for i in range(1, torch.cuda.device_count()):
        if torch.cuda.get_device_name(i) == torch.cuda.get_device_name(first):
            free, total = torch.cuda.mem_get_info(i)
            found += [torch.device("cuda", i)] if 2 * free >= total else []
    return tuple(found)


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())


def _choose(found: torch.device) -> Choice:
    if found.type == "cpu":
        return Choice(found)
    try:
        found_s = float64_s(found)
    except torch.OutOfMemoryError:
        return Choice(torch.device("cpu"), f"{found} has no memory left: spectra are computed on the CPU")
    except RuntimeError as error:  # a driver that does not fit, a card that fell off
        raise ProbeError(f"--device {found}: {str(error).splitlines()[0]}; use --device cpu") from None
    if found_s < FAST_S:
        return Choice(found, "", {str(found): found_s})
    return decide(found, found_s, float64_s(torch.device("cpu")))


def decide(found: torch.device, found_s: float, cpu_s: float) -> Choice:
    """The device where it is the faster in float64, else the CPU, with the reason."""
    measured = {str(found): found_s, "cpu": cpu_s}
    if found_s < cpu_s:
        return Choice(found, "", measured)
    why = (
        "has no float64"
        if math.isinf(found_s)
        else f"takes {1e3 * found_s:.0f} ms in float64 for a matrix that takes the CPU {1e3 * cpu_s:.0f} ms"
    )
    return Choice(torch.device("cpu"), f"{found} {why}: spectra are computed on the CPU", measured)


def float64_s(device: torch.device) -> float:
    """Seconds of one float64 spectrum of a `PROBED` matrix on the device, warmed up; ∞ where it has no float64."""
    try:
        A = torch.randn(PROBED, generator=torch.Generator().manual_seed(0)).to(device)
        if device.type != "cpu":
            full_spectrum(A)  # loads libraries and kernels
        begun = time.perf_counter()
        full_spectrum(A)  # ends on the host, so nothing is left running
        return time.perf_counter() - begun
    except (TypeError, NotImplementedError):  # as MPS answers to float64
        return math.inf
