"""The commands `probe resize` and `probe merge`: parse, one library call, print. Registered by `cli`."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_probe import interrupts
from lowrank_probe.cli_shared import (
    Data,
    Device,
    Json,
    Quiet,
    progress_bar,
    read_data,
    stored_word,
    tell,
    tell_problems,
    wrong_usage,
)
from lowrank_probe.words import some

if TYPE_CHECKING:
    import pandas as pd


def resize(
    adapter: Annotated[str, typer.Argument(help="PEFT LoRA adapter: a directory or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new adapter; must be new or empty.")],
    rank: Annotated[int | None, typer.Option(min=1, help="This rank for every module.")] = None,
    energy: Annotated[float | None, typer.Option(help="The least ranks that keep this share of each ‖ΔW‖².")] = None,
    budget: Annotated[
        str | None, typer.Option(help="The ranks that keep most: 40M parameters of factors, or 80MB of file.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="No rank above this.")] = None,
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks are multiples of this, rounded up.")] = 1,
    dtype: Annotated[
        str, typer.Option(callback=stored_word, help="Of the factors written: float32, bfloat16, float16.")
    ] = "float32",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The best adapter of other ranks: the truncated SVD of each module's ΔW, by QR of its factors, never dense."""
    if sum(value is not None for value in (rank, energy, budget)) != 1:
        raise typer.BadParameter("expected one of --rank, --energy and --budget", param_hint="--rank")
    if energy is not None and not 0 < energy <= 1:
        raise typer.BadParameter(f"{energy:g}: expected above 0 and at most 1, such as 0.9", param_hint="--energy")
    with interrupts.ending_at_once():
        from lowrank_probe import allocation, resizing
        from lowrank_probe.adapter_terminal import print_resized
    if budget is not None:
        with wrong_usage("--budget"):
            allocation.parse_budget(budget)
    with progress_bar(quiet) as on_progress:
        found = resizing.resize(
            adapter, out, rank=rank, energy=energy, budget=budget, max_rank=max_rank, rank_multiple=rank_multiple,
            dtype=dtype, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        print(found.to_json())  # noqa: T201
    else:
        print_resized(found)
    for what, why in (
        ("zero", "left out because its B·A is zero"),
        ("without_rank", "left out because the budget gives it no rank"),
        ("not_carried", "left out with its factors"),
    ):
        if found.facts[what]:
            tell(f"note: {why}: {some(found.facts[what])}", quiet)
    tell(f"adapter: {found.path}", quiet)


def merge(
    base: Annotated[str, typer.Argument(help="Base model: directory, file or hub id.")],
    adapters: Annotated[list[str], typer.Argument(help="PEFT LoRA adapters trained on it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the merged model; must be new or empty.")],
    weight: Annotated[
        list[float] | None, typer.Option(help="Weight of an adapter, one each in their order. Default: 1.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(callback=stored_word, help="float32, bfloat16, float16. Default: as the base is stored."),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the merged model with base + adapters through PEFT; exit 3 if it differs.")
    ] = False,
    data: Data = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write base + Σ w·scaling·B·A as a model: the base's shards and dtypes, its tokenizer and config.

    Several adapters: first how their updates overlap, in directions and in signs.
    """
    if weight and not all(map(math.isfinite, weight)):
        raise typer.BadParameter(f"{weight}: expected finite numbers", param_hint="--weight")
    if weight and len(weight) != len(adapters):
        raise typer.BadParameter(f"{len(weight)} for {len(adapters)} adapters; one each", param_hint="--weight")
    if device != "auto" and not verify:
        raise typer.BadParameter("goes with --verify: merging itself is done on the CPU", param_hint="--device")
    with interrupts.ending_at_once():
        from lowrank_probe import merging
        from lowrank_probe.adapter_terminal import print_merged, print_overlap
        from lowrank_probe.devices import choose_device

    texts = read_data(data, verify)
    where = choose_device(device).device if verify else None  # before the work rather than after it

    def on_overlap(overlap: "pd.DataFrame") -> None:
        if not as_json:
            print_overlap(overlap)

    with progress_bar(quiet) as on_progress:
        found = merging.merge(
            base, adapters, out, weights=weight or None, dtype=dtype, on_overlap=on_overlap, on_progress=on_progress
        )
    check = None
    if where is not None:
        from lowrank_probe.verification import verify_merge

        weighted = list(zip(adapters, weight or [1.0] * len(adapters), strict=True))
        check = verify_merge(base, weighted, found.path, texts, where)
    if as_json:
        told = json.loads(found.to_json()) | ({"verification": json.loads(check.to_json())} if check else {})
        print(json.dumps(told, ensure_ascii=False))  # noqa: T201
    else:
        print_merged(found)
        if check:
            from lowrank_probe.extraction_terminal import print_verification

            print_verification("", check, "the merged checkpoint")
    for told in found.facts["notes"]:
        tell(f"note: {told}", quiet)
    for told in found.facts["warnings"]:
        tell(f"warning: {told}", False)
    tell(f"model: {found.path}", quiet)
    if check and tell_problems(check, "", quiet):
        raise typer.Exit(3)
