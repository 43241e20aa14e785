"""Which weighting is taken, on planted distances of documents: none for a gain that is chance, else the best."""

import numpy as np
import pytest

from lowrank_probe.ridge_choice import Compared

N = 24


def compared(*candidates, measure="logits", rows=None, report=None):
    """Of one adapter: mean KL a row of every document, the plain SVD's first; rows: tokens of every document."""
    rows = np.full(len(candidates[0]), 100.0) if rows is None else np.asarray(rows, float)
    kept = {
        ("r8", number): {"choice": rows * one, "report": rows * (one if report is None else report[number])}
        for number, one in enumerate(candidates)
    }
    return Compared(measure, kept, {"choice": rows, "report": rows}, {"choice": 9.0, "report": 9.0}, [])


@pytest.fixture
def plain():
    """Mean KL of each document: documents differ far more than ways do."""
    return np.exp(np.random.default_rng(0).normal(size=N))


def noise(seed, mean):
    """Differences with exactly this mean, in units of its standard error."""
    drawn = np.random.default_rng(seed).normal(size=N)
    drawn = (drawn - drawn.mean()) / drawn.std()
    return 0.1 * (drawn + mean / np.sqrt(N))


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_that_is_chance_leaves_the_plain_svd(plain, seed):
    found = compared(plain, plain + noise(seed, -1.0), plain + noise(seed + 10, -0.5))
    assert found.distance("r8", 1, "choice") < found.distance("r8", 0, "choice")
    assert found.best("r8") == 0
    low, high = found.against_plain("r8", 1, "choice")
    assert low < 0 < high


@pytest.mark.parametrize("seed", range(5))
def test_a_gain_beyond_chance_is_taken_and_of_several_the_largest(plain, seed):
    candidates = [plain, plain + noise(seed, -4.0), plain + noise(seed + 10, -9.0), plain + noise(seed + 20, 9.0)]
    found = compared(*candidates)
    assert found.best("r8") == 2
    assert found.against_plain("r8", 2, "choice")[1] < 0
    assert found.against_plain("r8", 3, "choice")[0] > 0
    assert compared(*candidates[:2]).best("r8") == 1


def test_the_largest_gain_is_not_taken_where_it_is_the_less_certain_kind(plain):
    one_document = np.zeros(N)
    one_document[3] = -0.9 * plain[3]
    gains = [one_document * 30, noise(1, -6.0)]
    found = compared(plain + 40, plain + 40 + gains[0], plain + 40 + gains[1])
    assert found.distance("r8", 1, "choice") < found.distance("r8", 2, "choice")
    assert found.best("r8") == 2


def test_one_long_document_does_not_decide(plain):
    rows, change = np.full(N, 100.0), np.full(N, 0.01)
    rows[5], change[5] = 3000.0, -0.1
    found = compared(plain, plain + change, rows=rows)
    assert found.distance("r8", 1, "choice") < found.distance("r8", 0, "choice")
    assert found.best("r8") == 0


def test_the_third_part_decides_nothing(plain):
    better = plain + noise(0, -9.0)
    assert compared(plain, better, report=[plain, plain + 1]).best("r8") == 1
    assert compared(plain, plain + noise(0, 3.0), report=[plain, plain / 2]).best("r8") == 0


def test_hidden_states_are_compared_by_the_root_of_their_squares(plain):
    better = plain * 0.81
    found = compared(plain, better, measure="hidden states")
    assert found.distance("r8", 1, "choice") == pytest.approx(0.9 * found.distance("r8", 0, "choice"))
    low, high = found.against_plain("r8", 1, "choice")
    assert low < -0.1 * found.distance("r8", 0, "choice") < high < 0
    assert found.best("r8") == 1


def test_adapters_choose_apart(plain):
    found = compared(plain, plain + noise(0, -9.0))
    found.sums.update({("r1", number): one for number, one in enumerate([found.sums["r8", 1], found.sums["r8", 0]])})
    assert (found.best("r8"), found.best("r1")) == (1, 0)


def test_chance_alone_passes_in_few_texts():
    """A one-sided 2.5 %; a bootstrap over 24 documents is a little narrower than it should be."""
    generator, passed = np.random.default_rng(1), 0
    for _ in range(300):
        one = np.exp(generator.normal(size=N))
        passed += compared(one, one + generator.normal(size=N)).best("r8")
    assert passed <= 0.06 * 300
