"""`Evaluation`: losses of truncated updates and their functional ranks, in memory and as a run directory. No torch.

A run directory holds table.parquet and table.csv (one row a state), functional.csv, losses.npz (one loss a state and
sequence), report.html and, written last, facts.json, which has the size and checksum of the files that `load` reads.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import FUNCTIONAL
from lowrank_probe.outputs import write_directory
from lowrank_probe.runs import facts_text, notebook_html, read_csv, read_facts, read_file
from lowrank_probe.strict_json import SCHEMA_VERSION, plain

LOSSES: Final = "losses.npz"  # what no other run's directory has
_READ: Final = ("table.parquet", "functional.csv", LOSSES)
_ARRAYS: Final = ("losses", "kl", "tokens", "kl_tokens")


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The answer of `evaluate`.

    table: one row a state (`columns.EVALUATION`): base, tuned, then each group at every rank. functional: one row a
    group (`columns.FUNCTIONAL`). losses, kl: (rows of the table, sequences) means of each sequence, tokens, kl_tokens:
    (sequences,) what they are means over: losses @ tokens / tokens.sum() is the table's loss. facts: what was compared,
    on what text, by what merit, options, tolerance, notes, versions, device, seconds.
    """

    table: pd.DataFrame
    functional: pd.DataFrame
    losses: NDArray[np.float64]
    kl: NDArray[np.float64]
    tokens: NDArray[np.float64]
    kl_tokens: NDArray[np.float64]
    facts: dict[str, Any]

    def __repr__(self) -> str:
        sides = " → ".join(str(self.facts[side]["path"]) for side in ("base", "tuned"))
        ranks = self.functional[self.functional["how"] != "leave out"]
        told = ", ".join(
            f"{row.group} {rank_word(row.functional_rank, row.largest_rank)}" for row in ranks.itertuples()
        )
        return f"<Evaluation: {sides}; functional rank {told}>"

    def _repr_html_(self) -> str:
        return notebook_html([repr(self)[1:-1]], self.functional)

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        import plotly.graph_objects as go

        from lowrank_probe.evaluation_figures import evaluation_specs

        return {name: go.Figure(spec) for name, spec in evaluation_specs(self).items()}

    def row(self, how: str) -> dict[str, Any]:
        """The row of "base" or "tuned"."""
        found: dict[str, Any] = self.table[self.table["how"] == how].iloc[0].to_dict()
        return found

    def to_json(self) -> str:
        """One JSON object with `schema_version`: facts, functional, table; NaN and missing become null."""
        told = {
            "schema_version": SCHEMA_VERSION, "facts": self.facts, "functional": self.functional.to_dict("records"),
            "table": self.table.to_dict("records"),
        }  # fmt: skip
        return json.dumps(plain(told), ensure_ascii=False)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the run directory, facts.json last; returns its path. Raises `OutputError`."""
        from lowrank_probe.evaluation_reports import render

        files: dict[str, Callable[[Path], Any]] = {
            "table.parquet": lambda p: self.table.to_parquet(p, index=False),
            "table.csv": lambda p: self.table.to_csv(p, index=False),
            "functional.csv": lambda p: self.functional.to_csv(p, index=False),
            LOSSES: self._write_losses,
            "report.html": partial(Path.write_text, data=render(self), encoding="utf-8"),
            "facts.json": lambda p: p.write_text(facts_text(self.facts, p.parent, _READ), encoding="utf-8"),
        }
        return write_directory(Path(directory), files)

    def _write_losses(self, file: Path) -> None:
        np.savez(file, **{name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Evaluation":
        """Read it back. Raises `CheckpointError` where it is unfinished or damaged."""
        root = Path(directory)
        facts = read_facts(root, "facts.json")
        table = read_file(root, "table.parquet", pd.read_parquet)
        functional = read_file(root, "functional.csv", _read_functional)
        arrays = read_file(root, LOSSES, _read_losses)
        losses, kl, tokens, kl_tokens = (arrays[name] for name in _ARRAYS)
        return cls(table, functional, losses, kl, tokens, kl_tokens, facts)


def rank_word(rank: Any, largest: Any) -> str:
    """A functional rank, or "> r" where the grid ends before it."""
    return f"> {largest}" if pd.isna(rank) else str(rank)


def interval_word(low: Any, high: Any, largest: Any) -> str:
    """Both ends of an interval of ranks; one where they agree.

    >>> interval_word(1, 4, 8), interval_word(4, 4, 8), interval_word(4, None, 8), interval_word(None, None, 8)
    ('1–4', '4', '≥ 4', '> 8')
    """
    if pd.isna(low) or pd.isna(high):
        return rank_word(low, largest) if pd.isna(low) else f"≥ {low}"
    return str(low) if low == high else f"{low}–{high}"


def _read_functional(file: Path) -> pd.DataFrame:
    kinds = {name: "Int64" for name in FUNCTIONAL if name not in ("group", "how", "tolerance_nats")}
    return read_csv(
        file, usecols=list(FUNCTIONAL), dtype={**kinds, "group": "str", "how": "str"}, keep_default_na=False,
        na_values={name: [""] for name in (*kinds, "tolerance_nats")},
    )  # fmt: skip


def _read_losses(file: Path) -> dict[str, NDArray[np.float64]]:
    import zipfile

    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in _ARRAYS}
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from None
