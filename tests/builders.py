"""A realistic `Result` from synthetic spectra: every column, layers × types, with what storage noise does to each.

q, o: a clear low rank · k, v: a heavy tail, r90 not reached in v's last layer (as with --top) · gate, up, down: close
to noise · embedding and lm_head: outside the blocks, swallowed by storage, so undecidable.
"""

import math

import numpy as np
import pandas as pd

from lowrank_probe import metrics
from lowrank_probe.columns import LEDGER, TABLE
from lowrank_probe.runs import Result

# type: (rows, cols in units of hidden, module, decay of σ, noise floor as a share of σ₁, unchanged share)
TYPES = {
    "q": (1, 1, "self_attn.q_proj", 0.75, 0.004, 0.08),
    "k": (0.25, 1, "self_attn.k_proj", 0.6, 0.03, 0.15),
    "v": (0.25, 1, "self_attn.v_proj", 0.55, 0.03, 0.16),
    "o": (1, 1, "self_attn.o_proj", 0.7, 0.004, 0.09),
    "gate": (2.75, 1, "mlp.gate_proj", 0.12, 0.05, 0.18),
    "up": (2.75, 1, "mlp.up_proj", 0.1, 0.05, 0.17),
    "down": (1, 2.75, "mlp.down_proj", 0.35, 0.05, 0.19),
}
OUTSIDE = {"embedding": ("model.embed_tokens.weight", 0.92), "lm_head": ("lm_head.weight", 0.77)}


def build(layers=6, hidden=64, types=tuple(TYPES), hostile=None, seed=0, copies=1, truncated=False):
    """A `Result` of `layers` blocks; `hostile` replaces the first q's name; `copies` > 1 makes experts."""
    rng = np.random.default_rng(seed)
    rows, spectra, denoised = [], {}, {}

    def add(name, layer_type, layer, shape, decay, floor, unchanged):
        k = min(shape)
        size = 0.02 * math.sqrt(k) * rng.uniform(0.6, 1.4)
        s = size * np.arange(1, k + 1.0) ** (-decay * rng.uniform(0.9, 1.1)) * np.exp(-np.arange(k) / k)
        s = np.sort(np.sqrt(s**2 + (floor * size * np.linspace(2, 0.3, k)) ** 2))[::-1]
        whole = float(np.linalg.norm(s))
        if truncated:
            s = s[: k // 2]
        rows.append(row(name, layer_type, layer, shape, s, whole, floor * size, unchanged))
        spectra[name] = s
        if unchanged < 0.5:
            denoised[name] = np.where(s > rows[-1]["noise_edge"], np.sqrt(np.maximum(s**2 - (floor * size) ** 2, 0)), 0)

    add("model.embed_tokens.weight", "embedding", None, (8 * hidden, hidden), 0.4, 0.3, 0.92)
    for layer in range(layers):
        for layer_type in types:
            m, n, module, decay, floor, unchanged = TYPES[layer_type]
            for copy in range(copies):
                name = f"model.layers.{layer}.{module}.{f'{copy}.' if copies > 1 else ''}weight"
                if hostile and layer == 0 and layer_type == "q" and copy == 0:
                    name = hostile
                shape = (int(m * hidden), int(n * hidden))
                add(
                    name, layer_type, layer, shape, decay, floor, unchanged + 0.3 * layer / layers * (layer_type == "k")
                )
    add("lm_head.weight", "lm_head", None, (8 * hidden, hidden), 0.5, 0.25, 0.77)
    table = pd.DataFrame(rows, columns=list(TABLE))
    table["layer"] = table["layer"].astype("Int64")
    last = table["layer"] == layers - 1
    unreached = ["r90_low", "r90_high", "r90_denoised", "relative_r90"]
    table.loc[last & table["layer_type"].eq("v"), unreached] = math.nan
    return Result(table, ledger(table, layers, hidden), spectra, denoised, facts())


def row(name, layer_type, layer, shape, s, fro_norm, noise_std, unchanged):
    """One row of the table, from the spectrum by `metrics`."""
    whole = len(s) == min(shape)
    edge = 1.02 * noise_std * 1.8
    base_norm = 0.9 * math.sqrt(min(shape))
    cells = {
        "name": name, "layer_type": layer_type, "layer": layer, "stack": "", "rows": shape[0], "cols": shape[1],
        "base_dtype": "BF16", "tuned_dtype": "BF16", "storage": "BF16", "method": "gram", "compute_dtype": "float64",
        "n_kept": len(s), "n_resolved": len(s), "sigma_error": 1e-12, "energy_error": 1e-13, "fro_norm": fro_norm,
        "base_norm": base_norm, "relative_update": fro_norm / base_norm, "cosine": 0.9994,
        "spectral_norm": s[0], "nuclear_norm": metrics.nuclear_norm(s) if whole else math.nan,
        "stable_rank": metrics.stable_rank(s, fro_norm),
        "effective_rank": metrics.effective_rank(s) if whole else math.nan,
        "energy_effective_rank": metrics.energy_effective_rank(s) if whole else math.nan,
        "participation_ratio": metrics.participation_ratio(s) if whole else math.nan,
        "numerical_rank": metrics.numerical_rank(s, shape) if whole else math.nan,
        "hard_threshold_rank": metrics.hard_threshold_rank(s, shape) if whole else math.nan,
        "break_even_rank": metrics.break_even_rank(shape), "unchanged_fraction": unchanged, "noise_model": "rounding",
        "noise_std": noise_std / math.sqrt(max(shape)), "noise_edge": edge,
        "edge_ratio": edge * math.sqrt(max(shape)) / (noise_std * (math.sqrt(shape[0]) + math.sqrt(shape[1]))),
        "signal_rank": float(np.count_nonzero(s > 1.05 * edge)), "denoised_fro_norm": 0.98 * fro_norm,
        "decidable_signal_rank": unchanged <= 0.7, "decidable_r50": unchanged <= 0.45,
        "decidable_r90": unchanged <= 0.2, "seconds": 0.31,
    }  # fmt: skip
    for p in metrics.ENERGY_LEVELS:
        cells[f"r{100 * p:.0f}"] = metrics.energy_rank(s, fro_norm, p)
        cells[f"null_r{100 * p:.0f}"] = metrics.null_energy_rank(shape, p)
    for r in metrics.ENERGY_RANKS:
        cells[f"energy_{r}"] = metrics.energy(s, fro_norm, r)
    for rank in ("r50", "r90"):
        cells[f"relative_{rank}"] = cells[rank] / cells[f"null_{rank}"]
        cells[f"{rank}_denoised"] = cells[rank]
        cells[f"{rank}_low"] = max(1.0, math.floor(0.92 * cells[rank])) if math.isfinite(cells[rank]) else math.nan
        cells[f"{rank}_high"] = cells[rank]
    return cells


def ledger(table, layers, hidden):
    """The analysed matrices, the norms beside them, one excluded, one only in the tuned side."""
    lines = [
        {"name": r.name, "tuned_name": r.name, "status": "analysed", "layer_type": r.layer_type, "layer": r.layer,
         "base_shape": f"{r.rows}×{r.cols}", "tuned_shape": f"{r.rows}×{r.cols}", "base_dtype": "BF16",
         "tuned_dtype": "BF16", "fro_norm": r.fro_norm, "relative_update": r.relative_update, "note": ""}
        for r in table.itertuples()
    ]  # fmt: skip
    common = {"layer": pd.NA, "base_shape": f"{hidden}", "tuned_shape": f"{hidden}", "base_dtype": "BF16",
              "tuned_dtype": "BF16", "fro_norm": 0.01, "relative_update": 1e-4}  # fmt: skip
    for i in range(2 * layers):
        name = f"model.layers.{i // 2}.{('input_layernorm', 'post_attention_layernorm')[i % 2]}.weight"
        lines.append({**common, "name": name, "tuned_name": name, "status": "vector", "layer_type": "norm",
                      "layer": i // 2, "note": "1-D: has no rank"})  # fmt: skip
    lines.append({**common, "name": "model.score.weight", "tuned_name": "", "status": "only in base",
                  "layer_type": "score", "tuned_shape": "", "fro_norm": math.nan, "relative_update": math.nan,
                  "note": "no such tensor in the tuned side"})  # fmt: skip
    frame = pd.DataFrame(lines, columns=list(LEDGER))
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def facts():
    """Run facts as `spectra` writes them."""
    files = [{"name": "model.safetensors", "n_bytes": 269060552, "modified": "2025-11-20T10:00:00+00:00"}]
    side = {"kind": "model", "model_type": "llama", "n_tensors": 272, "n_bytes": 269026304, "files": files}
    return {
        "schema_version": 1, "status": "complete", "related": True, "median_cosine": 0.9994,
        "base": {"path": "/models/SmolLM2-135M", **side},
        "tuned": {"path": "/models/SmolLM2-135M-man-pages", **side},
        "versions": {"lowrank_probe": "0.1.0", "python": "3.12.3", "torch": "2.9.1", "numpy": "2.3.5"},
        "device": {"type": "cuda:0", "name": "NVIDIA H100 80GB HBM3", "n_threads": 16},
        "time": "2025-11-24T21:54:10+00:00", "counts": {"analysed": 30, "vector": 8},
        "options": {"include": [], "exclude": [], "layers": None, "top": None, "seed": 0},
        "seconds": {"headers": 0.21, "read": 4.1, "noise": 2.2, "spectrum": 9.4},
        "notes": ["lm_head is tied in the base and free in the tuned side"],
    }  # fmt: skip
