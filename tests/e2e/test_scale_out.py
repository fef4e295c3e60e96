"""Two nodes behind haproxy, by the recipe in conf/scale-out: health by /readyz, the true client, a drain that nobody notices."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from tests.e2e.conftest import Start
from tests.e2e.support import START_SECONDS, Netproxyd, environment, program, wait_for
from tests.support.ports import free_port
from tests.support.sockets import SECONDS, read_exactly, server

pytestmark = pytest.mark.e2e

RECIPE = Path(__file__).resolve().parents[2] / "conf/scale-out/haproxy.cfg"
NODES = ("127.0.0.11", "127.0.0.12")
CHECKED_SECONDS = 20.0  # the recipe asks every two seconds, and believes the second time


@pytest.fixture
def nodes(netproxyd: Start) -> dict[str, Netproxyd]:
    """Each with a plain listener, which the fixture asks at the end, and one behind haproxy; their ports are the same."""
    port, metrics = free_port(), free_port()
    made = {}
    for host in NODES:
        made[host] = netproxyd(
            config=f"listeners: [{{listen: '{host}:0', name: plain}}, {{listen: '{host}:{port}', name: behind, "
            f"proxy_protocol: [127.0.0.1]}}]\nmetrics: {host}:{metrics}\ntimeouts: {{drain: 20s}}\n",
            host=host,
        )
        made[host].ports = port, metrics  # type: ignore[attr-defined]
    return made


@pytest.fixture
def front(nodes: dict[str, Netproxyd], tmp_path: Path) -> Iterator[int]:
    """haproxy's port."""
    port, metrics = nodes[NODES[0]].ports  # type: ignore[attr-defined]
    here = free_port()
    text = RECIPE.read_text()
    for recipe, here_text in (
        ("10.0.0.11:1080", f"{NODES[0]}:{port}"),
        ("10.0.0.12:1080", f"{NODES[1]}:{port}"),
        ("port 9180", f"port {metrics}"),
        ("maxconn 20000", "maxconn 200"),
        ("bind :1080", f"bind 127.0.0.1:{here}"),
    ):
        assert text.count(recipe) == 1
        text = text.replace(recipe, here_text)
    (tmp_path / "haproxy.cfg").write_text(text)
    with open(tmp_path / "haproxy.log", "wb") as log:
        process = subprocess.Popen(
            (program("haproxy"), "-db", "-f", str(tmp_path / "haproxy.cfg")),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment(),
        )
    try:
        wait_for(
            lambda: f":{here:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text(),
            START_SECONDS,
            "haproxy listens",
        )
        yield here
    finally:
        process.terminate()
        process.wait(START_SECONDS)


def tunnel(port: int, target: Address) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), SECONDS)
    sock.sendall(b"\5\1\0" + socks5.encode_request(socks5.CONNECT, target))
    assert read_exactly(sock, 12)[:4] == b"\5\0\5\0"
    return sock


def check(sock: socket.socket) -> None:
    sock.sendall(b"ping")
    assert read_exactly(sock, 4) == b"ping"


def test_a_node_that_drains_is_left_by_all_and_refuses_nobody(
    nodes: dict[str, Netproxyd], front: int
) -> None:
    def echo(sock: socket.socket) -> None:
        while data := sock.recv(65536):
            sock.sendall(data)

    with server(echo) as target, tunnel(front, target) as kept:
        check(kept)
        (first,) = [host for host, node in nodes.items() if node.status()["connections"]]
        second = next(host for host in NODES if host != first)
        failures: list[BaseException] = []
        over = threading.Event()

        def visit() -> None:
            while not over.is_set():
                try:
                    with tunnel(front, target) as sock:
                        check(sock)
                except BaseException as error:
                    failures.append(error)
                    return

        visitor = threading.Thread(target=visit, name="test-visitor")
        visitor.start()
        try:
            nodes[first].signal(signal.SIGTERM)
            nodes[second].said(
                "msg=finished listener=behind client=127.0.0.1:", times=20, seconds=CHECKED_SECONDS
            )
        finally:
            over.set()
            visitor.join(SECONDS)
        assert not failures
        check(kept)
        own = kept.getsockname()[1]
    assert nodes[first].wait(SECONDS) == 0
    assert nodes[first].lines(f"client=127.0.0.1:{own} .* ended=closed")
