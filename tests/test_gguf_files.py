"""GGUF files: names, order of rows, experts, parts, what is dequantized, and what is refused."""

import contextlib
import re

import gguf
import numpy as np
import pytest
import torch
from pairs import add_update, write
from refusals import refused
from results import same_tables

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint


def gguf_file(file, family, tensors, heads=4, kv_heads=2, **numbers):
    """A GGUF file of these tensors under these names: arrays, or (bytes of blocks, type)."""
    writer = gguf.GGUFWriter(file, family)
    if heads is not None:
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
    for key, number in numbers.items():
        getattr(writer, f"add_{key}")(number)
    for name, values in tensors.items():
        if isinstance(values, tuple):
            writer.add_tensor(name, values[0], raw_dtype=values[1])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_gguf(file, tensors, kind, heads=4, kv_heads=2, family="llama"):
    """A LLaMA in GGUF's names; matrices as `kind`, vectors as float32; q and k rows as llama.cpp orders them."""
    stored = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
        short = f"blk.{found[1]}.{GGUF_NAMES[found[2]]}" if found else GGUF_NAMES[name.removesuffix(".weight")]
        values = tensor.float().numpy()
        for module, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if module in name and count and family == "llama":
                count = count if isinstance(count, int) else count[int(found[1])]
                halves = values.reshape(count, 2, values.shape[0] // count // 2, -1)
                values = halves.swapaxes(1, 2).reshape(values.shape)
        stored[f"{short}.weight"] = values if values.ndim == 1 else (gguf.quants.quantize(values, kind), kind)
    return gguf_file(file, family, stored, heads, kv_heads)


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
    whole = write_gguf(tmp_path / "whole.gguf", wide_llama, gguf.GGMLQuantizationType.F32).read_bytes()
    for end in range(4, len(whole), len(whole) // 60):  # the parser's errors differ by where it stops
        (tmp_path / "a.gguf").write_bytes(whole[:end])
        refused(tmp_path / "a.gguf", "not a readable GGUF file")
    for at in range(24, 400):
        (tmp_path / "a.gguf").write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
        with contextlib.suppress(lp.CheckpointError):  # or it does no harm
            open_checkpoint(tmp_path / "a.gguf")


@pytest.mark.parametrize("kv_heads", [[2], [4]], ids=str)
def test_head_counts_that_are_lists_one_a_layer(tmp_path, wide_llama, kv_heads):
    f32 = gguf.GGMLQuantizationType.F32
    side = open_checkpoint(write_gguf(tmp_path / "a.gguf", wide_llama, f32, [4], kv_heads))
    assert all(torch.equal(side.read(name), tensor) for name, tensor in wide_llama.items())
    assert side.config["num_key_value_heads"] == kv_heads[0]


@pytest.mark.parametrize(("heads", "said"), [(None, "is missing"), (3, "says 3 heads"), ([], "is missing")], ids=str)
def test_heads_that_do_not_fit_are_refused(tmp_path, wide_llama, heads, said):
    names = {"model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight"}
    tensors = {short: wide_llama[name].numpy() for name, short in names.items()}
    if heads == []:  # fewer entries than blocks
        tensors = {"blk.2.attn_q.weight": tensors["blk.0.attn_q.weight"]}
        heads = [4, 4]
    refused(gguf_file(tmp_path / "a.gguf", "llama", tensors, heads), "attn_q.weight has 64 rows", f"head_count {said}")


def split_gguf(tmp_path, wide_llama):
    """The same model whole and in two parts, as llama-gguf-split writes it; the first part's path."""
    whole = write_gguf(tmp_path / "whole.gguf", wide_llama, gguf.GGMLQuantizationType.F32)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(whole).tensors}
    names = sorted(tensors)
    for i in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        if i == 0:
            writer.add_head_count(4)
            writer.add_head_count_kv(2)
        for name in names[i::2]:
            writer.add_tensor(name, tensors[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tmp_path / "m-00001-of-00002.gguf"


def test_parts_of_a_split_model_are_opened_together(tmp_path, wide_llama):
    first = split_gguf(tmp_path, wide_llama)
    for part in (first, first.with_name("m-00002-of-00002.gguf")):
        side = open_checkpoint(part)
        assert set(side.tensors) == set(wide_llama)
        assert all(torch.equal(side.read(name), tensor) for name, tensor in wide_llama.items())
        assert len(side.files) == 2


def test_a_missing_or_renamed_part_is_told(tmp_path, wide_llama):
    first = split_gguf(tmp_path, wide_llama)
    first.with_name("m-00002-of-00002.gguf").unlink()
    refused(first, "one of 2 parts", "m-00002-of-00002.gguf is not beside it")
    refused(first.rename(tmp_path / "part.gguf"), "one of 2 parts", "named …-00001-of-00002.gguf")


MIXTRAL = {"gate": "block_sparse_moe.experts.{}.w1", "up": "block_sparse_moe.experts.{}.w3",
           "down": "block_sparse_moe.experts.{}.w2", "router": "block_sparse_moe.gate"}  # fmt: skip
QWEN = {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj",
        "router": "mlp.gate"}  # fmt: skip


@pytest.mark.parametrize(("family", "names"), [("llama", MIXTRAL), ("qwen3moe", QWEN)], ids=["mixtral", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_experts_get_the_names_of_a_checkpoint_and_are_read_one_by_one(tmp_path, family, names, kind):
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (3, 96, 64), "up": (3, 96, 64), "down": (3, 64, 96)}
    stacks = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    router = torch.randn(3, 64, generator=generator)
    quantization = gguf.GGMLQuantizationType[kind]
    stored = {
        f"blk.1.ffn_{name}_exps.weight": (gguf.quants.quantize(stack.numpy(), quantization), quantization)
        for name, stack in stacks.items()
    }
    side = open_checkpoint(
        gguf_file(tmp_path / "a.gguf", family, stored | {"blk.1.ffn_gate_inp.weight": router.numpy()})
    )
    base = {f"model.layers.1.{names['router']}.weight": router}
    for name, stack in stacks.items():
        for expert in range(3):
            base[f"model.layers.1.{names[name].format(expert)}.weight"] = stack[expert]
    assert set(side.tensors) == set(base)
    for name, W in base.items():
        assert side.tensors[name].shape == W.shape
        assert float((side.read(name) - W).abs().max()) <= (0 if kind == "F32" else float(W.abs().max()) / 127)
    lengths = [side.tensors[f"model.layers.1.{names['up'].format(e)}.weight"].n_bytes for e in range(3)]
    assert lengths == [96 * 64 * 4 if kind == "F32" else 96 * 64 // 32 * 34] * 3
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    result = lp.spectrum(tmp_path / "a.gguf", tuned)
    assert set(result.table["layer_type"]) == {"expert_gate", "expert_up", "expert_down", "router"}
    assert len(result.table) == 10


def test_other_families_keep_their_names_and_get_their_types(tmp_path):
    generator = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (80, 64), "blk.0.attn_qkv.weight": (128, 64), "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96), "blk.0.ffn_gate_exps.weight": (3, 96, 64),
        "blk.0.ffn_gate_inp.weight": (3, 64), "output.weight": (80, 64),
    }  # fmt: skip
    base = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {name: W + generator.normal(size=W.shape).astype(np.float32) / 10 for name, W in base.items()}
    sides = [
        gguf_file(tmp_path / f"{side}.gguf", "bloom", tensors, embedding_length=64)
        for side, tensors in (("a", base), ("b", tuned))
    ]
    result = lp.spectrum(*sides)
    types = result.table.set_index("name")["layer_type"].to_dict()
    assert {name.partition("[")[0] for name in types} == set(base)
    # GGUF puts q, k and v one after the other in every family; BLOOM's own checkpoints have them head by head.
    assert {name.partition(".")[2]: types[name] for name in types if "qkv" in name} == {
        f"0.attn_qkv.weight[{x}]": x for x in "qkv"
    }
    D = (tuned["blk.0.attn_qkv.weight"] - base["blk.0.attn_qkv.weight"]).astype(np.float64)
    for label, rows in (("q", D[:64]), ("k", D[64:96]), ("v", D[96:])):
        np.testing.assert_allclose(
            result.singular_values[f"blk.0.attn_qkv.weight[{label}]"], np.linalg.svd(rows, compute_uv=False), rtol=1e-6
        )
    assert {types[f"blk.0.ffn_gate_exps.weight[{e}]"] for e in range(3)} == {"expert_gate"}
    rest = {name.split(".")[-2]: of for name, of in types.items() if "[" not in name}
    assert rest == {
        "token_embd": "embedding", "attn_output": "o", "ffn_up": "up", "ffn_down": "down", "ffn_gate_inp": "router",
        "output": "lm_head",
    }  # fmt: skip
    assert not any("no layer type" in note for note in result.facts["notes"])
    with pytest.raises(lp.MatchError, match=r"no tensor in common .*give GGUF on both sides"):
        lp.spectrum({"transformer.h.0.mlp.dense_h_to_4h.weight": torch.ones(96, 64)}, sides[1])


def test_a_k_quant_is_dequantized_as_ggml_says(tmp_path):
    """Q6_K: 256 entries are 210 bytes: low 4 bits, high 2 bits, 16 scales, and one scale of the scales."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, size=(8, 2, 210), dtype=np.uint8)
    blocks[..., 208:] = np.float16(0.01).reshape(1).view(np.uint8)
    kind = gguf.GGMLQuantizationType.Q6_K
    stored = {"blk.0.ffn_down.weight": (blocks.reshape(8, 420), kind)}
    side = open_checkpoint(gguf_file(tmp_path / "a.gguf", "qwen2", stored))
    read = side.read("model.layers.0.mlp.down_proj.weight")
    expected = np.empty((8, 2, 256))
    for half in range(2):  # ggml's dequantize_row_q6_K
        for i in range(32):
            low, high = blocks[..., 64 * half :][..., :64].astype(int), blocks[..., 128 + 32 * half + i].astype(int)
            scales = blocks[..., 192:208].view(np.int8).astype(int)
            for quarter in range(4):
                nibble = low[..., i + 32 * (quarter % 2)] >> (4 * (quarter // 2)) & 15
                code = (nibble | ((high >> (2 * quarter) & 3) << 4)) - 32
                scale = scales[..., 8 * half + i // 16 + 2 * quarter]
                expected[..., 128 * half + 32 * quarter + i] = float(np.float16(0.01)) * scale * code
    np.testing.assert_allclose(read.numpy(), expected.reshape(8, 512), rtol=1e-6)
    assert side.tensors["model.layers.0.mlp.down_proj.weight"].quantized


def test_a_type_that_cannot_be_dequantized_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_K
    stored = {"blk.0.ffn_down.weight": (np.zeros((2, 292), np.uint8), kind)}
    side = open_checkpoint(gguf_file(tmp_path / "a.gguf", "qwen2", stored))
    with pytest.raises(lp.CheckpointError, match=r"ffn_down\.weight in .*a\.gguf: .* cannot dequantize Q8_K; convert"):
        side.read("model.layers.0.mlp.down_proj.weight")
