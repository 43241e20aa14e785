"""Figures: what is drawn equals the table, the spectra and the metrics; undecidable is never a number."""

import asyncio
import base64
import math
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import psutil
import pytest
from browsers import needs_chromium
from builders import build

from lowrank_probe import figure_data, figure_spectra, figures, metrics, verdicts
from lowrank_probe.errors import OutputError, ProbeError


@pytest.fixture(scope="module")
def result():
    return build()


def shown(figure, kind):
    return [t for t in figure.data if t.type == kind and t.visible is not False]


def cell(trace, row, column):
    return trace.z[list(trace.y).index(row)][list(trace.x).index(column)]


@pytest.mark.parametrize("metric", figures.METRICS)
def test_heatmap_shows_the_tables_values_and_no_undecidable_one(result, metric):
    flag = figures.METRICS[metric].flag
    figure = figures.heatmap(result.table, metric)
    values, unknown = shown(figure, "heatmap")
    marks = {(y, x): t for y, x, t in zip(*(shown(figure, "scatter")[0][k] for k in ("y", "x", "text")), strict=True)}
    for row in result.table.to_dict("records"):
        column = "outside" if pd.isna(row["layer"]) else str(row["layer"])
        drawn = cell(values, row["layer_type"], column)
        if flag and not row[flag]:
            assert drawn is None
            assert cell(unknown, row["layer_type"], column) == 1
            assert marks[row["layer_type"], column] == "?"
        elif math.isnan(row[metric]):
            assert drawn is None
            assert marks[row["layer_type"], column] == "–"
        else:
            assert drawn == pytest.approx(row[metric], rel=1e-5)
            assert (row["layer_type"], column) not in marks


def test_heatmap_buttons_show_one_metric_each(result):
    figure = figures.heatmap(result.table)
    buttons = figure.layout.updatemenus[0].buttons
    assert [b.label for b in buttons] == [m.label for m in figures.METRICS.values()]
    visible = np.array([b.args[0]["visible"] for b in buttons])
    assert visible.shape[1] == len(figure.data)
    assert (visible.sum(axis=0) == 1).all()
    for button, name in zip(buttons, figures.METRICS, strict=True):
        drawn = next(t for t, on in zip(figure.data, button.args[0]["visible"], strict=True) if on)
        assert drawn.colorbar.title.text == figures.METRICS[name].label


def test_heatmap_of_experts_is_their_median():
    table = build(layers=2, copies=3).table
    values = shown(figures.heatmap(table, "stable_rank"), "heatmap")[0]
    experts = table[(table["layer_type"] == "up") & (table["layer"] == 1)]
    assert len(experts) == 3
    assert cell(values, "up", "1") == pytest.approx(experts["stable_rank"].median(), rel=1e-5)


def test_energy_curves_are_the_medians_of_energy_beside_the_null(result):
    figure = figures.energy_curves(result)
    curve = next(t for t in figure.data if t.name == "q")
    names = result.table.loc[result.table["layer_type"] == "q", "name"]
    norms = result.table.set_index("name")["fro_norm"]
    for rank, drawn in zip(curve.x, curve.y, strict=True):
        energies = [metrics.energy(result.singular_values[n], norms[n], int(rank)) for n in names]
        assert drawn == pytest.approx(np.median(energies), rel=1e-5)
    null = next(t for t in figure.data if t.name == "q null")
    assert null.legendgroup == curve.legendgroup
    assert null.line.dash == "dash"
    reached = next(x for x, y in zip(null.x, null.y, strict=True) if y >= 0.9)
    before = max(x for x, y in zip(null.x, null.y, strict=True) if y < 0.9)
    assert before < metrics.null_energy_rank((64, 64), 0.9) <= reached


@pytest.mark.parametrize("shape", [(64, 64), (176, 64), (512, 64), (4096, 11008)])
@pytest.mark.parametrize("p", metrics.ENERGY_LEVELS)
def test_null_energy_agrees_with_the_null_rank(shape, p):
    rank = metrics.null_energy_rank(shape, p)
    before, at = figure_data.null_energy(np.array([rank - 1, rank]), shape)
    assert before < p <= at + 1e-9


def test_energy_curves_stop_where_truncated_lists_do():
    result = build(layers=2, truncated=True)
    curve = next(t for t in figures.energy_curves(result).data if t.name == "q")
    assert max(curve.x) == 32


def test_bracket_bars_span_the_bracket_and_skip_the_undecidable(result):
    figure = figures.bracket(result)
    bars = [t for t in figure.data if t.name == "bracket"]
    drawn = {(low, low + bar) for t in bars for low, bar in zip(t.y, t.error_y.array, strict=True)}
    table = result.table[result.table["decidable_r90"] & result.table["r90_high"].notna()]
    assert drawn == set(zip(table["r90_low"], table["r90_high"], strict=True))
    assert sum(len(t.y) for t in bars) == len(table)
    unknown = [t for t in figure.data if t.name == "undecidable"]
    marks = Counter(mark for t in unknown for mark in t.text)
    unreached = result.table["decidable_r90"] & result.table["r90_high"].isna()
    assert marks == {"?": (~result.table["decidable_r90"]).sum(), "–": unreached.sum()}
    assert {y for t in unknown for y in t.y} == {0}


def test_bracket_null_and_thresholds_are_the_tables(result):
    figure = figures.bracket(result)
    titles = [a.text for a in figure.layout.annotations]
    expected = result.table.groupby("layer_type")["null_r90"].median()
    nulls = [t.y[0] for t in figure.data if t.name == "null"]
    assert dict(zip(titles, nulls, strict=True)) == expected.to_dict()
    halves = [t.y[0] / 0.5 for t in figure.data if t.name == "thresholds"]
    assert dict(zip(titles, halves, strict=True)) == pytest.approx(expected.to_dict())
    assert len({t.xaxis for t in figure.data if t.name == "null"}) == len(titles)


@pytest.mark.parametrize("layers", [1, 2, 3, 8, 9, 30, 48])
def test_every_tick_of_a_layer_axis_is_a_layer(layers):
    result = build(layers=layers, hidden=16)
    here = set(result.table["layer"].dropna())
    drawn = figures.bracket(result).layout
    axes = [drawn[key] for key in drawn if key.startswith("xaxis")]
    assert len(axes) == 9
    for axis in axes:
        if axis.ticktext == ("outside the blocks",):
            assert axis.tickvals == (-1,)
        else:
            assert set(axis.tickvals) <= here
            assert axis.ticktext == tuple(map(str, axis.tickvals))
            assert min(layers, 5) <= len(axis.tickvals) <= 8
    for figure in (figures.heatmap(result.table), figures.relative_update(result.table)):
        assert figure.layout.xaxis.type == "category"
        assert set(figure.layout.xaxis.tickvals) <= {*map(str, here), "outside"}


def test_a_type_inside_and_outside_of_the_blocks_names_both():
    result = build(layers=2, types=("q",))
    axis = figures.bracket(replace(result, table=result.table.assign(layer_type="q"))).layout.xaxis
    assert (axis.tickvals, axis.ticktext) == ((-1, 0, 1), ("outside", "0", "1"))


def test_hovering_shows_ranks_as_whole_numbers(result):
    bracket = figures.bracket(result)
    assert "between %{y:.0f} and %{customdata:.0f}" in bracket.data[0].hovertemplate
    formats = {name: metric.form for name, metric in figures.METRICS.items()}
    ranks = {"r90", "r90_denoised", "r50", "signal_rank"}
    assert {name for name, form in formats.items() if form == ".0f"} == ranks


def test_relative_update_is_the_tables_by_layer(result):
    figure = figures.relative_update(result.table)
    assert [t.name for t in figure.data] == figure_data.groups(result.table)
    for trace in figure.data:
        part = result.table[result.table["layer_type"] == trace.name]
        layers = ["outside" if pd.isna(n) else str(n) for n in part["layer"]]
        assert dict(zip(trace.x, trace.y, strict=True)) == pytest.approx(
            dict(zip(layers, part["relative_update"], strict=True)), rel=1e-5
        )
    looks = {(t.line.color, t.line.dash, t.marker.symbol) for t in figure.data}
    assert len(looks) == len(figure.data)


def test_relative_update_of_experts_is_their_median_and_says_so():
    table = build(layers=2, copies=3).table
    trace = next(t for t in figures.relative_update(table).data if t.name == "up")
    experts = table[(table["layer_type"] == "up") & (table["layer"] == 1)]
    assert trace.y[trace.x.index("1")] == pytest.approx(experts["relative_update"].median(), rel=1e-5)
    assert trace.customdata[0] == ", median of 3"


def test_relative_update_without_a_base_is_the_norm_of_the_update(result):
    alone = result.table.assign(relative_update=np.nan)
    figure = figures.relative_update(alone)
    assert figure.layout.yaxis.title.text == "‖ΔW‖"
    assert max(figure.data[1].y) == pytest.approx(alone.loc[alone["layer_type"] == "q", "fro_norm"].max(), rel=1e-5)


def test_relative_update_is_logarithmic_where_one_type_stands_far_out(result):
    far = result.table.copy()
    far.loc[far["layer_type"] == "embedding", "relative_update"] = 50.0
    assert figures.relative_update(result.table).layout.yaxis.type is None
    assert figures.relative_update(far).layout.yaxis.type == "log"


@pytest.mark.parametrize("metric", figures.METRICS)
def test_distribution_boxes_are_the_quartiles_of_what_can_be_trusted(result, metric):
    flag = figures.METRICS[metric].flag
    figure = figures.distribution(result.table, metric)
    box = next(t for t in figure.data if t.name == "box" and t.visible)
    unknown = next(t for t in figure.data if t.name == "unknown" and t.visible)
    dots = next(t for t in figure.data if t.name == "matrices" and t.visible)
    names = figure_data.groups(result.table)
    assert list(figure.layout.xaxis.ticktext) == names
    sure = result.table[result.table[flag]] if flag else result.table
    sure = sure[np.isfinite(sure[metric])]
    for i, name in enumerate(names):
        values = sure.loc[sure["layer_type"] == name, metric].to_numpy()
        whole = int((result.table["layer_type"] == name).sum())
        assert (i in unknown.x) == (len(values) < whole)
        assert (i in box.x) == (len(values) > 0)
        if len(values):
            at = list(box.x).index(i)
            drawn = (box.q1[at], box.median[at], box.q3[at])
            assert drawn == pytest.approx(np.percentile(values, [25, 50, 75]), rel=1e-5)
            here = [y for x, y in zip(dots.x, dots.y, strict=True) if round(x) == i]
            assert sorted(here) == pytest.approx(sorted(values), rel=1e-5)


def test_distribution_buttons_show_one_metric_and_name_its_axis(result):
    figure = figures.distribution(result.table)
    for button, metric in zip(figure.layout.updatemenus[0].buttons, figures.METRICS.values(), strict=True):
        visible, layout = button.args
        assert next(t.name for t, on in zip(figure.data, visible["visible"], strict=True) if on) == "box"
        assert sum(visible["visible"]) == (4 if metric.colours == "relative" else 3)
        assert layout["yaxis.title.text"] == metric.label == button.label


def test_distribution_thins_its_dots_but_keeps_the_extremes():
    table = build(layers=10, hidden=16, copies=12).table
    figure = figures.distribution(table, "stable_rank")
    dots = next(t for t in figure.data if t.name == "matrices" and t.visible)
    at = figure_data.groups(table).index("up")
    drawn = [y for x, y in zip(dots.x, dots.y, strict=True) if round(x) == at]
    values = table.loc[table["layer_type"] == "up", "stable_rank"]
    assert len(drawn) == 60 < len(values)
    assert (min(drawn), max(drawn)) == pytest.approx((values.min(), values.max()), rel=1e-5)


@pytest.mark.parametrize("draw", [figures.heatmap, figures.distribution])
def test_an_unknown_metric_is_refused(result, draw):
    with pytest.raises(ProbeError, match="unknown metric 'r91'; one of relative_r90"):
        draw(result.table, "r91")


def test_singular_values_are_thinned_and_keep_both_ends():
    result = build(layers=1, hidden=512)
    figure = figures.singular_values(result)
    for button in figure.layout.updatemenus[0].buttons:
        s = result.singular_values[button.label]
        x, y = button.args[0]["x"][1], button.args[0]["y"][1]
        assert len(x) <= 120
        assert (x[0], x[-1]) == (1, len(s))
        assert y == pytest.approx(s[np.array(x) - 1], rel=1e-4)
        edge = result.table.set_index("name").at[button.label, "noise_edge"]
        assert button.args[0]["y"][3:] == [[edge] * 2, pytest.approx([1.05 * edge] * 2)]


@pytest.mark.parametrize("shape", [(300, 300), (120, 480), (480, 120)])
def test_the_grey_area_is_what_independent_errors_alone_have(shape):
    errors = np.random.default_rng(0).uniform(-0.5, 0.5, shape)
    found = np.linalg.svd(errors, compute_uv=False)
    index = np.array([2, 5, 20, 60, 100])
    expected = figure_data.null_values(index, shape) * math.sqrt(1 / 12)
    assert found[index - 1] == pytest.approx(expected, rel=0.03)
    assert len(figure_data.null_values(np.array([1, min(shape), min(shape) + 1]), shape)) == 2


def test_the_grey_area_is_drawn_for_rounding_only_and_of_the_rows_that_moved(result):
    name = "model.layers.2.self_attn.q_proj.weight"
    row = result.table["name"] == name
    std = result.table.loc[row, "noise_std"].item()
    noise = figures.singular_values(result, name).data[0]
    assert noise.fill == "tozeroy"
    assert noise.y == pytest.approx(std * figure_data.null_values(np.array(noise.x), (64, 64)), rel=1e-4)
    half = build()
    half.table.loc[row, "edge_ratio"] = half.table.loc[row, "noise_edge"] / (std * (math.sqrt(32) + math.sqrt(64)))
    assert max(figures.singular_values(half, name).data[0].x) <= 32
    half.table.loc[row, "noise_model"] = "dead-zone"
    figure = figures.singular_values(half, name)
    assert [len(t.x) > 0 for t in figure.data] == [False, True, True, False, False]


def test_singular_values_of_a_name_have_no_menu_and_an_unknown_one_is_refused(result):
    name = "model.layers.1.mlp.up_proj.weight"
    figure = figures.singular_values(result, name)
    assert not figure.layout.updatemenus
    assert name in figure.layout.title.text
    assert figure.data[1].y[0] == pytest.approx(result.singular_values[name][0], rel=1e-5)
    with pytest.raises(ProbeError, match=r"model\.nowhere: no spectrum of that name"):
        figures.singular_values(result, "model.nowhere")


def test_singular_values_offers_an_even_selection_of_many_matrices():
    result = build(layers=70, hidden=16)
    buttons = figures.singular_values(result).layout.updatemenus[0].buttons
    layers = result.table.set_index("name")["layer"]
    chosen = [int(layers[b.label]) for b in buttons if "q_proj" in b.label]
    assert len(buttons) <= figure_spectra.MAX_SPECTRA < len(result.table)
    assert (min(chosen), max(chosen)) == (0, 69)


def test_packed_spectra_unpack_to_the_figures_lines(result):
    packed = figure_data.packed_spectra(result, 120)
    values = np.frombuffer(base64.b64decode(packed["values"]), dtype="<f4")
    start = 0
    for row, (number, n_raw, n_denoised, std, edge) in zip(
        result.table.to_dict("records"), packed["rows"], strict=True
    ):
        x, y = figure_data.spectrum_points(result, row, 120)
        grid = packed["grids"][number]
        assert [grid["index"][:n_raw], grid["index"][:n_denoised]] == x[1:3]
        assert values[start : start + n_raw] == pytest.approx(y[1], rel=1e-5)
        assert values[start + n_raw : start + n_raw + n_denoised] == pytest.approx(y[2], rel=1e-5)
        assert [std * v for v in grid["noise"]] == pytest.approx(y[0], rel=1e-4)
        assert [edge, edge] == pytest.approx(y[3], rel=1e-5)
        start += n_raw + n_denoised
    assert start == len(values)


def test_packed_spectra_mark_a_matrix_without_one(result):
    some = replace(result, singular_values=dict(list(result.singular_values.items())[1:]))
    assert figure_data.packed_spectra(some, 120)["rows"][0] == [-1, 0, 0, 0, 0]


def test_the_verdict_of_one_matrix_is_the_rule_of_verdicts(result):
    alone = verdicts.verdict_alone(result.table)
    for i, word in enumerate(alone):
        expected, _ = verdicts.verdict(result.table.iloc[[i]])
        known = result.table["decidable_r90"].iloc[i] and not pd.isna(result.table["r90_high"].iloc[i])
        assert expected.startswith("undecidable" if word == "between" else word)
        assert (word == "undecidable") != known
    assert set(alone) == {"low-rank", "not low-rank", "between", "undecidable"}


def test_names_are_escaped_in_plotly_text():
    figure = figures.singular_values(build(layers=1, hostile="<b>x</b>&amp;"))
    assert "&lt;b&gt;x&lt;/b&gt;&amp;amp;" in {b.label for b in figure.layout.updatemenus[0].buttons}


def test_two_stacks_are_told_apart():
    table = build(layers=2).table
    table["stack"] = np.where(table["layer"].eq(0).fillna(False), "encoder", "decoder")
    assert {"encoder q", "decoder q"} <= set(figure_data.groups(table))


def test_all_figures_opens_on_a_metric_that_is_decidable(result):
    names = ["heatmap", "bracket", "distribution", "relative_update", "energy_curves", "singular_values"]
    assert list(figures.all_figures(result)) == list(figures.specs(result)) == names
    labels = list(figures.METRICS)
    result = build(layers=2)
    for flags, expected in ((["decidable_r90"], "signal_rank"), (["decidable_signal_rank"], "relative_update")):
        result.table[flags] = False
        assert labels[figures.all_figures(result)["heatmap"].layout.updatemenus[0].active] == expected
        assert labels[figures.all_figures(result)["distribution"].layout.updatemenus[0].active] == expected


def test_no_matrix_no_figures(result):
    empty = type(result)(result.table.iloc[:0], result.ledger, {}, {}, {})
    assert figures.all_figures(empty) == {}


@pytest.mark.parametrize("size", [{}, {"layers": 3, "copies": 12}, {"layers": 2, "truncated": True}])
def test_plotly_accepts_every_figure_and_the_page_draws_the_same(size):
    result = build(**size)
    drawn = figures.specs(result)
    for name, figure in figures.all_figures(result).items():
        assert len(figure.data) == len(drawn[name]["data"])
        for trace, spec in zip(figure.data, drawn[name]["data"], strict=True):
            assert trace.to_plotly_json()["type"] == spec["type"]
            assert trace.name == spec.get("name")


@pytest.mark.slow
@needs_chromium
def test_figures_are_written_as_svg_and_png(result, tmp_path):
    paths = figures.write(result, tmp_path / "figures")
    assert {p.name for p in paths} == {f"{n}.{form}" for n in figures.specs(result) for form in ("svg", "png")}
    assert set((tmp_path / "figures").iterdir()) == set(paths)
    for path in paths:
        if path.suffix == ".png":
            head = path.read_bytes()[:24]
            assert head.startswith(b"\x89PNG")
            assert int.from_bytes(head[16:20], "big") == 2200
        else:
            svg = path.read_text(encoding="utf-8")
            assert svg.startswith("<svg")
            assert figures.specs(result)[path.stem]["layout"]["title"]["text"].partition("?")[0] in svg


def test_writing_figures_without_kaleido_names_the_mend(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido.errors", None)
    with pytest.raises(ProbeError, match=r"needs kaleido 1\.3 or newer: pip install 'lowrank_probe\[figures\]'"):
        figures.write(result, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_writing_figures_without_a_browser_names_the_mend(result, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    with pytest.raises(ProbeError, match=r"Chrome or Chromium \(BROWSER_PATH=/nowhere/chrome is none\): install it"):
        figures.write(result, tmp_path / "figures")


def test_a_browser_that_does_not_work_is_an_error_of_one_line(result, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/bin/true")
    with pytest.raises(ProbeError, match="the browser did not draw the figures") as error:
        figures.write(result, tmp_path / "figures")
    assert "\n" not in str(error.value)


def test_a_browser_that_never_answers_is_ended(result, tmp_path, monkeypatch):
    asleep = tmp_path / "chrome"
    asleep.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n", encoding="utf-8")
    asleep.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(asleep))
    monkeypatch.setattr(figures, "STALLED_S", 5.0)
    with pytest.raises(ProbeError, match=r"did not draw the figures: it has done nothing for 5 s\. Is it a working"):
        figures.write(result, tmp_path / "figures")
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "figures").exists()


@pytest.mark.slow
@needs_chromium
def test_a_browser_that_never_closes_keeps_what_it_drew(result, tmp_path, monkeypatch):
    from choreographer import Browser

    async def never(self):
        await asyncio.sleep(600)

    monkeypatch.setattr(Browser, "close", never)
    monkeypatch.setattr(figures, "CLEANED_S", 1.0)
    assert all(path.stat().st_size for path in figures.write(result, tmp_path / "figures"))
    assert not [thread for thread in threading.enumerate() if "(run)" in thread.name]


@needs_chromium
def test_figures_cannot_be_written_into_a_file(result, tmp_path):
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(OutputError, match=r"taken: is a file \(expected a directory\); choose another --figures"):
        figures.write(result, tmp_path / "taken")


def test_a_figure_that_cannot_be_drawn_leaves_those_that_were_there(result, tmp_path, monkeypatch):
    (tmp_path / "heatmap.svg").write_text("before", encoding="utf-8")
    monkeypatch.setenv("BROWSER_PATH", "/bin/true")
    with pytest.raises(ProbeError, match="did not draw"):
        figures.write(result, tmp_path)
    assert [(path.name, path.read_text("utf-8")) for path in tmp_path.iterdir()] == [("heatmap.svg", "before")]


@pytest.mark.parametrize("values", [[1 - 3e-16, 1 - 1e-16], [1.0, 1.0], [3.0], [0.0, 1.0, 2.0, 3.0, 100.0]])
def test_a_box_bounds_its_values_also_where_they_are_one_rounding_apart(values):
    box = figure_data.five_numbers(np.array(values))
    assert box["lowerfence"] <= box["q1"] <= box["median"] <= box["q3"] <= box["upperfence"]
    assert box["lowerfence"] == pytest.approx(values[0])
    assert box["upperfence"] == pytest.approx(3.0 if len(values) == 5 else values[-1])
