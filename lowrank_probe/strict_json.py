"""What a run writes as JSON: plain values, and the version of their layout. Imports no pandas."""

import math
from typing import Any, Final

import numpy as np

SCHEMA_VERSION: Final = 1


def plain(value: Any) -> Any:
    """The value with numpy and pandas scalars as Python's own, and NaN, NA and ∞ as None: strict JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if type(value).__name__ == "NAType" or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
