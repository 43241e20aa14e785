"""A realistic `Extraction` built by hand: every column, layers × types, with what is whole, left out and unchanged.

The spectra are σ_i ∝ i^−decay, so that energies and errors are sums that a test can do again.
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lowrank_probe.columns import CURVES, EXTRACTION
from lowrank_probe.extraction_runs import Extraction
from lowrank_probe.extraction_summary import adapter_facts

# type: (module, m, n, decay of σ, ‖ΔW‖)
TYPES = {
    "q": ("self_attn.q_proj", 64, 64, 1.2, 1.0),
    "k": ("self_attn.k_proj", 16, 64, 0.9, 0.5),
    "v": ("self_attn.v_proj", 16, 64, 0.8, 0.6),
    "o": ("self_attn.o_proj", 64, 64, 1.0, 0.9),
    "gate": ("mlp.gate_proj", 176, 64, 0.4, 2.0),
    "down": ("mlp.down_proj", 64, 176, 0.5, 1.8),
}
ROUNDING = 0.004  # of the stored factors, as a share of ‖ΔW‖


def spectrum(layer_type, layer):
    """(k,) σ with ‖σ‖ = ‖ΔW‖."""
    _, m, n, decay, norm = TYPES[layer_type]
    s = np.arange(1, min(m, n) + 1.0) ** (-decay * (1 + 0.05 * layer))
    return s * (norm * (1 + 0.1 * layer) / np.linalg.norm(s))


ROOT = Path("/models/somewhere/adapter")


def build_extraction(ranks=(8,), layers=4, hostile=None, allot=None, root=ROOT, types=TYPES):
    """ranks: one adapter each. allot: (type, layer) → rank in place of it. hostile: the first q's name, and more."""
    labels = [""] if len(ranks) == 1 else [f"r{rank}" for rank in ranks]
    lines, curves = [], []
    for layer in range(layers):
        for kind in types:
            unit = _unit(kind, layer, hostile if (kind, layer) == ("q", 0) else None)
            square = spectrum(kind, layer) ** 2
            for label, rank in zip(labels, ranks, strict=True):
                lines.append({"adapter": label} | _line(unit, square, allot(kind, layer) if allot else rank))
            most = min(len(square), allot(kind, layer) if allot else max(ranks))
            if (kind, layer) != ("k", 1):  # that one is unchanged
                for rank in [r for r in (*range(1, 17), 19, 23, 27, 32, most) if 0 < r <= most]:
                    kept = square[:rank].sum() / square.sum()
                    place = {key: value for key, value in unit.items() if key in CURVES}
                    curves.append(place | {"rank": rank, "fro_norm": math.sqrt(square.sum()),
                                           "energy": kept - ROUNDING**2, "energy_upper": kept})  # fmt: skip
    for label in labels:
        lines += [{"adapter": label} | line for line in _others(hostile, layers)]
    total = sum(line["fro_norm"] ** 2 for line in lines if line["fro_norm"] > 0) / len(labels)
    for line in lines:
        line["share"] = line["fro_norm"] ** 2 / total
    ledger = pd.DataFrame(lines, columns=list(EXTRACTION))
    told = {label: adapter_facts(ledger, label) | {"n_bytes": 1_234_567 * (i + 1)} for i, label in enumerate(labels)}
    made = pd.DataFrame(curves, columns=list(CURVES)).drop_duplicates(["name", "rank"], ignore_index=True)
    where = {label: root / label for label in labels}
    return Extraction(ledger, made, where, facts(ranks, hostile) | {"adapters": told})


def _unit(kind, layer, name=None):
    module, m, n, _, _ = TYPES[kind]
    return {"name": name or f"model.layers.{layer}.{module}", "kind": "linear", "layer_type": kind, "layer": layer,
            "stack": "", "rows": m, "cols": n, "copies": 1}  # fmt: skip


def _line(unit, square, rank):
    rank, norm = min(rank, len(square)), math.sqrt(square.sum())
    nothing = {"rank": 0, "parameters": 0, "relative_update": math.nan, "method": "", "note": "", "rule": "fixed",
               "relative_error": math.nan, "optimal_error_low": math.nan, "optimal_error_high": math.nan}  # fmt: skip
    if (unit["layer_type"], unit["layer"]) == ("k", 1):
        return unit | nothing | {"status": "unchanged", "fro_norm": 0.0, "energy": math.nan, "rule": "ΔW = 0"}
    if rank == 0:
        return unit | nothing | {"status": "rank 0", "fro_norm": norm, "energy": 0.0, "relative_error": 1.0}
    cut = float(square[rank:].sum() / square.sum())
    return unit | nothing | {
        "status": "adapted", "rank": rank, "rule": "fixed" if rank < len(square) else "min(m, n)",
        "parameters": rank * (unit["rows"] + unit["cols"]), "fro_norm": norm, "relative_update": norm / 30,
        "energy": 1 - cut - ROUNDING**2, "relative_error": math.sqrt(cut + ROUNDING**2),
        "optimal_error_low": math.sqrt(cut), "optimal_error_high": math.sqrt(cut), "method": "gram",
    }  # fmt: skip


def _others(hostile, layers):
    """A table carried whole, norms and an embedding left out, and a tensor of unknown size."""
    nothing = {"kind": "", "stack": "", "copies": 1, "rank": 0, "rule": "", "method": "", "layer": None}
    left = nothing | {"status": "not carried", "parameters": 0, "energy": 0.0, "relative_error": 1.0}
    not_asked = "not among --targets"
    return [
        nothing | {"name": "lm_head", "status": "carried whole", "parameters": 4096, "fro_norm": 1.5, "energy": 1.0,
                   "relative_error": 0.0, "note": "another size"},
        left | {"name": "model.embed_tokens.weight", "layer_type": "embedding", "fro_norm": 2.5, "note": not_asked},
        *(left | {"name": f"model.layers.{i}.input_layernorm.weight", "layer_type": "input_layernorm", "layer": i,
                  "fro_norm": 0.01, "note": not_asked} for i in range(layers)),
        left | {"name": hostile or "model.rotary.scale", "layer_type": hostile or "rotary", "fro_norm": math.nan,
                "energy": math.nan, "relative_error": math.nan, "note": hostile or "only in the fine-tune"},
    ]  # fmt: skip


def facts(ranks, hostile=None):
    """As `extract` writes them."""
    side = {"kind": "model", "model_type": "llama", "n_tensors": 272, "n_bytes": 269026304, "files": [],
            "architectures": ["LlamaForCausalLM"]}  # fmt: skip
    return {
        "schema_version": 1, "status": "complete",
        "base": {"path": "/home/someone/.cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f0", **side},
        "tuned": {"path": f"/home/someone/runs/{hostile or 'man-pages'}", **side},
        "targets": ["all-linear"], "servable": False, "dtype": "bfloat16", "ranks": {"ranks": list(ranks)},
        "options": {"include": [], "exclude": [], "layers": None, "seed": 0}, "notes": [hostile] if hostile else [],
        "vocabulary": [49152, 49160],
        "versions": {"lowrank_probe": "0.1.0", "python": "3.12.3", "torch": "2.9.1"},
        "device": {"type": "cpu", "name": "Intel(R) Xeon(R) Processor", "n_threads": 2},
        "time": "2025-11-24T21:54:10+00:00", "seconds": 3.4,
    }  # fmt: skip


def checks(labels=("",), hostile=None):
    """The facts of a calibration and of a verification, as `extract` and `--verify` write them."""
    ways = [("plain SVD", "inf"), ("inputs", "0.1"), ("inputs and gradients", "1.0")]
    tried = [
        {"adapter": label, "weighted_by": sides, "ridge": ridge, "choice": 0.0123 * (3 - i) + 0.001 * n,
         "report": 0.0321 * (3 - i) + 0.001 * n, "chosen": i == 2,
         "choice_low": -0.0123 * i * 1.1, "choice_high": -0.0123 * i * 0.9,
         "report_low": -0.0321 * i * 1.1, "report_high": -0.0321 * i * 0.9}
        for i, (sides, ridge) in enumerate(ways) for n, label in enumerate(labels)
    ]  # fmt: skip
    models = ("base", "base+adapter", "base+adapter merged")
    table = [
        {"model": model, "kl_nats": 0.5 / 7**i, "top1_agreement": 0.7 + 0.1 * i, "mean_abs_logit_error": 0.42 / 7**i,
         "n_tokens": 1895} for i, model in enumerate(models)
    ]  # fmt: skip
    check = {
        "ok": hostile is None, "measure": "logits", "table": table, "merged_gap": 0.00313, "storage": "bfloat16",
        "storage_rounding": 0.00313, "tolerance": 0.0115, "problems": [hostile] if hostile else [],
        "notes": [hostile] if hostile else [],
    }  # fmt: skip
    return {
        "calibration": {
            "file": f"/home/someone/{hostile or 'text.jsonl'}",
            "n_documents": {"moments": 30, "choice": 15, "report": 15},
            "n_tokens": {"moments": 32768, "choice": 4096, "report": 4000}, "tried": tried,
            "measure": "KL(tuned ‖ base + adapter), nats a row", "base": {"choice": 0.987, "report": 0.876},
            "plain": [], "stays_tuned": [],
        },
        "verification": dict.fromkeys(labels, check),
    }  # fmt: skip
