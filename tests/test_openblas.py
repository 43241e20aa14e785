"""numpy's OpenBLAS called directly: A·Aᵀ added to half of a matrix, eigenvalues in place; and the way without it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from lowrank_probe import float64, openblas, svd
from lowrank_probe.full_spectra import eigenvalue_error

library = openblas.openblas()
needs_openblas = pytest.mark.skipif(library is None, reason="numpy computes with another BLAS")


def matrix(m, n, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n))


def test_the_pinned_numpy_has_it():
    assert library is not None


@needs_openblas
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (40, 70), (70, 40)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_half_of_a_square(shape, order):
    X = np.asarray(matrix(*shape), order=order)
    start = matrix(shape[0], shape[0], 1)
    G = start.copy()
    library.add_square(G, X)
    assert np.allclose(np.triu(G), np.triu(start + X @ X.T), rtol=1e-14, atol=1e-13)
    assert np.array_equal(np.tril(G, -1), np.tril(start, -1))
    G = np.full_like(start, np.nan)
    library.add_square(G, X, keep=False)
    assert np.allclose(np.triu(G), np.triu(X @ X.T), rtol=1e-14, atol=1e-13)


@needs_openblas
@pytest.mark.parametrize("band_from", [1, 10_000])
@pytest.mark.parametrize("k", [1, 2, 33, 64, 301])
def test_eigenvalues_are_numpys(k, band_from, monkeypatch):
    monkeypatch.setattr(openblas, "BAND_FROM", band_from)
    X = matrix(k, k + 5) * np.geomspace(1, 1e-6, k)[:, None]
    G = X @ X.T
    expected = np.linalg.eigvalsh(G)
    G[np.tril_indices(k, -1)] = np.nan  # not read
    found = library.eigenvalues(G)
    assert np.abs(found - expected).max() <= eigenvalue_error(expected[-1], X.shape)


@needs_openblas
@pytest.mark.parametrize(
    ("threads", "k", "by_band"), [(1, 9, False), (1, 10, True), (2, 10, True), (3, 14, False), (3, 15, True)]
)
def test_more_threads_ask_for_more_rows_by_way_of_a_band(threads, k, by_band, monkeypatch):
    monkeypatch.setattr(openblas, "BAND_FROM", 10)
    taken = []
    told = {name: lambda *a, name=name: taken.append(name) for name in ("dsyevd", "dsyevd_2stage")}
    replace(library, threads=lambda: threads, **told).eigenvalues(np.eye(k))
    assert set(taken) == {"dsyevd_2stage" if by_band else "dsyevd"}


@needs_openblas
def test_the_threads_are_those_of_the_limit():
    with threadpool_limits(1):
        assert library.threads() == 1


@needs_openblas
def test_what_does_not_converge_is_numpys_error():
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        library.eigenvalues(np.full((40, 40), np.nan))


@needs_openblas
def test_a_library_that_does_nothing_is_not_taken():
    assert openblas._works(library)
    for name in ("dsyrk", "dsyevd", "dsyevd_2stage"):
        assert not openblas._works(replace(library, **{name: lambda *a: None}))


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (5, 5)])
def test_without_it_the_same_comes_out(shape, monkeypatch):
    A = torch.from_numpy(matrix(*shape)).float()
    usual, full = svd.full_spectrum(A), float64.gram(A)
    monkeypatch.setattr(float64, "openblas", lambda: None)
    torch.testing.assert_close(float64.gram(A), full, rtol=0, atol=1e-12 * float(full.max()))
    other = svd.full_spectrum(A)
    assert np.all(np.abs(other.values - usual.values) <= other.error + usual.error)
    torch.testing.assert_close(full, full.T, rtol=0, atol=0)


def test_it_is_found_by_what_it_is(monkeypatch):
    monkeypatch.setattr(openblas, "threadpool_info", lambda: [{"internal_api": "mkl", "filepath": "libmkl_rt.so"}])
    assert openblas.openblas.__wrapped__() is None
    monkeypatch.setattr(openblas, "threadpool_info", lambda: [{"internal_api": "openblas", "filepath": "/nowhere.so"}])
    assert openblas.openblas.__wrapped__() is None
