"""The two steps of a spectrum on a CPU, by numpy and by the OpenBLAS beneath it (lowrank_probe/openblas.py), interleaved in
one process: the Gram matrix of float32 matrices, and its eigenvalues directly and by way of a band.

The error is that of the eigenvalues against numpy's, of the largest. A Gaussian matrix with a decaying part, as of a
fine-tune. Writes docs/eigensolvers-cpu.md; FAIL where the way that is taken is the slower one.

    python benchmarks/cpu_steps.py             # about 4 minutes on 2 idle cores
    python benchmarks/cpu_steps.py --tiny      # small ones; writes nothing
Source: Bischof, Lang & Sun 2000 (two stages); LAPACK 3.7 (`dsyevd_2stage`).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final
from unittest import mock

import numpy as np
import torch
from accuracy import publish
from eigensolvers import gram_of_size
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lowrank_probe import float64, openblas

SIZES: Final = (512, 1024, 2048, 2816, 4096)
SHAPES: Final = ((1024, 1024), (2816, 1024), (8000, 1024))
ROUNDS: Final = 3
# Share by which the way that is taken may be the slower one, for the machine's noise.
SLACK: Final = 1.1


def interleaved(ways: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, one after the other in every round; the first round is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, mine in zip(ways, seconds, strict=True):
            started = time.perf_counter()
            way()
            mine.append(time.perf_counter() - started)
    return [statistics.median(mine[1:]) for mine in seconds]


def eigenvalue_rows(k: int, library: openblas.OpenBlas, threads: int) -> tuple[list[tuple[str, ...]], float]:
    """Lines of the table, and (by way of a band)/(directly)."""
    G = gram_of_size(k, torch.device("cpu")).numpy()
    scratch = G.copy()
    found: dict[str, NDArray[np.float64]] = {}

    # Each of its two solvers in both places, so that it is taken whatever k is.
    directly = replace(library, dsyevd_2stage=library.dsyevd)
    by_band = replace(library, dsyevd=library.dsyevd_2stage)

    def numpys() -> None:
        found["numpy"] = np.linalg.eigvalsh(G.T)

    def by(name: str, way: openblas.OpenBlas) -> Callable[[], None]:
        def work() -> None:
            np.copyto(scratch, G)
            found[name] = way.eigenvalues(scratch)

        return work

    ways = [numpys, by("in place", directly), by("by way of a band", by_band)]
    seconds = interleaved(ways, ROUNDS if k < 4096 else 1)
    rows = []
    for (name, values), own in zip(found.items(), seconds, strict=True):
        error = np.abs(values - found["numpy"]).max() / found["numpy"][-1]
        told = "–" if name == "numpy" else f"{error:.1e}"
        rows.append((f"{k:,}", f"{threads}", name, f"{1e3 * own:.0f}", f"{own / seconds[0]:.2f}", told))
    return rows, seconds[2] / seconds[1]


def gram_rows(shape: tuple[int, int]) -> list[tuple[str, ...]]:
    A = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    whole = A.numpy().astype(np.float64)

    def without() -> None:
        with mock.patch.object(float64, "openblas", return_value=None):
            float64.gram(A, half=True)

    ways = {
        "numpy, whole and in float64 already": lambda: whole.T @ whole,
        "upcast by blocks, numpy": without,
        "upcast by blocks, added in place": lambda: float64.gram(A, half=True),
    }
    seconds = interleaved(list(ways.values()), 4 * ROUNDS)
    return [
        (f"{shape[0]:,} × {shape[1]:,}", name, f"{1e3 * own:.1f}", f"{own / seconds[1]:.2f}")
        for name, own in zip(ways, seconds, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small ones; writes nothing")
    options = parser.parse_args(arguments)
    library = openblas.openblas()
    if library is None:
        print("numpy computes with another BLAS than OpenBLAS here: nothing to compare")
        return 0
    sizes, shapes = ((64, 128), ((96, 64),)) if options.tiny else (SIZES, SHAPES)
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    verdicts = []
    for threads in sorted({1, cores}):
        with threadpool_limits(threads):
            for k in sizes:
                more, ratio = eigenvalue_rows(k, library, threads)
                rows += more
                print(*more, sep="\n", file=sys.stderr)
                taken = ratio if library.by_band(k) else 1 / ratio
                way = "by way of a band" if library.by_band(k) else "directly"
                verdicts.append(
                    (
                        f"k = {k:,}, {threads} threads: {way} takes {taken:.2f} × the other way, bar {SLACK}",
                        taken <= SLACK,
                    )
                )
    with threadpool_limits(1):
        grams = [row for shape in shapes for row in gram_rows(shape)]
    tables = [
        ("", ("k", "threads", "eigenvalues", "ms", "× numpy", "error / λ₁"), rows),
        ("Gram matrices, one thread", ("matrix", "way", "ms", "× by numpy"), grams),
    ]
    note = (
        f"Medians of {ROUNDS} (4,096: once), interleaved. Eigenvalues in place: the time to copy the matrix is in it."
    )
    if not options.tiny:
        publish("cpu_steps", "The steps of a spectrum on a CPU", note, tables, verdicts, page="eigensolvers-cpu")
    return 0 if options.tiny or all(held for _, held in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
