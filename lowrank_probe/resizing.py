"""`resize`: a PEFT adapter at other ranks, by QR of both factors and an r×r SVD: never a dense matrix.

Legend: m out, n in, R the rank an adapter's module has, r the one it gets; ΔW = scaling·B·A with B (m, R), A (R, n),
its singular values s (R,). The best approximation of rank r is U_r·diag(s_r)·Vh_r (Eckart & Young 1936), stored as
B̃ = U_r·√s_r, Ã = √s_r·Vh_r, with alpha = rank, so that the scaling is 1.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe import allocation
from lowrank_probe.adapters import LoraModule, read_factors, read_modules
from lowrank_probe.allocation import Allotment, Unit
from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.columns import RESIZED
from lowrank_probe.errors import CheckpointError, NumericsError, ProbeError
from lowrank_probe.factored import Core, distance
from lowrank_probe.layers import place
from lowrank_probe.outputs import copy_into, whole_directory
from lowrank_probe.runs import SCHEMA_VERSION, plain
from lowrank_probe.safetensors_files import write_file
from lowrank_probe.torch_dtypes import DTYPES

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Resized:
    """The best adapter of other ranks: for every module the truncated SVD of its ΔW = scaling·B·A, in float64.

    One of: rank, for every module; energy, the least ranks that keep this share of each ‖ΔW‖_F²; budget, ranks that
    keep the most energy within so many parameters of factors ("40M") or bytes of the file ("80MB"). max_rank and
    rank_multiple as in `allocation`; no rank exceeds the module's own. Scalings (alpha, rsLoRA, patterns) go into the
    factors; all other tensors are carried unchanged. dtype: of the factors written: float32, bfloat16, float16.

    Writes a PEFT adapter to `out`, which must be free, whole or not at all. Raises `ProbeError` for what cannot be
    resized (DoRA and other variants, NaN, no update at all), `OutputError` where it cannot be written.
    """
    side = open_checkpoint(adapter)
    if not side.is_adapter:
        raise CheckpointError(f"{side.path}: is not an adapter (expected a directory with {CONFIG})")
    stored = stored_dtype(dtype)
    modules, others = read_modules(side)
    units = _grouped(modules)
    whole_bytes = sum(side.tensors[name].n_bytes + allocation.TENSOR_OVERHEAD + len(name.encode()) for name in others)
    rule = _rule(rank, energy, budget, max_rank, rank_multiple, DTYPES[stored].itemsize, whole_bytes)
    with whole_directory(Path(out)) as aside:
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
            factors, row = _truncated(unit, cores, r, DTYPES[stored])
            rows.append(row | {"rule": "its own rank" if r < allotted.rank else allotted.rule})
            if r:
                kept[unit[0]] = factors
        if not any(row["fro_norm"] for row in rows):
            raise ProbeError(f"{side.path}: B·A is zero in all of its {len(units)} modules; there is nothing to resize")
        _write(aside, side, kept, {row["name"]: row["rank"] for row in rows}, others, stored)
    table = pd.DataFrame(rows, columns=list(RESIZED)).astype({"layer": "Int64"})
    facts = {
        "adapter": str(side.path), "rank": rank, "energy": energy, "budget": budget, "max_rank": max_rank,
        "rank_multiple": rank_multiple, "dtype": stored, "n_parameters": int(table["parameters"].sum()),
        "n_bytes": (Path(out) / WEIGHTS).stat().st_size, "carried": others,
        "skipped": [unit[0].name for unit in units if unit[0] not in kept],
    }  # fmt: skip
    return Resized(Path(out), table, facts)


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


def stored_dtype(dtype: str) -> str:
    """The safetensors name of a dtype for storage ("bfloat16" → "BF16"). Raises `ProbeError` for any other word."""
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp32": "F32", "bf16": "BF16", "fp16": "F16"}
    if dtype not in names:
        raise ProbeError(f"dtype {dtype!r}: expected float32, bfloat16 or float16")
    return names[dtype]


def _rule(
    rank: int | None, energy: float | None, budget: str | int | None, max_rank: int | None, rank_multiple: int,
    width: int, whole_bytes: int,
) -> Callable[[Sequence[Unit]], tuple[Allotment, ...]]:  # fmt: skip
    """The one rule that was asked for; checked on no unit at all, so that its options fail before any work."""
    given = [name for name, value in (("rank", rank), ("energy", energy), ("budget", budget)) if value is not None]
    if len(given) != 1:
        raise ProbeError(f"expected one of rank, energy and budget, found {' and '.join(given) or 'none'}")
    common: dict[str, Any] = {"max_rank": max_rank, "rank_multiple": rank_multiple}
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
        stored.append((exact[0].to(dtype), exact[1].to(dtype)))
        square += float((core.s**2).sum())
        lost += float((core.s[r:] ** 2).sum())
        rounding += distance(*exact, *stored[-1]) ** 2
    if not math.isfinite(rounding):
        raise NumericsError(f"{first.name}: its factors overflow {dtype}; choose --dtype float32 or bfloat16")
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
    return _packed(first, stored, r), row


def _packed(module: LoraModule, factors: Sequence[tuple[Tensor, Tensor]], r: int) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) as peft stores them: the way back of `LoraModule.of`."""
    B, A = factors[0]
    if module.is_embedding:
        return B.T, A.T
    if module.kernel:
        return A.reshape(r, -1, *module.kernel), B.reshape(-1, r, *(1 for _ in module.kernel))
    if len(factors) > 1:  # the expert slowest in lora_A, fastest in lora_B
        return torch.cat([A for _, A in factors]), torch.stack([B for B, _ in factors], dim=2).flatten(1)
    return A, B


def _write(
    directory: Path, side: Checkpoint, kept: Mapping[LoraModule, tuple[Tensor, Tensor]], ranks: Mapping[str, int],
    others: Sequence[str], dtype: str,
) -> None:  # fmt: skip
    """Weights, then what lies beside them, then the config."""
    infos: list[tuple[str, str, tuple[int, ...]]] = []
    tensors: list[Tensor | str] = []
    for module, factors in kept.items():
        for name, factor in zip((module.name_A, module.name_B), factors, strict=True):
            infos.append((name, dtype, tuple(factor.shape)))
            tensors.append(factor)
    for name in others:
        infos.append((name, side.tensors[name].dtype, side.tensors[name].shape))
        tensors.append(name)
    scalings = {module.name_B.removesuffix("weight") + "bias": module.scaling for module in kept}
    write_file(
        directory / WEIGHTS, infos,
        (_carried(side, one, scalings.get(one)) if isinstance(one, str) else one for one in tensors), {"format": "pt"},
    )  # fmt: skip
    copy_into(directory, side.other_files)
    config = _config(side.config, {module: ranks[module.name] for module in kept})
    (directory / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _carried(side: Checkpoint, name: str, scaling: float | None) -> Tensor:
    """A tensor as it is, but for lora_B's bias, to which peft applies the scaling that is in the factors now."""
    tensor = side.read_stored(name)
    return tensor if scaling is None else (tensor.double() * scaling).to(tensor.dtype)


def _config(config: Mapping[str, Any], ranks: Mapping[LoraModule, int]) -> dict[str, Any]:
    """The adapter_config.json of the same modules at other ranks, alpha = rank: every module by its full name.

    Pattern keys are regular expressions that peft matches as `(.*\\.)?(key)$`: escaped, and anchored at the start.
    """
    modules, parameters = {}, {}
    for module, r in ranks.items():
        if _is_parameter(module, config):
            parameters[module.name] = r
        else:
            modules[module.name.removesuffix(".weight")] = r
    # PEFT builds the parameters without their patterns where it knows of none: they get the common rank.
    usual = Counter((parameters or modules).values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in (modules | parameters).items() if r != usual}
    return {
        **config, "r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": dict(pattern),
        "use_rslora": False, "target_modules": sorted(modules), "target_parameters": sorted(parameters) or None,
        "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "init_lora_weights": True,
        "inference_mode": True,
    }  # fmt: skip
