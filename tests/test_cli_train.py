"""`probe train` as a process: what it prints, writes, refuses and exits with."""

import json

import pytest
from test_cli import fails, probe, stopped
from test_training import model, words

import lowrank_probe as lp

FAST = (
    "--rank", "1,4", "--targets", "mlp", "--seeds", 2, "--steps", 4, "--batch", 4, "--length", 32, "--evaluations", 1,
    "--lr", "full=3e-3,lora=1e-2", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    root = tmp_path_factory.mktemp("given")
    return model(root), "--data", words(root)


@pytest.fixture(scope="module")
def done(given, tmp_path_factory):
    """(directory, stdout, stderr) of a finished command."""
    out = tmp_path_factory.mktemp("done") / "run"
    return out, *probe("train", *given, *FAST, "--out", out)


def test_losses_verdicts_and_the_config_to_copy_are_printed(done):
    out, stdout, stderr = done
    found = lp.load(out)
    (line,) = [line.split() for line in stdout.splitlines() if line.split()[:2] == ["mlp", "0.01"]]
    adapters = found.runs[found.runs["rank"] > 0].groupby("rank")["loss"]
    assert line[2:] == [*(f"{loss:.4f}" for loss in adapters.mean()), f"{adapters.std().max():.4f}"]
    for row in found.verdict.itertuples():
        assert any(line.strip().startswith(row.layer_type) for line in stdout.splitlines())
    assert found.facts["recommendation"]["lora_config"] in stdout
    assert f"report: {out / 'report.html'}" in stderr


def test_the_same_command_again_prints_the_same_and_trains_nothing(given, done):
    out, stdout, _ = done
    before = [path.stat().st_mtime_ns for path in sorted(out.rglob("losses.npy"))]
    again, stderr = probe("train", *given, *FAST, "--out", out, "--quiet")
    assert again == stdout
    assert stderr == ""
    assert [path.stat().st_mtime_ns for path in sorted(out.rglob("losses.npy"))] == before


def test_json_is_one_object_and_the_report_is_made_again(given, done):
    out, _, _ = done
    told = json.loads(probe("train", *given, *FAST, "--out", out, "--quiet", "--json")[0])
    assert [row["label"] for row in told["runs"]][:3] == ["full-s0", "full-s1", "lora-r1-mlp-s0"]
    assert told["runs"][0]["alpha"] is None
    (out / "report.html").unlink()
    assert probe("report", out)[0].strip() == str(out / "report.html")
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_wrong_usage_exits_2_and_bad_input_1_and_nothing_stays(given, tmp_path):
    out = tmp_path / "run"
    told = {
        "--rank": ("1,x", "expected ranks such as 1,4,16"), "--precision": ("fp8", "expected fp32, bf16 or auto"),
        "--lr": ("lora=fast", "expected a method and its rate"), "--seeds": ("0", "--seeds"),
    }  # fmt: skip
    for option, (value, words_) in told.items():
        stderr = probe("train", *given, *FAST, option, value, "--out", out, code=2)[1]
        assert words_.split()[0] in stderr
        assert "Traceback" not in stderr
    fails("train", *given, *FAST, "--rank", "0", "--out", out, words=["rank 0", "at least 1"])
    fails("train", *given, *FAST, "--targets", "nope", "--out", out, words=["nope", "gate"])
    fails("train", *given, *FAST, "--variant", "lowra", "--out", out, words=["lowra", "rslora"])
    fails("train", given[0], "--data", tmp_path / "no.txt", *FAST, "--out", out, words=["no.txt", "cannot be read"])
    assert not out.exists()


@pytest.mark.slow
def test_ctrl_c_keeps_finished_runs_and_the_same_command_goes_on(given, tmp_path):
    out = tmp_path / "run"
    stdout, stderr = stopped("train", *given, *FAST, "--out", out, once=(out / "runs/full-s1/facts.json").exists)
    assert stdout == ""
    assert f"finished runs are kept in {out}; the same command with --out {out} resumes" in stderr
    assert not (out / "facts.json").exists()
    finished = (out / "runs/full-s0/facts.json").stat().st_mtime_ns
    probe("train", *given, *FAST, "--out", out, "--quiet")
    assert (out / "runs/full-s0/facts.json").stat().st_mtime_ns == finished
    assert len(lp.load(out).runs) == 2 + 2 * 2
