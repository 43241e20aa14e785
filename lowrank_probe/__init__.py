"""lowrank_probe: is this fine-tuning update low-rank, of what rank, and what does a LoRA of that rank keep?

>>> import lowrank_probe as lp
>>> result = lp.spectrum("base/", "finetuned/")
>>> result.summary[["layer_type", "r90", "null_r90", "verdict"]]
>>> result.save("run/")

The verbs are resolved on first use (PEP 562), so `import lowrank_probe` imports neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_probe.errors import CheckpointError, MatchError, NumericsError, OutputError, ProbeError, UnchangedError

if TYPE_CHECKING:
    from lowrank_probe.budget_runs import BudgetRun
    from lowrank_probe.budgets import Budget, budget
    from lowrank_probe.demos import demo
    from lowrank_probe.evaluation import evaluate
    from lowrank_probe.evaluation_runs import Evaluation
    from lowrank_probe.extraction import extract
    from lowrank_probe.extraction_runs import Extraction
    from lowrank_probe.merging import Merged, merge
    from lowrank_probe.options import Options
    from lowrank_probe.rank_choice import RankChoice
    from lowrank_probe.reports import report
    from lowrank_probe.resizing import Resized, resize
    from lowrank_probe.runs import Result, load
    from lowrank_probe.spectra import Interrupted, spectrum
    from lowrank_probe.training import train
    from lowrank_probe.training_plan import Recipe
    from lowrank_probe.training_runs import Training
    from lowrank_probe.trajectories import trajectory
    from lowrank_probe.trajectory_runs import Trajectory
    from lowrank_probe.verification import verify

__version__ = "0.1.0"

_VERBS = {
    "spectrum": "spectra",
    "Interrupted": "spectra",
    "load": "runs",
    "Result": "runs",
    "trajectory": "trajectories",
    "Trajectory": "trajectory_runs",
    "train": "training",
    "Training": "training_runs",
    "Recipe": "training_plan",
    "evaluate": "evaluation",
    "Evaluation": "evaluation_runs",
    "extract": "extraction",
    "Extraction": "extraction_runs",
    "RankChoice": "rank_choice",
    "Options": "options",
    "verify": "verification",
    "resize": "resizing",
    "merge": "merging",
    "Merged": "merging",
    "Resized": "resizing",
    "budget": "budgets",
    "Budget": "budgets",
    "BudgetRun": "budget_runs",
    "report": "reports",
    "demo": "demos",
}

__all__ = [
    "Budget",
    "BudgetRun",
    "CheckpointError",
    "Evaluation",
    "Extraction",
    "Interrupted",
    "MatchError",
    "Merged",
    "NumericsError",
    "Options",
    "OutputError",
    "ProbeError",
    "RankChoice",
    "Recipe",
    "Resized",
    "Result",
    "Training",
    "Trajectory",
    "UnchangedError",
    "__version__",
    "budget",
    "demo",
    "evaluate",
    "extract",
    "load",
    "merge",
    "report",
    "resize",
    "spectrum",
    "train",
    "trajectory",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Resolve a public verb from the module that holds it."""
    if name in _VERBS:
        return getattr(import_module(f"lowrank_probe.{_VERBS[name]}"), name)
    raise AttributeError(f"module 'lowrank_probe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
