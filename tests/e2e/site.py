"""A site for browsers: a page with fifty resources that counts what arrived of them.

The page shows the count in its title and in a box that turns green.
"""

from __future__ import annotations

import json
import random
import ssl
import struct
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Iterator, NamedTuple

from tests.e2e.support import LOOPBACK
from tests.support.certificates import certificates

IMAGES, SCRIPTS = 40, 7
BINARY, CHUNKED = "/binary", "/chunked"
# Bytes of each chunk.
CHUNKS = (1, 4096, 16, 30_000, 255, 65_536)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>not yet</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="/style.css">%(scripts)s</head>
<body><div id="box">not yet</div><p>%(images)s</p><pre id="wrong"></pre>
<script>
const wanted = %(wanted)s, wrong = [];

function adler32(bytes) {
  let a = 1, b = 0;
  for (const byte of bytes) { a = (a + byte) %% 65521; b = (b + a) %% 65521; }
  return b * 65536 + a;
}

async function fetched(path) {
  const bytes = new Uint8Array(await (await fetch(path)).arrayBuffer());
  return bytes.length == wanted[path].size && adler32(bytes) == wanted[path].adler32;
}

function shown(path) {
  if (path.endsWith(".png")) {
    return document.querySelector(`img[src="${path}"]`).naturalWidth == wanted[path].width;
  }
  if (path.endsWith(".js")) return window.ran.includes(path);
  return getComputedStyle(document.getElementById("box")).borderTopWidth == "5px";
}

function whole(path) {
  const [entry] = performance.getEntriesByName(new URL(path, location).href);
  return entry !== undefined && entry.encodedBodySize == wanted[path].size;
}

async function count() {
  const paths = Object.keys(wanted), good = [];
  for (const path of paths) {
    const isFetched = ["%(binary)s", "%(chunked)s"].includes(path);
    const arrived = await (isFetched ? fetched(path) : shown(path));
    (arrived && whole(path) ? good : wrong).push(path);
  }
  document.title = document.getElementById("box").textContent = `${good.length} of ${paths.length}`;
  document.getElementById("wrong").textContent = wrong.join(" ");
  if (!wrong.length) document.getElementById("box").className = "all";
}
window.onload = () => count().catch(error => document.title = error);
</script></body></html>
"""
STYLE = b"""body { font: 20px sans-serif } img { height: 24px; margin: 2px }
#box { border: 5px solid black; padding: 20px; background: red; color: white }
#box { font-size: 60px; text-align: center }
#box.all { background: green }
"""


class Resource(NamedTuple):
    """A file of the site. `width` is that of an image."""

    content_type: str
    body: bytes
    width: int = 0


def _png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """Return an image of one colour. Noise in its last line makes it compress badly."""
    lines = [bytes(colour) * width] * (height - 1) + [random.Random(width).randbytes(3 * width)]
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def _resources() -> dict[str, Resource]:
    """Return the files by path. All images differ in width, all scripts in length."""
    files = {"/style.css": Resource("text/css", STYLE)}
    for number in range(SCRIPTS):
        path = f"/script{number}.js"
        code = f"(window.ran ??= []).push('{path}');\n//{'x' * 5_000 * number}\n"
        files[path] = Resource("text/javascript", code.encode())
    for number in range(IMAGES):
        width, colour = 16 + number, (6 * number, 255 - 6 * number, 128)
        files[f"/image{number}.png"] = Resource("image/png", _png(width, 24, colour), width)
    files[BINARY] = Resource("application/octet-stream", random.Random(1).randbytes(2_000_000))
    files[CHUNKED] = Resource("application/octet-stream", random.Random(2).randbytes(sum(CHUNKS)))
    return files


def _page() -> bytes:
    wanted = {
        path: {"size": len(body), "adler32": zlib.adler32(body), "width": width}
        for path, (_, body, width) in RESOURCES.items()
    }
    scripts = "".join(
        f'<script src="{path}"></script>' for path in RESOURCES if path.endswith(".js")
    )
    images = "".join(f'<img src="{path}">' for path in RESOURCES if path.endswith(".png"))
    return (
        PAGE
        % {
            "wanted": json.dumps(wanted),
            "scripts": scripts,
            "images": images,
            "binary": BINARY,
            "chunked": CHUNKED,
        }
    ).encode()


RESOURCES = _resources()
INDEX = Resource("text/html; charset=utf-8", _page())


class Site(ThreadingHTTPServer):
    """Serves the page, with TLS if there is a context, and records its requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.port: int = self.server_address[1]
        self.paths: list[str] = []
        # Client ports of the connections that carried a request.
        self.clients: set[int] = set()
        if context:
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, *_: object) -> None:
        """Ignore errors: a browser may close any connection. Its page counts what is missing."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Otherwise the body of each small answer waits 40 ms until its head is acknowledged.
    disable_nagle_algorithm = True
    server: Site

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        self.server.clients.add(self.client_address[1])
        resource = INDEX if self.path == "/" else RESOURCES.get(self.path)
        self.send_response(200 if resource else 404)
        content_type, body, _ = resource or Resource("text/plain", b"not found\n")
        self.send_header("Content-Type", content_type)
        if self.path == CHUNKED:
            self._send_chunks(body)
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _send_chunks(self, body: bytes) -> None:
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        start = 0
        for size in CHUNKS:
            self.wfile.write(b"%x\r\n%b\r\n" % (size, body[start : start + size]))
            start += size
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_site(site: Site) -> Iterator[Site]:
    with site:
        threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        yield site
        site.shutdown()


def tls_context() -> ssl.SSLContext:
    """Return the context of a site with TLS."""
    files = certificates()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.path("server.pem"), files.path("server.key"))
    return context
