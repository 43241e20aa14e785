"""The loggers of `--report-to`: Trainer's own, each training run a run of theirs under its label."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lowrank_probe.errors import ProbeError

TENSORBOARD: Final = "TENSORBOARD_LOGGING_DIR"  # which Trainer's callback reads when it is made


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ProbeError` for a logger that Trainer does not have, or whose package is not installed."""
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    if missing := [name for name in names if name not in there]:
        known = f"installed are {', '.join(there)}" if there else "none is installed"
        raise ProbeError(f"--report-to {missing[0]}: expected a logger of Trainer that is installed; {known}")


@contextmanager
def logged(names: Sequence[str], folder: Path) -> Iterator[None]:
    """While one run trains in runs/<label>: TensorBoard writes to tensorboard/<label> beside runs/, or below the
    directory that its variable names; the run of Weights & Biases ends with it."""
    before = os.environ.get(TENSORBOARD)
    os.environ[TENSORBOARD] = str(Path(before or folder.parents[1] / "tensorboard") / folder.name)
    try:
        yield
    finally:
        del os.environ[TENSORBOARD]
        if before is not None:
            os.environ[TENSORBOARD] = before
        if "wandb" in names:  # which would take the next training for the same run
            import wandb

            wandb.finish()
