"""A budget's directory: what is read back is what was saved, and damage is one line."""

import json
import shutil

import pytest
from test_budgets import LLAMA_8B, TINY
from test_cli import fails, probe
from test_reports import without_scripts

import lowrank_probe as lp
from lowrank_probe.budgets import compare, sweep
from lowrank_probe.errors import CheckpointError
from lowrank_probe.measuring import measure_fake
from lowrank_probe.training_steps import Step


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(the run, its directory)."""
    found = (lp.budget(TINY, targets=["q", "v"], seq=64, batch=2),)
    measured = measure_fake(TINY, Step(batch=2, seq=64, targets=["q", "v"]))
    run = lp.BudgetRun(found, measured, 5, 2.5, "48GB")
    return run, run.save(tmp_path_factory.mktemp("runs") / "one")


def test_what_is_read_back_is_what_was_saved(saved):
    run, directory = saved
    again = lp.load(directory)
    assert isinstance(again, lp.BudgetRun)
    assert again == run
    assert again.budgets[0].changed(batch=4).total_bytes == run.budgets[0].changed(batch=4).total_bytes
    assert again.to_json() == run.to_json()
    assert again.price == 2.5
    assert set(again.table["priced_card"]) == {"48 GB card"}
    assert again.table.equals(run.table)
    assert set(again.figures) == {"bars", "phases", "ranks", "seqs"}
    assert "GiB on one card" in repr(again)
    told = json.loads((directory / "budget.json").read_text())
    assert told["measured"]["peaks"] == dict(run.measured.peaks)
    assert told["storage"]["n"] == 5
    assert told["price"] == {"card": "48 GB card", "one_card_an_hour": 2.5}
    assert told["budgets"][0]["price_per_hour"] == 2.5 * told["budgets"][0]["n_cards_priced"]


@pytest.mark.slow
def test_every_kind_of_run_is_read_back(tmp_path):
    shape = lp.budget(LLAMA_8B).shape
    spread = (lp.budget(LLAMA_8B, method="full", precision="mixed", gpus=8, fsdp=3),)
    for i, found in enumerate((compare(params="7B"), sweep(shape, ["lora", "full"], [4, 8], [32, 64]), spread)):
        run = lp.BudgetRun(found)
        assert lp.load(run.save(tmp_path / str(i))).budgets == found


def test_the_page_is_rebuilt_with_its_measurement(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "run")
    page = tmp_path / "run" / "report.html"
    first = page.read_text(encoding="utf-8")
    assert "What one real step took" in first
    assert "2 × 64 tokens, measured by fake tensors" in " ".join(without_scripts(first).split())
    page.unlink()
    stdout, _ = probe("report", tmp_path / "run")
    assert stdout == f"{page}\n"
    assert page.read_text(encoding="utf-8") == first


@pytest.mark.slow
def test_the_command_keeps_the_measurement(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    run = ("budget", tmp_path, "--method", "lora", "--seq", "64", "--measure", "--out", tmp_path / "out", "--json")
    told = json.loads(probe(*run)[0])
    again = lp.load(tmp_path / "out")
    assert dict(again.measured.peaks) == told["measured"]["peaks"]
    assert "What one real step took" in (tmp_path / "out" / "report.html").read_text()


def test_a_measurement_without_a_formula_is_on_the_page():
    config = {"model_type": "mamba", "vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1}
    measured = measure_fake(config, Step(method="full", seq=8))
    page = lp.BudgetRun((lp.budget(config, method="full"),), measured).page()
    assert "with the reserve a card needs" in " ".join(without_scripts(page).split())


def _cut(root):
    (root / "cards.csv").write_text("card")


def _gone(root):
    (root / "components.csv").unlink()


def _half(root):
    (root / "budget.json").write_text((root / "budget.json").read_text()[:500])


def _edited(**what):
    def act(root):
        told = json.loads((root / "budget.json").read_text())
        told["made_of"] |= what
        (root / "budget.json").write_text(json.dumps(told))

    return act


def _total(root):
    told = json.loads((root / "budget.json").read_text())
    told["budgets"][0]["total_bytes"] += 1
    (root / "budget.json").write_text(json.dumps(told))


def _old(root):
    told = json.loads((root / "budget.json").read_text())
    del told["made_of"]
    (root / "budget.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("damage", "said"),
    [(_cut, "cards.csv is not as it was written"), (_gone, "components.csv"), (_half, "budget.json"),
     (_edited(runs=[]), "holds no run"), (_edited(shape={"a": 1}), "budget.json"), (_edited(runs=[{}]), "budget.json"),
     (_edited(n_parameters="many"), "is not as it was written"), (_total, "other totals"), (_old, "made_of")],
)  # fmt: skip
def test_damage_is_one_line(saved, tmp_path, damage, said):
    root = tmp_path / "run"
    shutil.copytree(saved[1], root)
    damage(root)
    with pytest.raises(CheckpointError, match=said) as refused:
        lp.load(root)
    assert "\n" not in str(refused.value)


def test_damage_is_one_line_of_the_command_too(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "run")
    _cut(tmp_path / "run")
    fails("report", tmp_path / "run", words=["cards.csv is not as it was written"])
