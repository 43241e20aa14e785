"""Weights swapped in place: W_base + U_r·diag(s_r)·Vh_r for some matrices of a running model, all else as tuned.

Legend: m out, n in, r rank, k = min(m, n). A piece is one matrix of an update inside a parameter (one expert, the q of
a fused qkv); it is factorised once, and a state says at what rank each piece is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_probe.errors import MatchError, NumericsError
from lowrank_probe.layers import labels, place
from lowrank_probe.layouts import Part, parts
from lowrank_probe.truncation import truncate

# Piece number → the rank it is truncated to; pieces that are not in it are as tuned.
State = Mapping[int, int]


@dataclass(frozen=True)
class Piece:
    """One matrix (m, n) of the update. name: as in the model, with the part's label. parameter: whose values it is part
    of. label: its layer type, with the stack where a type is in several."""

    name: str
    parameter: str
    part: Part
    layer_type: str
    label: str
    shape: tuple[int, int]

    @property
    def k(self) -> int:
        """min(m, n)."""
        return min(self.shape)

    def lora_parameters(self, r: int) -> int:
        """r·(m + n), the entries of the factors."""
        return r * sum(self.shape)


@dataclass(frozen=True)
class Update:
    """What differs between two models of one shape. pieces: the matrices; vectors, kept: the other parameters that
    differ, without a matrix in them (norms, biases; tensors that are no matrix): they stay as tuned."""

    pieces: tuple[Piece, ...]
    vectors: tuple[str, ...]
    kept: tuple[str, ...]


def find_update(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], config: Mapping[str, Any]) -> Update:
    """The pieces whose values differ. base, tuned: name → value of the models' parameters; config: config.json as dict.

    Raises `MatchError` for a parameter that one side lacks or has in another shape, `NumericsError` for NaN and Inf.
    """
    _check_same(base, tuned)
    pieces: list[Piece] = []
    stacks: list[str] = []
    vectors, kept = [], []
    for name, W in tuned.items():
        if W.ndim < 2 or torch.equal(W, base[name]):
            vectors += [name] if W.ndim < 2 and not torch.equal(W, base[name]) else []
            continue
        found, _ = parts(name, tuple(W.shape), config)
        kept += [] if found else [name]
        where = place(name)
        for part in found:
            new, old = (matrix(values, part) for values in (W, base[name]))
            for side, values in (("base", old), ("tuned", new)):
                if not bool(torch.isfinite(values).all()):
                    raise NumericsError(f"{name} of the {side} model: contains NaN or Inf (expected finite weights)")
            if not torch.equal(new, old):
                told = f"{name}[{part.label}]" if part.label else name
                kind, shape = part.layer_type or where.layer_type, (new.shape[0], new.shape[1])
                pieces.append(Piece(told, name, part, kind, kind, shape))
                stacks.append(where.stack)
    shown = labels(stacks, [piece.layer_type for piece in pieces])
    named = tuple(replace(piece, label=label) for piece, label in zip(pieces, shown, strict=True))
    return Update(named, tuple(vectors), tuple(kept))


def matrix(values: Tensor, part: Part) -> Tensor:
    """(m, n), the part of a stored tensor; a view where possible."""
    view = _view(values, part)
    return view.reshape(-1, view.shape[-1])


def _view(values: Tensor, part: Part) -> Tensor:
    """The part as a view of the stored tensor, (m, n) or (groups, rows, n), that can be written to."""
    if part.table or (part.expert is not None and values.ndim == 3):
        values = values[part.expert or 0]
    M = values.view(values.shape[0], -1) if values.ndim > 2 else values
    M = M.T if part.transposed else M
    rows = part.rows
    if rows is None:
        return M
    blocks: Tensor = torch.unflatten(M, 0, (rows.groups, rows.group_rows))
    return blocks[:, rows.start : rows.stop]


@dataclass(frozen=True)
class Factors:
    """U (m, r), s (r,), Vh (r, n) in float32: cut to j < r columns they are the best of rank j."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    def to(self, device: torch.device) -> "Factors":
        return Factors(self.U.to(device), self.s.to(device), self.Vh.to(device))

    @property
    def n_bytes(self) -> int:
        return 4 * (self.U.numel() + self.s.numel() + self.Vh.numel())


def factorise(
    piece: Piece, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], r: int, device: torch.device, seed: int
) -> Factors:
    """The truncated SVD of rank r of one piece's ΔW (`truncate`), on the host."""
    new, old = (matrix(side[piece.parameter], piece.part).to(device).double() for side in (tuned, base))
    found = truncate(new - old, r, seed=seed)
    return Factors(*(part.float().cpu() for part in (found.U, found.s, found.Vh)))


class Swapper:
    """A model whose pieces are put at a state in place, and back to the exact tuned values.

    model: the tuned model, where it runs and in the dtype of its forward pass. base, tuned: name → float32 values of
    the changed parameters, and factors: number of a piece → its factors, on the host or where the model is. New weights
    are computed in float32 where the model is, then cast.
    """

    def __init__(
        self, model: nn.Module, pieces: Sequence[Piece], factors: Sequence[Factors], base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.pieces, self.factors, self.base, self.tuned = pieces, factors, base, tuned
        self.parameters = dict(model.named_parameters())
        self.now: dict[int, int] = {}

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Bring every piece to its rank in the state, or to its tuned values where it is not in it."""
        for i, piece in enumerate(self.pieces):
            if state.get(i) == self.now.get(i):
                continue
            target = _view(self.parameters[piece.parameter], piece.part)
            if i in state:
                values = self._truncated(i, state[i], target.device)
                self.now[i] = state[i]
            else:
                values = matrix(self.tuned[piece.parameter], piece.part)
                del self.now[i]
            target.copy_(values.reshape(target.shape))

    @torch.no_grad()
    def put_base(self, every: Mapping[str, Tensor]) -> None:
        """Every parameter as in the base; `restore` undoes it."""
        for name, parameter in self.parameters.items():
            parameter.copy_(every[name])

    @torch.no_grad()
    def restore(self, every: Mapping[str, Tensor]) -> None:
        """Every parameter as tuned."""
        self.put_base(every)
        self.now.clear()

    def _truncated(self, i: int, r: int, device: torch.device) -> Tensor:
        """W_base + U_r·diag(s_r)·Vh_r (m, n) in float32."""
        piece, found = self.pieces[i], self.factors[i]
        W = matrix(self.base[piece.parameter], piece.part).to(device, torch.float32)
        if r == 0:
            return W
        U, s, Vh = found.U[:, :r].to(device), found.s[:r].to(device), found.Vh[:r].to(device)
        return torch.addmm(W, U * s, Vh)


def _check_same(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    sides: tuple[tuple[Mapping[str, Tensor], Mapping[str, Tensor], str, str], ...] = (
        (base, tuned, "base", "tuned model"), (tuned, base, "tuned model", "base"),
    )  # fmt: skip
    for here, there, one, other in sides:
        alone = [name for name in here if name not in there]
        if alone:
            raise MatchError(
                f"{alone[0]}: is in the {one}, not in the {other}; both must be of one architecture (and one of them "
                "must not tie what the other keeps apart)"
            )
    for name, W in tuned.items():
        if W.shape != base[name].shape:
            raise MatchError(
                f"{name}: base is {tuple(base[name].shape)}, tuned is {tuple(W.shape)}; not the same architecture, or "
                "a vocabulary that has grown?"
            )
