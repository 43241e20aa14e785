"""The float64 steps that the kernels of `svd` share: a matrix of any dtype is upcast a few rows at a time.

Legend: A (m, n) any real 2-D tensor; k = min(m, n); G = the (k, k) Gram matrix of A's short side.
"""

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.openblas import openblas

EPS64: Final = 2.0**-53
# Entries upcast to float64 at a time; bounds the working memory next to the matrix itself.
CHUNK_ENTRIES: Final = 1 << 17
# The same for the Gram matrix, where every block costs one more pass over G.
GRAM_ENTRIES: Final = 3 << 17
# And where A lies on disk: a block of columns is a run of bytes in every row, read by pages.
SPILLED_ENTRIES: Final = 1 << 24
# Rows of the Gram matrix computed at a time, at least, and parts of it at most.
PANEL: Final = 256
PANELS: Final = 3
# On a GPU, where every chunk is a launch and many are a wait.
DEVICE_ENTRIES: Final = 1 << 24


def row_chunks(A: Tensor, entries: int = CHUNK_ENTRIES, device_entries: int = DEVICE_ENTRIES) -> Iterator[Tensor]:
    """Views of A by rows: about `entries` entries on a CPU, `device_entries` elsewhere."""
    rows = max(1, (entries if A.is_cpu else device_entries) // max(1, A.shape[1]))
    for start in range(0, A.shape[0], rows):
        yield A[start : start + rows]


def fro_norm(A: Tensor) -> float:
    """‖A‖_F = √Σ a², summed in float64 from the entries: the exact denominator of every energy."""
    total = torch.zeros((), dtype=torch.float64, device=A.device)
    for chunk in row_chunks(A):
        total += torch.linalg.vector_norm(chunk.double()) ** 2
    return math.sqrt(float(total))


def gram(A: Tensor, *, half: bool = False) -> Tensor:
    """The float64 Gram matrix of the short side, (k, k): A·Aᵀ for m ≤ n, else Aᵀ·A. Upcast chunk by chunk.

    half: on a CPU only what is on and above the diagonal is set, which `eigvalsh` reads.
    """
    if A.shape[0] > A.shape[1]:
        A = A.T
    k, long = A.shape
    G = torch.zeros(k, k, dtype=torch.float64, device=A.device)
    by_columns = spilling.active() and A.stride(1) == 1
    entries = DEVICE_ENTRIES // 2 if not A.is_cpu else SPILLED_ENTRIES if by_columns else GRAM_ENTRIES
    columns = max(1, entries // max(1, k))
    buffer = torch.empty(0, dtype=torch.float64, device=A.device)
    for start in range(0, long, columns):
        chunk = A[:, start : start + columns]
        # As it lies in memory, in one buffer for all blocks: glibc's heap grows when megabytes are allocated and freed.
        if chunk.stride(1) == 1:
            block = buffer.resize_(chunk.shape).copy_(chunk)
        else:
            block = buffer.resize_(chunk.T.shape).copy_(chunk.T).T
        if G.is_cpu:
            _add_square(G.numpy(), block.numpy())
        else:
            G.addmm_(block, block.T)
    if G.is_cpu and not half:
        for i, j in _panels(k):
            G[i:j, :i] = G[:i, i:j].T
            G[i:j, i:j].copy_(G[i:j, i:j].triu() + G[i:j, i:j].triu(1).T)
    return G


def _panels(k: int) -> list[tuple[int, int]]:
    step = max(PANEL, -(-k // PANELS))
    return [(i, min(k, i + step)) for i in range(0, k, step)]


def _add_square(G: NDArray[np.float64], X: NDArray[np.float64]) -> None:
    """G += X·Xᵀ on and above the diagonal: half of the work, and no second matrix of G's size."""
    library = openblas()
    if library is not None:
        library.add_square(G, X)
        return
    for i, j in _panels(len(G)):
        G[:i, i:j] += X[:i] @ X[i:j].T
        G[i:j, i:j] += X[i:j] @ X[i:j].T


def product(A: Tensor, X: Tensor) -> Tensor:
    """A·X in float64, (m, p), for A (m, n) in any dtype, X (n, p) float64; A is upcast chunk by chunk."""
    if A.T.is_contiguous() and not A.is_contiguous():  # by the rows that lie together in memory
        total = torch.zeros(A.shape[0], X.shape[1], dtype=torch.float64, device=A.device)
        at = 0
        for block in _upcast(A.T):
            total += mm(block.T, X[at : at + len(block)])
            at += len(block)
        return total
    out = torch.empty(A.shape[0], X.shape[1], dtype=torch.float64, device=A.device)
    at = 0
    for block in _upcast(A):
        out[at : at + len(block)] = mm(block, X)
        at += len(block)
    return out


def _upcast(A: Tensor) -> Iterator[Tensor]:
    """A's rows in float64, a few at a time, all in one buffer: glibc's heap grows by every block that is allocated for
    itself while results of theirs stay."""
    buffer = torch.empty(0, dtype=torch.float64, device=A.device)
    for chunk in row_chunks(A, GRAM_ENTRIES, DEVICE_ENTRIES // 2):
        yield chunk if chunk.dtype == torch.float64 else buffer.resize_(chunk.shape).copy_(chunk)


def mm(A: Tensor, B: Tensor) -> Tensor:
    """A·B. On a CPU by numpy, as all heavy steps: its BLAS is the faster one, and the threads of two kinds
    of BLAS in turn wait for each other spinning."""
    return torch.from_numpy(np.matmul(A.numpy(), B.numpy())) if A.is_cpu else A @ B


def qr(A: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of a float64 matrix."""
    if not A.is_cpu:
        Q, R = torch.linalg.qr(A)
        return Q, R
    q, r = np.linalg.qr(A.numpy())
    return torch.from_numpy(q), torch.from_numpy(r)


def eigvalsh(G: Tensor) -> NDArray[np.float64]:
    """Eigenvalues of a symmetric float64 matrix, descending, on the host; G is scratch memory afterwards.

    On a CPU what is below the diagonal is not read, and the work is numpy's LAPACK's, which is faster than torch's:
    transposed G is the same matrix in its order, and numpy copies it in a tenth of the time.
    """
    if not G.is_cpu:
        lam = torch.linalg.eigvalsh(G).cpu().numpy()
    else:
        library = openblas()
        lam = np.linalg.eigvalsh(G.numpy().T) if library is None else library.eigenvalues(G.numpy())
    return np.asarray(lam[::-1], dtype=np.float64)


def eigh(G: Tensor, count: int) -> tuple[NDArray[np.float64], Tensor]:
    """The `count` largest eigenvalues of a symmetric float64 matrix, descending, and their vectors (k, count)."""
    if G.is_cpu:
        lam, vectors = np.linalg.eigh(G.numpy().T)
        return lam[::-1][:count].copy(), torch.from_numpy(vectors[:, ::-1][:, :count].copy())
    values, W = torch.linalg.eigh(G)
    return values.flip(0)[:count].cpu().numpy(), W.flip(1)[:, :count]


def small_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, Vh) of a matrix of a few hundred rows, on the host: cuSOLVER's Jacobi default is inaccurate."""
    U, s, Vh = np.linalg.svd(A.cpu().numpy(), full_matrices=False)
    return torch.from_numpy(U).to(A.device), torch.from_numpy(s).to(A.device), torch.from_numpy(Vh).to(A.device)
