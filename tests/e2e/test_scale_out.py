"""Two daemons behind haproxy with the configuration in conf/scale-out.

haproxy checks /readyz and sends the client's address; a draining daemon refuses no client.
"""

from __future__ import annotations

import signal
import socket
import threading
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from tests.e2e.conftest import Start
from tests.e2e.support import Netproxyd, program
from tests.e2e.upstreams import Programs
from tests.support.ports import free_port
from tests.support.sockets import SECONDS, read_exactly, server

pytestmark = pytest.mark.e2e

RECIPE = Path(__file__).resolve().parents[2] / "conf/scale-out/haproxy.cfg"
NODES = ("127.0.0.11", "127.0.0.12")
# The configuration checks a node every two seconds, and reacts to the second failure.
CHECKED_SECONDS = 60.0
# The fixture connects to the first listener. The second one is behind haproxy.
CONFIG = """
listeners:
- {{listen: '{host}:0', name: plain}}
- {{listen: '{host}:{port}', name: behind, proxy_protocol: [127.0.0.1]}}
metrics: {host}:{metrics}
timeouts: {{drain: 60s}}
"""


class Nodes(NamedTuple):
    """The daemons by address. All have the same ports."""

    daemons: dict[str, Netproxyd]
    port: int
    metrics: int


@pytest.fixture
def nodes(netproxyd: Start) -> Nodes:
    port, metrics = free_port(), free_port()
    daemons = {
        host: netproxyd(config=CONFIG.format(host=host, port=port, metrics=metrics), host=host)
        for host in NODES
    }
    return Nodes(daemons, port, metrics)


@pytest.fixture
def front_port(nodes: Nodes, tmp_path: Path) -> Iterator[int]:
    """The port of haproxy."""
    front_port = free_port()
    text = RECIPE.read_text()
    for packaged, ours in (
        ("10.0.0.11:1080", f"{NODES[0]}:{nodes.port}"),
        ("10.0.0.12:1080", f"{NODES[1]}:{nodes.port}"),
        ("port 9180", f"port {nodes.metrics}"),
        ("maxconn 20000", "maxconn 200"),
        ("bind :1080", f"bind 127.0.0.1:{front_port}"),
    ):
        assert text.count(packaged) == 1
        text = text.replace(packaged, ours)
    path = program("haproxy")
    with Programs(tmp_path) as programs:
        config = programs.write("haproxy.cfg", text)
        programs.start(front_port, path, "-db", "-f", config, required=True)
        yield front_port


def tunnel(port: int, target: Address) -> socket.socket:
    """Return a connection to the target through haproxy and a daemon."""
    sock = socket.create_connection(("127.0.0.1", port), SECONDS)
    sock.sendall(b"\5\1\0" + socks5.encode_request(socks5.CONNECT, target))
    assert read_exactly(sock, 12)[:4] == b"\5\0\5\0"
    return sock


def check(sock: socket.socket) -> None:
    """Check that the target echoes."""
    sock.sendall(b"ping")
    assert read_exactly(sock, 4) == b"ping"


def test_draining_node_refuses_no_client_and_gets_no_new_one(nodes: Nodes, front_port: int) -> None:
    """The connection through the draining node continues; new ones go to the other node."""

    def echo(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(echo) as target, tunnel(front_port, target) as kept:
        check(kept)
        daemons = nodes.daemons.values()
        (draining,) = [daemon for daemon in daemons if daemon.status()["connections"]]
        (other,) = [daemon for daemon in daemons if daemon is not draining]
        failures: list[BaseException] = []
        stop = threading.Event()

        def visit() -> None:
            while not stop.is_set():
                try:
                    with tunnel(front_port, target) as sock:
                        check(sock)
                except BaseException as error:
                    failures.append(error)
                    return

        visitor = threading.Thread(target=visit, name="test-visitor")
        visitor.start()
        try:
            draining.signal(signal.SIGTERM)
            other.said(
                "msg=finished listener=behind client=127.0.0.1:", times=20, seconds=CHECKED_SECONDS
            )
        finally:
            stop.set()
            visitor.join(SECONDS)
        assert not failures
        check(kept)
        own = kept.getsockname()[1]
    assert draining.wait(CHECKED_SECONDS) == 0
    assert draining.lines(f"client=127.0.0.1:{own} .* ended=closed")
