"""Bytes of live storages over time, by what they are for: a `TorchDispatchMode` that sees every tensor made.

A storage counts once however many tensors view it, from the operator that made it to the moment that its last tensor is
gone (a weak reference on the storage says so). Memory inside one kernel, rounding to blocks and fragmentation are not
seen. Works on fake tensors, whose storages have sizes and no memory, as on real ones.
"""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """The largest sum of live storages in a phase, and what it was made of."""

    n_bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    time: int = 0


@dataclass
class _Storage:
    n_bytes: int
    what: str
    born: int
    alive: weakref.ref[Any]


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows storages while it is entered; `hold` names those that were there before.

    phase: what `enter` said last; new storages are `names[phase]`, or the phase itself. peaks: phase → `Peak`.
    Two gradients of one tensor are added in place where nobody else holds the first, but never on fake tensors; so the
    sum after such an addition (one without a graph) is taken one operator later, when the first is gone.
    """

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names, self.phase = names, ""
        self.peaks: dict[str, Peak] = {}
        self._live: dict[int, _Storage] = {}
        self._sums: Counter[str] = Counter()
        self._total = self._time = 0

    def enter(self, phase: str) -> None:
        """From here on it is `phase`; it starts with what is live now."""
        self.phase = phase
        self.peaks.setdefault(phase, Peak())
        self._compare()

    def hold(self, tensor: Tensor, what: str) -> None:
        """The tensor's storage is `what`, from its birth on: a peak that it was part of is set right."""
        storage = self._follow(tensor, what)
        if storage is None or storage.what == what:
            return
        for peak in self.peaks.values():
            if peak.time >= storage.born:
                peak.parts[storage.what] -= storage.n_bytes
                peak.parts[what] += storage.n_bytes
        self._sums[storage.what] -= storage.n_bytes
        self._sums[what] += storage.n_bytes
        storage.what = what

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._time += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf, self.names.get(self.phase, self.phase))
        if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled():
            self._compare()
        return out

    def _follow(self, tensor: Tensor, what: str) -> _Storage | None:
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            n_bytes = storage.nbytes()
            gone = weakref.ref(storage, lambda _: self._forget(key))
            self._live[key] = _Storage(n_bytes, what, self._time, gone)
            self._sums[what] += n_bytes
            self._total += n_bytes
        return self._live[key]

    def _forget(self, key: int) -> None:
        storage = self._live.pop(key)
        self._sums[storage.what] -= storage.n_bytes
        self._total -= storage.n_bytes

    def _compare(self) -> None:
        peak = self.peaks.get(self.phase)
        if peak is not None and self._total > peak.n_bytes:
            peak.n_bytes, peak.parts, peak.time = self._total, Counter(self._sums), self._time
