"""What trained adapters say: the rank from which on LoRA is as good as the full fine-tune, with its interval.

Legend: S seeds, n held-out sequences with weights w (judged tokens), R ranks. Losses are means a token, in nats.
Bootstrap: seeds and sequences are drawn with replacement, the same draw for every run, so that differences are paired:
a seed's full fine-tune and its adapters saw the same batches and are judged on the same text. numpy and pandas only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.functional_ranks import N_RESAMPLES, FunctionalRank, Tolerance, draws, functional_rank

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trained:
    """The adapters of one variant and group of targets against the full fine-tunes.

    ranks: ascending. excess: (R,) mean of loss(adapter) − loss(full) over seeds and tokens; low, high: (R,) its 95 %
    interval. sufficient: the smallest rank from which on the excess is within the tolerance. own: the same against the
    group's own largest rank in place of the full fine-tune: where it has levelled off. tolerance: nats.
    spread: (R,) standard deviation over seeds of an adapter's own loss, NaN with one seed.
    """

    variant: str
    targets: str
    ranks: tuple[int, ...]
    excess: Array
    low: Array
    high: Array
    sufficient: FunctionalRank
    own: FunctionalRank
    tolerance: float
    spread: Array
    n_seeds: int

    @property
    def levelled_off(self) -> bool:
        """Whether the loss has stopped falling before the largest rank, for certain."""
        return self.own.high is not None and self.own.high < self.ranks[-1]


def trained_ranks(
    runs: pd.DataFrame, losses: Mapping[str, Array], weights: Array, base: Array, tolerance: Tolerance, seed: int = 0
) -> list[Trained]:
    """One `Trained` a variant and group of targets.

    runs: rows with label, method, rank, targets, seed. losses: label → (n,) mean loss of each sequence; base: (n,) of
    the base model. A run that diverged (NaN) counts as infinitely bad.
    """
    full = {row.seed: losses[row.label] for row in runs[runs["method"] == "full"].itertuples()}
    seeds = sorted(full)
    counts = draws(len(weights), seed)
    picked = np.random.default_rng(seed).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), N_RESAMPLES)
    F = np.stack([full[one] for one in seeds])
    gain = float(_mean(base[None, None] - F[None], weights)[0])
    tolerated = _nats(tolerance, gain)
    drawn_tolerance = np.array(
        [_nats(tolerance, one) for one in _resampled((base - F)[None], weights, picked, counts)[0]]
    )
    found = []
    for (variant, targets), group in runs[runs["method"] != "full"].groupby(["method", "targets"], sort=False):
        ranks = sorted(set(group["rank"]))
        labels = {(row.rank, row.seed): row.label for row in group.itertuples()}
        if any((rank, one) not in labels for rank in ranks for one in seeds):
            continue
        L = np.stack([np.stack([losses[labels[rank, one]] for one in seeds]) for rank in ranks])
        L = np.where(np.isfinite(L), L, np.inf)
        excess, own = (_differences(L, other) for other in (F[None], L[-1:]))
        drawn, own_drawn = (_resampled(one, weights, picked, counts) for one in (excess, own))
        means = _mean(excess, weights)
        # The largest rank is its own yardstick, which it meets by definition.
        bar = np.maximum(drawn_tolerance, 0.0)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=1, method="nearest")  # of what may be infinite
        with np.errstate(invalid="ignore"):  # ∞ where a run diverged
            spread = _per_seed(L, weights).std(axis=1, ddof=1) if len(seeds) > 1 else np.full(len(ranks), math.nan)
        found.append(
            Trained(
                str(variant), str(targets), tuple(ranks), means, low, high,
                functional_rank(ranks, means, tolerated, drawn, bar),
                functional_rank(ranks, _mean(own, weights), tolerated, own_drawn, bar),
                tolerated, spread, len(seeds),
            )
        )  # fmt: skip
    return found


def _nats(tolerance: Tolerance, gain: float) -> float:
    """The tolerance in nats where the full fine-tune gained so much over the base."""
    return (
        Tolerance().value
        if tolerance.share is not None and gain <= 0
        else (tolerance.value if tolerance.share is None else tolerance.share * gain)
    )


def _differences(L: Array, other: Array) -> Array:
    """(R, S, n) L − other, ∞ where L is."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(L), L - np.where(np.isfinite(other), other, 0.0), np.inf)


def _per_seed(D: Array, weights: Array) -> Array:
    """(R, S) means over the sequences, by tokens."""
    found: Array = D @ weights / weights.sum()
    return found


def _mean(D: Array, weights: Array) -> Array:
    """(R,) means over seeds and sequences of (R, S, n)."""
    found: Array = _per_seed(D, weights).mean(axis=1)
    return found


def _resampled(D: Array, weights: Array, picked: NDArray[np.int64], counts: Array) -> Array:
    """(R, resamples) the means of each resample of seeds (resamples, S) and sequences (resamples, n)."""
    finite = np.where(np.isfinite(D), D, 0.0)
    shares = counts * weights
    by_seed = np.einsum("rsn,bn->rsb", finite, shares) / shares.sum(axis=1)
    found: Array = np.einsum("rsb,bs->rb", by_seed, picked) / picked.sum(axis=1)
    diverged = ~np.isfinite(D).all(axis=2)
    found[(diverged.astype(float) @ picked.T) > 0] = np.inf
    return found


def equal_parameters(runs: pd.DataFrame, points: int = 5) -> pd.DataFrame:
    """The loss of each variant and group at the same numbers of trained parameters, interpolated between its ranks.

    runs: rows with method, targets, rank, n_trained, loss. Returns one row a number and group: n_parameters, method,
    targets, rank (real, the one that has so many), loss (mean over seeds, linear in log parameters). Numbers are
    log-spaced over the range that at least two groups have; a group is missing where it is not in its range.
    """
    adapters = runs[runs["method"] != "full"]
    curves = {}
    for key, group in adapters.groupby(["method", "targets"], sort=False):
        means = group.groupby("rank")[["n_trained", "loss"]].mean().sort_values("n_trained")
        if len(means) > 1 and means["loss"].notna().all():
            curves[key] = means
    rows = []
    ends = sorted((float(one["n_trained"].iloc[0]), float(one["n_trained"].iloc[-1])) for one in curves.values())
    if len(ends) > 1:
        low = sorted(first for first, _ in ends)[1]
        high = sorted(last for _, last in ends)[-2]
        for n in np.geomspace(low, high, points) if low < high else ():
            for (method, targets), means in curves.items():
                x = np.log(means["n_trained"].to_numpy(dtype=float))
                if x[0] - 1e-9 <= math.log(n) <= x[-1] + 1e-9:
                    log_ranks = np.log(means.index.to_numpy(dtype=float))
                    loss, rank = (float(np.interp(math.log(n), x, y)) for y in (means["loss"], log_ranks))
                    rows.append((round(n), method, targets, math.exp(rank), loss))
    return pd.DataFrame(rows, columns=["n_parameters", "method", "targets", "rank", "loss"])
