"""merge: models that the real peft adapts, merged from their files, against what peft computes with the adapter on."""

import hashlib
import json
import math
import signal
import subprocess
import sys

import adapting
import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import LORA, adapt, gpt2, llama
from test_cli import probe
from test_resizing import EXPERTS, mixtral

import lowrank_probe as lp
from lowrank_probe import columns

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")
TOKENS = torch.arange(1, 13)[None]


def bert():
    torch.manual_seed(0)
    return adapting.bert()


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def unmerged(kind, base, adapter):
    return logits(PeftModel.from_pretrained(kind.from_pretrained(base), adapter))


def tree(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


GPT2 = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True}


BERT = {"r": 4, "lora_alpha": 6, "modules_to_save": ["transform"], "bias": "lora_only"}


MODELS = {
    **{f"llama-{name}": (llama, config) for name, config in LORA.items()},
    "llama-embedding": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "gpt2-conv1d": (gpt2, {**GPT2, "target_modules": ["c_attn", "c_proj"]}),
    "gpt2-square": (gpt2, {**GPT2, "target_modules": ["attn.c_proj"]}),
    "gpt2-bias": (gpt2, {**GPT2, "target_modules": ["c_attn"], "bias": "lora_only", "modules_to_save": ["wpe"]}),
    "gpt2-lora-bias": (gpt2, {**GPT2, "target_modules": ["c_attn"], "lora_bias": True}),
    "bert": (bert, {**BERT, "target_modules": ["query", "value", "output.dense"]}),
    "mixtral-experts": (mixtral, {"r": 4, "lora_alpha": 6, **EXPERTS}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config"), MODELS.values(), ids=MODELS)
def test_logits_are_those_of_base_and_adapter(tmp_path, make, config):
    base, adapter, deltas = adapt(tmp_path, make(), **config)
    result = lp.merge(base, adapter, tmp_path / "merged")
    kind = type(make())
    ours, theirs = logits(kind.from_pretrained(tmp_path / "merged")), unmerged(kind, base, adapter)
    distance = (logits(kind.from_pretrained(base)) - theirs).abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert distance > 1e-3 * theirs.abs().max()  # the adapter does something
    # tensor by tensor: base + ΔW as peft merges it in float64, within half a step of float32
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = set(result.table["name"][result.table["change"] != ""])
    for name, W in before.items():
        assert W.dtype == after[name].dtype
        if name not in changed:
            assert torch.equal(W, after[name])
    known = [name for name in deltas if name in before]
    assert known
    for name in known:
        moved = deltas[name].T if deltas[name].shape != before[name].shape else deltas[name]
        moved = moved.T if make is gpt2 and name.endswith("attn.c_proj.weight") else moved
        error = (after[name].double() - before[name].double() - torch.from_numpy(np.ascontiguousarray(moved))).abs()
        assert (error <= 2.0**-24 * after[name].double().abs() + 1e-14).all()
    checks = result.table["check"][result.table["change"].str.contains("lora")]
    assert 0 < checks.min() <= checks.max() <= 1
    assert result.facts["max_check"] == checks.max()


def test_a_convolution(tmp_path):
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    model = hf.ViTModel(config, add_pooling_layer=False)
    base, adapter, _ = adapt(tmp_path, model, r=5, lora_alpha=10, target_modules=["projection", "query"])
    lp.merge(base, adapter, tmp_path / "merged")
    wrapped = PeftModel.from_pretrained(hf.ViTModel.from_pretrained(base, add_pooling_layer=False), adapter).eval()
    merged = hf.ViTModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected, found = (one(pixel_values=image).last_hidden_state for one in (wrapped, merged))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "m", "transposed"), [
    ("qwen3_moe", 16, False), ("qwen3_moe", 24, False), ("gpt_oss", 16, True), ("gpt_oss", 24, True),
])  # fmt: skip
def test_a_stack_of_experts_in_one_tensor_also_where_it_is_square(tmp_path, model_type, m, transposed):
    E, r, n = 3, 2, 16
    W, A, B = (
        torch.randn(E, n if transposed else m, m if transposed else n),
        torch.randn(E * r, n),
        torch.randn(m, r * E),
    )
    name = "model.layers.0.mlp.experts.down_proj" if m == 16 else "model.layers.0.mlp.experts.gate_up_proj"
    for directory in ("base", "adapter"):
        (tmp_path / directory).mkdir()
    save_file({name: W}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 16}))
    module = f"base_model.model.{name.rpartition('.')[0]}"
    save_file(
        {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}, tmp_path / "adapter/adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_parameters": [name], "target_modules": []}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lp.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    # peft's own formula (ParamWrapper.get_delta_weight)
    order = "o r e, e r i -> e i o" if transposed else "o r e, e r i -> e o i"
    delta = 3 * torch.einsum(order, B.reshape(m, r, E).double(), A.reshape(E, r, n).double())
    after = load_file(tmp_path / "merged" / "model.safetensors")[name]
    torch.testing.assert_close(after.double(), W.double() + delta, atol=1e-5, rtol=1e-6)


def sharded(tmp_path, dtype=torch.bfloat16, **config):
    """(base in several bf16 shards, with files beside them; adapter of it)."""
    base, adapter, deltas = adapt(tmp_path, llama(), **(config or {"r": 4, "target_modules": ["q_proj", "down_proj"]}))
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for path in base.iterdir():
        path.unlink()
    model.save_pretrained(base, max_shard_size="4KB")
    (base / "tokenizer.json").write_text("{}")
    (base / ".cache").mkdir()
    return base, adapter, deltas


def test_shards_dtypes_and_what_lies_beside_them_are_the_bases_own(tmp_path):
    base, adapter, _ = sharded(tmp_path)
    of_base, of_adapter = tree_of_files(base), tree(adapter)
    result = lp.merge(base, adapter, tmp_path / "merged")
    assert tree_of_files(base) == of_base
    assert tree(adapter) == of_adapter
    merged = tmp_path / "merged"
    assert {path.name for path in merged.iterdir()} == set(of_base)
    assert len(list(merged.glob("*.safetensors"))) > 2
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    indices = [json.loads((side / "model.safetensors.index.json").read_text()) for side in (base, merged)]
    assert indices[0] == indices[1]
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(merged / file.name)
        assert before.keys() == after.keys()
        assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == (not name.endswith(("q_proj.weight", "down_proj.weight")))
    ours = logits(hf.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
    theirs = unmerged(hf.AutoModelForCausalLM, base, adapter)
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    lossy = result.table[result.table["change"] != ""]
    assert ((lossy["rounding"] > 1e-4) & (lossy["rounding"] < 0.1)).all()


def tree_of_files(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def test_bf16_is_rounded_once_from_the_exact_sum(tmp_path):
    base, adapter, _ = sharded(tmp_path)
    lp.merge(base, adapter, tmp_path / "merged")
    lp.merge(base, adapter, tmp_path / "wide", dtype="float32")
    for file in (tmp_path / "merged").glob("*.safetensors"):
        wide = load_file(tmp_path / "wide" / file.name)
        for name, tensor in load_file(file).items():
            assert wide[name].dtype == torch.float32
            torch.testing.assert_close(wide[name].bfloat16(), tensor, atol=0, rtol=0)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_buffers_that_are_no_floats_are_copied(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors") | {
        "model.position_ids": torch.arange(7),
        "flag": torch.tensor(True),
    }
    save_file(tensors, base / "model.safetensors")
    lp.merge(base, adapter, tmp_path / "merged", dtype="bfloat16")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(after["model.position_ids"], torch.arange(7))
    assert after["flag"].item() is True
    assert after["model.norm.weight"].dtype == torch.bfloat16


def test_pickles_and_models_in_memory_become_safetensors(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    lp.merge(base, adapter, tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    lp.merge(model, adapter, tmp_path / "memory")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    lp.merge(base, adapter, tmp_path / "pickle")
    for out in ("memory", "pickle"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    assert torch.equal(logits(loaded), logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


def second(tmp_path, base, **config):
    """Another adapter of the same base."""
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter) * (1 if "lora_" in name else 0.01)
    wrapped.save_pretrained(tmp_path / "second")
    return tmp_path / "second"


def test_weights_and_several_adapters_add_up(tmp_path):
    base, first, deltas = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    other = second(tmp_path, base, r=3, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "up_proj"])
    seen = []
    result = lp.merge(base, [first, other], tmp_path / "merged", weights=[0.5, -2], on_overlap=seen.append)
    lp.merge(base, other, tmp_path / "other", dtype="float32")
    before, alone, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "other", "merged"))
    for name, W in before.items():
        of_first = torch.from_numpy(deltas[name]) if name in deltas else torch.zeros_like(W).double()
        expected = W.double() + 0.5 * of_first - 2 * (alone[name].double() - W.double())
        torch.testing.assert_close(after[name].double(), expected, atol=1e-7, rtol=1e-6)
    row = result.table.set_index("name").loc["model.layers.0.self_attn.q_proj.weight"]
    assert (row["change"], row["adapters"]) == ("lora", "1, 2")
    assert result.table.set_index("name").loc["model.norm.weight", "change"] == "whole"
    assert seen[0] is result.overlap
    assert list(result.overlap.columns) == list(columns.OVERLAP)
    assert set(result.overlap["name"]) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert set(result.overlap["rank_a"]) == {4}
    assert set(result.overlap["rank_b"]) == {3}
    told = json.loads(result.to_json())
    assert len(told["overlap"]) == 2
    assert told["facts"]["weights"] == [0.5, -2.0]


def test_nan_overflow_and_quantized_bases_leave_nothing(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    good = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    cases = [
        (name, good[name].clone().fill_(math.nan), {}, lp.NumericsError, f"{name}: contains NaN or Inf in the base"),
        (name, good[name] + 7e4, {"dtype": "float16"}, lp.NumericsError, f"{name}: .*7e.04, beyond float16"),
        (
            "lm_head.weight",
            good["lm_head.weight"] + 7e4,
            {"dtype": "float16"},
            lp.ProbeError,
            "lm_head.weight: reaches",
        ),
        (name, good[name].to(torch.float8_e4m3fn), {}, lp.CheckpointError, "F8_E4M3|fp8"),
    ]
    for changed, tensor, options, error, words in cases:
        save_file(good | {changed: tensor}, base / "model.safetensors")
        with pytest.raises(error, match=words):
            lp.merge(base, adapter, tmp_path / "out", **options)
    save_file(good, base / "model.safetensors")
    content = load_file(adapter / "adapter_model.safetensors")
    next(iter(content.values()))[0, 0] = math.inf
    save_file(content, adapter / "adapter_model.safetensors")
    with pytest.raises(lp.NumericsError, match=r"lora_A.weight in .*: contains NaN or Inf"):
        lp.merge(base, adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_nan_in_what_no_adapter_touches_is_copied_and_named(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"])
    assert lp.merge(base, adapter, tmp_path / "sound").facts["warnings"] == []
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][3, 4] = math.nan
    tensors["model.norm.weight"][0] = -math.inf
    tensors["counts"] = torch.arange(3)  # a buffer of whole numbers
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    found = lp.merge(base, adapter, tmp_path / "merged")
    assert sorted(found.facts["not_finite"]) == ["lm_head.weight", "model.norm.weight"]
    (warning,) = found.facts["warnings"]
    assert "lm_head.weight, model.norm.weight: NaN or Inf in the base, copied as they are" in warning
    assert json.loads(found.to_json())["facts"]["warnings"] == [warning]
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"].nan_to_num(7.0), tensors["lm_head.weight"].nan_to_num(7.0))
    _, stderr = probe("merge", base, adapter, "--out", tmp_path / "told", "--quiet")
    assert stderr.splitlines() == [f"warning: {warning}"]
    many = {name: W.fill_(math.inf) if "layernorm" in name else W for name, W in tensors.items()}
    save_file(many, base / "model.safetensors", {"format": "pt"})
    found = lp.merge(base, adapter, tmp_path / "many")
    assert len(found.facts["not_finite"]) == 6
    assert ", " in found.facts["warnings"][0]
    assert found.facts["warnings"][0].count("weight") == 5
    assert " and 1 more: NaN or Inf" in found.facts["warnings"][0]


def test_dora_a_taken_directory_and_weights_that_do_not_fit(tmp_path):
    base, adapter, _ = adapt(tmp_path, llama(), r=4, target_modules=["q_proj"], use_dora=True)
    with pytest.raises(lp.CheckpointError, match=r"DoRA .*merge_and_unload"):
        lp.merge(base, adapter, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    base, adapter, _ = adapt(tmp_path / "plain", llama(), r=4, target_modules=["q_proj"])
    before = tree(base)
    for taken in (base, adapter, tmp_path):
        with pytest.raises(lp.OutputError, match="is not empty; choose another --out"):
            lp.merge(base, adapter, taken)
    with pytest.raises(lp.ProbeError, match="one weight an adapter, found 2 for 1"):
        lp.merge(base, adapter, tmp_path / "out", weights=[1, 2])
    with pytest.raises(lp.ProbeError, match="finite"):
        lp.merge(base, adapter, tmp_path / "out", weights=[math.nan])
    with pytest.raises(lp.ProbeError, match="dtype 'int8'"):
        lp.merge(base, adapter, tmp_path / "out", dtype="int8")
    assert tree(base) == before
    assert not (tmp_path / "out").exists()


SLOW = """
import signal, sys, time
import lowrank_probe as lp
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
def step(name, done, total):
    if done == 6:
        print("half", flush=True)
        time.sleep(60)
lp.merge(sys.argv[1], sys.argv[2], sys.argv[3], on_progress=step)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way_nothing_looks_finished_and_the_next_run_clears_up(tmp_path, number):
    base, adapter, _ = sharded(tmp_path)
    command = [sys.executable, "-c", SLOW, str(base), str(adapter), str(tmp_path / "merged")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout.readline() == "half\n"
        running.send_signal(number)
        running.wait(30)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "merged" not in names
    left = [name for name in names if name.startswith(".merged.part-")]
    assert len(left) == (1 if number == signal.SIGKILL else 0)
    lp.merge(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_run_beside_it_is_left_alone(tmp_path):
    base, adapter, _ = sharded(tmp_path)
    command = [sys.executable, "-c", SLOW, str(base), str(adapter), str(tmp_path / "merged")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout.readline() == "half\n"
        lp.merge(base, adapter, tmp_path / "merged")
        (left,) = tmp_path.glob(".merged.part-*")
        assert any(left.iterdir())
        running.send_signal(signal.SIGTERM)
        running.wait(30)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "bert", "t5", "marian"])
def test_what_extract_wrote_of_everything_is_merged_as_peft_computes_it(tmp_path, family):
    make = getattr(adapting, family)
    base, tuned = adapting.saved(tmp_path, make)
    lp.extract(base, tuned, tmp_path / "a", ranks=3, targets=["everything"])
    lp.merge(base, tmp_path / "a", tmp_path / "merged")
    kind = type(make())
    adapted = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "a").eval()
    inputs = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if adapted.config.is_encoder_decoder else {})
    with torch.no_grad():
        found, expected, before = (
            model.eval()(**inputs).logits
            for model in (kind.from_pretrained(tmp_path / "merged"), adapted, kind.from_pretrained(base))
        )
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert not torch.allclose(before, expected, rtol=0, atol=1e-2 * float(before.abs().max()))


def test_copies_of_a_table_that_differ_stay_unmerged(tmp_path):
    base, tuned = adapting.saved(tmp_path, adapting.t5)
    lp.extract(base, tuned, tmp_path / "a", ranks=3, targets=["everything"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.encoder.embed_tokens.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(lp.MatchError, match=r"encoder\.embed_tokens\.weight differs from .*shared\.weight.*; keep"):
        lp.merge(base, tmp_path / "a", tmp_path / "merged")


@pytest.mark.parametrize("rows", [50, 70], ids=["fewer", "more"])
def test_a_table_of_another_number_of_rows_takes_the_bases_place(tmp_path, rows):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    lp.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", ranks=100, targets=["everything"])
    lp.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == rows
    ids = torch.arange(2, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
