"""Numbers and counts in words for people, the same in the terminal, on the pages and in a notebook. No arithmetic."""

import math
from collections.abc import Sequence
from typing import Any


def is_known(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Three digits, and more where they stand before the point; – for unknown.

    >>> [number(value) for value in (0, 0.0312, 12.5, 2088.0, 29681, 3e-7, 2e8, math.inf, math.nan)]
    ['0', '0.0312', '12.5', '2,088', '29,681', '3.0e-07', '2.0e+08', '∞', '–']
    """
    if not is_known(value):
        return "∞" if isinstance(value, float) and value == math.inf else "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rank(value: float) -> str:
    """A rank, or the median of several, as a whole number; halves go up; ? for unknown."""
    return str(math.floor(value + 0.5)) if math.isfinite(value) else "?"


def bracket(low: float, high: float) -> str:
    """Lower to upper end of a rank: one number where they agree, ? where both are unknown."""
    return rank(low) if rank(low) == rank(high) else f"{rank(low)}–{rank(high)}"


def layer_span(layers: Sequence[int]) -> str:
    """Layers as `--layers` takes them.

    >>> layer_span((0, 3)), layer_span((7, 7))
    ('0-3', '7')
    """
    first, last = layers
    return str(first) if first == last else f"{first}-{last}"


def percent(share: float) -> str:
    """A share in whole per cent, without the sign; – for unknown."""
    return f"{100 * share:.0f}" if math.isfinite(share) else "–"


def size(n_bytes: float) -> str:
    """Bytes of memory as MiB or GiB."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def file_size(n_bytes: float) -> str:
    """Bytes in units of 1000, as the sizes of files are told."""
    unit, scale = next(((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6)) if n_bytes >= scale), ("kB", 1e3))
    return f"{n_bytes / scale:.3g} {unit}"


def count(n: int, one: str, several: str = "") -> str:
    """How many of a thing.

    >>> count(1, "matrix", "matrices"), count(2, "tensor")
    ('1 matrix', '2 tensors')
    """
    return f"{n} {one}" if n == 1 else f"{n} {several or one + 's'}"


def some(names: Sequence[str]) -> str:
    """The first of several names, and how many more there are.

    >>> some(["q"]), some(["q", "k", "v"])
    ('q', 'q and 2 more')
    """
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
