"""`probe budget --params 70e9` from start to end against importing typer and rich: whole processes, interleaved.

Also what a model's config adds, and a run in full with its activations. Writes docs/benchmarks-budget.md. Exit 1 on a
FAIL. The least of several rounds counts on both sides: other work only adds.

    python benchmarks/budget_start.py    # 15 seconds on 2 cores
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from accuracy import publish
from speed import as_installed

FACTOR: Final = 2.5
PLUS_S: Final = 0.3
LLAMA_8B: Final = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="runs of each, interleaved (default 15)")
    options = parser.parse_args()
    probe = str(Path(sys.executable).with_name("probe"))
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(LLAMA_8B))
        commands = {
            '`python -c "import typer, rich"`': [sys.executable, "-c", "import typer, rich"],
            "`probe budget --params 70e9`": [probe, "budget", "--params", "70e9"],
            "`probe budget config.json` (Llama-3-8B)": [probe, "budget", str(config)],
            "`probe budget config.json --method lora --seq 2048`": [
                probe, "budget", str(config), "--method", "lora", "--seq", "2048",
            ],
        }  # fmt: skip
        seconds: dict[str, list[float]] = {label: [] for label in commands}
        for _ in range(options.runs):
            for label, command in commands.items():
                seconds[label].append(timed(command))
    imports, size, *_ = (min(values) for values in seconds.values())
    allowed = FACTOR * imports + PLUS_S
    heads = ["", "least, s", "median, s", "runs"]
    cells = [
        [label, f"{min(values):.3f}", f"{statistics.median(values):.3f}", str(len(values))]
        for label, values in seconds.items()
    ]
    verdicts = [
        (f"--params: {size:.3f} s, bar {FACTOR:g} × {imports:.3f} s + {PLUS_S:g} s = {allowed:.3f} s", size <= allowed),
        (f"--params: {size:.3f} s, bar 0.7 s", size <= 0.7),
    ]
    note = "Whole processes, interleaved; the least of each is judged. None of them imports torch, numpy or pandas."
    publish("budget_start", "How fast `probe budget` answers", note, [("", heads, cells)], verdicts,
            page="benchmarks-budget")  # fmt: skip
    return 0 if all(ok for _, ok in verdicts) else 1


def timed(command: list[str]) -> float:
    """Wall seconds of a whole process that ends well."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=as_installed())
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
