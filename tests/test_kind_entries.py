"""Kinds that the entries show: quantized, pruned, re-stored, scaled and noisy copies."""

import pytest
import torch
from pairs import write
from updates import (
    BF16,
    F16,
    F32,
    IN_BLOCKS,
    absmax,
    along_columns,
    change,
    findings,
    fine_tuned,
    float8,
    full_rank,
    model,
    nf4,
    zero_point,
)

import lowrank_probe as lp
from lowrank_probe import kinds

QUANTIZERS = {
    "int8 a row": (absmax(8), 8, "one scale a row"),
    "int8 groups of 32": (absmax(8, 32), 8, "groups of 32"),
    "int8 zero point": (zero_point(8, 128), 8, "one scale a row"),
    "4 bits, groups of 64": (absmax(4, 64), 4, "groups of 64"),
    "4 bits, zero point, groups of 32": (zero_point(4, 32), 4, "groups of 32"),
    "nf4": (nf4, 4, "groups of 64"),
    "3 bits a row": (absmax(3), 3, "one scale a row"),
    "5 bits, groups of 32": (absmax(5, 32), 5, "groups of 32"),
    "5 bits, zero point, groups of 64": (zero_point(5, 64), 5, "groups of 64"),
    "6 bits a row": (absmax(6), 6, "one scale a row"),
    "6 bits, zero point, groups of 32": (zero_point(6, 32), 6, "groups of 32"),
    "float8": (float8, 8, "one scale a matrix"),
    "int8 a column": (along_columns(absmax(8)), 8, "one scale a column"),
    "nf4 along columns": (along_columns(nf4), 4, "groups of 64 along columns"),
    "6 bits along columns": (along_columns(absmax(6, 32)), 6, "groups of 32 along columns"),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("base_dtype", "tuned_dtype"), [(F32, F32), (F32, F16), (BF16, BF16), (F16, F16)])
def test_a_quantized_copy(tmp_path, name, base_dtype, tuned_dtype):
    how, bits, group = QUANTIZERS[name]
    base = model(base_dtype, layers=2)
    tuned = change({k: v.double() for k, v in base.items()}, how, IN_BLOCKS)
    tuned = {k: v.to(tuned_dtype if IN_BLOCKS(k) and v.ndim == 2 else base_dtype) for k, v in tuned.items()}
    found = findings(tmp_path, base, tuned)
    quantized = found["quantized"]
    assert next(iter(found)) == "quantized"
    assert quantized.evidence["bits"] == bits
    assert "-bit quantized copy (" in quantized.statement
    assert quantized.evidence["group"] == group
    assert quantized.evidence["n_matrices"] == 12
    assert {"merged LoRA", "low-rank", "pruned", "noise", "full fine-tune"}.isdisjoint(found)


def test_weights_stored_transposed_have_their_groups_along_columns(tmp_path):
    """GPT-2's Conv1D holds (in, out), and a quantizer takes consecutive entries as stored."""
    generator = torch.Generator().manual_seed(0)
    stored = {"attn.c_attn": (128, 384), "attn.c_proj": (128, 128), "mlp.c_fc": (128, 512), "mlp.c_proj": (512, 128)}
    base = {
        f"h.{layer}.{name}.weight": (0.02 * torch.randn(*shape, generator=generator)).to(F16)
        for layer in range(2)
        for name, shape in stored.items()
    }
    tuned = change(base, absmax(5, 64))
    folders = [write(tmp_path / name, pair, {"model_type": "gpt2"}) for name, pair in (("a", base), ("b", tuned))]
    (quantized,) = kinds.recognise(lp.spectrum(*folders))
    assert (quantized.kind, quantized.evidence["bits"]) == ("quantized", 5)
    assert quantized.evidence["group"] == "groups of 64 along columns"
    assert quantized.evidence["n_matrices"] == 8


def test_a_fine_tune_of_a_dequantized_base_is_no_quantized_copy(tmp_path):
    base = change(model(BF16), absmax(4, 32), IN_BLOCKS)
    for relative in (2e-2, 5e-4):  # at the second most values stay where they are
        tuned = change(base, fine_tuned(relative), IN_BLOCKS)
        assert "quantized" not in findings(tmp_path / str(relative), base, tuned)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_same_weights_in_a_narrower_type(tmp_path, dtype):
    base = model()
    tuned = {name: W.to(dtype) for name, W in base.items()}
    found = findings(tmp_path, base, tuned)
    assert list(found) == ["re-stored"]
    assert found["re-stored"].evidence["norm_over_rounding"] == pytest.approx(1, abs=0.05)


def magnitude(share):
    def how(W, i):
        return torch.where(W.abs() <= W.abs().flatten().kthvalue(round(share * W.numel())).values, 0.0, W)

    return how


def two_of_four(W, i):
    fours = W.reshape(-1, 4)
    return (fours * torch.zeros_like(fours).scatter_(1, fours.abs().topk(2).indices, 1.0)).reshape(W.shape)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_magnitude_pruning(tmp_path, dtype):
    base = model(dtype)
    found = findings(tmp_path, base, change(base, magnitude(0.5), IN_BLOCKS))
    assert next(iter(found)) == "pruned"
    pruned = found["pruned"]
    assert pruned.evidence["zeroed_fraction"] == pytest.approx(0.5, abs=0.01)
    assert pruned.evidence["zeroed_energy"] == pytest.approx(1)
    assert pruned.evidence["zero_pattern"] == ""
    assert "50 % of the smallest weights" in pruned.statement
    assert "nothing else moved" in pruned.statement


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_high_sparsity_is_no_4_bit_grid(tmp_path, share):
    base = model(BF16)
    assert "quantized" not in findings(tmp_path, base, change(base, magnitude(share), IN_BLOCKS))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_two_of_four(tmp_path, dtype):
    base = model(dtype)
    pruned = findings(tmp_path, base, change(base, two_of_four, IN_BLOCKS))["pruned"]
    assert pruned.evidence["zero_pattern"] == "2:4"
    assert "2:4" in pruned.statement


@pytest.mark.parametrize(("pattern", "axis"), [("rows", 0), ("columns", 1)])
def test_structured_pruning(tmp_path, pattern, axis):
    def how(W, i):
        return W.index_fill(axis, torch.arange(0, W.shape[axis], 4), 0.0)

    base = model()
    pruned = findings(tmp_path, base, change(base, how, IN_BLOCKS))["pruned"]
    assert pruned.evidence["zero_pattern"] == pattern
    assert pruned.evidence["zeroed_fraction"] == pytest.approx(0.25)


def test_pruned_and_then_trained(tmp_path):
    base = model()
    kept = change(base, magnitude(0.5), IN_BLOCKS)
    trained = change(kept, fine_tuned(0.3))
    tuned = {name: torch.where(W == 0, W, trained[name]) for name, W in kept.items()}
    pruned = findings(tmp_path, base, tuned)["pruned"]
    assert pruned.evidence["zeroed_energy"] < 0.9
    assert "trained or rounded" in pruned.statement


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("factor", [0.9, 1.5, -1.0])
def test_plain_scaling(tmp_path, dtype, factor):
    base = model(dtype)
    found = findings(tmp_path, base, change(base, lambda W, i: factor * W))
    assert list(found) == ["scaled"]
    assert found["scaled"].evidence["factor_min"] == pytest.approx(factor, rel=2e-3)
    assert f"multiplied by {factor:g}" in found["scaled"].statement


def test_scaling_by_several_factors(tmp_path):
    base = model()
    scaled = findings(tmp_path, base, change(base, lambda W, i: (0.8 + 0.01 * i) * W))["scaled"]
    assert "each by its own factor" in scaled.statement


@pytest.mark.parametrize(("dtype", "relative"), [(F32, 1e-3), (F32, 0.3), (BF16, 2e-2)])
def test_added_noise(tmp_path, dtype, relative):
    base = model(dtype)
    found = findings(tmp_path, base, change(base, full_rank(relative)))
    assert list(found) == ["noise"]
    assert found["noise"].evidence["r90_over_null"] == pytest.approx(1, abs=0.05)
