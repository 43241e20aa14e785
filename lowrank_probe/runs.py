"""`Result`: what a run found, in memory and as a run directory.

A run directory holds table.parquet and table.csv (one row a matrix), singular_values.parquet, ledger.csv, summary.csv,
timeline.csv, report.html and, written last, facts.json, which has the size and checksum of the files that `load` reads.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import LEDGER
from lowrank_probe.errors import CheckpointError, OutputError
from lowrank_probe.outputs import check_writable, write_directory
from lowrank_probe.verdicts import summarise

SCHEMA_VERSION: Final = 1
TIMELINE: Final = ("name", "phase", "start_s", "stop_s")
_READ: Final = ("table.parquet", "ledger.csv", "timeline.csv", "singular_values.parquet")


@dataclass(frozen=True)
class Result:
    """The answer of `spectrum`.

    table: one row a matrix, columns as `columns.TABLE`. ledger: one row a tensor of either side (`columns.LEDGER`).
    singular_values[name]: (k,) float64, descending, of ΔW as stored. denoised_values[name]: (k,) with the storage
    noise taken out (absent where there is none to take). facts: what was compared, options, versions, device, seconds.
    timeline: one row a matrix and phase (read, spectrum, noise) with its start and stop in seconds since work began.
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
        return summarise(self.table, related=bool(self.facts.get("related", True)))

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        from lowrank_probe.figures import all_figures

        return all_figures(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the run directory, facts.json last; returns its path. Raises `OutputError` naming what failed."""
        from lowrank_probe.reports import render

        def facts(aside: Path) -> str:
            told = plain(self.facts) | {"files": {name: _checksum(aside / name) for name in _READ}}
            return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

        files: dict[str, Callable[[Path], Any]] = {
            "table.parquet": lambda p: self.table.to_parquet(p, index=False),
            "table.csv": lambda p: self.table.to_csv(p, index=False),
            "summary.csv": lambda p: self.summary.to_csv(p, index=False),
            "ledger.csv": lambda p: self.ledger.to_csv(p, index=False),
            "timeline.csv": lambda p: self.timeline.to_csv(p, index=False, float_format="%.6f"),
            "singular_values.parquet": lambda p: self._long().to_parquet(p, index=False),
            "report.html": lambda p: p.write_text(render(self), encoding="utf-8"),
            "facts.json": lambda p: p.write_text(facts(p.parent), encoding="utf-8"),
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

    def _long(self) -> pd.DataFrame:
        parts = [
            pd.DataFrame(
                {
                    "name": name,
                    "index": np.arange(1, len(s) + 1, dtype=np.int32),
                    "sigma": s,
                    "sigma_denoised": self.denoised_values.get(name, np.full(len(s), math.nan)),
                }
            )
            for name, s in self.singular_values.items()
        ]
        columns = ["name", "index", "sigma", "sigma_denoised"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def load(directory: str | os.PathLike[str]) -> Result:
    """Read a run directory back.

    Raises `CheckpointError` where it is none, a file is not as it was written, or a newer version wrote it.
    """
    root = Path(directory)
    if not (root / "facts.json").exists():
        raise CheckpointError(f"{root}: not a run directory (no facts.json in it)")
    try:
        facts = json.loads((root / "facts.json").read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("facts.json holds no JSON object")
        if facts.get("schema_version", 0) > SCHEMA_VERSION:
            raise CheckpointError(
                f"{root}: written by a newer lowrank_probe (schema {facts['schema_version']}); upgrade"
            )
        for name, written in facts.pop("files", {}).items():
            found = _checksum(root / name)
            if found != written:
                raise ValueError(
                    f"{name} is not as it was written ({found['n_bytes']} bytes, expected {written['n_bytes']}; "
                    "truncated or edited?)"
                )
        table = pd.read_parquet(root / "table.parquet")
        ledger = _read_ledger(root / "ledger.csv")
        long = pd.read_parquet(root / "singular_values.parquet")
        timeline = pd.read_csv(root / "timeline.csv", usecols=list(TIMELINE))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root}: is not a complete run directory: {error}") from None
    values, denoised = {}, {}
    for name, part in long.groupby("name", sort=False):
        values[str(name)] = part["sigma"].to_numpy(dtype=np.float64)
        if not part["sigma_denoised"].isna().all():
            denoised[str(name)] = part["sigma_denoised"].to_numpy(dtype=np.float64)
    return Result(table, ledger, values, denoised, facts, timeline)


def _checksum(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    return {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read_ledger(file: Path) -> pd.DataFrame:
    numbers = {"layer": "Int64", "fro_norm": "float64", "relative_update": "float64"}
    return pd.read_csv(
        file, usecols=list(LEDGER), dtype={column: numbers.get(column, "str") for column in LEDGER},
        keep_default_na=False, na_values={column: [""] for column in numbers},
    )  # fmt: skip


def plain(value: Any) -> Any:
    """The value with numpy and pandas scalars as Python's own, and NaN, NA and ∞ as None: strict JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def unfinished(directory: str | os.PathLike[str]) -> Result | None:
    """The interrupted run in a directory, or None where the directory is free (absent or empty).

    Raises `OutputError` where it holds anything else, or cannot be written.
    """
    root = Path(directory)
    check_writable(root)
    if not root.exists() or not any(root.iterdir()):
        return None
    if (root / "facts.json").exists():
        earlier = load(root)
        if earlier.facts.get("status") == "interrupted":
            return earlier
        raise OutputError(f"{root}: already holds a finished run; choose another --out or remove it")
    raise OutputError(f"{root}: is not empty; choose another --out")
