"""A run that is killed at any point and started again: what was finished is taken, and it ends in the same files."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from logs import kept
from pairs import pair, sides
from safetensors.torch import load_file, save_file
from test_cli import ENVIRONMENT, fails, probe

import lowrank_probe as lp
from lowrank_probe import OutputError, spectrum_work
from lowrank_probe.outputs import is_unfinished
from lowrank_probe.unfinished import Unfinished

BYTES = ("ledger.csv", "summary.csv", "singular_values.parquet")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("planted"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    """(result, run directory) of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return lp.spectrum(*planted, out=out), out


def stop_after(n):
    """A progress callback that is Ctrl-C after n matrices."""

    def on_progress(name, done, total):
        nonlocal n
        n -= 1
        if n == 0:
            raise KeyboardInterrupt

    return on_progress


def stopped(planted, out, n=4, **options):
    """A run in `out` that was stopped after n matrices; their names in that order."""
    with pytest.raises(lp.Interrupted):
        lp.spectrum(*planted, out=out, on_progress=stop_after(n), **options)
    names = kept(out)
    assert len(names) == n
    return names


def same(a, b):
    """Two run directories of the same answer."""
    assert sorted(path.name for path in a.iterdir()) == sorted(path.name for path in b.iterdir())
    for name in BYTES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, other = lp.load(a), lp.load(b)
    pd.testing.assert_frame_equal(one.table.drop(columns="seconds"), other.table.drop(columns="seconds"))
    clock = ("time", "seconds", "resumed")
    facts = [{key: value for key, value in run.facts.items() if key not in clock} for run in (one, other)]
    assert facts[0] == facts[1]


def resumed(planted, out, **options):
    """(result, names of the matrices that were read) of a run that goes on."""
    read, read_pair = [], spectrum_work.read_pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectrum_work, "read_pair", lambda one, *rest: (read.append(one.key), read_pair(one, *rest))[1])
        return lp.spectrum(*planted, out=out, **options), read


# ---------------------------------------------------------------------------------------------- the store


def test_what_is_kept_comes_back_to_the_last_bit(tmp_path):
    facts = {
        "float": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf, "none": None, "yes": np.bool_(True),
        "numpy": np.float64(1) / 3, "int": np.int64(2**60), "text": 'é"\n', "list": [1, [2.5]],
    }  # fmt: skip
    tensors = {
        "a": torch.randn(5, 7, dtype=torch.float64), "b": torch.randn(6, 3).bfloat16(), "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 5).T,
    }  # fmt: skip
    Unfinished(tmp_path, {"x": 1}).put("one", tensors, facts)
    store = Unfinished(tmp_path, {"x": 1})
    assert store.resumed == {"n_finished": 1, "n_damaged": 0}
    back = store.facts("one")
    assert math.isnan(back.pop("nan"))
    assert back == {key: value for key, value in facts.items() if key != "nan"}
    assert type(back["yes"]) is bool
    assert store.names("one") == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(store.get("one", name), tensor)
        assert store.get("one", name).dtype == tensor.dtype
    assert torch.equal(store.get("one", "a", 1, 3), tensors["a"][1:4])
    assert torch.equal(store.get("one", "b", 4, 2), tensors["b"][4:])
    store.put("one", {}, {"again": 1})
    assert Unfinished(tmp_path, {"x": 1}).facts("one") == {"again": 1}


def test_the_first_difference_is_named(tmp_path):
    Unfinished(tmp_path, {"sides": [{"path": "a"}, {"path": "b"}], "options": {"seed": 0, "top": None}})
    for other, told in (
        (
            {"sides": [{"path": "a"}, {"path": "c"}], "options": {"seed": 0, "top": None}},
            "sides.1.path: b there, c here",
        ),
        (
            {"sides": [{"path": "a"}, {"path": "b"}], "options": {"seed": 0, "top": 8}},
            "options.top: null there, 8 here",
        ),
        ({"sides": [{"path": "a"}], "options": {"seed": 0, "top": None}}, "sides: "),
        ({"options": {"seed": 0, "top": None}}, "sides: "),
    ):
        with pytest.raises(OutputError) as caught:
            Unfinished(tmp_path, other)
        assert f"{tmp_path}: holds the unfinished work of another run ({told}" in str(caught.value)
        assert str(caught.value).endswith(f"; choose another --out, or remove {tmp_path / '.unfinished'}")


@pytest.mark.parametrize("last", ["facts.json", "trajectory.json", "probe/facts.json"])
def test_while_it_goes_on_nothing_looks_finished(tmp_path, last):
    Unfinished(tmp_path / "run", {"x": 1})
    file = tmp_path / "run" / last
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(OutputError, match="another run"):
        Unfinished(tmp_path / "run", {"x": 2})
    assert file.exists()
    Unfinished(tmp_path / "run", {"x": 1})
    assert not file.exists()


# ---------------------------------------------------------------------------------------------- one pair


@pytest.mark.parametrize("n", [1, 4, 11])
def test_a_run_goes_on_and_computes_only_what_is_missing(planted, whole, tmp_path, n):
    names = stopped(planted, tmp_path / "run", n)
    with pytest.raises(lp.CheckpointError, match=r"is an unfinished run; the same command with --out .* finishes it"):
        lp.load(tmp_path / "run")
    result, read = resumed(planted, tmp_path / "run")
    assert sorted([*names, *read]) == sorted(whole[0].ledger["name"])
    assert result.facts["resumed"] == {"n_finished": n, "n_damaged": 0}
    same(tmp_path / "run", whole[1])
    with pytest.raises(OutputError, match="already holds a finished run"):
        lp.spectrum(*planted, out=tmp_path / "run")


def test_what_ctrl_c_hands_over_can_be_saved(planted, tmp_path):
    with pytest.raises(lp.Interrupted) as caught:
        lp.spectrum(*planted, on_progress=stop_after(3))
    part = lp.load(caught.value.result.save(tmp_path / "part"))
    assert part.facts["status"] == "interrupted"
    assert (part.ledger["status"] == "pending").sum() == 9


@pytest.mark.parametrize("left", [0.2, 0.5, 0.95])
def test_a_log_that_was_cut_loses_its_last_record_only(planted, whole, tmp_path, left):
    stopped(planted, tmp_path / "run", 8)
    log = tmp_path / "run" / ".unfinished" / "log"
    log.write_bytes(log.read_bytes()[: int(left * log.stat().st_size)])
    names = kept(tmp_path / "run")
    assert len(names) < 8
    result, read = resumed(planted, tmp_path / "run")
    assert len(read) == 12 - len(names)
    assert result.facts.get("resumed", {"n_damaged": 0})["n_damaged"] == 0
    same(tmp_path / "run", whole[1])


def test_a_damaged_record_is_noticed_and_its_matrix_is_done_again(planted, whole, tmp_path):
    names = stopped(planted, tmp_path / "run", 8)
    log = tmp_path / "run" / ".unfinished" / "log"
    data = bytearray(log.read_bytes())
    data[data.index(f'"key":"{names[3]}"'.encode()) + 20] ^= 1
    log.write_bytes(data)
    shutil.copytree(tmp_path / "run", tmp_path / "command")
    result, read = resumed(planted, tmp_path / "run")
    assert len(read) == 5
    assert names[3] in read
    assert result.facts["resumed"] == {"n_finished": 7, "n_damaged": 1}
    same(tmp_path / "run", whole[1])


def test_a_log_without_its_beginning_is_refused(planted, tmp_path):
    stopped(planted, tmp_path / "run")
    log = tmp_path / "run" / ".unfinished" / "log"
    data = bytearray(log.read_bytes())
    data[60] ^= 1
    log.write_bytes(data)
    with pytest.raises(OutputError, match=r"beginning of its unfinished work is damaged; remove .*/\.unfinished$"):
        lp.spectrum(*planted, out=tmp_path / "run")


@pytest.mark.parametrize(
    "options", [{"top": 3}, {"seed": 1}, {"exact_tail": True}, {"split": False}, {"base_rounded": True}], ids=str
)
def test_other_options_are_refused(planted, tmp_path, options):
    stopped(planted, tmp_path / "run", 2)
    ((name, _),) = options.items()
    with pytest.raises(OutputError, match=rf"unfinished work of another run \(options\.{name}: .* there, .* here\)"):
        lp.spectrum(*planted, out=tmp_path / "run", **options)
    assert len(kept(tmp_path / "run")) == 2


def test_what_is_finished_holds_for_another_selection(planted, tmp_path):
    names = stopped(planted, tmp_path / "run", 8)
    _, read = resumed(planted, tmp_path / "run", exclude=["layers.1"])
    assert not set(read) & set(names)
    lp.spectrum(*planted, out=tmp_path / "whole", exclude=["layers.1"])
    same(tmp_path / "run", tmp_path / "whole")


def test_tied_matrices_are_found_anew_for_another_selection(tmp_path):
    generator = torch.Generator().manual_seed(0)
    W, D = torch.randn(40, 24, generator=generator), torch.randn(40, 24, generator=generator)
    names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    base, tuned = (dict(zip(names, M.repeat(3, 1, 1).unbind(), strict=True)) for M in (W, W + 0.1 * D))
    paths = sides(
        tmp_path, {n: M.clone() for n, M in base.items()}, {n: M.clone() for n, M in tuned.items()}
    )  # fmt: skip
    stopped(paths, tmp_path / "run", 1, exclude=["embed_tokens"])
    with pytest.raises(lp.Interrupted):
        lp.spectrum(*paths, out=tmp_path / "run", exclude=["embed_tokens"], on_progress=stop_after(1))
    assert set(kept(tmp_path / "run")) == set(names[1:])
    result = lp.spectrum(*paths, out=tmp_path / "run")
    assert dict(zip(result.ledger["name"], result.ledger["status"], strict=True))["lm_head.weight"] == "tied"
    lp.spectrum(*paths, out=tmp_path / "whole")
    same(tmp_path / "run", tmp_path / "whole")


def touch(base, tuned):
    stat = (tuned / "model.safetensors").stat()
    os.utime(tuned / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))


def rename(base, tuned):
    """Two tensors change places: the same size, and the time set back."""
    file = tuned / "model.safetensors"
    stat, data = file.stat(), file.read_bytes()
    a, b = b"layers.0.self_attn.q_proj", b"layers.1.self_attn.q_proj"
    file.write_bytes(data.replace(a, b"X" * len(a), 1).replace(b, a, 1).replace(b"X" * len(a), b, 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def configure(base, tuned):
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 3}))


@pytest.mark.parametrize("change", [touch, rename, configure])
def test_files_that_changed_are_refused(tmp_path, change):
    paths = pair(tmp_path)
    stopped(paths, tmp_path / "run", 2)
    change(*paths)
    with pytest.raises(
        OutputError, match=r"unfinished work of another run \((base|tuned)\.(files\.0\.modified|header): "
    ):
        lp.spectrum(*paths, out=tmp_path / "run")


def test_another_device_or_version_is_refused(planted, tmp_path, monkeypatch):
    stopped(planted, tmp_path / "run", 2)
    monkeypatch.setattr("lowrank_probe.facts.__version__", "9.9")
    with pytest.raises(OutputError, match=r"\(versions.lowrank_probe: .* there, 9.9 here\)"):
        lp.spectrum(*planted, out=tmp_path / "run")


def test_a_model_in_memory_is_not_known_again(tmp_path):
    base = {"a.weight": torch.randn(8, 6), "b.weight": torch.randn(8, 6)}
    tuned = {name: W + 1 for name, W in base.items()}
    stopped((base, tuned), tmp_path / "run", 1)
    with pytest.raises(OutputError, match=r"another run \(run: "):
        lp.spectrum(base, tuned, out=tmp_path / "run")


def test_an_output_where_another_process_works_is_refused(planted, tmp_path):
    stopped(planted, tmp_path / "run", 2)
    other = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "run" / ".unfinished" / "owner").write_text(f"{os.uname().nodename} {other.pid}")
        line = f"process {other.pid} is at work there; choose another --out"
        fails("spectrum", *planted, "--out", tmp_path / "run", words=[line])
    finally:
        other.kill()
        other.wait()
    lp.spectrum(*planted, out=tmp_path / "run")


def test_a_disk_that_is_full_says_so_and_keeps_what_was_finished(planted, tmp_path, monkeypatch):
    write, left = os.pwrite, [4]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"\.unfinished: cannot write log: the disk is full; free some space or"):
        lp.spectrum(*planted, out=tmp_path / "run")
    monkeypatch.undo()
    _, read = resumed(planted, tmp_path / "run")
    assert len(read) == 12 - 3


# ---------------------------------------------------------------------------------------------- killed

AT = """
import os, signal, sys
from lowrank_probe import outputs, record_log, reports, spectrum_work, trajectory_work, unfinished

def die(*arguments, **more):
    os.kill(os.getpid(), signal.SIGKILL)

def half(fd, data, at):
    write(fd, data[: len(data) // 2], at)
    die()

def after(n, function, last=die):
    count = 0
    def call(*arguments, **more):
        nonlocal count
        count += 1
        return last(*arguments, **more) if count > n else function(*arguments, **more)
    return call

where, write = sys.argv.pop(1), os.pwrite
if where == "owning":
    record_log.RecordLog.__init__ = die
elif where == "beginning":
    os.pwrite = half
elif where == "computing":
    spectrum_work.analyse = after(5, spectrum_work.analyse)
elif where == "comparing":
    trajectory_work.similarity_rows = after(5, trajectory_work.similarity_rows)
elif where == "appending":
    os.pwrite = after(6, os.pwrite, half)
elif where == "writing":
    reports.render = die
elif where.startswith("renaming"):
    os.replace = after(int(where[8:]), os.replace)
elif where == "removing":
    unfinished.Unfinished.remove = die
elif where == "removed":
    unfinished.Unfinished.remove = lambda store: ((store.folder / "log").unlink(), die())
from lowrank_probe.cli import main
main()
"""


def killed_at(where, *arguments, cwd=None, environment=os.environ):
    """Run `probe …` until it kills itself there."""
    command = [sys.executable, "-c", AT, where, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("where", "n_kept"),
    [
        ("owning", 0), ("beginning", 0), ("computing", 5), ("appending", 5), ("writing", 12), ("renaming1", 12),
        ("renaming7", 12), ("removing", 12), ("removed", 0),
    ],
)  # fmt: skip
def test_killed_anywhere_it_ends_in_the_same_files(planted, whole, tmp_path, where, n_kept):
    killed_at(where, "spectrum", *planted, "--out", tmp_path / "run")
    assert len(kept(tmp_path / "run")) == n_kept
    if not where.startswith("remov"):  # then the run is whole
        with pytest.raises(lp.CheckpointError):
            lp.load(tmp_path / "run")
    if where == "removed":
        with pytest.raises(OutputError, match="already holds a finished run"):
            lp.spectrum(*planted, out=tmp_path / "run")
    else:
        _, read = resumed(planted, tmp_path / "run")
        assert len(read) == 12 - n_kept
    same(tmp_path / "run", whole[1])


def test_a_default_directory_is_resumed_by_its_name(planted, whole, tmp_path):
    killed_at("computing", "spectrum", *planted, cwd=tmp_path, environment=ENVIRONMENT)
    (run,) = (tmp_path / "probe-runs").iterdir()
    _, stderr = probe("spectrum", *planted, "--out", Path("probe-runs") / run.name, cwd=tmp_path)
    assert "probe-runs/" in stderr
    assert ": 5 matrices were finished" in stderr
    assert not is_unfinished(run)


@pytest.mark.slow
def test_a_failed_run_leaves_its_work_in_out_and_nothing_in_a_default_directory(tmp_path):
    base, tuned = pair(tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors = load_file(tuned / "model.safetensors")
    save_file(tensors | {name: tensors[name] * math.nan}, tuned / "model.safetensors")
    fails("spectrum", base, tuned, words=[name, "NaN"], cwd=tmp_path)
    assert not (tmp_path / "probe-runs").exists()
    fails("spectrum", base, tuned, "--out", tmp_path / "run", words=[name, "NaN"])
    n_kept = len(kept(tmp_path / "run"))
    _, stderr = probe("spectrum", base, tuned, "--out", tmp_path / "run", "--exclude", "layers.1.self_attn.k_proj")
    assert f"{n_kept} matrices were finished" in stderr


# ---------------------------------------------------------------------------------------------- several steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "n_kept"), [("computing", 5), ("renaming3", 12), ("comparing", 36 + 5), ("renaming30", 36 + 9)]
)
def test_a_trajectory_killed_anywhere_ends_in_the_same_files(growing, saved, tmp_path, where, n_kept):
    killed_at(where, "spectrum", growing[0], *growing[1], "--out", tmp_path / "run", environment=ENVIRONMENT)
    assert len(kept(tmp_path / "run")) == n_kept
    with pytest.raises(lp.CheckpointError):
        lp.load(tmp_path / "run")
    _, stderr = probe("spectrum", growing[0], *growing[1], "--out", tmp_path / "run")
    assert f": {n_kept} matrices were finished" in stderr
    for label in ("checkpoint-100", "checkpoint-200", "checkpoint-300"):
        same(tmp_path / "run" / label, saved[0] / label)
    for name in ("trajectory.csv", "similarity.parquet", "amplification.parquet", "amplification.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (saved[0] / name).read_bytes(), name
    names = [sorted(path.name for path in run.iterdir()) for run in (tmp_path / "run", saved[0])]
    assert names[0] == names[1]


@pytest.mark.parametrize("values", [np.empty(0), np.arange(6.0)[::-2], np.arange(3, dtype=np.float32)], ids=str)
def test_arrays_come_back_as_float64(tmp_path, values):
    store = Unfinished(tmp_path / "run", {})
    store.put("a", {"values": values, "mask": torch.arange(6.0).reshape(2, 3).T}, {"n": np.int64(3)})
    again = Unfinished(tmp_path / "run", {})
    for one in (store, again):
        assert one.get("a", "values").dtype == torch.float64
        assert one.get("a", "values").tolist() == values.tolist()
        assert torch.equal(one.get("a", "mask"), torch.arange(6.0).reshape(2, 3).T)
        assert one.facts("a") == {"n": 3}
