"""The finished matrices of one pair → `Result`: table, ledger, facts, findings. What of `spectra` needs pandas."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.columns import LEDGER, TABLE
from lowrank_probe.kinds import UNRELATED, recognise
from lowrank_probe.layers import sort_key
from lowrank_probe.ledger import complete_ledger, join_parts, ledger_line
from lowrank_probe.matching import Matching, Pair
from lowrank_probe.runs import TIMELINE, Result

if TYPE_CHECKING:
    from lowrank_probe.spectrum_work import Done


def assemble(
    matching: Matching, base: Checkpoint | None, tuned: Checkpoint, finished: Mapping[str, "Done"],
    known: Mapping[str, Any], headers_s: float,
) -> Result:  # fmt: skip
    """The table, ledger and facts of what is finished. known: the facts of the run so far."""
    done = [finished[pair.key] for pair in matching.pairs if pair.key in finished]
    rows = [item.row for item in done if item.row is not None]
    table = pd.DataFrame(sorted(rows, key=_position), columns=list(TABLE))
    table["layer"] = table["layer"].astype("Int64")
    for column in ("decidable_signal_rank", "decidable_r50", "decidable_r90"):
        table[column] = table[column].astype(bool)
    lines = [(item.pair, item.line) for item in done] + matching.excluded
    lines += [
        (pair, ledger_line(pair, "pending", "interrupted before it"))
        for pair in matching.pairs
        if pair.key not in finished
    ]
    place_in_file = {name: i for i, name in enumerate([*(base.tensors if base else ()), *tuned.tensors])}

    def position(line: dict[str, Any]) -> int:
        return place_in_file[line["name"] if line["name"] in place_in_file else line["tuned_name"]]

    ordered = sorted([*matching.ledger, *join_parts(lines)], key=position)
    ledger = pd.DataFrame(complete_ledger(ordered, base, tuned), columns=list(LEDGER))
    ledger["layer"] = pd.to_numeric(ledger["layer"]).astype("Int64")
    facts = dict(known)
    facts["counts"] = {str(status): int(count) for status, count in ledger["status"].value_counts().items()}
    # A frozen matrix has cosine 1: a new head on an untouched body is a fine-tune.
    cosines = table["cosine"].dropna().to_list()
    cosines += [1.0 for item in done if item.line["status"] == "unchanged" and _is_matrix(item.pair, base)]
    cosine = float(np.median(cosines)) if cosines else math.nan
    facts["median_cosine"] = cosine
    # −W has cosine −1 and is related.
    facts["related"] = not cosines or float(np.median(np.abs(cosines))) >= UNRELATED
    if not facts["related"]:
        facts["warnings"] = [
            f"unrelated checkpoints: the median cosine of their weights is {cosine:+.3f}, so that their difference "
            "is no fine-tuning update"
        ]
    facts["seconds"] = {"headers": headers_s} | {
        phase: sum(stop - start for item in done for name, start, stop in item.times if name == phase)
        for phase in ("read", "spectrum", "noise")
    }
    timeline = pd.DataFrame(
        [(item.pair.key, *times) for item in done for times in item.times],
        columns=list(TIMELINE),
    )
    by_name = list(table["name"])
    found = Result(
        table, ledger,
        {name: values for name in by_name if (values := finished[name].values) is not None},
        {name: values for name in by_name if (values := finished[name].denoised) is not None}, facts,
        timeline.sort_values("start_s", ignore_index=True),
    )  # fmt: skip
    facts["findings"] = [asdict(finding) for finding in recognise(found)]
    return found


def _is_matrix(pair: Pair, base: Checkpoint | None) -> bool:
    info = base.tensors.get(pair.name) if base is not None else None
    return info is not None and len(info.shape) == 2


def _position(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """As data flows: embeddings, the blocks layer by layer, then what comes after them."""
    kind = sort_key(row["layer_type"])
    if pd.isna(row["layer"]):
        return (row["stack"], 2 if kind > sort_key("q") else 0, 0, kind)
    return (row["stack"], 1, int(row["layer"]), kind)
