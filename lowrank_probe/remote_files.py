"""One seam for a file's bytes: a path here, or a `RemoteFile`, read by range requests and never whole. No torch.

`locate` makes one or the other of what a user typed; `read_span` and `open_span` read some of its bytes.
"""

import datetime
import os
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeAlias

from lowrank_probe import hub
from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_store import Span, Stat, Store

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(?:::|://)")
# What an address names that ends so is a file, anything else a directory: plain HTTP does not say.
_FILES: Final = (".safetensors", ".json", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class RemoteFile:
    """A file or directory on a server, with as much of `pathlib.Path` as checkpoints need.

    store: the files of one directory there. path: from that directory on; "" for itself. As text it is the address
    without what is secret in it.
    """

    store: Store
    path: str = ""

    def __str__(self) -> str:
        return f"{self.store.root}/{self.path}" if self.path else self.store.root

    def __truediv__(self, name: str) -> "RemoteFile":
        return RemoteFile(self.store, f"{self.path}/{name}" if self.path else name)

    @property
    def name(self) -> str:
        return PurePosixPath(str(self)).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> "RemoteFile":
        """The directory of a file; of the store's own directory that itself."""
        return RemoteFile(self.store, self.path.rpartition("/")[0])

    def is_file(self) -> bool:
        """By its name: whether it would be a file."""
        return self.suffix in _FILES

    def is_dir(self) -> bool:
        """By its name: whether it would be a directory."""
        return not self.is_file()

    def exists(self) -> bool:
        """Whether there is such a file (a directory has no answer of its own): one request of 8 bytes, once."""
        return self.store.stat(self.path) is not None

    def stat(self) -> Stat:
        """Raises `CheckpointError` where there is none."""
        found = self.store.stat(self.path)
        if found is None:
            raise CheckpointError(self.store.forbidden or f"{self}: no such file; is the address right?")
        return found

    def nothing_found(self, tried: str) -> CheckpointError:
        """What to say where none of the files was there."""
        return CheckpointError(
            self.store.forbidden or f"{self}: found none of {tried} there; is that the address of a directory?"
        )


File: TypeAlias = Path | RemoteFile


def is_address(text: str) -> bool:
    """Whether it is an address of something to read over a network: https://…, s3://…, hf://…"""
    return _ADDRESS.match(text) is not None


def locate(text: str) -> File:
    """The path here, or the `RemoteFile`, that a text names; asks no server.

    Raises `CheckpointError` for a page of the hub, a protocol that fsspec does not know, and one whose package is not
    installed.
    """
    if not is_address(text):
        return Path(text)
    page = hub.id_in_address(text)
    if page:
        raise CheckpointError(
            f"{shown(text)}: is a page of the hub; give the hub id, {page} (which downloads it), or hf://{page} (which "
            "reads over the network what is asked for)"
        )
    address, root = text.rstrip("/"), shown(text)
    if text.startswith(("http://", "https://")):
        from lowrank_probe.http_store import HttpStore

        path, _, query = address.partition("?")
        name = path.rpartition("/")[2] if path.endswith(_FILES) else ""
        path = path.removesuffix(f"/{name}")
        try:
            return RemoteFile(HttpStore(f"{path}?{query}" if query else path), name)
        except ValueError as error:
            raise CheckpointError(f"{root}: is no valid address ({error})") from None
    from lowrank_probe.fsspec_store import FsspecStore, filesystem

    files, path = filesystem(address)
    if "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)):
        return Path(path)
    name = path.rpartition("/")[2] if path.endswith(_FILES) else ""
    return RemoteFile(FsspecStore(files, path.removesuffix(name), root.removesuffix(f"/{name}")), name)


def refuse_addresses(*sources: Any) -> None:
    """Raise `CheckpointError` for an address among what a user gave, where whole files or directories are needed."""
    for text in (os.fspath(source) for source in sources if isinstance(source, str | os.PathLike)):
        if is_address(text):
            raise CheckpointError(
                f"{shown(text)}: this needs whole files on this machine, and an address is read in parts; download it "
                "(of the hub: give owner/name) and give its directory"
            )


def shown(text: str) -> str:
    """A path or address as it may be printed and kept: an address without user, password and query.

    >>> shown("https://me:secret@example.org/models/base/?sig=abc")
    'https://example.org/models/base'
    """
    return re.sub(r"(?<!hf)://[^/@]*@", "://", text.partition("?")[0]).rstrip("/") if is_address(text) else text


def absolute(file: File) -> str:
    """The path from the root of the disk, or the address."""
    return os.path.abspath(file) if isinstance(file, Path) else str(file)


def identity(file: File) -> dict[str, Any]:
    """Name, size, and what tells its version: the time of its last change, and its ETag where a server gives one."""
    if isinstance(file, RemoteFile):
        found = file.stat()
        return {"name": file.name, "n_bytes": found.n_bytes, **found.marks}
    stat = file.stat()
    when = datetime.datetime.fromtimestamp(stat.st_mtime, datetime.UTC).isoformat(timespec="microseconds")
    return {"name": file.name, "n_bytes": stat.st_size, "modified": when}


def size_of(file: File) -> int:
    """Its bytes. Raises `OSError` here, `CheckpointError` there."""
    return file.stat().n_bytes if isinstance(file, RemoteFile) else file.stat().st_size


def read_span(file: File, start: int, stop: int) -> bytes:
    """Its bytes from `start` to before `stop`, fewer where it ends before. Raises as `size_of`."""
    if isinstance(file, RemoteFile):
        found = file.stat()
        stop = min(stop, found.n_bytes)
        if stop <= len(found.head):
            return found.head[start:stop]
    with closing(open_span(file, start, stop)) as span:
        got = bytearray(max(0, stop - start))
        at = 0
        while at < len(got) and (n := span.readinto(memoryview(got)[at:])):
            at += n
    return bytes(got[:at])


def open_span(file: File, start: int, stop: int) -> Span:
    """Its bytes from `start` on, to be read in order, no further than `stop`, and closed. Raises as `size_of`."""
    if isinstance(file, RemoteFile):
        return file.store.span(file.path, start, stop)
    handle = open(file, "rb", buffering=0)  # noqa: SIM115 - the caller closes it
    handle.seek(start)
    return handle


def fill(view: memoryview, span: Span) -> None:
    """Read as many bytes as `view` has. Raises EOFError where it ends before, and what reading raises."""
    while view:
        got = span.readinto(view)
        if not got:
            raise EOFError
        view = view[got:]


def read_text(file: File) -> str:
    """All of a text file. Raises `OSError` here, `CheckpointError` there, and `ValueError` where it is no UTF-8."""
    if isinstance(file, RemoteFile):
        return file.store.read(file.path).decode("utf-8")
    return file.read_text(encoding="utf-8")
