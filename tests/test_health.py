"""The rules on written histories: what each catches, and what it must leave alone."""

import math

import numpy as np
import pandas as pd
import pytest

from lowrank_probe.health import COLUMNS, find_health, history_frame

SOUND = {"rank": 8, "alpha": 16, "use_rslora": False, "method": "lora", "dtype": "float32", "n_trained": 10_000,
         "n_steps": 100, "n_skipped_steps": 0, "n_adapters": 14, "n_moved": 14, "not_moved": (),
         "base_weights_with_grad": (), "nan_step": None}  # fmt: skip
T = np.linspace(0, 1, 100)
NOISE = np.random.default_rng(0).normal(size=100)
HARD = np.random.default_rng(1).random(100) < 0.1
FALLING = 3 - T + 0.05 * NOISE


def history(loss=FALLING, grad_norm=None, eval_loss=(), rate=1e-3):
    n = len(loss)
    frame = pd.DataFrame({"step": np.arange(1, n + 1), "loss": loss, "learning_rate": rate, "eval_loss": math.nan})
    frame["grad_norm"] = np.full(n, 0.5) if grad_norm is None else grad_norm
    if len(eval_loss):
        frame.loc[np.linspace(0, n - 1, len(eval_loss)).astype(int), "eval_loss"] = eval_loss
    return frame[list(COLUMNS)]


def names(frame=None, **facts):
    return [f.name for f in find_health(history() if frame is None else frame, SOUND | facts)]


@pytest.mark.parametrize(
    "facts", [{}, {"method": "full", "base_weights_with_grad": ("w",), "n_adapters": 0, "n_moved": 0}]
)
def test_a_sound_run_has_no_finding(facts):
    assert names(**facts) == []
    assert names(history(eval_loss=3 - T[::10]), **facts) == []


def test_without_facts_and_without_history_there_is_nothing_to_find():
    assert find_health(history_frame([]), {}) == []
    assert find_health(history(), {}) == []
    assert names(history(loss=FALLING[:3])) == []


@pytest.mark.parametrize(
    ("facts", "evidence", "mend"),
    [
        ({"nan_source": "loss"}, "the loss is NaN or Inf at step 7 (float32)", "rate (it was 0.001)"),
        ({"nan_source": "gradient", "nan_parameter": "q.lora_B", "nan_dtype": "float32"},
         "the gradient is NaN or Inf at step 7; the backward pass met it first in q.lora_B (float32)", "to a tenth"),
        ({"nan_source": "gradient", "nan_parameter": "q.lora_B", "nan_dtype": "float16"}, "(float16)", "bf16=True"),
        ({"nan_source": "loss", "dtype": "float16"}, "(float16)", "65504"),
        ({"nan_source": "loss", "nan_step": 1}, "at step 1", "labels are all -100"),
    ],
)  # fmt: skip
def test_nan(facts, evidence, mend):
    (found,) = find_health(history(), SOUND | {"nan_step": 7} | facts)
    assert (found.name, found.severity, found.step) == ("nan", "error", facts.get("nan_step", 7))
    assert evidence in found.evidence
    assert mend in found.mend


@pytest.mark.parametrize(("column", "value"), [("loss", math.nan), ("loss", math.inf), ("grad_norm", math.inf)])
def test_nan_is_seen_in_the_history_alone(column, value):
    frame = history()
    frame.loc[41, column] = value
    (found,) = find_health(frame, {})
    assert (found.name, found.step) == ("nan", 42)


@pytest.mark.parametrize(
    ("skipped", "n_steps", "expected"), [(16, 40, []), (17, 40, ["nan"]), (20, 5000, []), (51, 5000, ["nan"])]
)
def test_skipped_steps_of_a_gradient_scaler(skipped, n_steps, expected):
    assert names(n_skipped_steps=skipped, n_steps=n_steps) == expected


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (3 - T + 0.5 * NOISE, []),  # batches of one short text
        (3 - T + np.where(T[50] == T, 3, 0), []),  # one spike
        (3 - T + 0.8 * np.sin(40 * T), ["oscillating loss"]),
        (3 + T + 0.05 * NOISE, ["oscillating loss"]),
        (2 - T / 2 + 2 * HARD, []),  # batches of one text, some of them hard
        (
            2.6 + np.where((T > 0.02) & (T < 0.3), 0.6, -0.1) + 0.1 * NOISE,
            ["oscillating loss"],
        ),  # lost, and learnt anew
        (3 - 2 * T + np.where((T > 0.4) & (T < 0.5), 0.7, 0), []),  # one climb, below the start
        (3 - 2 * T + np.where(((T > 0.3) & (T < 0.4)) | ((T > 0.6) & (T < 0.7)), 0.7, 0), ["oscillating loss"]),
        (3 + 0.05 * NOISE, ["plateau"]),
        (np.full(100, 2.5), ["plateau"]),
        (3 - 0.1 * T + 0.05 * NOISE, []),  # little, but above the noise
        (0.5 + 2.5 * np.exp(-20 * T) + 0.02 * NOISE, []),  # done early is no plateau
    ],
)
def test_shapes_of_the_loss(loss, expected):
    assert names(history(loss=loss)) == expected


def test_oscillation_names_the_learning_rate():
    (found,) = find_health(history(loss=3 - T + 0.8 * np.sin(40 * T), rate=0.25), SOUND)
    assert "highest: 0.25" in found.mend
    assert found.severity == "warning"
    assert find_health(history(loss=3 + T), SOUND)[0].severity == "error"


def test_a_held_out_loss_that_falls_is_no_plateau():
    assert names(history(loss=3 + 0.05 * NOISE, eval_loss=[3, 2.95, 2.9])) == []
    assert names(history(loss=3 + 0.05 * NOISE, eval_loss=[3, 3, 2.99])) == ["plateau"]


@pytest.mark.parametrize(
    ("eval_loss", "loss", "expected"),
    [
        ([3, 2.5, 2.4, 2.5, 2.7], FALLING, ["overfitting"]),
        ([3, 2.5, 2.4, 2.41, 2.42], FALLING, []),  # less than 2 %
        ([3, 2.5, 2.4, 2.39, 2.6], FALLING, []),  # risen once only
        ([3, 2.5, 2.4, 2.5, 2.7], 3 + T + 0.05 * NOISE, ["oscillating loss"]),  # both rise: not overfitting
    ],
)
def test_overfitting(eval_loss, loss, expected):
    assert names(history(loss=loss, eval_loss=eval_loss)) == expected


def test_overfitting_names_the_step_to_stop_at():
    (found,) = find_health(history(eval_loss=[3, 2.5, 2.4, 2.5, 2.7]), SOUND)
    assert found.step == 50
    assert "stop at step 50" in found.mend


@pytest.mark.parametrize(
    ("grad_norm", "expected"),
    [
        (np.where(T[60] == T, 50, 0.5), []),  # one spike, which clipping takes
        (np.where(T > 0.6, 8.0, 0.5), ["exploding gradients"]),
        (0.5 * 1.05 ** np.arange(100), ["exploding gradients"]),
        (np.exp(-4 * T) + 0.3, []),
        (np.full(100, 1e-7), ["vanishing gradients"]),
        (np.zeros(100), ["vanishing gradients"]),
        (10.0 ** (-4 * T), ["vanishing gradients"]),
    ],
)
def test_norms_of_the_gradient(grad_norm, expected):
    assert names(history(grad_norm=grad_norm)) == expected


def test_gradients_of_a_loss_that_is_learnt_by_heart_may_vanish():
    assert names(history(loss=3 * np.exp(-8 * T), grad_norm=10.0 ** (-4 * T))) == []


@pytest.mark.parametrize(
    ("facts", "scaling"),
    [
        ({"rank": 64, "alpha": 16}, None),
        ({"rank": 64, "alpha": 8}, "0.125 (α/r)"),
        ({"rank": 256, "alpha": 16}, "0.0625 (α/r)"),
        ({"rank": 256, "alpha": 16, "use_rslora": True}, None),
        ({"rank": 256, "alpha": 2, "use_rslora": True}, "0.125 (α/√r)"),
        ({"rank": 64, "alpha": 1, "method": "full"}, None),
    ],
)
def test_alpha_far_below_rank(facts, scaling):
    found = find_health(history(), SOUND | facts)
    assert [f.name for f in found] == ["alpha far below rank"] * bool(scaling)
    assert all(scaling in f.evidence for f in found)


def test_base_weights_with_gradients_are_listed():
    (found,) = find_health(history(), SOUND | {"base_weights_with_grad": tuple(f"layers.{i}.w" for i in range(8))})
    assert (found.name, found.severity) == ("base weights receive gradients", "error")
    assert "8 weights: layers.0.w" in found.evidence
    assert found.evidence.endswith("layers.4.w and 3 more")


def test_adapters_that_did_not_move():
    (some,) = find_health(history(), SOUND | {"n_moved": 12, "not_moved": ("vision.q", "vision.k")})
    (none,) = find_health(history(), SOUND | {"n_moved": 0})
    assert (some.name, some.severity, none.severity) == ("adapter did not move", "warning", "error")
    assert some.evidence == "2 of 14 adapters end where they started: vision.q, vision.k"


def test_errors_come_first():
    found = find_health(history(loss=3 + 0.05 * NOISE), SOUND | {"n_moved": 0, "alpha": 1})
    assert [f.severity for f in found] == ["error", "warning", "warning"]


def test_the_frame_of_a_log_history():
    logs = [
        {"step": 2, "loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.2},
        {"step": 4, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1},
        {"step": 4, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"step": 6, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1},
        {"step": 6, "train_runtime": 3.0, "train_loss": 2.0},
    ]
    frame = history_frame(logs, [(2, 4)])
    assert list(frame.columns) == list(COLUMNS)
    assert frame["step"].tolist() == [2, 4, 6]
    np.testing.assert_array_equal(frame["loss"], [3, math.nan, 1])
    np.testing.assert_array_equal(frame["eval_loss"], [math.nan, 2.5, math.nan])
    assert [f.name for f in find_health(frame, {})] == ["nan"]
