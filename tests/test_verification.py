"""base + adapter against the tuned model: adapters that the real peft writes, from exact to broken."""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lowrank_probe as lp
from lowrank_probe import texts
from lowrank_probe.layers import is_conv1d
from lowrank_probe.verification import ROWS, verify, verify_merge

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

VOCABULARY = 300
SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


def tokenizer():
    """Byte-level BPE of the prompts: any text becomes ids below 300."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(texts.prompts(), trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def llama(**changes):
    config = {**SMALL, **IDS, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
    config |= {"tie_word_embeddings": False, **changes}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**config))


def gpt2():
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
        )
    )  # fmt: skip


def bert_config():
    return hf.BertConfig(**SMALL, hidden_size=32, intermediate_size=48, max_position_embeddings=64, pad_token_id=1)


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=1,
            eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


LINEAR = {
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "bert": (lambda: hf.BertForMaskedLM(bert_config()), ["query", "key", "value", "dense"]),
    "bert-bare": (lambda: hf.BertModel(bert_config()), ["query", "key", "value"]),
    "t5": (t5, ["q", "k", "v", "o", "wi", "wo"]),
}


def sides(directory, make, targets, dtype=torch.float32, with_tokenizer=True):
    """(base, tuned) directories; tuned differs by a full-rank update, falling off, of every targeted matrix."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # so that the outputs of a tiny random model are not all but constant
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model = model.to(dtype)
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for name, W in model.named_parameters():
            if W.ndim == 2 and name.removesuffix(".weight").rpartition(".")[2] in targets:
                U, s, Vh = torch.linalg.svd(torch.randn(W.shape), full_matrices=False)
                W += ((U * s * 0.8 ** torch.arange(len(s))) @ Vh * 0.02).to(dtype)
    model.save_pretrained(directory / "tuned")
    if with_tokenizer:
        tokenizer().save_pretrained(directory / "tuned")
    return directory / "base", directory / "tuned"


def adapter_of(base, tuned, out, rank, targets, factor=1.0):
    """A peft adapter with the best rank-`rank` factors of the difference (None: all of it), scaled by `factor`."""
    name = json.loads((base / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    cls = getattr(hf, name)
    before = cls.from_pretrained(base, dtype=torch.float32)
    after = cls.from_pretrained(tuned, dtype=torch.float32).state_dict()
    values, model_type = {k: v.clone() for k, v in before.state_dict().items()}, before.config.model_type
    r = rank or 200
    worn = get_peft_model(before, LoraConfig(r=r, lora_alpha=factor * r, target_modules=targets))
    with torch.no_grad():
        for module_name, module in worn.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                delta = after[f"{module_name}.weight"] - values[f"{module_name}.weight"]
                delta = delta.T if is_conv1d(f"{module_name}.weight", model_type) else delta
                U, s, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
                k = min(r, len(s))
                if len(module.lora_A):
                    module.lora_A["default"].weight.zero_()[:k] = s[:k, None].sqrt() * Vh[:k]
                    module.lora_B["default"].weight.zero_()[:, :k] = U[:, :k] * s[:k].sqrt()
                else:
                    module.lora_embedding_A["default"].zero_()[:k] = (U[:, :k] * s[:k].sqrt()).T
                    module.lora_embedding_B["default"].zero_()[:, :k] = (s[:k, None].sqrt() * Vh[:k]).T
    worn.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return {name: (*sides(root / name, *LINEAR[name]), LINEAR[name][1]) for name in LINEAR}


@pytest.mark.parametrize("name", LINEAR)
def test_exact_adapter_is_the_tuned_model_and_rank_1_lies_between(pairs, name, tmp_path):
    base, tuned, targets = pairs[name]
    exact = verify(base, tuned, adapter_of(base, tuned, tmp_path / "exact", None, targets))
    low = verify(base, tuned, adapter_of(base, tuned, tmp_path / "low", 2, targets))
    assert exact.ok, exact.problems
    assert low.ok, low.problems
    assert list(exact.table.index) == list(ROWS)
    assert exact.notes == ()
    distance = "relative_error" if name == "bert-bare" else "mean_abs_logit_error"
    assert exact.measure == ("hidden states" if name == "bert-bare" else "logits")
    for result in (exact, low):
        assert result.table[distance]["base"] == exact.table[distance]["base"] > 1e-3
        assert result.merged_gap < 1e-4 * result.table[distance]["base"]
        assert (result.table["n_tokens"] > 500).all()
        assert result.storage == "float32"
    assert exact.table[distance]["base+adapter"] < 1e-4 * exact.table[distance]["base"]
    assert 0.05 < low.table[distance]["base+adapter"] / low.table[distance]["base"] < 0.95
    if name == "bert-bare":
        assert exact.table["cosine"]["base+adapter"] == pytest.approx(1, abs=1e-9)
        assert low.table["cosine"]["base"] < low.table["cosine"]["base+adapter"] < 1
    else:
        assert exact.table["kl_nats"]["base+adapter"] < 1e-8 < 1e-5 < exact.table["kl_nats"]["base"]
        assert exact.table["kl_nats"]["base+adapter merged"] < 1e-8
        assert exact.table["top1_agreement"]["base+adapter"] > 0.995
        assert low.table["kl_nats"]["base+adapter"] < low.table["kl_nats"]["base"]


def test_figures_are_those_of_the_models(pairs, tmp_path):
    base, tuned, targets = pairs["llama"]
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    text = "Seven boats came back."
    result = verify(base, tuned, adapter, [text])
    ids = torch.tensor([hf.AutoTokenizer.from_pretrained(tuned)(text)["input_ids"]])
    with torch.no_grad():
        p, q = (hf.LlamaForCausalLM.from_pretrained(side)(ids).logits[0].double() for side in (tuned, base))
    row = result.table.loc["base"]
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()
    assert row["kl_nats"] == pytest.approx(float(kl), rel=1e-6)
    assert row["mean_abs_logit_error"] == pytest.approx(float((p - q).abs().mean()), rel=1e-6)
    assert row["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert row["n_tokens"] == ids.shape[1]
    payload = json.loads(result.to_json())
    assert payload["ok"] is True
    assert [line["model"] for line in payload["table"]] == list(ROWS)
    assert payload["table"][0]["kl_nats"] == row["kl_nats"]


def test_experts_adapted_as_parameters(tmp_path):
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        **SMALL, **IDS, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    worn = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names))
    with torch.no_grad():
        for name, parameter in worn.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    worn.save_pretrained(tmp_path / "a")
    worn.merge_and_unload().save_pretrained(tmp_path / "tuned")
    result = verify(tmp_path / "base", tmp_path / "tuned", tmp_path / "a")
    assert result.ok, result.problems
    assert result.measure == "logits"
    assert result.table["kl_nats"]["base+adapter"] < 1e-9 < 1e-6 < result.table["kl_nats"]["base"]


def test_wrong_scaling_is_reported(pairs, tmp_path):
    base, tuned, targets = pairs["llama"]
    result = verify(base, tuned, adapter_of(base, tuned, tmp_path / "a", None, targets, factor=3.0))
    table = result.table["kl_nats"]
    assert table["base+adapter"] > table["base"]
    (note,) = result.notes
    assert "farther from the tuned model" in note
    assert "scaling" in note


def test_bfloat16_merged_weights_are_rounded_and_that_is_allowed_for(tmp_path):
    make, targets = LINEAR["llama"]
    base, tuned = sides(tmp_path, make, targets, dtype=torch.bfloat16)
    result = verify(base, tuned, adapter_of(base, tuned, tmp_path / "a", 4, targets))
    assert result.ok, result.problems
    assert result.storage == "bfloat16"
    base_distance = result.table["mean_abs_logit_error"]["base"]
    assert result.merged_gap == pytest.approx(result.storage_rounding, rel=0.01)
    assert result.storage_rounding > 1e-3 * base_distance
    assert result.tolerance == pytest.approx(0.02 * base_distance + result.storage_rounding, rel=1e-12)
    exact = verify(base, tuned, adapter_of(base, tuned, tmp_path / "exact", None, targets))
    assert exact.table["kl_nats"]["base+adapter merged"] < 1e-8  # W + BA rounds to the tuned model itself


def test_tied_embedding_adapted_at_one_end_does_not_hold(tmp_path):
    base, tuned = sides(tmp_path, lambda: llama(tie_word_embeddings=True), ["embed_tokens"])
    result = verify(base, tuned, adapter_of(base, tuned, tmp_path / "a", None, ["embed_tokens"]))
    assert not result.ok
    (problem,) = result.problems
    assert problem.startswith("merged and unmerged differ by")
    assert "tied" in problem
    assert result.merged_gap > 0.3 * result.table["mean_abs_logit_error"]["base"]
    assert result.table["kl_nats"]["base+adapter merged"] < 1e-8 < result.table["kl_nats"]["base+adapter"]
    assert json.loads(result.to_json())["ok"] is False


def test_tensors_that_peft_ignores_are_named(pairs, tmp_path):
    base, tuned, targets = pairs["llama"]
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    save_file({**tensors, extra: torch.ones(32)}, file)
    result = verify(base, tuned, adapter)
    (problem,) = result.problems
    assert "does not load 1 tensor" in problem
    assert "layers.0.self_attn.q_proj.lora_B" in problem
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    (problem,) = verify(base, tuned, adapter).problems
    assert "layers.1.mlp.up_proj.lora_A" in problem


def test_grown_vocabulary_is_compared_on_the_common_tokens(tmp_path):
    make, targets = LINEAR["llama"]
    base, tuned = sides(tmp_path, make, targets)
    model = hf.LlamaForCausalLM.from_pretrained(tuned)
    model.resize_token_embeddings(VOCABULARY + 5)
    model.save_pretrained(tuned)
    words = hf.AutoTokenizer.from_pretrained(tuned)
    words.add_tokens(["ferry", "glacier", "voltage"])
    words.save_pretrained(tuned)
    # An adapter with the tables whole, as peft writes it from the grown model.
    grown = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    grown.save_pretrained(tmp_path / "a")
    result = verify(base, tuned, tmp_path / "a")
    assert result.ok, result.problems
    notes = " ".join(result.notes)
    assert "resize_token_embeddings(305)" in notes
    assert "300 common" in notes
    assert "tokens that one of the models does not know are left out" in notes
    assert result.table["kl_nats"]["base+adapter"] == pytest.approx(result.table["kl_nats"]["base"], rel=1e-4)


def test_classifier_on_an_encoder_is_compared_by_hidden_states(pairs, tmp_path):
    base, tuned, targets = pairs["bert"]
    torch.manual_seed(1)
    classifier = hf.BertForSequenceClassification.from_pretrained(tuned, num_labels=3)
    classifier.save_pretrained(tmp_path / "tuned")
    adapter = adapter_of(base, tuned, tmp_path / "a", None, [".".join(["attention.self", t]) for t in targets[:3]])
    result = verify(base, tmp_path / "tuned", adapter)
    assert result.measure == "hidden states"
    assert any("last hidden states are compared" in note and "cls.predictions" in note for note in result.notes)
    assert any("random token ids" in note for note in result.notes)
    assert result.table["relative_error"]["base+adapter"] < result.table["relative_error"]["base"]


def test_heads_of_other_sizes_are_not_compared_but_equal_ones_are(tmp_path):
    targets = ["query", "value"]

    def make():
        return hf.BertForSequenceClassification(bert_config())

    base, tuned = sides(tmp_path, make, targets)
    adapter = adapter_of(base, tuned, tmp_path / "a", 4, targets)
    result = verify(base, tuned, adapter)
    assert result.measure == "logits"
    assert (result.table["n_tokens"] == 20).all()  # one output a text
    hf.BertForSequenceClassification.from_pretrained(tuned, num_labels=5, ignore_mismatched_sizes=True).save_pretrained(
        tuned
    )
    result = verify(base, tuned, adapter)
    assert result.measure == "hidden states"
    assert any("2 and 5 labels" in note for note in result.notes)
    assert result.table["relative_error"]["base+adapter"] < result.table["relative_error"]["base"]


def test_without_a_tokenizer_random_ids_are_used(tmp_path):
    make, targets = LINEAR["gpt2"]
    base, tuned = sides(tmp_path, make, targets, with_tokenizer=False)
    result = verify(base, tuned, adapter_of(base, tuned, tmp_path / "a", None, targets))
    assert any("20 sequences of 62 random token ids, no text" in note for note in result.notes)
    assert (result.table["n_tokens"] == 20 * 62).all()
    assert result.table["kl_nats"]["base+adapter"] < 1e-8


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda config: None, "no config.json"),
        (lambda config: {**config, "model_type": "novel"}, "novel"),
        (lambda config: {**config, "architectures": ["NovelForCausalLM"]}, "NovelForCausalLM"),
        (lambda config: {**config, "hidden_size": 64}, "cannot be loaded"),
    ],
    ids=["no config", "unknown type", "unknown class", "wrong sizes"],
)
def test_weights_are_compared_where_no_model_can_be_loaded(tmp_path, spoil, reason):
    make, targets = LINEAR["llama"]
    base, tuned = sides(tmp_path, make, targets)
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    for side in (base, tuned):
        config = spoil(json.loads((side / "config.json").read_text(encoding="utf-8")))
        (side / "config.json").unlink() if config is None else (side / "config.json").write_text(json.dumps(config))
    result = verify(base, tuned, adapter)
    assert result.measure == "weights"
    assert "no model was run" in result.notes[0]
    assert reason in result.notes[0]
    assert result.ok, result.problems
    assert len(result.matrices) == 14
    a, b = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    for row in result.matrices.itertuples():
        s = torch.linalg.svdvals(b[row.name].double() - a[row.name].double())
        assert row.relative_error == pytest.approx(math.sqrt(float((s[2:] ** 2).sum() / (s**2).sum())), rel=1e-4)
    files = verify(base / "model.safetensors", tuned / "model.safetensors", adapter)
    assert files.table.equals(result.table)
    errors = dict(zip(result.matrices["name"], result.matrices["relative_error"], strict=True))
    assert verify(base, tuned, adapter, expected=errors).ok
    first = next(iter(errors))
    (problem,) = verify(base, tuned, adapter, expected={**errors, first: 0.9 * errors[first]}).problems
    assert problem.startswith(f"{first}: ")
    assert "the ledger says" in problem


def test_weights_of_an_adapter_with_a_wrong_scale_are_reported(tmp_path):
    make, targets = LINEAR["gpt2"]
    base, tuned = sides(tmp_path, make, targets)
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets, factor=3.0)
    for side in (base, tuned):
        (side / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    result = verify(base, tuned, adapter)
    assert result.measure == "weights"
    assert len(result.problems) == len(result.matrices) == 8
    assert all("as far from the tuned side as without" in problem for problem in result.problems)


@pytest.mark.parametrize("readable", [True, False], ids=["outputs", "weights"])
def test_merged_checkpoint_is_compared_with_the_weighted_sum(tmp_path, readable):
    make, targets = LINEAR["llama"]
    base, tuned = sides(tmp_path, make, targets)
    one = adapter_of(base, tuned, tmp_path / "one", 2, targets)
    two = adapter_of(base, tuned, tmp_path / "two", 5, ["q_proj", "down_proj"])
    merged = {name: W.clone() for name, W in load_file(base / "model.safetensors").items()}
    for adapter, weight in ((one, 0.7), (two, -0.4)):
        factors = load_file(adapter / "adapter_model.safetensors")
        for name, B in factors.items():
            if "lora_B" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
                merged[f"{module}.weight"] += weight * B @ factors[name.replace("lora_B", "lora_A")]
    (tmp_path / "merged").mkdir()
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    if readable:
        (tmp_path / "merged" / "config.json").write_bytes((base / "config.json").read_bytes())
    right = verify_merge(base, [(one, 0.7), (two, -0.4)], tmp_path / "merged")
    assert right.measure == ("logits" if readable else "weights")
    assert right.ok, right.problems
    wrong = verify_merge(base, [(one, 0.7), (two, 0.4)], tmp_path / "merged")
    assert any("the merged checkpoint and base+adapter differ" in problem for problem in wrong.problems)


def test_an_adapter_of_another_model_is_one_clear_line(pairs, tmp_path):
    base, tuned, targets = pairs["gpt2"]
    other = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    with pytest.raises(lp.ProbeError) as caught:
        verify(*pairs["llama"][:2], other)
    assert "\n" not in str(caught.value)
    assert str(other) in str(caught.value)
    assert "peft cannot load it" in str(caught.value)


def test_nan_weights_are_an_error(tmp_path):
    make, targets = LINEAR["llama"]
    base, tuned = sides(tmp_path, make, targets)
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    weights = load_file(tuned / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(lp.NumericsError, match="NaN"):
        verify(base, tuned, adapter)


@pytest.mark.slow
def test_nothing_is_printed(pairs, tmp_path):
    base, tuned, targets = pairs["t5"]
    adapter = adapter_of(base, tuned, tmp_path / "a", 2, targets)
    code = f"from lowrank_probe.verification import verify; verify({str(base)!r}, {str(tuned)!r}, {str(adapter)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("name", "head"), [("llama", hf.LlamaForSequenceClassification), ("bert", hf.BertForSequenceClassification)]
)
def test_a_new_head_is_carried_but_not_checked_in_the_bases_class(pairs, tmp_path, name, head):
    base, tuned, _ = pairs[name]
    head.from_pretrained(tuned, num_labels=3).save_pretrained(tmp_path / "tuned")
    found = lp.extract(base, tmp_path / "tuned", tmp_path / "a", ranks=200, targets=["everything"])
    result = verify(base, tmp_path / "tuned", tmp_path / "a")
    assert result.ok, result.problems
    assert any(f"of {head.__name__}, which has no place in" in note for note in result.notes)
    card = (found.directory / "README.md").read_text(encoding="utf-8")
    assert f'base = {head.__name__}.from_pretrained("base", num_labels=3)' in card
    worn = PeftModel.from_pretrained(head.from_pretrained(base, num_labels=3), tmp_path / "a").eval()
    expected = head.from_pretrained(tmp_path / "tuned").eval()
    ids = torch.arange(2, 22).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(worn(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_whole_modules_with_weights_are_compared_by_weights(pairs, tmp_path):
    base, _, _ = pairs["llama"]
    for name in ("a", "b"):
        model = hf.LlamaForCausalLM.from_pretrained(base)
        worn = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        with torch.no_grad():
            for parameter in worn.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn_like(parameter)
        worn.save_pretrained(tmp_path / name)
    for adapters in ([("a", 0.5)], [("a", 0.5), ("b", 0.5)]):
        paths, weights = [tmp_path / name for name, _ in adapters], [weight for _, weight in adapters]
        merged = tmp_path / f"merged-{len(adapters)}"
        lp.merge(base, paths, merged, weights=weights)
        result = verify_merge(base, list(zip(paths, weights, strict=True)), merged)
        assert result.ok, result.problems
        assert result.measure == "weights"
        assert "lm_head.weight" in set(result.matrices["name"])
        assert any("holds whole modules, which peft neither weighs nor adds" in note for note in result.notes)


def test_a_merge_is_right_where_pefts_own_is_not(tmp_path):
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    worn = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    with torch.no_grad():
        for parameter in worn.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    worn.save_pretrained(tmp_path / "a")
    lp.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    result = verify_merge(tmp_path / "base", [(tmp_path / "a", 1.0)], tmp_path / "merged")
    assert result.ok, result.problems
    assert result.merged_gap <= result.tolerance
    assert any("what peft itself merges differs" in note for note in result.notes)
