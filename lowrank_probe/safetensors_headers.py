"""The headers of safetensors files, and the index of a checkpoint in shards, checked. No torch.

Source: the safetensors specification, version 0.4.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_files import File, RemoteFile, read_span, read_text, size_of
from lowrank_probe.tensor_info import WIDTHS, TensorInfo

MAX_HEADER: Final = 100_000_000
_CONNECTIONS: Final = 8


def read_header(file: File) -> dict[str, TensorInfo]:
    """name → `TensorInfo` of one safetensors file, checked against each tensor's shape, the others and the file's size.

    As in the official library the tensors must fill the file from the header to its end without hole or overlap.
    """
    try:
        size = size_of(file)
        prefix = read_span(file, 0, 8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER:
            raise CheckpointError(f"{file}: not a safetensors file ({what_begins_so(prefix, size)})")
        if 8 + length > size:
            raise CheckpointError(
                f"{file}: its header says {8 + length} bytes but the file has {size}; truncated? download it again"
            )
        raw = read_span(file, 8, 8 + length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        infos = {
            name: TensorInfo(
                name, tuple(map(int, entry["shape"])), str(entry["dtype"]), file,
                8 + length + int(entry["data_offsets"][0]), 8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise CheckpointError(
            f"{file}: not a safetensors file (its header is not the JSON the format asks for)"
        ) from None
    for info in infos.values():
        expected = _n_bytes(info)
        if info.start < 8 + length or info.n_bytes != expected:
            raise CheckpointError(
                f"{file}: tensor {info.name} {info.dtype} {info.shape} takes {expected} bytes, not {info.n_bytes}"
            )
        if info.stop > size:
            raise CheckpointError(
                f"{file}: tensor {info.name} ends at byte {info.stop} of {size}; truncated? download it again"
            )
    _check_layout(file, infos, 8 + length, size)
    return infos


def _check_layout(file: File, infos: dict[str, TensorInfo], start: int, size: int) -> None:
    """Raise `CheckpointError` unless the tensors follow each other from byte `start` to byte `size`, the end."""
    end, before = start, "the header"
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.start < end:
            raise CheckpointError(f"{file}: tensors {before} and {info.name} overlap; damaged? download it again")
        if info.start > end:
            hole = f"{info.start - end} bytes between {before} and tensor {info.name} belong to no tensor"
            raise CheckpointError(f"{file}: {hole}; damaged? download it again")
        end, before = info.stop, info.name
    if end < size:
        raise CheckpointError(
            f"{file}: {size - end} bytes after its last tensor belong to no tensor (it should end at byte {end}); "
            "damaged? download it again"
        )


def _n_bytes(info: TensorInfo) -> int:
    if info.dtype not in WIDTHS:
        raise CheckpointError(f"{info.file}: tensor {info.name} has unknown dtype {info.dtype}")
    count = 1
    for length in info.shape:
        if length < 0:
            raise CheckpointError(f"{info.file}: tensor {info.name} has a negative length in its shape {info.shape}")
        count *= length
    return int(count * WIDTHS[info.dtype])


def read_index(
    index: File, tensors_of: Callable[[File], Mapping[str, TensorInfo]] = read_header
) -> dict[str, TensorInfo]:
    """name → `TensorInfo` of all shards that an index lists, each opened by `tensors_of`, a few at once over a network.

    Raises `CheckpointError` for a shard that is missing, lies outside the directory or does not hold what is said.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map must give a file name for every tensor")

    def shard(name: str) -> Mapping[str, TensorInfo]:
        # The path as the index writes it; the file itself may be a link (hub caches link every shard).
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: names {name}, outside of its own directory")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index}: names {name}, which does not exist; is the download complete?")
        return tensors_of(index.parent / name)

    names = sorted(set(weight_map.values()))
    if isinstance(index, RemoteFile):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            opened = list(pool.map(shard, names))
    else:
        opened = list(map(shard, names))
    shards = dict(zip(names, opened, strict=True))
    tensors = {}
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            raise CheckpointError(f"{index}: says {tensor} is in {file}, which does not hold it")
        tensors[tensor] = shards[file][tensor]
    for file, infos in shards.items():
        extra = [name for name in infos if name not in tensors]
        if extra:
            raise CheckpointError(f"{index}: {file} holds {extra[0]}, which the index does not list")
    return tensors


def read_json(file: File) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` where it is none."""
    try:
        value = json.loads(read_text(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: is not valid JSON ({_what_is_there(file)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def what_begins_so(prefix: bytes, size: int) -> str:
    """What a file is that should hold weights and does not, and the mend. prefix: its first 8 bytes.

    >>> what_begins_so(b"version ", 134)
    'a pointer of Git LFS, 134 bytes: git lfs pull fetches the file itself'
    """
    if prefix == b"version ":
        return f"a pointer of Git LFS, {size} bytes: git lfs pull fetches the file itself"
    if prefix.lstrip()[:1] == b"<":
        return "a page of HTML or XML, as servers send in place of a file: download it again"
    if size < 8:
        return f"it has {size} bytes; download it again"
    return "no valid header length in its first 8 bytes"


def _what_is_there(file: File) -> str:
    """What a file that should be JSON holds, and the mend."""
    try:
        text = read_text(file).strip()
        json.loads(text)
    except json.JSONDecodeError as error:
        if not text:
            return "it is empty; download it again"
        if text.startswith("<"):
            return "a page of HTML or XML, as servers send in place of a file that is not there"
        if text.startswith("version https://git-lfs"):
            return "a pointer of Git LFS: git lfs pull fetches the file itself"
        return f"{error.msg} at line {error.lineno}, column {error.colno}; damaged? download it again"
    except (OSError, ValueError, RecursionError) as error:
        return str(error).partition("\n")[0]
    return "it changed just now"
