"""`probe eval`: parse, one library call, print."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_probe import interrupts
from lowrank_probe.cli_shared import (
    Device,
    Figures,
    Json,
    Open,
    Out,
    Quiet,
    Ray,
    Seed,
    finish,
    progress_bar,
    resumable,
    run_directory,
    tell,
    tell_resumed,
)

if TYPE_CHECKING:
    from lowrank_probe.evaluation_runs import Evaluation


def evaluate(
    base: Annotated[str, typer.Argument(help="Base model: a directory or hub id that transformers loads.")],
    tuned: Annotated[str, typer.Argument(help="Fine-tuned model, or a PEFT adapter on the base.")],
    data: Annotated[Path, typer.Option("--data", help="Held-out text: a file, .jsonl, .parquet, or a directory.")],
    out: Out = None,
    rank: Annotated[
        str | None, typer.Option("--rank", "-r", help="The grid, such as 0,1,4,16,full. Default: 0,1,2,4,8,…,full.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Groups: layer types, attention, mlp, all-linear, patterns; a,b; q+v. Default: each type."),
    ] = None,
    leave_out: Annotated[bool, typer.Option(help="Also truncate all but each group.")] = True,
    tolerance: Annotated[str, typer.Option(help="5% of what the fine-tune gained, or nats such as 0.01.")] = "5%",
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 64,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a sequence. Default: 512, or all positions.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(min=0, max=1, help="Only this share of the documents, the one that is held out.")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Plain text one after the other, or one a sequence.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the forward pass: float32 or bfloat16.")] = "float32",
    device: Device = "auto",
    ray: Ray = None,
    seed: Seed = 0,
    as_json: Json = False,
    open_report: Open = False,
    figures: Figures = None,
    quiet: Quiet = False,
) -> None:
    """The functional rank: the loss of base + ΔW truncated to rank r, and the smallest r that does as well as tuned."""
    ranks = _ranks(rank)
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"{dtype!r}: expected float32 or bfloat16", param_hint="--dtype")
    named = [one.strip() for text in targets for one in text.split(",")] if targets else None
    chosen = [one.replace("+", ",") for one in named if one] if named is not None else None
    with interrupts.ending_at_once():
        from lowrank_probe import cuda_driver

        if ray is None:
            cuda_driver.wake(device)
        from lowrank_probe import evaluation

        if figures is not None:
            from lowrank_probe.figures import check_writable

            check_writable(figures)
    with run_directory(out, tuned) as directory, resumable(directory, "states"), progress_bar(quiet) as on_progress:
        found = evaluation.evaluate(
            base, tuned, data, ranks=ranks, groups=chosen, leave_out=leave_out, tolerance=tolerance,
            length=length, sequences=sequences, batch=batch, held_out=held_out, packing=packing, dtype=dtype,
            device=device, ray=ray, seed=seed, out=directory, on_progress=on_progress,
        )  # fmt: skip
    tell_resumed(found.facts, directory, quiet, "states")
    _show(found, directory, as_json, quiet)
    finish(found, directory, figures, open_report, quiet)


def _ranks(text: str | None) -> list[int | str] | None:
    """The grid of `--rank`."""
    if text is None:
        return None
    if not re.fullmatch(r"(\d+|full)(,(\d+|full))*", text):
        raise typer.BadParameter(f"{text!r}: expected ranks such as 0,1,4,16,full", param_hint="--rank")
    return [one if one == "full" else int(one) for one in text.split(",")]


def _show(found: "Evaluation", directory: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(found.to_json())  # noqa: T201
    else:
        from lowrank_probe.evaluation_terminal import print_evaluation

        print_evaluation(found)
    for note in found.facts["notes"]:
        tell(f"note: {note}", quiet)
    tell(f"report: {directory / 'report.html'}", quiet)
