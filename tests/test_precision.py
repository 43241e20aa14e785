"""precision and deadzone: storage noise against updates whose truth is known."""

import math
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from pairs import planted, write

import lowrank_probe as lp
from lowrank_probe import deadzone, metrics, precision, rows
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.deltas import read_pair
from lowrank_probe.matching import match
from lowrank_probe.options import Options

NAME = "model.layers.0.self_attn.q_proj.weight"


def normal(*shape, seed=0, std=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def stored_pair(tmp_path, W, update, dtype=torch.bfloat16):
    base = W.to(dtype)
    write(tmp_path / "base", {NAME: base})
    write(tmp_path / "tuned", {NAME: (base.double() + update).to(dtype)})
    return tmp_path / "base", tmp_path / "tuned"


@pytest.mark.parametrize(("storage", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_ulp_is_the_distance_to_the_next_stored_value(storage, dtype):
    W = normal(64, 64).to(dtype)
    above = torch.nextafter(W.abs(), torch.tensor(math.inf, dtype=dtype))
    torch.testing.assert_close(precision.ulp(W, storage).double(), above.double() - W.abs().double())


def test_noise_edge_is_the_largest_singular_value_of_uneven_noise():
    scale = torch.full((200, 150), 1e-3)
    scale[:5] *= 16  # five rows round much more coarsely: the textbook edge is far off
    edge, leading = precision.noise_edge(torch.empty(200, 150), scale, "uniform", seed=1)
    rng = np.random.default_rng(0)
    drawn = [np.linalg.norm(rng.uniform(-0.5, 0.5, (200, 150)) * scale.numpy(), 2) for _ in range(20)]
    assert np.mean(drawn) * 0.97 <= edge <= np.max(drawn) * 1.05
    textbook = math.sqrt(float((scale**2).mean()) / 12) * (math.sqrt(200) + math.sqrt(150))
    assert edge > 1.3 * textbook
    assert leading[0] <= edge


def uneven(name, shape):
    """Widths of errors, (m, n): even, by rows and columns, or with one coarse row, a few coarse columns, one entry."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.full(shape, 1e-3)
    if name == "rows and columns":
        scale *= (0.5 * torch.randn(shape[0], 1, generator=generator)).exp()
        scale *= (0.3 * torch.randn(1, shape[1], generator=generator)).exp()
    elif name == "a row":
        scale[3] *= 12
    elif name == "columns":
        scale[:, :6] *= 6
    elif name == "an entry":
        scale[5, 7] *= 40
    elif name == "Student's t":
        W = np.random.default_rng(5).standard_t(4, shape)
        scale = 1e-3 * precision.ulp(torch.from_numpy(W).float(), "BF16").float()
    return scale


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize("name", ["even", "rows and columns", "a row", "columns"])
def test_one_draw_says_what_the_largest_of_three_would(name, law, monkeypatch):
    scale, scratch = uneven(name, (160, 240)), torch.empty(160, 240)
    one = [precision.noise_edge(scratch, scale, law, seed)[0] for seed in range(24)]
    monkeypatch.setattr(precision, "STEADY", 0.0)
    three = [precision.noise_edge(scratch, scale, law, seed)[0] for seed in range(24)]
    assert one != three
    assert np.mean(one) == pytest.approx(np.mean(three), rel=0.02)
    assert np.std(one) < 0.06 * np.mean(one)


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize("name", ["an entry", "Student's t"])
def test_what_moves_from_draw_to_draw_is_drawn_three_times(name, law, monkeypatch):
    scale, scratch, drawn = uneven(name, (160, 240)), torch.empty(160, 240), []
    triplet, unit = precision.leading_triplet, float(scale.max())
    monkeypatch.setattr(precision, "leading_triplet", lambda *a: drawn.append(triplet(*a)) or drawn[-1])
    for seed in range(24):  # in some of which the coarse entries' errors are small at first
        edge, leading = precision.noise_edge(scratch, scale, law, seed)
        assert len(drawn) == 3
        largest = max(values[0] for values, _, _ in drawn) * unit
        assert edge == pytest.approx(max(largest, unit / 2 if law == "uniform" else 0))
        assert np.array_equal(leading, drawn[0][0] * unit)
        drawn.clear()
    precision.noise_edge(scratch, uneven("even", (160, 240)), law)
    assert len(drawn) == 1


def test_the_error_of_one_large_weight_is_no_signal(tmp_path):
    found = []
    for seed in range(12):
        W = 0.02 * normal(160, 240, seed=seed)
        W[5, 7] = 3.0
        update = 2e-2 * float(W.norm()) * planted((160, 240), torch.tensor([1.0, 0.8]), seed)
        row = lp.spectrum(*stored_pair(tmp_path / f"{seed}", W, update)).table.iloc[0]
        found.append(row["signal_rank"])
    assert max(found) <= 2


@pytest.mark.parametrize(("relative", "model"), [(1e-2, "rounding"), (1.5e-3, "dead-zone")])
def test_both_sides_are_freed_before_the_singular_values_are_computed(tmp_path, relative, model, monkeypatch):
    W = normal(200, 160)
    update = planted((200, 160), torch.arange(1, 161, dtype=torch.float64) ** -0.5)
    update *= relative * float(W.norm() / update.norm())
    base, tuned = (open_checkpoint(side) for side in stored_pair(tmp_path, W, update))
    delta = read_pair(match(base, tuned, Options()).pairs[0], base, tuned, torch.device("cpu"))
    sides, held, values = [weakref.ref(delta.base), weakref.ref(delta.tuned)], [], rows.singular_values
    seen = lambda *a, **k: held.append([side() for side in sides]) or values(*a, **k)  # noqa: E731
    monkeypatch.setattr(rows, "singular_values", seen)
    found = rows.analyse(delta, rows.Settings(torch.device("cpu"), Options()))
    assert found.row["noise_model"] == model
    assert held == [[None, None]]


def test_dead_zone_model_finds_the_norm_and_the_errors_it_states():
    W = normal(400, 300).bfloat16()
    truth = planted((400, 300), torch.arange(1, 301, dtype=torch.float64) ** -0.5)
    truth *= 0.0015 * float(W.double().norm()) / float(truth.norm())
    stored = (W.double() + truth).bfloat16()
    Q, u = stored.float() - W.float(), precision.ulp(stored, "BF16")
    assert 0.5 < float((Q == 0).float().mean()) < 0.75
    found = deadzone.correct(Q.clone(), u)
    assert found is not None
    assert found.fro_norm == pytest.approx(float(truth.norm()), rel=0.02)
    true_error = float(((found.Y.double() - truth) ** 2).mean())
    assert float((found.error_std.double() ** 2).mean()) == pytest.approx(true_error, rel=0.05)


def test_dead_zone_model_declines_where_no_entry_is_fine():
    Q = torch.zeros(64, 64)
    Q[0, 0] = 1.0
    assert deadzone.correct(Q, torch.ones(64, 64, dtype=torch.bfloat16)) is None


def test_swallowed_update_is_bracketed_and_far_from_raw(tmp_path):
    W = normal(400, 300)
    truth = planted((400, 300), 1 / torch.arange(1, 301, dtype=torch.float64) ** 0.8)
    truth *= 0.0015 * float(W.double().norm()) / float(truth.norm())
    row = lp.spectrum(*stored_pair(tmp_path, W, truth)).table.iloc[0]
    s = torch.linalg.svdvals(truth).numpy()
    r50, r90 = (metrics.energy_rank(s, float(truth.norm()), p) for p in (0.5, 0.9))
    assert row["noise_model"] == "dead-zone"
    assert row["decidable_r50"]
    assert row["r50_low"] <= r50 <= row["r50_high"]
    assert row["r90_low"] <= r90 <= row["r90_high"]
    assert abs(row["r50_denoised"] - r50) <= max(1, 0.25 * r50)
    assert row["r50"] > 1.5 * r50  # what a naive reading of the stored pair says


def test_top_on_a_swallowed_update_saves_and_loads(tmp_path):
    W = normal(256, 256)
    truth = planted((256, 256), torch.linspace(2, 1, 6))
    truth *= 0.0015 * float(W.double().norm()) / float(truth.norm())
    result = lp.spectrum(*stored_pair(tmp_path, W, truth), top=8)
    row = result.table.iloc[0]
    assert row["noise_model"] == "dead-zone"
    assert row["signal_rank"] == 6
    loaded = lp.load(result.save(tmp_path / "run"))
    assert len(loaded.singular_values[NAME]) == len(loaded.denoised_values[NAME]) == 8
    pd.testing.assert_frame_equal(loaded.table, result.table)


def test_signal_rank_is_not_counted_on_a_list_that_ends_above_the_edge(tmp_path):
    W = normal(256, 256)
    truth = planted((256, 256), torch.linspace(2, 1, 40)) * 0.05
    row = lp.spectrum(*stored_pair(tmp_path, W, truth), top=8).table.iloc[0]
    assert row["n_kept"] == 8
    assert math.isnan(row["signal_rank"])
    assert not row["decidable_signal_rank"]


def test_rows_that_never_moved_carry_no_noise(tmp_path):
    W = normal(2000, 96)
    rows = torch.zeros(2000, dtype=torch.bool)
    rows[::10] = True
    truth = torch.zeros(2000, 96, dtype=torch.float64)
    truth[rows] = normal(200, 96, seed=5, std=2e-4).double()
    row = lp.spectrum(*stored_pair(tmp_path, W, truth)).table.iloc[0]
    s = torch.linalg.svdvals(truth).numpy()
    assert row["unchanged_fraction"] > 0.9
    assert row["denoised_fro_norm"] == pytest.approx(float(truth.norm()), rel=0.03)
    assert row["r90_low"] <= metrics.energy_rank(s, float(truth.norm()), 0.9) <= row["r90_high"]


def test_a_new_head_on_a_frozen_body_is_related(tmp_path):
    body = {f"model.layers.{i}.self_attn.q_proj.weight": normal(32, 32, seed=i) for i in range(3)}
    write(tmp_path / "a", body | {"lm_head.weight": normal(40, 32, seed=8)})
    write(tmp_path / "b", body | {"lm_head.weight": normal(40, 32, seed=9)})
    result = lp.spectrum(tmp_path / "a", tmp_path / "b")
    assert result.facts["related"]
    assert result.facts["counts"] == {"unchanged": 3, "analysed": 1}


def test_noise_edge_does_not_draw_what_a_model_of_the_same_seed_was_made_of():
    W = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    scale = W.abs().bfloat16()
    edge, _ = precision.noise_edge(torch.empty(300, 300), scale, "normal", seed=0)
    textbook = math.sqrt(float(scale.float().square().mean())) * 2 * math.sqrt(300)
    assert edge == pytest.approx(textbook, rel=0.06)  # the same draws give 1.4 times as much


@pytest.mark.parametrize("unit", [1e-28, 1e28])
def test_dead_zone_model_at_any_scale(unit):
    W = normal(200, 160).bfloat16()
    truth = planted((200, 160), torch.arange(1, 161, dtype=torch.float64) ** -1.0)
    truth *= 0.003 * float(W.double().norm()) / float(truth.norm())
    power = 2.0 ** round(math.log2(unit))
    found = []
    for base, update in ((W, truth), (W * power, truth * power)):
        stored = (base.double() + update).bfloat16()
        found.append(deadzone.correct(stored.float() - base.float(), precision.ulp(stored, "BF16")))
    assert found[1].fro_norm == found[0].fro_norm * power
    assert torch.equal(found[1].Y, found[0].Y * power)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_mask_in_the_base_is_not_taken_for_an_update_that_was_swallowed(tmp_path, share):
    """Weights that are zero on both sides have the finest grid, and would show an update if there was one."""
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(512, 512, generator=generator) >= share).float()
    W = (0.03 * torch.randn(512, 512, generator=generator) * mask).bfloat16()
    truth = 1e-4 * torch.randn(512, 512, generator=generator) * mask  # noise: r50 and r90 about 93 and 261
    tuned = (W.float() + truth).bfloat16()
    row = lp.spectrum({"layers.0.q_proj.weight": W}, {"layers.0.q_proj.weight": tuned}).table.iloc[0]
    s = torch.linalg.svdvals(truth.double()).numpy()
    assert row["noise_model"] == "dead-zone"
    assert row["denoised_fro_norm"] == pytest.approx(float(truth.norm()), rel=0.03)
    for rank, p in (("r50", 0.5), ("r90", 0.9)):
        true = metrics.energy_rank(s, float(truth.double().norm()), p)
        assert row[f"{rank}_low"] <= true <= row[f"{rank}_high"]


def test_frozen_columns_are_no_storage_noise():
    base = 0.03 * torch.randn(128, 96, generator=torch.Generator().manual_seed(4))
    for axis in (0, 1):
        tuned = base.clone()
        tuned.select(axis, 3).add_(1e-3)
        result = lp.spectrum({"layers.0.q_proj.weight": base}, {"layers.0.q_proj.weight": tuned})
        assert result.table["signal_rank"][0] == 1
        assert result.summary["verdict"][0] == "low-rank at r=1"
