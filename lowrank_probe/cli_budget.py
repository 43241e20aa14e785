"""`probe budget`: parse, one library call, print."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lowrank_probe.cli_shared import Json, Quiet, tell
from lowrank_probe.errors import NoFormulaError, ProbeError
from lowrank_probe.recipes import OPTIMIZERS, PRECISIONS

if TYPE_CHECKING:
    from lowrank_probe.accelerators import Accelerator
    from lowrank_probe.budgets import Budget
    from lowrank_probe.training_steps import Measured

METHODS: Final = ("full", "lora", "qlora", "dora", "rslora")
DTYPES: Final = ("float32", "bfloat16")


def budget(
    model: Annotated[
        str | None, typer.Argument(help="A directory, config.json, safetensors file, address, hub id; or --params.")
    ] = None,
    params: Annotated[str | None, typer.Option(help="A model's size instead of a model: 70B, 7e9, 135M.")] = None,
    like: Annotated[
        str | None, typer.Option(help="The family whose proportions a model of that size has. Default: llama.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora, qlora, dora, rslora; several: lora,full. Default: all compared.")
    ] = None,
    rank: Annotated[str | None, typer.Option("--rank", "-r", help="A rank, or several: 4,8,16. Default: 16.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="all-linear, everything, default, a layer type or a pattern; repeatable or a,b."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 (the default), mixed (fp32 master weights) or fp32.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (fused, the default), adamw-foreach, adamw-8bit, sgd-momentum or sgd.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the adapter in training: float32 or bfloat16.")] = None,
    seq: Annotated[
        str | None, typer.Option(help="Tokens a sequence, or several: 512,2048. Without: no activations.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a card and step.")] = 1,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Default: only for qlora.")
    ] = None,
    flash: Annotated[bool, typer.Option("--flash/--no-flash", help="Fused attention, or scores of s².")] = True,
    loss: Annotated[str, typer.Option(help="whole, or chunked: head and loss in pieces.")] = "whole",
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant/--no-double-quant", help="Of qlora's constants. Default: on.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="Cards.")] = 1,
    zero: Annotated[int | None, typer.Option(min=0, max=3, help="DeepSpeed ZeRO stage over --gpus.")] = None,
    fsdp: Annotated[int | None, typer.Option(min=2, max=3, help="PyTorch FSDP: 2 SHARD_GRAD_OP, 3 FULL_SHARD.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Does it fit on one? H100, 4090, MI300X, 48GB, …; exit 3 where it does not.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, max=1e9, help="Of one card an hour, to multiply by.")] = None,
    storage: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="That many tuned variants on disk: full or adapters.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Every formula with its source.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure one real step: on a GPU, else by fake tensors.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory for the report page and the table.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a training run needs: bytes by component and phase, and the cards it fits on.

    From a config or headers alone. With --gpu the exit code is 3 where what was asked for does not fit on one card; of
    the comparison, where none of its methods does.
    """
    methods = _methods(method)
    ranks: list[int] = _numbers("16" if rank is None else rank, "--rank")
    seqs: list[int | None] = [*_numbers(seq, "--seq")] if seq is not None else [None]
    for value, allowed, option in ((loss, ("whole", "chunked"), "--loss"), (precision, PRECISIONS, "--precision"),
                                   (optimizer, OPTIMIZERS, "--optimizer"), (dtype, DTYPES, "--dtype")):  # fmt: skip
        _one_of(value, allowed, option)
    if (model is None) == (params is None):
        raise typer.BadParameter(
            "give a model (directory, config.json, safetensors file, hub id) or --params, one of the two",
            param_hint="MODEL",
        )
    if measure:
        _measurable(params, seq, {"--gpus": gpus > 1, "--zero": zero, "--fsdp": fsdp})
    several = len(ranks) > 1 or len(seqs) > 1
    compared = methods is None and not several
    if compared:
        _unused({"--precision": precision, "--optimizer": optimizer, "--explain": explain or None},
                "the comparison of methods has recipes of its own; add --method, such as --method full")  # fmt: skip
    elif explain and (several or len(methods or ()) > 1):
        raise typer.BadParameter("explains one run: give one --method, --rank and --seq", param_hint="--explain")
    if params is None:
        _unused({"--like": like}, "is of a size; leave it out, or give --params in place of the model")
    if methods == ("qlora",):
        _unused({"--precision": precision}, "QLoRA computes in bf16 and keeps all else in fp32; leave it out")
    if methods == ("full",):
        _unused({"--rank": rank, "--targets": targets, "--dtype": dtype},
                "is of an adapter, and full fine-tuning has none; leave it out, or give --method lora")  # fmt: skip
    if methods is not None and "qlora" not in methods:
        _unused({"--double-quant": double_quant}, "is of 4-bit weights; leave it out, or give --method qlora")
    from lowrank_probe import budget_fits, budgets
    from lowrank_probe.accelerators import find_accelerator
    from lowrank_probe.budget_counts import parse_params
    from lowrank_probe.model_shapes import typical_shape
    from lowrank_probe.training_steps import Step

    if seq is None:
        said = {f"--batch {batch}": batch > 1, "--checkpointing": checkpointing, "--no-flash": not flash,
                "--loss chunked": loss == "chunked"}  # fmt: skip
        for option in (option for option, changed in said.items() if changed):
            tell(f"note: {option} changes nothing without --seq, which activations need", quiet)
    with _value_of("--gpu"):
        card = find_accelerator(gpu) if gpu is not None else None
    if zero is not None and fsdp is not None:
        raise typer.BadParameter("--zero names the stage too: give one of the two", param_hint="--fsdp")
    with _value_of("--zero" if zero is not None else "--fsdp"):
        budgets.sharding(gpus, zero, fsdp)
    with _value_of("--params"):
        n_parameters = None if params is None else parse_params(params)
    for option, values in (("rank", ranks), ("seq", seqs), ("batch", [batch])):
        for number in values:
            with _value_of(f"--{option}"):
                Step(**{option: number})  # type: ignore[arg-type]
    wanted = [one.strip() for text in targets or ["all-linear"] for one in text.split(",") if one.strip()]
    same: dict[str, Any] = {
        "rank": ranks[0], "targets": wanted, "seq": seqs[0], "batch": batch, "checkpointing": checkpointing,
        "flash": flash, "chunked_loss": loss == "chunked", "adapter_dtype": dtype or "float32",
        "double_quant": double_quant is not False, "gpus": gpus, "zero": zero, "fsdp": fsdp,
    }  # fmt: skip
    if n_parameters is None:
        shape, _, name = budgets.resolve(model, None, "llama")
    else:
        with _value_of("--params" if like is None else "--like"):
            shape, name = typical_shape(n_parameters, like or "llama"), ""

    def made(seqs: Sequence[int | None]) -> "tuple[Budget, ...]":
        if compared:
            return budgets.compare(shape, n_parameters=n_parameters, name=name, **same | {"seq": seqs[0]})
        return budgets.sweep(
            shape, methods or ("lora",), ranks, seqs, n_parameters, name, precision=precision or "bf16",
            optimizer=optimizer or "adamw", **same,
        )  # fmt: skip

    try:
        found = made(seqs)
    except NoFormulaError as error:
        if not measure:
            raise
        found = made([None])
        tell(f"note: {str(error).partition(';')[0]}: only the measurement knows them", quiet)
    measured = _measured(found, compared, seqs, measure)
    if out is not None:
        from lowrank_probe.budget_runs import BudgetRun

        BudgetRun(found, measured, storage, price, gpu or "H100").save(out)
    if as_json:
        print(json.dumps(budget_fits.told(found, card, price, storage, measured), ensure_ascii=False))  # noqa: T201
    else:
        _show(found, compared, card, price, storage, explain, measured)
    if out is not None:
        tell(f"report: {out / 'report.html'}", quiet)
    if card is not None and not _fits(found, card, compared, measured):
        what = "none of these fits" if compared else "this does not fit"
        tell(f"--gpu {gpu}: {what} on one {card.label}", False)
        raise typer.Exit(3)


def _show(
    found: "tuple[Budget, ...]", compared: bool, card: Any, price: float | None, storage: int | None, explain: bool,
    measured: Any,
) -> None:  # fmt: skip
    from lowrank_probe import budget_terminal as terminal

    if compared:
        terminal.print_comparison(found, card, price)
    elif len(found) > 1:
        terminal.print_sweep(found, card, price)
    else:
        terminal.print_budget(found[0], card, explain, price)
    if storage is not None:
        terminal.print_storage(found, storage)
    if measured is not None:
        terminal.print_measured(found[0], measured, card)


def _fits(found: "tuple[Budget, ...]", card: "Accelerator", compared: bool, measured: "Measured | None") -> bool:
    """Whether what was asked for does; of activations that only the measurement knows, by that."""
    if measured is not None and not found[0].knows_activations:
        from lowrank_probe.budget_measured import measured_total

        return measured_total(measured) <= card.usable_bytes
    some_or_all: Callable[[Iterable[bool]], bool] = any if compared else all
    return some_or_all(one.fits(card) for one in found)


def _measured(found: "tuple[Budget, ...]", compared: bool, seqs: "Sequence[int | None]", measure: bool) -> Any:
    """One measured step of a budget; what cannot be is a usage error."""
    if not measure:
        return None
    if compared or len(found) > 1 or len(seqs) > 1:
        raise typer.BadParameter("measures one run: give one --method, --rank and --seq", param_hint="--measure")
    from lowrank_probe.budget_measured import measured_step

    return measured_step(found[0], seqs[0])


def _measurable(params: str | None, seq: str | None, cards: Mapping[str, object]) -> None:
    """A usage error for options with which no step can be measured."""
    if params is not None:
        raise typer.BadParameter("needs a model, not a size: give its directory or config.json", param_hint="--measure")
    if seq is None:
        raise typer.BadParameter("needs --seq (and --batch): it runs one step", param_hint="--measure")
    for option in (option for option, given in cards.items() if given):
        raise typer.BadParameter("--measure runs on one card; leave it out", param_hint=option)


@contextmanager
def _value_of(option: str) -> Iterator[None]:
    """What the library refuses of an option's value is wrong usage, in its words."""
    try:
        yield
    except ProbeError as error:
        said = re.sub(rf"^({option}|{option[2:]}):? ", "", str(error))
        raise typer.BadParameter(said, param_hint=option) from None


def _one_of(value: str | None, allowed: Collection[str], option: str) -> None:
    if value is not None and value not in allowed:
        *first, last = allowed
        said = f"{', '.join(first)} or {last}"
        raise typer.BadParameter(f"{value!r}: expected {said}", param_hint=option)


def _unused(given: Mapping[str, object], why: str) -> None:
    """A usage error for the first option that was given and means nothing here."""
    for option, value in given.items():
        if value is not None:
            raise typer.BadParameter(why, param_hint=option)


def _methods(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(dict.fromkeys(one.strip() for one in text.split(",")))
    for name in names:
        if name not in METHODS:
            raise typer.BadParameter(f"{name!r}: expected one of {', '.join(METHODS)}", param_hint="--method")
    return names


def _numbers(text: str, hint: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{text!r}: expected a number such as 16, or several such as 4,8,16", param_hint=hint)
    return list(dict.fromkeys(map(int, text.split(","))))
