"""What kind of update it is: planted kinds are recognised, real fine-tunes are never called anything simpler."""

import json
import math
import re

import numpy as np
import pytest
import torch
from builders import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import add_update, llama_tensors, planted, write

import lowrank_probe as lp
from lowrank_probe import kinds, marks, reports
from lowrank_probe.layers import sort_key

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIMPLER = {"merged LoRA", "low-rank", "quantized", "pruned", "scaled", "noise", "re-stored", "adapter", "identical"}
SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256),
}  # fmt: skip


def model(dtype=F32, layers=3, seed=0, head=False):
    """Llama's names, 128 wide, Gaussian weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(300, 128, generator=generator) * 0.02}
    for layer in range(layers):
        for module, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{module}.weight"] = torch.randn(*shape, generator=generator) * 0.02
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(128)
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = 0.1 * torch.randn(128, generator=generator)
    tensors["model.norm.weight"] = torch.ones(128)
    if head:
        tensors["lm_head.weight"] = torch.randn(300, 128, generator=generator) * 0.02
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def change(tensors, how, where=lambda name: True):
    """The tensors with how(W, i) in place of every matrix that `where` selects; a float64 result is rounded once."""
    return {
        name: how(W.double(), i).to(W.dtype) if W.ndim == 2 and where(name) else W
        for i, (name, W) in enumerate(tensors.items())
    }


def findings(tmp_path, base, tuned):
    """kind → finding, in the order they were said."""
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    said = kinds.recognise(result)
    assert [f.statement for f in said] == [f["statement"] for f in result.facts["findings"]]
    assert all(f.statement.endswith(".") and "nan" not in f.statement for f in said)
    found = {f.kind: f for f in said}
    assert len(found) == len(said), said
    return found


def low_rank(rank, relative, seed=0, spread=(2, 1)):
    def how(W, i):
        delta = planted(tuple(W.shape), torch.linspace(*spread, rank), seed + i)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def full_rank(relative, seed=100):
    def how(W, i):
        delta = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def fine_tuned(relative, seed=100):
    """A full-rank update with the decaying spectrum of a real one."""

    def how(W, i):
        k = min(W.shape)
        delta = planted(tuple(W.shape), torch.arange(1, k + 1) ** -0.7, seed + i)
        return W + delta * (relative * W.norm() / delta.norm())

    return how


def of(*modules):
    return lambda name: any(module in name for module in modules)


IN_BLOCKS = of(*SHAPES)


# ---------------------------------------------------------------------------------------------- merged adapters


@pytest.mark.parametrize(
    ("dtype", "relative"), [(F32, 0.3), (F32, 1e-2), (F32, 1e-4), (F16, 1e-2), (BF16, 0.1), (BF16, 2e-2), (BF16, 8e-3)]
)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_merged_low_rank_update_is_a_merged_lora(tmp_path, dtype, relative, rank):
    base = model(dtype)
    found = findings(tmp_path, base, change(base, low_rank(rank, relative), of("q_proj", "v_proj", "down_proj")))
    assert list(found) == ["merged LoRA"]
    lora = found["merged LoRA"]
    assert lora.scope == ("q", "v", "down")
    assert (lora.evidence["rank"], lora.evidence["max_rank"]) == (rank, rank)
    assert (lora.evidence["n_at_rank"], lora.evidence["n_matrices"]) == (9, 9)
    assert f"rank {rank} on q, v, down" in lora.statement


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_an_adapter_merged_by_peft(tmp_path, dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "gate_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "tuned")
    (lora,) = kinds.recognise(lp.spectrum(tmp_path / "base", tmp_path / "tuned"))
    assert (lora.kind, lora.evidence["rank"], lora.scope) == ("merged LoRA", 8, ("q", "v", "gate"))
    for arguments in ((tmp_path / "base", tmp_path / "adapter"), (tmp_path / "adapter",)):
        (adapter,) = kinds.recognise(lp.spectrum(*arguments))
        assert (adapter.kind, adapter.evidence["rank"], adapter.scope) == ("adapter", 8, ("q", "v", "gate"))


def test_ranks_that_differ_by_type_are_told_apart(tmp_path):
    base = model()
    tuned = change(base, low_rank(4, 1e-2), of("q_proj"))
    tuned = change(tuned, low_rank(16, 1e-2), of("up_proj", "down_proj"))
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    said = [(f.kind, f.evidence["rank"], f.scope) for f in kinds.recognise(result)]
    assert said == [("merged LoRA", 16, ("up", "down")), ("merged LoRA", 4, ("q",))]


def test_a_lora_beside_fully_trained_embeddings(tmp_path):
    base = model(BF16)
    tuned = change(base, low_rank(8, 3e-2), of("q_proj", "v_proj"))
    tuned = change(tuned, fine_tuned(3e-2), of("embed_tokens"))
    found = findings(tmp_path, base, tuned)
    assert found["merged LoRA"].scope == ("q", "v")
    assert found["fine-tune"].scope == ("embedding",)
    assert "full fine-tune" not in found


def test_a_rank_partly_below_the_rounding_is_only_bounded(tmp_path):
    base = model(BF16)

    def how(W, i):
        s = torch.exp(torch.randn(16, generator=torch.Generator().manual_seed(i)))
        delta = planted(tuple(W.shape), s, i)
        return W + delta * (4e-3 * W.norm() / delta.norm())

    found = findings(tmp_path, base, change(base, how, of("q_proj", "up_proj", "down_proj")))
    assert list(found) == ["low-rank"]
    assert found["low-rank"].scope == ("q", "up", "down")
    assert found["low-rank"].statement.startswith("Consistent with a merged low-rank adapter of rank ≥ ")
    assert 8 <= found["low-rank"].evidence["rank_at_least"] <= 16


def test_a_pile_up_just_above_the_rounding_is_a_lower_bound(tmp_path):
    base = model(BF16)
    how = low_rank(16, 4e-3, spread=(3, 0.3))  # the weakest of 16 directions is below the rounding everywhere
    lora = findings(tmp_path, base, change(base, how, of("q_proj", "up_proj", "down_proj")))["merged LoRA"]
    assert not lora.evidence["exact"]
    assert f"of rank ≥ {lora.evidence['rank']} on q, up, down" in lora.statement
    assert 12 <= lora.evidence["rank"] <= 16


def test_a_rank_that_rounding_swallowed_is_not_named(tmp_path):
    base = model(BF16)
    found = findings(tmp_path, base, change(base, low_rank(8, 2e-4), of("q_proj", "v_proj")))
    assert list(found) == ["partially frozen"]
    assert found["partially frozen"].scope == ("q", "v")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20), log_relative=st.floats(-4, 0), dtype=st.sampled_from([F32, BF16, F16]),
    types=st.sets(st.sampled_from(sorted(SHAPES)), min_size=1),
)  # fmt: skip
def test_a_gaussian_update_is_never_a_merged_lora(tmp_path_factory, seed, log_relative, dtype, types):
    base = model(dtype, layers=2)
    tuned = change(base, full_rank(10**log_relative, seed), of(*types))
    found = findings(tmp_path_factory.mktemp("gaussian"), base, tuned)
    assert not {"merged LoRA", "low-rank"} & set(found)


@pytest.mark.parametrize("relative", [0.2, 2e-2, 4e-3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_decaying_full_rank_update_is_a_full_fine_tune(tmp_path, dtype, relative):
    base = model(dtype)
    found = findings(tmp_path, base, change(base, fine_tuned(relative)))
    assert list(found) == ["full fine-tune"]
    assert found["full fine-tune"].evidence["n_matrices"] == 19
    assert found["full fine-tune"].evidence["relative_update"] == pytest.approx(relative, rel=0.2)


# ---------------------------------------------------------------------------------------------- quantized


def absmax(bits, group=None):
    """Symmetric round-to-nearest, one scale for every `group` entries of a row (None: the row)."""

    def how(W, i):
        grouped = W.reshape(-1, group or W.shape[1])
        step = grouped.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (grouped / step).round().mul(step).reshape(W.shape)

    return how


def zero_point(bits, group):
    """Asymmetric round-to-nearest with an integer zero point."""

    def how(W, i):
        grouped = W.reshape(-1, group)
        low = grouped.amin(1, keepdim=True)
        step = (grouped.amax(1, keepdim=True) - low) / (2**bits - 1)
        zero = (-low / step).round()
        return (((grouped / step).round() + zero).clamp(0, 2**bits - 1) - zero).mul(step).reshape(W.shape)

    return how


NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0], dtype=torch.float64,
)  # fmt: skip


def nf4(W, i):
    grouped = W.reshape(-1, 64)
    scale = grouped.abs().amax(1, keepdim=True)
    return (NF4[(grouped[..., None] / scale[..., None] - NF4).abs().argmin(-1)] * scale).reshape(W.shape)


def float8(W, i):
    scale = W.abs().max() / 448
    return (W / scale).to(torch.float8_e4m3fn).double() * scale


QUANTIZERS = {
    "int8 a row": (absmax(8), 8, "one scale a row"),
    "int8 groups of 32": (absmax(8, 32), 8, "groups of 32"),
    "int8 zero point": (zero_point(8, 128), 8, "one scale a row"),
    "4 bits, groups of 64": (absmax(4, 64), 4, "groups of 64"),
    "4 bits, zero point, groups of 32": (zero_point(4, 32), 4, "groups of 32"),
    "nf4": (nf4, 4, "groups of 64"),
    "3 bits a row": (absmax(3), 3, "one scale a row"),
    "float8": (float8, 8, "one scale a matrix"),
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
    assert quantized.evidence["group"] == group
    assert quantized.evidence["n_matrices"] == 12
    assert {"merged LoRA", "low-rank", "pruned", "noise", "full fine-tune"}.isdisjoint(found)


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


# ---------------------------------------------------------------------------------------------- pruned, scaled, noise


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


# ---------------------------------------------------------------------------------------------- related, frozen


def test_a_layer_that_was_initialised_anew(tmp_path):
    base, other = model(BF16), model(BF16, seed=9)
    tuned = change(base, fine_tuned(2e-2))
    fresh = [name for name in base if "layers.1." in name and "_proj.weight" in name]
    tuned |= {name: other[name] for name in fresh}
    found = findings(tmp_path, base, tuned)
    assert next(iter(found)) == "re-initialised"
    assert set(found["re-initialised"].scope) == set(fresh)
    assert abs(found["re-initialised"].evidence["median_cosine"]) < 0.05
    assert found["re-initialised"].evidence["median_cosine_elsewhere"] > 0.99
    assert "fine-tune" in found


def test_unrelated_models(tmp_path):
    found = findings(tmp_path, model(), model(seed=9))
    assert list(found) == ["unrelated"]
    assert "19 of 19" in found["unrelated"].statement


@pytest.mark.parametrize("negated", [of("weight"), of("q_proj", "o_proj", "up_proj", "embed"), of("layers.0.")])
def test_negated_weights_are_related(tmp_path, negated):
    """Half of the cosines −1 and half +1 have a median of 0."""
    base = model(BF16)
    tuned = change(base, lambda W, i: -W, negated)
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert result.facts["related"] is True
    assert "warnings" not in result.facts
    assert "unrelated weights" not in set(result.summary["verdict"])
    assert result.table["cosine"].to_numpy() == pytest.approx(-1)
    (scaled,) = (f for f in kinds.recognise(result) if f.kind == "scaled")
    assert scaled.evidence["factor_max"] == pytest.approx(-1, rel=1e-5)


def test_unrelated_models_with_some_weights_negated_stay_unrelated(tmp_path):
    base, other = model(BF16), model(BF16, seed=9)
    tuned = other | {name: -base[name] for name in base if "layers.0.self_attn" in name}
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    assert result.facts["related"] is False


def test_identical_models(tmp_path):
    assert list(findings(tmp_path, model(), model())) == ["identical"]


def test_a_new_head_on_the_base_as_it_was(tmp_path):
    found = findings(tmp_path, model(), model() | {"score.weight": torch.randn(3, 128)})
    assert list(found) == ["head-only"]
    assert "score.weight" in found["head-only"].statement


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("kind", "where", "scope"),
    [
        ("embedding-only", of("embed_tokens"), ("embedding",)),
        ("head-only", of("lm_head"), ("lm_head",)),
        ("norm-only", of("norm"), ("input_layernorm", "norm")),
        ("bias-only", of("bias"), ("q",)),
        ("vectors-only", of("bias", "norm"), ("q", "input_layernorm", "norm")),
    ],
)
def test_only_one_part_moved(tmp_path, kind, where, scope, dtype):
    base = model(dtype, head=True)
    tuned = {
        name: (W.double() * (1 + 0.05 * torch.randn(W.shape, dtype=torch.float64))).to(dtype) if where(name) else W
        for name, W in base.items()
    }
    found = findings(tmp_path, base, tuned)
    assert kind in found
    assert found[kind].scope == tuple(sorted(scope, key=sort_key))
    assert found[kind].evidence["n_unchanged"] == len(base) - found[kind].evidence["n_moved"]
    assert "full fine-tune" not in found
    assert "partially frozen" not in found


def test_only_some_layers_moved(tmp_path):
    base = model(layers=5)
    found = findings(tmp_path, base, change(base, fine_tuned(1e-2), of("layers.1.", "layers.2.", "layers.4.")))
    assert list(found) == ["partially frozen"]
    assert found["partially frozen"].scope == ("layers 1–2, 4",)
    assert "only layers 1–2, 4 of 5 moved; embedding identical" in found["partially frozen"].statement


def test_only_some_types_moved(tmp_path):
    base = model()
    found = findings(tmp_path, base, change(base, fine_tuned(1e-2), of("self_attn")))
    assert list(found) == ["partially frozen"]
    assert found["partially frozen"].scope == ("q", "k", "v", "o")


# ---------------------------------------------------------------------------------------------- the columns


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


def test_levels_are_counted_in_whole_groups():
    A = torch.arange(200.0).remainder(5).reshape(2, 100)
    assert marks._n_levels(A, 32) == (5, 5)
    assert marks._n_levels(A, 200) == (5, 5)
    assert marks._n_levels(torch.zeros(2, 64), 64) == (1, 1)


# ---------------------------------------------------------------------------------------------- where they are shown


def test_findings_are_stored_and_in_json_and_in_the_report(tmp_path):
    base = model(BF16)
    tuned = change(base, low_rank(8, 3e-2), of("q_proj", "v_proj"))
    result = lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned))
    (stored,) = lp.load(result.save(tmp_path / "run")).facts["findings"]
    assert stored["kind"] == "merged LoRA"
    assert json.loads(result.to_json())["facts"]["findings"] == [stored]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert stored["statement"] in page.partition("<main>")[0]
    assert "findings.1" not in page


def test_findings_follow_the_table_on_a_terminal(tmp_path, capsys):
    from lowrank_probe.terminal import print_summary

    base = model()
    print_summary(lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", change(base, full_rank(0.1)))))
    assert capsys.readouterr().out.rstrip().rpartition("kind: ")[2].startswith("Noise: in all 19 changed matrices")


def test_hostile_names_and_older_runs():
    result = build(layers=1)
    result.facts["findings"] = [{"kind": "x", "statement": "<script>alert(1)</script>", "evidence": {}, "scope": []}]
    assert "<script>alert" not in reports.render(result)
    assert 'id="findings"' not in reports.render(build(layers=1))


def test_an_interrupted_run_says_nothing(tmp_path):
    result = lp.spectrum(write(tmp_path / "a", llama_tensors()), write(tmp_path / "b", add_update(llama_tensors())))
    result.facts["status"] = "interrupted"
    assert kinds.recognise(result) == []


# ---------------------------------------------------------------------------------------------- real fine-tunes


@pytest.mark.slow
@pytest.mark.parametrize("stored", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.1])
@pytest.mark.parametrize("pair", ["tcr", "shark", "tcr-small", "bert_ft_10k_25s"])
def test_a_real_full_fine_tune_is_called_one(tmp_path, pair, share, stored):
    """As it is, and a tenth of the update, in three storage types."""
    import real_models
    from safetensors.torch import load_file

    if pair.startswith("bert"):
        folders, base = real_models.rxnfp(), "bert_pretrained"
    else:
        folders, base = real_models.anarcii(), "antibody-small" if pair.endswith("small") else "antibody"
    before, after = (load_file(folders[name] / "model.safetensors") for name in (base, pair))
    before = {name: W.to(stored) if W.is_floating_point() else W for name, W in before.items()}
    tuned = {
        name: (before[name].float() + share * (W - before[name].float())).to(stored)
        if name in before and before[name].shape == W.shape and W.is_floating_point()
        else W
        for name, W in after.items()
    }
    assert list(findings(tmp_path, before, tuned)) == ["full fine-tune"]


@pytest.mark.slow
def test_real_unrelated_models():
    import real_models

    models = real_models.sapiens()
    (finding,) = kinds.recognise(lp.spectrum(models["VH"], models["VL"]))
    assert finding.kind == "unrelated"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["int8", "nf4", "lora"])
def test_kinds_on_real_weights(tmp_path, how):
    import real_models

    from lowrank_probe.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(real_models.smollm2())
    base = {name: checkpoint.read(name) for name in checkpoint.tensors if re.search(r"layers\.(3|25)\.", name)}
    if how == "lora":
        tuned = change(base, low_rank(8, 1e-2), of("q_proj", "v_proj", "up_proj"))
        expected = ("merged LoRA", {"rank": 8, "n_at_rank": 6})
    else:
        tuned = change(base, absmax(8) if how == "int8" else nf4)
        expected = ("quantized", {"bits": 8 if how == "int8" else 4})
    found = findings(tmp_path, base, tuned)
    assert list(found) == [expected[0]]
    assert expected[1].items() <= found[expected[0]].evidence.items()
    assert np.isfinite([v for v in found[expected[0]].evidence.values() if isinstance(v, float)]).all()
