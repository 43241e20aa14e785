"""`extract()`: a fine-tune → the best LoRA adapters in it, with a ledger of what they carry and what they leave out.

Legend: m out, n in, r rank. A target is what PEFT adapts (`targets.Target`), its copies the experts of one parameter.
Every finished matrix is kept at once (`unfinished`), so that a run that was killed goes on where it was.
"""

import operator
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank_probe.adapter_format import CONFIG, WEIGHTS
from lowrank_probe.allocation import Allotment
from lowrank_probe.checkpoints import Source, open_checkpoint
from lowrank_probe.columns import CURVES, EXTRACTION
from lowrank_probe.devices import choose_device
from lowrank_probe.errors import ProbeError, UnchangedError
from lowrank_probe.extraction_ledger import curves, ledger_lines
from lowrank_probe.extraction_work import Work
from lowrank_probe.facts import machine_facts, same_machine, side_facts
from lowrank_probe.narrowing import stored_dtype
from lowrank_probe.options import Options, Progress
from lowrank_probe.peft_files import write_adapter
from lowrank_probe.rank_choice import RankChoice
from lowrank_probe.selection import select
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.targets import Selection
from lowrank_probe.torch_dtypes import DTYPES
from lowrank_probe.unfinished import Unfinished
from lowrank_probe.words import some

if TYPE_CHECKING:
    from lowrank_probe.calibration import Calibration
    from lowrank_probe.extraction_runs import Extraction


def extract(
    base: Source,
    tuned: Source,
    out: str | Path,
    *,
    ranks: RankChoice | int | Sequence[int] | str = 16,
    targets: Sequence[str] = ("all-linear",),
    servable: bool = False,
    tied_lora: bool = False,
    dtype: str = "float32",
    options: Options = Options(),  # noqa: B008 - frozen
    calibration: "Calibration | None" = None,
    on_progress: Progress | None = None,
) -> "Extraction":
    """Write the truncated-SVD LoRA of ΔW = W_tuned − W_base as PEFT adapters into `out`.

    ranks: a rank, several (one adapter each, `out/r4/`, `out/r8/`, …), "auto", or a `RankChoice`. targets: what is
    adapted, as `selection.select`. servable: one rank, LoRA on linear layers only. tied_lora: a table that is tied to
    the output head by LoRA too, which holds unmerged only, in place of the whole table. dtype: of the stored factors.
    options: include, exclude, layers, device, seed. calibration: a text on whose inputs the factors are to be best,
    where that brings base + adapter nearer to the fine-tune on other text (`calibration`); a budget then goes by the
    weighted energies.

    Raises `UnchangedError` where nothing differs, `CheckpointError`, `MatchError`, `NumericsError`, `OutputError`.
    """
    choice = _rank_choice(ranks)
    stored = DTYPES[stored_dtype(dtype)]
    if servable and len(choice.ranks) != 1:
        raise ProbeError("--servable makes an adapter of one rank: give it with --rank 16, no energy, auto or budget")
    if servable and tied_lora:
        raise ProbeError("--servable is LoRA on linear layers only, --tied-lora adapts a table; give one of them")
    where = choose_device(options.device, options.ray)
    base_side, tuned_side = open_checkpoint(base), open_checkpoint(tuned)
    if tuned_side.is_adapter:
        raise ProbeError(f"{tuned_side.path}: is an adapter already; probe resize changes its rank")
    selection = select(
        base_side, tuned_side, targets, include=options.include, exclude=options.exclude, layers=options.layers,
        servable=servable, tied_lora=tied_lora,
    )  # fmt: skip
    choice, notes = _one_rank(choice, selection) if servable else (choice, [])
    notes += _absent(selection)
    if selection.sizes and not isinstance(tuned_side.path, Path):
        notes.append(
            f"the tokenizer of {tuned_side.path} is not copied: its address has no list of files; add it by hand"
        )
    if tied_lora and not any(target.tied for target in selection.chosen):
        notes.append(
            "--tied-lora changes nothing: no table embed_tokens that is tied to the output head is among the --targets"
        )
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "complete", "base": side_facts(base_side),
        "tuned": side_facts(tuned_side), "targets": list(targets), "servable": servable, "tied_lora": tied_lora,
        "dtype": dtype,
        "vocabulary": selection.sizes,
        "ranks": choice.facts(), "options": options.facts(),
        "notes": [*selection.notes, *notes, *filter(None, [where.note])], **machine_facts(where),
    }  # fmt: skip
    calibrator = None
    if calibration is not None:  # before any work: it imports transformers, and may not be possible
        from lowrank_probe.calibration import Calibrator

        # On a cluster the model runs in this process, on what this machine has.
        here = choose_device("auto") if where.cluster and where.device.type != "cpu" else where
        calibrator = Calibrator.open(calibration, base_side, tuned_side, here.device)
    same = ("base", "tuned", "dtype")
    identity = {key: facts[key] for key in same} | {"seed": options.seed} | same_machine(facts)
    if not (base_side.files and tuned_side.files):  # a model in memory cannot be known again
        identity["run"] = uuid.uuid4().hex
    store = Unfinished(Path(out), identity)
    if store.resumed:
        facts["resumed"] = store.resumed
    work = Work(
        base_side, tuned_side, selection.chosen, store, where.device, options, choice.needs_noise,
        cluster=where.cluster, others=where.others,
    )  # fmt: skip
    started = time.perf_counter()
    if where.device.type == "cuda" and not where.cluster:
        for card in (where.device, *where.others):
            torch.cuda.reset_peak_memory_stats(card)
    norms = selection.weigh(base_side, tuned_side)
    other_bytes = sum(one.n_bytes(tuned_side) for one in selection.whole)
    allotted = _ranks(work, choice, stored, on_progress, other_bytes)
    works = dict.fromkeys(allotted, work)
    if calibrator is not None and any(map(work.changed, work.pieces())):
        again = partial(_ranks, choice=choice, dtype=stored, progress=on_progress, other_bytes=other_bytes)
        works, allotted, facts["calibration"] = calibrator.run(
            work, selection, allotted, stored, again if choice.budget and not choice.denoised else None,
            on_progress,
        )  # fmt: skip
    kept = {
        label: {target.name: allotments[target.name].rank for target in work.targets if works[label].moved(target)}
        for label, allotments in allotted.items()
    }
    carried = {label: selection.at(ranks) for label, ranks in kept.items()}
    for side in (base_side, tuned_side):
        side.check_unchanged()
    lines = ledger_lines(works, carried, allotted, norms)
    if all(line["status"] == "unchanged" for line in lines):
        store.remove()
        raise UnchangedError(
            f"{base_side.path} and {tuned_side.path} are identical in every tensor: nothing to extract"
        )
    # Imported while the matrices are computed, not before.
    import pandas as pd

    from lowrank_probe.extraction_runs import Extraction
    from lowrank_probe.extraction_summary import adapter_facts

    ledger = pd.DataFrame(lines, columns=list(EXTRACTION))
    adapters = {}
    for earlier in (Path(out), *Path(out).glob("r[0-9]*")):  # of this run, killed when it was asked for other ranks
        if (earlier.name if earlier != Path(out) else "") not in kept:
            (earlier / CONFIG).unlink(missing_ok=True)
    for label, at in kept.items():
        (Path(out) / label / CONFIG).unlink(missing_ok=True)  # of this run, killed while it wrote
        adapters[label] = write_adapter(
            Path(out) / label, carried[label], at, partial(works[label].cut, at), base_side, tuned_side,
            dtype=stored,
        )  # fmt: skip
    facts["seconds"] = time.perf_counter() - started
    if where.device.type == "cuda" and not where.cluster:
        facts["gpu_peak_bytes"] = max(map(torch.cuda.max_memory_allocated, (where.device, *where.others)))
    facts["adapters"] = {
        label: adapter_facts(ledger, label) | {"n_bytes": (path / WEIGHTS).stat().st_size}
        for label, path in adapters.items()
    }
    found = Extraction(ledger, pd.DataFrame(curves(work), columns=list(CURVES)), adapters, facts)
    found.write()
    store.remove()
    return found


def _rank_choice(ranks: RankChoice | int | Sequence[int] | str) -> RankChoice:
    if isinstance(ranks, RankChoice):
        return ranks
    if isinstance(ranks, str):
        if ranks != "auto":
            raise ProbeError(f'ranks {ranks!r}: expected a rank, several, "auto" or a RankChoice')
        return RankChoice(auto=True)
    try:
        several = tuple(map(operator.index, ranks if isinstance(ranks, Iterable) else (ranks,)))
    except TypeError:
        raise ProbeError(f'ranks {ranks!r}: expected a rank, several, "auto" or a RankChoice') from None
    return RankChoice(ranks=several)


def _one_rank(choice: RankChoice, selection: Selection) -> tuple[RankChoice, list[str]]:
    """The choice with every rank at most what the smallest matrix can have, and what to say of it."""
    smallest = min(selection.chosen, key=lambda target: min(target.shape), default=None)
    if smallest is None or choice.most <= min(smallest.shape):
        return choice, []
    most = min(smallest.shape)
    told = f"--servable, one rank for all: {most} instead of {choice.most}, because {smallest.name} is {smallest.shape}"
    return replace(choice, max_rank=most), [told]


def _absent(selection: Selection) -> list[str]:
    """What to say of tensors of the base that the fine-tune lacks, and of new ones that are carried whole."""
    gone = [line["name"] for line in selection.matching.ledger if line["status"] == "only in base"]
    new = [one.name for one in selection.whole if one.why == "new module"]
    told = [f"{_some_are(gone)} only in the base: an adapter cannot take it away"] if gone else []
    return told + ([f"{_some_are(new)} not in the base: carried whole, and all of it counts as update"] if new else [])


def _some_are(names: Sequence[str]) -> str:
    return f"{some(names)} {'is' if len(names) == 1 else 'are'}"


def _ranks(
    work: Work, choice: RankChoice, dtype: torch.dtype, progress: Progress | None, other_bytes: int
) -> dict[str, dict[str, Allotment]]:
    """Adapter → target → its allotment; all factors are in the store afterwards."""
    if choice.needs_spectra:
        work.spectra(progress)
        units = [work.unit(target) for target in work.targets]
        try:
            allotted = choice.allot(units, dtype.itemsize, other_bytes)
        except ProbeError as error:
            raise ProbeError(
                f"{error} (the singular values are kept in {work.store.folder} for the next try)"
            ) from None
        work.factors({one.name: one.rank for one in allotted[""]}, dtype, progress)
    else:
        work.factors({target.name: min(choice.most, *target.shape) for target in work.targets}, dtype, progress)
        units = [work.kept_unit(target) for target in work.targets]
        allotted = choice.allot(units, dtype.itemsize)
    return {label: {one.name: one for one in allotments} for label, allotments in allotted.items()}
