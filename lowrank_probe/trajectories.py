"""`trajectory()`: one base, several fine-tunes (checkpoints of one training, or siblings) → how their updates compare.

Each step is a `Result` of `spectrum`; beside them stand the similarity of the steps' singular subspaces and the
amplification of each step, columns as `columns.SIMILARITY` and `columns.AMPLIFICATION`.
"""

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import pandas as pd
import torch

from lowrank_probe import spectra
from lowrank_probe.checkpoints import WEIGHT_SUFFIXES, Checkpoint, Source, open_checkpoint
from lowrank_probe.devices import Choice, choose_device
from lowrank_probe.errors import ProbeError
from lowrank_probe.facts import machine_facts, side_facts
from lowrank_probe.footprints import find_room
from lowrank_probe.hub import is_hub_id
from lowrank_probe.matching import Pair, match
from lowrank_probe.options import Keywords, Options, Progress
from lowrank_probe.outputs import check_free
from lowrank_probe.remote_files import is_address, shown
from lowrank_probe.runs import Result
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.trajectory_runs import TAKEN, Trajectory, is_labels, naming
from lowrank_probe.trajectory_work import Comparison
from lowrank_probe.unfinished import Unfinished


def trajectory(
    base: Source,
    steps: Sequence[Source],
    *,
    labels: Sequence[str] | None = None,
    rank: int = 16,
    out: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    **options: Unpack[Keywords],
) -> Trajectory:
    """Spectra of several fine-tunes of one base, φ(i, j) between their updates, and their amplification.

    base, steps: as `spectrum` takes them, the steps in the order given; PEFT adapters may be among them. labels: their
    names, by default from their directories.
    rank: directions kept of each ΔW, (m, rank) and (rank, n); φ and amplification at 1, 2, 4, … rank. The other options
    are those of `spectrum`. out: the trajectory's directory (`Trajectory.save`), in which every finished matrix is kept
    at once, and every finished step, so that a run that was killed goes on there, as `spectrum`'s does.

    One matrix at a time: all steps' directions of it are kept, never two steps' matrices. Every step is read twice, the
    base once for each step and once more. Raises what `spectrum` raises, naming the step; on Ctrl-C `Interrupted` or,
    after the last spectrum, KeyboardInterrupt.
    Source: Hu et al. 2021, §7.2 and §7.3 (φ and amplification).
    """
    return probe_steps(
        base, steps, Options(**options), labels=labels, rank=rank, out=out, on_progress=on_progress
    )  # fmt: skip


def probe_steps(
    base: Source,
    steps: Sequence[Source],
    options: Options,
    *,
    labels: Sequence[str] | None = None,
    rank: int = 16,
    out: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
) -> Trajectory:
    """`trajectory` with the options of `spectrum` in one value."""
    if out is not None:
        check_free(Path(out))
    if isinstance(steps, str | os.PathLike | Mapping) or not isinstance(steps, Iterable):
        raise ProbeError(f"steps: expected a list of checkpoints, found a {type(steps).__name__}; put it in a list")
    steps = list(steps)
    if not steps:
        raise ProbeError("no steps: expected at least one fine-tuned checkpoint")
    sources = dict(zip(step_labels(steps) if labels is None else _checked(labels, steps), steps, strict=True))
    if rank < 1:
        raise ProbeError(f"rank {rank}: expected at least 1 direction")
    choice = choose_device(options.device, options.ray)
    base_side = open_checkpoint(base)
    sides: dict[str, Checkpoint] = {}
    for label, source in sources.items():  # every header before any work
        with naming(label):
            sides[label] = open_checkpoint(source)
    matched, notes = _match_all(base_side, sides, options), list[str]()
    if options.split and (fused := _fused_beside_adapters(sides, matched)):
        options = replace(options, split=False)
        matched = _match_all(base_side, sides, options)
        notes = [f"fused matrices such as {fused} are kept whole: an adapter among the steps changes them as a whole"]
    store = None
    if out is not None:
        named = {"base": base_side} | {f"step {label}": side for label, side in sides.items()}
        store = Unfinished(Path(out), spectra.identity(named, options, choice) | {"rank": rank})
    results: dict[str, Result] = {}
    for number, (label, side) in enumerate(sides.items(), 1):
        with naming(label):
            found = spectra.compare(
                base_side, side, match(base_side, side, options), options, choice, store=store, prefix=f"{label}/",
                started=time.perf_counter(), on_progress=_told(on_progress, f"{number}/{len(sides)} {label}"),
            )  # fmt: skip
            if out is not None:
                found.save(Path(out) / label)
        results[label] = found
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "complete", "base": side_facts(base_side),
        "steps": [{"label": label, "path": result.facts["tuned"]["path"]} for label, result in results.items()],
        "rank": rank, "grid_matrix": _grid_matrix(results), "options": options.facts(), "notes": notes,
        **machine_facts(choice),
    }  # fmt: skip
    if store is not None and store.resumed:
        facts["resumed"] = store.resumed
    # Here also with a cluster, whose devices this machine may not have: it is small beside the spectra.
    where = torch.device("cpu") if choice.cluster else choice.device
    room = find_room(options.memory, options.gpu_memory, Choice(where), store.folder if store is not None else None)
    comparison = Comparison(
        base_side, sides, matched, results, rank, facts["grid_matrix"], where, options.seed, store, room
    )
    similarity, amplification = comparison.run(_told(on_progress, "subspaces"))
    trajectory = Trajectory(results, similarity, amplification, facts)
    if out is not None and store is not None:
        trajectory.save(out)
        store.remove()
    return trajectory


def _match_all(base: Checkpoint, sides: Mapping[str, Checkpoint], options: Options) -> dict[str, dict[str, Pair]]:
    """label → key → pair."""
    matched = {}
    for label, side in sides.items():
        with naming(label):
            matched[label] = {pair.key: pair for pair in match(base, side, options).pairs}
    return matched


def _fused_beside_adapters(sides: Mapping[str, Checkpoint], matched: Mapping[str, Mapping[str, Pair]]) -> str:
    """A tensor that an adapter changes as a whole while another step's is taken apart; "" where there is none."""
    whole = {pair.name for label, side in sides.items() if side.is_adapter for pair in matched[label].values()}
    apart = (pair.name for pairs in matched.values() for pair in pairs.values() if pair.part.label)
    return next((name for name in apart if name in whole), "")


def step_labels(steps: Sequence[Source]) -> list[str]:
    """A name for each step from its directory (or file), with as many parents as tell it from the others.

    >>> step_labels(["a/checkpoint-100", "a/checkpoint-200/", "b/checkpoint-100"])
    ['a-checkpoint-100', 'checkpoint-200', 'b-checkpoint-100']
    """
    parts = [[word for p in _path_of(step) if (word := re.sub(r"[^\w.-]+", "-", p).strip("-."))] for step in steps]
    parts = [words or ["step"] for words in parts]
    folded = [[word.lower() for word in words] for words in parts]
    depth = [1] * len(parts)

    def named() -> list[str]:
        return ["-".join(words[-n:]) for words, n in zip(parts, depth, strict=True)]

    while True:
        names = [name.lower() for name in named()]
        unclear = [
            i for i, name in enumerate(names)
            if depth[i] < len(parts[i]) and any(names[j] == name and folded[j] != folded[i] for j in range(len(names)))
        ]  # fmt: skip
        if not unclear:
            break
        for i in unclear:
            depth[i] += 1
    unique: list[str] = []
    for name in named():
        number, label = 1, name if name.lower() not in TAKEN else f"{name}-step"
        while label.lower() in {other.lower() for other in unique}:
            number += 1
            label = f"{name}-{number}"
        unique.append(label)
    return unique


def _path_of(step: Source) -> tuple[str, ...]:
    """The components of a step's path; of a hub id its own; of a model in memory its class."""
    if not isinstance(step, str | os.PathLike):
        return ("step" if isinstance(step, Mapping) else type(step).__name__,)
    text = os.fspath(step)
    path = Path(shown(text))
    if not is_address(text) and not path.exists() and path.suffix not in WEIGHT_SUFFIXES and is_hub_id(text):
        return path.parts
    path = path if is_address(text) else path.absolute()
    if path.suffix in WEIGHT_SUFFIXES:
        path = path.parent if path.stem in ("model", "adapter_model", "pytorch_model") else path.with_suffix("")
    return path.parts


def _told(on_progress: Progress | None, prefix: str) -> Progress | None:
    return on_progress and (lambda name, done, total: on_progress(f"{prefix}: {name}", done, total))


def _checked(labels: Sequence[str], steps: Sequence[Any]) -> list[str]:
    if len(labels) != len(steps):
        raise ProbeError(f"{len(labels)} labels for {len(steps)} steps (expected one each)")
    if not is_labels(labels):
        raise ProbeError(
            f"labels {', '.join(map(repr, labels))}: expected names that directories can have, all different"
        )
    return list(labels)


def _grid_matrix(results: Mapping[str, Result]) -> str | None:
    """The matrix whose whole grid φ(i, j) is kept: of those that most steps changed, inside the blocks if there are
    any, the one with the largest relative update in the last step."""
    tables = pd.concat([result.table for result in results.values()])
    if tables.empty:
        return None
    tables = tables[tables["layer"].notna()] if tables["layer"].notna().any() else tables
    counts = tables["name"].value_counts()
    tables = tables[tables["name"].isin(counts.index[counts == counts.max()])]
    last = tables.drop_duplicates("name", keep="last").sort_values("relative_update", ascending=False, kind="stable")
    return str(last["name"].iloc[0])
