"""`Trajectory`: what several fine-tunes of one base have in common, in memory and as a directory; imports no torch.

A trajectory's directory holds one run directory a step, trajectory.csv, similarity and amplification (.parquet, .csv),
report.html and, written last, trajectory.json, which has the size and checksum of the files that `load` reads.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import pandas as pd

from lowrank_probe import runs, words
from lowrank_probe.columns import AMPLIFICATION, SIMILARITY, Column
from lowrank_probe.errors import ProbeError
from lowrank_probe.layers import labels, several_stacks, sort_key
from lowrank_probe.outputs import write_directory
from lowrank_probe.runs import Result
from lowrank_probe.strict_json import SCHEMA_VERSION, plain
from lowrank_probe.verdicts import summarise

FACTS: Final = "trajectory.json"
_READ: Final = ("similarity.parquet", "amplification.parquet")
# Names in a trajectory's directory that no step's directory may have.
TAKEN: Final = {
    FACTS, "trajectory.csv", "similarity.parquet", "similarity.csv", "amplification.parquet", "amplification.csv",
    "report.html",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Trajectory:
    """The answer of `trajectory`.

    results: label → what `spectrum(base, step)` gives, in the order of the steps. similarity: one row a matrix, pair of
    steps and (i, j), columns as `columns.SIMILARITY`. amplification: one row a matrix, step and r, columns as
    `columns.AMPLIFICATION`. facts: base, steps, rank, the matrix of the whole grid, options, versions.
    """

    results: dict[str, Result]
    similarity: pd.DataFrame
    amplification: pd.DataFrame
    facts: dict[str, Any]

    def __repr__(self) -> str:
        labels = list(self.results)
        shown = labels if len(labels) <= 6 else [*labels[:3], "…", *labels[-2:]]
        steps = words.count(len(labels), "step")
        return f"<Trajectory: {self.facts['base']['path']} → {steps}: {', '.join(shown)}>"

    def _repr_html_(self) -> str:
        found = [(label, result.facts.get("findings") or ()) for label, result in self.results.items()]
        said = [f"{label}: {finding['statement']}" for label, findings in found for finding in findings]
        return runs.notebook_html(said, self.table)

    @property
    def table(self) -> pd.DataFrame:
        """One row a step and layer type: `step`, then the columns of `Result.summary`."""
        parts = []
        for label, result in self.results.items():
            related = bool(result.facts.get("related", True))
            parts.append(summarise(result.table, related=related, apart=self._apart).assign(step=label))
        table = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
        return table[["step", *(column for column in table.columns if column != "step")]]

    @cached_property
    def _apart(self) -> bool:
        """Whether stacks are told: the same in every table, whichever stacks each step moved."""
        tables = [result.table for result in self.results.values()]
        return several_stacks(
            (s, t) for table in tables for s, t in zip(table["stack"], table["layer_type"], strict=True)
        )

    @property
    def similarity_by_type(self) -> pd.DataFrame:
        """Medians of `similarity` over the matrices of a layer type, i = j; `trusted` becomes the share that is."""
        part = self.similarity[self.similarity["i"] == self.similarity["j"]].drop(columns=["name", "layer"])
        return _medians(part, ["step_a", "step_b", "i", "j"], self._apart)

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
        return _medians(self.amplification.drop(columns=["name", "layer"]), ["step", "r"], self._apart)

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        from lowrank_probe.trajectory_figures import all_figures

        return all_figures(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the trajectory's directory, trajectory.json last; returns its path. Raises `OutputError`.

        A step's run directory that holds this very result already is left as it is.
        """
        from lowrank_probe.trajectory_reports import render

        root = Path(directory)
        for label, result in self.results.items():
            with naming(label):
                if not _holds(root / label, result):
                    result.save(root / label)
        files: dict[str, Callable[[Path], Any]] = {
            "trajectory.csv": lambda p: self.table.to_csv(p, index=False),
            "similarity.parquet": lambda p: self.similarity.to_parquet(p, index=False),
            "similarity.csv": lambda p: self.similarity.to_csv(p, index=False),
            "amplification.parquet": lambda p: self.amplification.to_parquet(p, index=False),
            "amplification.csv": lambda p: self.amplification.to_csv(p, index=False),
            "report.html": lambda p: p.write_text(render(self), encoding="utf-8"),
            FACTS: lambda p: p.write_text(runs.facts_text(self.facts, p.parent, _READ), encoding="utf-8"),
        }
        return write_directory(root, files)

    def to_json(self) -> str:
        """One JSON object: facts, what each step is, the table, φ and amplification by type; NaN and ∞ are null."""
        payload = {
            "schema_version": SCHEMA_VERSION,
            "facts": self.facts,
            "steps": {
                label: {key: result.facts.get(key) or [] for key in ("counts", "findings", "warnings", "notes")}
                for label, result in self.results.items()
            },
            "table": self.table.to_dict("records"),
            "similarity": self.similarity_by_type.to_dict("records"),
            "amplification": self.amplification_by_type.to_dict("records"),
        }
        return json.dumps(plain(payload), ensure_ascii=False)


def load_trajectory(root: Path) -> Trajectory:
    """Read a trajectory's directory back. Raises `CheckpointError` where it is damaged."""
    facts = runs.read_facts(root, FACTS)
    labels = runs.read_file(root, FACTS, lambda _: _labels(facts))
    results = {}
    for label in labels:
        with naming(label):
            results[label] = runs.load_result(root / label)

    def read(file: Path, columns: dict[str, Column], steps: list[str]) -> pd.DataFrame:
        table = pd.read_parquet(file, columns=list(columns))
        unknown = set(table[steps].to_numpy().ravel()) - set(labels)
        if unknown:
            raise ValueError(f"has a step {min(map(str, unknown))!r} that {FACTS} does not have")
        return table

    similarity = partial(read, columns=SIMILARITY, steps=["step_a", "step_b"])
    amplification = partial(read, columns=AMPLIFICATION, steps=["step"])
    return Trajectory(
        results, runs.read_file(root, "similarity.parquet", similarity),
        runs.read_file(root, "amplification.parquet", amplification), facts,
    )  # fmt: skip


def _labels(facts: dict[str, Any]) -> list[str]:
    """The steps' labels, after what else a report needs of the facts was found in them. Raises ValueError."""
    try:
        labels = [step["label"] for step in facts["steps"]]
        texts = [facts["base"]["path"], *labels, *(step["path"] for step in facts["steps"])]
    except (KeyError, TypeError):
        raise ValueError("lacks base or steps, each with its path and label") from None
    if not all(isinstance(text, str) for text in texts) or not is_labels(labels):
        raise ValueError(f"has no usable labels of the steps (found {labels})")
    return labels


def is_labels(labels: Sequence[str]) -> bool:
    """Whether there are labels, each a name that a step's directory can have, no two the same but for case."""
    lower = {label.lower() for label in labels}
    return 0 < len(labels) == len(lower) and all(re.fullmatch(r"[\w-][\w .+=-]*", x) and x not in TAKEN for x in lower)


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Name the step in every error within."""
    try:
        yield
    except ProbeError as error:
        if not str(error).startswith("step "):
            error.args = (f"step {label}: {error}",)
        raise


def _medians(part: pd.DataFrame, keys: list[str], apart: bool) -> pd.DataFrame:
    names = pd.Series(labels(part["stack"], part["layer_type"], apart), index=part.index, dtype=object)
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
