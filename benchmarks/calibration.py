"""Calibrate the gates: is the truth inside the printed bracket, and where must the answer be "undecidable"?

Updates whose truth is known (planted spectra on Gaussian and on real weights, and real fp32 fine-tunes) are stored in
bf16 and fp16 at many sizes and analysed from the stored pair alone. Writes docs/calibration.md and docs/calibration.png.

    python benchmarks/calibration.py            # about 6 minutes on 2 cores
    python benchmarks/calibration.py --quick    # about 1 minute, no downloads
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import real_models
import torch
from tables import frame
from torch import Tensor
from truth import collect, compare

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.devices import choose_device
from lowrank_probe.facts import machine_facts
from lowrank_probe.rows import RESOLVED_GATE, SLACK

DOCS = Path(__file__).resolve().parent.parent / "docs"
SHAPES = ((512, 512), (1024, 384), (192, 576))
SIZES = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
SCALES = (1.0, 0.5, 0.25, 0.1, 0.05)


def spectra(k: int) -> dict[str, Tensor]:
    """Singular values of the planted updates."""
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "rank 8": (i <= 8).double(),
        "rank 64": (i <= 64) * torch.linspace(2, 1, k).double(),
        "1/i": 1 / i,
        "1/sqrt(i)": i**-0.5,
        "i^-0.3": i**-0.3,
        "linear": 1 - i / (k + 1),
        "shelf": (i <= 0.3 * k).double(),
        "Gaussian": _gaussian(k),
        "flat": torch.ones(k, dtype=torch.float64),
    }


def _gaussian(k: int) -> Tensor:
    """Singular values of a square matrix of independent normal entries."""
    return torch.linalg.svdvals(torch.randn(k, k, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def planted(quick: bool) -> Iterator[dict[str, Any]]:
    """Planted spectra at every shape, size and storage type, on Gaussian and on SmolLM2's weights."""
    weights = {"Gaussian": None} if quick else {"Gaussian": None, "SmolLM2": open_checkpoint(real_models.smollm2())}
    generator = torch.Generator().manual_seed(0)
    for source, checkpoint in weights.items():
        for m, n in SHAPES[:1] if quick else SHAPES:
            if checkpoint is None:
                W = torch.randn(m, n, generator=generator) * 0.02
            else:
                # A real matrix at least this large, cut to the shape (its uneven rows and columns are the point).
                name = "model.layers.9.mlp.gate_proj.weight" if m > 576 else "model.layers.9.self_attn.q_proj.weight"
                W = checkpoint.read(name).float()[:m, :n].contiguous()
            for kind, s in spectra(min(m, n)).items():
                U = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64)).Q
                V = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64)).Q
                update = (U * s) @ V.T
                update *= torch.linalg.norm(W.double()) / torch.linalg.norm(update)
                for storage in ("BF16", "F16"):
                    for size in SIZES:
                        scale = size if storage == "BF16" else size / 8
                        row = compare(f"layers.0.{kind}.weight", W, update * scale, storage)
                        yield row | {"set": f"{kind} on {source}", "kind": "planted", "stored_as": storage}


def real() -> Iterator[dict[str, Any]]:
    """Real fp32 fine-tunes, rounded to bf16 by this script at several sizes."""
    families = real_models.anarcii()
    bert = real_models.rxnfp()
    pairs = {
        "antibody → TCR": (families["antibody"], families["tcr"]),
        "antibody → shark": (families["antibody"], families["shark"]),
        "BERT → reaction classes": (bert["bert_pretrained"], bert["bert_ft_10k_25s"]),
    }
    for label, (base_dir, tuned_dir) in pairs.items():
        base, tuned = open_checkpoint(base_dir), open_checkpoint(tuned_dir)
        for name, info in base.tensors.items():
            other = tuned.tensors.get(name)
            if other is None or other.shape != info.shape or len(info.shape) != 2 or min(info.shape) < 64:
                continue
            W, update = base.read(name), tuned.read(name).double() - base.read(name).double()
            if float(update.abs().max()) == 0.0:
                continue
            for scale in SCALES:
                row = compare(name, W, update * scale)
                yield row | {"set": label, "kind": "real", "stored_as": "BF16", "scale": scale}


def summary(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Per group: matrices, decided, truth inside the brackets and r50 within 25 % among the decided."""
    lines = []
    for key, group in table.groupby(by, sort=False):
        decided = group[group["decidable_r90"]]
        inside = {
            p: (decided[f"{p}_low"] <= decided[f"true_{p}"]) & (decided[f"true_{p}"] <= decided[f"{p}_high"])
            for p in ("r50", "r90")
        }
        off = (decided["r50_denoised"] - decided["true_r50"]).abs() <= 0.25 * decided["true_r50"]
        lines.append(
            dict(zip(by, key, strict=True))
            | {
                "matrices": len(group),
                "unchanged": f"{100 * group['unchanged_fraction'].median():.0f} %",
                "decided": len(decided),
                "r50 inside": int(inside["r50"].sum()),
                "r90 inside": int(inside["r90"].sum()),
                "r50 within 25 %": int(off.sum()),
                "r90 high/low": f"{(decided['r90_high'] / decided['r90_low']).median():.2f}" if len(decided) else "–",
            }
        )
    return pd.DataFrame(lines)


def plot(table: pd.DataFrame, path: Path) -> None:
    """Estimate over truth against the resolved share, with the printed brackets, and the gate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    for axis, p in zip(axes, ("r50", "r90"), strict=True):
        for kind, colour in (("planted", "#0072B2"), ("real", "#D55E00")):
            part = table[(table["kind"] == kind) & table["resolved"].notna() & (table["resolved"] > 0)]
            middle = part[f"{p}_denoised"] / part[f"true_{p}"]
            low, high = part[f"{p}_low"] / part[f"true_{p}"], part[f"{p}_high"] / part[f"true_{p}"]
            axis.vlines(part["resolved"], low, high, color=colour, alpha=0.25, linewidth=1)
            axis.plot(part["resolved"], middle, ".", color=colour, markersize=4, label=f"{kind}: estimate and bracket")
        axis.axhline(1.0, color="black", linewidth=1)
        axis.axvline(RESOLVED_GATE, color="grey", linestyle="--", linewidth=1)
        axis.set(xlabel="share of ‖ΔW‖² that the stored entries resolve", title=f"{p}: printed over true", yscale="log")
        axis.set_ylim(0.08, 12)
        axis.text(RESOLVED_GATE - 0.01, 0.1, "undecidable ←", ha="right", color="grey")
        axis.grid(alpha=0.2)
    axes[0].legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Gaussian weights, one shape, no downloads")
    quick = parser.parse_args().quick
    rows: list[dict[str, Any]] = []
    for source in (planted(quick), *(() if quick else (real(),))):
        for row in source:
            rows.append(row)
            print(f"\r{len(rows)} matrices", end="", file=sys.stderr)
    print(file=sys.stderr)
    table = collect(rows)
    table["decidable_r90"] = table["decidable_r90"].astype(bool)
    planted_table = summary(table[table["kind"] == "planted"], ["set", "stored_as"])
    print(planted_table.to_string(index=False))
    real_table = pd.DataFrame()
    if not quick:
        real_table = summary(table[table["kind"] == "real"], ["set", "scale"])
        print(real_table.to_string(index=False))
    # All σ equal (an isometry) is the one spectrum whose spread under noise the estimate does not undo: reported apart.
    is_flat = table["set"].str.startswith("flat")
    flat = table[is_flat & table["decidable_r90"]]
    low_rank = int((flat["r90_high"] <= 0.5 * flat["null_r90"]).sum())
    off = float((flat["r90_high"] / flat["true_r90"] - 1).min())
    flat_line = (
        f"flat spectra: r90's upper end misses by at most {-100 * off:.0f} %; "
        f"called low-rank: {low_rank} of {len(flat)}"
    )
    print(flat_line)
    decided = table[table["decidable_r90"] & ~is_flat]
    inside = {
        p: float(
            ((decided[f"{p}_low"] <= decided[f"true_{p}"]) & (decided[f"true_{p}"] <= decided[f"{p}_high"])).mean()
        )
        for p in ("r50", "r90")
    }
    verdict = "PASS" if min(inside.values()) >= 0.95 and low_rank == 0 else "FAIL"
    line = (
        f"decided {len(decided)} of {int((~is_flat).sum())}; truth inside the bracket: "
        f"r50 {100 * inside['r50']:.1f} %, r90 {100 * inside['r90']:.1f} % (bar 95 %)"
    )
    print(f"{verdict}: {line}")
    if not quick:
        DOCS.mkdir(exist_ok=True)
        plot(table, DOCS / "calibration.png")
        facts = machine_facts(choose_device("cpu"))
        text = (
            "# Calibration of the gates and brackets\n\n"
            f"Written by `python benchmarks/calibration.py` on {facts['device']['name']}, torch "
            f"{facts['versions']['torch']}, {facts['time'][:10]}.\n\n"
            f"Gate: decided where the stored entries resolve at least {RESOLVED_GATE:g} of ‖ΔW‖². Slack of the energy "
            f"curve: {SLACK[0]:g} + {SLACK[1]:g}·(1 − resolved)².\n\n- {verdict}: {line}\n\nNot counted there, {flat_line}.\n\n"
            "![calibration](calibration.png)\n\n"
            "Each point is one matrix: the printed estimate over the truth, its bracket as a bar. Left of the dashed "
            "line `probe` says undecidable.\n\n## Planted updates\n\n"
            f"{frame(planted_table)}\n\n## Real fp32 fine-tunes, rounded to bf16 at several sizes\n\n"
            f"{frame(real_table)}\n"
        )
        (DOCS / "calibration.md").write_text(text, encoding="utf-8")
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    raise SystemExit(main())
