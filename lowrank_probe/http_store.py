"""Files on a plain HTTP server, by range requests through the standard library: nothing else to install.

A span is one request, read as it comes; where the connection breaks, the rest of it is asked for again. Every answer
says which version of the file it is of (ETag, Last-Modified, size), and is compared with the first.
Source: RFC 9110, sections 8.8 (validators) and 14 (range requests).
"""

import base64
import re
import ssl
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, build_opener

from lowrank_probe import __version__
from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_store import Missing, Passing, Stat, changed, patiently

TIMEOUT_S: Final = 20.0
# The first request of a file brings these, the length of a safetensors header.
_HEAD: Final = 8
_PIECE: Final = 1 << 20
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
_MISSING: Final = (404, 410)
_RANGE: Final = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_MEND: Final = "give an address that may be read, https://user:password@… or a signed one, or download it"
_SAFE: Final = "/%:=~+!$,;'@()*&"


class HttpStore:
    """The files under `address`; its query (a signature) goes with every request, its user and password as Basic."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        user, at, host = parts.netloc.rpartition("@")
        self._parts = parts._replace(netloc=host, fragment="")
        self.root = urlunsplit((parts.scheme, host, parts.path, "", "")).rstrip("/")
        self._headers = {"Accept-Encoding": "identity", "User-Agent": f"lowrank_probe/{__version__}"}
        self._authorization = f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if at else ""
        self._opener = build_opener()
        self._stats: dict[str, Stat] = {}
        self.forbidden = ""

    def stat(self, path: str) -> Stat | None:
        if path not in self._stats:
            try:
                found = patiently(lambda: self._look(path), self._name(path))
            except Missing as missing:
                self.forbidden = self.forbidden or missing.forbidden
                return None
            self._stats[path] = found
        return self._stats[path]

    def read(self, path: str) -> bytes:
        def whole() -> bytes:
            with self._ask(path, {}) as answer:
                content = _read(answer)
                length = answer.headers.get("Content-Length")
                if length is not None and len(content) != int(length):
                    raise Passing(f"the answer ended after {len(content)} of {length} bytes")
                return content

        try:
            return patiently(whole, self._name(path))
        except Missing as missing:
            raise self._gone(path, missing) from None

    def span(self, path: str, start: int, stop: int) -> "_HttpSpan":
        return _HttpSpan(self, path, start, stop)

    def check_unchanged(self) -> None:
        """Nothing to ask: every answer was compared."""

    def answer(self, path: str, start: int, stop: int) -> HTTPResponse:
        """The answer whose body is these bytes. Raises `Passing`, `CheckpointError`."""
        try:
            answer = self._ask(path, {"Range": f"bytes={start}-{stop - 1}"})
        except Missing as missing:
            raise self._gone(path, missing) from None
        try:
            if answer.status != 206:
                raise self._no_ranges(path, answer)
            now, first, last = self._range(path, answer)
            before = self._stats.setdefault(path, now)
            if before.differs(now):
                raise changed(self._name(path), before, now)
            if (first, last) != (start, stop - 1):
                raise CheckpointError(
                    f"{self._name(path)}: asked for bytes {start}-{stop - 1}, its server answers with "
                    f"{first}-{last}; download it and give the directory"
                )
        except BaseException:
            answer.close()
            raise
        return answer

    def _look(self, path: str) -> Stat:
        with self._ask(path, {"Range": f"bytes=0-{_HEAD - 1}"}) as answer:
            if answer.status == 206:
                found, _, _ = self._range(path, answer)
                head = _read(answer)
                if len(head) != min(_HEAD, found.n_bytes):
                    raise Passing(f"the answer ended after {len(head)} bytes")
                return Stat(found.n_bytes, found.marks, head)
            # Ranges are not its business; a small file can still be read whole.
            return Stat(int(answer.headers.get("Content-Length") or 0), _marks(answer))

    def _ask(self, path: str, headers: Mapping[str, str]) -> HTTPResponse:
        """Raises `Passing`, `Missing`, `CheckpointError`."""
        name = self._name(path)
        below = f"{self._parts.path.rstrip('/')}/{quote(path)}" if path else self._parts.path
        address = urlunsplit(self._parts._replace(path=quote(below, safe=_SAFE)))
        request = Request(address, headers={**self._headers, **headers})
        if self._authorization:
            request.add_unredirected_header("Authorization", self._authorization)
        try:
            answer: HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as error:
            with error:
                told = f"its server answers {error.code} {error.reason}".rstrip()
                if error.code in _PASSING:
                    wait = error.headers.get("Retry-After") or ""
                    raise Passing(told, float(wait) if wait.isdigit() else 0.0) from None
                if error.code in _MISSING:
                    raise Missing from None
                if error.code == 403:  # object stores say so of what is not there
                    raise Missing(f"{name}: {told}; {_MEND}") from None
                if error.code == 401:
                    raise CheckpointError(f"{name}: {told}; {_MEND}") from None
                if error.code == 416:
                    raise self._past_the_end(path, error) from None
                raise CheckpointError(f"{name}: {told}; download it and give the directory") from None
        except InvalidURL:  # what it says has the query in it
            raise CheckpointError(f"{name}: is no valid address (a space, or a port that is no number?)") from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise CheckpointError(f"{name}: {reason}") from None
            raise Passing(f"its server cannot be reached ({reason or type(reason).__name__})") from None
        return answer

    def _range(self, path: str, answer: HTTPResponse) -> tuple[Stat, int, int]:
        """(what the answer says of the file, its first byte, its last byte)."""
        found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        if found is None or found[1] is None:
            raise CheckpointError(
                f"{self._name(path)}: its server does not say which bytes it sends (Content-Range is "
                f"{answer.headers.get('Content-Range')!r}); download it and give the directory"
            )
        return Stat(int(found[3]), _marks(answer)), int(found[1]), int(found[2])

    def _past_the_end(self, path: str, error: HTTPError) -> Exception:
        found = _RANGE.fullmatch(error.headers.get("Content-Range") or "")
        now = Stat(int(found[3]) if found else 0)
        before = self._stats.get(path)
        if before is None:
            return CheckpointError(f"{self._name(path)}: is empty; is the upload complete?")
        return changed(self._name(path), before, now)

    def _no_ranges(self, path: str, answer: HTTPResponse) -> CheckpointError:
        return CheckpointError(
            f"{self._name(path)}: its server has no range requests (it answers {answer.status} with the whole file); "
            "download it and give the directory, or serve it by a server that has them (nginx, Apache, an object store)"
        )

    def _gone(self, path: str, missing: Missing) -> CheckpointError:
        before, name = self._stats.get(path), self._name(path)
        if missing.forbidden or before is None:
            return CheckpointError(missing.forbidden or f"{name}: no such file")
        return changed(name, before, None)

    def _name(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root


def _marks(answer: HTTPResponse) -> dict[str, str]:
    etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    found = {"etag": etag and etag.removeprefix("W/"), "modified": modified}
    return {key: value for key, value in found.items() if value}


def _read(answer: HTTPResponse) -> bytes:
    try:
        return answer.read()
    except (OSError, HTTPException) as error:
        raise Passing(f"the connection broke ({type(error).__name__})") from None


class _HttpSpan:
    """A run of bytes of one file: asked for when first read, and again from where a broken answer ended."""

    def __init__(self, store: HttpStore, path: str, start: int, stop: int) -> None:
        self._store, self._path, self._at, self._stop = store, path, start, stop
        self._answer: HTTPResponse | None = None

    def readinto(self, view: memoryview, /) -> int:
        wanted = view[: min(len(view), self._stop - self._at, _PIECE)]
        if not wanted:
            return 0
        got = patiently(lambda: self._piece(wanted), self._store._name(self._path))
        self._at += got
        return got

    def _piece(self, view: memoryview) -> int:
        if self._answer is None:
            self._answer = self._store.answer(self._path, self._at, self._stop)
        try:
            got = self._answer.readinto(view)
        except (OSError, HTTPException) as error:
            self.close()
            raise Passing(f"the connection broke at byte {self._at} ({type(error).__name__})") from None
        if not got:
            self.close()
            raise Passing(f"the answer ended at byte {self._at}, before byte {self._stop}")
        return got

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None
