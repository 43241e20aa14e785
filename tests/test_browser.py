"""The page in real headless Chromium, from file://: it draws, sorts and filters, and says nothing in the console."""

import os
from pathlib import Path

import pytest
from builders import build

from lowrank_probe import reports

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)
HOSTILE = "<img src=x onerror=document.title='hacked'><b>"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM.exists() and "CI" not in os.environ,
        reason=f"{CHROMIUM} is missing: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def result():
    return build(layers=6, hostile=HOSTILE)


@pytest.fixture
def page(driver, result, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    path = tmp_path / "report.html"
    path.write_text(reports.render(result), encoding="utf-8")
    driver.get(path.as_uri())
    WebDriverWait(driver, 30).until(lambda d: d.execute_script("return document.body.dataset.drawn") == "yes")
    yield driver
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def find(page, css):
    return page.find_elements("css selector", css)


def button(page, within, label):
    return next(b for b in find(page, f"{within} button") if b.text.split("\n")[0].startswith(label))


def press(page, element):
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def column(page, table, heading):
    heads = [h.text for h in find(page, f"#{table} thead th")]
    return [c.text for c in find(page, f"#{table} tbody tr td:nth-child({heads.index(heading) + 1})")]


def test_every_plot_is_drawn_and_nothing_is_fetched(page, result):
    for name in result.figures:
        assert find(page, f"#{name} .plot svg.main-svg")
        assert page.execute_script("return document.querySelectorAll(arguments[0]).length", f"#{name} svg path") > 3
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert page.title != "hacked"
    assert not find(page, "img")


def test_a_button_changes_the_metric(page):
    title = (
        "return document.querySelector('#heatmap .plot .colorbar text[class*=title], #heatmap .cbtitle').textContent"
    )
    assert page.execute_script(title) == "r90 ÷ noise's r90"
    chip = button(page, "#heatmap", "stable rank")
    press(page, chip)
    assert page.execute_script(title) == "stable rank"
    assert [b.text for b in find(page, "#heatmap .controls [aria-pressed=true]")] == ["stable rank"]


def test_the_menu_changes_the_matrix(page, result):
    from selenium.webdriver.support.ui import Select

    select = Select(find(page, "#singular_values select")[0])
    name = "model.layers.3.mlp.down_proj.weight"
    assert HOSTILE in [option.text for option in select.options]
    select.select_by_visible_text(name)
    drawn = page.execute_script("return document.querySelector('#singular_values .plot').data[0].y[0]")
    assert drawn == pytest.approx(result.singular_values[name][0], rel=1e-4)


def test_the_table_sorts_and_filters(page, result):
    assert HOSTILE in column(page, "matrices", "name")
    press(page, button(page, "#matrices", "stable rank"))
    up = [float(x) for x in column(page, "matrices", "stable rank")]
    assert up == sorted(up)
    assert len(up) == len(result.table)
    press(page, button(page, "#matrices", "stable rank"))
    down = [float(x) for x in column(page, "matrices", "stable rank")]
    assert down == up[::-1]
    press(page, find(page, "#matrices input")[0])
    find(page, "#matrices input")[0].send_keys("layers.2 mlp")
    assert sorted(column(page, "matrices", "layer type")) == ["down", "gate", "up"]
    assert find(page, "#matrices .count")[0].text == f"3 of {len(result.table)}"


def test_sorting_works_from_the_keyboard_and_puts_the_open_end_last(page):
    from selenium.webdriver.common.keys import Keys

    button(page, "#matrices", "r90 high").send_keys(Keys.ENTER)
    ends = column(page, "matrices", "r90 high")
    assert ends[-1] == "∞"
    assert page.switch_to.active_element.text.startswith("r90 high")
    assert find(page, "#matrices th[aria-sort=ascending]")[0].text == "r90 high"


def test_undecidable_numbers_are_marked(page):
    cells = [c.text for c in find(page, "#matrices td.doubtful")]
    assert cells
    assert all(text.endswith(" ?") for text in cells)


def test_all_columns_can_be_shown(page, result):
    before = len(find(page, "#matrices th"))
    press(page, button(page, "#matrices", "All columns"))
    assert before < len(find(page, "#matrices th")) == len(result.table.columns)
    heading = next(h for h in find(page, "#matrices th") if h.text == "effective rank")
    assert heading.get_attribute("title") == "exp H(σ/Σσ)"


def test_the_ledger_is_filtered_by_status(page, result):
    vectors = int((result.ledger["status"] == "vector").sum())
    chip = button(page, "#ledger", "vector")
    assert chip.text.split() == ["vector", str(vectors)]
    press(page, chip)
    assert set(column(page, "ledger", "status")) == {"vector"}
    assert len(column(page, "ledger", "status")) == vectors


def test_a_narrow_dark_page_fits(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 380, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 23)"
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
