"""Adapters of full rank, loaded and merged by the real peft: base + adapter must be the fine-tune, to rounding."""

import json
import warnings

import adapting
import numpy as np
import pytest
import torch
import transformers as hf
from adapting import errors, full_ranks, saved, svd_factors, write
from peft import LoraConfig, PeftModel
from safetensors import safe_open

import lowrank_probe as lp
from lowrank_probe import NumericsError, OutputError, ProbeError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.peft_files import write_adapter
from lowrank_probe.selection import select

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
ROUNDING = 5e-6


def config(adapter):
    return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))


def keys(adapter):
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def check_exact(found, base=0.1):
    assert found.base > base
    assert found.unmerged < ROUNDING
    assert found.merged < ROUNDING


# model → what of its change PEFT cannot carry; the tests below leave that as it is
EXACT = {
    "llama": "", "gpt2": "", "qwen2": "", "qwen3": "", "mixtral": "", "qwen2_moe": "", "qwen3_moe": "", "t5": "",
    "bert": "", "marian": "final_logits_bias", "vit": "cls_token position_embeddings",
    "gpt_oss": "sinks router.bias proj_bias",
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_base_plus_adapter_is_the_fine_tune(tmp_path, name):
    kept = EXACT[name].split()
    pair = saved(tmp_path, getattr(adapting, name), lambda parameter, _: not parameter.endswith(tuple(kept)))
    adapter, selection = write(tmp_path, pair)
    check_exact(errors(pair, adapter))
    for _, line in selection.left_out:
        assert any(word in line["name"] for word in kept), line
    # and our own reader finds the same update in it, matrix by matrix
    read, known = lp.spectrum(pair[0], adapter), lp.spectrum(*pair, split=False)
    assert set(known.table["name"]) <= set(read.table["name"])
    for row, s in known.singular_values.items():
        np.testing.assert_allclose(read.singular_values[row][:8], s[:8], rtol=2e-5, err_msg=row)
    assert "shape differs" not in set(read.ledger["status"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "bert"])
def test_all_linear_leaves_out_what_peft_does(tmp_path, name):
    pair = saved(tmp_path, getattr(adapting, name), lambda parameter, p: p.ndim == 2 and "emb" not in parameter)
    adapter, selection = write(tmp_path, pair, ["all-linear"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapting.load(pair[0])
        peft = PeftModel(model, LoraConfig(r=2, target_modules="all-linear"))
    assert set(config(adapter)["target_modules"]) == peft.peft_config["default"].target_modules
    assert not selection.whole
    assert config(adapter)["modules_to_save"] is None


def test_a_fused_matrix_is_one_unit(tmp_path):
    adapter, selection = write(tmp_path, saved(tmp_path, adapting.gpt2), ["c_attn"])
    assert [target.shape for target in selection.chosen] == [(48, 16), (48, 16)]
    assert config(adapter)["fan_in_fan_out"] is True
    assert config(adapter)["target_modules"] == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]


def test_biases_of_adapted_modules_only(tmp_path):
    pair = saved(tmp_path, adapting.qwen2, lambda name, _: "q_proj" in name or name.endswith("k_proj.bias"))
    adapter, selection = write(tmp_path, pair)
    assert config(adapter)["bias"] == "lora_only"
    assert "lora_bias" not in config(adapter)
    biases = {key for key in keys(adapter) if key.endswith("bias")}
    assert biases == {f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in (0, 1)}
    # the weight of k_proj did not change, so there is no module to carry its bias with
    left = selection.at(full_ranks(selection, *map(open_checkpoint, pair))).left_out
    lines = {line["name"]: line for _, line in left}
    assert lines["model.layers.0.self_attn.k_proj.weight"]["note"] == "ΔW = 0: no module"
    assert lines["model.layers.0.self_attn.k_proj.bias"]["note"] == "a bias of a module without LoRA"


def test_ranks_and_their_patterns(tmp_path):
    pair = saved(tmp_path, adapting.llama)
    base, tuned = map(open_checkpoint, pair)
    selection = select(base, tuned)
    ranks = {target.name: 1 + i % 5 for i, target in enumerate(selection.chosen)}
    adapter = write_adapter(tmp_path / "a", selection, ranks, svd_factors(base, tuned, ranks), base, tuned)
    assert config(adapter)["rank_pattern"] == config(adapter)["alpha_pattern"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a pattern that matches nothing
        model = PeftModel.from_pretrained(adapting.load(pair[0]), adapter)
    seen = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert module.r["default"] == ranks[name]
            assert module.scaling["default"] == 1.0
            seen += 1
    assert seen == len(ranks) == 14


def test_names_that_end_in_a_target_are_not_adapted(tmp_path):
    # as a model of two towers would have it, one named like the other with a prefix
    pair = saved(tmp_path, adapting.llama)
    base, tuned = map(open_checkpoint, pair)
    selection = select(base, tuned, ["q"])
    names = selection.modules.names | {"vision.model.layers.0.self_attn.q_proj"}
    object.__setattr__(selection.modules, "names", names)
    ranks = {target.name: 2 for target in selection.chosen}
    adapter = write_adapter(tmp_path / "a", selection, ranks, svd_factors(base, tuned, ranks), base, tuned)
    assert isinstance(config(adapter)["target_modules"], str)
    model = PeftModel.from_pretrained(adapting.load(pair[0]), adapter)
    assert sum(hasattr(module, "lora_A") for module in model.modules()) == 2


def test_two_parameters_of_one_module_do_not_change_places(tmp_path):
    pair = saved(tmp_path, adapting.mixtral, lambda name, _: "experts" in name)
    adapter, selection = write(tmp_path, pair, ["experts"])
    experts = "base_model.model.model.layers.0.mlp.experts"
    assert f"{experts}.lora_A.weight" in keys(adapter)  # down_proj, registered last, is the outer wrapper
    assert f"{experts}.base_layer.lora_A.weight" in keys(adapter)
    assert [(t.name[-12:], t.shape, t.copies) for t in selection.chosen][:2] == [
        ("gate_up_proj", (48, 16), 3), ("ts.down_proj", (16, 24), 3),
    ]  # fmt: skip
    check_exact(errors(pair, adapter))


def test_one_expert_that_did_not_change(tmp_path):
    pair = saved(tmp_path, adapting.mixtral, lambda *_: False)
    model = adapting.load(pair[1])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2] += 0.3 * torch.randn(48, 16)
    model.save_pretrained(pair[1])
    adapter, selection = write(tmp_path, pair)
    check_exact(errors(pair, adapter), base=0.01)
    target = next(t for t in selection.chosen if t.name == "model.layers.1.mlp.experts.gate_up_proj")
    found = list(target.deltas(*map(open_checkpoint, pair), torch.device("cpu")))
    assert found[:2] == [None, None]
    assert found[2].fro_norm == pytest.approx(0.3 * (48 * 16) ** 0.5, rel=0.1)
    result = lp.spectrum(pair[0], adapter)
    assert set(result.table["name"]) == {f"model.layers.1.block_sparse_moe.experts.2.{w}.weight" for w in ("w1", "w3")}


class TestTiedTable:
    @pytest.mark.parametrize(("name", "targets"), [("gpt2", "qkv"), ("bert", "q"), ("t5", "q"), ("marian", "q")])
    def test_is_carried_whole_with_all_that_is_tied_to_it(self, tmp_path, name, targets):
        pair = saved(tmp_path, getattr(adapting, name))
        adapter, selection = write(tmp_path, pair, ["embedding", targets], ranks=_one)
        table = next(one for one in selection.whole if one.why == "tied table")
        assert {table.module, *table.partners} <= set(config(adapter)["modules_to_save"])
        assert not any("lora_embedding" in key for key in keys(adapter))

    def test_of_llama(self, tmp_path):
        pair = saved(tmp_path, lambda: adapting.llama(tie_word_embeddings=True))
        adapter, selection = write(tmp_path, pair)
        assert [one.module for one in selection.whole if one.partners] == ["model.embed_tokens"]
        assert config(adapter)["ensure_weight_tying"] is True
        check_exact(errors(pair, adapter))

    def test_by_lora_holds_unmerged_only(self, tmp_path):
        pair = saved(tmp_path, lambda: adapting.llama(tie_word_embeddings=True))
        adapter, selection = write(tmp_path, pair, tied_lora=True)
        assert "right unmerged, wrong when merged" in selection.notes[-1]
        assert any("lora_embedding_A" in key for key in keys(adapter))
        found = errors(pair, adapter)
        assert found.unmerged < ROUNDING
        assert found.merged > 0.1

    def test_unchanged_is_not_carried(self, tmp_path):
        pair = saved(tmp_path, lambda: adapting.llama(tie_word_embeddings=True), lambda name, _: "q_proj" in name)
        adapter, selection = write(tmp_path, pair)
        assert config(adapter)["modules_to_save"] is None
        assert {line["status"] for _, line in selection.left_out} == {"unchanged"}
        check_exact(errors(pair, adapter), base=0.001)


def _one(selection):
    return {target.name: 1 for target in selection.chosen}


def test_a_table_by_lora(tmp_path):
    pair = saved(tmp_path, adapting.llama, lambda name, _: "embed_tokens" in name)
    adapter, _ = write(tmp_path, pair, ["embedding"])
    assert config(adapter)["target_modules"] == ["model.embed_tokens"]
    check_exact(errors(pair, adapter))


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_vocabulary(tmp_path, tied):
    pair = saved(tmp_path, lambda: adapting.llama(tie_word_embeddings=tied))
    grown = adapting.load(pair[1])
    grown.resize_token_embeddings(44, mean_resizing=False)
    grown.save_pretrained(pair[1])
    (pair[1] / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    adapter, selection = write(tmp_path, pair)
    assert selection.sizes == (40, 44)
    assert "resize_token_embeddings(44)" in selection.notes[-1]
    assert (adapter / "tokenizer.json").read_text(encoding="utf-8") == '{"version": "1.0"}'
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "base_vocabulary": "40", "tuned_vocabulary": "44"}

    def resized(model):
        model.resize_token_embeddings(44, mean_resizing=False)
        return model

    check_exact(errors(pair, adapter, resized))
    # all-linear leaves the new words out, and says so
    names = {line["name"]: line["note"] for _, line in select(*map(open_checkpoint, pair)).left_out}
    assert names["model.embed_tokens.weight"].startswith("not in --targets; of another shape")


def test_a_head_that_only_the_fine_tune_has(tmp_path):
    pair = saved(tmp_path, adapting.bert)
    torch.manual_seed(1)
    tuned = hf.BertForSequenceClassification(hf.BertConfig(**adapting.SIZES, num_labels=3))
    with torch.no_grad():
        tuned.classifier.bias += 0.5
    tuned.save_pretrained(pair[1])
    adapter, selection = write(tmp_path, pair)
    assert {one.module for one in selection.whole if one.why == "new module"} >= {"classifier"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = hf.BertForSequenceClassification.from_pretrained(pair[0], num_labels=3).eval()
        model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert float((model(ids).logits - tuned.eval()(ids).logits).abs().max()) < ROUNDING


def test_convolutions_of_a_vision_model(tmp_path):
    pair = saved(tmp_path, adapting.vit, lambda name, _: "patch_embeddings" in name)
    adapter, selection = write(tmp_path, pair, ["patch_embedding", "bias"])
    assert [(target.kind, target.shape, target.stored) for target in selection.chosen] == [
        ("conv", (16, 48), (16, 3, 4, 4))
    ]
    check_exact(errors(pair, adapter), base=0.01)


def test_servable(tmp_path):
    adapter, selection = write(tmp_path, saved(tmp_path, adapting.qwen2), ["everything"], servable=True)
    found = config(adapter)
    assert (found["bias"], found["modules_to_save"], found["target_parameters"]) == ("none", None, None)
    assert all("lora_A.weight" in key or "lora_B.weight" in key for key in keys(adapter))
    assert {line["note"] for _, line in selection.left_out} == {
        "more than LoRA on a linear layer: not in a servable adapter"
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    pair = saved(tmp_path, adapting.llama)
    adapter, _ = write(tmp_path, pair, ["q"], dtype=dtype)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118


@pytest.mark.parametrize(
    ("value", "words"), [(7e4, r"factors reach 7e\+04, beyond float16"), (torch.nan, "contain NaN or Inf")]
)
def test_factors_that_half_precision_cannot_hold(tmp_path, value, words):
    base, tuned = map(open_checkpoint, saved(tmp_path, adapting.llama))
    selection = select(base, tuned, ["q"])
    ranks = _one(selection)

    def factors(target):
        return torch.full((target.shape[0], 1), value), torch.ones(1, target.shape[1])

    with pytest.raises(NumericsError, match=words) as caught:
        write_adapter(tmp_path / "a", selection, ranks, factors, base, tuned, dtype=torch.float16)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_nothing_to_adapt(tmp_path):
    base, tuned = map(open_checkpoint, saved(tmp_path, adapting.llama, lambda *_: False))
    selection = select(base, tuned)
    with pytest.raises(ProbeError, match="no matrix to adapt"):
        write_adapter(tmp_path / "a", selection, {}, lambda target: None, base, tuned)
    assert not (tmp_path / "a").exists()


def test_an_adapter_is_not_overwritten(tmp_path):
    pair = saved(tmp_path, adapting.llama)
    write(tmp_path, pair, ["q"])
    with pytest.raises(OutputError, match="holds an adapter already"):
        write(tmp_path, pair, ["q"])
