"""A budget's figures and page: what is drawn is the budget's, nothing comes from elsewhere, hostile names stay text."""

import re
from dataclasses import replace

import pytest
from test_budgets import LLAMA_8B, TINY
from test_reports import HOSTILE, data, without_scripts

import lowrank_probe as lp
from lowrank_probe import budget_figures, budget_reports, columns
from lowrank_probe.accelerators import accelerators, find_accelerator
from lowrank_probe.budget_figures import PARTS, bars_spec, budget_specs, chosen, phases_spec, rank_spec, seq_spec
from lowrank_probe.budget_fits import least_cards
from lowrank_probe.budget_words import Price, run_names
from lowrank_probe.budgets import compare, sweep
from lowrank_probe.errors import OutputError


@pytest.fixture(scope="module")
def budgets():
    return compare(LLAMA_8B, seq=2048)


@pytest.fixture(scope="module")
def page(budgets):
    return budget_reports.render(budgets, 50)


def test_every_component_has_a_colour_of_its_own():
    runs = [
        *compare(LLAMA_8B, seq=128),
        lp.budget(LLAMA_8B, method="full", optimizer="adamw-foreach", seq=128, gpus=2),
        lp.budget(LLAMA_8B, method="full", precision="mixed", gpus=8, fsdp=3),
    ]
    names = {one.name for found in runs for one in found.components}
    assert names == set(PARTS)
    assert len({colour for part, colour in PARTS.items() if part not in ("fp32 master weights",)}) == len(PARTS) - 1


def test_a_bar_is_the_runs_peak(budgets):
    figure = bars_spec(budgets)
    names = [one.label for one in budgets]
    assert figure["data"][0]["y"] == names[::-1]
    assert [note["text"] for note in figure["layout"]["annotations"] if note.get("xref") == "paper"] == names[::-1]
    for i, found in enumerate(budgets[::-1]):
        drawn = sum(trace["x"][i] for trace in figure["data"])
        assert drawn == pytest.approx(found.total_bytes / 2**30, rel=1e-4)
    lines = [shape["x0"] for shape in figure["layout"]["shapes"]]
    assert find_accelerator("H100").usable_bytes / 2**30 in lines
    assert lines == sorted(lines)
    assert max(lines) <= 1.05 * max(found.total_bytes for found in budgets) / 2**30


def test_the_phases_of_each_run(budgets):
    figure = phases_spec(budgets)
    (chooser,) = figure["layout"]["updatemenus"]
    for found, choice in zip(budgets, chooser["buttons"], strict=True):
        for i, total in enumerate(found.phases.values()):
            assert sum(y[i] for y in choice["args"][0]["y"]) == pytest.approx(total / 2**30, rel=1e-4)


def test_ranks_and_sequences_are_those_asked_for(budgets):
    shape = budgets[0].shape
    asked = sweep(shape, ["lora", "dora"], [2, 8, 64], [None])
    figure = rank_spec(asked)
    assert [trace["name"] for trace in figure["data"]] == ["lora, bf16 base", "dora, bf16 base"]
    assert figure["data"][0]["x"] == [2, 8, 64]
    assert figure["data"][0]["y"] == pytest.approx([one.counts.adapter for one in asked[:3]], rel=1e-5)
    share = figure["layout"]["updatemenus"][0]["buttons"][1]["args"][0]["y"][0]
    assert share == pytest.approx([0.000652, 0.002605, 0.02046], rel=1e-3)
    figure = seq_spec(sweep(shape, ["lora", "full"], [16], [512, 1024]))
    assert [trace["x"] for trace in figure["data"]] == [[512, 1024], [512, 1024]]
    usual = seq_spec(budgets)
    assert max(usual["data"][0]["x"]) == 8192  # the model's positions
    assert usual["data"][0]["y"][-1] == pytest.approx(budgets[0].changed(seq=8192).total_bytes / 2**30, rel=1e-5)


def test_without_a_sequence_there_are_no_phases():
    assert list(budget_specs([lp.budget(TINY)])) == ["bars", "ranks"]
    assert list(budget_specs([lp.budget(TINY, method="full")])) == ["bars"]
    assert run_names(sweep(lp.budget(TINY).shape, ["full", "lora"], [4, 8], [32, 64])) == [
        "full, pure bf16 Adam, 32 tokens", "full, pure bf16 Adam, 64 tokens", "lora, bf16 base, r=4, 32 tokens",
        "lora, bf16 base, r=4, 64 tokens", "lora, bf16 base, r=8, 32 tokens", "lora, bf16 base, r=8, 64 tokens",
    ]  # fmt: skip


def test_a_model_of_few_positions_has_its_own_lengths():
    found = lp.budget({**TINY, "max_position_embeddings": 128}, seq=48, rank=3)
    assert seq_spec([found])["data"][0]["x"] == [48, 128]
    assert 3 in rank_spec([found])["data"][0]["x"]


def test_the_tables_are_documented_and_complete(budgets):
    runs = budget_reports.runs_table(budgets, Price(find_accelerator("A100 40GB"), 2.5))
    assert list(runs) == list(columns.BUDGET)
    assert set(runs["priced_card"]) == {"A100 40GB"}
    assert list(runs["n_cards_priced"].fillna(0)) == [least_cards(one, find_accelerator("A100 40GB")) or 0
                                                      for one in budgets]  # fmt: skip
    assert (runs["price_per_hour"] == 2.5 * runs["n_cards_priced"]).fillna(True).all()
    assert set(columns.BUDGET) - set(budget_reports.runs_table(budgets)) == {
        "priced_card", "n_cards_priced", "price_per_hour",
    }  # fmt: skip
    parts = budget_reports.components_table(budgets)
    assert set(parts) < set(columns.BUDGET_COMPONENTS)
    assert len(parts) == sum(len(one.components) for one in budgets)
    cards = budget_reports.cards_table(budgets)
    assert list(cards) == list(columns.BUDGET_CARDS)
    assert len(cards) == len(budgets) * len(accelerators())
    fits = cards[(cards["run"] == budgets[0].label) & cards["fits"]]["card"]
    assert list(fits) == [one.label for one in accelerators() if budgets[0].fits(one)]


def test_the_page_has_the_tables_and_the_words(page, budgets):
    assert len(data(page, "runs")["rows"]) == len(budgets)
    text = re.sub(r"\s+", " ", without_scripts(page))
    assert "8,030,261,248 parameters" in text
    assert "with DDP each holds everything" in text
    assert "What 50 tuned variants take" in text
    assert "one base and 50 adapters, lora, qlora r=16" in text
    assert text.count("a second one only takes another batch") == 1
    assert "price an hour" not in text
    assert "at the run's peak" in text or "at the run&#39;s peak" in text
    assert page.count("* plotly.js v") == 1
    plain = without_scripts(page)
    assert not re.findall(
        r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[^"'\s>]""", re.sub(r'data-\w+="[^"]*"', "", plain)
    )
    assert "default-src 'none'" in plain


def test_of_many_runs_the_baseline_stays_and_the_rest_is_said(monkeypatch):
    for module in (budget_figures, budget_reports):
        monkeypatch.setattr(module, "MAX_BARS", 8)
    monkeypatch.setattr(budget_reports, "MAX_CARDS", 5)
    shape = lp.budget(TINY).shape
    many = sweep(shape, ["lora", "dora", "full"], [1, 2, 3, 4, 5, 6, 7, 8, 9], [16, 32, 64])
    full = [i for i, one in enumerate(many) if one.step.method == "full"]
    for most in (5, 12, 48):
        picked = chosen(many, most)
        assert len(set(picked)) == most
        assert set(full) <= set(picked)
        assert picked == sorted(picked)
    picked = [many[i].step for i in chosen(many, 12)]
    assert {(step.method, step.seq) for step in picked} == {
        (a, b) for a in ("lora", "dora", "full") for b in (16, 32, 64)
    }
    assert chosen(many[:7], 12) == list(range(7))
    assert len(chosen([many[i] for i in full] * 9, 4)) == 4
    few = sweep(shape, ["lora", "dora", "full"], [1, 2], [16, 32, 64])
    names, full = run_names(few), [i for i, one in enumerate(few) if one.step.method == "full"]
    page = budget_reports.render(few, price=Price(find_accelerator("H100"), 2.5))
    text = re.sub(r"\s+", " ", without_scripts(page))
    assert text.count("5 of the 15 runs are shown here, every full fine-tune, and others from everywhere") == 2
    assert text.count("8 of the 15 runs are shown here") == 2
    assert all(f"<h3>{names[i]}</h3>" in text and f"<summary>{names[i]}</summary>" in text for i in full)
    assert f"{names[0]}: LoRA trains" in text or f"{names[0]}: With checkpointing" in text
    assert "The table has the answer of each of the 15 runs" in text
    assert text.count("1 × 2.5 = 2.50") == 5
    assert "Price: an hour of the least number of H100 (80 GB) cards" in text
    assert len(data(page, "runs")["rows"]) == 15
    assert "price_per_hour" in [one["key"] for one in data(page, "runs")["columns"] if one["main"]]


def test_without_activations_the_page_says_so_at_the_bars():
    text = without_scripts(budget_reports.render(compare(params="70B")))
    assert "one card&#39;s memory, without activations and logits" in text or "one card's memory, without acti" in text
    assert "at the run" not in text


def test_a_tiny_model_is_drawn_in_its_own_unit():
    found = lp.budget(TINY, seq=32)
    figure = bars_spec([found])
    assert figure["layout"]["xaxis"]["title"]["text"] == "MiB on one card"
    assert sum(trace["x"][0] for trace in figure["data"]) == pytest.approx(found.total_bytes / 2**20, rel=1e-4)
    assert phases_spec([found])["layout"]["yaxis"]["title"]["text"] == "MiB on one card"
    assert seq_spec([found])["layout"]["yaxis"]["title"]["text"] == "peak on one card, MiB"
    text = without_scripts(budget_reports.render([found]))
    assert "saves MiB" in text
    assert "0.00 GiB" not in text


def test_hostile_names_stay_text(budgets):
    shape = replace(budgets[0].shape, source=HOSTILE, model_type=HOSTILE, notes=(HOSTILE,))
    page = budget_reports.render([replace(one, shape=shape, name=HOSTILE) for one in budgets[:2]])
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_directory_that_is_not_empty_is_left_alone(budgets, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        lp.BudgetRun(budgets[:1]).save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
