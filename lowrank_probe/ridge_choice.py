"""KL(tuned ‖ base + adapter) of every candidate adapter on two parts of a text: one to choose by, one to report.

One model is in memory. It is the fine-tune, given the base's values of all that no adapter carries; then each candidate
writes W_base + BA into its targets. So a new head or grown table is there on both sides, and what is carried whole
(with the biases of all targets, also of one that a budget gives rank 0) is the fine-tune's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lowrank_probe import running_models as running
from lowrank_probe.allocation import Allotment
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.distances import Distance, Measure
from lowrank_probe.extraction_work import Work
from lowrank_probe.model_weights import put_back, stored_matrix, view_of
from lowrank_probe.options import Progress
from lowrank_probe.running_models import Kind
from lowrank_probe.targets import Selection, Target

Allotted = Mapping[str, Mapping[str, Allotment]]
# The fine-tune's outputs of one part that are held; where there are more rows, every second, third, … is compared.
HELD_BYTES: Final = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """Factors to try, of the weighting of `work` (None: the plain SVD). allotted: adapter → target → its rank."""

    work: Work
    allotted: Allotted

    @property
    def ridge(self) -> float:
        """λ; ∞ for the plain SVD."""
        return self.work.weighting.ridge if self.work.weighting else math.inf

    @property
    def sides(self) -> str:
        """What it is weighted by."""
        if self.work.weighting is None:
            return "plain SVD"
        return "inputs and gradients" if self.work.weighting.two_sided else "inputs"


@dataclass(frozen=True)
class Compared:
    """distances: (adapter, number of the candidate) → part → mean KL in nats a row, or ‖Q − P‖_F/‖P‖_F of states.

    base: the same without any adapter. stays: names of what stays the fine-tune's in all of them.
    """

    measure: Measure
    distances: dict[tuple[str, int], dict[str, float]]
    base: dict[str, float]
    stays: list[str]

    def best(self, label: str) -> int:
        """The candidate with the least distance on the part "choice"; the first of equals."""
        tried = {number: told["choice"] for (adapter, number), told in self.distances.items() if adapter == label}
        return min(tried, key=tried.__getitem__)


def compare(
    tuned: Path, kind: Kind, parts: Mapping[str, Sequence[Tensor]], base: Checkpoint, selection: Selection,
    candidates: Sequence[Candidate], device: torch.device, progress: Progress | None = None,
) -> Compared:  # fmt: skip
    """The distances of all candidates on all parts. Raises `running_models.CannotRun`, `NumericsError`."""
    model, missing = running.load(tuned, kind, device)
    first = next(iter(parts.values()))[0]
    measure = find_measure(model, first, missing, kind, device)
    reference = {part: _Reference(model, sequences, measure, kind, device) for part, sequences in parts.items()}
    works = {target.name: target for candidate in candidates for target in candidate.work.targets}
    with torch.no_grad():
        stays = put_back(model, selection, base, device)
        for target in works.values():
            _write(model, target, base, None, device)
        without = {part: one.distance(model) for part, one in reference.items()}
        todo = [(label, number, one) for number, one in enumerate(candidates) for label in one.allotted]
        distances = {}
        for done, (label, number, one) in enumerate(todo):
            if progress:
                progress(f"KL, {one.sides}, ridge {one.ridge:g}", done, len(todo))
            ranks = {name: allotment.rank for name, allotment in one.allotted[label].items()}
            for target in one.work.targets:
                factors = one.work.cut(ranks, target) if ranks.get(target.name) else None
                _write(model, target, base, factors, device)
            distances[label, number] = {part: other.distance(model) for part, other in reference.items()}
    del model
    running.free(device)
    return Compared(measure, distances, without, stays)


def find_measure(model: Any, ids: Tensor, missing: Sequence[str], kind: Kind, device: torch.device) -> Measure:
    """As `running_models.find_measure`, and hidden states where the head has one output, which is no distribution."""
    measure = running.find_measure(model, ids, missing, kind, device)
    if measure == "logits" and running.outputs(model, ids, measure, kind, device).shape[1] < 2:
        return "hidden states"
    return measure


def _write(
    model: Any, target: Target, base: Checkpoint, factors: tuple[Tensor, Tensor] | None, device: torch.device
) -> None:
    """W_base + BA into every copy of a target; without factors, W_base."""
    for copy in range(target.copies):
        W = stored_matrix(target, copy, base, device)
        if factors is not None:
            B, A = (factor[copy].to(device).float() for factor in factors)
            W = torch.addmm(W, B, A)
        view_of(model, target, copy).copy_(W)


class _Reference:
    """The fine-tune's outputs on one part, on the host, and the distance of another state of the model to them."""

    def __init__(
        self, model: Any, sequences: Sequence[Tensor], measure: Measure, kind: Kind, device: torch.device
    ) -> None:
        self.sequences, self.measure, self.kind, self.device = sequences, measure, kind, device
        self.every = 1
        rows = running.outputs(model, sequences[0], measure, kind, device)
        a_row = 4 * rows.shape[1]
        n_rows = len(rows) / len(sequences[0]) * sum(map(len, sequences))
        self.every = max(1, math.ceil(n_rows * a_row / HELD_BYTES))
        self.held = [rows.cpu() for rows in self._rows(model)]

    def distance(self, model: Any) -> float:
        """Mean KL(reference ‖ model) in nats a row, or the relative error of hidden states."""
        found = Distance(self.measure)
        for P, Q in zip(self.held, self._rows(model), strict=True):
            found.add(P.to(self.device), Q)
        return found.figures()["kl_nats" if self.measure == "logits" else "relative_error"]

    def _rows(self, model: Any) -> Iterator[Tensor]:
        seen = 0
        for ids in self.sequences:
            rows = running.outputs(model, ids, self.measure, self.kind, self.device)
            yield rows[-seen % self.every :: self.every]
            seen += len(rows)
