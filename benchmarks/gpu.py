"""One GPU on Llama-3-8B's shapes: exact spectra, `--top 64` and `extract --rank 16`, against kernels and reading alone.

28 matrices (4 layers, two bf16 files of 1.8 GB) with a decaying update of relative size 2e-2. In one run: the time to
read both files, Σ of fp64 Gram + `eigvalsh` alone, then `probe spectrum`, `probe spectrum --top 64` and `probe extract
--rank 16` as whole processes beside processes that only start torch and CUDA. Prints bars and a timeline; writes
docs/benchmarks-gpu.md.

    python benchmarks/gpu.py                                         # about 4 minutes on one H100, 8 GB of disk
    python benchmarks/gpu.py --peer PATH/bin/mergekit-extract-lora   # extract against `mergekit … --cuda` too, one run
    python benchmarks/gpu.py --layers 16 --rounds 1 --peer-rounds 1 --peer …   # the same at 112 matrices, 4 minutes
    python benchmarks/gpu.py --tiny                                  # small shapes, on the CPU too; judges nothing
"""

import argparse
import compileall
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from accuracy import publish
from extract import RANK, judge, scaling
from safetensors.torch import load_file
from speed import as_installed

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.svd import gram

SHAPES: Final = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
LAYERS: Final = 4
# Of 1.3 for the whole spectrum and 1.2 for throughput, the stricter.
EXACT_BAR: Final = 1.2
TOP_BAR: Final = 1.5
EXTRACT_BAR: Final = 1.3
PEAK_BAR: Final = 6.0
# × faster than mergekit, whose imports weigh less the more there is to do.
PEER_BAR: Final = 7.0
PEER_BAR_16: Final = 15.0
PEER_ROUNDS: Final = 3
# Starting Python and torch takes 4 to 7 s there: medians over rounds, in each of which everything is measured.
ROUNDS: Final = 5


def make_pair(root: Path, device: torch.device, shrink: int, n_layers: int = LAYERS) -> tuple[Path, Path]:
    """(base, tuned) directories in bf16: W normal, ΔW with σ_i ∝ 1/i over 512 directions, ‖ΔW‖/‖W‖ = 2e-2."""
    from safetensors.torch import save_file

    generator = torch.Generator(device).manual_seed(0)
    base, tuned = {}, {}
    for layer in range(n_layers):
        for module, (m, n) in SHAPES.items():
            m, n = m // shrink, n // shrink
            r = min(512, min(m, n) // 2)
            W = (0.02 * torch.randn(m, n, generator=generator, device=device)).bfloat16()
            B, A = (torch.randn(d, r, generator=generator, device=device) for d in (m, n))
            D = (B / torch.arange(1, r + 1, device=device)) @ A.T
            D *= 2e-2 * torch.linalg.norm(W.float()) / torch.linalg.norm(D)
            name = f"model.layers.{layer}.{module}.weight"
            base[name], tuned[name] = W.cpu(), (W.float() + D).bfloat16().cpu()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096 // shrink, "vocab_size": 128,
        "intermediate_size": 14336 // shrink, "num_hidden_layers": n_layers, "num_attention_heads": 32,
        "num_key_value_heads": 8, "dtype": "bfloat16",
    }  # fmt: skip
    for side, tensors in (("base", base), ("tuned", tuned)):
        (root / side).mkdir()
        save_file(tensors, root / side / "model.safetensors")
        (root / side / "config.json").write_text(json.dumps(config), encoding="utf-8")
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


def whole_s(*command: str | Path) -> float:
    """Seconds of one whole process; its own words where it fails."""
    started = time.perf_counter()
    done = subprocess.run([*map(str, command)], check=False, capture_output=True, text=True, env=as_installed())
    if done.returncode:
        raise RuntimeError(f"{command[0]} {command[-1]}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - started


def probe_s(command: str, *arguments: str | Path) -> float:
    """Seconds of one whole `probe COMMAND` process."""
    return whole_s(sys.executable, "-m", "lowrank_probe", command, *arguments, "--quiet")


def prepare(device: torch.device, peer: str | None = None) -> None:
    """Bytecode of all that is measured, for machines on which none is kept (`speed.as_installed`)."""
    compileall.compile_dir(Path(lp.__file__).parent, quiet=1)
    start_s(device)
    if peer:
        whole_s(peer, "--help")


def start_s(device: torch.device) -> float:
    """Seconds of a process that imports what `probe spectrum` imports and starts the device and its eigen-solver."""
    code = (
        "import torch, pandas, pyarrow.parquet, plotly.offline, jinja2; "
        f"I = torch.eye(64, dtype=torch.float64, device='{device}'); torch.linalg.eigvalsh(I @ I).cpu()"
    )
    return whole_s(sys.executable, "-c", code)


def start_torch_s(device: torch.device) -> float:
    """Seconds of a process that starts torch and the device, and no more."""
    return whole_s(sys.executable, "-c", f"import torch; torch.ones(64, device='{device}').cpu()")


def peer_s(peer: str, sides: tuple[Path, Path], out: Path, device: torch.device) -> float:
    """Seconds of one whole mergekit process on the same matrices and nothing else."""
    where = ["--cuda"] if device.type == "cuda" else []
    only = ["-i", "_proj$", "-e", "embed_tokens", "-e", "lm_head", "--quiet", *where]
    names = ["--base-model", sides[0], "--model", sides[1], "--max-rank", str(RANK), "--out-path", out]
    return whole_s(peer, *names, *only)


def stored_errors(
    sides: tuple[Path, Path], adapter: Path, device: torch.device
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """({module: ‖ΔW − s·BA‖/‖ΔW‖ as stored}, {module: (optimum by fp64 Gram and eigvalsh, ‖ΔW‖)})."""
    base, tuned = map(open_checkpoint, sides)
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    factors = load_file(adapter / "adapter_model.safetensors", device=str(device))
    stored, optimum = {}, {}
    for name in base.tensors:
        module = name.removesuffix(".weight")
        D = tuned.read(name, device).double() - base.read(name, device).double()
        norm = float(torch.linalg.norm(D))
        tail = torch.linalg.eigvalsh(D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D)[:-RANK].clamp(min=0).sum()
        A, B = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        stored[module] = float(torch.linalg.norm(D - scaling(config, module) * (B @ A))) / norm
        optimum[module] = math.sqrt(float(tail)) / norm, norm
    return stored, optimum


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


def judge_extract(
    whole: float, least: float, peak_bytes: int | None, peers: Sequence[float], n_layers: int
) -> Iterator[tuple[str, bool]]:
    """The extraction against start and reading, the peak on the card (where there is one), and mergekit (where given)."""
    name = f"`probe extract --rank {RANK}`"
    yield (f"{name}: {whole / least:.2f} × (start of torch and the device + reading), bar {EXTRACT_BAR:g}",
           whole <= EXTRACT_BAR * least)  # fmt: skip
    if peak_bytes is not None:
        multiple = peak_bytes / (4 * max(m * n for m, n in SHAPES.values()))
        yield (
            f"{name}: peak on the card {multiple:.2f} × the largest matrix in fp32, bar {PEAK_BAR:g}",
            multiple <= PEAK_BAR,
        )
    if peers:
        faster, bar = statistics.median(peers) / whole, PEER_BAR_16 if n_layers >= 16 else PEER_BAR
        yield f"{name}: {faster:.1f} × faster than mergekit, bar {bar:g}", faster >= bar


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever device there is")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help=f"default {LAYERS}; others write a page of their own"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--peer", help="the mergekit-extract-lora executable of another venv")
    parser.add_argument(
        "--peer-rounds", type=int, default=PEER_ROUNDS, help=f"in how many it runs (default {PEER_ROUNDS})"
    )
    options = parser.parse_args()
    tiny = options.tiny
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sides = make_pair(root, device, 16 if tiny else 1, options.layers)
        alone = kernels_s(sides, device)
        read_s(*sides)  # once unmeasured: the files lie in the page cache for every measurement alike
        prepare(device, options.peer)
        rounds, peers = [], []
        for number in range(1 if tiny else options.rounds):
            for made in ("exact", "top", "adapter", "peer"):
                shutil.rmtree(root / made, ignore_errors=True)
            rounds.append((
                start_s(device), start_torch_s(device), read_s(*sides), probe_s("spectrum", *sides, "--out", root / "exact"),
                probe_s("spectrum", *sides, "--out", root / "top", "--top", "64"),
                probe_s("extract", *sides, "--out", root / "adapter", "--rank", str(RANK)),
            ))  # fmt: skip
            if options.peer and number < options.peer_rounds:
                peers.append(peer_s(options.peer, sides, root / "peer", device))
            print(
                f"round {number + 1}: " + " ".join(f"{seconds:.2f}" for seconds in (*rounds[-1], *peers[number:])),
                flush=True,
            )
        start, torch_start, reading, exact, top, extract = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        extract_facts = json.loads((root / "adapter" / "probe" / "facts.json").read_text(encoding="utf-8"))
        stored, optimum = stored_errors(sides, root / "adapter", device)
        lines = list(overlap(root / "exact"))
        table = lp.load(root / "top").table
        fell = int((table["method"] == "gram").sum())
        top_seconds = lp.load(root / "top").facts["seconds"]
        exact_seconds = lp.load(root / "exact").facts["seconds"]
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    n_matrices = options.layers * len(SHAPES)
    cells = [
        [f"fp64 Gram + eigvalsh alone, Σ of {n_matrices}", f"{alone:.2f}"],
        ["start of Python, the command's imports and the device", f"{start:.2f}"],
        ["start of Python, torch and the device, no more", f"{torch_start:.2f}"],
        ["reading both files from the page cache, one thread", f"{reading:.2f}"],
        ["`probe spectrum`, whole process", f"{exact:.2f}"], ["`probe spectrum --top 64`, whole process", f"{top:.2f}"],
        [f"`probe extract --rank {RANK}`, whole process", f"{extract:.2f}"],
        *([f"`mergekit-extract-lora{' --cuda' * (device.type == 'cuda')} --max-rank {RANK}`, whole process", f"{x:.2f}"] for x in peers),
    ]  # fmt: skip
    cells += [[f"… phases of {word}", ", ".join(f"{k} {v:.2f}" for k, v in seconds.items())]
              for word, seconds in (("the exact spectra", exact_seconds), ("--top 64", top_seconds))]  # fmt: skip
    exact_ratio, top_ratio = (exact - start) / alone, (top - start) / reading
    verdicts = [
        (f"exact spectra: {exact_ratio:.2f} × (Gram + eigvalsh) beyond the start, bar {EXACT_BAR:g}", exact_ratio <= EXACT_BAR),
        (f"--top 64: {top_ratio:.2f} × reading beyond the start, bar {TOP_BAR:g}; {fell} of {len(table)} matrices fell "
         "through to the whole spectrum", top_ratio <= TOP_BAR),
        *judge_extract(extract, torch_start + reading, extract_facts.get("gpu_peak_bytes"), peers, options.layers),
        judge(f"`probe extract --rank {RANK}`", stored, optimum, "float32"),
    ]  # fmt: skip
    note = "\n".join(
        [
            f"{n_matrices} matrices of Llama-3-8B's shapes, two bf16 files; medians of {options.rounds} rounds. Card: {card}.",
            "",
            *lines[:1],
            "",
            *(f"- {x}" for x in lines[1:13]),
        ]
    )
    publish("gpu", "One GPU on Llama-3-8B's shapes", note, [("", ["what", "seconds"], cells)], verdicts, write=not tiny,
            page="benchmarks-gpu" + (f"-{options.layers}-layers" if options.layers != LAYERS else ""))  # fmt: skip
    return 0 if tiny or all(ok and math.isfinite(exact) for _, ok in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
