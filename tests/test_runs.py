"""Run directories: what is written comes back the same, and a failed write leaves nothing."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import build
from mounts import mounted
from pairs import llama_tensors, write

import lowrank_probe as lp
from lowrank_probe import CheckpointError, OutputError, outputs, runs

FILES = {
    "table.parquet", "table.csv", "summary.csv", "ledger.csv", "singular_values.parquet", "report.html", "facts.json",
    "timeline.csv",
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A real result with every kind of value: missing layers, names on one side only, quotes and commas, NaN."""
    tmp_path = tmp_path_factory.mktemp("pair")
    base = llama_tensors(dtype=torch.bfloat16)
    base |= {'odd, "name"\nof.weight': torch.randn(8, 8), "only.base": torch.ones(3), "NA": torch.ones(2)}
    tuned = {name: W + 0.05 * torch.randn_like(W) for name, W in base.items()} | {"only.tuned": torch.ones(3)}
    del tuned["only.base"]
    return lp.spectrum(write(tmp_path / "base", base), write(tmp_path / "tuned", tuned), exclude=["layers.1"])


def same(a, b):
    pd.testing.assert_frame_equal(a.table, b.table)
    pd.testing.assert_frame_equal(a.ledger, b.ledger)
    pd.testing.assert_frame_equal(a.summary, b.summary)
    for x, y in ((a.singular_values, b.singular_values), (a.denoised_values, b.denoised_values)):
        assert list(x) == list(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])
    assert runs.plain(a.facts) == runs.plain(b.facts)


def test_repr_is_short_and_a_notebook_shows_the_summary():
    result = build(layers=30)
    assert len(repr(result)) < 600
    assert repr(result).startswith("<Result: /models/SmolLM2-135M → /models/SmolLM2-135M-man-pages; 212 matrices: ")
    result.facts["findings"] = [{"kind": "x", "statement": "<b>bold</b>"}]
    shown = result._repr_html_()
    assert shown.startswith("<p>&lt;b&gt;bold&lt;/b&gt;</p><table")
    assert shown.count("<tr") == 1 + len(result.summary)
    assert len(shown) < 20_000


def test_round_trip_of_a_real_run(everything, tmp_path):
    assert everything.save(tmp_path / "run") == tmp_path / "run"
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES
    same(lp.load(tmp_path / "run"), everything)


@pytest.mark.parametrize("options", [{}, {"truncated": True}, {"layers": 1, "types": ("q",)}], ids=str)
def test_round_trip_of_synthetic_runs(tmp_path, options):
    result = build(**options)
    result.save(tmp_path / "run")
    loaded = lp.load(tmp_path / "run")
    pd.testing.assert_frame_equal(loaded.table, result.table)
    for name, s in result.singular_values.items():
        np.testing.assert_array_equal(loaded.singular_values[name], s)


def test_round_trip_of_an_empty_run(tmp_path):
    path = write(tmp_path / "m", llama_tensors())
    result = lp.spectrum(path, path)
    result.save(tmp_path / "run")
    loaded = lp.load(tmp_path / "run")
    assert loaded.table.empty
    assert list(loaded.table.columns) == list(result.table.columns)
    pd.testing.assert_frame_equal(loaded.ledger, result.ledger)
    assert loaded.singular_values == {}
    assert loaded.summary.empty


def test_round_trip_of_an_adapter_alone(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    factors = {"m.q_proj.lora_A.weight": torch.randn(2, 8), "m.q_proj.lora_B.weight": torch.randn(6, 2)}
    write(tmp_path / "a", factors)
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    result = lp.spectrum(tmp_path / "a")
    result.save(tmp_path / "run")
    same(lp.load(tmp_path / "run"), result)


def test_files_for_people_say_the_same(everything, tmp_path):
    everything.save(tmp_path)
    table = pd.read_csv(tmp_path / "table.csv")
    assert table["name"].tolist() == everything.table["name"].tolist()
    np.testing.assert_allclose(table["r90"], everything.table["r90"])
    assert pd.read_csv(tmp_path / "summary.csv")["verdict"].tolist() == everything.summary["verdict"].tolist()


def test_facts_say_what_was_compared(everything):
    facts = everything.facts
    assert facts["schema_version"] == runs.SCHEMA_VERSION
    assert facts["status"] == "complete"
    assert facts["options"]["exclude"] == ["layers.1"]
    for side in ("base", "tuned"):
        (file,) = facts[side]["files"]
        path = os.path.join(facts[side]["path"], file["name"])
        assert file["n_bytes"] == os.path.getsize(path)
        assert file["modified"].endswith("+00:00")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"]["type"] in ("cpu", "cuda")
    assert set(facts["seconds"]) == {"headers", "read", "spectrum", "noise"}
    assert all(seconds >= 0 for seconds in facts["seconds"].values())


def test_json_is_strict_and_complete(everything):
    def no(constant):
        pytest.fail(f"{constant} is not JSON")

    payload = json.loads(everything.to_json(), parse_constant=no)
    assert payload["schema_version"] == runs.SCHEMA_VERSION
    assert len(payload["table"]) == len(everything.table)
    assert len(payload["ledger"]) == len(everything.ledger)
    assert payload["table"][-1]["name"] == everything.table["name"].iloc[-1]
    assert json.loads(build().to_json(), parse_constant=no)["table"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None), (math.inf, None), (pd.NA, None), (np.float64("nan"), None), (np.int64(3), 3),
        (np.bool_(True), True), ((1, 2), [1, 2]), ({1: math.inf}, {"1": None}), (np.float32(0.5), 0.5),
    ],
    ids=str,
)  # fmt: skip
def test_plain(value, expected):
    assert runs.plain(value) == expected
    assert type(runs.plain(value)) is type(expected)


# ---------------------------------------------------------------------------------------------- reading damage


def test_load_of_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        lp.load(tmp_path)
    with pytest.raises(CheckpointError, match="not a run directory"):
        lp.load(tmp_path / "nope")


@pytest.mark.parametrize("file", sorted(FILES - {"facts.json", "table.csv", "summary.csv", "report.html"}))
@pytest.mark.parametrize("damage", ["missing", "text"])
def test_load_of_a_damaged_run(tmp_path, file, damage):
    build(layers=1, types=("q",)).save(tmp_path)
    (tmp_path / file).unlink()
    if damage == "text":
        (tmp_path / file).write_text("damaged\n")
    with pytest.raises(CheckpointError, match=f"not a complete run directory: {file}"):
        lp.load(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[]", "3", '{"schema_version": "1"}'])
def test_load_of_damaged_facts(tmp_path, text):
    build(layers=1, types=("q",)).save(tmp_path)
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: is not a complete run directory: facts.json: "):
        lp.load(tmp_path)


CUTS = {"half": 0.5, "one-line": None, "last-byte": -1}


@pytest.mark.parametrize("file", ["ledger.csv", "timeline.csv", "table.parquet", "singular_values.parquet"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_load_of_a_truncated_file(everything, tmp_path, file, cut):
    everything.save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    size = {None: whole.rstrip(b"\n").rfind(b"\n") + 1, 0.5: len(whole) // 2, -1: len(whole) - 1}[cut]
    (tmp_path / file).write_bytes(whole[:size])
    expected = f"{file} is not as it was written \\({size} bytes, expected {len(whole)}"
    with pytest.raises(CheckpointError, match=rf"is not a complete run directory: {expected}; truncated or edited\?\)"):
        lp.load(tmp_path)
    with pytest.raises(CheckpointError, match=expected):
        lp.report(tmp_path)


def test_load_of_a_file_edited_to_the_same_length(everything, tmp_path):
    everything.save(tmp_path)
    text = (tmp_path / "ledger.csv").read_text(encoding="utf-8")
    (tmp_path / "ledger.csv").write_text(text.replace("analysed", "excluded"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"ledger\.csv is not as it was written"):
        lp.load(tmp_path)


def test_a_run_without_checksums_is_read(everything, tmp_path):
    everything.save(tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert set(facts.pop("files")) == {"table.parquet", "ledger.csv", "timeline.csv", "singular_values.parquet"}
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    same(lp.load(tmp_path), everything)


def test_load_of_a_newer_schema(tmp_path):
    result = build(layers=1, types=("q",))
    replace(result, facts=result.facts | {"schema_version": runs.SCHEMA_VERSION + 1}).save(tmp_path)
    with pytest.raises(CheckpointError, match="newer lowrank_probe"):
        lp.load(tmp_path)


# ---------------------------------------------------------------------------------------------- whose directory


def test_an_absent_or_empty_directory_is_free(tmp_path):
    outputs.check_free(tmp_path / "new")
    outputs.check_free(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten(tmp_path):
    build(layers=1, types=("q",)).save(tmp_path)
    with pytest.raises(OutputError, match="already holds a finished run"):
        outputs.check_free(tmp_path)


def test_a_directory_of_something_else_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="is not empty"):
        outputs.check_free(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"is a file \(expected a directory\); choose another --out"):
        outputs.check_free(tmp_path / "file")


def test_an_output_below_a_file_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        outputs.check_free(tmp_path / "file" / "run")


# ---------------------------------------------------------------------------------------------- writing fails

LIMITED = """
import resource, sys
from builders import build
from mounts import mounted
import lowrank_probe as lp
result = build(layers=1, types=("q",))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    result.save(sys.argv[1])
except lp.OutputError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [100, 20_000, 200_000])
def test_a_write_that_fails_leaves_nothing(tmp_path, limit):
    # A limit on file sizes: the first file fails, or a middle one, or the report.
    tests = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "run"), str(limit)],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": tests},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert f"{tmp_path / 'run'}: cannot write " in done.stdout
    assert "choose another --out" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB."""
    with mounted(tmp_path / "small", "size=64k") as disk:
        yield disk


def test_no_space_is_told_and_leaves_nothing(full_disk):
    result = build(layers=1, types=("q",))
    with pytest.raises(
        OutputError, match=r"cannot write \S+: the disk is full; free some space or choose another --out"
    ):
        result.save(full_disk / "run")
    assert list(full_disk.iterdir()) == []


def test_no_space_keeps_what_an_interrupted_run_had_written(full_disk):
    (full_disk / "facts.json").write_text("{}")
    with pytest.raises(OutputError, match="the disk is full"):
        build(layers=1, types=("q",)).save(full_disk)
    assert [file.name for file in full_disk.iterdir()] == ["facts.json"]


def test_saving_twice_replaces(tmp_path):
    build(layers=2, types=("q",)).save(tmp_path)
    result = build(layers=1, types=("q",))
    result.save(tmp_path)
    pd.testing.assert_frame_equal(lp.load(tmp_path).table, result.table)


def test_a_run_without_spectra_comes_back(everything, tmp_path):
    result = replace(everything, singular_values={}, denoised_values={})
    back = lp.load(result.save(tmp_path / "run"))
    assert back.singular_values == {}
    pd.testing.assert_frame_equal(back.table, everything.table)


def test_spectra_are_read_by_pandas_as_plain_columns(everything, tmp_path):
    long = pd.read_parquet(everything.save(tmp_path / "run") / "singular_values.parquet")
    assert [str(kind) for kind in long.dtypes] == ["str", "int32", "float64", "float64"]
    first = long[long["name"] == next(iter(everything.singular_values))]
    np.testing.assert_array_equal(first["sigma"], next(iter(everything.singular_values.values())))
    assert list(first["index"]) == list(range(1, len(first) + 1))
