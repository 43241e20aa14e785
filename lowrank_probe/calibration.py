"""Activation-aware extraction: factors that are best on the inputs a text gives, where that is better on other text.

A text is parted in three by document. On the first the fine-tune runs, and the second moments of every matrix's inputs
and output gradients are kept (`moments`). All matrices are factorised weighted by them (`weighting`), in several ways:
inputs alone, or inputs and gradients, at a few ridges λ. The KL of base + adapter from the fine-tune on the second part
decides: the plain SVD stays unless a weighting's gain over it is beyond chance (a paired bootstrap over documents), and
of those the one with the least KL is taken. All KL, with the intervals of their differences, are reported on the third
part, which decided nothing (`ridge_choice`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from lowrank_probe import running_models as running
from lowrank_probe.allocation import Allotment
from lowrank_probe.calibration_text import PARTS, CalibrationText, read_calibration
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.errors import ProbeError
from lowrank_probe.extraction_jobs import Piece
from lowrank_probe.extraction_work import Work
from lowrank_probe.moments import LEAST_RIDGE, LIMIT_BYTES, SEEN, Moments, collect
from lowrank_probe.options import Progress
from lowrank_probe.ridge_choice import Candidate, Compared, compare, find_measure
from lowrank_probe.running_models import CannotRun, Kind
from lowrank_probe.targets import Selection
from lowrank_probe.weighting import Weighting

# (two-sided, λ), λ in units of tr C/n and tr G/m, one for all matrices. Below the least ones little changes, and at 100
# the adapter is nearly the plain one: at rank 1 that may be all there is to gain.
WAYS: Final = ((False, 0.1), (False, 1.0), (False, 10.0), (True, 0.01), (True, 1.0), (True, 10.0), (True, 100.0))
Ranks = dict[str, dict[str, Allotment]]


@dataclass(frozen=True)
class Calibration:
    """file: of text (`texts.read_texts`). ways: (two-sided, λ) to try beside the plain SVD.

    limit_bytes: of the moments in memory at once.
    """

    file: str | Path
    ways: tuple[tuple[bool, float], ...] = WAYS
    limit_bytes: int = LIMIT_BYTES

    def __post_init__(self) -> None:
        if not self.ways or not all(LEAST_RIDGE <= ridge < math.inf for _, ridge in self.ways):
            raise ProbeError(
                f"ways {self.ways}: expected (two-sided, ridge), with finite ridges of at least {LEAST_RIDGE:g}"
            )


@dataclass(frozen=True)
class Calibrator:
    """A calibration that has been found possible, before any work: the text is read, the model is known.

    Raises (in `open`) `ProbeError` where there is too little text, or no model or tokenizer that transformers loads.
    """

    calibration: Calibration
    base: Checkpoint
    tuned: Checkpoint
    kind: Kind
    text: CalibrationText
    device: torch.device

    @classmethod
    def open(cls, calibration: Calibration, base: Checkpoint, tuned: Checkpoint, device: torch.device) -> "Calibrator":
        try:
            kind = running.find_kind(tuned.local_path, tuned.local_path)
        except CannotRun as reason:
            raise _cannot(reason) from None
        file, directories = Path(calibration.file), (tuned.local_path, base.local_path)
        text = read_calibration(file, directories, kind.vocabulary, kind.max_tokens)
        return cls(calibration, base, tuned, kind, text, device)

    def run(
        self, work: Work, selection: Selection, allotted: Ranks, dtype: torch.dtype,
        ranks: Callable[[Work], Ranks] | None, progress: Progress | None,
    ) -> tuple[dict[str, Work], Ranks, dict[str, Any]]:  # fmt: skip
        """(adapter → the work whose factors it takes, adapter → its ranks, facts).

        work, allotted: of the plain SVD. ranks: chooses them anew by the weighted energies; None: they stay.
        """
        try:
            with running.quiet():
                moments = self._moments(work, progress)
                candidates = [Candidate(work, allotted)]
                for weighting in self._weightings(work, moments):
                    one = replace(work, weighting=weighting)
                    candidates.append(Candidate(one, ranks(one) if ranks else allotted))
                    if ranks is None:
                        one.factors(_largest(allotted), dtype, progress)
                found = compare(
                    self.tuned.local_path, self.kind, self.text, self.base, selection, candidates, self.device, progress
                )
        except CannotRun as reason:
            raise _cannot(reason) from None
        chosen = {label: candidates[found.best(label)] for label in allotted}
        return (
            {label: one.work for label, one in chosen.items()},
            {label: dict(one.allotted[label]) for label, one in chosen.items()},
            self._facts(found, candidates, work, moments),
        )

    def _weightings(self, work: Work, moments: Moments) -> list[Weighting]:
        n_tokens = self.text.n_tokens("moments")
        gradients = [moments.mean_gradient(piece) for piece in work.pieces() if moments.n_tokens(piece)]
        mean = sum(gradients) / max(1, len(gradients))
        return [Weighting(moments, ridge, two_sided, n_tokens, mean) for two_sided, ridge in self.calibration.ways]

    def _moments(self, work: Work, progress: Progress | None) -> Moments:
        moments = Moments(work.store, self.text.word)
        pieces = [piece for piece in work.pieces() if work.changed(piece)]
        if not all(moments.has(piece) for piece in pieces if piece.target.kind in SEEN):
            self._collect(pieces, moments, progress)
            running.free(self.device)
        return moments.to_read() if work.cluster else moments

    def _collect(self, pieces: Sequence[Piece], moments: Moments, progress: Progress | None) -> None:
        model, missing = running.load(self.tuned.local_path, self.kind, self.device)
        sequences = self.text.sequences["moments"]
        measure = find_measure(model, sequences[0], missing, self.kind, self.device)

        def loss(number: int, ids: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(number)
            return running.sampled_loss(model, ids, measure, self.device, generator)

        collect(model, loss, sequences, pieces, moments, self.calibration.limit_bytes, progress)

    def _facts(self, found: Compared, candidates: Sequence[Candidate], work: Work, moments: Moments) -> dict[str, Any]:
        pieces = [piece for piece in work.pieces() if work.changed(piece)]
        unseen = sorted(
            {piece.target.name for piece in pieces} - {p.target.name for p in pieces if moments.n_tokens(p)}
        )
        return {
            "file": str(self.calibration.file),
            "n_documents": {part: self.text.n_documents(part) for part in PARTS},
            "n_tokens": {part: self.text.n_tokens(part) for part in PARTS},
            "measure": "KL(tuned ‖ base + adapter), nats a row" if found.measure == "logits" else
            "‖difference‖/‖tuned‖ of last hidden states",
            "base": found.base,
            "tried": [
                {"adapter": label, "weighted_by": candidates[number].sides, "ridge": str(candidates[number].ridge),
                 **_distances(found, label, number), "chosen": found.best(label) == number}
                for label, number in found.sums
            ],
            "plain": unseen,
            "stays_tuned": found.stays,
        }  # fmt: skip


def _distances(found: Compared, label: str, number: int) -> dict[str, float]:
    """On each part the distance, and the ends of the 95 % interval of its difference to the plain SVD's."""
    told: dict[str, float] = {}
    for part in PARTS[1:]:
        low, high = found.against_plain(label, number, part)
        told |= {part: found.distance(label, number, part), f"{part}_low": low, f"{part}_high": high}
    return told


def _largest(allotted: Ranks) -> dict[str, int]:
    """target → its largest rank in any adapter."""
    names = {name for one in allotted.values() for name in one}
    return {name: max(one[name].rank for one in allotted.values() if name in one) for name in names}


def _cannot(reason: CannotRun) -> ProbeError:
    return ProbeError(f"--calibration runs the fine-tune, which transformers cannot: {reason}; leave it out")
