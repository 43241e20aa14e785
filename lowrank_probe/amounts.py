"""Amounts as users type them: 40M, 4e7, 80MB, 1.5GiB. Imports nothing heavy."""

import re
from fractions import Fraction
from typing import Final

_AMOUNT: Final = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:E[0-9]{1,2})?) ?([KMGT]?)(B|IB)?", re.IGNORECASE)


def parse_amount(text: str) -> tuple[int, str]:
    """(amount, its unit: "B", or "" for none); parts are cut off. Raises ValueError with the reason for anything else.

    K, M, G, T are powers of 1000, with iB powers of 1024; case does not matter.

    >>> parse_amount("40M"), parse_amount("1.5 GiB"), parse_amount("4e7")
    ((40000000, ''), (1610612736, 'B'), (40000000, ''))
    """
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError("is not understood")
    number, prefix, unit = found[1], found[2].upper(), (found[3] or "").upper()
    if unit and not prefix:
        raise ValueError("is unclear: a single B may be bytes or a billion")
    scale = (1024 if unit == "IB" else 1000) ** " KMGT".index(prefix or " ")
    return int(Fraction(number) * scale), unit[-1:]
