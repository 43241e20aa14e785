"""Matching: every tensor of both sides ends in exactly one line of the ledger, with the right status."""

import math

import numpy as np
import pytest
import torch
from ledgers import check_complete
from pairs import add_update, llama_tensors, pair, planted, write, write_sharded
from transformers import BertConfig, BertForPreTraining, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers import LlamaForCausalLM as Llama

import lowrank_probe as lp
from lowrank_probe import CheckpointError, MatchError, NumericsError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.deltas import match
from lowrank_probe.options import Options

NAN = math.nan


def sides(tmp_path, base, tuned, config=None):
    return write(tmp_path / "base", base, config), write(tmp_path / "tuned", tuned, config)


def statuses(result):
    return dict(zip(result.ledger["name"], result.ledger["status"], strict=True))


def one(result, name):
    lines = result.ledger[(result.ledger["name"] == name) | (result.ledger["tuned_name"] == name)]
    assert len(lines) == 1
    return lines.iloc[0]


# ---------------------------------------------------------------------------------------------- the ledger


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One pair that has every status at once."""
    tmp_path = tmp_path_factory.mktemp("everything")
    base = llama_tensors()
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    base["score.weight"] = torch.randn(3, 48)
    base["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    base["position_ids"] = torch.arange(16).reshape(1, 16)
    base["mask"] = torch.ones(4, 4, dtype=torch.bool)
    base["stack.weight"] = torch.randn(4, 3, 2)
    base["resized.weight"] = torch.randn(10, 48)
    base["rebuilt.weight"] = torch.randn(10, 48)
    tuned = add_update({name: tensor for name, tensor in base.items() if tensor.is_floating_point()}, rank=2)
    tuned |= {"position_ids": base["position_ids"], "mask": base["mask"]}
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"].clone()
    tuned["model.layers.0.self_attn.k_proj.weight"] = base["model.layers.0.self_attn.k_proj.weight"]
    tuned["model.norm.weight"] = base["model.norm.weight"]
    tuned["classifier.weight"] = torch.randn(2, 48)
    tuned["resized.weight"] = torch.randn(12, 48)
    tuned["rebuilt.weight"] = torch.randn(10, 24)
    del tuned["score.weight"]
    paths = sides(tmp_path, base, tuned, {"model_type": "llama"})
    return lp.spectrum(*paths, exclude=["down_proj"]), paths


def test_every_tensor_is_in_one_line(everything):
    check_complete(everything[0], *everything[1])


def test_every_status(everything):
    result, _ = everything
    expected = {
        "model.embed_tokens.weight": "analysed",
        "model.layers.0.self_attn.k_proj.weight": "unchanged",
        "model.layers.1.self_attn.k_proj.weight": "analysed",
        "model.norm.weight": "unchanged",
        "lm_head.weight": "tied",
        "score.weight": "only in base",
        "classifier.weight": "only in tuned",
        "resized.weight": "shape differs",
        "rebuilt.weight": "shape differs",
        "model.layers.1.self_attn.rotary_emb.inv_freq": "not a weight",
        "position_ids": "not a weight",
        "mask": "not a weight",
        "stack.weight": "not a matrix",
    }
    for layer in (0, 1):
        expected |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": "analysed",
            f"model.layers.{layer}.mlp.up_proj.weight": "analysed",
            f"model.layers.{layer}.mlp.down_proj.weight": "excluded",
            f"model.layers.{layer}.input_layernorm.weight": "vector",
        }
    assert statuses(result) == expected


def test_lines_say_shapes_dtypes_and_why(everything):
    result, _ = everything
    line = one(result, "resized.weight")
    assert (line["base_shape"], line["tuned_shape"]) == ("10×48", "12×48")
    assert "vocabulary or head" in line["note"]
    assert "architecture" in one(result, "rebuilt.weight")["note"]
    assert "model.embed_tokens.weight" in one(result, "lm_head.weight")["note"]
    assert "3-D" in one(result, "stack.weight")["note"]
    assert one(result, "model.layers.0.mlp.down_proj.weight")["note"] == "--exclude"
    only = one(result, "classifier.weight")
    assert (only["base_shape"], only["base_dtype"], only["tuned_shape"]) == ("", "", "2×48")
    assert one(result, "position_ids")["base_dtype"] == "I64"


def test_a_tensor_only_in_tuned_is_named_as_the_column_says(everything):
    # columns.LEDGER["name"]: "tensor name in the base, or in the tuned side where the base has none"
    assert one(everything[0], "classifier.weight")["name"] == "classifier.weight"


def test_vectors_and_unchanged_tensors_have_their_relative_change(everything):
    result, _ = everything
    norm = one(result, "model.layers.0.input_layernorm.weight")
    assert norm["fro_norm"] == pytest.approx(0.01 * math.sqrt(48), rel=1e-6)
    assert norm["relative_update"] == pytest.approx(0.01, rel=1e-6)
    unchanged = one(result, "model.norm.weight")
    assert unchanged["fro_norm"] == unchanged["relative_update"] == 0.0
    assert math.isnan(one(result, "score.weight")["fro_norm"])


@pytest.mark.parametrize("write_tuned", [write, write_sharded])
def test_a_plain_pair_is_complete_in_any_layout(tmp_path, write_tuned):
    base = write(tmp_path / "base", llama_tensors())
    tuned = write_tuned(tmp_path / "tuned", add_update(llama_tensors()))
    result = lp.spectrum(base, tuned)
    check_complete(result, base, tuned)
    assert set(statuses(result).values()) == {"analysed", "vector"}


def test_matrices_with_a_side_of_one_are_vectors(tmp_path):
    base = {"a.weight": torch.randn(1, 8), "b.weight": torch.randn(8, 1), "c.weight": torch.randn(8, 2)}
    result = lp.spectrum(*sides(tmp_path, base, {name: W + 0.1 for name, W in base.items()}))
    assert statuses(result) == {"a.weight": "vector", "b.weight": "vector", "c.weight": "analysed"}


def test_scalars_and_empty_tensors_end_in_a_line(tmp_path):
    base = {"a": torch.tensor(2.0), "b": torch.zeros(0), "c": torch.zeros(0, 4), "d": torch.tensor(1.0)}
    tuned = base | {"a": torch.tensor(2.5)}
    result = lp.spectrum(*sides(tmp_path, base, tuned))
    assert statuses(result) == {"a": "vector", "b": "unchanged", "c": "not a matrix", "d": "unchanged"}
    assert one(result, "a")["relative_update"] == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------- selection


def run_pair(tmp_path, **options):
    paths = pair(tmp_path)
    result = lp.spectrum(*paths, **options)
    check_complete(result, *paths)
    return result


def test_include_takes_only_what_matches(tmp_path):
    result = run_pair(tmp_path, include=["q_proj", "embedding"])
    assert sorted(result.table["layer_type"]) == ["embedding", "q", "q"]
    assert set(result.ledger["note"][result.ledger["status"] == "excluded"]) == {"not in --include"}


def test_exclude_beats_include(tmp_path):
    result = run_pair(tmp_path, include=["q_proj"], exclude=["layers.1"])
    assert result.table["name"].tolist() == ["model.layers.0.self_attn.q_proj.weight"]


def test_layers_leaves_out_the_rest_and_what_is_outside_the_blocks(tmp_path):
    result = run_pair(tmp_path, layers=(1, 1))
    assert set(result.table["layer"]) == {1}
    assert one(result, "model.embed_tokens.weight")["note"] == "outside --layers 1-1"


@pytest.mark.parametrize("options", [{"include": ["qq_proj"]}, {"exclude": ["layers.7"]}, {"layers": (5, 9)}])
def test_a_selection_of_nothing_is_an_error(tmp_path, options):
    with pytest.raises(MatchError, match=f"--{next(iter(options))}"):
        lp.spectrum(*pair(tmp_path), **options)


def test_selection_may_leave_out_a_dtype_that_cannot_be_read(tmp_path):
    base = {"q_proj.weight": torch.randn(8, 8), "codes.weight": torch.ones(8, 8, dtype=torch.int8)}
    paths = sides(tmp_path, base, base | {"q_proj.weight": torch.randn(8, 8)})
    with pytest.raises(CheckpointError, match=r"codes\.weight.*I8"):
        lp.spectrum(*paths)
    assert statuses(lp.spectrum(*paths, exclude=["codes"])) == {"q_proj.weight": "analysed", "codes.weight": "excluded"}


# ---------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("prefix", ["bert.", "model.", "transformer.", "roberta.", "base_model.model."])
@pytest.mark.parametrize("longer", ["base", "tuned"])
def test_a_base_model_prefix_is_matched_and_said(tmp_path, prefix, longer):
    plain = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    tuned = add_update(plain)
    renamed = {prefix + name: tensor for name, tensor in (plain if longer == "base" else tuned).items()}
    paths = sides(tmp_path, renamed, tuned) if longer == "base" else sides(tmp_path, plain, renamed)
    result = lp.spectrum(*paths)
    check_complete(result, *paths)
    assert set(statuses(result).values()) == {"analysed", "vector"}
    (note,) = result.facts["notes"]
    assert f"'{prefix}'" in note
    assert str(len(plain)) in note
    assert f"only the {longer} side has" in note


def test_prefix_of_a_real_bert_and_its_headless_fine_tune(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    whole = BertForPreTraining(config)
    headless = BertModel(config)
    headless.load_state_dict(whole.bert.state_dict())
    with torch.no_grad():
        for parameter in headless.parameters():
            parameter += 1e-2 * torch.randn_like(parameter)
    whole.save_pretrained(tmp_path / "base")
    headless.save_pretrained(tmp_path / "tuned")
    result = lp.spectrum(tmp_path / "base", tmp_path / "tuned")
    check_complete(result, tmp_path / "base", tmp_path / "tuned")
    assert "'bert.'" in result.facts["notes"][0]
    found = statuses(result)
    assert {found[name] for name in found if name.startswith("cls.")} == {"only in base"}
    assert {found[name] for name in found if name.startswith("bert.")} == {"analysed", "vector"}


def test_exact_names_win_and_no_prefix_is_said(tmp_path):
    result = lp.spectrum(*pair(tmp_path))
    assert result.facts["notes"] == []


def test_nothing_is_guessed_for_an_unknown_prefix(tmp_path):
    base = llama_tensors()
    with pytest.raises(MatchError, match=r"no tensor in common.*model\.embed_tokens.*mine\.model\.embed_tokens"):
        lp.spectrum(*sides(tmp_path, base, {f"mine.{name}": tensor for name, tensor in base.items()}))


# ---------------------------------------------------------------------------------------------- what cannot be compared


def test_no_tensor_in_common_names_both_sides(tmp_path):
    with pytest.raises(MatchError, match=r"no tensor in common \(base has alpha; tuned has beta\)"):
        lp.spectrum(*sides(tmp_path, {"alpha": torch.ones(2, 2)}, {"beta": torch.ones(2, 2)}))


def test_a_model_alone_is_no_adapter(tmp_path):
    with pytest.raises(MatchError, match="a base is needed"):
        lp.spectrum(pair(tmp_path)[0])


def test_every_shape_differs_is_another_architecture(tmp_path):
    paths = sides(tmp_path, {"a.weight": torch.randn(4, 4)}, {"a.weight": torch.randn(4, 5)})
    with pytest.raises(MatchError, match=r"differs in shape \(such as a\.weight\)"):
        lp.spectrum(*paths)


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


def test_matching_reads_no_tensor(tmp_path):
    base, tuned = map(open_checkpoint, pair(tmp_path))
    for side in (base, tuned):
        file = side.path / "model.safetensors"
        file.write_bytes(file.read_bytes()[: max(info.start for info in side.tensors.values())])
    assert len(match(base, tuned, Options()).pairs) == len(base.tensors)
