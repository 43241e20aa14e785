"""The jobs of `spectra`: a pair is read, then analysed; what its matrix takes, and where there is room for that.

Legend: m out, n in; ΔW (m, n).
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from lowrank_probe.checkpoints import Checkpoint, all_on_disk
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.device_jobs import Card, Host, Memory
from lowrank_probe.footprints import Footprint, Room
from lowrank_probe.ledger import ledger_line
from lowrank_probe.matching import Pair
from lowrank_probe.metrics import Values
from lowrank_probe.rows import Settings, analyse


@dataclass(frozen=True)
class Done:
    """One finished pair: its ledger line and, where it was a matrix that changed, its row and singular values.

    times: (phase, start, stop) of reading and computing it, in seconds since the work began.
    """

    pair: Pair
    line: dict[str, Any]
    row: dict[str, Any] | None = None
    values: Values | None = None
    denoised: Values | None = None
    times: Sequence[tuple[str, float, float]] = ()


@dataclass(frozen=True)
class _Loaded:
    """What reading a pair gave (a `Delta`, or its ledger line), and when, in seconds since the work began."""

    delta: Delta | dict[str, Any]
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Job:
    """What is done for one pair, here or on another node. started: `time.time` at which the work began."""

    base: Checkpoint | None
    tuned: Checkpoint
    tied: Mapping[str, str]
    settings: Settings
    started: float
    room: Room

    def on(self, device: torch.device) -> "Job":
        """The same on another device."""
        return replace(self, settings=replace(self.settings, device=device).with_turns())

    @property
    def forks(self) -> bool:
        """Whether forked processes can do it."""
        return all_on_disk(self.base, self.tuned)

    def footprint(self, pair: Pair) -> Footprint:
        """What its matrix takes."""
        stored = [
            side.tensors[name]
            for side, name in ((self.base, pair.name), (self.tuned, pair.tuned_name))
            if side is not None and name in side.tensors
        ]
        s = 8 if any(info.wide for info in stored) else 4
        if pair.lora is not None:
            return Footprint(pair.lora.shape, s, factored=True)
        lies = stored[0].shape
        shape = pair.part.shape(lies) if len(lies) > 1 else (math.prod(lies), 1)
        return Footprint(shape, s, any(info.quantized for info in stored), self.settings.options.exact_tail)

    def card(self) -> Card[Pair, _Loaded, Done]:
        """What `run_jobs` runs on its device."""
        return self.load, self.compute, self.settings.device

    def memory(self, pairs: Sequence[Pair]) -> Memory:
        """What pairs take there."""
        held = Memory(
            math.inf, lambda pair: self.footprint(pair).loading, lambda pair: self.footprint(pair).waiting,
            lambda pair: self.footprint(pair).computing,
        )  # fmt: skip
        return self.room.bound(
            self.settings.device, pairs, held, lambda pair: self.footprint(pair).on_disk, lambda pair: pair.key
        )

    def host(self, pairs: Sequence[Pair]) -> Host[Pair, _Loaded, Done]:
        """What the CPU does of these, all of the run, beside cards."""
        here = self.on(torch.device("cpu"))

        def takes(pair: Pair) -> bool:
            found = self.footprint(pair)
            return self.room.takes(found.shape, found.most)

        taken = [pair for pair in pairs if takes(pair)]
        every = [pair.entries(self.base, self.tuned) for pair in taken]
        return Host(takes, here.load, here.compute, here.memory(taken), every, self.forks)

    def _place(self, pair: Pair) -> AbstractContextManager[None]:
        return self.room.place(self.settings.device, lambda: self.footprint(pair).most)

    def load(self, pair: Pair) -> _Loaded:
        clock = time.time() - self.started
        if pair.key in self.tied:
            line = ledger_line(pair, "tied", f"the same tensor as {self.tied[pair.key]} on both sides")
            return _Loaded(line, clock, clock)
        with self._place(pair):
            delta = read_pair(pair, self.base, self.tuned, self.settings.device)
        return _Loaded(delta, clock, time.time() - self.started)

    def compute(self, pair: Pair, loaded: _Loaded) -> Done:
        delta = loaded.delta
        times = [("read", loaded.start_s, loaded.stop_s)]
        if not isinstance(delta, Delta):
            return Done(pair, delta, times=times)
        with self._place(pair):
            found = analyse(delta, self.settings)
        times += [(phase, start - self.started, stop - self.started) for phase, start, stop in found.times]
        row = found.row | {"seconds": sum(stop - start for _, start, stop in times)}
        note = f"both factors, with {pair.lora.name_B}" if pair.lora is not None else ""
        line = ledger_line(pair, "analysed", note, delta.fro_norm, delta.relative_update)
        return Done(pair, line, row, found.values, found.denoised, times)
