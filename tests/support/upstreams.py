"""Test doubles around the NAT table: dialers, packet connections, a client-side socket, a pool.

Nothing here has a socket or a thread.  A task of the pool runs when the test calls run().
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Hashable, Sequence

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Arena, Batch, Run
from netproxy.interfaces.fairness import ClientTask
from netproxy.interfaces.flows import Flow
from tests.support.sockets import SECONDS

PITCH = 2048
"""Bytes between two datagrams that FakeConn puts into an arena."""


def payloads(arena: Any, run: Run) -> list[bytes]:
    """Return the datagrams of a run."""
    return [
        bytes(arena.view[at : at + (run.last if at == run.offsets[-1] else run.length)])
        for at in run.offsets
    ]


class FakeDestination(str):
    """The destination "to HOST:PORT".  A filter sees its sockaddr; a name has 203.0.113.9."""

    sockaddr: tuple[str, int]

    @classmethod
    def to(cls, target: Address) -> FakeDestination:
        """Return the destination for a target."""
        destination = cls(f"to {target}")
        host = target.host if target.host[-1].isdigit() else "203.0.113.9"
        destination.sockaddr = (host, target.port)
        return destination


class FakeConn:
    """A PacketConn that records.  Its reader receives what the test passes to offer()."""

    member = ""
    deliverer = None
    bound: Sequence[Address] = ()
    only: Address | None = None
    """The only target that it reaches; None for all."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        """Payloads and destinations in order."""
        self.prepared: list[Address] = []
        self.refusal: DialError | None = None
        """Raised by prepare()."""
        self.while_sending: Callable[[], None] | None = None
        """Called once, by the next send()."""
        self.shut = threading.Event()
        self.closed = threading.Event()
        self._arrived = threading.Condition()
        self._offered: list[tuple[bytes, Hashable]] = []

    def reaches(self, target: Address) -> bool:
        return self.only in (None, target)

    def prepare(self, flow: Flow) -> FakeDestination:
        target = flow.target
        self.prepared.append(target)
        if self.refusal:
            raise self.refusal
        return FakeDestination.to(target)

    def send(self, arena: Arena, run: Run, destination: Any) -> None:
        self.sent += [(payload, destination) for payload in payloads(arena, run)]
        if self.while_sending:
            call, self.while_sending = self.while_sending, None
            call()

    def offer(self, *datagrams: tuple[bytes, Hashable]) -> None:
        """Let the reader receive datagrams, each with the key of its peer."""
        with self._arrived:
            self._offered += datagrams
            self._arrived.notify_all()

    def wait(self) -> bool:
        with self._arrived:
            self._arrived.wait_for(lambda: self._offered or self.shut.is_set())
        return not self.shut.is_set()

    def receive(self, arena: Any) -> Batch:
        with self._arrived:
            offered, self._offered = self._offered, []
        spans, at = [], 0
        for payload, peer in offered:
            arena.view[at : at + len(payload)] = payload
            spans.append(((at,), len(payload), len(payload), peer))
            at += PITCH
        return Batch(arena, spans)

    def source(self, peer: Any) -> Address:
        return Address(*peer)

    def shutdown(self) -> None:
        with self._arrived:
            self.shut.set()
            self._arrived.notify_all()

    def close(self) -> None:
        self.closed.set()


class FakeDialer:
    """A Dialer of FakeConns.  dial_packet() raises `refusal` while that is set."""

    carries = frozenset({"tcp", "udp"})
    symmetric = knows_bound = False
    resolves_names = True

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.conns: list[FakeConn] = []
        self.flows: list[Flow] = []
        self.refusal: BaseException | None = None
        self.refuse_names: DialError | None = None
        """Raised by prepare() of the connections."""

    def dial(self, flow: Flow) -> Any:
        raise AssertionError("this test dials no stream")

    def fixed_for(self, flow: Flow) -> FakeDialer:
        return self

    def dial_packet(self, flow: Flow) -> FakeConn:
        self.flows.append(flow)
        if self.refusal:
            raise self.refusal
        conn = FakeConn()
        conn.refusal = self.refuse_names
        self.conns.append(conn)
        return conn


class FakeSocket:
    """A DatagramSocket towards clients."""

    def __init__(self) -> None:
        self.address = Address("127.0.0.1", 1080)
        self.sent: list[tuple[bytes, Any]] = []
        """Datagrams, headers included, and destinations in order."""
        self.changed = threading.Condition()

    def reply_destination(self, peer: Hashable) -> Any:
        return f"back to {peer}"

    def send(self, arena: Arena, run: Run, destination: Any) -> None:
        header = run.header.data if run.header else b""
        with self.changed:
            self.sent += [(header + payload, destination) for payload in payloads(arena, run)]
            self.changed.notify_all()

    def wait_for(self, amount: int) -> None:
        """Wait until `amount` datagrams have been sent."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.sent) >= amount, SECONDS), self.sent


class FakePool:
    """A pool without threads: tasks run at once if `eager`, otherwise in run()."""

    def __init__(self, eager: bool = True) -> None:
        self.eager = eager
        self.full = False
        """True if submit() refuses every task."""
        self.tasks: list[Callable[[], None]] = []

    def submit(self, task: Callable[[], None]) -> bool:
        if self.full:
            return False
        if self.eager:
            task()
        else:
            self.tasks.append(task)
        return True

    def submit_fairly(self, task: ClientTask) -> None:
        """Take a task of a client (interfaces.fairness.FairSubmit)."""
        if not self.submit(task.run):
            task.drop()

    def run(self) -> None:
        """Run all tasks that wait, and those that they submit."""
        while self.tasks:
            self.tasks.pop(0)()
