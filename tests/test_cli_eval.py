"""`probe eval` as a process: what it prints, writes, refuses and exits with."""

import json

import pandas as pd
import pytest
from evaluated import fine_tuned, saved, texts
from logs import kept
from test_cli import fails, probe, stopped

import lowrank_probe as lp

FAST = ("--length", 32, "--sequences", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    root = tmp_path_factory.mktemp("sides")
    return *saved(root, *fine_tuned()), "--data", texts(root)


@pytest.fixture(scope="module")
def done(sides, tmp_path_factory):
    """(directory, stdout, stderr) of a finished command."""
    out = tmp_path_factory.mktemp("done") / "run"
    return out, *probe("eval", *sides, *FAST, "--rank", "0,1,4,full", "--targets", "attention,mlp", "--out", out)


def test_the_table_names_every_group_with_its_rank(done):
    out, stdout, stderr = done
    found = lp.load(out)
    lines = {line.split("  ")[0].strip(): line.split() for line in stdout.splitlines() if line.strip()}
    for row in found.functional.to_dict("records"):
        name = {"alone": "only {}", "all": "all", "leave out": "all but {}"}[row["how"]].format(row["group"])
        told = lines[name][len(name.split()) :]
        assert told[:2] == [str(row["n_matrices"]), str(row["functional_rank"])]
        part = found.table[(found.table["group"] == row["group"]) & (found.table["how"] == row["how"])]
        assert told[4:] == [f"{loss:.4g}" for loss in part["loss"]]
    assert "base: 5." in stdout
    assert "5% of what tuned gained" in stdout
    assert "8 sequences of 32 tokens" in stdout
    assert "next-token loss, nats a token" in stdout
    assert f"report: {out / 'report.html'}" in stderr
    assert "attention" not in stderr


def test_without_a_grid_ranks_double_up_to_full(sides, tmp_path):
    stdout, stderr = probe("eval", *sides, *FAST, "--targets", "q", "--no-leave-out", "--out", tmp_path / "run")
    assert next(line for line in stdout.splitlines() if "truncated" in line).split()[-7:] == [
        "r0", "r1", "r2", "r4", "r8", "r16", "full",
    ]  # fmt: skip
    assert "left out" not in stderr  # ranks that nobody asked for


def test_the_files_are_those_of_the_library(done):
    out = done[0]
    names = ["facts.json", "functional.csv", "losses.npz", "report.html", "table.csv", "table.parquet"]
    assert sorted(path.name for path in out.iterdir()) == names
    found = lp.load(out)
    assert pd.read_csv(out / "table.csv")["loss"].tolist() == pytest.approx(found.table["loss"].tolist(), rel=1e-12)
    stdout, _ = probe("report", out)
    assert stdout.strip() == str(out / "report.html")


def test_json_is_one_object(sides, tmp_path):
    stdout, stderr = probe(
        "eval", *sides, *FAST, "--rank", "0,full", "--targets", "q", "--no-leave-out", "--json", "--quiet", cwd=tmp_path
    )
    told = json.loads(stdout)
    assert told["schema_version"] == 1
    assert told["facts"]["merit"] == "next-token loss"
    assert [row["how"] for row in told["table"]] == ["base", "tuned", "alone", "alone", "all", "all"]
    assert told["table"][0]["rank"] is None
    assert [row["group"] for row in told["functional"]] == ["q", "all"]
    assert stderr == ""
    (run,) = (tmp_path / "probe-runs").iterdir()  # named after the tuned side
    assert run.name.startswith("tuned-")


def test_wrong_usage_exits_2(sides, tmp_path):
    assert "expected ranks such as" in probe("eval", *sides, "--rank", "1,x", code=2, cwd=tmp_path)[1]
    assert "expected float32 or bfloat16" in probe("eval", *sides, "--dtype", "int8", code=2, cwd=tmp_path)[1]
    assert "--data" in probe("eval", *sides[:2], code=2, cwd=tmp_path)[1]
    assert not (tmp_path / "probe-runs").exists()


def test_bad_input_exits_1_and_leaves_nothing(sides, tmp_path):
    out = tmp_path / "run"
    fails("eval", *sides[:3], tmp_path / "no.txt", "--out", out, words=["no.txt", "cannot be read"])
    fails("eval", *sides, "--length", "99", "--out", out, words=["--length 99", "64 positions"])
    assert not out.exists()


def test_ctrl_c_keeps_what_is_finished(sides, tmp_path):
    out = tmp_path / "run"
    stdout, stderr = stopped("eval", *sides, *FAST, "--batch", 1, "--out", out, once=lambda: "state-00002" in kept(out))
    assert stdout == ""
    assert f"finished states are kept in {out}; the same command with --out {out} resumes" in stderr
    assert len(kept(out, "state-")) >= 3
