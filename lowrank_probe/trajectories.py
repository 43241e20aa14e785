"""`trajectory()`: one base, several fine-tunes (checkpoints of one training, or siblings) → how their updates compare.

Each step is a `Result` of `spectrum`; beside them stand the similarity of the steps' singular subspaces and the
amplification of each step, columns as `subspaces.SIMILARITY` and `subspaces.AMPLIFICATION`.

A trajectory's directory holds one run directory a step, trajectory.csv, similarity.parquet and .csv, amplification.csv,
report.html and, written last, trajectory.json. While it is unfinished, trajectory.json says so.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
import torch
from torch import Tensor

from lowrank_probe import runs, spectra, svd
from lowrank_probe.checkpoints import WEIGHT_SUFFIXES, Checkpoint, open_checkpoint
from lowrank_probe.deltas import Delta, Pair, match, read_pair, read_part
from lowrank_probe.devices import choose_device
from lowrank_probe.errors import OutputError, ProbeError
from lowrank_probe.facts import machine_facts, side_facts
from lowrank_probe.layers import is_conv1d, sort_key
from lowrank_probe.outputs import made, write_directory
from lowrank_probe.runs import SCHEMA_VERSION, Result, plain
from lowrank_probe.scheduling import interruptible, run_jobs
from lowrank_probe.spectra import Interrupted, Progress
from lowrank_probe.subspaces import (
    AMPLIFICATION,
    SIMILARITY,
    Directions,
    amplification_rows,
    dimensions,
    directions,
    similarity_rows,
)

FACTS: Final = "trajectory.json"
# Names in a trajectory's directory that no step's directory may have.
_TAKEN: Final = {FACTS, "trajectory.csv", "similarity.parquet", "similarity.csv", "amplification.csv", "report.html"}


@dataclass(frozen=True)
class Trajectory:
    """The answer of `trajectory`.

    results: label → what `spectrum(base, step)` gives, in the order of the steps. similarity: one row a matrix, pair of
    steps and (i, j), columns as `subspaces.SIMILARITY`. amplification: one row a matrix, step and r, columns as
    `subspaces.AMPLIFICATION`. facts: base, steps, rank, the matrix of the whole grid, options, versions.
    """

    results: dict[str, Result]
    similarity: pd.DataFrame
    amplification: pd.DataFrame
    facts: dict[str, Any]

    @property
    def table(self) -> pd.DataFrame:
        """One row a step and layer type: `step`, then the columns of `Result.summary`."""
        parts = [result.summary.assign(step=label) for label, result in self.results.items()]
        table = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
        return table[["step", *(column for column in table.columns if column != "step")]]

    @property
    def similarity_by_type(self) -> pd.DataFrame:
        """Medians of `similarity` over the matrices of a layer type, i = j; `trusted` becomes the share that is."""
        part = self.similarity[self.similarity["i"] == self.similarity["j"]].drop(columns=["name", "layer"])
        return _medians(part, ["step_a", "step_b", "i", "j"])

    @property
    def shown_dimension(self) -> int:
        """The i at which φ(i, i) is shown first: the largest up to 8 that half of the pairs can be trusted at."""
        part = self.similarity[(self.similarity["i"] == self.similarity["j"]) & (self.similarity["i"] <= 8)]
        share = part.groupby("i")["trusted"].mean()
        trusted = share.index[share >= 0.5]
        return int(max(trusted if len(trusted) else share.index, default=1))

    @property
    def amplification_by_type(self) -> pd.DataFrame:
        """Medians of `amplification` over the matrices of a layer type; `trusted` becomes the share that is."""
        return _medians(self.amplification.drop(columns=["name", "layer"]), ["step", "r"])

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        from lowrank_probe.trajectory_figures import all_figures

        return all_figures(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the trajectory's directory, trajectory.json last; returns its path. Raises `OutputError`.

        A step's run directory that holds this very result already (see `save_step`) is left as it is.
        """
        from lowrank_probe.trajectory_figures import render

        root = Path(directory)
        for label, result in self.results.items():
            with _naming(label):
                if not _holds(root / label, result):
                    save_step(root, label, result)
        files: dict[str, Callable[[Path], Any]] = {
            "trajectory.csv": lambda p: self.table.to_csv(p, index=False),
            "similarity.parquet": lambda p: self.similarity.to_parquet(p, index=False),
            "similarity.csv": lambda p: self.similarity.to_csv(p, index=False),
            "amplification.csv": lambda p: self.amplification.to_csv(p, index=False),
            "report.html": lambda p: p.write_text(render(self), encoding="utf-8"),
            FACTS: lambda p: p.write_text(_json(self.facts), encoding="utf-8"),
        }
        return write_directory(root, files)

    def to_json(self) -> str:
        """One JSON object: facts, the table, and similarity and amplification by layer type; NaN and ∞ are null."""
        payload = {
            "schema_version": SCHEMA_VERSION,
            "facts": self.facts,
            "table": self.table.to_dict("records"),
            "similarity": self.similarity_by_type.to_dict("records"),
            "amplification": self.amplification_by_type.to_dict("records"),
        }
        return json.dumps(plain(payload), ensure_ascii=False)


def trajectory(
    base: str | os.PathLike[str],
    steps: Sequence[str | os.PathLike[str]],
    *,
    labels: Sequence[str] | None = None,
    rank: int = 16,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: tuple[int, int] | None = None,
    split: bool = True,
    top: int | None = None,
    exact_tail: bool = False,
    base_rounded: bool = False,
    device: str = "auto",
    seed: int = 0,
    resume: Mapping[str, Result] | None = None,
    on_step: Callable[[str, Result], Any] | None = None,
    on_progress: Progress | None = None,
) -> Trajectory:
    """Spectra of several fine-tunes of one base, φ(i, j) between their updates, and their amplification.

    steps: checkpoints or PEFT adapters, in the order given. labels: their names, by default from their directories.
    rank: directions kept of each ΔW, (m, rank) and (rank, n); φ and amplification at 1, 2, 4, … rank. The other options
    are those of `spectrum`. resume: label → a finished or interrupted result of that step (`unfinished_steps`).
    on_step: called with (label, result) as each step is finished, and with what is there at Ctrl-C (`save_step`).

    One matrix at a time: all steps' directions of it are kept, never two steps' matrices. Every file is read twice.
    Raises what `spectrum` raises, naming the step; on Ctrl-C `Interrupted` or, after the last spectrum,
    KeyboardInterrupt.
    """
    paths = dict(zip(step_labels(steps) if labels is None else _checked(labels, steps), steps, strict=True))
    if rank < 1:
        raise ProbeError(f"rank {rank}: expected at least 1 direction")
    choice = choose_device(device)
    options: dict[str, Any] = {
        "include": include, "exclude": exclude, "layers": layers, "split": split, "top": top, "exact_tail": exact_tail,
        "base_rounded": base_rounded, "seed": seed,
    }  # fmt: skip
    base_side = open_checkpoint(base)
    opened: dict[str, tuple[Checkpoint, dict[str, Pair]]] = {}
    for label, path in paths.items():  # every header before any work
        with _naming(label):
            side = open_checkpoint(path)
            matching = match(base_side, side, include=include, exclude=exclude, layers=layers, split=split)
            opened[label] = side, {pair.key: pair for pair in matching.pairs}
    results: dict[str, Result] = {}
    for number, (label, path) in enumerate(paths.items(), 1):
        earlier = (resume or {}).get(label)
        with _naming(label):
            told = _told(on_progress, f"{number}/{len(paths)} {label}")
            try:
                found = spectra.spectrum(base, path, **options, device=device, resume=earlier, on_progress=told)
            except Interrupted as stopped:
                if on_step:
                    on_step(label, stopped.result)
                raise
            if earlier is not None and earlier.facts["status"] == "complete":
                found = earlier  # `spectrum` has checked that it is of the same files and options
            elif on_step:
                on_step(label, found)
        results[label] = found
    facts: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "status": "complete", "base": side_facts(base_side),
        "steps": [{"label": label, "path": os.path.abspath(path)} for label, path in paths.items()],
        "rank": rank, "grid_matrix": _grid_matrix(results), "options": options, **machine_facts(choice),
    }  # fmt: skip
    compare = _Comparison(base_side, opened, results, rank, facts["grid_matrix"], choice.device, seed)
    similarity, amplification = compare.run(_told(on_progress, "subspaces"))
    return Trajectory(results, similarity, amplification, facts)


@dataclass(frozen=True)
class _Comparison:
    """The second pass: directions of every step's ΔW, a matrix at a time."""

    base: Checkpoint
    steps: Mapping[str, tuple[Checkpoint, Mapping[str, Pair]]]
    results: Mapping[str, Result]
    rank: int
    grid_matrix: str | None
    device: torch.device
    seed: int

    def run(self, on_progress: Progress | None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(similarity, amplification), in the order of the tables."""
        names = list(dict.fromkeys(name for result in self.results.values() for name in result.table["name"]))
        pairs = {key: pair for _, of_step in self.steps.values() for key, pair in of_step.items()}
        sizes = {name: math.prod(self._shape(pairs[name])) for name in names}
        rows: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
        done = 0
        jobs = run_jobs(names, sizes.__getitem__, partial(self._base_matrix, pairs), self._matrix, self.device)
        with interruptible() as asked_to_stop, closing(jobs):
            for name, found in jobs:
                rows[name] = found
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

    def _base_matrix(self, pairs: Mapping[str, Pair], name: str) -> Tensor:
        pair = pairs[name]
        if pair.lora is None:
            return read_part(self.base, pair.name, pair.part, self.device)
        W = self.base.read(pair.name, self.device)
        return W.T if is_conv1d(pair.name, self.base.config.get("model_type")) else W

    def _matrix(self, name: str, W: Tensor) -> tuple[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
        dims, whole_grid = dimensions(self.rank), name == self.grid_matrix
        base_values = svd.top_triplets(W, self.rank).s.cpu().numpy()
        found: dict[str, Directions] = {}
        for label, (side, pairs) in self.steps.items():
            row = self.results[label].table.set_index("name", drop=False)
            if name not in row.index:
                continue  # this step left the matrix alone, or does not have it
            with _naming(label):
                delta = read_pair(pairs[name], self.base, side, self.device)
                assert isinstance(delta, Delta)
                certified = self.results[label].singular_values[name]
                key = f"{self.seed} {name} {label}"
                found[label] = directions(delta, W, self.rank, row.loc[name].to_dict(), certified, key)
                place = {"name": name, "layer_type": delta.place.layer_type, "layer": delta.place.layer,
                         "stack": delta.place.stack}  # fmt: skip
        return name, (
            similarity_rows(place, found, dims, whole_grid), amplification_rows(place, found, base_values, dims)
        )  # fmt: skip


def step_labels(steps: Sequence[str | os.PathLike[str]]) -> list[str]:
    """A name for each step from its directory (or file), with as many parents as tell it from the others.

    >>> step_labels(["a/checkpoint-100", "a/checkpoint-200/", "b/checkpoint-100"])
    ['a-checkpoint-100', 'checkpoint-200', 'b-checkpoint-100']
    """
    parts = []
    for step in steps:
        path = Path(step).absolute()
        if path.suffix in WEIGHT_SUFFIXES:
            path = path.parent if path.stem in ("model", "adapter_model", "pytorch_model") else path.with_suffix("")
        parts.append([word for p in path.parts if (word := re.sub(r"[^\w.-]+", "-", p).strip("-."))] or ["step"])
    depth = [1] * len(parts)

    def named() -> list[str]:
        return ["-".join(words[-n:]) for words, n in zip(parts, depth, strict=True)]

    while True:
        names = [name.lower() for name in named()]
        unclear = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(parts[i])]
        if not unclear:
            break
        for i in unclear:
            depth[i] += 1
    unique: list[str] = []
    for name in named():
        number, label = 1, name if name.lower() not in _TAKEN else f"{name}-step"
        while label.lower() in {other.lower() for other in unique}:
            number += 1
            label = f"{name}-{number}"
        unique.append(label)
    return unique


def save_step(root: Path, label: str, result: Result) -> None:
    """Save one step's run directory in a trajectory's, which is marked as unfinished until `Trajectory.save`."""
    first = not (root / FACTS).exists()
    with made(root):
        if first:
            text = _json({"schema_version": SCHEMA_VERSION, "status": "interrupted"})
            write_directory(root, {FACTS: lambda p: p.write_text(text, encoding="utf-8")})
        try:
            result.save(root / label)
        except BaseException:
            if first:
                (root / FACTS).unlink(missing_ok=True)
            raise


def unfinished_steps(directory: str | os.PathLike[str], labels: Sequence[str]) -> dict[str, Result]:
    """label → the finished or interrupted result kept in a trajectory's directory; empty where that is free.

    Raises `OutputError` where the directory holds a finished trajectory or anything else.
    """
    root = Path(directory)
    if not (root / FACTS).exists():
        if runs.unfinished(root) is not None:
            raise OutputError(f"{root}: holds the unfinished run of one step; choose another --out")
        return {}
    try:
        facts = json.loads((root / FACTS).read_text(encoding="utf-8"))
        complete = facts["status"] == "complete"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{root / FACTS}: cannot be read ({error}); choose another --out") from None
    if complete:
        raise OutputError(f"{root}: already holds a finished trajectory; choose another --out or remove it")
    return {label: runs.load(root / label) for label in labels if (root / label / "facts.json").exists()}


@contextmanager
def _naming(label: str) -> Iterator[None]:
    """Name the step in every error within."""
    try:
        yield
    except Interrupted:
        raise
    except ProbeError as error:
        if str(error).startswith("step "):
            raise
        raise type(error)(f"step {label}: {error}") from None


def _told(on_progress: Progress | None, prefix: str) -> Progress | None:
    return on_progress and (lambda name, done, total: on_progress(f"{prefix}: {name}", done, total))


def _checked(labels: Sequence[str], steps: Sequence[Any]) -> list[str]:
    if len(labels) != len(steps):
        raise ProbeError(f"{len(labels)} labels for {len(steps)} steps (expected one each)")
    for label in labels:
        if not re.fullmatch(r"[\w-][\w .+=-]*", label) or label.lower() in _TAKEN:
            raise ProbeError(f"label {label!r}: expected a name that a directory can have")
    if len({label.lower() for label in labels}) < len(labels):
        raise ProbeError(f"labels must differ, found {', '.join(labels)}")
    return list(labels)


def _grid_matrix(results: Mapping[str, Result]) -> str | None:
    """The matrix whose whole grid φ(i, j) is kept: of those that most steps changed, inside the blocks if there are
    any, the one with the largest relative update in the last step."""
    tables = pd.concat([result.table for result in results.values()])
    if tables.empty:
        return None
    tables = tables[tables["layer"].notna()] if tables["layer"].notna().any() else tables
    counts = tables["name"].value_counts()
    tables = tables[tables["name"].isin(counts.index[counts == counts.max()])]
    last = tables.drop_duplicates("name", keep="last").sort_values("relative_update", ascending=False, kind="stable")
    return str(last["name"].iloc[0])


def _medians(part: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    both = {"encoder", "decoder"} <= set(part["stack"])
    names = (part["stack"] + " " + part["layer_type"]).str.strip() if both else part["layer_type"]
    order = {name: (kind, name) for name, kind in zip(names, part["layer_type"].map(sort_key), strict=True)}
    grouped = part.assign(layer_type=names).drop(columns="stack").groupby(["layer_type", *keys], sort=False)
    table = grouped[[c for c in part.columns if c not in (*keys, "layer_type", "stack", "trusted")]].median()
    table = table.assign(trusted=grouped["trusted"].mean(), n_matrices=grouped.size()).reset_index()
    return table.sort_values("layer_type", key=lambda c: c.map(order), kind="stable", ignore_index=True)


def _holds(directory: Path, result: Result) -> bool:
    """Whether a run directory is of this very result."""
    try:
        facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        return bool(facts == plain(result.facts) | {"files": facts["files"]})
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(plain(facts), indent=2, ensure_ascii=False) + "\n"
