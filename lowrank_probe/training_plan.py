"""What a reference training consists of: the runs, one by one, and the recipe that all of them share. No torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from lowrank_probe.errors import ProbeError

Variant = Literal["lora", "rslora", "dora", "pissa", "lora+"]
FULL: Final = "full"
VARIANTS: Final[tuple[str, ...]] = get_args(Variant)
# Where the search for a learning rate begins, half a decade apart. LoRA's best is about 10 × full fine-tuning's
# (Biderman et al. 2024; "LoRA Without Regret", 2025), whatever the rank, with α fixed and scaling α/r.
FULL_RATES: Final = (1e-5, 3e-5, 1e-4, 3e-4)
LORA_RATES: Final = (1e-4, 3e-4, 1e-3, 3e-3)

_NO_RESULTS: Final = ("save_s", "stop_on_nan", "report_to")


@dataclass(frozen=True)
class Recipe:
    """What all runs share: the same data in the same order, the same steps and the same schedule.

    steps: optimizer steps; each sees batch·accumulation sequences of `length` tokens on every process. alpha: LoRA's α,
    the same at every rank, so that scaling·learning rate does not grow with it. warmup: share of the steps in which the
    rate rises; then it falls to 0 by `schedule`. evaluations: how often the held-out loss is taken on the way.
    precision: "fp32", or "bf16" (autocast over float32 weights). save_s: seconds after which the state of a run is
    saved, so that a killed one goes on from there. lr_ratio: of LoRA+, the rate of B over that of A.
    """

    steps: int = 200
    batch: int = 8
    accumulation: int = 1
    length: int = 512
    alpha: float = 32.0
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluations: int = 8
    precision: str = "fp32"
    checkpointing: bool = False
    save_s: float = 300.0
    lr_ratio: float = 16.0
    stop_on_nan: bool = False
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "length", "evaluations"):
            if (value := getattr(self, name)) < 1:
                raise ProbeError(f"{name}: expected 1 or more, found {value}")
        if self.precision not in ("fp32", "bf16"):
            raise ProbeError(f"precision: expected fp32 or bf16, found {self.precision}")
        if not 0 < self.alpha < math.inf:
            raise ProbeError(f"alpha: expected a number above 0, found {self.alpha:g}")
        if not 0 <= self.warmup < 1:
            raise ProbeError(f"warmup: expected a share of the steps from 0 to 1, found {self.warmup:g}")

    def identity(self) -> dict[str, Any]:
        """What a training that goes on must have had before: all that its results depend on.

        Loggers and saved states change none. Nor does stopping at NaN: a run with a NaN is no evidence, whether it was
        stopped there or trained on, and every other run is the same.
        """
        return {name: value for name, value in asdict(self).items() if name not in _NO_RESULTS}

    @property
    def sequences(self) -> int:
        """Sequences that one process sees in all steps."""
        return self.steps * self.batch * self.accumulation


@dataclass(frozen=True)
class Fit:
    """One training: method "full" or a variant of LoRA, its rank (0 for full) and targets, seed, learning rate, steps.

    The seed decides the order of the data and LoRA's start, so that runs of one seed see the same batches.
    search: it only looks for a learning rate.
    """

    method: str
    rank: int
    targets: str
    seed: int
    lr: float
    steps: int
    search: bool = False

    @property
    def label(self) -> str:
        """The name of its directory, such as lora-r8-attention-s0."""
        if self.search:
            return f"search-{self.method}-lr{self.lr:.0e}".replace("+", "plus").replace("e-0", "e-")
        group = self.targets.replace("*", "all").replace(",", "+").replace("/", "_")
        return (
            f"full-s{self.seed}" if self.method == FULL else f"{self.method}-r{self.rank}-{group}-s{self.seed}"
        ).replace("+", "plus")


@dataclass(frozen=True)
class Plan:
    """Every run but the searches. ranks ascending; targets: groups as `ModelShape.adapted` takes them."""

    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    variants: tuple[str, ...] = ("lora",)

    def __post_init__(self) -> None:
        for name in ("ranks", "targets", "seeds", "variants"):
            values = getattr(self, name)
            if not values:
                raise ProbeError(f"{name}: expected at least one")
            if len(set(values)) < len(values):
                raise ProbeError(f"{name}: {', '.join(map(str, values))}: one of them is there twice")
        if min(self.ranks) < 1:
            raise ProbeError(f"rank {min(self.ranks)}: a rank is at least 1")
        if odd := [one for one in self.variants if one not in VARIANTS]:
            raise ProbeError(f"variant {odd[0]}: expected one of {', '.join(VARIANTS)}")

    @property
    def methods(self) -> tuple[str, ...]:
        return (FULL, *self.variants)

    def searched(self, method: str, lr: float, steps: int, targets: str) -> Fit:
        """The run that tries a learning rate for a method: the middle rank, the first seed.

        targets: the widest group; a rate that is good for fewer layers can be too high for more.
        """
        rank = 0 if method == FULL else self.ranks[len(self.ranks) // 2]
        return Fit(method, rank, "" if method == FULL else targets, self.seeds[0], lr, steps, search=True)

    def fits(self, rates: dict[str, float], steps: int) -> list[Fit]:
        """Full fine-tuning at every seed, then the adapters, seed by seed from the small ranks up."""
        found = [Fit(FULL, 0, "", seed, rates[FULL], steps) for seed in self.seeds]
        found += [
            Fit(variant, rank, group, seed, rates[variant], steps)
            for seed in self.seeds
            for variant in self.variants
            for group in self.targets
            for rank in self.ranks
        ]
        return found

    def facts(self) -> dict[str, Any]:
        return {name: list(getattr(self, name)) for name in ("ranks", "targets", "seeds", "variants")}


def next_rate(tried: dict[float, float], start: Sequence[float], most: int) -> float | None:
    """The next learning rate to try, None where the best is found; tried: rate → held-out loss (∞ where it diverged).

    First all of `start`; then, while the best lies at an end, half a decade beyond it, in all at most `most` rates.
    """
    for rate in start:
        if rate not in tried:
            return rate
    best = min(tried, key=lambda rate: tried[rate])
    if len(tried) >= most or tried[best] == float("inf"):
        return None
    if best == max(tried):
        return _half_decade(best, 1)
    if best == min(tried):
        return _half_decade(best, -1)
    return None


def _half_decade(rate: float, direction: int) -> float:
    """1e-4 → 3e-4 → 1e-3: the neighbour of a rate among 1 and 3 of each decade."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    if direction > 0:
        return float(f"3e{exponent}") if mantissa == "1" else float(f"1e{int(exponent) + 1}")
    return float(f"1e{exponent}") if mantissa == "3" else float(f"3e{int(exponent) - 1}")
