"""What was tried with a calibration text and what `--verify` found, as tables of text, the same on the terminal, the
page and the card. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from lowrank_probe import words

_BASE: Final = "base alone"
_PLAIN: Final = "plain SVD"
_INTERVAL: Final = "95 %: of the difference to the plain SVD, over resampled documents"


class CheckTable(NamedTuple):
    """heads and rows of one width; the first `n_words` columns are words, the others numbers. line: what to add."""

    heads: list[str]
    rows: list[list[str]]
    n_words: int
    line: str


def calibration_table(told: Mapping[str, Any], labels: Sequence[str] = (), *, every: bool = True) -> CheckTable:
    """The base, then each way that was tried, with its distance from the fine-tune on both parts of the text, and the
    95 % interval of the difference to the plain SVD's, in per cent of that.

    told: `facts["calibration"]`. labels: of the adapters, where there are several. every: else plain and chosen only.
    """
    tried = [row for row in told["tried"] if not labels or row["adapter"] in labels]
    several = len({row["adapter"] for row in tried}) > 1
    order = list(dict.fromkeys(row["adapter"] for row in tried))
    plain = {row["adapter"]: row for row in tried if row["weighted_by"] == _PLAIN}
    rows = []
    for row in sorted(tried, key=lambda row: order.index(row["adapter"])):
        if every or row["chosen"] or row["weighted_by"] == _PLAIN:
            ridge, mark = row["ridge"].replace("inf", ""), "chosen" if row["chosen"] else ""
            rows.append([row["adapter"], row["weighted_by"], ridge, mark])
            rows[-1] += _distances(row, plain[row["adapter"]])
    rows.insert(0, ["", _BASE, "", "", *_distances(told["base"])])
    heads = ["adapter", "weighted by", "ridge", "", "to choose by", "95 %", "to report", "95 %"]
    tokens = ", ".join(f"{count:,} tokens for {part}" for part, count in told["n_tokens"].items())
    first = 0 if several else 1
    return CheckTable(
        heads[first:],
        [row[first:] for row in rows],
        4 - first,
        f"distance: {told['measure']}; {tokens} of the text; {_INTERVAL}",
    )


def _distances(row: Mapping[str, Any], plain: Mapping[str, Any] | None = None) -> list[str]:
    found = []
    for part in ("choice", "report"):
        change = ""
        if plain is not None and row is not plain and plain[part] > 0:
            low, high = (100 * row[f"{part}_{end}"] / plain[part] for end in ("low", "high"))
            change = f"{low:+.1f} to {high:+.1f} %"
        found += [f"{row[part]:.5g}", change]
    return found


def verification_table(told: Mapping[str, Any]) -> CheckTable:
    """base, base+adapter and base+adapter merged with their distances from the other model, and the rule.

    told: `Verification.facts()`.
    """
    columns = [name for name in told["table"][0] if name != "model"]
    heads = ["model", *(name.replace("_", " ") for name in columns)]
    rows = [[str(row["model"]), *(_number(row[name]) for name in columns)] for row in told["table"]]
    line = (
        f"merged and unmerged differ by {_number(told['merged_gap'])}; allowed: {_number(told['tolerance'])} (2 % of "
        f"the base's distance, and {_number(told['storage_rounding'])} that {told['storage']} rounding makes): "
        f"{'holds' if told['ok'] else 'does NOT hold'}"
    )
    return CheckTable(heads, rows, 1, line)


def _number(value: Any) -> str:
    return f"{value:.4g}" if words.is_known(value) else "–"
