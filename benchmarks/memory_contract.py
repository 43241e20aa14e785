"""`--memory`: what the process takes, what it costs, and that the results are the same bits.

A pair with the table of Gemma-2-2B's shape, (256,000, 2,304) in bf16 on both sides, of which 9 rows in 10 moved, and two
smaller matrices: `probe spectrum` and `probe extract --rank 16 --targets everything` without a bound and with `--memory
3GB`, whole processes. Memory is the process's own (RssAnon, looked at every 20 ms): files that are mapped are the page
cache's, which the system takes back when it needs it. Linux. Writes docs/benchmarks-memory.md.

    python benchmarks/memory_contract.py            # about 10 minutes on 2 cores, 20 GB of memory, 30 GB of disk under TMPDIR
    python benchmarks/memory_contract.py --rows 32000    # a smaller table
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from accuracy import publish
from safetensors.torch import save_file
from speed import as_installed

from lowrank_probe.runs import load_result

WIDTH: Final = 2304
ROWS: Final = 256_000
ASKED: Final = 3e9
SAMPLE_S: Final = 0.02


@dataclass(frozen=True)
class Ran:
    """One whole process: seconds, and the most bytes of its own memory and of mapped files."""

    wall_s: float
    own: int
    mapped: int


def make_pair(root: Path, rows: int) -> tuple[Path, Path]:
    """(base, tuned) directories in bf16: W normal, ΔW of rank 64 with σ_i ∝ 1/i and ‖ΔW‖/‖W‖ = 1e-2."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (rows, WIDTH), "model.layers.0.mlp.up_proj.weight": (4 * WIDTH, WIDTH),
        "model.layers.0.mlp.down_proj.weight": (WIDTH, 4 * WIDTH),
    }  # fmt: skip
    base, tuned = {}, {}
    for name, (m, n) in shapes.items():
        base[name] = torch.empty(m, n, dtype=torch.bfloat16)
        tuned[name] = torch.empty_like(base[name])
        B = torch.randn(m, 64, generator=generator) / torch.arange(1, 65)
        A = torch.randn(64, n, generator=generator)
        if "embed" in name:
            B[torch.rand(m, generator=generator) < 0.1] = 0
        size = 1e-2 * 0.02 * (m * n) ** 0.5 / float(torch.linalg.norm(B.T @ B * (A @ A.T)).sqrt())
        for at in range(0, m, 4096):
            W = 0.02 * torch.randn(min(4096, m - at), n, generator=generator)
            base[name][at : at + 4096] = W
            tuned[name][at : at + 4096] = base[name][at : at + 4096].float() + size * B[at : at + 4096] @ A
    config = {"model_type": "gemma2", "hidden_size": WIDTH, "vocab_size": rows, "tie_word_embeddings": False}
    for side, tensors in (("base", base), ("tuned", tuned)):
        (root / side).mkdir()
        save_file(tensors, root / side / "model.safetensors")
        (root / side / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root / "base", root / "tuned"


def run(*arguments: str | Path) -> Ran:
    """One `probe` command, watched; its own words where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lowrank_probe", *map(str, arguments), "--device", "cpu", "--quiet"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=as_installed(),
    )  # fmt: skip
    own = mapped = 0
    while process.poll() is None:
        seen = _status(process.pid)
        own, mapped = max(own, seen.get("RssAnon", 0)), max(mapped, seen.get("RssFile", 0))
        time.sleep(SAMPLE_S)
    if process.returncode:
        assert process.stderr is not None
        raise RuntimeError(f"probe {arguments[0]}: exit {process.returncode}: {process.stderr.read()[-2000:]}")
    return Ran(time.perf_counter() - started, own, mapped)


def _status(pid: int) -> dict[str, int]:
    """/proc/PID/status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="of the table")
    options = parser.parse_args(arguments)
    asked = f"{ASKED / 1e9:.0f}GB"
    bars: list[tuple[str, bool]] = []
    cells: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sides = make_pair(root, options.rows)
        commands: dict[str, tuple[str, ...]] = {
            "spectrum": (), "extract": ("--rank", "16", "--targets", "everything"),
        }  # fmt: skip
        for command, more in commands.items():
            ran = []
            for bound in ((), ("--memory", asked)):
                out = root / f"{command}-{len(bound)}"
                ran.append(one := run(command, *sides, *more, *bound, "--out", out))
                print(command, *bound, one, file=sys.stderr)
                cells.append(
                    (
                        " ".join([f"`probe {command}", *bound]) + "`", f"{one.wall_s:.0f}", f"{one.own / 1e9:.2f}",
                        f"{one.mapped / 1e9:.2f}",
                    )
                )  # fmt: skip
            free, bounded = ran
            told = f"{bounded.own / 1e9:.2f} GB of its own, {free.own / 1e9:.2f} GB without"
            slower = f"{bounded.wall_s / free.wall_s:.2f} × the time"
            bars.append((f"`probe {command} --memory {asked}`: {told}, bar {asked}; {slower}", bounded.own <= ASKED))
            same = _same(command, root / f"{command}-0", root / f"{command}-2")
            bars.append((f"`probe {command}`: the same to the last bit with and without", same))
    note = (
        f"A table ({options.rows:,} × {WIDTH:,}) and two matrices of {4 * WIDTH:,} × {WIDTH:,}, bf16. Memory: the most "
        f"that was seen every {1000 * SAMPLE_S:.0f} ms, of the process's own (RssAnon) and of mapped files (RssFile), "
        "which the system takes back when it needs it; imports included."
    )
    heads = ("what", "seconds", "its own memory, GB", "mapped files, GB")
    publish("memory_contract", "Memory by contract", note, [("", heads, cells)], bars, write=options.rows == ROWS,
            page="benchmarks-memory")  # fmt: skip
    return 0 if all(ok for _, ok in bars) else 1


def _same(command: str, one: Path, other: Path) -> bool:
    if command == "extract":
        return (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    a, b = load_result(one), load_result(other)
    values = all((a.singular_values[name] == b.singular_values[name]).all() for name in a.singular_values)
    return values and a.table.drop(columns="seconds").equals(b.table.drop(columns="seconds"))


if __name__ == "__main__":
    sys.exit(main())
