"""The adapter's weights against the tuned model's, where no model can be run: ‖(W + Σ w·s·BA) − W_tuned‖ / ‖ΔW‖.

Legend: W (m, n) of the base, ΔW = W_tuned − W, w the adapter's weight in the sum, s its scaling, B (m, r), A (r, n).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.errors import MatchError
from lowrank_probe.matching import Pair, match
from lowrank_probe.options import Options
from lowrank_probe.running_models import Weighted
from lowrank_probe.torch_dtypes import DTYPES
from lowrank_probe.verification import ALLOWED_SHARE, ROWS, Verification, broken_rules

# The ledger's figure is rounded where it is printed, and computed in another order.
LEDGER_RTOL: Final = 1e-3
LEDGER_ATOL: Final = 1e-5
ARITHMETIC: Final = 1e-6


def compare_weights(
    base: Path, tuned: Path, adapters: Sequence[Weighted], device: torch.device,
    expected: Mapping[str, float] | None, reason: str, equal: bool = False,
) -> Verification:  # fmt: skip
    """Read the written adapters back and compare every matrix they adapt; `reason`: why no model was run.

    expected: base tensor → relative error; `equal`: the tuned side is the merged checkpoint. Raises `CheckpointError`
    and `MatchError` as reading does.
    """
    sides = open_checkpoint(base), open_checkpoint(tuned)
    if sides[1].is_adapter:
        raise MatchError(f"{tuned}: is an adapter (expected the tuned model)")
    options = Options(split=False)
    pairs = {pair.key: pair for pair in match(*sides, options).pairs}
    worn: dict[str, list[tuple[Checkpoint, Pair, float]]] = {}
    for path, weight in adapters:
        adapter = open_checkpoint(path)
        for pair in match(sides[0], adapter, options).pairs:
            worn.setdefault(pair.key, []).append((adapter, pair, weight))
    rows, absent = [], []
    for key, updates in worn.items():
        if key in pairs:
            rows += _compared(pairs[key], updates, sides, device)
        else:
            absent.append(key)
    if not rows:
        raise MatchError(f"{tuned}: has no matrix that the adapter adapts and the base has otherwise")
    matrices = pd.DataFrame(rows)
    matrices["expected"] = [(expected or {}).get(name, math.nan) for name in matrices["name"]]
    return _verification(matrices, sides[0], absent, reason, equal)


def _compared(
    pair: Pair, updates: Sequence[tuple[Checkpoint, Pair, float]], sides: tuple[Checkpoint, Checkpoint],
    device: torch.device,
) -> list[dict[str, Any]]:  # fmt: skip
    delta = read_pair(pair, *sides, device)
    if not isinstance(delta, Delta):  # a vector, or unchanged
        return []
    assert delta.dense is not None
    assert delta.base is not None
    update = torch.zeros_like(delta.dense)
    for adapter, adapted, weight in updates:
        update += weight * _update(adapter, adapted, sides[0], update)
    W = delta.base.to(update.dtype)
    stored = (W + update).to(DTYPES.get(delta.base_dtype, torch.float32)).to(update.dtype)
    return [
        {
            "name": pair.key, "fro_norm": delta.fro_norm,
            "relative_error": _norm(update - delta.dense) / delta.fro_norm,
            "merged_error": _norm(stored - W - delta.dense) / delta.fro_norm,
            "rounding": _norm(stored - W - update) / delta.fro_norm,
        }
    ]  # fmt: skip


def _update(adapter: Checkpoint, pair: Pair, base: Checkpoint, like: Tensor) -> Tensor:
    """What one adapter adds to W: s·BA, or its whole tensor less the base's."""
    if pair.lora is not None:
        B, A = pair.lora.read(adapter, like.device)
        return pair.lora.scaling * (B.to(like.dtype) @ A.to(like.dtype))
    found = read_pair(pair, base, adapter, like.device, sides=False)
    return (
        found.dense.to(like.dtype) if isinstance(found, Delta) and found.dense is not None else torch.zeros_like(like)
    )


def _norm(A: Tensor) -> float:
    return float(torch.linalg.vector_norm(A, dtype=torch.float64))


def _verification(
    matrices: pd.DataFrame, base: Checkpoint, absent: Sequence[str], reason: str, equal: bool
) -> Verification:
    whole = math.sqrt(float((matrices["fro_norm"] ** 2).sum()))

    def overall(column: str) -> float:
        return math.sqrt(float(((matrices[column] * matrices["fro_norm"]) ** 2).sum())) / whole

    errors = (1.0, overall("relative_error"), overall("merged_error"))
    cells = [{"relative_error": error, "n_matrices": len(matrices)} for error in errors]
    rounding = max(overall("rounding"), ARITHMETIC)
    tolerance = ALLOWED_SHARE + rounding
    gap = errors[1] if equal else overall("rounding")
    problems = broken_rules(gap, tolerance, equal)
    stated = matrices[matrices["expected"].notna()]
    off = (stated["relative_error"] - stated["expected"]).abs() > LEDGER_RTOL * stated["expected"] + LEDGER_ATOL
    problems += [
        f"{row.name}: the adapter read back has the error {row.relative_error:.6g}, the ledger says {row.expected:.6g}"
        for row in stated[off].itertuples(index=False)
    ]
    unstated = matrices[matrices["expected"].isna()]
    problems += [
        f"{row.name}: with the adapter it is as far from the tuned side as without ({row.relative_error:.4g} ‖ΔW‖)"
        for row in unstated[unstated["relative_error"] >= 1 - ARITHMETIC].itertuples(index=False)
    ]
    notes = [f"weights were compared, no model was run: {reason}"]
    if absent:
        notes.append(f"{len(absent)} adapted matrices have no counterpart in the tuned side, such as {absent[0]}")
    dtypes = {base.tensors[name.partition("[")[0]].dtype for name in matrices["name"]}
    table = pd.DataFrame(cells, index=pd.Index(ROWS, name="model"))
    return Verification(
        "weights", table, gap, "/".join(sorted(dtypes)), rounding, tolerance, tuple(problems),
        tuple(notes), matrices,
    )  # fmt: skip
