"""What `train` is asked for, checked before anything is trained: each error is one line and leaves nothing behind."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from lowrank_probe import hub
from lowrank_probe.devices import EXPECTED
from lowrank_probe.errors import CheckpointError, MatchError, ProbeError
from lowrank_probe.model_shapes import ModelShape, model_shape
from lowrank_probe.training_plan import FULL, Plan, Recipe

HIGHEST_RATE: Final = 100.0  # more is a typing error


def checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """0 … n − 1 of a number, or the seeds given."""
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not found:
        raise ProbeError("seeds: expected at least 1")
    return found


def model_directory(model: str | os.PathLike[str]) -> Path:
    """Where the model lies: the directory itself, or the local snapshot of a hub id, weights and tokenizer."""
    text = os.fspath(model)
    if text and Path(text).exists():
        return Path(text)
    if not hub.is_hub_id(text):
        raise CheckpointError(hub.no_such(text))
    found = hub.download(text)
    hub.download_tokenizer(text)
    return found


def shape_of(directory: Path) -> ModelShape:
    """The model's shape, from its config.json."""
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json (expected the directory of a transformers model)")
    return model_shape(directory)


def check_causal(directory: Path, shape: ModelShape) -> None:
    """Raise `CheckpointError` for an encoder: its layers see the tokens that a causal loss has them predict."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind, config = shape.config.get("model_type"), shape.config
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder"):
        name = (config.get("architectures") or [kind])[0]
        raise CheckpointError(f"{directory}: {name} sees the tokens to come (expected a causal language model)")


def training_device(asked: str) -> torch.device:
    """The device that Trainer will take. Raises `ProbeError` where that is not the one asked for."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise ProbeError(f"--device {asked}: {EXPECTED}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ProbeError(f"--device {asked}: there is no CUDA device here; {EXPECTED}")
    if found.index:
        raise ProbeError(f"--device {asked}: Trainer takes the first card; choose another with CUDA_VISIBLE_DEVICES")
    return found


def max_positions(shape: ModelShape) -> int | None:
    """The longest sequence that the model takes, where its config says it."""
    found = shape.config.get("max_position_embeddings") or shape.config.get("n_positions")
    return found if isinstance(found, int) else None


def checked_recipe(recipe: Recipe, shape: ModelShape) -> Recipe:
    """The recipe. Raises `ProbeError` for sequences longer than the model's positions."""
    positions = max_positions(shape)
    if positions is not None and recipe.length > positions:
        raise ProbeError(f"--length {recipe.length}: the model has {positions} positions; give at most {positions}")
    return recipe


def adapted_modules(shape: ModelShape, group: str, plan: Plan) -> tuple[list[str], list[str]]:
    """(modules, bare parameters) that LoRA adapts for one group. Raises `MatchError` for what has no such rank."""
    found = shape.adapted(group.split(","))
    smallest = min(found, key=lambda weight: min(weight.sides))
    if plan.ranks[-1] > min(smallest.sides):
        m, n = smallest.sides
        raise MatchError(
            f"rank {plan.ranks[-1]} is above what {smallest.name} ({m}, {n}) can have; give ranks up to {min(m, n)}, "
            f"or other targets than {group}"
        )
    bare = [name for weight in found if weight.kind == "parameter" for name in weight.modules()]
    if bare and "dora" in plan.variants:
        raise MatchError(
            f"variant dora: PEFT cannot adapt {bare[0]}, a bare parameter, with it; leave it or {group} out"
        )
    return [name for weight in found if weight.kind != "parameter" for name in weight.modules()], bare


def given_rates(lr: str | float | Mapping[str, float], methods: Sequence[str]) -> dict[str, float]:
    """Method → learning rate as asked for; empty for "auto"."""
    if isinstance(lr, Mapping):
        if missing := [one for one in methods if one not in lr]:
            raise ProbeError(f"lr: no learning rate for {missing[0]}; given are {', '.join(lr)}")
        return {one: _rate(lr[one]) for one in methods}
    return {} if lr == "auto" else {one: _rate(lr) / (10 if one == FULL else 1) for one in methods}


def _rate(value: str | float) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = 0.0
    if not 0 < rate < HIGHEST_RATE:
        raise ProbeError(
            f"lr {value}: expected auto, a rate above 0 and below {HIGHEST_RATE:g} such as 2e-4, or method=rate"
        )
    return rate
