"""Stand-ins on both sides of the NAT table: dialers and packet connections, a listening socket, a pool of workers.

Nothing here has a socket or a thread.  A worker's task runs when the test says so.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Hashable

from netproxy.errors import DialError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run
from netproxy.interfaces.flows import Flow


def payloads(arena: Any, run: Run) -> list[bytes]:
    return [
        bytes(arena.view[at : at + (run.last if at == run.offsets[-1] else run.length)])
        for at in run.offsets
    ]


class Way(str):
    """A destination: "to HOST:PORT", and the sockaddr that a filter asks for; a name is at 203.0.113.9."""

    sockaddr: tuple

    @classmethod
    def to(cls, target: Address) -> Way:
        way = cls(f"to {target}")
        way.sockaddr = (target.host if target.host[-1].isdigit() else "203.0.113.9", target.port)
        return way


class FakeConn:
    """A PacketConn; `sent` are (payload, destination) in order.  What `offer` is given is received by the reader."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.prepared: list[Address] = []
        self.refusal: DialError | None = None  # what prepare() raises
        self.while_sending: Callable[[], None] | None = None
        self.shut = threading.Event()
        self.closed = threading.Event()
        self._arrived = threading.Condition()
        self._offered: list[tuple[bytes, Hashable]] = []

    def prepare(self, flow: Flow) -> Any:
        target = flow.target
        self.prepared.append(target)
        if self.refusal:
            raise self.refusal
        return Way.to(target)

    def send(self, arena: Any, run: Run, destination: Any) -> None:
        self.sent += [(payload, destination) for payload in payloads(arena, run)]
        if self.while_sending:
            call, self.while_sending = self.while_sending, None
            call()

    def offer(self, *datagrams: tuple[bytes, Hashable]) -> None:
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
            at += 2048
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
    """A Dialer of FakeConns; `refusal` is what dial_packet() raises while it is set."""

    carries = frozenset({"tcp", "udp"})
    symmetric = False
    resolves_names = True

    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.conns: list[FakeConn] = []
        self.flows: list[Flow] = []
        self.refusal: BaseException | None = None
        self.refuse_names: DialError | None = None

    def dial(self, flow: Flow) -> Any:
        raise AssertionError("no stream is asked for here")

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
    """A DatagramSocket towards clients; `sent` are (datagram with its header, destination)."""

    def __init__(self) -> None:
        self.address = Address("127.0.0.1", 1080)
        self.sent: list[tuple[bytes, Any]] = []
        self.changed = threading.Condition()

    def reply_destination(self, peer: Hashable) -> Any:
        return f"back to {peer}"

    def send(self, arena: Any, run: Run, destination: Any) -> None:
        header = run.header.data if run.header else b""
        with self.changed:
            self.sent += [(header + payload, destination) for payload in payloads(arena, run)]
            self.changed.notify_all()

    def wait_for(self, amount: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.sent) >= amount, 5), self.sent


class Workers:
    """submit() of a pool; tasks wait until run(), or run at once while `eager`.  With `full` none is taken."""

    def __init__(self, eager: bool = True) -> None:
        self.eager = eager
        self.full = False
        self.tasks: list[Callable[[], None]] = []

    def submit(self, task: Callable[[], None]) -> bool:
        if self.full:
            return False
        if self.eager:
            task()
        else:
            self.tasks.append(task)
        return True

    def run(self) -> None:
        """All that wait, and what they submit in turn."""
        while self.tasks:
            self.tasks.pop(0)()
