"""The budget against real training steps on one CUDA GPU: `torch.cuda.max_memory_allocated`, random weights.

Thirteen configurations of 135M to 8B parameters, full, LoRA, rsLoRA and DoRA, with and without checkpointing, each in a
process of its own, two at a time (each counts its own memory; together they stay under 80 GB). The bar is 5 % of the
prediction without its reserve. Beside it fitcheck-llm 0.3.1. Writes docs/benchmarks-budget-gpu.md; exit 1 on a FAIL.

    python benchmarks/budget_gpu.py --peer-json benchmarks/budget_fitcheck.json    # under 4 minutes on an H100, no network
    python benchmarks/budget_gpu.py --peer PATH/bin/python --write-peer FILE       # anywhere: fitcheck's answers, no more
    python benchmarks/budget_gpu.py --tiny               # small shapes on the CPU's fake tensors; judges those
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from accuracy import publish
from budget_grid import GIB, MLP, QV, said
from budget_models import MODELS

from lowrank_probe.budgets import Budget
from lowrank_probe.model_shapes import model_shape
from lowrank_probe.training_steps import PHASES, Step

BAR: Final = 0.05
# No two neighbours are together above 75 GB.
RUNS: Final = (
    ("SmolLM-135M", Step(method="full", batch=4, seq=1024, checkpointing=True)),
    ("SmolLM-135M", Step(method="full", batch=8, seq=1024)),
    ("Llama-3-8B", Step(method="lora", batch=1, seq=2048)),
    ("Llama-3-8B", Step(method="lora", batch=4, seq=2048, checkpointing=True)),
    ("Llama-3-8B", Step(method="rslora", rank=64, batch=1, seq=4096, checkpointing=True)),
    ("Llama-3.2-3B", Step(method="lora", rank=32, targets=QV, batch=4, seq=768)),
    ("Llama-3.2-3B", Step(method="dora", rank=32, targets=QV, batch=4, seq=768)),
    ("Llama-3.2-3B", Step(method="lora", rank=10, targets=MLP, batch=2, seq=1536)),
    ("Llama-3.2-1B", Step(method="full", batch=4, seq=1024)),
    ("Llama-3.2-1B", Step(method="full", batch=2, seq=4096, checkpointing=True)),
    ("Qwen2.5-7B", Step(method="lora", batch=1, seq=1024)),
    ("Pythia-1.4B", Step(method="full", batch=4, seq=1024, checkpointing=True)),
    ("GPT-2", Step(method="full", batch=8, seq=1024)),
)  # fmt: skip
_TINY: Final = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8,
                "num_key_value_heads": 2, "vocab_size": 4000, "head_dim": 32}  # fmt: skip
# fitcheck's Python interface, run by the interpreter that has it: rows in, GiB without its overhead out.
_PEER: Final = """
import json, sys
from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu
def one(row):
    try:
        report = estimate(ModelConfig(**row["model"]), TrainingConfig(**row["training"]), get_gpu("h100"))
    except ValueError as error:
        return {"why": str(error)}
    return {"allocated": (report.total_mib - report.overhead_mib) / 1024, "total": report.total_mib / 1024}
print(json.dumps([one(row) if row else {"why": "an architecture that it does not know"} for row in json.load(sys.stdin)]))
"""


def config_of(model: str, tiny: bool) -> Mapping[str, Any]:
    """The model's config, or a small one of the same family."""
    config = MODELS[model]
    if not tiny:
        return config
    return (
        config | {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 4000}
        if "n_embd" in config
        else config | _TINY
    )


def step_of(step: Step, tiny: bool) -> Step:
    return Step(**{**vars(step), "batch": 2, "seq": 128, "rank": 8}) if tiny else step


def measure(number: int, tiny: bool) -> None:
    """One run's measurement, as JSON on stdout: what the child process does."""
    import torch

    from lowrank_probe.measuring import measure_cuda, measure_fake

    model, step = RUNS[number]
    found = (measure_fake if tiny else measure_cuda)(config_of(model, tiny), step_of(step, tiny))
    facts: dict[str, Any] = {"how": found.how, "peaks": dict(found.peaks), "seconds": found.seconds}
    if not tiny:
        free, total = torch.cuda.mem_get_info()
        facts["reserved"] = torch.cuda.memory_reserved()
        facts["context"] = total - free - facts["reserved"]
        # The model is gone: what is left are cuBLAS' workspaces.
        facts["workspaces"] = torch.cuda.memory_allocated()
        facts["torch"] = torch.__version__
    print(json.dumps(facts))


def child(number: int, tiny: bool) -> dict[str, Any]:
    """`measure` in a process of its own; its own words where it fails."""
    command = [sys.executable, __file__, "--one", str(number), *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer_answers(python: str) -> list[dict[str, Any]]:
    """fitcheck's answer to every run: GiB allocated, or why there is none."""
    rows = [peer_row(MODELS[model], step) for model, step in RUNS]
    done = subprocess.run([python, "-c", _PEER], input=json.dumps(rows), capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def peer_row(config: Mapping[str, Any], step: Step) -> dict[str, Any] | None:
    """The run in fitcheck's own terms, with the exact count of parameters; None for another layout than Llama's.

    It knows no DoRA and no rsLoRA and is asked for LoRA; states of a bf16 run are bf16 as torch makes them.
    """
    shape = model_shape(config)
    if not shape.gated:
        return None
    every = ["q_proj", "k_proj", "v_proj", "o_proj", *MLP]
    return {
        "model": {
            "name": "local", "num_params": shape.n_parameters, "hidden_size": shape.hidden, "num_layers": shape.n_layers,
            "num_attention_heads": shape.n_heads, "num_kv_heads": shape.n_kv_heads,
            "intermediate_size": shape.intermediate, "vocab_size": shape.vocab, "head_dim": shape.head_dim,
            "tie_word_embeddings": shape.tied_embeddings,
        },
        "training": {
            "precision": "bf16", "optimizer": "adamw", "optimizer_dtype": "fp32" if step.adapted else "bf16",
            "batch_size": step.batch, "seq_len": step.seq, "lora_rank": step.rank if step.adapted else None,
            "lora_targets": every if isinstance(step.targets, str) else list(step.targets),
            "grad_checkpoint": step.checkpointing, "flash_attn": step.flash,
        },
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU's fake tensors")
    parser.add_argument("--peer", help="a Python interpreter that has fitcheck-llm 0.3.1")
    parser.add_argument("--peer-json", type=Path, help="fitcheck's answers, as --write-peer wrote them")
    parser.add_argument("--write-peer", type=Path, help="write fitcheck's answers there, and do nothing else")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measure(options.one, options.tiny)
        return 0
    peers = json.loads(options.peer_json.read_text(encoding="utf-8")) if options.peer_json else []
    peers = peer_answers(options.peer) if options.peer else peers
    if options.write_peer:
        options.write_peer.write_text(json.dumps(peers, indent=1) + "\n", encoding="utf-8")
        return 0
    started = time.perf_counter()
    # The first one alone: the GPU's free memory then tells the context.
    found = [child(0, options.tiny)]
    with ThreadPoolExecutor(1 if options.tiny else 2) as pool:
        found += pool.map(lambda number: child(number, options.tiny), range(1, len(RUNS)))
    seconds = time.perf_counter() - started
    return report(found, [] if options.tiny else peers, seconds, options.tiny)


def report(found: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]], seconds: float, tiny: bool) -> int:
    """The table, the verdicts and the page."""
    heads = [
        "model",
        "run",
        "batch × seq",
        "measured, GiB",
        "predicted, GiB",
        "difference",
        "peaks in, measured / predicted",
    ]
    heads += [] if tiny else ["reserved, GiB"]
    heads += ["fitcheck-llm 0.3.1, GiB", "its difference"] if peers else []
    cells, phases, offs, theirs = [], [], [], []
    for number, ((model, how), one) in enumerate(zip(RUNS, found, strict=True)):
        step = step_of(how, tiny)
        budget = Budget(model_shape(config_of(model, tiny)), step)
        row = [model, said(step), f"{step.batch} × {step.seq}"]
        if "failed" in one:
            cells.append([*row, one["failed"], f"{budget.allocated_bytes / GIB:.3f}", *["–"] * (len(heads) - 5)])
            offs.append(float("inf"))
            continue
        peak = max(one["peaks"].values())
        offs.append(budget.allocated_bytes / peak - 1)
        row += [f"{peak / GIB:.3f}", f"{budget.allocated_bytes / GIB:.3f}", f"{100 * offs[-1]:+.2f} %"]
        row.append(f"{max(one['peaks'], key=one['peaks'].get)} / {budget.peak_phase}")
        row += [] if tiny else [f"{one['reserved'] / GIB:.3f}"]
        if peers:
            answer = peers[number].get("allocated")
            theirs += [answer * GIB / peak - 1] if answer else []
            row += [f"{answer:.3f}", f"{100 * theirs[-1]:+.1f} %"] if answer else ["–", peers[number]["why"]]
        cells.append(row)
        without = {phase: budget.phases[phase] - budget.components[-1].at[phase] for phase in PHASES}
        phases.append([model, said(step), *(f"{one['peaks'][p] / GIB:.3f} / {without[p] / GIB:.3f}" for p in PHASES)])
    worst = max(offs, key=abs)
    verdicts = [
        (f"{sum(abs(off) <= BAR for off in offs)} of {len(offs)} runs within {100 * BAR:g} %; worst {100 * worst:+.2f} %",
         abs(worst) <= BAR),
        (f"{seconds:.0f} s for all of them, bar 240 s", seconds <= 240 or tiny),
    ]  # fmt: skip
    notes = [NOTE]
    first = found[0]
    if "reserved" in first:
        held = max(one["reserved"] / max(one["peaks"].values()) - 1 for one in found if "reserved" in one)
        notes.append(
            f"Card: {first['how']}, torch {first['torch']}. CUDA context: {first['context'] / 2**20:.0f} MiB; cuBLAS' "
            f"workspaces, in the measured column: {first['workspaces'] / 2**20:.0f} MiB; the allocator reserved up to "
            f"{100 * held:.0f} % more than the peak."
        )
    if theirs:
        notes.append(
            f"fitcheck-llm is asked by its Python interface with the exact count of parameters, without its own overhead; "
            f"it knows no DoRA and no rsLoRA and answers for LoRA. Its worst difference is {100 * max(theirs, key=abs):+.1f} %."
        )
    tables = [("Peaks", heads, cells), ("By phase: measured / predicted, GiB", ["model", "run", *PHASES], phases)]
    publish("budget_gpu", "The budget against real steps on a GPU", "\n\n".join(notes), tables, verdicts,
            write=not tiny, page="benchmarks-budget-gpu")  # fmt: skip
    return 0 if all(ok for _, ok in verdicts) else 1


NOTE: Final = (
    "One real optimizer step on random weights in bf16, AdamW's states in place; transformers' model, PEFT's adapter "
    "(fp32, all linear layers where nothing else is said), torch's fused AdamW. Measured is the largest of "
    "`torch.cuda.max_memory_allocated` over the phases; predicted is the budget without its reserve."
)

if __name__ == "__main__":
    raise SystemExit(main())
