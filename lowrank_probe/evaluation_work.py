"""The states of an evaluation, one by one: here, or as tasks of a Ray cluster whose workers hold a model each.

Legend: a state is named "tuned", "base", or state-00042 for a group at a rank.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lowrank_probe.cluster import cluster_jobs
from lowrank_probe.errors import ProbeError
from lowrank_probe.evaluation_models import Sides, open_sides
from lowrank_probe.evaluation_states import Group
from lowrank_probe.options import Progress
from lowrank_probe.scoring import Score, Scorer, Task
from lowrank_probe.swapping import Factors, Piece, Swapper, factorise

if TYPE_CHECKING:
    from lowrank_probe.unfinished import Unfinished

SIDES: Final = ("tuned", "base")


@dataclass(frozen=True)
class States:
    """What every state needs. pieces: the matrices that differ; states: (group, rank), by number. dtype: of the forward
    pass; for_factors: where ΔW is factorised; seed: of the factorisation."""

    pieces: Sequence[Piece]
    states: Sequence[tuple[Group, int]]
    dtype: torch.dtype
    for_factors: torch.device
    seed: int

    @property
    def names(self) -> list[str]:
        return [*SIDES, *(f"state-{i:05d}" for i in range(len(self.states)))]

    def ranks(self, names: Sequence[str]) -> dict[int, int]:
        """Number of a piece → the largest rank that these states need of it."""
        needed: dict[int, int] = {}
        for group, rank in (self.states[int(name[6:])] for name in names if name not in SIDES):
            for i, r in group.state(rank, self.pieces).items():
                needed[i] = max(needed.get(i, 0), r)
        return {i: r for i, r in needed.items() if r}

    def scoring(
        self, sides: Sides, scorer: Scorer, names: Sequence[str], factorised: Callable[[str], None]
    ) -> Callable[[str], Score]:
        """Name of one of these states → its score. Every ΔW is factorised first; then the model is where it runs."""
        factors: dict[int, Factors] = {}
        for i, r in self.ranks(names).items():
            factors[i] = factorise(self.pieces[i], sides.base, sides.tuned, r, self.for_factors, self.seed)
            factorised(self.pieces[i].name)
        with _enough_memory(scorer):
            tuned = _aside(sides, scorer.device, self.dtype)
            model = sides.model.to(scorer.device, self.dtype).requires_grad_(False)
            scorer.keep(model)
            base, held = _near(sides.base, tuned, factors, self.pieces, scorer.device)
            every = [held.get(i) or Factors(*(torch.zeros(0, 0),) * 3) for i in range(len(self.pieces))]
            swapper = Swapper(model, self.pieces, every, base, tuned)

        def score(name: str) -> Score:
            with _enough_memory(scorer):
                if name == "base":
                    swapper.put_base(sides.base)
                elif name == "tuned":
                    swapper.put({})
                else:
                    group, rank = self.states[int(name[6:])]
                    swapper.put(group.state(rank, self.pieces))
                found = scorer.score(model, name)
                if name == "base":
                    swapper.restore(tuned)
                return found

        return score


def score_here(
    sides: Sides, states: States, scorer: Scorer, store: "Unfinished | None", report: Progress
) -> dict[str, Score]:
    """The score of every state; those that the store has are not run again."""
    names = states.names
    scores = {name: found for name in names if (found := _kept(store, name)) is not None}
    pending = [name for name in names if name not in scores]
    total, done = len(states.ranks(pending)) + len(names), len(scores)

    def factorised(name: str) -> None:
        nonlocal done
        done += 1
        report(f"factorising {name}", done, total)

    score = states.scoring(sides, scorer, pending, factorised)
    for name in pending:
        scores[name] = score(name)
        if store is not None:
            _keep(store, name, scores[name])
        done += 1
        report("base and tuned" if name in SIDES else "truncated states", done, total)
    return scores


@dataclass(frozen=True)
class _Job:
    """One state on a node of a cluster. base, tuned: as `open_sides` takes them, where every node sees them."""

    base: Any
    tuned: Any
    states: States
    task: Task
    batch: int
    device: torch.device
    key: str

    def load(self, name: str) -> str:
        return name

    def compute(self, name: str, loaded: str) -> tuple[str, Score, Tensor]:
        """The name, its score, and which of the tuned model's outputs were kept (`Scorer.kept`)."""
        if self.key not in _workers:
            _workers.clear()
            scorer = Scorer(self.task, self.batch, self.device)
            sides = open_sides(self.base, self.tuned)
            _workers[self.key] = scorer, self.states.scoring(sides, scorer, self.states.names, lambda _: None)
        scorer, score = _workers[self.key]
        return name, score(loaded), scorer.kept


# Of this process: a worker keeps its model from task to task.
_workers: dict[str, tuple[Scorer, Callable[[str], Score]]] = {}


def score_on_cluster(
    base: Any, tuned: Any, key: str, n_parameters: int, states: States, scorer: Scorer, store: "Unfinished | None",
    report: Progress,
) -> dict[str, Score]:  # fmt: skip
    """`score_here` as tasks of the cluster that this process is in. key: what tells this evaluation from others.

    Every worker loads both sides and factorises ΔW once, then does whatever states it is given.
    """
    names = states.names
    scores = {name: found for name in names if (found := _kept(store, name)) is not None}
    pending = [name for name in names if name not in scores or name == "tuned"]  # which says what is kept of it
    job = _Job(base, tuned, states, scorer.task, scorer.batch, scorer.device, key)
    jobs = cluster_jobs(pending, lambda _: n_parameters, job.load, job.compute, scorer.device, together=0)
    done = len(names) - len(pending)
    with closing(jobs):
        for name, found, kept in jobs:
            scores[name], scorer.kept = found, kept
            if store is not None and not store.has(name):
                _keep(store, name, found)
            done += 1
            report("base and tuned" if name in SIDES else "truncated states", done, len(names))
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


def _kept(store: "Unfinished | None", name: str) -> Score | None:
    if store is None or not store.has(name):
        return None
    return Score(store.get(name, "merit").numpy(), store.get(name, "kl").numpy())


def _keep(store: "Unfinished", name: str, score: Score) -> None:
    store.put(name, {"merit": torch.tensor(score.merit), "kl": torch.tensor(score.kl)}, {})
