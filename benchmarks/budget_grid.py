"""The budget's closed form against one real training step on fake tensors: families × methods × checkpointing × lengths.

transformers' models, PEFT's adapters and torch's AdamW at their real sizes, with no memory for values; the bar is 1 % of
the whole step's peak (weights, adapter, gradients, optimizer states, activations, logits). Beside it the published
maxima of PEFT's own method comparison. Writes docs/budget-grid.md; exit 1 on a FAIL.

    python benchmarks/budget_grid.py            # about 6 minutes on 2 cores, under 1 GB of memory
    python benchmarks/budget_grid.py --quick    # the two smallest models, writes nothing
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from accuracy import publish
from budget_models import MODELS

from lowrank_probe.budgets import Budget
from lowrank_probe.measuring import Measured, measure_fake
from lowrank_probe.model_shapes import model_shape
from lowrank_probe.training_steps import Step

HERE: Final = Path(__file__).resolve().parent
BAR: Final = 0.01
SECONDS: Final = 60
GIB: Final = 2**30
GRID: Final = ("GPT-2", "Pythia-1.4B", "Qwen3-1.7B", "Llama-3.2-3B", "Mistral-7B", "Qwen2.5-7B", "Llama-3-8B")
SIZES: Final = ((1, 512), (4, 1024))
QV: Final = ("q_proj", "v_proj")
MLP: Final = ("gate_proj", "up_proj", "down_proj")
# Llama-3.2-3B, batch 4 × 768, the outputs held: maximum reserved on an L40S as PEFT's method comparison publishes it.
PUBLISHED: Final = (
    (Step(method="lora", rank=32, targets=QV), 20.76), (Step(method="lora", rank=64, targets=QV), 21.00),
    (Step(method="dora", rank=32, targets=QV), 22.85), (Step(method="lora", rank=10, targets=MLP), 23.00),
    (Step(method="full"), 36.20),
)  # fmt: skip
OPTIONS: Final = (
    Step(method="full", precision="mixed"), Step(method="full", precision="mixed", checkpointing=True),
    Step(method="lora", precision="mixed"), Step(method="full", precision="fp32"), Step(method="full", flash=False),
    Step(method="lora", flash=False, checkpointing=True), Step(method="full", chunked_loss=True),
    Step(method="lora", chunked_loss=True, checkpointing=True), Step(method="rslora", rank=64),
    Step(method="lora", adapter_dtype="bfloat16"), Step(method="lora", targets=QV),
    Step(method="full", optimizer="adamw-foreach"), Step(method="full", optimizer="sgd", checkpointing=True),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One run: its budget and what its step held."""

    model: str
    step: Step
    budget: Budget
    measured: Measured

    @property
    def off(self) -> float:
        """Formula / measured − 1, of the peak."""
        return self.budget.allocated_bytes / self.measured.peak - 1

    @property
    def ok(self) -> bool:
        return abs(self.off) <= BAR

    def cells(self) -> list[str]:
        phase = max(self.budget.phases, key=lambda phase: self.budget.phases[phase])
        peaks = phase if phase == self.measured.phase else f"{phase}; measured {self.measured.phase}"
        return [
            self.model, said(self.step), f"{self.step.batch} × {self.step.seq}", f"{self.measured.peak / GIB:.3f}",
            f"{self.budget.allocated_bytes / GIB:.3f}", f"{100 * self.off:+.2f} %", peaks, "PASS" if self.ok else "FAIL",
        ]  # fmt: skip


HEADS: Final = ["model", "run", "batch × seq", "fake tensors, GiB", "formula, GiB", "difference", "peaks in", "1 %"]


def run(model: str, step: Step) -> Row:
    """Both of one run."""
    config = MODELS[model]
    return Row(model, step, Budget(model_shape(config), step), measure_fake(config, step))


def said(step: Step) -> str:
    """The run in a few words."""
    words = [step.method]
    if step.adapted:
        targets = step.targets if isinstance(step.targets, str) else ", ".join(step.targets)
        words.append(f"r={step.rank} {targets}")
    words += [step.precision] if step.precision != "bf16" else []
    words += [step.optimizer] if step.optimizer != "adamw" else []
    words += ["bf16 adapter"] if step.adapter_dtype != "float32" else []
    names = (("checkpointing", "checkpointing"), ("chunked_loss", "chunked loss"), ("held_outputs", "outputs held"))
    words += [word for name, word in names if getattr(step, name)] + ([] if step.flash else ["eager attention"])
    return ", ".join(words)


def grid(models: tuple[str, ...]) -> Iterator[Row]:
    """The bar's own table."""
    for model in models:
        for method in ("full", "lora", "dora"):
            for checkpointing in (False, True):
                for batch, seq in SIZES:
                    step = Step(method=method, checkpointing=checkpointing, batch=batch, seq=seq)
                    yield run(model, step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two smallest models; writes nothing")
    quick = parser.parse_args().quick
    rows = []
    for row in grid(GRID[:2] if quick else GRID):
        print(" | ".join(row.cells()), flush=True)
        rows.append(row)
    published = [
        (run("Llama-3.2-3B", replace(step, batch=4, seq=768, held_outputs=True)), peak) for step, peak in PUBLISHED
    ]
    models = ("GPT-2",) if quick else ("GPT-2", "Pythia-1.4B", "Llama-3.2-1B")
    options = [
        run(model, replace(step, batch=2, seq=512))
        for model in models for step in OPTIONS if model == "Llama-3.2-1B" or step.targets != QV
    ]  # fmt: skip
    tables = [
        ("Families, methods, checkpointing", HEADS, [row.cells() for row in rows]),
        ("Options", HEADS, [row.cells() for row in options]),
        ("Beside published maxima: Llama-3.2-3B on an L40S", [*HEADS[1:6], "published, GiB reserved"],
         [[*row.cells()[1:6], f"{peak:.2f}"] for row, peak in published]),
    ]  # fmt: skip
    seconds, host = eight_b()
    verdicts = [
        verdict("families, methods, checkpointing", rows), verdict("options", options),
        verdict("the published five", [row for row, _ in published]),
        (f"Llama-3-8B, LoRA, one fake step in a process of its own: {seconds:.0f} CPU seconds, bar {SECONDS}", seconds < SECONDS),
        (f"… and {host / 1e9:.2f} GB of memory, bar 1 GB", host < 1e9),
    ]  # fmt: skip
    publish(
        "budget_grid",
        "The budget's formulas against real steps",
        NOTE,
        tables,
        verdicts,
        write=not quick,
        page="budget-grid",
    )
    return 0 if all(ok for _, ok in verdicts) else 1


def eight_b() -> tuple[float, int]:
    """(CPU seconds, bytes) of a process that measures one step of Llama-3-8B."""
    code = (
        "import json, resource, time; from budget_models import MODELS; from lowrank_probe.measuring import measure_fake; "
        "from lowrank_probe.training_steps import Step; measure_fake(MODELS['Llama-3-8B'], Step(seq=2048, checkpointing=True)); "
        "print(json.dumps([time.process_time(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    seconds, host = json.loads(done.stdout.splitlines()[-1])
    return seconds, host


def verdict(name: str, rows: list[Row]) -> tuple[str, bool]:
    """(sentence, whether every row is within the bar)."""
    worst = max(rows, key=lambda row: abs(row.off))
    good = sum(row.ok for row in rows)
    where = f"{worst.model}, {said(worst.step)}, {worst.step.batch} × {worst.step.seq}"
    return (
        f"{name}: {good} of {len(rows)} runs within {100 * BAR:g} %; worst {100 * worst.off:+.2f} % ({where})",
        good == len(rows),
    )


NOTE: Final = (
    "One training step of transformers' model with PEFT's adapter and torch's fused AdamW, in bf16 with an fp32 adapter "
    "on all linear layers at rank 16 where nothing else is said, optimizer states in place, no padding; run on fake "
    "tensors, every storage followed from birth to death, with what CUDA's kernels save in place of the CPU's "
    "(`lowrank_probe/as_on_cuda.py`). The peak is of everything together: weights, adapter, gradients, optimizer states, "
    "activations, logits. The formula knows the config alone. Neither has the CUDA context, cuBLAS' workspaces or the "
    "allocator's rounding and fragmentation; the published maxima are of reserved memory, which has the last two of these."
)

if __name__ == "__main__":
    raise SystemExit(main())
