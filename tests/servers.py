"""A server of files on this machine that counts what it sends, and fails as servers do."""

import email.utils
import hashlib
import http.server
import re
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from functools import cache
from urllib.parse import urlsplit

_AT_ONCE = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing sends a reset


class Files:
    """What a server has, `files` (path → bytes), and what was asked of it, `asked` (path, range, status, bytes sent).

    before(path, number of the request): "" to answer well, or a fault: a status such as "503", "drop" (half of the
    body, then the connection closes), "reset", "whole" (200 in spite of a range), "other" (other bytes than asked),
    or an address or a path to redirect to. connections: those that were opened.
    """

    def __init__(self, root, before=None):
        self.files = {f"/{p.relative_to(root)}": p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        self.before = before or (lambda path, number: "")
        self.asked, self.headers, self.connections, self.marks, self.address = [], [], [], True, ""

    def hang_up(self):
        """Close every connection, as a server does with one that is idle for long."""
        for connection in self.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

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
def serving(root, before=None, context=None):
    """Serve a directory, by TLS where there is a context for it; yields its `Files`, with the address in `address`."""
    told = Files(root, before)

    class Handler(http.server.BaseHTTPRequestHandler):
        disable_nagle_algorithm = True
        protocol_version = "HTTP/1.1"  # a connection serves one request after the other

        def setup(self):
            told.connections.append(self.request)
            super().setup()

        def do_GET(self):
            path = urlsplit(self.path).path  # a proxy is asked for whole addresses
            told.headers.append((self.path, dict(self.headers)))
            wanted = self.headers.get("Range")
            told.asked.append((path, wanted, 0, 0))
            number = len(told.asked) - 1
            fault = told.before(path, number)
            body = told.files.get(path)
            if "/" in fault:
                told.asked[number] = (path, wanted, 302, 0)
                self.send_response(302)
                self.send_header("Location", fault)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
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
    server.daemon_threads = False  # closing waits for them
    scheme = "http"
    if context is not None:
        scheme = "https"
        server.socket = context.wrap_socket(server.socket, server_side=True)
    told.address = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        thread.join()
        told.hang_up()
        server.server_close()
