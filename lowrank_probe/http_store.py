"""Files on a plain HTTP server, by range requests over connections that are kept (`http_connections`).

A span is one request, read as it comes; where the connection breaks, the rest of it is asked for again. Every answer
says which version of the file it is of (ETag, Last-Modified, size), and is compared with the first.
Source: RFC 9110, sections 8.8 (validators) and 14 (range requests).
"""

import base64
import re
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, URLSchemeUnknown

from lowrank_probe import __version__, http_connections
from lowrank_probe.errors import CheckpointError
from lowrank_probe.remote_store import Missing, Passing, Stat, changed, patiently

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
        basic = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
        self._authorization = {"Authorization": basic} if at else {}
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

    def answer(self, path: str, start: int, stop: int) -> BaseHTTPResponse:
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

    def _ask(self, path: str, headers: Mapping[str, str]) -> BaseHTTPResponse:
        """Raises `Passing`, `Missing`, `CheckpointError`."""
        name = self._name(path)
        below = f"{self._parts.path.rstrip('/')}/{quote(path)}" if path else self._parts.path
        address = urlunsplit(self._parts._replace(path=quote(below, safe=_SAFE)))
        try:
            answer = http_connections.get(address, {**self._headers, **headers}, self._authorization)
        except URLSchemeUnknown as error:  # of where it redirects to, or of a proxy
            raise CheckpointError(f"{name}: {error}") from None
        except ValueError:  # what it says has the query in it
            raise CheckpointError(
                f"{name}: is no valid address, or redirects to none, or its proxy's is none (a port that is no number?)"
            ) from None
        except (OSError, HTTPError) as error:
            told = next((one for one in error.args if isinstance(one, BaseException)), error)  # urllib3's wrap them
            reason = error.__cause__ or told
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise CheckpointError(f"{name}: {reason}") from None
            raise Passing(f"its server cannot be reached ({str(reason) or type(reason).__name__})") from None
        if answer.status < 300:
            return answer
        http_connections.close(answer)
        raise self._refusal(path, answer)

    def _refusal(self, path: str, answer: BaseHTTPResponse) -> Exception:
        name, told = self._name(path), f"its server answers {answer.status} {answer.reason or ''}".rstrip()
        if answer.status in _PASSING:
            wait = answer.headers.get("Retry-After") or ""
            return Passing(told, float(wait) if wait.isdigit() else 0.0)
        if answer.status in _MISSING:
            return Missing()
        if answer.status == 403:  # object stores say so of what is not there
            return Missing(f"{name}: {told}; {_MEND}")
        if answer.status == 401:
            return CheckpointError(f"{name}: {told}; {_MEND}")
        if answer.status == 416:
            return self._past_the_end(path, answer)
        return CheckpointError(f"{name}: {told}; download it and give the directory")

    def _range(self, path: str, answer: BaseHTTPResponse) -> tuple[Stat, int, int]:
        """(what the answer says of the file, its first byte, its last byte)."""
        found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        if found is None or found[1] is None:
            raise CheckpointError(
                f"{self._name(path)}: its server does not say which bytes it sends (Content-Range is "
                f"{answer.headers.get('Content-Range')!r}); download it and give the directory"
            )
        return Stat(int(found[3]), _marks(answer)), int(found[1]), int(found[2])

    def _past_the_end(self, path: str, answer: BaseHTTPResponse) -> Exception:
        found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
        now = Stat(int(found[3]) if found else 0)
        before = self._stats.get(path)
        if before is None:
            return CheckpointError(f"{self._name(path)}: is empty; is the upload complete?")
        return changed(self._name(path), before, now)

    def _no_ranges(self, path: str, answer: BaseHTTPResponse) -> CheckpointError:
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


def _marks(answer: BaseHTTPResponse) -> dict[str, str]:
    etag, modified = answer.headers.get("ETag"), answer.headers.get("Last-Modified")
    found = {"etag": etag and etag.removeprefix("W/"), "modified": modified}
    return {key: value for key, value in found.items() if value}


def _read(answer: BaseHTTPResponse) -> bytes:
    try:
        return answer.read()
    except (OSError, HTTPError) as error:
        raise Passing(f"the connection broke ({type(error).__name__})") from None


class _HttpSpan:
    """A run of bytes of one file: asked for when first read, and again from where a broken answer ended."""

    def __init__(self, store: HttpStore, path: str, start: int, stop: int) -> None:
        self._store, self._path, self._at, self._stop = store, path, start, stop
        self._answer: BaseHTTPResponse | None = None

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
        except (OSError, HTTPError) as error:
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
