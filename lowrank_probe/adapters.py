"""PEFT LoRA adapters as they lie in files: the modules of an adapter, and their factors. `peft_files` writes them.

Legend: B (m, r), A (r, n), ΔW = scaling·B·A with m out, n in; scaling = α/r, or α/√r with rsLoRA.
A bare parameter (E, m, n) (`target_parameters`) has lora_A (E·r, n), the expert slowest, and lora_B (m, r·E), the
expert fastest. Those of one module are wrappers in each other: the last one registered has no `base_layer` in its name.
Source: PEFT ≥ 0.18, `LoraConfig`, `get_peft_model_state_dict`, `ParamWrapper`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe.adapter_format import CONFIG
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import CheckpointError, NumericsError
from lowrank_probe.layers import place, sort_key
from lowrank_probe.remote_files import File

_FACTOR: Final = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?:\.\w+)?(?:\.weight)?$"
)
# Variants whose ΔW is not scaling·B·A alone, by the setting in adapter_config.json that turns them on.
_REFUSED: Final = {
    "use_dora": "DoRA (its ΔW also rescales every column; merge it into its base with peft's merge_and_unload, then "
    "compare or extract from the merged model)",
    "megatron_config": "Megatron LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA (its base loses singular values)",
    "monteclora_config": "Monte Carlo LoRA",
    "layer_replication": "LoRA on repeated layers",
}
# Initialisations that peft takes out of the base's weights, again on every load.
_OUT_OF_THE_BASE: Final = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraModule:
    """One adapted matrix: name of the base tensor, shape (m, n), rank, scaling, and the two factors' tensor names.

    kernel: of a convolution, whose n is in·kernel. expert, copies: which of the E matrices of a parameter it is.
    rows: the m rows of B that are this base tensor's, where the parameter is stored in pieces.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    name_A: str  # noqa: N815
    name_B: str  # noqa: N815
    is_embedding: bool = False
    kernel: tuple[int, ...] = ()
    expert: int | None = None
    copies: int = 1
    rows: tuple[int, int] | None = None

    def fits(self, stored: tuple[int, ...], conv1d: bool) -> bool:
        """Whether the base tensor has the shape of this module: (n, m) for a `Conv1D`, (E, …) for a stack."""
        m, n = self.shape
        if self.expert is not None and len(stored) == 3:
            return stored[0] == self.copies and stored[1:] in ((m, n), (n, m))
        if self.kernel:
            return stored == (m, n // math.prod(self.kernel), *self.kernel)
        return stored == ((n, m) if conv1d else (m, n))

    def read(self, adapter: Checkpoint, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(B (m, r), A (r, n)) in their stored dtype, brought into that form.

        Raises `NumericsError` naming factor and file for NaN or Inf.
        """
        return self.of(*read_factors(self, adapter, device))

    def of(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """(B (m, r), A (r, n)) from lora_A and lora_B as they are stored."""
        if self.is_embedding:
            return A.T, B.T
        A, B = A.flatten(1), B.flatten(1)
        if self.expert is not None:
            A = A[self.expert * self.rank : (self.expert + 1) * self.rank]
            B = B[:, self.expert :: self.copies]
        return (B if self.rows is None else B[slice(*self.rows)]), A


def read_factors(module: LoraModule, adapter: Checkpoint, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) as they are stored. Raises `NumericsError` naming factor and file for NaN or Inf."""
    factors = adapter.read(module.name_A, device), adapter.read(module.name_B, device)
    for name, factor in zip((module.name_A, module.name_B), factors, strict=True):
        # NaN and Inf survive a sum, which float64 holds for any narrower type; isfinite takes five times as long.
        if not math.isfinite(float(factor.sum(dtype=torch.float64))):
            raise NumericsError(f"{name} in {adapter.tensors[name].file}: contains NaN or Inf")
    return factors


def read_modules(adapter: Checkpoint) -> tuple[list[LoraModule], list[str]]:
    """The LoRA modules of an adapter, from headers and config, and the names of its other tensors (full ones, biases).

    Raises `CheckpointError` naming the module: not LoRA, a variant that is more than scaling·B·A, a missing factor,
    factors that do not fit each other, a rank that the config contradicts.
    """
    config = adapter.config
    where = adapter.path / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for setting, what in _REFUSED.items():
        if config.get(setting):
            raise CheckpointError(f"{where}: {setting} is set: {what} is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OUT_OF_THE_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights is {init!r}: peft takes that out of the base on every load, so that ΔW is "
            "not scaling·B·A; save it as plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )
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
    parameters = _parameters(adapter, [module for module, _ in factors])
    found_modules: list[LoraModule] = []
    for (module, is_embedding), pair in factors.items():
        found_modules += _modules(adapter, module, parameters.get(module), is_embedding, pair)
    return found_modules, others


def _parameters(adapter: Checkpoint, modules: list[str]) -> dict[str, str]:
    """Name of the wrapper in the file → name of the bare parameter that it adapts, by `target_parameters`.

    The file says how deep a wrapper lies, not whose it is: the parameters of one module are taken in the order gate,
    up, down, in which every model registers them.
    """
    listed = adapter.config.get("target_parameters") or ()
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise CheckpointError(f"{adapter.path / CONFIG}: target_parameters is no list of names")
    depths: dict[str, list[str]] = {}
    for module in modules:
        bare = re.sub(r"(?:\.base_layer)+$", "", module)
        if listed and not _is_target_module(adapter.config.get("target_modules"), bare):
            depths.setdefault(bare, []).append(module)
    found: dict[str, str] = {}
    for bare, wrappers in depths.items():
        leaves = {
            one.rpartition(".")[2] for one in listed if f".{bare}".endswith(f".{one.rpartition('.')[0]}".rstrip("."))
        }
        order = sorted(leaves, key=lambda leaf: (sort_key(place(f"{bare}.{leaf}").layer_type), leaf))
        if len(order) != len(wrappers):
            raise CheckpointError(
                f"{adapter.path}: {bare} has factors for {len(wrappers)} parameters, adapter_config.json names "
                f"{len(order)} of it (target_parameters)"
            )
        for wrapper, leaf in zip(sorted(wrappers, key=len, reverse=True), order, strict=True):
            found[wrapper] = f"{bare}.{leaf}"
    absent = [one for one in listed if not any(f".{name}".endswith(f".{one}") for name in found.values())]
    if absent:
        raise CheckpointError(f"{adapter.path}: has no factors for {absent[0]} (target_parameters); is it complete?")
    return found


def _is_target_module(targets: Any, module: str) -> bool:
    """PEFT's rule: a regular expression for all of the name, or names that end it at a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in targets or ())


def _modules(
    adapter: Checkpoint, module: str, parameter: str | None, is_embedding: bool, pair: Mapping[str, str]
) -> list[LoraModule]:
    for factor in "AB":
        if factor not in pair:
            other = next(iter(pair.values()))
            raise CheckpointError(
                f"{adapter.path}: {module} has {other} but no lora_{factor}; the adapter is incomplete"
            )
    A, B = adapter.tensors[pair["A"]].shape, adapter.tensors[pair["B"]].shape
    kernel = A[2:]
    if len(A) < 2 or len(A) != len(B) or math.prod(B[2:]) != 1:
        raise CheckpointError(f"{adapter.path}: {module}: factors {A} and {B} are not matrices")
    if A[0] != B[1]:
        raise CheckpointError(f"{adapter.path}: {module}: lora_A {A} and lora_B {B} do not share a rank (damaged?)")
    named = parameter or module
    where = adapter.path / CONFIG
    expected = _number(where, "r", "rank_pattern", adapter.config, named)
    rank, copies = A[0], 1
    if parameter is not None and expected and A[0] % int(expected) == 0:
        rank, copies = int(expected), A[0] // int(expected)
    if rank == 0 or (expected is not None and expected != rank):
        raise CheckpointError(
            f"{adapter.path}: {module}: lora_A has rank {rank}, {where.name} says {expected:g} (r or rank_pattern)"
            if rank
            else f"{adapter.path}: {module}: its factors have rank 0"
        )
    alpha = _number(where, "lora_alpha", "alpha_pattern", adapter.config, named)
    if alpha is None:
        raise CheckpointError(f"{where}: lora_alpha is missing")
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    shape = (A[1], B[0]) if is_embedding else (B[0], math.prod(A[1:]))
    name = parameter or f"{module}.weight"
    one = LoraModule(name, shape, rank, scaling, pair["A"], pair["B"], is_embedding, kernel, copies=copies)
    if parameter is None or copies == 1:
        return [one]
    return [replace(one, expert=number) for number in range(copies)]


def _number(where: File, key: str, pattern_key: str, config: Mapping[str, Any], module: str) -> float | None:
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
