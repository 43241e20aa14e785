"""The weighted problem against dense references: the optimum, its limits, never above the plain SVD."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_probe.errors import NumericsError
from lowrank_probe.factorisation import factorise
from lowrank_probe.weighting import Roots, root

shapes = st.sampled_from([(12, 30), (30, 12), (20, 20), (7, 25)])


def problem(shape, seed, rows=200, decay=1.0):
    """(ΔW, C, G) with decaying spectra; C and G of `rows` rows, singular where there are fewer than n, m."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape

    def moments(size):
        x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        x = x * torch.arange(1, size + 1) ** -decay @ torch.randn(size, size, generator=generator, dtype=torch.float64)
        return x.T @ x

    D = torch.randn(m, n, generator=generator, dtype=torch.float64)
    return D * torch.linspace(2, 0.1, n, dtype=torch.float64), moments(n), moments(m)


def sqrtm(C, ridge):
    lam, Q = torch.linalg.eigh(C)
    return (Q * (lam.clamp_min(0) + ridge * lam.sum() / len(lam)).sqrt()) @ Q.T


def product(D, r, roots=None):
    found = factorise(D, float(torch.linalg.norm(D)), r, torch.float32, "w", roots=roots)
    return found, found.B.double() @ found.A.double()


def plain(D, r):
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vh[:r]


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([1e-6, 0.01, 1.0]), st.booleans())
def test_the_error_is_the_dense_optimum_of_the_weighted_matrix_and_never_above_plain(shape, r, seed, ridge, two_sided):
    D, C, G = problem(shape, seed)
    right, left = sqrtm(C, ridge), sqrtm(G, ridge) if two_sided else torch.eye(shape[0], dtype=torch.float64)
    found, BA = product(D, r, Roots(root(C, ridge), root(G, ridge) if two_sided else None))
    norm = float(torch.linalg.norm(left @ D @ right))
    s = torch.linalg.svdvals(left @ D @ right)
    best = float(s[r:].square().sum().sqrt()) / norm
    error = float(torch.linalg.norm(left @ (D - BA) @ right)) / norm
    assert error == pytest.approx(best, rel=1e-5, abs=3e-6)
    assert error <= float(torch.linalg.norm(left @ (D - plain(D, r)) @ right)) / norm + 3e-6
    # What the ledger states is the same.
    assert found.weighted_norm == pytest.approx(norm, rel=1e-9)
    assert math.sqrt(found.weighted[-1]) / norm == pytest.approx(error, abs=1e-6)
    assert found.upper[-1] / norm**2 == pytest.approx(1 - best**2, abs=1e-9)
    assert math.sqrt(found.stored[-1]) == pytest.approx(float(torch.linalg.norm(D - BA)), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_a_large_ridge_is_the_plain_svd(shape, r, seed, two_sided):
    D, C, G = problem(shape, seed)
    _, BA = product(D, r, Roots(root(C, 1e10), root(G, 1e10) if two_sided else None))
    reference = plain(D, r)
    # Singular vectors turn by 1e-10 over the relative gap; compare what they keep.
    assert torch.linalg.norm(D - BA) == pytest.approx(float(torch.linalg.norm(D - reference)), rel=1e-6)


def test_one_sided_factors_are_the_projection_on_the_leading_vectors_of_the_weighted_gram_matrix():
    D, C, _ = problem((16, 40), 3)
    ridge = 0.1 * float(torch.trace(C)) / 40
    _, U = torch.linalg.eigh(D @ (C + ridge * torch.eye(40)) @ D.T)
    U = U[:, -5:]
    _, BA = product(D, 5, Roots(root(C, 0.1)))
    assert torch.allclose(BA, U @ U.T @ D, atol=1e-5)


def test_smaller_ranks_are_nested_and_factors_are_balanced():
    D, C, G = problem((20, 30), 4)
    roots = Roots(root(C, 0.01), root(G, 0.01))
    found, _ = product(D, 8, roots)
    _, three = product(D, 3, roots)
    assert torch.allclose(found.B[:, :3].double() @ found.A[:3].double(), three, atol=1e-5)
    assert torch.allclose(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-5)
    assert np.all(np.diff(found.weighted) < 0)


def test_fewer_rows_than_inputs_are_no_trouble():
    D, C, _ = problem((10, 50), 5, rows=8)
    assert int(torch.linalg.matrix_rank(C)) == 8
    _, BA = product(D, 8, Roots(root(C, 1e-6)))
    _, Q = torch.linalg.eigh(C)
    assert float(torch.linalg.norm((D - BA) @ Q[:, -8:])) < 1e-2 * float(torch.linalg.norm(D @ Q[:, -8:]))


def test_moments_of_nothing_are_refused():
    with pytest.raises(NumericsError, match="not positive definite"):
        root(torch.zeros(4, 4, dtype=torch.float64), 0.1)


@settings(max_examples=20, deadline=None)
@given(shapes, st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([0.01, 1.0]), st.booleans())
def test_a_diagonal_root_of_a_table_is_that_of_the_dense_matrix(shape, r, seed, ridge, two_sided):
    D, G, _ = problem(shape, seed)
    counts = torch.randint(0, 5, shape[:1], generator=torch.Generator().manual_seed(seed)).double()
    counts[0] = 3.0
    L = root(G, ridge) if two_sided else None
    found, BA = product(D, r, Roots(L, root(counts, ridge)))
    dense, same = product(D, r, Roots(L, root(torch.diag(counts), ridge)))
    assert found.weighted_norm == pytest.approx(dense.weighted_norm, rel=1e-9)
    assert found.weighted == pytest.approx(dense.weighted, rel=1e-4, abs=1e-6 * dense.weighted_norm**2)
    assert found.upper == pytest.approx(dense.upper, rel=1e-6)
    assert torch.linalg.norm(D - BA) == pytest.approx(float(torch.linalg.norm(D - same)), rel=1e-4, abs=1e-5)


def test_rows_that_are_looked_up_often_are_kept_and_a_row_that_never_is_has_a_weight():
    D = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(40)
    counts[:3] = 1000.0
    K = root(counts, 0.01)
    assert K[3:].numpy() == pytest.approx(math.sqrt(0.01 * 3000 / 40))
    _, BA = product(D, 3, Roots(None, K))
    often, never = (torch.linalg.norm((D - BA)[rows]) / D[rows].norm() for rows in (slice(3), slice(3, None)))
    assert often < 0.03 < 0.5 < never
