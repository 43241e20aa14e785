"""glibc's malloc for matrices: large blocks mapped by themselves, freed memory kept for the next one or given back."""

import ctypes
import sys
from typing import Final

# Bytes from which a block is mapped by itself; by default up to 32 MiB, as glibc finds fit.
MAPPED_FROM: Final = 5_000_000
# Free bytes at the top of a heap from which they go back to the system: glibc's default, and never.
TRIMMED_FROM: Final = 1 << 17
KEPT: Final = 1 << 30
_glibc = ctypes.CDLL(None) if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt") else None


def set_malloc(trimmed_from: int) -> None:
    """Have glibc map large matrices by themselves and unmap them when freed, and give the top of a heap back to the
    system when so many bytes of it are free."""
    if _glibc is not None:
        _glibc.mallopt(-1, trimmed_from)  # M_TRIM_THRESHOLD
        _glibc.mallopt(-3, MAPPED_FROM)  # M_MMAP_THRESHOLD
        _glibc.mallopt(-8, 1)  # M_ARENA_MAX: worker threads share one heap


def trim() -> None:
    """Give what is free to the system."""
    if _glibc is not None:
        _glibc.malloc_trim(0)
