"""`resize`: a PEFT adapter at other ranks, by QR of both factors and an r×r SVD: never a dense matrix.

Legend: m out, n in, R the rank an adapter's module has, r the one it gets; ΔW = scaling·B·A with B (m, R), A (R, n),
its singular values s (R,). The best approximation of rank r is U_r·diag(s_r)·Vh_r (Eckart & Young 1936), stored as
B̃ = U_r·√s_r, Ã = √s_r·Vh_r, with alpha = rank, so that the scaling is 1.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from lowrank_probe import allocation
from lowrank_probe.adapter_format import CONFIG, WEIGHTS, packed, ranks_and_patterns, target_modules
from lowrank_probe.adapters import LoraModule, read_factors, read_modules
from lowrank_probe.allocation import Allotment, Unit
from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.columns import RESIZED
from lowrank_probe.errors import CheckpointError, ProbeError
from lowrank_probe.factored import Core, distance
from lowrank_probe.layers import place
from lowrank_probe.narrowing import narrowed, stored_dtype
from lowrank_probe.options import Progress
from lowrank_probe.outputs import copy_into, whole_directory, write_json
from lowrank_probe.remote_files import refuse_addresses
from lowrank_probe.safetensors_files import write_file
from lowrank_probe.strict_json import SCHEMA_VERSION, plain
from lowrank_probe.torch_dtypes import DTYPES


@dataclass(frozen=True)
class Resized:
    """The answer of `resize`.

    path: the new adapter. table: one row a module, columns as `columns.RESIZED`. facts: what was resized, and how.
    """

    path: Path
    table: pd.DataFrame
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def energy(self) -> float:
        """The share of Σ‖ΔW‖_F² over all modules that the new adapter keeps."""
        squares = self.table["fro_norm"] ** 2
        return float((squares * self.table["energy"]).sum() / squares.sum())

    @property
    def error(self) -> float:
        """‖ΔW − B̃Ã‖_F / ‖ΔW‖_F over all modules, of the factors as stored."""
        squares = self.table["fro_norm"] ** 2
        return math.sqrt(float((squares * self.table["error"] ** 2).sum() / squares.sum()))

    def to_json(self) -> str:
        """One JSON object with `schema_version`: path, energy, error, facts and table; NaN becomes null."""
        payload = {
            "schema_version": SCHEMA_VERSION, "path": self.path, "energy": self.energy, "error": self.error,
            "facts": self.facts, "table": self.table.to_dict("records"),
        }  # fmt: skip
        return json.dumps(plain(payload), ensure_ascii=False)


def resize(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | int | None = None,
    max_rank: int | None = None,
    rank_multiple: int = 1,
    dtype: str = "float32",
    on_progress: Progress | None = None,
) -> Resized:
    """The best adapter of other ranks: for every module the truncated SVD of its ΔW = scaling·B·A, in float64.

    One of: rank, for every module; energy, the least ranks that keep this share of each ‖ΔW‖_F²; budget, ranks that
    keep the most energy within so many parameters of factors ("40M") or bytes of the file ("80MB"). max_rank and
    rank_multiple as in `allocation`; no rank exceeds the module's own. Scalings (alpha, rsLoRA, patterns) go into the
    factors; all other tensors are carried unchanged. A module of rank 0 is left out, and where a budget did that, its
    bias within LoRA (`lora_bias`) too: both are listed in facts. dtype: of the factors written: float32, bfloat16,
    float16.

    Writes a PEFT adapter to `out`, which must be free, whole or not at all. Raises `ProbeError` for what cannot be
    resized (DoRA and other variants, NaN, no update at all), `OutputError` where it cannot be written.
    """
    refuse_addresses(adapter)
    side = open_checkpoint(adapter)
    if not side.is_adapter:
        raise CheckpointError(f"{side.path}: is not an adapter (expected a directory with {CONFIG})")
    stored = stored_dtype(dtype)
    modules, others = read_modules(side)
    units = _grouped(modules)
    whole_bytes = sum(side.tensors[name].n_bytes + allocation.TENSOR_OVERHEAD + len(name.encode()) for name in others)
    rule = _rule(rank, energy, budget, max_rank, rank_multiple, DTYPES[stored].itemsize, whole_bytes)
    with whole_directory(Path(out)) as aside, _one_thread():
        chosen: Sequence[Allotment] | None = None
        if budget is not None:  # one budget for all: every spectrum first
            chosen = rule([_unit(unit, _cores(unit, side)) for unit in units])
        kept: dict[LoraModule, tuple[Tensor, Tensor]] = {}
        rows = []
        for number, unit in enumerate(units):
            if on_progress:
                on_progress(unit[0].name, number, len(units))
            cores = _cores(unit, side)
            allotted = chosen[number] if chosen else rule([_unit(unit, cores)])[0]
            r = min(allotted.rank, unit[0].rank)
            if r == 0 and _is_parameter(unit[0], side.config):
                r = 1  # the names of a module's other parameters depend on it
            if r == 0 and budget is None and _lora_bias(unit[0]) in side.tensors:
                r = 1  # its update is more than B·A, and PEFT reads it with factors only
            factors, row = _truncated(unit, cores, r, DTYPES[stored])
            rows.append(row | {"rule": "its own rank" if r < allotted.rank else allotted.rule})
            if r:
                kept[unit[0]] = factors
        if not any(row["fro_norm"] for row in rows):
            raise ProbeError(f"{side.path}: B·A is zero in all of its {len(units)} modules; there is nothing to resize")
        dropped = [unit[0] for unit in units if unit[0] not in kept]
        carried = _new_names(others, dropped)
        _write(aside, side, kept, {row["name"]: row["rank"] for row in rows}, carried, stored)
    table = pd.DataFrame(rows, columns=list(RESIZED)).astype({"layer": "Int64"})
    facts = {
        "adapter": str(side.path), "rank": rank, "energy": energy, "budget": budget, "max_rank": max_rank,
        "rank_multiple": rank_multiple, "dtype": stored, "n_parameters": int(table["parameters"].sum()),
        "n_bytes": (Path(out) / WEIGHTS).stat().st_size, "carried": list(carried.values()),
        "not_carried": [name for name in others if name not in carried],
        "zero": [row["name"] for row in rows if row["rank"] == 0 and row["fro_norm"] == 0],
        "without_rank": [row["name"] for row in rows if row["rank"] == 0 and row["fro_norm"] > 0],
    }  # fmt: skip
    return Resized(Path(out), table, facts)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it linear algebra has one thread: of factors so thin several mostly wait for each other, spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _grouped(modules: Sequence[LoraModule]) -> list[list[LoraModule]]:
    """What one rank is chosen for: a module, or all the experts whose factors lie in one pair of tensors."""
    groups: dict[str, list[LoraModule]] = {}
    for module in modules:
        groups.setdefault(module.name_A, []).append(module)
    return list(groups.values())


def _cores(unit: Sequence[LoraModule], side: Checkpoint) -> list[Core]:
    factors = read_factors(unit[0], side)
    return [Core.of(*module.of(*factors), module.scaling) for module in unit]


def _is_parameter(module: LoraModule, config: Mapping[str, Any]) -> bool:
    """Whether it is a bare parameter (`target_parameters`), not a module's weight."""
    return any(f".{module.name}".endswith(f".{one}") for one in config.get("target_parameters") or ())


def _lora_bias(module: LoraModule) -> str:
    """The name that the bias of its lora_B would have (`lora_bias`)."""
    return module.name_B.removesuffix("weight") + "bias"


def _new_names(others: Sequence[str], dropped: Sequence[LoraModule]) -> dict[str, str]:
    """Name of a tensor that is carried → its name beside the new factors: the bias of a module that is no longer
    adapted is the base's own again, the one of its lora_B has no place.
    """
    lost = {_lora_bias(module) for module in dropped}
    bare = {module.name_A.partition(".lora_")[0] for module in dropped}
    unwrapped = {f"{module}.base_layer.bias": f"{module}.bias" for module in bare}
    return {name: unwrapped.get(name, name) for name in others if name not in lost}


def _rule(
    rank: int | None, energy: float | None, budget: str | int | None, max_rank: int | None, rank_multiple: int,
    width: int, whole_bytes: int,
) -> Callable[[Sequence[Unit]], tuple[Allotment, ...]]:  # fmt: skip
    """The one rule that was asked for; checked on no unit at all, so that its options fail before any work."""
    given = [name for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None]
    if len(given) != 1:
        raise ProbeError(f"expected one of rank, energy and budget, found {' and '.join(given) or 'none'}")
    most = allocation.whole_steps(max_rank, rank_multiple)
    common: dict[str, Any] = {"max_rank": most, "rank_multiple": rank_multiple}
    rule: Callable[[Sequence[Unit]], tuple[Allotment, ...]]
    if rank is not None:
        rule = partial(allocation.fixed, r=rank, **common)
    elif energy is not None:
        rule = partial(allocation.by_energy, p=energy, **common)
    else:
        allowance = allocation.parse_budget(str(budget))
        overhead = allocation.FILE_OVERHEAD + whole_bytes
        rule = partial(
            allocation.by_budget, **allowance, bytes_per_parameter=width, file_overhead=overhead, **common
        )  # fmt: skip
    rule([])
    return rule


def _unit(unit: Sequence[LoraModule], cores: Sequence[Core]) -> Unit:
    s = torch.stack([core.s for core in cores])
    values = s.numpy() if len(cores) > 1 else s[0].numpy()
    return Unit(unit[0].name, unit[0].shape, values, float(torch.linalg.norm(s)), copies=len(cores))


def _truncated(
    unit: Sequence[LoraModule], cores: Sequence[Core], r: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """((lora_A, lora_B) as they are stored, the row of the table but its rule)."""
    first = unit[0]
    stored = []
    lost = rounding = square = 0.0
    for core in cores:
        exact = core.factors(r)
        told = f"{first.name}: its factors reach"
        stored.append((narrowed(exact[0], dtype, told), narrowed(exact[1], dtype, told)))
        square += float((core.s**2).sum())
        lost += float((core.s[r:] ** 2).sum())
        rounding += distance(*exact, *stored[-1]) ** 2
    where = place(first.name)
    row = {
        "name": first.name, "layer_type": where.layer_type, "layer": where.layer, "rows": first.shape[0],
        "cols": first.shape[1], "copies": len(unit), "rank_before": first.rank, "rank": r,
        "parameters": len(unit) * r * sum(first.shape), "fro_norm": math.sqrt(square),
        "energy": 1 - lost / square if square else math.nan,
        "optimum": math.sqrt(lost / square) if square else math.nan,
        # What was cut off is orthogonal to what rounding moves, but for the product of both factors' rounding.
        "error": math.sqrt((lost + rounding) / square) if square else math.nan,
    }  # fmt: skip
    B, A = (torch.stack(factors) for factors in zip(*stored, strict=True))
    return packed(B, A, embedding=first.is_embedding, kernel=first.kernel), row


def _write(
    directory: Path, side: Checkpoint, kept: Mapping[LoraModule, tuple[Tensor, Tensor]], ranks: Mapping[str, int],
    carried: Mapping[str, str], dtype: str,
) -> None:  # fmt: skip
    """Weights, then what lies beside them, then the config. carried: name → the name it gets."""
    infos: list[tuple[str, str, tuple[int, ...]]] = []
    tensors: list[Tensor | str] = []
    for module, factors in kept.items():
        for name, factor in zip((module.name_A, module.name_B), factors, strict=True):
            infos.append((name, dtype, tuple(factor.shape)))
            tensors.append(factor)
    for name, new in carried.items():
        infos.append((new, side.tensors[name].dtype, side.tensors[name].shape))
        tensors.append(name)
    scalings = {_lora_bias(module): module.scaling for module in kept}
    write_file(
        directory / WEIGHTS, infos,
        (_carried(side, one, scalings.get(one)) if isinstance(one, str) else one for one in tensors), {"format": "pt"},
    )  # fmt: skip
    copy_into(directory, side.other_files)
    write_json(directory / CONFIG, _config(side, {module: ranks[module.name] for module in kept}))


def _carried(side: Checkpoint, name: str, scaling: float | None) -> Tensor:
    """A tensor as it is, but for lora_B's bias, to which peft applies the scaling that is in the factors now."""
    tensor = side.read_stored(name)
    return tensor if scaling is None else narrowed(tensor.double() * scaling, tensor.dtype, f"{name}: reaches")


def _config(side: Checkpoint, ranks: Mapping[LoraModule, int]) -> dict[str, Any]:
    """The adapter_config.json of the same modules at other ranks, alpha = rank: every module by its full name."""
    modules, parameters, others = {}, {}, set()
    for module in read_modules(side)[0]:
        name = module.name.removesuffix(".weight")
        if module not in ranks:
            others.add(name)
        elif _is_parameter(module, side.config):
            parameters[module.name] = ranks[module]
        else:
            modules[name] = ranks[module]
    # Where the old names left out no module that ends in one of them, the adapter has every module that could.
    limits = ("exclude_modules", "layers_to_transform")
    listed = not isinstance(side.config.get("target_modules"), str) and not any(map(side.config.get, limits))
    return {
        **side.config, **ranks_and_patterns(modules, parameters),
        "target_modules": target_modules(modules, others if listed else None),
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip
