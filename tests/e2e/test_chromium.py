"""Chromium, without a head, loads a page of fifty resources through the one port; skipped where there is no Chromium.

The page counts for itself what came with the right number of bytes, and says so in its title and in a green box.
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
from tests.e2e.support import (
    ANY_PORT,
    CLEAN_SECONDS,
    LOOPBACK,
    Netproxyd,
    environment,
    program,
    wait_for,
)
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")
HOST = "localhost"  # a name, so that the proxy has something to look up
IMAGES, SCRIPTS = 40, 7
BINARY, CHUNKED = "/binary", "/chunked"
CHUNKS = (1, 4096, 16, 30_000, 255, 65_536)  # bytes in each
LOAD_SECONDS = (
    60.0  # for a browser to start, load the page and end: a second or three where nothing else runs
)
VIRTUAL_MILLISECONDS = (
    10_000  # of the page's own clock, which stands while anything is being loaded
)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MOST_CONNECTIONS = 12  # to the origin, six at a time: a browser keeps them, and so must the proxy
# What the browser wants for itself does not reach the proxy, nor anybody else.
OF_THE_BROWSER = ("*.google.com", "*.googleapis.com", "*.gvt1.com")
BYPASS = ";".join(("<-loopback>", *OF_THE_BROWSER))
RESOLVED = "MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
ENDS = {
    "closed",
    "reset",
    "client reset",
    "done",
}  # of a connection that did what was wanted: the browser's end may cut off idle ones
_RECORD = re.compile(
    r" msg=finished .* target=(\S+) upstream=direct sent=(\d+) received=(\d+) .* ended=(.*)$"
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
  if (path.endsWith(".png")) return document.querySelector(`img[src="${path}"]`).naturalWidth == wanted[path].width;
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
    const came = await (["%(binary)s", "%(chunked)s"].includes(path) ? fetched(path) : shown(path));
    (came && whole(path) ? good : wrong).push(path);
  }
  document.title = document.getElementById("box").textContent = `${good.length} of ${paths.length}`;
  document.getElementById("wrong").textContent = wrong.join(" ");
  if (!wrong.length) document.getElementById("box").className = "all";
}
window.onload = () => count().catch(error => document.title = error);
</script></body></html>
"""
STYLE = b"""body { font: 20px sans-serif } img { height: 24px; margin: 2px }
#box { border: 5px solid black; padding: 20px; background: red; color: white; font-size: 60px; text-align: center }
#box.all { background: green }
"""


class Resource(NamedTuple):
    kind: str
    body: bytes
    width: int = 0  # of an image


class Way(NamedTuple):
    proxy: str  # the scheme of the proxy, as Chromium calls it
    origin: str  # that of the page
    target: str  # the host that the proxy is asked for


WAYS = {
    "socks5": Way("socks5", "http", HOST),
    "socks4": Way("socks4", "http", LOOPBACK),
    "forward": Way("http", "http", HOST),
    "socks5-https": Way("socks5", "https", HOST),
    "connect-https": Way("http", "https", HOST),
    "tls-forward": Way("https", "http", HOST),
    "tls-connect-https": Way("https", "https", HOST),
}


# -- what is served


def _png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """Of one colour, with noise in its last line for it to have some size."""
    lines = [bytes(colour) * width] * (height - 1) + [random.Random(width).randbytes(3 * width)]
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )


def _resources() -> dict[str, Resource]:
    """By path; no two images are of the same width, nor two scripts of the same length."""
    made = {"/style.css": Resource("text/css", STYLE)}
    for number in range(SCRIPTS):
        path = f"/script{number}.js"
        code = f"(window.ran ??= []).push('{path}');\n//{'x' * 5_000 * number}\n"
        made[path] = Resource("text/javascript", code.encode())
    for number in range(IMAGES):
        width = 16 + number
        made[f"/image{number}.png"] = Resource(
            "image/png", _png(width, 24, (6 * number, 255 - 6 * number, 128)), width
        )
    made[BINARY] = Resource("application/octet-stream", random.Random(1).randbytes(2_000_000))
    made[CHUNKED] = Resource("application/octet-stream", random.Random(2).randbytes(sum(CHUNKS)))
    return made


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
ALL_BYTES = sum(len(one.body) for one in (INDEX, *RESOURCES.values()))


class Site(ThreadingHTTPServer):
    """Serves the page and remembers who asked for what; by TLS where there is a context for it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__((LOOPBACK, 0), _Handler)
        self.port: int = self.server_address[1]
        self.seen: list[str] = []  # paths
        self.clients: set[int] = set()  # ports of the connections that brought a request
        if context:
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, *_: object) -> None:
        """A browser may leave whenever it likes: what did not come, its page tells."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # or each small answer's body waits 40 ms for its head to be acknowledged
    )
    server: Site

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        self.server.clients.add(self.client_address[1])
        found = INDEX if self.path == "/" else RESOURCES.get(self.path)
        self.send_response(200 if found else 404)
        kind, body, _ = found or Resource("text/plain", b"no such thing\n")
        self.send_header("Content-Type", kind)
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
    dom: str
    screenshot: bytes
    errors: str


def _load(browser: str, directory: Path, proxy: str, url: str) -> Loaded:
    """The page as it is in the end.  The browser starts from nothing, and lives in `directory`."""
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
        f"--host-resolver-rules={RESOLVED}",
        f"--virtual-time-budget={VIRTUAL_MILLISECONDS}",
        "--window-size=1000,400",
        f"--screenshot={picture}",
        "--dump-dom",
        url,
    )
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(HOME=str(directory)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LOAD_SECONDS,
    )
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0, errors
    return Loaded(
        done.stdout.decode("utf-8", "replace"),
        picture.read_bytes() if picture.exists() else b"",
        errors,
    )


# -- what is between them


class Record(NamedTuple):
    """An access record."""

    target: str
    sent: int
    received: int
    ended: str


def _records(daemon: Netproxyd) -> list[Record]:
    found = filter(None, map(_RECORD.search, daemon.log.splitlines()))
    return [Record(match[1], int(match[2]), int(match[3]), match[4].strip('"')) for match in found]


@pytest.fixture
def daemon(netproxyd: Start, way: str) -> Netproxyd:
    """With a second listener, by TLS, where the way wants one."""
    if WAYS[way].proxy != "https":
        return netproxyd("-l", ANY_PORT)
    tls = f"{{name: tls, listen: '{LOOPBACK}:0', tls: {certificates().listener()}}}"
    return netproxyd(config=f"listeners: [{{name: plain, listen: '{LOOPBACK}:0'}}, {tls}]\n")


@pytest.fixture
def site(way: str) -> Iterator[Site]:
    context = None
    if WAYS[way].origin == "https":
        made = certificates()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made.path("server.pem"), made.path("server.key"))
    with _serving(Site(context)) as server:
        yield server


@pytest.mark.parametrize("way", WAYS)
def test_page(browser: str, daemon: Netproxyd, site: Site, tmp_path: Path, way: str) -> None:
    proxy, origin, target = WAYS[way]
    loaded = _load(
        browser,
        tmp_path,
        f"{proxy}://{LOOPBACK}:{daemon.tcp_ports[-1]}",
        f"{origin}://{HOST}:{site.port}/",
    )
    everything = f"{len(RESOURCES)} of {len(RESOURCES)}"
    assert f"<title>{everything}</title>" in loaded.dom, loaded.errors + loaded.dom
    assert f'<div id="box" class="all">{everything}</div>' in loaded.dom
    assert loaded.screenshot.startswith(PNG_MAGIC), loaded.errors
    assert sorted(site.seen) == sorted(["/", *RESOURCES])
    assert 1 < len(site.clients) <= MOST_CONNECTIONS
    _check_records(
        daemon,
        f"{target}:{site.port}",
        len(site.seen) if way.endswith("forward") else len(site.clients),
    )


def _check_records(daemon: Netproxyd, target: str, count: int) -> None:
    """At least one for each request that was forwarded, or for each connection that was tunnelled; with all that was loaded."""

    def complete() -> bool:
        records = _records(daemon)
        return (
            sum(record.sent > 0 for record in records) >= count
            and sum(record.received for record in records) >= ALL_BYTES
        )

    wait_for(complete, CLEAN_SECONDS, f"{count} access records with {ALL_BYTES} bytes")
    assert {record.target for record in _records(daemon)} == {target}
    assert {record.ended for record in _records(daemon)} <= ENDS
