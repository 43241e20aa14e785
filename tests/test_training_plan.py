"""The runs of a training, their labels, and the search for a learning rate."""

import math

import pytest

from lowrank_probe.errors import ProbeError
from lowrank_probe.training_plan import FULL, FULL_RATES, Fit, Plan, Recipe, next_rate

PLAN = Plan((1, 4), ("attention", "q,v"), (0, 1), ("lora", "lora+"))


def test_every_run_is_planned_once_full_first():
    fits = PLAN.fits({FULL: 1e-4, "lora": 1e-3, "lora+": 5e-4}, 10)
    assert [fit.label for fit in fits[:3]] == ["full-s0", "full-s1", "lora-r1-attention-s0"]
    assert len({fit.label for fit in fits}) == len(fits) == 2 + 2 * 2 * 2 * 2
    assert {fit.lr for fit in fits if fit.method == FULL} == {1e-4}
    assert {fit.lr for fit in fits if fit.method == "lora+"} == {5e-4}


def test_labels_are_names_of_directories():
    labels = [Fit(method, 4, "model.*.q_proj,up/x", 1, 3e-4, 9).label for method in ("lora", "lora+")]
    for label in labels:
        assert "/" not in label
        assert "*" not in label
        assert "," not in label
    assert labels[0] != labels[1]


def test_a_search_takes_the_middle_rank_and_tells_its_rate():
    fit = Plan((1, 4, 16), ("mlp",), (3,)).searched("lora", 3e-4, 20, "mlp")
    assert (fit.rank, fit.targets, fit.seed, fit.label) == (4, "mlp", 3, "search-lora-lr3e-4")
    assert PLAN.searched(FULL, 1e-4, 20, "attention").rank == 0


def find(best, start=FULL_RATES, most=9, cliff=math.inf):
    """The rates that are tried on a parabola in log rate with that minimum, ∞ above the cliff."""
    tried = {}
    while (rate := next_rate(tried, start, most)) is not None:
        tried[rate] = (math.log(rate) - math.log(best)) ** 2 if rate < cliff else math.inf
    return tried


@pytest.mark.parametrize("best", [1e-6, 3e-5, 1e-4, 3e-3])
def test_the_search_ends_at_the_best_of_the_half_decades(best):
    tried = find(best)
    assert min(tried, key=tried.get) == best
    assert len(tried) == len(set(tried))


def test_the_search_stops_at_divergence_and_at_the_most():
    assert max(find(1.0, cliff=2e-3)) == 3e-3
    assert len(find(1e3, most=6)) == 6
    assert len(find(1.0, cliff=0.0)) == len(FULL_RATES)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan((0, 4), ("q",), (0,)), "rank 0: a rank is at least 1"),
        (lambda: Plan((4, 4), ("q",), (0,)), "ranks: 4, 4: one of them is there twice"),
        (lambda: Plan((4,), (), (0,)), "targets: expected at least one"),
        (
            lambda: Plan((4,), ("q",), (0,), ("qlora",)),
            "variant qlora: expected one of lora, rslora, dora, pissa, lora+",
        ),
        (lambda: Recipe(steps=0), "steps: expected 1 or more, found 0"),
        (lambda: Recipe(precision="fp16"), "precision: expected fp32 or bf16, found fp16"),
        (lambda: Recipe(alpha=0), "alpha: expected a number above 0, found 0"),
        (lambda: Recipe(warmup=1.0), "warmup: expected a share of the steps from 0 to 1, found 1"),
    ],
)
def test_what_cannot_be(make, said):
    with pytest.raises(ProbeError) as error:
        make()
    assert str(error.value) == said
