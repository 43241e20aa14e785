"""The columns that tell kinds apart, against their formulas."""

import math

import pytest
import torch
from pairs import write
from updates import findings

import lowrank_probe as lp


def test_marks_against_their_formulas(tmp_path):
    W = torch.randn(40, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    T = torch.where(torch.rand(40, 64, generator=torch.Generator().manual_seed(2)) < 0.3, 0.0, 1.1 * W + 0.1)
    W[0, :2], T[0, 0] = 0.0, 0.0
    result = lp.spectrum(write(tmp_path / "a", {"q_proj.weight": W}), write(tmp_path / "b", {"q_proj.weight": T}))
    row, D = result.table.iloc[0], T - W
    assert row["scale"] == pytest.approx(float((D * W).sum() / (W * W).sum()), rel=1e-9)
    assert row["base_alignment"] == pytest.approx(float((D * W).sum() / D.norm() / W.norm()), rel=1e-9)
    gone = (W != 0) & (T == 0)
    assert row["zeroed_fraction"] == pytest.approx(float(gone.sum() / (W != 0).sum()), rel=1e-6)
    assert row["zeroed_energy"] == pytest.approx(float((D[gone] ** 2).sum() / (D**2).sum()), rel=1e-9)
    assert math.isnan(row["grid_bits"])


def test_a_base_of_zeros_and_tiny_shapes_have_marks(tmp_path):
    for i, shape in enumerate([(3, 2), (2, 40), (1000, 3), (8, 8)]):
        base, tuned = {"q_proj.weight": torch.zeros(shape)}, {"q_proj.weight": torch.randn(shape)}
        assert not {"quantized", "pruned", "scaled"} & set(findings(tmp_path / f"{i}a", base, tuned))
        assert not {"quantized", "scaled"} & set(findings(tmp_path / f"{i}b", tuned, base))
