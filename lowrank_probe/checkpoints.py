"""`Checkpoint`: a model or adapter directory; headers now, tensors on demand, one at a time.

Reads the safetensors format itself (an 8-byte length, a JSON header, raw little-endian data): the header tells
everything that matching needs, a tensor is read with one positioned read into memory that we own, and every fault of
a file becomes one clear line. Source of the format: the safetensors specification, version 0.4.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.errors import CheckpointError

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Width in bytes of every dtype a safetensors header may name; only `DTYPES` can be read as weights.
WIDTHS: Final[dict[str, float]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75,
    "F6_E3M2": 0.75, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
MAX_HEADER: Final = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: shape, dtype as the header names it, file, and byte range in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    stop: int

    @property
    def n_bytes(self) -> int:
        return self.stop - self.start

    def check_dtype(self) -> None:
        """Raise `CheckpointError` for a dtype that is not a float of at least 16 bits."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.name} in {self.file}: dtype {self.dtype} is not supported (expected one of "
                f"{', '.join(DTYPES)}); dequantize or convert the checkpoint first, or leave it out with --exclude"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers. `tensors`: name → `TensorInfo`; `config`: config.json or adapter_config.json."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool = False

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """One tensor, in its stored dtype. Raises `CheckpointError` for a dtype that is not a float of ≥ 16 bits."""
        info = self.tensors[name]
        info.check_dtype()
        raw = torch.empty(info.n_bytes, dtype=torch.uint8)
        if info.n_bytes:
            view = memoryview(raw.numpy().data)
            try:
                with open(info.file, "rb", buffering=0) as handle:
                    handle.seek(info.start)
                    filled = 0
                    while filled < info.n_bytes:
                        got = handle.readinto(view[filled:])
                        if not got:
                            raise CheckpointError(
                                f"{info.file}: ends inside tensor {info.name} (changed while it was read?)"
                            )
                        filled += got
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot read tensor {info.name}: {error.strerror}") from None
        return raw.view(DTYPES[info.dtype]).reshape(info.shape).to(device)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a directory (one file, or shards with an index), a `.safetensors` file, or a PEFT adapter.

    Raises `CheckpointError` naming the file: missing or empty directory, truncated shard, an index that names a
    missing file, a tensor its shard lacks, or a path outside the directory, a header longer than the file.
    """
    root = Path(path)
    if not root.exists():
        raise CheckpointError(
            f"{root}: no such file or directory (expected a checkpoint directory or .safetensors file)"
        )
    if root.is_file():
        if root.suffix != ".safetensors":
            raise CheckpointError(
                f"{root}: expected a .safetensors file or a directory, found a file named *{root.suffix}"
            )
        return Checkpoint(root, read_header(root))
    if (root / "adapter_config.json").exists():
        weights = root / "adapter_model.safetensors"
        if not weights.exists():
            raise CheckpointError(f"{root}: has adapter_config.json but no adapter_model.safetensors")
        return Checkpoint(root, read_header(weights), read_json(root / "adapter_config.json"), is_adapter=True)
    config = read_json(root / "config.json") if (root / "config.json").exists() else {}
    index, single = root / "model.safetensors.index.json", root / "model.safetensors"
    if index.exists():
        return Checkpoint(root, _read_index(index), config)
    if single.exists():
        return Checkpoint(root, read_header(single), config)
    found = sorted(p.name for p in root.iterdir())
    if not found:
        raise CheckpointError(
            f"{root}: the directory is empty (expected model.safetensors, shards with an index, or an adapter)"
        )
    listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    hint = ""
    if any(name.endswith((".bin", ".pt", ".pth")) for name in found):
        hint = "; convert pickled weights with transformers' save_pretrained first"
    elif len([name for name in found if name.endswith(".safetensors")]) == 1:
        hint = "; give the .safetensors file itself"
    raise CheckpointError(
        f"{root}: expected model.safetensors, model.safetensors.index.json or adapter_config.json, found {listed}{hint}"
    )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """name → `TensorInfo` of one safetensors file, checked against the file's size and each tensor's shape."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            prefix = handle.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER:
                raise CheckpointError(f"{file}: not a safetensors file (no valid header length in its first 8 bytes)")
            if 8 + length > size:
                raise CheckpointError(
                    f"{file}: its header says {8 + length} bytes but the file has {size}; truncated? download it again"
                )
            raw = handle.read(length)
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
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
    return infos


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{file}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_index(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map must give a file name for every tensor")
    root = index.parent.resolve()
    shards: dict[str, dict[str, TensorInfo]] = {}
    for name in sorted(set(weight_map.values())):
        # The path as the index writes it; the file itself may be a link (hub caches link every shard).
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: names {name}, outside of its own directory")
        if not (root / name).exists():
            raise CheckpointError(f"{index}: names {name}, which does not exist; is the download complete?")
        shards[name] = read_header(index.parent / name)
    tensors = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise CheckpointError(f"{index}: says {tensor} is in {shard}, which does not hold it")
        tensors[tensor] = shards[shard][tensor]
    for shard, infos in shards.items():
        extra = [name for name in infos if name not in tensors]
        if extra:
            raise CheckpointError(f"{index}: {shard} holds {extra[0]}, which the index does not list")
    return tensors


def _n_bytes(info: TensorInfo) -> int:
    if info.dtype not in WIDTHS:
        raise CheckpointError(f"{info.file}: tensor {info.name} has unknown dtype {info.dtype}")
    count = 1
    for length in info.shape:
        if length < 0:
            raise CheckpointError(f"{info.file}: tensor {info.name} has a negative length in its shape {info.shape}")
        count *= length
    return int(count * WIDTHS[info.dtype])
