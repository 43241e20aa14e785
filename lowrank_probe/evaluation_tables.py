"""Scores of all states → the tables of an `Evaluation`: losses with their intervals, functional ranks. No torch.

Legend: n sequences; every figure is Σ over sequences / Σ weights, so that each token counts the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe import functional_ranks as functional
from lowrank_probe.columns import EVALUATION, FUNCTIONAL
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.functional_ranks import Tolerance

if TYPE_CHECKING:
    from lowrank_probe.evaluation_states import Group
    from lowrank_probe.scoring import Score, Scorer
    from lowrank_probe.swapping import Piece

_INTEGERS: Final = ("rank", "n_matrices", "parameters", "functional_rank", "low", "high", "largest_rank")


def make_evaluation(
    groups: Sequence["Group"], at: Mapping[tuple[int, int], int], pieces: Sequence["Piece"], scorer: "Scorer",
    scores: Mapping[str, "Score"], tolerance: Tolerance, facts: Mapping[str, Any],
) -> Evaluation:  # fmt: skip
    """The evaluation. at: (number of the group, rank) → number of its state, as `unique_states` numbers them."""
    keys: list[dict[str, Any]] = [
        {"group": "", "how": how, "rank": None, "full": how == "tuned", "n_matrices": 0, "parameters": None}
        for how in ("base", "tuned")
    ]
    found = [scores["base"], scores["tuned"]]
    spans = []
    for number, group in enumerate(groups):
        spans.append(slice(len(keys), len(keys) + len(group.ranks)))
        for rank in group.ranks:
            keys.append({
                "group": group.name, "how": group.how, "rank": rank, "full": group.full and rank == group.ranks[-1],
                "n_matrices": len(group.pieces), "parameters": group.lora_parameters(rank, pieces),
            })  # fmt: skip
            found.append(scores[f"state-{at[number, rank]:05d}"])
    merit, kl = np.stack([one.merit for one in found]), np.stack([one.kl for one in found])
    weights, kl_weights = scorer.weights, scorer.kl_weights
    counts = functional.draws(len(weights), int(facts["options"]["seed"]))
    mean = functional.means(merit, weights)
    drawn = functional.resampled(merit, weights, counts)
    excess, excess_drawn = mean - mean[1], drawn - drawn[1]
    gain = float(mean[0] - mean[1])
    allowed, allowed_drawn, notes = _allowed(tolerance, gain, drawn[0] - drawn[1])
    has_kl = scorer.task.merit != "1 − cosine to tuned"
    unknown = np.full(len(mean), math.nan)
    columns: dict[str, Any] = {
        "loss": mean, "excess": excess, "kept_gain": (mean[0] - mean) / gain if gain > 0 else unknown,
        "perplexity": np.exp(np.minimum(mean, 700)) if scorer.task.has_loss else unknown,
        "kl_nats": functional.means(kl, kl_weights) if has_kl else unknown,
        "n_tokens": int(weights.sum()), "n_kl_tokens": int(kl_weights.sum()) if has_kl else 0,
    }  # fmt: skip
    columns["loss_low"], columns["loss_high"] = functional.interval(drawn)
    columns["excess_low"], columns["excess_high"] = functional.interval(excess_drawn)
    rows = []
    for group, span in zip(groups, spans, strict=True):
        told = functional.functional_rank(group.ranks, excess[span], allowed, excess_drawn[span], allowed_drawn)
        rows.append({
            "group": group.name, "how": group.how, "n_matrices": len(group.pieces), "functional_rank": told.rank,
            "low": told.low, "high": told.high, "largest_rank": group.ranks[-1],
            "parameters": None if told.rank is None else group.lora_parameters(told.rank, pieces),
            "tolerance_nats": allowed,
        })  # fmt: skip
    more = {"gain": gain, "tolerance": allowed, "n_tokens": int(weights.sum()), "n_kl_tokens": columns["n_kl_tokens"]}
    return Evaluation(
        _typed(pd.DataFrame(keys).assign(**columns), list(EVALUATION)), _typed(pd.DataFrame(rows), list(FUNCTIONAL)),
        _a_token(merit, weights), _a_token(kl, kl_weights), weights, kl_weights,
        {**facts, **more, "notes": [*facts["notes"], *notes]},
    )  # fmt: skip


def _allowed(
    tolerance: Tolerance, gain: float, gain_drawn: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64], list[str]]:
    """(by how much the loss may be worse, the same in every resample, notes)."""
    nats = tolerance.nats(gain)
    notes = tolerance.fallback(gain, "the tuned model")
    if tolerance.share is None or notes:
        return nats, np.full(len(gain_drawn), nats), notes
    # Of a resample in which tuned is the worse, no share can be taken: nothing may be lost there.
    return nats, tolerance.share * np.maximum(np.nan_to_num(gain_drawn), 0.0), []


def _a_token(sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(states, n) means of each sequence; 0 where nothing in it is judged."""
    return np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)


def _typed(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    kinds = {name: "Int64" for name in columns if name in _INTEGERS}
    return table[columns].astype(kinds)
