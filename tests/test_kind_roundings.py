"""QLoRA: an adapter seen through the 4-bit rounding of its base, or said to be hidden by it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from updates import (
    BF16,
    F16,
    F32,
    FP4,
    IN_BLOCKS,
    NF4,
    ORDINARY,
    along_columns,
    change,
    codebook,
    findings,
    fine_tuned,
    low_rank,
    model,
    of,
)

TARGETS = of("q_proj", "v_proj", "down_proj")


def qlora(side, quantizer, train, dtype=BF16, targets=TARGETS):
    """(base, tuned): the tuned side is the dequantized base with an adapter, or the base is a dequantized copy."""
    plain = model(dtype)
    rounded = change(plain, quantizer, IN_BLOCKS)
    trained = change(plain, train, targets)
    update = {name: trained[name].double() - W.double() for name, W in plain.items()}
    if side == "base":
        return rounded, trained
    return plain, {name: (W.double() + update[name]).to(dtype) for name, W in rounded.items()}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("codes", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("side", ["tuned", "base"])
@pytest.mark.parametrize("scale_error", [0, 0.01])
def test_a_merged_qlora_adapter(tmp_path, side, codes, dtype, scale_error):
    found = findings(tmp_path, *qlora(side, codebook(codes, scale_error), low_rank(8, 0.09), dtype))
    adapter = found["merged QLoRA"]
    assert adapter.scope == ("q", "v", "down")
    assert (adapter.evidence["rank_at_least"], adapter.evidence["n_matrices"]) == (8, 9)
    assert adapter.evidence["rounded_to"] == ("nf4" if codes is NF4 else "fp4")
    assert adapter.evidence["rounded_side"] == side
    error = 0.0925 if codes is NF4 else 0.122
    assert adapter.evidence["rounding_energy"] == pytest.approx(error**2 / (error**2 + 0.09**2), rel=0.05)
    # The other matrices hold the rounding only: as such, or as values on the grid.
    rest = found["4-bit rounding" if side == "base" else "quantized"]
    assert (rest.scope, rest.evidence["n_matrices"]) == (("k", "o", "up"), 9)
    assert {"merged LoRA", "low-rank", "full fine-tune", "fine-tune", "noise"}.isdisjoint(found)


def test_weights_stored_transposed(tmp_path):
    found = findings(tmp_path, *qlora("tuned", along_columns(codebook(NF4)), low_rank(4, 0.12), targets=IN_BLOCKS))
    assert found["merged QLoRA"].evidence["rank_at_least"] == 4


def test_only_rounding_is_called_that(tmp_path):
    found = findings(tmp_path, *qlora("base", codebook(NF4), lambda W, i: W))
    assert list(found) == ["4-bit rounding"]
    rounding = found["4-bit rounding"]
    assert (rounding.evidence["max_directions"], rounding.evidence["n_matrices"]) == (0, 18)
    assert rounding.evidence["rounding_energy"] == pytest.approx(1, abs=0.01)
    assert rounding.evidence["relative_update"] == pytest.approx(0.092, abs=0.003)
    assert "no direction stands above it, and what lies below cannot be seen" in rounding.statement


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_an_adapter_below_the_rounding_is_not_named(tmp_path, side):
    found = findings(tmp_path, *qlora(side, codebook(NF4), low_rank(8, 0.01), targets=IN_BLOCKS))
    assert list(found) == ["4-bit rounding"]
    assert found["4-bit rounding"].evidence["max_directions"] <= 1


def test_a_rank_partly_below_the_rounding_is_only_bounded(tmp_path):
    found = findings(tmp_path, *qlora("tuned", codebook(NF4), low_rank(8, 0.05), targets=of("up_proj")))
    adapter = found["merged QLoRA"]
    assert adapter.statement.startswith("Consistent with a merged QLoRA adapter of rank ≥ ")
    assert 5 <= adapter.evidence["rank_at_least"] <= 8


def test_full_rank_training_above_the_rounding_is_no_adapter(tmp_path):
    base, tuned = qlora("base", codebook(NF4), fine_tuned(0.06), targets=IN_BLOCKS)
    tuned["model.norm.weight"] = tuned["model.norm.weight"] + 0.01
    found = findings(tmp_path, base, tuned)
    assert list(found) == ["4-bit rounding"]
    assert found["4-bit rounding"].evidence["max_directions"] > 0


def test_an_adapter_merged_into_a_dequantized_base_that_is_given_is_plain(tmp_path):
    base = change(model(BF16), codebook(NF4), IN_BLOCKS)
    found = findings(tmp_path, base, change(base, low_rank(8, 0.05), TARGETS))
    assert list(found) == ["merged LoRA"]
    assert found["merged LoRA"].evidence["rank"] == 8


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    update=st.sampled_from(ORDINARY), log_relative=st.floats(-3, 0), dtype=st.sampled_from([BF16, F16, F32]),
    dequantized=st.sampled_from(["no", "nf4", "fp4"]), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_ordinary_updates_hold_no_grid_and_no_rounding(
    tmp_path_factory, update, log_relative, dtype, dequantized, seed
):
    """Of a plain base and of a dequantized one, whatever their size."""

    def train(W, i):
        D = update(W, seed + i)
        return W + D * (10**log_relative * W.norm() / D.norm())

    base = model(dtype, layers=1, seed=seed)
    if dequantized != "no":
        base = change(base, codebook(NF4 if dequantized == "nf4" else FP4), IN_BLOCKS)
    found = findings(tmp_path_factory.mktemp("ordinary"), base, change(base, train))
    simpler = {
        "merged QLoRA",
        "4-bit rounding",
        "quantized",
        "pruned",
        "merged LoRA",
        "low-rank",
        "re-stored",
        "scaled",
    }
    assert simpler.isdisjoint(found)
