"""10,000 small matrices, as of a model of many experts: what the tool adds to the eigen-solver, matrix by matrix.

A pair of 10,000 experts' matrices (k, k) in bf16, their update of rank 8. The whole process of `probe spectrum` on one
core (one after the other, so that times add up), beside a process that only starts and beside float64 Gram + `eigvalsh`
alone. The rest is told apart by the run's own timeline: reading, the noise of storage, and all else: scheduling, rows,
what is kept at once, tables and the page. Then the same on all cores; and for k = 512 and 1,024, where fewer do, what
seven times as many cost more, each the less of two (a disk that is busy elsewhere once stops a run for longer than all of
this takes). Matrices up to k = 512 are the CPU's beside a GPU, too. Writes docs/benchmarks-small-matrices.md.

    python benchmarks/small_matrices.py                    # about 10 minutes
    python benchmarks/small_matrices.py --count 500        # a look
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd
import torch
from accuracy import publish
from gpu import prepare, probe_s, start_s
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

import lowrank_probe as lp
from lowrank_probe.float64 import eigvalsh, gram
from lowrank_probe.malloc import trim

COUNT: Final = 10_000
WIDTH: Final = 256
EXPERTS: Final = 128
OVERHEAD_BAR_MS: Final = 1.0
ONE_THREAD: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PHASES: Final = ("read", "spectrum", "noise")
# k → how many: seven times as many are measured beside them.
WIDER: Final = {512: 200, 1024: 60}


def make_pair(root: Path, count: int, width: int = WIDTH) -> tuple[Path, Path]:
    """(base, tuned) directories: count matrices of experts (width, width), ‖ΔW‖/‖W‖ = 2e-2."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for i in range(count):
        W = 0.02 * torch.randn(width, width, generator=generator)
        B, A = (torch.randn(width, 8, generator=generator) for _ in range(2))
        D = B @ A.T
        name = f"model.layers.{i // EXPERTS}.mlp.experts.{i % EXPERTS}.up_proj.weight"
        base[name] = W.bfloat16()
        tuned[name] = (W + 2e-2 * D * torch.linalg.norm(W) / torch.linalg.norm(D)).bfloat16()
    for side, tensors in (("base", base), ("tuned", tuned)):
        (root / side).mkdir(parents=True)
        save_file(tensors, root / side / "model.safetensors")
        (root / side / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}), encoding="utf-8")
    os.sync()  # a run that keeps what it finished would wait for these files too
    return root / "base", root / "tuned"


def kernel_s(rounds: int = 200) -> float:
    """Seconds of float64 Gram + `eigvalsh` of one matrix."""
    A = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    eigvalsh(gram(A, half=True))
    started = time.perf_counter()
    for _ in range(rounds):
        eigvalsh(gram(A, half=True))
    return (time.perf_counter() - started) / rounds


def more_ms(root: Path, width: int, few: int) -> float:
    """Milliseconds a matrix beside reading, solver and noise: what 6·few matrices more than few cost, in one process;
    each the less of two runs, after one that warms up."""
    rest = []
    for n in (few, few, 7 * few, few, 7 * few):
        where = Path(tempfile.mkdtemp(dir=root))
        sides = make_pair(where, n, width)
        trim()  # what made the pair is given back before the clock starts
        started = time.perf_counter()
        found = lp.spectrum(*sides, device="cpu", out=where / "out")
        rest.append(time.perf_counter() - started - sum(found.facts["seconds"][name] for name in PHASES))
    return 1e3 * (min(rest[2], rest[4]) - min(rest[1], rest[3])) / (6 * few)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT)
    n = parser.parse_args(arguments).count
    os.environ |= dict.fromkeys(ONE_THREAD, "1")
    torch.set_num_threads(1)
    threadpool_limits(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sides = make_pair(root, n)
        prepare(torch.device("cpu"))
        started, alone = start_s(torch.device("cpu")), kernel_s()
        whole = probe_s("spectrum", *sides, "--device", "cpu", "--out", root / "out")
        times = pd.read_csv(root / "out" / "timeline.csv")
        wider = {k: more_ms(root, k, few) for k, few in WIDER.items()} if n == COUNT else {}
        for name in ONE_THREAD:
            os.environ.pop(name, None)
        together = probe_s("spectrum", *sides, "--device", "cpu", "--out", root / "all")
    phases = (times["stop_s"] - times["start_s"]).groupby(times["phase"]).sum()
    rest = 1e3 * (whole - started - float(phases.sum())) / n

    def each(seconds: float) -> str:
        return f"{1e3 * seconds / n:.2f}"

    rows = [
        ("float64 Gram + eigvalsh alone", f"{1e3 * alone:.2f}"), ("the whole process, less its start", each(whole - started)),
        *((f"… {phase}", each(phases[phase])) for phase in PHASES), ("… all else", f"{rest:.2f}"),
        (f"the whole process on {os.cpu_count()} cores, less its start", each(together - started)),
        *((f"all else at k = {k:,}", f"{ms:.2f}") for k, ms in wider.items()),
    ]  # fmt: skip
    told = f"ms a matrix beside reading, the eigen-solver and the noise of storage, bar {OVERHEAD_BAR_MS:g}"
    bars = [(f"k = {k:,}: {ms:.2f} {told}", ms <= OVERHEAD_BAR_MS) for k, ms in {WIDTH: rest, **wider}.items()]
    note = (
        f"{n:,} matrices of {WIDTH} × {WIDTH}, bf16; one core; at k = 512 and 1,024 what more matrices cost more, each the "
        "less of two runs."
    )
    publish("small_matrices", "Small matrices", note, [("", ("what", "ms a matrix"), rows)], bars, write=n == COUNT, page="benchmarks-small-matrices")  # fmt: skip
    return 0 if all(ok for _, ok in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
