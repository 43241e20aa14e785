"""PEFT LoRA adapters: the one place that knows PEFT's file format. Reading, for now.

Legend: B (m, r), A (r, n), ΔW = scaling·B·A with m out, n in; scaling = α/r, or α/√r with rsLoRA.
Source: PEFT ≥ 0.18, `LoraConfig` and `get_peft_model_state_dict`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import CheckpointError

_FACTOR: Final = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.\w+)?(?:\.weight)?$"
)
# Variants whose ΔW is not scaling·B·A alone, by the setting in adapter_config.json that turns them on.
_REFUSED: Final = {
    "use_dora": "DoRA (its ΔW also rescales every column)",
    "target_parameters": "LoRA on bare parameters (experts)",
    "megatron_config": "Megatron LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA (its base loses singular values)",
    "monteclora_config": "Monte Carlo LoRA",
    "layer_replication": "LoRA on repeated layers",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted matrix: name of the base tensor, shape (m, n), rank, scaling, and the two factors' tensor names."""

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    name_A: str  # noqa: N815
    name_B: str  # noqa: N815
    is_embedding: bool

    def stored_shape(self, conv1d: bool) -> tuple[int, int]:
        """The shape the base tensor must have: (n, m) for a `Conv1D`."""
        return self.shape[::-1] if conv1d else self.shape

    def read(self, adapter: Checkpoint, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(B (m, r), A (r, n)) in their stored dtype; an embedding's factors are transposed into that form."""
        A, B = adapter.read(self.name_A, device), adapter.read(self.name_B, device)
        return (A.T, B.T) if self.is_embedding else (B, A)


def read_modules(adapter: Checkpoint) -> tuple[list[LoraModule], list[str]]:
    """The LoRA modules of an adapter, from headers and config, and the names of its other tensors (full ones, biases).

    Raises `CheckpointError` naming the module: not LoRA, a variant that is more than scaling·B·A, a missing factor,
    factors that do not fit each other, a rank that the config contradicts.
    """
    config = adapter.config
    where = adapter.path / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for setting, what in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(f"{where}: {setting} is set: {what} is not supported")
    factors: dict[tuple[str, bool], dict[str, str]] = {}
    others = []
    for name in adapter.tensors:
        found = _FACTOR.match(name)
        if found and not name.endswith(".bias"):
            factors.setdefault((found["module"], found["embedding"] is not None), {})[found["factor"]] = name
        else:
            others.append(name)
    if not factors:
        raise CheckpointError(f"{adapter.path}: holds no LoRA factors (expected tensors named …lora_A.weight)")
    return [_module(adapter, module, is_embedding, pair) for (module, is_embedding), pair in factors.items()], others


def _module(adapter: Checkpoint, module: str, is_embedding: bool, pair: Mapping[str, str]) -> LoraModule:
    for factor in "AB":
        if factor not in pair:
            other = next(iter(pair.values()))
            raise CheckpointError(
                f"{adapter.path}: {module} has {other} but no lora_{factor}; the adapter is incomplete"
            )
    A, B = adapter.tensors[pair["A"]], adapter.tensors[pair["B"]]
    if len(A.shape) != 2 or len(B.shape) != 2:
        raise CheckpointError(
            f"{adapter.path}: {module}: factors {A.shape} and {B.shape} are not matrices (a convolution?)"
        )
    if A.shape[0] != B.shape[1]:
        raise CheckpointError(
            f"{adapter.path}: {module}: lora_A {A.shape} and lora_B {B.shape} do not share a rank (damaged?)"
        )
    rank = A.shape[0]
    where = adapter.path / "adapter_config.json"
    expected = _number(where, "r", "rank_pattern", adapter.config, module)
    if rank == 0 or (expected is not None and expected != rank):
        raise CheckpointError(
            f"{adapter.path}: {module}: lora_A has rank {rank}, {where.name} says {expected:g} (r or rank_pattern)"
            if rank
            else f"{adapter.path}: {module}: its factors have rank 0"
        )
    alpha = _number(where, "lora_alpha", "alpha_pattern", adapter.config, module)
    if alpha is None:
        raise CheckpointError(f"{where}: lora_alpha is missing")
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    shape = (A.shape[1], B.shape[0]) if is_embedding else (B.shape[0], A.shape[1])
    return LoraModule(f"{module}.weight", shape, rank, scaling, pair["A"], pair["B"], is_embedding)


def _number(where: Path, key: str, pattern_key: str, config: Mapping[str, Any], module: str) -> float | None:
    """config[key], or what its patterns say for this module: PEFT's own rule, the first key that matches
    `(.*\\.)?(key)$` on the module's name wins. None where it is missing."""
    patterns, value = config.get(pattern_key) or {}, config.get(key)
    try:
        value = next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), value)
    except (re.error, AttributeError, TypeError):
        raise CheckpointError(f"{where}: {pattern_key} is no map of regular expressions to numbers") from None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{where}: {key} for {module} is {value!r}, expected a number")
    return float(value)
