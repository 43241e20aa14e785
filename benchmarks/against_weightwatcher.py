"""`probe spectrum` against WeightWatcher 0.7.7 on the 84M-parameter pair of speed.py: the whole spectrum of ΔW, whole
processes, interleaved, on a CPU. WeightWatcher gets both models as torch modules and analyses their difference
(`analyze(base_model=…)`, defaults otherwise). Beside them the floor: float64 Gram matrices and `eigvalsh` alone, a matrix
a core, without noise, ranks, kept work, tables or report. Writes docs/benchmarks-weightwatcher.md. Exit 1 on a FAIL.

    python benchmarks/against_weightwatcher.py --peer PATH/bin/python    # about 4 minutes on 2 idle cores
    python benchmarks/against_weightwatcher.py                           # makes a venv for WeightWatcher first (needs pip)
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from accuracy import publish
from speed import RELATIVE, make_pair, timed

PEER: Final = "weightwatcher==0.7.7"
BAR: Final = 1 / 3
ANALYSE: Final = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch, weightwatcher
from safetensors.torch import load_file

def model(path):
    found = torch.nn.Module()
    for name, W in load_file(path + "/model.safetensors").items():
        if W.ndim == 2:
            linear = torch.nn.Linear(W.shape[1], W.shape[0], bias=False)
            linear.weight.data = W.float()
            found.add_module(name.replace(".", "_"), linear)
    return found

base, tuned = model(sys.argv[1]), model(sys.argv[2])
print(len(weightwatcher.WeightWatcher(model=tuned).analyze(model=tuned, base_model=base)))
"""

FLOOR: Final = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import numpy, torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits

base, tuned = (load_file(path + "/model.safetensors") for path in sys.argv[1:])

def values(name):
    D = (tuned[name].float() - base[name].float()).double().numpy()
    D = D if D.shape[0] <= D.shape[1] else D.T
    return numpy.sqrt(numpy.maximum(numpy.linalg.eigvalsh(D @ D.T), 0))

torch.set_num_threads(1)
names = sorted((name for name, W in base.items() if W.ndim == 2), key=lambda name: -base[name].numel())
with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
    found = list(pool.map(values, names))
sys.stdout.flush()
os._exit(0)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="the Python of an environment with weightwatcher and safetensors")
    parser.add_argument("--runs", type=int, default=7, help="runs of each, interleaved (default 7)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, tuned = make_pair(root, RELATIVE)
        peer = options.peer or str(install_peer(root / "peer"))
        probe = str(Path(sys.executable).with_name("probe"))
        ours, theirs, floor = [], [], []
        for i in range(options.runs):
            ours.append(timed([probe, "spectrum", str(base), str(tuned), "--out", str(root / f"run{i}"), "--quiet"]))
            theirs.append(timed([peer, "-c", ANALYSE, str(base), str(tuned)]))
            floor.append(timed([sys.executable, "-c", FLOOR, str(base), str(tuned)]))
            print(
                f"{ours[-1].wall_s:.2f} s, WeightWatcher {theirs[-1].wall_s:.2f} s, floor {floor[-1].wall_s:.2f} s",
                file=sys.stderr,
            )
    names = (
        "`probe spectrum`", f"`{PEER.replace('==', ' ')}`, `analyze(base_model=…)`",
        "floor: Gram and `eigvalsh` alone, a matrix a core",
    )  # fmt: skip
    columns = [
        [statistics.median(value(run) for run in runs) for runs in (ours, theirs, floor)]
        for value in (lambda run: run.wall_s, lambda run: run.cpu_s, lambda run: run.others)
    ]
    spans = [
        f"{min(walls):.2f}–{max(walls):.2f}"
        for walls in ([one.wall_s for one in runs] for runs in (ours, theirs, floor))
    ]
    cells = [
        [name, f"{wall:.2f}", span, f"{cpu:.2f}", f"{load:.1f}"]
        for name, span, wall, cpu, load in zip(names, spans, *columns, strict=True)
    ]
    ratios = sorted(one.wall_s / other.wall_s for one, other in zip(ours, theirs, strict=True))
    ratio = statistics.median(ratios)
    verdicts = [(f"whole process: {1 / ratio:.1f} × faster than WeightWatcher (median of {len(ratios)} pairs of runs, "
                 f"{1 / ratios[-1]:.1f} to {1 / ratios[0]:.1f} ×), bar {1 / BAR:.0f}", ratio <= BAR)]  # fmt: skip
    note = "The 84M-parameter bf16 pair of `speed.py`; every singular value of ΔW on both sides; runs are interleaved."
    publish("against_weightwatcher", "Against WeightWatcher", note,
            [("", ["whole process", "median, s", "least–most, s", "CPU, median s", "others' load, cores"], cells)], verdicts, page="benchmarks-weightwatcher")  # fmt: skip
    return 0 if ratio <= BAR else 1


def install_peer(venv: Path) -> Path:
    """A venv with WeightWatcher, the torch of our constraints and safetensors; returns its Python."""
    constraints = Path(__file__).resolve().parent.parent / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", constraints]
    for packages in (["torch"], [PEER, "safetensors"]):
        subprocess.run([*pip, *packages], check=True)
    return venv / "bin" / "python"


if __name__ == "__main__":
    raise SystemExit(main())
