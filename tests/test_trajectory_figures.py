"""The figures of a trajectory: their data, axes and names, and that all are written."""

import numpy as np
import pytest
import torch
from browsers import needs_chromium
from pairs import write
from test_cli import probe

import lowrank_probe as lp
from lowrank_probe.trajectory_figures import _log_ticks


def test_figures(growing, angled_trajectory):
    found = lp.trajectory(*growing)
    figures = found.figures
    assert list(figures) == ["relative_update", "r90", "signal_rank", "similarity", "grid", "amplification"]
    line = next(trace for trace in figures["relative_update"].data if trace.name == "q")
    q = found.table[found.table["layer_type"] == "q"]
    np.testing.assert_allclose(line.y, q["relative_update"], rtol=1e-5)
    heat = figures["similarity"]
    buttons = heat.layout.updatemenus[0].buttons
    assert [button.label for button in buttons][:2] == ["i = 1, output side", "i = 2, output side"]
    by_type = found.similarity_by_type.set_index(["layer_type", "i", "step_a", "step_b"])["phi_left"]
    kinds = list(dict.fromkeys(found.similarity_by_type["layer_type"]))
    z = buttons[2].args[0]["z"][2 * kinds.index("q")]
    assert z[0][2] == z[2][0] == pytest.approx(by_type["q", 4, "checkpoint-100", "checkpoint-300"], rel=1e-5)
    assert z[1][1] == 1
    assert "q · chance 0.062" in buttons[2].args[1].values(), "4/64"
    grid = angled_trajectory.figures["grid"]
    wanted = angled_trajectory.similarity.pivot(index="i", columns="j", values="phi_right").to_numpy()
    np.testing.assert_allclose(grid.data[1].z, wanted, rtol=1e-5)


def test_a_step_that_did_not_move_is_no_question_mark(growing):
    found = lp.trajectory(growing[0], [growing[1][0], growing[0], growing[1][1]], labels=["a", "still", "b"])
    marks = found.figures["r90"].data[1]
    assert list(marks.y) == [None, 0, None]
    assert marks.text[1] == "–"
    assert marks.hovertext[1] == "no matrix of this type moved"
    assert "3" in marks.hovertext[0]
    values, grey = found.figures["similarity"].data[:2]
    assert [row[1] for row in values.z] == [None] * 3
    assert [row[1] for row in grey.z] == [None] * 3
    assert values.z[0][0] == values.z[2][2] == 1


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.021, 0.024, None], [0.021, 0.022, 0.023, 0.024]),
        ([0.01, 0.05, 0.3], None),
        ([0.4], [0.4]),
        ([None], [1]),
    ],
)
def test_a_logarithmic_axis_has_labels_whatever_it_spans(values, ticks):
    found = _log_ticks(values, percent=True)
    if ticks is not None:
        assert found["tickvals"] == ticks
        assert found["ticktext"] == [f"{100 * tick:g}%" for tick in ticks]
    known = [v for v in values if v]
    if len(known) > 1:
        assert sum(min(known) <= tick <= max(known) for tick in found["tickvals"]) >= 3


def test_names_of_any_length_are_drawn_short_and_apart(tmp_path):
    long = [f"{'x' * 250}{i}{'x' * 250}.weight" for i in range(2)]
    generator = torch.Generator().manual_seed(0)
    W = {name: torch.randn(24, 20, generator=generator) for name in long}
    paths = [write(tmp_path / str(n), {k: (1 + n / 10) * v for k, v in W.items()}) for n in range(3)]
    found = lp.trajectory(paths[0], paths[1:])
    drawn = [trace.name for trace in found.figures["relative_update"].data]
    assert len(set(drawn)) == 2
    assert max(map(len, drawn)) < 50
    heat = found.results["1"].figures["heatmap"].data[0]
    assert len(set(heat.y)) == 2
    assert max(map(len, heat.y)) < 50


@pytest.mark.slow
@needs_chromium
def test_figures_of_the_trajectory_and_of_every_step_are_written(run, tmp_path):
    probe("report", run, "--figures", tmp_path / "figures")
    found = lp.load(run)
    steps = {f"{label}/{name}" for label, result in found.results.items() for name in result.figures}
    expected = {f"{name}.{form}" for name in {*found.figures, *steps} for form in ("svg", "png")}
    written = [path for path in (tmp_path / "figures").rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path / "figures").as_posix() for path in written} == expected
    assert "Do the steps move in the same directions?" in (tmp_path / "figures" / "similarity.svg").read_text("utf-8")
