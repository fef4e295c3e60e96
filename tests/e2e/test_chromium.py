"""Headless Chromium loads a page of fifty resources through netproxyd.

The page itself counts the resources that arrived with the right bytes. It shows the count in its
title and in a box that turns green. The tests are skipped without Chromium.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import ssl
import struct
import subprocess
import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.support import ANY_PORT, LOOPBACK, SECONDS, Netproxyd, environment, program, wait_for
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
# A name, so that the proxy has to look it up.
HOST = "localhost"
IMAGES, SCRIPTS = 40, 7
BINARY, CHUNKED = "/binary", "/chunked"
# Bytes of each chunk.
CHUNKS = (1, 4096, 16, 30_000, 255, 65_536)
# The limit for a browser to start, load the page and end, which takes one to three seconds.
LOAD_SECONDS = 60.0
# The page's own clock. It stands still while anything is being loaded.
VIRTUAL_MILLISECONDS = 10_000
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# To the origin. A browser keeps six connections at a time open, and so must the proxy.
MOST_CONNECTIONS = 12
# The browser's own requests go neither to the proxy nor anywhere else.
BROWSER_HOSTS = ("*.google.com", "*.googleapis.com", "*.gvt1.com")
BYPASS = ";".join(("<-loopback>", *BROWSER_HOSTS))
RESOLVER_RULES = "MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
# How a good connection may end: the browser resets idle ones when it ends.
ENDS = {"closed", "reset", "client reset", "done"}
_RECORD = re.compile(
    r" msg=finished .* target=(\S+) .*upstream=direct sent=(\d+) received=(\d+) .*ended=(.*)$"
)

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


class Route(NamedTuple):
    """How the browser loads the page."""

    proxy: str
    """Scheme of the proxy, as Chromium calls it."""
    origin: str
    """Scheme of the page."""
    target: str
    """The host that the browser asks the proxy for."""


ROUTES = {
    "socks5": Route("socks5", "http", HOST),
    "socks4": Route("socks4", "http", LOOPBACK),
    "forward": Route("http", "http", HOST),
    "socks5-https": Route("socks5", "https", HOST),
    "connect-https": Route("http", "https", HOST),
    "tls-forward": Route("https", "http", HOST),
    "tls-connect-https": Route("https", "https", HOST),
}


# -- the site


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
ALL_BYTES = sum(len(resource.body) for resource in (INDEX, *RESOURCES.values()))


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
def _serving(site: Site) -> Iterator[Site]:
    with site:
        threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True).start()
        yield site
        site.shutdown()


# -- the browser


@pytest.fixture(scope="module")
def browser() -> str:
    return next(filter(None, map(shutil.which, BROWSERS)), None) or program(BROWSERS[0])


class Loaded(NamedTuple):
    """What the browser has made of the page."""

    dom: str
    screenshot: bytes
    errors: str


def _load(browser: str, directory: Path, proxy: str, url: str) -> Loaded:
    """Load a page with a new profile in `directory`. Return the page as it is in the end."""
    picture = directory / "screenshot.png"
    command = (
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--ignore-certificate-errors",
        f"--user-data-dir={directory / 'profile'}",
        f"--proxy-server={proxy}",
        f"--proxy-bypass-list={BYPASS}",
        f"--host-resolver-rules={RESOLVER_RULES}",
        f"--virtual-time-budget={VIRTUAL_MILLISECONDS}",
        "--window-size=1000,400",
        f"--screenshot={picture}",
        "--dump-dom",
        url,
    )
    process = subprocess.run(
        command,
        cwd=directory,
        env=environment(HOME=str(directory)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LOAD_SECONDS,
    )
    errors = process.stderr.decode("utf-8", "replace")
    assert process.returncode == 0, errors
    return Loaded(
        process.stdout.decode("utf-8", "replace"),
        picture.read_bytes() if picture.exists() else b"",
        errors,
    )


# -- the daemon


class Record(NamedTuple):
    """An access record of the daemon."""

    target: str
    sent: int
    received: int
    ended: str


def _records(daemon: Netproxyd) -> list[Record]:
    matches = filter(None, map(_RECORD.search, daemon.log.splitlines()))
    return [
        Record(match[1], int(match[2]), int(match[3]), match[4].strip('"')) for match in matches
    ]


@pytest.fixture
def daemon(netproxyd: Start, route: str) -> Netproxyd:
    """A daemon, with a second listener with TLS if the route needs one."""
    if ROUTES[route].proxy != "https":
        return netproxyd("-l", ANY_PORT)
    tls = f"{{name: tls, listen: '{LOOPBACK}:0', tls: {certificates().listener()}}}"
    return netproxyd(config=f"listeners: [{{name: plain, listen: '{LOOPBACK}:0'}}, {tls}]\n")


@pytest.fixture
def site(route: str) -> Iterator[Site]:
    context = None
    if ROUTES[route].origin == "https":
        files = certificates()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files.path("server.pem"), files.path("server.key"))
    with _serving(Site(context)) as server:
        yield server


@pytest.mark.parametrize("route", ROUTES)
def test_chromium_loads_a_page_of_fifty_resources(
    browser: str, daemon: Netproxyd, site: Site, tmp_path: Path, route: str
) -> None:
    proxy, origin, target = ROUTES[route]
    loaded = _load(
        browser,
        tmp_path,
        f"{proxy}://{LOOPBACK}:{daemon.tcp_ports[-1]}",
        f"{origin}://{HOST}:{site.port}/",
    )
    count = f"{len(RESOURCES)} of {len(RESOURCES)}"
    assert f"<title>{count}</title>" in loaded.dom, loaded.errors + loaded.dom
    assert f'<div id="box" class="all">{count}</div>' in loaded.dom
    assert loaded.screenshot.startswith(PNG_MAGIC), loaded.errors
    assert sorted(site.paths) == sorted(["/", *RESOURCES])
    assert 1 < len(site.clients) <= MOST_CONNECTIONS
    # A record for each forwarded request, or for each tunnelled connection.
    records = len(site.paths) if route.endswith("forward") else len(site.clients)
    _check_records(daemon, f"{target}:{site.port}", records)


def _check_records(daemon: Netproxyd, target: str, count: int) -> None:
    """Wait for at least `count` access records, which together have received the whole page."""

    def complete() -> bool:
        records = _records(daemon)
        return (
            sum(record.sent > 0 for record in records) >= count
            and sum(record.received for record in records) >= ALL_BYTES
        )

    wait_for(
        complete, SECONDS, f"{count} access records with {ALL_BYTES} bytes:\n{daemon.log[-3000:]}"
    )
    assert {record.target for record in _records(daemon)} == {target}
    assert {record.ended for record in _records(daemon)} <= ENDS
