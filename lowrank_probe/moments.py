"""Second moments of what a running model multiplies its matrices with, and of its loss's gradients, streamed to disk.

Legend: a product y = W·x of a matrix W (m, n) with one row x (n,): a token's, or of an expert a token's that was routed
to it; g (m,) the gradient of a loss with respect to y. C = Σ x xᵀ (n, n), G = Σ g gᵀ (m, m), float64 sums of float32
rows. Matrices that read the same rows (q, k, v; gate, up) share one C.
A table E (m, n) is looked up: y = Eᵀx (n,), x the unit vector of a row. So C is diagonal, kept as its diagonal (m,):
how often each row was looked up; and G is (n, n).

On disk: the lower triangle rounded to float32, a quarter of the float64 matrix. As |C_ij| ≤ √(C_ii·C_jj), the rounding
is at most 2⁻²⁴·tr C in the spectral norm, so that C + λ·tr C/n·I stays positive definite for λ > n·2⁻²⁴, 8.5e-4 at
n = 14,336; `LEAST_RIDGE` is above that.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowrank_probe.errors import OutputError
from lowrank_probe.model_weights import view_of
from lowrank_probe.options import Progress
from lowrank_probe.unfinished import Kept, Unfinished

if TYPE_CHECKING:
    from lowrank_probe.extraction_jobs import Piece

# The kinds whose product with their input is seen; the inputs of a convolution overlap.
SEEN: Final = ("linear", "conv1d", "parameter", "embedding")
# Where x and W are among the arguments of the functions that multiply them, or look up the rows x of W.
_OPERANDS: Final = {
    "linear": (0, 1), "addmm": (1, 2), "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "embedding": (0, 1),
}  # fmt: skip
LIMIT_BYTES: Final = 4 << 30
# The least λ that the rounding on disk allows for.
LEAST_RIDGE: Final = 1e-3


@dataclass(frozen=True)
class Moments:
    """The moments of one text, kept in an extraction's store. word: names the text, so that another one's are others.

    Of a piece: n_tokens, the rows that were seen, 0 where none was; mean_gradient = tr G over its size; whose C it
    shares.
    """

    store: Unfinished | Kept
    word: str

    def has(self, piece: "Piece") -> bool:
        return self.store.has(self._key(piece))

    def n_tokens(self, piece: "Piece") -> int:
        """Rows that C sums over."""
        return int(self._facts(piece)["n_tokens"]) if self.has(piece) else 0

    def mean_gradient(self, piece: "Piece") -> float:
        """tr G/m, of a table tr G/n, also where G itself is too large to be kept."""
        return float(self._facts(piece)["mean_gradient"]) if self.has(piece) else 0.0

    def inputs(self, piece: "Piece", device: torch.device) -> Tensor | None:
        """C (n, n) float32, of a table its diagonal (m,); None where the piece was never seen."""
        if not self.n_tokens(piece):
            return None
        if piece.target.kind == "embedding":
            return self.store.get(self._key(piece), "C").to(device)
        return self._read(self._facts(piece)["shared"], "C", device)

    def gradients(self, piece: "Piece", device: torch.device) -> Tensor | None:
        """G (m, m) float32, of a table (n, n); None where the piece was never seen, or has too many outputs."""
        key = self._key(piece)
        return self._read(key, "G", device) if self.has(piece) and "G" in self.store.names(key) else None

    def put(self, piece: "Piece", shared: "Piece", tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep what was found for a piece, which shares C with an earlier one or itself; in an `Unfinished` only."""
        assert isinstance(self.store, Unfinished)
        lower = {name: M.float() if M.ndim == 1 else packed_triangle(M) for name, M in tensors.items()}
        self.store.put(self._key(piece), lower, {"shared": self._key(shared), **facts})

    def to_read(self) -> "Moments":
        """The same to read only, in any process that sees the run's directory: no matrix travels with it."""
        assert isinstance(self.store, Unfinished)
        return replace(self, store=self.store.kept(self._prefix))

    @property
    def _prefix(self) -> str:
        return f"moments-{self.word}"

    def _read(self, key: str, name: str, device: torch.device) -> Tensor:
        return full_matrix(self.store.get(key, name)).to(device)

    def _facts(self, piece: "Piece") -> dict[str, Any]:
        return self.store.facts(self._key(piece))

    def _key(self, piece: "Piece") -> str:
        return piece.key(self._prefix)


def packed_triangle(M: Tensor) -> Tensor:
    """The lower triangle of a symmetric M (n, n), row after row: (n(n + 1)/2,) float32 on the host."""
    M = M.cpu()
    return torch.cat([row[: i + 1].float() for i, row in enumerate(M)])


def full_matrix(lower: Tensor) -> Tensor:
    """The symmetric (n, n) whose `packed_triangle` this is."""
    n = (math.isqrt(8 * len(lower) + 1) - 1) // 2
    M = torch.empty(n, n, dtype=lower.dtype)
    at = 0
    for i in range(n):
        M[i, : i + 1] = M[: i + 1, i] = lower[at : at + i + 1]
        at += i + 1
    return M


Watched = Mapping[tuple[bool, int], tuple[int, int, int]]


class _Watch(TorchFunctionMode):
    """Calls take(i, x, y) for every product y of rows x with the i-th watched matrix, whichever module computes it.

    At the product itself, not at a module's call: so experts, which are entries of one parameter, are seen as well,
    each with the rows that were routed to it. Of a table x (rows,) is which of its rows are looked up; that the output
    head multiplies with it too, where they are tied, is not its own. matrices: (is it a table, address) → (i, m, n).
    """

    def __init__(self, matrices: Watched, take: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.matrices, self.take = matrices, take

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        where = _OPERANDS.get(getattr(func, "__name__", ""))
        if where and len(args) > max(where):
            x, W = args[where[0]], args[where[1]]
            if isinstance(x, Tensor) and isinstance(W, Tensor):
                table = func is torch.nn.functional.embedding
                i, m, n = self.matrices.get((table, W.data_ptr()), (-1, 0, 0))
                if i >= 0 and W.numel() == m * n and (table or x.shape[-1] == n):
                    self.take(i, x.detach().flatten() if table else x.detach().reshape(-1, n), y)
        return y


def collect(
    model: Any, loss: Callable[[int, Tensor], Tensor], sequences: Sequence[Tensor], pieces: Sequence["Piece"],
    moments: Moments, limit_bytes: int = LIMIT_BYTES, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Run the model over the sequences, forward and backward, and keep C and G of every piece that has none yet.

    As many pieces at once as their moments take no more than `limit_bytes` together (at least one), then the next ones
    in another pass. A G of more than half of `limit_bytes` is not kept.
    loss(number, ids) is one forward pass with a graph, of the sequence of that number; what it draws at random must
    depend on the number alone, as a run that was killed begins with what is missing, whichever pass that was in.
    Raises `OutputError` where the disk has no room for them.
    """
    watched = [piece for piece in pieces if piece.target.kind in SEEN and not moments.has(piece)]
    if not watched:
        return
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one product an expert; the fused kernels are not seen
    model.requires_grad_(False)  # a graph of activations alone, from the tables on
    for table in model.modules():
        if isinstance(table, torch.nn.Embedding):  # a copy, as some models go on in place
            table.register_forward_hook(lambda module, args, y: y.requires_grad_().clone())
    tables = [piece.target.kind == "embedding" for piece in watched]
    matrices = {
        (tables[i], view_of(model, piece.target, piece.copy).data_ptr()): (i, *piece.target.shape)
        for i, piece in enumerate(watched)
    }
    groups = _sharing(matrices, partial(loss, 0), sequences[0], len(watched))
    inputs = [m if table else n**2 for table, (m, n) in zip(tables, (p.target.shape for p in watched), strict=True)]
    outputs = [piece.target.shape[1 if table else 0] for piece, table in zip(watched, tables, strict=True)]
    kept = {i for i, size in enumerate(outputs) if 8 * size**2 <= limit_bytes / 2}
    sizes = [8 * (inputs[one[0]] + sum(outputs[i] ** 2 for i in one if i in kept)) for one in groups]
    _check_room(moments, sum(sizes) // 4)
    batches = list(_batches(groups, sizes, limit_bytes))
    for number, batch in enumerate(batches):
        sums = _Sums({one[0] for one in batch}, {i for one in batch for i in one}, kept, inputs)
        for done, ids in enumerate(sequences):
            if progress:
                progress("second moments", number * len(sequences) + done, len(batches) * len(sequences))
            with _Watch(matrices, sums.add), torch.enable_grad():
                loss(done, ids).backward()  # type: ignore[no-untyped-call]
        for one in batch:
            for i in one:
                facts = {"n_tokens": sums.rows.get(one[0], 0), "mean_gradient": sums.squares.get(i, 0.0) / outputs[i]}
                moments.put(watched[i], watched[one[0]], sums.take(i), facts)


def _check_room(moments: Moments, needed: int) -> None:
    assert isinstance(moments.store, Unfinished)
    folder = moments.store.folder
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder}: the second moments take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose --out on "
            "another disk, or fewer --targets"
        )


@dataclass
class _Sums:
    """What is summed in one pass. first: whose C; every: whose gradients; kept: whose G, if in `every`.

    inputs: entries of every C; of a table, its rows.
    """

    first: set[int]
    every: set[int]
    kept: set[int]
    inputs: Sequence[int]
    C: dict[int, Tensor] = field(default_factory=dict)
    G: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)

    def add(self, i: int, x: Tensor, y: Tensor) -> None:
        """Take in the rows of one product (of a table, which were looked up), and on the way back its gradients."""
        if not len(x):
            return
        table = x.ndim == 1
        if i in self.first:
            self.rows[i] = self.rows.get(i, 0) + len(x)
            if table:
                self.C[i] = self.C.get(i, 0) + torch.bincount(x, minlength=self.inputs[i]).double()
            else:
                _add(self.C, i, x)
        if i in self.every and table:
            y.requires_grad_()  # of a frozen weight: a leaf
        if i in self.every and y.requires_grad:
            y.register_hook(  # type: ignore[no-untyped-call]
                lambda g: self._add_gradient(i, g.detach().reshape(-1, g.shape[-1]))
            )

    def _add_gradient(self, i: int, g: Tensor) -> None:
        self.squares[i] = self.squares.get(i, 0.0) + float(g.double().square().sum())
        if i in self.kept:
            _add(self.G, i, g)

    def take(self, i: int) -> dict[str, Tensor]:
        """The finished sums of one matrix, on the host."""
        found = {"C": self.C.pop(i, None), "G": self.G.pop(i, None)}
        return {name: M.cpu() for name, M in found.items() if M is not None}


def _add(sums: dict[int, Tensor], i: int, rows: Tensor) -> None:
    if i not in sums:
        sums[i] = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    rows = rows.double()
    if rows.is_cpu:  # numpy sees the symmetry and does half the work
        sums[i] += torch.from_numpy(np.matmul(rows.numpy().T, rows.numpy()))
    else:
        sums[i].addmm_(rows.T, rows)


def _sharing(matrices: Watched, run: Callable[[Tensor], Any], ids: Tensor, count: int) -> list[list[int]]:
    """The matrices in groups that read the same rows: the same tensors in one pass over one sequence; a table alone."""
    inputs: list[list[Tensor]] = [[] for _ in range(count)]
    with _Watch(matrices, lambda i, x, y: inputs[i].append(x)):
        run(ids)  # all inputs are held, so that an address stands for one tensor
    groups: dict[Any, list[int]] = {}
    for i, read in enumerate(inputs):
        mark = tuple((x.data_ptr(), tuple(x.shape), float(x.double().sum())) for x in read if x.ndim > 1)
        groups.setdefault(mark or i, []).append(i)
    return list(groups.values())


def _batches(groups: Sequence[list[int]], sizes: Sequence[int], limit_bytes: int) -> Iterator[list[list[int]]]:
    """Groups whose moments take at most `limit_bytes` together, or one."""
    batch: list[list[int]] = []
    held = 0
    for one, size in zip(groups, sizes, strict=True):
        if batch and held + size > limit_bytes:
            yield batch
            batch, held = [], 0
        batch.append(one)
        held += size
    if batch:
        yield batch
