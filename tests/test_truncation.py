import pytest
import torch

from lowrank_probe.truncation import KRYLOV_FROM, truncate


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80), (500, 600), (1300, 1100)], ids=str)
@pytest.mark.parametrize("spectrum", ["decaying", "steep", "flat", "low rank"])
def test_a_truncation_is_the_best_of_its_rank_and_proves_it(shape, spectrum):
    generator = torch.Generator().manual_seed(3)
    k = min(shape)
    if spectrum == "low rank":
        A = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    else:
        A = torch.randn(shape, generator=generator, dtype=torch.float64)
        if spectrum == "decaying":
            A = A / torch.arange(1, shape[1] + 1)
        if spectrum == "steep":
            A = A / 2.0 ** torch.arange(shape[1])
        A = A.float()
    exact = torch.linalg.svdvals(A.double()).numpy()
    found = truncate(A, 16)
    assert found.method in (("eigh",) if k <= KRYLOV_FROM else ("eigh", "krylov"))
    eye = torch.eye(16, dtype=torch.float64)
    if spectrum != "low rank":
        assert torch.allclose(found.U.T @ found.U, eye, atol=1e-10)
        assert torch.allclose(found.Vh @ found.Vh.T, eye, atol=1e-10)
    total = float((exact**2).sum())
    for j in (1, 3, 8, 16):
        best = float((exact[:j] ** 2).sum())
        kept = float((found.s[:j] ** 2).sum())
        left = torch.linalg.matrix_norm(A.double() - found.U[:, :j] * found.s[:j] @ found.Vh[:j])
        assert float(left) ** 2 == pytest.approx(total - kept, abs=1e-9 * total)
        assert best * (1 - 1e-12) - 1e-6 * total <= kept <= best + 1e-12 * total
        if j == 16:  # the error, too, is that of the optimum
            assert total - kept <= 1.0001 * (total - best) + 1e-12 * total
        assert best <= float(found.upper[:j].sum()) <= best + 2e-6 * total


def test_a_truncation_of_nothing_and_beyond_the_shape():
    zero = truncate(torch.zeros(40, 30), 8)
    assert float(zero.s.max()) == 0.0
    whole = truncate(torch.eye(6, 4), 99)
    assert whole.U.shape == (6, 4)
    assert whole.Vh.shape == (4, 4)
    assert torch.allclose(whole.U * whole.s @ whole.Vh, torch.eye(6, 4, dtype=torch.float64))
