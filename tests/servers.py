"""A server of files on this machine that counts what it sends, and fails as servers do."""

import email.utils
import hashlib
import http.server
import re
import socket
import struct
import threading
from contextlib import contextmanager
from functools import cache

_AT_ONCE = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a reset


class Files:
    """What a server has, `files` (path → bytes), and what was asked of it, `asked` (path, range, status, bytes sent).

    before(path, number of the request): "" to answer well, or a fault: a status such as "503", "drop" (half of the
    body, then the connection closes), "reset", "whole" (200 in spite of a range), "other" (other bytes than asked).
    """

    def __init__(self, root, before=None):
        self.files = {f"/{p.relative_to(root)}": p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        self.before = before or (lambda path, number: "")
        self.asked, self.headers, self.marks, self.address = [], [], True, ""

    @property
    def sent(self):
        return sum(n_bytes for *_, n_bytes in self.asked)

    def of(self, name):
        """The answers about files of this name."""
        return [one for one in self.asked if one[0].rpartition("/")[2] == name]


@cache
def _mark(body):
    return hashlib.sha256(body).hexdigest()[:16]


@contextmanager
def serving(root, before=None):
    """Serve a directory; yields its `Files`, with the address in `address`."""
    told = Files(root, before)

    class Handler(http.server.BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self):
            path = self.path.partition("?")[0]
            told.headers.append((self.path, dict(self.headers)))
            wanted = self.headers.get("Range")
            told.asked.append((path, wanted, 0, 0))
            number = len(told.asked) - 1
            fault = told.before(path, number)
            body = told.files.get(path)
            if fault.isdigit() or body is None:
                status = int(fault) if fault.isdigit() else 404
                told.asked[number] = (path, wanted, status, 0)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size, status, etag = len(body), 200, _mark(body)
            ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
            if ranged and fault != "whole":
                first, last = int(ranged[1]), min(int(ranged[2]), size - 1)
                if first >= size:
                    told.asked[number] = (path, wanted, 416, 0)
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{size}")
                    self.end_headers()
                    return
                first -= fault == "other"
                body, status = body[first : last + 1], 206
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            if told.marks:
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault in ("drop", "reset"):
                body = body[: len(body) // 2]
            told.asked[number] = (path, wanted, status, len(body))
            self.wfile.write(body)
            if fault == "reset":
                self.connection.setsockopt(*_AT_ONCE)
            if fault in ("drop", "reset"):
                self.close_connection = True

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    told.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
