"""`Training`: what reference adapters showed, in memory and as a directory.

The directory holds runs/ (one a run), spectrum/ and evaluation/ of the full run, subspaces/ of some adapters, and of
all of them runs.csv, searches.csv, histories.csv, verdict.csv, equal_parameters.csv, losses.npz, report.html and,
written last, facts.json, which has the size and checksum of the files that `load` reads.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import EQUAL_PARAMETERS, HYPOTHESIS, TRAINING
from lowrank_probe.evaluation_runs import Evaluation
from lowrank_probe.hypothesis import COUNTS
from lowrank_probe.outputs import write_directory
from lowrank_probe.runs import Result, facts_text, load_result, notebook_html, read_csv, read_facts, read_file
from lowrank_probe.strict_json import SCHEMA_VERSION, plain

if TYPE_CHECKING:
    from lowrank_probe.trajectory_runs import Trajectory

FACTS: Final = "facts.json"
PLAN: Final = "plan.json"  # what no other run's directory has
SPECTRUM: Final = "spectrum"
EVALUATION: Final = "evaluation"
SUBSPACES: Final = "subspaces"
_READ: Final = ("runs.csv", "searches.csv", "histories.csv", "verdict.csv", "equal_parameters.csv", "losses.npz")
HISTORIES: Final = ("label", "step", "loss", "grad_norm", "learning_rate", "eval_loss")
_WORDS: Final = ("label", "method", "targets", "health", "layer_type", "verdict", "decided_by", "evidence", "missing")


@dataclass(frozen=True, repr=False)
class Training:
    """The answer of `train`.

    runs, searches: one row a run (`columns.TRAINING`), those that only looked for a learning rate apart. histories: one
    row a run and step. verdict: one row a group or layer type (`columns.HYPOTHESIS`). equal_parameters:
    `columns.EQUAL_PARAMETERS`. losses[label]: (n,) mean held-out loss of each sequence, "base" among them; tokens: (n,)
    judged tokens of each. spectrum, evaluation: of the first full run's update that did not diverge, None where all
    did; subspaces: of some adapters, None without two. facts: what was trained on what, parts (those of the last three
    that there are), findings on health, the recommendation, versions, device.
    """

    runs: pd.DataFrame
    searches: pd.DataFrame
    histories: pd.DataFrame
    verdict: pd.DataFrame
    equal_parameters: pd.DataFrame
    losses: dict[str, NDArray[np.float64]]
    tokens: NDArray[np.float64]
    spectrum: Result | None
    evaluation: Evaluation | None
    subspaces: "Trajectory | None"
    facts: dict[str, Any]

    @property
    def base_loss(self) -> float:
        """Held-out loss of the base, nats a token."""
        return float(np.average(self.losses["base"], weights=self.tokens))

    @property
    def full_loss(self) -> float:
        """Held-out loss of the full fine-tune, mean over the seeds that did not diverge; NaN without any."""
        return float(self.sound.loc[self.sound["method"] == "full", "loss"].mean())

    @property
    def sound(self) -> pd.DataFrame:
        """The runs that did not diverge."""
        return self.runs[~self.runs["diverged"].astype(bool)]

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        import plotly.graph_objects as go

        from lowrank_probe.training_figures import training_specs

        return {name: go.Figure(spec) for name, spec in training_specs(self).items()}

    def __repr__(self) -> str:
        told = ", ".join(f"{row.layer_type} {row.verdict}" for row in self.verdict.head(8).itertuples())
        return f"<Training: {self.facts['model']['path']}; {len(self.runs)} runs; {told}>"

    def _repr_html_(self) -> str:
        return notebook_html([repr(self)[1:-1]], self.verdict)

    def to_json(self) -> str:
        """One JSON object with `schema_version`: facts, verdict, runs, searches, equal_parameters; NaN becomes null."""
        told = {"schema_version": SCHEMA_VERSION, "facts": self.facts} | {
            name: getattr(self, name).to_dict("records") for name in ("verdict", "runs", "searches", "equal_parameters")
        }
        return json.dumps(plain(told), ensure_ascii=False)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write what is not in the directory's sub-directories, facts.json last; returns its path."""
        from lowrank_probe.training_reports import render

        files: dict[str, Callable[[Path], Any]] = {
            f"{name}.csv": partial(_write_csv, getattr(self, name))
            for name in ("runs", "searches", "histories", "verdict", "equal_parameters")
        }
        files |= {
            "losses.npz": self._write_losses,
            "report.html": partial(Path.write_text, data=render(self), encoding="utf-8"),
            FACTS: lambda p: p.write_text(facts_text(self.facts, p.parent, _READ), encoding="utf-8"),
        }
        return write_directory(Path(directory), files)

    def _write_losses(self, file: Path) -> None:
        np.savez(
            file, labels=np.array(list(self.losses)), losses=np.stack(list(self.losses.values())), tokens=self.tokens
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Training":
        """Read it back. Raises `CheckpointError` where it is unfinished or damaged."""
        from lowrank_probe.trajectory_runs import load_trajectory

        root = Path(directory)
        facts = read_facts(root, FACTS)
        runs, searches, histories, verdict, equal = (
            read_file(root, f"{name}.csv", partial(_read_csv, columns=columns))
            for name, columns in (
                ("runs", TRAINING), ("searches", TRAINING), ("histories", HISTORIES), ("verdict", HYPOTHESIS),
                ("equal_parameters", EQUAL_PARAMETERS),
            )
        )  # fmt: skip
        losses, tokens = read_file(root, "losses.npz", _read_losses)
        parts = facts["parts"]
        return cls(
            runs, searches, histories, verdict, equal, losses, tokens,
            load_result(root / SPECTRUM) if SPECTRUM in parts else None,
            Evaluation.load(root / EVALUATION) if EVALUATION in parts else None,
            load_trajectory(root / SUBSPACES) if SUBSPACES in parts else None, facts,
        )  # fmt: skip


def _write_csv(table: pd.DataFrame, file: Path) -> None:
    table.to_csv(file, index=False)


def _read_csv(file: Path, columns: Any) -> pd.DataFrame:
    kinds: dict[str, Any] = {name: "str" for name in _WORDS if name in columns}
    kinds |= {name: "Int64" for name in COUNTS if name in columns}
    others = [name for name in columns if name not in _WORDS]
    return read_csv(
        file, usecols=list(columns), dtype=kinds, keep_default_na=False, na_values={name: [""] for name in others}
    )


def _read_losses(file: Path) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    import zipfile

    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(zip(map(str, found["labels"]), found["losses"], strict=True)), found["tokens"]
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
