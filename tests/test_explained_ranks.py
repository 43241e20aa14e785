"""explained_ranks: updates of a few directions, whose rounding is no independent noise."""

import math

import numpy as np
import pytest
import torch
from pairs import planted, write

import lowrank_probe as lp
from lowrank_probe.explained_ranks import MOST, explained_rank
from lowrank_probe.precision import ulp

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPE = (320, 256)


def product(r, size, shape=SHAPE, seed=0):
    """(W, ΔW) with Gaussian factors, ‖ΔW‖ = size·‖W‖."""
    generator = torch.Generator().manual_seed(seed)
    W = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    D = torch.randn(shape[0], r, generator=generator).double() @ torch.randn(r, shape[1], generator=generator).double()
    return W, sized(D, W, size)


def sized(D, W, size):
    return D * (size * torch.linalg.norm(W.double()) / torch.linalg.norm(D))


def stored(W, D):
    """(Q, steps, values, ‖Q‖, mean square error)."""
    tuned = (W.double() + D).to(W.dtype)
    Q, steps = tuned.float() - W.float(), ulp(tuned, "BF16" if W.dtype == torch.bfloat16 else "F16")
    values = torch.linalg.svdvals(Q.double()).numpy()
    return Q, steps, values, float(torch.linalg.norm(Q.double())), float(steps.double().square().mean()) / 12


def row_of(tmp_path, base, tuned, **options):
    pair = write(tmp_path / "base", {NAME: base}), write(tmp_path / "tuned", {NAME: tuned})
    return lp.spectrum(*pair, **options).table.iloc[0]


@pytest.mark.parametrize("size", [3e-2, 1e-2, 3e-3])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_a_planted_rank_is_counted(tmp_path, r, size):
    W, D = product(r, size)
    row = row_of(tmp_path, W, (W.double() + D).bfloat16())
    assert row["decidable_signal_rank"]
    assert row["signal_rank"] == r


def test_what_rounding_leaves_of_one_direction_stands_above_the_noise_edge():
    Q, steps, values, norm, square = stored(*product(1, 3e-2, (768, 768)))
    assert np.count_nonzero(values > 1.05 * math.sqrt(square) * 2 * math.sqrt(768)) > 4
    assert explained_rank(Q, steps, values, norm, square) == 1


@pytest.mark.parametrize("size", [1e-1, 1e-2, 3e-3, 1e-3, 3e-4])
@pytest.mark.parametrize("kind", ["rank 9", "rank 16", "1/i", "flat", "signs"])
def test_no_rank_explains_an_update_of_more(kind, size):
    W, D = product(int(kind.split()[1]) if "rank" in kind else 1, size, seed=1)
    i = torch.arange(1, 257, dtype=torch.float64)
    if kind == "signs":
        D = sized(torch.sign(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))).double(), W, size)
    elif "rank" not in kind:
        D = sized(planted(SHAPE, 1 / i if kind == "1/i" else i**0), W, size)
    assert explained_rank(*stored(W, D)) is None


def test_a_weak_direction_above_the_noise_is_not_explained_away():
    W, _ = product(1, 1e-2)
    s = torch.tensor([1.0, 1.0, 0.06], dtype=torch.float64)
    Q, steps, values, norm, square = stored(W, sized(planted(SHAPE, s), W, 1e-2))
    edge = math.sqrt(square) * (math.sqrt(SHAPE[0]) + math.sqrt(SHAPE[1]))
    assert 1.5 * edge < values[2] < 3 * edge
    assert explained_rank(Q, steps, values, norm, square) == 3


@pytest.mark.parametrize(("shape", "next_one"), [((768, 32), 0.9), ((768, 64), 0.9)])
def test_a_ninth_direction_above_the_noise_is_not_explained_away(shape, next_one):
    generator = torch.Generator().manual_seed(5)
    W = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    edge = math.sqrt(float(ulp(W, "BF16").double().square().mean()) / 12) * sum(map(math.sqrt, shape))
    D = planted(shape, edge * torch.tensor([30.0] * 8 + [next_one]))
    Q, steps, values, *numbers = stored(W, D)
    assert 1.3 * edge > values[8] > 1.1 * edge > values[9]
    assert explained_rank(Q, steps, values, *numbers) is None


def test_a_weak_direction_beside_strong_ones_is_counted_and_no_more(tmp_path):
    shape = (768, 768)
    W = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(6))).bfloat16()
    edge = math.sqrt(float(ulp(W, "BF16").double().square().mean()) / 12) * sum(map(math.sqrt, shape))
    row = row_of(tmp_path, W, (W.double() + planted(shape, edge * torch.tensor([30.0, 30, 30, 1.3]))).bfloat16())
    assert row["signal_rank"] == 4


@pytest.mark.parametrize("seed", range(6))
def test_the_ninth_value_of_few_columns_that_moved_is_rounding_of_the_arithmetic(tmp_path, seed):
    W = (0.02 * torch.randn(96, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    generator = torch.Generator().manual_seed(seed + 6)
    v = torch.zeros(32)
    v[torch.randperm(32, generator=generator)[:3]] = torch.randn(3, generator=generator)
    D = 2e-4 * torch.outer(torch.randn(96, generator=generator), v)
    assert not row_of(tmp_path, W, (W.float() + D).bfloat16())["signal_rank"] > 3


@pytest.mark.parametrize("power", [-100, -20, 20])
def test_the_scale_of_a_pair_does_not_matter(power):
    W, D = product(2, 3e-3)
    plain, scaled = stored(W, D), stored((W.float() * 2.0**power).bfloat16(), D * 2.0**power)
    assert explained_rank(*plain) == explained_rank(*scaled) == 2


def test_the_transpose_is_the_same():
    Q, steps, *numbers = stored(*product(2, 3e-3))
    assert explained_rank(Q.T.contiguous(), steps.T.contiguous(), *numbers) == 2


def test_half_precision_and_values_that_are_saved_wider(tmp_path):
    W, D = product(1, 3e-3)
    half = W.half()
    assert explained_rank(*stored(half, D / 8)) == 1
    row = row_of(tmp_path, W.float(), (W.double() + D).bfloat16().float())
    assert row["storage"] == "BF16"
    assert (row["base_dtype"], row["signal_rank"]) == ("F32", 1)


def test_weights_that_stayed_at_zero_show_that_the_update_is_not_that_low():
    W, D = product(1, 3e-2)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.3
    W = W.masked_fill(mask, 0.0)
    with np.errstate(all="raise"):
        assert explained_rank(*stored(W, D.masked_fill(mask, 0.0))) is None


def test_it_is_asked_only_where_training_began_with_the_stored_base(tmp_path):
    shape = (768, 768)
    W, D = product(1, 3e-2, shape)
    tuned = (W.double() + D).bfloat16()
    assert row_of(tmp_path / "a", W, tuned)["signal_rank"] == 1
    assert row_of(tmp_path / "b", W, tuned, base_rounded=True)["signal_rank"] > 1
    # From values between the steps rounding is as good as independent, and nothing is counted beside the one.
    between = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert row_of(tmp_path / "c", between, (between.double() + D).bfloat16())["signal_rank"] == 1


def test_rows_that_did_not_move_are_left_out(tmp_path):
    W, D = product(2, 3e-3)
    D[::2] = 0.0
    assert row_of(tmp_path, W, (W.double() + D).bfloat16())["signal_rank"] == 2


@pytest.mark.parametrize("top", [2, 8, 9, 20])
def test_the_largest_values_are_enough(tmp_path, top):
    W, D = product(1, 1e-2, (768, 512))
    row = row_of(tmp_path, W, (W.double() + D).bfloat16(), top=top)
    assert row["method"] == "krylov"
    assert (row["n_kept"], row["signal_rank"], row["decidable_signal_rank"]) == (top, 1, True)


@pytest.mark.parametrize("size", [1e-1, 1e-2])
@pytest.mark.parametrize(("kind", "r"), [("constant", 1), ("signs", 1), ("signs", 5)])
def test_factors_of_one_magnitude_whose_errors_are_not_spread_evenly(kind, r, size):
    shape = (256, 256)
    generator = torch.Generator().manual_seed(9)
    W = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    B, A = (torch.randn(256, r, generator=generator).double() for _ in range(2))
    B, A = (B.sign(), A.sign()) if kind == "signs" else (torch.ones_like(B), torch.ones_like(A))
    assert explained_rank(*stored(W, sized(B @ A.T, W, size))) == r


def test_short_and_unmoved_matrices_are_not_asked():
    Q, steps, values, norm, square = stored(*product(1, 3e-2, (MOST, 400)))
    assert len(values) == MOST
    assert explained_rank(Q, steps, values, norm, square) is None
    assert explained_rank(torch.zeros(20, 20), torch.ones(20, 20).bfloat16(), np.zeros(20), 0.0, 1 / 12) is None


def test_it_repeats_and_leaves_what_it_is_given():
    Q, steps, *numbers = stored(*product(1, 3e-3))
    before = Q.clone(), steps.clone()
    assert [explained_rank(Q, steps, *numbers) for _ in range(2)] == [1, 1]
    assert torch.equal(Q, before[0])
    assert torch.equal(steps, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("r", [1, 3, 8, 9])
def test_a_gpu_finds_the_same(r):
    Q, steps, *numbers = stored(*product(r, 3e-3, (1024, 768)))
    assert explained_rank(Q.cuda(), steps.cuda(), *numbers) == explained_rank(Q, steps, *numbers)
