"""The two traps of naive ranks, through `probe spectrum`: storage rounding, and noise whose "rank" is its shape.

Trap 1 plants low-rank updates of known rank on Gaussian and on real weights (SmolLM2-135M, an anarcii encoder–decoder)
and stores both sides in bf16, ranks 1 to 4 too, where what bf16 leaves out is no independent noise; trap 2 adds pure
Gaussian noise. Writes docs/benchmarks-traps.md. Exit 1 on a FAIL.

    python benchmarks/traps.py             # about 3 minutes on 2 cores
    python benchmarks/traps.py --quick     # Gaussian weights only: no downloads
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
import real_models
import torch
from accuracy import probe, publish, save, update
from torch import Tensor

from lowrank_probe.checkpoints import Checkpoint, open_checkpoint
from lowrank_probe.metrics import SIGNAL_FACTOR

# Rank 16 with σ_i = exp(−i/5): r90 is 6, r99 is 12, the effective rank 11. All of it, stored exactly.
DECAYING: Final = torch.exp(-torch.arange(16, dtype=torch.float64) / 5)
TRUE_R90: Final = 6
SIZES_16: Final = ("3e-2", "1e-2", "3e-3", "1e-3", "3e-4")
SIZES_8: Final = ("2e-3", "1e-3", "5e-4", "2e-4")
RANKS_FEW: Final = (1, 2, 3, 4)
SIZES_FEW: Final = ("3e-2", "1e-2", "3e-3", "1e-3")
SIZES_NOISE: Final = {"F32": ("1e-2",), "BF16": ("1e-2", "1e-3")}
NOISE_SHAPES: Final = ((512, 512), (1024, 1024), (1024, 4096), (576, 1536), (2048, 512))
GAUSSIAN: Final = ((1024, 1024), (512, 2048), (1536, 576))
LAYERS: Final = (3, 14, 25)
INSIDE_BAR: Final = 0.95
NULL_BAR: Final = 0.02
FEW_BAR: Final = 0.98

Case = tuple[str, Tensor, Tensor]  # name, base, update: of which the layer type, one a case, is the last component


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Gaussian weights only, no downloads")
    quick = parser.parse_args().quick
    weights = gaussian(GAUSSIAN) | ({} if quick else smollm2() | anarcii())
    rank16 = pd.concat(analyse(planted_16(weights, size), "BF16", size) for size in SIZES_16)
    rank8 = pd.concat(analyse(planted_8(weights, size), "BF16", size) for size in SIZES_8)
    noise = pd.concat(
        analyse(plain_noise(gaussian(NOISE_SHAPES) if on == "Gaussian" else real(weights), size), storage, size)
        for on in ("Gaussian",) + (() if quick else ("real",))
        for storage, sizes in SIZES_NOISE.items()
        for size in sizes
    )
    few = pd.concat(
        analyse(planted(weights, size, r), "BF16", size).assign(planted=r) for r in RANKS_FEW for size in SIZES_FEW
    )
    verdicts = judge_16(rank16) + judge_8(rank8) + judge_few(few) + judge_noise(noise)
    tables = [
        ("Rank 16 (r90 = 6) stored in bf16", *table_16(rank16)),
        ("Exactly rank 8 stored in bf16", *table_8(rank8)),
        ("Ranks 1 to 4 stored in bf16", *table_few(few)),
        ("Pure noise, Gaussian weights", *table_noise(noise[noise["source"] == "Gaussian"])),
        ("Pure noise, real weights", *table_noise(noise[noise["source"] != "Gaussian"])),
    ]
    tables = [table for table in tables if table[2]]
    note = (
        "Sizes are rms ΔW / rms W. Medians over the matrices of a row, (least–most) where they differ. `raw` is ΔW as "
        "stored; the bracket and the counts are printed by `probe`; the truth never enters them. A count or bracket "
        "is judged only where the command calls it decidable; a verdict is one a matrix. SmolLM2: the seven matrices "
        f"of layers {', '.join(map(str, LAYERS))} of the bf16 base; anarcii: the antibody model's weights rounded to bf16."
    )
    publish("traps", "The two traps", note, tables, verdicts, write=not quick)
    return 0 if all(ok for _, ok in verdicts) else 1


def gaussian(shapes: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"Gaussian.m{m}x{n}": 0.02 * torch.randn(m, n, generator=generator) for m, n in shapes}


def smollm2() -> dict[str, Tensor]:
    side = open_checkpoint(real_models.smollm2())
    return _matrices("SmolLM2", side, lambda name: any(f"layers.{layer}." in name for layer in LAYERS))


def anarcii() -> dict[str, Tensor]:
    side = open_checkpoint(real_models.anarcii()["antibody"])
    return _matrices("anarcii", side, lambda name: True)


def _matrices(source: str, side: Checkpoint, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    return {
        f"{source}.{name.removesuffix('.weight').replace('.', '_')}": side.read(name).float()
        for name, info in side.tensors.items()
        if len(info.shape) == 2 and min(info.shape) >= 64 and wanted(name)
    }


def real(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: W for name, W in weights.items() if not name.startswith("Gaussian")}


def planted_16(weights: Mapping[str, Tensor], size: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(2)
    for name, W in weights.items():
        yield name, W, _sized(update((W.shape[0], W.shape[1]), DECAYING, generator), W, size)


def planted_8(weights: Mapping[str, Tensor], size: str) -> Iterator[Case]:
    return planted(weights, size, 8)


def planted(weights: Mapping[str, Tensor], size: str, r: int) -> Iterator[Case]:
    """B·A with Gaussian factors of rank r: what a LoRA merged into the base looks like."""
    generator = torch.Generator().manual_seed(3)
    for name, W in weights.items():
        B = torch.randn(W.shape[0], r, generator=generator, dtype=torch.float64)
        A = torch.randn(r, W.shape[1], generator=generator, dtype=torch.float64)
        yield name, W, _sized(B @ A, W, size)


def plain_noise(weights: Mapping[str, Tensor], size: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(4)
    for name, W in weights.items():
        yield name, W, _sized(torch.randn(W.shape, generator=generator, dtype=torch.float64), W, size)


def _sized(D: Tensor, W: Tensor, size: str) -> Tensor:
    """D scaled to rms ΔW / rms W = size, against W as bf16 stores it."""
    return D * (float(size) * torch.linalg.norm(W.bfloat16().double()) / torch.linalg.norm(D))


def analyse(cases: Iterator[Case], storage: str, size: str) -> pd.DataFrame:
    """The table of `probe spectrum` on a pair of checkpoints that holds all cases, a verdict for each."""
    dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[storage]
    base, tuned = {}, {}
    for name, W, D in cases:
        base[f"{name}.weight"] = W.to(dtype)
        tuned[f"{name}.weight"] = (base[f"{name}.weight"].double() + D).to(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        run = probe(root / "run", save(root / "base", base), save(root / "tuned", tuned))
    table = run.table.copy()
    verdicts = run.summary.set_index("layer_type")["verdict"]
    if len(verdicts) != len(table):
        raise RuntimeError("two cases fell into one layer type")
    table["verdict"] = table["layer_type"].map(verdicts)
    table["source"] = table["name"].str.partition(".")[0]
    table["size"], table["stored"] = size, storage
    table["raw_ratio"] = table["r90"] / table["null_r90"]
    return table


def judge_16(table: pd.DataFrame) -> list[tuple[str, bool]]:
    lines = []
    for source, group in table.groupby("source", sort=False):
        large = group[group["size"].isin(("3e-2", "1e-2"))]
        smallest = large["size"].astype(float) * large["base_norm"] * float(DECAYING[15] / torch.linalg.norm(DECAYING))
        seen = large[smallest > SIGNAL_FACTOR["rounding"] * large["noise_edge"]]
        right = int((seen["decidable_signal_rank"] & seen["signal_rank"].eq(16)).sum())
        hidden = len(large) - len(seen)
        lines.append((f"rank 16 on {source} weights at 3e-2 and 1e-2: counted as 16 in {right} of {len(seen)}"
                      + (f" (not judged: {hidden} with the planted σ₁₆ below the noise edge)" if hidden else ""),
                      right == len(seen) > 0))  # fmt: skip
    counted = table[table["decidable_signal_rank"]]
    over = int((counted["signal_rank"] > 16).sum())
    lines.append((f"rank 16, all sizes: more than 16 counted in {over} of {len(counted)} decidable", over == 0))
    decided = table[table["decidable_r90"]]
    inside = (decided["r90_low"] <= TRUE_R90) & (decided["r90_high"] >= TRUE_R90)
    lines.append((f"rank 16, all sizes: true r90 inside the bracket in {int(inside.sum())} of {len(decided)} decidable",
                  len(decided) > 0 and float(inside.mean()) >= INSIDE_BAR))  # fmt: skip
    wrong = int(table["verdict"].eq("not low-rank").sum())
    lines.append((f'rank 16, all sizes: called "not low-rank": {wrong} of {len(table)}', wrong == 0))
    return lines


def judge_8(table: pd.DataFrame) -> list[tuple[str, bool]]:
    lines = []
    for source, group in table.groupby("source", sort=False):
        decided = group[group["decidable_signal_rank"]]
        right = int(decided["signal_rank"].eq(8).sum())
        wrong = [
            f"; {row.name} at {row.size}: {row.signal_rank:.0f}, {100 * row.unchanged_fraction:.0f} % unchanged"
            for row in decided[decided["signal_rank"] != 8].itertuples(index=False)
        ]
        lines.append((f"rank 8 on {source} weights: counted as 8 in {right} of {len(decided)} decidable "
                      f"({len(group) - len(decided)} undecidable){''.join(wrong)}", not wrong and right > 0))  # fmt: skip
    return lines


def judge_few(table: pd.DataFrame) -> list[tuple[str, bool]]:
    lines = []
    for source, group in table.groupby("source", sort=False):
        decided = group[group["decidable_signal_rank"]]
        right = int(decided["signal_rank"].eq(decided["planted"]).sum())
        wrong = [
            f"; {row.name} of rank {row.planted} at {row.size}: {row.signal_rank:.0f}"
            for row in decided[decided["signal_rank"] != decided["planted"]].itertuples(index=False)
        ]
        lines.append((f"ranks 1 to 4 on {source} weights: counted right in {right} of {len(decided)} decidable "
                      f"({len(group) - len(decided)} undecidable){''.join(wrong)}", right >= FEW_BAR * len(decided) > 0))  # fmt: skip
    return lines


def judge_noise(table: pd.DataFrame) -> list[tuple[str, bool]]:
    own = table[table["source"] == "Gaussian"]
    off = float((own["raw_ratio"] - 1).abs().max())
    called = int(table["verdict"].str.startswith("low-rank").sum())
    return [
        (f"pure noise on Gaussian weights: raw r90 / null within {off:.3f} of 1, bar {NULL_BAR:g}", off <= NULL_BAR),
        (f'pure noise: called "low-rank": {called} of {len(table)}', called == 0),
    ]  # fmt: skip


Table = tuple[list[str], list[list[str]]]


def table_16(table: pd.DataFrame) -> Table:
    heads = ["weights", "rms ΔW/W", "matrices", "unchanged", "raw r90", "raw effective rank", "signal rank",
             "r90 bracket", "decidable", "6 inside", "verdicts"]  # fmt: skip
    cells = []
    for (source, size), group in table.groupby(["source", "size"], sort=False):
        decided = group[group["decidable_r90"]]
        inside = int(((decided["r90_low"] <= TRUE_R90) & (decided["r90_high"] >= TRUE_R90)).sum())
        cells.append([
            source, size, str(len(group)), _percent(group["unchanged_fraction"]), _spread(group["r90"]),
            _spread(group["effective_rank"]), _spread(group.loc[group["decidable_signal_rank"], "signal_rank"]),
            _bracket(decided), f"{len(decided)} of {len(group)}", f"{inside} of {len(decided)}", _verdicts(group),
        ])  # fmt: skip
    return heads, sorted(cells, key=lambda row: _order(row[0]))


def table_8(table: pd.DataFrame) -> Table:
    heads = ["weights", "rms ΔW/W", "matrices", "unchanged", "raw energy(8)", "raw r90", "signal rank", "decidable",
             "counted as 8", "verdicts"]  # fmt: skip
    cells = []
    for (source, size), group in table.groupby(["source", "size"], sort=False):
        decided = group[group["decidable_signal_rank"]]
        cells.append([
            source, size, str(len(group)), _percent(group["unchanged_fraction"]), f"{group['energy_8'].median():.2f}",
            _spread(group["r90"]), _spread(decided["signal_rank"]), f"{len(decided)} of {len(group)}",
            f"{int(decided['signal_rank'].eq(8).sum())} of {len(decided)}", _verdicts(group),
        ])  # fmt: skip
    return heads, sorted(cells, key=lambda row: _order(row[0]))


def table_few(table: pd.DataFrame) -> Table:
    heads = ["weights", "planted rank", "rms ΔW/W", "matrices", "unchanged", "signal rank", "r90 bracket", "decidable"]
    cells = []
    for (source, r, size), group in table.groupby(["source", "planted", "size"], sort=False):
        decided = group[group["decidable_signal_rank"]]
        cells.append([
            source, str(r), size, str(len(group)), _percent(group["unchanged_fraction"]),
            _spread(decided["signal_rank"]), _bracket(decided), f"{len(decided)} of {len(group)}",
        ])  # fmt: skip
    return heads, sorted(cells, key=lambda row: _order(row[0]))


def table_noise(table: pd.DataFrame) -> Table:
    heads = ["weights", "shape", "matrices", "stored", "rms ΔW/W", "unchanged", "raw r90", "null", "raw r90 / null",
             "r90 bracket / null", "decidable", "verdicts"]  # fmt: skip
    cells = []
    keys = ["source", "rows", "cols", "stored", "size"]
    for (source, m, n, stored, size), group in table.groupby(keys, sort=False):
        decided = group[group["decidable_r90"]]
        low, high = (decided[f"r90_{end}"] / decided["null_r90"] for end in ("low", "high"))
        cells.append([
            source, f"{m}×{n}", str(len(group)), stored, size, _percent(group["unchanged_fraction"]),
            _spread(group["r90"]), f"{group['null_r90'].iloc[0]:.0f}", _spread(group["raw_ratio"], 3),
            f"{low.median():.2f}–{high.median():.2f}" if len(decided) else "–", f"{len(decided)} of {len(group)}",
            _verdicts(group),
        ])  # fmt: skip
    return heads, sorted(cells, key=lambda row: (_order(row[0]), row[1]))


def _order(source: str) -> int:
    return ("Gaussian", "SmolLM2", "anarcii").index(source)


def _percent(values: "pd.Series[float]") -> str:
    return f"{100 * values.median():.0f} %"


def _spread(values: "pd.Series[float]", digits: int = 0) -> str:
    """Median (least–most)."""
    if not len(values):
        return "–"
    middle, low, high = (f"{v:.{digits}f}" for v in (values.median(), values.min(), values.max()))
    return middle if low == high else f"{middle} ({low}–{high})"


def _bracket(decided: pd.DataFrame) -> str:
    if not len(decided):
        return "–"
    low, high = decided["r90_low"].median(), decided["r90_high"].median()
    return f"{low:.0f}–{high:.0f}" if math.isfinite(high) else f"{low:.0f}–open"


def _verdicts(group: pd.DataFrame) -> str:
    """How many matrices got which verdict, the named rank as a range."""
    words: dict[str, list[int]] = {}
    for verdict in group["verdict"]:
        word, _, rank = str(verdict).partition(" at r=")
        words.setdefault(word, []).append(int(rank or 0))
    parts = []
    for word, ranks in words.items():
        least, most = int(np.min(ranks)), int(np.max(ranks))
        span = "" if not most else f" at r={least}" if least == most else f" at r={least}–{most}"
        parts.append(f"{len(ranks)} {word}{span}")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
