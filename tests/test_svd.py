"""svd: every kernel against a float64 SVD of a planted matrix, and its certificate against the truth."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import planted

from lowrank_probe import float64, krylov, svd, triplets

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
            return planted(shape, torch.linspace(5, 2, 12)[: min(shape)]) + noise / (4 * max(shape) ** 0.5)
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
    assert not krylov._bounded_by(G, V[:, 1:20], 1.5)  # the first was left out: no proof
    assert krylov._bounded_by(G, V[:, :19], 1.5)
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
    for name in ("CHUNK_ENTRIES", "GRAM_ENTRIES"):
        monkeypatch.setattr(float64, name, 64)
    A = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert svd.fro_norm(A) == pytest.approx(float(torch.linalg.norm(A.double())), rel=1e-14)
    torch.testing.assert_close(svd.gram(A), A.double().T @ A.double())
    torch.testing.assert_close(svd.gram(A.T), A.double().T @ A.double())


@pytest.mark.parametrize("shape", [(2, 300), (5, 50), (50, 5), (9, 9)], ids=str)
def test_leading_singular_values_of_a_thin_matrix_are_its_own(shape):
    E = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) - 0.5
    found = svd.leading_singular_values(E, torch.Generator().manual_seed(2))[: min(shape)]
    truth = torch.linalg.svdvals(E.double()).numpy()
    np.testing.assert_allclose(found, truth, atol=1e-4 * truth[0])


@pytest.mark.parametrize(("shape", "rank"), [((5, 2000), 1), ((200, 300), 1), ((200, 300), 2), ((300, 40), 3)], ids=str)
def test_leading_singular_values_stay_below_where_the_rank_is_used_up(shape, rank):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        E = torch.zeros(shape)
        E[:, :rank] = torch.rand(shape[0], rank, generator=generator) - 0.5
        truth = float(torch.linalg.svdvals(E.double())[0])
        assert 0.98 * truth <= svd.leading_singular_values(E, generator)[0] <= 1.01 * truth


def test_leading_singular_values_of_nothing_are_zero():
    assert not svd.leading_singular_values(torch.zeros(50, 40), torch.Generator().manual_seed(2)).any()


def test_leading_singular_values_of_noise():
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        E = torch.randn(*shape, generator=generator)
        truth = float(torch.linalg.svdvals(E)[0])
        found = max(svd.leading_singular_values(E, generator)[0] for _ in range(3))
        assert 0.98 * truth <= found <= 1.0001 * truth


def test_the_leading_triplet_is_one():
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(120, 90, generator=generator)
    E[4] *= 6  # σ₁ stands alone, so that ten steps find u and v
    values, u, v = svd.leading_triplet(E, generator)
    U, s, Vh = torch.linalg.svd(E)
    assert values[0] == pytest.approx(float(s[0]), rel=1e-4)
    assert abs(float(u @ U[:, 0])) == pytest.approx(1, abs=1e-3)
    assert abs(float(v @ Vh[0])) == pytest.approx(1, abs=1e-3)
    assert float(u @ E @ v) == pytest.approx(values[0], rel=1e-5)
    values, u, v = svd.leading_triplet(torch.zeros(20, 30), generator)
    assert not values.any()
    assert not u.any()


def noise_with_spikes(shape, seed=3):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return planted(shape, torch.linspace(5, 2, 12)[: min(shape)]) + noise / (4 * max(shape) ** 0.5)


def check_triplets(A, found, r):
    """Orthonormal, the truth's σ, and A·v = σ·u as closely as it says."""
    truth = np.linalg.svd(A.double().cpu().numpy(), compute_uv=False)
    U, s, V = found.U.cpu().numpy(), found.s.cpu().numpy(), found.Vh.T.cpu().numpy()
    assert (U.shape, V.shape) == ((A.shape[0], r), (A.shape[1], r))
    np.testing.assert_allclose(U.T @ U, np.eye(r), atol=1e-13)
    np.testing.assert_allclose(V.T @ V, np.eye(r), atol=1e-13)
    np.testing.assert_allclose(s, truth[:r], atol=1e-12 * truth[0])
    assert found.following == pytest.approx(truth[r] if r < len(truth) else 0.0, abs=1e-5 * truth[0])
    A64 = A.double().cpu().numpy()
    residual = np.maximum(np.linalg.norm(A64 @ V - U * s, axis=0), np.linalg.norm(A64.T @ U - V * s, axis=0))
    np.testing.assert_allclose(found.residual.cpu().numpy(), residual, atol=1e-13 * truth[0])
    assert residual.max() <= 1e-9 * truth[0]


class TestTopTriplets:
    @pytest.mark.parametrize("shape", [*SHAPES, (40, 7)])
    @pytest.mark.parametrize("kind", ["flat", "steep", "harmonic", "rank one", "spikes"])
    @pytest.mark.parametrize("limit", [triplets.EIGH_LIMIT, 0], ids=["eigh", "krylov"])
    def test_against_float64(self, shape, kind, limit, monkeypatch):
        monkeypatch.setattr(triplets, "EIGH_LIMIT", limit)
        A = noise_with_spikes(shape) if kind == "spikes" else planted(shape, spectra(min(shape))[kind])
        r = min(8, *shape)
        check_triplets(A, svd.top_triplets(A, 8), r)

    def test_a_large_short_side_takes_the_krylov_path_and_finds_the_same_subspace(self, monkeypatch):
        A = noise_with_spikes((1030, 1040)).float()
        found = svd.top_triplets(A, 12)
        monkeypatch.setattr(triplets, "EIGH_LIMIT", 2000)
        U = svd.top_triplets(A, 12).U
        assert float(torch.linalg.matrix_norm(U.T @ found.U) ** 2) == pytest.approx(12, abs=1e-10)
        assert float(found.residual.max()) < 1e-9

    @pytest.mark.parametrize("limit", [triplets.EIGH_LIMIT, 0], ids=["eigh", "krylov"])
    def test_deterministic_with_a_fixed_sign_and_the_same_for_the_transpose(self, limit, monkeypatch):
        monkeypatch.setattr(triplets, "EIGH_LIMIT", limit)
        A = noise_with_spikes((90, 90))
        first, again, transposed = svd.top_triplets(A, 6), svd.top_triplets(A, 6), svd.top_triplets(A.T, 6)
        assert torch.equal(first.U, again.U)
        assert torch.equal(first.Vh, again.Vh)
        assert bool((first.U.gather(0, first.U.abs().argmax(0, keepdim=True)) > 0).all())
        np.testing.assert_allclose(
            ((first.U * first.s) @ first.Vh).numpy(),
            ((transposed.U * transposed.s) @ transposed.Vh).T.numpy(),
            atol=1e-9,
        )

    def test_bf16_is_upcast_and_small_values_keep_their_digits(self):
        A = planted((300, 80), torch.logspace(0, -7, 12, dtype=torch.float64))
        # Squaring in the Gram matrix alone would lose the last ones: σ² = 1e-14·σ₁².
        np.testing.assert_allclose(svd.top_triplets(A, 12).s, torch.logspace(0, -7, 12, dtype=torch.float64), rtol=1e-8)
        B = A.bfloat16()
        check_triplets(B, svd.top_triplets(B, 5), 5)

    def test_zero_and_an_open_gap(self):
        found = svd.top_triplets(torch.zeros(30, 20), 4)
        assert found.s.tolist() == [0.0] * 4
        np.testing.assert_allclose((found.U.T @ found.U).numpy(), np.eye(4), atol=1e-14)
        gaps = svd.top_triplets(planted((60, 50), torch.tensor([3.0, 2.0, 2.0, 1.0])), 4).gaps
        np.testing.assert_allclose(gaps, [1, 0, 1, 1], atol=1e-12)

    def test_factored(self):
        generator = torch.Generator().manual_seed(0)
        B, A = torch.randn(70, 6, generator=generator), torch.randn(6, 40, generator=generator)
        product = -0.5 * (B.double() @ A.double())
        check_triplets(product, svd.factored_triplets(B, A, -0.5, 4), 4)
        found = svd.factored_triplets(B, A, -0.5, 16)
        np.testing.assert_allclose(((found.U * found.s) @ found.Vh).numpy(), product.numpy(), atol=1e-12)
        assert found.following == 0.0

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @pytest.mark.parametrize("shape", [(300, 120), (1100, 1300)])
    def test_on_a_gpu(self, shape):
        A = noise_with_spikes(shape).float().cuda()
        found = svd.top_triplets(A, 8)
        assert found.U.is_cuda
        check_triplets(A, found, 8)
        np.testing.assert_allclose(found.U.cpu().numpy(), svd.top_triplets(A.cpu(), 8).U.numpy(), atol=1e-8)
