"""What a 405B pair would take: every matrix of Llama-3.1-405B's shapes, priced by parts that are measured here.

    python benchmarks/plan_405b.py            # on a GPU about 2 minutes; without one about 5
    python benchmarks/plan_405b.py --tiny     # small parts, seconds; writes nothing

No such pair is read: the shapes come from the table of `probe budget`, matrices of the same proportions and smaller short
sides k from a reader that makes them up. For each proportion the exact spectrum with its noise (`rows.analyse`) and the
factors of rank 16 (`factorisation.factorise`) are timed at two k; from the larger one they go on as k³, which is what the
arithmetic costs and more than was seen between the two. Reading is timed on a file in the page cache. What runs beside what is scheduled as the tool
does it, largest first. Then the work around the matrices: a spectrum of as many matrices, each 64 wide.
Writes docs/plan-405b.md (docs/plan-405b-cuda.md on a GPU).
"""

import argparse
import heapq
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from accuracy import publish
from safetensors.torch import save_file

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.devices import find_device
from lowrank_probe.factorisation import factorise
from lowrank_probe.matching import match
from lowrank_probe.options import Options
from lowrank_probe.rows import Settings, analyse, warm_up
from lowrank_probe.typical_shapes import typical_shape
from lowrank_probe.weight_shapes import ModelShape

RANK: Final = 16
# Short sides at which parts are measured; what they cost goes on as a power of k.
ON_GPU: Final = (2048, 4096)
ON_CPU: Final = (512, 1024)
TINY: Final = (96, 128)
DISK: Final = 1.5e9  # bytes a second of a usual disk, beside the page cache that is measured
CARDS: Final = (1, 8)


@dataclass(frozen=True)
class Part:
    """One proportion of a matrix, measured: seconds and bytes at two short sides k."""

    ks: tuple[int, int]
    exact_s: tuple[float, float]
    factors_s: tuple[float, float]
    peaks: tuple[int, int]

    def seconds(self, k: int, exact: bool) -> float:
        """At another k: as k³ from the larger one, which Gram matrix and eigenvalues cost; less than that is overhead."""
        return (self.exact_s if exact else self.factors_s)[1] * (k / self.ks[1]) ** 3

    @property
    def power(self) -> float:
        """Of k, between the two: how far from k³ the smaller matrices still are."""
        return math.log(self.exact_s[1] / self.exact_s[0]) / math.log(self.ks[1] / self.ks[0])

    def peak(self, k: int) -> float:
        """Bytes on the card: entries and Gram matrices both grow as k²."""
        return self.peaks[1] * (k / self.ks[1]) ** 2


def matrices(shape: ModelShape) -> list[tuple[str, tuple[int, int]]]:
    """(layer type, (m, n)) of every matrix of the model."""
    return [(one.layer_type, one.sides) for one in shape.weights for _ in range(one.count) if len(one.shape) == 2]


def synthetic(m: int, n: int, device: torch.device) -> Delta:
    """ΔW of a made-up bf16 pair: normal weights, a falling spectrum at 1e-2 of their norm."""
    generator = torch.Generator().manual_seed(m + n)
    W = 0.02 * torch.randn(m, n, generator=generator)
    B, A = (torch.randn(side, 64, generator=generator) for side in (m, n))
    D = (B / torch.arange(1, 65)) @ A.T
    tuned = W + D * (1e-2 * torch.linalg.norm(W) / torch.linalg.norm(D))
    name = "model.layers.0.mlp.up_proj.weight"
    sides = [open_checkpoint({name: side.bfloat16()}) for side in (W, tuned)]
    found = read_pair(match(*sides, Options()).pairs[0], *sides, device)
    assert isinstance(found, Delta)
    return found


def measured(m: int, n: int, device: torch.device, rounds: int) -> tuple[float, float, int]:
    """(seconds of the exact spectrum with its noise, seconds of the factors, peak bytes on the card; 0 without one).

    The peak holds both sides, which a run lets go of before the spectrum, in place of the next matrix's that it reads.
    """
    delta = synthetic(m, n, device)
    dense = delta.dense
    assert dense is not None

    def once(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    factors = statistics.median(
        once(lambda: factorise(dense, delta.fro_norm, RANK, torch.float32, delta.name)) for _ in range(rounds)
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    exact = []
    for _ in range(rounds):
        its_own = replace(delta, dense=dense.clone())  # `analyse` overwrites it, and lets go of both sides
        exact.append(once(partial(analyse, its_own, Settings(device, Options()))))
    peak = torch.cuda.max_memory_allocated() - dense.nbytes if device.type == "cuda" else 0
    return statistics.median(exact), factors, peak


def priced(
    shapes: Sequence[tuple[int, int]], ks: tuple[int, int], device: torch.device, rounds: int
) -> dict[float, Part]:
    """Long side over short side → the part that is measured for it."""
    parts = {}
    for ratio in sorted({max(shape) / min(shape) for shape in shapes}):
        found = [measured(round(ratio * k), k, device, rounds) for k in ks]
        exact, factors, peaks = zip(*found, strict=True)
        parts[ratio] = Part(ks, exact, factors, peaks)
        print(f"{ratio:.2f}: {found}", file=sys.stderr)
    return parts


def read_rate(n_bytes: int) -> float:
    """Bytes a second of reading a file in the page cache with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file({"x.weight": torch.zeros(n_bytes // 8192, 4096, dtype=torch.bfloat16)}, file)
        side = open_checkpoint(file)
        side.read("x.weight")
        started = time.perf_counter()
        side.read("x.weight")
        return n_bytes / (time.perf_counter() - started)


def around(n: int) -> float:
    """Seconds a matrix of a spectrum of n matrices, 64 wide: what the tool adds to the solver's time."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{i // 7}.mlp.w{i % 7}_proj.weight": torch.randn(64, 64, generator=generator) for i in range(n)
    }
    tuned = {name: W + 0.01 * torch.randn(64, 64, generator=generator) for name, W in base.items()}
    started = time.perf_counter()
    found = lp.spectrum(base, tuned, device="cpu")
    assert len(found.table) == n
    return (time.perf_counter() - started) / n


def makespan(seconds: Sequence[float], n: int) -> float:
    """Seconds of all on n devices, the longest first to whichever is free (Graham 1969: within 4/3 of the optimum)."""
    free = [0.0] * n
    for one in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def clock(seconds: float) -> str:
    """Two digits in the unit that suits."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small parts; writes nothing")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    device = find_device("auto")
    if device.type == "mps":
        device = torch.device("cpu")
    on_gpu = device.type == "cuda"
    warm_up(device)
    every = matrices(typical_shape(405e9))
    ks = TINY if options.tiny else ON_GPU if on_gpu else ON_CPU
    shapes = [shape for _, shape in every]
    parts = priced(shapes, ks, device, 1 if options.tiny else options.rounds)
    rate = read_rate(1 << (24 if options.tiny else 30))
    overhead = around(70 if options.tiny else len(every))
    n_bytes = 2 * 2 * sum(m * n for m, n in shapes)
    rows, exact, factors = [], [], []
    for kind in dict.fromkeys(kind for kind, _ in every):
        found = [shape for name, shape in every if name == kind]
        m, n = found[0]
        k, part = min(m, n), parts[max(m, n) / min(m, n)]
        each = part.seconds(k, exact=True), part.seconds(k, exact=False)
        exact += [each[0]] * len(found)
        factors += [each[1]] * len(found)
        peak = f"{part.peak(k) / 2**30:.1f}" if on_gpu else "–"
        rows.append(
            (kind, str(len(found)), f"{m:,} × {n:,}", f"{2 * m * n / 2**30:.2f}", clock(each[0]), clock(each[1]), peak)
        )
    devices = CARDS if on_gpu else (1,)
    totals = [
        ("reading both sides, page cache, one thread", clock(n_bytes / rate)),
        ("reading both sides at 1.5 GB/s", clock(n_bytes / DISK)),
    ]
    for n_devices in devices:
        what = f"{n_devices} × {torch.cuda.get_device_name()}" if on_gpu else "this CPU"
        totals.append((f"exact spectra, {what}", clock(makespan(exact, n_devices))))
        totals.append((f"factors of rank {RANK}, {what}", clock(makespan(factors, n_devices))))
    totals.append((f"the work around {len(every)} matrices", clock(overhead * len(every))))
    largest = max(m * n for m, n in shapes)
    totals.append(
        ("host memory at 4 × the largest matrix in fp32, as speed.py measures it", f"{16 * largest / 2**30:.0f} GiB")
    )
    note = (
        f"{len(every)} matrices, two bf16 sides of {n_bytes / 2e9:,.0f} GB each. Measured at k = {ks[0]} and {ks[1]} on "
        f"{torch.cuda.get_device_name() if on_gpu else 'the CPU'}, extrapolated as k³: a plan, not a run, and rather too "
        f"long than too short (between the two k, exact spectra grew as k^{min(part.power for part in parts.values()):.1f} to "
        f"k^{max(part.power for part in parts.values()):.1f}). "
        f"One thread reads {rate / 1e9:.1f} GB/s from the page cache; {1e3 * overhead:.2g} ms a matrix are spent around it."
    )
    heads = ("layer type", "matrices", "shape", "GiB a side", "exact spectrum", f"rank {RANK}", "on the card, GiB")
    bars = [
        (f"our own overhead: {1e3 * overhead:.2g} ms a matrix of 64 × 64, solver included, bar 10", overhead < 0.01)
    ]
    publish("plan_405b", "A 405B pair, planned", note, [("", ("what", "estimate"), totals), ("By layer type", heads, rows)],
            [] if options.tiny else bars, write=not options.tiny, page="plan-405b-cuda" if on_gpu else "plan-405b")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
