"""The ledger of an extraction: what each adapter carries of every matrix, how near to the optimum, and what it leaves.

Every number is of the factors as they are stored; squares are summed over the copies of a target.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_probe.allocation import Allotment
from lowrank_probe.columns import CURVES
from lowrank_probe.extraction_jobs import Piece, pieces_of
from lowrank_probe.extraction_work import Work
from lowrank_probe.factorisation import relative
from lowrank_probe.full_spectra import eigenvalue_error
from lowrank_probe.targets import Selection, Target
from lowrank_probe.unfinished import Unfinished


def ledger_lines(
    works: Mapping[str, Work], selections: Mapping[str, Selection], allotted: Mapping[str, Mapping[str, Allotment]],
    norms: Mapping[str, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """One line an adapter and unit (`columns.EXTRACTION`), with what each adapter carries whole or leaves out.

    works: adapter → whose factors it takes. selections: adapter → what it carries. norms: ‖ΔW‖_F of what goes whole.
    """
    left_out = {(line["name"], line["tuned_name"]): (pair, line) for one in selections.values()
                for pair, line in one.left_out if math.isnan(line["fro_norm"])}  # fmt: skip
    left = next(iter(works.values())).norms(list(left_out.values()))
    lines = []
    for label, allotments in allotted.items():
        work = works[label]
        lines += [{"adapter": label} | _target_line(work, one, allotments[one.name]) for one in work.targets]
        lines += [{"adapter": label} | line for line in _others(work, selections[label], norms, left)]
    total = sum(line["fro_norm"] ** 2 for line in lines if line["fro_norm"] > 0) / max(1, len(allotted))
    for line in lines:
        line["share"] = line["fro_norm"] ** 2 / total if total > 0 else math.nan
    return lines


def curves(work: Work) -> list[dict[str, Any]]:
    """Energy against rank of every target (`columns.CURVES`), at all ranks to 16 and a few a doubling beyond."""
    rows = []
    for target in work.targets:
        keys = [piece.key(work.factored) for piece in pieces_of(target)]
        held = [key for key in keys if work.store.has(key) and "stored" in work.store.names(key)]
        if not held:
            continue
        square = sum(work.store.facts(key)["fro_norm"] ** 2 for key in held)
        every = [[work.store.get(key, name).numpy() for key in held] for name in ("stored", "upper")]
        r = min(len(one) for one in every[0])
        stored, upper = (np.sum([one[:r] for one in ones], axis=0) for ones in every)
        place = {name: value for name, value in _place(target).items() if name in CURVES}
        rows += [
            place | {
                "rank": rank, "fro_norm": math.sqrt(square), "energy": 1 - stored[rank - 1] / square,
                "energy_upper": min(1.0, upper[rank - 1] / square),
            }
            for rank in _points(len(stored))
        ]  # fmt: skip
    return rows


def _points(most: int) -> list[int]:
    beyond = {round(16 * 2 ** (step / 4)) for step in range(1, 60)}
    return sorted({rank for rank in {*range(1, 17), *beyond, most} if rank <= most})


def _target_line(work: Work, target: Target, allotment: Allotment) -> dict[str, Any]:
    rank = allotment.rank
    square, base_square, stored, best = 0.0, 0.0, 0.0, [0.0, 0.0]
    weighted = _Weighted()
    methods = set()
    for piece in pieces_of(target):
        # A matrix that got no rank has its spectrum only, and one that did not move nothing of its own weighting.
        kept_as = (work.factored, work.spectrum, "factors", "spectrum", "noise")
        what = next(name for name in kept_as if work.store.has(piece.key(name)))
        facts = work.store.facts(piece.key(what))
        norm = facts["fro_norm"]
        square += norm**2
        base = facts.get("base_norm")
        base_square += math.nan if base is None and norm > 0 else (base or 0.0) ** 2
        if what != work.factored or not norm > 0 or rank == 0:
            stored += norm**2
            continue
        at = min(rank, *target.shape) - 1
        stored += _entry(work.store, piece.key(what), "stored", at)
        for i, square_kept in enumerate(_optimum(work.store, piece, at)):
            best[i] += square_kept
        methods.add(facts["method"])
        if "weighted_norm" in facts:
            weighted.add(work.store, piece.key(what), facts["weighted_norm"], at)
    norm = math.sqrt(square)
    known = square > 0 and rank > 0
    return _place(target) | {
        "status": "adapted" if known else "unchanged" if not square > 0 else "rank 0",
        "rank": rank if known else 0, "rule": allotment.rule, "parameters": allotment.parameters if known else 0,
        "fro_norm": norm, "relative_update": norm / math.sqrt(base_square) if base_square > 0 else math.nan,
        "energy": 1 - stored / square if known else 0.0 if square > 0 else math.nan,
        "relative_error": relative(stored, norm),
        "optimal_error_low": relative(square - best[1], norm) if known else math.nan,
        "optimal_error_high": relative(square - best[0], norm) if known else math.nan,
        **weighted.columns(), "method": "+".join(sorted(methods)),
        "note": "; ".join(filter(None, ["holds unmerged only" if target.tied else "", _plain_copies(work, target)])),
    }  # fmt: skip


def _plain_copies(work: Work, target: Target) -> str:
    """What to say of experts that the calibration text says nothing of."""
    if work.weighting is None:
        return ""
    unmet = [piece.copy for piece in pieces_of(target) if work.changed(piece) and work.weighting.is_unmet(piece)]
    if not unmet:
        return ""
    which = f"expert {unmet[0]}" if len(unmet) == 1 else f"{len(unmet)} of {target.copies} experts"
    return f"plain SVD for {which}: no token of the calibration text was routed there"


def _optimum(store: Unfinished, piece: Piece, at: int) -> tuple[float, float]:
    """(what rank at + 1 of the plain SVD keeps of ‖ΔW‖_F², what no matrix of that rank keeps more than).

    It is the optimum whatever was minimised. Of the plain factors; where a budget by weighted energies gave a higher
    rank than they have, of the spectrum that all budgets begin with, and its certified error.
    """
    kept, upper = (_entry(store, piece.key("factors"), name, at) for name in ("kept", "upper"))
    if not math.isnan(kept):
        return kept, upper
    squares = store.get(piece.key("spectrum"), "values").numpy()[: at + 1] ** 2
    error = len(squares) * eigenvalue_error(float(squares[0]), piece.target.shape)
    return float(squares.sum()) - error, float(squares.sum()) + error


def _entry(store: Unfinished, key: str, name: str, at: int) -> float:
    """One number of a piece's factors at a rank; NaN where there are none, or of a lower rank only."""
    if not store.has(key) or name not in store.names(key):
        return math.nan
    values = store.get(key, name)
    return float(values[at]) if at < len(values) else math.nan


@dataclass
class _Weighted:
    """Sums over copies of what was minimised with a calibration text: ‖Kᵀ(ΔW − BA)L‖_F²."""

    square: float = 0.0
    stored: float = 0.0
    upper: float = 0.0

    def add(self, store: Unfinished, key: str, norm: float, at: int) -> None:
        self.square += norm**2
        self.stored += _entry(store, key, "weighted", at)
        self.upper += _entry(store, key, "upper", at)

    def columns(self) -> dict[str, float]:
        norm = math.sqrt(self.square)
        return {
            "weighted_error": relative(self.stored, norm),
            "weighted_optimal_error": relative(self.square - self.upper, norm),
        }


def _place(target: Target) -> dict[str, Any]:
    return {
        "name": target.name, "kind": target.kind, "layer_type": target.place.layer_type, "layer": target.place.layer,
        "stack": target.place.stack, "rows": target.shape[0], "cols": target.shape[1], "copies": target.copies,
    }  # fmt: skip


def _others(
    work: Work, selection: Selection, norms: Mapping[str, float], left: Mapping[tuple[str, str], float]
) -> Iterator[dict[str, Any]]:
    """What is carried whole, what is not carried, and what could not be: no rank, energy 1 or 0."""
    nothing = {"copies": 1, "rank": 0, "rule": "", "method": "", "stack": "", "kind": "", "parameters": 0}
    for whole in selection.whole:
        parameters = sum(math.prod(work.tuned.tensors[name].shape) for name in whole.tensors.values())
        yield nothing | {
            "name": whole.name, "status": "carried whole", "parameters": parameters, "fro_norm": norms[whole.name],
            "energy": 1.0, "relative_error": 0.0, "note": whole.why,
        }  # fmt: skip
    chosen = {pair.key for target in work.targets for pairs in target.pieces for pair in pairs}
    for pair, line in selection.left_out:
        if pair is not None and pair.key in chosen:
            continue  # a target without a rank, which has a line of its own
        norm = left.get((line["name"], line["tuned_name"]), line["fro_norm"])
        status = "unchanged" if norm == 0 or line["status"] == "unchanged" else "not carried"
        yield nothing | _named(line) | {
            "status": status, "fro_norm": norm, "energy": 0.0 if norm > 0 else math.nan,
            "relative_error": 1.0 if norm > 0 else math.nan,
            "note": line["note"] + ("; NaN or Inf in it" if math.isnan(norm) else ""),
        }  # fmt: skip
    for line in selection.matching.ledger:  # only in the base, no weight, …
        yield nothing | _named(line) | {"status": line["status"], "fro_norm": math.nan, "note": line["note"]}


def _named(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": line["name"] or line["tuned_name"], "layer_type": line["layer_type"], "layer": line["layer"]}
