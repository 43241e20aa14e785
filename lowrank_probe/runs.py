"""`Result`: what a run found, in memory and as a run directory.

A run directory holds table.parquet and table.csv (one row a matrix), singular_values.parquet, ledger.csv, summary.csv,
timeline.csv, report.html and, written last, facts.json, which has the size and checksum of the files that `load` reads.
"""

import hashlib
import html
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe import words
from lowrank_probe.columns import LEDGER
from lowrank_probe.errors import CheckpointError
from lowrank_probe.outputs import is_unfinished, write_directory
from lowrank_probe.strict_json import SCHEMA_VERSION, plain
from lowrank_probe.verdicts import summarise

if TYPE_CHECKING:
    from lowrank_probe.budget_runs import BudgetRun
    from lowrank_probe.evaluation_runs import Evaluation
    from lowrank_probe.extraction_runs import Extraction
    from lowrank_probe.training_runs import Training
    from lowrank_probe.trajectory_runs import Trajectory

LONG: Final = ("name", "index", "sigma", "sigma_denoised")
TIMELINE: Final = ("name", "phase", "start_s", "stop_s")
_READ: Final = ("table.parquet", "ledger.csv", "timeline.csv", "singular_values.parquet")


@dataclass(frozen=True, repr=False)
class Result:
    """The answer of `spectrum`.

    table: one row a matrix, columns as `columns.TABLE`. ledger: one row a tensor of either side (`columns.LEDGER`).
    singular_values[name]: (k,) float64, descending, of ΔW as stored. denoised_values[name]: (k,) with the storage
    noise taken out (absent where there is none to take). facts: what was compared, options, versions, device, seconds.
    timeline: one row a matrix and phase (read, spectrum, noise: before and after) with start and stop in seconds since
    work began.
    """

    table: pd.DataFrame
    ledger: pd.DataFrame
    singular_values: dict[str, NDArray[np.float64]]
    denoised_values: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    timeline: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(TIMELINE)))

    @property
    def summary(self) -> pd.DataFrame:
        """One row a layer type with its verdict, columns as `columns.SUMMARY`."""
        return self._summary.copy()

    @cached_property
    def _summary(self) -> pd.DataFrame:
        return summarise(self.table, related=bool(self.facts.get("related", True)))

    def __repr__(self) -> str:
        sides = [str(self.facts[key]["path"]) for key in ("base", "tuned") if self.facts.get(key)]
        counted = words.count(len(self.table), "matrix", "matrices")
        verdicts = ", ".join(f"{row.layer_type} {row.verdict}" for row in self.summary.head(8).itertuples())
        more = ", …" if len(self.summary) > 8 else ""
        return f"<Result: {' → '.join(sides)}; {counted}{': ' if verdicts else ''}{verdicts}{more}>"

    def _repr_html_(self) -> str:
        said = [found["statement"] for found in self.facts.get("findings") or ()]
        return notebook_html(said, self.summary)

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        from lowrank_probe.figures import all_figures

        return all_figures(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the run directory, facts.json last; returns its path. Raises `OutputError` naming what failed."""
        from lowrank_probe.reports import render

        files: dict[str, Callable[[Path], Any]] = {
            "table.parquet": lambda p: self.table.to_parquet(p, index=False),
            "table.csv": lambda p: self.table.to_csv(p, index=False),
            "summary.csv": lambda p: self.summary.to_csv(p, index=False),
            "ledger.csv": lambda p: self.ledger.to_csv(p, index=False),
            "timeline.csv": lambda p: self.timeline.to_csv(p, index=False, float_format="%.6f"),
            "singular_values.parquet": self._write_values,
            "report.html": lambda p: p.write_text(render(self), encoding="utf-8"),
            "facts.json": lambda p: p.write_text(facts_text(self.facts, p.parent, _READ), encoding="utf-8"),
        }
        return write_directory(Path(directory), files)

    def to_json(self) -> str:
        """One JSON object with `schema_version`: facts, summary, table and ledger; NaN and ∞ become null."""
        payload = {
            "schema_version": SCHEMA_VERSION,
            "facts": self.facts,
            "summary": self.summary.to_dict("records"),
            "table": self.table.to_dict("records"),
            "ledger": self.ledger.to_dict("records"),
        }
        return json.dumps(plain(payload), ensure_ascii=False)

    def _write_values(self, file: Path) -> None:
        """One row a singular value; the names as a dictionary, so that none is written a thousand times."""
        import pyarrow as pa
        from pyarrow import parquet

        every = self.singular_values
        counts = [len(s) for s in every.values()]
        denoised = (self.denoised_values.get(name, np.full(len(s), math.nan)) for name, s in every.items())
        codes = pa.array(np.repeat(np.arange(len(every), dtype=np.int32), counts))
        indices = [np.arange(1, count + 1, dtype=np.int32) for count in counts]
        columns = (
            pa.DictionaryArray.from_arrays(codes, pa.array(list(every), pa.string())),
            np.concatenate([np.empty(0, np.int32), *indices]),
            np.concatenate([np.empty(0), *every.values()]),
            np.concatenate([np.empty(0), *denoised]),
        )
        # Without pandas' own notes on the columns they are read as plain ones; no two values of σ are the same.
        table = pa.table(dict(zip(LONG, columns, strict=True)))
        parquet.write_table(table, file, store_schema=False, use_dictionary=["name", "index"])


def notebook_html(lines: Sequence[str], table: pd.DataFrame) -> str:
    """A table below some lines, as a notebook shows it."""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    shown: str = table.to_html(index=False, float_format=words.number, na_rep="–", max_rows=100)
    return said + shown


def load(directory: str | os.PathLike[str]) -> "Result | Trajectory | Extraction | Evaluation | Training | BudgetRun":
    """Read a run directory back: a `Result`, `Trajectory`, `Extraction`, `Evaluation`, `Training` or `BudgetRun`.

    Raises `CheckpointError` where it is none, a file is not as it was written, or a newer version wrote it.
    """
    from lowrank_probe import evaluation_runs, extraction_runs, training_runs, trajectory_runs

    root = Path(directory)
    if (root / training_runs.PLAN).exists():
        return training_runs.Training.load(root)
    if (root / evaluation_runs.LOSSES).exists():
        return evaluation_runs.Evaluation.load(root)
    if (root / trajectory_runs.FACTS).exists():
        return trajectory_runs.load_trajectory(root)
    if (root / "budget.json").exists():
        from lowrank_probe.budget_runs import BudgetRun

        return BudgetRun.load(root)
    if extraction_runs.extraction_directory(root):
        return extraction_runs.Extraction.load(root)
    return load_result(root)


def load_result(root: Path) -> Result:
    """Read the run directory of one pair back. Raises `CheckpointError`."""
    facts = read_facts(root, "facts.json")
    table = read_file(root, "table.parquet", pd.read_parquet)
    ledger = read_file(root, "ledger.csv", _read_ledger)
    long = read_file(root, "singular_values.parquet", partial(pd.read_parquet, columns=list(LONG)))
    timeline = read_file(root, "timeline.csv", partial(read_csv, usecols=list(TIMELINE)))
    values, denoised = {}, {}
    for name, part in long.groupby("name", sort=False):
        values[str(name)] = part["sigma"].to_numpy(dtype=np.float64)
        if not part["sigma_denoised"].isna().all():
            denoised[str(name)] = part["sigma_denoised"].to_numpy(dtype=np.float64)
    return Result(table, ledger, values, denoised, facts, timeline)


def facts_text(facts: dict[str, Any], aside: Path, read: Sequence[str]) -> str:
    """The facts of a run directory as JSON, with size and checksum of the files beside them that are read back."""
    told = plain(facts) | {"files": {name: _checksum(aside / name) for name in read}}
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def read_facts(root: Path, name: str) -> dict[str, Any]:
    """The facts of a run directory, after its files were checked.

    Raises `CheckpointError` where they are missing, damaged, or of a newer version, or a file is not as it was written.
    """
    if not (root / name).exists():
        if is_unfinished(root):
            raise CheckpointError(f"{root}: is an unfinished run; the same command with --out {root} finishes it")
        raise CheckpointError(f"{root}: not a run directory (no {name} in it)")
    facts: dict[str, Any] = read_file(root, name, _parse_facts)
    if facts.get("schema_version", 0) > SCHEMA_VERSION:
        raise CheckpointError(f"{root}: written by a newer lowrank_probe (schema {facts['schema_version']}); upgrade")
    for file, (size, digest) in facts.pop("files").items():
        found = read_file(root, file, _checksum)
        if found != {"n_bytes": size, "sha256": digest}:
            raise CheckpointError(
                f"{root}: is not a complete run directory: {file} is not as it was written ({found['n_bytes']} bytes, "
                f"expected {size}; truncated or edited?)"
            )
    return facts


def _parse_facts(file: Path) -> dict[str, Any]:
    facts = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(facts, dict) or not isinstance(facts.get("schema_version", 0), int):
        raise ValueError("is no JSON object with a number as its schema_version")
    try:
        written = facts.get("files", {}).items()
        facts["files"] = {name: (told["n_bytes"], told["sha256"]) for name, told in written}
    except (AttributeError, KeyError, TypeError):
        raise ValueError("does not tell its files' sizes and checksums") from None
    return facts


def read_file(root: Path, name: str, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of one file of a run directory. Raises `CheckpointError` of one line, whatever the damage."""
    try:
        return read(root / name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"{root}: is not a complete run directory: {name}: {said}") from None


def read_csv(file: Path, **options: Any) -> pd.DataFrame:
    """pandas' `read_csv`, every float as it was written: its default only since 3.1, which deprecates asking for it."""
    if tuple(map(int, pd.__version__.split(".")[:2])) < (3, 1):
        options["float_precision"] = "round_trip"
    return pd.read_csv(file, **options)


def _checksum(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read_ledger(file: Path) -> pd.DataFrame:
    numbers = {"layer": "Int64", "fro_norm": "float64", "relative_update": "float64"}
    return read_csv(
        file, usecols=list(LEDGER), dtype={column: numbers.get(column, "str") for column in LEDGER},
        keep_default_na=False, na_values={column: [""] for column in numbers},
    )  # fmt: skip
