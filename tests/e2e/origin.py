"""Provides an HTTP/1.1 origin with keep-alive and chunked uploads that records its requests."""

from __future__ import annotations

import hashlib
import random
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Iterator, NamedTuple

HELLO = b"hello from the origin\n"
BIG = random.Random(20).randbytes(20_000_000)


class Seen(NamedTuple):
    """A request that the origin received."""

    method: str
    path: str
    port: int
    """The client's port: it tells connections apart."""
    fields: dict[str, str]
    """Names in lower case."""
    body: bytes


class Origin(ThreadingHTTPServer):
    """Python's HTTP server on loopback. `seen` are the requests so far.

    /hello and /big return HELLO and BIG, /chunked returns HELLO in chunks of one byte. An upload is
    answered with its SHA-256.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[Seen] = []

    @property
    def port(self) -> int:
        return self.server_address[1]

    def url(self, path: str = "/hello", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def serving() -> Iterator[Origin]:
    """Run an origin."""
    with Origin() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Origin

    def do_GET(self) -> None:
        self._record(b"")
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for byte in HELLO:
                self.wfile.write(b"1\r\n%c\r\n" % byte)
            self.wfile.write(b"0\r\n\r\n")
        else:
            self._answer(BIG if self.path == "/big" else HELLO)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        body = self._body()
        self._record(body)
        self._answer(hashlib.sha256(body).hexdigest().encode())

    do_POST = do_PUT

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            assert self.rfile.readline() == b"\r\n"
        assert self.rfile.readline() == b"\r\n"
        return b"".join(pieces)

    def _record(self, body: bytes) -> None:
        fields = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.command, self.path, self.client_address[1], fields, body))

    def log_message(self, *_: object) -> None:
        pass
