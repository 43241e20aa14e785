"""What merging changes: tied tables, a vocabulary that grew, and adapters that do not fit the base."""

import json

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import adapt, gpt2, llama
from test_merging import logits, unmerged

import lowrank_probe as lp

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


def tied_llama():
    return llama(num_hidden_layers=1, tie_word_embeddings=True)


TIED = {
    "table": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, True),
    "both-tied": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
    "table-whole": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "head-whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "whole-tied": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False,
    ),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 7]}, False),
}  # fmt: skip


@pytest.mark.parametrize(("config", "apart"), TIED.values(), ids=TIED)
def test_a_tied_head_is_written_apart_only_where_both_ends_do_not_change_alike(tmp_path, config, apart):
    base, adapter, _ = adapt(tmp_path, tied_llama(), r=4, **config)
    result = lp.merge(base, adapter, tmp_path / "merged")
    ours = logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    theirs = unmerged(hf.AutoModelForCausalLM, base, adapter)
    assert (ours - theirs).abs().max() <= 1e-6 * max(1.0, float(theirs.abs().max()))
    assert result.facts["untied"] == apart
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in written) == apart
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["tie_word_embeddings"] == (not apart)
    assert any("lm_head.weight is tied to" in note for note in result.facts["notes"]) == apart


def test_a_vocabulary_that_grew_brings_its_tokenizer_and_its_size(tmp_path):
    model = tied_llama()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text('"of the base"')
    (tmp_path / "base" / "LICENSE").write_text("MIT")
    model.resize_token_embeddings(44, mean_resizing=False)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        wrapped.get_input_embeddings().weight.add_(0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text('"of the adapter"')
    lp.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 44
    torch.testing.assert_close(logits(merged), logits(wrapped), atol=1e-6, rtol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '"of the adapter"'
    assert (tmp_path / "merged" / "LICENSE").read_text() == "MIT"
    with pytest.raises(lp.MatchError, match=r"a table of 44 rows, the base has 40: .* weight 1 only"):
        lp.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", weights=[0.5])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for table in (W for W in tensors.values() if len(W) == 44):  # and the head that is tied to it
        table[43, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(lp.NumericsError, match=r"embed_tokens.weight in .*adapter_model.safetensors: contains NaN"):
        lp.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "damaged")


def test_an_adapter_of_another_base_is_refused_by_tensor(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    config = hf.LlamaConfig.from_pretrained(base)
    config.hidden_size = 32
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(lp.MatchError, match=r"q_proj.weight: .*wide has \(16, 32\), .*adapter is for \(16, 16\)"):
        lp.merge(tmp_path / "wide", adapter, tmp_path / "out")
    config = hf.LlamaConfig.from_pretrained(base)
    config.num_hidden_layers = 1
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "shallow")
    with pytest.raises(
        lp.MatchError, match=r"layers.1.self_attn.q_proj.lora_A.weight, for which .*shallow has no place"
    ):
        lp.merge(tmp_path / "shallow", adapter, tmp_path / "out")
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(lp.MatchError, match="adapts no tensor of"):
        lp.merge(tmp_path / "other", adapter, tmp_path / "out")
    with pytest.raises(lp.CheckpointError, match="give the base model first"):
        lp.merge(adapter, base, tmp_path / "out")
    with pytest.raises(lp.CheckpointError, match="base: is not an adapter"):
        lp.merge(base, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_the_base_has_no_place_for(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    content = load_file(adapter / "adapter_model.safetensors")
    content["base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"] = torch.ones(16)
    save_file(content, adapter / "adapter_model.safetensors")
    with pytest.raises(lp.MatchError, match=r"lora_bias.*no model.layers.0.self_attn.q_proj.bias"):
        lp.merge(base, adapter, tmp_path / "out")
