"""The jobs of an extraction: the spectrum of one piece, or its factors; what its matrix takes, and where.

Legend: m out, n in, r rank, k = min(m, n). A piece is one copy of a target: one matrix ΔW (m, n).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_probe.checkpoints import Checkpoint, all_on_disk
from lowrank_probe.deltas import PART_ENTRIES, READ_ENTRIES, Delta, streams
from lowrank_probe.device_jobs import Card, Host, Memory
from lowrank_probe.factorisation import factorise
from lowrank_probe.float64 import SPILLED_ENTRIES
from lowrank_probe.footprints import Footprint, Room, grams
from lowrank_probe.rows import Settings, analyse
from lowrank_probe.svd import full_spectrum
from lowrank_probe.targets import Target
from lowrank_probe.weighting import Weighting


@dataclass(frozen=True)
class Piece:
    """One matrix of work: a copy of a target."""

    target: Target
    copy: int

    @property
    def name(self) -> str:
        """Of its target."""
        return self.target.name

    def key(self, what: str) -> str:
        """Where it is kept: by name, so that what is finished holds for other --exclude and --targets too."""
        return f"{what}-{hashlib.sha256(self.target.name.encode()).hexdigest()[:16]}-{self.copy:03d}"


def pieces_of(target: Target) -> list[Piece]:
    """One for each copy."""
    return [Piece(target, copy) for copy in range(target.copies)]


# What a job found for a piece: tensors and facts to keep.
Found = tuple[Piece, dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What is done for one piece, here or on another node. keep_sides: the stored values are needed, too."""

    base: Checkpoint
    tuned: Checkpoint
    device: torch.device
    keep_sides: bool
    room: Room

    @property
    def forks(self) -> bool:
        """Whether forked processes can do it."""
        return all_on_disk(self.base, self.tuned)

    def on(self, device: torch.device) -> "Job":
        """The same on another device."""
        return replace(self, device=device)

    def card(self) -> Card[Piece, Delta | None, "Found"]:
        """What `run_jobs` runs on its device."""
        return self.load, self.placed, self.device

    def memory(self, pieces: Sequence[Piece], limit: float) -> Memory:
        """What pieces take there; limit: of all that is held on a GPU at once."""
        held = Memory(limit, self.loading, self.waiting, self.computing)
        return self.room.bound(self.device, pieces, held, self.on_disk, lambda piece: piece.name)

    def host(self, pieces: Sequence[Piece]) -> Host[Piece, Delta | None, "Found"]:
        """What the CPU does of these, all of the run, beside cards."""
        here = self.on(torch.device("cpu"))

        def takes(piece: Piece) -> bool:
            return self.room.takes(piece.target.shape, self.most(piece))

        taken = [piece for piece in pieces if takes(piece)]
        every = [math.prod(piece.target.shape) for piece in taken]
        return Host(takes, here.load, here.placed, here.memory(taken, math.inf), every, self.forks)

    def load(self, piece: Piece) -> Delta | None:
        """ΔW; None where it is 0."""
        with self.room.place(self.device, lambda: self.most(piece)):
            return self.read(piece)

    def placed(self, piece: Piece, delta: Delta | None) -> "Found":
        """`compute`, on the disk where there is no room."""
        with self.room.place(self.device, lambda: self.most(piece)):
            return self.compute(piece, delta)

    def read(self, piece: Piece) -> Delta | None:
        return piece.target.delta(piece.copy, self.base, self.tuned, self.device, sides=self.keep_sides)

    def compute(self, piece: Piece, delta: Delta | None) -> Found:
        raise NotImplementedError

    # Bytes. s: of an entry of ΔW, float64 where a side is stored in float32 or wider; both sides take as much.

    def loading(self, piece: Piece) -> float:
        """ΔW, both sides where they are not read run by run, and a part of each upcast, for differences and norms."""
        size, s = math.prod(piece.target.shape), self._itemsize(piece)
        pairs = piece.target.pieces[piece.copy]
        # What is put together of several pieces lies there twice for a moment.
        run_by_run = not self.keep_sides and len(pairs) == 1 and streams(pairs[0], self.base, self.tuned)
        return s * ((size + 6 * min(size, READ_ENTRIES)) if run_by_run else (2 * size + 6 * min(size, PART_ENTRIES)))

    def waiting(self, piece: Piece) -> float:
        """ΔW, and both sides where they are kept."""
        return self._itemsize(piece) * math.prod(piece.target.shape) * (2 if self.keep_sides else 1)

    def computing(self, piece: Piece) -> float:
        """ΔW, its float64 Gram matrix, and what the eigen-solver or a proof needs beside it."""
        return self.waiting(piece) + grams(3, piece.target.shape)

    def most(self, piece: Piece) -> float:
        """From its reading to its end."""
        return max(self.loading(piece), self.computing(piece))

    def on_disk(self, piece: Piece) -> float:
        """What is in memory of one whose ΔW lies on disk: all but what is as large as that."""
        return self.computing(piece) - self.waiting(piece) - self.single(piece) + 16.0 * SPILLED_ENTRIES

    def single(self, piece: Piece) -> float:
        """ΔW in float32 beside one in float64, where that is made."""
        return 0.0

    def _weighted_bytes(self, piece: Piece) -> float:
        """KᵀΔWL and its roots K (m, m), of a table (m,), L (n, n), all float64."""
        m, n = piece.target.shape
        return 8.0 * (m * n + (m if piece.target.kind == "embedding" else m * m) + n * n)

    def _itemsize(self, piece: Piece) -> int:
        names = [(self.base, pair.name) for pair in piece.target.pieces[piece.copy]]
        names += [(self.tuned, pair.tuned_name) for pair in piece.target.pieces[piece.copy]]
        return 8 if any(side.tensors[name].wide for side, name in names) else 4


@dataclass(frozen=True)
class SpectrumJob(Job):
    """The singular values of a piece, of KᵀΔWL with a weighting; where sides are kept, what storage did to it, too."""

    settings: Settings
    weighting: Weighting | None

    def computing(self, piece: Piece) -> float:
        if self.keep_sides:
            return self._footprint(piece).computing
        return super().computing(piece) + (self._weighted_bytes(piece) if self.weighting is not None else 0.0)

    def on_disk(self, piece: Piece) -> float:
        return self._footprint(piece).on_disk if self.keep_sides else super().on_disk(piece)

    def _footprint(self, piece: Piece) -> Footprint:
        return Footprint(piece.target.shape, self._itemsize(piece))

    def on(self, device: torch.device) -> "Job":
        settings = replace(self.settings, device=device).with_turns()
        return replace(self, device=device, settings=settings)

    def compute(self, piece: Piece, delta: Delta | None) -> Found:
        if delta is None:
            return piece, {}, {"fro_norm": 0.0}
        assert delta.dense is not None
        facts: dict[str, Any] = {"fro_norm": delta.fro_norm}
        tensors: dict[str, Tensor] = {}
        if self.keep_sides:
            found = analyse(delta, self.settings)
            values, denoised = found.values, found.denoised
            for name in ("signal_rank", "r90_denoised", "denoised_fro_norm", "decidable_r90"):
                facts[name] = found.row[name]
            if denoised is not None:
                tensors["denoised"] = torch.from_numpy(np.ascontiguousarray(denoised))
        elif self.weighting:
            roots = self.weighting.roots(piece, self.device)
            found_values = full_spectrum(roots.weighted(delta.dense) if roots else delta.dense).values
            values = found_values * math.sqrt(self.weighting.scale(piece, roots))
            facts["weighted_norm"] = float(np.linalg.norm(values))
        else:
            values = full_spectrum(delta.dense, delta.fro_norm).values
        return piece, tensors | {"values": torch.from_numpy(np.ascontiguousarray(values))}, facts


@dataclass(frozen=True)
class FactorsJob(Job):
    """The factors of a piece at its target's rank."""

    ranks: Mapping[str, int]
    dtype: torch.dtype
    seed: int
    weighting: Weighting | None

    def computing(self, piece: Piece) -> float:
        """The Gram matrix, the same again for the proof of its top part, and the space that is searched, several
        times."""
        k, r = min(piece.target.shape), min(self.ranks[piece.target.name], *piece.target.shape)
        # The space that is searched, on the short side; on the long one what of it is kept, several times.
        searched = 8.0 * 6 * (k * min(k, 3 * (r + 32)) + max(piece.target.shape) * min(k, r + 16))
        # All eigenvectors take more (`truncation`).
        whole = 0.0 if r <= k // 8 else 8.0 * 4 * k * k
        weighted = self._weighted_bytes(piece) if self.weighting is not None else 0.0
        return self.waiting(piece) + grams(2, piece.target.shape) + searched + whole + self.single(piece) + weighted

    def single(self, piece: Piece) -> float:
        return (self._itemsize(piece) - 4.0) * math.prod(piece.target.shape) if self.device.type == "cpu" else 0.0

    def compute(self, piece: Piece, delta: Delta | None) -> Found:
        if delta is None:
            return piece, {}, {"fro_norm": 0.0, "base_norm": None}
        assert delta.dense is not None
        rank = min(self.ranks[piece.target.name], *piece.target.shape)
        roots = self.weighting.roots(piece, self.device) if self.weighting else None
        found = factorise(delta.dense, delta.fro_norm, rank, self.dtype, piece.target.name, seed=self.seed, roots=roots)
        numbers = {name: torch.from_numpy(getattr(found, name)) for name in ("kept", "upper", "stored")}
        facts = {
            "fro_norm": delta.fro_norm, "base_norm": delta.base_norm, "method": found.method, "rank": found.A.shape[0],
        }  # fmt: skip
        if found.weighted is not None:
            numbers["weighted"] = torch.from_numpy(found.weighted)
            facts["weighted_norm"] = found.weighted_norm
        # B by columns, so that a smaller rank is the first rows of both.
        return piece, {"Bt": found.B.T.contiguous(), "A": found.A, **numbers}, facts
