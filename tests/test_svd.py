"""svd: every kernel against a float64 SVD of a planted matrix, and its certificate against the truth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import planted

from lowrank_probe import svd

SHAPES = [(160, 160), (300, 120), (96, 400)]


def spectra(k):
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "flat": torch.ones(k, dtype=torch.float64),
        "steep": torch.logspace(0, -14, k, dtype=torch.float64),
        "harmonic": 1 / i,
        "rank one": (i == 1).double(),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["flat", "steep", "harmonic", "rank one", "spikes"])
class TestAgainstFloat64:
    def matrix(self, shape, kind):
        if kind == "spikes":
            noise = torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            return planted(shape, torch.linspace(5, 2, 12)) + noise / (4 * max(shape) ** 0.5)
        return planted(shape, spectra(min(shape))[kind])

    def test_full(self, shape, kind):
        A = self.matrix(shape, kind)
        truth = torch.linalg.svdvals(A).numpy()
        found = svd.full_spectrum(A)
        assert np.all(np.abs(found.values - truth) <= found.error + 1e-15 * truth[0])
        big = truth > 2e-5 * truth[0]
        np.testing.assert_allclose(found.values[big], truth[big], rtol=1e-6)
        total = (truth**2).sum()
        np.testing.assert_allclose(np.cumsum(found.values**2) / total, np.cumsum(truth**2) / total, atol=1e-9)

    def test_exact_tail(self, shape, kind):
        A = self.matrix(shape, kind)
        truth = torch.linalg.svdvals(A).numpy()
        found = svd.exact_spectrum(A)
        assert np.abs(found.values - truth).max() <= min(1e-12 * truth[0], found.error[0])

    def test_top(self, shape, kind):
        A = self.matrix(shape, kind)
        truth = torch.linalg.svdvals(A).numpy()
        found = svd.top_spectrum(A, 8)
        if found is None:
            assert kind == "flat"  # nothing separates the values: the caller takes the whole spectrum
            return
        assert np.all(np.abs(found.values - truth[:8]) <= found.error + 1e-12 * truth[0])
        kept, true = (found.values**2).sum(), (truth[:8] ** 2).sum()
        assert abs(kept - true) <= 1e-6 * (truth**2).sum()
        assert abs(kept - true) <= (found.energy_error + 1e-14) * (truth**2).sum()


def test_top_notices_a_missed_direction():
    # A start that is blind to the largest direction: the certificate has to fail or the search has to find it.
    A = planted((200, 200), torch.cat([torch.tensor([10.0]), torch.full((60,), 1.0)]))
    truth = torch.linalg.svdvals(A)
    G = A.T @ A
    V = torch.linalg.eigh(G).eigenvectors.flip(1)
    assert not svd._bounded_by(G, V[:, 1:20], 1.5)  # the first was left out: no proof
    assert svd._bounded_by(G, V[:, :19], 1.5)
    found = svd.top_spectrum(A, 4)
    assert found is None or found.values[0] == pytest.approx(float(truth[0]))


def test_zero_matrix():
    found = svd.full_spectrum(torch.zeros(20, 10))
    assert np.all(found.values == 0)
    assert svd.top_spectrum(torch.zeros(200, 200), 8) is None


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_invariant_to_transpose_rotation_and_scale(seed, scale):
    A = planted((40, 24), torch.linspace(3, 0.1, 24), seed)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(seed), dtype=A.dtype)).Q
    reference = svd.full_spectrum(A).values
    np.testing.assert_allclose(svd.full_spectrum(A.T).values, reference, rtol=1e-9)
    np.testing.assert_allclose(svd.full_spectrum(rotation @ A).values, reference, rtol=1e-9)
    np.testing.assert_allclose(svd.full_spectrum(scale * A).values, scale * reference, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factored_equals_dense(dtype):
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(120, 8, generator=generator).to(dtype)
    A = torch.randn(8, 90, generator=generator).to(dtype)
    found = svd.factored_spectrum(B, A, -1.5)
    truth = torch.linalg.svdvals(1.5 * B.double() @ A.double())[:8].numpy()
    np.testing.assert_allclose(found.values, truth, rtol=1e-12)
    assert len(found.values) == 8


def test_frobenius_norm_and_gram_are_chunked_exactly(monkeypatch):
    monkeypatch.setattr(svd, "CHUNK_ENTRIES", 64)
    A = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert svd.fro_norm(A) == pytest.approx(float(torch.linalg.norm(A.double())), rel=1e-14)
    torch.testing.assert_close(svd.gram(A), A.double().T @ A.double())
    torch.testing.assert_close(svd.gram(A.T), A.double().T @ A.double())


def test_leading_singular_values_of_noise():
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        E = torch.randn(*shape, generator=generator)
        truth = float(torch.linalg.svdvals(E)[0])
        found = max(svd.leading_singular_values(E, generator)[0] for _ in range(3))
        assert 0.98 * truth <= found <= 1.0001 * truth
