"""What one matrix takes in memory while it is worked on, in bytes, and how much there is for all of them.

Legend: m out, n in, k = min(m, n); s bytes of an entry of ΔW: 4, or 8 where a side is stored in float32 or wider. Both
sides together take s bytes an entry, too.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from lowrank_probe import spilling
from lowrank_probe.deltas import PART_ENTRIES
from lowrank_probe.device_jobs import READ_AHEAD, Memory
from lowrank_probe.devices import Choice
from lowrank_probe.errors import ProbeError
from lowrank_probe.float64 import DEVICE_ENTRIES, SPILLED_ENTRIES
from lowrank_probe.staged_reads import AHEAD, STAGE_BYTES
from lowrank_probe.words import file_size

Item = TypeVar("Item")
# Entries that are upcast at a time on a GPU while a Gram matrix is formed.
_GRAM_CHUNK: Final = DEVICE_ENTRIES // 2
# Short sides up to this are the CPU's: with 256 an H200 took 13 ms a matrix, of which 2 in the eigen-solver, a core 12.
SMALL: Final = 512
# What Python, torch and the report take of a process's memory, and CUDA's context and workspaces of a card's.
HOST_RESERVE: Final = 700_000_000
CARD_RESERVE: Final = 800_000_000
# Page-locked memory of a card: of every matrix that is read, two files' buffers, and one of each that is copied from.
STAGED_BYTES: Final = READ_AHEAD * 2 * (AHEAD + 1) * STAGE_BYTES
# Share of a card's free memory that is taken where nothing was asked for; its allocator wastes some.
OF_FREE: Final = 0.85


@dataclass(frozen=True)
class Footprint:
    """Bytes of one matrix (m, n) at most, in all that is done for its row of the table.

    dequantized: both sides are made in memory, by whole tensors. exact_tail: by an SVD of the matrix itself. factored:
    the update is an adapter's, and only the base's matrix is read, for its norm.
    """

    shape: tuple[int, int]
    s: int
    dequantized: bool = False
    exact_tail: bool = False
    factored: bool = False

    @property
    def loading(self) -> float:
        """Both sides, ΔW, and a part of each upcast."""
        return self.waiting + self.s * 6 * min(math.prod(self.shape), PART_ENTRIES)

    @property
    def waiting(self) -> float:
        """Both sides and ΔW."""
        return (1.0 if self.factored else 2.0) * self.s * math.prod(self.shape)

    @property
    def computing(self) -> float:
        """Also a Gram matrix, or what is drawn and corrected for the noise, of the rows that moved."""
        size = math.prod(self.shape)
        if self.factored:
            return self.waiting
        # Copies of both sides and ΔW where some rows did not move; steps and errors in bf16, draws, ΔW in float32.
        noise = self.waiting + (2 + 2 + 4 + (self.s - 4)) * size
        return self.waiting + max(noise, grams(3, self.shape), 16.0 * size * self.exact_tail)

    @property
    def most(self) -> float:
        """From its reading to its end."""
        return max(self.loading, self.computing)

    @property
    def on_disk(self) -> float:
        """What is in memory of one whose tensors lie on disk: two Gram matrices, and parts."""
        size = math.prod(self.shape)
        return (
            16.0 * min(self.shape) ** 2 + 16.0 * SPILLED_ENTRIES
            + (5.0 * size if self.dequantized else 0.0) + 16.0 * size * self.exact_tail
        )  # fmt: skip


def grams(count: int, shape: tuple[int, int]) -> float:
    """Bytes of so many float64 Gram matrices, or of one and a part of ΔW (m, n) upcast."""
    size, gram = math.prod(shape), min(shape) ** 2
    return 8.0 * max(count * gram, gram + min(size, _GRAM_CHUNK))


@dataclass(frozen=True)
class Room:
    """Bytes that matrices may take: on each card, and on the host; ∞ where there is no bound. folder: where those lie
    that are larger than the host's."""

    card: float
    host: float
    folder: Path

    def place(self, device: torch.device, most: Callable[[], float]) -> AbstractContextManager[None]:
        """What a matrix is read and computed in that takes `most()` bytes: of a host, its disk where needed."""
        if device.type != "cpu" or math.isinf(self.host) or most() <= self.host:
            return nullcontext()
        return spilling.on_disk(self.folder)

    def takes(self, shape: tuple[int, int], most: float) -> bool:
        """Whether a matrix (m, n) that takes so many bytes is the CPU's, where there are cards: it is too large for
        them, or so small that they would wait for its launches."""
        return most > self.card or min(shape) <= SMALL

    def bound(
        self, device: torch.device, items: Sequence[Item], on_card: Memory, on_disk: Callable[[Item], float],
        name: Callable[[Item], str],
    ) -> Memory:  # fmt: skip
        """What bounds `run_jobs` on a device. on_card: what items take where they are in memory, and the most of all
        together on a card; on_disk: what one takes whose tensors lie on disk.

        Raises `ProbeError` for one that the host has no room for even so.
        """
        if device.type != "cpu":
            return replace(on_card, limit=min(on_card.limit, self.card))
        if math.isinf(self.host):
            return replace(on_card, limit=math.inf)
        for item in items:
            needed = min(on_disk(item), on_card.most(item))
            if needed > self.host:
                enough = math.ceil((needed + HOST_RESERVE) / 1e8) / 10
                raise ProbeError(
                    f"{name(item)}: needs --memory {enough:g}GB, found {file_size(self.host + HOST_RESERVE)}; give "
                    f"more, or leave it out with --exclude {name(item)}"
                )

        def held(item: Item) -> float:
            return found if (found := on_card.most(item)) <= self.host else on_disk(item)

        return Memory(self.host, held, held, held)


def find_room(memory: float | None, gpu_memory: float | None, choice: Choice, folder: Path | None) -> Room:
    """The room there is; memory, gpu_memory: what was asked for, of this process and on each card, in bytes.

    A card's is what is free on the fullest of them, where no less was asked for. folder: None for that of temporary
    files.
    """
    n_cards = 1 + len(choice.others) if choice.device.type == "cuda" else 0
    host = math.inf if memory is None else memory - HOST_RESERVE - n_cards * STAGED_BYTES
    card = math.inf if gpu_memory is None else gpu_memory - CARD_RESERVE
    if choice.device.type == "cuda" and not choice.cluster:
        card = min(card, OF_FREE * min(map(_free, (choice.device, *choice.others))))
    return Room(card, host, folder or Path(tempfile.gettempdir()))


def _free(card: torch.device) -> float:
    """Bytes that nobody uses, those among them that torch has kept for this process."""
    kept = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return torch.cuda.mem_get_info(card)[0] + kept
