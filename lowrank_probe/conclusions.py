"""From finished runs to what they say: spectrum and functional rank of the full run, subspaces, tables, verdict.

Each part is kept in the training directory as it is finished, so that a killed training goes on from there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import EQUAL_PARAMETERS, TRAINING
from lowrank_probe.devices import Choice
from lowrank_probe.errors import CheckpointError, UnchangedError
from lowrank_probe.evaluation import evaluate
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.evaluation_states import EACH
from lowrank_probe.facts import machine_facts
from lowrank_probe.functional_ranks import Tolerance, parse_tolerance
from lowrank_probe.hypothesis import judge, recommend
from lowrank_probe.options import Progress
from lowrank_probe.outputs import is_finished
from lowrank_probe.running_models import first_line
from lowrank_probe.runs import Result, load_result, read_csv
from lowrank_probe.spectra import spectrum
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.trained_ranks import Yardstick, equal_parameters, trained_ranks, yardstick
from lowrank_probe.training_fits import ADAPTER, HISTORY, LOSSES, MODEL, Setting, diverged
from lowrank_probe.training_fits import finished as finished_run
from lowrank_probe.training_memory import predicted_bytes
from lowrank_probe.training_plan import FULL, Fit, Plan
from lowrank_probe.training_runs import EVALUATION, HISTORIES, SPECTRUM, SUBSPACES, Training
from lowrank_probe.trajectories import trajectory
from lowrank_probe.trajectory_runs import load_trajectory

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory

# Ranks of the subspaces that are compared, where they were trained: Hu et al. 2021, §7.2.
COMPARED: Final[tuple[int, ...]] = (8, 64)
# Held-out sequences on which the truncated updates are judged, at most.
SEQUENCES: Final = 64
NOT_NUMBERS: Final = ("label", "method", "targets", "health", "rank", "seed", "steps", "diverged")


def conclude(
    root: Path, folder: Path, setting: Setting, plan: Plan, fits: Sequence[Fit], searches: Sequence[Fit],
    base: NDArray[np.float64], tolerance: str, notes: Sequence[str], on_progress: Progress | None,
) -> Training:  # fmt: skip
    """The `Training` of finished runs, saved. base: (2, n) loss of each held-out sequence of the base, and tokens."""
    runs, losses = _table(folder, fits, setting)
    sought, _ = _table(folder, searches, setting)
    losses = {"base": base[0], **losses}
    tokens = base[1]
    sound = set(runs.loc[~runs["diverged"], "label"])
    full = [fit.label for fit in fits if fit.method == FULL]
    first = next((label for label in full if label in sound), None)  # whose update is looked at
    spectral = functional = None
    if first is not None:
        spectral = _spectrum(root / SPECTRUM, setting, folder / first / MODEL, on_progress)
        functional = _evaluation(root / EVALUATION, setting, plan, folder / first / MODEL, tolerance, on_progress)
    shared = _subspaces(
        root / SUBSPACES, folder, setting, plan, [fit for fit in fits if fit.label in sound], on_progress
    )
    allowed = parse_tolerance(tolerance)
    asked = runs, losses, tokens, base[0], allowed, plan.seeds[0]
    against, trained = yardstick(*asked), trained_ranks(*asked)
    best = recommend(runs, trained, float(np.average(base[0], weights=tokens)))
    notes = [*notes, *_full_notes(full, first, against, allowed)]
    health = [
        {"label": label, **one} for label in runs["label"] for one in (finished_run(folder / label) or {})["health"]
    ]
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "complete",
        "model": {"path": str(setting.model.resolve()), "hub_id": setting.hub_id or None},
        "plan": plan.facts(), "recipe": vars(setting.recipe),
        "rates": {row.method: row.lr for row in runs.itertuples()},
        "text": {
            "n_training": len(setting.training), "n_held_out": len(setting.held_out), "length": setting.recipe.length,
            "n_training_tokens": setting.training.n_tokens, "n_held_out_tokens": int(tokens.sum()),
        },
        "tolerance": {"asked": tolerance, "nats": against.tolerance, "gain": against.gain},
        "full": {"outcome": against.outcome, "looked_at": first},
        "parts": [
            name for name, part in ((SPECTRUM, spectral), (EVALUATION, functional), (SUBSPACES, shared))
            if part is not None
        ],
        "health": health, "notes": list(notes), "recommendation": None,
        **machine_facts(Choice(setting.device)),
    }  # fmt: skip
    if best is not None:
        modules = sorted({name.rpartition(".")[2] for part in setting.modules[best.targets] for name in part})
        facts["recommendation"] = vars(best) | {
            "good_enough": best.good_enough,
            "lora_config": best.lora_config(modules),
            "modules": modules,
        }
    found = Training(
        runs, sought, _histories(folder, [*fits, *searches]), judge(spectral, functional, trained),
        equal_parameters(runs)[list(EQUAL_PARAMETERS)], losses, tokens, spectral, functional, shared, facts,
    )  # fmt: skip
    found.save(root)
    return found


def _table(folder: Path, fits: Sequence[Fit], setting: Setting) -> tuple[pd.DataFrame, dict[str, NDArray[np.float64]]]:
    """(one row a run, columns as `columns.TRAINING`; label → (n,) losses)."""
    rows: list[dict[str, Any]] = []
    losses = {}
    for fit in fits:
        facts = finished_run(folder / fit.label)
        assert facts is not None
        history = _history(folder / fit.label)
        losses[fit.label] = _kept(folder / fit.label / LOSSES)[0]
        rows.append(
            {column: facts.get(column) for column in TRAINING}
            | {
                "steps": facts["steps_done"], "lowest_loss": history["eval_loss"].min(),
                "predicted_bytes": predicted_bytes(fit, setting) if facts["peak_bytes"] else None,
                "health": ", ".join(sorted({one["name"] for one in facts["health"]})), "diverged": diverged(facts),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows, columns=list(TRAINING))
    numbers = [name for name in TRAINING if name not in NOT_NUMBERS]
    table[numbers] = table[numbers].apply(pd.to_numeric)
    full = {row.seed: row.loss for row in table.itertuples() if row.method == FULL and not row.diverged}
    searched = any(fit.search for fit in fits)
    table["excess"] = math.nan if searched else table["loss"] - table["seed"].map(full)
    return table, losses


def _full_notes(full: Sequence[str], first: str | None, against: Yardstick, tolerance: Tolerance) -> list[str]:
    """What a reader should know of the full fine-tunes."""
    if first is None:
        return ["every full fine-tune diverged: there is no spectrum, no functional rank and nothing to compare with"]
    passed = full[: full.index(first)]
    told = [f"{' and '.join(passed)} diverged: spectrum and functional rank are of {first}"] if passed else []
    return told + tolerance.fallback(against.gain, "the full fine-tune")


def _kept(file: Path) -> NDArray[np.float64]:
    """An array of a finished run. Raises `CheckpointError` where the file is missing or damaged."""
    try:
        return np.asarray(np.load(file, allow_pickle=False), dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, error) from None


def _history(folder: Path) -> pd.DataFrame:
    try:
        return read_csv(folder / HISTORY)
    except (OSError, ValueError) as error:
        raise _damaged(folder / HISTORY, error) from None


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: cannot be read: {first_line(error)}; remove {file.parent} and the same command runs "
        f"{file.parent.name} again"
    )


def _histories(folder: Path, fits: Sequence[Fit]) -> pd.DataFrame:
    parts = [_history(folder / fit.label).assign(label=fit.label) for fit in fits]
    return pd.concat(parts, ignore_index=True)[list(HISTORIES)]


def _spectrum(root: Path, setting: Setting, tuned: Path, on_progress: Progress | None) -> Result:
    """The spectra of the full run's update."""
    if is_finished(root):
        return load_result(root)
    return spectrum(setting.model, tuned, device=str(setting.device), out=root, on_progress=on_progress)


def _evaluation(
    root: Path, setting: Setting, plan: Plan, tuned: Path, tolerance: str, on_progress: Progress | None
) -> Evaluation | None:
    """The functional ranks of the full run's update, on the held-out text of the training; None of no update."""
    if is_finished(root):
        return Evaluation.load(root)
    # In float32 on any hardware: bfloat16 weights would drop what a higher rank adds.
    try:
        return evaluate(
            setting.model, tuned, setting.held_out, groups=[*plan.targets, EACH], leave_out=False, tolerance=tolerance,
            sequences=SEQUENCES, batch=setting.recipe.batch, device=str(setting.device), out=root,
            on_progress=on_progress,
        )  # fmt: skip
    except UnchangedError:
        return None


def _subspaces(
    root: Path, folder: Path, setting: Setting, plan: Plan, fits: Sequence[Fit], on_progress: Progress | None
) -> "Trajectory | None":
    """φ between adapters of two ranks and of two seeds, and their amplification; None where there are no two.

    fits: those that did not diverge.

    Those of `COMPARED` ranks where they were trained, else of the smallest above 1 and the largest, on all-linear or
    the first targets.
    """
    if is_finished(root):
        return load_trajectory(root)
    variant = next((one for one in plan.variants if one != "dora"), None)  # whose update is no product of factors
    group = "all-linear" if "all-linear" in plan.targets else plan.targets[0]
    first = (variant, group, plan.seeds[0])
    trained = [fit.rank for fit in fits if (fit.method, fit.targets, fit.seed) == first]
    ranks = [rank for rank in COMPARED if rank in trained]
    if len(ranks) < 2:
        ranks = sorted({*[rank for rank in trained if rank > 1][:1], *trained[-1:]})
    if not ranks:
        return None
    wanted = [(rank, plan.seeds[0]) for rank in ranks] + [(ranks[-1], seed) for seed in plan.seeds[1:2]]
    picked = [
        fit for rank, seed in wanted for fit in fits
        if (fit.method, fit.rank, fit.targets, fit.seed) == (variant, rank, group, seed)
    ]  # fmt: skip
    if len(picked) < 2:
        return None
    return trajectory(
        setting.model, [folder / fit.label / ADAPTER for fit in picked], labels=[fit.label for fit in picked],
        rank=min(max(ranks), max(COMPARED)), device=str(setting.device), out=root, on_progress=on_progress,
    )  # fmt: skip
