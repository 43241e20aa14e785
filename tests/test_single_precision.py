"""Bounds that float32 proves, against float64; and that it does not prove what is not so."""

import numpy as np
import pytest
import torch

from lowrank_probe import single_precision, truncation
from lowrank_probe.definite import BLOCK, positive_definite
from lowrank_probe.truncation import TAIL_BAR, truncate


def spectrum_of(A: torch.Tensor) -> np.ndarray:
    return (torch.linalg.svdvals(A.double()) ** 2).numpy()


def matrix(shape: tuple[int, int], s: np.ndarray, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(s)
    U, V = (torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0] for d in shape)
    return ((U * torch.from_numpy(s)) @ V.T).float()


@pytest.mark.parametrize("shape", [(700, 500), (500, 700)], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6, 1e8])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_bounds_hold_and_are_tight(shape, scale, decay):
    A = matrix(shape, scale / np.arange(1, 501) ** decay)
    exact = spectrum_of(A)
    tall = A if shape[0] > shape[1] else A.T
    found = single_precision.certified(tall, 8, tail_bar=TAIL_BAR)
    assert isinstance(found, tuple)
    upper, V, AV = found
    assert V.shape == (500, 8)
    assert torch.allclose(AV, tall.double() @ V, rtol=0, atol=1e-12 * float(exact[0]) ** 0.5)
    lower = (AV**2).sum(dim=0).numpy()  # the Rayleigh quotients
    assert V.dtype == torch.float64
    assert torch.allclose(V.T @ V, torch.eye(8, dtype=torch.float64), atol=1e-12)
    rounding = 1e-12 * exact.sum()
    assert np.all(lower <= exact[:8] + rounding)
    assert np.all(exact[:8] <= upper + rounding)
    assert (upper - lower).sum() <= max(TAIL_BAR * exact[8:].sum(), rounding)


def test_noise_with_spikes_is_bracketed():
    rng = np.random.default_rng(5)
    s = np.concatenate([[30.0, 20.0, 15.0], np.zeros(497)])
    A = matrix((600, 500), s) + torch.from_numpy(0.1 * rng.standard_normal((600, 500))).float()
    exact = spectrum_of(A)
    found = single_precision.certified(A, 3, tail_bar=TAIL_BAR)
    assert isinstance(found, tuple)
    upper, _, AV = found
    lower = (AV**2).sum(dim=0).numpy()
    assert np.all((lower <= exact[:3] * (1 + 1e-12)) & (exact[:3] <= upper * (1 + 1e-12)))


@pytest.mark.parametrize(
    "A",
    [
        1e-25 * matrix((600, 500), 1.0 / np.arange(1, 501)),  # squares underflow
        1e10 * matrix((600, 500), 1.0 / np.arange(1, 501)),  # G² overflows
        torch.zeros(600, 500),
    ],
    ids=["tiny", "huge", "zero"],
)
def test_what_float32_cannot_hold_is_left_to_float64(A):
    assert single_precision.certified(A, 8, tail_bar=TAIL_BAR) == 0.0


def test_what_takes_many_rounds_is_left_to_the_eigenvectors(monkeypatch):
    A = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))  # no gap anywhere
    assert single_precision.certified(A, 32, tail_bar=TAIL_BAR) > 8
    monkeypatch.setattr(truncation, "certified", None)  # float64's iteration
    found = truncate(A, 32)
    assert found.method == "eigh"
    assert found.s.numpy() ** 2 == pytest.approx(spectrum_of(A)[:32], rel=1e-9)


@pytest.mark.parametrize("stored", [False, True])
def test_a_merged_adapter_at_more_than_its_rank_is_proven_at_once(stored):
    A = matrix((600, 500), np.r_[1.0 / np.arange(1, 6), np.zeros(495)])
    if stored:  # on a base in float32
        W = 0.02 * torch.randn(600, 500, generator=torch.Generator().manual_seed(0))
        A = (W + A) - W
    assert single_precision.certified(A, 8, tail_bar=TAIL_BAR) == 2.0
    found = truncate(A, 8)
    assert found.method == "krylov"
    exact = spectrum_of(A)
    assert found.s[:5].numpy() ** 2 == pytest.approx(exact[:5], rel=1e-9)
    assert np.all(exact[:8] <= found.upper + 1e-15 * exact.sum())
    assert (found.upper - found.s.numpy() ** 2).sum() <= 1e-12 * exact.sum()


def test_what_float32_nearly_proves_is_proven_in_float64():
    A = matrix((1024, 1024), 1.0 / np.arange(1, 1025))
    rounds = single_precision.certified(A, 64, tail_bar=TAIL_BAR)
    assert 2 < rounds < 8
    assert truncate(A, 48).method == "krylov"


def test_a_missed_direction_is_noticed():
    s = 1.0 / np.arange(1, 301)
    A = matrix((400, 300), s)
    G = (A.T @ A).numpy()
    V = torch.linalg.eigh(A.double().T @ A.double())[1].flip(1)
    every, without_third = V[:, :9], torch.cat([V[:, :2], V[:, 3:10]], dim=1)
    mu = 1.01 * float(s[9] ** 2)
    assert single_precision._bounded_by(G, every, mu)
    assert not single_precision._bounded_by(G, without_third, mu)
    assert not single_precision._bounded_by(G, every, 0.95 * float(s[9] ** 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_definite_or_not_wherever_the_negative_value_lies(k, dtype):
    rng = np.random.default_rng(1)
    Q, _ = np.linalg.qr(rng.standard_normal((k, k)))
    for lowest, expected in ((1e-2, True), (-1e-2, False)):
        lam = np.concatenate([[lowest], np.linspace(0.5, 2, k - 1)])
        M = ((Q * lam) @ Q.T).astype(dtype)
        M[np.triu_indices(k, 1)] = np.nan  # not read
        assert positive_definite(M) is expected


def test_the_last_pivot_decides_too():
    M = np.eye(2 * BLOCK + 3)
    M[-1, -1] = -1e-8
    assert not positive_definite(M)


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK + 5, 2 * BLOCK + 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_is_not_definite(at, dtype):
    for i, j in ((at, at), (2 * BLOCK + 2, at)):
        M = np.eye(2 * BLOCK + 3, dtype=dtype)
        M[i, j] = np.nan
        assert not positive_definite(M)


def test_truncation_of_large_and_small_numbers_is_that_of_float64():
    A = matrix((600, 500), 1.0 / np.arange(1, 501))
    for scale in (1e-12, 1e10, 1e14):
        found, plain = truncate(A * scale, 8), truncate(A, 8)
        np.testing.assert_allclose(found.s.numpy() / scale, plain.s.numpy(), rtol=1e-6)


@pytest.mark.parametrize("rows", ["lognormal", "few"])
def test_a_low_rank_with_uneven_rows_is_proven_too(rows, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(1024, 8, generator=generator)
    scale = torch.exp(0.5 * torch.randn(1024, 1, generator=generator))
    B = B * scale if rows == "lognormal" else B * (torch.arange(1024)[:, None] < 20)
    A = B @ torch.randn(8, 1024, generator=generator)
    monkeypatch.setattr(truncation, "_eigenvectors", None)
    found = truncate(A, 64)
    exact = spectrum_of(A)
    assert found.s[:8].numpy() ** 2 == pytest.approx(exact[:8], rel=1e-9)
    assert np.all(exact[:64] <= found.upper + 1e-14 * exact.sum())
    assert (found.upper - found.s.numpy() ** 2).sum() <= 1e-10 * exact.sum()
