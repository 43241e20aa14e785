"""Quantization grids: found along either axis, in bits and groups; never in ordinary updates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import BF16, F16, F32, ORDINARY, absmax, nf4, zero_point

from lowrank_probe import grids


def gaussian(shape, seed=0):
    return 0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("quantizer", [absmax, zero_point])
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_bits_group_and_axis(dtype, group, quantizer, bits):
    W = gaussian((128, 256)).to(dtype)
    T = quantizer(bits, group)(W.double(), 0).to(dtype)
    for base, tuned, axis in ((W, T, "row"), (W.T, T.T, "column")):
        found = grids.find_grid(base, tuned)
        assert (found["grid_bits"], found["grid_group"], found["grid_axis"]) == (bits, group, axis)
        assert found["grid_levels"] <= 2**bits


def test_one_scale_a_matrix_has_no_axis():
    W = gaussian((128, 256))
    step = W.abs().max() / 127
    found = grids.find_grid(W, (W / step).round() * step)
    assert (found["grid_bits"], found["grid_group"], found["grid_axis"]) == (8, W.numel(), "")


BASES = {
    "Gaussian": gaussian,
    "heavy tails": lambda shape, seed: gaussian(shape, seed) ** 3,
    "uniform": lambda shape, seed: torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5,
    "rows of many sizes": lambda shape, seed: gaussian(shape, seed) * torch.logspace(-2, 2, shape[0])[:, None],
    "dequantized int8": lambda shape, seed: absmax(8, 32)(gaussian(shape, seed), 0),
    "dequantized 4 bits": lambda shape, seed: absmax(4, 32)(gaussian(shape, seed), 0),
    "zeros": lambda shape, seed: torch.zeros(shape),
    "constant": lambda shape, seed: torch.ones(shape),
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    base=st.sampled_from(sorted(BASES)), update=st.sampled_from(ORDINARY),
    dtype=st.sampled_from([F32, F16, BF16]), log_size=st.floats(-4, 0.5), seed=st.integers(0, 2**20),
    shape=st.sampled_from([(64, 64), (40, 96), (256, 128), (32, 512)]),
)  # fmt: skip
def test_an_ordinary_update_is_on_no_grid(base, update, dtype, log_size, seed, shape):
    W = BASES[base](shape, seed).to(dtype)
    D = update(W.double(), seed + 1)
    T = (W + D * (10**log_size * (float(W.float().std()) or 0.02))).to(dtype)
    assert grids.find_grid(W, T) == {}


@pytest.mark.parametrize("quantizer", [absmax(4, 32), absmax(6, 64), absmax(8), nf4])
def test_a_base_on_the_same_grid_shows_nothing(quantizer):
    W = quantizer(gaussian((128, 256)).double(), 0).to(BF16)
    assert grids.find_grid(W, W) == {}
    assert grids.find_grid(W, torch.where(torch.rand(W.shape) < 0.01, W + 1e-3, W)) == {}


def test_levels_are_counted_in_whole_groups():
    A = torch.arange(200.0).remainder(5).reshape(2, 100).numpy()
    assert grids._levels(A, 32) == (5, 5)
    assert grids._levels(A, math.inf) == (5, 5)
    assert grids._levels(torch.zeros(2, 64).numpy(), 64) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_cast_to_float8_has_8_bits(dtype):
    W = (0.02 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    cast = W.to(dtype).bfloat16()
    assert grids.find_grid(W, cast)["grid_bits"] == 8
    assert grids.find_grid(cast, (2 * cast.float()).bfloat16()) == {}
