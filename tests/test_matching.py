"""Matching: what is selected, prefixes, and what cannot be compared."""

import pytest
import torch
from ledgers import check_complete, one, statuses
from pairs import add_update, llama_tensors, pair, sides
from transformers import BertConfig, BertForPreTraining, BertModel

import lowrank_probe as lp
from lowrank_probe import CheckpointError, MatchError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.matching import match
from lowrank_probe.options import Options

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


def test_matching_reads_no_tensor(tmp_path):
    base, tuned = map(open_checkpoint, pair(tmp_path))
    for side in (base, tuned):
        file = side.path / "model.safetensors"
        file.write_bytes(file.read_bytes()[: max(info.start for info in side.tensors.values())])
    assert len(match(base, tuned, Options()).pairs) == len(base.tensors)
