"""`probe spectrum BASE STEP1 STEP2 …`: files, JSON, terminal, Ctrl-C and what serves the next try."""

import json
import math
import re
import shutil

import pandas as pd
import pytest
import torch
from logs import heads
from pairs import write
from steps import Q
from test_cli import fails, interrupted, probe

import lowrank_probe as lp
from lowrank_probe.checkpoints import open_checkpoint
from lowrank_probe.trajectory_reports import READING
from lowrank_probe.trajectory_terminal import print_trajectory


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
    fails("spectrum", growing[0], *growing[1], "--out", saved[0], words=["already holds a finished run"])
    (tmp_path / "file").write_text("mine")
    fails("spectrum", growing[0], *growing[1], "--out", tmp_path, words=["is not empty"])
    fails("spectrum", growing[0], growing[1][0], tmp_path / "no", words=["step no: ", "no such file"], cwd=tmp_path)


@pytest.mark.slow
def test_a_bad_tensor_names_its_step_and_the_finished_steps_serve_the_next_try(growing, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(growing[1][1], broken)
    side = open_checkpoint(growing[1][1])
    good = {name: side.read(name) for name in side.tensors}
    write(broken, good | {Q: good[Q] * math.nan})
    arguments = ["spectrum", growing[0], growing[1][0], broken, "--out", tmp_path / "run"]
    fails(*arguments, words=["step broken: ", Q, "NaN"])
    seconds = lp.load(tmp_path / "run" / "checkpoint-100").table["seconds"]
    with pytest.raises(lp.CheckpointError, match=r"is an unfinished run; the same command with --out .* finishes it"):
        lp.load(tmp_path / "run")
    unfinished = "holds the unfinished work of another run"
    fails(*arguments, "--seed", "1", words=[unfinished, "(options.seed: 0 there, 1 here)"])
    other = ["spectrum", growing[0], growing[1][0], growing[1][1], "--out", tmp_path / "run"]
    fails(*other, words=[unfinished, "step broken: ", "there, null here)"])
    fails("spectrum", growing[1][2], *other[2:], words=[unfinished, "(base.path: "])
    _, stderr = probe(*arguments, "--exclude", "layers.0.self_attn.q_proj")
    assert "resumed the interrupted run" in stderr
    found = lp.load(tmp_path / "run")
    again = found.results["checkpoint-100"].table["seconds"]
    assert set(again) < set(seconds)
    assert len(again) == len(seconds) - 1
    assert found.facts["status"] == "complete"


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


@pytest.mark.slow
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
    said = f"finished matrices are kept in {out}; the same command with --out {out} resumes"
    assert said in shown.replace("\r\n", "")
    first, begun = lp.load(out / "s1"), heads(out)
    assert first.facts["status"] == "complete"
    assert not (out / "s2").exists()
    second = {head["facts"]["row"]["name"]: head["facts"] for head in begun if head["key"].startswith("s2/")}
    assert 0 < len(second) < 30
    _, stderr = probe("spectrum", *paths, "--out", out)
    assert f"resumed the interrupted run in {out}: {len(begun)} matrices were finished" in stderr
    pd.testing.assert_frame_equal(lp.load(out / "s1").table, first.table)
    whole = lp.load(out / "s2")
    seconds = whole.table.set_index("name")["seconds"]
    assert all(seconds[name] == facts["row"]["seconds"] for name, facts in second.items())
    assert whole.timeline.groupby("name")["phase"].agg(set).map(len).eq(3).all()
    assert len(whole.timeline) == 120  # noise before and after
    before = max(stop for facts in second.values() for _, _, stop in facts["times"])
    later = whole.timeline[~whole.timeline["name"].isin(second)]
    assert later["start_s"].min() >= before - 1e-6, "the clock goes on"
    for phase in ("read", "spectrum", "noise"):
        rows = whole.timeline[whole.timeline["phase"] == phase]
        assert whole.facts["seconds"][phase] == pytest.approx((rows["stop_s"] - rows["start_s"]).sum(), abs=1e-3)
    assert len(pd.read_parquet(out / "similarity.parquet")["name"].unique()) == 30
    assert not (out / ".unfinished").exists()
