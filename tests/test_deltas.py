"""Deltas: what is read of a pair, related or not; NaN and Inf; Conv1D; tied heads."""

import math

import numpy as np
import pytest
import torch
from ledgers import check_complete, statuses
from pairs import add_update, llama_tensors, pair, planted, sides
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import lowrank_probe as lp
from lowrank_probe import NumericsError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.deltas import Delta, read_pair, streams
from lowrank_probe.matching import match
from lowrank_probe.options import Options
from lowrank_probe.targets import difference_norm

NAN = math.nan


def test_unrelated_models_are_recognised(tmp_path):
    paths = sides(tmp_path, llama_tensors(seed=1), llama_tensors(seed=2))
    result = lp.spectrum(*paths)
    assert result.facts["related"] is False
    assert abs(result.facts["median_cosine"]) < 0.1
    assert "unrelated checkpoints" in result.facts["warnings"][0]
    assert set(result.summary["verdict"]) == {"unrelated weights"}
    assert all("cosine" in text for text in result.summary["evidence"])


def test_a_fine_tune_is_related_however_large(tmp_path):
    result = lp.spectrum(*pair(tmp_path, relative=1.0))
    assert result.facts["related"] is True
    assert "warnings" not in result.facts
    assert result.facts["median_cosine"] == pytest.approx(1 / math.sqrt(2), abs=0.05)


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_and_inf_are_named_with_their_file(tmp_path, side, value, name):
    base, tuned = llama_tensors(), add_update(llama_tensors())
    planted_in = {"base": base, "tuned": tuned}[side][name]
    planted_in.view(-1)[3] = value
    paths = sides(tmp_path, base, tuned)
    word = "1 NaN" if math.isnan(value) else "1 Inf"
    with pytest.raises(NumericsError, match=f"{name} in .*{side}/model.safetensors: contains {word}"):
        lp.spectrum(*paths)
    assert name in set(lp.spectrum(*paths, exclude=[name]).ledger["name"])


def _pairs(tmp_path, base, tuned, config):
    both = [open_checkpoint(path) for path in sides(tmp_path, base, tuned, config)]
    return match(*both, Options()).pairs, both


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float64", "bfloat16")])
def test_without_its_sides_a_matrix_is_read_run_by_run_and_is_the_same(tmp_path, dtypes):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (700, 400),  # more than one run
        "model.layers.0.mlp.experts.gate_up_proj": (3, 64, 48),
        "model.layers.0.self_attn.qkv_proj.weight": (96, 32),
        "model.norm.weight": (32,),
        "model.layers.0.mlp.shared.thin.weight": (1, 64),
    }
    base = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtypes[0])) for name, shape in shapes.items()
    }
    tuned = {name: (1.5 * W).to(getattr(torch, dtypes[1])) for name, W in base.items()}
    pairs, both = _pairs(tmp_path, base, tuned, {"model_type": "llama"})
    assert len(pairs) > len(shapes)
    ran = [one.key for one in pairs if streams(one, *both)]
    assert "model.layers.0.self_attn.q_proj.weight" in ran
    assert sum("experts" in key for key in ran) >= 3
    for one in pairs:
        whole, bare = (read_pair(one, *both, torch.device("cpu"), sides=kept) for kept in (True, False))
        assert type(whole) is type(bare)
        if not isinstance(whole, Delta):
            assert {**whole, "fro_norm": 0, "relative_update": 0} == {**bare, "fro_norm": 0, "relative_update": 0}
            assert whole["fro_norm"] == pytest.approx(bare["fro_norm"], rel=1e-6)
            continue
        assert (bare.base, bare.tuned) == (None, None)
        assert bare.dense.dtype == whole.dense.dtype
        assert torch.equal(bare.dense, whole.dense)
        assert math.isnan(bare.cosine) and math.isnan(bare.dot)  # noqa: PT018
        for number in ("fro_norm", "base_norm"):
            assert getattr(bare, number) == pytest.approx(getattr(whole, number), rel=1e-5)


def test_without_its_sides_nan_is_named_and_counted_too(tmp_path):
    base, tuned = llama_tensors(), add_update(llama_tensors())
    name = "model.layers.1.mlp.up_proj.weight"
    tuned[name].view(-1)[[3, 7]] = NAN
    both = [open_checkpoint(path) for path in sides(tmp_path, base, tuned)]
    (moved,) = [one for one in match(*both, Options()).pairs if one.key == name]
    with pytest.raises(NumericsError, match=f"{name} in .*tuned/model.safetensors: contains 2 NaN"):
        read_pair(moved, *both, torch.device("cpu"), sides=False)


@pytest.mark.parametrize("grown", [0, 40_000])
def test_a_norm_is_taken_a_few_entries_at_a_time_and_is_that_of_all(tmp_path, grown):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40_000, 64, generator=generator).bfloat16()  # 2.6 million entries: more than one run
    tuned = torch.cat([base * 1.5, torch.randn(grown, 64, generator=generator).bfloat16()])
    both = [open_checkpoint(path) for path in sides(tmp_path, {"a.weight": base}, {"a.weight": tuned})]
    expected = torch.linalg.norm(torch.cat([tuned[:40_000].double() - base.double(), tuned[40_000:].double()]))
    for one, other in ((both[0], both[1]), tuple(open_checkpoint({"a.weight": W}) for W in (base, tuned))):
        assert difference_norm(one, "a.weight", other, "a.weight") == pytest.approx(float(expected), rel=1e-12)
        whole = difference_norm(one, "", other, "a.weight")
        assert whole == pytest.approx(float(torch.linalg.norm(tuned.double())), rel=1e-12)


def test_a_scalar_beside_matrices_is_a_vector(tmp_path):
    base = {"logit_scale": torch.tensor(2.6), "fc1.weight": torch.randn(32, 16)}
    tuned = {"logit_scale": torch.tensor(2.7), "fc1.weight": base["fc1.weight"] + 0.1 * torch.randn(32, 16)}
    for one in (lp.spectrum(base, tuned, device="cpu"), lp.spectrum(*sides(tmp_path, base, tuned), device="cpu")):
        assert statuses(one) == {"logit_scale": "vector", "fc1.weight": "analysed"}


# ---------------------------------------------------------------------------------------------- Conv1D, tied heads


def test_conv1d_of_a_real_gpt2_is_out_by_in(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"
    delta = planted((16, 48), torch.tensor([3.0, 1.0]))
    with torch.no_grad():
        model.get_parameter(name).add_(delta.float())
    model.save_pretrained(tmp_path / "tuned")
    result = lp.spectrum(tmp_path / "base", tmp_path / "tuned", split=False)
    check_complete(result, tmp_path / "base", tmp_path / "tuned")
    (row,) = result.table.to_dict("records")
    assert (row["name"], row["rows"], row["cols"], row["layer_type"]) == (name, 48, 16, "qkv")
    np.testing.assert_allclose(result.singular_values[name][:2], [3, 1], rtol=1e-5)


@pytest.mark.parametrize("changed", ["base", "tuned", "neither"])
def test_a_head_is_tied_only_where_both_sides_are(tmp_path, changed):
    base = llama_tensors()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    tuned = add_update(base)
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    if changed != "neither":
        {"base": base, "tuned": tuned}[changed]["lm_head.weight"][0, 0] += 1
    paths = sides(tmp_path, base, tuned)
    result = lp.spectrum(*paths)
    check_complete(result, *paths)
    assert statuses(result)["lm_head.weight"] == ("tied" if changed == "neither" else "analysed")


def test_tied_in_base_and_untied_in_tuned_by_transformers(tmp_path):
    config = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    Llama(LlamaConfig(**config, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    Llama(LlamaConfig(**config, tie_word_embeddings=False)).save_pretrained(tmp_path / "tuned")
    result = lp.spectrum(tmp_path / "base", tmp_path / "tuned")
    check_complete(result, tmp_path / "base", tmp_path / "tuned")
    assert statuses(result)["lm_head.weight"] == "only in tuned"
