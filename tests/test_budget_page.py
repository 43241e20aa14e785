"""A budget's page in real headless Chromium, from file://: it draws, sorts, filters, and stays silent."""

from itertools import combinations

import pytest
from browsers import needs_chromium
from test_browser import arrives, button, choose, column, drawn, driver, find, fits, press, turns_dark, visit, wait  # noqa: F401
from test_budgets import LLAMA_8B

from lowrank_probe import budget_reports
from lowrank_probe.budgets import compare

pytestmark = [pytest.mark.browser, needs_chromium]


@pytest.fixture(scope="module")
def budgets():
    return compare(LLAMA_8B, seq=2048)


@pytest.fixture(scope="module")
def path(budgets, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(budget_reports.render(budgets, 10), encoding="utf-8")
    return file


@pytest.fixture
def page(driver, path):  # noqa: F811
    visit(driver, path.as_uri())
    yield driver
    driver.execute_script("localStorage.clear()")
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def test_every_plot_is_drawn_and_nothing_is_fetched(page, budgets):
    for name in ("bars", "phases", "ranks", "seqs"):
        assert page.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{name} svg path") > 3
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [card.text for card in find(page, ".card h3")] == [one.label for one in budgets]


def test_the_bar_of_a_card_is_full(page, budgets):
    widths = "[...bar.children].reduce((sum, part) => sum + parseFloat(part.style.width), 0)"
    widths = f"return [...document.querySelectorAll('.card .bar')].map(bar => {widths})"
    assert page.execute_script(widths) == pytest.approx([100] * len(budgets), abs=0.1)


def test_the_menus_choose(page, budgets):
    choose(page, "#phases select", "lora, bf16 base")
    lora = next(one for one in budgets if one.step.method == "lora")
    heights = [sum(values) for values in zip(*drawn(page, "phases", "data.map(t => t.y)"), strict=True)]
    assert heights == pytest.approx([n / 2**30 for n in lora.phases.values()], rel=1e-4)
    choose(page, "#ranks select", "adapter file, MB")
    axis = "return document.querySelector('#ranks .ytitle').textContent"
    assert page.execute_script(axis) == "adapter file, MB"


def test_the_cards_filter_and_sort(page, budgets):
    choose(page, "#cards [data-facet=fits]", f"true ({sum_fits(budgets)})")
    assert set(column(page, "cards", "fits")) == {"yes"}
    choose(page, "#cards [data-facet=run]", "full, fp32 Adam (42)")
    press(page, button(page, "#cards", "usable gib"))
    up = [float(x) for x in column(page, "cards", "usable gib")]
    assert up == sorted(up)
    assert min(up) * 2**30 >= 0.999 * budgets[0].total_bytes


def sum_fits(budgets):
    return int(budget_reports.cards_table(budgets)["fits"].sum())


@pytest.mark.parametrize("section", ["seqs", "cards", "mends", "components", "facts"])
def test_a_deep_link_arrives(driver, path, section):  # noqa: F811
    assert arrives(driver, path, section)


def test_a_narrow_dark_page_fits(page):
    assert turns_dark(page)
    assert fits(page)


def test_bars_have_the_width_of_a_narrow_screen_and_names_do_not_meet(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page.refresh()
        wait(page, lambda d: d.execute_script("return document.body.dataset.drawn") == "yes")
        assert page.execute_script("return document.querySelector('#bars .plot')._fullLayout._size.w") > 280
        box = "(e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
        left, _, right, _ = page.execute_script(f"return {box}(document.querySelector('#bars .xtitle'))")
        assert 0 < left < right < 400
        texts = page.execute_script(f"return [...document.querySelectorAll('#bars .annotation-text')].map({box})")
        assert len(texts) > 10
        assert all(one[0] >= 0 and one[2] <= 400 for one in texts)
        for a, b in combinations(texts, 2):
            assert min(a[2], b[2]) - max(a[0], b[0]) < 2 or min(a[3], b[3]) - max(a[1], b[1]) < 2
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_is_named(page):
    shown = [e for e in find(page, "button, main select, main input") if e.is_displayed()]
    assert len(shown) > 15
    assert all(e.accessible_name for e in shown)
