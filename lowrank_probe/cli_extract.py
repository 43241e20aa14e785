"""`probe extract`: parse, one library call, print."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_probe import interrupts
from lowrank_probe.cli_shared import (
    CardMemory,
    Data,
    Device,
    Exclude,
    HostMemory,
    Include,
    Json,
    Layers,
    Quiet,
    Ray,
    Seed,
    layer_span,
    progress_bar,
    read_data,
    resumable,
    stored_word,
    tell,
    tell_problems,
    tell_resumed,
    wrong_usage,
)

Rank = Annotated[str | None, typer.Option("--rank", "-r", help="A rank, several (4,8,16), or auto. Default: 16.")]


def extract(
    base: Annotated[str, typer.Argument(help="Base checkpoint: directory, file, address or hub id.")],
    tuned: Annotated[str, typer.Argument(help="Fine-tuned checkpoint.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the adapter; must be new or empty.")],
    rank: Rank = None,
    energy: Annotated[float | None, typer.Option(help="Share of each matrix's ‖ΔW‖² to keep, such as 0.9.")] = None,
    budget: Annotated[str | None, typer.Option(help="For all matrices together: 40M parameters, or 80MB.")] = None,
    denoised: Annotated[bool, typer.Option(help="Energies without the storage noise of bf16 or fp16.")] = False,
    max_rank: Annotated[int | None, typer.Option(min=1, help="No rank is larger.")] = None,
    rank_multiple: Annotated[int, typer.Option(min=1, help="Ranks are multiples of this.")] = 1,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="all-linear, everything, default, a layer type or a pattern; repeatable or a,b."),
    ] = None,
    servable: Annotated[bool, typer.Option(help="What servers take: one rank, LoRA on linear layers only.")] = False,
    tied_lora: Annotated[
        bool, typer.Option("--tied-lora", help="LoRA on a table tied to the output head: right unmerged only.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(callback=stored_word, help="Of the stored factors: float32, bfloat16 or float16.")
    ] = "float32",
    include: Include = None,
    exclude: Exclude = None,
    layers: Layers = None,
    verify: Annotated[
        bool, typer.Option(help="Compare base + adapter with the tuned model through PEFT; exit 3 if merging differs.")
    ] = False,
    data: Data = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text (.txt, .jsonl) on whose activations the factors are to be best.")
    ] = None,
    device: Device = "auto",
    memory: HostMemory = None,
    gpu_memory: CardMemory = None,
    ray: Ray = None,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The best LoRA adapter in a fine-tune: truncated SVD of ΔW, at the proven optimum, as PEFT loads it."""
    span = layer_span(layers)
    ranks, auto = _ranks(rank, default=energy is None and budget is None)
    with interrupts.ending_at_once():
        from lowrank_probe import cuda_driver

        if ray is None:
            cuda_driver.wake(device)
        from lowrank_probe import devices

        devices.start(
            "cpu" if ray else device, work="lowrank_probe.factorisation", then="lowrank_probe.extraction_reports"
        )
        from lowrank_probe import extraction
        from lowrank_probe.options import Options
        from lowrank_probe.rank_choice import RankChoice
    texts = read_data(data, verify)
    if verify:  # before the work rather than after it
        from lowrank_probe.remote_files import refuse_addresses

        refuse_addresses(base, tuned)
    with wrong_usage("--rank / --energy / --budget"):
        choice = RankChoice(
            ranks=ranks, energy=energy, auto=auto, budget=budget, denoised=denoised, max_rank=max_rank,
            rank_multiple=rank_multiple,
        )  # fmt: skip
    chosen = [one.strip() for text in targets or ["all-linear"] for one in text.split(",") if one.strip()]
    options = Options(
        include=include or (), exclude=exclude or (), layers=span, device=device, seed=seed, ray=ray,
        memory=memory, gpu_memory=gpu_memory,
    )  # fmt: skip
    with resumable(out), progress_bar(quiet) as on_progress:
        found = extraction.extract(
            base, tuned, out, ranks=choice, targets=chosen, servable=servable, tied_lora=tied_lora, dtype=dtype,
            options=options, calibration=_calibration(calibration), on_progress=on_progress,
        )  # fmt: skip
    tell_resumed(found.facts, out, quiet)
    checks: dict[str, Any] = {}
    if verify:
        from lowrank_probe.verification import verify_extraction

        found, checks = verify_extraction(found, texts)
    _show(found, checks, as_json, quiet)
    broken = [label for label, check in checks.items() if tell_problems(check, label, quiet)]
    if broken:
        raise typer.Exit(3)


def _calibration(file: Path | None) -> Any:
    if file is None:
        return None
    from lowrank_probe.calibration import Calibration  # with transformers

    return Calibration(file)


def _ranks(text: str | None, *, default: bool) -> tuple[tuple[int, ...], bool]:
    """(ranks, auto) of `--rank`; 16 where neither it nor another rule is given."""
    if text is None:
        return ((16,) if default else ()), False
    if text == "auto":
        return (), True
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(
            f"{text!r}: expected a rank such as 16, several such as 4,8,16, or auto", param_hint="--rank"
        )
    return tuple(map(int, text.split(","))), False


def _show(found: Any, checks: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        told = json.loads(found.to_json()) | {
            "verification": {label: json.loads(check.to_json()) for label, check in checks.items()}
        }
        print(json.dumps(told, ensure_ascii=False))  # noqa: T201
    else:
        from lowrank_probe.extraction_terminal import print_extraction, print_verification

        print_extraction(found)
        for label, check in checks.items():
            print_verification(label, check)
    left = next(iter(found.facts["adapters"].values()))["not_carried"]
    if left >= 0.01:
        what = ", ".join(found.facts["targets"])
        more = "" if "everything" in found.facts["targets"] else "; --targets everything carries more"
        told = f"--servable --targets {what}" if found.facts["servable"] else f"--targets {what}"
        tell(f"warning: {told} leaves out {100 * left:.0f} % of ‖ΔW‖²{more}", False)
    for text in found.facts.get("notes", []):
        tell(f"note: {text}", quiet)
