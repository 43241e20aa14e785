"""Full fine-tunes of SmolLM2-135M whose fp32 update is known: what the stored bf16 pair says, beside the truth.

    python benchmarks/smollm2_finetune.py RUNS            # one GPU, about 3 minutes
    python benchmarks/smollm2_truth.py RUNS               # writes docs/smollm2-truth.md

Reads RUNS/lr_*/tuned_fp32.safetensors. The analysis sees the bf16 values only; the fp32 update serves as the truth.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tables import frame
from truth import collect, compare, score

from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.devices import choose_device
from lowrank_probe.facts import machine_facts
from lowrank_probe.layers import sort_key

DOCS = Path(__file__).resolve().parent.parent / "docs"


def analyse(base_dir: Path, run: Path, device: str) -> list[dict[str, Any]]:
    """One row a projection matrix of one fine-tune."""
    base, tuned = open_checkpoint(base_dir), open_checkpoint(run / "tuned_fp32.safetensors")
    rows = []
    for name, info in tuned.tensors.items():
        if len(info.shape) == 2 and ".layers." in name:
            W = base.read(name, device)
            rows.append(compare(name, W, tuned.read(name, device).double() - W.double()) | {"run": run.name})
    return rows


def by_type(table: pd.DataFrame) -> pd.DataFrame:
    """Medians per run and layer type: truth, raw, ours with its bracket."""
    lines = []
    for (run, layer_type), group in table.groupby(["run", "layer_type"], sort=False):
        decided = group[group["decidable_r90"]]
        median = group.median(numeric_only=True)
        ours = decided.median(numeric_only=True) if len(decided) else median * float("nan")
        lines.append(
            {
                "run": run, "type": layer_type, "unchanged": f"{100 * median['unchanged_fraction']:.0f} %",
                "‖ΔW‖ raw / true": f"{(group['fro_norm'] / group['true_norm']).median():.3f}",
                "‖ΔW‖ ours / true": f"{(group['denoised_fro_norm'] / group['true_norm']).median():.3f}",
                "r50 true / raw / ours": f"{median['true_r50']:.0f} / {median['r50']:.0f} / {ours['r50_denoised']:.0f}",
                "r50 bracket": f"{ours['r50_low']:.0f}–{ours['r50_high']:.0f}",
                "r90 true / raw": f"{median['true_r90']:.0f} / {median['r90']:.0f}",
                "r90 bracket": f"{ours['r90_low']:.0f}–{ours['r90_high']:.0f}",
                "null r90": f"{median['null_r90']:.0f}", "decided": f"{len(decided)} of {len(group)}",
            }
        )  # fmt: skip
    lines.sort(key=lambda line: (line["run"], sort_key(line["type"])))
    return pd.DataFrame(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--base", type=Path, help="the base's directory; without it, SmolLM2 is fetched")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=DOCS / "smollm2-truth.md")
    parser.add_argument("--csv", type=Path, help="write every matrix's row there too")
    arguments = parser.parse_args()
    base = arguments.base
    if base is None:
        import real_models

        base = real_models.smollm2()
    start = time.perf_counter()
    runs = sorted(p for p in arguments.runs.iterdir() if (p / "tuned_fp32.safetensors").exists())
    table = collect(row for run in runs for row in analyse(base, run, arguments.device))
    table["decidable_r90"] = table["decidable_r90"].astype(bool)
    seconds = time.perf_counter() - start
    shown = by_type(table)
    print(shown.to_string(index=False))
    scores = pd.DataFrame([{"run": run, **score(group)} for run, group in table.groupby("run")]).round(3)
    everything = score(table[table["unchanged_fraction"] <= 0.7])
    print(scores.to_string(index=False))
    bars = {
        "r50 within 25 % on ≥ 3 of 4": everything["r50_within_25%"] >= 0.75,
        "norm within 2 % (≥ 95 of 100)": everything["norm_within_2%"] >= 0.95,
        "r90 inside its bracket (≥ 95 of 100)": everything["r90_inside"] >= 0.95,
    }
    lines = "\n".join(f"- {'PASS' if held else 'FAIL'}: {bar}" for bar, held in bars.items())
    print(lines)
    facts = machine_facts(choose_device(arguments.device))
    text = (
        "# Full fine-tunes of SmolLM2-135M: truth, raw, ours\n\n"
        "Written by `python benchmarks/smollm2_truth.py` after `python benchmarks/smollm2_finetune.py`: 200 steps of "
        "16 × 512 tokens of German manual pages, fp32 masters, cosine schedule. The analysis sees the bf16-stored pair "
        f"only. {facts['device']['name']}, torch {facts['versions']['torch']}, {facts['time'][:10]}; "
        f"{len(table)} matrices analysed in {seconds:.0f} s.\n\n"
        f"Over matrices with at most 70 % of their entries unchanged:\n\n{lines}\n\n"
        "Medians over 30 layers. raw: of the difference as stored.\n\n"
        f"{frame(shown)}\n\n## Share of decided matrices for which it holds\n\n{frame(scores)}\n"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    if arguments.csv:
        table.to_csv(arguments.csv, index=False)
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
