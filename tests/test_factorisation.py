"""Factors as they are stored: the optimum from both sides, the error of what is written, overflow."""

import math

import numpy as np
import pytest
import torch

from lowrank_probe.errors import NumericsError
from lowrank_probe.factorisation import factorise, relative


def decaying(m, n, scale=1.0):
    generator = torch.Generator().manual_seed(5)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64)).Q
    return (scale * U / torch.arange(1, min(m, n) + 1) @ V.T).float()


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (60, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_rank_is_at_the_optimum_and_the_stored_error_is_that_of_the_written_factors(shape, dtype):
    D = decaying(*shape)
    norm = float(torch.linalg.matrix_norm(D.double()))
    found = factorise(D, norm, 12, dtype, "w")
    assert found.B.dtype == found.A.dtype == dtype
    sigma = torch.linalg.svdvals(D.double()).numpy()
    rounding = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
    for j in (1, 2, 7, 12):
        best = math.sqrt((sigma[j:] ** 2).sum())
        error = float(torch.linalg.matrix_norm(D.double() - found.B[:, :j].double() @ found.A[:j].double()))
        assert relative(found.stored[j - 1], norm) == pytest.approx(error / norm, abs=3e-8)
        assert best * (1 - 1e-12) <= error <= math.sqrt((1.00005 * best) ** 2 + (rounding * norm) ** 2)
        assert found.kept[j - 1] <= (sigma[:j] ** 2).sum() * (1 + 1e-12) <= found.upper[j - 1] * (1 + 1e-12)
        assert found.upper[j - 1] - found.kept[j - 1] <= 2e-6 * norm**2


def test_both_factors_carry_the_same_share():
    D = decaying(40, 90)
    found = factorise(D, float(torch.linalg.matrix_norm(D)), 6, torch.float32, "w")
    assert torch.allclose(found.B.norm(dim=0), found.A.norm(dim=1), rtol=1e-5)
    assert np.allclose(found.B.norm(dim=0).numpy() ** 4, np.diff(found.kept, prepend=0.0), rtol=1e-4)


def test_a_low_rank_update_is_kept_to_rounding_and_the_rank_is_cut_to_the_shape():
    D = torch.outer(torch.arange(1.0, 9.0), torch.arange(1.0, 6.0))
    norm = float(torch.linalg.matrix_norm(D.double()))
    found = factorise(D, norm, 50, torch.float32, "w")
    assert found.B.shape == (8, 5)
    assert relative(found.stored[0], norm) < 2e-7
    assert math.isnan(relative(0.0, 0.0))


def test_an_overflow_names_the_matrix_and_the_mend():
    D = decaying(30, 30, scale=1e12)
    with pytest.raises(
        NumericsError, match=r"^a\.weight: its factors reach .*e\+0.*, beyond float16; use --dtype float32"
    ):
        factorise(D, 1.0, 4, torch.float16, "a.weight")
