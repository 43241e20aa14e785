"""`train()`: reference adapters. Full fine-tuning and LoRA at several ranks, targets and seeds on the same data, and
what they say about the low-rank hypothesis.

The training directory holds plan.json (what is trained, on what), runs/<label>/ (facts.json, history.csv, losses.npy
and the tuned model/ or adapter/ of each run), and at the end what `training_runs.Training` writes.
"""

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lowrank_probe import __version__, processes
from lowrank_probe.conclusions import conclude
from lowrank_probe.documents import read_documents, split_documents
from lowrank_probe.errors import NumericsError, OutputError, ProbeError
from lowrank_probe.functional_ranks import parse_tolerance
from lowrank_probe.model_shapes import ModelShape
from lowrank_probe.options import Progress
from lowrank_probe.outputs import ANOTHER_OUT, check_writable, own, write_json
from lowrank_probe.sequence_losses import sequence_losses
from lowrank_probe.strict_json import plain
from lowrank_probe.token_blocks import Blocks, load_tokenizer, to_blocks
from lowrank_probe.training_checks import (
    adapted_modules,
    check_causal,
    checked_recipe,
    checked_seeds,
    given_rates,
    max_positions,
    model_directory,
    shape_of,
    training_device,
)
from lowrank_probe.training_fits import Setting, autocast, diverged, finished, load_model, run_fit
from lowrank_probe.training_loggers import check_loggers
from lowrank_probe.training_plan import FULL, FULL_RATES, LORA_RATES, Fit, Plan, Recipe, next_rate
from lowrank_probe.training_runs import PLAN, Training
from lowrank_probe.unfinished import difference
from lowrank_probe.words import count

RUNS: Final = "runs"
BASE: Final = "base.npy"
OWNER: Final = ".owner"  # the process that trains here
# Rates that the search for one tries at most, and the steps of each: a quarter of a run's, and at least so many.
MOST_RATES: Final = 7
SEARCH_STEPS: Final = 20
LENGTH: Final = 512
# Held-out sequences, at least and at most.
LEAST_HELD_OUT: Final = 8
MOST_HELD_OUT: Final = 256


def train(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    ranks: Sequence[int] = (1, 2, 4, 8, 16, 64),
    targets: Sequence[str] = ("attention", "mlp", "all-linear"),
    seeds: int | Sequence[int] = 2,
    variants: Sequence[str] = ("lora",),
    lr: str | float | Mapping[str, float] = "auto",
    recipe: Recipe | None = None,
    held_out: float = 0.1,
    packing: bool = True,
    tolerance: str = "5%",
    device: str = "auto",
    on_progress: Progress | None = None,
) -> Training | None:
    """Train a full fine-tune and LoRA at every rank × targets × seed × variant on the same data, and compare them.

    model: directory of a causal language model, or its hub id. data: as `documents.read_documents`. held_out: share of
    the documents that no run learns from, chosen by their hash. targets: groups as `ModelShape.adapted` takes them. lr:
    "auto" (a short search a method), one rate for all adapters and a tenth of it for full fine-tuning, or method →
    rate. tolerance: how far above the full fine-tune's held-out loss is as good: nats, or a share of what it gained
    ("5%"). recipe: steps, batch, length, precision (None: sequences of the model's length up to 512, bf16 where the
    hardware has it). The same `out` goes on where a killed training was, at the run it was in. Under torchrun every
    process calls this; all but the first get None.

    Raises `ProbeError` of one line: too little text, a length beyond the model's positions, no tokenizer, a rank above
    the matrices, targets that match nothing, too little memory; `OutputError` where `out` holds anything else.
    """
    parse_tolerance(tolerance)
    root, directory = Path(out), model_directory(model)
    plan = Plan(tuple(sorted(ranks)), tuple(targets), checked_seeds(seeds), tuple(variants))
    shape = shape_of(directory)
    check_causal(directory, shape)
    where = training_device(device)
    processes.meet(where.type)
    recipe = checked_recipe(recipe or _default(shape, where), shape)
    check_loggers(recipe.report_to)
    given = given_rates(lr, plan.methods)
    modules = {group: adapted_modules(shape, group, plan) for group in plan.targets}
    blocks, notes = _blocks(directory, Path(data), recipe, held_out, packing, shape)
    source = os.fspath(model)
    setting = Setting(directory, *blocks, recipe, modules, where, source if not Path(source).exists() else "")
    identity = {
        "version": __version__, "model": _identity(directory), "plan": plan.facts(), "recipe": recipe.identity(),
        "lr": lr if isinstance(lr, str | float | int) else dict(lr), "held_out": held_out, "packing": packing,
        "data": _digest(*blocks), "tolerance": tolerance,
    }  # fmt: skip
    _begin(root, identity)
    work = _Work(root / RUNS, setting, plan, on_progress)
    gc.freeze()  # Trainer collects garbage at every start, and goes through all that was ever imported
    try:
        base = work.base()
        rates = given or work.rates()
        fits = plan.fits(rates, recipe.steps)
        for fit in fits:
            work.run(fit)
        if not processes.is_first():
            return None
        notes += work.notes
        return conclude(root, root / RUNS, setting, plan, fits, work.searches, base, tolerance, notes, on_progress)
    finally:
        gc.unfreeze()
        if processes.is_first():
            (root / OWNER).unlink(missing_ok=True)
            if not (root / RUNS).exists():  # nothing was done: another model may come here
                (root / PLAN).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    root.rmdir()


class _Work:
    """The runs of one training, each done once: where a run's facts are there, it is not done again."""

    def __init__(self, folder: Path, setting: Setting, plan: Plan, on_progress: Progress | None) -> None:
        self.folder, self.setting, self.plan, self.on_progress = folder, setting, plan, on_progress
        steps = setting.recipe.steps
        self.total = len(plan.fits(dict.fromkeys(plan.methods, 0.0), steps)) * steps
        self.done = 0
        self.searches: list[Fit] = []
        self.notes: list[str] = []

    def base(self) -> NDArray[np.float64]:
        """(2, n): the base's loss on each held-out sequence, and how many tokens that is a mean over."""
        file = self.folder / BASE
        if processes.is_first() and not file.exists():
            model = load_model(self.setting.model).to(self.setting.device)
            losses, counts = sequence_losses(
                model, self.setting.held_out, self.setting.recipe.batch, autocast(self.setting)
            )
            if not np.isfinite(losses).all():
                raise NumericsError(
                    f"{self.setting.model}: its loss on the held-out text is NaN or Inf ({_not_finite(model)}); is the "
                    "checkpoint whole?"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = file.with_name(f".{BASE}")
            np.save(aside, np.stack([losses, counts.astype(np.float64)]))
            aside.replace(file)
        processes.wait()
        return np.asarray(np.load(file), dtype=np.float64)

    def run(self, fit: Fit) -> dict[str, Any]:
        folder = self.folder / fit.label
        facts: dict[str, Any] | None = processes.agreed(finished(folder) if processes.is_first() else None)
        if facts is None:
            before = self.done

            def told(step: int, _: int) -> None:
                if self.on_progress and processes.is_first():
                    self.on_progress(fit.label, before + step, self.total)

            facts = run_fit(fit, self.setting, folder, told)
        self.done += fit.steps
        return facts

    def rates(self) -> dict[str, float]:
        """Method → learning rate, each by a search."""
        return {one: self._search(one) for one in self.plan.methods}

    def _search(self, method: str) -> float:
        """The rate with the lowest held-out loss after a short run, half a decade apart."""
        start = FULL_RATES if method == FULL else LORA_RATES
        steps = max(SEARCH_STEPS, self.setting.recipe.steps // 4)
        widest = max(self.plan.targets, key=lambda group: sum(map(len, self.setting.modules[group])))
        tried: dict[float, float] = {}
        while (rate := next_rate(tried, start, MOST_RATES)) is not None:
            fit = self.plan.searched(method, rate, steps, widest)
            self.searches.append(fit)
            self.total += steps
            facts = self.run(fit)
            tried[rate] = float("inf") if diverged(facts) else facts["loss"]
        best = min(tried, key=lambda rate: tried[rate])
        if tried[best] == float("inf"):
            raise ProbeError(
                f"{method}: diverged at every learning rate from {min(tried):g} to {max(tried):g}; is the model whole? "
                "(or give --lr)"
            )
        if best in (min(tried), max(tried)):
            end = "highest" if best == max(tried) else "lowest"
            self.notes.append(
                f"{method}: its best learning rate, {best:g}, is the {end} that was tried: a better one may lie "
                "beyond it (give --lr to try)"
            )
        return best


def _not_finite(model: torch.nn.Module) -> str:
    """The first parameter with NaN or Inf, or that there is none."""
    bad = (name for name, W in model.named_parameters() if not bool(torch.isfinite(W).all()))
    name = next(bad, None)
    return "every weight is finite" if name is None else f"{name} has NaN or Inf"


def default_recipe(model: str | os.PathLike[str], device: str = "auto") -> Recipe:
    """Sequences of the model's positions up to 512 tokens; bf16 where the hardware has it."""
    return _default(shape_of(model_directory(model)), training_device(device))


def _default(shape: ModelShape, device: torch.device) -> Recipe:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Recipe(length=min(LENGTH, max_positions(shape) or LENGTH), precision="bf16" if has_bf16 else "fp32")


def _blocks(
    directory: Path, data: Path, recipe: Recipe, held_out: float, packing: bool, shape: ModelShape
) -> tuple[tuple[Blocks, Blocks], list[str]]:
    """((training, held out), notes). Raises `ProbeError` naming the side that has too little text."""
    if not 0 < held_out < 1:
        raise ProbeError(f"held_out={held_out}: expected a share of the documents between 0 and 1, such as 0.1")
    documents = read_documents(data)
    sides = split_documents(documents, held_out)
    tokenizer = load_tokenizer(directory)
    found = []
    least = (recipe.batch, LEAST_HELD_OUT)
    for name, side, n, most in zip(("training", "held-out"), sides, least, (None, MOST_HELD_OUT), strict=True):
        try:
            found.append(
                to_blocks(side, tokenizer, recipe.length, packing=packing, limit=most, least=n, vocabulary=shape.vocab)
            )
        except ProbeError as error:
            raise ProbeError(
                f"{data}: {name} part ({len(side)} of {count(len(documents), 'document')}): {error}"
            ) from None
    notes = [f"{name}: {note}" for name, one in zip(("training", "held out"), found, strict=True) for note in one.notes]
    if dropped := len(documents) - sum(map(len, sides)):
        notes.append(f"left out as duplicates: {count(dropped, 'document')}")
    epochs = recipe.sequences * processes.count() / len(found[0])
    if epochs > 1:
        notes.append(f"{recipe.steps} steps go {epochs:.1f} times through the {len(found[0])} training sequences")
    return (found[0], found[1]), notes


def _identity(directory: Path) -> dict[str, Any]:
    """What tells a model from another: its path, and name and size of its weights' files and config."""
    files = sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", ".bin", ".json"))
    return {"path": str(directory.resolve()), "files": {file.name: file.stat().st_size for file in files}}


def _digest(*blocks: Blocks) -> str:
    found = hashlib.sha256()
    for one in blocks:
        for part in (one.ids, one.labels):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def _begin(root: Path, identity: Mapping[str, Any]) -> None:
    """Make the directory and its plan, or go on where the same plan is. Raises `OutputError` where it holds another."""
    told = json.dumps(plain(dict(identity)), indent=1, sort_keys=True)
    if processes.is_first():
        check_writable(root)
        file = root / PLAN
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(key for key in identity if before.get(key) != json.loads(told)[key])
            if changed:
                raise OutputError(
                    f"{root}: holds a training with another {' and '.join(changed)} "
                    f"({difference(before, json.loads(told))}); {ANOTHER_OUT}, or the same options"
                )
        elif root.exists() and any(root.iterdir()):
            raise OutputError(f"{root}: is not empty; {ANOTHER_OUT}")
        else:
            root.mkdir(parents=True, exist_ok=True)
            aside = root / f".{PLAN}"
            write_json(aside, json.loads(told))
            aside.replace(file)
        own(root, OWNER)
    processes.wait()
