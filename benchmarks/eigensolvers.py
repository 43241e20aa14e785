"""Ways to all eigenvalues of a float64 Gram matrix on a GPU, beside `eigvalsh`: what each costs, and how exact it is.

    one split      the first step of a divide and conquer by the polar decomposition: the sign of G − μI by QDWH, by its
                   Cholesky steps alone (its first ones need the dearer QR steps, so this is a lower bound), and the
                   projection onto both halves; all that follows, down to small matrices, comes on top
    float32        `eigvalsh` of G rounded to float32, for its time; its error is what makes it no answer
    refined        all eigenvectors in float32, then one step of Ogita & Aishima in float64
    by bands       the products of a two-stage tridiagonalisation's first stage alone, to a band of 64 in blocks; the
                   factorisations of its panels, and its second stage, come on top
    beside CPU     eigvalsh of matrices of half the size on the GPU while the CPU's cores compute others: how many a second

The error is against numpy's float64 `eigvalsh`, of the largest eigenvalue. A Gram matrix of a Gaussian matrix with a
decaying part, as of a fine-tune. Writes docs/eigensolvers.md.

    python benchmarks/eigensolvers.py             # about 3 minutes on one H200
    python benchmarks/eigensolvers.py --tiny      # small ones, on whatever device there is; writes nothing
Source: Nakatsukasa & Higham 2013 (QDWH); Ogita & Aishima 2018 (refinement); Bischof, Lang & Sun 2000 (two stages).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from accuracy import publish
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_probe.devices import find_device
from lowrank_probe.float64 import gram

SIZES: Final = (1024, 4096, 8192)
BAND: Final = 64
ROUNDS: Final = 3


def gram_of_size(k: int, device: torch.device) -> Tensor:
    """G (k, k) of a (k, 2k) matrix: noise, and 64 directions that stand out of it by up to 30 ×."""
    generator = torch.Generator().manual_seed(k)
    A = torch.randn(k, 2 * k, generator=generator)
    B, C = torch.randn(k, 64, generator=generator), torch.randn(64, 2 * k, generator=generator)
    A += 30 * (B / torch.arange(1, 65)) @ C / (2 * k) ** 0.5
    return gram(A.to(device))


def split(G: Tensor) -> Tensor:
    """One split of the spectrum at its mean: QDWH by Cholesky steps, then both halves' matrices."""
    k = len(G)
    eye = torch.eye(k, dtype=G.dtype, device=G.device)
    X = G - torch.diagonal(G).mean() * eye
    X /= torch.linalg.matrix_norm(X)
    lower = 1e-8
    while abs(1 - lower) > 1e-14:
        d = (4 * (1 - lower**2) / lower**4) ** (1 / 3)
        a = (1 + d) ** 0.5 + 0.5 * (8 - 4 * d + 8 * (2 - lower**2) / (lower**2 * (1 + d) ** 0.5)) ** 0.5
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        L = torch.linalg.cholesky(torch.addmm(eye, X, X.T, alpha=c))
        X = (b / c) * X + (a - b / c) * torch.cholesky_solve(X, L)
        X = (X + X.T) / 2
        lower = min(1.0, lower * (a + b * lower**2) / (1 + c * lower**2))
    P = (X + eye) / 2  # the projector onto the upper part
    upper = min(k - 1, max(1, round(float(torch.diagonal(P).sum()))))
    generator = torch.Generator(G.device).manual_seed(0)
    Q = torch.linalg.qr(P @ torch.randn(k, upper, generator=generator, dtype=G.dtype, device=G.device))[0]
    return Q.T @ G @ Q


def refined(G: Tensor) -> Tensor:
    """Eigenvalues by float32 eigenvectors and one step of Ogita & Aishima in float64."""
    X = torch.linalg.eigh(G.float())[1].double()
    R = torch.eye(len(G), dtype=G.dtype, device=G.device) - X.T @ X
    S = X.T @ (G @ X)
    return torch.sort(torch.diagonal(S) / (1 - torch.diagonal(R))).values


def band_products(G: Tensor) -> Tensor:
    """The products of the first stage: for each panel one of the trailing matrix with it, and the rank-2b update."""
    A = G.clone()
    for start in range(BAND, len(A), BAND):
        trailing = A[start:, start:]
        V = trailing[:, :BAND].clone()
        W = trailing @ V
        W -= 0.5 * V @ (V.T @ W)
        trailing.addmm_(V, W.T, alpha=-1e-9).addmm_(W, V.T, alpha=-1e-9)
    return A


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """(median seconds of a few, the result), warmed up."""
    found = work()
    seconds = []
    for _ in range(ROUNDS):
        _wait(device)
        started = time.perf_counter()
        found = work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def a_second(G: Tensor, cores: int, seconds: float = 5.0) -> float:
    """Eigenproblems a second: the GPU one after the other, and so many CPU threads beside it."""
    host, until = G.cpu().numpy(), time.perf_counter() + seconds

    def on_device() -> int:
        n = 0
        while time.perf_counter() < until:
            torch.linalg.eigvalsh(G).cpu()
            n += 1
        return n

    def on_host() -> int:
        n = 0
        while time.perf_counter() < until:
            np.linalg.eigvalsh(host)
            n += 1
        return n

    with threadpool_limits(1), ThreadPoolExecutor(1 + cores) as pool:
        started = time.perf_counter()
        done = [pool.submit(on_device), *(pool.submit(on_host) for _ in range(cores))]
        return sum(one.result() for one in done) / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small ones; writes nothing")
    options = parser.parse_args(arguments)
    device = find_device("auto")
    rows: list[tuple[str, ...]] = []
    beside: list[tuple[str, ...]] = []
    for k in (128, 256) if options.tiny else SIZES:
        G = gram_of_size(k, device)
        exact_s, exact = timed(lambda G=G: torch.linalg.eigvalsh(G), device)
        truth = np.linalg.eigvalsh(G.cpu().numpy()) if k <= 4096 else exact.cpu().numpy()

        def error(found: Tensor, truth: np.ndarray = truth) -> str:
            return f"{np.abs(found.double().cpu().numpy() - truth).max() / truth[-1]:.1e}"

        single_s, single = timed(lambda G=G: torch.linalg.eigvalsh(G.float()), device)
        refined_s, better = timed(lambda G=G: refined(G), device)
        split_s, _ = timed(lambda G=G: split(G), device)
        band_s, _ = timed(lambda G=G: band_products(G), device)
        rows += [
            (f"{k:,}", "`eigvalsh`, float64", f"{1e3 * exact_s:.1f}", "1.00", error(exact)),
            (f"{k:,}", "one split by QDWH, at least", f"{1e3 * split_s:.1f}", f"{split_s / exact_s:.2f}", "–"),
            (f"{k:,}", "`eigvalsh`, float32", f"{1e3 * single_s:.1f}", f"{single_s / exact_s:.2f}", error(single)),
            (
                f"{k:,}",
                "float32 vectors, refined",
                f"{1e3 * refined_s:.1f}",
                f"{refined_s / exact_s:.2f}",
                error(better),
            ),
            (f"{k:,}", "to a band, products alone", f"{1e3 * band_s:.1f}", f"{band_s / exact_s:.2f}", "–"),
        ]
        print(*rows[-5:], sep="\n", file=sys.stderr)
        if k <= 1024:
            cores = (torch.get_num_threads(), 0)
            both, alone = (a_second(G, n, 0.5 if options.tiny else 5.0) for n in cores)
            beside.append((f"{k:,}", f"{alone:.0f}", f"{cores[0]}", f"{both:.0f}"))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    tables = [
        ("", ("k", "way", "ms", "× eigvalsh", "error / λ₁"), rows),
        ("CPU cores beside the GPU", ("k", "a second, GPU alone", "cores", "a second, with them"), beside),
    ]
    note = (
        f"{name}; medians of {ROUNDS}. What each way is says the script's head. None of the first four is used: a split "
        "alone costs two thirds of all eigenvalues, float32 is no faster on this card, and a first stage to a band, whose "
        "products are cheap, needs panels and a second stage that no library here has on a GPU. CPU cores beside the GPU "
        "double the rate at k = 1,024, but then the last digits would depend on who was free; up to k = 512 matrices are "
        "the CPU's by rule."
    )
    publish("eigensolvers", "Ways to all eigenvalues", note, tables, [], write=not options.tiny, page="eigensolvers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
