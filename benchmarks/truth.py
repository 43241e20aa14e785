"""Compare what the stored (rounded) update says with the update itself, matrix by matrix. Shared by the benchmarks."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe import metrics, svd
from lowrank_probe.deltas import Delta
from lowrank_probe.layers import place
from lowrank_probe.precision import assess, look
from lowrank_probe.rows import describe

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def compare(name: str, base: Tensor, update: Tensor, storage: str = "BF16", seed: int = 0) -> dict[str, Any]:
    """One row: the truth from `update` (m, n) in float64 beside our row of the pair stored as `storage`.

    base: (m, n), already on the storage grid (training started from it). The truth never enters our numbers.
    """
    dtype = DTYPES[storage]
    W0 = base.to(dtype)
    W1 = (W0.double() + update.double()).to(dtype)
    truth = svd.full_spectrum(update.double()).values
    true_norm = svd.fro_norm(update)
    dense = W1.float() - W0.float() if storage != "F32" else W1.double() - W0.double()
    base_norm = svd.fro_norm(W0)
    delta = Delta(
        name, place(name), (base.shape[0], base.shape[1]), storage, storage, svd.fro_norm(dense), base_norm, 1.0,
        dense=dense, base=W0, tuned=W1,
    )  # fmt: skip
    if delta.fro_norm == 0.0:
        row: dict[str, Any] = {"decidable_r50": False, "decidable_r90": False, "decidable_signal_rank": False}
    else:
        found = svd.full_spectrum(dense, delta.fro_norm)
        noise = assess(delta, look(delta), found.values, seed)
        corrected = found.values if noise.corrected is None else svd.full_spectrum(noise.corrected).values
        row, _ = describe(delta, found, noise, corrected)
    row |= {
        "name": name, "layer_type": delta.place.layer_type, "true_norm": true_norm,
        "true_relative": true_norm / base_norm, "true_r50": metrics.energy_rank(truth, true_norm, 0.5),
        "true_r90": metrics.energy_rank(truth, true_norm, 0.9), "true_sigma1": float(truth[0]),
    }  # fmt: skip
    return row


def score(table: pd.DataFrame) -> dict[str, float]:
    """Shares over the decidable matrices: r50 within 25 %, r50 and r90 inside their brackets, norm within 2 %."""
    decided = table[table["decidable_r90"].astype(bool)]
    if decided.empty:
        return {"n": float(len(table)), "decidable": 0.0}
    off50 = (decided["r50_denoised"] - decided["true_r50"]).abs() / decided["true_r50"]
    inside = {
        p: ((decided[f"{p}_low"] <= decided[f"true_{p}"]) & (decided[f"true_{p}"] <= decided[f"{p}_high"])).mean()
        for p in ("r50", "r90")
    }
    return {
        "n": float(len(table)),
        "decidable": len(decided) / len(table),
        "unchanged": float(decided["unchanged_fraction"].median()),
        "r50_within_25%": float((off50 <= 0.25).mean()),
        "r50_inside": float(inside["r50"]),
        "r90_inside": float(inside["r90"]),
        "r90_width": float((decided["r90_high"] / decided["r90_low"]).median()),
        "norm_within_2%": float(((decided["denoised_fro_norm"] / decided["true_norm"] - 1).abs() <= 0.02).mean()),
    }


def collect(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A table of rows, numbers as floats."""
    table = pd.DataFrame(list(rows))
    for column in table.columns:
        if column.startswith(("true_", "r50", "r90", "denoised_fro")):
            table[column] = pd.to_numeric(table[column]).fillna(math.nan)
    return table
