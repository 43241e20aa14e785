"""4-bit rounding in an update: its size and its largest σ are those of the true errors; no other update holds any."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import planted
from updates import BF16, F16, F32, FP4, NF4, ORDINARY, codebook

from lowrank_probe import roundings
from lowrank_probe.deltas import Delta
from lowrank_probe.layers import place

CODES = {"nf4": NF4, "fp4": FP4}


def gaussian(shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def delta_of(W, T):
    D, name = T.double() - W.double(), "q_proj.weight"
    return Delta(
        name, place(name), (W.shape[0], W.shape[1]), "F32", "F32", float(D.norm()), float(W.double().norm()), 1.0,
        dense=D, base=W, tuned=T,
    )  # fmt: skip


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("size", [0, 0.03, 0.06])
def test_energy_and_edge_are_those_of_the_errors(side, name, axis, size):
    W = gaussian((256, 512))
    Q = codebook(CODES[name])(W, 0)
    update = planted((256, 512), torch.ones(4))
    update *= size * W.norm() / update.norm()
    before, after = (W, Q + update) if side == "tuned" else (Q, W + update)
    if axis == 0:
        before, after = before.T, after.T
    found = roundings.find_rounding(delta_of(before.to(BF16), after.to(BF16)))
    assert (found["rounded_to"], found["rounded_side"]) == (name, side)
    assert found["rounding_energy"] == pytest.approx(
        float(((Q - W) ** 2).sum() / ((after - before) ** 2).sum()), rel=0.02
    )
    assert found["rounding_edge"] == pytest.approx(float(torch.linalg.matrix_norm(Q - W, 2)), rel=0.03)


@pytest.mark.parametrize("shape", [(100, 96), (7, 30), (3, 2)])
def test_blocks_that_run_on_over_the_ends_of_lines_are_not_looked_for(shape):
    W = gaussian(shape)
    assert roundings.find_rounding(delta_of(W, W + 0.1 * gaussian(shape, 1))) == {}


def test_rows_of_zeros_are_left_out():
    W = gaussian((256, 512))
    W[::2] = 0.0
    Q = torch.where(W == 0, W, codebook(NF4)(W + 1e-9, 0))
    assert (
        roundings.find_rounding(delta_of(W.to(F32), (Q + 1e-4 * gaussian(W.shape, 1)).to(F32)))["rounded_to"] == "nf4"
    )
    assert roundings.find_rounding(delta_of(torch.zeros(64, 64), torch.ones(64, 64))) == {}


@settings(max_examples=300, deadline=None)
@given(
    update=st.sampled_from(ORDINARY), dtype=st.sampled_from([F32, F16, BF16]), log_relative=st.floats(-1.6, 0.5),
    dequantized=st.sampled_from(["no", "nf4", "fp4"]), heavy=st.booleans(), seed=st.integers(0, 2**20),
    shape=st.sampled_from([(64, 64), (128, 256), (512, 64)]),
)  # fmt: skip
def test_no_other_update_holds_any(update, dtype, log_relative, dequantized, heavy, seed, shape):
    W = gaussian(shape, seed)
    W = W**3 / 4e-4 if heavy else W
    W = (codebook(CODES[dequantized])(W, 0) if dequantized != "no" else W).to(dtype)
    D = update(W.double(), seed + 1)
    T = (W + D * (10**log_relative * W.double().norm() / D.norm())).to(dtype)
    assert roundings.find_rounding(delta_of(W, T)) == {}
