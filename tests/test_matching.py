"""Matching: what is selected, prefixes, and what cannot be compared."""

import peft
import pytest
import torch
from ledgers import check_complete, one, statuses
from pairs import add_update, llama_tensors, pair, sides
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

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
    assert one(result, "model.embed_tokens.weight")["note"] == "outside --layers 1"


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


@pytest.mark.parametrize("prefix", ["bert.", "model.", "transformer.", "roberta.", "base_model.model.", "_orig_mod."])
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


def test_a_changed_bias_is_no_buffer_whatever_its_module_is_called(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.bias += 0.1
    model.save_pretrained(tmp_path / "tuned")
    result = lp.spectrum(tmp_path / "base", tmp_path / "tuned")
    for layer in range(2):
        line = one(result, f"transformer.h.{layer}.attn.c_attn.bias")
        assert line["status"] == "vector"
        assert line["fro_norm"] == pytest.approx(0.1 * 48**0.5, rel=1e-5)
    assert "identical" not in {finding["kind"] for finding in result.facts["findings"]}


@pytest.mark.parametrize(
    ("name", "shape", "status"),
    [
        ("h.0.ln_attn.bias", (8,), "vector"), ("h.0.attn.bias", (8,), "vector"), ("h.0.my_inv_freq", (8,), "vector"),
        ("h.0.attn.bias", (1, 1, 8, 8), "not a weight"), ("h.0.attn.attention.bias", (1, 1, 8, 8), "not a weight"),
        ("h.0.attn.masked_bias", (), "not a weight"), ("h.0.rotary_emb.inv_freq", (8,), "not a weight"),
    ],
)  # fmt: skip
def test_buffers_are_told_by_name_and_shape(tmp_path, name, shape, status):
    base = {"a.weight": torch.ones(4, 4), name: torch.ones(shape)}
    assert statuses(lp.spectrum(base, {"a.weight": torch.ones(4, 4), name: torch.full(shape, 2.0)}))[name] == status


# ---------------------------------------------------------------------------------------------- wrapped models


PEFTS_WARNING = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def wrapped_llama():
    """(a model's state dict, that of the same model inside PEFT's wrapping with a LoRA that changes it)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    return plain, peft.get_peft_model(model, lora).state_dict()


@PEFTS_WARNING
@pytest.mark.parametrize("in_file", [False, True], ids=["memory", "file"])
@pytest.mark.parametrize("swap", [False, True], ids=["tuned", "base"])
def test_weights_inside_pefts_wrapping_are_refused(tmp_path, in_file, swap):
    plain, wrapped = wrapped_llama()
    if in_file:
        torch.save(wrapped, tmp_path / "last.pt")
        wrapped = tmp_path / "last.pt"
    words = r"holds \S+(base_layer|lora_A)\S*: .*save_pretrained.*merge_and_unload"
    with pytest.raises(MatchError, match=words) as told:
        lp.spectrum(*((wrapped, plain) if swap else (plain, wrapped)))
    assert ("last.pt" if in_file else "state dict in memory") in str(told.value)


@PEFTS_WARNING
def test_an_adapters_file_without_its_config_is_refused(tmp_path):
    plain, wrapped = wrapped_llama()
    save_file({n: t.clone() for n, t in wrapped.items() if "lora_" in n}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(MatchError, match=r"lora_A.*without its adapter_config\.json"):
        lp.spectrum(plain, tmp_path / "adapter_model.safetensors")


def test_a_compiled_model_is_matched(tmp_path):
    base, tuned = llama_tensors(), add_update(llama_tensors())
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in tuned.items()}
    result = lp.spectrum(base, compiled)
    assert set(statuses(result).values()) == {"analysed", "vector"}
    assert "'_orig_mod.'" in result.facts["notes"][0]


def test_matching_reads_no_tensor(tmp_path):
    base, tuned = map(open_checkpoint, pair(tmp_path))
    for side in (base, tuned):
        file = side.path / "model.safetensors"
        file.write_bytes(file.read_bytes()[: max(info.start for info in side.tensors.values())])
    assert len(match(base, tuned, Options()).pairs) == len(base.tensors)
