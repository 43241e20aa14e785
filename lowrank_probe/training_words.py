"""What a training showed, in sentences: for the terminal and the page alike."""

from pathlib import PurePath
from typing import TYPE_CHECKING, Final

from lowrank_probe.words import number, percent

if TYPE_CHECKING:
    from lowrank_probe.training_runs import Training

# What the outcome of the full fine-tune means for all verdicts.
NO_VERDICT: Final = {
    "gained": "", "no gain": " The full fine-tune gains nothing on this text, so that nothing is decided.",
    "diverged": " So there is nothing to compare with, and nothing is decided.",
}  # fmt: skip


def model_word(found: "Training") -> str:
    """The model's short name: its directory and the one above, or its hub id."""
    told = found.facts["model"]
    return str(told["hub_id"] or "/".join(PurePath(told["path"]).parts[-2:]).lstrip("/"))


def summary_words(found: "Training") -> str:
    """The losses of base and full fine-tune, and of the best adapter."""
    outcome = found.facts["full"]["outcome"]
    full = "diverged" if outcome == "diverged" else number(found.full_loss)
    told = f"Held-out loss: base {number(found.base_loss)}, full fine-tune {full}"
    adapters = found.sound[found.sound["method"] != "full"]
    means = adapters.groupby(["method", "targets", "rank"])["loss"].mean()
    if means.notna().any():
        method, targets, rank = means.idxmin()
        told += f", best adapter {number(float(means.min()))} ({method} r={rank} on {targets})"
    return f"{told}.{NO_VERDICT[outcome]}"


def tolerance_words(found: "Training") -> str:
    """What "as good" means, in nats."""
    told = found.facts["tolerance"]
    nats, asked = number(told["nats"]), str(told["asked"])
    if not asked.endswith("%"):
        return f"{nats} nats"
    if found.facts["full"]["outcome"] == "diverged":
        return f"{nats} nats (no full fine-tune to take {asked} of)"
    gain = told["gain"]
    return f"{nats} nats ({asked} of its gain{'' if gain > 0 else ', which is nothing, so nats are taken'})"


def recommendation_words(found: "Training") -> str:
    """One sentence on the adapter that is recommended; "" where none is."""
    best = found.facts["recommendation"]
    if best is None:
        return ""
    full = found.facts["full"]["outcome"]
    told = (
        f"{best['variant']} of rank {best['rank']} on {best['targets']}, learning rate {best['lr']:g}: "
        f"{best['n_trained']:,} parameters, held-out loss {number(best['loss'])}, the fewest within the tolerance of "
        "the best adapter; "
    )
    if full == "diverged":
        return f"{told}nothing to compare it with, since the full fine-tune diverged"
    if full == "no gain":
        return f"{told}{best['against_full']:+.3g} against the full fine-tune, which gained nothing"
    side = "above" if best["against_full"] >= 0 else "below"
    told += f"it reaches {percent(best['share'])} % of the full fine-tune's gain, "
    told += f"{number(abs(best['against_full']))} nats {side} its loss"
    return told if best["good_enough"] else f"{told}: none that was trained is good enough"
