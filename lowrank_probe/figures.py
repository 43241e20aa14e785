"""Table and spectra to plotly figures, one function a question; imports no torch.

Each figure works alone (in a notebook, in either colour theme) and in the report, which turns its menus into page
controls. What storage noise makes undecidable is drawn as "?", never as a number. Tensor names are untrusted: every
name that becomes plotly text goes through `figure_style.text`.

A figure is built as a plain dict (`specs`), which is all that the page needs; plotly validates it only where a
`go.Figure` is asked for, which takes ten times as long.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from lowrank_probe import outputs
from lowrank_probe.errors import ProbeError
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.extraction_runs import Extraction
from lowrank_probe.figure_layers import (
    METRICS,
    bracket_spec,
    heatmap_spec,
    known_metric,
    relative_update_spec,
)
from lowrank_probe.figure_spectra import distribution_spec, energy_curves_spec, singular_values_spec
from lowrank_probe.figure_style import Spec
from lowrank_probe.runs import Result
from lowrank_probe.training_runs import Training

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lowrank_probe.budget_runs import BudgetRun
    from lowrank_probe.trajectory_runs import Trajectory

    Run = Result | Trajectory | Extraction | Evaluation | Training | BudgetRun

FORMATS: Final = ("svg", "png")
WIDTH: Final = 1100  # pixels of a written figure; a PNG has twice as many
# Seconds in which a browser that works has drawn a figure; kaleido gives each 90.
STALLED_S: Final = 120.0
# Seconds in which it closes, and in which what it leaves in its temporary directory is removed once it was killed.
CLEANED_S: Final = 10.0
# Seconds between two looks at what is drawn.
LOOKED_S: Final = 0.5
_PAPER: Final = {"paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}


def heatmap(table: pd.DataFrame, metric: str = "relative_r90") -> "go.Figure":
    """Where in the model is the update low-rank? Layer type × layer, coloured by `metric`; a menu changes the metric.

    A cell is the median of its matrices (several only where a layer has several of a type, as experts). "?" marks what
    storage noise makes undecidable, "–" a value that was not reached or not computed. Raises `ProbeError`.
    """
    return _figure(heatmap_spec(table, known_metric(metric)))


def relative_update(table: pd.DataFrame) -> "go.Figure":
    """How large is the update, layer by layer? ‖ΔW‖_F / ‖W_base‖_F of each layer type; the median where there are more.

    ‖ΔW‖_F alone where no base is known (an adapter by itself). Logarithmic where a type stands far out.
    """
    return _figure(relative_update_spec(table))


def distribution(table: pd.DataFrame, metric: str = "relative_r90") -> "go.Figure":
    """How do the layer types differ? A box of `metric` over the matrices of each type, and dots; a menu changes it.

    Boxes span the quartiles, whiskers end at the outermost value within 1.5 interquartile ranges (Tukey). At most 60
    dots a type, evenly spaced in rank. "?" at a type counts in its hover the matrices left out as undecidable.
    Raises `ProbeError`.
    """
    return _figure(distribution_spec(table, known_metric(metric)))


def bracket(result: Result) -> "go.Figure":
    """What is the true r90, layer by layer? The bracket's lower to upper end beside the r90 of noise, a panel a type.

    "?" marks undecidable matrices, "–" those where `--top` did not reach r90. Dotted lines are the verdict's
    thresholds, half and three quarters of the null.
    """
    return _figure(bracket_spec(result.table))


def energy_curves(result: Result) -> "go.Figure":
    """How much of the update does rank r keep? Energy against rank for each layer type, beside noise of its shape.

    Lines are medians over the matrices of a type, bands their 10th to 90th percentile, dashed lines the
    Marchenko–Pastur energy of the type's most common shape. ΔW is as stored.
    """
    return _figure(energy_curves_spec(result))


def singular_values(result: Result, name: str | None = None) -> "go.Figure":
    """What does one ΔW's spectrum look like? σ against its index, raw and denoised, beside what storage noise has.

    The grey area is the Marchenko–Pastur law of the storage noise: the singular values that independent errors of
    `noise_std` alone would have. Without `name`, a menu chooses the matrix: of more than 400, an even selection of each
    layer type. Spectra are thinned to 120 log-spaced points. Raises `ProbeError` where there is no such matrix.
    """
    if name is not None and name not in result.singular_values:
        raise ProbeError(f"{name}: no spectrum of that name in this run; the table lists the names")
    return _figure(singular_values_spec(result, name, with_menu=name is None))


def specs(result: Result) -> dict[str, Spec]:
    """The report's figures as plain dicts by name, in its order; empty where no matrix was analysed."""
    table = result.table
    if not len(table):
        return {}
    metric = "relative_r90" if table["decidable_r90"].any() else "signal_rank"
    if not table[METRICS[metric].flag].any():
        metric = "relative_update"
    figures = {
        "heatmap": heatmap_spec(table, metric),
        "bracket": bracket_spec(table),
        "distribution": distribution_spec(table, metric),
        "relative_update": relative_update_spec(table),
    }
    if result.singular_values:
        figures |= {"energy_curves": energy_curves_spec(result), "singular_values": singular_values_spec(result)}
    return figures


def all_figures(result: Result) -> dict[str, "go.Figure"]:
    """The report's figures by name, in its order; empty where no matrix was analysed."""
    found = {name: _figure(spec) for name, spec in specs(result).items() if name != "singular_values"}
    return found | ({"singular_values": singular_values(result)} if found and result.singular_values else {})


def _figure(spec: Spec) -> "go.Figure":
    import plotly.graph_objects as go

    return go.Figure(spec)


_ELSEWHERE: Final = "choose another --figures"


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Raises `OutputError` where nothing can be written there, `ProbeError` where kaleido or a browser is missing."""
    outputs.check_writable(Path(directory), _ELSEWHERE)
    try:
        from choreographer.browsers.chromium import Chromium
        from kaleido.errors import ChromeNotFoundError  # noqa: F401
    except ImportError:
        raise ProbeError("--figures needs kaleido 1.3 or newer: pip install 'lowrank_probe[figures]'") from None
    browser = os.environ.get("BROWSER_PATH") or Chromium.find_browser(skip_local=False)
    if not browser or not os.access(browser, os.X_OK):
        raise ProbeError(
            f"--figures needs Chrome or Chromium{f' (BROWSER_PATH={browser} is none)' if browser else ''}: install it, "
            "run kaleido_get_chrome, or set BROWSER_PATH to one"
        )


def write(found: "Run", directory: str | os.PathLike[str]) -> list[Path]:
    """Write every figure of the report as <name>.svg and <name>.png, on white; returns the paths.

    Those of a trajectory's steps go to <label>/ below its own.
    Through kaleido and a headless Chromium, without the network. Raises `ProbeError` where either is missing or fails,
    `OutputError` where the directory cannot be written.
    """
    check_writable(directory)
    root, written = Path(directory), list[Path]()
    with tempfile.TemporaryDirectory(prefix="lowrank_probe-") as drawn:
        aside = Path(drawn)
        jobs = list(_all_jobs(found, aside))
        for place in {Path(job["path"]).parent for job in jobs}:
            place.mkdir(exist_ok=True)
        try:
            _draw(jobs)
        except Exception as error:  # the browser's protocol raises errors of many kinds
            said = str(error.args[0] if error.args else error)
            raise ProbeError(
                f"{root}: the browser did not draw the figures: {said} Is it a working Chromium?"
            ) from error
        places: dict[Path, dict[str, Callable[[Path], Any]]] = {}
        for path in (Path(job["path"]) for job in jobs):
            place = root / path.parent.relative_to(aside)
            places.setdefault(place, {})[path.name] = partial(shutil.copyfile, path)
            written.append(place / path.name)
        with outputs.made(root, _ELSEWHERE):
            for place, files in places.items():
                outputs.write_directory(place, files, _ELSEWHERE)
    return written


def _draw(jobs: Sequence[dict[str, Any]]) -> None:
    """Write each job's image to its path; raises what kaleido and the browser raise.

    A browser that neither draws nor ends is ended after `STALLED_S`: while it opens and closes kaleido waits for ever.
    """
    from kaleido import Kaleido

    opened: list[Any] = []
    tasks: list[tuple[asyncio.AbstractEventLoop, Any]] = []
    raised: list[BaseException] = []

    async def draw() -> None:
        tasks.append((asyncio.get_running_loop(), asyncio.current_task()))
        opened.append(Kaleido(mathjax=False))  # which comes from the network, and none of the figures needs it
        async with opened[0] as browser:
            await browser.write_fig_from_object(jobs, cancel_on_error=True)

    def run() -> None:
        try:
            asyncio.run(draw())
        except BaseException as error:  # raised by the thread that asked
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    n_drawn, until = 0, time.monotonic() + STALLED_S
    try:
        while thread.is_alive() and time.monotonic() < until:
            thread.join(LOOKED_S)
            before, n_drawn = n_drawn, sum(_has_content(Path(job["path"])) for job in jobs)
            if n_drawn > before:
                until = time.monotonic() + (STALLED_S if n_drawn < len(jobs) else CLEANED_S)
        stalled = thread.is_alive()
    finally:
        if thread.is_alive():
            for process in (browser.subprocess for browser in opened if hasattr(browser, "subprocess")):
                with contextlib.suppress(OSError):
                    if hasattr(os, "killpg"):  # a session of its own: the browser is started by a process between
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        process.kill()
            for loop, task in tasks:
                with contextlib.suppress(RuntimeError):  # it has just ended
                    loop.call_soon_threadsafe(task.cancel)
            thread.join(CLEANED_S)
    if stalled and n_drawn < len(jobs):
        raise TimeoutError(f"it has done nothing for {STALLED_S:.0f} s.")
    if raised and not stalled:
        raise raised[0]


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _jobs(figures: Mapping[str, Spec], root: Path) -> Iterable[dict[str, Any]]:
    for name, spec in figures.items():
        layout = {key: value for key, value in spec["layout"].items() if key != "updatemenus"}
        layout |= _PAPER | {"width": WIDTH, "font": layout["font"] | {"color": "#22262e"}}
        layout["title"] = layout["title"] | {"y": 0.98, "yanchor": "top"}
        layout["margin"] = layout["margin"] | {"t": 110 if layout["showlegend"] else 64, "b": 64}
        for form in FORMATS:
            size = {"width": WIDTH, "height": layout["height"] + 30, "scale": 2 if form == "png" else 1}
            path = str(root / f"{name}.{form}")
            yield {"fig": {"data": spec["data"], "layout": layout}, "path": path, "opts": {"format": form, **size}}


def _all_jobs(found: "Run", root: Path) -> Iterable[dict[str, Any]]:
    if isinstance(found, Result):
        return _jobs(specs(found), root)
    figures = {name: figure.to_plotly_json() for name, figure in found.figures.items()}
    for spec in figures.values():
        layout = spec["layout"]
        for menu in layout.get("updatemenus", ()):  # a written figure has none: say what it would have shown as chosen
            layout["title"]["text"] += f" ({menu['buttons'][menu['active']]['label']})"
    from lowrank_probe.trajectory_runs import Trajectory

    steps = found.results.items() if isinstance(found, Trajectory) else []
    return chain(_jobs(figures, root), *(_jobs(specs(result), root / label) for label, result in steps))
