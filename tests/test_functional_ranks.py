"""The rule of the functional rank and its bootstrap, on losses that are planted."""

import numpy as np
import pytest

import lowrank_probe as lp
from lowrank_probe import functional_ranks as functional
from lowrank_probe.functional_ranks import FunctionalRank, Tolerance, parse_tolerance

GRID = (0, 1, 2, 4, 8)


def judged(excess, noise=0.0, tolerance=0.1, n=50):
    """The functional rank where each sequence's excess is the planted one, with noise that all states share or not."""
    generator = np.random.default_rng(0)
    weights = generator.integers(20, 60, n).astype(float)
    sums = (np.array(excess)[:, None] + noise * generator.standard_normal((len(excess), n))) * weights
    counts = functional.draws(n, 0)
    drawn = functional.resampled(sums, weights, counts)
    mean = functional.means(sums, weights)
    return functional.functional_rank(GRID, mean, tolerance, drawn, np.full(len(counts), tolerance))


def test_the_smallest_rank_within_the_tolerance_and_all_after_it():
    assert judged([1, 0.5, 0.09, 0.05, 0]) == FunctionalRank(2, 2, 2)
    assert judged([0.05, 0.5, 0.09, 0.05, 0]) == FunctionalRank(2, 2, 2)  # rank 0 by chance: rank 1 is not
    assert judged([0, 0, 0, 0, -1]) == FunctionalRank(0, 0, 0)
    assert judged([1, 1, 1, 1, 0.2]) == FunctionalRank(None, None, None)


def test_a_rank_between_two_of_the_grid_was_not_looked_at():
    assert judged([1, 1, 1, 1, 0]) == FunctionalRank(8, 5, 8)
    assert judged([1, 1, 1, 0, 0]) == FunctionalRank(4, 3, 4)
    assert judged([1, 0, 0, 0, 0]) == FunctionalRank(1, 1, 1)
    enough = np.zeros((1, 10))
    found = functional.functional_rank((16,), np.zeros(1), 0.1, enough, np.full(10, 0.1))
    assert found == FunctionalRank(16, 1, 16)  # 0 was not tried


def test_the_interval_widens_with_noise():
    found = judged([1, 0.5, 0.12, 0.09, 0], noise=0.2)
    assert found.low == 2
    assert found.high in (4, 8)
    beyond = judged([1, 1, 1, 0.1, 0.1], noise=0.2)
    assert beyond.high is None


def test_the_bootstrap_is_that_of_a_mean():
    generator = np.random.default_rng(1)
    sums = generator.standard_normal((1, 400))
    low, high = functional.interval(functional.resampled(sums, np.ones(400), functional.draws(400, 0)))
    expected = 1.96 * sums.std() / 20
    assert high[0] - sums.mean() == pytest.approx(expected, rel=0.1)
    assert sums.mean() - low[0] == pytest.approx(expected, rel=0.1)


def test_weights_are_tokens():
    sums, weights = np.array([[6.0, 1.0]]), np.array([3.0, 1.0])
    assert functional.means(sums, weights)[0] == 7 / 4
    counts = np.array([[2.0, 0.0], [1.0, 1.0]])
    assert functional.resampled(sums, weights, counts).tolist() == [[2.0, 7 / 4]]


def test_draws_are_of_all_sequences_and_seeded():
    counts = functional.draws(7, 3)
    assert counts.shape == (functional.N_RESAMPLES, 7)
    assert (counts.sum(1) == 7).all()
    assert np.array_equal(counts, functional.draws(7, 3))
    assert not np.array_equal(counts, functional.draws(7, 4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5%", Tolerance(share=0.05)),
        (" 0.5 % ", Tolerance(share=0.005)),
        ("0.01", Tolerance(0.01)),
        (1e-3, Tolerance(1e-3)),
    ],
)
def test_a_tolerance_is_a_share_or_nats(text, expected):
    assert parse_tolerance(text) == expected


@pytest.mark.parametrize("text", ["", "five", "0", "-1%", "nan", "inf", "1e", "1%%", "..5"])
def test_other_tolerances_are_refused(text):
    with pytest.raises(lp.ProbeError, match="expected nats such as"):
        parse_tolerance(text)
