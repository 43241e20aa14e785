"""Speed and memory of the whole command, on an 84M-parameter bf16 Llama pair made here (random weights, 1/i update).

`probe spectrum` against `modeldelta` 0.4.4 from PyPI, interleaved, whole processes; the peak of memory above the
process after its imports; `probe --help` against importing typer and rich. Writes docs/benchmarks-speed.md. Exit 1 on a
FAIL. Time is judged on rounds during which the rest of the machine was idle: other work slows modeldelta up to sixfold.

    python benchmarks/speed.py --peer PATH/bin/modeldelta    # about 4 minutes on 2 idle cores
    python benchmarks/speed.py                               # makes a venv for modeldelta first (needs pip's network)
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HIDDEN: Final = 1024
N_LAYERS: Final = 6
INTERMEDIATE: Final = 2816
VOCAB: Final = 8000
RELATIVE: Final = 1e-2
PEER: Final = "modeldelta==0.4.4"
LARGEST_BYTES: Final = 4 * VOCAB * HIDDEN
TIME_BAR: Final = 0.5
MEMORY_BAR: Final = 4.0
HELP_BAR: Final = 2.5
SAMPLE_S: Final = 0.002
# A round counts while other work kept fewer cores busy than this; up to three times the rounds are tried.
IDLE_CORES: Final = 0.2


@dataclass(frozen=True)
class Timing:
    """One whole process: wall clock, its CPU seconds, and the cores that anything else kept busy meanwhile."""

    wall_s: float
    cpu_s: float
    others: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the modeldelta executable of another venv; without it one is made")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, interleaved (default 5)")
    parser.add_argument("--relative", type=float, default=RELATIVE, help="relative size of the update (default 1e-2)")
    parser.add_argument("--memory", nargs=3, metavar=("BASE", "TUNED", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory_of_this_process(*options.memory)))
        return 0
    from accuracy import publish

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, tuned = make_pair(root, options.relative)
        peer = options.peer or str(install_peer(root / "peer"))
        probe = str(Path(sys.executable).with_name("probe"))
        ours, theirs, helps, imports, memory = [], [], [], [], []
        discarded = 0
        while len(ours) < options.runs and discarded < 2 * options.runs:
            out = root / f"run{len(ours) + discarded}"
            our = timed([probe, "spectrum", str(base), str(tuned), "--out", str(out), "--quiet"])
            their = timed([peer, str(base), str(tuned), "-q", "-o", str(root / "peer.json")])
            quiet = max(our.others, their.others) <= IDLE_CORES
            print(
                f"{our.wall_s:.2f} s, modeldelta {their.wall_s:.2f} s; others' load {our.others:.2f}, "
                f"{their.others:.2f}{'' if quiet else ': not counted'}",
                file=sys.stderr,
            )
            if quiet:
                ours.append(our)
                theirs.append(their)
            else:
                discarded += 1
        if len(ours) < min(3, options.runs):
            print(f"FAIL: the machine was idle in {len(ours)} rounds only; nothing is judged", file=sys.stderr)
            return 1
        for _ in range(10):
            helps.append(timed([probe, "--help"]))
            imports.append(timed([sys.executable, "-c", "import typer, rich"]))
        for i in range(3):
            command = [sys.executable, __file__, "--memory", str(base), str(tuned), str(root / f"memory{i}")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            memory.append(json.loads(done.stdout.splitlines()[-1]))
    ratio, help_ratio = _median(ours) / _median(theirs), _median(helps) / _median(imports)
    worst = max(memory, key=lambda one: float(one["peak_bytes"]))
    multiple = worst["peak_bytes"] / LARGEST_BYTES
    heads = ["whole process", "runs", "median, s", "least–most, s", "CPU, median s", "others' load, cores"]
    cells = [
        _row("`probe spectrum` (every singular value, report written)", ours),
        _row(f"`{PEER.replace('==', ' ')}` (20 singular values a matrix)", theirs),
        _row("`probe --help`", helps), _row('`python -c "import typer, rich"`', imports),
    ]  # fmt: skip
    memory_heads = ["memory above the process after its imports", "MB", "× largest matrix in fp32"]
    memory_cells = [
        [label, f"{worst[key] / 1e6:.0f}", f"{worst[key] / LARGEST_BYTES:.2f}"]
        for key, label in (("peak_bytes", "peak, whole run (worst of 3)"), ("spectrum_bytes", "peak, analysis"),
                           ("after_bytes", "kept after the analysis"), ("sampled_bytes", "peak seen by the sampler"))
    ]  # fmt: skip
    verdicts = [
        (f"whole process: {ratio:.2f} × modeldelta, bar {TIME_BAR:g}; {len(ours)} rounds, {discarded} more not counted "
         f"because other work kept more than {IDLE_CORES:g} cores busy", ratio <= TIME_BAR),
        (f"memory: {multiple:.2f} × the largest matrix in fp32 ({LARGEST_BYTES / 1e6:.1f} MB), bar {MEMORY_BAR:g}; "
         f"reached in {worst['where']}", multiple <= MEMORY_BAR),
        (f"--help: {help_ratio:.2f} × importing typer and rich, bar {HELP_BAR:g}", help_ratio <= HELP_BAR),
    ]  # fmt: skip
    note = (
        f"A Llama pair of hidden {HIDDEN}, {N_LAYERS} layers, intermediate {INTERMEDIATE}, vocabulary {VOCAB}, tied "
        f"head: random bf16 weights and an update of relative size {options.relative:g} with σ_i = 1/i in every matrix. "
        "Runs are interleaved; others' load is what the rest of the machine kept busy meanwhile (0 = idle). The peak is the "
        "kernel's own high-water mark (VmHWM), reset after the imports."
    )
    publish("speed", "Speed and memory", note, [("", heads, cells), ("Memory", memory_heads, memory_cells)], verdicts,
            write=options.relative == RELATIVE)  # fmt: skip
    return 0 if all(ok for _, ok in verdicts) else 1


def make_pair(root: Path, relative: float) -> tuple[Path, Path]:
    """(base, tuned): two directories with model.safetensors in bf16 and config.json."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for name, shape in shapes():
        if len(shape) == 1:
            base[name] = tuned[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        W = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        U, V = (torch.linalg.qr(torch.randn(d, min(shape), generator=generator)).Q for d in shape)
        D = (U / torch.arange(1, min(shape) + 1)) @ V.T
        D *= relative * torch.linalg.norm(W.float()) / torch.linalg.norm(D)
        base[name], tuned[name] = W, (W.float() + D).bfloat16()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "num_hidden_layers": N_LAYERS, "intermediate_size": INTERMEDIATE, "tie_word_embeddings": True,
    }  # fmt: skip
    for directory, tensors in ((root / "base", base), (root / "tuned", tuned)):
        directory.mkdir()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return root / "base", root / "tuned"


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, as transformers' Llama names them."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(N_LAYERS):
        prefix = f"model.layers.{layer}."
        for kind in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{kind}_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
        yield f"{prefix}input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)


def install_peer(venv: Path, requirement: str = PEER, command: str = "modeldelta") -> Path:
    """A venv with a peer and the torch of our constraints; returns the peer's executable."""
    print(f"making a venv with {requirement}", file=sys.stderr)
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints]
    subprocess.run([*pip, "torch", requirement], check=True)
    return venv / "bin" / command


def as_installed() -> dict[str, str]:
    """The environment of a process that keeps its modules' bytecode, as pip leaves it on every machine.

    Containers often forbid that: each process then compiles all of torch again, half of the seconds of its start.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def timed(command: Sequence[str]) -> Timing:
    """Run a command to its end; RuntimeError with its own words where it fails."""
    busy, used, started = _busy_s(), _children_s(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=as_installed())
    wall, cpu = time.perf_counter() - started, _children_s() - used
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return Timing(wall, cpu, max(0.0, (_busy_s() - busy - cpu) / wall))


def memory_of_this_process(base: str, tuned: str, out: str) -> dict[str, Any]:
    """Bytes above the resident size after the imports, of `spectrum(base, tuned).save(out)` in this process.

    Linux only. The peak is VmHWM, which the kernel keeps exactly; a sampling thread tells where it was reached.
    """
    # What the command itself imports before and after the analysis.
    import jinja2  # noqa: F401
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import plotly.graph_objects
    import plotly.offline  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    from lowrank_probe.spectra import spectrum

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = _status("VmRSS")
    samples: list[tuple[int, str]] = [(0, "")]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            resident = _status("VmRSS") - start
            if resident > samples[-1][0]:
                samples.append((resident, _running(threading.get_ident())))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    result = spectrum(base, tuned)
    analysis, after = _status("VmHWM") - start, _status("VmRSS") - start
    result.save(out)
    stop.set()
    sampler.join()
    peak = _status("VmHWM") - start
    return {"peak_bytes": peak, "spectrum_bytes": analysis, "after_bytes": after, "sampled_bytes": samples[-1][0],
            "where": samples[-1][1]}  # fmt: skip


def _running(own: int) -> str:
    """The innermost function of ours in every other thread."""
    found = []
    for thread, frame in sys._current_frames().items():
        inner = frame
        while inner is not None and "lowrank_probe" not in inner.f_code.co_filename.split(os.sep)[-2:]:
            inner = inner.f_back  # type: ignore[assignment]
        if thread != own and inner is not None:
            found.append(inner.f_code.co_name)
    return " beside ".join(sorted(f"`{name}`" for name in found if name != "run_jobs")) or "start-up"


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as handle:
        return next(1024 * int(line.split()[1]) for line in handle if line.startswith(f"{key}:"))


def _busy_s() -> float:
    """CPU seconds that all cores together have spent on anything since the start of the machine."""
    with open("/proc/stat", encoding="ascii") as handle:
        user, nice, system, _, _, irq, soft = (int(word) for word in handle.readline().split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _median(runs: Sequence[Timing]) -> float:
    return statistics.median(run.wall_s for run in runs)


def _row(name: str, runs: Sequence[Timing]) -> list[str]:
    walls = [run.wall_s for run in runs]
    return [
        name, str(len(runs)), f"{_median(runs):.2f}", f"{min(walls):.2f}–{max(walls):.2f}",
        f"{statistics.median(run.cpu_s for run in runs):.2f}", f"{statistics.median(run.others for run in runs):.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
