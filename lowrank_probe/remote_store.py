"""What a server with files looks like to us: `Store`, its answers, and patience with failures that pass. No torch."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from lowrank_probe.errors import CheckpointError

# Seconds before each further try of what failed for a reason that may pass.
WAITS_S: Final = (0.25, 0.5, 1.0, 2.0)
_LONGEST_S: Final = 60.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Stat:
    """What is known of a file without reading it.

    n_bytes: its size. marks: what tells one version of it from another, such as its ETag and its time, where the
    protocol gives them. head: its first bytes, where they came along.
    """

    n_bytes: int
    marks: Mapping[str, str] = field(default_factory=dict)
    head: bytes = b""

    def differs(self, other: "Stat") -> bool:
        """Whether they are of two versions of a file: by size, or the first mark that both have."""
        both = [key for key in self.marks if key in other.marks]
        return self.n_bytes != other.n_bytes or any(self.marks[key] != other.marks[key] for key in both[:1])


class Span(Protocol):
    """A run of a file's bytes, read from its first to its last, as an unbuffered file is."""

    def readinto(self, view: memoryview, /) -> int | None: ...
    def close(self) -> None: ...


class Store(Protocol):
    """The files under one address, each named by its path from there.

    root: the address as it may be shown and kept: without password, signature or other query. forbidden: why a file was
    taken as missing that may only be hidden from us, as object stores answer; "" where none was. All methods raise
    `CheckpointError`, one line that names the file, for what stays wrong after a few tries.
    """

    root: str
    forbidden: str

    def stat(self, path: str) -> Stat | None:
        """What is known of a file, asked for once; None where there is none."""

    def read(self, path: str) -> bytes:
        """All of a small file."""

    def span(self, path: str, start: int, stop: int) -> Span:
        """Its bytes from `start` to before `stop`, by one request as long as nothing fails, and no others."""

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file is another than at the first look."""


class Missing(Exception):  # noqa: N818 - an answer
    """No such file; forbidden: as in `Store`."""

    def __init__(self, forbidden: str = "") -> None:
        super().__init__(forbidden)
        self.forbidden = forbidden


class Passing(Exception):  # noqa: N818 - a reason to wait, not an error
    """A failure that may pass; wait_s: what the server asks to wait."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def patiently(action: Callable[[], Answer], name: str) -> Answer:
    """What the action gives; tried again after each of `WAITS_S` where it raises `Passing`, then `CheckpointError`."""
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except Passing as error:
            if wait_s is None:
                raise CheckpointError(
                    f"{name}: cannot be read: {error} ({len(WAITS_S) + 1} tries); try again, what a run with --out "
                    "has finished is kept"
                ) from None
            time.sleep(max(wait_s, min(error.wait_s, _LONGEST_S)))
    raise AssertionError("unreachable")


def changed(name: str, before: Stat, now: Stat | None) -> CheckpointError:
    """The refusal of a file that is another than before."""
    told = "it is gone"
    if now is not None:
        key = next((key for key in before.marks if before.marks[key] != now.marks.get(key, before.marks[key])), "")
        told = f"{before.n_bytes} bytes before, {now.n_bytes} now"
        if before.n_bytes == now.n_bytes:
            told = f"its {key} was {before.marks[key]}, is {now.marks[key]}"
    return CheckpointError(f"{name}: changed while it was read ({told}); run again on files that stay as they are")
