"""The demo's pair: proper checkpoints, learned, repeatable, cached, and never half-written."""

import json
from pathlib import Path

import pytest
import torch

from lowrank_probe import demo_text, demo_training, demos
from lowrank_probe.demo_training import Recipe
from lowrank_probe.demos import demo, train_pair
from lowrank_probe.errors import OutputError, ProbeError

TINY = Recipe(
    hidden=32,
    layers=2,
    heads=2,
    kv_heads=1,
    intermediate=48,
    vocabulary=400,
    length=32,
    batch=4,
    base_steps=25,
    tuned_steps=25,
    tuned_lr=3e-3,
    code_chars=200_000,
    prose_chars=60_000,
)
FILES = ("base/model.safetensors", "base/config.json", "base/tokenizer.json", "finetuned/model.safetensors")


class Stop(BaseException):
    """Stands for Ctrl-C: not an Exception."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "pair"
    calls = []
    paths = train_pair(out, recipe=TINY, on_progress=lambda *told: calls.append(told))
    return out, paths, calls


def test_both_sides_load_through_transformers(pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, paths, _ = pair
    for path in paths:
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.bfloat16
        assert model.config.num_key_value_heads == 1
        tokenizer = AutoTokenizer.from_pretrained(path)
        text = "def f(x):\n    return x  # é\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == text
        assert torch.isfinite(model(input_ids=ids).logits).all()


def test_fine_tune_learned_and_moved_every_matrix(pair):
    from safetensors.torch import load_file

    out, (base, tuned), _ = pair
    facts = json.loads((out / "pair.json").read_text())
    assert facts["loss_prose_after"] < facts["loss_prose_before"] - 0.05
    assert facts["seed"] == 0
    assert facts["versions"]["torch"] == torch.__version__
    before, after = (load_file(p / "model.safetensors") for p in (base, tuned))
    assert before.keys() == after.keys()
    assert "lm_head.weight" in before
    assert all(not torch.equal(before[name], after[name]) for name in before if before[name].ndim == 2)


def test_stated_loss_is_that_of_the_stored_weights(pair):
    from transformers import AutoModelForCausalLM

    out, (_, tuned), _ = pair
    tokenizer = demo_training._train_tokenizer(demo_text.read_code(TINY.code_chars), TINY.vocabulary)
    _, held = demo_training._blocks(tokenizer, demo_text.read_prose(TINY.prose_chars), TINY.length)
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    stated = json.loads((out / "pair.json").read_text())["loss_prose_after"]
    assert demo_training._loss(model, held, demos._silent) == pytest.approx(stated, abs=1e-4)


def test_progress_reaches_the_end_of_every_phase(pair):
    _, _, calls = pair
    phases = list(dict.fromkeys(phase for phase, _, _ in calls))
    assert phases == ["reading text", "training tokenizer", "pre-training", "evaluating", "fine-tuning"]
    for phase in phases:
        assert any(done == total for told, done, total in calls if told == phase)


def test_same_seed_gives_the_same_bytes_and_leaves_torch_as_it_was(pair, tmp_path):
    out, _, _ = pair
    torch.manual_seed(77)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train_pair(tmp_path / "again", recipe=TINY)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


def test_another_seed_gives_another_pair(pair, tmp_path):
    out, _, _ = pair
    base, tuned = train_pair(tmp_path / "other", seed=1, recipe=TINY)
    for path in (base, tuned):
        ours = (path / "model.safetensors").read_bytes()
        assert ours != (out / path.name / "model.safetensors").read_bytes()
    assert (base / "tokenizer.json").read_bytes() == (out / "base" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("phase", ["pre-training", "fine-tuning"])
def test_interrupted_training_leaves_nothing(tmp_path, monkeypatch, phase):
    monkeypatch.setenv("LOWRANK_PROBE_CACHE", str(tmp_path / "cache"))

    def stop(told, done, total):
        if told == phase and done == 3:
            raise Stop

    with pytest.raises(Stop):
        train_pair(tmp_path / "pair", recipe=TINY, on_progress=stop)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Stop):
        demos._cached_pair(0, TINY, demos._key(0, TINY), stop)
    assert list(tmp_path.iterdir()) == []


def test_cached_pair_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_PROBE_CACHE", str(tmp_path))
    key = demos._key(0, TINY)
    calls = []
    first = demos._cached_pair(0, TINY, key, lambda *told: calls.append(told))
    assert calls
    calls.clear()
    assert demos._cached_pair(0, TINY, key, lambda *told: calls.append(told)) == first == tmp_path / key
    assert not calls
    assert sorted(p.name for p in tmp_path.iterdir()) == [key]
    (first / "finetuned" / "model.safetensors").unlink()  # damaged: made anew
    demos._cached_pair(0, TINY, key, lambda *told: calls.append(told))
    assert calls
    assert demos._is_pair(first, key)


def test_demo_keeps_pair_and_run_where_asked_and_trains_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_PROBE_CACHE", str(tmp_path / "cache"))
    result = demo(recipe=TINY)
    told = result.facts["demo"]
    assert told["run"].startswith(str(tmp_path / "cache"))
    for name in ("base", "finetuned", "run", "report"):
        assert Path(told[name]).exists(), name
    phases = set()
    for _ in range(2):  # the second time `out` is this demo's own
        again = demo(tmp_path / "out", recipe=TINY, on_progress=lambda phase, done, total: phases.add(phase))
        assert again.facts["demo"]["report"] == str(tmp_path / "out" / "run" / "report.html")
    assert "pre-training" not in phases
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["base", "finetuned", "pair.json", "run"]
    assert again.table.r90.tolist() == result.table.r90.tolist()


def test_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        train_pair(tmp_path, recipe=TINY)
    with pytest.raises(OutputError, match="not empty"):
        demos._check_out(tmp_path, "key")
    with pytest.raises(OutputError, match="is a file"):
        demos._check_out(tmp_path / "thesis.tex", "key")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_cache_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWRANK_PROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="LOWRANK_PROBE_CACHE"):
        demos._cached_pair(0, TINY, demos._key(0, TINY), None)


def test_python_without_its_source_is_named(tmp_path, monkeypatch):
    (tmp_path / "only.py").write_text("x = 1\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ProbeError, match=r"source, the demo needs"):
        demo_text.read_code(1_000_000)


def test_prose_repeats_no_paragraph():
    paragraphs = [p for text in demo_text.read_prose(10**9) for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
