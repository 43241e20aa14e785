"""What a training showed, in sentences: for the terminal and the page alike."""

from pathlib import PurePath
from typing import TYPE_CHECKING

from lowrank_probe.words import number

if TYPE_CHECKING:
    from lowrank_probe.training_runs import Training


def model_word(found: "Training") -> str:
    """The model's short name."""
    return PurePath(found.facts["model"]["path"]).name


def summary_words(found: "Training") -> str:
    """The losses of base and full fine-tune, and of the best adapter."""
    told = f"Held-out loss: base {number(found.base_loss)}, full fine-tune {number(found.full_loss)}"
    adapters = found.runs[found.runs["method"] != "full"]
    means = adapters.groupby(["method", "targets", "rank"])["loss"].mean()
    if means.notna().any():
        method, targets, rank = means.idxmin()
        told += f", best adapter {number(float(means.min()))} ({method} r={rank} on {targets})"
    return f"{told}."


def recommendation_words(found: "Training") -> str:
    """One sentence on the adapter that is recommended; "" where none is."""
    best = found.facts["recommendation"]
    if best is None:
        return ""
    above = f"{best['against_full']:+.3g}"
    return (
        f"{best['variant']} of rank {best['rank']} on {best['targets']}, learning rate {best['lr']:g}: "
        f"{best['n_trained']:,} parameters, held-out loss {number(best['loss'])} ({above} against full), the fewest "
        "within the tolerance of the best adapter"
    )
