"""What --targets pick, what is left out and why; headers of tiny real models."""

import adapting
import pytest
import torch
from adapting import saved
from safetensors.torch import load_file, save_file

from lowrank_probe import MatchError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.selection import select


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tuple(map(open_checkpoint, saved(tmp_path_factory.mktemp("llama"), adapting.llama)))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return tuple(map(open_checkpoint, saved(tmp_path_factory.mktemp("mixtral"), adapting.mixtral)))


def types(selection):
    return {target.place.layer_type for target in selection.chosen}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear"], {"q", "k", "v", "o", "gate", "up", "down"}),
        (["everything"], {"q", "k", "v", "o", "gate", "up", "down", "embedding", "lm_head"}),
        (["default"], {"q", "v"}),
        (["q", "up"], {"q", "up"}),
        (["mlp"], {"gate", "up", "down"}),
        (["layers.1.self_attn.*"], {"q", "k", "v", "o"}),
        (["all-linear", "lm_head"], {"q", "k", "v", "o", "gate", "up", "down", "lm_head"}),
    ],
)
def test_targets(llama, targets, expected):
    selection = select(*llama, targets)
    assert types(selection) == expected
    # every tensor is in exactly one place
    placed = [pair.tuned_name for target in selection.chosen for pairs in target.pieces for pair in pairs]
    placed += [name for one in selection.whole for name in one.tensors.values()]
    placed += [line["tuned_name"] for _, line in selection.left_out]
    placed += [line["tuned_name"] for line in selection.matching.ledger]
    assert sorted(placed) == sorted(llama[1].tensors)


def test_norms_are_whole_only_where_asked_for(llama):
    assert not select(*llama).whole
    assert {one.why for one in select(*llama, ["everything"]).whole} == {"norm"}
    whole = select(*llama, ["q", "input_layernorm"]).whole
    assert [one.module for one in whole] == [f"model.layers.{i}.input_layernorm" for i in (0, 1)]


def test_include_exclude_and_layers(llama):
    selection = select(*llama, exclude=["q_proj"], layers=(1, 1))
    assert types(selection) == {"k", "v", "o", "gate", "up", "down"}
    assert {target.place.layer for target in selection.chosen} == {1}
    notes = {line["note"] for _, line in selection.left_out}
    assert notes == {"--exclude", "outside --layers 1", "not in --targets"}


def test_a_stack_is_adapted_with_all_its_experts_or_not(mixtral):
    selection = select(*mixtral, ["expert_gate"])  # a part of gate_up_proj, which is the unit
    assert [target.name for target in selection.chosen] == [
        f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)
    ]
    assert selection.chosen[0].parameters == 3 * 48 * 16
    left = select(*mixtral, ["experts"], exclude=["layers.0.block_sparse_moe.experts.1.w1"])
    assert "model.layers.0.mlp.experts.gate_up_proj" not in {target.name for target in left.chosen}
    assert sum(line["note"] == "a part of it is excluded" for _, line in left.left_out) == 5


def test_a_delta_is_the_pieces_one_under_the_other(mixtral):
    target = select(*mixtral, ["expert_gate_up"]).chosen[0]
    base, tuned = (side.read for side in mixtral)
    for expert, delta in enumerate(target.deltas(*mixtral, torch.device("cpu"))):
        names = [f"model.layers.0.block_sparse_moe.experts.{expert}.{w}.weight" for w in ("w1", "w3")]
        expected = torch.cat([tuned(name).double() - base(name).double() for name in names])
        torch.testing.assert_close(delta.dense, expected)
        assert delta.fro_norm == pytest.approx(float(expected.norm()))
        assert delta.base_norm == pytest.approx(float(torch.cat([base(name) for name in names]).double().norm()))


def test_an_expert_that_is_missing(tmp_path):
    pair = saved(tmp_path, adapting.mixtral)
    for side in pair:
        tensors = load_file(side / "model.safetensors")
        del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
        save_file(tensors, side / "model.safetensors")
    selection = select(*map(open_checkpoint, pair), ["experts"])
    assert {line["note"] for _, line in selection.left_out if line["name"].endswith("w2.weight")} == {
        "expert 1 of 3 is missing"
    }


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ["q_prj"],
            r"--targets q_prj: matches nothing; there are the layer types embedding q k v o gate up down lm_head",
        ),
        (["q", "vision.*"], r"--targets vision\.\*: matches nothing"),
        ("q", "targets are a list"),
        ([], "targets are a list"),
    ],
)
def test_targets_that_match_nothing(llama, targets, words):
    with pytest.raises(MatchError, match=words):
        select(*llama, targets)


def test_no_default_targets_are_known(tmp_path):
    pair = saved(tmp_path, adapting.marian)
    sides = [open_checkpoint(side) for side in pair]
    for side in sides:
        side.config["model_type"] = "mine"
    with pytest.raises(MatchError, match="none known for model type 'mine'"):
        select(*sides, ["default"])
