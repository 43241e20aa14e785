"""What the commands share: options that mean the same everywhere, notes, the progress bar, the line after Ctrl-C."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lowrank_probe import interrupts
from lowrank_probe.amounts import parse_amount
from lowrank_probe.errors import ProbeError, printable
from lowrank_probe.options import LEAST_MEMORY, STORED, Progress
from lowrank_probe.words import count, file_size

if TYPE_CHECKING:
    from lowrank_probe.verification import Verification

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Run directory. Default: probe-runs/<tuned>-<time>/.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in the browser.")]
Include = Annotated[list[str] | None, typer.Option("--include", help="Only tensors that match (repeatable).")]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", help="Leave out what matches: q_proj, layers.3, *mlp*.")
]
Layers = Annotated[str | None, typer.Option("--layers", help="Only these layers: 0-3 or 7.")]
Data = Annotated[Path | None, typer.Option("--data", help="Text or jsonl for --verify. Default: built-in prompts.")]
Figures = Annotated[Path | None, typer.Option("--figures", help="Also write every figure there, as SVG and PNG.")]

# Between two lines of progress where stderr is no terminal.
EVERY_S: Final = 60.0


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text):
        raise typer.BadParameter(f"{text!r}: expected auto, cpu, cuda, cuda:N or mps")
    return text


Device = Annotated[str, typer.Option("--device", callback=_device, help="auto (every GPU), cpu, cuda, cuda:N, mps.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster that does the matrices; auto: this machine's.")]


def _memory(text: str) -> int:
    """Bytes of `--memory 8GB`."""
    expected = "expected bytes such as 8GB or 7.5GiB"
    try:
        amount, unit = parse_amount(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} {error}; {expected}") from None
    if not unit:
        raise typer.BadParameter(f"{text!r}: {expected}")
    if amount < LEAST_MEMORY:
        raise typer.BadParameter(f"{text!r}: expected at least {file_size(LEAST_MEMORY)}")
    return amount


HostMemory = Annotated[
    int | None,
    typer.Option("--memory", parser=_memory, metavar="8GB", help="Of the process: larger matrices go by the disk."),
]
CardMemory = Annotated[
    int | None,
    typer.Option("--gpu-memory", parser=_memory, metavar="20GB", help="Of each card: larger matrices go to the CPU."),
]


@contextmanager
def wrong_usage(option: str) -> Iterator[None]:
    """Within it what the library finds wrong is wrong usage of an option."""
    try:
        yield
    except ProbeError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def stored_word(text: str | None) -> str | None:
    """`--dtype`, checked while parsing."""
    if text is not None and text not in STORED:
        raise typer.BadParameter(f"{text!r}: expected one of {', '.join(STORED)}")
    return text


def layer_span(text: str | None) -> tuple[int, int] | None:
    """(first, last) of `--layers`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise typer.BadParameter(f"{text!r}: expected a layer number or a range such as 0-3", param_hint="--layers")
    return int(found[1]), int(found[2] or found[1])


def tell(text: str, quiet: bool) -> None:
    """A note, warning or path on stderr."""
    if not quiet:
        print(printable(text), file=sys.stderr)  # noqa: T201


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A callback for (what is finished, done, total): it moves a bar on a terminal, elsewhere it writes a line every
    `EVERY_S` seconds; None if quiet."""
    if quiet:
        yield None
        return
    if not sys.stderr.isatty():
        last = time.monotonic()

        def write(name: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY_S:
                last = time.monotonic()
                tell(f"{name}: {100 * done // max(1, total)} %", False)

        yield write
        return
    from rich import progress
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield advance


def run_directory(out: Path | None, last: str) -> AbstractContextManager[Path]:
    """The run directory: --out, or a new one that no other process has, named after the last of what was given."""
    from lowrank_probe.outputs import new_directory
    from lowrank_probe.remote_files import is_address, shown

    slug = (
        re.sub(r"[^\w.-]+", "-", (Path(shown(last)) if is_address(last) else Path(last).resolve()).name).strip("-")
        or "run"
    )
    named = f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"
    return nullcontext(out) if out is not None else new_directory(Path("probe-runs") / named)


def finish(found: Any, directory: Path, figures: Path | None, open_report: bool, quiet: bool) -> None:
    """What `--figures` and `--open` ask for, once a run is written."""
    if figures is not None:
        from lowrank_probe.figures import write

        write(found, figures)
        tell(f"figures: {figures}", quiet)
    if open_report:
        typer.launch(str((directory / "report.html").resolve()))


def stopped_line(kept: str, directory: Path) -> interrupts.Stopped:
    """The last line after Ctrl-C: what is kept, and how to go on."""
    again = f"the same command with --out {directory} resumes"
    return interrupts.Stopped(printable(f"{interrupts.LINE}: {kept}; {again}"))


@contextmanager
def resumable(directory: Path, what: str = "matrices") -> Iterator[None]:
    """Within it Ctrl-C ends with what is kept in a run directory, and how to go on."""
    from lowrank_probe.outputs import is_unfinished
    from lowrank_probe.spectra import Interrupted

    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        if not is_unfinished(directory):
            raise interrupts.Stopped(interrupts.LINE) from None
        raise stopped_line(f"finished {what} are kept in {directory}", directory) from None


def tell_resumed(facts: dict[str, Any], directory: Path, quiet: bool, what: str = "matrices") -> None:
    """What a run took over from one that was killed."""
    if "resumed" not in facts:
        return
    told = f"resumed the interrupted run in {directory}: {facts['resumed']['n_finished']} {what} were finished"
    damaged = facts["resumed"]["n_damaged"]
    tell(f"{told}, what was damaged ({count(damaged, 'place')}) was done again" if damaged else told, quiet)


def read_data(data: Path | None, verify: bool) -> list[str] | None:
    """The texts of `--data`, before the work rather than after it; None: the built-in prompts."""
    if data is None:
        return None
    if not verify:
        raise typer.BadParameter("goes with --verify", param_hint="--data")
    from lowrank_probe.texts import read_texts

    return read_texts(data, limit=65)  # 64 are used, and the cut is told


def tell_problems(check: "Verification", label: str, quiet: bool) -> bool:
    """What of a verification did not hold, and its notes; whether there was anything that did not."""
    for text in check.problems:
        tell(f"--verify{' ' + label if label else ''}: {text}", False)
    for text in check.notes:
        tell(f"note: --verify: {text}", quiet)
    return bool(check.problems)
