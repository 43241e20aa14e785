"""The verdict on the low-rank hypothesis, layer type by layer type, from every kind of evidence there is.

Spectral: r90 of the full run's ΔW (`verdicts`). Functional: the rank to which a type's ΔW can be truncated before the
held-out loss is worse (`functional_ranks`). Trained: the rank from which on LoRA on that type alone is as good as the
full fine-tune (`trained_ranks`). Trained evidence decides before functional, functional before spectral: the question
is whether an update of low rank does the job, and only then whether this one is of low rank.

A rank is low where it is at most half of the break-even rank mn/(m + n), so that the factors have at most half as many
parameters as the matrices:

    trained     the full fine-tune diverged, or gains nothing on this    no evidence: there is nothing to be as good as
                text (its gain's 95 % interval reaches 0)
                no rank whose adapters gained and did not diverge        no evidence: not the rank's fault
                its interval's upper end is low                          low-rank at r = that end
                the largest rank that was trained is not low, and not
                as good; and the loss has not levelled off before        not low-rank
                the loss levelled off above the full fine-tune's         no evidence: other types moved, too
    functional  the full fine-tune, likewise                             no evidence
                its interval's upper end is low, its lower end 0         no evidence: the text hardly needs it
                its interval's upper end is low, its lower end not 0     low-rank at r = that end
                its interval's lower end is not low                      not low-rank
    spectral    the full fine-tune, likewise                             no evidence
                its rank is below the functional interval                no evidence: more of the update counts
                else                                                     as `verdicts`
    anything else                                                        undecidable, and which evidence is missing
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from lowrank_probe.columns import HYPOTHESIS
from lowrank_probe.evaluation_runs import Evaluation, interval_word, rank_word
from lowrank_probe.layer_groups import in_group
from lowrank_probe.layers import labels
from lowrank_probe.runs import Result
from lowrank_probe.verdicts import named_rank
from lowrank_probe.verdicts import verdict as spectral_verdict
from lowrank_probe.words import count, number

if TYPE_CHECKING:
    from lowrank_probe.trained_ranks import Trained

LOW: Final = 0.5
# Share of the full fine-tune's gain below which no adapter is good enough.
GOOD_ENOUGH: Final = 0.5
UNDECIDABLE: Final = "undecidable"
# What a full fine-tune, and an adapter, did not do, so that it is no evidence.
FULL_FAILED: Final = {
    "diverged": "a full fine-tune that did not diverge", "no gain": "a full fine-tune that gains on this text",
}  # fmt: skip
LORA_FAILED: Final = {"diverged": "a LoRA run that did not diverge", "no gain": "a LoRA run that gains on this text"}
COUNTS: Final = (
    "trained_rank", "trained_low", "trained_high", "trained_largest", "own_rank", "functional_rank", "functional_low",
    "functional_high", "functional_largest",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What one kind of evidence says: a verdict, "" where it does not decide; the numbers; what is missing."""

    verdict: str = ""
    evidence: str = ""
    missing: tuple[str, ...] = field(default=())


def judge(spectrum: Result | None, evaluation: Evaluation | None, trained: Sequence["Trained"] = ()) -> pd.DataFrame:
    """One row a group of targets or layer type, columns as `columns.HYPOTHESIS`, groups that were trained first.

    spectrum, evaluation: of the full run, None where none is fit for it. trained: of `trained_ranks`; of several
    variants the first counts.
    """
    by_group: dict[str, Trained] = {}
    for one in trained:
        by_group.setdefault(one.targets, one)
    types = list(spectrum.summary["layer_type"]) if spectrum is not None else []
    if evaluation is not None:
        types += [name for name in evaluation.functional["group"] if name not in types and name != "all"]
    names = [*by_group, *(name for name in types if name not in by_group)]
    table = pd.DataFrame(
        [_row(name, spectrum, evaluation, by_group.get(name)) for name in names], columns=list(HYPOTHESIS)
    )
    return table.astype(dict.fromkeys(COUNTS, "Int64"))


def _row(
    name: str, spectrum: Result | None, evaluation: Evaluation | None, trained: "Trained | None"
) -> dict[str, Any]:
    rows = _matrices(name, spectrum)
    break_even = float(rows["break_even_rank"].median()) if len(rows) else float("nan")
    functional = _functional_row(name, evaluation)
    said = {
        "trained": _trained(trained, LOW * break_even),
        "functional": _functional(functional, LOW * break_even),
        "spectral": _spectral(name, spectrum, functional),
    }
    if evaluation is None or not gained(evaluation):
        lacking = FULL_FAILED["diverged" if spectrum is None else "no gain"]
        said |= {kind: Said(evidence=said[kind].evidence, missing=(lacking,)) for kind in ("functional", "spectral")}
    deciding = next((kind for kind, one in said.items() if one.verdict), "")
    missing = list(dict.fromkeys(what for one in said.values() for what in one.missing))
    verdict = said[deciding].verdict if deciding else UNDECIDABLE
    row: dict[str, Any] = {
        "layer_type": name, "n_matrices": len(rows), "verdict": verdict, "decided_by": deciding,
        "break_even_rank": break_even,
        "evidence": "; ".join(f"{kind}: {one.evidence}" for kind, one in said.items() if one.evidence),
        "missing": "; ".join(missing) if not deciding else "",
    }  # fmt: skip
    row |= {"trained_rank": None, "trained_low": None, "trained_high": None, "trained_largest": None, "own_rank": None}
    row |= {"trained_excess": None, "trained_spread": None}
    if trained is not None and trained.ranks:
        ends = trained.sufficient
        row |= {
            "trained_rank": ends.rank, "trained_low": ends.low, "trained_high": ends.high, "own_rank": trained.own.rank,
            "trained_largest": trained.ranks[-1], "trained_excess": float(trained.excess[-1]),
            "trained_spread": float(np.max(trained.spread)),
        }  # fmt: skip
    row |= {"functional_rank": None, "functional_low": None, "functional_high": None, "functional_largest": None}
    if functional is not None:
        row |= {
            "functional_rank": functional["functional_rank"], "functional_low": functional["low"],
            "functional_high": functional["high"], "functional_largest": functional["largest_rank"],
        }  # fmt: skip
    decided = rows[rows["decidable_r90"]] if len(rows) else rows
    enough = len(decided) * 2 >= max(1, len(rows))
    row |= {
        f"r90_{end}": float(decided[f"r90_{end}"].median(skipna=False)) if enough and len(decided) else float("nan")
        for end in ("low", "high")
    }
    return {column: row[column] for column in HYPOTHESIS}


def _matrices(name: str, spectrum: Result | None) -> pd.DataFrame:
    """The rows of the spectrum's table that belong to a group."""
    if spectrum is None:
        return pd.DataFrame(columns=["break_even_rank", "decidable_r90", "r90_low", "r90_high"])
    table = spectrum.table
    shown = labels(table["stack"], table["layer_type"])
    places = zip(shown, table["layer_type"], table["name"], strict=True)
    return table[[in_group(name, *one) for one in places]]


def _functional_row(name: str, evaluation: Evaluation | None) -> Mapping[str, Any] | None:
    if evaluation is None:
        return None
    table = evaluation.functional
    found = table[(table["group"] == name) & (table["how"] == "alone")]
    return None if found.empty else dict(found.iloc[0])


def gained(evaluation: Evaluation) -> bool:
    """Whether the tuned model is better than the base on the text, with the whole 95 % interval of the difference."""
    return bool(evaluation.row("base")["excess_low"] > 0)


def _trained(found: "Trained | None", limit: float) -> Said:
    if found is None:
        return Said(missing=("LoRA trained on it alone",))
    if found.full.outcome == "diverged":
        return Said(missing=(FULL_FAILED["diverged"],))
    failed = [f"r={rank} {'diverged' if how == 'diverged' else 'gained nothing'}" for rank, how in found.failed.items()]
    if not found.ranks:
        how = "diverged" if "diverged" in found.failed.values() or not failed else "no gain"
        return Said(evidence=", ".join(failed), missing=(LORA_FAILED[how],))
    largest, ends, n_seeds = found.ranks[-1], found.sufficient, len(found.full.seeds)
    between = interval_word(_na(ends.low), _na(ends.high), largest)
    seeds, allowed = count(n_seeds, "seed"), number(found.full.tolerance)
    told = f"as good as full from r={rank_word(_na(ends.rank), largest)} on ({between}, {seeds}, within {allowed})"
    if ends.rank is None:
        told = f"at r={largest} still {number(float(found.excess[-1]))} above full (allowed {allowed}, {seeds})"
    told = ", ".join([told, *failed])
    if found.full.outcome == "no gain":
        return Said(evidence=told, missing=(FULL_FAILED["no gain"],))
    if n_seeds < 2:
        return Said(evidence=told, missing=("a second seed",))
    if ends.high is not None and ends.high <= limit:
        return Said(f"low-rank at r={ends.high}", told)
    if found.levelled_off and ends.rank is None:
        return Said(evidence=f"{told}, levelled off at r={found.own.high}")
    if ends.low is None and largest > limit:
        return Said("not low-rank", told)
    if ends.high is None:
        return Said(evidence=told, missing=(f"LoRA above rank {largest}",))
    if ends.low is not None and ends.low > limit:
        return Said("not low-rank", told)
    tried = f"LoRA at more ranks from {ends.low} to {ends.high}, more seeds or held-out text"
    return Said(evidence=told, missing=(tried,))


def _functional(row: Mapping[str, Any] | None, limit: float) -> Said:
    if row is None:
        return Said(missing=("the loss of its truncated update",))
    low, high, largest = row["low"], row["high"], row["largest_rank"]
    told = (
        f"truncated to r={rank_word(row['functional_rank'], largest)} it costs at most "
        f"{number(row['tolerance_nats'])} nats (r {interval_word(low, high, largest)})"
    )
    if not pd.isna(high) and high <= limit and low == 0:
        hardly = "does not need it" if high == 0 else "hardly needs it"
        return Said(evidence=f"{told}: this text {hardly}", missing=("text on which this update matters",))
    if not pd.isna(high) and high <= limit:
        return Said(f"low-rank at r={high}", told)
    if (largest if pd.isna(low) else low) > limit:
        return Said("not low-rank", told)
    if pd.isna(high):
        return Said(evidence=told, missing=(f"its loss at ranks above {largest}",))
    return Said(evidence=told, missing=(f"its loss at more ranks from {low} to {high}, or more held-out text",))


def _spectral(name: str, spectrum: Result | None, functional: Mapping[str, Any] | None) -> Said:
    if spectrum is None:
        return Said()
    rows = _matrices(name, spectrum)
    if rows.empty or not spectrum.facts.get("related", True):
        return Said()
    verdict, evidence = spectral_verdict(rows)
    if verdict.startswith(UNDECIDABLE):
        return Said(evidence=f"{verdict}, {evidence}", missing=("a spectrum that decides",))
    rank, short = named_rank(verdict), 0
    if functional is not None:
        short = functional["largest_rank"] + 1 if pd.isna(functional["low"]) else int(functional["low"])
    if rank is not None and rank < short:  # most of the update's energy, but not what the loss needs of it
        return Said(evidence=f"{evidence}: r={rank} holds the energy, and falls short in loss")
    return Said(verdict, evidence)


def _na(value: int | None) -> Any:
    return pd.NA if value is None else value


@dataclass(frozen=True)
class Recommendation:
    """The adapter to train: the fewest parameters within the tolerance of the best adapter's loss.

    loss: its mean held-out loss; against_full: minus the full fine-tune's, NaN where that diverged. n_trained:
    parameters. share: of the full fine-tune's gain over the base, NaN where that gained nothing.
    """

    variant: str
    rank: int
    targets: str
    alpha: float
    lr: float
    n_trained: int
    loss: float
    against_full: float
    share: float

    @property
    def good_enough(self) -> bool:
        """Whether it reaches half of what the full fine-tune gains, as far as that is known."""
        return not self.share < GOOD_ENOUGH

    def lora_config(self, modules: Sequence[str]) -> str:
        """The `LoraConfig` as Python; modules: the last names of what is adapted, such as q_proj."""
        target = '"all-linear"' if self.targets == "all-linear" else repr(sorted(modules)).replace("'", '"')
        extra = {"rslora": ", use_rslora=True", "dora": ", use_dora=True", "pissa": ', init_lora_weights="pissa"'}
        return (
            f'LoraConfig(task_type="CAUSAL_LM", r={self.rank}, lora_alpha={self.alpha:g}, target_modules={target}'
            f"{extra.get(self.variant, '')})"
        )


def recommend(runs: pd.DataFrame, trained: Sequence["Trained"], base: float) -> Recommendation | None:
    """The smallest adapter whose mean loss over seeds is within the tolerance of the best one's; None where none gains.

    runs: rows with method, targets, rank, alpha, lr, n_trained, loss, diverged; base: the base's loss. A rank counts
    where none of its runs diverged.
    """
    adapters = runs[runs["method"] != "full"]
    if not trained:
        return None
    keys = ["method", "targets", "rank"]
    sound = adapters[~adapters.groupby(keys)["diverged"].transform("any").astype(bool)]
    if sound.empty:
        return None
    means = sound.groupby(keys, sort=False)[["alpha", "lr", "n_trained", "loss"]].mean().reset_index()
    means = means[means["loss"] < base]
    if means.empty:
        return None
    full = trained[0].full
    good = means[means["loss"] <= means["loss"].min() + full.tolerance]
    best = good.sort_values(["n_trained", "loss"]).iloc[0]
    reached = base - float(best["loss"])
    return Recommendation(
        str(best["method"]), int(best["rank"]), str(best["targets"]), float(best["alpha"]), float(best["lr"]),
        int(best["n_trained"]), float(best["loss"]), full.gain - reached,
        reached / full.gain if full.outcome == "gained" else math.nan,
    )  # fmt: skip
