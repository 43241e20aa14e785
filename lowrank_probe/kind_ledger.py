"""Findings that rest on the ledger: nothing moved, only some parts, layers or types moved; the rest is a fine-tune."""

import re
from collections.abc import Sequence
from typing import Any, Final

import pandas as pd

from lowrank_probe.findings import Finding, listed, percent, spans_of, types_of, where
from lowrank_probe.layers import sort_key

_EMBEDDINGS: Final = ("embedding", "position_embedding", "token_type_embedding")
_NORM: Final = re.compile(r"norm|(?:^|[._])ln(?:[._]|\d|$)", re.IGNORECASE)
_HEAD: Final = re.compile(r"(?:^|\.)(?:lm_head|classifier|score|cls|head|qa_outputs|predictions|embed_out)(?:\.|$)")


def find_unmoved(ledger: pd.DataFrame) -> list[Finding]:
    """Identical, or identical but for a new head."""
    compared = int(ledger["status"].isin(["unchanged", "tied"]).sum())
    if not compared:
        return []
    new = ledger[ledger["status"].isin(["only in tuned", "shape differs"])]
    evidence = {"n_unchanged": compared, "n_only_in_tuned": len(new)}
    if len(new) and all(_HEAD.search(str(name)) for name in new["tuned_name"]):
        names = listed(new["tuned_name"])
        say = f"A new head on the base as it was: all {compared} shared tensors are identical; new are {names}."
        return [Finding("head-only", say, evidence, tuple(new["tuned_name"]))]
    beside = f"; {len(new)} more are only in the tuned side or of another shape" if len(new) else ""
    return [Finding("identical", f"The two are identical in all {compared} tensors compared{beside}.", evidence)]


def find_parts(moved: pd.DataFrame, ledger: pd.DataFrame) -> list[Finding]:
    """Embedding-only, head-only, norm-only, bias-only: all that moved is of one part, and something else did not."""
    still = ledger[ledger["status"] == "unchanged"]
    if still.empty:
        return []
    parts = {_part(line) for line in moved.to_dict("records")}
    names = {
        frozenset({"embedding"}): ("embedding-only", "the embeddings"),
        frozenset({"head"}): ("head-only", "the head"),
        frozenset({"embedding", "head"}): ("embedding-only", "the embeddings and the head"),
        frozenset({"norm"}): ("norm-only", "the norms"),
        frozenset({"norm", "bias"}): ("vectors-only", "norms and biases"),
    }
    found = names.get(frozenset(parts))
    if all(str(name).endswith("bias") for name in moved["name"]):
        found = ("bias-only", "the biases")
    if found is None or any(_part(line) in parts for line in still.to_dict("records") if found[0] == "vectors-only"):
        return []
    kind, what = found
    size = float(moved["relative_update"].median())
    say = (
        f"Only {what} moved: {len(moved)} tensors (median {percent(size)} of their norm); the other {len(still)} are "
        "identical."
    )
    evidence = {"n_moved": len(moved), "n_unchanged": len(still), "relative_update": size}
    return [Finding(kind, say, evidence, tuple(sorted(set(moved["layer_type"]), key=sort_key)))]


def _part(line: dict[str, Any]) -> str:
    name, vector = str(line["name"]), line["status"] == "vector" or "×" not in str(line["base_shape"])
    if line["layer_type"] in _EMBEDDINGS and not vector:
        return "embedding"
    if _HEAD.search(name) or line["layer_type"] == "lm_head":
        return "head"
    if vector and _NORM.search(name):
        return "norm"
    return "bias" if vector and name.endswith("bias") else "other"


def find_frozen(table: pd.DataFrame, ledger: pd.DataFrame, low_rank: Sequence[Finding]) -> list[Finding]:
    """Which layers, or which types, are all that moved among the matrices."""
    matrices = ledger[
        ledger["base_shape"].astype(str).str.contains("×") & ledger["status"].isin(["analysed", "unchanged"])
    ]
    moved = matrices["status"] == "analysed"
    if moved.all() or not moved.any():
        return []
    evidence = {
        "n_moved": int(moved.sum()), "n_matrices": len(matrices),
        "relative_update": float(table["relative_update"].median()),
    }  # fmt: skip
    by_type = moved.groupby(matrices["layer_type"]).mean()
    if by_type.isin([0, 1]).all():
        types, frozen = types_of(by_type.index[by_type == 1]), types_of(by_type.index[by_type == 0])
        if set(types) == {name for finding in low_rank for name in finding.scope}:
            return []  # the adapter's targets say it
        say = f"Partially frozen: only {listed(types, 12)} moved; {listed(frozen, 12)} are identical."
        return [Finding("partially frozen", say, evidence, types)]
    layers = matrices["layer"].notna()
    by_layer = moved[layers].groupby(matrices["layer"][layers].astype(int)).mean()
    if len(by_layer) and by_layer.isin([0, 1]).all() and not by_layer.eq(1).all():
        span = spans_of([int(layer) for layer in by_layer.index[by_layer == 1]])
        outside = moved[~layers]
        besides = ""
        if len(outside):
            of = matrices["layer_type"][~layers]
            besides = "".join(
                f"; {listed(types_of(set(of[outside == state])), 12)} {word}"
                for state, word in ((True, "moved too"), (False, "identical"))
                if (outside == state).any()
            )
        inside = f"layers {span} of {len(by_layer)}" if span else "what is outside the blocks"
        say = f"Partially frozen: only {inside} moved{besides}."
        return [Finding("partially frozen", say, evidence, (f"layers {span}",) if span else ())]
    say = f"Partially frozen: {evidence['n_moved']} of {len(matrices)} matrices moved, the others are identical."
    return [Finding("partially frozen", say, evidence, tuple(matrices["name"][moved]))]


def find_fine_tune(
    plain: pd.DataFrame, table: pd.DataFrame, moved: pd.DataFrame, ledger: pd.DataFrame, special: bool, partial: bool
) -> list[Finding]:
    """The default: what moved without a structure of its own."""
    if plain.empty or (partial and not special):
        return []
    sizes = plain.groupby("layer_type")["relative_update"].median().dropna()
    size = float(plain["relative_update"].median())
    evidence: dict[str, Any] = {"relative_update": size, "n_matrices": len(plain)}
    spread = ""
    if len(sizes) > 1:
        most, least = str(sizes.idxmax()), str(sizes.idxmin())
        spread = f", most in {most} ({percent(float(sizes.max()))}), least in {least} ({percent(float(sizes.min()))})"
    # That of r90, which is storage alone: the signal rank's also asks whether --top reached its end.
    hidden = 2 * int(plain["decidable_r90"].astype(bool).sum()) < len(plain)
    if special:
        say = f"The rest, {where(plain, table)}, moved as in plain fine-tuning: {percent(size)} of ‖W‖{spread}."
        return [Finding("fine-tune", say, evidence, types_of(plain["layer_type"]))]
    n_matrices = len(table) + int(
        (ledger["status"].eq("unchanged") & ledger["base_shape"].astype(str).str.contains("×")).sum()
    )
    what = f"all {len(plain)}" if len(plain) == n_matrices else f"{len(plain)} of {n_matrices}"
    say = f"A full fine-tune: {what} matrices moved, by {percent(size)} of ‖W‖ (median{spread})"
    kept = int(plain["n_kept"].max())
    if hidden:
        say += "; storage rounding hides any finer structure."
    elif (plain["n_kept"] < plain[["rows", "cols"]].min(axis=1)).any():
        say += (
            f". The {kept} largest singular values show no structure of a simpler kind of update, but a merged LoRA of "
            "that rank or more could not be told by them."
        )
    else:
        say += ", with no structure of a simpler kind of update."
    evidence["n_vectors_moved"] = int(moved["status"].eq("vector").sum())
    return [Finding("full fine-tune", say, evidence, types_of(plain["layer_type"]))]
