"""The page in real headless Chromium, from file://: it draws, sorts and filters, and says nothing in the console."""

import pytest
import torch
from browsers import CHROMIUM, DRIVER, needs_chromium
from builders import build
from pairs import add_update, llama_tensors, write

import lowrank_probe as lp
from lowrank_probe import reports

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
CHOSEN = "return document.querySelector('#choose-matrix option:checked').textContent"
HOSTILE = "<img src=x onerror=document.title='hacked'><b>"

pytestmark = [pytest.mark.browser, needs_chromium]


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


@pytest.fixture(scope="module")
def path(result, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(reports.render(result), encoding="utf-8")
    return file


def wait(driver, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 60, ignored_exceptions=[StaleElementReferenceException]).until(condition)


def visit(driver, address):
    driver.get("about:blank")  # another fragment alone would not load the page anew
    driver.get(address)
    wait(driver, lambda d: d.execute_script("return document.body.dataset.drawn") == "yes")


@pytest.fixture
def page(driver, path):
    visit(driver, path.as_uri())
    yield driver
    driver.execute_script("localStorage.clear()")
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def find(page, css):
    return page.find_elements("css selector", css)


def button(page, within, label):
    return next(b for b in find(page, f"{within} button") if b.text.split("\n")[0].startswith(label))


def press(page, element):
    """Click it; anew where plots that were still being laid out moved it away."""

    def clicked(page):
        from selenium.common.exceptions import ElementClickInterceptedException

        page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        try:
            element.click()
        except ElementClickInterceptedException:
            return False
        return True

    wait(page, clicked)


def turns_dark(page):
    background = "return getComputedStyle(document.body).backgroundColor"
    light = page.execute_script(background)
    press(page, find(page, "#theme")[0])
    return page.execute_script(background) == "rgb(15, 18, 23)" != light


def fits(page, width=380):
    """Whether nothing sticks out of a narrow screen."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        return page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def arrives(driver, path, section):
    """Whether a deep link shows its section at the top, or as near as the page's end allows, without a word."""
    visit(driver, f"{path.as_uri()}#{section}")
    top, last = driver.execute_script(
        f"return [document.querySelector('#{section}').getBoundingClientRect().top,"
        " innerHeight + scrollY >= document.documentElement.scrollHeight - 1]"
    )
    return (0 <= top < 120 or last) and driver.get_log("browser") == []


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


def choose(page, css, words):
    from selenium.webdriver.support.ui import Select

    select = Select(find(page, css)[0])
    select.select_by_visible_text(words)
    return select


def drawn(page, figure, words):
    return page.execute_script(f"return document.querySelector('#{figure} .plot').{words}")


def test_the_menu_changes_the_heat_maps_metric(page):
    title = "return document.querySelector('#heatmap .plot .cbtitle').textContent"
    assert page.execute_script(title) == "r90 ÷ noise's r90"
    choose(page, "#heatmap select", "stable rank")
    assert page.execute_script(title) == "stable rank"


def test_the_menu_changes_the_distributions_metric_and_its_axis(page):
    axis = "return document.querySelector('#distribution .ytitle').textContent"
    assert page.execute_script(axis) == "r90 ÷ noise's r90"
    choose(page, "#distribution select", "size of the update")
    assert page.execute_script(axis) == "size of the update"
    visible = drawn(page, "distribution", "data.map(t => t.visible)")
    assert sum(visible) == 3


def test_a_matrix_is_chosen_by_type_and_stepped_through(page, result):
    select = choose(page, "#choose-type", "down")
    assert select.options[0].text == f"all ({len(result.table)})"
    names = [o.text for o in find(page, "#choose-matrix option")]
    assert names == list(result.table.loc[result.table["layer_type"] == "down", "name"])
    choose(page, "#choose-matrix", names[3])
    s = result.singular_values[names[3]]
    y = drawn(page, "singular_values", "data.map(t => t.y)")
    assert y[1][0] == pytest.approx(s[0], rel=1e-4)
    row = result.table.set_index("name").loc[names[3]]
    assert y[3] == pytest.approx([row["noise_edge"]] * 2, rel=1e-4)
    assert max(y[0]) == pytest.approx(row["noise_std"] * (64**0.5 + 176**0.5), rel=0.1)
    press(page, find(page, "#next-matrix")[0])
    assert drawn(page, "singular_values", "data[1].y[0]") == pytest.approx(
        result.singular_values[names[4]][0], rel=1e-4
    )
    press(page, find(page, "#previous-matrix")[0])
    assert drawn(page, "singular_values", "data[1].y[0]") == pytest.approx(s[0], rel=1e-4)
    assert "64 × 176" in find(page, "#chosen")[0].text


def test_a_name_in_the_table_opens_its_spectrum(page, result):
    find(page, "#matrices input")[0].send_keys("onerror")
    # The table is drawn anew after the key, the link's event comes after the click, the page moves after that.
    wait(page, lambda d: [one.text.replace("\n", "") for one in find(d, "#matrices tbody a")] == [HOSTILE])
    press(page, find(page, "#matrices tbody a")[0])
    wait(page, lambda d: d.execute_script(CHOSEN) == HOSTILE)
    drawn_first = drawn(page, "singular_values", "data[1].y[0]")
    assert drawn_first == pytest.approx(result.singular_values[HOSTILE][0], rel=1e-4)
    top = "return document.querySelector('#singular_values').getBoundingClientRect().top"
    wait(page, lambda d: abs(d.execute_script(top)) < 120)
    assert page.title != "hacked"


@pytest.mark.parametrize("section", ["bracket", "energy_curves", "matrices", "ledger"])
def test_a_deep_link_arrives(driver, path, section):
    visit(driver, f"{path.as_uri()}#{section}")
    top = driver.execute_script(f"return document.querySelector('#{section}').getBoundingClientRect().top")
    assert 0 <= top < 120
    assert driver.get_log("browser") == []


def test_a_deep_link_names_a_matrix(driver, path, result):
    name = "model.layers.4.mlp.up_proj.weight"
    visit(driver, f"{path.as_uri()}#singular_values/{name}")
    assert drawn(driver, "singular_values", "data[1].y[0]") == pytest.approx(result.singular_values[name][0], rel=1e-4)
    top = driver.execute_script("return document.querySelector('#singular_values').getBoundingClientRect().top")
    assert 0 <= top < 120
    visit(driver, f"{path.as_uri()}#singular_values/%E0%A4%A")
    assert driver.get_log("browser") == []


def test_the_theme_is_toggled_and_kept(page, path):
    def background():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    def ink():
        return page.execute_script("return document.querySelector('#heatmap .xtick text').style.fill")

    light, written = background(), ink()
    button = find(page, "#theme")[0]
    assert button.text == "Dark", "what it switches to"
    press(page, button)
    assert button.text == "Light"
    assert background() == "rgb(15, 18, 23)" != light
    assert ink() != written
    visit(page, path.as_uri())
    assert background() == "rgb(15, 18, 23)"
    press(page, find(page, "#theme")[0])
    assert background() == light


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


def test_the_table_is_filtered_by_type_and_by_verdict(page, result):
    choose(page, "#matrices [data-facet=layer_type]", "q (6)")
    assert set(column(page, "matrices", "layer type")) == {"q"}
    choose(page, "#matrices [data-facet=layer_type]", f"all ({len(result.table)})")
    verdicts = find(page, "#matrices [data-facet=verdict_alone] option")
    undecidable = next(o.text for o in verdicts if o.text.startswith("undecidable"))
    choose(page, "#matrices [data-facet=verdict_alone]", undecidable)
    assert set(column(page, "matrices", "verdict alone")) == {"undecidable"}
    assert f"({len(column(page, 'matrices', 'name'))})" in undecidable


def test_sorting_works_from_the_keyboard_and_puts_the_unknown_last(page):
    from selenium.webdriver.common.keys import Keys

    button(page, "#matrices", "r90 high").send_keys(Keys.ENTER)
    ends = column(page, "matrices", "r90 high")
    assert ends[-1] == "–"
    assert page.switch_to.active_element.text.startswith("r90 high")
    assert find(page, "#matrices th[aria-sort=ascending]")[0].text == "r90 high"


def test_undecidable_numbers_are_marked(page):
    cells = [c.text for c in find(page, "#matrices td.doubtful")]
    assert cells
    assert all(text.endswith(" ?") for text in cells)


def test_all_columns_can_be_shown(page, result):
    before = len(find(page, "#matrices th"))
    press(page, button(page, "#matrices", "All columns"))
    assert before < len(find(page, "#matrices th")) == len(result.table.columns) + 1  # verdict alone
    heading = next(h for h in find(page, "#matrices th") if h.text == "effective rank")
    assert heading.get_attribute("title") == "exp H(σ/Σσ)"


def test_the_ledger_is_filtered_by_status(page, result):
    vectors = int((result.ledger["status"] == "vector").sum())
    choose(page, "#ledger select", f"vector ({vectors})")
    assert set(column(page, "ledger", "status")) == {"vector"}
    assert len(column(page, "ledger", "status")) == vectors


def test_every_control_is_named_reachable_and_shows_its_focus(page):
    from selenium.webdriver.common.keys import Keys

    shown = [e for e in find(page, "button, main select, main input") if e.is_displayed()]
    assert len(shown) > 20
    assert all(e.accessible_name for e in shown)
    page.execute_script("document.querySelector('#heatmap').scrollIntoView()")
    select = find(page, "#heatmap select")[0]
    page.execute_script("arguments[0].focus()", select)
    select.send_keys(Keys.TAB)
    reached = page.switch_to.active_element
    assert reached.get_attribute("class") == "scroll"  # the wide plot, scrolled by the arrow keys
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


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


@pytest.mark.slow
def test_five_thousand_matrices(driver, tmp_path):
    result = build(layers=60, hidden=64, copies=12, hostile=HOSTILE)
    file = tmp_path / "large.html"
    file.write_text(reports.render(result), encoding="utf-8")
    assert len(result.table) > 5000
    assert file.stat().st_size < 15e6
    name = "model.layers.59.mlp.down_proj.11.weight"
    visit(driver, f"{file.as_uri()}#singular_values/{name}")
    for figure in result.figures:
        assert find(driver, f"#{figure} .plot svg.main-svg")
    assert drawn(driver, "singular_values", "data[1].y[0]") == pytest.approx(result.singular_values[name][0], rel=1e-4)
    assert len(find(driver, "#matrices tbody tr")) == len(find(driver, "#ledger tbody tr")) == 100
    press(driver, next(b for b in find(driver, "#matrices .pages button") if b.text == "Next ›"))
    assert column(driver, "matrices", "name")[0] == result.table["name"].iloc[100]
    assert find(driver, "#matrices .pages span")[0].text == "Page 2 of 51"
    press(driver, button(driver, "#matrices", "stable rank"))
    first = [float(x) for x in column(driver, "matrices", "stable rank")]
    assert first == sorted(first)
    assert first[0] == pytest.approx(result.table["stable_rank"].min(), rel=1e-3)
    find(driver, "#matrices input")[0].send_keys("layers.7 up_proj")
    assert find(driver, "#matrices .count")[0].text == "12 of 5042"
    assert driver.get_log("browser") == []


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    """The page of three steps, the second of which did not move, of a model with a name of 500 characters."""
    root, generator = tmp_path_factory.mktemp("trajectory"), torch.Generator().manual_seed(0)
    base = llama_tensors() | {f"{'x' * 500}.weight": torch.randn(24, 20, generator=generator)}
    steps = {"first": add_update(base), "still": base, "second": add_update(base, relative=0.06)}
    paths = [write(root / name, tensors) for name, tensors in steps.items()]
    found = lp.trajectory(write(root / "base", base), paths)
    return found.save(root / "run") / "report.html"


def test_the_page_of_a_trajectory_draws_and_has_the_same_theme_switch(driver, trajectory):
    visit(driver, trajectory.as_uri())
    for plot in find(driver, ".plot"):
        assert plot.find_elements("css selector", "svg.main-svg")
    assert len(find(driver, "#relative_update .ytick")) >= 2
    assert "identical" in find(driver, "#steps tbody tr:nth-child(2)")[0].text
    light = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    press(driver, find(driver, "#theme")[0])
    assert find(driver, "#theme")[0].text == "Light"
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 23)" != light
    driver.execute_script("localStorage.clear()")
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("step", ["", "first"])
def test_a_name_of_500_characters_does_not_stretch_the_page(driver, trajectory, step):
    visit(driver, (trajectory.parent / step / "report.html").as_uri())
    wide = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    cells = driver.execute_script("return [...document.querySelectorAll('td')].map(cell => cell.offsetWidth)")
    assert len(cells) > 20
    assert max(cells) < 800
    assert driver.get_log("browser") == []
