"""Merged adapters: the rank is named where the spectra show it, and never for full-rank updates."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import planted, write
from updates import BF16, F16, F32, SHAPES, change, findings, fine_tuned, full_rank, low_rank, model, of

import lowrank_probe as lp
from lowrank_probe import kinds

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


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
