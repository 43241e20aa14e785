"""fp8 with scales is dequantized; codes of other formats are refused by name."""

import pytest
import torch
from pairs import write
from refusals import refused

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint


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
    refused(write(tmp_path / "b", tensors), "b.weight", "no b.weight_scale_inv or _scale", "half-quantized")


def test_a_scale_that_does_not_fit(tmp_path):
    codes, _ = fp8_pair(torch.randn(8, 8), None)
    side = open_checkpoint(write(tmp_path / "b", {"a.weight": codes, "a.weight_scale": torch.ones(3, 5)}))
    with pytest.raises(
        lp.CheckpointError, match=r"a\.weight in .*scale is \(3, 5\) for a weight \(8, 8\) \(expected .*--exclude"
    ):
        side.read("a.weight")


def in_safetensors(path, tensors):
    return write(path, tensors)


def in_a_pickle(path, tensors):
    path.mkdir()
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def in_memory(path, tensors):
    return tensors


EVERYWHERE = pytest.mark.parametrize("place", [in_safetensors, in_a_pickle, in_memory])


@EVERYWHERE
@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
def test_fp8_is_the_same_wherever_it_lies(tmp_path, place, block):
    W = 0.02 * torch.randn(200, 160, generator=torch.Generator().manual_seed(0))
    codes, scale = fp8_pair(W, block)
    height, width = block or (1, 160)
    expected = codes.float() * scale.repeat_interleave(height, 0)[:200].repeat_interleave(width, 1)[:, :160]
    side = open_checkpoint(place(tmp_path / "b", {"a.weight": codes, "a.weight_scale_inv": scale}))
    assert torch.equal(side.read("a.weight"), expected)
    result = lp.spectrum({"a.weight": W}, place(tmp_path / "c", {"a.weight": codes, "a.weight_scale_inv": scale}))
    assert result.table["fro_norm"][0] == pytest.approx(float((expected - W).double().norm()), rel=1e-6)
    assert set(result.table["noise_model"]) == {"quantized"}


@EVERYWHERE
@pytest.mark.parametrize("kind", ["row", "column", "block", "expert", "stack"])
def test_each_fp8_expert_of_a_stack_is_read_by_itself_with_its_own_scale(tmp_path, place, kind):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 48, 64, generator=generator) * torch.tensor([1.0, 10, 100])[:, None, None]
    codes = (stack / stack.abs().max() * 448).to(torch.float8_e4m3fn)
    shape = {"row": (3, 48, 1), "column": (3, 1, 64), "block": (3, 3, 2), "expert": (3,), "stack": (1,)}[kind]
    scale = torch.rand(shape, generator=generator) + 0.5
    whole = scale.reshape(3, 1, 1) if kind == "expert" else scale
    if kind == "block":
        whole = scale.repeat_interleave(16, 1).repeat_interleave(32, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {name: codes, f"{name}_scale_inv": scale}
    side = open_checkpoint(place(tmp_path / "b", tensors))
    expected = codes.float() * whole
    assert torch.equal(side.read(name), expected)
    assert torch.equal(side.read(name, span=(48 * 64, 48 * 64)), expected[1].reshape(-1))
    result = lp.spectrum({name: stack}, place(tmp_path / "c", tensors))
    for expert in range(3):
        s = torch.linalg.svdvals((expected - stack)[expert].double())
        assert result.singular_values[f"{name}[{expert}]"][:5] == pytest.approx(s[:5].numpy(), rel=1e-5)


def test_a_stack_with_scales_of_another_number_of_experts(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {name: torch.ones(3, 8, 8).to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(2, 8, 1)}
    with pytest.raises(lp.CheckpointError, match=r"its scale is \(2, 8, 1\) for 3 experts .*--exclude"):
        open_checkpoint(write(tmp_path / "b", tensors)).read(name, span=(0, 64))


def test_a_scale_that_is_no_float_is_refused_from_the_header(tmp_path):
    codes, _ = fp8_pair(torch.randn(8, 8), None)
    tensors = {"a.weight": codes, "a.weight_scale": torch.ones(8, 1, dtype=torch.uint8)}
    refused(write(tmp_path / "b", tensors), "a.weight_scale, the scale of a.weight, is U8")


@pytest.mark.parametrize(
    ("tensors", "config", "word"),
    [
        ({"q.weight": torch.ones(8, 1, dtype=torch.uint8), "q.weight.absmax": torch.ones(1)}, {}, "bitsandbytes"),
        ({"q.qweight": torch.ones(8, 8, dtype=torch.int32), "q.g_idx": torch.ones(8, dtype=torch.int32)}, {}, "GPTQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "gptq"}}, "GPTQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
        ({"q.weight": torch.ones(8, 8)}, {"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"experts.down_proj_blocks": torch.ones(2, 8, 4, 16, dtype=torch.uint8),
          "experts.down_proj_scales": torch.ones(2, 8, 4, dtype=torch.uint8)}, {}, "MXFP4"),
    ],
    ids=["bnb names", "gptq names", "awq", "gptq", "bnb", "hqq", "mxfp4", "mxfp4 names"],
)  # fmt: skip
def test_codes_are_refused_by_name(tmp_path, tensors, config, word):
    refused(write(tmp_path / "m", tensors, config), word, "codes", "dequantize")
