"""`probe extract --rank 16` against mergekit-extract-lora 0.1.5 from PyPI, on the 84M-parameter bf16 pair of speed.py.

Whole processes, interleaved: wall time and peak of resident memory; and ‖ΔW − BA‖/‖ΔW‖ of the factors as both stored
them, beside the optimum by a float64 SVD of every matrix. mergekit runs with default threads and with `-j 1`, and is
judged by the faster. Writes docs/benchmarks-extract.md. Exit 1 on a FAIL. Time counts on an idle machine only.

    python benchmarks/extract.py --peer PATH/bin/mergekit-extract-lora    # about 8 minutes on 2 idle cores
    python benchmarks/extract.py                                          # makes a venv for mergekit first
    python benchmarks/extract.py --errors                                 # the stored errors only, on any machine
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from accuracy import publish
from safetensors import safe_open
from speed import IDLE_CORES, RELATIVE, Timing, _median, _row, install_peer, make_pair, timed

PEER: Final = "mergekit==0.1.5"
PEER_COMMAND: Final = "mergekit-extract-lora"
RANK: Final = 16
WALL_BAR: Final = 0.25
# The stored error: √((OVER·optimum)² + floor²), floor in units of ‖ΔW‖ by the dtype of the factors.
OVER: Final = 1.00005
FLOORS: Final = {"float32": 1e-6, "bfloat16": 3e-3}
OURS: Final = "`probe extract`"
SAME: Final = "`probe extract --targets everything`"
THEIRS: Final = "`mergekit-extract-lora` 0.1.5"
ONE_THREAD: Final = "`mergekit-extract-lora` 0.1.5, `-j 1`"
# Linux hands the peak of a parent on to what it starts: the process measured is started by one that is small.
LAUNCH: Final = """
import pathlib, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(str(1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the mergekit-extract-lora executable of another venv; without it one is made")
    parser.add_argument("--runs", type=int, default=3, help="rounds, interleaved (default 3)")
    parser.add_argument("--errors", action="store_true", help="no times, no page: the stored errors only")
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # each side as it chooses for itself
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sides = make_pair(root, RELATIVE)
        peer = options.peer or str(install_peer(root / "peer", PEER, PEER_COMMAND))
        probe = str(Path(sys.executable).with_name("probe"))
        ours = [probe, "extract", *map(str, sides), "--rank", str(RANK), "--quiet", "--out"]
        theirs = [peer, "--base-model", str(sides[0]), "--model", str(sides[1]), "--max-rank", str(RANK), "--quiet"]
        commands: dict[str, Callable[[Path], list[str]]] = {
            OURS: lambda out: [*ours, str(out)],
            SAME: lambda out: [*ours, str(out), "--targets", "everything"],
            THEIRS: lambda out: [*theirs, "--out-path", str(out)],
            ONE_THREAD: lambda out: [*theirs, "--out-path", str(out), "-j", "1"],
        }
        if options.errors:
            del commands[THEIRS]
        rounds, discarded = measure(commands, root, 1 if options.errors else options.runs, options.errors)
        if rounds is None:
            print("FAIL: the machine was not idle; nothing is judged", file=sys.stderr)
            return 1
        bfloat16 = root / "bfloat16"
        timed([*ours, str(bfloat16), "--dtype", "bfloat16"])
        adapters = {
            OURS: root / "0-0",
            f"{OURS[:-1]} --dtype bfloat16`": bfloat16,
            THEIRS: root / f"0-{len(commands) - 1}",
        }
        optimum, stored = errors(*sides, adapters)
        sizes = {label: (path / "adapter_model.safetensors").stat().st_size for label, path in adapters.items()}
    heads = ["adapter", "file, MB", "error over all matrices", "optimum", "worst error / optimum"]
    error_cells = [error_row(label, sizes[label], one, optimum) for label, one in stored.items()]
    verdicts = [
        judge(label, stored[label], optimum, dtype)
        for label, dtype in zip(stored, ("float32", "bfloat16"), strict=False)
    ]
    tables = [("Stored error", heads, error_cells)]
    if not options.errors:
        verdicts = judge_rounds(rounds, discarded) + verdicts
        heads = [
            "whole process",
            "runs",
            "median, s",
            "least–most, s",
            "CPU, median s",
            "others' load, cores",
            "peak, MB",
        ]
        cells = [
            [*_row(label, [t for t, _ in runs]), f"{max(p for _, p in runs) / 1e6:.0f}"]
            for label, runs in rounds.items()
        ]
        tables.insert(0, ("Time and memory", heads, cells))
    note = (
        f"The 84M-parameter bf16 Llama pair of `speed.py` (42 linear matrices, tied table of 8000), rank {RANK}. Processes are "
        "interleaved; each side's threads as it chooses, mergekit also with one thread. The peak is the resident memory of the "
        "whole process (`ru_maxrss`), its imports and mapped files included; the worst of all rounds. mergekit "
        "also stores the table and the norms whole: `--targets everything` does the same. Errors are those of the factors "
        "as stored, in float64: √(Σ‖ΔW − BA‖²/Σ‖ΔW‖²) over all matrices, and the worst ratio to the optimum, which comes from a "
        "full float64 SVD of every matrix (LAPACK through numpy)."
    )
    publish("extract", "Extraction against mergekit", note, tables, verdicts, write=not options.errors)
    return 0 if all(ok for _, ok in verdicts) else 1


Rounds = dict[str, list[tuple[Timing, int]]]


def measure(
    commands: Mapping[str, Callable[[Path], list[str]]], root: Path, n_rounds: int, any_load: bool
) -> tuple[Rounds | None, int]:
    """({label: [(timing, peak bytes)]}, rounds not counted); None where fewer than n_rounds were idle. Keeps round 0's output."""
    found: Rounds = {label: [] for label in commands}
    peak, tried = root / "peak", 0
    while tried < 3 * n_rounds and len(found[OURS]) < n_rounds:
        one = {}
        for place, (label, command) in enumerate(commands.items()):
            timing = timed([sys.executable, "-I", "-S", "-c", LAUNCH, str(peak), *command(root / f"{tried}-{place}")])
            one[label] = timing, int(peak.read_text(encoding="ascii"))
        tried += 1
        quiet = any_load or max(timing.others for timing, _ in one.values()) <= IDLE_CORES
        line = ", ".join(
            f"{label} {t.wall_s:.2f} s {p / 1e6:.0f} MB (others {t.others:.2f})" for label, (t, p) in one.items()
        )
        print(f"{line}{'' if quiet else ': not counted'}", file=sys.stderr, flush=True)
        if quiet:
            for label, pair in one.items():
                found[label].append(pair)
    return (found if len(found[OURS]) == n_rounds else None), tried - len(found[OURS])


def judge_rounds(rounds: Rounds, discarded: int) -> list[tuple[str, bool]]:
    """Wall time and memory against the better of mergekit's two ways."""
    walls = {label: _median([timing for timing, _ in runs]) for label, runs in rounds.items()}
    peaks = {label: max(peak for _, peak in runs) for label, runs in rounds.items()}
    wall, peak = min(walls[THEIRS], walls[ONE_THREAD]), min(peaks[THEIRS], peaks[ONE_THREAD])
    lines = [
        (f"{label}: {walls[label] / wall:.3f} × mergekit's wall time (bar {WALL_BAR:g}), {wall / walls[label]:.1f} × faster",
         walls[label] <= WALL_BAR * wall)
        for label in (OURS, SAME)
    ]  # fmt: skip
    lines += [
        (
            f"{label}: peak memory {peaks[label] / 1e6:.0f} MB, mergekit {peak / 1e6:.0f} MB (bar: less)",
            peaks[label] < peak,
        )
        for label in (OURS, SAME)
    ]
    n = len(rounds[OURS])
    return [(f"{text}; {n} rounds, {discarded} not counted", ok) for text, ok in lines]


def errors(
    base: Path, tuned: Path, adapters: Mapping[str, Path]
) -> tuple[dict[str, tuple[float, float]], dict[str, dict[str, float]]]:
    """({module: (optimum, ‖ΔW‖)}, {label: {module: ‖ΔW − s·BA‖/‖ΔW‖}}) of every linear matrix; 1 where an adapter lacks it."""
    optimum: dict[str, tuple[float, float]] = {}
    stored: dict[str, dict[str, float]] = {label: {} for label in adapters}
    configs = {label: json.loads((path / "adapter_config.json").read_text("utf-8")) for label, path in adapters.items()}
    for module, D in deltas(base, tuned):
        s, norm = np.linalg.svd(D, compute_uv=False), float(np.linalg.norm(D))
        optimum[module] = math.sqrt(float(np.sum(s[RANK:] ** 2))) / norm, norm
        for label, path in adapters.items():
            left = D
            with safe_open(path / "adapter_model.safetensors", "pt") as file:
                key = f"base_model.model.{module}.lora_"
                if f"{key}A.weight" in file.keys():  # noqa: SIM118 (no container)
                    A, B = (file.get_tensor(f"{key}{side}.weight").double().numpy() for side in "AB")
                    left = D - scaling(configs[label], module) * (B @ A)
            stored[label][module] = float(np.linalg.norm(left)) / norm
    return optimum, stored


def deltas(base: Path, tuned: Path) -> Iterator[tuple[str, Any]]:
    """(module, ΔW in float64) of every linear layer of the pair."""
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(tuned / "model.safetensors", "pt") as new:
        for name in old.keys():  # noqa: SIM118 (no container)
            if name.endswith("_proj.weight"):
                yield (
                    name.removesuffix(".weight"),
                    (new.get_tensor(name).double() - old.get_tensor(name).double()).numpy(),
                )


def scaling(config: Mapping[str, Any], module: str) -> float:
    """α/r (rsLoRA α/√r) of a module, patterns by PEFT's own rule: regular expressions, the first that matches."""
    rank, alpha = (
        next(
            (value for key, value in config[f"{word}_pattern"].items() if re.match(rf"(.*\.)?({key})$", module)), whole
        )
        for word, whole in (("rank", config["r"]), ("alpha", config["lora_alpha"]))
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def error_row(
    label: str, n_bytes: int, stored: Mapping[str, float], optimum: Mapping[str, tuple[float, float]]
) -> list[str]:
    total = math.fsum(norm**2 for _, norm in optimum.values())
    over_all = math.sqrt(math.fsum((stored[m] * norm) ** 2 for m, (_, norm) in optimum.items()) / total)
    best = math.sqrt(math.fsum((least * norm) ** 2 for least, norm in optimum.values()) / total)
    worst = max(stored[m] / least for m, (least, _) in optimum.items())
    return [label, f"{n_bytes / 1e6:.1f}", f"{over_all:.7f}", f"{best:.7f}", f"{worst:.7f}"]


def judge(
    label: str, stored: Mapping[str, float], optimum: Mapping[str, tuple[float, float]], dtype: str
) -> tuple[str, bool]:
    """Every matrix between the optimum (less the rounding of float64) and the bar."""
    floor = FLOORS[dtype]
    above = [m for m, (least, _) in optimum.items() if stored[m] > math.hypot(OVER * least, floor)]
    below = [m for m, (least, _) in optimum.items() if stored[m] < least * (1 - 1e-9)]
    middle = statistics.median(least for least, _ in optimum.values())
    text = (
        f"{label}: stored error at most √(({OVER:g}·optimum)² + ({floor:g})²) in {len(optimum) - len(above)} of {len(optimum)} "
        f"matrices (median optimum {middle:.4f}); below the optimum, which cannot be: {len(below)}"
    )
    return text, not above and not below


if __name__ == "__main__":
    raise SystemExit(main())
