"""trajectory(): several steps beside each other, whatever they are; labels, options, refusals, real siblings."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pandas as pd
import pytest
import real_models
import torch
from pairs import llama_tensors, write
from steps import Q, same

import lowrank_probe as lp
from lowrank_probe import trajectories
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.columns import AMPLIFICATION, SIMILARITY
from lowrank_probe.options import Keywords, Options


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


def test_errors_name_the_step_and_come_before_any_work(growing, tmp_path):
    with pytest.raises(lp.CheckpointError, match=r"step gone: .*no such file"):
        lp.trajectory(growing[0], [growing[1][0], tmp_path / "gone"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(lp.ProbeError, match="rank 0"):
        lp.trajectory(*growing, rank=0)


def test_the_options_of_both_verbs_are_those_of_options():
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parameters = inspect.signature(lp.spectrum).parameters.values()
    own = {"base", "tuned", "out", "on_progress"}
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
