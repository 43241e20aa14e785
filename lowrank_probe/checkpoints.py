"""`Checkpoint`: a model or adapter, from wherever it lies; headers now, tensors on demand, one at a time."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe import formats
from lowrank_probe.errors import CheckpointError
from lowrank_probe.safetensors_files import read_entries, read_header
from lowrank_probe.tensor_info import TORCH_DTYPES, TensorInfo

# What a user may give as one side of a comparison: a path or hub id, a state dict, or a model.
Source = str | os.PathLike[str] | Mapping[str, Tensor] | Any


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, and how to read its tensors.

    tensors: name → `TensorInfo`. config: config.json or adapter_config.json. loaders: name → a function that gives the
    tensor, for those that do not lie in a safetensors file. scales: fp8 weight → its scale tensor. notes: what a user
    should know of how it was opened.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool = False
    loaders: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """The files the tensors lie in; none for a model in memory."""
        return sorted({info.file for info in self.tensors.values() if info.file.exists()})

    @property
    def other_files(self) -> list[Path]:
        """What lies beside the weights and the config in its directory: tokenizer, chat template, licence, …"""
        if not self.path.is_dir():
            return []
        known = ("config.json", "adapter_config.json")
        return [
            file for file in sorted(self.path.iterdir())
            if file.is_file() and not file.name.startswith(".") and file.name not in known
            and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        ]  # fmt: skip

    def read(self, name: str, device: str | torch.device = "cpu", span: tuple[int, int] | None = None) -> Tensor:
        """One tensor in its stored dtype, float32 where that is quantized; not to be written to (it may be a user's).

        span: (first entry, number of entries) of a run of the flat tensor, (entries,), where only that is wanted.
        Raises `CheckpointError` for a dtype that is not a float of ≥ 16 bits and has no scale, and for damaged files.
        """
        info = self.tensors[name]
        info.check_dtype()
        first, count = span or (0, math.prod(info.shape))
        shape = info.shape if span is None else (count,)
        if name in self.loaders or name in self.scales:
            whole = self.loaders[name]() if name in self.loaders else self._dequantized(name)
            return whole.reshape(-1)[first : first + count].reshape(shape).to(device)
        if torch.device(device).type == "cuda":  # straight there
            return read_entries(info, first, count, device).reshape(shape)
        return read_entries(info, first, count).reshape(shape).to(device)

    def read_stored(self, name: str) -> Tensor:
        """One tensor as it is stored, whatever its dtype. Raises `CheckpointError` where torch has no such dtype."""
        info = self.tensors[name]
        if name in self.loaders:
            return self.loaders[name]()
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name} in {info.file}: dtype {info.dtype} cannot be read")
        return read_entries(info, 0, math.prod(info.shape)).reshape(info.shape)

    def _dequantized(self, name: str) -> Tensor:
        info, scale_info = self.tensors[name], self.tensors[self.scales[name]]
        W = read_entries(info, 0, math.prod(info.shape)).reshape(info.shape)
        scale = read_entries(scale_info, 0, math.prod(scale_info.shape)).reshape(scale_info.shape)
        quantization = self.config.get("quantization_config") or {}
        block = quantization.get("weight_block_size")
        try:
            return formats.dequantize_fp8(W, scale, (int(block[0]), int(block[1])) if block else None)
        except ValueError as error:
            raise CheckpointError(f"{name} in {info.file}: {error}") from None


def open_checkpoint(source: Source) -> Checkpoint:
    """Read the headers of a checkpoint: what matching needs, and no tensor.

    A directory (model.safetensors or pytorch_model.bin, or shards of either with an index), one `.safetensors`, `.bin`,
    `.pt`, `.pth` or `.gguf` file, a PEFT adapter's directory, a hub id where no such path exists (`owner/name`,
    `owner/name@revision`), a model or a state dict in memory.

    Raises `CheckpointError` naming the file: missing or empty directory, truncated shard, an index that names a
    missing file, a tensor its shard lacks, or a path outside the directory, a header longer than the file, a pickle
    that holds more than tensors, a quantized format whose tensors are codes.
    """
    if not isinstance(source, str | os.PathLike):
        (infos, loaders), config, described = formats.open_memory(source)
        return _checked(Checkpoint(Path(described), infos, config, loaders=loaders))
    root = Path(source)
    notes: tuple[str, ...] = ()
    if not root.exists():
        if not formats.is_hub_id(os.fspath(source)):
            raise CheckpointError(
                f"{root}: no such file or directory (expected a checkpoint directory, file or hub id)"
            )
        root = formats.download(os.fspath(source))
        notes = (f"{source} is no path here: taken from the hub (snapshot {root.name[:12]})",)
    opened = _open_file(root) if root.is_file() else _open_directory(root)
    return _checked(replace(opened, notes=notes))


def _checked(side: Checkpoint) -> Checkpoint:
    """The checkpoint with its fp8 scales found and its quantized tensors marked; refused where they are codes."""
    formats.refuse_codes(side.path, side.tensors, side.config)
    scales = formats.fp8_scales(side.path, side.tensors, side.config)
    tensors = {name: replace(info, quantized=True) if name in scales else info for name, info in side.tensors.items()}
    return replace(side, tensors=tensors, scales=scales)


_PICKLES: Final = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf", *_PICKLES)


def _open_file(file: Path) -> Checkpoint:
    if file.suffix == ".safetensors":
        return Checkpoint(file, read_header(file))
    if file.suffix in _PICKLES:
        infos, loaders = formats.open_pickle(file)
        return Checkpoint(file, infos, loaders=loaders)
    if file.suffix == ".gguf":
        (infos, loaders), config = formats.open_gguf(file)
        return Checkpoint(file, infos, config, loaders=loaders)
    raise CheckpointError(
        f"{file}: expected a .safetensors, .bin, .pt, .pth or .gguf file or a directory, found a file named "
        f"*{file.suffix}"
    )


def _open_directory(root: Path) -> Checkpoint:
    if (root / "adapter_config.json").exists():
        config = read_json(root / "adapter_config.json")
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (root / name).exists():
                return replace(_open_file(root / name), path=root, config=config, is_adapter=True)
        raise CheckpointError(f"{root}: has adapter_config.json but no adapter_model.safetensors")
    config = read_json(root / "config.json") if (root / "config.json").exists() else {}
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (root / f"{stem}.index.json").exists():
            infos, loaders = _read_index(root / f"{stem}.index.json")
            return Checkpoint(root, infos, config, loaders=loaders)
        if (root / stem).exists():
            return replace(_open_file(root / stem), path=root, config=config)
    broken = [p for p in sorted(root.iterdir()) if p.is_symlink() and not p.exists()]
    if broken:
        raise CheckpointError(f"{broken[0]}: is a link to a file that is not there; is the download complete?")
    found = sorted(p.name for p in root.iterdir())
    if not found:
        raise CheckpointError(
            f"{root}: the directory is empty (expected model.safetensors, shards with an index, or an adapter)"
        )
    listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    weights = [name for name in found if name.endswith(WEIGHT_SUFFIXES)]
    hint = f"; give the file itself, such as {root / weights[0]}" if weights else ""
    raise CheckpointError(
        f"{root}: expected model.safetensors, pytorch_model.bin, an index of shards or adapter_config.json, found "
        f"{listed}{hint}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` where it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file}: is not valid JSON") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_index(index: Path) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], Tensor]]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: its weight_map must give a file name for every tensor")
    root = index.parent.resolve()
    shards: dict[str, Mapping[str, TensorInfo]] = {}
    loaders: dict[str, Callable[[], Tensor]] = {}
    for name in sorted(set(weight_map.values())):
        # The path as the index writes it; the file itself may be a link (hub caches link every shard).
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: names {name}, outside of its own directory")
        if not (root / name).exists():
            raise CheckpointError(f"{index}: names {name}, which does not exist; is the download complete?")
        shard = _open_file(index.parent / name)
        shards[name] = shard.tensors
        loaders.update(shard.loaders)
    tensors = {}
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            raise CheckpointError(f"{index}: says {tensor} is in {file}, which does not hold it")
        tensors[tensor] = shards[file][tensor]
    for file, infos in shards.items():
        extra = [name for name in infos if name not in tensors]
        if extra:
            raise CheckpointError(f"{index}: {file} holds {extra[0]}, which the index does not list")
    return tensors, loaders
