"""metrics: planted singular values with known answers, invariants, and the Marchenko–Pastur null."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lowrank_probe import metrics

FLAT = np.ones(8)
STEEP = 2.0 ** -np.arange(8)
RANK_ONE = np.array([3.0, 0, 0, 0])


def norm(s):
    return float(np.linalg.norm(s))


def test_flat_spectrum_has_every_rank_equal_to_its_length():
    assert metrics.stable_rank(FLAT, norm(FLAT)) == pytest.approx(8)
    assert metrics.effective_rank(FLAT) == pytest.approx(8)
    assert metrics.energy_effective_rank(FLAT) == pytest.approx(8)
    assert metrics.participation_ratio(FLAT) == pytest.approx(8)
    assert metrics.energy_rank(FLAT, norm(FLAT), 0.5) == 4
    assert metrics.energy_rank(FLAT, norm(FLAT), 0.9) == 8
    assert metrics.energy(FLAT, norm(FLAT), 2) == pytest.approx(0.25)


def test_rank_one_has_every_rank_one():
    n = norm(RANK_ONE)
    assert metrics.stable_rank(RANK_ONE, n) == metrics.energy_rank(RANK_ONE, n, 0.99) == 1
    assert metrics.effective_rank(RANK_ONE) == pytest.approx(1)
    assert metrics.participation_ratio(RANK_ONE) == pytest.approx(1)
    assert metrics.numerical_rank(RANK_ONE, (4, 4)) == 1


def test_geometric_spectrum_by_hand():
    # σ² = 4^-i: the first value holds 3/4 of a geometric series' energy, the first two 15/16.
    total = norm(STEEP)
    assert metrics.energy_rank(STEEP, total, 0.5) == 1
    assert metrics.energy_rank(STEEP, total, 0.9) == 2
    assert metrics.energy(STEEP, total, 1) == pytest.approx(0.75, abs=1e-4)
    assert metrics.nuclear_norm(STEEP) == pytest.approx(2 - 2**-7)


def test_zero_matrix_is_nan_or_zero_and_never_raises():
    zero = np.zeros(5)
    assert math.isnan(metrics.stable_rank(zero, 0.0))
    assert math.isnan(metrics.effective_rank(zero))
    assert math.isnan(metrics.energy_rank(zero, 0.0, 0.9))
    assert metrics.numerical_rank(zero, (5, 5)) == 0


def test_truncated_list_keeps_exact_energies_and_gives_nan_beyond():
    top = FLAT[:3]
    assert metrics.energy(top, norm(FLAT), 2) == pytest.approx(0.25)
    assert math.isnan(metrics.energy(top, norm(FLAT), 4))
    assert math.isnan(metrics.energy_rank(top, norm(FLAT), 0.5))
    assert metrics.energy_rank(top, norm(FLAT), 0.25) == 2


@settings(deadline=None, max_examples=100)
@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1e3)).filter(lambda a: a.max() > 1e-6))
def test_ranks_are_ordered_and_scale_free(a):
    s = np.sort(a)[::-1]
    stable = metrics.stable_rank(s, norm(s))
    energy_effective, effective = metrics.energy_effective_rank(s), metrics.effective_rank(s)
    nonzero = np.count_nonzero(s)
    assert 1 - 1e-9 <= stable <= energy_effective * (1 + 1e-9)
    assert energy_effective <= effective * (1 + 1e-9)
    assert effective <= nonzero * (1 + 1e-9)
    assert metrics.stable_rank(7 * s, norm(7 * s)) == pytest.approx(stable)
    assert metrics.effective_rank(7 * s) == pytest.approx(effective)


@pytest.mark.parametrize(
    ("shape", "r90"),
    [((4096, 4096), 2088), ((4096, 11008), 2916), ((1024, 4096), 779), ((8192, 28672), 6115), ((192, 576), 140)],
)
def test_null_r90_of_the_known_shapes(shape, r90):
    assert metrics.null_energy_rank(shape, 0.9) == pytest.approx(r90, abs=1)
    assert metrics.null_energy_rank(shape[::-1], 0.9) == metrics.null_energy_rank(shape, 0.9)


@pytest.mark.parametrize("shape", [(200, 200), (100, 400), (300, 150)])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.95])
def test_null_agrees_with_drawn_noise(shape, p):
    s = np.linalg.svd(np.random.default_rng(0).standard_normal(shape), compute_uv=False)
    assert metrics.null_energy_rank(shape, p) == pytest.approx(metrics.energy_rank(s, norm(s), p), rel=0.02, abs=1)


def test_denoising_recovers_planted_values_from_noise():
    rng = np.random.default_rng(1)
    m, n, std = 300, 200, 0.01
    planted = np.array([2.0, 1.0, 0.6])
    U, V = np.linalg.qr(rng.standard_normal((m, 3)))[0], np.linalg.qr(rng.standard_normal((n, 3)))[0]
    noisy = np.linalg.svd((U * planted) @ V.T + std * rng.standard_normal((m, n)), compute_uv=False)
    found = metrics.denoise(noisy, std, (m, n))
    np.testing.assert_allclose(found[:3], planted, rtol=0.03)
    assert np.all(noisy[:3] > planted)  # the noise had inflated them
    assert np.all(found[4:] == 0)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_bracket_is_where_the_shifted_curves_reach_p(p):
    s = np.array([3.0, 2.0, 1.0, 0.5])
    curve = np.cumsum(s**2) / np.sum(s**2)
    low, high = metrics.energy_rank_bracket(s, norm(s), p, slack=0.1, noise_energy=0.05)
    assert low == next(r for r in range(1, 5) if curve[r - 1] + 0.1 >= p)
    assert high == next((r for r in range(1, 5) if curve[r - 1] - 0.15 >= p), 4)
    assert metrics.energy_rank_bracket(s, norm(s), p, slack=0.0) == (metrics.energy_rank(s, norm(s), p),) * 2
    assert all(math.isnan(end) for end in metrics.energy_rank_bracket(np.zeros(3), 0.0, p, slack=0.1))


def test_hard_threshold_counts_spikes_over_noise():
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((150, 150)) / math.sqrt(150)
    spikes = np.zeros((150, 150))
    spikes[[0, 1, 2], [0, 1, 2]] = [9, 8, 7]
    s = np.linalg.svd(noise + spikes, compute_uv=False)
    assert metrics.hard_threshold_rank(s, (150, 150)) == 3
