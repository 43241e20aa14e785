"""Names and kinds of modules in memory: by the names in the file, and as transformers itself says."""

from dataclasses import replace

import adapting
import pytest
import torch
import transformers as hf
from adapting import saved
from safetensors.torch import load_file, save_file

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.modules import _PLAIN, _by_name, _by_transformers, in_memory


@pytest.mark.parametrize("model_type", sorted(_PLAIN))
@pytest.mark.parametrize("tied", [False, True])
def test_plain_decoders_are_loaded_under_the_names_in_the_file(tmp_path, model_type, tied):
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {**adapting.SIZES, **tokens, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": tied}
    config = hf.AutoConfig.for_model(model_type, **sizes)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    side = open_checkpoint(tmp_path)
    ours, theirs = _by_name(side), _by_transformers(side)
    assert in_memory(side) == ours
    assert {name: replace(slot, why="") for name, slot in ours.slots.items()} == {
        name: replace(slot, why="") for name, slot in theirs.slots.items()
    }
    assert (ours.head, ours.tied) == (theirs.head, theirs.tied)
    assert ours.names - {"model.layers"} <= theirs.names


def test_experts_stored_one_by_one_are_one_parameter(tmp_path):
    base, _ = saved(tmp_path, adapting.mixtral)
    modules = in_memory(open_checkpoint(base))
    slot = modules.slots["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert (slot.parameter, slot.kind) == ("model.layers.1.mlp.experts.gate_up_proj", "parameter")
    assert (slot.expert, slot.piece) == (2, 1)
    assert modules.experts
    names = [name for name in modules.order if "layers.0.mlp.experts" in name]
    assert [name.rpartition(".")[2] for name in names] == ["gate_up_proj", "down_proj"]


def test_a_prefix_that_only_the_model_has(tmp_path):
    base, _ = saved(tmp_path, adapting.gpt2)
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, base / "model.safetensors")
    modules = in_memory(open_checkpoint(base))
    assert modules.slots["h.0.attn.c_attn.weight"].parameter == "transformer.h.0.attn.c_attn.weight"
    assert modules.slots["h.0.attn.c_attn.weight"].kind == "conv1d"
    assert modules.tied == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, "its config names no architecture"),
        ({"model_type": "mine", "architectures": ["MineForCausalLM"]}, "MineForCausalLM is none of its models"),
    ],
)
def test_without_transformers_help_the_names_in_the_file_are_taken(tmp_path, config, why):
    tensors = {"a.q_proj.weight": torch.ones(4, 4), "a.embed_tokens.weight": torch.ones(8, 4), "b": torch.ones(3, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    modules = in_memory(replace(open_checkpoint(tmp_path), config=config))
    assert modules.note == f"module names are those in the file, transformers could not say: {why}"
    assert {name: slot.kind for name, slot in modules.slots.items()} == {
        "a.q_proj.weight": "linear", "a.embed_tokens.weight": "embedding", "b": None,
    }  # fmt: skip


def test_stacks_that_peft_takes_as_in_out(tmp_path):
    base, _ = saved(tmp_path, adapting.gpt_oss)
    modules = in_memory(open_checkpoint(base))
    assert modules.slots["model.layers.0.mlp.experts.down_proj"].transposed
    assert not modules.slots["model.layers.0.self_attn.q_proj.weight"].transposed
