"""The work of an extraction: spectra where ranks depend on them, then factors, and the norms of what is left out.

Legend: m out, n in, r rank, k = min(m, n). A piece is one copy of a target: one matrix ΔW (m, n).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from lowrank_probe.allocation import Unit
from lowrank_probe.checkpoints import Checkpoint, all_on_disk
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.device_jobs import Memory
from lowrank_probe.devices import Choice
from lowrank_probe.errors import NumericsError
from lowrank_probe.extraction_jobs import FactorsJob, Job, Piece, SpectrumJob, pieces_of
from lowrank_probe.footprints import Room, find_room
from lowrank_probe.matching import Pair
from lowrank_probe.metrics import Values
from lowrank_probe.options import Options, Progress
from lowrank_probe.rows import Settings
from lowrank_probe.scheduling import interruptible, run_jobs
from lowrank_probe.targets import Target, difference_norm
from lowrank_probe.unfinished import Unfinished
from lowrank_probe.weighting import Weighting

Left = tuple[Pair | None, dict[str, Any]]
# Bytes that are held on a GPU at once, in multiples of the largest matrix in float32; what cuBLAS and cuSOLVER keep for
# each stream comes on top.
IN_FLIGHT: Final = 4.75


@dataclass(frozen=True)
class Work:
    """What every job needs. Everything a job finds goes to `store` at once.

    weighting: KᵀΔWL is what is approximated, and whose singular values ranks are chosen by. cluster: jobs are Ray's.
    others: further cards of the same kind.
    """

    base: Checkpoint
    tuned: Checkpoint
    targets: Sequence[Target]
    store: Unfinished
    device: torch.device
    options: Options
    noise: bool = False
    weighting: Weighting | None = None
    cluster: bool = False
    others: Sequence[torch.device] = ()

    @property
    def room(self) -> Room:
        """What its matrices may take."""
        choice = Choice(self.device, cluster=self.cluster, others=tuple(self.others))
        return find_room(self.options.memory, self.options.gpu_memory, choice, self.store.folder)

    @property
    def spectrum(self) -> str:
        """What spectra are kept as."""
        return "noise" if self.noise else self._weighted("spectrum")

    @property
    def factored(self) -> str:
        """What factors are kept as."""
        return self._weighted("factors")

    def _weighted(self, what: str) -> str:
        return f"{what}-{self.weighting.word}" if self.weighting else what

    def pieces(self) -> Iterator[Piece]:
        return (piece for target in self.targets for piece in pieces_of(target))

    def spectra(self, progress: Progress | None) -> None:
        """The singular values of every piece; `noise`: also what storage did to it, and the values without that."""
        settings = Settings(self.device, self.options)
        settings = settings if self.cluster else settings.with_turns()
        job = SpectrumJob(self.base, self.tuned, self.device, self.noise, self.room, settings, self.weighting)
        self._run(self.spectrum, None, job, progress)

    def factors(self, ranks: Mapping[str, int], dtype: torch.dtype, progress: Progress | None) -> None:
        """The factors of every piece at its target's rank (0: none)."""
        job = FactorsJob(
            self.base, self.tuned, self.device, False, self.room, dict(ranks), dtype, self.options.seed, self.weighting
        )
        self._run(self.factored, ranks, job, progress)

    def norms(self, left_out: Sequence[Left]) -> dict[tuple[str, str], float]:
        """(name, tuned name) → ‖ΔW‖_F of what no adapter carries; NaN where it cannot be told (NaN or Inf in it)."""
        cpu, room = torch.device("cpu"), self.room

        def load(one: Left) -> float:
            pair, line = one
            try:
                if pair is None:  # the base has none of that shape, or none at all
                    return difference_norm(self.base, line["name"], self.tuned, line["tuned_name"])
                with room.place(cpu, lambda: held(one)):
                    found = read_pair(pair, self.base, self.tuned, cpu, sides=False)
            except NumericsError:
                return math.nan
            return found.fro_norm if isinstance(found, Delta) else float(found["fro_norm"])

        def size(one: Left) -> int:
            return math.prod(self.tuned.tensors[one[1]["tuned_name"]].shape)

        def named(one: Left, norm: float) -> tuple[tuple[str, str], float]:
            return (one[1]["name"], one[1]["tuned_name"]), norm

        def held(one: Left) -> float:
            return 8.0 * size(one)

        memory = Memory(room.host, held, held, held)
        forks = all_on_disk(self.base, self.tuned)
        with closing(run_jobs(list(left_out), size, load, named, cpu, memory, forks=forks)) as jobs:
            return dict(jobs)

    def moved(self, target: Target) -> bool:
        """Whether a target has factors, in one of its copies."""
        return any(self.held(piece) for piece in pieces_of(target))

    def changed(self, piece: Piece) -> bool:
        """Whether its ΔW is not 0; once its spectrum or factors are there, whatever rank it got."""
        keys = [key for what in (self.spectrum, self.factored) if self.store.has(key := piece.key(what))]
        return any(self.store.facts(key)["fro_norm"] > 0 for key in keys)

    def cut(self, ranks: Mapping[str, int], target: Target) -> tuple[Tensor, Tensor]:
        """(B (E, m, r), A (E, r, n)) of a target at its rank, as stored; zeros where a copy did not move."""
        r, factors = ranks[target.name], []
        for piece in pieces_of(target):
            key = piece.key(self.factored)
            if self.held(piece):
                factors.append((self.store.get(key, "Bt", 0, r).T, self.store.get(key, "A", 0, r)))
            else:
                factors.append((torch.zeros(target.shape[0], r), torch.zeros(r, target.shape[1])))
        return torch.stack([B for B, _ in factors]), torch.stack([A for _, A in factors])

    def held(self, piece: Piece) -> bool:
        """Whether it has factors."""
        key = piece.key(self.factored)
        return self.store.has(key) and "A" in self.store.names(key)

    def _has(self, piece: Piece, what: str, rank: int) -> bool:
        """Whether it is finished: a spectrum, or factors of at least this rank (of any, where it did not move)."""
        key = piece.key(what)
        if not self.store.has(key):
            return False
        return what == self.spectrum or self.store.facts(key).get("rank", rank) >= rank

    def _run(self, what: str, ranks: Mapping[str, int] | None, job: Job, progress: Progress | None) -> None:
        def size(piece: Piece) -> int:
            return math.prod(piece.target.shape)

        def rank(piece: Piece) -> int:
            return 1 if ranks is None else min(ranks[piece.target.name], *piece.target.shape)

        every = [piece for piece in self.pieces() if rank(piece) > 0]
        todo = [piece for piece in every if not self._has(piece, what, rank(piece))]
        total, done = sum(map(size, every)), sum(map(size, every)) - sum(map(size, todo))
        largest = max(math.prod(info.shape) for info in self.base.tensors.values())  # read for its norm at least
        memory = job.memory(todo, IN_FLIGHT * 4 * max(map(size, every), default=0))
        jobs = run_jobs(
            todo, size, *job.card(), memory, largest, [*map(size, every)], self.cluster,
            [job.on(other).card() for other in self.others], job.host(every), job.forks,
        )  # fmt: skip
        with interruptible() as asked_to_stop, closing(jobs):
            for piece, tensors, facts in jobs:
                self.store.put(piece.key(what), tensors, facts)
                done += size(piece)
                if progress:
                    progress(f"{what} {piece.target.name}", done, total)
                if asked_to_stop():
                    raise KeyboardInterrupt

    def unit(self, target: Target) -> Unit:
        """The `allocation.Unit` of a target, from its spectra (all values)."""
        keys = [piece.key(self.spectrum) for piece in pieces_of(target)]
        facts = [_known(self.store.facts(key)) for key in keys]
        k = min(target.shape)
        square = sum(fact.get("weighted_norm", fact["fro_norm"]) ** 2 for fact in facts)
        found: dict[str, Any] = {}
        if any("denoised_fro_norm" in fact for fact in facts):
            # Where there is no noise to take out, what is stored is the update.
            clean = [fact.get("denoised_fro_norm", fact["fro_norm"]) for fact in facts]
            found["denoised"] = _by_copy([self._values(key, k, "denoised") for key in keys])
            found["denoised_fro_norm"] = math.sqrt(sum(norm**2 for norm in clean))
        for rank, name in (("signal_rank", "signal_rank"), ("r90", "r90_denoised")):
            known = [fact[name] for fact in facts if name in fact]
            found[rank] = float(max(known)) if known else math.nan
        return Unit(
            target.name, target.shape, _by_copy([self._values(key, k, "values") for key in keys]), math.sqrt(square),
            copies=target.copies, **found,
        )  # fmt: skip

    def kept_unit(self, target: Target) -> Unit:
        """The same where only the values up to the rank of the factors are known."""
        keys = [piece.key(self.factored) for piece in pieces_of(target)]
        square = sum(self.store.facts(key)["fro_norm"] ** 2 for key in keys)
        kept = [self.store.get(key, "kept").numpy() if "kept" in self.store.names(key) else None for key in keys]
        # Copies that were finished when a larger rank was asked for have more.
        r = min((len(one) for one in kept if one is not None), default=0)
        s = [np.zeros(r) if one is None else np.sqrt(np.maximum(np.diff(one[:r], prepend=0.0), 0.0)) for one in kept]
        s = [np.minimum.accumulate(one) for one in s]  # differences of sums are a rounding off
        whole = r == min(target.shape)
        return Unit(target.name, target.shape, _by_copy(s), math.sqrt(square), copies=target.copies, whole=whole)

    def _values(self, key: str, k: int, name: str) -> Values:
        """(k,) singular values kept under a key; zeros for a copy that did not move."""
        held = self.store.names(key)
        if not held:
            return np.zeros(k)
        values = self.store.get(key, name if name in held else "values").numpy()
        return np.pad(values, (0, k - len(values)))


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without those that are NaN."""
    return {name: value for name, value in facts.items() if value == value}


def _by_copy(values: Sequence[Values]) -> Values:
    return values[0] if len(values) == 1 else np.stack(values)
