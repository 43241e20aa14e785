"""The whole of `probe train` on the demo's base, as one process, with the search for learning rates and all evidence.

    python benchmarks/training_whole.py

Three ranks × two groups of layers × two seeds beside two full fine-tunes, spectrum, functional ranks, subspaces, page.
Bar: 10 minutes on 2 cores. The pair is the demo's, trained before the clock starts; the machine should be idle.
Writes docs/benchmarks-training-whole.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from accuracy import publish
from speed import as_installed

import lowrank_probe as lp
from lowrank_probe.demo_text import read_prose

BAR_S = 600.0
HEADS = ("runs", "what", "seconds")


def demo_task(folder: Path) -> tuple[Path, Path]:
    """(the demo's base, trained on first use; a file in `folder` with the prose that its fine-tune learnt)."""
    text = folder / "prose.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in read_prose(1_000_000)), encoding="utf-8")
    return Path(lp.demo().facts["demo"]["base"]), text


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (base, text), out = demo_task(Path(folder)), Path(folder) / "run"
        probe = shutil.which("probe", path=Path(sys.executable).parent) or "probe"
        command = [
            probe, "train", str(base), "--data", str(text), "--rank", "1,4,16", "--targets", "attention,mlp",
            "--seeds", "2", "--steps", "100", "--length", "128", "--out", str(out), "--quiet",
        ]  # fmt: skip
        began = time.perf_counter()
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=as_installed()).stdout)
        seconds = time.perf_counter() - began
        found = lp.load(out)
    parts = [
        (len(found.searches), "short runs that look for learning rates", f"{found.searches['seconds'].sum():.0f}"),
        (len(found.runs), "full fine-tunes and adapters of 100 steps", f"{found.runs['seconds'].sum():.0f}"),
    ]
    trained = sum(float(one) for _, _, one in parts)
    parts.append(
        ("", "start, loading, held-out losses, spectrum, functional ranks, subspaces, page", f"{seconds - trained:.0f}")
    )
    parts.append((len(found.searches) + len(found.runs), "the whole process", f"{seconds:.0f}"))
    publish(
        "training_whole", "The whole of a training", NOTE, [("", HEADS, parts)],
        [(f"{seconds:.0f} s, bar {BAR_S:.0f} s", seconds <= BAR_S)], page="benchmarks-training-whole",
    )  # fmt: skip
    return 0 if seconds <= BAR_S else 1


NOTE = (
    "`probe train` on the demo's base (1.3M parameters) and the language reference's prose: ranks 1, 4, 16 × attention, "
    "mlp × 2 seeds, learning rates by search, 100 steps of 8 × 128 tokens."
)

if __name__ == "__main__":
    sys.exit(main())
