"""A trajectory's directory: what is written comes back the same, and damage is named."""

import json
import shutil

import pytest
from refusals import refused
from steps import same
from test_cli import fails, probe

import lowrank_probe as lp
from lowrank_probe import runs


def test_round_trip(growing, tmp_path):
    found = lp.trajectory(*growing, exclude=["embed_tokens"], layers=(0, 0), labels=["α 1", "b", "-c"])
    loaded = lp.load(found.save(tmp_path / "run"))
    assert isinstance(loaded, lp.Trajectory)
    same(loaded, found)
    same(lp.load(loaded.save(tmp_path / "again")), found)
    for name in ("report.html", "α 1/report.html", "similarity.csv", "trajectory.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


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
