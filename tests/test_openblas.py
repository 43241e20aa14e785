"""numpy's OpenBLAS called directly: A·Aᵀ added to half of a matrix, eigenvalues in place; and the way without it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from lowrank_probe import float64, openblas, svd
from lowrank_probe.full_spectra import eigenvalue_error

library = openblas.openblas()
needs_openblas = pytest.mark.skipif(library is None, reason="numpy computes with another BLAS")


def matrix(m, n, seed=0):
    return np.random.default_rng(seed).standard_normal((m, n))


@needs_openblas
@pytest.mark.parametrize("X", [matrix(9, 12)[:, :5], np.asfortranarray(matrix(12, 9))[:4], matrix(12, 9).T[:, 2:7]])
def test_a_part_of_a_matrix(X):
    G = np.zeros((len(X), len(X)))
    library.add_square(G, X)
    assert np.allclose(np.triu(G), np.triu(X @ X.T), rtol=1e-14, atol=1e-13)


@pytest.mark.skipif(sys.platform != "linux", reason="numpy's wheels have another BLAS elsewhere")
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


def test_it_is_numpys_own_or_the_only_one(monkeypatch):
    def found(*libraries):
        monkeypatch.setattr(openblas, "threadpool_info", lambda: list(libraries))
        return openblas.openblas.__wrapped__() is not None

    def blas(file, kind="openblas"):
        return {"user_api": "blas", "internal_api": kind, "filepath": str(file)}

    own = [one for one in threadpool_info() if one["user_api"] == "blas" and "numpy.libs" in one["filepath"]]
    assert not found(blas("libmkl_rt.so", "mkl"))
    assert not found(blas("/nowhere.so"))
    assert not found(blas("/a.so"), blas("/b.so", "mkl"))
    assert not found({"user_api": "openmp", "internal_api": "openmp", "filepath": "libgomp.so"})
    for one in own:
        assert found(one)
        assert found(blas("/a.so"), one, blas("/b.so", "mkl"))
        assert not found(blas("/a.so", "mkl"), one | {"filepath": "/elsewhere/libopenblas.so"})
