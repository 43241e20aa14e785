"""Findings about the health of a training run, from its logged history and a few facts. pandas and numpy only.

A finding has a name, the evidence in numbers, and what to do. What is judged is noise against noise: losses of single
batches scatter, so every comparison is of means with their standard errors, the scatter taken from the differences of
neighbouring logs. `health_watch.HealthWatch` collects history and facts of a run of `transformers.Trainer`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.words import count, number

COLUMNS: Final = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
WINDOW: Final = 5
_START: Final = 2
_SURE: Final = 3.5  # standard errors, for the largest of some thirty means
_SHOWN: Final = 5
_MAX_HALVINGS: Final = 16  # GradScaler starts at 2^16
_ADAM_EPSILON: Final = 1e-8


@dataclass(frozen=True)
class HealthFinding:
    """What is wrong: its name, how bad, since which step (None: no one step), the numbers, what to do about it."""

    name: str
    severity: Literal["error", "warning"]
    step: int | None
    evidence: str
    mend: str


def history_frame(log_history: Iterable[Mapping[str, Any]], hidden: Sequence[tuple[int, int]] = ()) -> pd.DataFrame:
    """Trainer's `state.log_history` → one row a step with `COLUMNS`; NaN where a number was not taken.

    hidden: (after, up to) steps between which a loss was not finite and Trainer logged another instead.
    """
    rows: dict[int, dict[str, float]] = {}
    for log in log_history:
        found = {name: float(log[name]) for name in COLUMNS[1:] if isinstance(log.get(name), int | float)}
        if found:
            rows.setdefault(int(log["step"]), {}).update(found)
    frame = pd.DataFrame([{"step": step, **rows[step]} for step in sorted(rows)], columns=list(COLUMNS))
    for after, up_to in hidden:
        frame.loc[(frame["step"] > after) & (frame["step"] <= up_to), "loss"] = math.nan
    return frame.astype(dict.fromkeys(COLUMNS[1:], float) | {"step": int})


def find_health(history: pd.DataFrame, facts: Mapping[str, Any]) -> list[HealthFinding]:
    """What is wrong with a run; empty where nothing is. Errors first.

    history: columns `COLUMNS`, NaN where a number was not taken. facts, each may be missing: rank, alpha, use_rslora,
    method ("full" where base weights are meant to train), dtype, n_trained, n_steps, n_skipped_steps, n_adapters,
    n_moved, not_moved, base_weights_with_grad, nan_step, nan_source, nan_parameter, nan_dtype.

    The rules, and where their numbers come from; each was tried on the runs of `benchmarks/training_health.py`:

    nan                 a loss or gradient that is not finite; or a gradient scaler (fp16) that threw away more than 16
                        steps and 1 % of them: it starts at 2^16, so that 16 halvings leave no scale at all.
    oscillating loss    the mean of some `WINDOW` logs lies above the first two by 3.5 standard errors of the difference
                        and 10 %: sound runs start with their highest loss (at most 1.7 errors above were seen; 4.0 and
                        12 at rates 100 times too high); or the last quarter of the run does, by 2 %; or
                        twice it climbs above the lowest so far by 3.5 errors and a quarter of the whole fall, and
                        falls again by as much.
    plateau             over the whole run the loss fell by no more than 2 standard errors of the difference between
                        its ends, and by less than 1 %; a held-out loss that fell by 1 % says otherwise.
    overfitting         the held-out loss rose for at least two measurements and by at least 2 % from its lowest, while
                        the training loss fell further.
    exploding gradients the median norm of `WINDOW` logs exceeds 10 × the median of all logs before.
    vanishing gradients the median norm of the last quarter is below 1e-8·√n_trained, Adam's ε for every entry: from
                        there on steps get shorter than the learning rate; or below 1e-3 of the first quarter's while
                        the loss has not halved.
    base weights receive gradients   any, where the method is an adapter.
    alpha far below rank   scaling (α/r; rsLoRA α/√r) below 1/4, which is the smallest of the published recipes
                        (QLoRA: α 16, r 64).
    adapter did not move   any adapter whose update is the one it started with.
    """
    found = [finding for rule in _RULES for finding in rule(history, facts)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _nan(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    step, source = facts.get("nan_step"), facts.get("nan_source") or "loss"
    if step is None:  # a row that has a learning rate was a logged training step
        bad = history["loss"].isna() & history["learning_rate"].notna()
        for name, column in (("loss", bad | np.isinf(history["loss"])), ("gradient", np.isinf(history["grad_norm"]))):
            if step is None and column.any():
                step, source = int(history.loc[column, "step"].iloc[0]), name
    dtype = facts.get("nan_dtype") or facts.get("dtype")
    if step is not None:
        parameter = facts.get("nan_parameter")
        where = f"; the backward pass met it first in {parameter}" if parameter else ""
        evidence = f"the {source} is NaN or Inf at step {step}{where}" + (f" ({dtype})" if dtype else "")
        yield HealthFinding("nan", "error", int(step), evidence, _nan_mend(history, int(step), source, facts))
    skipped, n_steps = facts.get("n_skipped_steps") or 0, facts.get("n_steps") or 0
    if skipped > max(_MAX_HALVINGS, 0.01 * n_steps):
        yield HealthFinding(
            "nan", "error", None,
            f"the gradient scaler threw {skipped} of {n_steps} steps away: their gradients overflow",
            "train in bf16 (bf16=True), whose range is that of float32, or lower the learning rate",
        )  # fmt: skip


def _nan_mend(history: pd.DataFrame, step: int, source: str, facts: Mapping[str, Any]) -> str:
    if "float16" in (facts.get("dtype"), facts.get("nan_dtype")):
        return "float16 ends at 65504: train in bf16 (bf16=True), with the trained weights in float32"
    if step == 1 and source == "loss":
        return (
            "nothing was trained yet: look for NaN in the base's weights (`probe spectrum` names them), and for rows "
            "whose labels are all -100 (a mean over no token)"
        )
    rates = history.loc[history["step"] <= step, "learning_rate"].dropna()
    now = f" (it was {number(float(rates.iloc[-1]))})" if len(rates) else ""
    return (
        f"lower the learning rate{now} to a tenth, with a warm-up and max_grad_norm=1; if it stays at that step, look "
        "for rows whose labels are all -100"
    )


def _oscillating(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    steps, loss = _taken(history, "loss")
    if len(loss) < 4 * WINDOW:
        return
    noise, means = _noise(loss), _means(loss)
    mend = (
        f"lower the learning rate (highest: {_peak_rate(history)}) to a third or a tenth, or lengthen the warm-up; if "
        "the texts are not shuffled, shuffle them"
    )
    start, last, high = loss[:_START].mean(), loss[-(len(loss) // 4) :], int(means.argmax())
    at_end = last.mean() - start > max(_SURE * noise * math.sqrt(1 / _START + 1 / len(last)), 0.02 * start)
    peak = means[high] - start > max(_SURE * noise * math.sqrt(1 / _START + 1 / WINDOW), 0.1 * start)
    doubt = _SURE * noise * math.sqrt(2 / WINDOW)
    climbs = _climbs(means, max(doubt, 0.25 * (means[0] - means.min())))
    step = int(steps[high + WINDOW - 1])
    if at_end:
        evidence = f"it rose from {number(start)} (first {_START} logs) to {number(last.mean())} (last quarter)"
    elif peak:
        evidence = (
            f"it climbed from {number(start)} to {number(means[high])} at step {step} (mean of {WINDOW} logs), ends at "
            f"{number(last.mean())}: what the base had learnt was lost first"
        )
    elif len(climbs) >= 2:
        low, high, _ = max(climbs, key=lambda climb: means[climb[1]] - means[climb[0]])
        step = int(steps[climbs[0][1] + WINDOW - 1])
        evidence = (
            f"{len(climbs)} times its mean of {WINDOW} logs climbed and fell again, most from {number(means[low])} to "
            f"{number(means[high])} at step {steps[high + WINDOW - 1]}"
        )
    else:
        return
    yield HealthFinding("oscillating loss", "error" if at_end else "warning", step, evidence, mend)


def _climbs(means: NDArray[np.float64], least: float) -> list[tuple[int, int, int]]:
    """(lowest, highest, fallen again) of every climb by more than `least` that was followed by such a fall."""
    climbs, low, high = [], 0, 0
    for i, value in enumerate(means):
        if means[high] - means[low] > least:  # climbing: wait for the fall
            if value > means[high]:
                high = i
            elif means[high] - value > least:
                climbs.append((low, high, i))
                low = high = i
        elif value < means[low]:
            low = high = i
        elif value > means[high]:
            high = i
    return climbs


def _plateau(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    steps, loss = _taken(history, "loss")
    _, held = _taken(history, "eval_loss")
    if len(loss) < 2 * WINDOW or (len(held) >= 2 and held.min() < 0.99 * held[0]):
        return
    n = max(WINDOW, len(loss) // 4)
    first, last = loss[:n].mean(), loss[-n:].mean()
    error = _noise(loss) * math.sqrt(2 / n)
    if abs(first - last) <= 2 * error and first - last < 0.01 * first:
        yield HealthFinding(
            "plateau", "warning", None,
            f"in {steps[-1]} steps the loss went from {number(first)} to {number(last)} (means of {n} logs, ± "
            f"{number(error)}): no fall above the noise of single batches",
            f"raise the learning rate (highest: {_peak_rate(history)}) tenfold; LoRA wants about ten times full "
            "fine-tuning's; or train longer",
        )  # fmt: skip


def _overfitting(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    steps, held = _taken(history, "eval_loss")
    train_steps, loss = _taken(history, "loss")
    if len(held) < 3:
        return
    best = int(held.argmin())
    before, after = loss[train_steps <= steps[best]], loss[train_steps > steps[best]]
    if len(held) - 1 - best < 2 or held[-1] < 1.02 * held[best] or not len(before) or not len(after):
        return
    n = min(WINDOW, len(after))
    if after[-n:].mean() < before[-WINDOW:].mean():
        yield HealthFinding(
            "overfitting", "warning", int(steps[best]),
            f"since step {steps[best]} the held-out loss rose from {number(held[best])} to {number(held[-1])}, while "
            f"the training loss fell from {number(before[-WINDOW:].mean())} to {number(after[-n:].mean())}",
            f"stop at step {steps[best]} (load_best_model_at_end), fewer epochs, more texts, a smaller rank, dropout",
        )  # fmt: skip


def _gradients(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    steps, norms = _taken(history, "grad_norm")
    _, loss = _taken(history, "loss")
    if len(norms) < 2 * WINDOW:
        return
    medians = np.array([np.median(norms[i : i + WINDOW]) for i in range(len(norms) - WINDOW + 1)])
    usual = np.array([np.median(norms[:i]) for i in range(WINDOW, len(norms) - WINDOW + 1)])
    over = np.flatnonzero(medians[WINDOW:] > 10 * usual)
    if len(over):
        at = int(over[0])
        yield HealthFinding(
            "exploding gradients", "error", int(steps[at + WINDOW]),
            f"from step {steps[at + WINDOW]} their norm is {number(medians[at + WINDOW])} (median of {WINDOW} logs), "
            f"before {number(usual[at])}; the largest is {number(norms.max())}",
            f"lower the learning rate (highest: {_peak_rate(history)}) to a tenth, clip (max_grad_norm=1), lengthen "
            "the warm-up",
        )  # fmt: skip
    n = max(WINDOW, len(norms) // 4)
    first, last = float(np.median(norms[:n])), float(np.median(norms[-n:]))
    entry = last / math.sqrt(max(facts.get("n_trained") or 1, 1))
    fallen = last < 1e-3 * first and len(loss) >= 2 * n and loss[-n:].mean() > 0.5 * loss[:n].mean()
    if (facts.get("n_trained") and entry < _ADAM_EPSILON) or last == 0 or fallen:
        yield HealthFinding(
            "vanishing gradients", "warning", int(steps[-n]),
            f"their norm is {number(last)} (median of the last {n} logs), at first {number(first)}",
            "is the loss taken on any token, and does it reach the trained weights (frozen or detached parts between "
            "them, gradient checkpointing without enable_input_require_grads)? In fp16, use a gradient scaler or bf16",
        )  # fmt: skip


def _base_weights(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    names = tuple(facts.get("base_weights_with_grad") or ())
    if names and facts.get("method") != "full":
        yield HealthFinding(
            "base weights receive gradients", "error", None, f"{count(len(names), 'weight')}: {_listed(names)}",
            "freeze all but the adapter before the optimizer is made (requires_grad_(False)); otherwise the saved "
            "adapter is not what was trained, and the memory is that of full fine-tuning",
        )  # fmt: skip


def _alpha(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    rank, alpha = facts.get("rank"), facts.get("alpha")
    if not rank or alpha is None or facts.get("method") == "full":
        return
    scaled = facts.get("use_rslora")
    scaling = alpha / (math.sqrt(rank) if scaled else rank)
    if scaling < 0.25:
        yield HealthFinding(
            "alpha far below rank", "warning", None,
            f"alpha {number(float(alpha))} at rank {rank}: the update is scaled by {number(scaling)} "
            f"({'α/√r' if scaled else 'α/r'})",
            f"alpha {math.ceil(math.sqrt(rank)) if scaled else rank} (scaling 1), at the same learning rate a step is "
            f"then {number(1 / scaling)} × as long" + ("" if scaled else "; or use_rslora=True"),
        )  # fmt: skip


def _not_moved(history: pd.DataFrame, facts: Mapping[str, Any]) -> Iterator[HealthFinding]:
    n, moved = facts.get("n_adapters"), facts.get("n_moved")
    if not n or moved is None or moved >= n:
        return
    names = tuple(facts.get("not_moved") or ())
    yield HealthFinding(
        "adapter did not move", "warning" if moved else "error", None,
        f"{n - moved} of {count(n, 'adapter')} end where they started" + (f": {_listed(names)}" if names else ""),
        "does the data run through these modules? leave them out of target_modules" if moved else
        "is the learning rate above 0, does the optimizer hold the adapter's parameters, and does the loss reach them?",
    )  # fmt: skip


def _taken(history: pd.DataFrame, column: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(steps, values) where the column is finite."""
    rows = history[np.isfinite(history[column].to_numpy(float))]
    return rows["step"].to_numpy(), rows[column].to_numpy(float)


def _noise(values: NDArray[np.float64]) -> float:
    """Standard deviation of one log about its trend: of neighbours' differences, over √2.

    Not a robust one: where one text in ten is hard, its scatter is what the means of a few logs have.
    """
    return float(np.std(np.diff(values)) / math.sqrt(2))


def _means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of `WINDOW` neighbouring logs."""
    return np.convolve(values, np.full(WINDOW, 1 / WINDOW), "valid")


def _peak_rate(history: pd.DataFrame) -> str:
    rates = history["learning_rate"].dropna()
    return number(float(rates.max())) if len(rates) else "unknown"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


_RULES: Final = (
    _nan, _base_weights, _not_moved, _gradients, _oscillating, _overfitting, _plateau, _alpha,
)  # fmt: skip
