"""The least rank that explains ΔW as it is stored: a matrix of that rank that, stored again, gives the same values.

Where training started from the stored base, each entry of ΔW is known to half a step u, its own ulp. Of an update of a
few directions whole rows and columns are small against u together, and what rounding takes from them is no independent
noise: odd powers of the update, directions of their own, of which up to 14 stand above the noise edge for rank 1. The
few explain them:

1.  P of rank r, as near as possible to the cells [Q − u/2, Q + u/2], by alternating projections (reflected at the
    cells, which halves their number).
2.  D = u·round((Q − P)/u) is what is stored of ΔW beyond P stored. Where its largest σ lies well below those of Q that
    are noise, rank r leaves nothing unexplained: planted ranks come to 0.25–0.5 of them, one less to 0.95 and more.

Legend: m out, n in; Q (m, n) ΔW as stored, u (m, n) its steps; V (n, r) orthonormal, B = Q·V, P = B·Vᵀ.
Source: ours, judged by benchmarks/traps.py; alternating projections onto low rank: Cadzow 1988.
"""

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from lowrank_probe import spilling
from lowrank_probe.float64 import mm, qr, row_chunks, small_svd
from lowrank_probe.krylov import leading_singular_values
from lowrank_probe.metrics import Values

# Of larger ranks an entry is the sum of so many products that its error is as good as independent.
MOST: Final = 8
# What a rank leaves of Q is no more than the energy of the errors: none exceeds half a step, whose square is this many
# times the mean of those that are spread evenly. Where little is stored of an update, any rank does: it also keeps this
# share of ‖Q‖² at least, and its last σ is this many times the noise.
ENERGY: Final = 3.0
SHARE: Final = 0.4
CLEAR: Final = 1.1
# Of those ranks the few are tried after which σ falls most.
TRIED: Final = 3
# Projections before each time that the rank is judged.
ROUNDS: Final = (0, 4, 4, 8, 8)
REFLECTED: Final = 1.9
# σ₁(D) over the noise; and over what it was when it was judged before, 0.6 to 0.8 where a rank explains Q.
LEFT: Final = 0.75
FALLING: Final = 0.9
# Of a subspace iteration for the leading directions of Q.
WIDER: Final = 4
TURNS: Final = 4
# No step is a smaller share of the noise: it shows ΔW as it is, and a division by it would overflow.
LEAST_STEP: Final = 1e-9
# Below this share of an entry's error a singular value is rounding of the arithmetic.
DUST: Final = 1e-3
_SEED: Final = 0x10_0A4B_E001


def explained_rank(
    Q: Tensor, steps: Tensor, values: Values, fro_norm: float, square: float, *, counted_from: float = 0.0
) -> int | None:
    """The least rank r ≤ MOST of which a matrix, stored, leaves nothing of Q but noise; None where none is found, and
    where no σ beyond the least possible r exceeds `counted_from`.

    Q: (m, n), ‖Q‖_F = fro_norm. steps: (m, n) bfloat16. values: the singular values of Q, descending; the first
    MOST + 1 are needed. square: mean square error of an entry. Where a rank is tried, one more float32 matrix is made,
    and two of a wider Q.
    """
    m, n = Q.shape
    error = math.sqrt(square)
    if min(m, n, len(values)) <= MOST or values[MOST] <= DUST * error:
        return None
    # The next σ of Q may be a signal itself; the edge of independent errors is none.
    noise = min(float(values[MOST]), error * (math.sqrt(m) + math.sqrt(n)))
    r = np.arange(1, MOST + 1)
    left = fro_norm**2 - np.cumsum(values[:MOST] ** 2)
    plausible = left <= np.minimum(ENERGY * m * n * square, (1 - SHARE) * fro_norm**2)
    possible = r[plausible & (values[:MOST] >= CLEAR * noise)]
    possible = np.sort(possible[np.argsort(values[possible] / values[possible - 1])][:TRIED])
    if not len(possible) or values[possible[0]] <= counted_from:
        return None
    scratch = spilling.empty(Q.shape, torch.float32, Q.device)
    if Q.dtype != torch.float32:  # no more digits of Q are needed than say in which cell P lies
        narrow = spilling.empty(Q.shape, torch.float32, Q.device)
        for out, part in zip(row_chunks(narrow), row_chunks(Q), strict=True):
            out.copy_(part)
        Q = narrow
    generator = torch.Generator(device=Q.device).manual_seed(_SEED)
    return next((r for r in possible.tolist() if _explains(r, Q, steps, noise, scratch, generator)), None)


def _explains(r: int, Q: Tensor, steps: Tensor, noise: float, scratch: Tensor, generator: torch.Generator) -> bool:
    """Whether rank r leaves nothing of Q but noise, whose largest σ is `noise`. scratch: (m, n) float32."""
    B, V = _leading(Q, r, generator)
    before = math.inf
    for rounds in ROUNDS:
        for _ in range(rounds):
            for X, q, u, P in _parts(scratch, Q, steps, B, V, noise):
                half = u.div_(2)
                torch.minimum(torch.maximum(P, q - half), q + half, out=X)
                X.sub_(P).mul_(REFLECTED).add_(P)
            V = _orthonormal(mm(scratch.T, _orthonormal(mm(scratch, V))))
            B = mm(scratch, V)
        for D, q, u, P in _parts(scratch, Q, steps, B, V, noise):
            # Over the noise: squares of very small updates would underflow.
            torch.sub(q, P, out=D).div_(u).round_().mul_(u.div_(noise))
        left = float(leading_singular_values(scratch, generator)[0])
        if left <= LEFT or not left < FALLING * before:
            return left <= LEFT
        before = left
    return False


def _leading(Q: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, V) of the best P of rank r, nearly."""
    width = min(r + WIDER, *Q.shape)
    V = _orthonormal(torch.randn(Q.shape[1], width, generator=generator, device=Q.device))
    for _ in range(TURNS):
        V = _orthonormal(mm(Q.T, _orthonormal(mm(Q, V))))
    B = mm(Q, V)
    turn = small_svd(qr(B.double())[1])[2][:r].T.float()
    return mm(B, turn), mm(V, turn)


def _parts(
    scratch: Tensor, Q: Tensor, steps: Tensor, B: Tensor, V: Tensor, noise: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(scratch, Q, u, P), part by part of the rows; u and P are the caller's."""
    at = 0
    for out, q, u in zip(*map(row_chunks, (scratch, Q, steps)), strict=True):
        yield out, q, u.float().clamp_(min=LEAST_STEP * noise), mm(B[at : at + len(out)], V.T)
        at += len(out)


def _orthonormal(X: Tensor) -> Tensor:
    return qr(X.double())[0].float()
