"""A model's shape from whatever names it: a config, a directory, safetensors headers, a hub id, a size.

`import lowrank_probe.model_shapes` and every answer for a family of `shape_families.FAMILIES` need no torch and no
transformers; an architecture that is not among them is built by transformers on the meta device, and `source` says so.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank_probe import hub
from lowrank_probe.errors import CheckpointError
from lowrank_probe.safetensors_headers import read_header, read_json
from lowrank_probe.shape_families import FAMILIES, family_shape, is_known
from lowrank_probe.shape_headers import check_headers, headers_in, shape_of_headers
from lowrank_probe.typical_shapes import typical_shape
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight

__all__ = ["Kind", "ModelShape", "Weight", "model_shape", "shape_of_config", "typical_shape"]


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
    if is_known(config):
        return family_shape(config)
    from lowrank_probe.built_shapes import built_shape

    return built_shape(config)


def model_shape(source: str | os.PathLike[str] | Mapping[str, Any] | ModelShape) -> ModelShape:
    """The shape of a model, allocating and downloading none of it.

    source: a config as a dict; a config.json; a model's directory, whose safetensors headers must agree with its
    config; a safetensors file, with the config.json beside it where there is one; a hub id (`owner/name`,
    `owner/name@revision`) where no such path exists, of which the config alone is downloaded; a shape, given back.

    Raises `CheckpointError`: nothing there, an adapter, a config as in `shape_of_config`, headers that contradict it.
    """
    if isinstance(source, ModelShape):
        return source
    if isinstance(source, Mapping):
        return shape_of_config(source)
    text = os.fspath(source)
    path = Path(text)
    if not text or not path.exists():
        if not hub.is_hub_id(text):
            raise CheckpointError(hub.no_such(text))
        return replace(_read(hub.download_config(text)), source=f"config.json of {text} on the hub")
    if path.is_dir():
        return _directory(path)
    return _read(path) if path.suffix == ".json" else _file(path)


def _directory(root: Path) -> ModelShape:
    config = root / "config.json"
    if not config.exists() and (root / "adapter_config.json").exists():
        base = read_json(root / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(f"{root}: is an adapter, not a model; give its base model{f', {base}' if base else ''}")
    headers = headers_in(root)
    if config.exists():
        shape = _read(config)
        if not headers:
            return shape
        notes = check_headers(shape, headers, root)
        return replace(shape, source=f"{shape.source}, safetensors headers", notes=(*shape.notes, *notes))
    if not headers:
        found = sorted(file.name for file in root.iterdir())
        raise CheckpointError(
            f"{root}: expected config.json, model.safetensors or its index, found "
            f"{', '.join(found[:5]) or 'an empty directory'}"
        )
    return shape_of_headers(headers, root)


def _file(path: Path) -> ModelShape:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: expected a directory, config.json, .safetensors file or hub id, found a file named *{path.suffix}"
        )
    headers, config = read_header(path), path.parent / "config.json"
    if path.name == "model.safetensors" and config.exists():
        return _directory(path.parent)
    return shape_of_headers(headers, path)


def _read(file: Path) -> ModelShape:
    """The shape that a config.json, or the directory of an index of shards, describes."""
    if file.name.endswith(".index.json"):
        return _directory(file.parent)
    try:
        return shape_of_config(read_json(file))
    except CheckpointError as error:
        told = str(error)
        raise CheckpointError(told if told.startswith(str(file)) else f"{file}: {told}") from None
