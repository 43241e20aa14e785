"""The one writer of the Markdown tables in docs/."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd


def markdown(heads: Sequence[str], cells: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal too; a finite float as by `%g`."""
    rows = [list(heads), *([_text(value) for value in row] for row in cells)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def frame(table: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table, without its index."""
    return markdown(list(table.columns), table.itertuples(index=False))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
