"""Ranks for all matrices of a model: fixed, by energy, by the noise edge, or by one budget for all. numpy only.

Legend: a unit is what one rank is chosen for, a matrix ΔW (m, n), or the E matrices of one expert parameter ("copies").
Rank r costs E·r·(m + n) parameters, and keeps Σ_{j≤r} σ_j² of ‖ΔW‖_F², σ_j² summed over the copies.
A list of singular values may be truncated. The energy kept stays exact, because `fro_norm` comes from the entries; what
would need the tail is an error or a rule of its own, never a guess.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from lowrank_probe import metrics
from lowrank_probe.amounts import parse_amount
from lowrank_probe.errors import ProbeError
from lowrank_probe.metrics import Values

# Upper bounds for a safetensors header. A file: its length (8), the braces, the metadata, the padding. A tensor, beside
# the unit's name: dtype, shape, offsets, punctuation (at most 100), and what PEFT puts around the name (at most 50).
FILE_OVERHEAD: Final = 64
TENSOR_OVERHEAD: Final = 160

_ACCEPTED: Final = (
    "expected parameters (40000000, 500K, 40M, 1.5G) or bytes (900KB, 80MB, 1.5GB; 80MiB, 1.5GiB in powers of 1024)"
)


@dataclass(frozen=True, eq=False)
class Unit:
    """What one rank is chosen for: one matrix ΔW, or all the experts of one parameter.

    shape: (m, n) as (out, in). s: (k,) singular values, descending, or (copies, k). fro_norm: exact ‖ΔW‖_F over all
    copies, from the entries. whole: s holds every value that is not zero; else only the k leading ones.
    denoised: as s, with the storage noise taken out, and denoised_fro_norm, ‖ΔW‖_F without it; None: no noise known.
    signal_rank, r90 (denoised): as in the table, the largest over the copies; NaN: unknown or not reached.
    Raises `ProbeError` for NaN, Inf, or values that are not (k,) or (copies, k), descending, with k ≤ min(m, n).
    """

    name: str
    shape: tuple[int, int]
    s: Values
    fro_norm: float
    copies: int = 1
    whole: bool = True
    denoised: Values | None = None
    denoised_fro_norm: float = math.nan
    signal_rank: float = math.nan
    r90: float = math.nan

    def __post_init__(self) -> None:
        _check_values(self, self.s, self.fro_norm)
        if self.denoised is not None:
            _check_values(self, self.denoised, self.denoised_fro_norm)

    @property
    def rank_parameters(self) -> int:
        """Parameters of one rank: copies·(m + n)."""
        return self.copies * sum(self.shape)

    def spectrum(self, denoised: bool = False) -> tuple[Values, float]:
        """((k,) singular values √Σ_e σ_{e,j}² over the copies e, their ‖ΔW‖_F); as stored where no noise is known."""
        s, norm = self._values(denoised)
        return (s if s.ndim == 1 else np.sqrt((s**2).sum(axis=0))), norm

    def gains(self, denoised: bool = False) -> tuple[Values, float]:
        """((k,) energies Σ_e σ_{e,j}² of the ranks j, ‖ΔW‖_F): not squared roots, whose rounding would order what is
        equal."""
        s, norm = self._values(denoised)
        return (s**2 if s.ndim == 1 else (s**2).sum(axis=0)), norm

    def _values(self, denoised: bool) -> tuple[Values, float]:
        if denoised and self.denoised is not None:
            return self.denoised, self.denoised_fro_norm
        return self.s, self.fro_norm

    def energy(self, r: int) -> float:
        """Σ_{i≤r} σ² / ‖ΔW‖_F², of ΔW as stored; NaN where ΔW = 0, or r is beyond the known values."""
        s, norm = self.spectrum()
        return metrics.energy(s, norm, min(r, len(s)) if self.whole else r)


@dataclass(frozen=True)
class Allotment:
    """The rank of one unit, the rule that bound it, what it costs (parameters), and the share of ‖ΔW‖_F² it keeps.

    rule: what was asked for ("fixed", "energy", "denoised energy", "budget"; "signal_rank", "r90", "half break-even" of
    `auto`), or what stopped it before: "min(m, n)", "max_rank", "all values" (none is left that is not zero), "known
    values" (only the leading ones are known, and all of them are kept), "ΔW = 0". energy: NaN where it is not known.
    """

    name: str
    rank: int
    rule: str
    parameters: int
    energy: float


class Budget(TypedDict, total=False):
    """The allowance as `by_budget` takes it: one of the two."""

    parameters: int
    budget_bytes: int


def parse_budget(text: str) -> Budget:
    """`"40M"` → {"parameters": 40_000_000}; `"80MB"`, `"80MiB"`, `"1.5GB"` → {"budget_bytes": …}; parts are cut off.

    K, M, G, T are powers of 1000, with iB powers of 1024; case does not matter. Raises `ProbeError` for anything else.
    """
    try:
        amount, unit = parse_amount(text)
    except ValueError as error:
        raise ProbeError(f"budget {text!r} {error}; {_ACCEPTED}") from None
    if amount < 1:
        raise ProbeError(f"budget {text!r} is nothing; {_ACCEPTED}")
    return {"budget_bytes": amount} if unit else {"parameters": amount}


def fixed(
    units: Sequence[Unit], r: int, *, max_rank: int | None = None, rank_multiple: int = 1
) -> tuple[Allotment, ...]:
    """Rank r for every unit, at most min(m, n). Raises `ProbeError` for r < 1.

    Here and below, max_rank caps every rank, and ranks are multiples of rank_multiple (rounded up) or the cap.
    """
    _check_positive("rank", r)
    return _allot(units, [(r, "fixed")] * len(units), max_rank, rank_multiple)


def by_energy(
    units: Sequence[Unit], p: float, *, denoised: bool = False, max_rank: int | None = None, rank_multiple: int = 1
) -> tuple[Allotment, ...]:
    """The least rank of each unit with Σ_{i≤r} σ² ≥ p·‖ΔW‖_F²; denoised: of σ and ‖ΔW‖_F without storage noise.

    Where all values together fall short of p, as denoised ones may, every one that is not zero is kept ("all values").
    Raises `ProbeError` for p outside (0, 1], and where only the leading values are known and do not reach p.
    """
    if not 0 < p <= 1:
        raise ProbeError(f"energy is {p}, expected a share of ‖ΔW‖² above 0 and at most 1, such as 0.9")
    wanted, short = [], []
    for unit in units:
        s, norm = unit.spectrum(denoised)
        rule = "denoised energy" if denoised and unit.denoised is not None else "energy"
        r = metrics.energy_rank(s, norm, p) if norm > 0.0 else 0.0
        cap, cap_rule = _cap(unit, max_rank)
        if not math.isnan(r):
            wanted.append((int(r), rule))
        elif unit.whole:
            wanted.append((int(np.count_nonzero(s)), "all values"))
        elif len(s) >= cap:
            wanted.append((cap, cap_rule))
        else:
            held = f"{np.sum(s**2) / norm**2:.4g}"
            short.append(f"{unit.name}: the {len(s)} leading singular values, all that are known, hold {held} of ‖ΔW‖²")
    if short:
        others = f"; so with {len(short) - 1} more" if len(short) > 1 else ""
        raise ProbeError(f"{short[0]}, not {p:g}{others}; compute all (leave --top out), or ask for less energy")
    return _allot(units, wanted, max_rank, rank_multiple)


def auto(units: Sequence[Unit], *, max_rank: int | None = None, rank_multiple: int = 1) -> tuple[Allotment, ...]:
    """The least of signal_rank (what is no storage noise), r90 (denoised) and half the break-even rank mn/(m + n).

    The rule says which one binds. An unknown one (NaN) does not bind, and the third is always known: the factors are
    never more than half as large as ΔW, unless at rank 1. A signal_rank of 0 is rank 0: nothing but noise is seen.
    """
    wanted = []
    for unit in units:
        half = max(1.0, metrics.break_even_rank(unit.shape) // 2)
        ranks = {"signal_rank": unit.signal_rank, "r90": unit.r90, "half break-even": half}
        rule = min((rule for rule in ranks if not math.isnan(ranks[rule])), key=ranks.__getitem__)
        wanted.append((int(ranks[rule]), rule))
    return _allot(units, wanted, max_rank, rank_multiple)


def by_budget(
    units: Sequence[Unit],
    *,
    parameters: int | None = None,
    budget_bytes: int | None = None,
    bytes_per_parameter: int = 4,
    file_overhead: int = FILE_OVERHEAD,
    tensor_overhead: int = TENSOR_OVERHEAD,
    denoised: bool = False,
    max_rank: int | None = None,
    rank_multiple: int = 1,
) -> tuple[Allotment, ...]:
    """Ranks that keep the most energy Σσ² over all units within one budget, in parameters or in bytes of the file.

    A step is one rank of a unit (or rank_multiple of them, the last step up to the cap); its price is energy per cost,
    σ²/(m + n). σ descends, so prices descend within a unit: its energy is concave in its cost, and buying steps by
    falling price takes each unit's in order. Then:

    1. While every step fits, nothing of the same cost keeps more: whatever it has instead has no higher price.
    2. Let x be the first step that does not fit, and L what is left. No choice within the budget keeps more than
       L·price(x) on top, as if a part of x could be had. L < cost(x): the optimum is less than the energy of x away.
    3. What is left goes to the next best steps that fit; a unit is closed when its next one does not. This only adds
       energy, so 2 still holds, and in the end no step that keeps anything fits.

    In bytes, a unit's first rank also pays for the headers of its two tensors: file_overhead + Σ over units of rank ≥ 1
    of (parameters·bytes_per_parameter + 2·(tensor_overhead + bytes of its name)) ≤ budget_bytes. Energy is then concave
    but for a unit's first ranks; those up to its best average price are one step in 1 and 2 (the edge of its upper
    concave hull). The default overheads are upper bounds, so that a safetensors file stays within the budget.

    Where only leading values are known, all this is among the ranks that are known; where they are used up, the rule is
    "known values". denoised: σ without storage noise, so that nothing is spent on noise. Ties go to the unit that comes
    first.
    Raises `ProbeError` unless one budget is given, where it is below the least step of all, and where fewer values than
    rank_multiple are known.
    """
    _check_positive("rank_multiple", rank_multiple)
    if parameters is not None and budget_bytes is None:
        budget, what, file_cost, width = parameters, "parameters", 0, 1
    elif budget_bytes is not None and parameters is None:
        budget, what, file_cost, width = budget_bytes, "bytes", file_overhead, bytes_per_parameter
    else:
        raise ProbeError("expected a budget in parameters or in bytes, found both or none; give one")
    prices, costs = [], []
    for unit in units:
        opening = 2 * (tensor_overhead + len(unit.name.encode())) if what == "bytes" else 0
        gain, size = _steps(unit, _cap(unit, max_rank)[0], rank_multiple, denoised)
        cost = size * (unit.rank_parameters * width)
        cost[:1] += opening
        prices.append(_hull_prices(gain, cost))
        costs.append(cost)
    firsts = [(int(cost[0]) + file_cost, i) for i, cost in enumerate(costs) if len(cost)]
    if firsts and budget < min(firsts)[0]:
        least, i = min(firsts)
        raise ProbeError(
            f"a budget of {budget:,} {what} is too small; the least possible is {least:,} {what}, "
            f"for rank {min(rank_multiple, _cap(units[i], max_rank)[0])} of {units[i].name} alone"
        )
    wanted = []
    for unit, price, n in zip(units, prices, _buy(prices, costs, budget - file_cost), strict=True):
        cap, cap_rule = _cap(unit, max_rank)
        r = min(n * rank_multiple, cap)
        spent_all = cap_rule if r == cap else "all values" if unit.whole else "known values"
        wanted.append((r, "budget" if n < len(price) else spent_all))
    return _allot(units, wanted, max_rank, rank_multiple)


def _steps(unit: Unit, cap: int, rank_multiple: int, denoised: bool) -> tuple[Values, NDArray[np.int64]]:
    """(energy, ranks) of each step of a unit that keeps anything: rank_multiple ranks, the last step up to the cap."""
    gain, norm = unit.gains(denoised)
    known = min(len(gain), cap)
    if not unit.whole and known < cap:
        # A block that ends among unknown values has no known energy.
        if norm > 0.0 and known < rank_multiple:
            raise ProbeError(
                f"{unit.name}: only {known} singular values are known, a step takes {rank_multiple}; "
                f"compute at least so many (--top {rank_multiple}), or all"
            )
        known -= known % rank_multiple
    gain = gain[:known]
    if rank_multiple > 1 and known:
        gain = np.add.reduceat(gain, np.arange(0, known, rank_multiple))
    gain = gain[: np.count_nonzero(gain) if norm > 0.0 else 0]
    size = np.full(len(gain), rank_multiple, dtype=np.int64)
    if len(size) * rank_multiple > cap:
        size[-1] = cap - (len(size) - 1) * rank_multiple
    return gain, size


def _hull_prices(gain: Values, cost: NDArray[np.int64]) -> Values:
    """The price of each step, descending: the slopes of the upper concave hull where the first cost has an extra."""
    if not len(gain):
        return gain
    average = np.cumsum(gain) / np.cumsum(cost)
    first = int(np.argmax(average))
    price = gain / cost
    price[: first + 1] = average[first]
    # Sums of equal values over blocks of unequal length differ in the last bit; the order must hold all the same.
    return np.minimum.accumulate(price)


def _buy(prices: list[Values], costs: list[NDArray[np.int64]], budget: int) -> list[int]:
    """How many steps of each unit are bought: by falling price while they fit, then the best that still fit."""
    if not prices:
        return []
    lengths = [len(price) for price in prices]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    price, cost = np.concatenate(prices), np.concatenate(costs)
    last = _refused_price(price, cost, budget)
    chosen = price > last
    left = budget - int(cost[chosen].sum())
    # Ties at once, in the order the queue below would take them: a flat spectrum has millions.
    tied = np.flatnonzero(price == last)
    chosen[tied[: np.searchsorted(np.cumsum(cost[tied]), left, side="right")]] = True
    left = budget - int(cost[chosen].sum())
    bought: list[int] = np.bincount(owner[chosen], minlength=len(lengths)).tolist()
    queue = [(-prices[i][n], i) for i, n in enumerate(bought) if n < lengths[i]]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if costs[i][bought[i]] <= left:
            left -= int(costs[i][bought[i]])
            bought[i] += 1
            if bought[i] < lengths[i]:
                heapq.heappush(queue, (-prices[i][bought[i]], i))
    return bought


def _refused_price(price: Values, cost: NDArray[np.int64], budget: int) -> float:
    """The price of the first step that does not fit, going by falling price; −∞ where all fit.

    By halving around medians, in linear time: a sort of all steps would take most of the whole.
    """
    while len(price):
        middle = np.partition(price, len(price) // 2)[len(price) // 2]
        above, below = price > middle, price < middle
        dearer = int(cost[above].sum())
        tied = int(cost.sum()) - dearer - int(cost[below].sum())
        if dearer > budget:
            price, cost = price[above], cost[above]
        elif dearer + tied > budget:
            return float(middle)
        else:
            budget -= dearer + tied
            price, cost = price[below], cost[below]
    return -math.inf


def _allot(
    units: Sequence[Unit], wanted: Sequence[tuple[int, str]], max_rank: int | None, rank_multiple: int
) -> tuple[Allotment, ...]:
    """One `Allotment` a unit for the (rank, rule) wanted: rounded up to the multiple, at most the cap; 0 for ΔW = 0."""
    _check_positive("rank_multiple", rank_multiple)
    allotted = []
    for unit, (r, rule) in zip(units, wanted, strict=True):
        cap, cap_rule = _cap(unit, max_rank)
        if unit.fro_norm == 0.0:
            r, rule = 0, "ΔW = 0"
        elif r > cap:
            r, rule = cap, cap_rule
        r = min(cap, -(-r // rank_multiple) * rank_multiple)
        allotted.append(Allotment(unit.name, r, rule, r * unit.rank_parameters, unit.energy(r)))
    return tuple(allotted)


def whole_steps(max_rank: int | None, rank_multiple: int) -> int | None:
    """The largest multiple that is no more than max_rank. Raises `ProbeError` where that is 0."""
    if max_rank is None or rank_multiple < 1 or max_rank < 1:  # said elsewhere
        return max_rank
    if max_rank < rank_multiple:
        raise ProbeError(
            f"max_rank {max_rank} is less than rank_multiple {rank_multiple}; raise the one or lower the other"
        )
    return max_rank - max_rank % rank_multiple


def _cap(unit: Unit, max_rank: int | None) -> tuple[int, str]:
    """(the largest rank allowed, the rule that says so)."""
    full = min(unit.shape)
    if max_rank is None:
        return full, "min(m, n)"
    _check_positive("max_rank", max_rank)
    return (max_rank, "max_rank") if max_rank < full else (full, "min(m, n)")


def _check_positive(what: str, value: int) -> None:
    if value < 1:
        raise ProbeError(f"{what} is {value}, expected at least 1")


def _check_values(unit: Unit, s: Values, norm: float) -> None:
    k = s.shape[-1] if s.ndim else 0
    if s.shape != ((k,) if unit.copies == 1 and s.ndim == 1 else (unit.copies, k)) or k > min(unit.shape):
        raise ProbeError(
            f"{unit.name}: singular values are {s.shape}, expected ({unit.copies}, k) with k ≤ {min(unit.shape)}; "
            f"give one list a copy"
        )
    if not (np.isfinite(s).all() and math.isfinite(norm)):
        raise ProbeError(f"{unit.name}: NaN or Inf in its singular values or ‖ΔW‖_F; is the checkpoint damaged?")
    # Neighbours that are equal but for the rounding of the solver may come in either order.
    if (s < 0).any() or (s[..., 1:] > s[..., :-1] + 1e-9 * s[..., :1]).any():
        raise ProbeError(f"{unit.name}: singular values must be at least 0 and descend; sort them")
