"""What a run has finished so far: kept at once, matrix by matrix, so that one that was killed goes on where it was.

`<out>/.unfinished/` holds the log (`record_log`), whose first record says what the run is, every other one what was
found for a matrix, and the number of the process at work. It is removed when the run's files are all in place.
"""

import json
import math
import shutil
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_probe import outputs
from lowrank_probe.errors import OutputError
from lowrank_probe.narrowing import CODES
from lowrank_probe.outputs import LOG, UNFINISHED
from lowrank_probe.record_log import Record, RecordLog, read_at
from lowrank_probe.strict_json import plain
from lowrank_probe.torch_dtypes import DTYPES


@dataclass(frozen=True)
class _Held:
    """Where one tensor lies in the log."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """What a log holds of some matrices, to be read by other processes: they need the file, and are given the rest.

    file: the log, by its absolute path. held: key → (facts, tensors).
    """

    file: Path
    held: Mapping[str, tuple[dict[str, Any], dict[str, _Held]]]

    def has(self, key: str) -> bool:
        return key in self.held

    def facts(self, key: str) -> dict[str, Any]:
        """The facts kept under a key."""
        return self.held[key][0]

    def names(self, key: str) -> list[str]:
        """The tensors kept under a key."""
        return list(self.held[key][1])

    def get(self, key: str, name: str) -> Tensor:
        """One tensor kept under a key. Raises `OutputError` where this machine does not see the file."""
        held = self.held[key][1][name]
        try:
            with self.file.open("rb") as log:
                body = read_at(log.fileno(), held.at, math.prod(held.shape) * held.dtype.itemsize)
        except OSError as error:
            raise OutputError(
                f"{self.file}: cannot be read on {socket.gethostname()} ({outputs.why(error)}); choose an --out that "
                "every node sees"
            ) from None
        return _tensor(body, held.dtype, held.shape)


class Unfinished:
    """The log of one run's finished matrices.

    identity: what a run that goes on must share with the one that began. resumed: how many matrices were found, and how
    many damaged places that cost some; empty at a beginning. Raises `OutputError` where the output directory holds
    anything else, or another run's work, or another process is at work there.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        outputs.check_free(out)
        outputs.own(out, f"{UNFINISHED}/owner")
        self.folder = out / UNFINISHED
        told = json.loads(json.dumps(plain(dict(identity))))
        self._held: dict[str, tuple[Record, dict[str, _Held]]] = {}
        try:
            self._log = RecordLog(self.folder / LOG)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot write {LOG}: {outputs.why(error)}") from None
        if not self._log.records:
            self._append({"identity": told})
        else:
            self._check(told)
        for record in self._log.records[1:]:
            self._note(record, self._head(record))
        for name in outputs.LAST:  # of a process killed in its last moment: these files are written again
            (out / name).unlink(missing_ok=True)
        self.resumed: dict[str, int] = {}
        if self._held or self._log.n_damaged:
            self.resumed = {"n_finished": len(self._held), "n_damaged": self._log.n_damaged}

    def has(self, key: str) -> bool:
        return key in self._held

    def put(self, key: str, tensors: Mapping[str, Tensor | NDArray[np.float64]], facts: Mapping[str, Any]) -> None:
        """Keep the tensors and facts of one matrix under a key, such as "factors-00012-003"; the last ones count."""
        infos, body = list[tuple[str, str, tuple[int, ...]]](), list[memoryview]()
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                flat = tensor.detach().cpu().contiguous()
                infos.append((name, CODES[flat.dtype], tuple(flat.shape)))
                values = flat.reshape(-1).view(torch.uint8).numpy()
            else:
                values = np.ascontiguousarray(tensor, np.float64)
                infos.append((name, "F64", values.shape))
            if values.size:
                body.append(values.data.cast("B"))
        head = {"key": key, "facts": dict(facts), "tensors": infos}
        self._note(self._append(head, body), head)

    def facts(self, key: str) -> dict[str, Any]:
        """The facts kept under a key."""
        facts: dict[str, Any] = self._head(self._held[key][0])["facts"]
        return facts

    def names(self, key: str) -> list[str]:
        """The tensors kept under a key."""
        return list(self._held[key][1])

    def get(self, key: str, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """One tensor kept under a key; first, count: only so many of its rows."""
        held = self._held[key][1][name]
        shape, at = held.shape, held.at
        if len(shape) > 1 and count is not None:
            at += first * math.prod(shape[1:]) * held.dtype.itemsize
            shape = (count, *shape[1:])
        n_bytes = math.prod(shape) * held.dtype.itemsize
        return _tensor(self._log.read(at, n_bytes), held.dtype, shape)

    def kept(self, prefix: str) -> Kept:
        """What is there under keys that begin so, on the disk, for other processes to read."""
        self._log.sync()
        held = {key: (self.facts(key), tensors) for key, (_, tensors) in self._held.items() if key.startswith(prefix)}
        return Kept((self.folder / LOG).absolute(), held)

    def remove(self) -> None:
        """Remove it, the log first (without it the rest is nothing), and the output directory if that is all in it."""
        (self.folder / LOG).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _check(self, told: Mapping[str, Any]) -> None:
        there = self._head(self._log.records[0]).get("identity")
        out = self.folder.parent
        if there is None:
            raise OutputError(f"{out}: the beginning of its unfinished work is damaged; remove {self.folder}")
        if there != told:
            raise OutputError(
                f"{out}: holds the unfinished work of another run ({difference(there, told)}); "
                f"{outputs.ANOTHER_OUT}, or remove {self.folder}"
            )

    def _append(self, head: Mapping[str, Any], body: Sequence[memoryview] = ()) -> Record:
        try:
            return self._log.append(_JSON.encode(head).encode(), body)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot write {LOG}: {outputs.why(error)}") from None

    def _head(self, record: Record) -> dict[str, Any]:
        head: dict[str, Any] = json.loads(self._log.read(record.at, record.head_bytes))
        return head

    def _note(self, record: Record, head: Mapping[str, Any]) -> None:
        at, held = record.body_at, {}
        for name, code, shape in head["tensors"]:
            held[name] = _Held(at, DTYPES[code], tuple(shape))
            at += math.prod(shape) * DTYPES[code].itemsize
        self._held[head["key"]] = record, held


def _tensor(body: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    flat = torch.frombuffer(body or bytearray(1), dtype=torch.uint8)[: len(body)]
    return flat.view(dtype).reshape(shape)


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be kept")


_JSON: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_scalar)


def difference(there: Any, here: Any, where: str = "") -> str:
    """The first thing in which two identities differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        return difference(there.get(key), here.get(key), f"{where}.{key}" if where else key)
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        i = next(i for i, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
        return difference(there[i], here[i], f"{where}.{i}")
    return f"{where}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
