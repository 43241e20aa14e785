"""The command as a user has it: a real process, its exit code, its stdout, its stderr."""

import json
import math
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pairs import add_update, llama_tensors, pair, write

import lowrank_probe as lp
from lowrank_probe import cli, cli_shared

PROBE = Path(sys.executable).with_name("probe")
COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)
OPTIONS = {
    "spectrum": [
        "--out", "--include", "--exclude", "--layers", "--top", "--exact-tail", "--base-rounded", "--fail-on",
        "--device", "--memory", "--gpu-memory", "--ray", "--seed", "--json", "--open", "--quiet",
    ],
    "extract": [
        "--out", "--rank", "--energy", "--budget", "--denoised", "--max-rank", "--rank-multiple", "--targets",
        "--servable", "--tied-lora", "--dtype", "--include", "--exclude", "--layers", "--verify", "--data",
        "--calibration", "--device", "--memory", "--gpu-memory", "--ray", "--seed", "--json", "--quiet",
    ],
    "eval": [
        "--data", "--out", "--rank", "--targets", "--no-leave-out", "--tolerance", "--sequences", "--length",
        "--held-out", "--no-packing", "--batch", "--dtype", "--device", "--ray", "--seed", "--json", "--open",
        "--figures", "--quiet",
    ],
    "train": [
        "--data", "--out", "--rank", "--targets", "--seeds", "--variant", "--lr", "--steps", "--batch",
        "--accumulation", "--length", "--evaluations", "--alpha", "--held-out", "--no-packing", "--tolerance",
        "--precision", "--checkpointing", "--stop-on-nan", "--report-to", "--device", "--json", "--open", "--figures",
        "--quiet",
    ],
    "resize": [
        "--out", "--rank", "--energy", "--budget", "--max-rank", "--rank-multiple", "--dtype", "--json", "--quiet",
    ],
    "merge": ["--out", "--weight", "--dtype", "--verify", "--data", "--device", "--json", "--quiet"],
    "budget": [
        "--params", "--like", "--method", "--rank", "--targets", "--precision", "--optimizer", "--dtype", "--seq",
        "--batch", "--checkpointing", "--flash", "--loss", "--gpus", "--zero", "--fsdp", "--gpu", "--price",
        "--storage", "--explain", "--measure", "--out", "--json", "--quiet",
    ],
    "report": ["--open"],
    "demo": ["--out", "--seed", "--json", "--open", "--quiet"],
}  # fmt: skip


# One thread: BLAS threads that spin for each other crawl where the tests share their cores.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"} | {
    "COLUMNS": "160", "TERM": "xterm", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip


def probe(*arguments, cwd=None, code=0, **options):
    """(stdout, stderr) of `probe …`, after its exit code was checked."""
    done = subprocess.run(
        [PROBE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, env=ENVIRONMENT, **options
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def stopped(*arguments, once):
    """(stdout, stderr) of a command that gets Ctrl-C once `once()` is true, and tells so in a line."""
    process = subprocess.Popen(
        [str(PROBE), *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        while process.poll() is None and not once():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    return stdout, stderr


def fails(*arguments, words=(), code=1, **options):
    """A `ProbeError` in a process: one line on stderr, nothing on stdout, no traceback."""
    stdout, stderr = probe(*arguments, code=code, **options)
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert len(stderr.splitlines()) == 1
    for word in words:
        assert str(word) in stderr
    return stderr


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(base, tuned) of a small bf16 pair with a planted rank 4."""
    return pair(tmp_path_factory.mktemp("planted"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    """(run directory, stdout, stderr) of one finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, *probe("spectrum", *planted, "--out", out)


# ---------------------------------------------------------------------------------------------- help, usage


def test_every_command_is_in_the_help_and_here():
    stdout, stderr = probe("--help")
    assert sorted(OPTIONS) == COMMANDS
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", stdout)
    assert "--version" in stdout
    assert stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_ends_with_an_example(command):
    stdout, stderr = probe(command, "--help")
    for option in OPTIONS[command]:
        assert re.search(rf"(?<![\w-]){option}\b", stdout), option
    assert stdout.strip().splitlines()[-1].strip().startswith(f"Example: probe {command}")
    assert stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    stdout, _ = probe(command, "--help")
    for line in stdout.splitlines():
        if re.match(r"│\s+--", line):
            assert len(line.strip("│ ").split()) > 2, line


@pytest.mark.parametrize("command", [name for name, options in OPTIONS.items() if "--memory" in options])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lots", "is not understood; expected bytes such as 8GB"), ("8", "expected bytes such as 8GB"),
        ("7B", "a single B may be bytes or a billion"), ("800MB", "expected at least 1.5 GB"),
    ],
)  # fmt: skip
def test_memory_is_bytes(command, given, said):
    for option in ("--memory", "--gpu-memory"):
        stdout, stderr = probe(command, "base", "tuned", "--out", "x", option, given, code=2)
        told = " ".join(line.strip("│ ") for line in stderr.splitlines())
        assert f"'{given}'" in told
        assert said in told
        assert option in told
        assert stdout == ""


@pytest.mark.parametrize("command", [name for name, options in OPTIONS.items() if "--out" in options])
def test_out_has_one_short_form(command):
    assert re.search(r"--out\s+-o\s", probe(command, "--help")[0])


def test_the_examples_are_valid_usage(tmp_path):
    # They end in an error about the files, not in wrong usage.
    for command in ("spectrum", "extract", "resize", "merge", "report"):
        stdout, _ = probe(command, "--help")
        example = stdout.strip().splitlines()[-1].strip().removeprefix("Example: probe ")
        fails(*example.split(), cwd=tmp_path)


def test_version():
    assert probe("--version") == (f"{lp.__version__}\n", "")


def test_no_arguments_show_the_help():
    done = subprocess.run([PROBE], capture_output=True, text=True, check=False)
    assert "spectrum" in done.stdout + done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spectrum"], "base"),
        (["report", "a", "b"], "unexpected extra argument"),
        (["spectrum", "a", "b", "--layers", "x"], "expected a layer number or a range such as 0-3"),
        (["spectrum", "a", "b", "--layers", "3-0"], "--layers"),
        (["spectrum", "a", "b", "--top", "0"], "--top"),
        (["spectrum", "a", "b", "--top", "many"], "--top"),
        (["spectrum", "a", "b", "--top", "4", "--exact-tail"], "leave one of the two out"),
        (["spectrum", "a", "b", "c", "--exact-tail", "--top", "4"], "leave one of the two out"),
        (["spectrum", "a", "b", "--device", "gpu"], "expected auto, cpu, cuda, cuda:N or mps"),
        (["spectrum", "a", "b", "--device", "cuda:x"], "expected auto, cpu, cuda, cuda:N or mps"),
        (["spectrum", "a", "b", "--device", "xpu"], "--device"),
        (["spectrum", "a", "b", "--seed", "x"], "--seed"),
        (["spectrum", "a", "b", "--nope"], "--nope"),
        (["spectre", "a"], "spectre"),
        (["report"], "run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_2(arguments, words, tmp_path):
    stdout, stderr = probe(*arguments, code=2, cwd=tmp_path)
    assert stdout == ""
    assert words.lower() in stderr.lower()
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- results


def test_stdout_is_the_summary_and_stderr_the_rest(finished):
    out, stdout, stderr = finished
    summary = lp.load(out).summary
    for row in summary.to_dict("records"):
        assert re.search(rf"^ *{row['layer_type']} +{row['n_matrices']} .*{re.escape(row['verdict'])}", stdout, re.M)
    assert stdout.startswith("ledger: 9 analysed, 3 vector\n")
    assert stderr == f"report: {out / 'report.html'}\n", "no progress where there is no terminal"
    assert max(map(len, stdout.splitlines())) <= 120
    assert "\x1b" not in stdout


def test_the_run_directory_is_what_lp_spectrum_finds(finished, planted):
    result, loaded = lp.spectrum(*planted), lp.load(finished[0])
    pd.testing.assert_frame_equal(loaded.table.drop(columns="seconds"), result.table.drop(columns="seconds"))
    pd.testing.assert_frame_equal(loaded.ledger, result.ledger)
    assert (finished[0] / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_one_strict_object_and_the_default_directory_is_named_after_tuned(planted, tmp_path):
    stdout, stderr = probe("spectrum", *planted, "--json", "--top", "2", cwd=tmp_path)
    payload = json.loads(stdout, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert stdout.count("\n") == 1
    assert payload["schema_version"] == 1
    assert set(payload) == {"schema_version", "facts", "summary", "table", "ledger"}
    assert len(payload["table"]) == 9
    assert payload["table"][0]["layer"] is None
    (run,) = (tmp_path / "probe-runs").iterdir()
    assert re.fullmatch(r"tuned-\d{8}-\d{6}", run.name)
    assert stderr == f"report: {Path('probe-runs') / run.name / 'report.html'}\n"
    assert payload["facts"]["options"]["top"] == 2


def test_options_reach_the_library(planted, tmp_path):
    stdout, stderr = probe(
        "spectrum", *planted, "--out", tmp_path / "run", "--include", "q_proj", "--include", "*mlp*", "--exclude",
        "down_proj", "--layers", "1", "--exact-tail", "--base-rounded", "--device", "cpu", "--seed", "5", "--quiet",
        "--fail-on", "undecidable",
    )  # fmt: skip
    assert stderr == ""
    assert stdout.startswith("ledger: ")
    result = lp.load(tmp_path / "run")
    assert result.table["name"].tolist() == [
        "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight",
    ]  # fmt: skip
    assert set(result.table["method"]) == {"svd"}
    assert result.facts["options"] == {
        "include": ["q_proj", "*mlp*"], "exclude": ["down_proj"], "layers": [1, 1], "split": True, "top": None,
        "exact_tail": True, "base_rounded": True, "seed": 5,
    }  # fmt: skip


def test_identical_checkpoints_are_told_and_are_no_failure(planted, tmp_path):
    stdout, stderr = probe("spectrum", planted[0], planted[0], "--out", tmp_path / "run", "--fail-on", "undecidable")
    assert "The two checkpoints are identical in every tensor compared" in stdout
    assert "error" not in stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_what_was_not_compared_is_not_called_the_same(tmp_path):
    W = torch.randn(8, 4, 3)
    paths = write(tmp_path / "base", {"odd.weight": W}), write(tmp_path / "tuned", {"odd.weight": 2 * W})
    stdout, _ = probe("spectrum", *paths, "--out", tmp_path / "run")
    assert stdout.splitlines()[1] == "No matrix was compared: 1 not a matrix (see the ledger)."
    both = {"norm.weight": torch.ones(4), "odd.weight": W}
    paths = write(tmp_path / "base2", both), write(tmp_path / "tuned2", {key: 2 * value for key, value in both.items()})
    stdout, _ = probe("spectrum", *paths, "--out", tmp_path / "run2")
    assert "only 1 vector moved: nothing to analyse; not compared: 1 not a matrix" in stdout


def test_warnings_and_notes_go_to_stderr(tmp_path):
    base = write(tmp_path / "base", llama_tensors(1, seed=1))
    tuned = write(tmp_path / "tuned", {f"transformer.{name}": W for name, W in llama_tensors(1, seed=2).items()})
    stdout, stderr = probe("spectrum", base, tuned, "--out", tmp_path / "run")
    assert "unrelated weights" in stdout
    assert "note: " not in stdout
    warning, note, report = stderr.splitlines()
    assert warning.startswith("warning: unrelated checkpoints: the median cosine")
    assert note.startswith("note: 7 tensors matched after the prefix 'transformer.'")
    assert report.startswith("report: ")


def test_fail_on_undecidable_is_exit_3_after_a_complete_run(tmp_path):
    W = {"q_proj.weight": (0.02 * torch.randn(256, 256)).bfloat16()}
    swallowed = {"q_proj.weight": (W["q_proj.weight"].double() + 1e-7 * torch.randn(256, 256)).bfloat16()}
    swallowed["q_proj.weight"][:2] *= 1.01
    paths = write(tmp_path / "base", W), write(tmp_path / "tuned", swallowed)
    stdout, stderr = probe("spectrum", *paths, "--out", tmp_path / "run", "--fail-on", "undecidable", code=3)
    assert "undecidable" in stdout
    assert "--fail-on undecidable" in stderr
    assert len(lp.load(tmp_path / "run").table) == 1


def test_report_rebuilds_the_page(finished):
    out = finished[0]
    page = out / "report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    stdout, stderr = probe("report", out)
    assert (stdout, stderr) == (f"{page}\n", "")
    assert page.read_text(encoding="utf-8") == before


# ---------------------------------------------------------------------------------------------- errors


def test_a_missing_checkpoint(tmp_path):
    fails("spectrum", tmp_path / "nope", tmp_path / "none", words=["none: no such file or directory"], cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_no_wrong_usage(planted, tmp_path):
    words = ["--device cuda:63: found", "CUDA devices", "use --device cpu"]
    fails("spectrum", *planted, "--device", "cuda:63", cwd=tmp_path, words=words)
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_another_process_made_is_left_to_it(planted, tmp_path):
    now = time.time()
    taken = {f"tuned-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now + i))}" for i in range(-1, 120)}
    for name in taken:
        (tmp_path / "probe-runs" / name).mkdir(parents=True)
    probe("spectrum", *planted, "--top", "2", cwd=tmp_path)
    (run,) = [path for path in (tmp_path / "probe-runs").iterdir() if path.name not in taken]
    assert run.name.removesuffix("-2") in taken
    assert len(lp.load(run).table) == 9
    assert not any(any((tmp_path / "probe-runs" / name).iterdir()) for name in taken)


def test_runs_started_at_once_all_come_whole(planted, tmp_path):
    command = [PROBE, "spectrum", *map(str, planted), "--top", "2", "--quiet", "--seed"]
    seeds = ["1", "2", "3"]
    started = [subprocess.Popen([*command, seed], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
               for seed in seeds]  # fmt: skip
    assert [process.wait(120) for process in started] == [0, 0, 0]
    found = [lp.load(run) for run in (tmp_path / "probe-runs").iterdir()]
    assert sorted(str(result.facts["options"]["seed"]) for result in found) == seeds
    assert {len(result.table) for result in found} == {9}


def test_debug_shows_the_traceback(tmp_path):
    _, stderr = probe("--debug", "spectrum", tmp_path / "nope", tmp_path / "nope", code=1)
    assert "Traceback" in stderr
    assert "CheckpointError" in stderr


def test_nan_and_inf_are_named_with_their_file_and_only_what_is_finished_is_kept(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    base, tuned = llama_tensors(), add_update(llama_tensors())
    tuned[name][2, 3], tuned[name][4, 5] = math.nan, math.inf
    paths = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    words = [name, tmp_path / "tuned" / "model.safetensors", "1 NaN and 1 Inf", "--exclude"]
    fails("spectrum", *paths, "--out", tmp_path / "run", words=words)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".unfinished"]
    _, stderr = probe("spectrum", *paths, "--out", tmp_path / "run", "--exclude", name)
    assert "resumed the interrupted run" in stderr


def test_a_text_file_of_the_right_name(planted, tmp_path):
    (tmp_path / "model.safetensors").write_text("no weights here, only words")
    words = [tmp_path / "model.safetensors", "not a safetensors file"]
    fails("spectrum", planted[0], tmp_path, "--out", tmp_path / "run", words=words)
    assert not (tmp_path / "run").exists()


def test_an_output_in_use_is_refused(finished, planted):
    fails("spectrum", *planted, "--out", finished[0], words=["already holds a finished run", "another --out"])


def test_figures_that_cannot_be_written_are_told_before_the_work(planted, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = [tmp_path / "file", "is a file (expected a directory); choose another --figures"]
    fails("spectrum", *planted, "--out", tmp_path / "run", "--figures", tmp_path / "file" / "x", words=words)
    assert not (tmp_path / "run").exists()


def test_no_space_for_the_output(planted, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    words = [tmp_path / "a" / "run", "cannot write", "larger than a file may be here", "ulimit -f"]
    fails("spectrum", *planted, "--out", tmp_path / "a" / "run", words=words, preexec_fn=limit)
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == [".unfinished"]
    assert "resumed the interrupted run" in probe("spectrum", *planted, "--out", tmp_path / "a" / "run")[1]


def test_report_of_a_truncated_run(planted, tmp_path):
    probe("spectrum", *planted, "--out", tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_bytes()
    os.truncate(tmp_path / "run" / "ledger.csv", 200)
    words = [tmp_path / "run", "ledger.csv is not as it was written (200 bytes, expected ", "truncated"]
    fails("report", tmp_path / "run", words=words)
    assert (tmp_path / "run" / "report.html").read_bytes() == before


def test_report_of_no_run(tmp_path):
    fails("report", tmp_path, words=["not a run directory"])


def test_a_reader_that_goes_away_is_no_traceback(planted, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [PROBE, "spectrum", *planted, "--out", tmp_path / "run", "--json"],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert lp.load(tmp_path / "run").facts["status"] == "complete"


@pytest.mark.parametrize(("every_s", "lines"), [(0.0, ["pre-training: 20 %", "pre-training: 80 %"]), (1e6, [])])
def test_without_a_terminal_progress_is_a_line_now_and_then(every_s, lines, monkeypatch, capsys):
    monkeypatch.setattr(cli_shared, "EVERY_S", every_s)
    with cli_shared.progress_bar(False) as on_progress:
        for done in (10, 40):
            on_progress("pre-training", done, 50)
    with cli_shared.progress_bar(True) as on_progress:
        assert on_progress is None
    assert capsys.readouterr().err.splitlines() == lines


# ---------------------------------------------------------------------------------------------- Ctrl-C


def interrupted(*arguments, at):
    """(exit code, stdout, what the terminal showed): SIGINT once `at` is seen in the progress on a terminal."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [PROBE, *map(str, arguments)], stdout=subprocess.PIPE, stderr=end, text=True,
        env=ENVIRONMENT,
    )  # fmt: skip
    os.close(end)
    shown, sent, deadline = "", False, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.05)[0]:
                try:
                    shown += os.read(terminal, 65536).decode(errors="replace")
                except OSError:  # the process has closed its side
                    break
            elif process.poll() is not None:
                break
            if not sent and re.search(at, shown):
                process.send_signal(signal.SIGINT)
                sent = True
        stdout = process.communicate(timeout=30)[0]
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert sent, f"{at} was not seen: {shown}"
    return process.returncode, stdout, shown


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """40 matrices, a few seconds of work even on an idle machine."""
    directory = tmp_path_factory.mktemp("long")
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for i in range(40):
        W = 0.02 * torch.randn(768, 896, generator=generator)
        base[f"model.layers.{i}.mlp.up_proj.weight"] = W.bfloat16()
        update = torch.randn(768, 4, generator=generator) @ torch.randn(4, 896, generator=generator)
        tuned[f"model.layers.{i}.mlp.up_proj.weight"] = (W.bfloat16() + 2e-4 * update).bfloat16()
    return write(directory / "base", base), write(directory / "tuned", tuned)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_resumes(long_pair, tmp_path):
    out = tmp_path / "run"
    code, stdout, shown = interrupted("spectrum", *long_pair, "--out", out, at=r"layers\.\d+\.mlp.*%")
    assert code == 130
    assert stdout == ""
    assert "Traceback" not in shown
    found = re.search(r"interrupted: (\d+) finished matrices kept in", shown.replace("\r\n", ""))
    part = lp.load(out)
    assert part.facts["status"] == "interrupted"
    assert found is not None
    assert int(found[1]) == len(part.table)
    assert 0 < len(part.table) < 40
    assert part.facts["counts"] == {"analysed": len(part.table), "pending": 40 - len(part.table)}

    fails(
        "spectrum",
        *long_pair,
        "--out",
        out,
        "--seed",
        "1",
        "--quiet",
        words=["the unfinished work of another run (options.seed: 0 there, 1 here)"],
    )
    assert lp.load(out).facts["status"] == "interrupted"

    stdout, stderr = probe("spectrum", *long_pair, "--out", out)
    assert f"resumed the interrupted run in {out}" in stderr
    whole_stdout, _ = probe("spectrum", *long_pair, "--out", tmp_path / "whole")
    assert stdout == whole_stdout
    resumed, whole = lp.load(out), lp.load(tmp_path / "whole")
    assert resumed.facts["status"] == "complete"
    pd.testing.assert_frame_equal(resumed.table.drop(columns="seconds"), whole.table.drop(columns="seconds"))
    pd.testing.assert_frame_equal(resumed.ledger, whole.ledger)
    for name, s in whole.singular_values.items():
        np.testing.assert_array_equal(resumed.singular_values[name], s)
    # what was finished before the interruption was not computed again
    kept = resumed.table.set_index("name")["seconds"]
    assert (kept[part.table["name"]].to_numpy() == part.table["seconds"].to_numpy()).all()
