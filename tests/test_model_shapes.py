"""Counts against real transformers models on the meta device, real PEFT, published numbers; headers against configs."""

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from peft.utils import transformers_weight_conversion as peft_moe
from published_models import COUNTS
from refusals import refused
from safetensors.torch import load_file, save_file
from shape_configs import CONFIGS, OTHERS, SIZES, configs
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lowrank_probe.built_shapes import built_shape
from lowrank_probe.errors import CheckpointError, MatchError, ProbeError
from lowrank_probe.layers import LORA_TARGETS, place
from lowrank_probe.model_shapes import model_shape, shape_of_config, typical_shape
from lowrank_probe.shape_families import FAMILIES, family_shape
from lowrank_probe.typical_shapes import LIKE, published
from lowrank_probe.weight_shapes import REWRITTEN

REFERENCE = json.loads((Path(__file__).parent / "data" / "reference_counts.json").read_text())["models"]
# Totals of the typical models, from memory as in published_models.py.
PUBLISHED = {
    "SmolLM2-135M": 134515008, "SmolLM2-360M": 361821120, "Llama-3.2-1B": 1235814400, "Llama-3.2-3B": 3212749824,
    "Llama-2-7B": 6738415616, "Llama-3.1-8B": 8030261248, "Llama-2-13B": 13015864320, "LLaMA-30B": 32528943616,
    "LLaMA-65B": 65285660672, "Llama-2-70B": 68976648192, "Llama-3.1-70B": 70553706496,
    "Llama-3.1-405B": 405853388800, "Qwen2.5-0.5B": 494032768, "Qwen2.5-1.5B": 1543714304, "Qwen2.5-3B": 3085938688,
    "Qwen2.5-7B": 7615616512, "Qwen2.5-14B": 14770033664, "Qwen2.5-32B": 32763876352, "Qwen2.5-72B": 72706203648,
    "Mistral-7B": 7241732096, "Mistral-Nemo-12B": 12247782400, "Mistral-Small-24B": 23572403200,
    "Mistral-Large-123B": 122610069504, "Gemma-2-2B": 2614341888, "Gemma-2-9B": 9241705984,
    "Gemma-2-27B": 27227128320, "GPT-2": 124439808, "GPT-2 medium": 354823168, "GPT-2 large": 774030080,
    "GPT-2 XL": 1557611200, "Pythia-70M": 70426624, "Pythia-160M": 162322944, "Pythia-410M": 405334016,
    "Pythia-1B": 1011781632, "Pythia-1.4B": 1414647808, "Pythia-2.8B": 2775208960, "Pythia-6.9B": 6857302016,
    "Pythia-12B": 11846072320, "GPT-NeoX-20B": 20554567680, "Mixtral-8x7B": 46702792704,
    "Mixtral-8x22B": 140630071296,
}  # fmt: skip


def without(config, *names):
    return {key: value for key, value in config.items() if key not in names}


def meta(config):
    """The real model of a config, on the meta device."""
    cls = getattr(hf, FAMILIES[config["model_type"]][0])
    with torch.device("meta"):
        return cls(cls.config_class(**{key: value for key, value in config.items() if key != "model_type"}))


def by_peft(model, **lora):
    """(layer type → trainable parameters, all trainable), as the real PEFT makes them; experts of a layer together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers' newest names, and tied tables
        adapted = get_peft_model(model, LoraConfig(**lora), low_cpu_mem_usage=True)
    found = Counter()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            module = name.removeprefix("base_model.model.").partition(".lora_")[0].replace(".base_layer", "")
            found["experts" if module.endswith("experts") else place(module).layer_type] += parameter.numel()
    return dict(found), adapted.get_nb_trainable_parameters()[0]


def ours(shape, rank, targets, dora=False):
    found = Counter()
    for weight in shape.adapted(targets):
        layer_type = "experts" if ".experts." in weight.name else weight.layer_type
        found[layer_type] += weight.lora_parameters(rank, dora)
    return dict(found), shape.lora_parameters(rank, targets, dora)


@pytest.mark.parametrize("name", REFERENCE)
def test_reference_models(name):
    row = REFERENCE[name]
    shape = shape_of_config(row["config"])
    assert shape.source == "config.json"
    assert shape.n_parameters == shape.n_active == row["total_params"] == sum(shape.by_type().values())
    assert shape.tied_embeddings == row["tied_embeddings"]
    by_type = shape.by_type()
    assert by_type["embedding"] == row["embedding_params"]
    assert by_type["lm_head"] == row["lm_head_params"]
    for label, target in row["targets"].items():
        dora = label.endswith("+dora")
        modules = target.get("target_modules", "all-linear")
        also = {"attention": "attention", "mlp": "mlp", "peft-default": "default", "all-linear": "all-linear"}
        also |= {"attention+mlp": ["attention", "mlp"]}
        for targets in [modules, *([also[label]] if label in also else [])]:
            assert shape.lora_parameters(row["r"], targets, dora) == target["trainable"], (label, targets)
        if not dora:
            found = Counter()
            for weight in shape.adapted(modules):
                found[weight.name.rpartition(".")[2]] += weight.count
            assert found == target["adapted_modules"]
            assert target["all_params"] == target["trainable"] + shape.n_parameters


def test_every_family_has_configs():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_weights_are_those_of_the_real_model(model_type):
    for config in configs(model_type):
        shape, built, model = shape_of_config(config), built_shape(config), meta(config)
        assert shape.n_parameters == sum(parameter.numel() for parameter in model.parameters())
        assert sorted(map(repr, shape.weights)) == sorted(map(repr, built.weights))
        assert built.source == "transformers (meta device)"
        same = ("hidden", "n_heads", "vocab", "gated", "tied_embeddings", "n_active", "head", "notes", "head_dim")
        assert [getattr(shape, name) for name in same] == [getattr(built, name) for name in same]
        modules = dict(model.named_modules())
        assert modules[shape.head] is model.get_output_embeddings()
        names = [name for weight in shape.weights for name in weight.modules()]
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert len(names) == len(set(names)) == sum(weight.count for weight in shape.weights)
        assert all(name in modules or name in parameters for name in names)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if "num_key_value_heads" in CONFIGS[name][0]])
def test_what_a_config_leaves_out_has_the_familys_default(model_type):
    config = without(configs(model_type)[0], "num_key_value_heads")
    assert sorted(map(repr, shape_of_config(config).weights)) == sorted(map(repr, built_shape(config).weights))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora_counts_are_pefts(model_type):
    config = configs(model_type)[0]
    shape = shape_of_config(config)
    everything = model_type in REWRITTEN
    assert ours(shape, 3, "all-linear") == by_peft(meta(config), r=3, target_modules="all-linear")
    default = list(LORA_TARGETS[model_type])
    assert ours(shape, 40, "default") == by_peft(meta(config), r=40, target_modules=default)
    dora = default if everything else "all-linear"
    targets = "default" if everything else "all-linear"
    assert ours(shape, 3, targets, True) == by_peft(meta(config), r=3, target_modules=dora, use_dora=True)


@pytest.mark.parametrize(
    ("model_type", "variant"), [("falcon", 1), ("opt", 1), ("qwen2_moe", 1), ("qwen3_moe", 1), ("t5", 1)]
)
def test_lora_counts_of_variants_are_pefts(model_type, variant):
    config = configs(model_type)[variant]
    assert ours(shape_of_config(config), 3, "all-linear") == by_peft(meta(config), r=3, target_modules="all-linear")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_stacks_of_experts_are_target_parameters(model_type):
    config = configs(model_type)[-1]
    shape = shape_of_config(config)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    counted = by_peft(meta(config), r=3, target_modules=[], target_parameters=parameters)
    assert ours(shape, 3, ["expert_gate_up", "expert_down", "router"]) == counted
    assert all("target_parameters" in note or "at twice the rank" in note for note in shape.notes[1:])
    inside = [weight for weight in shape.adapted("mlp") if weight.copies > 1]
    assert [weight.layer_type for weight in inside] == ["expert_gate_up", "expert_down"]
    with pytest.raises(MatchError, match=r"DoRA: PEFT cannot adapt model\.layers\.\*\.mlp"):
        shape.lora_parameters(4, "mlp", dora=True)
    with pytest.raises(ValueError, match="does not work with use_dora"):
        by_peft(meta(config), r=3, use_dora=True, target_modules=[], target_parameters=parameters)


def test_everything_is_every_table_head_and_matrix():
    for model_type in ("gpt2", "llama", "bert"):
        config = configs(model_type)[0]
        model = meta(config)
        kinds = (torch.nn.Linear, torch.nn.Embedding, hf.pytorch_utils.Conv1D)
        names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
        assert ours(shape_of_config(config), 3, "everything") == by_peft(model, r=3, target_modules=names)
    table = ["embed_tokens", "q_proj"]
    config = configs("llama")[0]
    assert ours(shape_of_config(config), 3, table, True) == by_peft(
        meta(config), r=3, target_modules=table, use_dora=True
    )


def test_the_mixtures_that_peft_rewrites():
    known = peft_moe._MODEL_TO_CONVERSION_PATTERN
    names = peft_moe._MOE_TARGET_MODULE_MAPPING
    theirs = {
        model_type: set(names[like]) for model_type, like in known.items()
        if like in names and model_type.islower() and get_checkpoint_conversion_mapping(model_type) is not None
    }  # fmt: skip
    assert theirs == REWRITTEN


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    config, count = COUNTS[name]
    assert family_shape(config).n_parameters == count


def test_active_parameters():
    mixtral = family_shape(published("mixtral")["Mixtral-8x7B"])
    assert (mixtral.n_parameters, mixtral.n_active) == (46_702_792_704, 12_879_925_248)
    assert "2 of 8 experts" in mixtral.notes[0]
    for name, billions in (("Qwen1.5-MoE-A2.7B", 2.7), ("Qwen3-30B-A3B", 3.3)):  # as published
        assert math.isclose(family_shape(COUNTS[name][0]).n_active, billions * 1e9, rel_tol=0.02)


@pytest.mark.parametrize(
    ("targets", "counts"),
    [
        ("q", {"q": 3}), (["q", "v_proj"], {"q": 3, "v": 3}),
        ("layers.1.*", dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 1)),
        (["model.layers.2.self_attn.q_proj", "layers.0.self_attn"], {"q": 2, "k": 1, "v": 1, "o": 1}),
        (["q", "layers.0.self_attn.q_proj"], {"q": 3}), ("self_attn.*", dict.fromkeys("qkvo", 3)),
        ("embedding", {"embedding": 1}), (["lm_head", "gate"], {"lm_head": 1, "gate": 3}),
    ],
)  # fmt: skip
def test_targets(targets, counts):
    adapted = shape_of_config(configs("llama")[0]).adapted(targets)
    assert {weight.layer_type: weight.count for weight in adapted} == counts


def test_targets_that_match_nothing_list_what_there_is():
    shape = shape_of_config(configs("llama")[0])
    with pytest.raises(MatchError) as told:
        shape.adapted(["q", "c_attn"])
    assert "targets c_attn: matches nothing" in str(told.value)
    assert "embedding q k v o gate up down lm_head" in str(told.value)
    assert "q_proj k_proj v_proj o_proj gate_proj" in str(told.value)
    for targets in ("norm", "layers.3.self_attn.q_proj", "bias"):
        with pytest.raises(MatchError, match="matches nothing"):
            shape.adapted(targets)
    with pytest.raises(MatchError, match="rank 0"):
        shape.lora_parameters(0, "q")
    with pytest.raises(MatchError, match="targets are a list"):
        shape.adapted([])
    assert shape.lora_parameters(1000, "q") == 1000 * 3 * 32


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (without(configs("llama")[0], "hidden_size"), "'llama' has no hidden_size"),
        (without(configs("gpt2")[0], "n_layer"), "has no n_layer or num_hidden_layers"),
        (without(configs("mixtral")[0], "num_local_experts"), "has no num_local_experts or num_experts"),
        (without(configs("t5")[0], "d_kv"), "has no d_kv"),
        (configs("llama")[0] | {"vocab_size": "many"}, "vocab_size is 'many', expected a positive integer"),
        (configs("llama")[0] | {"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        (configs("llama")[0] | {"hidden_size": True}, "hidden_size is True"),
        (configs("llama")[0] | {"num_attention_heads": 5}, "hidden size 16 is not a multiple of its 5"),
        (configs("llama")[0] | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        (configs("mixtral")[0] | {"num_experts_per_tok": 4}, "num_experts_per_tok is 4, expected at most its 3"),
        (configs("t5")[0] | {"feed_forward_proj": 3}, "feed_forward_proj is 3"),
        ({"hidden_size": 4}, "config has no model_type"),
        ({}, "it has no field"),
        ({"model_type": "lama"}, "'lama': neither this package nor transformers knows it; nearest: llama"),
        ({"model_type": "?"}, "'?': neither this package nor transformers knows it; none is spelled like it"),
        ({"model_type": "bart", "vocab_size": "x"}, "is in no table of families here, and transformers cannot build"),
    ],
)  # fmt: skip
def test_configs_that_say_too_little_or_nonsense(config, told):
    with pytest.raises(CheckpointError) as error:
        shape_of_config(config)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["model_type"])
def test_an_architecture_that_is_in_no_table_is_built(config):
    shape = shape_of_config(config)
    with torch.device("meta"):
        cls = getattr(hf, config["architectures"][0])
        model = cls(cls.config_class(**without(config, "model_type", "architectures")))
    assert shape.source == "transformers (meta device)"
    assert shape.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shape.hidden, shape.n_layers, shape.n_heads, shape.vocab) == (16, 3, 4, 32)
    assert dict(model.named_modules())[shape.head] is model.get_output_embeddings()
    assert ours(shape, 3, "all-linear") == by_peft(model, r=3, target_modules="all-linear")
    plain = shape_of_config(without(config, "architectures")) if "text_config" not in config else shape
    assert plain.n_parameters == shape.n_parameters


def test_another_head_than_the_tables_is_built():
    config = configs("llama")[0] | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}
    shape = shape_of_config(config)
    assert shape.source == "transformers (meta device)"
    assert shape.head == "score"
    assert shape.n_parameters == shape_of_config(configs("llama")[0]).n_parameters - 32 * 16 + 3 * 16
    model = hf.LlamaForSequenceClassification(hf.LlamaConfig(**without(configs("llama")[0], "model_type")))
    trainable = by_peft(model, r=3, target_modules="all-linear", task_type="SEQ_CLS")[0]
    del trainable["default"]  # the head, which PEFT trains whole
    assert ours(shape, 3, "all-linear")[0] == trainable


def saved(tmp_path, model_type, variant=0):
    torch.manual_seed(0)
    config = configs(model_type)[variant]
    cls = getattr(hf, FAMILIES[model_type][0])
    cls(cls.config_class(**without(config, "model_type"))).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model_type", FAMILIES)
def test_directories_that_transformers_wrote(tmp_path, model_type):
    for variant in range(len(configs(model_type))):
        root = saved(tmp_path / str(variant), model_type, variant)
        shape = model_shape(root)
        assert shape.source == "config.json, safetensors headers"
        assert shape.weights == shape_of_config(configs(model_type)[variant]).weights
        assert model_shape(root / "config.json").n_parameters == shape.n_parameters
        assert model_shape(root / "model.safetensors").source == shape.source


def test_shards_and_files_under_other_names(tmp_path):
    root = saved(tmp_path / "whole", "gpt2")
    tensors = load_file(root / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    shutil.copy(root / "config.json", shards)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [{name.removeprefix("transformer."): t for name, t in list(tensors.items())[i::2]} for i in (0, 1)]
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(0.0)}
    for name, half in zip(names, [halves[0] | masks, halves[1]], strict=True):
        save_file(half, shards / name)
    where = {key: name for name, half in zip(names, [halves[0] | masks, halves[1]], strict=True) for key in half}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert model_shape(shards).weights == model_shape(root).weights
    assert model_shape(shards / "model.safetensors.index.json").source == "config.json, safetensors headers"
    assert "one of 2 shards" in model_shape(shards / names[0]).notes[1]
    (shards / names[1]).unlink()
    refused(shards, names[1], "does not exist; is the download complete?", act=model_shape)


@pytest.mark.parametrize(
    ("model_type", "change", "name", "expected", "found"),
    [
        ("llama", {"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight", "(16, 16)", "(8, 16)"),
        ("llama", {"vocab_size": 33}, "model.embed_tokens.weight", "(33, 16)", "(32, 16)"),
        ("llama", {"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight", "(16, 16)", "none of it"),
        ("llama", {"num_hidden_layers": 2}, "model.layers.2.mlp.down_proj.weight", "2 layers", "(16, 24)"),
        ("gpt2", {"n_inner": 20}, "transformer.h.0.mlp.c_fc.weight", "(16, 20)", "(16, 64)"),
        ("mixtral", {"num_local_experts": 4}, "model.layers.0.block_sparse_moe.gate.weight", "(4, 16)", "(3, 16)"),
        ("mixtral", {"intermediate_size": 20}, "model.layers.0.block_sparse_moe.experts.0.w1.weight",
         "(20, 16) or (3, 40, 16) for each of 3 experts", "(24, 16)"),
        ("gemma", {"tie_word_embeddings": False}, "lm_head.weight", "(32, 16)", "none of it"),
    ],
)  # fmt: skip
def test_headers_that_contradict_their_config(tmp_path, model_type, change, name, expected, found):
    root = saved(tmp_path, model_type)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | change))
    refused(root, f": {name}: its config.json", expected, f" have {found}; is it another model's", act=model_shape)


def test_an_expert_that_lies_in_no_file(tmp_path):
    root = saved(tmp_path, "mixtral")
    tensors = load_file(root / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, root / "model.safetensors")
    refused(root, "model.layers.1.mlp.experts.down_proj", "for each of 3 experts", "not all of it", act=model_shape)


def test_headers_of_an_architecture_that_is_in_no_table(tmp_path):
    model = hf.StableLmForCausalLM(hf.StableLmConfig(**SIZES, num_key_value_heads=2))
    model.save_pretrained(tmp_path)
    assert model_shape(tmp_path).source == "transformers (meta device), safetensors headers"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: its config\.json expects \(16, 16\)"):
        model_shape(tmp_path)


def test_an_untied_head_that_the_config_ties_and_quantized_weights_are_told(tmp_path):
    root = saved(tmp_path, "gemma")
    tensors = load_file(root / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.zeros(32, 16)}, root / "model.safetensors")
    assert "lm_head.weight lies in the files, but the config ties it" in model_shape(root).notes[0]
    save_file(
        tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(192, 1, dtype=torch.uint8)},
        root / "model.safetensors",
    )
    assert "quantized: their shapes were not compared" in model_shape(root).notes[0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert", "t5", "qwen2", "opt"])
def test_headers_alone(tmp_path, model_type):
    root = saved(tmp_path, model_type)
    full = model_shape(root)
    (root / "config.json").unlink()
    for source in (root, root / "model.safetensors"):
        shape = model_shape(source)
        assert shape.source == "safetensors headers"
        assert (shape.n_parameters, shape.hidden, shape.vocab) == (full.n_parameters, full.hidden, full.vocab)
        assert (shape.n_layers, shape.gated, shape.tied_embeddings) == (full.n_layers, full.gated, full.tied_embeddings)
        assert ours(shape, 3, "all-linear") == ours(full, 3, "all-linear")
    with pytest.raises(MatchError, match="targets default: none known"):
        shape.adapted("default")


def test_sources_that_are_no_model(tmp_path):
    refused(tmp_path / "none" / "at all" / "here", "no such file or directory", act=model_shape)
    refused("https://huggingface.co/org/name", "the hub id, org/name", act=model_shape)
    refused(tmp_path, "expected config.json, model.safetensors or its index, found an empty directory", act=model_shape)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    refused(tmp_path, "is an adapter, not a model; give its base model, org/base", act=model_shape)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(tmp_path, "config.json: config of model type 'llama' has no hidden_size", act=model_shape)
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path / "config.json", "config.json: expected a JSON object, found list", act=model_shape)
    (tmp_path / "model.bin").write_bytes(b"")
    refused(tmp_path / "model.bin", "found a file named *.bin", act=model_shape)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    (tmp_path / "config.json").write_text(json.dumps(configs("llama")[0]))
    refused(tmp_path, "model.safetensors: not a safetensors file", act=model_shape)


def test_a_shape_and_a_config_as_a_dict():
    shape = model_shape(configs("llama")[0])
    assert model_shape(shape) is shape


@pytest.mark.parametrize("like", LIKE)
def test_published_models(like):
    for name, config in published(like).items():
        shape = family_shape(config)
        if name.startswith("GPT-3"):  # published as 6.7B and 175.0B, its vocabulary apart
            assert math.isclose(shape.n_parameters, float(name.split()[1][:-1]) * 1e9, rel_tol=0.01)
        else:
            assert shape.n_parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("size", "like", "source"),
    [
        (70e9, "llama", "typical llama of that size: Llama-3.1-70B"), (7e9, "llama", "Llama-2-7B"),
        (8e9, "llama", "Llama-3.1-8B"), (13e9, "llama", "Llama-2-13B"), (405e9, "llama", "Llama-3.1-405B"),
        (7e9, "qwen", "Qwen2.5-7B"), (7e9, "mistral", "Mistral-7B"), (124e6, "gpt2", "GPT-2"),
        (6.9e9, "pythia", "Pythia-6.9B"), (6.9e9, "gpt_neox", "Pythia-6.9B"), (47e9, "mixtral", "Mixtral-8x7B"),
    ],
)  # fmt: skip
def test_a_typical_model_is_the_nearest_published_one(size, like, source):
    shape = typical_shape(size, like)
    assert shape.source.endswith(source)
    assert shape.source.startswith("typical ")
    assert 0.8 < shape.n_parameters / size < 1.25


@pytest.mark.parametrize("like", LIKE)
def test_a_typical_model_is_scaled_where_none_is_near(like):
    sizes = [size for size in (5e8, 2e10, 3e11, 1e12) if size > 1e10 or like != "gemma"]
    for size in sizes:
        shape = typical_shape(size, like)
        assert 0.8 < shape.n_parameters / size < 1.25
        if "scaled" in shape.source:
            assert math.isclose(shape.n_parameters, size, rel_tol=0.1)
            assert f"{shape.n_layers} layers of {shape.hidden} (none published is near)" in shape.source
            assert shape.hidden % shape.n_heads == 0 or "head_dim" in shape.config
            assert shape.n_heads % shape.n_kv_heads == 0
    assert "scaled" in typical_shape(1e12, like).source


def test_sizes_and_families_without_a_typical_model():
    with pytest.raises(ProbeError, match=r"like 'no'.*there are llama, qwen, mistral"):
        typical_shape(7e9, "no")
    for size in (0, -1, 7, math.nan, math.inf, 1e20):
        with pytest.raises(ProbeError, match="expected a number of parameters between 1M and 100T"):
            typical_shape(size)
    with pytest.raises(ProbeError, match="no typical llama is that small"):
        typical_shape(2e6)


def test_the_config_of_a_hub_id_is_all_that_is_asked_for(tmp_path):
    snapshot = tmp_path / "hub" / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(configs("llama")[0]))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    code = "from lowrank_probe.model_shapes import model_shape as m; s = m('org/name'); print(s.n_parameters, s.source)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    count = shape_of_config(configs("llama")[0]).n_parameters
    assert done.stdout == f"{count} config.json of org/name on the hub\n"


def test_answers_for_the_table_need_no_heavy_module(tmp_path):
    root = saved(tmp_path, "mixtral")
    code = f"""
import sys
from lowrank_probe.model_shapes import model_shape, typical_shape
print(model_shape({str(root)!r}).lora_parameters(8), typical_shape(70e9).lora_parameters(16, "mlp"))
heavy = ("torch", "transformers", "peft", "pandas", "numpy", "plotly", "safetensors", "huggingface_hub")
print(*sorted(set(heavy) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == ""


def test_what_is_no_whole_model_is_one_line(tmp_path):
    """An adapter, codes, a file without layers, sizes that no model has."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    factor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({factor: torch.zeros(4, 16)}, adapter / "adapter_model.safetensors")
    for source in (adapter, adapter / "adapter_config.json", adapter / "adapter_model.safetensors"):
        refused(source, "is an adapter, not a model", "org/base", act=model_shape)
    module = "model.layers.0.self_attn.q_proj."
    for tensors, said in (
        ({f"{module}weight": (2048, torch.uint8), f"{module}weight.absmax": (64, torch.uint8)}, "bitsandbytes"),
        ({f"{module}qweight": (64, torch.int32), f"{module}qzeros": (8, torch.int32)}, "GPTQ or AWQ"),
        ({f"{module}W_q": (64, torch.uint8), f"{module}scale": (8, torch.float16)}, "HQQ"),
        ({f"{module}weight._data": (64, torch.int8), f"{module}weight._scale": (1, torch.float16)}, "Quanto"),
        ({f"{module}codes": (64, torch.int8), f"{module}codebooks": (8, torch.float16)}, "AQLM"),
        ({f"{module}weight": (64, torch.int8)}, "I8"), ({"weight": (64, torch.float32)}, "no numbered layers"),
    ):  # fmt: skip
        save_file({k: torch.zeros(8, n, dtype=dtype) for k, (n, dtype) in tensors.items()}, tmp_path / "x.safetensors")
        refused(tmp_path / "x.safetensors", said, "config.json", act=model_shape)
    for wrong, said in (
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 10**9}, "expected at most 10,000 layers"), ({"vocab_size": 10**12}, "vocab_size"),
    ):  # fmt: skip
        refused(configs("llama")[0] | wrong, said, act=model_shape)
    refused({"model_type": "stablelm", "num_hidden_layers": 10**9}, "expected at most 10,000", act=model_shape)


def test_a_quantized_config_is_told():
    plain = configs("llama")[0]
    for said, name in (({"quant_method": "GPTQ"}, "gptq"), ({"bits": 4}, "an unnamed method"), ("yes", "unnamed")):
        shape = model_shape(plain | {"quantization_config": said})
        assert shape.weights == model_shape(plain).weights
        assert f"the weights are quantized ({name}" in shape.notes[0] or name in shape.notes[0]
