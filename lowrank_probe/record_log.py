"""An append-only file of checksummed records: after a kill every record that was appended is there, whole.

A record: MAGIC, length of its head (uint32) and of its body (uint64), CRC-32 of both, CRC-32 of these 20 bytes, then
head and body; little-endian. The operating system has a record before `append` returns, so that a killed process loses
nothing. It is on the disk (fdatasync) at once if none was for SYNC_S, else with a later one, so that a machine that
loses power loses seconds; a sync for each record would cost 1 to 20 ms.
"""

import mmap
import os
import struct
import threading
import time
import weakref
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MAGIC: Final = b"lpR1"
SYNC_S: Final = 5.0
_FRONT: Final = struct.Struct("<4sIQI")
_CHECK: Final = struct.Struct("<I")
_START: Final = _FRONT.size + _CHECK.size
# Records up to this size are put together in memory and written in one call.
_SMALL: Final = 1 << 20
_sync = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class Record:
    """Where a record lies: its head, and behind that its body."""

    at: int
    head_bytes: int
    body_bytes: int

    @property
    def body_at(self) -> int:
        return self.at + self.head_bytes

    @property
    def stop(self) -> int:
        return self.body_at + self.body_bytes


class RecordLog:
    """A log, opened to go on with it: a last record that is not whole is cut off.

    records: those found. n_damaged: gaps before one of them, where something else lies. Raises OSError.
    """

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()
        self.records, self.n_damaged = scan(self._fd)
        self._end = self.records[-1].stop if self.records else 0
        os.ftruncate(self._fd, self._end)
        self._synced = 0.0

    def append(self, head: bytes, body: Sequence[memoryview] = ()) -> Record:
        """Add a record; the buffers are bytes. Where it cannot be written (OSError) the log stays as it was."""
        crc = zlib.crc32(head)
        for part in body:
            crc = zlib.crc32(part, crc)
        n_bytes = sum(map(len, body))
        front = _FRONT.pack(MAGIC, len(head), n_bytes, crc)
        front += _CHECK.pack(zlib.crc32(front)) + head
        parts: Sequence[bytes | memoryview] = [b"".join((front, *body))] if n_bytes <= _SMALL else [front, *body]
        with self._lock:
            end = self._end
            try:
                for piece in parts:
                    end = self._write(piece, end)
                if time.monotonic() - self._synced > SYNC_S:
                    _sync(self._fd)
                    self._synced = time.monotonic()
            except OSError:
                os.ftruncate(self._fd, self._end)
                raise
            record = Record(self._end + _START, len(head), n_bytes)
            self._end = end
        return record

    def read(self, at: int, count: int) -> bytearray:
        """`count` bytes from `at`. Raises OSError where the file ends before."""
        return read_at(self._fd, at, count)

    def sync(self) -> None:
        """Have all of it on the disk, where other machines that share the disk see it."""
        with self._lock:
            _sync(self._fd)
            self._synced = time.monotonic()

    def _write(self, part: bytes | memoryview, at: int) -> int:
        """Write all of it; returns where it ends."""
        while len(part):
            done = os.pwrite(self._fd, part, at)
            part, at = part[done:], at + done
        return at


def read_at(fd: int, at: int, count: int) -> bytearray:
    """`count` bytes of an open file from `at`. Raises OSError where it ends before."""
    found = bytearray(count)
    view, done = memoryview(found), 0
    while done < count:
        got = os.preadv(fd, [view[done : done + (1 << 30)]], at + done)
        if not got:
            raise OSError(f"ends at {at + done}, expected {at + count} bytes")
        done += got
    return found


def scan(fd: int) -> tuple[list[Record], int]:
    """The whole records of a log, and the number of gaps before one of them."""
    size = os.fstat(fd).st_size
    if not size:
        return [], 0
    records, n_damaged, at = list[Record](), 0, 0
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as log:
        for record in _found(log):
            n_damaged += record.at - _START > at
            at = record.stop
            records.append(record)
    return records, n_damaged


def _found(log: mmap.mmap) -> Iterator[Record]:
    at = log.find(MAGIC)
    while at >= 0:
        record = _record_at(log, at)
        if record:
            yield record
        at = log.find(MAGIC, record.stop if record else at + 1)


def _record_at(log: mmap.mmap, at: int) -> Record | None:
    front = log[at : at + _START]
    if len(front) < _START or zlib.crc32(front[: _FRONT.size]) != _CHECK.unpack(front[_FRONT.size :])[0]:
        return None
    _, head_bytes, body_bytes, crc = _FRONT.unpack(front[: _FRONT.size])
    record = Record(at + _START, head_bytes, body_bytes)
    if record.stop > len(log):
        return None
    with memoryview(log) as whole, whole[record.at : record.stop] as part:
        return record if zlib.crc32(part) == crc else None
