"""A bridge and an agent as two processes on loopback: two versions of Python, one unread stream."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import struct
import time
import zlib
from typing import Any, Iterator, Mapping, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import UdpEcho, exactly, udp
from tests.e2e.support import LOOPBACK, SECONDS, Netproxyd, environment, wait_for
from tests.support.certificates import certificates
from tests.support.interpreters import Interpreter, lowest_and_highest
from tests.support.ports import free_port
from tests.support.sockets import Task, server

pytestmark = pytest.mark.e2e

TOKEN = "a token for two processes"
IDLE_DESCRIPTORS = 16
"""Of an idle tunnel: ports, control connection, idle work connections."""

PIECE = 1 << 18
DATA = random.Random(1).randbytes(1 << 20)
BULK_BYTES = 64 << 20
BESIDE_BYTES = 16 << 20
"""Transferred beside an unread stream."""

STUCK_SECONDS = 0.1
"""No more bytes could be sent for so long: all buffers are full."""

SHORT_STREAMS, STREAMS_AT_ONCE = 100, 40
"""Streams one after the other, and more at once than idle work connections."""

KEPT_CONNECTIONS = 32
"""Idle work connections that are kept for a while after that."""


class Pair(NamedTuple):
    """The daemons of a tunnel, and the public ports of the bridge."""

    bridge: Netproxyd
    agent: Netproxyd
    tcp: int
    udp: int

    def dial(self) -> socket.socket:
        """Connect to the public TCP port."""
        return socket.create_connection((LOOPBACK, self.tcp), SECONDS)


def bridge_text(tls: bool, tcp: int, udp: int) -> str:
    scheme = "" if tls else "tcp://"
    secure = f", tls: {certificates().listener()}" if tls else ""
    agents = f"{{home: {{token: {TOKEN}, ports: [{tcp}, {udp}/udp]}}}}"
    return f"""
listeners: [{{listen: "{LOOPBACK}:0"}}]
tunnel: {{bridge: {{listen: "{scheme}{LOOPBACK}:0", agents: {agents}{secure}}}}}
"""


def agent_text(tls: bool, bridge_port: int, services: str) -> str:
    scheme = "tls" if tls else "tcp"
    trust = f', tls: {{ca: "{certificates().path("ca.pem")}"}}' if tls else ""
    return f"""
listeners: [{{listen: "{LOOPBACK}:0"}}]
tunnel:
  agent: {{bridge: "{scheme}://{LOOPBACK}:{bridge_port}", name: home, token: {TOKEN},
    services: {services}{trust}}}
"""


def start(
    netproxyd: Start,
    tls: bool,
    targets: tuple[int, int],
    bridge_options: Mapping[str, Any] | None = None,
    agent_options: Mapping[str, Any] | None = None,
) -> Pair:
    """Start a tunnel to the TCP and the UDP port of `targets`."""
    tcp, udp = free_port(), free_port()
    bridge = netproxyd(config=bridge_text(tls, tcp, udp), **(bridge_options or {}))
    tcp_target, udp_target = (f"{LOOPBACK}:{port}" for port in targets)
    services = f'{{"{tcp}": "{tcp_target}", "{udp}/udp": "{udp_target}"}}'
    text = agent_text(tls, bridge.tcp_ports[1], services)
    agent = netproxyd(config=text, **(agent_options or {}))
    agent.said("tunnel: connected as 'home'", seconds=SECONDS)
    for daemon in (bridge, agent):
        daemon.baseline += IDLE_DESCRIPTORS
    pair = Pair(bridge, agent, tcp, udp)
    wait_for(lambda: _answers(pair), SECONDS, "the port is open")
    return pair


def _answers(pair: Pair) -> bool:
    try:
        with pair.dial() as sock:
            sock.sendall(b"e!")
            return sock.recv(1) == b"!"
    except OSError:
        return False


def serve(sock: socket.socket) -> None:
    """Serve a connection as its first byte says.

    "e": send back what arrives.  "u": receive to the end, then send the count and the checksum.
    "d": send as many bytes as the next 8 bytes say.
    """
    # An unread stream blocks for as long as it exists.
    sock.settimeout(None)
    task = exactly(sock, 1)
    if task == b"e":
        while data := sock.recv(PIECE):
            sock.sendall(data)
    elif task == b"u":
        total, checksum = receive_all(sock)
        sock.sendall(total.to_bytes(8, "big") + checksum.to_bytes(4, "big"))
    elif task == b"d":
        for _ in range(int.from_bytes(exactly(sock, 8), "big") // len(DATA)):
            sock.sendall(DATA)


def receive_all(sock: socket.socket) -> tuple[int, int]:
    """Receive to the end of the stream; return the count and the checksum of the bytes."""
    total, checksum, buffer = 0, 0, memoryview(bytearray(PIECE))
    while count := sock.recv_into(buffer):
        total, checksum = total + count, zlib.crc32(buffer[:count], checksum)
    return total, checksum


@functools.cache
def expected_checksum(size: int) -> tuple[int, int]:
    """Return the count and the checksum of so many bytes."""
    checksum = 0
    for _ in range(size // len(DATA)):
        checksum = zlib.crc32(DATA, checksum)
    return size, checksum


def check_upload(pair: Pair, size: int) -> None:
    """Send so many bytes to the service, which must receive them all."""
    with pair.dial() as sock:
        sock.sendall(b"u")
        for _ in range(size // len(DATA)):
            sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        answer = exactly(sock, 12)
    received = int.from_bytes(answer[:8], "big"), int.from_bytes(answer[8:], "big")
    assert received == expected_checksum(size)


def check_download(pair: Pair, size: int) -> None:
    """Have the service send so many bytes, which must all arrive."""
    with pair.dial() as sock:
        sock.sendall(b"d" + size.to_bytes(8, "big"))
        received = receive_all(sock)
    assert received == expected_checksum(size)


# -- one unread stream


@contextlib.contextmanager
def unread_stream(pair: Pair) -> Iterator[None]:
    """Keep a stream whose client sends but does not read: its buffers are full both ways."""
    with pair.dial() as sock:
        # close() resets the connection.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(b"e")
        sock.setblocking(False)
        last = time.monotonic()
        while time.monotonic() - last < STUCK_SECONDS:
            try:
                sock.send(DATA)
                last = time.monotonic()
            except BlockingIOError:
                time.sleep(0.005)
        yield


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_streams_transfer_all_bytes_beside_an_unread_stream(netproxyd: Start, tls: bool) -> None:
    """Hazard 124.  tests/bench/tunnel.py measures that they are not slower, either."""
    with server(serve) as target, UdpEcho() as udp_target:
        pair = start(netproxyd, tls, (target.port, udp_target.address[1]))
        with unread_stream(pair):
            for _ in range(2):
                check_upload(pair, BESIDE_BYTES)
                check_download(pair, BESIDE_BYTES)


# -- two versions of Python


@pytest.fixture(params=["lowest at the bridge", "lowest at the agent"])
def versions(request: pytest.FixtureRequest) -> tuple[Interpreter, Interpreter]:
    """Return the interpreters of the bridge and of the agent."""
    lowest, highest = lowest_and_highest()
    return (lowest, highest) if request.param == "lowest at the bridge" else (highest, lowest)


def run_with(interpreter: Interpreter) -> dict[str, Any]:
    return {"python": (interpreter.path,), "env": environment(**interpreter.environment)}


@pytest.mark.any_workers
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_bridge_and_agent_of_different_python_versions(
    netproxyd: Start, versions: tuple[Interpreter, Interpreter], tls: bool
) -> None:
    bridge, agent = (run_with(interpreter) for interpreter in versions)
    with server(serve) as target, UdpEcho() as udp_target:
        pair = start(netproxyd, tls, (target.port, udp_target.address[1]), bridge, agent)
        transfers = [Task(check, pair, BULK_BYTES) for check in (check_upload, check_download)]
        for transfer in transfers:
            transfer.result(60)
        check_short_streams(pair)
        for daemon in (pair.bridge, pair.agent):
            daemon.baseline += KEPT_CONNECTIONS
        check_streams_at_once(pair)
        for _ in range(2):
            check_datagrams(pair)
        assert len(set(udp_target.sources)) == 2


def check_short_streams(pair: Pair) -> None:
    for number in range(SHORT_STREAMS):
        with pair.dial() as sock:
            sock.sendall(b"e%d" % number)
            sock.shutdown(socket.SHUT_WR)
            assert exactly(sock, len(str(number))) == b"%d" % number and sock.recv(1) == b""


def check_streams_at_once(pair: Pair) -> None:
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(pair.dial()) for _ in range(STREAMS_AT_ONCE)]
        for number, sock in enumerate(streams):
            sock.sendall(b"e%3d" % number)
        for number, sock in enumerate(streams):
            assert exactly(sock, 3) == b"%3d" % number


def check_datagrams(pair: Pair) -> None:
    with udp(LOOPBACK) as sock:
        for size in (0, 1, 1200, 9000, 65507):
            data = random.Random(size).randbytes(size)
            sock.sendto(data, (LOOPBACK, pair.udp))
            assert sock.recvfrom(65536) == (data, (LOOPBACK, pair.udp))
