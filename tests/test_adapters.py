"""Adapters that the real peft writes: our singular values against those of what peft itself merges, in float64."""

import json
import math
from dataclasses import replace

import adapting
import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lowrank_probe as lp
from lowrank_probe import CheckpointError, MatchError, NumericsError
from lowrank_probe.adapters import read_modules
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.layers import is_conv1d
from lowrank_probe.matching import match
from lowrank_probe.options import Options

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


def llama(**config):
    torch.manual_seed(0)
    return adapting.llama(**{"head_dim": 8, "tie_word_embeddings": False} | config)


def gpt2():
    torch.manual_seed(0)
    return adapting.gpt2()


def adapt(directory, model, save=None, **config):
    """(base directory, adapter directory, ΔW by base tensor name as peft merges it, in float64 and as (out, in))."""
    base, adapter = directory / "base", directory / "adapter"
    model.save_pretrained(base)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    model_type = model.config.model_type
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter) * (1 if "lora_" in name else 0.01)
    wrapped.save_pretrained(adapter, **(save or {}))
    after = wrapped.double().merge_and_unload().state_dict()
    deltas = {}
    for name in before:
        delta = after[name] - before[name]
        if delta.any():
            deltas[name] = (delta.T if delta.ndim == 2 and is_conv1d(name, model_type) else delta).numpy()
    return base, adapter, deltas


def check_against_peft(result, deltas, rank=None):
    """Every matrix peft changed is a row with the same shape, norm and singular values, and nothing else is."""
    matrices = {name: delta for name, delta in deltas.items() if delta.ndim == 2}
    assert set(result.table["name"]) == set(matrices)
    for row in result.table.to_dict("records"):
        expected = np.linalg.svd(matrices[row["name"]], compute_uv=False)
        s = result.singular_values[row["name"]]
        assert (row["rows"], row["cols"]) == matrices[row["name"]].shape
        np.testing.assert_allclose(s, expected[: len(s)], rtol=2e-6, atol=1e-6 * expected[0], err_msg=row["name"])
        assert expected[len(s) :].sum() <= 1e-6 * expected[0]
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6)


LORA = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 6, r"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.1\..*": 32},
    },
    "rslora-patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_rslora": True,
        "rank_pattern": {"up_proj": 6}, "alpha_pattern": {"q_proj": 5},
    },
    "some-layers": {"r": 4, "target_modules": ["o_proj"], "layers_to_transform": [1]},
}  # fmt: skip


@pytest.mark.parametrize("config", LORA.values(), ids=LORA)
def test_llama(tmp_path, config):
    base, adapter, deltas = adapt(tmp_path, llama(), **config)
    result = lp.spectrum(base, adapter)
    check_against_peft(result, deltas)
    assert set(result.table["method"]) == {"factored_qr"}
    assert set(result.table["noise_model"]) == {"none"}
    # the adapter alone gives the same values
    alone = lp.spectrum(adapter)
    assert set(alone.table["name"]) == set(deltas)
    for name, s in result.singular_values.items():
        np.testing.assert_array_equal(alone.singular_values[name], s)
    assert alone.table["base_norm"].isna().all()
    assert alone.table["relative_update"].isna().all()


@pytest.mark.parametrize("square", [True, False])
def test_gpt2_conv1d(tmp_path, square):
    targets = ["attn.c_proj"] if square else ["c_attn", "c_fc", "mlp.c_proj"]
    base, adapter, deltas = adapt(tmp_path, gpt2(), r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True)
    result = lp.spectrum(base, adapter)
    check_against_peft(result, deltas)
    assert set(result.ledger["status"]) == {"analysed", "unchanged"}
    check_against_peft(lp.spectrum(adapter), deltas)


@pytest.mark.parametrize("save_embedding_layers", [True, False])
def test_lora_on_the_embedding(tmp_path, save_embedding_layers):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "k_proj"]}
    save = {"save_embedding_layers": save_embedding_layers}
    base, adapter, deltas = adapt(tmp_path, llama(), save=save, **config)
    result = lp.spectrum(base, adapter)
    check_against_peft(result, deltas)
    assert "model.embed_tokens.weight" in deltas
    check_complete(result, base, adapter)
    check_against_peft(lp.spectrum(adapter), deltas)


def test_modules_to_save_and_biases_are_compared_whole(tmp_path):
    config = {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["wpe", "ln_f"], "bias": "lora_only"}
    base, adapter, deltas = adapt(tmp_path, gpt2(), fan_in_fan_out=True, **config)
    result = lp.spectrum(base, adapter)
    check_against_peft(result, deltas)
    check_complete(result, base, adapter)
    status = dict(zip(result.ledger["name"], result.ledger["status"], strict=True))
    assert status["transformer.wpe.weight"] == "analysed"
    assert status["transformer.ln_f.weight"] == status["transformer.h.0.attn.c_attn.bias"] == "vector"
    assert {name for name, value in status.items() if value != "unchanged"} == set(deltas)


def check_complete(result, base, adapter):
    """Each base tensor is in one line; so is each tensor of the adapter, a pair of factors by its lora_A."""
    names = result.ledger["name"][result.ledger["base_shape"] != ""]
    assert sorted(names) == sorted(open_checkpoint(base).tensors)
    named = [name for name in result.ledger["tuned_name"] if name]
    expected = [
        name
        for name in open_checkpoint(adapter).tensors
        if not name.endswith(("lora_B.weight", "lora_embedding_B"))
    ]  # fmt: skip
    assert sorted(named) == sorted(expected)


def test_ledger_of_a_plain_adapter(tmp_path):
    base, adapter, deltas = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    result = lp.spectrum(base, adapter)
    check_complete(result, base, adapter)
    unchanged = result.ledger[result.ledger["status"] == "unchanged"]
    assert set(unchanged["note"]) == {"not adapted"}
    assert result.facts["counts"] == {"analysed": 2, "unchanged": len(result.ledger) - 2}
    assert result.facts["tuned"]["kind"] == "adapter"
    assert set(result.table["numerical_rank"]) == {4}
    assert len(deltas) == 2


def test_a_headless_base_is_matched_by_its_prefix(tmp_path):
    base, adapter, deltas = adapt(tmp_path, gpt2(), r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, base / "model.safetensors")
    result = lp.spectrum(base, adapter)
    assert set(result.table["name"]) == {name.removeprefix("transformer.") for name in deltas}
    assert "'transformer.'" in result.facts["notes"][0]


def test_relative_update_is_against_the_base(tmp_path):
    base, adapter, deltas = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    weights = load_file(base / "model.safetensors")
    for row in lp.spectrum(base, adapter).table.to_dict("records"):
        expected = np.linalg.norm(deltas[row["name"]]) / np.linalg.norm(weights[row["name"]].double())
        assert row["relative_update"] == pytest.approx(expected, rel=1e-6)


def test_an_untrained_adapter_changes_nothing(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    result = lp.spectrum(tmp_path / "base", tmp_path / "adapter")
    assert result.table.empty
    assert set(result.ledger["status"]) == {"unchanged"}
    assert "B·A is zero" in " ".join(result.ledger["note"])
    assert lp.spectrum(tmp_path / "adapter").table.empty


# ---------------------------------------------------------------------------------------------- bad adapters

MODULE = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def plain(tmp_path):
    """(base, adapter) of a rank-4 LoRA on q_proj, to be damaged."""
    return adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])[:2]


def edit(adapter, tensors=None, **config):
    """Change an adapter on disk: `tensors` edits the dict in place, `config` its JSON."""
    if tensors:
        content = load_file(adapter / "adapter_model.safetensors")
        tensors(content)
        save_file(content, adapter / "adapter_model.safetensors")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize("factor", "AB")
def test_a_missing_factor_is_named(plain, factor):
    edit(plain[1], lambda content: content.pop(f"{MODULE}.lora_{factor}.weight"))
    with pytest.raises(CheckpointError, match=rf"layers\.1\.self_attn\.q_proj has .* but no lora_{factor}"):
        lp.spectrum(*plain)


def test_a_rank_that_contradicts_the_config(plain):
    edit(plain[1], r=8)
    with pytest.raises(CheckpointError, match=r"q_proj: lora_A has rank 4, adapter_config\.json says 8"):
        lp.spectrum(*plain)


def test_factors_that_share_no_rank(plain):
    def cut(content):
        content[f"{MODULE}.lora_B.weight"] = content[f"{MODULE}.lora_B.weight"][:, :3].contiguous()

    edit(plain[1], cut)
    with pytest.raises(CheckpointError, match=r"q_proj: lora_A \(4, 16\) and lora_B \(16, 3\) do not share a rank"):
        lp.spectrum(*plain)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "expected 'LORA'"),
        ({"peft_type": None}, "expected 'LORA'"),
        ({"target_parameters": ["experts.up"]}, "no factors for experts.up"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
    ],
)
def test_what_is_more_than_scaled_b_a_is_refused(plain, config, words):
    edit(plain[1], **config)
    with pytest.raises(CheckpointError, match=words):
        lp.spectrum(*plain)


def test_dora_that_peft_writes_is_refused(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        lp.spectrum(base, adapter)


def test_an_adapter_without_factors(plain):
    edit(plain[1], lambda content: [content.pop(name) for name in list(content)] and content.update(x=torch.ones(2)))
    with pytest.raises(CheckpointError, match="no LoRA factors"):
        lp.spectrum(*plain)


def test_a_base_of_other_names(plain, tmp_path):
    gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(MatchError, match=r"adapts no tensor of .*is this the base it was trained on"):
        lp.spectrum(tmp_path / "other", plain[1])


def test_a_base_of_another_width(plain, tmp_path):
    config = hf.LlamaConfig.from_pretrained(plain[0])
    config.hidden_size = 32
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    result = lp.spectrum(tmp_path / "other", plain[1])
    assert result.table.empty
    lines = result.ledger[result.ledger["name"].str.contains("q_proj")]
    assert set(lines["status"]) == {"shape differs"}
    assert all("(16, 16)" in note for note in lines["note"])


def test_an_adapter_as_the_base_is_refused(plain):
    with pytest.raises(MatchError, match="give the base model first"):
        lp.spectrum(plain[1], plain[0])


@pytest.mark.parametrize("factor", "AB")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_factor_is_named(plain, factor, value):
    edit(plain[1], lambda content: content[f"{MODULE}.lora_{factor}.weight"].view(-1)[:1].fill_(value))
    with pytest.raises(NumericsError, match=rf"{MODULE}\.lora_{factor}\.weight in .*adapter_model\.safetensors"):
        lp.spectrum(*plain)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_the_base_is_named(plain, value):
    file, name = plain[0] / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(file)
    tensors[name][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(NumericsError, match=rf"{name} in .*base/model\.safetensors: contains 1"):
        lp.spectrum(*plain)


def test_modules_are_read_from_headers_alone(plain):
    file = plain[1] / "adapter_model.safetensors"
    adapter = open_checkpoint(plain[1])
    file.write_bytes(file.read_bytes()[: min(info.start for info in adapter.tensors.values())])
    modules, others = read_modules(adapter)
    assert [(m.shape, m.rank, m.scaling) for m in modules] == [((16, 16), 4, 2.0)] * 2
    assert others == []


@pytest.mark.parametrize(
    "damage",
    [
        {"r": "abc"}, {"r": [4]}, {"lora_alpha": "x"}, {"lora_alpha": math.nan}, {"lora_alpha": math.inf},
        {"alpha_pattern": {"q_proj": "z"}}, {"alpha_pattern": {"*q": 4}}, {"rank_pattern": {"(((": 4}},
        {"rank_pattern": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_with_nonsense_in_it_is_one_clear_line(tmp_path, damage):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | damage
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {"q_proj.lora_A.weight": torch.ones(2, 6), "q_proj.lora_B.weight": torch.ones(5, 2)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(lp.CheckpointError, match=r"adapter_config\.json"):
        lp.spectrum(tmp_path)


def test_an_adapter_on_a_quantized_base_keeps_every_note(plain):
    """The hub's note and the quantized side's, as for two models."""
    side = open_checkpoint(plain[0])
    q = "model.layers.0.self_attn.q_proj.weight"
    tensors = {name: side.read(name) for name in side.tensors}
    tensors |= {q: tensors[q].to(torch.float8_e4m3fn), f"{q}_scale": torch.ones(1)}
    noted = replace(open_checkpoint(tensors), notes=("taken from the hub",))
    found = match(noted, open_checkpoint(plain[1]), Options())
    assert found.notes[0] == "taken from the hub"
    (said,) = found.notes[1:]
    assert said.startswith("the base side is quantized (F8_E4M3)")
    assert "free of its rounding" in said
