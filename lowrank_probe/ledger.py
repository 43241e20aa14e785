"""The coverage ledger: every tensor of both sides ends in exactly one line, so that nothing vanishes."""

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.layers import place

if TYPE_CHECKING:
    from lowrank_probe.matching import Pair


def tensor_line(name: str, tuned_name: str, status: str, note: str = "") -> dict[str, Any]:
    """A ledger line for a tensor that is not compared; one of the two names may be "".

    Shapes and dtypes are filled in by `complete_ledger`.
    """
    known = name or tuned_name
    where = place(known)
    return {
        "name": known, "tuned_name": tuned_name, "status": status, "layer_type": where.layer_type,
        "layer": where.layer, "fro_norm": math.nan, "relative_update": math.nan, "note": note,
    }  # fmt: skip


def ledger_line(
    pair: "Pair", status: str, note: str = "", fro_norm: float = math.nan, relative: float = math.nan
) -> dict[str, Any]:
    """A ledger line for a pair; shapes and dtypes are filled in by `complete_ledger`, parts joined by `join_parts`."""
    return {
        "name": pair.name, "tuned_name": pair.tuned_name, "status": status, "layer_type": pair.place.layer_type,
        "layer": pair.place.layer, "fro_norm": fro_norm, "relative_update": relative, "note": note,
    }  # fmt: skip


def join_parts(lines: list[tuple["Pair", dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line a stored tensor from the lines of the matrices inside it: norms joined, and how many of each status."""
    grouped: dict[tuple[str, str], list[tuple[Pair, dict[str, Any]]]] = {}
    for pair, line in lines:
        grouped.setdefault((pair.name, pair.tuned_name), []).append((pair, line))
    joined = []
    for members in grouped.values():
        pair, line = members[0]
        if len(members) > 1:
            counts = Counter(part["status"] for _, part in members)
            status = "analysed" if "analysed" in counts else counts.most_common(1)[0][0]
            told = [f"{n} {word}" for word, n in sorted(counts.items())] if len(counts) > 1 else []
            square = sum(part["fro_norm"] ** 2 for _, part in members if part["fro_norm"] > 0)
            base = sum((p["fro_norm"] / p["relative_update"]) ** 2 for _, p in members if p["relative_update"] > 0)
            known = any(not math.isnan(part["fro_norm"]) for _, part in members)
            line = ledger_line(
                pair, status, "; ".join([pair.note, *told]), math.sqrt(square) if known else math.nan,
                math.sqrt(square / base) if base > 0 else 0.0 if known else math.nan,
            ) | {"layer_type": place(pair.name).layer_type}  # fmt: skip
        elif pair.note and not line["note"].startswith(pair.note):
            line = line | {"note": "; ".join(filter(None, (pair.note, line["note"])))}
        joined.append(line)
    return joined


def complete_ledger(lines: list[dict[str, Any]], base: Checkpoint | None, tuned: Checkpoint) -> list[dict[str, Any]]:
    """Add shapes and dtypes from the headers to every line."""
    for line in lines:
        a = base.tensors.get(line["name"]) if base else None
        b = tuned.tensors.get(line["tuned_name"])
        line["base_shape"], line["base_dtype"] = (_shape(a.shape), a.dtype) if a else ("", "")
        line["tuned_shape"], line["tuned_dtype"] = (_shape(b.shape), b.dtype) if b else ("", "")
    return lines


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
