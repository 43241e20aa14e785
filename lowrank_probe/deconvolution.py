"""The singular values of ΔW from those of ΔW + N, N independent noise of known size: the whole spectrum at once.

Under growing noise the squared singular values λ = σ² move as Bru's process (the Wishart case of Dyson's Brownian
motion): with t the variance of an entry, k = min and N = max of the shape,

    dλ_i/dt = N + Σ_{j≠i} (λ_i + λ_j)/(λ_i − λ_j)

up to fluctuations that vanish as the matrix grows. `forward` follows it from the clean values; `deconvolve` looks for
the clean values that end at the seen ones. Isolated directions in noise are the well-known special case
(Benaych-Georges & Nadakuditi 2012); this also holds without a gap, where many directions push each other apart.

Numpy only. Legend: k = min(m, n); λ (B,) block means of σ², descending; w (B,) how many values a block stands for.
Source: the process: Bru 1989; its deterministic limit: Dozier & Silverstein 2007. The inversion is ours, compared with
planted and real updates by benchmarks/calibration.py.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from lowrank_probe.metrics import Values, denoise

N_SINGLES: Final = 24
N_BLOCKS: Final = 72
STEPS: Final = 20
ROUNDS: Final = 8
GOOD_FIT: Final = 1e-3


def deconvolve(s: Values, noise_std: float, shape: tuple[int, int], fro_norm: float) -> Values:
    """Singular values (k,) of the clean matrix, with Σσ² = fro_norm².

    s: (k,) descending, of the matrix with noise; noise_std: the noise's standard deviation an entry; fro_norm: ‖ΔW‖_F
    without the noise. Values far below the noise are known as a group only, and are given as smooth as they can be.
    """
    k, long = min(shape), max(shape)
    if noise_std == 0.0 or fro_norm <= 0.0:
        return s.copy()
    unit = fro_norm**2
    t = noise_std**2 / unit
    edges = _blocks(k)
    w = np.diff(edges).astype(np.float64)
    seen = np.add.reduceat(s**2, edges[:-1]) / w / unit
    clean = np.add.reduceat(denoise(s, noise_std, shape) ** 2, edges[:-1]) / w / unit
    hidden = clean <= 0
    if hidden.any():  # what is below the edge shares what is left of the energy
        clean[hidden] = max(0.0, 1.0 - float(clean @ w)) / w[hidden].sum()
    clean = _descending(clean, w)
    clean /= clean @ w
    for _ in range(ROUNDS):  # few: a perfect fit would fit the fluctuations too
        residual = seen - forward(clean, w, t, long)
        if float(np.abs(residual) @ w) < GOOD_FIT:
            break
        clean = _descending(np.maximum(clean + residual, 0.0), w)
        clean /= max(float(clean @ w), 1e-300)
    return np.sqrt(_spread(clean, edges) * unit)


def with_tail(s: Values, fro_norm: float, k: int) -> Values:
    """(k,) values: the largest, as `--top` gives them, and a smooth stand-in for the rest with the energy it has.

    σ²_{K+j} = σ²_K·(1 − u)^a, u from 0 to 1, a from the energy. What lies far below hardly moves the largest ones.
    """
    count = k - len(s)
    left = fro_norm**2 - float(np.sum(s**2))
    if count <= 0 or not len(s) or left <= 0:
        return np.pad(s, (0, max(0, count)))
    a = max(0.0, count * float(s[-1]) ** 2 / left - 1)
    u = (np.arange(count) + 0.5) / count
    tail = (1 - u) ** a
    tail[0] = max(tail[0], 1e-300)  # where next to nothing is left, all of them come to 0
    return np.concatenate([s, np.sqrt(tail * left / tail.sum())])


def forward(clean: Values, w: Values, t: float, long: int) -> Values:
    """λ after noise of variance t an entry, from clean block means; `long` the longer side of the matrix."""
    times = t * (np.arange(1, STEPS + 1) / STEPS) ** 2
    lam = _split_ties(clean, w, times[0], long)
    before = 0.0
    for time in times:
        dt, before = time - before, time
        difference = lam[:, None] - lam[None, :]
        kernel = (lam[:, None] + lam[None, :]) * difference / (difference**2 + (0.5 * long * dt) ** 2)
        lam = np.maximum(lam + dt * (long + kernel @ w), 0.0)
    return lam


def _split_ties(lam: Values, w: Values, t: float, long: int) -> Values:
    """Equal values repel each other, which the drift alone would not show: g of them into a semicircle of radius
    2√(2λ·t·g), or 2t√(long·g) where they are zero (Marchenko–Pastur)."""
    starts = np.flatnonzero(np.concatenate([[True], np.diff(lam) < -1e-6 * lam[:-1]]))
    group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(lam)]))
    size = np.bincount(group, w)
    middle = np.cumsum(w) - w / 2
    centre = np.bincount(group, w * middle) / size
    place = (centre[group] - middle) / (size[group] / 2)
    g = size[group]
    return np.maximum(lam + 2 * np.sqrt(2 * lam * t * g) * place + 2 * t * np.sqrt(long * g) * (1 + place), 0.0)


def _blocks(k: int) -> NDArray[np.int64]:
    """Edges of the blocks: the leading values one by one, the rest in blocks that widen."""
    if k <= N_SINGLES + N_BLOCKS:
        return np.arange(k + 1)
    tail = N_SINGLES + np.round((k - N_SINGLES) * np.linspace(0, 1, N_BLOCKS + 1) ** 1.5).astype(np.int64)
    return np.unique(np.concatenate([np.arange(N_SINGLES), tail]))


def _descending(x: Values, w: Values) -> Values:
    """The descending sequence nearest to x in weighted least squares (pool adjacent violators)."""
    values: list[float] = []
    weights: list[float] = []
    counts: list[int] = []
    for value, weight in zip(x.tolist(), w.tolist(), strict=True):
        count = 1
        while values and values[-1] < value:
            last, w_last = values.pop(), weights.pop()
            value = (value * weight + last * w_last) / (weight + w_last)
            weight += w_last
            count += counts.pop()
        values.append(value)
        weights.append(weight)
        counts.append(count)
    return np.repeat(values, counts)


def _spread(block: Values, edges: NDArray[np.int64]) -> Values:
    """(k,) values from block means: linear in the index between the middles of blocks, each block's mean kept."""
    w = np.diff(edges)
    middle = edges[:-1] + (w - 1) / 2
    fine = np.interp(np.arange(edges[-1]), middle, block)
    mean = np.add.reduceat(fine, edges[:-1]) / w
    fine *= np.repeat(np.divide(block, mean, out=np.zeros_like(block), where=mean > 0), w)
    return np.asarray(np.sort(fine)[::-1])
