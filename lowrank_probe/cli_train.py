"""`probe train`: parse, one library call, print."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_probe import interrupts, processes
from lowrank_probe.cli_shared import Device, Figures, Json, Open, Quiet, finish, progress_bar, stopped_line, tell

if TYPE_CHECKING:
    from lowrank_probe.training_plan import Recipe
    from lowrank_probe.training_runs import Training


def train(
    model: Annotated[str, typer.Argument(help="Causal language model with its tokenizer: a directory or hub id.")],
    data: Annotated[Path, typer.Option("--data", help="Text to learn: a file, .jsonl, .parquet, or a directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the training; the same one resumes it.")],
    rank: Annotated[str, typer.Option("--rank", "-r", help="Ranks of the adapters.")] = "1,2,4,8,16,64",
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Groups, each trained alone: attention, mlp, all-linear, layer types, patterns; a,b; q+v."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind, with other data order and start.")] = 2,
    variant: Annotated[str, typer.Option(help="lora, rslora, dora, pissa, lora+; a,b.")] = "lora",
    lr: Annotated[
        str, typer.Option(help="auto (a short search), a rate (a tenth of it for full), or full=1e-5,lora=1e-4.")
    ] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each run.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once on each device.")] = 8,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a sequence. Default: 512, or the model's positions.")
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Held-out losses on the way.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA's α, at every rank.")] = 32.0,
    held_out: Annotated[float, typer.Option(help="Share of the documents that no run learns from.")] = 0.1,
    packing: Annotated[bool, typer.Option(help="Documents one after the other, or one a sequence.")] = True,
    tolerance: Annotated[str, typer.Option(help="5% of what the full fine-tune gained, or nats such as 0.01.")] = "5%",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 (autocast), or auto: bf16 where the hardware has it.")
    ] = "auto",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")] = False,
    stop_on_nan: Annotated[bool, typer.Option("--stop-on-nan", help="End a run at its first NaN or Inf.")] = False,
    report_to: Annotated[str, typer.Option(help="Trainer's loggers: tensorboard, wandb; a,b.")] = "",
    device: Device = "auto",
    as_json: Json = False,
    open_report: Open = False,
    figures: Figures = None,
    quiet: Quiet = False,
) -> None:
    """Is a low-rank update enough? Full fine-tuning and LoRA at several ranks and layers on your text, compared."""
    ranks = _ranks(rank)
    rates = _rates(lr)
    if precision not in ("auto", "fp32", "bf16"):
        raise typer.BadParameter(f"{precision!r}: expected auto, fp32 or bf16", param_hint="--precision")
    chosen = [
        one.strip().replace("+", ",") for text in targets or ["attention,mlp,all-linear"] for one in text.split(",")
    ]
    with interrupts.ending_at_once():
        from lowrank_probe import training
        from lowrank_probe.training_plan import Recipe

        if figures is not None:
            from lowrank_probe.figures import check_writable

            check_writable(figures)
    recipe = Recipe(
        steps=steps, batch=batch, accumulation=accumulation, alpha=alpha, evaluations=evaluations,
        checkpointing=checkpointing, stop_on_nan=stop_on_nan,
        report_to=tuple(one for one in report_to.split(",") if one),
    )  # fmt: skip
    with progress_bar(quiet or not processes.is_first()) as on_progress:
        try:
            found = training.train(
                model, data, out, ranks=ranks, targets=[one for one in chosen if one], seeds=seeds,
                variants=[one.strip() for one in variant.split(",") if one.strip()], lr=rates,
                recipe=_completed(recipe, length, precision, model, device), held_out=held_out, packing=packing,
                tolerance=tolerance, device=device, on_progress=on_progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise stopped_line(f"finished runs are kept in {out}", out) from None
    if found is not None:
        _show(found, out, as_json, quiet)
        finish(found, out, figures, open_report, quiet)


def _completed(recipe: "Recipe", length: int | None, precision: str, model: str, device: str) -> "Recipe":
    """The recipe with what the model and the hardware decide where the user did not."""
    from lowrank_probe.training import default_recipe

    found = default_recipe(model, device)
    chosen = found.precision if precision == "auto" else precision
    return replace(recipe, length=length or found.length, precision=chosen)


def _ranks(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{text!r}: expected ranks such as 1,4,16", param_hint="--rank")
    return [int(one) for one in text.split(",")]


def _rates(text: str) -> str | dict[str, float]:
    """ "auto" or one rate as it is; method=rate,… as a dict."""
    if "=" not in text:
        return text
    rates = {}
    for part in text.split(","):
        method, _, rate = part.partition("=")
        try:
            rates[method.strip()] = float(rate)
        except ValueError:
            raise typer.BadParameter(
                f"{part!r}: expected a method and its rate, such as lora=2e-4", param_hint="--lr"
            ) from None
    return rates


def _show(found: "Training", out: Path, as_json: bool, quiet: bool) -> None:
    if as_json:
        print(found.to_json())  # noqa: T201
    else:
        from lowrank_probe.training_terminal import print_training

        print_training(found)
    for one in found.facts["health"]:
        tell(f"{one['severity']}: {one['label']}: {one['name']}: {one['evidence']}; {one['mend']}", False)
    for note in found.facts["notes"]:
        tell(f"note: {note}", quiet)
    tell(f"report: {out / 'report.html'}", quiet)
