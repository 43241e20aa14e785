"""The check of a merged tensor sees what is not the sum."""

import pytest
import torch

from lowrank_probe import sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_the_check_sees_what_is_not_the_sum(dtype):
    """Also an update so small that rounding W to the dtype swallows it."""
    generator = torch.Generator().manual_seed(0)
    W, B, A = (torch.randn(*shape, generator=generator).double() for shape in ((40, 300), (40, 4), (4, 300)))
    B *= 1e-4
    X = torch.randint(0, 2, (300, 2), generator=generator).double() * 2 - 1
    seen, size = W @ X + B @ (A @ X), W.abs().sum(1, keepdim=True) + B.abs() @ A.abs().sum(1, keepdim=True)
    good = W + B @ A

    def check(total, stored=None):
        return sums._check(total, (total if stored is None else stored).to(dtype).double(), seen, size, X, dtype)

    assert 0 < check(good) <= 1
    one_entry, one_lost = good.clone(), good.clone()
    one_entry[7, 3] += 1e-8
    one_lost[7, 3] = W[7, 3]
    for wrong in (W, W - B @ A, good + B @ A, W + B @ A.flip(1), W + B.flip(0) @ A, one_entry, one_lost):
        assert check(wrong) > 1
    other = good.clone()
    other[7, 3] *= 1 + 3 * torch.finfo(dtype).eps
    assert check(good, other) > 1  # not what was summed up
    assert check(good, good.to(torch.float8_e5m2)) > 1  # rounded more than it says
