"""A training's figures, its terminal tables, and its page in real headless Chromium, from file://."""

import html
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from browsers import needs_chromium
from test_browser import HOSTILE, button, choose, column, drawn, driver, find, fits, page, press, turns_dark  # noqa: F401
from test_training import model, words

import lowrank_probe as lp
from lowrank_probe import training, training_reports
from lowrank_probe.training_figures import training_specs
from lowrank_probe.training_terminal import print_training

pytestmark = pytest.mark.slow  # it trains first

FIGURES = ("loss", "ranks", "parameters", "curves", "search", "memory", "subspaces", "amplification")
GROUPS = ("attention", "mlp")
ESCAPED = html.escape(HOSTILE, quote=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A short real training with a search for rates; as if on a GPU, and with a hostile name for one group."""
    root = tmp_path_factory.mktemp("training")
    recipe = lp.Recipe(steps=4, batch=4, length=32, evaluations=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SEARCH_STEPS", 1)
        patch.setattr(training, "MOST_RATES", 3)
        made = lp.train(
            model(root), words(root), root / "run", ranks=[2, 8], targets=GROUPS, recipe=recipe, device="cpu"
        )
    bytes_ = np.arange(len(made.runs), dtype=float) * 2**28 + 2**30
    sick = {"label": "full-s0", "name": "plateau", "severity": "warning", "step": None, "evidence": HOSTILE}
    return replace(
        made,
        runs=_renamed(made.runs, "targets").assign(peak_bytes=bytes_, predicted_bytes=1.1 * bytes_),
        verdict=_renamed(made.verdict, "layer_type"), equal_parameters=_renamed(made.equal_parameters, "targets"),
        facts=made.facts | {"notes": [HOSTILE], "health": [sick | {"mend": "train longer"}]},
    )  # fmt: skip


def _renamed(table, column):
    return table.assign(**{column: table[column].replace("mlp", HOSTILE)})


def test_loss_against_rank_with_full_and_base_as_lines(found):
    data = training_specs(found)["loss"]["data"]
    lines = {one["name"]: one for one in data if "name" in one}
    assert list(lines) == ["full fine-tune", "base", "attention", ESCAPED]
    assert lines["base"]["y"] == pytest.approx([found.base_loss] * 2, rel=1e-5)
    assert lines["full fine-tune"]["y"] == pytest.approx([found.full_loss] * 2, rel=1e-5)
    rows = found.runs[(found.runs["targets"] == "attention") & (found.runs["rank"] == 8)]
    assert lines["attention"]["x"] == [2, 8]
    assert lines["attention"]["y"][1] == pytest.approx(rows["loss"].mean(), rel=1e-5)
    bands = [one for one in data if one.get("fill")]
    assert len(bands) == 3
    assert bands[1]["y"][1] == pytest.approx(rows["loss"].max(), rel=1e-5)
    assert bands[1]["y"][2] == pytest.approx(rows["loss"].min(), rel=1e-5)


def test_trained_functional_and_spectral_ranks_side_by_side(found):
    trained, functional, spectral = training_specs(found)["ranks"]["data"]
    assert len(trained["x"]) == len(GROUPS)
    assert len(functional["x"]) == len(found.verdict)
    assert len(spectral["x"]) == found.verdict["r90_low"].notna().sum()
    for one, kind in ((trained, "trained"), (functional, "functional")):
        rows = found.verdict[found.verdict[f"{kind}_largest"].notna()]
        expected = rows[f"{kind}_rank"].fillna(rows[f"{kind}_largest"]).astype(float)
        assert one["x"] == pytest.approx(list(np.log2(1 + expected)), rel=1e-5)
        beyond = [symbol == "triangle-right" for symbol in one["marker"]["symbol"]]
        assert beyond == list(rows[f"{kind}_rank"].isna())


def test_the_other_figures_show_the_tables(found):
    specs = training_specs(found)
    assert tuple(specs) == FIGURES
    attention = specs["parameters"]["data"][0]
    rows = found.runs[(found.runs["targets"] == "attention") & (found.runs["seed"] == 0)]
    assert attention["x"] == list(rows["n_trained"])
    assert len(specs["curves"]["data"]) == 2 * (found.runs["seed"] == 0).sum()
    for line in specs["search"]["data"]:
        tried = found.searches[found.searches["method"] == line["name"]].sort_values("lr")
        assert line["y"] == pytest.approx(list(tried["loss"]), rel=1e-5)
    predicted, measured = specs["memory"]["data"]
    assert measured["y"][0] == 1
    assert predicted["y"][0] == pytest.approx(1.1)
    names = [one["name"] for one in specs["subspaces"]["data"]]
    assert names[0::2] == [
        "r=2 seed 0 and r=8 seed 0", "r=2 seed 0 and r=8 seed 1", "r=8 seed 0 and r=8 seed 1",
    ]  # fmt: skip
    assert all(name.endswith(", random") for name in names[1::2])
    assert {one["name"] for one in specs["amplification"]["data"]} == {"r=2 seed 0", "r=8 seed 0", "r=8 seed 1"}


def test_curves_begin_at_the_base_and_show_training_loss_one_group_at_a_time(found):
    curves = training_specs(found)["curves"]
    held_out = [one for one in curves["data"] if one["mode"] == "lines+markers"]
    training_ = [one for one in curves["data"] if one["mode"] == "lines"]
    assert all((one["x"][0], one["y"][0]) == (0, pytest.approx(found.base_loss, rel=1e-5)) for one in held_out)
    assert len(training_) == len(held_out)
    assert all(one["line"]["dash"] == "dot" for one in training_)
    (menu,) = curves["layout"]["updatemenus"]
    assert [one["label"] for one in menu["buttons"]] == ["attention", ESCAPED]
    for button_ in menu["buttons"]:
        shown = [one for one, is_shown in zip(curves["data"], button_["args"][0]["visible"], strict=True) if is_shown]
        assert [one["name"] for one in shown if one in held_out] == ["full fine-tune", "r=2", "r=8"]


def test_variants_can_be_told_apart(found):
    variants = ("lora", "rslora", "dora", "pissa", "lora+")
    adapters = found.runs[found.runs["method"] == "lora"]
    runs = pd.concat(
        [found.runs, *(adapters.assign(method=one, label=one + adapters["label"]) for one in variants[1:])]
    )
    many = replace(found, runs=runs)
    for name in ("loss", "parameters"):
        lines = [one for one in training_specs(many)[name]["data"] if one["mode"] == "lines+markers"]
        assert len(lines) == 2 * len(variants)
        looks = {(one["line"]["color"], one["line"]["dash"]) for one in lines}
        assert len(looks) == len(lines)
        assert len({one["marker"]["symbol"] for one in lines}) == len(variants)
    assert len(training_specs(many)["curves"]["layout"]["updatemenus"][0]["buttons"]) == 2 * len(variants)


def test_a_rank_of_0_is_drawn_at_0(found):
    none = replace(found, verdict=found.verdict.assign(functional_rank=0, functional_low=0, functional_high=1))
    ranks = training_specs(none)["ranks"]
    assert set(ranks["data"][1]["x"]) == {0.0}
    assert set(ranks["data"][1]["error_x"]["array"]) == {1.0}
    assert ranks["layout"]["xaxis"]["ticktext"][:3] == ["0", "1", "2"]


def test_the_terminal_has_every_loss_and_verdict(found, capsys):
    print_training(found)
    out = capsys.readouterr().out
    for (targets, _), rows in found.runs[found.runs["rank"] > 0].groupby(["targets", "rank"]):
        line = next(line for line in out.splitlines() if line.strip().startswith(targets[:9]))
        assert f"{rows['loss'].mean():.4f}" in line
    for row in found.verdict.itertuples():
        assert row.verdict.partition(" at ")[0] in out
    assert found.facts["recommendation"]["lora_config"] in out


def test_names_are_escaped_and_nothing_is_fetched(found):
    text = training_reports.render(found)
    assert HOSTILE not in text
    assert "http://" not in text.partition("plotly.js v")[0].replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(training_reports.render(found), encoding="utf-8")
    return file


@pytest.mark.browser
@needs_chromium
class TestPage:
    def test_every_plot_is_drawn_and_nothing_is_fetched(self, page, found):  # noqa: F811
        for name in FIGURES:
            assert page.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{name} svg path") > 3
        assert len(drawn(page, "curves", "data")) == 2 * (found.runs["seed"] == 0).sum()
        choose(page, "[data-menu=curves]", HOSTILE)
        shown = [one for one in drawn(page, "curves", "data") if one["visible"] is True]
        assert len(shown) == 6
        assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
        assert page.title != "hacked"
        assert not find(page, "img")

    def test_a_card_a_group_says_verdict_ranks_and_what_decided(self, page, found):  # noqa: F811
        cards = [card.text for card in find(page, ".card")]
        assert [card.split("\n")[0] for card in cards] == list(found.verdict["layer_type"])
        for card, row in zip(cards, found.verdict.itertuples(), strict=True):
            assert row.verdict in card
            assert ("decided by" in card) == bool(row.decided_by)
            assert ("missing" in card) == bool(row.missing)
            assert row.evidence in card
        assert find(page, "#recommendation pre")[0].text == found.facts["recommendation"]["lora_config"]
        assert "train longer" in find(page, "#health")[0].text

    def test_the_runs_sort_and_filter(self, page, found):  # noqa: F811
        press(page, button(page, "#runs", "loss"))
        shown = [float(x) for x in column(page, "runs", "loss")]
        assert shown == sorted(shown)
        assert len(shown) == len(found.runs)
        choose(page, "#runs [data-facet=targets]", "attention (4)")
        labels = column(page, "runs", "label")
        assert len(labels) == 4
        assert all("attention" in label for label in labels)

    def test_both_themes_and_a_narrow_screen(self, page):  # noqa: F811
        assert turns_dark(page)
        assert fits(page)


def test_a_training_without_adapters_that_compare_has_no_such_figures(found):
    full = found.runs[found.runs["method"] == "full"].assign(peak_bytes=np.nan)
    bare = replace(
        found, runs=full, verdict=found.verdict.iloc[:0], searches=found.searches.iloc[:0], subspaces=None,
        equal_parameters=pd.DataFrame(columns=found.equal_parameters.columns),
        facts=found.facts | {"recommendation": None},
    )  # fmt: skip
    assert list(training_specs(bare)) == ["curves"]
    assert "data-equal" not in training_reports.render(bare)


def test_without_findings_the_page_says_that_all_is_well(found):
    text = training_reports.render(replace(found, facts=found.facts | {"health": []}))
    assert "Nothing was found: no NaN or Inf" in text
