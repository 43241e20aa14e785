"""What trained adapters say: the rank from which on LoRA is as good as the full fine-tune, with its interval.

Legend: S seeds, n held-out sequences with weights w (judged tokens), R ranks. Losses are means a token, in nats.
Bootstrap: seeds and sequences are drawn with replacement, the same draw for every run, so that differences are paired:
a seed's full fine-tune and its adapters saw the same batches and are judged on the same text. numpy and pandas only.

A run that diverged, or that is no better than the base, says that its training failed, not what its rank can hold: a
full fine-tune that did is nothing to compare with, and a rank of adapters that did is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.functional_ranks import N_RESAMPLES, FunctionalRank, Tolerance, draws, functional_rank

Array = NDArray[np.float64]
Outcome = Literal["gained", "no gain", "diverged"]
NONE: Final = FunctionalRank(None, None, None)


@dataclass(frozen=True)
class Yardstick:
    """The full fine-tunes that adapters are compared with.

    seeds: those whose full run did not diverge. outcome: "gained" where their mean loss is below the base's, with the
    whole 95 % interval; "diverged" where there is none. gain: nats, NaN without any. tolerance: nats.
    """

    seeds: tuple[int, ...]
    outcome: Outcome
    gain: float
    tolerance: float


@dataclass(frozen=True)
class Trained:
    """The adapters of one variant and group of targets against the full fine-tunes.

    ranks: ascending, those whose runs count. excess: (R,) mean of loss(adapter) − loss(full) over seeds and tokens;
    low, high: (R,) its 95 % interval. sufficient: the smallest rank from which on the excess is within the tolerance.
    own: the same against the group's own largest rank in place of the full fine-tune: where it has levelled off.
    spread: (R,) standard deviation over seeds of an adapter's own loss, NaN with one seed. failed: rank → how, for
    those that were trained and do not count. full: what they are compared with.
    """

    variant: str
    targets: str
    ranks: tuple[int, ...]
    excess: Array
    low: Array
    high: Array
    sufficient: FunctionalRank
    own: FunctionalRank
    spread: Array
    failed: Mapping[int, Outcome]
    full: Yardstick

    @property
    def levelled_off(self) -> bool:
        """Whether the loss has stopped falling before the largest rank, for certain."""
        return self.own.high is not None and self.own.high < self.ranks[-1]


def yardstick(
    runs: pd.DataFrame, losses: Mapping[str, Array], weights: Array, base: Array, tolerance: Tolerance, seed: int = 0
) -> Yardstick:
    """The full fine-tunes among the runs; arguments as `trained_ranks`."""
    full = _sound_full(runs, losses)
    if not full:
        return Yardstick((), "diverged", math.nan, tolerance.nats(0.0))
    gains = _gains(full, base)
    gain = float(_mean(gains, weights)[0])
    sure = np.percentile(_resampled(gains, weights, *_draws(len(full), len(weights), seed))[0], 2.5) > 0
    return Yardstick(tuple(full), "gained" if sure else "no gain", gain, tolerance.nats(gain))


def trained_ranks(
    runs: pd.DataFrame, losses: Mapping[str, Array], weights: Array, base: Array, tolerance: Tolerance, seed: int = 0
) -> list[Trained]:
    """One `Trained` a variant and group of targets.

    runs: rows with label, method, rank, targets, seed, diverged. losses: label → (n,) mean loss of each sequence;
    base: (n,) of the base model.
    """
    full = yardstick(runs, losses, weights, base, tolerance, seed)
    return [
        _trained(str(variant), str(targets), group, full, runs, losses, weights, base, tolerance, seed)
        for (variant, targets), group in runs[runs["method"] != "full"].groupby(["method", "targets"], sort=False)
    ]


def _trained(
    variant: str, targets: str, group: pd.DataFrame, full: Yardstick, runs: pd.DataFrame, losses: Mapping[str, Array],
    weights: Array, base: Array, tolerance: Tolerance, seed: int,
) -> Trained:  # fmt: skip
    failed: dict[int, Outcome] = {}
    counted: dict[int, list[Array]] = {}  # rank → its losses seed by seed
    start = float(base @ weights / weights.sum())
    for rank, rows in group.groupby("rank"):
        if rows["diverged"].any():
            failed[int(rank)] = "diverged"
            continue
        found = {row.seed: losses[row.label] for row in rows.itertuples()}
        if np.mean([loss @ weights / weights.sum() for loss in found.values()]) >= start:
            failed[int(rank)] = "no gain"
        elif all(one in found for one in full.seeds):
            counted[int(rank)] = [found[one] for one in full.seeds]
    if not counted or not full.seeds:
        nothing = np.empty(0)
        return Trained(variant, targets, (), nothing, nothing, nothing, NONE, NONE, nothing, failed, full)
    ranks = tuple(counted)
    picked, counts = _draws(len(full.seeds), len(weights), seed)
    F = _sound_full(runs, losses)
    L = np.stack([np.stack(one) for one in counted.values()])
    excess, own = L - np.stack(list(F.values()))[None], L - L[-1:]
    drawn, own_drawn = (_resampled(one, weights, picked, counts) for one in (excess, own))
    means = _mean(excess, weights)
    allowed = np.array([tolerance.nats(gain) for gain in _resampled(_gains(F, base), weights, picked, counts)[0]])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=1)
    spread = _per_seed(L, weights).std(axis=1, ddof=1) if len(F) > 1 else np.full(len(ranks), math.nan)
    return Trained(
        variant, targets, ranks, means, low, high,
        functional_rank(ranks, means, full.tolerance, drawn, allowed),
        functional_rank(ranks, _mean(own, weights), full.tolerance, own_drawn, allowed),
        spread, failed, full,
    )  # fmt: skip


def _sound_full(runs: pd.DataFrame, losses: Mapping[str, Array]) -> dict[int, Array]:
    """Seed → (n,) losses of its full fine-tune, ascending, without those that diverged."""
    rows = runs[(runs["method"] == "full") & ~runs["diverged"].astype(bool)].sort_values("seed")
    return {int(row.seed): losses[row.label] for row in rows.itertuples()}


def _gains(full: Mapping[int, Array], base: Array) -> Array:
    """(1, S, n) base − full."""
    return (base - np.stack(list(full.values())))[None]


def _draws(n_seeds: int, n: int, seed: int) -> tuple[NDArray[np.int64], Array]:
    """How often each seed (resamples, S) and each sequence (resamples, n) is in each resample."""
    picked = np.random.default_rng(seed).multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), N_RESAMPLES)
    return picked, draws(n, seed)


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
    shares = counts * weights
    by_seed = np.einsum("rsn,bn->rsb", D, shares) / shares.sum(axis=1)
    found: Array = np.einsum("rsb,bs->rb", by_seed, picked) / picked.sum(axis=1)
    return found


def equal_parameters(runs: pd.DataFrame, points: int = 5) -> pd.DataFrame:
    """The loss of each variant and group at the same numbers of trained parameters, interpolated between its ranks.

    runs: rows with method, targets, rank, n_trained, loss, diverged; those that diverged are left out. Returns one row
    a number and group: n_parameters, method, targets, rank (real, the one that has so many), loss (mean over seeds,
    linear in log parameters). Numbers are log-spaced over the range that at least two groups have; a group is missing
    where it is not in its range.
    """
    adapters = runs[(runs["method"] != "full") & ~runs["diverged"].astype(bool)]
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
