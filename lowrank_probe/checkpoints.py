"""`Checkpoint`: a model or adapter, from wherever it lies; headers now, tensors on demand, one at a time."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe import hub, quantized
from lowrank_probe.adapter_format import CONFIG, WEIGHTS
from lowrank_probe.errors import CheckpointError
from lowrank_probe.gguf_files import open_gguf
from lowrank_probe.memory import open_memory
from lowrank_probe.pickles import open_pickle
from lowrank_probe.quantization_codes import refuse_codes
from lowrank_probe.remote_files import File, RemoteFile, locate, refuse_addresses
from lowrank_probe.safetensors_files import read_entries, read_runs
from lowrank_probe.safetensors_headers import read_header, read_index, read_json
from lowrank_probe.tensor_info import FLOATS, Loader, Opened, TensorInfo
from lowrank_probe.torch_dtypes import TORCH_DTYPES

# What a user may give as one side of a comparison: a path, address or hub id, a state dict, or a model.
Source = str | os.PathLike[str] | Mapping[str, Tensor] | Any

_TOKENIZER: Final = re.compile(
    r"(?:tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template.*|.*\.model|.*\.spm)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's headers, and how to read its tensors.

    tensors: name → `TensorInfo`. config: config.json or adapter_config.json. loaders: name → a function that gives rows
    of the tensor, for those that do not lie in a safetensors file. scales: fp8 weight → its scale tensor. notes: what a
    user should know of how it was opened.
    """

    path: File
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)
    is_adapter: bool = False
    loaders: Mapping[str, Loader] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[File]:
        """The files the tensors lie in; none for a model in memory."""
        return sorted((file for file in {info.file for info in self.tensors.values()} if file.exists()), key=str)

    @property
    def local_path(self) -> Path:
        """Its path on this machine. Raises `CheckpointError` where it is read over a network."""
        refuse_addresses(str(self.path))
        return Path(str(self.path))

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file over a network is another than when it was opened."""
        if isinstance(self.path, RemoteFile):
            self.path.store.check_unchanged()

    @property
    def other_files(self) -> list[Path]:
        """What lies beside the weights and the config in its directory: tokenizer, chat template, licence, …

        Of a directory over a network nothing: plain HTTP has no list of files.
        """
        if not isinstance(self.path, Path) or not self.path.is_dir():
            return []
        known = ("config.json", CONFIG)
        return [
            file for file in sorted(self.path.iterdir())
            if file.is_file() and not file.name.startswith(".") and file.name not in known
            and not file.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        ]  # fmt: skip

    @property
    def tokenizer_files(self) -> list[Path]:
        """Those of `other_files` that are a tokenizer's, with its chat template."""
        return [file for file in self.other_files if _TOKENIZER.fullmatch(file.name)]

    def read(self, name: str, device: str | torch.device = "cpu", span: tuple[int, int] | None = None) -> Tensor:
        """One tensor in its stored dtype, float32 where that is quantized; not to be written to (it may be a user's).

        span: (first entry, number of entries) of a run of the flat tensor, (entries,), where only that is wanted.
        Raises `CheckpointError` for a dtype that is not a float of ≥ 16 bits and has no scale, and for damaged files.
        """
        info = self.tensors[name]
        info.check_dtype()
        first, count = span or (0, math.prod(info.shape))
        shape = info.shape if span is None else (count,)
        if self.lies_flat(name):
            straight = device if torch.device(device).type == "cuda" else "cpu"
            return read_entries(info, first, count, straight).reshape(shape).to(device)
        width = max(1, math.prod(info.shape[1:]))
        start, stop = first // width, -(-(first + count) // width)
        rows = self._dequantized(name, start, stop) if name in self.scales else self._rows(name, start, stop)
        first -= start * width
        return rows.reshape(-1)[first : first + count].reshape(shape).to(device)

    def lies_flat(self, name: str) -> bool:
        """Whether the tensor lies in a safetensors file as its values are, floats of ≥ 16 bits (for `read_runs`)."""
        return self.tensors[name].dtype in FLOATS and name not in self.loaders and name not in self.scales

    def read_runs(self, name: str, first: int, counts: Sequence[int], device: torch.device) -> Iterator[Tensor]:
        """Entries of the flat tensor from `first` on, one run of `counts` after the other, in one pass over the file.

        Only of one that `lies_flat`; raises `CheckpointError` for damaged files.
        """
        straight = device if device.type == "cuda" else torch.device("cpu")
        return (run.to(device) for run in read_runs(self.tensors[name], first, counts, straight))

    def read_stored(self, name: str) -> Tensor:
        """One tensor as it is stored, whatever its dtype. Raises `CheckpointError` where torch has no such dtype."""
        info = self.tensors[name]
        if name not in self.loaders and info.dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{name} in {info.file}: dtype {info.dtype} cannot be read")
        return self._rows(name, 0, info.shape[0] if info.shape else 1).reshape(info.shape)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor's first dimension, as they are stored."""
        if name in self.loaders:
            return self.loaders[name](start, stop)
        shape = self.tensors[name].shape[1:]
        width = math.prod(shape)
        return read_entries(self.tensors[name], start * width, (stop - start) * width).reshape(stop - start, *shape)

    def _dequantized(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of an fp8 tensor; of a stack of experts only those are read, a matrix is read whole."""
        info, scale = self.tensors[name], self.read(self.scales[name])
        block = (self.config.get("quantization_config") or {}).get("weight_block_size")
        count = info.shape[0] if info.shape else 1
        stacked = len(info.shape) == 3
        if stacked and scale.ndim and len(scale) == count:
            scale = scale[start:stop]
        elif stacked and scale.numel() > 1:
            raise CheckpointError(
                f"{name} in {info.file}: its scale is {tuple(scale.shape)} for {count} experts {info.shape[1:]}; leave "
                "it out with --exclude, or convert the checkpoint again"
            )
        W = self._rows(name, start, stop) if stacked else self._rows(name, 0, count)
        try:
            values = quantized.dequantize_fp8(W, scale, (block[0], block[1]) if block else None)
        except ValueError as error:
            raise CheckpointError(f"{name} in {info.file}: {error}") from None
        return values if stacked else values[start:stop]


def open_checkpoint(source: Source) -> Checkpoint:
    """Read the headers of a checkpoint: what matching needs, and no tensor.

    A directory (model.safetensors or pytorch_model.bin, or shards of either with an index), one `.safetensors`, `.bin`,
    `.pt`, `.pth` or `.gguf` file, a PEFT adapter's directory, a hub id where no such path exists (`owner/name`,
    `owner/name@revision`), a model or a state dict in memory; safetensors and adapters also by the address of a
    directory or file (`https://…`, or any that fsspec reads: `s3://…`, `gs://…`, `hf://…`), from which then no more is
    read than the headers and each tensor when it is asked for.

    Raises `CheckpointError` naming the file: missing or empty directory, truncated shard, an index that names a
    missing file, a tensor its shard lacks, or a path outside the directory, a header longer than the file, a pickle
    that holds more than tensors, a quantized format whose tensors are codes; a server without range requests.
    """
    if not isinstance(source, str | os.PathLike):
        (infos, loaders), config, described = open_memory(source)
        return _checked(Checkpoint(Path(described), infos, config, loaders=loaders))
    text = os.fspath(source)
    root = locate(text)
    notes: tuple[str, ...] = ()
    if isinstance(root, Path) and (not text or not root.exists()):
        if not hub.is_hub_id(text):
            raise CheckpointError(hub.no_such(text))
        root = hub.download(text)
        notes = (f"{text} is no path here: taken from the hub (snapshot {root.name[:12]})",)
    opened = _open_file(root) if root.is_file() else _open_directory(root)
    return _checked(replace(opened, notes=notes))


def _checked(side: Checkpoint) -> Checkpoint:
    """The checkpoint with its fp8 scales found and its quantized tensors marked; refused where they are codes, or where
    its config is damaged.
    """
    if not side.tensors:
        raise CheckpointError(f"{side.path}: holds no tensor (expected weights); is the right file given?")
    _check_config(side)
    refuse_codes(side.path, side.tensors, side.config)
    scales = quantized.fp8_scales(side.path, side.tensors, side.config)
    tensors = {name: replace(info, quantized=True) if name in scales else info for name, info in side.tensors.items()}
    return replace(side, tensors=tensors, scales=scales)


def _check_config(side: Checkpoint) -> None:
    """Raise `CheckpointError` where a key that is read has a value of another type, also in a part for one tower."""
    todo = [side.config]
    while todo:
        config = todo.pop()
        todo += [value for value in config.values() if isinstance(value, Mapping)]
        block = config.get("weight_block_size")
        wrong = {
            "model_type": not isinstance(config.get("model_type"), str | None) and "text",
            "quantization_config": not isinstance(config.get("quantization_config"), Mapping | None) and "an object",
            "weight_block_size": block is not None and not _is_block(block) and "two positive whole numbers",
        }
        for key, expected in wrong.items():
            if expected:
                raise CheckpointError(
                    f"{side.path}: its config says {key} is {str(config[key])[:60]!r}, expected {expected}; damaged? "
                    "download it again"
                )


def all_on_disk(*sides: Checkpoint | None) -> bool:
    """Whether all that there are lie in files of this machine, which forked processes can read, too."""
    return all(isinstance(side.path, Path) and bool(side.files) for side in sides if side is not None)


def _is_block(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(length, int) and length > 0 for length in value)
    )


_PICKLES: Final = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf", *_PICKLES)


def _open_file(file: File) -> Checkpoint:
    if file.suffix == ".safetensors":
        return Checkpoint(file, read_header(file))
    if isinstance(file, RemoteFile):
        raise CheckpointError(
            f"{file}: over a network only safetensors can be read tensor by tensor, not *{file.suffix}; download it "
            "and give the file, or save it as safetensors there"
        )
    if file.suffix in _PICKLES:
        infos, loaders = open_pickle(file)
        return Checkpoint(file, infos, loaders=loaders)
    if file.suffix == ".gguf":
        (infos, loaders), config = open_gguf(file)
        return Checkpoint(file, infos, config, loaders=loaders)
    raise CheckpointError(
        f"{file}: expected a .safetensors, .bin, .pt, .pth or .gguf file or a directory, found a file named "
        f"*{file.suffix}"
    )


def _open_directory(root: File) -> Checkpoint:
    if (root / CONFIG).exists():
        config = read_json(root / CONFIG)
        for name in (WEIGHTS, "adapter_model.bin"):
            if (root / name).exists():
                return replace(_open_file(root / name), path=root, config=config, is_adapter=True)
        raise CheckpointError(f"{root}: has {CONFIG} but no {WEIGHTS}")
    config = read_json(root / "config.json") if (root / "config.json").exists() else {}
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (root / f"{stem}.index.json").exists():
            infos, loaders = _read_index(root / f"{stem}.index.json")
            return Checkpoint(root, infos, config, loaders=loaders)
        if (root / stem).exists():
            return replace(_open_file(root / stem), path=root, config=config)
    if isinstance(root, RemoteFile):
        raise root.nothing_found(f"model.safetensors.index.json, model.safetensors, {CONFIG} with {WEIGHTS}")
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


def _read_index(index: File) -> Opened:
    loaders: dict[str, Loader] = {}

    def tensors_of(file: File) -> Mapping[str, TensorInfo]:
        shard = _open_file(file)
        loaders.update(shard.loaders)
        return shard.tensors

    return read_index(index, tensors_of), loaders
