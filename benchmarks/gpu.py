"""One GPU on Llama-3-8B's shapes: exact spectra and `--top 64`, against the kernels alone and against reading.

28 matrices (4 layers, two bf16 files of 1.8 GB) with a decaying update of relative size 2e-2. In one run: the time to
read both files, Σ of fp64 Gram + `eigvalsh` alone, then `probe spectrum` and `probe spectrum --top 64` as whole
processes beside a process that only starts torch and CUDA. Prints bars and a timeline; writes docs/benchmarks-gpu.md.

    python benchmarks/gpu.py            # about 3 minutes on one H100, 8 GB of disk
    python benchmarks/gpu.py --tiny     # the same on the CPU with small shapes: a check of the script, judges nothing
"""

import argparse
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from accuracy import publish

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.svd import gram

SHAPES: Final = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
LAYERS: Final = 4
EXACT_BAR: Final = 1.3
TOP_BAR: Final = 1.5
# Starting Python and torch takes 4 to 7 s there: medians over rounds, in each of which everything is measured.
ROUNDS: Final = 5


def make_pair(root: Path, device: torch.device, shrink: int) -> tuple[Path, Path]:
    """(base, tuned) directories in bf16: W normal, ΔW with σ_i ∝ 1/i over 512 directions, ‖ΔW‖/‖W‖ = 2e-2."""
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(0)
    base, tuned = {}, {}
    for layer in range(LAYERS):
        for module, (m, n) in SHAPES.items():
            m, n = m // shrink, n // shrink
            r = min(512, min(m, n) // 2)
            W = (0.02 * torch.randn(m, n, generator=generator, device=device)).bfloat16()
            B, A = (torch.randn(d, r, generator=generator, device=device) for d in (m, n))
            D = (B / torch.arange(1, r + 1, device=device)) @ A.T
            D *= 2e-2 * torch.linalg.norm(W.float()) / torch.linalg.norm(D)
            name = f"model.layers.{layer}.{module}.weight"
            base[name], tuned[name] = W.cpu(), (W.float() + D).bfloat16().cpu()
    for side, tensors in (("base", base), ("tuned", tuned)):
        (root / side).mkdir()
        save_file(tensors, root / side / "model.safetensors")
        (root / side / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return root / "base", root / "tuned"


def read_s(*sides: Path) -> float:
    """Seconds to read every tensor of both sides into memory, and nothing else."""
    started = time.perf_counter()
    for side in map(open_checkpoint, sides):
        for name in side.tensors:
            side.read(name)
    return time.perf_counter() - started


def kernels_s(sides: tuple[Path, Path], device: torch.device) -> float:
    """Seconds of fp64 Gram + `eigvalsh` alone over every matrix, which lies on the device already."""
    base, tuned = map(open_checkpoint, sides)
    total = 0.0
    torch.linalg.eigvalsh(gram(torch.randn(256, 256, device=device)))
    for name in base.tensors:
        delta = tuned.read(name, device).float() - base.read(name, device).float()
        _wait(device)
        started = time.perf_counter()
        torch.linalg.eigvalsh(gram(delta)).cpu()
        total += time.perf_counter() - started
    return total


def whole_s(*arguments: str | Path) -> float:
    """Seconds of one whole `probe spectrum` process."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "lowrank_probe", "spectrum", *map(str, arguments), "--quiet"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def start_s(device: torch.device) -> float:
    """Seconds of a process that imports what the command imports and starts the device."""
    code = (
        "import torch, pandas, pyarrow.parquet, plotly.offline, jinja2; "
        f"I = torch.eye(64, dtype=torch.float64, device='{device}'); torch.linalg.eigvalsh(I @ I).cpu()"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def overlap(run: Path) -> Iterator[str]:
    """How much of reading happened while something was computed, and one line a matrix of the timeline."""
    timeline = lp.load(run).timeline
    busy = timeline[timeline["phase"] != "read"]
    reading = timeline[timeline["phase"] == "read"]
    hidden = 0.0
    for read in reading.itertuples():  # each moment once, however many matrices are computed then
        spans = [(max(read.start_s, b.start_s), min(read.stop_s, b.stop_s)) for b in busy.itertuples()]
        reached = read.start_s
        for begun, ended in sorted(span for span in spans if span[0] < span[1]):
            hidden += max(0.0, ended - max(begun, reached))
            reached = max(reached, ended)
    total = float((reading["stop_s"] - reading["start_s"]).sum())
    yield f"{hidden:.2f} s of the {total:.2f} s of reading and copying lie beside computing"
    for name, part in timeline.groupby("name", sort=False):
        spans = ", ".join(f"{p.phase} {p.start_s:.2f}–{p.stop_s:.2f}" for p in part.itertuples())
        yield f"{name}: {spans}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever device there is")
    tiny = parser.parse_args().tiny
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sides = make_pair(root, device, 16 if tiny else 1)
        alone = kernels_s(sides, device)
        read_s(*sides)  # once unmeasured: the files lie in the page cache for every measurement alike
        rounds = []
        for number in range(1 if tiny else ROUNDS):
            shutil.rmtree(root / "exact", ignore_errors=True)
            shutil.rmtree(root / "top", ignore_errors=True)
            rounds.append((
                start_s(device), read_s(*sides), whole_s(*sides, "--out", root / "exact"),
                whole_s(*sides, "--out", root / "top", "--top", "64"),
            ))  # fmt: skip
            print(f"round {number + 1}: " + " ".join(f"{seconds:.2f}" for seconds in rounds[-1]), flush=True)
        start, reading, exact, top = (statistics.median(column) for column in zip(*rounds, strict=True))
        lines = list(overlap(root / "exact"))
        table = lp.load(root / "top").table
        fell = int((table["method"] == "gram").sum())
        top_seconds = lp.load(root / "top").facts["seconds"]
        exact_seconds = lp.load(root / "exact").facts["seconds"]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    cells = [
        ["fp64 Gram + eigvalsh alone, Σ of 28", f"{alone:.2f}"], ["start of Python, torch and the device", f"{start:.2f}"],
        ["reading both files from the page cache, one thread", f"{reading:.2f}"],
        ["`probe spectrum`, whole process", f"{exact:.2f}"], ["`probe spectrum --top 64`, whole process", f"{top:.2f}"],
    ]  # fmt: skip
    cells += [[f"… phases of {word}", ", ".join(f"{k} {v:.2f}" for k, v in seconds.items())]
              for word, seconds in (("the exact spectra", exact_seconds), ("--top 64", top_seconds))]  # fmt: skip
    exact_ratio, top_ratio = (exact - start) / alone, (top - start) / reading
    verdicts = [
        (f"exact spectra: {exact_ratio:.2f} × (Gram + eigvalsh) beyond the start, bar {EXACT_BAR:g}", exact_ratio <= EXACT_BAR),
        (f"--top 64: {top_ratio:.2f} × reading beyond the start, bar {TOP_BAR:g}; {fell} of {len(table)} matrices fell "
         "through to the whole spectrum", top_ratio <= TOP_BAR),
    ]  # fmt: skip
    note = "\n".join(
        [
            f"28 matrices of Llama-3-8B's shapes, two bf16 files; medians of {ROUNDS} rounds. Card: {card}.",
            "",
            *lines[:1],
            "",
            *(f"- {x}" for x in lines[1:13]),
        ]
    )
    publish("gpu", "One GPU on Llama-3-8B's shapes", note, [("", ["what", "seconds"], cells)], verdicts, write=not tiny)
    return 0 if tiny or all(ok and math.isfinite(exact) for _, ok in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
