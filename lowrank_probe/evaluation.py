"""`evaluate`: the loss of base + ΔW truncated to rank r, for each layer type alone, all together, and all but one.

Legend: k = min(m, n). Every ΔW is factorised once; the weights of the running model are swapped in place.
"""

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from lowrank_probe.devices import Choice, choose_device, find_device
from lowrank_probe.errors import ProbeError, UnchangedError
from lowrank_probe.evaluation_models import Sides, open_sides
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.evaluation_states import Group, make_groups, parse_ranks, unique_states
from lowrank_probe.evaluation_tables import make_evaluation
from lowrank_probe.evaluation_text import Text, read_data, read_text
from lowrank_probe.evaluation_work import States, score_here, score_on_cluster
from lowrank_probe.facts import machine_facts, same_machine
from lowrank_probe.functional_ranks import parse_tolerance
from lowrank_probe.options import Progress
from lowrank_probe.outputs import check_free
from lowrank_probe.scoring import Scorer, make_task
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.swapping import Update, find_update
from lowrank_probe.words import count, some

if TYPE_CHECKING:
    from lowrank_probe.unfinished import Unfinished

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Two weights that differ by rounding alone: what full rank may miss of the tuned model's loss.
FULL_RANK_BAR: Final = 1e-4


def evaluate(
    base: Any,
    tuned: Any,
    data: Any,
    *,
    ranks: Sequence[int | str] | None = None,
    groups: Sequence[str] | None = None,
    leave_out: bool = True,
    tolerance: str | float = "5%",
    length: int | None = None,
    sequences: int = 64,
    batch: int = 8,
    held_out: float | None = None,
    packing: bool | None = None,
    tokenizer: Any = None,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    ray: str | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """The loss on text of base + ΔW truncated to rank r, and the smallest r within `tolerance` of the tuned model's.

    base, tuned: directories or hub ids that transformers loads (tuned may be a PEFT adapter), or two models in memory.
    data: held-out text (`evaluation_text.read_text`, which has length, sequences, held_out, packing, tokenizer).
    ranks: the grid, None 0, 1, 2, 4, 8, … and "full". groups: layer types or targets that are truncated
    (`evaluation_states.make_groups`), None each layer type that differs; leave_out: also all but each. Vectors (norms,
    biases) stay as tuned. tolerance: "5%" of what tuned gained over the base on this text, or nats. batch: sequences at
    once. dtype: of the forward pass; weights are computed in float32. out: the run directory, in which every finished
    state is kept, so that a killed run goes on. ray: the address of a Ray cluster ("auto": this machine's), whose
    workers hold a model each and do the states.

    Causal models are judged by next-token loss, masked ones by masked-token loss, other heads by KL(tuned ‖ state), no
    head by 1 − cosine of last hidden states.

    Raises `ProbeError`, `MatchError` (not of one shape, a target that picks nothing), `CheckpointError`, `OutputError`,
    `UnchangedError` where no matrix differs, `NumericsError` for NaN and Inf.
    """
    grid, allowed = parse_ranks(ranks), parse_tolerance(tolerance)
    if dtype not in DTYPES:
        raise ProbeError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if batch < 1:
        raise ProbeError(f"batch={batch}: expected at least 1 sequence")
    if out is not None:
        check_free(Path(out))
    if ray is not None and (isinstance(base, nn.Module) or isinstance(tuned, nn.Module)):
        raise ProbeError("ray: a model in memory is not where the nodes are; give its directory")
    where = find_device(device) if ray is None else choose_device(device, ray).device
    report = on_progress or _silent
    started = time.perf_counter()
    report("loading models", 0, 1)
    documents = read_data(data)  # before the models, which take longer
    sides = open_sides(base, tuned)
    text = read_text(
        data,
        documents,
        sides,
        length=length,
        sequences=sequences,
        held_out=held_out,
        packing=packing,
        tokenizer=tokenizer,
    )
    update = find_update(sides.base, sides.tuned, sides.config)
    if not update.pieces:
        raise UnchangedError(
            f"{sides.facts['base']['path']} and {sides.facts['tuned']['path']} do not differ in any matrix"
        )
    made, cut = make_groups(update.pieces, grid, groups, leave_out)
    task = make_task(sides.model, sides.config, text.blocks, seed, text.mask_id, text.special)
    states, at = unique_states(made)
    asked = {
        "ranks": None if ranks is None else list(grid), "groups": None if groups is None else list(groups),
        "leave_out": leave_out, "tolerance": str(allowed), "batch": batch, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "complete", **sides.facts, "text": text.facts,
        "merit": task.merit, "options": asked, "n_states": len(states) + 2,
        "notes": _notes(sides, text, update, made, cut if ranks is not None else []),
        **machine_facts(Choice(where, cluster=ray is not None)),
    }  # fmt: skip
    store = _store(out, facts)
    if store is not None and store.resumed:
        facts["resumed"] = store.resumed
    scorer = Scorer(task, batch, where)
    every = States(update.pieces, states, DTYPES[dtype], choose_device(device, ray).device, seed)
    if ray is None:
        scores = score_here(sides, every, scorer, store, report)
    else:
        n_parameters = sum(W.numel() for W in sides.tuned.values())
        scores = score_on_cluster(base, tuned, uuid.uuid4().hex, n_parameters, every, scorer, store, report)
    facts["seconds"] = time.perf_counter() - started
    found = make_evaluation(made, at, update.pieces, scorer, scores, allowed, facts)
    _check_full(found)
    if store is not None:
        found.save(os.fspath(out or ""))
        store.remove()
    return found


def _store(out: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> "Unfinished | None":
    if out is None:
        return None
    from lowrank_probe.unfinished import Unfinished

    same = ("base", "tuned", "text", "merit", "options")
    return Unfinished(Path(out), {key: facts[key] for key in same} | same_machine(facts))


def _notes(sides: Sides, text: Text, update: Update, groups: Sequence[Group], cut: Sequence[str]) -> list[str]:
    every = next(group for group in groups if group.how == "all")
    notes = [*sides.notes, *text.blocks.notes, *cut]
    rest = len(update.pieces) - len(every.pieces)
    if rest:
        notes.append(f"in no group, so as tuned in every state but the base: {count(rest, 'matrix', 'matrices')}")
    if update.vectors:
        notes.append(f"{some(update.vectors)} (norms, biases) differ too and stay as tuned in every state but the base")
    if update.kept:
        notes.append(f"{some(update.kept)} differ, are no matrices, and stay as tuned in every state but the base")
    return notes


def _check_full(found: Evaluation) -> None:
    """Note by how much full rank misses the tuned model: the noise of the arithmetic, below which nothing counts."""
    rows = found.table[found.table["full"] & (found.table["how"] != "tuned")]
    worst = float(rows["excess"].abs().max()) if len(rows) else 0.0
    if worst > FULL_RANK_BAR:
        found.facts["notes"].append(
            f"at full rank the weights differ from the tuned ones by rounding alone, the loss by up to {worst:.2g}: "
            "differences of that size mean nothing (--dtype float32 has less)"
        )


def _silent(name: str, done: int, total: int) -> None:
    """Where nobody listens."""
