"""Checkpoints that are no safetensors files: pickles, GGUF, fp8 with scales, models in memory, hub ids, codes."""

import json
import os
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from pairs import add_update, llama_tensors, planted, write
from refusals import refused
from safetensors.torch import save_file

import lowrank_probe as lp
from lowrank_probe import formats
from lowrank_probe.checkpoints import open_checkpoint


def same_tables(a, b):
    """Two results with the same rows and singular values, whatever they were read from."""
    assert set(a.table["name"]) == set(b.table["name"])
    for name, values in a.singular_values.items():
        np.testing.assert_array_equal(values, b.singular_values[name])
    for one, other, column in ((a.table, b.table, "r90"), (a.ledger, b.ledger, "status")):
        assert one.set_index("name")[column].to_dict() == other.set_index("name")[column].to_dict()


# ---------------------------------------------------------------------------------------------- pickles


def write_pickle(directory, tensors, config=None, **options):
    directory.mkdir(parents=True)
    torch.save(tensors, directory / "pytorch_model.bin", **options)
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_give_what_safetensors_give(tmp_path, zipped):
    base, tuned = llama_tensors(), add_update(llama_tensors())
    expected = lp.spectrum(write(tmp_path / "a", base), write(tmp_path / "b", tuned))
    sides = [
        write_pickle(tmp_path / f"{name}_bin", tensors, _use_new_zipfile_serialization=zipped)
        for name, tensors in (("a", base), ("b", tuned))
    ]
    same_tables(lp.spectrum(*sides), expected)


def test_shards_of_pickles(tmp_path):
    tensors = llama_tensors()
    names = sorted(tensors)
    for i in range(2):
        torch.save({name: tensors[name] for name in names[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
    weight_map = {name: f"pytorch_model-{i}.bin" for i in range(2) for name in names[i::2]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    side = open_checkpoint(tmp_path)
    assert set(side.tensors) == set(tensors)
    assert all(torch.equal(side.read(name), tensor) for name, tensor in tensors.items())
    assert len(side.files) == 2


def test_a_state_dict_inside_a_training_checkpoint(tmp_path):
    tensors = llama_tensors()
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.pt")
    assert set(open_checkpoint(tmp_path / "last.pt").tensors) == set(tensors)


def test_a_pickle_that_holds_a_non_tensor(tmp_path):
    torch.save({"w": torch.ones(2, 2), "epoch": 3}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", "epoch is a int", "save the state dict alone")
    torch.save([torch.ones(2)], tmp_path / "b.bin")
    refused(tmp_path / "b.bin", "found list")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"w": Evil()}, tmp_path / "evil.bin")
    refused(tmp_path / "evil.bin", "system", "refused", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_pickle(tmp_path):
    torch.save(llama_tensors(), tmp_path / "a.bin")
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:2000])
    refused(tmp_path / "a.bin", "cannot be opened as PyTorch weights")


def test_memory_mapped_pickles_are_not_read_before_they_are_asked_for(tmp_path):
    """A 256 MB pickle is opened and one small tensor read: far less than the file becomes resident."""
    torch.save({"big": torch.zeros(2**26), "small": torch.ones(4)}, tmp_path / "a.bin")
    code = (
        "import resource, sys, torch; from lowrank_probe.checkpoints import open_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "side = open_checkpoint(sys.argv[1]); assert side.read('small').sum() == 4\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.bin"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024


# ---------------------------------------------------------------------------------------------- in memory


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
    refused({"w": [1, 2]}, "w is a list")
    refused(3.5, "found float")
    with torch.device("meta"):
        refused(torch.nn.Linear(2, 2), "meta device")
    import peft

    wearing = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(target_modules=["q_proj"]))
    refused(wearing, "PEFT adapter", "merge")


# ---------------------------------------------------------------------------------------------- GGUF


def write_gguf(file, tensors, kind, heads=4, kv_heads=2):
    """A LLaMA in GGUF's names; matrices as `kind`, vectors as float32; q and k rows as llama.cpp orders them."""
    names = {gg: name for name, gg in GGUF_NAMES.items()}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    for name, tensor in tensors.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        short = f"blk.{found[1]}.{GGUF_NAMES[found[2]]}" if found else GGUF_NAMES[name.removesuffix(".weight")]
        values = tensor.float().numpy()
        for module, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if module in name:
                halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(f"{short}.weight", values)
        else:
            data = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{short}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(names) == len(GGUF_NAMES)
    return file


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}  # fmt: skip


@pytest.fixture
def wide_llama():
    """Rows of 64: a multiple of GGUF's block of 32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens": (96, 64), "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.self_attn.k_proj": (32, 64), "model.layers.0.mlp.up_proj": (96, 64),
        "model.layers.0.mlp.down_proj": (64, 96), "model.layers.0.input_layernorm": (64,), "model.norm": (64,),
    }  # fmt: skip
    return {f"{name}.weight": 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_plain_gguf_gives_what_safetensors_give(tmp_path, wide_llama):
    tuned = add_update(wide_llama)
    expected = lp.spectrum(write(tmp_path / "a", wide_llama), write(tmp_path / "b", tuned))
    f32 = gguf.GGMLQuantizationType.F32
    result = lp.spectrum(tmp_path / "a", write_gguf(tmp_path / "b.gguf", tuned, f32))
    same_tables(result, expected)
    same_tables(lp.spectrum(write_gguf(tmp_path / "a.gguf", wide_llama, f32), tmp_path / "b.gguf"), expected)


def test_quantized_gguf_is_dequantized_and_marked(tmp_path, wide_llama):
    kind = gguf.GGMLQuantizationType.Q8_0
    side = open_checkpoint(write_gguf(tmp_path / "b.gguf", wide_llama, kind))
    for name, tensor in wide_llama.items():
        read = side.read(name)
        assert read.shape == tensor.shape
        assert float((read - tensor).abs().max()) <= float(tensor.abs().max()) / 127
        assert side.tensors[name].quantized == (tensor.ndim == 2)
    result = lp.spectrum(write(tmp_path / "a", wide_llama), tmp_path / "b.gguf")
    assert set(result.table["noise_model"]) == {"quantized"}
    assert not result.table[["decidable_r50", "decidable_r90", "decidable_signal_rank"]].to_numpy().any()
    assert set(result.table["tuned_dtype"]) == {"Q8_0"}
    assert any("Q8_0" in note and "dequantized" in note for note in result.facts["notes"])
    assert all(verdict.startswith("undecidable") for verdict in result.summary["verdict"])


def test_a_damaged_gguf_file(tmp_path, wide_llama):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "a.gguf", "not a readable GGUF file")


# ---------------------------------------------------------------------------------------------- fp8 and codes


def fp8_pair(W, block):
    """(fp8 codes, scale) with one scale a block, as DeepSeek stores them; None: one scale a row."""
    height, width = block or (1, W.shape[1])
    rows, cols = -(-W.shape[0] // height), -(-W.shape[1] // width)
    scale = torch.zeros(rows, cols)
    codes = torch.zeros(W.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(cols):
            at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scale[i, j] = W[at].abs().max() / 448
            codes[at] = (W[at] / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


@pytest.mark.parametrize("block", [None, (128, 128), (64, 32)], ids=str)
@pytest.mark.parametrize("said", [True, False], ids=["block in config", "block from the shape"])
def test_fp8_with_its_scales(tmp_path, block, said):
    W = 0.02 * torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.self_attn.q_proj.weight"
    codes, scale = fp8_pair(W, block)
    suffix = "_scale_inv" if block else "_scale"
    quantization = {"quant_method": "fp8"} | ({"weight_block_size": list(block)} if block and said else {})
    config = {"model_type": "llama", "quantization_config": quantization}
    tuned = write(tmp_path / "b", {name: codes, name + suffix: scale}, config)
    side = open_checkpoint(tuned)
    read = side.read(name)
    assert read.dtype == torch.float32
    height, width = block or (1, 160)
    expected = codes.float() * scale.repeat_interleave(height, 0)[:200].repeat_interleave(width, 1)[:, :160]
    assert torch.equal(read, expected)
    assert float((read - W).norm() / W.norm()) < 0.05
    result = lp.spectrum(write(tmp_path / "a", {name: W}), tuned)
    assert set(result.table["noise_model"]) == {"quantized"}
    lines = result.ledger.set_index("tuned_name")
    assert lines.loc[name + suffix, "status"] == "not a weight"
    assert lines.loc[name + suffix, "note"] == f"the scale of {name}"


def test_a_half_quantized_checkpoint(tmp_path):
    codes, scale = fp8_pair(torch.randn(8, 8), None)
    tensors = {"a.weight": codes, "a.weight_scale": scale, "b.weight": codes.clone()}
    refused(write(tmp_path / "b", tensors), "b.weight", "no weight_scale_inv or weight_scale", "half-quantized")


def test_a_scale_that_does_not_fit(tmp_path):
    codes, _ = fp8_pair(torch.randn(8, 8), None)
    side = open_checkpoint(write(tmp_path / "b", {"a.weight": codes, "a.weight_scale": torch.ones(3, 5)}))
    with pytest.raises(lp.CheckpointError, match=r"a\.weight in .*scale \(3, 5\)"):
        side.read("a.weight")


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        ({"q.weight": torch.ones(8, 1, dtype=torch.uint8), "q.weight.absmax": torch.ones(1)}, {}, "bitsandbytes"),
        ({"q.qweight": torch.ones(8, 8, dtype=torch.int32), "q.g_idx": torch.ones(8, dtype=torch.int32)}, {}, "GPTQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ],
    ids=["bnb names", "gptq names", "awq", "gptq", "bnb"],
)  # fmt: skip
def test_codes_are_refused_by_name(tmp_path, tensors, config, word):
    refused(write(tmp_path / "m", tensors, config), word, "codes", "dequantize")


# ---------------------------------------------------------------------------------------------- hub ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True), ("org/name@main", True), ("org/na.me-7B@refs/pr/1", True), ("name", False),
        ("./org/name", False), ("/org/name", False), ("a/b/c", False), ("org/name/", False), ("org/na me", False),
    ],
)  # fmt: skip
def test_what_may_be_a_hub_id(text, expected):
    assert formats.is_hub_id(text) == expected


def test_a_hub_id_offline_says_so_and_a_path_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    code = "import lowrank_probe as lp; lp.spectrum('nobody/nothing', 'nobody/nothing2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "nobody/nothing2: no such file or directory here, and the hub cannot be reached" in done.stderr
    write(tmp_path / "nobody" / "nothing", llama_tensors())
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("nobody/nothing").notes == ()


def test_a_snapshot_in_the_hubs_cache_is_used_and_said(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "hub" / "models--org--name" / "snapshots" / ("0" * 40)
    tensors = llama_tensors()
    write(snapshot, tensors, {"model_type": "llama"})
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    code = (
        "from lowrank_probe.checkpoints import open_checkpoint\n"
        "side = open_checkpoint('org/name'); print(len(side.tensors), side.notes[0])"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert done.stdout.startswith(f"{len(tensors)} org/name is no path here: taken from the hub (snapshot 000000000000")


# ---------------------------------------------------------------------------------------------- parts of tensors


def test_fused_qkv_is_split_or_kept_and_the_ledger_has_one_line(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=4, n_positions=16)
    base, tuned = hf.GPT2LMHeadModel(config), hf.GPT2LMHeadModel(config)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for block in tuned.transformer.h:
            block.attn.c_attn.weight[:, :48] += 0.01 * planted((48, 48), torch.ones(2), 1).float()  # q only
    base.save_pretrained(tmp_path / "a")
    tuned.save_pretrained(tmp_path / "b")
    split = lp.spectrum(tmp_path / "a", tmp_path / "b")
    assert set(split.table["name"]) == {f"transformer.h.{i}.attn.c_attn.weight[q]" for i in range(2)}
    assert set(split.table["layer_type"]) == {"q"}
    assert set(zip(split.table["rows"], split.table["cols"], strict=True)) == {(48, 48)}
    line = split.ledger.set_index("name").loc["transformer.h.0.attn.c_attn.weight"]
    assert line["status"] == "analysed"
    assert "split into q, k, v" in line["note"]
    assert "1 analysed; 2 unchanged" in line["note"]
    whole = lp.spectrum(tmp_path / "a", tmp_path / "b", split=False)
    assert set(whole.table["name"]) == {f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)}
    assert set(whole.table["rows"]) == {144}
    np.testing.assert_allclose(
        whole.singular_values["transformer.h.0.attn.c_attn.weight"][:2],
        split.singular_values["transformer.h.0.attn.c_attn.weight[q]"][:2], rtol=1e-6,
    )  # fmt: skip
    assert line["fro_norm"] == pytest.approx(whole.table["fro_norm"][0])
    assert line["relative_update"] == pytest.approx(
        whole.table["fro_norm"][0] / float(base.transformer.h[0].attn.c_attn.weight[:, :48].detach().norm()), rel=1e-5
    )
    chosen = lp.spectrum(tmp_path / "a", tmp_path / "b", include=["q"])
    assert set(chosen.table["name"]) == set(split.table["name"])
    assert len(chosen.ledger) == len(split.ledger)


def test_experts_are_one_row_each_and_convolutions_are_flattened(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 40, 24, generator=generator),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 24, 20, generator=generator),
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "empty.weight": torch.zeros(0, 4),
    }
    tuned = {name: W + 0.01 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    tuned["model.layers.0.mlp.experts.down_proj"][1] = base["model.layers.0.mlp.experts.down_proj"][1]
    config = {"model_type": "qwen3_moe", "hidden_size": 24, "moe_intermediate_size": 20, "num_experts": 3}
    result = lp.spectrum(write(tmp_path / "a", base, config), write(tmp_path / "b", tuned, config))
    assert set(result.table["name"].str.removeprefix("model.layers.0.mlp.experts.")) == {
        *(f"gate_up_proj[{e}.{part}]" for part in ("gate", "up") for e in range(3)),
        "down_proj[0]", "down_proj[2]", "conv.weight",
    }  # fmt: skip
    for row in result.table.itertuples():
        name, _, label = row.name.partition("[")
        D = (tuned[name] - base[name]).double()
        if label:
            expert, _, part = label.rstrip("]").partition(".")
            D = D[int(expert)]
            D = D[:20] if part == "gate" else D[20:] if part == "up" else D
        expected = torch.linalg.svdvals(D.flatten(1)).numpy()
        np.testing.assert_allclose(result.singular_values[row.name], expected, rtol=1e-6)
    ledger = result.ledger.set_index("name")
    assert ledger.loc["empty.weight", "status"] == "not a matrix"
    assert "2 analysed; 1 unchanged" in ledger.loc["model.layers.0.mlp.experts.down_proj", "note"]
    assert len(ledger) == 4


def test_an_unknown_architecture_falls_back_and_says_so(tmp_path):
    base = {"net.0.mystery.weight": torch.randn(16, 12), "net.1.mystery.weight": torch.randn(16, 12)}
    tuned = {name: W + 0.01 for name, W in base.items()}
    result = lp.spectrum(write(tmp_path / "a", base, {"model_type": "nobody_knows"}), write(tmp_path / "b", tuned))
    assert set(result.table["layer_type"]) == {"mystery"}
    assert any("mystery" in note and "nobody_knows" in note for note in result.facts["notes"])


def test_a_tensor_name_with_html_in_it(tmp_path):
    name = "layers.0.<img src=x onerror=alert(1)>.weight"
    base = {name: torch.randn(16, 12)}
    result = lp.spectrum(write(tmp_path / "a", base), write(tmp_path / "b", {name: base[name] + 0.01}))
    page = (result.save(tmp_path / "run") / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page


def test_an_interrupted_split_tensor_resumes_to_the_same_table(tmp_path):
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=64, n_embd=48, n_layer=1, n_head=4, n_positions=16)
    base = hf.GPT2LMHeadModel(config).state_dict()
    tuned = {name: W + 0.01 * torch.randn(W.shape) for name, W in base.items()}
    sides = [write(tmp_path / side, {n: t.clone() for n, t in tensors.items()}, config.to_dict())
             for side, tensors in (("a", base), ("b", tuned))]  # fmt: skip
    whole = lp.spectrum(*sides)
    seen = []

    def stop(name, done, total):
        seen.append(name)
        if name.endswith("[k]"):
            raise KeyboardInterrupt

    with pytest.raises(lp.Interrupted) as caught:
        lp.spectrum(*sides, on_progress=stop)
    earlier = lp.load(caught.value.result.save(tmp_path / "run"))
    again = []
    resumed = lp.spectrum(*sides, resume=earlier, on_progress=lambda name, done, total: again.append(name))
    same_tables(resumed, whole)
    assert not {name for name in seen if "[" in name} & set(again)
    assert list(resumed.ledger["note"].fillna("")) == list(whole.ledger["note"].fillna(""))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_without_a_scale_are_refused_from_the_header(tmp_path, dtype):
    save_file({"a.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(lp.CheckpointError, match=r"a\.weight .*dtype"):
        lp.spectrum(tmp_path / "a.safetensors", tmp_path / "a.safetensors")
