"""allocation: ranks against truncated matrices, an exact optimum over all choices, and real safetensors files."""

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lowrank_probe import allocation
from lowrank_probe.allocation import Unit, auto, by_budget, by_energy, fixed, parse_budget
from lowrank_probe.errors import ProbeError

DECAY = 2.0 ** -np.arange(8)


def unit(name, shape, s, **more):
    s = np.asarray(s, dtype=np.float64)
    return Unit(name, shape, s, more.pop("fro_norm", float(np.linalg.norm(s))), **more)


def ranks(allotted):
    return [a.rank for a in allotted]


def rules(allotted):
    return [a.rule for a in allotted]


SMALL = unit("small", (8, 12), DECAY)
LARGE = unit("large", (40, 60), 3 * DECAY)
ZERO = unit("zero", (8, 12), np.zeros(8))


# --- what an allotment says ---


@pytest.mark.parametrize("copies", [1, 3])
def test_energy_and_parameters_are_those_of_the_truncated_matrices(copies):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((copies, 7, 5)) @ np.diag([4, 2, 1, 0.5, 0.25]) @ rng.standard_normal((copies, 5, 5))
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    delta = unit("experts", (7, 5), s if copies > 1 else s[0], fro_norm=float(np.linalg.norm(W)), copies=copies)
    for r in range(1, 6):
        (a,) = fixed([delta], r)
        B, A = U[..., :r] * s[:, None, :r], Vh[:, :r]
        assert a.parameters == B.size + A.size
        assert 1 - a.energy == pytest.approx(np.sum((W - B @ A) ** 2) / np.sum(W**2), abs=1e-12)
    for p in (0.5, 0.9, 0.99):
        (a,) = by_energy([delta], p)
        assert a.energy >= p > fixed([delta], a.rank - 1)[0].energy if a.rank > 1 else a.energy >= p
        assert a.rule == "energy"


def test_energy_is_of_the_exact_norm_and_nan_beyond_what_is_known():
    top = unit("top", (8, 12), DECAY[:2], fro_norm=2.0, whole=False)
    assert fixed([top], 2)[0].energy == pytest.approx(1.25 / 4)
    assert math.isnan(fixed([top], 3)[0].energy)
    factored = unit("adapter", (8, 12), DECAY[:2])
    assert fixed([factored], 3)[0].energy == pytest.approx(1.0)


def test_a_zero_unit_gets_nothing_from_any_rule():
    for allotted in (
        fixed([ZERO, SMALL], 2),
        by_energy([ZERO, SMALL], 0.9),
        auto([ZERO, SMALL]),
        by_budget([ZERO, SMALL], parameters=100),
    ):
        assert (allotted[0].rank, allotted[0].rule, allotted[0].parameters) == (0, "ΔW = 0", 0)
        assert math.isnan(allotted[0].energy)
        assert allotted[1].rank > 0
    assert ranks(by_budget([ZERO], parameters=1)) == [0]
    assert by_budget([], parameters=1) == ()


# --- fixed, energy, auto ---


def test_fixed_ranks_are_capped_and_rounded_up():
    units = [SMALL, LARGE]
    assert ranks(fixed(units, 10)) == [8, 10]
    assert rules(fixed(units, 10)) == ["min(m, n)", "fixed"]
    assert ranks(fixed(units, 5, rank_multiple=4)) == [8, 8]
    assert ranks(fixed(units, 9, rank_multiple=4)) == [8, 12]
    assert ranks(fixed(units, 9, rank_multiple=4, max_rank=10)) == [8, 10]
    assert rules(fixed(units, 9, max_rank=6)) == ["max_rank", "max_rank"]
    assert rules(fixed(units, 6, max_rank=6)) == ["fixed", "fixed"]


def test_energy_of_a_geometric_spectrum_by_hand():
    # σ² = 4^-i: 1 − 4^-r of the energy is in the first r values.
    assert [ranks(by_energy([SMALL], p))[0] for p in (0.7, 0.9, 0.98, 1.0)] == [1, 2, 3, 8]
    assert ranks(by_energy([SMALL], 0.98, rank_multiple=4)) == [4]
    assert rules(by_energy([SMALL], 0.98, max_rank=2)) == ["max_rank"]


def test_denoised_energy_takes_the_cleared_spectrum_where_there_is_one():
    raw = np.full(8, 1.0)
    raw[0] = 2.0
    clean = np.array([1.9, 0.6, 0, 0, 0, 0, 0, 0])
    noisy = unit("noisy", (8, 12), raw, denoised=clean, denoised_fro_norm=float(np.linalg.norm(clean)))
    assert ranks(by_energy([noisy, SMALL], 0.9)) == [7, 2]
    got = by_energy([noisy, SMALL], 0.9, denoised=True)
    assert (ranks(got), rules(got)) == ([1, 2], ["denoised energy", "energy"])
    assert got[0].energy == pytest.approx(4 / 11)  # of ΔW as stored, whatever the rule


def test_denoised_values_that_fall_short_of_their_norm_are_all_kept():
    clean = np.array([1.0, 0.5, 0, 0])
    short = unit("short", (4, 4), np.ones(4), denoised=clean, denoised_fro_norm=1.5)
    (a,) = by_energy([short], 0.9, denoised=True)
    assert (a.rank, a.rule) == (2, "all values")
    noise = unit("noise", (4, 4), np.ones(4), denoised=np.zeros(4), denoised_fro_norm=0.0)
    assert ranks(by_energy([noise], 0.9, denoised=True)) == [0]


def test_energy_that_the_known_values_do_not_reach_is_an_error_with_its_mend():
    top = unit("layers.0.q", (8, 12), DECAY[:2], fro_norm=2.0, whole=False)
    assert ranks(by_energy([top], 0.3)) == [2]
    with pytest.raises(ProbeError, match=r"layers\.0\.q: the 2 leading .* hold 0\.3125 .* not 0\.5; compute all"):
        by_energy([top, SMALL], 0.5)
    with pytest.raises(ProbeError, match="so with 2 more"):
        by_energy([top, top, top], 0.5)
    # Where the cap comes first, nothing is missing.
    assert rules(by_energy([top], 0.5, max_rank=2)) == ["max_rank"]


@pytest.mark.parametrize(
    ("signal_rank", "r90", "rank", "rule"),
    [
        (3, 5, 3, "signal_rank"),
        (9, 5, 5, "r90"),
        (20, 30, 12, "half break-even"),  # 40·60/100 = 24
        (math.nan, 5, 5, "r90"),
        (4, math.nan, 4, "signal_rank"),
        (math.nan, math.nan, 12, "half break-even"),
        (4, 4, 4, "signal_rank"),
        (0, 1, 0, "signal_rank"),
    ],
)
def test_auto_takes_the_least_and_says_which(signal_rank, r90, rank, rule):
    (a,) = auto([unit("x", (40, 60), np.ones(40), signal_rank=signal_rank, r90=r90)])
    assert (a.rank, a.rule) == (rank, rule)


def test_auto_gives_a_thin_matrix_rank_one():
    assert ranks(auto([unit("norm-like", (1, 64), [1.0])])) == [1]


# --- the budget: against the exact optimum ---


@st.composite
def instances(draw):
    """Few small units with whole singular values, so that energies are exact and ties are common."""
    units = []
    for i in range(draw(st.integers(1, 4))):
        m, n, copies = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
        k = min(m, n)
        lists = draw(st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k), min_size=copies, max_size=copies))
        units.append(unit("u" * i, (m, n), -np.sort(-np.array(lists, dtype=float), axis=1), copies=copies))
    limits = {"rank_multiple": draw(st.integers(1, 3)), "max_rank": draw(st.none() | st.integers(1, 4))}
    return units, limits, draw(st.integers(0, 6))


def options(u, limits, overhead):
    """(rank, cost, energy) of every rank that a unit may have, exact."""
    q, cap = limits["rank_multiple"], min(*u.shape, limits["max_rank"] or 99)
    allowed = sorted({0, cap, *range(q, cap, q)})
    opening = 2 * (overhead + len(u.name)) if overhead else 0
    return [(r, r * u.copies * sum(u.shape) + (opening if r else 0), kept(u, r)) for r in allowed]


def kept(u, r):
    return int(np.sum(u.s[:, :r] ** 2))


def optimum(units, limits, overhead, budget):
    """The most energy within the budget: dynamic programming over all ranks of all units."""
    best = [0] * (budget + 1)
    for u in units:
        choices = options(u, limits, overhead)
        best = [max(best[b - cost] + e for _, cost, e in choices if cost <= b) for b in range(budget + 1)]
    return best[budget]


def walk(units, limits, overhead):
    """The edges (cost, energy) of the units' upper concave hulls by falling slope."""
    edges = []
    for i, u in enumerate(units):
        hull = [(0, 0)]
        for _, c, e in options(u, limits, overhead)[1:]:
            while len(hull) > 1 and (e - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) > (c - hull[-1][0]) * (
                hull[-1][1] - hull[-2][1]
            ):
                hull.pop()
            hull.append((c, e))
        pairs = itertools.pairwise(hull)
        edges += [(Fraction(e1 - e0, c1 - c0), i, c1 - c0, e1 - e0) for (c0, e0), (c1, e1) in pairs if e1 > e0]
    return [(c, e) for _, _, c, e in sorted(edges, key=lambda edge: (-edge[0], edge[1]))]


def allocate(units, limits, overhead, budget):
    if not overhead:
        return by_budget(units, parameters=budget, **limits)
    bytes_of_file = {"bytes_per_parameter": 1, "file_overhead": 0, "tensor_overhead": overhead}
    return by_budget(units, budget_bytes=budget, **bytes_of_file, **limits)


def cheapest(units, limits, overhead):
    return min((c for u in units for _, c, e in options(u, limits, overhead)[1:2] if e), default=0)


@settings(deadline=None, max_examples=300)
@given(instances(), st.integers(1, 150))
def test_budget_is_within_one_step_of_the_optimum_and_leaves_no_step_that_fits(instance, budget):
    units, limits, overhead = instance
    assume(budget >= cheapest(units, limits, overhead))
    found = allocate(units, limits, overhead, budget)
    table = [{r: (c, e) for r, c, e in options(u, limits, overhead)} for u in units]
    spent = sum(rows[a.rank][0] for rows, a in zip(table, found, strict=True))
    energy = sum(rows[a.rank][1] for rows, a in zip(table, found, strict=True))
    assert spent <= budget
    steps, total, first_refused = walk(units, limits, overhead), 0, 0
    for cost, gain in steps:
        total += cost
        if total > budget:
            first_refused = gain
            break
    best = optimum(units, limits, overhead, budget)
    assert energy <= best
    assert energy == best if not first_refused else energy > best - first_refused
    for rows, a in zip(table, found, strict=True):
        for r, (cost, gain) in rows.items():
            if r > a.rank and gain > rows[a.rank][1]:
                assert spent - rows[a.rank][0] + cost > budget
    assert sum(a.parameters for a in found) == sum(
        a.rank * u.copies * sum(u.shape) for a, u in zip(found, units, strict=True)
    )


@settings(deadline=None, max_examples=200)
@given(instances(), st.integers(0, 30))
def test_budget_is_the_optimum_of_what_the_walk_spends(instance, n):
    units, limits, overhead = instance
    steps = walk(units, limits, overhead)
    assume(steps)
    budget = sum(cost for cost, _ in steps[: n % len(steps) + 1])
    found = allocate(units, limits, overhead, budget)
    energy = sum(kept(u, a.rank) for u, a in zip(units, found, strict=True))
    assert energy == optimum(units, limits, overhead, budget)
    assert energy == sum(gain for _, gain in steps[: n % len(steps) + 1])


def test_equal_prices_of_experts_are_equal():
    """65 = 4² + 7² is not the square of its rounded root, which would take the second unit's last rank first."""
    units = [unit("", (2, 4), [[6.0, 2.0]]), unit("u", (4, 4), [[4.0, 4.0, 4.0, 4.0], [7.0, 4.0, 4.0, 4.0]], copies=2)]
    assert ranks(allocate(units, {"rank_multiple": 3, "max_rank": None}, 4, 78)) == [2, 3]


def naive(units, budget):
    """The rule word for word: the dearest next step of all open units is bought if it fits, else its unit is closed."""
    bought, closed = [0] * len(units), set()
    while True:
        nexts = [
            (-(u.s[r] ** 2) / sum(u.shape), i)
            for i, (u, r) in enumerate(zip(units, bought, strict=True))
            if i not in closed and r < len(u.s) and u.s[r] > 0
        ]
        if not nexts:
            return bought
        _, i = min(nexts)
        if sum(units[i].shape) <= budget:
            budget -= sum(units[i].shape)
            bought[i] += 1
        else:
            closed.add(i)


@pytest.mark.parametrize("budget", [300, 3000, 7001, 20000, 200_000])
@pytest.mark.parametrize("ties", [True, False])
def test_budget_follows_its_rule_on_many_units(budget, ties):
    rng = np.random.default_rng(budget)
    units = []
    for i in range(60):
        m, n = rng.integers(20, 200, 2) if not ties else rng.choice([32, 64, 128], 2)
        s = np.sort(rng.integers(0, 9, 20) if ties else rng.exponential(size=20))[::-1]
        units.append(unit(f"u{i}", (int(m), int(n)), s))
    assert ranks(by_budget(units, parameters=budget)) == naive(units, budget)


def test_budget_prefers_what_is_cheap_for_its_energy_and_fills_up_with_what_fits():
    # Prices: a 16/100 and 9/100, b 4/20 and 1/20. 130: b₁, a₁, and the 10 that are left fit nothing.
    units = [unit("a", (50, 50), [4.0, 3.0]), unit("b", (10, 10), [2.0, 1.0])]
    assert ranks(by_budget(units, parameters=130)) == [1, 1]
    # 150: a₂ (0.09) comes before b₂ (0.05) but does not fit; b₂ does.
    assert ranks(by_budget(units, parameters=150)) == [1, 2]
    assert ranks(by_budget(units, parameters=220)) == [2, 1]
    found = by_budget(units, parameters=10_000)
    assert (ranks(found), rules(found)) == ([2, 2], ["all values", "all values"])
    assert rules(by_budget(units, parameters=150)) == ["budget", "all values"]
    assert rules(by_budget(units, parameters=10_000, max_rank=1)) == ["max_rank", "max_rank"]


def test_ties_go_to_the_unit_that_comes_first():
    units = [unit(name, (4, 4), np.ones(4)) for name in "abc"]
    assert ranks(by_budget(units, parameters=8 * 6)) == [4, 2, 0]
    assert ranks(by_budget(units[::-1], parameters=8 * 6)) == [4, 2, 0]


def test_experts_share_a_rank_and_pay_for_all():
    experts = unit("experts", (4, 6), [[3.0, 1.0, 0, 0], [1.0, 1.0, 0, 0]], copies=2)
    dense = unit("dense", (4, 6), [2.5, 1.1, 0, 0])
    # Prices: experts 10/20 and 2/20, dense 6.25/10 and 1.21/10.
    assert [ranks(by_budget([experts, dense], parameters=b)) for b in (10, 30, 40, 60)] == [
        [0, 1], [1, 1], [1, 2], [2, 2],
    ]  # fmt: skip
    assert by_budget([experts, dense], parameters=60)[0].parameters == 2 * 2 * 10


def test_denoised_budget_spends_nothing_on_noise():
    raw = np.full(8, 2.0)
    noisy = unit("noisy", (8, 12), raw, denoised=np.array([1.0, *[0.0] * 7]), denoised_fro_norm=1.0)
    assert ranks(by_budget([noisy, SMALL], parameters=8 * 20)) == [8, 0]
    assert ranks(by_budget([noisy, SMALL], parameters=8 * 20, denoised=True)) == [1, 7]


@pytest.mark.parametrize("budget", [500, 2000, 4000])
def test_leading_values_give_the_same_ranks_until_they_are_used_up(budget):
    rng = np.random.default_rng(3)
    full = [unit(f"u{i}", (30, 20 + i), np.sort(rng.exponential(size=20))[::-1]) for i in range(10)]
    expected = ranks(by_budget(full, parameters=budget))
    k = max(expected)
    top = [Unit(u.name, u.shape, u.s[:k], u.fro_norm, whole=False) for u in full]
    assert ranks(by_budget(top, parameters=budget)) == expected
    fewer = [Unit(u.name, u.shape, u.s[: k - 1], u.fro_norm, whole=False) for u in full]
    found = by_budget(fewer, parameters=budget)
    assert max(ranks(found)) == k - 1
    assert all((a.rule == "known values") == (a.rank == k - 1) for a in found)


def test_a_step_does_not_end_among_unknown_values():
    top = unit("top", (20, 20), np.ones(10), fro_norm=9.0, whole=False)
    assert ranks(by_budget([top], parameters=10_000, rank_multiple=4)) == [8]
    assert ranks(by_budget([top], parameters=10_000, rank_multiple=4, max_rank=10)) == [10]
    with pytest.raises(ProbeError, match=r"top: only 10 singular values are known, a step takes 16; .*--top 16"):
        by_budget([top], parameters=10_000, rank_multiple=16)
    whole = unit("whole", (20, 20), np.ones(10))
    assert ranks(by_budget([whole], parameters=10_000, rank_multiple=4)) == [12]


# --- bytes ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("budget", [9_000, 50_001, 200_000, 1_000_000])
def test_a_real_file_stays_within_its_bytes_and_uses_them(tmp_path, budget, dtype):
    rng = np.random.default_rng(5)
    shapes = [(64, 64), (16, 64), (200, 64), (64, 200)]
    units = [
        unit(f"model.layers.{i}.Aufmerksamkeit_ü.q_proj.weight", shapes[i % 4], np.sort(rng.exponential(size=16))[::-1])
        for i in range(40)
    ]
    width = np.dtype(dtype).itemsize
    tensors = {}
    for u, a in zip(units, by_budget(units, budget_bytes=budget, bytes_per_parameter=width), strict=True):
        if a.rank:
            stem = f"base_model.model.{u.name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = np.zeros((a.rank, u.shape[1]), dtype)
            tensors[f"{stem}.lora_B.weight"] = np.zeros((u.shape[0], a.rank), dtype)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size <= budget
    largest_step = 264 * width + 2 * (allocation.TENSOR_OVERHEAD + 64)
    everything = ranks(by_budget(units, parameters=10**9)) == [t.shape[0] for n, t in tensors.items() if "lora_A" in n]
    assert everything or size > budget - largest_step - len(tensors) * allocation.TENSOR_OVERHEAD


def test_opening_a_unit_costs_its_headers():
    flat, steep = unit("f", (4, 6), [2.0, 2.0, 2.0, 2.0]), unit("s", (4, 6), [2.1, 0, 0, 0])
    costs = {"bytes_per_parameter": 1, "file_overhead": 5, "tensor_overhead": 19}
    # Headers of 2·(19 + 1) = 40: 4 ranks of the flat unit keep 16 for 80, one of the steep one 4.41 for 50.
    assert ranks(by_budget([flat, steep], budget_bytes=85, **costs)) == [4, 0]
    assert ranks(by_budget([flat, steep], budget_bytes=84, **costs)) == [3, 0]
    assert ranks(by_budget([flat, steep], budget_bytes=135, **costs)) == [4, 1]


# --- what is refused ---


def test_a_budget_below_one_step_says_the_least_possible():
    with pytest.raises(
        ProbeError, match=r"budget of 19 parameters .* the least possible is 20 .* rank 1 of small alone"
    ):
        by_budget([ZERO, LARGE, SMALL], parameters=19)
    assert ranks(by_budget([ZERO, LARGE, SMALL], parameters=20)) == [0, 0, 1]
    with pytest.raises(ProbeError, match=r"the least possible is 80 parameters, for rank 4 of small"):
        by_budget([LARGE, SMALL], parameters=79, rank_multiple=4)
    least = 64 + 2 * (160 + 5) + 20 * 4
    with pytest.raises(ProbeError, match=f"the least possible is {least} bytes"):
        by_budget([LARGE, SMALL], budget_bytes=least - 1)
    assert ranks(by_budget([LARGE, SMALL], budget_bytes=least)) == [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fixed([SMALL], 0), "rank is 0, expected at least 1"),
        (lambda: fixed([SMALL], 4, max_rank=0), "max_rank is 0"),
        (lambda: fixed([SMALL], 4, rank_multiple=0), "rank_multiple is 0"),
        (lambda: by_budget([SMALL], parameters=100, rank_multiple=-1), "rank_multiple is -1"),
        (lambda: by_energy([SMALL], 0.0), "energy is 0.0, expected a share"),
        (lambda: by_energy([SMALL], 1.1), "energy is 1.1"),
        (lambda: by_energy([SMALL], math.nan), "energy is nan"),
        (lambda: by_budget([SMALL]), "found both or none"),
        (lambda: by_budget([SMALL], parameters=100, budget_bytes=100), "found both or none"),
        (lambda: unit("x", (2, 2), [1.0, math.nan]), "x: NaN or Inf"),
        (lambda: unit("x", (2, 2), [1.0, 1.0], fro_norm=math.inf), "x: NaN or Inf"),
        (lambda: unit("x", (2, 2), [1.0, 2.0]), "x: singular values must be at least 0 and descend"),
        (lambda: unit("x", (2, 2), [1.0, -1.0]), "x: singular values must be at least 0 and descend"),
        (lambda: unit("x", (2, 2), [3.0, 2.0, 1.0]), r"x: singular values are \(3,\), expected \(1, k\) with k ≤ 2"),
        (lambda: unit("x", (2, 2), [3.0, 2.0], copies=2), r"x: singular values are \(2,\), expected \(2, k\)"),
        (lambda: unit("x", (2, 2), [3.0, 2.0], denoised=np.ones(2)), "x: NaN or Inf"),
    ],
)
def test_what_cannot_be_is_one_clear_line(call, message):
    with pytest.raises(ProbeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# --- parse_budget, imports ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("40M", {"parameters": 40_000_000}),
        ("4e7", {"parameters": 40_000_000}),
        ("40000000", {"parameters": 40_000_000}),
        ("40_000_000", {"parameters": 40_000_000}),
        ("500k", {"parameters": 500_000}),
        ("1.5G", {"parameters": 1_500_000_000}),
        ("1.1M", {"parameters": 1_100_000}),
        ("80MB", {"budget_bytes": 80_000_000}),
        ("80 MiB", {"budget_bytes": 80 * 2**20}),
        ("1.5GB", {"budget_bytes": 1_500_000_000}),
        (" 900kb ", {"budget_bytes": 900_000}),
        ("0.5gib", {"budget_bytes": 2**29}),
    ],
)
def test_budgets_are_read(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "M", "-4M", "40X", "1.M", ".5M", "40MBit", "nan", "1,000", "٤M"])
def test_other_budgets_are_refused_with_what_is_accepted(text):
    with pytest.raises(ProbeError, match=r"is not understood; expected parameters \(.*40M.* or bytes \(.*80MB.*80MiB"):
        parse_budget(text)


def test_a_lone_b_and_nothing_are_refused():
    with pytest.raises(ProbeError, match="may be bytes or a billion; expected parameters"):
        parse_budget("1.5B")
    for text in ("0", "0.4", "0.0001K", "0MB"):
        with pytest.raises(ProbeError, match="is nothing; expected parameters"):
            parse_budget(text)


def test_a_parsed_budget_is_what_by_budget_takes():
    assert by_budget([SMALL, LARGE], **parse_budget("0.2K")) == by_budget([SMALL, LARGE], parameters=200)
    assert by_budget([SMALL, LARGE], **parse_budget("2KB")) == by_budget([SMALL, LARGE], budget_bytes=2000)


def test_import_needs_neither_torch_nor_pandas():
    code = "import sys, lowrank_probe.allocation; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
