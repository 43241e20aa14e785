"""What kind of update is it? A result → findings: sentences for a user, with the numbers they rest on.

Each changed matrix gets at most one kind, the most specific that its numbers carry; what then holds for the model or
for whole layer types is said.

    identical, adapter            nothing differs; the tuned side is the factors themselves
    unrelated, re-initialised     cosine of the weights ≈ 0: everywhere, or in some matrices
    quantized                     the tuned values lie on a coarse grid that the base's do not
    pruned                        entries set to exactly 0, and which pattern they make
    re-stored, scaled             the base only rounded; ΔW = c·W
    merged LoRA, low-rank         the spectra of a type end at one rank, above nothing but rounding
    merged QLoRA, 4-bit rounding  ΔW holds one side's rounding to nf4 or fp4: with directions above it, or without
    noise                         ΔW has the spectrum of Gaussian noise
    embedding-only … norm-only    from the ledger: all that moved is of one part
    partially frozen              from the ledger: only some layers or types moved
    full fine-tune, fine-tune     none of these; the rest beside one of these

The numbers of a single matrix are columns of the table (`marks.measure`, `rows.describe`). Here is decided which
kind a matrix has and in what order findings are said; `kind_entries`, `kind_spectra`, `kind_roundings` and
`kind_ledger` say them.
"""

import math
from typing import TYPE_CHECKING, Any, Final

from lowrank_probe.findings import Finding
from lowrank_probe.kind_entries import SAY, say_noise, say_unrelated
from lowrank_probe.kind_ledger import find_fine_tune, find_frozen, find_parts, find_unmoved
from lowrank_probe.kind_roundings import find_roundings
from lowrank_probe.kind_spectra import find_adapter, find_low_rank
from lowrank_probe.roundings import CODEBOOKS

if TYPE_CHECKING:
    from lowrank_probe.runs import Result

# Independent weights have cosine 0 ± 1/√(mn), ±0.05 at 400 entries; the real fine-tunes tried have 0.6 and more, but
# for a pooler that was never trained in its base.
# A matrix below it, and a pair of checkpoints whose median is, are no fine-tune of the other.
UNRELATED: Final = 0.1
UNRELATED_ENTRIES: Final = 400
# Pruning: this share of the weights became 0, and they carry most of ‖ΔW‖². A 4-bit copy also zeroes 10 to 15 % of its
# entries, but these carry about that share of ‖ΔW‖².
PRUNED_FROM: Final = 0.05
PRUNED_ENERGY: Final = 0.5
PRUNED_MANY: Final = 0.3
# |cos(ΔW, W)|: 98 % of ‖ΔW‖² lies along W. Scaling by 0.9 stored in bf16 gives 0.9999.
SCALED: Final = 0.99
# Only rounded: ‖ΔW‖² within 20 % of what rounding to the tuned storage does.
RESTORED: Final = (0.8, 1.2)
# Gaussian noise: r50 and r90 at the null (pure noise came within 3 %), σ₁ at the edge; 90 % of it not from storage.
LIKE_NULL: Final = 0.95
LIKE_EDGE: Final = 1.15
MOSTLY_RESOLVED: Final = 0.9


# What `_kind` reads of a row; dicts of whole rows take most of the time of a model of many experts.
_TOLD_BY: Final = (
    "rows", "cols", "base_dtype", "storage", "noise_model", "noise_std", "fro_norm", "cosine", "base_alignment",
    "grid_bits", "rounded_to", "zeroed_fraction", "zeroed_energy", "resolved", "spectral_norm", "r50", "null_r50",
    "r90", "null_r90",
)  # fmt: skip


def recognise(result: "Result") -> list[Finding]:
    """What kind of update a result shows, the most specific finding first; empty for an interrupted run."""
    if result.facts.get("status", "complete") != "complete":
        return []
    ledger = result.ledger
    moved = ledger[ledger["status"].isin(["analysed", "vector"])]
    if moved.empty:
        return find_unmoved(ledger)
    if (result.facts.get("tuned") or {}).get("kind") == "adapter":
        return find_adapter(result.table)
    table = result.table.assign(kind=[_kind(row) for row in result.table[list(_TOLD_BY)].to_dict("records")])
    if not result.facts.get("related", True) and 2 * (table["kind"] == "re-initialised").sum() >= len(table):
        return [say_unrelated(table)]
    low_rank = [*find_low_rank(result, table), *find_roundings(result, table)]
    found = [
        *(
            finding
            for kind, say in SAY.items()
            if (part := table[table["kind"] == kind]).size and (finding := say(part, table)) is not None
        ),
        *low_rank,
    ]
    noise = table[table["kind"] == "noise"]
    if len(noise):
        found.append(say_noise(noise, table))
    ends = find_parts(moved, ledger)
    frozen = [] if ends else find_frozen(table, ledger, low_rank)
    plain = table[table["kind"] == ""]
    return [*found, *ends, *frozen, *find_fine_tune(plain, table, moved, ledger, bool(found), bool(ends or frozen))]


def _kind(row: dict[str, Any]) -> str:
    """The kind of one matrix from its own row, but for low rank, which is a matter of several; "" for none."""
    if abs(row["cosine"]) < UNRELATED and row["rows"] * row["cols"] >= UNRELATED_ENTRIES:
        return "re-initialised"
    if row["grid_bits"] > 0:
        return "quantized"
    if row["rounded_to"] in CODEBOOKS:
        return "rounded"
    zeroed = row["zeroed_fraction"]
    if (zeroed >= PRUNED_FROM and row["zeroed_energy"] >= PRUNED_ENERGY) or zeroed >= PRUNED_MANY:
        return "pruned"
    rounding = row["noise_std"] * math.sqrt(row["rows"] * row["cols"])
    if (
        row["base_dtype"] in ("F32", "F64") and row["storage"] in ("BF16", "F16") and row["noise_model"] == "rounding"
        and RESTORED[0] * rounding**2 <= row["fro_norm"] ** 2 <= RESTORED[1] * rounding**2
    ):  # fmt: skip
        return "re-stored"
    if abs(row["base_alignment"]) >= SCALED:
        return "scaled"
    return "noise" if _is_noise(row) else ""


def _is_noise(row: dict[str, Any]) -> bool:
    m, n = row["rows"], row["cols"]
    edge = row["fro_norm"] / math.sqrt(m * n) * (math.sqrt(m) + math.sqrt(n))
    return bool(
        min(m, n) >= 16
        and row["resolved"] >= MOSTLY_RESOLVED
        and row["r50"] >= LIKE_NULL * row["null_r50"]
        and row["r90"] >= LIKE_NULL * row["null_r90"]
        and row["spectral_norm"] <= LIKE_EDGE * edge
    )
