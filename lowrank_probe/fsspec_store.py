"""Files on whatever fsspec has a filesystem for (s3://, gs://, hf://, memory://, …), by `cat_file` of byte ranges.

Retries and credentials are the filesystem's own; what still fails is tried a few times more. Not every filesystem says
of which version of a file its bytes are: `check_unchanged` asks anew when a run has read all.
"""

from typing import Any, Final

from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_store import Missing, Passing, Stat, changed, patiently

# One request each, and memory beside the tensor that it fills.
PIECE_BYTES: Final = 1 << 26
# What filesystems call the marks of a version, the surest first.
_MARKS: Final = {
    "etag": ("ETag", "etag", "generation", "blob_id", "checksum"),
    "modified": ("LastModified", "last_modified", "mtime", "updated", "modified", "created"),
}


def filesystem(address: str) -> tuple[Any, str]:
    """(fsspec's filesystem, the path in it) of an address. Raises `CheckpointError` where there is none."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    from lowrank_probe.remote_files import shown  # which imports this module when it is needed

    protocol = address.partition("::")[0].partition("://")[0]
    root = shown(address)
    try:
        return url_to_fs(address)  # type: ignore[no-any-return]
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0].replace("_", "-")
        mend = f"pip install {package}" if package not in ("", "fsspec") else str(error)
        raise CheckpointError(f"{root}: reading {protocol}:// needs a package that is not installed: {mend}") from None
    except Exception as error:  # of whichever library: no such protocol, no credentials, an address it cannot parse
        raise CheckpointError(
            f"{root}: cannot be opened by fsspec ({_line(error)}); expected an address such as "
            "https://…, s3://…, gs://… or hf://…"
        ) from None


class FsspecStore:
    """The files under `directory` of a filesystem."""

    def __init__(self, files: Any, directory: str, root: str) -> None:
        self.root, self.forbidden = root, ""
        self._files, self._directory = files, directory.rstrip("/")
        # A filesystem without ranges of its own reads through a file object, which would read ahead.
        self._options = {} if getattr(files, "async_impl", False) else {"cache_type": "none"}
        self._stats: dict[str, Stat] = {}
        files.invalidate_cache()  # fsspec keeps one filesystem a process, and in it what an earlier run saw

    def stat(self, path: str) -> Stat | None:
        if path not in self._stats:
            found = self._look(path)
            if found is None:
                return None
            self._stats[path] = found
        return self._stats[path]

    def read(self, path: str) -> bytes:
        return self._bytes(path)

    def span(self, path: str, start: int, stop: int) -> "_FsspecSpan":
        return _FsspecSpan(self, path, start, stop)

    def check_unchanged(self) -> None:
        self._files.invalidate_cache()
        for path, before in self._stats.items():
            now = self._look(path)
            if now is None or before.differs(now):
                raise changed(self._name(path), before, now)

    def piece(self, path: str, start: int, stop: int) -> bytes:
        """Its bytes from `start` to before `stop`."""
        got = self._bytes(path, start=start, end=stop, **self._options)
        if len(got) != stop - start:
            raise CheckpointError(
                f"{self._name(path)}: asked for bytes {start}-{stop - 1}, got {len(got)} of {stop - start} (changed "
                "while it was read?)"
            )
        return got

    def _bytes(self, path: str, **options: Any) -> bytes:
        try:
            return bytes(self._do(path, lambda: self._files.cat_file(self._path(path), **options)))
        except Missing as missing:
            raise CheckpointError(missing.forbidden or f"{self._name(path)}: no such file") from None

    def _look(self, path: str) -> Stat | None:
        try:
            info = self._do(path, lambda: self._files.info(self._path(path)))
        except Missing as missing:
            self.forbidden = self.forbidden or missing.forbidden
            return None
        if info.get("type") == "directory":
            return None
        if info.get("size") is None:
            raise CheckpointError(f"{self._name(path)}: its server does not tell its size; download it")
        marks = {
            mark: str(next(info[key] for key in keys if info.get(key)))
            for mark, keys in _MARKS.items()
            if any(info.get(key) for key in keys)
        }
        return Stat(int(info["size"]), marks)

    def _do(self, path: str, action: Any) -> Any:
        def once() -> Any:
            try:
                return action()
            except FileNotFoundError:
                raise Missing from None
            except PermissionError as error:  # object stores say so of what is not there
                raise Missing(f"{self._name(path)}: access is denied ({_line(error)}); are credentials set?") from None
            except Exception as error:  # every library has its own
                raise Passing(f"{type(error).__name__}: {_line(error)}") from None

        return patiently(once, self._name(path))

    def _path(self, path: str) -> str:
        return f"{self._directory}/{path}" if path else self._directory

    def _name(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


class _FsspecSpan:
    """A run of bytes of one file, `PIECE_BYTES` a request."""

    def __init__(self, store: FsspecStore, path: str, start: int, stop: int) -> None:
        self._store, self._path, self._at, self._stop = store, path, start, stop
        self._have = memoryview(b"")

    def readinto(self, view: memoryview, /) -> int:
        if not self._have and self._at < self._stop:
            stop = min(self._stop, self._at + PIECE_BYTES)
            self._have = memoryview(self._store.piece(self._path, self._at, stop))
            self._at = stop
        got = min(len(view), len(self._have))
        view[:got] = self._have[:got]
        self._have = self._have[got:]
        return got

    def close(self) -> None:
        self._have = memoryview(b"")


def _line(error: object) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
