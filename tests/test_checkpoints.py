"""Reading: every layout and dtype that is taken, and every damage that must end in one clear line."""

import json
import struct

import numpy as np
import pytest
import torch
from pairs import llama_tensors, write, write_sharded
from refusals import refused
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowrank_probe import CheckpointError
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.matching import match
from lowrank_probe.options import Options
from lowrank_probe.safetensors_headers import read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def raw_file(path, header, data=b""):
    """A safetensors file with any header at all: an object, or bytes taken as they are."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(dtype="F32", shape=(2, 2), start=0, stop=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def same_tensors(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


# ---------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_file_in_a_directory(tmp_path, dtype):
    tensors = llama_tensors(dtype=dtype)
    checkpoint = open_checkpoint(write(tmp_path / "m", tensors, {"model_type": "llama"}))
    same_tensors(checkpoint, tensors)
    assert checkpoint.config == {"model_type": "llama"}
    assert not checkpoint.is_adapter
    assert checkpoint.files == [tmp_path / "m" / "model.safetensors"]
    assert {info.dtype for info in checkpoint.tensors.values()} == {next(k for k, v in DTYPES.items() if v == dtype)}


def test_shards_with_an_index(tmp_path):
    tensors = llama_tensors()
    checkpoint = open_checkpoint(write_sharded(tmp_path / "m", tensors))
    same_tensors(checkpoint, tensors)
    assert len(checkpoint.files) == 2


def test_shards_that_are_links_as_in_a_hub_cache(tmp_path):
    tensors = llama_tensors()
    blobs = write_sharded(tmp_path / "blobs", tensors)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    same_tensors(open_checkpoint(snapshot), tensors)


def test_a_single_safetensors_file_of_any_name(tmp_path):
    tensors = llama_tensors()
    write(tmp_path, tensors)
    file = (tmp_path / "model.safetensors").rename(tmp_path / "anything.safetensors")
    checkpoint = open_checkpoint(file)
    same_tensors(checkpoint, tensors)
    assert checkpoint.config == {}


def test_mixed_dtypes_scalars_empty_tensors_and_metadata(tmp_path):
    tensors = {name: torch.arange(6, dtype=dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "nothing": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same_tensors(open_checkpoint(tmp_path), tensors)


def test_a_tensor_read_is_ours_to_overwrite(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, {"a": torch.ones(2, 2)}))
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32])
def test_other_dtypes_are_refused_by_name_from_the_headers(tmp_path, dtype):
    values = torch.ones(4, 4).to(dtype)
    paths = [write(tmp_path / side, {"layers.0.q_proj.weight": values}) for side in ("a", "b")]
    base, tuned = map(open_checkpoint, paths)
    message = r"layers\.0\.q_proj\.weight in .*model\.safetensors: dtype \w+ is not"
    with pytest.raises(CheckpointError, match=message):
        match(base, tuned, Options())
    with pytest.raises(CheckpointError, match=message):
        base.read("layers.0.q_proj.weight")


# ---------------------------------------------------------------------------------------------- what is missing


def test_a_missing_path(tmp_path):
    refused(tmp_path / "nope", tmp_path / "nope", "no such file or directory")


def test_an_empty_directory(tmp_path):
    refused(tmp_path, tmp_path, "empty")


def test_a_directory_with_a_damaged_pickle(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "pytorch_model.bin", "cannot be opened as PyTorch weights")


def test_a_directory_with_one_file_of_another_name_says_what_to_do(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    refused(tmp_path, "give the file itself", tmp_path / "weights.safetensors")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    refused(tmp_path / "model.onnx", "expected a .safetensors", ".gguf file", "*.onnx")


def test_an_adapter_without_its_weights(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(tmp_path, "no adapter_model.safetensors")


# ---------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("keep", [0, 4, 20, 0.5, -1], ids=["empty", "in-length", "in-header", "half", "last-byte"])
def test_a_truncated_shard(tmp_path, keep):
    write_sharded(tmp_path, llama_tensors())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = refused(tmp_path, shard)
    assert "truncated" in message or "not a safetensors file" in message


def test_a_shard_that_shrinks_after_its_header_was_read(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, {"a": torch.ones(64, 64), "b": torch.ones(64, 64)}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ends inside tensor b"):
        checkpoint.read("b")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read tensor a"):
        checkpoint.read("a")


def test_a_header_longer_than_its_file(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 5000) + b'{"a": {}}')
    refused(tmp_path, file, "5008", "truncated")


def test_an_absurd_header_length(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(tmp_path, "not a safetensors file")


@pytest.mark.parametrize("text", ["this is not a checkpoint\n" * 10, "hi", "version https://git-lfs.github.com/spec"])
def test_a_text_file_with_the_right_name(tmp_path, text):
    (tmp_path / "model.safetensors").write_text(text)
    refused(tmp_path, tmp_path / "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"{not json", b"\xff\xfe\x00\x01", b"[1, 2]", b"3", {"a": 3}, {"a": {}}, {"a": entry() | {"shape": 4}},
        {"a": entry() | {"data_offsets": [0]}}, {"a": entry() | {"shape": ["x"]}},
    ],
)  # fmt: skip
def test_a_header_that_is_not_what_the_format_asks_for(tmp_path, header):
    raw_file(tmp_path / "model.safetensors", header, b"\0" * 16)
    refused(tmp_path, tmp_path / "model.safetensors", "not a safetensors file")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (entry(stop=12), "takes 16 bytes, not 12"),
        (entry(shape=(3, 2)), "takes 24 bytes, not 16"),
        (entry(start=16, stop=0), "takes 16 bytes"),
        (entry(start=-16, stop=0), "takes 16 bytes"),
        (entry(shape=(-2, -2)), "negative"),
        (entry(start=8, stop=24), "ends at byte"),
        (entry(dtype="Q4"), "unknown dtype Q4"),
    ],
)
def test_an_entry_that_contradicts_itself(tmp_path, tensor, words):
    raw_file(tmp_path / "model.safetensors", {"planted": tensor}, b"\0" * 16)
    refused(tmp_path, "planted", words)


LAYOUTS = {
    "trailing": ({"a": entry(), "b": entry(start=16, stop=32)}, 40, "8 bytes after its last tensor belong to no"),
    "overlap": ({"a": entry(), "b": entry(start=8, stop=24)}, 24, "tensors a and b overlap"),
    "the same bytes": ({"a": entry(), "b": entry()}, 16, "tensors a and b overlap"),
    "hole": ({"a": entry(), "b": entry(start=24, stop=40)}, 40, "8 bytes between a and tensor b belong to no tensor"),
    "hole in front": ({"a": entry(start=4, stop=20)}, 20, "4 bytes between the header and tensor a belong to no"),
    "no tensor": ({}, 16, "16 bytes after its last tensor"),
    "a name given twice": (
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}', 8, "4 bytes between the header and tensor a",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("header", "n_bytes", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_that_do_not_fill_the_file_are_refused_as_by_the_official_library(tmp_path, header, n_bytes, words):
    file = raw_file(tmp_path / "model.safetensors", header, b"\0" * n_bytes)
    refused(tmp_path, file, words, "damaged? download it again")
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass


def test_tensors_in_any_order_and_empty_ones_fill_the_file_as_for_the_official_library(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 4]}
    header = {"late": entry(start=16, stop=32), "early": entry(), "zero": empty | {"data_offsets": [16, 16]},
              "first": empty | {"data_offsets": [0, 0]}, "last": empty | {"data_offsets": [32, 32]}}  # fmt: skip
    file = raw_file(tmp_path / "model.safetensors", header, b"\0" * 32)
    with safe_open(file, "pt") as official:
        assert set(read_header(file)) == set(official.keys()) == set(header)


def test_read_header_agrees_with_the_real_writer(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"a": torch.from_numpy(values)}, tmp_path / "m.safetensors")
    info = read_header(tmp_path / "m.safetensors")["a"]
    assert (info.shape, info.dtype, info.n_bytes) == ((3, 4), "F32", 48)
    assert (tmp_path / "m.safetensors").read_bytes()[info.start : info.stop] == values.tobytes()


# ---------------------------------------------------------------------------------------------- index


def edit_index(directory, change):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_an_index_that_names_a_missing_file(tmp_path):
    write_sharded(tmp_path, llama_tensors())
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refused(tmp_path, "index.json", "model-00001-of-00002.safetensors", "does not exist")


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_that_leaves_its_directory(tmp_path, absolute):
    root = write_sharded(tmp_path / "m", llama_tensors())
    outside = tmp_path / "outside.safetensors"
    save_file({"secret": torch.ones(2)}, outside)
    target = str(outside) if absolute else "../outside.safetensors"
    edit_index(root, lambda weight_map: weight_map.update(secret=target))
    refused(root, target, "outside of its own directory")


def test_an_index_that_lists_a_tensor_its_shard_lacks(tmp_path):
    write_sharded(tmp_path, llama_tensors())
    edit_index(tmp_path, lambda weight_map: weight_map.update(ghost="model-00001-of-00002.safetensors"))
    refused(tmp_path, "ghost", "model-00001-of-00002.safetensors", "does not hold it")


def test_a_shard_that_holds_a_tensor_the_index_does_not_list(tmp_path):
    write_sharded(tmp_path, llama_tensors())
    edit_index(tmp_path, lambda weight_map: weight_map.pop("model.norm.weight"))
    refused(tmp_path, "model.norm.weight", "does not list")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{broken", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 5}}', "file name"),
        ('{"weight_map": {"a": ["x"]}}', "file name"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, words):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, tmp_path / "model.safetensors.index.json", words)


@pytest.mark.parametrize(("file", "text"), [("config.json", "{"), ("config.json", "[]"), ("adapter_config.json", "{")])
def test_a_config_that_is_no_json_object(tmp_path, file, text):
    write(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "model.safetensors").rename(tmp_path / ("adapter_" * file.startswith("adapter") + "model.safetensors"))
    (tmp_path / file).write_text(text)
    refused(tmp_path, tmp_path / file, "JSON")


def test_a_file_written_tensor_by_tensor_is_the_one_the_official_library_reads(tmp_path):
    from safetensors.torch import load_file

    from lowrank_probe.safetensors_files import write_file

    tensors = {
        "a.weight": torch.randn(3, 5), "b": torch.randn(4, 2).bfloat16().T, "empty": torch.zeros(0, 7),
        "n": torch.arange(4), "s": torch.tensor(2.5),
    }  # fmt: skip
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    infos = [(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    written = write_file(tmp_path / "x.safetensors", infos, iter(tensors.values()), {"format": "pt"})
    assert written == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="announced as F32"):
        write_file(tmp_path / "y", [("a", "F32", (2,))], [torch.zeros(2).half()], {})


# ---------------------------------------------------------------------------------------------- damaged configs


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": ["llama"]}, ("model_type is", "expected text")),
        ({"text_config": {"model_type": 3}}, ("model_type is '3'", "expected text")),
        ({"quantization_config": [1]}, ("quantization_config is '[1]'", "expected an object")),
        ({"quantization_config": {"weight_block_size": 128}}, ("weight_block_size is '128'", "two positive")),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, ("weight_block_size", "two positive")),
        ({"quantization_config": {"weight_block_size": ["a", "b"]}}, ("weight_block_size", "two positive")),
    ],
    ids=str,
)
def test_a_config_value_of_another_type_is_named(tmp_path, config, words):
    refused(write(tmp_path / "m", llama_tensors(), config), tmp_path / "m", *words)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(POINTER, ("Git LFS", "git lfs pull")), (b"<!DOCTYPE html>\n<p>Not found", ("HTML",)), (b"abc", ("3 bytes",))],
)
def test_what_lies_there_in_place_of_weights_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ("is empty", "download it again")),
        ("<html></html>", ("HTML",)),
        (POINTER.decode(), ("git lfs pull",)),
        ('{\n "model_type": llama}', ("line 2, column 16", "damaged?")),
    ],
)
def test_what_lies_there_in_place_of_a_config_is_named(tmp_path, content, words):
    write(tmp_path, {"a.weight": torch.ones(2, 2)})
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "config.json", "is not valid JSON", *words)
