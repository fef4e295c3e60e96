"""One port for a proxy, an agent, and the services of two machines: curl, an agent, two workers."""

from __future__ import annotations

import socket
import subprocess
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import Association, UdpEcho
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, environment, program, wait_for
from tests.support.certificates import certificates

pytestmark = pytest.mark.e2e

TOKEN = "a token of twenty bytes"
SERVICE = 8443
"""The agent's service, by its number at the bridge."""
IDLE_DESCRIPTORS = 20
"""Of a tunnel: its control connection and idle work connections, some relayed to a worker."""
CURL_IS_CLOSED = (35, 52, 56)


class _Named(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.server.name  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def site(name: bytes, tls: bool = True) -> Iterator[int]:
    """Serve a page with a name; yield the port."""
    server = ThreadingHTTPServer((LOOPBACK, 0), _Named)
    server.name = name  # type: ignore[attr-defined]
    if tls:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            certificates().path("server.pem"), certificates().path("server.key")
        )
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Place(NamedTuple):
    """A daemon with an sni listener, and the ports of the plain sites behind it."""

    daemon: Netproxyd
    port: int
    by_host: int


@pytest.fixture(scope="module")
def place(shared_netproxyd: Start) -> Iterator[Place]:
    with ExitStack() as stack:
        first, second, far = (stack.enter_context(site(name)) for name in (b"A", b"B", b"far"))
        plain, default = (stack.enter_context(site(name, tls=False)) for name in (b"W", b"rest"))
        files = certificates()
        daemon = shared_netproxyd(
            *("-w", "2"),
            config=f"""
listeners:
- {{name: plain, listen: '{LOOPBACK}:0'}}
- protocol: sni
  name: web
  listen: '{LOOPBACK}:0'
  routes:
  - {{sni: a.example, target: '{LOOPBACK}:{first}'}}
  - {{sni: '*.b.example', target: '{LOOPBACK}:{second}'}}
  - {{sni: home.example, via: 'tunnel://home/{SERVICE}'}}
  - {{sni: localhost, listener: main}}
  - {{sni: agents.example, listener: agents}}
  - {{host: w.example, target: '{LOOPBACK}:{plain}'}}
  - {{protocol: socks5, listener: plain}}
  - {{protocol: http, target: '{LOOPBACK}:{default}'}}
- {{name: main, listen: '{LOOPBACK}:0', tls: {files.listener()}}}
- {{name: agents, protocol: tunnel, listen: '{LOOPBACK}:0', tls: {files.listener()}}}
tunnel: {{bridge: {{agents: {{home: {{token: {TOKEN}}}}}}}}}
timeouts: {{handshake: 600s}}
""",
        )
        port = daemon.tcp_ports[1]
        trust = f"{{ca: '{files.path('ca.pem')}', server_name: agents.example}}"
        agent = shared_netproxyd(
            config=f"""
listeners: [{{listen: '{LOOPBACK}:0'}}]
tunnel:
  agent:
    bridge: tls://{LOOPBACK}:{port}
    name: home
    token: {TOKEN}
    tls: {trust}
    services: {{"{SERVICE}": "{LOOPBACK}:{far}"}}
"""
        )
        wait_for(lambda: daemon.lines("agent 'home' connected"), SECONDS, "the agent")
        daemon.baseline += IDLE_DESCRIPTORS
        agent.baseline += IDLE_DESCRIPTORS
        yield Place(daemon, port, plain)


def curl(place: Place, *arguments: str) -> tuple[int, bytes]:
    """Run curl, all of whose connections go to the sni listener; return status and body."""
    if "-x" not in arguments:
        arguments = ("--connect-to", f"::{LOOPBACK}:{place.port}", *arguments)
    options = ("-q", "-sS", "-k", "-m", "50", "--proxy-cacert", certificates().path("ca.pem"))
    command = (program("curl"), *options, *arguments)
    process = subprocess.run(command, capture_output=True, env=environment(), timeout=60)
    return process.returncode, process.stdout


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("https://a.example/", b"A"),
        ("https://x.b.example/", b"B"),
        ("https://home.example/", b"far"),
        ("http://w.example/", b"W"),
        ("http://other.example/", b"rest"),
    ],
)
def test_curl_reaches_the_service_of_each_name(place: Place, url: str, body: bytes) -> None:
    for source in range(2, 6):  # clients of both workers
        assert curl(place, "--interface", f"127.0.0.{source}", url) == (0, body)


def test_name_without_a_route_is_closed(place: Place) -> None:
    """Hazard 163."""
    status, body = curl(place, "https://c.example/")
    assert status in CURL_IS_CLOSED and body == b""
    line = wait_for(lambda: place.daemon.lines("asked=c.example"), SECONDS, "the record")[0]
    assert 'reason="no route" listener=web' in line and " decided=routes id=" in line


def test_curl_uses_the_proxy_within_tls(place: Place) -> None:
    url = f"http://{LOOPBACK}:{place.by_host}/"
    proxy = ("-x", f"https://localhost:{place.port}", "--noproxy", "")
    assert curl(place, *proxy, "-p", url) == (0, b"W")
    record = "listener=main .*route=listeners.1..routes.3. route_name=localhost"
    wait_for(lambda: place.daemon.lines(record), SECONDS, "the record")


def test_udp_of_socks5_by_the_port_is_that_of_its_listener(place: Place) -> None:
    udp = next(port for network, _, port in place.daemon.listens if network == "udp")
    with UdpEcho() as echo:
        for _ in range(4):  # accepted by both workers
            with Association((LOOPBACK, place.port)) as ours:
                assert ours.bound[1] == udp != place.port
                ours.echo(echo.address, b"ping")


def test_slow_and_broken_clients_hinder_nobody(place: Place) -> None:
    """Hazard 163."""
    with ExitStack() as stack:
        for number in range(300):
            sock = stack.enter_context(socket.create_connection((LOOPBACK, place.port), SECONDS))
            sock.sendall((b"\x16", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n")[number % 3])
        assert curl(place, "--interface", "127.0.0.9", "https://a.example/") == (0, b"A")
