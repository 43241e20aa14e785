"""The second pass of `trajectory`: the directions of every step's ΔW, compared matrix by matrix.

Legend: m out, n in; W (m, n) the base's matrix.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe import svd
from lowrank_probe.checkpoints import Checkpoint, all_on_disk
from lowrank_probe.columns import AMPLIFICATION, SIMILARITY
from lowrank_probe.deltas import Delta, read_pair, read_part
from lowrank_probe.device_jobs import Card, Host, Memory
from lowrank_probe.footprints import Footprint, Room
from lowrank_probe.layers import is_conv1d
from lowrank_probe.matching import Pair
from lowrank_probe.options import Progress
from lowrank_probe.runs import Result
from lowrank_probe.scheduling import interruptible, run_jobs
from lowrank_probe.subspaces import Directions, amplification_rows, dimensions, directions, similarity_rows
from lowrank_probe.trajectory_runs import naming
from lowrank_probe.unfinished import Unfinished

# label → name of a matrix → its row of the table; (rows of similarity, of amplification).
Lines = Mapping[str, Mapping[str, dict[str, Any]]]
Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Comparison:
    """The second pass: directions of every step's ΔW, a matrix at a time.

    matched: label → key → pair. results: label → its spectra. rank: directions kept. grid_matrix: the one of which
    every φ(i, j) is kept.
    """

    base: Checkpoint
    sides: Mapping[str, Checkpoint]
    matched: Mapping[str, Mapping[str, Pair]]
    results: Mapping[str, Result]
    rank: int
    grid_matrix: str | None
    device: torch.device
    seed: int
    store: Unfinished | None
    room: Room

    def run(self, on_progress: Progress | None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(similarity, amplification), in the order of the tables."""
        names = list(dict.fromkeys(name for result in self.results.values() for name in result.table["name"]))
        pairs = {key: pair for of_step in self.matched.values() for key, pair in of_step.items()}
        lines = {label: _by_name(result.table) for label, result in self.results.items()}
        sizes = {name: math.prod(self._shape(pairs[name])) for name in names}
        # By what the rows depend on: which steps moved the matrix, and whether its whole grid is asked for.
        keys = {
            name: json.dumps([name, [x for x in lines if name in lines[x]], name == self.grid_matrix]) for name in names
        }
        rows: dict[str, Rows] = {}
        for name in names:
            if self.store is not None and self.store.has(keys[name]):
                kept = self.store.facts(keys[name])
                rows[name] = kept["similarity"], kept["amplification"]
        todo = [name for name in names if name not in rows]
        done = sum(sizes[name] for name in rows)
        jobs = run_jobs(
            todo, sizes.__getitem__, *self._card(pairs, lines), self._memory(pairs, todo),
            every=list(sizes.values()), host=self._host(pairs, lines, names), forks=self._forks,
        )  # fmt: skip
        with interruptible() as asked_to_stop, closing(jobs):
            for name, found in jobs:
                rows[name] = found
                if self.store is not None:
                    self.store.put(keys[name], {}, {"similarity": found[0], "amplification": found[1]})
                done += sizes[name]
                if on_progress:
                    on_progress(name, done, sum(sizes.values()))
                if asked_to_stop():
                    raise KeyboardInterrupt
        tables = []
        for number, columns in enumerate((SIMILARITY, AMPLIFICATION)):
            table = pd.DataFrame([row for name in names for row in rows[name][number]], columns=list(columns))
            table["layer"] = table["layer"].astype("Int64")
            tables.append(table.astype({"trusted": bool}))
        return tables[0], tables[1]

    def _shape(self, pair: Pair) -> tuple[int, int]:
        return pair.lora.shape if pair.lora is not None else pair.part.shape(self.base.tensors[pair.name].shape)

    def _card(
        self, pairs: Mapping[str, Pair], lines: Mapping[str, Mapping[str, dict[str, Any]]]
    ) -> Card[str, Any, Any]:
        return partial(self._base_matrix, pairs), partial(self._placed, pairs, lines), self.device

    def _host(self, pairs: Mapping[str, Pair], lines: Lines, names: Sequence[str]) -> Host[str, Any, Any]:
        here = replace(self, device=torch.device("cpu"))

        def takes(name: str) -> bool:
            found = self._footprint(pairs[name])
            return self.room.takes(found.shape, found.most)

        load, compute, _ = here._card(pairs, lines)
        taken = [name for name in names if takes(name)]
        every = [math.prod(self._shape(pairs[name])) for name in taken]
        return Host(takes, load, compute, here._memory(pairs, taken), every, self._forks)

    @property
    def _forks(self) -> bool:
        """Whether forked processes can do it."""
        return all_on_disk(self.base, *self.sides.values())

    def _footprint(self, pair: Pair) -> Footprint:
        stored = [side.tensors[pair.tuned_name] for side in self.sides.values() if pair.tuned_name in side.tensors]
        wide = any(info.wide for info in [self.base.tensors[pair.name], *stored])
        return Footprint(self._shape(pair), 8 if wide else 4)

    def _memory(self, pairs: Mapping[str, Pair], names: Sequence[str]) -> Memory:
        prints = {name: self._footprint(pairs[name]) for name in names}
        held = Memory(
            math.inf, lambda name: prints[name].loading, lambda name: prints[name].waiting,
            lambda name: prints[name].computing,
        )  # fmt: skip
        return self.room.bound(self.device, names, held, lambda name: prints[name].on_disk, lambda name: name)

    def _placed(self, pairs: Mapping[str, Pair], lines: Lines, name: str, W: Tensor) -> tuple[str, Rows]:
        with self.room.place(self.device, lambda: self._footprint(pairs[name]).most):
            return self._matrix(lines, name, W)

    def _base_matrix(self, pairs: Mapping[str, Pair], name: str) -> Tensor:
        pair = pairs[name]
        with self.room.place(self.device, lambda: self._footprint(pair).most):
            W = read_part(self.base, pair.name, pair.part, self.device)
        conv1d = pair.lora is not None and is_conv1d(pair.name, self.base.config.get("model_type"))
        return W.T if conv1d else W

    def _matrix(self, lines: Lines, name: str, W: Tensor) -> tuple[str, Rows]:
        dims, whole_grid = dimensions(self.rank), name == self.grid_matrix
        base_values = svd.top_triplets(W, self.rank).s.cpu().numpy()
        found: dict[str, Directions] = {}
        for label, side in self.sides.items():
            row = lines[label].get(name)
            if row is None:
                continue  # this step left the matrix alone, or does not have it
            with naming(label):
                delta = read_pair(self.matched[label][name], self.base, side, self.device, W)
                assert isinstance(delta, Delta)
                certified = self.results[label].singular_values[name]
                key = f"{self.seed} {name} {label}"
                found[label] = directions(delta, W, self.rank, row, certified, key)
                place = {"name": name, "layer_type": delta.place.layer_type, "layer": delta.place.layer,
                         "stack": delta.place.stack}  # fmt: skip
        return name, (
            similarity_rows(place, found, dims, whole_grid), amplification_rows(place, found, base_values, dims)
        )  # fmt: skip


def _by_name(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    return {str(row["name"]): dict(row) for row in table.to_dict("records")}
