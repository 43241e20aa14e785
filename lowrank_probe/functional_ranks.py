"""The functional rank: the smallest rank whose loss is within a tolerance of the tuned model's. numpy only.

Legend: n sequences with weights w (judged tokens), L (states, n) sums of the merit a sequence; mean = ΣL / Σw.
Bootstrap: sequences are drawn with replacement, the same draw for every state, so that differences are paired.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lowrank_probe.errors import ProbeError

N_RESAMPLES: Final = 1000
INTERVAL: Final = (2.5, 97.5)
# Where the tuned model gained nothing on the text, of which a share could be taken.
FALLBACK: Final = 0.01


@dataclass(frozen=True)
class Tolerance:
    """By how much a state may be worse than the tuned model: `share` of what tuned gained over the base, or `value`."""

    value: float = FALLBACK
    share: float | None = None

    def __str__(self) -> str:
        return f"{self.value:g}" if self.share is None else f"{100 * self.share:g}%"

    def nats(self, gain: float) -> float:
        """By how much in the merit's unit, where tuned gained so much over the base; of no gain there is no share."""
        if self.share is None:
            return self.value
        return self.share * gain if gain > 0 else FALLBACK

    def fallback(self, gain: float, what: str) -> list[str]:
        """The note that a share of nothing was asked for, if it was. what: gained nothing."""
        if self.share is None or gain > 0:
            return []
        return [
            f"{what} is not better than the base on this text ({-gain:.3g} worse): {self} of nothing is no tolerance, "
            f"so that {FALLBACK:g} is taken"
        ]


@dataclass(frozen=True)
class FunctionalRank:
    """rank: the smallest of the grid within the tolerance, with every larger one of the grid too.

    low, high: what the smallest rank of all lies between, 95 % of its bootstrap. A rank between two of the grid was not
    looked at: low is one above the largest of the grid that falls short at the 2.5 % point (0 where none does and 0 was
    tried, else at least 1), high the rank of the grid that is enough at the 97.5 % point. None: beyond the largest of
    the grid.
    """

    rank: int | None
    low: int | None
    high: int | None


def parse_tolerance(text: str | float) -> Tolerance:
    """The tolerance of "5%" (of what was gained) or 0.01 (in the merit's unit). Raises `ProbeError` otherwise."""
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%?)\s*", str(text))
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if not (found and math.isfinite(value) and value > 0):
        raise ProbeError(f"tolerance {text!r}: expected nats such as 0.01, or a share of what was gained such as 5%")
    return Tolerance(share=value / 100) if found[2] else Tolerance(value)


def draws(n: int, seed: int) -> NDArray[np.float64]:
    """(`N_RESAMPLES`, n) how often each sequence is in each resample."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)


def means(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(states,) Σ sums / Σ weights over the sequences; NaN without any."""
    total = weights.sum()
    return sums.sum(-1) / total if total else np.full(sums.shape[:-1], math.nan)


def resampled(
    sums: NDArray[np.float64], weights: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(states, resamples) the means of every resample; one without any judged token is left at NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums @ counts.T) / (weights @ counts.T)


def interval(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The 2.5 and 97.5 % points over the resamples (the last axis)."""
    low, high = np.nanpercentile(values, INTERVAL, axis=-1)
    return low, high


def functional_rank(
    ranks: Sequence[int], excess: NDArray[np.float64], tolerance: float,
    excess_drawn: NDArray[np.float64], tolerance_drawn: NDArray[np.float64],
) -> FunctionalRank:  # fmt: skip
    """The functional rank on a grid of ascending ranks.

    excess: (ranks,) mean paired difference to the tuned model. excess_drawn: (ranks, resamples), tolerance_drawn:
    (resamples,) the same of every resample.
    """
    point = _smallest(excess[:, None] <= tolerance)[0]
    drawn = _smallest(excess_drawn <= tolerance_drawn)
    low = int(np.percentile(drawn, INTERVAL[0], method="lower"))
    high = int(np.percentile(drawn, INTERVAL[1], method="higher"))
    rank, above, enough = (ranks[int(at)] if at < len(ranks) else None for at in (point, low, high))
    if above is not None:
        above = ranks[low - 1] + 1 if low else min(above, 1)
    return FunctionalRank(rank, above, enough)


def _smallest(within: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each column the first row from which on all are true; the number of rows where the last is not."""
    from_here = np.logical_and.accumulate(within[::-1], axis=0)
    count: NDArray[np.int64] = len(within) - from_here.sum(axis=0)
    return count
