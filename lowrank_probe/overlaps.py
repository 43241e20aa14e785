"""How the updates of several adapters overlap, matrix by matrix: shared directions φ, cosine, conflicting signs.

Legend: m out, n in; ΔW = scaling·B·A of one adapter, U, V its singular directions (svd.factored_triplets).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_probe import metrics, svd
from lowrank_probe.changes import Change
from lowrank_probe.float64 import CHUNK_ENTRIES
from lowrank_probe.layers import place
from lowrank_probe.subspaces import random_directions, random_similarity, similarity


@dataclass(frozen=True)
class _Update:
    """w·ΔW of one adapter on one matrix: B (m, r) with weight and scaling in it, A (r, n), directions of its rank."""

    number: int
    B: Tensor
    A: Tensor
    U: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[1]


def overlap_rows(
    changes: Mapping[str, Sequence[Change]], factors: Callable[[Change], tuple[Tensor, Tensor]], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows as `columns.OVERLAP`: every matrix that LoRA factors of several adapters change, for every two of them."""
    for name, members in changes.items():
        matrices: dict[str, list[Change]] = {}
        for change in members:
            if change.kind == "lora":
                key = f"{name}[{change.part.label}]" if change.part.label else name
                matrices.setdefault(key, []).append(change)
        for key, on_matrix in matrices.items():
            if len({change.number for change in on_matrix}) > 1:
                updates = [update for change in on_matrix if (update := _update(change, factors)).rank]
                where = place(name)
                common = {"name": key, "layer_type": where.layer_type, "layer": where.layer}
                for a, b in itertools.combinations(updates, 2):
                    yield common | _row(a, b, f"{seed} {key}")


def _update(change: Change, factors: Callable[[Change], tuple[Tensor, Tensor]]) -> _Update:
    assert change.module is not None
    B, A = change.module.of(*factors(change))
    B = B.double() * (change.weight * change.module.scaling)
    found = svd.factored_triplets(B, A, 1.0, change.module.rank)
    s = found.s.numpy()
    r = int(metrics.numerical_rank(s, change.module.shape))
    return _Update(change.number, B, A.double(), found.U[:, :r], found.Vh[:r].T)


def _row(a: _Update, b: _Update, key: str) -> dict[str, Any]:
    m, n = len(a.U), len(a.V)
    at = (a.rank - 1, b.rank - 1)
    drawn = {
        (side, one.number): random_directions(rows, one.rank, f"{key} {one.number} {side}")
        for side, rows in (("U", m), ("V", n))
        for one in (a, b)
    }
    inner = float(((a.B.T @ b.B) * (a.A @ b.A.T)).sum())
    norms = [math.sqrt(float(((one.B.T @ one.B) * (one.A @ one.A.T)).sum())) for one in (a, b)]
    return {
        "adapter_a": a.number + 1, "adapter_b": b.number + 1, "rank_a": a.rank, "rank_b": b.rank,
        "phi_left": similarity(a.U, b.U)[at], "phi_right": similarity(a.V, b.V)[at],
        "phi_random_left": random_similarity(a.rank, b.rank, m),
        "phi_random_right": random_similarity(a.rank, b.rank, n),
        "control_left": similarity(drawn["U", a.number], drawn["U", b.number])[at],
        "control_right": similarity(drawn["V", a.number], drawn["V", b.number])[at],
        "cosine": inner / math.prod(norms), "sign_conflict": _sign_conflict(a, b),
    }  # fmt: skip


def _sign_conflict(a: _Update, b: _Update) -> float:
    """Share of the entries that both change at which the two have opposite signs; a few rows at a time."""
    both = opposite = 0
    A_a, A_b = a.A.float(), b.A.float()
    rows = max(1, CHUNK_ENTRIES // A_a.shape[1])
    for B_a, B_b in zip(torch.split(a.B.float(), rows), torch.split(b.B.float(), rows), strict=True):
        x, y = torch.sign(B_a @ A_a), torch.sign(B_b @ A_b)
        product = x * y
        both += int(torch.count_nonzero(product))
        opposite += int((product < 0).sum())
    return opposite / both if both else math.nan
