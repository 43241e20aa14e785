"""An extraction's page in real headless Chromium, from file://: it draws, sorts, filters, and stays silent."""

import pytest
from browsers import needs_chromium
from extractions import TYPES, build_extraction, checks
from test_browser import HOSTILE, arrives, button, choose, column, drawn, driver, find, fits, press, turns_dark, visit  # noqa: F401

from lowrank_probe import extraction_reports

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def found():
    made = build_extraction((2, 8, 16), layers=6, hostile=HOSTILE)
    made.facts.update(checks(made.adapters, HOSTILE))
    return made


@pytest.fixture(scope="module")
def path(found, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(extraction_reports.render(found), encoding="utf-8")
    return file


@pytest.fixture
def page(driver, path):  # noqa: F811
    visit(driver, path.as_uri())
    yield driver
    driver.execute_script("localStorage.clear()")
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def test_every_plot_is_drawn_and_nothing_is_fetched(page):
    for name in ("error", "allotment", "where"):
        assert page.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{name} svg path") > 3
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert page.title.endswith("· lowrank_probe")
    assert not find(page, "img")
    assert [card.text.split("\n")[0] for card in find(page, ".card h3")] == ["r2", "r8", "r16"]


def test_the_bar_of_a_card_is_full(page):
    widths = "[...bar.children].reduce((sum, part) => sum + parseFloat(part.style.width), 0)"
    widths = f"return [...document.querySelectorAll('.card .bar')].map(bar => {widths})"
    assert page.execute_script(widths) == pytest.approx([100, 100, 100], abs=0.05)


def test_the_menus_choose_the_adapter(page, found):
    choose(page, "#allotment select", "r16: rank")
    title = "return document.querySelector('#allotment .plot .cbtitle').textContent"
    assert page.execute_script(title) == "rank"
    rows = found.ledger[(found.ledger["adapter"] == "r16") & (found.ledger["status"] == "adapted")]
    z = drawn(page, "allotment", "data.filter(t => t.visible && t.z)[0].z")
    assert sorted(v for row in z for v in row if v is not None) == sorted(rows["rank"])
    choose(page, "#where select", "r8: share of the layer type")
    parts = drawn(page, "where", "data.map(trace => trace.x)")
    sums = [sum(shares) for shares in zip(*parts, strict=True)]
    assert sums == pytest.approx([1] * len(sums), rel=1e-4)
    axis = "return document.querySelector('#where .xtitle').textContent"
    assert page.execute_script(axis) == "share of ‖ΔW‖² of the layer type"


def test_the_ledger_sorts_and_filters(page, found):
    press(page, button(page, "#ledger", "relative error"))
    up = [float(x) for x in column(page, "ledger", "relative error") if x != "–"]
    assert up == sorted(up)
    choose(page, "#ledger [data-facet=adapter]", f"r8 ({len(found.ledger) // 3})")
    choose(page, "#ledger [data-facet=status]", "not carried (24)")
    assert len(column(page, "ledger", "name")) == 8
    assert set(column(page, "ledger", "status")) == {"not carried"}
    find(page, "#ledger input")[0].send_keys("onerror")
    assert column(page, "ledger", "name") == [HOSTILE]


def test_the_types_sort_by_what_is_cut_away(page, found):
    choose(page, "#types [data-facet=adapter]", f"r2 ({len(found.summary) // 3})")
    press(page, button(page, "#types", "truncated"))
    press(page, button(page, "#types", "truncated"))
    own = found.summary[found.summary["adapter"] == "r2"].sort_values("truncated", ascending=False)
    assert column(page, "types", "layer type")[: len(TYPES)] == list(own["layer_type"])[: len(TYPES)]


@pytest.mark.parametrize("section", ["error", "where", "calibration", "types", "ledger", "facts"])
def test_a_deep_link_arrives(driver, path, section):  # noqa: F811
    assert arrives(driver, path, section)


def test_a_narrow_dark_page_fits(page):
    assert turns_dark(page)
    assert fits(page)


def test_every_control_is_named(page):
    shown = [e for e in find(page, "button, main select, main input") if e.is_displayed()]
    assert len(shown) > 20
    assert all(e.accessible_name for e in shown)
