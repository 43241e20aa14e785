"""An evaluation's figures and its page in real headless Chromium, from file://: it draws, sorts, and stays silent."""

import html

import numpy as np
import pandas as pd
import pytest
from browsers import needs_chromium
from test_browser import HOSTILE, button, column, drawn, driver, find, fits, page, press, turns_dark  # noqa: F401

from lowrank_probe import evaluation_figures, evaluation_reports
from lowrank_probe.columns import EVALUATION, FUNCTIONAL
from lowrank_probe.evaluation_runs import Evaluation

GRID = (0, 1, 2, 4, 8, 16, 32, 64)
GROUPS = ("q", "v", "down", HOSTILE)


def build(logits=True):
    """An evaluation with losses that are planted: excess 2·2^(−i) a group, less where it is left out."""
    table, functional = [], []
    common = {"n_tokens": 1000, "n_kl_tokens": 1000 if logits else 0}
    for how, loss in (("base", 3.0), ("tuned", 2.0)):
        table.append(_row("", how, None, loss, how == "tuned", logits) | common)
    sets = [(group, "alone", 0.4) for group in GROUPS] + [("all", "all", 1.0)]
    for group, how, size in [*sets, *((group, "leave out", 0.7) for group in GROUPS)]:
        for i, rank in enumerate(GRID):
            full = rank == GRID[-1]
            table.append(_row(group, how, rank, 2.0 + (0.0 if full else size * 2.0**-i), full, logits) | common)
        beyond = group == "down" and how == "alone"
        functional.append({
            "group": group, "how": how, "n_matrices": 4, "functional_rank": None if beyond else 16, "low": 8,
            "high": None if beyond else 32, "largest_rank": 64, "parameters": None if beyond else 4096,
            "tolerance_nats": 0.05,
        })  # fmt: skip
    integers = dict.fromkeys(("functional_rank", "low", "high", "largest_rank", "parameters", "n_matrices"), "Int64")
    n = len(table)
    facts = {
        "schema_version": 1, "base": {"path": f"/{HOSTILE}/base"}, "tuned": {"path": "/tuned", "kind": "model"},
        "merit": "next-token loss" if logits else "1 − cosine to tuned", "gain": 1.0, "tolerance": 0.05,
        "n_tokens": 1000, "n_kl_tokens": common["n_kl_tokens"], "notes": [HOSTILE], "seconds": 3.5,
        "text": {"path": HOSTILE, "n_sequences": 8, "length": 125, "n_documents": 30},
        "options": {"tolerance": "5%", "ranks": [*GRID, "full"]}, "time": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return Evaluation(
        pd.DataFrame(table)[list(EVALUATION)].astype({"rank": "Int64", "parameters": "Int64"}),
        pd.DataFrame(functional)[list(FUNCTIONAL)].astype(integers),
        np.zeros((n, 8)), np.zeros((n, 8)), np.ones(8), np.ones(8), facts,
    )  # fmt: skip


def _row(group, how, rank, loss, full, logits):
    return {
        "group": group, "how": how, "rank": rank, "full": full, "n_matrices": 4, "parameters": None, "loss": loss,
        "loss_low": loss - 0.1, "loss_high": loss + 0.1, "excess": loss - 2, "excess_low": loss - 2.02,
        "excess_high": loss - 1.97, "kept_gain": 3 - loss, "perplexity": np.exp(loss) if logits else np.nan,
        "kl_nats": (loss - 2) / 2 if logits else np.nan,
    }  # fmt: skip


def test_the_loss_figure_has_a_line_and_a_paired_band_a_group():
    data = evaluation_figures.loss_spec(build())["data"]
    lines = [trace for trace in data if trace["mode"] == "lines+markers"]
    names = ["q", "v", "down", html.escape(HOSTILE, quote=False), "all together"]
    assert [trace["name"] for trace in lines] == names
    assert lines[0]["x"] == pytest.approx([np.log2(1 + rank) for rank in GRID])
    assert lines[0]["y"] == pytest.approx([2 + 0.4 * 2.0**-i for i in range(7)] + [2])
    band = next(trace for trace in data if trace.get("fill"))
    assert band["y"][0] == pytest.approx(2.43)
    assert band["y"][-1] == pytest.approx(2.38)
    shapes = evaluation_figures.loss_spec(build())["layout"]["shapes"]
    assert [shape["y0"] for shape in shapes] == [3.0, 2.0, 2.0]
    assert shapes[2]["y1"] == 2.05


def test_the_ranks_figure_has_intervals_and_arrows_beyond_the_grid():
    alone, without = evaluation_figures.ranks_spec(build())["data"]
    assert alone["marker"]["symbol"] == ["circle", "circle", "triangle-right", "circle", "circle"]
    x = np.log2(1 + np.array([16, 16, 64, 16, 16]))
    assert alone["x"] == pytest.approx(x, rel=1e-5)
    assert alone["error_x"]["arrayminus"] == pytest.approx(x - np.log2(9), rel=1e-4)
    assert alone["customdata"][2] == "down alone: rank > 64, 95 %: ≥ 8"
    assert len(without["x"]) == 4


def test_kl_is_drawn_below_full_rank_and_only_where_there_is_a_head():
    data = evaluation_figures.kl_spec(build())["data"]
    assert len(data[0]["y"]) == len(GRID) - 1
    assert list(evaluation_figures.evaluation_specs(build())) == ["loss", "ranks", "leave_out", "kl"]
    assert list(evaluation_figures.evaluation_specs(build(logits=False))) == ["loss", "ranks", "leave_out"]


def test_names_are_escaped_and_the_page_is_one_file():
    text = evaluation_reports.render(build())
    assert HOSTILE not in text
    assert "need rank 16 to be within 0.05 (5 % of the 1 gained) of the tuned model&#39;s loss." in text
    assert "http://" not in text.partition("plotly.js v")[0].replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(evaluation_reports.render(build()), encoding="utf-8")
    return file


@pytest.mark.browser
@needs_chromium
class TestPage:
    def test_every_plot_is_drawn_and_nothing_is_fetched(self, page):  # noqa: F811
        for name in ("loss", "ranks", "leave_out", "kl"):
            assert page.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{name} svg path") > 3
        assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
        assert not find(page, "img")
        assert len(drawn(page, "loss", "data")) == 10
        assert [card.text.split("\n")[0] for card in find(page, ".card h3")] == [
            "q",
            "v",
            "down",
            HOSTILE,
            "all together",
        ]

    def test_the_tables_sort(self, page):  # noqa: F811
        press(page, button(page, "#states", "loss"))
        up = [float(x) for x in column(page, "states", "loss") if x != "–"]
        assert up == sorted(up)
        assert len(column(page, "functional", "group")) == 9

    def test_both_themes_and_a_narrow_screen(self, page):  # noqa: F811
        assert turns_dark(page)
        assert fits(page)
