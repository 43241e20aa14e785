"""Which states of a model are looked at: a layer type truncated alone, all together, all but one; at every rank.

Legend: r rank, k = min(m, n) of a matrix. A state truncates each of its matrices to min(r, k); all else is as tuned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from lowrank_probe.errors import MatchError, ProbeError
from lowrank_probe.layer_groups import in_group
from lowrank_probe.layers import sort_key
from lowrank_probe.swapping import Piece, State

How = Literal["alone", "all", "leave out"]
ALL: Final = "all"
FULL: Final = "full"
EACH: Final = "each"
# Each twice the one before, up to what the matrices have: half the break-even rank, above which an update is not low,
# lies among the larger ones.
RANKS: Final[tuple[int | str, ...]] = (0, *(2**i for i in range(16)), FULL)


@dataclass(frozen=True)
class Group:
    """A set of matrices at every rank of a grid. name: the layer type or target; of "leave out", the one left as tuned.

    pieces: numbers of the matrices that are truncated. ranks: ascending, no larger than the largest k among them.
    full: whether the last of them is that k.
    """

    name: str
    how: How
    pieces: tuple[int, ...]
    ranks: tuple[int, ...]
    full: bool

    def state(self, rank: int, pieces: Sequence[Piece]) -> State:
        """The state at one rank."""
        return {i: min(rank, pieces[i].k) for i in self.pieces}

    def lora_parameters(self, rank: int, pieces: Sequence[Piece]) -> int:
        """Σ r·(m + n), what LoRA of that rank on these matrices has."""
        return sum(pieces[i].lora_parameters(min(rank, pieces[i].k)) for i in self.pieces)


def parse_ranks(ranks: Sequence[int | str] | None) -> tuple[int | str, ...]:
    """The grid, ascending and without repetition, "full" last. Raises `ProbeError` for anything that is no rank."""
    if ranks is None:
        return RANKS
    if isinstance(ranks, str | int):
        ranks = [ranks]
    numbers = []
    for rank in ranks:
        if rank != FULL and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
            raise ProbeError(f'rank {rank!r}: expected whole numbers from 0 on, or "full"')
        numbers += [rank] if isinstance(rank, int) else []
    if not ranks:
        raise ProbeError("ranks: expected at least one")
    return (*sorted(set(numbers)), *([FULL] if FULL in ranks else []))


def make_groups(
    pieces: Sequence[Piece], ranks: Sequence[int | str], targets: Sequence[str] | None = None, leave_out: bool = True
) -> tuple[list[Group], list[str]]:
    """(the groups in the order in which data flows, notes). targets: None each layer type; else a group each.

    A target is `each` (every layer type for itself), a layer type, `attention`, `mlp`, `all-linear`, `everything`, a
    pattern as `layers.matches` takes it, or several of them parted by commas.
    Raises `MatchError` for one that picks nothing, listing the layer types that there are.
    """
    members = _members(pieces, targets)
    every = tuple(sorted({i for found in members.values() for i in found}))
    groups = [_group(name, "alone", found, pieces, ranks) for name, found in members.items()]
    groups.append(_group(ALL, "all", every, pieces, ranks))
    if leave_out:
        for name, found in members.items():
            rest = tuple(i for i in every if i not in set(found))
            groups += [_group(name, "leave out", rest, pieces, ranks)] if rest else []
    largest = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    cut = [
        f"{group.name} ({group.ranks[-1]})" for group in groups if group.how == "alone" and group.ranks[-1] < largest
    ]
    notes = (
        [f"ranks beyond the largest that a layer type's matrices can have are left out: {', '.join(cut)}"]
        if cut
        else []
    )
    return groups, notes


def _members(pieces: Sequence[Piece], targets: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """Group → numbers of its matrices."""
    kinds = {piece.label: piece.layer_type for piece in pieces}
    labels = sorted(kinds, key=lambda label: (sort_key(kinds[label]), label))
    if targets is None:
        return {label: tuple(i for i, piece in enumerate(pieces) if piece.label == label) for label in labels}
    if isinstance(targets, str) or not targets:
        raise MatchError(f'targets are a list, such as ["q", "v"] or ["attention", "mlp"], found {targets!r}')
    found: dict[str, tuple[int, ...]] = {}
    for target in dict.fromkeys(targets):
        if target == EACH:
            found = _members(pieces, None) | found
            continue
        found[target] = tuple(i for i, piece in enumerate(pieces) if _picks(target, piece))
        if not found[target]:
            raise MatchError(
                f"--targets {target}: matches no matrix that differs; there are the layer types {' '.join(labels)}, "
                "and attention, mlp, all-linear, everything"
            )
    return found


def _picks(target: str, piece: Piece) -> bool:
    return in_group(target, piece.label, piece.layer_type, piece.parameter, piece.part.expert is not None)


def _group(name: str, how: How, found: tuple[int, ...], pieces: Sequence[Piece], ranks: Sequence[int | str]) -> Group:
    largest = max(pieces[i].k for i in found)
    chosen = {rank for rank in ranks if isinstance(rank, int) and rank < largest}
    beyond = any(rank == FULL or (isinstance(rank, int) and rank >= largest) for rank in ranks)
    return Group(name, how, found, (*sorted(chosen), *([largest] if beyond else [])), beyond)


def unique_states(groups: Sequence[Group]) -> tuple[list[tuple[Group, int]], dict[tuple[int, int], int]]:
    """(the different states as (group, rank), (number of the group, rank) → number of its state).

    Two groups may hold the same matrices: a single type alone is all.
    """
    found: dict[tuple[tuple[int, ...], int], tuple[int, tuple[Group, int]]] = {}
    at = {}
    for number, group in enumerate(groups):
        for rank in group.ranks:
            at[number, rank] = found.setdefault((group.pieces, rank), (len(found), (group, rank)))[0]
    return [state for _, state in found.values()], at
