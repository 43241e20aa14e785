"""An extraction's tables by layer type, its figures, its page and its directory: what is drawn equals the ledger."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from browsers import needs_chromium
from extractions import ROUNDING, TYPES, build_extraction, checks, spectrum
from test_reports import HOSTILE, data, without_scripts

import lowrank_probe as lp
from lowrank_probe import columns, extraction_reports
from lowrank_probe.errors import CheckpointError
from lowrank_probe.extraction_figures import PARTS, allotment_spec, error_spec, extraction_specs, where_spec
from lowrank_probe.extraction_runs import Extraction
from lowrank_probe.extraction_summary import error_curves
from lowrank_probe.rank_choice import RankChoice


def uneven(kind, layer):
    return (3 * layer + 5 * len(kind)) % 13


@pytest.fixture(scope="module")
def found():
    return build_extraction()


@pytest.fixture(scope="module")
def several():
    return build_extraction((2, 8, 16), layers=6)


@pytest.fixture(scope="module")
def budget():
    return build_extraction(allot=uneven)


def test_the_summary_is_that_of_the_matrices_as_one(found):
    rows = found.summary.set_index("layer_type")
    assert list(found.summary.columns) == list(columns.EXTRACTION_SUMMARY)
    for kind in TYPES:
        squares = [spectrum(kind, layer) ** 2 for layer in range(4) if (kind, layer) != ("k", 1)]
        cut, total = sum(s[8:].sum() for s in squares), sum(s.sum() for s in squares)
        assert rows.loc[kind, "optimal_error_low"] == pytest.approx(math.sqrt(cut / total), rel=1e-12)
        assert rows.loc[kind, "relative_error"] == pytest.approx(math.sqrt(cut / total + ROUNDING**2), rel=1e-12)
        assert rows.loc[kind, "energy"] == pytest.approx(1 - cut / total - ROUNDING**2, rel=1e-12)
        assert rows.loc[kind, "n_adapted"] == len(squares)
    assert rows.loc["embedding", "energy"] != rows.loc["embedding", "energy"]
    assert rows.loc["scale", "n_unknown"] == 1


@pytest.mark.parametrize("which", ["found", "several", "budget"])
def test_the_parts_of_every_type_are_its_share_and_all_shares_are_one(which, request):
    made = request.getfixturevalue(which)
    summary = made.summary
    assert summary[list(PARTS)].sum(axis=1).to_numpy() == pytest.approx(summary["share"].to_numpy(), abs=1e-12)
    assert summary.groupby("adapter")["share"].sum().to_numpy() == pytest.approx(1.0)
    for label, own in made.ledger.groupby("adapter"):
        told = made.facts["adapters"][label]
        lora, whole = (own[own["status"] == status] for status in ("adapted", "carried whole"))
        assert told["carried"] == pytest.approx((lora["energy"] * lora["share"]).sum() + whole["share"].sum())
        assert told["not_carried"] == pytest.approx(own[own["status"].isin(["not carried", "rank 0"])]["share"].sum())
        assert told["kept_of_adapted"] == pytest.approx((lora["energy"] * lora["share"]).sum() / lora["share"].sum())


def test_error_curves_end_at_the_ledgers_error(found):
    ends = {label: (ranks[-1], stored[-1], best[-1]) for label, ranks, stored, best in error_curves(found.curves)}
    assert list(ends) == list(TYPES)
    for row in found.summary[found.summary["n_adapted"] > 0].itertuples():
        rank, stored, best = ends[row.layer_type]
        assert rank == 8
        assert stored == pytest.approx(row.relative_error, rel=1e-9)
        assert best == pytest.approx(row.optimal_error_low, rel=1e-9)


def test_a_matrix_of_a_smaller_rank_stays_where_it_ends(budget):
    for kind, ranks, stored, _ in error_curves(budget.curves):
        squares = [(spectrum(kind, layer) ** 2, uneven(kind, layer)) for layer in range(4) if (kind, layer) != ("k", 1)]
        squares = [(s, r) for s, r in squares if r > 0]
        total = sum(s.sum() for s, _ in squares)
        for rank, error in zip(ranks, stored, strict=True):
            cut = sum(s[min(rank, own) :].sum() for s, own in squares)
            assert error == pytest.approx(math.sqrt(cut / total + ROUNDING**2), rel=1e-9)


def test_a_rank_of_which_some_matrices_know_nothing_is_left_out(found):
    few = found.curves[(found.curves["name"] != "model.layers.2.self_attn.q_proj") | (found.curves["rank"] != 5)]
    ranks = {label: list(ranks) for label, ranks, _, _ in error_curves(few)}
    assert ranks["q"] == [1, 2, 3, 4, 6, 7, 8]
    assert ranks["o"] == list(range(1, 9))


def test_the_error_figure_draws_stored_error_above_the_optimum(several):
    spec = error_spec(several)
    curves = {label: rest for label, *rest in error_curves(several.curves)}
    lines = [trace for trace in spec["data"] if trace.get("fill") == "tonexty"]
    assert [line["name"] for line in lines] == list(TYPES)
    for line in lines:
        ranks, stored, optimum = curves[line["name"]]
        assert line["x"] == ranks.tolist()
        assert line["y"] == pytest.approx(stored, rel=1e-5)
        assert line["customdata"] == pytest.approx(optimum, rel=1e-5)
        assert all(a > b for a, b in zip(line["y"], line["customdata"], strict=True))
    assert [shape["x0"] for shape in spec["layout"]["shapes"]] == [2, 8, 16]
    assert [note["text"] for note in spec["layout"]["annotations"]] == ["r2", "r8", "r16"]


def test_a_budget_has_no_usual_rank(budget):
    assert error_spec(budget)["layout"]["shapes"] == []


@pytest.mark.parametrize("which", ["found", "several", "budget"])
def test_the_map_shows_every_rank_and_energy(which, request):
    made = request.getfixturevalue(which)
    spec = allotment_spec(made)
    menu = spec["layout"]["updatemenus"][0]
    assert len(menu["buttons"]) == 2 * len(made.adapters)
    for button in menu["buttons"]:
        label, _, what = button["label"].rpartition(": ")
        column = "rank" if what == "rank" else "energy"
        traces = [t for t, on in zip(spec["data"], button["args"][0]["visible"], strict=True) if on]
        values, grey, marks = traces
        rows = made.ledger[(made.ledger["adapter"] == label) & (made.ledger["kind"] != "")]
        for row in rows.to_dict("records"):
            at = values["y"].index(row["layer_type"]), values["x"].index(str(int(row["layer"])))
            if row["status"] == "unchanged":
                assert values["z"][at[0]][at[1]] is None
                assert grey["z"][at[0]][at[1]] == 1
                assert (row["layer_type"], str(int(row["layer"]))) in zip(marks["y"], marks["x"], strict=True)
            else:
                assert values["z"][at[0]][at[1]] == pytest.approx(row[column], rel=1e-5)
        assert len(marks["x"]) == (rows["status"] == "unchanged").sum() == 1
    shown = [trace["visible"] for trace in spec["data"]]
    assert shown == menu["buttons"][menu["active"]]["args"][0]["visible"]
    assert menu["active"] == (0 if which == "budget" else 1)  # one rank for all is no picture


def test_the_bars_are_the_summarys_shares(several):
    spec = where_spec(several)
    summary = several.summary.set_index(["adapter", "layer_type"])
    buttons = spec["layout"]["updatemenus"][0]["buttons"]
    assert [b["label"] for b in buttons[:2]] == ["r2: share of all that changed", "r2: share of the layer type"]
    for button in buttons:
        label = button["label"].partition(":")[0]
        for part, trace, x in zip(PARTS, spec["data"], button["args"][0]["x"], strict=True):
            assert trace["name"] == PARTS[part][0]
            for kind, value in zip(trace["y"], x, strict=True):
                row = summary.loc[(label, kind)]
                unit = row["share"] if button["label"].endswith("type") else 1
                assert value == pytest.approx(row[part] / unit, rel=1e-5, abs=1e-9)
    assert [trace["x"] for trace in spec["data"]] == buttons[0]["args"][0]["x"]
    assert "scale" not in spec["data"][0]["y"]  # of unknown size


def test_a_prepared_page_has_nothing_left_to_compile(found, monkeypatch):
    extraction_reports.page_template.cache_clear()
    extraction_reports.prepare()
    monkeypatch.setattr("jinja2.environment.Environment._compile", None)
    assert "plotly" in extraction_reports.render(found)


def test_the_figures_are_valid_plotly_and_leave_out_what_is_not_there(found):
    assert list(found.figures) == ["error", "allotment", "where"]
    none = found.ledger["kind"] == ""
    nothing = replace(found, ledger=found.ledger[none], curves=found.curves.iloc[:0])
    assert list(extraction_specs(nothing)) == ["where"]
    assert "Who got which rank?" not in extraction_reports.render(nothing)


def test_the_page_holds_every_line_and_loads_nothing(several):
    page = extraction_reports.render(several)
    ledger, types = data(page, "ledger"), data(page, "types")
    assert {c["key"] for c in ledger["columns"]} == set(columns.EXTRACTION)
    assert len(ledger["rows"]) == len(several.ledger)
    assert len(types["rows"]) == len(several.summary)
    at = {c["key"]: i for i, c in enumerate(ledger["columns"])}
    for row, expected in zip(ledger["rows"], several.ledger.to_dict("records"), strict=True):
        assert row[at["name"]] == expected["name"]
        assert row[at["relative_error"]] == pytest.approx(expected["relative_error"], rel=1e-5, nan_ok=True) or (
            row[at["relative_error"]] is None and math.isnan(expected["relative_error"])
        )
    assert page.count("* plotly.js v") == 1
    text = without_scripts(page)
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert not re.findall(r"url\(|@import", text)


def shown(page, section):
    """(heads, rows, the text) of a table of checks on the page."""
    part = re.search(rf'<section id="{section}">(.*?)</section>', page, re.S)[1]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", part)]
    return rows[0], rows[1:], part


def test_what_was_tried_and_what_was_verified_is_on_the_page():
    made = build_extraction((2, 8))
    made.facts.update(checks(("r2", "r8")))
    page = extraction_reports.render(made)
    heads, rows, text = shown(page, "calibration")
    assert heads == ["adapter", "weighted by", "ridge", "", "to choose by", "95 %", "to report", "95 %"]
    assert rows[0] == ["", "base alone", "", "", "0.987", "", "0.876", ""]
    assert rows[1] == ["r2", "plain SVD", "", "", "0.0369", "", "0.0963", ""]
    assert [row[0] for row in rows[1:]] == ["r2"] * 3 + ["r8"] * 3
    changes = "-73.3 to -60.0 %", "-72.6 to -59.4 %"
    assert rows[3] == ["r2", "inputs and gradients", "1.0", "chosen", "0.0123", changes[0], "0.0321", changes[0]]
    assert rows[6][3:] == ["chosen", "0.0133", "-71.4 to -58.4 %", "0.0331", changes[1]]
    assert "4,000 tokens for report" in text
    for label in ("r2", "r8"):
        heads, rows, text = shown(page, f"verification-{label}")
        assert heads == ["model", "kl nats", "top1 agreement", "mean abs logit error", "n tokens"]
        assert rows[0] == ["base", "0.5", "0.7", "0.42", "1895"]
        assert rows[2][0] == "base+adapter merged"
        assert "allowed: 0.0115" in text
        assert "holds" in text
    assert '<a href="#calibration">Checks</a>' in page
    assert "calibration.tried" not in page
    none = extraction_reports.render(build_extraction())
    assert "Checks</a>" not in none
    assert 'id="calibration"' not in none


def test_hostile_names_stay_text():
    hostile = build_extraction(hostile=HOSTILE)
    hostile.facts.update(checks(hostile=HOSTILE))
    hostile.ledger.loc[hostile.ledger["layer_type"] == "o", "layer_type"] = HOSTILE
    hostile.curves.loc[hostile.curves["layer_type"] == "o", "layer_type"] = HOSTILE
    page = extraction_reports.render(hostile)
    assert "<script>alert" not in page
    assert "</script>alert" not in page
    assert page.count("<script>") == 3
    at = [c["key"] for c in data(page, "ledger")["columns"]].index("name")
    assert HOSTILE in {row[at] for row in data(page, "ledger")["rows"]}
    assert "&lt;script&gt;" in json.dumps(error_spec(hostile)["data"])
    assert "<script>" not in json.dumps([error_spec(hostile), allotment_spec(hostile), where_spec(hostile)])


def test_a_directory_comes_back_as_it_was(several, tmp_path):
    several.save(tmp_path / "out" / "probe")
    for place in (tmp_path / "out", tmp_path / "out" / "probe"):
        back = lp.load(place)
        assert isinstance(back, Extraction)
        assert list(back.adapters) == ["r2", "r8", "r16"]
        assert back.adapters["r8"] == tmp_path / "out" / "r8"
        assert back.facts == json.loads(json.dumps(several.facts))
        pd.testing.assert_frame_equal(back.summary, several.summary)
        pd.testing.assert_frame_equal(back.curves, several.curves)
        assert (
            back.card("r8").partition("\n## How it was made")[0] == several.card("r8").partition("\n## How it was")[0]
        )
    assert pd.read_csv(tmp_path / "out" / "probe" / "summary.csv").shape == several.summary.shape


def test_a_notebook_is_told_what_is_carried(several):
    told = several.facts["adapters"]
    said = f"r2 {100 * told['r2']['carried']:.3g} %, r8 {100 * told['r8']['carried']:.3g} %"
    assert said in repr(several)
    assert said in several._repr_html_()
    assert several._repr_html_().count("<tr") == len(several.summary) + 1


@pytest.mark.parametrize("inside", [True, False])
def test_the_report_is_rebuilt_as_it_was(several, tmp_path, inside):
    several.save(tmp_path / "probe")
    page = tmp_path / "probe" / "report.html"
    written = page.read_text(encoding="utf-8")
    page.unlink()
    assert lp.report(tmp_path / "probe" if inside else tmp_path) == page
    assert page.read_text(encoding="utf-8") == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["probe"]


@pytest.mark.parametrize("file", ["ledger.parquet", "curves.parquet"])
def test_a_cut_file_is_no_extraction(found, tmp_path, file):
    found.save(tmp_path / "probe")
    (tmp_path / "probe" / file).write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match=f"{file} is not as it was written"):
        lp.load(tmp_path)


def test_the_json_has_the_summary(found):
    told = json.loads(found.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert told["schema_version"] == 1
    assert len(told["summary"]) == len(found.summary)
    assert np.isfinite(told["facts"]["adapters"][""]["carried"])


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"ranks": (1,)}, {"ranks": [1]}),
        ({"auto": True, "max_rank": 1}, {"auto": True, "max_rank": 1}),
        ({"energy": 1.0, "denoised": True, "rank_multiple": 8}, {"energy": 1.0, "denoised": True, "rank_multiple": 8}),
        ({"budget": {"parameters": 1}}, {"budget": {"parameters": 1}}),
    ],
)
def test_the_facts_tell_whatever_was_asked_for(choice, told):
    assert RankChoice(**choice).facts() == told


@needs_chromium
def test_the_figures_are_written(found, tmp_path):
    pytest.importorskip("kaleido")
    found.save(tmp_path / "probe")
    lp.report(tmp_path, figures_dir=tmp_path / "figures")
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [f"{name}.{form}" for name in ("allotment", "error", "where") for form in ("png", "svg")]
