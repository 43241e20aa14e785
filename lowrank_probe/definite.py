"""Positive definite or not: the Cholesky factorisation by which certificates are proven on a CPU. numpy only."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# Columns taken at a time.
BLOCK: Final = 96


def positive_definite(M: NDArray[np.floating[Any]]) -> bool:
    """Whether the Cholesky factorisation of a symmetric M (k, k) succeeds; M is overwritten, its upper half not read.

    A NaN is not definite. By blocks, because numpy's own goes through strided copies that take six times as long as
    the arithmetic.
    """
    k = len(M)
    for start in range(0, k, BLOCK):
        stop = min(k, start + BLOCK)
        try:
            L = np.linalg.cholesky(M[start:stop, start:stop])
        except np.linalg.LinAlgError:
            return False
        if not np.isfinite(L).all():  # some LAPACKs let NaN through
            return False
        X = M[stop:, start:stop] @ np.linalg.inv(L).T
        for at in range(stop, k, 2 * BLOCK):
            end = min(k, at + 2 * BLOCK)
            M[at:, at:end] -= X[at - stop :] @ X[at - stop : end - stop].T
    return True
