"""resize: adapters that the real peft writes and loads again, against the dense SVD of what peft makes of them."""

import json
import math

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_adapters import LORA, adapt, gpt2, llama

import lowrank_probe as lp
from lowrank_probe import resizing
from lowrank_probe.adapters import read_modules
from lowrank_probe.checkpoints import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")


def products(adapter):
    """name → ΔW = scaling·B·A in float64, by the reader."""
    side = open_checkpoint(adapter)
    found = {}
    for module in read_modules(side)[0]:
        B, A = module.read(side)
        key = module.name if module.expert is None else f"{module.name}[{module.expert}]"
        found[key] = module.scaling * (B.double() @ A.double()).numpy()
    return found


def truncated(delta, r):
    U, s, Vh = np.linalg.svd(delta, full_matrices=False)
    return (U[:, :r] * s[:r]) @ Vh[:r]


def check_optimum(before, result, tolerance=2e-7):
    """Every module of the new adapter is the truncated SVD of the old one; energy and error are the real ones."""
    old, new = products(before), products(result.path)
    lost = total = 0.0
    for row in result.table.to_dict("records"):
        delta, r = old[row["name"]], row["rank"]
        s = np.linalg.svd(delta, compute_uv=False)
        norm = np.linalg.norm(s)
        error = np.linalg.norm(delta - new[row["name"]]) / norm
        optimum = np.linalg.norm(s[r:]) / norm
        assert error <= optimum + tolerance
        assert row["fro_norm"] == pytest.approx(norm, rel=1e-12)
        assert row["energy"] == pytest.approx((s[:r] ** 2).sum() / norm**2, abs=1e-12)
        assert row["optimum"] == pytest.approx(optimum, abs=1e-7)
        assert row["error"] == pytest.approx(error, rel=1e-5, abs=1e-9)
        lost += (error * norm) ** 2
        total += norm**2
    assert set(old) == set(new)
    assert result.error == pytest.approx(math.sqrt(lost / total), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("config", LORA.values(), ids=LORA)
def test_the_optimum_of_every_module_and_peft_computes_it(tmp_path, config):
    base, adapter, deltas = adapt(tmp_path, llama(), **config)
    result = lp.resize(adapter, tmp_path / "new", rank=2)
    check_optimum(adapter, result)
    assert set(result.table["rank"]) == {2}
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path / "new").double().merge_and_unload().state_dict()
    for name, delta in deltas.items():
        moved = (merged[name] - before[name]).numpy()
        np.testing.assert_allclose(moved, truncated(delta, 2), atol=3e-7 * np.linalg.norm(delta), err_msg=name)
    for name in before.keys() - deltas.keys():
        assert torch.equal(merged[name], before[name])


def test_conv1d_embeddings_and_what_is_carried(tmp_path):
    config = {"r": 6, "lora_alpha": 3, "target_modules": ["c_attn", "mlp.c_proj", "wte"], "bias": "lora_only"}
    _, adapter, _ = adapt(tmp_path, gpt2(), fan_in_fan_out=True, modules_to_save=["ln_f"], **config)
    result = lp.resize(adapter, tmp_path / "new", rank=3)
    check_optimum(adapter, result)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "new"))
    assert result.facts["carried"] == [name for name in old if "lora_" not in name]
    assert any("ln_f" in name for name in result.facts["carried"])
    for name in result.facts["carried"]:
        assert torch.equal(old[name], new[name])
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (written["fan_in_fan_out"], written["modules_to_save"], written["bias"]) == (True, ["ln_f"], "lora_only")


def test_a_convolution(tmp_path):
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    model = hf.ViTModel(config, add_pooling_layer=False)
    _, adapter, _ = adapt(tmp_path, model, r=5, lora_alpha=10, target_modules=["projection"])
    result = lp.resize(adapter, tmp_path / "new", rank=2)
    check_optimum(adapter, result)
    assert (result.table["rows"].item(), result.table["cols"].item()) == (24, 3 * 4 * 4)
    PeftModel.from_pretrained(hf.ViTModel(config, add_pooling_layer=False), tmp_path / "new")


def mixtral():
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, num_local_experts=3,
        )
    )  # fmt: skip


EXPERTS = {
    "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}  # fmt: skip


def test_the_experts_of_a_parameter_share_one_rank(tmp_path):
    base, adapter, deltas = adapt(tmp_path, mixtral(), r=4, lora_alpha=6, **EXPERTS)
    result = lp.resize(adapter, tmp_path / "new", rank=2)
    old, new = products(adapter), products(tmp_path / "new")
    assert set(old) == set(new)
    assert len(old) == 7
    for name, delta in old.items():
        np.testing.assert_allclose(new[name], truncated(delta, 2), atol=3e-7 * np.linalg.norm(delta), err_msg=name)
    assert sorted(result.table["copies"]) == [1, 3, 3]
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path / "new").double().merge_and_unload().state_dict()
    for name, parts in deltas.items():
        for delta, moved in zip(
            np.atleast_3d(parts.T).T, np.atleast_3d((merged[name] - before[name]).numpy().T).T, strict=True
        ):
            np.testing.assert_allclose(moved, truncated(delta, 2), atol=3e-7 * np.linalg.norm(delta), err_msg=name)


class Towers(torch.nn.Module):
    """Two stacks, one of which has all names of the other with a prefix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 5) for _ in range(2))
        self.visual = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(6, 5) for _ in range(2))})


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"target_modules": r"layers\.\d"}, True),
        ({"target_modules": ["layers.0", "layers.1"], "exclude_modules": r"visual\..*"}, True),
        ({"target_modules": ["visual.layers.0", "visual.layers.1"]}, False),
        ({"target_modules": ["layers.0", "layers.1"]}, True),  # the other tower's factors are zero, and left out
    ],
)
def test_no_other_tower_is_adapted(tmp_path, config, text):
    wrapped = get_peft_model(Towers(), LoraConfig(r=3, **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and ("visual" not in name or not text):
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    lp.resize(tmp_path / "adapter", tmp_path / "new", rank=2)
    written = json.loads((tmp_path / "new" / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(written, str) == text
    again = PeftModel.from_pretrained(Towers(), tmp_path / "new")
    adapted = {name for name, module in again.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"{'' if text else 'visual.'}layers.{i}" for i in range(2)}


def test_energy_ranks_are_the_least_and_written_as_patterns_that_peft_reads(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=8, lora_alpha=16, target_modules="all-linear")
    result = lp.resize(adapter, tmp_path / "new", energy=0.8)
    for row in result.table.to_dict("records"):
        s = np.linalg.svd(products(adapter)[row["name"]], compute_uv=False)
        kept = np.cumsum(s**2) / (s**2).sum()
        assert kept[row["rank"] - 1] >= 0.8
        assert row["rank"] == 1 or kept[row["rank"] - 2] < 0.8
    assert result.table["rank"].nunique() > 1
    assert (result.table["energy"] >= 0.8).all()
    check_optimum(adapter, result)
    model = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), tmp_path / "new")
    ranks = {
        name.removeprefix("base_model.model."): module.r["default"]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A)
    }
    assert ranks == {
        name.removesuffix(".weight"): r for name, r in zip(result.table["name"], result.table["rank"], strict=True)
    }


def test_a_budget_in_bytes_is_that_of_the_file(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=8, target_modules="all-linear", modules_to_save=["embed_tokens"])
    result = lp.resize(adapter, tmp_path / "new", budget="16KB")
    size = (tmp_path / "new" / "adapter_model.safetensors").stat().st_size
    assert 0.7 * 16_000 < size <= 16_000
    assert result.facts["n_bytes"] == size
    fewer = lp.resize(adapter, tmp_path / "fewer", budget="1K")
    assert fewer.facts["n_parameters"] <= 1000
    check = products(tmp_path / "fewer")
    assert set(check) == set(fewer.table["name"][fewer.table["rank"] > 0])


def test_ranks_stop_at_the_adapters_own(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=3, target_modules=["q_proj"])
    result = lp.resize(adapter, tmp_path / "new", rank=64)
    assert set(result.table["rank"]) == {3}
    assert set(result.table["rule"]) == {"its own rank"}
    assert result.error < 1e-7


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_error_printed_is_that_of_the_rounded_factors(tmp_path, dtype):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj", "up_proj"])
    result = lp.resize(adapter, tmp_path / "new", rank=4, dtype=dtype)
    check_optimum(adapter, result, tolerance=1e-2)
    assert 1e-5 < result.error < 1e-2
    assert set(result.table["optimum"]) == {0.0}


def test_lora_bias_keeps_its_scaling(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}
    wrapped = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(10)[None]
    expected = wrapped.eval()(input_ids=tokens).logits
    lp.resize(tmp_path / "adapter", tmp_path / "new", rank=4)
    again = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "new")
    torch.testing.assert_close(again.eval()(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)


def zeroed(adapter, part):
    """The adapter with lora_B = 0 in the modules of that name."""
    content = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in content.items():
        if f"{part}.lora_B.weight" in name:
            tensor.zero_()
    save_file(content, adapter / "adapter_model.safetensors")


def gpt2_logits(base, adapter):
    tokens = torch.arange(10)[None]
    return PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), adapter).eval()(tokens).logits


@pytest.mark.parametrize("bias", [{"lora_bias": True}, {"bias": "lora_only"}], ids=["lora_bias", "lora_only"])
def test_a_bias_of_a_module_whose_factors_do_nothing_is_kept(tmp_path, bias):
    targets = ["c_attn", "c_fc"]
    base, adapter, _ = adapt(tmp_path, gpt2(), r=4, target_modules=targets, fan_in_fan_out=True, **bias)
    zeroed(adapter, "c_fc")
    result = lp.resize(adapter, tmp_path / "new", rank=4)
    expected = gpt2_logits(base, adapter)
    torch.testing.assert_close(gpt2_logits(base, tmp_path / "new"), expected, atol=1e-5, rtol=1e-5)
    assert result.facts["not_carried"] == []
    of_c_fc = result.table["rank"][result.table["name"].str.contains("c_fc")]
    assert set(of_c_fc) == ({1} if "lora_bias" in bias else {0})


def test_a_bias_within_lora_goes_with_the_factors_that_a_budget_takes(tmp_path):
    config = {"r": 4, "target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}
    base, adapter, _ = adapt(tmp_path, gpt2(), **config)
    result = lp.resize(adapter, tmp_path / "new", budget="150")
    gone = result.facts["without_rank"]
    assert 0 < len(gone) < 4
    assert result.facts["zero"] == []
    lost = [f"base_model.model.{name.removesuffix('weight')}lora_B.bias" for name in gone]
    assert sorted(result.facts["not_carried"]) == sorted(lost)
    old, new = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "new"))
    assert {name for name in old if name.endswith("bias")} - set(lost) == {name for name in new if "bias" in name}
    model = get_peft_model(hf.AutoModelForCausalLM.from_pretrained(base), LoraConfig.from_pretrained(tmp_path / "new"))
    loaded = set_peft_model_state_dict(model, new)
    assert loaded.unexpected_keys == []


def test_modules_that_do_nothing_are_left_out_and_an_adapter_that_does_nothing_is_refused(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj", "v_proj"])
    zeroed(adapter, "v_proj")
    result = lp.resize(adapter, tmp_path / "new", rank=2)
    assert all("v_proj" in name for name in result.facts["zero"])
    assert len(result.facts["zero"]) == 2
    assert set(products(tmp_path / "new")) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    zeroed(adapter, "q_proj")
    with pytest.raises(lp.ProbeError, match="B·A is zero in all of its 4 modules"):
        lp.resize(adapter, tmp_path / "none", rank=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "new"]


def test_factors_that_lack_rank_or_cancel(tmp_path):
    """B with equal columns, A with zero rows: fewer directions than the rank, and no NaN from dividing by them."""
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(20, 4, generator=generator)
    B[:, 1] = B[:, 0]
    A = torch.randn(4, 12, generator=generator)
    A[3] = 0
    save_file({"q.lora_A.weight": A, "q.lora_B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    result = lp.resize(tmp_path, tmp_path / "new", rank=4)
    new = load_file(tmp_path / "new" / "adapter_model.safetensors")
    product = new["q.lora_B.weight"].double() @ new["q.lora_A.weight"].double()
    torch.testing.assert_close(product, B.double() @ A.double(), atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(product).item() == 2
    assert result.table["optimum"].item() == 0


def test_what_lies_beside_the_weights_goes_along_and_the_adapter_is_untouched(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    (adapter / "tokenizer.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    lp.resize(adapter, tmp_path / "new", rank=2)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "expected one of rank, energy and budget, found none"),
        ({"rank": 2, "energy": 0.5}, "found rank and energy"),
        ({"rank": 0}, "rank is 0, expected at least 1"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"budget": "40X"}, "budget '40X' is not understood"),
        ({"budget": "1"}, "too small"),
        ({"rank": 2, "dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, words):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    with pytest.raises(lp.ProbeError, match=words):
        lp.resize(adapter, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_dora_nan_a_model_and_a_taken_directory_are_refused(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    with pytest.raises(lp.CheckpointError, match="is not an adapter"):
        lp.resize(base, tmp_path / "new", rank=2)
    with pytest.raises(lp.OutputError, match="is not empty; choose another --out"):
        lp.resize(adapter, base, rank=2)
    with pytest.raises(lp.OutputError, match="is not empty"):
        lp.resize(adapter, adapter, rank=2)
    content = load_file(adapter / "adapter_model.safetensors")
    next(iter(content.values()))[0, 0] = math.nan
    save_file(content, adapter / "adapter_model.safetensors")
    with pytest.raises(lp.NumericsError, match=r"lora_A.weight in .*adapter_model.safetensors: contains NaN"):
        lp.resize(adapter, tmp_path / "new", rank=2)
    (tmp_path / "dora").mkdir()
    _, dora, _ = adapt(tmp_path / "dora", llama(), r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(lp.CheckpointError, match=r"use_dora is set: DoRA .*merge_and_unload"):
        lp.resize(dora, tmp_path / "new", rank=2)
    assert not (tmp_path / "new").exists()


def test_an_initialisation_that_peft_takes_out_of_the_base_is_refused(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(lp.CheckpointError, match="path_initial_model_for_weight_conversion"):
        lp.resize(adapter, tmp_path / "new", rank=2)


def test_the_columns_are_documented_and_json_is_strict(tmp_path):
    _, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    result = lp.resize(adapter, tmp_path / "new", rank=2)
    assert list(result.table.columns) == list(resizing.RESIZED)
    told = json.loads(result.to_json())
    assert told["schema_version"] == 1
    assert told["energy"] == pytest.approx(result.energy)
    assert len(told["table"]) == 2
