"""`Extraction`: the adapters in a fine-tune and what they carry, in memory and as a directory; imports no torch.

An extraction's directory holds ledger (.parquet, .csv), summary.csv, curves.parquet, report.html and, written last,
facts.json, which has the size and checksum of the files that `load` reads. It is the `probe/` beside the adapters.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import pandas as pd

from lowrank_probe.extraction_summary import summarise_extraction
from lowrank_probe.outputs import write_directory
from lowrank_probe.runs import facts_text, notebook_html, read_facts, read_file
from lowrank_probe.strict_json import SCHEMA_VERSION, plain

FOLDER: Final = "probe"
_CURVES: Final = "curves.parquet"  # what no other run's directory has
_READ: Final = ("ledger.parquet", _CURVES)


@dataclass(frozen=True, repr=False)
class Extraction:
    """The answer of `extract`.

    ledger: one row an adapter and unit, and one for everything that is not carried (`columns.EXTRACTION`).
    curves: energy against rank of every unit, up to its largest rank (`columns.CURVES`).
    adapters: label → directory ("" where there is one, else "r4", "r8", …). facts: what was extracted, how, per adapter
    its parameters, bytes and the share of ‖ΔW‖² that base + adapter carries, and what was tried with a calibration text
    and found by a verification.
    """

    ledger: pd.DataFrame
    curves: pd.DataFrame
    adapters: dict[str, Path]
    facts: dict[str, Any]

    @property
    def directory(self) -> Path:
        """What was given as `out`."""
        label, path = next(iter(self.adapters.items()))
        return path.parent if label else path

    @property
    def summary(self) -> pd.DataFrame:
        """One row an adapter and layer type, columns as `columns.EXTRACTION_SUMMARY`."""
        return self._summary.copy()

    @cached_property
    def _summary(self) -> pd.DataFrame:
        return summarise_extraction(self.ledger)

    def __repr__(self) -> str:
        carried = (f"{label} {100 * told['carried']:.3g} %".strip() for label, told in self.facts["adapters"].items())
        sides = " → ".join(str(self.facts[side]["path"]) for side in ("base", "tuned"))
        return f"<Extraction: {sides}; {self.directory} carries {', '.join(carried)} of ‖ΔW‖²>"

    def _repr_html_(self) -> str:
        return notebook_html([repr(self)[1:-1]], self.summary)

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        import plotly.graph_objects as go

        from lowrank_probe.extraction_figures import extraction_specs

        return {name: go.Figure(spec) for name, spec in extraction_specs(self).items()}

    def card(self, label: str = "") -> str:
        """The README.md of one of the adapters (`model_card.card`)."""
        from lowrank_probe.model_card import card

        return card(self, label)

    def to_json(self) -> str:
        """One JSON object with `schema_version`: facts, summary and ledger; NaN and ∞ become null."""
        told = {
            "schema_version": SCHEMA_VERSION, "facts": self.facts, "summary": self.summary.to_dict("records"),
            "ledger": self.ledger.to_dict("records"),
        }  # fmt: skip
        return json.dumps(plain(told), ensure_ascii=False)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the directory, facts.json last; returns its path. Raises `OutputError`."""
        from lowrank_probe.extraction_reports import render

        files: dict[str, Callable[[Path], Any]] = {
            "ledger.parquet": lambda p: self.ledger.to_parquet(p, index=False),
            _CURVES: lambda p: self.curves.to_parquet(p, index=False),
            "ledger.csv": lambda p: self.ledger.to_csv(p, index=False),
            "summary.csv": lambda p: self.summary.to_csv(p, index=False),
            "report.html": partial(Path.write_text, data=render(self), encoding="utf-8"),
            "facts.json": lambda p: p.write_text(facts_text(self.facts, p.parent, _READ), encoding="utf-8"),
        }
        return write_directory(Path(directory), files)

    def write(self) -> Path:
        """Write every adapter's model card, then the directory `probe` (`save`); returns that. Raises `OutputError`."""
        for label, path in self.adapters.items():
            card = partial(Path.write_text, data=self.card(label), encoding="utf-8")
            write_directory(path, {"README.md": card})
        return self.save(self.directory / FOLDER)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Extraction":
        """Read it back from its directory, or from the one that `extract` wrote. Raises `CheckpointError`."""
        root = extraction_directory(Path(directory)) or Path(directory)
        facts = read_facts(root, "facts.json")
        ledger = read_file(root, "ledger.parquet", pd.read_parquet)
        curves = read_file(root, _CURVES, pd.read_parquet)
        labels = read_file(root, "facts.json", lambda _: list(facts["adapters"]))
        return cls(ledger, curves, {label: root.absolute().parent / label for label in labels}, facts)


def extraction_directory(path: Path) -> Path | None:
    """The directory of an extraction: the path itself, or `probe/` in it; None where it is another thing."""
    return next((root for root in (path, path / FOLDER) if (root / _CURVES).exists()), None)
