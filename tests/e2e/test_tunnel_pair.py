"""A bridge and an agent as two processes on loopback: in different versions of Python, and with one stream that nobody reads."""

from __future__ import annotations

import contextlib
import functools
import random
import socket
import statistics
import struct
import time
import zlib
from operator import truediv
from typing import Any, Iterator, NamedTuple

import pytest

from tests.e2e.conftest import Start
from tests.e2e.peers import UdpEcho, exactly, udp
from tests.e2e.support import LOOPBACK, Netproxyd, environment, free_port, wait_for
from tests.support.certificates import certificates
from tests.support.interpreters import Interpreter, lowest_and_highest
from tests.support.sockets import Task, server

pytestmark = pytest.mark.e2e

TOKEN = "a token for two processes"
STANDING = (
    16  # descriptors of a tunnel at rest: ports, the control connection, connections that wait
)
PIECE = 1 << 18
DATA = random.Random(1).randbytes(1 << 20)
BULK = 64 << 20  # bytes of a measure
BAR = 0.9  # of the speed without a stream that is not read (hazard 124)
ROUNDS, ROUNDS_LIMIT = (
    5,
    40,
)  # that a best needs, and that a busy machine may take until it is at the bar
STUCK_SECONDS = 0.1  # without a byte more that goes: everything between two programs is full
SHORT, AT_ONCE = (
    100,
    40,
)  # streams: one after the other, and more together than connections wait for
KEPT = 32  # connections that wait for a while after that
PATIENCE = 20.0  # seconds, for what takes less


class Pair(NamedTuple):
    bridge: Netproxyd
    agent: Netproxyd
    tcp: int  # ports of the bridge
    udp: int

    def dial(self) -> socket.socket:
        return socket.create_connection((LOOPBACK, self.tcp), PATIENCE)


def start(
    netproxyd: Start,
    tls: bool,
    tcp_target: int,
    udp_target: int,
    bridge: dict[str, Any] = {},
    agent: dict[str, Any] = {},
) -> Pair:
    """`bridge` and `agent`: how either is run."""
    made = certificates() if tls else None
    listen, dial = ("", "tls://") if tls else ("tcp://", "tcp://")
    tcp, datagrams = free_port(), free_port()
    near = netproxyd(
        config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}]
tunnel: {{bridge: {{listen: "{listen}{LOOPBACK}:0", agents: {{home: {{token: {TOKEN}, ports: [{tcp}, {datagrams}/udp]}}}}
    {f", tls: {made.listener()}" if made else ""}}}}}
""",
        **bridge,
    )
    far = netproxyd(
        config=f"""
listeners: [{{listen: "{LOOPBACK}:0"}}]
tunnel: {{agent: {{bridge: "{dial}{LOOPBACK}:{near.tcp_ports[1]}", name: home, token: {TOKEN},
    services: {{"{tcp}": "{LOOPBACK}:{tcp_target}", "{datagrams}/udp": "{LOOPBACK}:{udp_target}"}}
    {f', tls: {{ca: "{made.path("ca.pem")}"}}' if made else ""}}}}}
""",
        **agent,
    )
    far.said("tunnel: connected as 'home'", seconds=PATIENCE)
    for one in (near, far):
        one.baseline += STANDING
    pair = Pair(near, far, tcp, datagrams)
    wait_for(lambda: _answers(pair), PATIENCE, "the port is open")
    return pair


def _answers(pair: Pair) -> bool:
    try:
        with pair.dial() as sock:
            sock.sendall(b"e!")
            return sock.recv(1) == b"!"
    except OSError:
        return False


def serve(sock: socket.socket) -> None:
    """A service.  The first byte says: 'e' give back what comes, 'u' swallow and say how much and what it was, 'd' pour so much."""
    sock.settimeout(None)  # a stream that nobody reads stands still for as long as it is there
    what = exactly(sock, 1)
    if what == b"e":
        while data := sock.recv(PIECE):
            sock.sendall(data)
    elif what == b"u":
        total, checksum = drain(sock)
        sock.sendall(total.to_bytes(8, "big") + checksum.to_bytes(4, "big"))
    elif what == b"d":
        for _ in range(int.from_bytes(exactly(sock, 8), "big") // len(DATA)):
            sock.sendall(DATA)


def drain(sock: socket.socket) -> tuple[int, int]:
    """How much came, and what it was."""
    total, checksum, buffer = 0, 0, memoryview(bytearray(PIECE))
    while count := sock.recv_into(buffer):
        total, checksum = total + count, zlib.crc32(buffer[:count], checksum)
    return total, checksum


@functools.cache
def wanted(size: int) -> tuple[int, int]:
    checksum = 0
    for _ in range(size // len(DATA)):
        checksum = zlib.crc32(DATA, checksum)
    return size, checksum


def swallow(pair: Pair, size: int) -> float:
    """Seconds for so many bytes to the service, which tells that it has them all."""
    began = time.monotonic()
    with pair.dial() as sock:
        sock.sendall(b"u")
        for _ in range(size // len(DATA)):
            sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        told = exactly(sock, 12)
    seconds = time.monotonic() - began
    assert (int.from_bytes(told[:8], "big"), int.from_bytes(told[8:], "big")) == wanted(size)
    return seconds


def pour(pair: Pair, size: int) -> float:
    """Seconds for so many bytes of the service's, which are those that it sent."""
    began = time.monotonic()
    with pair.dial() as sock:
        sock.sendall(b"d" + size.to_bytes(8, "big"))
        came = drain(sock)
    seconds = time.monotonic() - began
    assert came == wanted(size)
    return seconds


# -- one stream that nobody reads


@contextlib.contextmanager
def unread(pair: Pair) -> Iterator[None]:
    """A stream whose service gives back what comes, and who sent it does not take it: all is full, both ways."""
    with pair.dial() as sock:
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )  # its close is a reset
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
def test_one_stream_unread_while_others_run_at_nearly_full_speed(
    netproxyd: Start, tls: bool
) -> None:
    """Hazard 124, as a ratio of the best of each: a busy machine only slows, and in turn, so that it slows both."""
    measures = {"up": swallow, "down": pour}
    took: dict[bool, dict[str, list[float]]] = {
        stuck: {name: [] for name in measures} for stuck in (False, True)
    }
    with server(serve) as target, UdpEcho() as datagrams:
        pair = start(netproxyd, tls, target.port, datagrams.address[1])
        for turn in range(ROUNDS_LIMIT):
            for stuck in (turn % 2 == 0, turn % 2 == 1):
                with unread(pair) if stuck else contextlib.nullcontext():
                    for name, take in measures.items():
                        took[stuck][name].append(take(pair, BULK))
            ratios = {name: min(took[False][name]) / min(took[True][name]) for name in measures}
            if turn + 1 >= ROUNDS and min(ratios.values()) >= BAR:
                break
        medians = {
            name: statistics.median(map(truediv, took[False][name], took[True][name]))
            for name in measures
        }
        print(
            f"with an unread stream {'in TLS' if tls else 'in clear'}, of the speed without: "
            + ", ".join(
                f"{name} {ratios[name]:.2f}, median {medians[name]:.2f}" for name in measures
            )
            + f" ({turn + 1} rounds)"
        )
        assert min(ratios.values()) >= BAR, took


# -- two versions of Python


@pytest.fixture(params=["lowest at the bridge", "lowest at the agent"])
def versions(request: pytest.FixtureRequest) -> tuple[Interpreter, Interpreter]:
    """The bridge's and the agent's."""
    lowest, highest = lowest_and_highest()
    return (lowest, highest) if request.param == "lowest at the bridge" else (highest, lowest)


def run_in(interpreter: Interpreter) -> dict[str, Any]:
    return {"python": (interpreter.path,), "env": environment(**interpreter.environment)}


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_versions_of_python_understand_each_other(
    netproxyd: Start, versions: tuple[Interpreter, Interpreter], tls: bool
) -> None:
    bridge, agent = versions
    with server(serve) as target, UdpEcho() as datagrams:
        pair = start(
            netproxyd, tls, target.port, datagrams.address[1], run_in(bridge), run_in(agent)
        )
        both = Task(swallow, pair, BULK), Task(pour, pair, BULK)
        for one in both:
            one.result(60)
        for number in range(SHORT):
            with pair.dial() as sock:
                sock.sendall(b"e%d" % number)
                sock.shutdown(socket.SHUT_WR)
                assert exactly(sock, len(str(number))) == b"%d" % number and sock.recv(1) == b""
        for one in (pair.bridge, pair.agent):
            one.baseline += KEPT
        with contextlib.ExitStack() as stack:
            at_once = [stack.enter_context(pair.dial()) for _ in range(AT_ONCE)]
            for number, sock in enumerate(at_once):
                sock.sendall(b"e%3d" % number)
            for number, sock in enumerate(at_once):
                assert exactly(sock, 3) == b"%3d" % number
        for _ in range(2):
            with udp(LOOPBACK) as sock:
                for size in (0, 1, 1200, 9000, 65507):
                    data = random.Random(size).randbytes(size)
                    sock.sendto(data, (LOOPBACK, pair.udp))
                    assert sock.recvfrom(65536) == (data, (LOOPBACK, pair.udp))
        assert len(set(datagrams.sources)) == 2
