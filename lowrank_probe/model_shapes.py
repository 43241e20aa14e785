"""A model's shape from whatever names it: a config, a directory, safetensors headers, a hub id, a size.

`import lowrank_probe.model_shapes` and every answer for a family of `shape_families.FAMILIES` need no torch and no
transformers; an architecture that is not among them is built by transformers on the meta device, and `source` says so.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from lowrank_probe import hub
from lowrank_probe.errors import CheckpointError
from lowrank_probe.quantization_codes import quantization_method
from lowrank_probe.remote_files import File, RemoteFile, locate
from lowrank_probe.safetensors_headers import read_header, read_json
from lowrank_probe.shape_families import FAMILIES, family_shape, is_known
from lowrank_probe.shape_headers import check_headers, headers_in, shape_of_headers
from lowrank_probe.typical_shapes import typical_shape
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight

__all__ = ["Kind", "ModelShape", "Weight", "model_shape", "shape_of_config", "typical_shape"]

_DEPTHS: Final = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers", "encoder_layers",
                  "decoder_layers")  # fmt: skip
_MOST_LAYERS: Final = 10_000  # ten times the deepest that was published
_MOST: Final = 2**31 - 1  # of any other size: a vocabulary, a width


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Every weight of the model that a config (config.json as a dict) describes.

    Raises `CheckpointError` naming a field that is missing or no size; for an architecture that transformers does not
    know either; for a config without a model type.
    """
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"config has no model_type (expected one such as {', '.join(list(FAMILIES)[:3])}; it has "
            f"{', '.join(sorted(map(str, config))[:5]) or 'no field'}); give a model's own config.json"
        )
    _check_sizes(config)
    if is_known(config):
        shape = family_shape(config)
    else:
        from lowrank_probe.built_shapes import built_shape

        shape = built_shape(config)
    method = quantization_method(config) or ("an unnamed method" if config.get("quantization_config") else "")
    if not method:
        return shape
    note = (
        f"its config says that the weights are quantized ({method}): every number here is of the model as it trains, "
        "in 16 or 32 bits (qlora: in bitsandbytes' NF4), not of those files"
    )
    return replace(shape, notes=(*shape.notes, note))


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a size that no model has: building a billion layers would take all memory."""
    for part in (config, *(inner for inner in config.values() if isinstance(inner, Mapping))):
        for name, value in part.items():
            deep = name in _DEPTHS
            if isinstance(value, int) and value > (_MOST_LAYERS if deep else _MOST):
                most = f"{_MOST_LAYERS:,} layers" if deep else f"{_MOST:,}"
                raise CheckpointError(f"config: {name} is {value}, expected at most {most}; a typing error?")


def model_shape(source: str | os.PathLike[str] | Mapping[str, Any] | ModelShape) -> ModelShape:
    """The shape of a model, allocating and downloading none of it.

    source: a config as a dict; a config.json; a model's directory, whose safetensors headers must agree with its
    config; a safetensors file, with the config.json beside it where there is one; a hub id (`owner/name`,
    `owner/name@revision`) where no such path exists, of which the config alone is downloaded; the address of such a
    directory or file (`checkpoints.open_checkpoint`), of which config and headers are read; a shape, given back.

    Raises `CheckpointError`: nothing there, an adapter, a config as in `shape_of_config`, headers that contradict it.
    """
    if isinstance(source, ModelShape):
        return source
    if isinstance(source, Mapping):
        return shape_of_config(source)
    text = os.fspath(source)
    path = locate(text)
    if isinstance(path, Path) and (not text or not path.exists()):
        if not hub.is_hub_id(text):
            raise CheckpointError(hub.no_such(text))
        return replace(_read(hub.download_config(text)), source=f"config.json of {text} on the hub")
    if path.is_dir():
        return _directory(path)
    return _read(path) if path.suffix == ".json" else _file(path)


def _directory(root: File) -> ModelShape:
    config = root / "config.json"
    if not config.exists() and (root / "adapter_config.json").exists():
        raise _an_adapter(root, root / "adapter_config.json")
    headers = headers_in(root)
    if config.exists():
        shape = _read(config)
        if not headers:
            return shape
        notes = check_headers(shape, headers, root)
        return replace(shape, source=f"{shape.source}, safetensors headers", notes=(*shape.notes, *notes))
    if not headers and isinstance(root, RemoteFile):
        raise root.nothing_found("config.json, model.safetensors or its index")
    if not headers:
        assert isinstance(root, Path)
        found = sorted(file.name for file in root.iterdir())
        raise CheckpointError(
            f"{root}: expected config.json, model.safetensors or its index, found "
            f"{', '.join(found[:5]) or 'an empty directory'}"
        )
    return shape_of_headers(headers, root)


def _an_adapter(path: File, config: File) -> CheckpointError:
    base = read_json(config).get("base_model_name_or_path") if config.exists() else None
    return CheckpointError(f"{path}: is an adapter, not a model; give its base model{f', {base}' if base else ''}")


def _file(path: File) -> ModelShape:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: expected a directory, config.json, .safetensors file or hub id, found a file named *{path.suffix}"
        )
    headers, config = read_header(path), path.parent / "config.json"
    if any(".lora_A." in name or ".lora_embedding_A" in name for name in headers):
        raise _an_adapter(path, path.parent / "adapter_config.json")
    if path.name == "model.safetensors" and config.exists():
        return _directory(path.parent)
    return shape_of_headers(headers, path)


def _read(file: File) -> ModelShape:
    """The shape that a config.json, or the directory of an index of shards, describes."""
    if file.name.endswith(".index.json"):
        return _directory(file.parent)
    if file.name == "adapter_config.json":
        raise _an_adapter(file, file)
    try:
        return shape_of_config(read_json(file))
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(str(file)) else f"{file}: {told}") from None
