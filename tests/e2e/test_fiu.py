"""Every fiftieth socket call fails: nothing dies, and nothing is left when it is over (HAZARDS 96).

FIU_SECONDS in the environment makes it longer: 60 is what the row asks for.  The
faults are libfiu's: it stands before the C library, also for what is called
through ctypes, and is told over named pipes when to begin and when to end.  What it
does not know (accept4, splice, sendmmsg, recvmmsg) never fails here.

A call that fails by libfiu has not been made.  Of most that is what failing means,
but a real shutdown(2) that fails has done its work: it says that the peer has gone
(ENOTCONN), and has woken who waits.  Nothing else wakes the reader of a UDP session,
so shutdown only fails where there are none.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import pytest

from tests.e2e.conftest import Start
from tests.e2e.origin import HELLO, Origin, serving
from tests.e2e.peers import CONNECT, Association, Endpoint, TcpEcho, UdpEcho, echo, exactly, socks5
from tests.e2e.support import (
    CLEAN_SECONDS,
    LOOPBACK,
    SPARE_DESCRIPTORS,
    Netproxyd,
    environment,
    program,
    wait_for,
)

pytestmark = pytest.mark.e2e

SECONDS = float(os.environ.get("FIU_SECONDS", 6))
PROBABILITY = 0.02
FAULTY = tuple(
    f"posix/io/net/{name}"
    for name in (
        "recv",
        "recvfrom",
        "recvmsg",
        "send",
        "sendto",
        "sendmsg",
        "connect",
        "socket",
        "poll",
        "accept",
    )
)
SHUTDOWN = ("posix/io/net/shutdown",)
THREADS = 2  # of clients of each kind
SERVED = 0.4  # of the connections of each kind, at least: each makes some twenty calls
STALLED = 0.02  # of all clients may wait in vain, at most
PATIENCE = 3.0  # seconds of a client
IDLE = 0.5  # seconds for which an idle connection is
DATAGRAMS = 20
ARRIVED = 0.7  # of the datagrams
GONE_SECONDS = 10.0  # for everything to end: the timeouts below, and some more
CONFIG = f"""
listeners: [{{listen: "{LOOPBACK}:0"}}]
timeouts: {{handshake: 2s, connect: 2s, half_close: 3s}}
"""
NOTHING = {"connections": 0, "parked": 0, "associations": 0, "sessions": 0, "entries": 0}
PIECES = random.Random(96).randbytes(100_000)


class Targets(NamedTuple):
    tcp: Endpoint
    udp: Endpoint
    origin: Origin


Kind = Callable[[Endpoint, Targets], None]


class Faults:
    """Those of one daemon, on and off."""

    def __init__(self, daemon: Netproxyd, pipes: Path, names: Sequence[str]) -> None:
        self._names = names
        self._command = [program("fiu-ctrl"), "-f", str(pipes)]
        self._pid = str(daemon.process.pid)

    def begin(self) -> None:
        self._tell(
            *(f"enable_random name={name},probability={PROBABILITY}" for name in self._names)
        )

    def end(self) -> None:
        self._tell(*(f"disable name={name}" for name in self._names))

    def _tell(self, *commands: str) -> None:
        options = [part for command in commands for part in ("-c", command)]
        done = subprocess.run(
            [*self._command, *options, self._pid],
            env=environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=20,
        )
        assert done.returncode == 0 and not done.stdout + done.stderr, done.stdout + done.stderr


# -- what clients do: each returns when it has been served, and raises OSError, EOFError or AssertionError when not


def socks_connect(server: Endpoint, targets: Targets) -> None:
    with socks5(server, CONNECT, targets.tcp, seconds=PATIENCE)[0] as sock:
        for size in (1, 600, 3000):
            echo(sock, PIECES[:size])


def http_connect(server: Endpoint, targets: Targets) -> None:
    with socket.create_connection(server, PATIENCE) as sock:
        host, port = targets.tcp
        sock.sendall(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        assert head(sock).startswith(b"HTTP/1.1 200 ")
        echo(sock, PIECES[:4000])


def http_forward(server: Endpoint, targets: Targets) -> None:
    """Two requests on one connection."""
    with socket.create_connection(server, PATIENCE) as sock:
        for _ in range(2):
            sock.sendall(
                f"GET {targets.origin.url()} HTTP/1.1\r\nHost: {LOOPBACK}:{targets.origin.port}\r\n\r\n".encode()
            )
            assert head(sock).startswith(b"HTTP/1.1 200 ")
            assert exactly(sock, len(HELLO)) == HELLO


def associate(server: Endpoint, targets: Targets) -> None:
    with Association(server) as association:
        association.socket.settimeout(0.3)
        came = 0
        for number in range(DATAGRAMS):
            association.send(targets.udp, PIECES[:number])
            try:
                association.receive()
                came += 1
            except TimeoutError:
                pass  # a datagram may be lost
        assert came >= ARRIVED * DATAGRAMS


def idle(server: Endpoint, targets: Targets) -> None:
    with socks5(server, CONNECT, targets.tcp, seconds=PATIENCE)[0] as sock:
        time.sleep(IDLE)  # long enough to be parked
        echo(sock, b"after a while")


def half_closed(server: Endpoint, targets: Targets) -> None:
    """All of it comes back after the client's end of stream, and then the target's."""
    with socks5(server, CONNECT, targets.tcp, seconds=PATIENCE)[0] as sock:
        sock.sendall(PIECES[:5000])
        sock.shutdown(socket.SHUT_WR)
        assert exactly(sock, 5000) == PIECES[:5000]
        assert sock.recv(1) == b""


def bulk(server: Endpoint, targets: Targets) -> None:
    """Enough for splice; no more, because the slower the machine the more calls it takes."""
    with socks5(server, CONNECT, targets.tcp, seconds=PATIENCE)[0] as sock:
        for _ in range(3):
            echo(sock, PIECES)


OVER_TCP = (socks_connect, http_connect, http_forward, idle, half_closed, bulk)
KINDS = (*OVER_TCP, associate)


def head(sock: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += exactly(sock, 1)
    return data


class Load:
    """Clients of some kinds, one after the other on each of some threads."""

    def __init__(self, server: Endpoint, targets: Targets, kinds: Sequence[Kind]) -> None:
        self._server, self._targets, self._kinds = server, targets, kinds
        self._lock = threading.Lock()
        self.found: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in kinds}

    def run(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._clients, args=(kind,))
            for kind in self._kinds
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def part(self, result: str) -> float:
        """Of all clients."""
        total = sum(self.found.values(), Counter())
        return total[result] / total.total()

    def _clients(self, kind: Kind) -> None:
        while time.monotonic() < self._until:
            result = self._client(kind)
            with self._lock:
                self.found[kind.__name__][result] += 1

    def _client(self, kind: Kind) -> str:
        try:
            kind(self._server, self._targets)
        except TimeoutError:
            return "stalled"
        except (OSError, EOFError, AssertionError):
            return "failed"
        return "served"


# -- the test


@contextmanager
def held(number: int) -> Iterator[None]:
    """What is started meanwhile holds that signal back in all its threads.

    libfiu's own is there before the daemon can see to it: a signal that comes while the main thread is at work, and not
    waiting for one, would go to that, and be the end of all.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def targets() -> Iterator[Targets]:
    with ExitStack() as stack:
        tcp, udp = stack.enter_context(TcpEcho()), stack.enter_context(UdpEcho())
        yield Targets(tcp.address, udp.address, stack.enter_context(serving()))


def check_end(daemon: Netproxyd) -> None:
    """All clients have gone, and so has what they had."""
    left = NOTHING

    def ended() -> bool:
        nonlocal left
        status = daemon.status()
        left = {name: status[name] for name in NOTHING}
        return left == NOTHING

    with suppress(AssertionError):
        wait_for(ended, GONE_SECONDS, "")
    assert left == NOTHING, daemon.log[-2000:]
    with suppress(AssertionError):
        wait_for(
            lambda: daemon.descriptors() <= daemon.baseline + SPARE_DESCRIPTORS, CLEAN_SECONDS, ""
        )
    assert daemon.descriptors() <= daemon.baseline + SPARE_DESCRIPTORS, opened(daemon)


def opened(daemon: Netproxyd) -> dict[str, str]:
    folder = Path(f"/proc/{daemon.process.pid}/fd")
    return {entry.name: os.readlink(entry) for entry in folder.iterdir()}


def check_load(load: Load) -> None:
    print("\n".join(f"{kind}: {dict(found)}" for kind, found in load.found.items()))
    for kind, found in load.found.items():
        assert found["served"] >= SERVED * found.total(), f"{kind}: {found}"
    assert load.part("stalled") <= STALLED, load.found


@pytest.mark.parametrize(
    "names, kinds", ((FAULTY, KINDS), (SHUTDOWN, OVER_TCP)), ids=("calls", "shutdown")
)
def test_every_fiftieth_call_fails(
    netproxyd: Start, targets: Targets, tmp_path: Path, names: Sequence[str], kinds: Sequence[Kind]
) -> None:
    pipes = tmp_path / "fiu"
    with held(signal.SIGUSR1):
        daemon = netproxyd(
            "-v", config=CONFIG, python=(program("fiu-run"), "-x", "-f", str(pipes), sys.executable)
        )
    faults, load = Faults(daemon, pipes, names), Load(daemon.server, targets, kinds)
    faults.begin()
    load.run(SECONDS)
    faults.end()
    check_load(load)
    assert load.part("served") < 1.0, "faults that nobody notices are none"
    check_end(daemon)
    assert not daemon.lines(r"(?i)traceback|internal error|exception|has died"), "\n".join(
        daemon.lines(" error ")
    )
    after = Load(daemon.server, targets, KINDS)
    after.run(0.2)
    assert after.part("served") == 1.0, after.found
    check_end(daemon)
    daemon.process.terminate()
    assert daemon.wait(CLEAN_SECONDS) == 0
