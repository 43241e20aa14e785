"""Numbers and counts in words."""

import math

import pytest

from lowrank_probe import words


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"), (0.0312, "0.0312"), (12.54, "12.5"), (2088.0, "2,088"), (3e-7, "3.0e-07"), (2e8, "2.0e+08"),
        (-0.5, "-0.5"), (math.inf, "∞"), (math.nan, "–"), (None, "–"),
    ],
)  # fmt: skip
def test_numbers(value, said):
    assert words.number(value) == said


@pytest.mark.parametrize(
    ("low", "high", "said"), [(6.5, 7.2, "7"), (6.4, 7.5, "6–8"), (math.nan, math.nan, "?"), (3, math.nan, "3–?")]
)
def test_brackets(low, high, said):
    assert words.bracket(low, high) == said


def test_counts_shares_and_sizes():
    assert [words.count(n, "matrix", "matrices") for n in (0, 1, 2)] == ["0 matrices", "1 matrix", "2 matrices"]
    assert words.count(3, "tensor") == "3 tensors"
    assert (words.percent(0.666), words.percent(math.nan)) == ("67", "–")
    assert (words.size(3 * 2**20), words.size(3 * 2**29)) == ("3.0 MiB", "1.50 GiB")
