"""Models and state dicts in memory."""

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from pairs import planted
from refusals import refused

import lowrank_probe as lp


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def test_models_and_state_dicts_in_memory_give_what_their_files_give(tmp_path):
    base, tuned = tiny_llama(0), tiny_llama(0)
    with torch.no_grad():
        for i, weight in enumerate(tuned.parameters()):
            weight += 0.01 * planted(weight.shape, torch.ones(3), i).float() if weight.ndim == 2 else 0.01
    base.save_pretrained(tmp_path / "a")
    tuned.save_pretrained(tmp_path / "b")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    files = lp.spectrum(tmp_path / "a", tmp_path / "b")
    memory = lp.spectrum(base, tuned)
    mixed = lp.spectrum(base.state_dict(), tmp_path / "b")
    for result in (memory, mixed):
        assert set(result.table["name"]) == set(files.table["name"])
        for name, values in files.singular_values.items():
            np.testing.assert_array_equal(values, result.singular_values[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert memory.facts["base"]["path"] == "(LlamaForCausalLM in memory)"
    status = memory.ledger.set_index("name")["status"]
    assert status["lm_head.weight"] == "tied"
    again = lp.load(memory.save(tmp_path / "run"))
    assert again.facts["base"]["files"] == []


def test_bf16_models_in_memory_are_not_written_to():
    base, tuned = tiny_llama(0).bfloat16(), tiny_llama(0).bfloat16()
    with torch.no_grad():
        for weight in tuned.parameters():
            weight += (3e-5 * torch.randn(weight.shape)).bfloat16()
    copies = [{n: t.clone() for n, t in model.state_dict().items()} for model in (base, tuned)]
    lp.spectrum(base, tuned)
    for model, copy in zip((base, tuned), copies, strict=True):
        assert all(torch.equal(tensor, copy[name]) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_in_memory_cannot_be_compared():
    refused({"w": [1, 2]}, "w is of type list")
    refused({}, "(state dict in memory): holds no tensor")
    refused({0: torch.ones(2, 2)}, "its key 0 is of type int", "name → tensor")
    refused({"w": torch.eye(3).to_sparse()}, "w is stored as sparse_coo", "to_dense()")
    refused(3.5, "found float")
    with torch.device("meta"):
        refused(torch.nn.Linear(2, 2), "meta device")

    wearing = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(target_modules=["q_proj"]))
    refused(wearing, "PEFT adapter", "merge")
