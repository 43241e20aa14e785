"""One training run through `transformers.Trainer` and `peft`: the model, its adapter, the loop, what it leaves on disk.

Weights are float32 on every side, frozen ones too: a bfloat16 residual stream in the adapters' runs alone would pass
for a difference between the methods. On hardware that has it the products run in bfloat16 (autocast).
"""

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_probe import processes
from lowrank_probe.errors import CheckpointError, ProbeError
from lowrank_probe.health_watch import HealthWatch
from lowrank_probe.outputs import write_json
from lowrank_probe.running_models import first_line, quiet
from lowrank_probe.sequence_losses import sequence_losses
from lowrank_probe.strict_json import plain
from lowrank_probe.token_blocks import Blocks
from lowrank_probe.training_loggers import logged
from lowrank_probe.training_plan import FULL, Fit, Recipe

FACTS: Final = "facts.json"
HISTORY: Final = "history.csv"
LOSSES: Final = "losses.npy"
MODEL: Final = "model"
ADAPTER: Final = "adapter"
CHECKPOINTS: Final = "checkpoints"


@dataclass(frozen=True)
class Setting:
    """What every run of a training shares. model: its directory. modules: targets → (modules, bare parameters) of the
    model that LoRA adapts. device: where it runs, "cpu", "cuda" or "mps". hub_id: what the directory is a snapshot of.
    """

    model: Path
    training: Blocks
    held_out: Blocks
    recipe: Recipe
    modules: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    device: torch.device
    hub_id: str = ""


class Rows(Dataset[dict[str, Tensor]]):
    """Blocks as Trainer takes them: row → input_ids and labels (length,), and the mask where there is padding."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        mask = blocks.attention_mask
        self.mask = None if bool(mask.all()) else mask

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        found = {"input_ids": self.blocks.ids[row], "labels": self.blocks.labels[row]}
        return found if self.mask is None else found | {"attention_mask": self.mask[row]}


def load_model(directory: Path) -> Any:
    """The causal language model of a directory, float32, on the host. Raises `CheckpointError` if it does not load."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    except Exception as error:  # damaged or foreign checkpoints
        raise CheckpointError(
            f"{directory}: cannot be loaded as a causal language model: {first_line(error)}"
        ) from None
    model.config.use_cache = False
    return model


def lora_config(fit: Fit, modules: tuple[Sequence[str], Sequence[str]], alpha: float) -> Any:
    """PEFT's `LoraConfig` of a run; "all-linear" is left to PEFT, which has its own rules for mixtures of experts."""
    from peft import LoraConfig

    linear, parameters = modules if fit.targets != "all-linear" else ("all-linear", ())
    return LoraConfig(
        task_type="CAUSAL_LM", r=fit.rank, lora_alpha=alpha, lora_dropout=0.0,
        target_modules=linear if isinstance(linear, str) else list(linear), target_parameters=list(parameters) or None,
        use_rslora=fit.method == "rslora", use_dora=fit.method == "dora",
        init_lora_weights="pissa" if fit.method == "pissa" else True,
    )  # fmt: skip


def run_fit(
    fit: Fit, setting: Setting, folder: Path, on_step: Callable[[int, int], Any] | None = None
) -> dict[str, Any]:
    """Train one run in `folder`, going on from what a killed process saved there; returns its facts, as facts.json has
    them, which is written last.

    Leaves history.csv, losses.npy (mean held-out loss of each sequence) and the tuned model/ or adapter/; a search
    leaves no weights. Raises `ProbeError` where the memory does not suffice, `CheckpointError` where the model does not
    load.
    """
    try:
        return _run(fit, setting, folder, on_step)
    except torch.OutOfMemoryError as error:
        raise ProbeError(_out_of_memory(fit, setting, first_line(error))) from None
    finally:
        if setting.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _run(fit: Fit, setting: Setting, folder: Path, on_step: Callable[[int, int], Any] | None) -> dict[str, Any]:
    from transformers import Trainer, set_seed

    recipe = setting.recipe
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    set_seed(fit.seed)
    model = load_model(setting.model)
    started_from = None
    if fit.method != FULL:
        model, started_from = _adapted(model, fit, setting, folder)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    watch = HealthWatch(stop_on_nan=recipe.stop_on_nan or fit.search, method=fit.method)
    with quiet(), logged(recipe.report_to, folder):
        trainer = Trainer(
            model=model, args=_arguments(fit, setting, folder), train_dataset=Rows(setting.training),
            eval_dataset=Rows(setting.held_out), callbacks=[watch, _saving(recipe.save_s), *_told(on_step)],
            optimizers=(_optimizer(model, fit, recipe), None),
        )  # fmt: skip
        _without_prints(trainer)
        saved = _last_checkpoint(folder)
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(saved) if saved else None)
        seconds = time.perf_counter() - began
    losses, counts = sequence_losses(model, setting.held_out, recipe.batch, autocast(setting))
    steps_done = trainer.state.global_step
    facts = {
        "label": fit.label, "method": fit.method, "rank": fit.rank, "targets": fit.targets, "seed": fit.seed,
        "lr": fit.lr, "steps": fit.steps, "search": fit.search, "alpha": recipe.alpha if fit.method != FULL else None,
        "n_trained": n_trained, "loss": float(np.average(losses, weights=counts)), "n_tokens": int(counts.sum()),
        "steps_done": steps_done, "resumed": saved is not None, "seconds": seconds,
        "tokens_per_s": None if saved else _seen(steps_done, setting) / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else None,
        "dtype": "bfloat16" if recipe.precision == "bf16" else "float32",
    }  # fmt: skip
    facts["watched"] = watch.facts()
    facts["health"] = [asdict(one) for one in watch.findings()]
    if processes.is_first():
        _leave(folder, fit, model, started_from, watch.history, losses, counts, facts)
    processes.wait()
    return plain(facts)  # type: ignore[no-any-return]


def _adapted(model: Any, fit: Fit, setting: Setting, folder: Path) -> tuple[Any, Path | None]:
    """(the model with a fresh adapter, where PiSSA's start is kept: it changes the frozen weights)."""
    from peft import get_peft_model

    with quiet():
        model = get_peft_model(model, lora_config(fit, setting.modules[fit.targets], setting.recipe.alpha))
    if setting.recipe.checkpointing:
        model.enable_input_require_grads()
    if fit.method != "pissa":
        return model, None
    start = folder / "pissa-start"
    if processes.is_first():
        with quiet():
            model.peft_config["default"].init_lora_weights = True  # else it would be converted on saving
            model.save_pretrained(start)
            model.peft_config["default"].init_lora_weights = "pissa"
    processes.wait()
    return model, start


def _arguments(fit: Fit, setting: Setting, folder: Path) -> Any:
    from transformers import TrainingArguments

    recipe = setting.recipe
    every = max(1, fit.steps // recipe.evaluations)
    return TrainingArguments(
        output_dir=str(folder / CHECKPOINTS), max_steps=fit.steps, per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch, gradient_accumulation_steps=recipe.accumulation,
        learning_rate=fit.lr, lr_scheduler_type=recipe.schedule, warmup_steps=int(recipe.warmup * fit.steps),
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.clip, seed=fit.seed, data_seed=fit.seed,
        bf16=recipe.precision == "bf16", use_cpu=setting.device.type == "cpu", tf32=None,
        gradient_checkpointing=recipe.checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="no" if fit.search else "steps", eval_steps=every, prediction_loss_only=True,
        logging_strategy="steps", logging_steps=max(1, min(10, fit.steps // 20)), logging_first_step=True,
        logging_nan_inf_filter=False, save_strategy="no", save_total_limit=1, disable_tqdm=True,
        report_to=list(recipe.report_to) or "none", run_name=fit.label, remove_unused_columns=False,
        ddp_find_unused_parameters=False, dataloader_pin_memory=setting.device.type == "cuda",
    )  # fmt: skip


def _optimizer(model: Any, fit: Fit, recipe: Recipe) -> Any:
    """LoRA+ has its own groups of rates; None: Trainer's AdamW."""
    if fit.method != "lora+":
        return None
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=fit.lr, loraplus_lr_ratio=recipe.lr_ratio, weight_decay=recipe.weight_decay
    )


def _saving(every_s: float) -> Any:
    """A callback that saves the run's state at the first logging step after so many seconds."""
    from transformers import TrainerCallback

    class Saving(TrainerCallback):  # type: ignore[misc]
        last = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            due = processes.agreed(time.monotonic() - self.last >= every_s)
            if due and 0 < state.global_step < state.max_steps:
                control.should_save, self.last = True, time.monotonic()

    return Saving()


def _told(on_step: Callable[[int, int], Any] | None) -> list[Any]:
    from transformers import TrainerCallback

    class Telling(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if on_step is not None:
                on_step(state.global_step, state.max_steps)

    return [Telling()]


def _without_prints(trainer: Any) -> None:
    """stdout is for results alone: without Trainer's own lines there."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint that a killed process left: trainer_state.json is written last."""
    found = [path for path in folder.glob(f"{CHECKPOINTS}/checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def autocast(setting: Setting) -> Any:
    """The arithmetic of every forward pass: bfloat16 products where the recipe has them."""
    return torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.recipe.precision == "bf16")


def _seen(steps: int, setting: Setting) -> int:
    recipe = setting.recipe
    return steps * recipe.batch * recipe.accumulation * recipe.length * processes.count()


def _leave(
    folder: Path, fit: Fit, model: Any, started_from: Path | None, history: pd.DataFrame,
    losses: NDArray[np.float64], counts: NDArray[np.int64], facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write what is kept of a run, facts.json last; then the saved states go."""
    folder.mkdir(parents=True, exist_ok=True)
    history.to_csv(folder / HISTORY, index=False)
    np.save(folder / LOSSES, np.stack([losses, counts.astype(np.float64)]))
    if not fit.search:
        target = folder / (MODEL if fit.method == FULL else ADAPTER)
        shutil.rmtree(target, ignore_errors=True)
        with quiet():
            if started_from is None:
                model.save_pretrained(target)
            else:
                model.save_pretrained(target, path_initial_model_for_weight_conversion=str(started_from))
    aside = folder / f".{FACTS}"
    write_json(aside, plain(facts))
    aside.replace(folder / FACTS)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    shutil.rmtree(folder / "pissa-start", ignore_errors=True)


def finished(folder: Path) -> dict[str, Any] | None:
    """The facts of a run that is done, or None."""
    file = folder / FACTS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read: {first_line(error)}; remove it to run {folder.name} again"
        ) from None
    if not isinstance(found, dict) or "loss" not in found:
        raise CheckpointError(f"{file}: are no facts of a run; remove it to run {folder.name} again")
    return found


def diverged(facts: Mapping[str, Any]) -> bool:
    """Whether a run's loss or gradient was NaN or Inf, on the way or at its end, or a scaler threw its steps away."""
    return facts["loss"] is None or any(one["name"] == "nan" for one in facts["health"])


def _out_of_memory(fit: Fit, setting: Setting, said: str) -> str:
    """One line: what it needs as `probe budget` predicts, and what would fit."""
    from lowrank_probe.training_memory import predicted_bytes

    need = predicted_bytes(fit, setting)
    recipe = setting.recipe
    mends = []
    if recipe.batch > 1:
        mends.append(f"--batch {max(1, recipe.batch // 2)} --accumulation {2 * recipe.accumulation}")
    if not recipe.checkpointing:
        mends.append("--checkpointing")
    if recipe.length > 128:
        mends.append(f"--length {recipe.length // 2}")
    told = f"probe budget predicts {need / 2**30:.1f} GiB" if need else "probe budget cannot predict it for this model"
    return f"{fit.label}: out of memory ({said}); {told}; try {' or '.join(mends) or 'a larger card'}"
