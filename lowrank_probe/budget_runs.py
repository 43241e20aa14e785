"""`BudgetRun`: budgets and a measured step of one model, in memory and as a directory; imports no torch.

Its directory holds budgets.csv, components.csv, cards.csv, report.html and, written last, budget.json: everything that
`probe budget --json` tells, what the budgets are made of, and the checksums of the tables.
"""

import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd

from lowrank_probe import __version__
from lowrank_probe.accelerators import find_accelerator
from lowrank_probe.budget_fits import told
from lowrank_probe.budget_words import Price
from lowrank_probe.budgets import Budget
from lowrank_probe.errors import CheckpointError, ProbeError
from lowrank_probe.model_shapes import ModelShape, Weight
from lowrank_probe.outputs import whole_directory, write_directory
from lowrank_probe.recipes import Recipe
from lowrank_probe.runs import facts_text, notebook_html, read_facts, read_file
from lowrank_probe.sharding import Sharding
from lowrank_probe.strict_json import plain
from lowrank_probe.training_steps import Measured, Step

FACTS: Final = "budget.json"
_TABLES: Final = ("budgets.csv", "components.csv", "cards.csv")


def _now() -> dict[str, Any]:
    return {
        "versions": {"lowrank_probe": __version__, "python": platform.python_version()},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True, repr=False)
class BudgetRun:
    """What `probe budget` found.

    budgets: one or several runs of one model. measured: one real step of the first, where there is one. n_stored: how
    many tuned variants its storage is told for. price: of one card an hour, of the accelerator priced_on. facts:
    versions and time.
    """

    budgets: tuple[Budget, ...]
    measured: Measured | None = None
    n_stored: int | None = None
    price: float | None = None
    priced_on: str = "H100"
    facts: dict[str, Any] = field(default_factory=_now)

    @property
    def table(self) -> pd.DataFrame:
        """One row a run, columns as `columns.BUDGET`."""
        return self._tables["budgets.csv"]

    @property
    def components(self) -> pd.DataFrame:
        """One row a run and component, columns as `columns.BUDGET_COMPONENTS`."""
        return self._tables["components.csv"]

    @property
    def cards(self) -> pd.DataFrame:
        """One row a run and accelerator, columns as `columns.BUDGET_CARDS`."""
        return self._tables["cards.csv"]

    @property
    def _tables(self) -> dict[str, pd.DataFrame]:
        from lowrank_probe.budget_reports import cards_table, components_table, runs_table

        made = (runs_table(self.budgets, self._price), components_table(self.budgets), cards_table(self.budgets))
        return dict(zip(_TABLES, made, strict=True))

    @property
    def _price(self) -> Price | None:
        return None if self.price is None else Price(find_accelerator(self.priced_on), self.price)

    @property
    def figures(self) -> dict[str, Any]:
        """The report's plotly figures by name."""
        import plotly.graph_objects as go

        from lowrank_probe.budget_figures import budget_specs

        return {name: go.Figure(spec) for name, spec in budget_specs(self.budgets).items()}

    def __repr__(self) -> str:
        first, n = self.budgets[0], len(self.budgets)
        model = first.name or first.shape.source
        sizes = [f"{one.total_bytes / 2**30:.2f}" for one in self.budgets[:4]] + ["…"] * (n > 4)
        return f"<BudgetRun: {model}, {n} run{'s' * (n > 1)}: {', '.join(sizes)} GiB on one card>"

    def _repr_html_(self) -> str:
        return notebook_html([repr(self)[1:-1]], self.table)

    def to_json(self) -> str:
        """One JSON object with `schema_version`, as `probe budget --json` prints it."""
        priced = find_accelerator(self.priced_on)
        found = told(self.budgets, None, self.price, self.n_stored, self.measured, priced)
        return json.dumps(plain(found), ensure_ascii=False)

    def page(self) -> str:
        """The report as one HTML page (`budget_reports.render`)."""
        from lowrank_probe.budget_reports import render

        return render(self.budgets, self.n_stored, self.measured, self.facts, self._price)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the directory, budget.json last; returns its path. Raises `OutputError` where it is not free."""
        files: dict[str, Callable[[Path], Any]]
        files = {name: partial(table.to_csv, index=False) for name, table in self._tables.items()}
        files["report.html"] = partial(Path.write_text, data=self.page(), encoding="utf-8")
        everything = json.loads(self.to_json()) | self.facts | {"made_of": _made_of(self)}
        files[FACTS] = lambda p: p.write_text(facts_text(everything, p.parent, _TABLES), encoding="utf-8")
        with whole_directory(Path(directory)) as aside:
            write_directory(aside, files)
        return Path(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "BudgetRun":
        """Read it back.

        Raises `CheckpointError` where it is none, a file is not as it was written, or this version's formulas give
        other numbers than those in it.
        """
        root = Path(directory)
        facts = read_facts(root, FACTS)
        try:
            run: BudgetRun = read_file(root, FACTS, lambda _: _run_of(facts))
            totals = [one.total_bytes for one in run.budgets]
            written = read_file(root, FACTS, lambda _: [one["total_bytes"] for one in facts["budgets"]])
        except ProbeError:
            raise
        except Exception as error:  # whatever numbers that are none lead to
            raise CheckpointError(
                f"{root}: {FACTS} is not as it was written ({type(error).__name__}: {error})"
            ) from None
        if totals != written:
            raise CheckpointError(
                f"{root}: {FACTS} tells other totals than its runs have by this version's formulas (lowrank_probe "
                f"{__version__}; written by {run.facts['versions']['lowrank_probe']}); make it again with probe budget"
            )
        return run


def _made_of(run: BudgetRun) -> dict[str, Any]:
    first = run.budgets[0]
    return {
        "shape": asdict(first.shape), "n_parameters": first.n_parameters, "name": first.name, "n_stored": run.n_stored,
        "price": run.price, "priced_on": run.priced_on,
        "runs": [
            {"step": asdict(one.step), "sharding": asdict(one.sharding),
             "special": None if one.special is None else asdict(one.special)}
            for one in run.budgets
        ],
        "measured": None if run.measured is None else asdict(run.measured),
    }  # fmt: skip


def _run_of(told: Mapping[str, Any]) -> BudgetRun:
    """The run of a parsed budget.json. Raises `KeyError`, `TypeError` or `ValueError` where it is damaged."""
    made = told["made_of"]
    weights = tuple(
        Weight(**one | {"shape": tuple(one["shape"]), "layers": tuple(one["layers"])})
        for one in made["shape"]["weights"]
    )
    shape = ModelShape(**made["shape"] | {"weights": weights, "notes": tuple(made["shape"]["notes"])})
    budgets = tuple(
        Budget(
            shape, Step(**one["step"]), Sharding(**one["sharding"]), made["n_parameters"],
            None if one["special"] is None else Recipe(**one["special"]), made["name"],
        )
        for one in made["runs"]
    )  # fmt: skip
    if not budgets:
        raise ValueError("holds no run")
    measured = None if made["measured"] is None else Measured(**made["measured"])
    facts = {"versions": told["versions"], "time": told["time"]}
    return BudgetRun(budgets, measured, made["n_stored"], made.get("price"), made.get("priced_on", "H100"), facts)
