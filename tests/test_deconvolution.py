"""deconvolution: spectra with and without a gap, seen through noise of known size."""

import numpy as np
import pytest
from pairs import planted

from lowrank_probe import metrics
from lowrank_probe.deconvolution import deconvolve, forward, with_tail

K = 256
INDEX = np.arange(1, K + 1)
SPECTRA = {
    "1/i": 1 / INDEX,
    "slow decay": INDEX**-0.3,
    "linear": 1 - INDEX / (K + 1),
    "shelf": (INDEX <= 80) * 1.0,
    "rank 8": (INDEX <= 8) * np.linspace(2, 1, K),
    "Gaussian": np.linalg.svd(np.random.default_rng(0).standard_normal((K, 400)), compute_uv=False),
}


def seen_through_noise(s, shape, resolved, seed=1):
    """(singular values of U·diag(s)·Vh + N, N's standard deviation) with Σs² = 1 and that share of the energy clean."""
    import torch

    X = planted(shape, torch.from_numpy(np.ascontiguousarray(s, dtype=float)), seed).numpy()
    std = np.sqrt((1 / resolved - 1) / (shape[0] * shape[1]))
    noise = std * np.random.default_rng(seed).standard_normal(shape)
    return np.linalg.svd(X + noise, compute_uv=False), std


@pytest.mark.parametrize("resolved", [0.95, 0.8, 0.6])
@pytest.mark.parametrize("shape", [(K, K), (400, K), (K, 1000)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_energy_curve_is_recovered(kind, shape, resolved):
    s = SPECTRA[kind] / np.linalg.norm(SPECTRA[kind])
    seen, std = seen_through_noise(s, shape, resolved)
    clean = deconvolve(seen, std, shape, 1.0)
    truth = np.cumsum(s**2)
    off = np.abs(np.cumsum(clean**2) - truth).max()
    assert off <= (0.025 if kind in ("shelf", "rank 8") else 0.006) + 0.35 * (1 - resolved) ** 2  # equal values: less
    assert np.sum(clean**2) == pytest.approx(1)
    assert np.all(np.diff(clean) <= 0)
    # The noise hid far more than that, or the check would be empty.
    hidden = np.abs(np.cumsum(seen**2) / np.sum(seen**2) - truth).max()
    assert off < hidden or kind in ("Gaussian", "linear", "slow decay")  # those look much like noise of their shape


def test_forward_is_what_noise_does():
    s = SPECTRA["linear"] / np.linalg.norm(SPECTRA["linear"])
    for shape, resolved in (((K, K), 0.7), ((K, 900), 0.8)):
        seen, std = seen_through_noise(s, shape, resolved)
        found = np.sqrt(forward(s**2, np.ones(K), std**2, max(shape)))
        np.testing.assert_allclose(found[5:-40], seen[5:-40], rtol=0.04)


def test_equal_values_split():
    seen, std = seen_through_noise(np.full(40, 1 / np.sqrt(40)), (300, 300), 0.8)
    lam = np.concatenate([np.full(40, 1 / 40), np.zeros(260)])
    found = np.sqrt(forward(lam, np.ones(300), std**2, 300))
    np.testing.assert_allclose(found[:40], seen[:40], rtol=0.03)
    assert seen[0] > 1.1 * seen[39]
    np.testing.assert_allclose(found[60:200], seen[60:200], rtol=0.06)


def test_without_noise_nothing_changes():
    s = np.array([3.0, 2.0, 1.0])
    np.testing.assert_array_equal(deconvolve(s, 0.0, (3, 5), 1.0), s)


def test_a_stand_in_for_the_tail_keeps_the_energy_and_the_order():
    s = SPECTRA["1/i"]
    whole = with_tail(s[:40], float(np.linalg.norm(s)), K)
    assert len(whole) == K
    assert np.sum(whole**2) == pytest.approx(np.sum(s**2))
    assert np.all(np.diff(whole) <= 1e-12)
    np.testing.assert_array_equal(whole[:40], s[:40])


@pytest.mark.parametrize("kind", ["1/i", "rank 8"])
def test_the_leading_values_suffice_for_the_leading_ranks(kind):
    s = SPECTRA[kind] / np.linalg.norm(SPECTRA[kind])
    seen, std = seen_through_noise(s, (K, 400), 0.8)
    top = with_tail(seen[:48], float(np.linalg.norm(seen)), K)
    for p in (0.5, 0.9):
        whole, leading = (metrics.energy_rank(deconvolve(x, std, (K, 400), 1.0), 1.0, p) for x in (seen, top))
        assert leading == pytest.approx(whole, abs=1, rel=0.15)
