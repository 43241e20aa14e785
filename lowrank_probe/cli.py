"""The command `probe`: parse, one library call, print. No arithmetic.

stdout carries the result only (a table, or one JSON object); progress, warnings and errors go to stderr.
Exit codes: 0 done, 1 a `ProbeError`, 2 wrong usage, 3 a check that was asked for did not hold, 130 interrupted.
"""

import gc
import io
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_probe import cli_adapters, interrupts
from lowrank_probe.cli_budget import budget
from lowrank_probe.cli_eval import evaluate
from lowrank_probe.cli_extract import extract
from lowrank_probe.cli_shared import (
    CardMemory,
    Device,
    Exclude,
    Figures,
    HostMemory,
    Include,
    Json,
    Layers,
    Open,
    Out,
    Quiet,
    Ray,
    Seed,
    finish,
    layer_span,
    progress_bar,
    resumable,
    run_directory,
    stopped_line,
    tell,
    tell_resumed,
)
from lowrank_probe.cli_train import train
from lowrank_probe.errors import ProbeError, UnchangedError, printable
from lowrank_probe.options import Options

if TYPE_CHECKING:
    from lowrank_probe.runs import Result
    from lowrank_probe.trajectory_runs import Trajectory

app = typer.Typer(
    name="probe",
    help="Is this fine-tuning update low-rank, of what rank, and what does a LoRA of that rank keep?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

VERDICTS = ("undecidable", "low-rank", "not low-rank", "unrelated")


def _version(asked: bool) -> None:
    if asked:
        from lowrank_probe import __version__

        print(__version__)  # noqa: T201
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


@app.command(epilog="Example: probe spectrum base/ finetuned/ --exclude embed_tokens")
def spectrum(
    base: Annotated[
        str, typer.Argument(help="Base checkpoint: directory, file, address, hub id; or an adapter alone.")
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            help="Fine-tuned checkpoint or PEFT LoRA adapter; several: the steps of a trajectory, siblings."
        ),
    ] = None,
    out: Out = None,
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    split: Annotated[bool, typer.Option(help="Take fused qkv and gate-up apart where their layout is known.")] = True,
    top: Annotated[int | None, typer.Option(min=1, help="Only the K largest singular values, certified.")] = None,
    exact_tail: Annotated[bool, typer.Option(help="float64 SVD of each matrix: an accurate tail, slower.")] = False,
    base_rounded: Annotated[
        bool, typer.Option(help="Training started from a wider base than the one stored: count its rounding too.")
    ] = False,
    fail_on: Annotated[
        str | None, typer.Option(help="Exit 3 if any verdict is this: undecidable, low-rank, not low-rank, unrelated.")
    ] = None,
    device: Device = "auto",
    memory: HostMemory = None,
    gpu_memory: CardMemory = None,
    ray: Ray = None,
    seed: Seed = 0,
    as_json: Json = False,
    open_report: Open = False,
    figures: Figures = None,
    quiet: Quiet = False,
) -> None:
    """Singular values, ranks and a verdict per layer type of ΔW = W_tuned − W_base.

    With several TUNED also how their updates compare: over the steps, in the directions they share.
    """
    span = layer_span(layers)
    if fail_on is not None and fail_on not in VERDICTS:
        raise typer.BadParameter(f"{fail_on!r}: expected one of {', '.join(VERDICTS)}", param_hint="--fail-on")
    if top is not None and exact_tail:
        raise typer.BadParameter("--exact-tail computes every value: leave one of the two out", param_hint="--top")
    options = Options(
        include=include or (), exclude=exclude or (), layers=span, split=split, top=top, exact_tail=exact_tail,
        base_rounded=base_rounded, device=device, seed=seed, ray=ray, memory=memory, gpu_memory=gpu_memory,
    )  # fmt: skip
    with interrupts.ending_at_once():
        from lowrank_probe import cuda_driver

        if ray is None:
            cuda_driver.wake(device)
        from lowrank_probe import devices

        devices.start("cpu" if ray else device, work="lowrank_probe.rows", then="lowrank_probe.reports")
        from lowrank_probe import spectra  # noqa: F401

        if figures is not None:
            from lowrank_probe.figures import check_writable

            check_writable(figures)  # before the minutes of work, not after them
    found: Result | Trajectory
    with run_directory(out, tuned[-1] if tuned else base) as directory:
        if tuned and len(tuned) > 1:
            found = _trajectory(base, tuned, directory, options, as_json, quiet)
        else:
            found = _single(base, tuned[0] if tuned else None, directory, options, as_json, quiet)
        _finish(directory, found, open_report, fail_on, figures, quiet)


def _single(base: str, tuned: str | None, directory: Path, options: Options, as_json: bool, quiet: bool) -> "Result":
    """`probe spectrum` with one tuned side."""
    from lowrank_probe import spectra

    with resumable(directory), progress_bar(quiet) as on_progress:
        try:
            result = spectra.probe_pair(base, tuned, options, out=directory, on_progress=on_progress)
        except spectra.Interrupted as stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not cut the report off
            stopped.result.save(directory)
            raise stopped_line(
                f"{len(stopped.result.table)} finished matrices kept in {directory}", directory
            ) from None
    tell_resumed(result.facts, directory, quiet)
    _show(result, directory, as_json, quiet)
    return result


def _trajectory(
    base: str, steps: list[str], directory: Path, options: Options, as_json: bool, quiet: bool
) -> "Trajectory":
    """`probe spectrum` with several steps."""
    from lowrank_probe import trajectories

    with resumable(directory), progress_bar(quiet) as on_progress:
        found = trajectories.probe_steps(base, steps, options, out=directory, on_progress=on_progress)
    tell_resumed(found.facts, directory, quiet)
    if as_json:
        print(found.to_json())  # noqa: T201
    else:
        from lowrank_probe.trajectory_terminal import print_trajectory

        print_trajectory(found)
    for text in found.facts["notes"]:
        tell(f"note: {text}", quiet)
    for label, result in found.results.items():
        for warning in result.facts.get("warnings", []):
            tell(f"warning: {label}: {warning}", False)
        for note in result.facts.get("notes", []):
            tell(f"note: {label}: {note}", quiet)
    tell(f"report: {directory / 'report.html'}", quiet)
    return found


def _finish(
    directory: Path, found: "Result | Trajectory", open_report: bool, fail_on: str | None, figures: Path | None,
    quiet: bool,
) -> None:  # fmt: skip
    from lowrank_probe import runs

    finish(found, directory, figures, open_report, quiet)
    summary = found.summary if isinstance(found, runs.Result) else found.table
    if fail_on and any(str(verdict).startswith(fail_on) for verdict in summary["verdict"]):
        tell(f"--fail-on {fail_on}: at least one verdict is {fail_on}", False)
        raise typer.Exit(3)


app.command(epilog="Example: probe extract base/ finetuned/ --rank 16 --out adapter/")(extract)
app.command("eval", epilog="Example: probe eval base/ finetuned/ --data held-out.txt --rank 0,1,4,16,full")(evaluate)
app.command(epilog="Example: probe train base/ --data text.jsonl --rank 1,4,16 --targets attention,mlp --out run/")(
    train
)
app.command(epilog="Example: probe budget base/ --method lora --rank 16 --seq 2048 --gpu H100")(budget)


@app.command(epilog="Example: probe report probe-runs/finetuned-20260102-030405/ --open")
def report(
    run: Annotated[Path, typer.Argument(help="A run directory, or what probe extract or budget wrote.")],
    open_report: Open = False,
    figures: Figures = None,
) -> None:
    """Rebuild report.html of a run directory, and print its path."""
    with interrupts.ending_at_once():
        from lowrank_probe.reports import report as rebuild

    print(rebuild(run, open_browser=open_report, figures_dir=figures))  # noqa: T201
    if figures is not None:
        tell(f"figures: {figures}", False)


@app.command(epilog="Example: probe demo --open")
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the pair and the run here. Default: the cache.")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    open_report: Open = False,
    quiet: Quiet = False,
) -> None:
    """Train a tiny Llama on the standard library's source, fine-tune it on other text, and probe that real pair."""
    with interrupts.ending_at_once():
        from lowrank_probe import demos, spectra

    try:
        with progress_bar(quiet) as on_progress:
            result = demos.demo(out, seed=seed, on_progress=on_progress)
    except spectra.Interrupted:  # the pair is kept, its spectra take a few seconds
        raise interrupts.Stopped(interrupts.LINE) from None
    directory = Path(result.facts["demo"]["run"])
    _show(result, directory, as_json, quiet)
    if open_report:
        typer.launch(str((directory / "report.html").resolve()))


app.command(epilog="Example: probe resize adapter/ --rank 8 --out smaller/")(cli_adapters.resize)
app.command(epilog="Example: probe merge base/ adapter/ --out merged/")(cli_adapters.merge)


def main() -> None:
    """The one place where a `ProbeError` becomes text and an exit code."""
    with interrupts.one_line():
        _main()


def _main() -> None:
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    # Importing torch and pandas sets off hundreds of collections. What is large here (tensors) is freed by reference
    # counts.
    gc.set_threshold(200_000)
    try:
        app()
    except ProbeError as error:
        if debug:
            raise
        print(f"error: {printable(error)}", file=sys.stderr)  # noqa: T201
        raise SystemExit(3 if isinstance(error, UnchangedError) else 1) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if debug:
            raise
        print(f"error: {printable(error.filename or 'output')}: {error.strerror or error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None


def _show(result: "Result", directory: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(result.to_json())  # noqa: T201
    else:
        from lowrank_probe.terminal import print_summary

        print_summary(result)
    for warning in result.facts.get("warnings", []):
        tell(f"warning: {warning}", False)
    for note in result.facts.get("notes", []):
        tell(f"note: {note}", quiet)
    tell(f"report: {directory / 'report.html'}", quiet)
