"""Two steps of the OpenBLAS that numpy computes with, which numpy does not offer: A·Aᵀ added to half of a matrix, and
the eigenvalues of one that they overwrite. Where numpy has another BLAS (MKL, Accelerate) there is nothing here.

numpy's own A·Aᵀ takes as long again to mirror the product, and its `eigvalsh` copies the matrix first and reduces it to
a tridiagonal one directly: half of that reads the whole matrix once a column, which large ones pay with memory's speed.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

# What the functions are called, and whether their integers have 64 bits: builds differ.
_NAMES: Final = (("scipy_", "64_", True), ("", "64_", True), ("scipy_", "", False), ("", "", False))
# Of CBLAS: column-major, lower half.
_COLUMNS: Final = 102
_LOWER: Final = 122
_PLAIN: Final = 111
_TRANSPOSED: Final = 112
# Rows from which the reduction by way of a band is the faster on one core or two, 1.5 × and 1.4 × at 4,096
# (docs/eigensolvers-cpu.md). Its second stage has one thread whatever there are: more of them ask for more rows.
BAND_FROM: Final = 2304


@dataclass(frozen=True)
class OpenBlas:
    """The library's functions, and the type of its integers."""

    dsyrk: Any
    dsyevd: Any
    dsyevd_2stage: Any
    threads: Callable[[], int]
    integer: Any

    def add_square(self, G: NDArray[np.float64], X: NDArray[np.float64]) -> None:
        """G += X·Xᵀ on and above the diagonal.

        G: (k, k) float64, C-contiguous; what is below its diagonal stays as it is. X: (k, n) float64, its rows or its
        columns contiguous each.
        """
        assert G.flags.c_contiguous
        rows = X.strides[1] == X.itemsize
        assert rows or X.strides[0] == X.itemsize
        (k, n), apart = X.shape, X.strides[0 if rows else 1] // X.itemsize
        self.dsyrk(
            _COLUMNS, _LOWER, _TRANSPOSED if rows else _PLAIN, k, n, 1.0, X.ctypes.data,
            max(1, apart, n if rows else k), 1.0, G.ctypes.data, max(1, k),
        )  # fmt: skip

    def eigenvalues(self, G: NDArray[np.float64]) -> NDArray[np.float64]:
        """(k,) ascending, of a symmetric matrix (k, k) float64, C-contiguous, of which only what is on and above the
        diagonal is read; it is scratch memory afterwards. Raises `numpy.linalg.LinAlgError` as numpy does."""
        assert G.flags.c_contiguous
        k = len(G)
        solve = self.dsyevd_2stage if self.by_band(k) else self.dsyevd
        values, needed, needed_whole = np.full(k, np.nan), np.zeros(1), np.zeros(1, np.int64)
        info = self._solve(solve, G, values, needed, needed_whole, ask=True)
        work, whole = np.empty(max(1, int(needed[0]))), np.empty(max(1, int(needed_whole[0])), np.int64)
        info = info or self._solve(solve, G, values, work, whole, ask=False)
        if info:
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return values

    def by_band(self, k: int) -> bool:
        """Whether the eigenvalues of k rows are found by way of a band."""
        return 2 * k >= BAND_FROM * max(2, self.threads())

    def _solve(
        self, solve: Any, G: NDArray[np.float64], values: NDArray[np.float64], work: NDArray[np.float64],
        whole: NDArray[np.int64], *, ask: bool,
    ) -> int:  # fmt: skip
        def integer(value: int) -> Any:
            return ctypes.byref(self.integer(value))

        k, info = len(G), self.integer(0)
        solve(
            b"N", b"L", integer(k), G.ctypes, integer(max(1, k)), values.ctypes, work.ctypes,
            integer(-1 if ask else len(work)), whole.ctypes, integer(-1 if ask else len(whole)), ctypes.byref(info),
            1, 1,
        )  # fmt: skip
        return int(info.value)


@cache
def openblas() -> OpenBlas | None:
    """numpy's own library, if it is an OpenBLAS that works as it should.

    That which its wheel brings, or the only BLAS of the process: another one's threads would spin beside numpy's.
    """
    every = [found for found in threadpool_info() if found["user_api"] == "blas"]
    root = Path(np.__file__).parent
    brought = {root.parent / "numpy.libs", root / ".libs", root / ".dylibs"}
    own = [found for found in every if Path(found["filepath"]).parent in brought] or (every if len(every) == 1 else [])
    for found in own:
        if found["internal_api"] != "openblas":
            continue
        try:
            library = ctypes.CDLL(found["filepath"])
        except OSError:
            continue
        for before, after, wide in _NAMES:
            made = _bound(library, before, after, wide)
            if made is not None and _works(made):
                return made
    return None


def _bound(library: ctypes.CDLL, before: str, after: str, wide: bool) -> OpenBlas | None:
    integer = ctypes.c_int64 if wide else ctypes.c_int32
    # Fortran's names have an underscore of their own, but for the one that the suffix ends with.
    tail = f"_{after}" if after else "_"
    try:
        dsyrk = library[f"{before}cblas_dsyrk{after}"]
        dsyevd, dsyevd_2stage = (library[f"{before}{name}{tail}"] for name in ("dsyevd", "dsyevd_2stage"))
        threads = library[f"{before}openblas_get_num_threads{after}"]
    except AttributeError:
        return None
    number, flag, address = ctypes.c_double, ctypes.c_int, ctypes.c_void_p
    dsyrk.restype = None
    dsyrk.argtypes = [flag, flag, flag, integer, integer, number, address, integer, number, address, integer]
    for solver in (dsyevd, dsyevd_2stage):
        solver.restype = None
        solver.argtypes = [ctypes.c_char_p] * 2 + [address] * 9 + [ctypes.c_size_t] * 2
    return OpenBlas(dsyrk, dsyevd, dsyevd_2stage, threads, integer)


def _works(library: OpenBlas) -> bool:
    """Whether it computes what it should: a build whose integers are not what its names say does not."""
    X = np.arange(12.0).reshape(3, 4) % 5
    G = np.zeros((3, 3))
    library.add_square(G, X)
    if not np.allclose(np.triu(X @ X.T), G):
        return False
    expected = np.linalg.eigvalsh(X @ X.T)
    for solve in (library.dsyevd, library.dsyevd_2stage):
        if not np.allclose(replace(library, dsyevd=solve).eigenvalues(G.copy()), expected):
            return False
    return True
