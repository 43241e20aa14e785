"""Figures: what is drawn equals the table, the spectra and the metrics; undecidable is never a number."""

import math

import numpy as np
import pandas as pd
import pytest
from builders import build

from lowrank_probe import figures, metrics
from lowrank_probe.errors import ProbeError


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


def test_heatmap_refuses_an_unknown_metric(result):
    with pytest.raises(ProbeError, match="unknown metric 'r91'; one of relative_r90"):
        figures.heatmap(result.table, "r91")


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
    before, at = figures.null_energy(np.array([rank - 1, rank]), shape)
    assert before < p <= at + 1e-9


def test_energy_curves_stop_where_truncated_lists_do():
    result = build(layers=2, truncated=True)
    curve = next(t for t in figures.energy_curves(result).data if t.name == "q")
    assert max(curve.x) == 32


def test_bracket_bars_span_the_bracket_and_skip_the_undecidable(result):
    figure = figures.bracket(result)
    closed = [t for t in figure.data if t.name == "closed"]
    drawn = {(low, low + bar) for t in closed for low, bar in zip(t.y, t.error_y.array, strict=True)}
    table = result.table[result.table["decidable_r90"] & np.isfinite(result.table["r90_high"])]
    assert drawn == set(zip(table["r90_low"], table["r90_high"], strict=True))
    assert sum(len(t.y) for t in closed) == len(table)
    unknown = [t for t in figure.data if t.name == "undecidable"]
    assert sum(len(t.text) for t in unknown) == (~result.table["decidable_r90"]).sum()
    assert {y for t in unknown for y in t.y} == {0}


def test_bracket_draws_an_open_end_as_an_arrow_at_the_null(result):
    figure = figures.bracket(result)
    opened = [t for t in figure.data if t.name == "open end" and t.y]
    row = result.table[np.isinf(result.table["r90_high"])].iloc[0]
    assert [(list(t.x), list(t.y), t.marker.symbol) for t in opened] == [([5], [row["null_r90"]], "triangle-up")]


def test_bracket_null_is_the_tables(result):
    figure = figures.bracket(result)
    nulls = [t.y[0] for t in figure.data if t.name == "null"]
    titles = [a.text for a in figure.layout.annotations]
    expected = result.table.groupby("layer_type")["null_r90"].median()
    assert dict(zip(titles, nulls, strict=True)) == expected.to_dict()


def test_singular_values_are_thinned_and_keep_both_ends():
    result = build(layers=1, hidden=512)
    figure = figures.singular_values(result)
    for button in figure.layout.updatemenus[0].buttons:
        s = result.singular_values[button.label]
        x, y = button.args[0]["x"][0], button.args[0]["y"][0]
        assert len(x) <= 250
        assert (x[0], x[-1]) == (1, len(s))
        assert y == pytest.approx(s[np.array(x) - 1], rel=1e-4)
        edge = result.table.set_index("name").at[button.label, "noise_edge"]
        assert button.args[0]["y"][2:] == [[edge] * 2, pytest.approx([1.05 * edge] * 2)]


def test_singular_values_offers_an_even_selection_of_many_matrices():
    result = build(layers=70, hidden=16)
    buttons = figures.singular_values(result).layout.updatemenus[0].buttons
    layers = result.table.set_index("name")["layer"]
    chosen = [int(layers[b.label]) for b in buttons if "q_proj" in b.label]
    assert len(buttons) <= figures.MAX_SPECTRA < len(result.table)
    assert (min(chosen), max(chosen)) == (0, 69)


def test_names_are_escaped_in_plotly_text():
    figure = figures.singular_values(build(layers=1, hostile="<b>x</b>&amp;"))
    assert "&lt;b&gt;x&lt;/b&gt;&amp;amp;" in {b.label for b in figure.layout.updatemenus[0].buttons}


def test_two_stacks_are_told_apart():
    table = build(layers=2).table
    table["stack"] = np.where(table["layer"].eq(0).fillna(False), "encoder", "decoder")
    assert {"encoder q", "decoder q"} <= set(figures.groups(table))


def test_all_figures_opens_on_a_metric_that_is_decidable(result):
    assert list(figures.all_figures(result)) == ["heatmap", "bracket", "energy_curves", "singular_values"]
    labels = list(figures.METRICS)
    result = build(layers=2)
    for flags, expected in ((["decidable_r90"], "signal_rank"), (["decidable_signal_rank"], "relative_update")):
        result.table[flags] = False
        assert labels[figures.all_figures(result)["heatmap"].layout.updatemenus[0].active] == expected


def test_no_matrix_no_figures(result):
    empty = type(result)(result.table.iloc[:0], result.ledger, {}, {}, {})
    assert figures.all_figures(empty) == {}
