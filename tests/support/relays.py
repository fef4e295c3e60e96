"""A real Daemon on loopback, clients with an association, and targets, for tests of the UDP relay.

Daemon and clients share the test's process, so that threads and descriptors can be counted.
Targets are plain sockets that the test itself reads and writes.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from contextlib import contextmanager
from typing import Any, Iterator

import pytest

from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.node import Source
from netproxy.config.tree.problems import Problems
from netproxy.config.read import check, read_config
from netproxy.config.schema import Config
from netproxy.daemon.build import build
from netproxy.daemon.daemon import Daemon
from netproxy.daemon.questions import PlanQuestions
from netproxy.daemon.runtime import Runtime
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5
from tests.support.handlers import LOCALHOST, SECONDS, RecordingLog, eventually, reset

SPS = "listeners: [{listen: '127.0.0.1:0'}]"
NO_HINT = Address("0.0.0.0", 0)
SOL_UDP, UDP_SEGMENT = 17, 103


def configuration(text: str) -> Config:
    problems = Problems()
    return check(read_config(parse_text(text.encode(), Source("test.yaml")), problems), problems)


def described(text: str) -> list[str]:
    """Return what netproxyd -t prints of a configuration."""
    plan = build(configuration(text), Runtime(RecordingLog()), None)  # type: ignore[arg-type]
    return PlanQuestions(plan).describe()


class Running:
    """A daemon that serves."""

    def __init__(self, text: str) -> None:
        self.log = RecordingLog()
        self.daemon = Daemon(self.log)  # type: ignore[arg-type]
        self.daemon.start(configuration(text))
        first = self.daemon.summary().partition(",")[0]
        # A UNIX socket has a path and no port.
        port = first.rpartition(":")[2]
        self.port = int(port) if port.isdigit() else 0

    def count(self, name: str, reason: str = "") -> int:
        return self.daemon.counters.value(name, reason)

    def wait_for_count(self, name: str, reason: str, expected: int) -> None:
        """Wait until a counter has the expected value."""
        eventually(lambda: self.count(name, reason) == expected)

    def drops(self) -> dict[str, int]:
        return {
            reason: value for name, reason, value in self.daemon.counters.items() if name == "drops"
        }

    def state(self) -> dict[str, int]:
        """Return the associations, sessions and entries of all relays."""
        totals = {"associations": 0, "sessions": 0, "entries": 0}
        for line in self.daemon.status():
            if line.startswith("udp "):
                for name, value in re.findall(r"(\w+)=(\d+)", line):
                    totals[name] += int(value)
        return totals

    def idle(self) -> bool:
        return not any(self.state().values())

    def sweep(self, later: float) -> None:
        """Do what the janitor will do `later` seconds after the last datagram of all sessions.

        However long the machine has paused since: all count as active until now.
        """
        janitor, now = self.daemon._runtime.janitor, time.monotonic()
        for state in self.daemon._plan.relays.states.values():
            for session in list(state.table._mappings):
                session.active = True
        janitor.sweep(now)
        # A little more: (now + later) - now may be less than `later`.
        janitor.sweep(now + later + 0.001)

    def reload(self, text: str) -> None:
        self.daemon.reload(configuration(text))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the relay's reader busy: it finds what is sent meanwhile as one batch."""
        listeners = self.daemon._manager.listeners
        listener = next(listener for listener in listeners if listener.network == "udp")
        handler = listener.handler
        hold = listener.handler = _Hold()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nudge:
            for _ in range(100):
                nudge.sendto(b"", (LOCALHOST, self.port))
                if hold.entered.wait(SECONDS / 100):
                    break
        assert hold.entered.is_set()
        try:
            yield
        finally:
            listener.handler = handler
            hold.release.set()


class _Hold:
    """A PacketHandler that takes one batch and blocks until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def handle_packets(self, batch: Any, local: Any) -> None:
        self.entered.set()
        self.release.wait(SECONDS)


@contextmanager
def running(text: str = SPS) -> Iterator[Running]:
    """Run a daemon; stop it at the end, and check that nothing has raised an exception."""
    relay = Running(text)
    try:
        yield relay
    finally:
        relay.daemon.stop()
    assert not relay.log.faults
    assert not relay.count("drops", "internal error")
    assert not relay.count("connections", "internal error")


class UdpPort:
    """A UDP socket of a test: a target, or an unknown sender."""

    def __init__(self, host: str = LOCALHOST, port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        if host == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind((host, port))
        self.socket.settimeout(SECONDS)
        self.address = Address(*self.socket.getsockname()[:2])

    def receive(self) -> tuple[bytes, Address]:
        data, peer = self.socket.recvfrom(65536)
        return data, Address(*peer[:2])

    def expect(self, data: bytes) -> Address:
        """Check that the next datagram is `data`; return its sender."""
        received, peer = self.receive()
        assert received == data
        return peer

    def send(self, data: bytes, to: Address) -> None:
        self.socket.sendto(data, to)

    def silent(self) -> bool:
        """Return whether nothing has arrived until now."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(65536)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(SECONDS)
        return False

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UdpClient(UdpPort):
    """A SOCKS5 client with an association.

    Its socket is connected to BND, so that it receives what comes from there only.
    """

    def __init__(
        self,
        port: int,
        server: str = LOCALHOST,
        source: str = LOCALHOST,
        hint: Address | None = None,
    ) -> None:
        """`hint` is the address in the request, by default the port of the datagrams."""
        super().__init__(source)
        self.control = associate(
            port, server, source, hint or Address("0.0.0.0", self.address.port)
        )
        code, self.bound = complete(socks5.read_reply(Stream(self.control)))
        assert code == 0
        self.socket.connect(self.bound)

    def to(self, target: Address, data: bytes) -> None:
        self.socket.send(socks5.encode_header(target) + data)

    def raw(self, data: bytes) -> None:
        self.socket.send(data)

    def receive(self) -> tuple[bytes, Address]:
        """Return the payload and the source of the next datagram."""
        data = self.socket.recv(65536)
        assert data[:3] == b"\0\0\0"
        skip = socks5.header_length(data)
        return data[skip:], socks5.parse_target(data[3:skip])

    def check_echo(self, target: UdpPort, data: bytes = b"ping") -> Address:
        """Send a datagram to a target and one back; return the address that the target saw."""
        self.to(target.address, data)
        seen = target.expect(data)
        target.send(data[::-1], seen)
        assert self.receive() == (data[::-1], target.address)
        return seen

    def leave(self, way: str = "end") -> None:
        """End the control connection: "end", "half" (close) or "reset"."""
        if way == "reset":
            reset(self.control)
        elif way == "half":
            self.control.shutdown(socket.SHUT_WR)
        else:
            self.control.close()

    def close(self) -> None:
        self.control.close()
        super().close()


def associate(
    port: int, server: str = LOCALHOST, source: str = LOCALHOST, hint: Address = NO_HINT
) -> socket.socket:
    """Return a control connection whose ASSOCIATE has been sent.  Its reply is unread."""
    control = socket.create_connection((server, port), SECONDS, (source, 0))
    control.sendall(b"\5\1\0")
    assert control.recv(2) == b"\5\0"
    control.sendall(socks5.encode_request(socks5.UDP_ASSOCIATE, hint))
    control.settimeout(None)
    return control


def send_train(sock: socket.socket, datagrams: list[bytes], to: Address) -> None:
    """Send datagrams of one length as a single message.

    The kernel cuts it, or keeps it whole for a reader with UDP_GRO.
    """
    control = [(SOL_UDP, UDP_SEGMENT, len(datagrams[0]).to_bytes(2, "little"))]
    try:
        sock.sendmsg([b"".join(datagrams)], control, 0, to)
    except OSError:
        pytest.skip("the kernel cannot cut datagrams")


def sessions_threads() -> int:
    return sum(thread.name.startswith("udp-session") for thread in threading.enumerate())
