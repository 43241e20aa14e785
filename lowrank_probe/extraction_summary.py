"""The ledger and curves of an extraction by layer type: tables to tables, pandas only.

Legend: r rank. Everything is weighted by ‖ΔW‖_F², as squares add up: a type's error is that of its matrices as one.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lowrank_probe.columns import EXTRACTION_SUMMARY
from lowrank_probe.layers import labels, place, sort_key
from lowrank_probe.metrics import Values

ALL: Final = "all"
_ERRORS: Final = ("relative_error", "optimal_error_low", "optimal_error_high")
_SUMMED: Final = ("status", "share", "rank", "energy", "fro_norm", "parameters", *_ERRORS)


def summarise_extraction(ledger: pd.DataFrame) -> pd.DataFrame:
    """One row an adapter and layer type, columns as `columns.EXTRACTION_SUMMARY`; types in the order the data flows."""
    return _summary(ledger, types_of(ledger))


def extraction_totals(ledger: pd.DataFrame) -> pd.DataFrame:
    """The same with one row an adapter, its layer type "all"."""
    return _summary(ledger, pd.Series(ALL, index=ledger.index))


def adapter_facts(ledger: pd.DataFrame, label: str) -> dict[str, Any]:
    """Of one adapter: parameters in all, and the shares of ‖ΔW‖_F² that base + adapter carries and leaves out.

    kept_of_adapted: the share that the factors keep of what LoRA adapts.
    """
    own = ledger[ledger["adapter"] == label]
    total = extraction_totals(own).to_dict("records")[0]
    return {
        "n_adapted": total["n_adapted"], "n_parameters": int(own["parameters"].sum()),
        "carried": total["carried"] + total["carried_whole"], "kept_of_adapted": total["energy"],
        "not_carried": total["not_carried"],
    }  # fmt: skip


def types_of(ledger: pd.DataFrame) -> "pd.Series[str]":
    """Each row's layer type as shown; of what LoRA does not adapt, from its name."""
    adapted = (ledger["kind"] != "").to_numpy()
    found = [place(name) for name in ledger["name"]]
    stack = np.where(adapted, ledger["stack"], [where.stack for where in found])
    kind = np.where(adapted, ledger["layer_type"], [where.layer_type for where in found])
    return pd.Series(labels(stack, kind), index=ledger.index, dtype=object)


def error_curves(curves: pd.DataFrame) -> Iterator[tuple[str, Values, Values, Values]]:
    """(layer type, ranks, stored error, error that no matrix of that rank is below), of each type.

    The error is √(Σ‖ΔW − BA‖² / Σ‖ΔW‖²) with every matrix at rank r, or at its own largest where that is smaller.
    """
    stack, kind = curves["stack"].fillna("").astype(str), curves["layer_type"].astype(str)
    by_type = pd.Series(labels(stack, kind), index=curves.index)
    for label in sorted(set(by_type), key=lambda label: sort_key(label.rpartition(" ")[2])):
        part = curves[by_type == label]
        weight = part.groupby("name", sort=False)["fro_norm"].first() ** 2
        kept, best = (part.pivot(index="name", columns="rank", values=column) for column in ("energy", "energy_upper"))
        most = part.groupby("name")["rank"].max().reindex(kept.index).to_numpy()
        ranks = kept.columns.to_numpy(dtype=np.int64)
        # A rank at which only some of the matrices were looked at, though the others reach beyond it, has no sum.
        whole = (kept.notna().to_numpy() | (ranks[None] > most[:, None])).all(axis=0)
        w = (weight / weight.sum()).reindex(kept.index).to_numpy()
        stored, optimum = (
            np.sqrt(np.maximum(1 - w @ frame.ffill(axis=1).to_numpy()[:, whole], 0.0)) for frame in (kept, best)
        )
        yield label, ranks[whole], stored, optimum


def _summary(ledger: pd.DataFrame, types: "pd.Series[str]") -> pd.DataFrame:
    rows = []
    order = sorted(set(types), key=lambda label: (sort_key(label.rpartition(" ")[2]), label))
    columns = {name: ledger[name].to_numpy() for name in _SUMMED}
    for adapter in dict.fromkeys(ledger["adapter"]):
        own = (ledger["adapter"] == adapter).to_numpy()
        for label in order:
            part = own & (types == label).to_numpy()
            if part.any():
                found = _numbers({name: values[part] for name, values in columns.items()})
                rows.append({"adapter": adapter, "layer_type": label} | found)
    return pd.DataFrame(rows, columns=list(EXTRACTION_SUMMARY))


def _numbers(part: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """In numpy: a few matrices a type, and a hundred types, are much work for pandas."""
    status, share = part["status"], part["share"].astype(float)
    adapted = status == "adapted"
    shares = {word: float(np.nansum(share[status == word])) for word in set(status)}
    rank, energy = part["rank"][adapted], part["energy"][adapted].astype(float)
    square = part["fro_norm"][adapted].astype(float) ** 2
    total = float(np.nansum(square)) or math.nan  # NaN where nothing is adapted
    kept = float(np.nansum(energy * share[adapted]))
    errors = {
        column: math.sqrt(float(np.nansum(part[column][adapted].astype(float) ** 2 * square)) / total)
        for column in _ERRORS
    }
    return {
        "n_adapted": len(rank), "rank_low": min(rank, default=math.nan), "rank_high": max(rank, default=math.nan),
        "parameters": int(np.nansum(part["parameters"][adapted].astype(float))),
        "energy": float(np.nansum(energy * square)) / total, **errors,
        "share": float(np.nansum(share)), "carried": kept, "truncated": shares.get("adapted", 0.0) - kept,
        "carried_whole": shares.get("carried whole", 0.0),
        "not_carried": shares.get("not carried", 0.0) + shares.get("rank 0", 0.0),
        "n_unknown": int(((status == "not carried") & np.isnan(share)).sum()),
    }  # fmt: skip
