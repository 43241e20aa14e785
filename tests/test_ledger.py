"""The ledger: every tensor of both sides ends in exactly one line, with the right status."""

import math

import pytest
import torch
from ledgers import check_complete, one, statuses
from pairs import add_update, llama_tensors, sides, write, write_sharded

import lowrank_probe as lp


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
    assert [note for note in result.facts["notes"] if note.startswith("2 tensors differ in shape and are left out: ")]
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
