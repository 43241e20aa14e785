"""trajectories: planted subspaces of known overlap, the random control by simulation, amplification, the command."""

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import real_models
import torch
from browsers import needs_chromium
from pairs import add_update, llama_tensors, orthonormal, planted, write
from refusals import refused
from test_cli import fails, interrupted, probe

import lowrank_probe as lp
from lowrank_probe import runs, spectra, subspaces, trajectories, trajectory_runs
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.columns import AMPLIFICATION, SIMILARITY
from lowrank_probe.options import Keywords, Options
from lowrank_probe.trajectory_figures import _log_ticks
from lowrank_probe.trajectory_reports import READING
from lowrank_probe.trajectory_terminal import print_trajectory

Q = "model.layers.0.self_attn.q_proj.weight"


def rotated(shape, angles, seed=0):
    """(U_A, U_B, V_A, V_B): orthonormal, U_Aᵀ U_B = V_Aᵀ V_B = diag(cos angles)."""
    generator = torch.Generator().manual_seed(seed)
    r = len(angles)
    sides = []
    for rows in shape:
        both = orthonormal(rows, 2 * r, generator)
        sides += [both[:, :r], both[:, :r] * torch.cos(angles) + both[:, r:] * torch.sin(angles)]
    return sides


@pytest.fixture(scope="module")
def angled(tmp_path_factory):
    """(base, step a, step b, angles): one float64 matrix, two updates whose directions have known angles."""
    root, shape = tmp_path_factory.mktemp("angled"), (70, 50)
    angles = torch.linspace(0.1, 1.4, 16, dtype=torch.float64)
    s = torch.linspace(3, 1, 16, dtype=torch.float64)
    U_A, U_B, V_A, V_B = rotated(shape, angles)
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = {"model_type": "llama"}
    deltas = {"base": 0 * W, "a": (U_A * s) @ V_A.T, "b": 2 * (U_B * s) @ V_B.T}
    return *(write(root / name, {Q: W + delta}, config) for name, delta in deltas.items()), angles.numpy()


@pytest.fixture(scope="module")
def angled_trajectory(angled):
    return lp.trajectory(angled[0], angled[1:3])


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """(base, [three steps]): a small bf16 Llama, an update of rank 4 that grows."""
    root = tmp_path_factory.mktemp("growing")
    base = llama_tensors(dtype=torch.bfloat16)
    steps = [add_update(base, relative=relative) for relative in (0.03, 0.06, 0.12)]
    config = {"model_type": "llama"}
    paths = [write(root / f"checkpoint-{i}00", step, config) for i, step in enumerate(steps, 1)]
    return write(root / "base", base, config), paths


@pytest.fixture(scope="module")
def saved(growing, tmp_path_factory):
    """(directory, stdout, stderr) of the finished command on the three steps."""
    out = tmp_path_factory.mktemp("saved") / "run"
    return out, *probe("spectrum", growing[0], *growing[1], "--out", out)


# ---------------------------------------------------------------------------------------------- similarity


def test_phi_of_planted_subspaces_is_exact(angled, angled_trajectory):
    table, angles = angled_trajectory.similarity, angled[3]
    assert set(zip(table["i"], table["j"], strict=True)) == {(i, j) for i in (1, 2, 4, 8, 16) for j in (1, 2, 4, 8, 16)}
    for row in table.to_dict("records"):
        expected = (np.cos(angles[: min(row["i"], row["j"])]) ** 2).mean()
        assert row["phi_left"] == pytest.approx(expected, abs=1e-10)
        assert row["phi_right"] == pytest.approx(expected, abs=1e-10)
    assert table["trusted"].all()
    s = np.linspace(3, 1, 16)
    gaps = dict(zip(table["i"], table["gap_a"], strict=True))
    assert gaps[4] == pytest.approx(s[3] / s[4], rel=1e-10)
    assert gaps[16] > 1e10


def test_phi_by_its_definition_and_its_limits():
    generator = torch.Generator().manual_seed(0)
    A, B = orthonormal(40, 5, generator), orthonormal(40, 7, generator)
    phi = subspaces.similarity(A, B)
    assert phi.shape == (5, 7)
    for i, j in ((1, 1), (3, 7), (5, 2)):
        assert phi[i - 1, j - 1] == pytest.approx(np.linalg.norm(A[:, :i].T @ B[:, :j]) ** 2 / min(i, j), rel=1e-12)
    np.testing.assert_allclose(subspaces.similarity(A, A @ orthonormal(5, 5, generator))[4, 4], 1, rtol=1e-12)
    np.testing.assert_allclose(subspaces.similarity(B[:, :3], B[:, 3:]), 0, atol=1e-15)
    np.testing.assert_allclose(subspaces.similarity(A[:, :2], A)[1, 4], 1, rtol=1e-12)


@pytest.mark.parametrize(("i", "j", "m"), [(1, 1, 20), (2, 8, 40), (8, 8, 64), (16, 4, 30)])
def test_phi_of_random_subspaces_by_simulation(i, j, m):
    drawn = np.array(
        [
            subspaces.similarity(
                *(subspaces.random_directions(m, r, f"{n} {side}") for r, side in ((i, "a"), (j, "b")))
            )
            for n in range(600)
        ]
    )[:, -1, -1]
    expected = subspaces.random_similarity(i, j, m)
    assert expected == max(i, j) / m
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / math.sqrt(len(drawn))


def test_the_control_is_seeded_and_has_the_stated_mean(growing):
    first, again, other = (lp.trajectory(*growing, seed=seed).similarity for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first["control_left"], other["control_left"])
    np.testing.assert_allclose(first["phi_left"], other["phi_left"], rtol=1e-9)
    for side, size in (("left", "rows"), ("right", "cols")):
        excess = first[f"control_{side}"] / first[f"phi_random_{side}"]
        assert excess.mean() == pytest.approx(1, abs=0.1), size


def test_true_overlap_against_a_simulated_spiked_matrix():
    shape, s = (200, 500), torch.tensor([6.0, 4.0, 2.5, 1.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    U, V = orthonormal(200, 4, generator), orthonormal(500, 4, generator)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(500)
    edge = 1 + math.sqrt(200 / 500)
    found_U, found_s, found_Vh = torch.linalg.svd((U * s) @ V.T + noise, full_matrices=False)
    left, right = subspaces.true_overlap(found_s[:4].numpy(), edge, shape)
    np.testing.assert_allclose(left, (found_U[:, :4] * U).sum(0).numpy() ** 2, atol=0.05)
    np.testing.assert_allclose(right, (found_Vh[:4].T * V).sum(0).numpy() ** 2, atol=0.05)
    swapped = subspaces.true_overlap(found_s[:4].numpy(), edge, shape[::-1])
    np.testing.assert_allclose(swapped, (right, left))
    assert [list(x) for x in subspaces.true_overlap(np.array([0.9 * edge]), edge, shape)] == [[0.0], [0.0]]
    assert list(subspaces.true_overlap(np.ones(2), 0.0, shape)[0]) == [1, 1]


# ---------------------------------------------------------------------------------------------- what storage leaves


def test_storage_in_bf16_limits_phi_as_stated_and_takes_the_trust_away(tmp_path):
    generator = torch.Generator().manual_seed(5)
    W = (0.02 * torch.randn(300, 400, generator=generator)).bfloat16()
    delta = planted((300, 400), torch.tensor([10.0, 8, 6, 4, 0.5, 0.45, 0.4, 0.35]))
    delta *= 0.012 * W.double().norm() / delta.norm()
    paths = [write(tmp_path / "base", {Q: W})]
    for label, factor in (("a", 1.0), ("b", 1.3)):  # the same directions: without rounding φ = 1
        paths.append(write(tmp_path / label, {Q: (W.double() + factor * delta).bfloat16()}))
    found = lp.trajectory(paths[0], paths[1:])
    (row,) = found.results["a"].table.to_dict("records")
    assert row["noise_model"] == "rounding"
    table = found.similarity[found.similarity["i"] == found.similarity["j"]].set_index("i")
    signal = row["signal_rank"]
    assert 4 <= signal < 16
    assert table["trusted"].to_dict() == {i: i <= signal for i in (1, 2, 4, 8, 16)}
    assert table["phi_left"][8] < 0.97
    for side in ("left", "right"):
        for i in (1, 2, 4, 8):
            assert table[f"phi_{side}"][i] == pytest.approx(table[f"phi_ceiling_{side}"][i], abs=0.05)
    amplification = found.amplification.set_index("r")["trusted"]
    assert amplification[1].all()
    assert not amplification[16].any()


def test_swallowed_updates_are_not_trusted(tmp_path):
    base = llama_tensors(1, dtype=torch.bfloat16)
    steps = [write(tmp_path / f"s{i}", add_update(base, relative=2e-4, seed=i)) for i in (1, 2)]
    found = lp.trajectory(write(tmp_path / "base", base), steps)
    assert not found.similarity["trusted"].any()
    figure = found.figures["similarity"]
    grey = figure.data[1]
    assert grey.text[0][1] == "?"
    assert grey.z[0][1] is not None
    assert figure.data[0].z[0][1] is None
    assert found.figures["r90"].data[1].text[0] == "?"


def test_a_subspace_without_a_gap_is_not_trusted(tmp_path):
    W = torch.randn(60, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    delta = planted((60, 50), torch.tensor([3.0, 2, 2, 1]))
    paths = [write(tmp_path / name, {Q: W + factor * delta}) for name, factor in (("base", 0), ("a", 1), ("b", 2))]
    table = lp.trajectory(paths[0], paths[1:]).similarity.set_index(["i", "j"])
    assert table["gap_a"][2, 2] == pytest.approx(1, abs=1e-9)
    assert {i: bool(table["trusted"][i, i]) for i in (1, 2, 4)} == {1: True, 2: False, 4: True}


# ---------------------------------------------------------------------------------------------- amplification


def test_amplification_against_dense_numpy(angled, angled_trajectory):
    W = open_checkpoint(angled[0]).read(Q).numpy()
    base_values = np.linalg.svd(W, compute_uv=False)
    for row in angled_trajectory.amplification.to_dict("records"):
        delta = open_checkpoint(angled[1 if row["step"] == "a" else 2]).read(Q).numpy() - W
        U, _, Vh = np.linalg.svd(delta)
        r = row["r"]
        own = np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
        assert row["fro_norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-12)
        assert row["projected_own"] == pytest.approx(own, rel=1e-9)
        assert row["factor"] == pytest.approx(np.linalg.norm(delta) / own, rel=1e-9)
        assert row["projected_base"] == pytest.approx(np.linalg.norm(base_values[:r]), rel=1e-12)
        assert row["projected_random"] == pytest.approx(r * np.linalg.norm(W) / math.sqrt(W.size), rel=3 / r)
        assert row["trusted"]


# ---------------------------------------------------------------------------------------------- adapters, gaps in steps


def test_an_adapter_and_the_same_update_stored_dense_agree(tmp_path):
    base = {k: v.double() for k, v in llama_tensors(1).items()}
    write(tmp_path / "base", base, {"model_type": "llama"})
    generator = torch.Generator().manual_seed(7)
    A, B = torch.randn(8, 48, generator=generator), torch.randn(64, 8, generator=generator)
    module = Q.removesuffix(".weight")
    write(tmp_path / "adapter", {f"base_model.model.{module}.lora_{x}.weight": f for x, f in (("A", A), ("B", B))})
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write(tmp_path / "dense", base | {Q: base[Q] + 0.25 * B.double() @ A.double()}, {"model_type": "llama"})
    found = lp.trajectory(tmp_path / "base", [tmp_path / "adapter", tmp_path / "dense"])
    table = found.similarity
    assert sorted(set(table["i"])) == [1, 2, 4, 8], "the adapter has 8 directions"
    same = table[table["i"] == table["j"]]
    np.testing.assert_allclose(same[["phi_left", "phi_right"]], 1, atol=1e-10)
    assert same["trusted"].all()
    amplification = found.amplification.pivot(index="r", columns="step", values="factor").dropna()
    np.testing.assert_allclose(amplification["adapter"], amplification["dense"], rtol=1e-9)


def test_a_matrix_that_only_one_step_changed_has_no_phi(growing, tmp_path):
    base = open_checkpoint(growing[0])
    tensors = {name: base.read(name) for name in base.tensors}
    tensors[Q] = open_checkpoint(growing[1][0]).read(Q)
    frozen = write(tmp_path / "frozen", tensors, {"model_type": "llama"})
    found = lp.trajectory(growing[0], [growing[1][0], frozen])
    assert set(found.similarity["name"]) == {Q}
    assert set(found.amplification["name"][found.amplification["step"] == "frozen"]) == {Q}
    assert len(found.amplification["name"].unique()) == 9


@pytest.mark.parametrize("n_steps", [1, 2])
def test_one_step_and_unchanged_steps_are_no_failure(growing, tmp_path, n_steps):
    found = lp.trajectory(growing[0], growing[1][:1] if n_steps == 1 else [growing[0]] * 2)
    assert found.similarity.empty
    assert found.similarity_by_type.empty
    assert len(found.amplification_by_type) == (len(found.table) * 5 if n_steps == 1 else 0)
    assert list(found.similarity.columns) == list(SIMILARITY)
    assert list(found.amplification.columns) == list(AMPLIFICATION)
    same(lp.load(found.save(tmp_path / "run")), found)
    json.loads(found.to_json(), parse_constant=pytest.fail)


# ---------------------------------------------------------------------------------------------- the object


def test_results_are_those_of_spectrum_and_the_table_stacks_their_summaries(growing):
    options = {"exclude": ["embed_tokens"], "layers": (0, 0), "seed": 3}
    found = lp.trajectory(*growing, **options)
    assert list(found.results) == ["checkpoint-100", "checkpoint-200", "checkpoint-300"]
    for path, result in zip(growing[1], found.results.values(), strict=True):
        alone = lp.spectrum(growing[0], path, **options)
        pd.testing.assert_frame_equal(result.table.drop(columns="seconds"), alone.table.drop(columns="seconds"))
        pd.testing.assert_frame_equal(
            found.table[found.table["step"] == path.name].drop(columns="step").reset_index(drop=True), alone.summary
        )
    assert set(found.similarity["layer"]) == {0}
    q = found.table[found.table["layer_type"] == "q"]
    assert q["relative_update"].is_monotonic_increasing
    for table, columns in ((found.similarity, SIMILARITY), (found.amplification, AMPLIFICATION)):
        assert list(table.columns) == list(columns)
    by_type = found.similarity_by_type
    assert len(by_type) == 3 * 4 * 5
    assert list(dict.fromkeys(by_type["layer_type"])) == ["q", "k", "up", "down"]


def test_towers_are_told_apart_in_every_table_though_only_one_step_moved_both(tmp_path):
    names = [f"model.{tower}.layers.0.self_attn.q_proj.weight" for tower in ("vision_tower", "language_model")]
    generator = torch.Generator().manual_seed(0)
    W = {name: torch.randn(24, 20, generator=generator) for name in names}
    both = {name: tensor + 0.01 * torch.randn(24, 20, generator=generator) for name, tensor in W.items()}
    paths = [
        write(tmp_path / "base", W),
        write(tmp_path / "both", both),
        write(tmp_path / "text", W | {names[1]: both[names[1]]}),
    ]
    found = lp.trajectory(paths[0], paths[1:])
    assert list(zip(found.table["step"], found.table["layer_type"], strict=True)) == [
        ("both", "text q"), ("both", "vision q"), ("text", "text q"),
    ]  # fmt: skip
    assert set(found.similarity_by_type["layer_type"]) == {"text q"}
    assert set(found.amplification_by_type["layer_type"]) == {"text q", "vision q"}
    assert set(found.amplification_by_type["n_matrices"]) == {1}
    assert {trace.name for trace in found.figures["relative_update"].data} == {"text q", "vision q"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (["a/checkpoint-100", "a/checkpoint-20/"], ["checkpoint-100", "checkpoint-20"]),
        (["a/x", "b/x", "c"], ["a-x", "b-x", "c"]),
        (["a/model.safetensors", "b/two words.safetensors"], ["a", "two-words"]),
        (["a/x", "a/x", "b/y"], ["x", "x-2", "y"]),
        (["a/x", "a/x", "b/x"], ["a-x", "a-x-2", "b-x"]),
        (["owner/name@main", "other/name@main"], ["owner-name-main", "other-name-main"]),
        ([{}, torch.nn.Linear(2, 2), {}], ["step", "Linear", "step-2"]),
        (["report.html", "b/Report.html"], None),
    ],
)
def test_labels_come_from_the_directories_and_are_unique(steps, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = trajectories.step_labels(steps)
    assert expected is None or labels == expected
    assert len({label.lower() for label in labels}) == len(steps)
    assert all(re.fullmatch(r"[\w.-]+", label) and label != "report.html" for label in labels)


@pytest.mark.parametrize(
    "labels", [["a"], ["a", "A", "b"], ["a", "../b", "c"], ["", "b", "c"], ["report.html", "b", "c"]]
)
def test_bad_labels_are_refused(growing, labels):
    with pytest.raises(lp.ProbeError, match="label"):
        lp.trajectory(*growing, labels=labels)


@pytest.mark.parametrize(
    ("steps", "words"),
    [([], "no steps"), ("a/b", "found a str"), ({"w": torch.ones(2)}, "found a dict"), (3, "found a int")],
)
def test_steps_that_are_no_list_are_refused(growing, steps, words):
    with pytest.raises(lp.ProbeError, match=words):
        lp.trajectory(growing[0], steps)


def test_models_and_state_dicts_in_memory_are_steps_too(growing, tmp_path):
    sides = [open_checkpoint(path) for path in (growing[0], *growing[1][:2])]
    base, first, second = ({name: side.read(name) for name in side.tensors} for side in sides)
    found = lp.trajectory(base, [first, second])
    expected = lp.trajectory(growing[0], growing[1][:2], labels=["step", "step-2"])
    pd.testing.assert_frame_equal(found.similarity, expected.similarity)
    pd.testing.assert_frame_equal(found.table, expected.table)
    same(lp.load(found.save(tmp_path / "run")), found)


def test_an_adapter_beside_a_full_model_keeps_fused_matrices_whole_in_both(tmp_path):
    name, generator = "h.0.attn.c_attn.weight", torch.Generator().manual_seed(0)
    W, config = torch.randn(16, 48, generator=generator), {"model_type": "gpt2", "n_embd": 16, "n_head": 2}
    A, B = torch.randn(2, 16, generator=generator), torch.randn(48, 2, generator=generator)
    base = write(tmp_path / "base", {name: W}, config)
    full = write(tmp_path / "full", {name: W + (B @ A).T}, config)
    factors = {f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight": f for x, f in (("A", A), ("B", B))}
    adapter = write(tmp_path / "adapter", factors)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert len(lp.trajectory(base, [full, full], labels=["a", "b"]).results["a"].table) == 3, "taken apart"
    found = lp.trajectory(base, [full, adapter])
    assert [list(result.table["name"]) for result in found.results.values()] == [[name], [name]]
    (note,) = found.facts["notes"]
    assert name in note
    assert found.facts["options"]["split"] is False
    same_space = found.similarity[(found.similarity["i"] == 2) & (found.similarity["j"] == 2)]
    np.testing.assert_allclose(same_space[["phi_left", "phi_right"]], 1, atol=1e-6)


def test_ctrl_c_waits_until_a_step_is_written(growing, tmp_path):
    def slow(label, result):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        trajectory_runs.save_step(tmp_path / "run", label, result)

    with pytest.raises(KeyboardInterrupt):
        lp.trajectory(*growing, on_step=slow)
    assert lp.load(tmp_path / "run" / "checkpoint-100").facts["status"] == "complete"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-100", "trajectory.json"]


def test_errors_name_the_step_and_come_before_any_work(growing, tmp_path):
    finished = []
    with pytest.raises(lp.CheckpointError, match=r"step gone: .*no such file"):
        lp.trajectory(growing[0], [growing[1][0], tmp_path / "gone"], on_step=lambda *step: finished.append(step))
    assert finished == []
    with pytest.raises(lp.ProbeError, match="rank 0"):
        lp.trajectory(*growing, rank=0)


# ---------------------------------------------------------------------------------------------- the directory


def same(a, b):
    """Two trajectories with the same tables, spectra and facts."""
    assert list(a.results) == list(b.results)
    for name in ("table", "similarity", "similarity_by_type", "amplification", "amplification_by_type"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name))
    for label, result in a.results.items():
        other = b.results[label]
        pd.testing.assert_frame_equal(result.table, other.table)
        pd.testing.assert_frame_equal(result.ledger, other.ledger)
        assert list(result.singular_values) == list(other.singular_values)
        for name, s in result.singular_values.items():
            np.testing.assert_array_equal(s, other.singular_values[name])
    assert runs.plain(a.facts) == runs.plain(b.facts)
    assert a.to_json() == b.to_json()


def test_round_trip(growing, tmp_path):
    found = lp.trajectory(*growing, exclude=["embed_tokens"], layers=(0, 0), labels=["α 1", "b", "-c"])
    loaded = lp.load(found.save(tmp_path / "run"))
    assert isinstance(loaded, lp.Trajectory)
    same(loaded, found)
    same(lp.load(loaded.save(tmp_path / "again")), found)
    for name in ("report.html", "α 1/report.html", "similarity.csv", "trajectory.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.fixture
def run(saved, tmp_path):
    """A copy of the finished command's directory."""
    return shutil.copytree(saved[0], tmp_path / "run")


def test_report_rebuilds_the_page_and_those_of_the_steps(run):
    pages = [run / "report.html", *(run / f"checkpoint-{i}00" / "report.html" for i in (1, 2, 3))]
    before = [page.read_bytes() for page in pages]
    for page in pages:
        page.write_text("old")
    files = set(run.rglob("*"))
    assert probe("report", run) == (f"{pages[0]}\n", "")
    assert [page.read_bytes() for page in pages] == before
    assert set(run.rglob("*")) == files


def damaged(run, *words):
    """Loading and `lp.report` raise one line that names the directory and holds every word."""
    for act in (lp.load, lp.report):
        refused(run, run, *words, act=act)


@pytest.mark.parametrize("file", ["similarity.parquet", "amplification.parquet"])
@pytest.mark.parametrize("damage", ["missing", "text", "short", "another table"])
def test_a_damaged_table_is_named(run, file, damage):
    whole = (run / file).read_bytes()
    (run / file).unlink()
    if damage == "another table":
        shutil.copy(run / "checkpoint-100" / "table.parquet", run / file)
    elif damage != "missing":
        (run / file).write_bytes(b"words" if damage == "text" else whole[:-100])
    damaged(run, f"is not a complete run directory: {file}")
    facts = json.loads((run / "trajectory.json").read_text())
    (run / "trajectory.json").write_text(json.dumps(facts | {"files": {}}))  # as if nothing were known of it
    damaged(run, f"is not a complete run directory: {file}: ")


@pytest.mark.parametrize("damage", ["no directory", "no facts", "no table"])
def test_a_damaged_step_is_named(run, damage):
    step = run / "checkpoint-200"
    if damage == "no directory":
        shutil.rmtree(step)
    else:
        (step / {"no facts": "facts.json", "no table": "table.parquet"}[damage]).unlink()
    damaged(run, "step checkpoint-200: ", "not a complete" if damage == "no table" else "not a run directory")
    fails("report", run, words=["step checkpoint-200: "])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": None}, "lacks base or steps"),
        ({"steps": [{"label": "checkpoint-100"}]}, "lacks base or steps"),
        ({"base": {}}, "lacks base or steps"),
        ({"steps": []}, "no usable labels"),
        ({"steps": [{"label": "../run/checkpoint-100", "path": "x"}]}, "no usable labels"),
        ({"steps": [{"label": 1, "path": "x"}]}, "no usable labels"),
        ({"steps": [{"label": f"checkpoint-{i}00", "path": "x"} for i in (1, 3)]}, "step 'checkpoint-200' that"),
        ({"status": "interrupted"}, "is an unfinished trajectory"),
        ({"status": None}, "is an unfinished trajectory"),
        ({"schema_version": runs.SCHEMA_VERSION + 1}, "newer lowrank_probe"),
        ({"schema_version": "1"}, "schema_version"),
        ({"files": ["similarity.parquet"]}, "sizes and checksums"),
    ],
    ids=str,
)
def test_damaged_facts_are_told(run, change, words):
    facts = json.loads((run / "trajectory.json").read_text())
    (run / "trajectory.json").write_text(json.dumps(facts | change))
    damaged(run, words)


@pytest.mark.parametrize("text", ["{broken", "[]", "3", ""])
def test_facts_that_are_no_object_are_told(run, text):
    (run / "trajectory.json").write_text(text)
    damaged(run, "is not a complete run directory: trajectory.json: ")


def test_the_options_of_both_verbs_are_those_of_options():
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parameters = inspect.signature(lp.spectrum).parameters.values()
    own = {"base", "tuned", "resume", "on_progress"}
    assert {p.name: p.default for p in parameters if p.name not in own} == defaults
    assert list(Keywords.__annotations__) == list(defaults)


@pytest.mark.parametrize(
    ("option", "words"), [({"top": 0}, "top=0"), ({"layers": (3, 1)}, "layers="), ({"exclude": "q_proj"}, "are lists")]
)
def test_bad_options_are_refused_as_by_spectrum(growing, option, words):
    for act in (lambda: lp.spectrum(growing[0], growing[1][0], **option), lambda: lp.trajectory(*growing, **option)):
        with pytest.raises(lp.ProbeError, match=words) as caught:
            act()
        assert not str(caught.value).startswith("step ")
    with pytest.raises(TypeError, match="tops"):
        lp.trajectory(*growing, tops=3)


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_every_file(saved, growing):
    out, stdout, stderr = saved
    assert stderr == f"report: {out / 'report.html'}\n"
    assert max(map(len, stdout.splitlines())) <= 120
    labels = [path.name for path in growing[1]]
    for label in labels:
        assert re.search(rf"^ .*{label} +\d", stdout, re.M)
        assert lp.load(out / label).facts["status"] == "complete"
        assert (out / label / "report.html").exists()
    assert re.search(r"^ type +φ\(4, 4\) step–next +φ\(4, 4\) first–last +random", stdout, re.M), "the planted rank"
    assert re.search(r"^ q +(?:1.00|0.9\d) / (?:1.00|0.9\d) +[\d.]+ / [\d.]+ +0.06 / 0.08", stdout, re.M)
    found = lp.trajectory(*growing)
    similarity = pd.read_parquet(out / "similarity.parquet")
    pd.testing.assert_frame_equal(similarity, found.similarity)
    assert len(pd.read_csv(out / "similarity.csv")) == len(similarity)
    assert len(pd.read_csv(out / "amplification.csv")) == len(found.amplification)
    pd.testing.assert_frame_equal(
        pd.read_csv(out / "trajectory.csv")[["step", "layer_type", "n_matrices"]],
        found.table[["step", "layer_type", "n_matrices"]],
    )
    facts = json.loads((out / "trajectory.json").read_text())
    assert facts["status"] == "complete"
    assert [step["label"] for step in facts["steps"]] == labels
    page = (out / "report.html").read_text(encoding="utf-8")
    for label in labels:
        assert f'href="{label}/report.html"' in page
    for heading, _ in READING.values():
        assert heading.replace("'", "&#39;") in page


def test_json_is_one_strict_object(growing, tmp_path):
    stdout, stderr = probe(
        "spectrum", growing[0], *growing[1][:2], "--json", "--quiet", "--include", "q_proj", cwd=tmp_path
    )
    payload = json.loads(stdout, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert stdout.count("\n") == 1
    assert stderr == ""
    assert set(payload) == {"schema_version", "facts", "steps", "table", "similarity", "amplification"}
    assert payload["steps"]["checkpoint-100"]["counts"] == {"excluded": 10, "analysed": 2}
    assert [found["kind"] for found in payload["steps"]["checkpoint-200"]["findings"]]
    assert {row["layer_type"] for row in payload["table"]} == {"q"}
    assert payload["similarity"][0]["step_b"] == "checkpoint-200"
    (run,) = (tmp_path / "probe-runs").iterdir()
    assert run.name.startswith("checkpoint-200-")
    assert (run / "report.html").exists()


def test_a_finished_trajectory_and_a_foreign_directory_are_refused(saved, growing, tmp_path):
    fails("spectrum", growing[0], *growing[1], "--out", saved[0], words=["already holds a finished trajectory"])
    (tmp_path / "file").write_text("mine")
    fails("spectrum", growing[0], *growing[1], "--out", tmp_path, words=["is not empty"])
    fails("spectrum", growing[0], growing[1][0], tmp_path / "no", words=["step no: ", "no such file"], cwd=tmp_path)


def test_a_bad_tensor_names_its_step_and_the_finished_steps_serve_the_next_try(growing, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(growing[1][1], broken)
    side = open_checkpoint(growing[1][1])
    good = {name: side.read(name) for name in side.tensors}
    write(broken, good | {Q: good[Q] * math.nan})
    arguments = ["spectrum", growing[0], growing[1][0], broken, "--out", tmp_path / "run"]
    fails(*arguments, words=["step broken: ", Q, "NaN"])
    seconds = lp.load(tmp_path / "run" / "checkpoint-100").table["seconds"]
    fails(*arguments, "--seed", "1", words=["an unfinished trajectory that differs in seed (0 there, 1 here)"])
    other = ["spectrum", growing[0], growing[1][0], growing[1][1], "--out", tmp_path / "run"]
    fails(*other, words=["an unfinished trajectory that differs in steps", broken, growing[1][1]])
    fails("spectrum", growing[1][2], *other[2:], words=["differs in base"])
    write(broken, good)
    _, stderr = probe(*arguments)
    assert "resumed the interrupted run" in stderr
    assert (lp.load(tmp_path / "run" / "checkpoint-100").table["seconds"] == seconds).all()
    assert json.loads((tmp_path / "run" / "trajectory.json").read_text())["status"] == "complete"


def test_the_terminal_says_what_each_step_is_and_which_did_not_move(growing, tmp_path):
    stdout, _ = probe("spectrum", growing[0], growing[1][0], growing[0], "--out", tmp_path / "run")
    lines = stdout.splitlines()
    assert lines[0] == "checkpoint-100: ledger: 9 analysed, 3 vector"
    assert lines[1].startswith("  kind: ")
    at = lines.index("base: ledger: 12 unchanged")
    assert "identical in every tensor compared" in lines[at + 1]


def test_names_do_not_drive_the_terminal(tmp_path, capsys):
    name = "model.layers.0.\x1b[31mred.weight"
    W = torch.randn(24, 20, generator=torch.Generator().manual_seed(0))
    paths = [write(tmp_path / label, {name: factor * W}) for label, factor in (("base", 1), ("a", 1.1), ("b", 1.2))]
    print_trajectory(lp.trajectory(paths[0], paths[1:]))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\ufffd[31mred" in out


def test_in_a_notebook_it_is_a_line_and_a_table(angled_trajectory):
    assert re.fullmatch(r"<Trajectory: .*/base → 2 steps: a, b>", repr(angled_trajectory))
    shown = angled_trajectory._repr_html_()
    assert shown.count("<tr") == 1 + len(angled_trajectory.table)
    assert len(shown) < 5000


def test_fail_on_reads_the_verdicts_of_every_step(growing, tmp_path):
    arguments = ["spectrum", growing[0], *growing[1][:2], "--out", tmp_path / "run", "--include", "up_proj"]
    _, stderr = probe(*arguments, "--fail-on", "low-rank", code=3)
    assert "--fail-on low-rank" in stderr


def test_ctrl_c_keeps_finished_steps_and_the_same_command_resumes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, steps = {}, [{}, {}]
    for i in range(30):
        W = (0.02 * torch.randn(512, 640, generator=generator)).bfloat16()
        name = f"model.layers.{i}.mlp.up_proj.weight"
        base[name] = W
        for number, tuned in enumerate(steps, 1):
            update = torch.randn(512, 4, generator=generator) @ torch.randn(4, 640, generator=generator)
            tuned[name] = (W + 2e-4 * number * update).bfloat16()
    paths = [write(tmp_path / "base", base), *(write(tmp_path / f"s{n}", step) for n, step in enumerate(steps, 1))]
    out = tmp_path / "run"
    code, stdout, shown = interrupted("spectrum", *paths, "--out", out, at=r"2/2 s2: ")
    assert code == 130
    assert stdout == ""
    assert "Traceback" not in shown
    assert "interrupted: 1 of 2 steps are finished" in shown.replace("\r\n", "")
    first, second = lp.load(out / "s1"), lp.load(out / "s2")
    assert first.facts["status"] == "complete"
    assert second.facts["status"] == "interrupted"
    _, stderr = probe("spectrum", *paths, "--out", out)
    assert "resumed" in stderr
    pd.testing.assert_frame_equal(lp.load(out / "s1").table, first.table)
    kept = lp.load(out / "s2").table.set_index("name")["seconds"]
    assert (kept[second.table["name"]].to_numpy() == second.table["seconds"].to_numpy()).all()
    whole = lp.load(out / "s2")
    assert whole.timeline.groupby("name")["phase"].agg(set).map(len).eq(3).all()
    assert len(whole.timeline) == 90
    before = second.timeline["stop_s"].max()
    assert whole.timeline["start_s"].iloc[len(second.timeline) :].min() >= before, "the clock goes on"
    for phase in ("read", "spectrum", "noise"):
        rows = whole.timeline[whole.timeline["phase"] == phase]
        assert whole.facts["seconds"][phase] == pytest.approx((rows["stop_s"] - rows["start_s"]).sum(), abs=1e-3)
    assert whole.facts["seconds"]["headers"] > second.facts["seconds"]["headers"]
    assert len(pd.read_parquet(out / "similarity.parquet")["name"].unique()) == 30


def test_ctrl_c_in_the_library_hands_the_step_over(growing, monkeypatch):
    handed = []

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(spectra, "read_pair", stop)
    with pytest.raises(spectra.Interrupted):
        lp.trajectory(*growing, on_step=lambda label, result: handed.append((label, result.facts["status"])))
    assert handed == [("checkpoint-100", "interrupted")]


# ---------------------------------------------------------------------------------------------- figures, real siblings


def test_figures(growing, angled_trajectory):
    found = lp.trajectory(*growing)
    figures = found.figures
    assert list(figures) == ["relative_update", "r90", "signal_rank", "similarity", "grid", "amplification"]
    line = next(trace for trace in figures["relative_update"].data if trace.name == "q")
    q = found.table[found.table["layer_type"] == "q"]
    np.testing.assert_allclose(line.y, q["relative_update"], rtol=1e-5)
    heat = figures["similarity"]
    buttons = heat.layout.updatemenus[0].buttons
    assert [button.label for button in buttons][:2] == ["i = 1, output side", "i = 2, output side"]
    by_type = found.similarity_by_type.set_index(["layer_type", "i", "step_a", "step_b"])["phi_left"]
    kinds = list(dict.fromkeys(found.similarity_by_type["layer_type"]))
    z = buttons[2].args[0]["z"][2 * kinds.index("q")]
    assert z[0][2] == z[2][0] == pytest.approx(by_type["q", 4, "checkpoint-100", "checkpoint-300"], rel=1e-5)
    assert z[1][1] == 1
    assert "q · chance 0.062" in buttons[2].args[1].values(), "4/64"
    grid = angled_trajectory.figures["grid"]
    wanted = angled_trajectory.similarity.pivot(index="i", columns="j", values="phi_right").to_numpy()
    np.testing.assert_allclose(grid.data[1].z, wanted, rtol=1e-5)


def test_a_step_that_did_not_move_is_no_question_mark(growing):
    found = lp.trajectory(growing[0], [growing[1][0], growing[0], growing[1][1]], labels=["a", "still", "b"])
    marks = found.figures["r90"].data[1]
    assert list(marks.y) == [None, 0, None]
    assert marks.text[1] == "–"
    assert marks.hovertext[1] == "no matrix of this type moved"
    assert "3" in marks.hovertext[0]
    values, grey = found.figures["similarity"].data[:2]
    assert [row[1] for row in values.z] == [None] * 3
    assert [row[1] for row in grey.z] == [None] * 3
    assert values.z[0][0] == values.z[2][2] == 1


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.021, 0.024, None], [0.021, 0.022, 0.023, 0.024]),
        ([0.01, 0.05, 0.3], None),
        ([0.4], [0.4]),
        ([None], [1]),
    ],
)
def test_a_logarithmic_axis_has_labels_whatever_it_spans(values, ticks):
    found = _log_ticks(values, percent=True)
    if ticks is not None:
        assert found["tickvals"] == ticks
        assert found["ticktext"] == [f"{100 * tick:g}%" for tick in ticks]
    known = [v for v in values if v]
    if len(known) > 1:
        assert sum(min(known) <= tick <= max(known) for tick in found["tickvals"]) >= 3


def test_names_of_any_length_are_drawn_short_and_apart(tmp_path):
    long = [f"{'x' * 250}{i}{'x' * 250}.weight" for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    W = {name: torch.randn(24, 20, generator=generator) for name in long}
    paths = [write(tmp_path / str(n), {k: (1 + n / 10) * v for k, v in W.items()}) for n in range(3)]
    found = lp.trajectory(paths[0], paths[1:])
    drawn = [trace.name for trace in found.figures["relative_update"].data]
    assert len(set(drawn)) == 2
    assert max(map(len, drawn)) < 50
    heat = found.results["1"].figures["heatmap"].data[0]
    assert len(set(heat.y)) == 2
    assert max(map(len, heat.y)) < 50


@needs_chromium
def test_figures_of_the_trajectory_and_of_every_step_are_written(run, tmp_path):
    probe("report", run, "--figures", tmp_path / "figures")
    found = lp.load(run)
    steps = {f"{label}/{name}" for label, result in found.results.items() for name in result.figures}
    expected = {f"{name}.{form}" for name in {*found.figures, *steps} for form in ("svg", "png")}
    written = [path for path in (tmp_path / "figures").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "figures").as_posix() for path in written} == expected
    assert "Do the steps move in the same directions?" in (tmp_path / "figures" / "similarity.svg").read_text("utf-8")


@pytest.mark.slow
def test_rxnfp_siblings():
    models = real_models.rxnfp()
    base, steps = models["bert_pretrained"], [models["bert_ft_10k_25s"], models["bert_ft"]]
    found = lp.trajectory(base, steps)
    assert list(found.results) == ["bert_ft_10k_25s", "bert_ft"]
    table = found.similarity[(found.similarity["i"] == 8) & (found.similarity["j"] == 8)]
    # φ(8, 8) of the siblings lies well above chance (.03), far below 1, on either side
    blocks = table[table["layer_type"].isin(["q", "k", "v", "o"])]
    assert len(blocks) == 48
    assert 0.05 < blocks["phi_left"].median() < 0.3
    assert 0.05 < blocks["phi_right"].median() < 0.4
    assert set(blocks["phi_random_left"]) == {8 / 256}
    assert blocks["control_left"].mean() == pytest.approx(8 / 256, abs=0.003)
    assert table["trusted"].mean() > 0.95
    name = blocks["name"].iloc[5]
    W = open_checkpoint(base).read(name).double()
    U = []
    for label, step in zip(found.results, steps, strict=True):
        ledger = found.results[label].ledger
        tuned = open_checkpoint(step).read(ledger["tuned_name"][ledger["name"] == name].iloc[0]).double()
        U.append(np.linalg.svd((tuned - W).numpy())[0][:, :8])
    assert blocks["phi_left"].iloc[5] == pytest.approx(np.linalg.norm(U[0].T @ U[1]) ** 2 / 8, abs=1e-8)
