"""An adapter from rank 64 to 16 by `lp.resize`, against peft's own conversion through dense matrices: CPU seconds, error.

The base is that of `speed.py` (84M parameters, bf16), the adapter a rank-64 LoRA on all of its 42 linear layers, made
here. Both sides start with everything imported, peft also with the model loaded; ours reads and writes its files.
Writes docs/benchmarks-resize.md. Exit 1 on a FAIL.

    python benchmarks/resize.py    # about 2 minutes on 2 cores
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import peft
import torch
import transformers
from accuracy import publish
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from speed import make_pair

import lowrank_probe as lp

RANK: Final = 64
NEW_RANK: Final = 16
SPEED_BAR: Final = 100.0
ERROR_BAR: Final = 1.00005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="runs of ours; peft runs once per two of them (default 5)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, _ = make_pair(root, 1e-2)
        adapter = make_adapter(base, root / "adapter")
        model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter)
        lp.resize(adapter, root / "warm", rank=NEW_RANK)  # the imports on first use
        ours, theirs = [], []
        for run in range(options.runs):
            ours.append(timed(lambda run=run: lp.resize(adapter, root / f"ours{run}", rank=NEW_RANK)))
            if run % 2 == 0:
                theirs.append(timed(lambda: peft.convert_to_lora(model, rank=NEW_RANK)))
            print(f"{ours[-1][0]:.3f} s, peft {theirs[-1][0]:.1f} s", file=sys.stderr)
        table = ours[0][2].table
        factors = load_file(root / "ours0" / "adapter_model.safetensors")
        our_error, best = errors(adapter, factors)
        their_error, _ = errors(adapter, theirs[0][2][1])
    our_cpu, their_cpu = (statistics.median(cpu for cpu, _, _ in side) for side in (ours, theirs))
    ratio = their_cpu / our_cpu
    told = math.sqrt(float((table["fro_norm"] ** 2 * table["error"] ** 2).sum() / (table["fro_norm"] ** 2).sum()))
    heads = ["", "CPU, median s", "wall, median s", "runs", "‖ΔW − BA‖/‖ΔW‖", "over the optimum"]
    cells = [
        [label, f"{statistics.median(cpu for cpu, _, _ in side):.3f}",
         f"{statistics.median(wall for _, wall, _ in side):.3f}", str(len(side)), f"{error:.9f}", f"{error / best - 1:.1e}"]
        for label, side, error in (("`lp.resize`, files read and written", ours, our_error),
                                   (f"`peft.convert_to_lora` {peft.__version__}, in memory", theirs, their_error))
    ]  # fmt: skip
    verdicts = [
        (f"peft's dense conversion takes {ratio:.0f} × our CPU time, bar {SPEED_BAR:g}", ratio >= SPEED_BAR),
        (f"error {our_error / best:.8f} × the optimum {best:.9f} (dense float64 SVD), bar {ERROR_BAR}; "
         f"peft's {their_error / best:.8f} ×", our_error <= ERROR_BAR * best),
        (f"the printed error is the real one: {told:.9f} against {our_error:.9f}", abs(told - our_error) <= 1e-7),
    ]  # fmt: skip
    note = (
        f"{len(table)} modules of a Llama of 84M parameters, rank {RANK} → {NEW_RANK}, float32; {torch.get_num_threads()} "
        "thread(s). The work alone: imports are left out on both sides, on peft's also loading the model and writing."
    )
    publish("resize", "Resizing an adapter", note, [("", heads, cells)], verdicts)
    return 0 if all(ok for _, ok in verdicts) else 1


def make_adapter(base: Path, directory: Path) -> Path:
    """A rank-64 LoRA on all linear layers whose directions get weaker as 1/√i, as those of trained ones do."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.01 * torch.randn_like(parameter) / torch.arange(1, RANK + 1).sqrt())
    wrapped.save_pretrained(directory)
    return directory


def timed(act: Callable[[], Any]) -> tuple[float, float, Any]:
    """(CPU seconds, wall seconds, what it returned)."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = act()
    return time.process_time() - cpu, time.perf_counter() - wall, found


def errors(adapter: Path, factors: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(‖ΔW − BA‖/‖ΔW‖ over all modules, its optimum) by dense float64 matrices; scaling is 1 on both sides."""
    before = load_file(adapter / "adapter_model.safetensors")
    lost = least = total = 0.0
    for name in [name for name in before if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        delta = before[other].double() @ before[name].double()
        s = torch.linalg.svdvals(delta)
        lost += float(torch.linalg.norm(delta - factors[other].double() @ factors[name].double())) ** 2
        least += float((s[NEW_RANK:] ** 2).sum())
        total += float((s**2).sum())
    return math.sqrt(lost / total), math.sqrt(least / total)


if __name__ == "__main__":
    raise SystemExit(main())
