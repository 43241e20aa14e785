"""KL(tuned ‖ base + adapter) of every candidate adapter on two parts of a text: one to choose by, one to report.

A weighting is taken in place of the plain SVD only where its gain on the first part is beyond chance: the 95 % interval
of the difference is below 0, by a paired bootstrap over documents (`functional_ranks`; sequences of one document are
not independent). Of those that pass, the one with the least distance. Each of the ways passes by chance alone in 2.5 %
of all texts; they resemble one another, so that together it is less than the sum.

One model is in memory. It is the fine-tune, given the base's values of all that no adapter carries; then each candidate
writes W_base + BA into its targets. So a new head or grown table is there on both sides, and what is carried whole
(with the biases of all targets, also of one that a budget gives rank 0) is the fine-tune's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import running_models as running
from lowrank_probe.allocation import Allotment
from lowrank_probe.calibration_text import PARTS, CalibrationText
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.distances import Distance, Measure
from lowrank_probe.extraction_work import Work
from lowrank_probe.functional_ranks import draws, interval, means, resampled
from lowrank_probe.model_weights import put_back, stored_matrix, view_of
from lowrank_probe.options import Progress
from lowrank_probe.running_models import Kind
from lowrank_probe.targets import Selection, Target

Array = NDArray[np.float64]
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
    """What was found; the candidate of number 0 is the plain SVD.

    sums: (adapter, number of the candidate) → part → (documents,) Σ KL in nats, or Σ‖Q − P‖² of states; weights: part →
    (documents,) rows, or Σ‖P‖². base: the distances without any adapter. stays: names of what stays the fine-tune's in
    all of them.
    """

    measure: Measure
    sums: dict[tuple[str, int], dict[str, Array]]
    weights: dict[str, Array]
    base: dict[str, float]
    stays: list[str]

    def distance(self, label: str, number: int, part: str) -> float:
        """Mean KL in nats a row, or ‖Q − P‖_F/‖P‖_F of states."""
        return float(_distance(self.measure, means(self.sums[label, number][part], self.weights[part])))

    def against_plain(self, label: str, number: int, part: str) -> tuple[float, float]:
        """The 95 % interval of the difference to the plain SVD's distance; below 0 is better than it."""
        pair = np.stack([self.sums[label, number][part], self.sums[label, 0][part]])
        weights = self.weights[part]
        this, plain = _distance(self.measure, resampled(pair, weights, draws(len(weights), 0)))
        low, high = interval(this - plain)
        return float(low), float(high)

    def best(self, label: str) -> int:
        """Of the candidates whose gain on the part "choice" is beyond chance, that of the least distance; else 0."""
        tried = [number for adapter, number in self.sums if adapter == label]
        sure = [number for number in tried if self.against_plain(label, number, "choice")[1] < 0]
        return min(sure, key=lambda number: self.distance(label, number, "choice"), default=0)


def _distance(measure: Measure, square: Any) -> Any:
    """The distance of a mean: itself for KL, its root for hidden states."""
    return square if measure == "logits" else np.sqrt(square)


def compare(
    tuned: Path, kind: Kind, text: CalibrationText, base: Checkpoint, selection: Selection,
    candidates: Sequence[Candidate], device: torch.device, progress: Progress | None = None,
) -> Compared:  # fmt: skip
    """The distances of all candidates on the parts that are not the moments', document by document.

    Raises `running_models.CannotRun`, `NumericsError`.
    """
    model, missing = running.load(tuned, kind, device)
    measure = find_measure(model, text.sequences["choice"][0], missing, kind, device)
    reference = {
        part: _Reference(model, text.sequences[part], text.documents[part], measure, kind, device) for part in PARTS[1:]
    }
    works = {target.name: target for candidate in candidates for target in candidate.work.targets}
    with torch.no_grad():
        stays = put_back(model, selection, base, device)
        for target in works.values():
            _write(model, target, base, None, device)
        found = {part: one.compared(model) for part, one in reference.items()}
        weights = {part: one[1] for part, one in found.items()}
        without = {part: float(_distance(measure, means(*one))) for part, one in found.items()}
        todo = [(label, number, one) for number, one in enumerate(candidates) for label in one.allotted]
        sums = {}
        for done, (label, number, one) in enumerate(todo):
            if progress:
                progress(f"KL, {one.sides}, ridge {one.ridge:g}", done, len(todo))
            ranks = {name: allotment.rank for name, allotment in one.allotted[label].items()}
            for target in one.work.targets:
                factors = one.work.cut(ranks, target) if ranks.get(target.name) else None
                _write(model, target, base, factors, device)
            sums[label, number] = {part: other.compared(model)[0] for part, other in reference.items()}
    del model
    running.free(device)
    return Compared(measure, sums, weights, without, stays)


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
    """The fine-tune's outputs on one part, on the host, and how far another state of the model is from them."""

    def __init__(
        self, model: Any, sequences: Sequence[Tensor], documents: Sequence[int], measure: Measure, kind: Kind,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.sequences, self.measure, self.kind, self.device = sequences, measure, kind, device
        self.documents = np.unique(np.asarray(documents), return_inverse=True)[1]
        self.every = 1
        rows = running.outputs(model, sequences[0], measure, kind, device)
        a_row = 4 * rows.shape[1]
        n_rows = len(rows) / len(sequences[0]) * sum(map(len, sequences))
        self.every = max(1, math.ceil(n_rows * a_row / HELD_BYTES))
        self.held = [rows.cpu() for rows in self._rows(model)]

    def compared(self, model: Any) -> tuple[Array, Array]:
        """(documents,) each: Σ KL(reference ‖ model) and rows, or of hidden states Σ‖Q − P‖² and Σ‖P‖²."""
        found = np.zeros((2, self.documents.max() + 1))
        for document, P, Q in zip(self.documents, self.held, self._rows(model), strict=True):
            one = Distance(self.measure)
            one.add(P.to(self.device), Q)
            told = (one.kl, one.n_tokens) if self.measure == "logits" else (one.squares, one.reference_squares)
            found[:, document] += told
        return found[0], found[1]

    def _rows(self, model: Any) -> Iterator[Tensor]:
        seen = 0
        for ids in self.sequences:
            rows = running.outputs(model, ids, self.measure, self.kind, self.device)
            yield rows[-seen % self.every :: self.every]
            seen += len(rows)
