"""The page: complete, self-contained, safe with strangers' names, honest about unknown values."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from browsers import needs_chromium
from builders import build

from lowrank_probe import reports, words
from lowrank_probe.columns import LEDGER, TABLE
from lowrank_probe.errors import CheckpointError
from lowrank_probe.terminal import print_summary
from lowrank_probe.verdicts import verdict_alone

HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def result():
    return build()


@pytest.fixture(scope="module")
def page(result):
    return reports.render(result)


def data(page, name):
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page, re.S)
    return json.loads(found[1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


def without_scripts(page):
    return re.sub(r"<script>.*?</script>", "", page, flags=re.S)


def test_plotly_is_embedded_exactly_once(page):
    assert page.count("* plotly.js v") == 1


def test_nothing_is_loaded_from_elsewhere(page):
    page = without_scripts(page)
    assert not re.findall(
        r"""(?:src|href|action|data)\s*=\s*["']?(?!#)[^"'\s>]""", re.sub(r'data-\w+="[^"]*"', "", page)
    )
    assert not re.findall(r"url\(|@import", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page


def test_hostile_names_stay_text():
    hostile = build(layers=1, hostile=HOSTILE)
    hostile.table.loc[0, "layer_type"] = HOSTILE
    hostile.ledger.loc[0, "status"] = HOSTILE
    hostile.facts["base"]["path"] = f"/models/{HOSTILE}"
    hostile.facts["notes"] = [HOSTILE]
    page = reports.render(hostile)
    assert "<script>alert" not in page
    assert "</script>alert" not in page
    assert "{{ 7 * 7 }}" in page
    assert page.count("<script>") == 3  # the page's own, plotly, and the start of the drawing
    assert HOSTILE in {row[0] for row in data(page, "matrices")["rows"]}


def test_every_value_of_the_table_is_in_the_page(result, page):
    found = data(page, "matrices")
    keys = [column["key"] for column in found["columns"]]
    assert set(keys) == {*TABLE, "verdict_alone"}
    assert len(found["rows"]) == len(result.table)
    table = result.table.assign(verdict_alone=verdict_alone(result.table))
    for row, expected in zip(found["rows"], table.to_dict("records"), strict=True):
        for key, value in zip(keys, row, strict=True):
            if pd.isna(expected[key]):
                assert value is None
            else:
                assert value == (
                    pytest.approx(expected[key], rel=1e-5) if not isinstance(value, str) else expected[key]
                )
    titles = {column["key"]: column["title"] for column in found["columns"]}
    assert titles["stable_rank"] == TABLE["stable_rank"].meaning


def test_the_whole_ledger_is_in_the_page(result, page):
    found = data(page, "tensors")
    assert {column["key"] for column in found["columns"]} == set(LEDGER)
    assert len(found["rows"]) == len(result.ledger)


def test_verdicts_and_evidence_are_in_the_page(result, page):
    for row in result.summary.to_dict("records"):
        assert re.search(rf"<h3>{row['layer_type']}</h3>.*?{re.escape(row['verdict'])}", page, re.S)
    counts = [result.summary["verdict"].str.startswith(word).sum() for word in ("low-rank", "not low-rank", "undecid")]
    assert all(counts)
    assert "Of 9 layer types: {} low-rank, {} not low-rank, {} undecidable.".format(*counts) in page


def test_medians_of_ranks_are_the_same_whole_numbers_in_the_terminal_and_in_the_page(capsys):
    result = build(layers=2, types=("q",))
    of_q = result.table["layer_type"] == "q"
    for column, values in {"r90_low": [6, 7], "r90_high": [9, 12], "null_r90": [40, 41]}.items():
        result.table.loc[of_q, column] = values
    result.table.loc[of_q, ["decidable_r90", "decidable_r50"]] = True
    print_summary(result)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["q"]]
    assert line.split()[7:9] == ["7–11", "41"]
    card = re.search(r"<h3>q</h3>.*?</li>", reports.render(result), re.S)[0]
    assert 'aria-label="r90 from 7 to 11, noise 41"' in card
    assert "<span>r90 7 to 11</span><span>noise 41</span>" in card
    assert not re.search(r"r90 [^<]*\d\.\d", card.partition('class="evidence"')[0])


@pytest.mark.parametrize(
    ("value", "shown"), [(6.0, "6"), (6.5, "7"), (7.5, "8"), (2088.5, "2089"), (np.nan, "?"), (np.inf, "?")]
)
def test_halves_of_ranks_go_up(value, shown):
    assert words.rank(value) == shown


def test_undecidable_brackets_show_no_number(result, page):
    card = re.search(r"<h3>embedding</h3>.*?</li>", page, re.S)[0]
    assert "r90 unknown" in card
    assert not {"nan", "NaN", "None"} & set(re.findall(r"\w+", without_scripts(page).partition("</main>")[0]))


def test_every_figure_has_a_heading_and_one_sentence(result, page):
    for name in result.figures:
        heading, sentence = reports.READING[name]
        assert f"<h2>{heading}</h2>" in page
        assert sentence in page
        assert sentence.endswith(".")
        assert ". " not in sentence
        assert data(page, name)["data"]
        section = re.search(rf'<section id="{name}">.*?</section>', page, re.S)[0]
        height = data(page, name)["layout"]["height"]
        assert f'style="height:{height}px"' in section  # nothing moves when the plot is drawn
        assert section.count("<option") == len(data(page, name)["buttons"])


def test_every_spectrum_is_in_the_page(result, page):
    packed = data(page, "spectra")
    assert len(packed["rows"]) == len(result.table)
    assert all(row[0] >= 0 for row in packed["rows"])


@pytest.mark.parametrize(
    ("facts", "words"),
    [({"related": False, "median_cosine": 0.01}, "look unrelated"), ({"status": "interrupted"}, "was interrupted")],
)
def test_warnings(result, page, facts, words):
    assert words not in page
    assert words in reports.render(replace(result, facts={**result.facts, **facts}))


def test_missing_facts_are_left_out(result):
    for facts in ({}, {"base": None, "tuned": "/a/b", "device": "cpu", "seconds": 3.2}):
        page = reports.render(replace(result, facts=facts))
        assert "None" not in without_scripts(page).partition('id="facts"')[0]


def test_a_run_without_matrices_has_a_page(result):
    page = reports.render(type(result)(result.table.iloc[:0], result.ledger, {}, {}, {}))
    assert "No matrix was analysed." in page
    assert "* plotly.js v" not in page


def test_zero_updates_and_missing_values_have_a_page():
    result = build(layers=1)
    numeric = [c for c in result.table.columns if c.startswith(("r50", "r90", "relative_", "energy_", "stable"))]
    result.table[numeric] = np.nan
    result.table["fro_norm"] = 0.0
    assert data(reports.render(result), "matrices")["rows"]


def test_a_prepared_page_has_nothing_left_to_compile(result, monkeypatch):
    reports.page_template.cache_clear()
    reports.prepare()
    monkeypatch.setattr("jinja2.environment.Environment._compile", None)
    assert "plotly" in reports.render(result)


def test_report_rewrites_the_page_of_a_run(result, tmp_path):
    result.save(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("old", encoding="utf-8")
    before = set((tmp_path / "run").iterdir())
    path = reports.report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert data(path.read_text(encoding="utf-8"), "matrices")["rows"]
    assert set((tmp_path / "run").iterdir()) == before


def test_report_of_no_run_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        reports.report(tmp_path)


@pytest.mark.slow
@needs_chromium
def test_report_writes_the_figures_where_asked(result, tmp_path):
    result.save(tmp_path / "run")
    reports.report(tmp_path / "run", figures_dir=tmp_path / "figures")
    assert len(list((tmp_path / "figures").iterdir())) == 2 * len(result.figures)


def test_a_large_model_stays_light():
    result = build(layers=60, hidden=64, copies=12)
    assert len(result.table) > 5000
    page = reports.render(result)
    assert len(page.encode()) < 15e6
    assert len(data(page, "spectra")["rows"]) == len(data(page, "matrices")["rows"]) == len(result.table)
    assert "<tr>" not in without_scripts(page)
