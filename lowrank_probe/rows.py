"""One `Delta` → one row of the table: singular values, metrics, storage noise, denoised ranks, and what is decidable.

Legend: m out, n in, k = min(m, n); the columns are documented in `columns.TABLE`. No pandas: this is what runs per
matrix, and what warms a device up.
"""

import math
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch

from lowrank_probe import metrics, svd
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.columns import TABLE
from lowrank_probe.deconvolution import deconvolve, with_tail
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.explained_ranks import MOST
from lowrank_probe.marks import measure
from lowrank_probe.matching import match
from lowrank_probe.metrics import Values
from lowrank_probe.options import Options
from lowrank_probe.precision import StorageNoise, assess, look

# Share of ‖ΔW‖² that the stored entries must resolve for a number to be decidable, and how far the denoised energy
# curve may be off: SLACK[0] + SLACK[1]·(1 − resolved)², as a share of ‖ΔW‖². Calibrated by benchmarks/calibration.py.
RESOLVED_GATE: Final = 0.5
SLACK: Final = (0.006, 0.35)


@dataclass(frozen=True)
class Settings:
    """How matrices are analysed. turn: held while a device computes singular values: two eigenproblems beside each
    other only share it, and then both wait for the host at once."""

    device: torch.device
    options: Options
    turn: AbstractContextManager[Any] = field(default_factory=nullcontext)

    def with_turns(self) -> "Settings":
        """The same with a lock of its own where a device computes, and none where the CPU does."""
        return replace(self, turn=nullcontext() if self.device.type == "cpu" else threading.Lock())


@dataclass(frozen=True)
class Analysed:
    """One matrix's row (without `seconds`), singular values of ΔW as stored and denoised, and the phases' times.

    times: (phase, start, stop) on `time.time`, which the nodes of a cluster share.
    """

    row: dict[str, Any]
    values: Values
    denoised: Values | None
    times: Sequence[tuple[str, float, float]]


def analyse(delta: Delta, settings: Settings) -> Analysed:
    """Everything the table says of one matrix, whose entries are freed as soon as they are not needed any more."""
    options = settings.options
    begun = time.time()
    marks = measure(delta)
    # Values on a grid of their own were quantized, whatever their dtype: that step is not the dtype's.
    delta.quantized |= marks.get("grid_bits", math.nan) > 0
    stored = look(delta, base_rounded=options.base_rounded)
    delta.base = delta.tuned = None
    looked = time.time()
    with settings.turn:
        found = singular_values(delta, top=options.top and max(options.top, MOST + 1), exact_tail=options.exact_tail)
    computed = time.time()
    # After the raw values: it overwrites ΔW, by the corrected update or by noise.
    noise = assess(delta, stored, found.values, options.seed)
    if found.method == "krylov":
        found = replace(found, values=found.values[: options.top], error=found.error[: options.top])
    del stored
    corrected = found.values
    if noise.corrected is not None:
        with settings.turn:
            corrected = svd.full_spectrum(noise.corrected).values
    row, denoised = describe(delta, found, noise, corrected)
    stopped = time.time()
    times = [("noise", begun, looked), ("spectrum", looked, computed), ("noise", computed, stopped)]
    return Analysed(row | marks, found.values, denoised, times)


def warm_up(device: torch.device) -> None:
    """Load libraries and kernels by analysing a small bf16 pair: the first use of each costs half a second in all."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(512, 256, generator=generator)
    base = open_checkpoint({"warm.weight": W.bfloat16()})
    tuned = open_checkpoint({"warm.weight": (1.1 * W).bfloat16()})
    options = Options()
    delta = read_pair(match(base, tuned, options).pairs[0], base, tuned, device)
    assert isinstance(delta, Delta)
    analyse(delta, Settings(device, options))


def singular_values(delta: Delta, *, top: int | None = None, exact_tail: bool = False) -> svd.SingularValues:
    """The singular values of one `Delta` by the tier asked for; `top` falls through to the whole spectrum.

    What float32 lost of ΔW is in the bounds: |σᵢ(ΔW) − σᵢ(ΔW + E)| ≤ ‖E‖ (Weyl), and of energies as much twice over in
    the sum and in ‖ΔW‖² (Hoffman & Wielandt).
    """
    found = _of_stored(delta, top, exact_tail)
    share = delta.lost / delta.fro_norm
    if not 0 < share < 1:
        return found
    more = (4 * share + 2 * share**2) / (1 - share) ** 2
    return replace(found, error=found.error + delta.lost, energy_error=found.energy_error + more)


def _of_stored(delta: Delta, top: int | None, exact_tail: bool) -> svd.SingularValues:
    """The singular values of ΔW as it was subtracted."""
    if delta.factors is not None:
        return svd.factored_spectrum(*delta.factors)
    assert delta.dense is not None
    if exact_tail:
        return svd.exact_spectrum(delta.dense)
    if top is not None:
        found = svd.top_spectrum(delta.dense, top, delta.fro_norm)
        if found is not None:
            return found
    return svd.full_spectrum(delta.dense, delta.fro_norm)


def describe(
    delta: Delta, found: svd.SingularValues, noise: StorageNoise, corrected: Values
) -> tuple[dict[str, Any], Values | None]:
    """One row of the table (without `seconds`), and the denoised singular values where there is noise to take out.

    corrected: the singular values that are denoised: those of ΔW as stored, or of `noise.corrected`.
    """
    s, shape, norm = found.values, delta.shape, delta.fro_norm
    whole = len(s) == min(shape) or delta.factors is not None
    row: dict[str, Any] = {
        "name": delta.name, "layer_type": delta.place.layer_type, "layer": delta.place.layer,
        "stack": delta.place.stack, "rows": shape[0], "cols": shape[1], "base_dtype": delta.base_dtype,
        "tuned_dtype": delta.tuned_dtype, "storage": noise.storage, "method": found.method,
        "compute_dtype": found.dtype, "n_kept": len(s), "n_resolved": found.resolved,
        "sigma_error": float(found.error.max() / s[0]) if len(s) and s[0] > 0 else 0.0,
        "energy_error": found.energy_error, "fro_norm": norm, "base_norm": delta.base_norm,
        "relative_update": delta.relative_update, "cosine": delta.cosine, "spectral_norm": float(s[0]),
        "nuclear_norm": metrics.nuclear_norm(s) if whole else math.nan, "stable_rank": metrics.stable_rank(s, norm),
        "effective_rank": metrics.effective_rank(s) if whole else math.nan,
        "energy_effective_rank": metrics.energy_effective_rank(s) if whole else math.nan,
        "participation_ratio": metrics.participation_ratio(s) if whole else math.nan,
        "numerical_rank": metrics.numerical_rank(s, shape) if whole else math.nan,
        "hard_threshold_rank": metrics.hard_threshold_rank(s, shape) if len(s) == min(shape) else math.nan,
        "break_even_rank": metrics.break_even_rank(shape),
    }  # fmt: skip
    for p in metrics.ENERGY_LEVELS:
        name = f"r{100 * p:.0f}"
        row[name] = metrics.energy_rank(s, norm, p)
        row[f"null_{name}"] = metrics.null_energy_rank(shape, p)
    for r in metrics.ENERGY_RANKS:
        row[f"energy_{r}"] = metrics.energy(s, norm, r)
    denoised = _storage_columns(row, corrected, shape, noise)
    for rank in ("r50", "r90"):
        row[f"relative_{rank}"] = row.get(f"{rank}_denoised", math.nan) / row[f"null_{rank}"]
    return {name: row.get(name, math.nan) for name in TABLE}, denoised


def _storage_columns(row: dict[str, Any], s: Any, shape: tuple[int, int], noise: StorageNoise) -> Values | None:
    row.update(
        unchanged_fraction=noise.unchanged_fraction, noise_model=noise.model, noise_std=noise.noise_std,
        noise_edge=noise.noise_edge, edge_ratio=noise.edge_ratio, resolved=noise.resolved,
        denoised_fro_norm=noise.fro_norm,
    )  # fmt: skip
    if noise.model == "none":
        for rank in ("r50", "r90"):
            row[f"{rank}_low"] = row[f"{rank}_high"] = row[f"{rank}_denoised"] = row[rank]
        row["signal_rank"] = row["numerical_rank"]
        row.update(decidable_signal_rank=True, decidable_r50=True, decidable_r90=True)
        return None
    if not noise.fro_norm > 0.0 or not math.isfinite(noise.noise_std):
        row.update(decidable_signal_rank=False, decidable_r50=False, decidable_r90=False)
        return None
    shape = noise.shape  # rows that did not move carry neither update nor error
    k = min(shape)
    whole = len(s) >= k
    # Below what the method itself may be wrong by nothing is a signal: of fp32 and fp64 pairs, storage hides less.
    limit = max(metrics.SIGNAL_FACTOR[noise.model] * noise.noise_edge, row["sigma_error"] * row["spectral_norm"])
    counted = whole or not float(s[-1]) > limit
    count = int(np.count_nonzero(s > limit))
    if noise.explained is not None:  # what lies beyond so few directions is what storing them leaves
        count, counted = min(count, noise.explained), True
    row["signal_rank"] = float(count) if counted else math.nan
    seen = s[:k] if whole else with_tail(s, row["fro_norm"], k)
    denoised = deconvolve(seen, noise.noise_std, shape, noise.fro_norm)
    # The same with every direction taken for an isolated one: better where few stand out of uneven noise.
    isolated = metrics.denoise(seen, noise.noise_std, shape)
    noise_energy = float((metrics.denoise(noise.outliers, noise.noise_std, shape) ** 2).sum()) / noise.fro_norm**2
    slack = SLACK[0] + SLACK[1] * (1 - noise.resolved) ** 2
    for p in (0.5, 0.9):
        rank = f"r{100 * p:.0f}"
        row[f"{rank}_denoised"] = metrics.energy_rank(denoised, noise.fro_norm, p)
        row[f"{rank}_low"], row[f"{rank}_high"] = metrics.energy_rank_bracket(
            denoised, noise.fro_norm, p, slack=slack, noise_energy=noise_energy
        )
        alone = metrics.energy_rank(isolated, noise.fro_norm, p)
        if not math.isnan(alone):  # the bracket holds both estimates
            row[f"{rank}_low"], row[f"{rank}_high"] = min(row[f"{rank}_low"], alone), max(row[f"{rank}_high"], alone)
        if not whole and not row[f"{rank}_high"] <= len(s):
            # --top did not reach it
            row[f"{rank}_low"] = row[f"{rank}_high"] = row[f"{rank}_denoised"] = math.nan
    for name in ("signal_rank", "r50", "r90"):
        row[f"decidable_{name}"] = noise.resolved >= RESOLVED_GATE
    row["decidable_signal_rank"] &= counted
    # As long as the list of values as stored: zeros for rows that did not move.
    return np.pad(denoised, (0, max(0, row["n_kept"] - len(denoised))))[: row["n_kept"]]
