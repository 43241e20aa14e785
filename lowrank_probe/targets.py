"""What an adapter adapts: one `Target` a module or parameter, a `Whole` for what goes as it is; `selection` finds them.

Legend: m out, n in, E copies. The unit is PEFT's: a fused qkv is one matrix, a parameter (E, m, n) with all its experts
one target, put together from the tensors in the file where those are one an expert. Names are those in memory, of the
model that transformers loads (`modules.in_memory`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from lowrank_probe.allocation import TENSOR_OVERHEAD
from lowrank_probe.checkpoints import Checkpoint
from lowrank_probe.deltas import Delta, read_pair
from lowrank_probe.errors import NumericsError
from lowrank_probe.layers import Place, place
from lowrank_probe.ledger import ledger_line, tensor_line
from lowrank_probe.matching import Matching, Pair
from lowrank_probe.modules import Kind, Modules

# Entries that a norm takes at a time.
_RUN: Final = 1 << 21


@dataclass(frozen=True)
class Target:
    """One module, or one bare parameter, that LoRA adapts.

    name: the module in memory (`model.layers.0.self_attn.q_proj`), or the parameter (`…mlp.experts.gate_up_proj`,
    `…mlp.gate.weight`) where `by_parameter`, that is PEFT's `target_parameters`. shape: (m, n) as (out, in) of one copy
    of B·A; a table is (rows, width), a convolution (out, in·kernel). pieces: for each of the E copies the pairs that,
    one under the other, are its ΔW. stored: the shape of the parameter in memory. tied: the module shares its weight
    with the output head, so that LoRA on it holds unmerged only.
    """

    name: str
    kind: Kind
    place: Place
    shape: tuple[int, int]
    pieces: tuple[tuple[Pair, ...], ...]
    stored: tuple[int, ...]
    by_parameter: bool = False
    transposed: bool = False
    tied: bool = False

    @property
    def module(self) -> str:
        """The module's name; of a parameter, the module that has it."""
        return self.name.rpartition(".")[0] if self.by_parameter else self.name

    @property
    def copies(self) -> int:
        return len(self.pieces)

    @property
    def parameters(self) -> int:
        """Number of entries of ΔW over all copies."""
        return self.copies * math.prod(self.shape)

    def delta(
        self, copy: int, base: Checkpoint, tuned: Checkpoint, device: torch.device, *, sides: bool = True
    ) -> Delta | None:
        """ΔW (m, n) of one copy, dense; None where it is 0. sides, and errors: as `deltas.read_pair`."""
        pairs = self.pieces[copy]
        read = [read_pair(pair, base, tuned, device, thin=True, sides=sides) for pair in pairs]
        found = [one if isinstance(one, Delta) else None for one in read]
        if not any(found):
            return None
        name = f"{self.name}[{copy}]" if self.copies > 1 else self.name
        return _stacked(name, self, [p.part.shape(base.tensors[p.name].shape) for p in pairs], found)

    def deltas(self, base: Checkpoint, tuned: Checkpoint, device: torch.device) -> Iterator[Delta | None]:
        """`delta` of one copy after the other."""
        return (self.delta(copy, base, tuned, device) for copy in range(self.copies))


def _stacked(name: str, target: Target, shapes: Sequence[tuple[int, int]], found: Sequence[Delta | None]) -> Delta:
    """The pieces one under the other; an unchanged one is rows of zeros (then without the stored values)."""
    known = [one for one in found if one is not None]
    first = known[0]
    if len(found) == 1:
        return replace(first, name=name, place=target.place)
    assert first.dense is not None
    wide = max((one.dense.dtype for one in known if one.dense is not None), key=lambda dtype: dtype.itemsize)
    rows = [
        torch.zeros(shape, dtype=wide, device=first.dense.device)
        if one is None or one.dense is None
        else one.dense.to(wide)
        for one, shape in zip(found, shapes, strict=True)
    ]
    whole = len(known) == len(found)

    def values(side: str) -> torch.Tensor | None:
        parts = [part for one in known if (part := getattr(one, side)) is not None]
        there = whole and len(parts) == len(known)
        return torch.cat(parts) if there and len({part.dtype for part in parts}) == 1 else None

    return Delta(
        name, target.place, target.shape, first.base_dtype, first.tuned_dtype,
        math.hypot(*(one.fro_norm for one in known)),
        math.hypot(*(one.base_norm for one in known)) if whole else math.nan, math.nan,
        dense=torch.cat(rows), base=values("base"), tuned=values("tuned"),
        quantized=any(one.quantized for one in known),
    )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """What an adapter carries as it is in the fine-tune: a module (`modules_to_save`), or a bias (`bias="lora_only"`).

    tensors: leaf → name in the tuned checkpoint, all of the module's. base: leaf → name in the base, where it has one.
    why: "norm", "tied table", "another size" (a grown vocabulary), "new module", "bias". partners: the modules tied to
    it, with their own tensors: PEFT wraps each for itself and wants all of them in the file.
    """

    module: str
    tensors: Mapping[str, str]
    base: Mapping[str, str]
    why: str
    partners: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def is_bias(self) -> bool:
        return self.why == "bias"

    @property
    def name(self) -> str:
        """The module's name, or the bias's."""
        return f"{self.module}.bias" if self.is_bias else self.module

    def lines(self, status: str, note: str) -> list[tuple[Pair | None, dict[str, Any]]]:
        """Its ledger lines, each with the pair to read where the base has the tensor."""
        found: list[tuple[Pair | None, dict[str, Any]]] = []
        for leaf, name in self.tensors.items():
            before = self.base.get(leaf, "")
            pair = Pair(before, name, place(before)) if before else None
            found.append((pair, tensor_line(before, name, status, note)))
        return found

    def fro_norm(self, base: Checkpoint, tuned: Checkpoint, device: torch.device | str = "cpu") -> float:
        """‖ΔW‖_F of all its tensors, as `difference_norm`."""
        squares = [
            difference_norm(base, self.base.get(leaf, ""), tuned, name, device) ** 2
            for leaf, name in self.tensors.items()
        ]
        return math.sqrt(sum(squares))

    def n_bytes(self, tuned: Checkpoint) -> int:
        """An upper bound of the bytes it takes in a safetensors file, with its partners and their headers."""
        every = [*self.tensors.values(), *(name for held in self.partners.values() for name in held.values())]
        infos = [tuned.tensors[name] for name in every]
        sizes = [4 * math.prod(info.shape) if info.quantized else info.n_bytes for info in infos]
        return sum(sizes) + sum(TENSOR_OVERHEAD + len(name.encode()) for name in every)


def difference_norm(
    base: Checkpoint, base_name: str, tuned: Checkpoint, tuned_name: str, device: torch.device | str = "cpu"
) -> float:
    """‖W_tuned − W_base‖_F; what only the fine-tune has counts in full: added rows, a tensor that is new (the base has
    no base_name) or of another width (other trailing dimensions). Raises `NumericsError` for NaN and Inf, naming it."""
    shape = tuned.tensors[tuned_name].shape
    both = math.prod(shape)
    if base_name not in base.tensors or base.tensors[base_name].shape[1:] != shape[1:]:
        both = 0
    elif shape:
        both = min(both, math.prod(base.tensors[base_name].shape))
    new = _runs(tuned, tuned_name, 0, both, device)
    old = _runs(base, base_name, 0, both, device) if both else ()
    square = sum(_square(x.double() - y.double()) for x, y in zip(new, old, strict=False))
    square += sum(_square(x) for x in _runs(tuned, tuned_name, both, math.prod(shape), device))
    if not math.isfinite(square):
        file = tuned.tensors[tuned_name].file
        raise NumericsError(f"{tuned_name} in {file}: contains NaN or Inf; leave it out with --exclude {tuned_name}")
    return math.sqrt(square)


def _runs(side: Checkpoint, name: str, start: int, stop: int, device: torch.device | str) -> Iterator[torch.Tensor]:
    """The flat tensor's entries from start to stop, a few at a time."""
    counts = [min(_RUN, stop - first) for first in range(start, stop, _RUN)]
    if side.lies_flat(name):
        return side.read_runs(name, start, counts, torch.device(device))
    flat = side.read(name, device).reshape(-1)[start:stop]
    return iter(torch.split(flat, _RUN)) if counts else iter(())


def _square(run: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(run, dtype=torch.float64)) ** 2


@dataclass
class Selection:
    """What of an update an adapter carries, and what not.

    chosen: by LoRA. whole: as it is. left_out: (the pair, or None where the base has nothing to compare with; its
    ledger line, status "left out" or "excluded", the reason as note). notes: for the user. modules: the model in
    memory. sizes: rows of the table of words, base and tuned, where they differ. matching: its ledger has what no
    adapter could carry, such as buffers and what only the base has; with chosen, whole and left_out that is every
    tensor.
    """

    chosen: list[Target] = field(default_factory=list)
    whole: list[Whole] = field(default_factory=list)
    left_out: list[tuple[Pair | None, dict[str, Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    modules: Modules = field(default_factory=lambda: Modules({}, frozenset()))
    sizes: tuple[int, int] | None = None
    matching: Matching = field(default_factory=Matching)

    def weigh(self, base: Checkpoint, tuned: Checkpoint, device: torch.device | str = "cpu") -> dict[str, float]:
        """‖ΔW‖_F of each whole module and bias, by `Whole.name`; the unchanged ones are moved to left_out."""
        norms = {one.name: one.fro_norm(base, tuned, device) for one in self.whole}
        for one in [one for one in self.whole if norms[one.name] == 0.0]:
            self.whole.remove(one)
            self.left_out += one.lines("unchanged", "")
        return {name: norm for name, norm in norms.items() if norm > 0.0}

    def at(self, ranks: Mapping[str, int]) -> "Selection":
        """What is carried at these ranks: a target without one (ΔW = 0) goes to left_out, and its bias with it."""
        bare = {target.name for target in self.chosen if not ranks.get(target.name, 0)}
        left_out = list(self.left_out)
        zero = [pair for target in self.chosen if target.name in bare for pairs in target.pieces for pair in pairs]
        left_out += [(pair, ledger_line(pair, "unchanged", "ΔW = 0: no module", 0.0, 0.0)) for pair in zero]
        lost = [one for one in self.whole if one.is_bias and one.module in bare]
        for one in lost:
            left_out += one.lines("left out", "a bias of a module without LoRA")
        return replace(
            self, left_out=left_out, chosen=[target for target in self.chosen if target.name not in bare],
            whole=[one for one in self.whole if one not in lost],
        )  # fmt: skip
