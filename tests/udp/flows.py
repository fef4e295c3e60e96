"""Numbered datagrams: a receiver can tell which it got, and whether every byte is right.

A Piece leaves in one send: a datagram, or a train that the kernel cuts.  The pieces of a shape
are the same in each run, so that a failure can be repeated.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import pytest

from netproxy.relay.entry import EntryState
from netproxy.relay.session import Session
from tests.support.handlers import SECONDS, eventually
from tests.support.relays import SOL_UDP, UDP_SEGMENT, Running

HEAD = struct.Struct("!HI")
"""Flow and number of a datagram."""
END = 0xFFFFFFFF
"""The number of a flow's last datagram, which is sent until it arrives."""
NOISE = random.Random(1).randbytes(1 << 17)
ICMP_PACE = 0.025
"""Seconds between datagrams whose refusals are counted: Linux limits ICMP in steps of 20 ms."""
TRAIN_BYTES = 60_000
"""The most bytes of a train with its headers.  A send takes 65,507."""


class Piece(NamedTuple):
    flow: int
    sizes: tuple[int, ...]
    """Bytes of each payload.  More than one is a train, whose last datagram may be shorter."""


def datagram(flow: int, number: int, size: int) -> bytes:
    """Return a datagram of `size` bytes that no other flow and number have."""
    start = (number * 37 + flow * 1009) % (1 << 16)
    return HEAD.pack(flow, number) + NOISE[start : start + size - HEAD.size]


def pieces(shape: str, count: int, flows: int = 1) -> list[Piece]:
    """Return pieces of a shape with at least `count` datagrams."""
    chance = random.Random(shape)
    plan: list[Piece] = []
    while count > 0:
        piece = Piece(chance.randrange(flows), tuple(_SHAPES[shape](chance)))
        plan.append(piece)
        count -= len(piece.sizes)
    return plan


def _mixed(chance: random.Random) -> Iterable[int]:
    size = chance.choice((HEAD.size, 40, 100, 300, 590, 600, 1190, 1200, 1472, 3000))
    if chance.random() < 0.5:
        return (size,)
    train = (size,) * chance.randrange(2, min(60, TRAIN_BYTES // (size + 22)) + 1)
    return train if chance.random() < 0.5 else (*train, chance.randrange(HEAD.size, size + 1))


_SHAPES: dict[str, Callable[[random.Random], Iterable[int]]] = {
    "singles": lambda chance: (1200,),
    "trains": lambda chance: (1200,) * 16,
    "mixed": _mixed,
}


class SendPlan:
    """All datagrams of some flows, encoded before the sending begins, for the full rate."""

    def __init__(
        self, pieces: Iterable[Piece], flows: int, header: Callable[[int], bytes] = lambda flow: b""
    ) -> None:
        """`header` returns what precedes each datagram of a flow."""
        self.sizes: list[list[int]] = [[] for _ in range(flows)]
        self.sends: list[tuple[int, bytes, int]] = []
        """Flow, bytes, and the length of each datagram (0 if there is only one)."""
        self.ends = [(flow, header(flow) + datagram(flow, END, HEAD.size)) for flow in range(flows)]
        for flow, sizes in pieces:
            known = self.sizes[flow]
            parts = []
            for size in sizes:
                parts.append(header(flow) + datagram(flow, len(known), size))
                known.append(size)
            self.sends.append((flow, b"".join(parts), len(parts[0]) if len(parts) > 1 else 0))

    def send_all(self, put: Callable[[int, bytes, int], None], arrived: threading.Event) -> None:
        """Send everything, then the ends again and again until they have `arrived`."""
        for flow, data, stride in self.sends:
            put(flow, data, stride)
        for _ in range(int(SECONDS * 100)):
            for flow, data in self.ends:
                put(flow, data, 0)
            if arrived.wait(0.01):
                return


class Arrivals:
    """Checks what arrives of a SendPlan: numbers rise in each flow, and every byte is right."""

    def __init__(self, plan: SendPlan) -> None:
        self._sizes = plan.sizes
        self._last = [-1] * len(plan.sizes)
        self._open = set(range(len(plan.sizes)))
        self.count = 0

    def enter(self, data: bytes) -> int:
        """Check a datagram; return its flow."""
        flow, number = HEAD.unpack_from(data)
        if number == END:
            assert len(data) == HEAD.size
            self._open.discard(flow)
            return flow
        assert flow in self._open, "a datagram came behind the end of its flow"
        assert number > self._last[flow], f"{number} came behind {self._last[flow]}"
        assert data == datagram(flow, number, self._sizes[flow][number])
        self._last[flow] = number
        self.count += 1
        return flow

    @property
    def complete(self) -> bool:
        return not self._open


def put_on(sock: socket.socket, data: bytes, stride: int, to: Any) -> None:
    """Send one datagram, or a train of datagrams of `stride` bytes."""
    if not stride:
        sock.sendto(data, to)
        return
    try:
        sock.sendmsg([data], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", stride))], 0, to)
    except OSError:
        pytest.skip("the kernel cannot cut datagrams")


def settled(relay: Running) -> None:
    """Wait until every entry is ready.

    A worker may still be flushing its queue, though the first reply has come.
    """
    tables = [state.table for state in relay.daemon._plan.relays.states.values()]
    eventually(
        lambda: all(
            entry.state is EntryState.READY
            for table in tables
            for entry in list(table.entries.values())
        )
    )


@contextmanager
def held_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Keep a session's reader busy: it finds the replies that come meanwhile as one batch.

    Yields an event.  The caller sends a reply, which keeps the reader busy once that is set.
    """
    busy, release = threading.Event(), threading.Event()
    send_back = Session._send_back

    def slowly(*arguments: Any) -> None:
        busy.set()
        assert release.wait(SECONDS)
        send_back(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_send_back", slowly)
        try:
            yield busy
        finally:
            release.set()
