"""The report of large models: size of the page, time to build it, time to its first plot in headless Chromium.

Synthetic runs of 44, 324 (an 8B model) and 5,042 matrices (experts), from tests/builders.py. Writes
docs/benchmarks-report.md. Exit 1 on a FAIL. Needs Debian's chromium and chromium-driver, and selenium.

    python benchmarks/report.py    # about 1 minute on 2 cores
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import plotly
from accuracy import publish

from lowrank_probe import figures, reports

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from builders import build

CHROMIUM: Final = "/usr/bin/chromium"
DRIVER: Final = "/usr/bin/chromedriver"
SIZES: Final[dict[str, dict[str, int]]] = {
    "44": {"layers": 6},
    "324 (an 8B model)": {"layers": 46, "hidden": 256},
    "5,042 (experts)": {"layers": 60, "hidden": 512, "copies": 12},
}
SIZE_BAR: Final = 15e6
FIRST_PLOT_BAR_S: Final = 3.0
FIGURES_BAR_S: Final = {"44": 0.25, "5,042 (experts)": 1.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each measurement; the median counts (default 5)")
    runs = parser.parse_args().runs
    cells, verdicts = [], []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        for name, size in SIZES.items():
            result = build(**size)
            figures_s = _median(lambda result=result: json.dumps(figures.specs(result)), runs)
            render_s = _median(lambda result=result: reports.render(result), runs)
            file = Path(scratch) / f"{len(result.table)}.html"
            file.write_text(reports.render(result), encoding="utf-8")
            seen = [first_plot(file, Path(scratch) / f"profile-{len(result.table)}-{i}") for i in range(runs)]
            first, whole = (statistics.median(one[key] for one in seen) for key in ("first_s", "all_s"))
            errors = [message for one in seen for message in one["console"]]
            n_bytes = file.stat().st_size
            cells.append(
                [name, f"{n_bytes / 1e6:.2f}", f"{figures_s:.2f}", f"{render_s:.2f}", f"{first:.2f}", f"{whole:.2f}",
                 str(len(errors))]
            )  # fmt: skip
            verdicts += [
                (f"{name} matrices: {n_bytes / 1e6:.2f} MB, bar {SIZE_BAR / 1e6:g}", n_bytes < SIZE_BAR),
                (
                    f"{name} matrices: first plot after {first:.2f} s, bar {FIRST_PLOT_BAR_S:g}",
                    first < FIRST_PLOT_BAR_S,
                ),
                (f"{name} matrices: {len(errors)} messages in the console", not errors),
            ]
            if name in FIGURES_BAR_S:
                bar = FIGURES_BAR_S[name]
                verdicts.append(
                    (
                        f"{name} matrices: figures built and written as JSON in {figures_s:.2f} s, bar {bar:g}",
                        figures_s <= bar,
                    )
                )
    heads = ["matrices", "page, MB", "figures, s", "page built, s", "first plot, s", "all plots, s", "console"]
    note = (
        f"Synthetic runs (tests/builders.py). Medians of {runs}; the load average was {load:.1f} at the start. The first plot "
        "is the browser's own clock from navigation to the end of the first Plotly.newPlot, in a fresh profile each time; "
        f"the page carries plotly.js (plotly {plotly.__version__}, 4.8 MB)."
    )
    publish("report", "The report of large models", note, [("", heads, cells)], verdicts)
    return 0 if all(ok for _, ok in verdicts) else 1


def first_plot(file: Path, profile: Path) -> dict[str, Any]:
    """Seconds from navigation to the first plot and to all of them, and what the console said."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1000",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(file.as_uri())
        WebDriverWait(driver, 120).until(lambda d: d.execute_script("return document.body.dataset.drawn") == "yes")
        marks = "return performance.getEntriesByType('mark').map(m => m.startTime / 1000)"
        first, whole = driver.execute_script(marks)
        return {"first_s": first, "all_s": whole, "console": [entry["message"] for entry in driver.get_log("browser")]}
    finally:
        driver.quit()


def _median(work: Any, runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
