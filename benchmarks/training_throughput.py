"""Tokens a second of `probe train`'s runs against a bare `transformers.Trainer` on the same model, adapter and batches.

    python benchmarks/training_throughput.py [MODEL TEXT] [--steps 40] [--batch 8] [--length 128] [--device cpu]

Both train the same steps with the same arguments and no held-out losses, in turns; ours with its watch on health, its
saving and its progress. Prints the ratio of the medians over rounds, bar 0.9; writes docs/benchmarks-training-throughput-<device>.md.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from accuracy import publish
from training_whole import demo_task
from transformers import PrinterCallback, Trainer, set_seed

from lowrank_probe import training
from lowrank_probe.running_models import quiet
from lowrank_probe.training_fits import Rows, Setting, _arguments, load_model, lora_config, run_fit
from lowrank_probe.training_plan import FULL, Fit, Plan, Recipe

BAR = 0.9
ROUNDS = 3


def bare(fit: Fit, setting: Setting, folder: Path) -> float:
    """Seconds of `train()` of a Trainer that has nothing of ours."""
    from peft import get_peft_model

    set_seed(fit.seed)
    model = load_model(setting.model)
    with quiet():
        if fit.method != FULL:
            model = get_peft_model(model, lora_config(fit, setting.modules[fit.targets], setting.recipe.alpha))
        trainer = Trainer(model=model, args=_arguments(fit, setting, folder), train_dataset=Rows(setting.training))
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo's base")
    parser.add_argument("text", type=Path, nargs="?", help="default: the language reference's prose")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.text is None:
            asked.model, asked.text = demo_task(Path(folder))
        return measure(asked)


def measure(asked: argparse.Namespace) -> int:
    device, shape = training._device(asked.device), training._shape(asked.model)
    recipe: Recipe = replace(
        training.default_recipe(asked.model, asked.device), steps=asked.steps, batch=asked.batch, length=asked.length
    )
    plan = Plan((16,), ("all-linear",), (0,))
    modules = {"all-linear": training._modules(shape, "all-linear", plan)}
    blocks, _ = training._blocks(asked.model, asked.text, recipe, 0.1, True, shape)
    setting = Setting(asked.model, *blocks, recipe, modules, device)
    tokens = recipe.sequences * recipe.length
    cells, verdicts = [], []
    for fit in plan.fits({FULL: 1e-5, "lora": 1e-4}, asked.steps):
        fit = replace(fit, search=True)  # without held-out losses on the way, and without weights at the end
        ours, theirs = [], []
        for _ in range(asked.rounds):
            with tempfile.TemporaryDirectory() as folder:
                theirs.append(bare(fit, setting, Path(folder) / "bare"))
                ours.append(run_fit(fit, setting, Path(folder) / "ours")["seconds"])
        rates = [tokens / statistics.median(one) for one in (theirs, ours)]
        name = "full" if fit.method == FULL else "LoRA r=16, all-linear"
        cells.append((name, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{rates[1] / rates[0]:.3f}"))
        verdicts.append(
            (f"{name}: {rates[1] / rates[0]:.3f} × the bare Trainer, bar {BAR}", rates[1] >= BAR * rates[0])
        )
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    note = (
        f"{asked.model.resolve().name} on {where}: {asked.steps} steps of {recipe.batch} × {recipe.length} tokens, "
        f"{recipe.precision}, medians of {asked.rounds} rounds in turns."
    )
    heads = ("run", "bare Trainer, tokens/s", "`probe train`, tokens/s", "ratio")
    page = f"benchmarks-training-throughput-{device.type}"
    publish("training_throughput", "Throughput of reference runs", note, [("", heads, cells)], verdicts, page=page)
    return 0 if all(ok for _, ok in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
