"""`evaluate`: the loss of base + ΔW truncated to rank r, for each layer type alone, all together, and all but one.

Legend: k = min(m, n). Every ΔW is factorised once; the weights of the running model are swapped in place.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lowrank_probe.devices import Choice, choose_device, find_device
from lowrank_probe.errors import ProbeError, UnchangedError
from lowrank_probe.evaluation_models import Sides, open_sides
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.evaluation_states import Group, make_groups, parse_ranks, unique_states
from lowrank_probe.evaluation_tables import make_evaluation
from lowrank_probe.evaluation_text import Text, read_data, read_text
from lowrank_probe.facts import machine_facts, same_machine
from lowrank_probe.functional_ranks import parse_tolerance
from lowrank_probe.options import Progress
from lowrank_probe.outputs import check_free
from lowrank_probe.scoring import Score, Scorer, make_task
from lowrank_probe.strict_json import SCHEMA_VERSION
from lowrank_probe.swapping import Factors, Piece, Swapper, Update, factorise, find_update
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
    on_progress: Progress | None = None,
) -> Evaluation:
    """The loss on text of base + ΔW truncated to rank r, and the smallest r within `tolerance` of the tuned model's.

    base, tuned: directories or hub ids that transformers loads (tuned may be a PEFT adapter), or two models in memory.
    data: held-out text (`evaluation_text.read_text`, which has length, sequences, held_out, packing, tokenizer).
    ranks: the grid, None 0, 1, 2, 4, 8, … and "full". groups: layer types or targets that are truncated
    (`evaluation_states.make_groups`), None each layer type that differs; leave_out: also all but each. Vectors (norms,
    biases) stay as tuned. tolerance: "5%" of what tuned gained over the base on this text, or nats. batch: sequences at
    once. dtype: of the forward pass; weights are computed in float32. out: the run directory, in which every finished
    state is kept, so that a killed run goes on.

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
    where = find_device(device)
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
        "notes": _notes(sides, text, update, made, cut if ranks is not None else []), **machine_facts(Choice(where)),
    }  # fmt: skip
    store = _store(out, facts)
    if store is not None and store.resumed:
        facts["resumed"] = store.resumed
    scorer = Scorer(task, batch, where)
    scores = _scores(
        sides, update.pieces, states, scorer, DTYPES[dtype], choose_device(device).device, store, report, seed
    )
    facts["seconds"] = time.perf_counter() - started
    found = make_evaluation(made, at, update.pieces, scorer, scores, allowed, facts)
    _check_full(found)
    if store is not None:
        found.save(os.fspath(out or ""))
        store.remove()
    return found


def _scores(
    sides: Sides, pieces: Sequence[Piece], states: Sequence[tuple[Group, int]], scorer: Scorer, dtype: torch.dtype,
    for_factors: torch.device, store: "Unfinished | None", report: Progress, seed: int,
) -> dict[str, Score]:  # fmt: skip
    """ "base", "tuned" and the number of each state → its score; those that the store has are not run again."""
    names = ["tuned", "base", *(f"state-{i:05d}" for i in range(len(states)))]
    scores = {name: found for name in names if (found := _kept(store, name)) is not None}
    pending = [name for name in names if name not in scores]
    needed: dict[int, int] = {}
    for group, rank in (states[int(name[6:])] for name in pending if name.startswith("state-")):
        for i, r in group.state(rank, pieces).items():
            needed[i] = max(needed.get(i, 0), r)
    needed = {i: r for i, r in needed.items() if r}
    total, done = len(needed) + len(names), len(scores)
    factors: dict[int, Factors] = {}
    for i, r in needed.items():
        factors[i] = factorise(pieces[i], sides.base, sides.tuned, r, for_factors, seed)
        done += 1
        report(f"factorising {pieces[i].name}", done, total)
    with _enough_memory(scorer):
        tuned = _aside(sides, scorer.device, dtype)
        model = sides.model.to(scorer.device, dtype).requires_grad_(False)
        scorer.keep(model)
        base, held = _near(sides.base, tuned, factors, pieces, scorer.device)
        every = [held.get(i) or Factors(*(torch.zeros(0, 0),) * 3) for i in range(len(pieces))]
        swapper = Swapper(model, pieces, every, base, tuned)
        for name in pending:
            if name == "base":
                swapper.put_base(sides.base)
            elif name == "tuned":
                swapper.put({})
            else:
                group, rank = states[int(name[6:])]
                swapper.put(group.state(rank, pieces))
            scores[name] = scorer.score(model, name)
            if name == "base":
                swapper.restore(tuned)
            if store is not None:
                _keep(store, name, scores[name])
            done += 1
            report("base and tuned" if name in ("base", "tuned") else "truncated states", done, total)
    return scores


def _aside(sides: Sides, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tuned values apart from the parameters that will be swapped: copied where these stay where they are."""
    if device.type != "cpu" or dtype != torch.float32:
        return sides.tuned
    return {name: W.clone() for name, W in sides.tuned.items()}


def _near(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], factors: Mapping[int, Factors], pieces: Sequence[Piece],
    device: torch.device,
) -> tuple[Mapping[str, Tensor], Mapping[int, Factors]]:  # fmt: skip
    """The base's values and the factors where the model is, if half of the free memory holds them; else on the host."""
    if device.type != "cuda":
        return base, factors
    names = {pieces[i].parameter for i in factors}
    n_bytes = sum(4 * base[name].numel() for name in names) + sum(one.n_bytes for one in factors.values())
    if 2 * n_bytes > torch.cuda.mem_get_info(device)[0]:
        return base, factors
    near = {name: base[name].to(device) for name in names}
    return {**base, **near}, {i: one.to(device) for i, one in factors.items()}


@contextmanager
def _enough_memory(scorer: Scorer) -> Iterator[None]:
    """Out of memory as one line with the way out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(scorer) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        raise _too_large(scorer) from error


def _too_large(scorer: Scorer) -> ProbeError:
    length = max(value.shape[1] for value in scorer.task.inputs.values())
    return ProbeError(
        f"{scorer.device}: out of memory with {scorer.batch} sequences of {length} tokens at once; use a smaller "
        "--batch or --length, --dtype bfloat16, or another --device"
    )


def _store(out: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> "Unfinished | None":
    if out is None:
        return None
    from lowrank_probe.unfinished import Unfinished

    same = ("base", "tuned", "text", "merit", "options")
    return Unfinished(Path(out), {key: facts[key] for key in same} | same_machine(facts))


def _kept(store: "Unfinished | None", name: str) -> Score | None:
    if store is None or not store.has(name):
        return None
    return Score(store.get(name, "merit").numpy(), store.get(name, "kl").numpy())


def _keep(store: "Unfinished", name: str, score: Score) -> None:
    store.put(name, {"merit": torch.from_numpy(score.merit), "kl": torch.from_numpy(score.kl)}, {})


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
