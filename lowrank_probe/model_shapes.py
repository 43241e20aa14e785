"""A model's shape from whatever names it: a config, a directory, safetensors headers, a hub id, a size.

`import lowrank_probe.model_shapes` and every answer for a family of `shape_families.FAMILIES` need no torch and no
transformers; an architecture that is not among them is built by transformers on the meta device, and `source` says so.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_probe.shape_families import family_shape, is_known
from lowrank_probe.typical_shapes import typical_shape
from lowrank_probe.weight_shapes import Kind, ModelShape, Weight

__all__ = ["Kind", "ModelShape", "Weight", "model_shape", "shape_of_config", "typical_shape"]


def shape_of_config(config: Mapping[str, Any]) -> ModelShape:
    """Every weight of the model that a config (config.json as a dict) describes."""
    if is_known(config):
        return family_shape(config)
    from lowrank_probe.built_shapes import built_shape

    return built_shape(config)


def model_shape(source: str | os.PathLike[str] | Mapping[str, Any] | ModelShape) -> ModelShape:
    """The shape of a model: its config as a dict, its config.json, its directory."""
    if isinstance(source, ModelShape):
        return source
    if isinstance(source, Mapping):
        return shape_of_config(source)
    import json

    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    return shape_of_config(json.loads(file.read_text(encoding="utf-8")))
