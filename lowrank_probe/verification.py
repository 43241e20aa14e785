"""Does an adapter do what it is for: base + adapter against the tuned model; the result, the rule, and the verbs.

`text_checks` runs the models, `weight_checks` compares weights where that is not possible.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pandas as pd
import torch

from lowrank_probe.extraction_runs import FOLDER
from lowrank_probe.outputs import write_directory
from lowrank_probe.remote_files import refuse_addresses
from lowrank_probe.strict_json import SCHEMA_VERSION, plain

if TYPE_CHECKING:
    from lowrank_probe.extraction_runs import Extraction

# The share of the base's own distance by which merged and unmerged may differ.
ALLOWED_SHARE: Final = 0.02
ROWS: Final = ("base", "base+adapter", "base+adapter merged")


@dataclass(frozen=True)
class Verification:
    """How far base, base+adapter and base+adapter merged are from the tuned model, and whether the check held.

    table: one row a model. measure "logits": kl_nats (mean KL(tuned ‖ model) a token), top1_agreement,
    mean_abs_logit_error, n_tokens; "hidden states": cosine, relative_error, n_tokens; "weights": relative_error
    = ‖W − W_tuned‖ / ‖ΔW‖ over the adapted matrices, n_matrices. The rule rests on the distance (mean_abs_logit_error,
    relative_error): merged_gap is that between merged and unmerged; storage_rounding is measured too, as that between
    the model merged in float32 and the same with its merged weights rounded to `storage`, and is at least 1e-5 of the
    outputs (float32 arithmetic); tolerance = 0.02·(the base's distance) + storage_rounding. Of a merge, merged_gap is
    that between base+adapter and the merged checkpoint.
    problems: what did not hold, one line each; notes: what a reader should know. matrices: one row an adapted matrix,
    where weights were compared.
    """

    measure: str
    table: pd.DataFrame
    merged_gap: float
    storage: str
    storage_rounding: float
    tolerance: float
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    matrices: pd.DataFrame | None = None

    @property
    def ok(self) -> bool:
        """Whether everything that was checked held."""
        return not self.problems

    def facts(self) -> dict[str, Any]:
        """All but `matrices` as JSON's own types; NaN and ∞ become None."""
        told: dict[str, Any] = plain({
            "ok": self.ok, "measure": self.measure, "table": self.table.reset_index().to_dict("records"),
            "merged_gap": self.merged_gap, "storage": self.storage, "storage_rounding": self.storage_rounding,
            "tolerance": self.tolerance, "problems": list(self.problems), "notes": list(self.notes),
        })  # fmt: skip
        return told

    def to_json(self) -> str:
        """One JSON object with `schema_version`; NaN and ∞ become null."""
        matrices = None if self.matrices is None else self.matrices.to_dict("records")
        payload = {"schema_version": SCHEMA_VERSION, **self.facts(), "matrices": plain(matrices)}
        return json.dumps(payload, ensure_ascii=False)


def verify(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    texts: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    *,
    expected: Mapping[str, float] | None = None,
) -> Verification:
    """base + adapter through peft against the tuned model on `texts` (None: the built-in prompts).

    At most 64 texts of at most 256 tokens, one at a time, in float32. The class is the base's own; what has a head with
    logits on both sides is compared by them, anything else by its last hidden states. Where transformers cannot load or
    run the pair the weights are compared, with `expected` (base tensor → ‖ΔW − BA‖/‖ΔW‖ that the ledger states).

    Raises `ProbeError` where peft cannot load the adapter, where no text gives a token, and for NaN outputs.
    """
    adapters = [(Path(adapter), 1.0)]
    refuse_addresses(base, tuned, adapter)
    return _verify(Path(base), Path(tuned), adapters, texts, torch.device(device), expected)


def verify_merge(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    merged: str | os.PathLike[str],
    texts: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Verification:
    """base + Σ weight·adapter through peft against the merged checkpoint on disk, which takes the tuned model's place.

    As `verify`, and a problem too where base+adapter is farther from it than the tolerance.
    """
    weighted = [(Path(adapter), float(weight)) for adapter, weight in adapters]
    refuse_addresses(base, merged)
    return _verify(Path(base), Path(merged), weighted, texts, torch.device(device), None, equal=True)


def verify_extraction(
    found: "Extraction", texts: Sequence[str] | None = None
) -> tuple["Extraction", dict[str, Verification]]:
    """Every adapter of an extraction by `verify`: (the extraction whose facts have what was found, label → that).

    Written as `probe/verification[-LABEL].json`, and the model cards, report and facts anew, which tell it too.
    Raises as `verify`, and `OutputError`.
    """
    where, checks = found.facts["device"]["type"], {}
    base, tuned = (found.facts[side]["path"] for side in ("base", "tuned"))  # of a hub id, the files it was taken from
    for label, directory in found.adapters.items():
        rows = found.ledger[(found.ledger["adapter"] == label) & (found.ledger["status"] == "adapted")]
        expected = dict(zip(rows["name"] + ".weight", rows["relative_error"], strict=True))
        checks[label] = check = verify(base, tuned, directory, texts, where, expected=expected)
        name = f"verification{'-' + label if label else ''}.json"
        write_directory(found.directory / FOLDER, {name: partial(Path.write_text, data=check.to_json() + "\n")})
    told = replace(found, facts=found.facts | {"verification": {label: one.facts() for label, one in checks.items()}})
    told.write()
    return told, checks


def _verify(
    base: Path, tuned: Path, adapters: Sequence[tuple[Path, float]], texts: Sequence[str] | None, device: torch.device,
    expected: Mapping[str, float] | None, equal: bool = False,
) -> Verification:  # fmt: skip
    from lowrank_probe.running_models import CannotRun
    from lowrank_probe.text_checks import compare_outputs
    from lowrank_probe.weight_checks import compare_weights

    try:
        return compare_outputs(base, tuned, adapters, texts, device, equal)
    except CannotRun as reason:
        return compare_weights(base, tuned, adapters, device, expected, str(reason), equal)


def broken_rules(gap: float, tolerance: float, equal: bool) -> list[str]:
    """One line where `merged_gap` is more than allowed; `equal`: the tuned side is the merged checkpoint."""
    if gap <= tolerance:
        return []
    what = "the merged checkpoint and base+adapter" if equal else "merged and unmerged"
    why = "" if equal else "; tied weights that are adapted at one end do that"
    return [
        f"{what} differ by {gap:.3g}, more than {tolerance:.3g} (2 % of the base's distance from the tuned side, and "
        f"storage rounding){why}"
    ]
