"""Numbered datagrams: whoever gets one can tell which it is, and whether every byte of it is right.

A Piece is what leaves in one send: a datagram, or a train that the kernel cuts.
Those of a shape look alike in each run, so that a failure can be repeated.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import pytest

from netproxy.relay.session import Session
from tests.support.handlers import SECONDS, eventually
from tests.support.relays import SOL_UDP, UDP_SEGMENT, Running

HEAD = struct.Struct("!HI")  # flow, number
END = 0xFFFFFFFF  # the number of a flow's last datagram, which is sent until it arrives
NOISE = random.Random(1).randbytes(1 << 17)
ICMP_PACE = 0.025  # seconds between datagrams that are all to be refused: Linux counts what it may tell in steps of 20 ms
TRAIN_BYTES = 60_000  # of a train with its headers: a send takes 65,507


class Piece(NamedTuple):
    flow: int
    sizes: tuple[int, ...]  # bytes of payload; more than one: a train, whose last may be shorter


def datagram(flow: int, number: int, size: int) -> bytes:
    start = (number * 37 + flow * 1009) % (1 << 16)
    return HEAD.pack(flow, number) + NOISE[start : start + size - HEAD.size]


def pieces(shape: str, count: int, flows: int = 1) -> list[Piece]:
    """At least `count` datagrams of a shape."""
    chance = random.Random(shape)
    found: list[Piece] = []
    while count > 0:
        piece = Piece(chance.randrange(flows), tuple(_SHAPES[shape](chance)))
        found.append(piece)
        count -= len(piece.sizes)
    return found


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


class Stream:
    """What is to be sent of each flow, made before the sending begins, so that it goes at full rate."""

    def __init__(
        self, plan: Iterable[Piece], flows: int, header: Callable[[int], bytes] = lambda flow: b""
    ) -> None:
        """`header` stands before each datagram of a flow."""
        self.sizes: list[list[int]] = [[] for _ in range(flows)]
        self.sends: list[
            tuple[int, bytes, int]
        ] = []  # flow, bytes, length of each (0: not a train)
        self.ends = [(flow, header(flow) + datagram(flow, END, HEAD.size)) for flow in range(flows)]
        for flow, sizes in plan:
            known = self.sizes[flow]
            parts = []
            for size in sizes:
                parts.append(header(flow) + datagram(flow, len(known), size))
                known.append(size)
            self.sends.append((flow, b"".join(parts), len(parts[0]) if len(parts) > 1 else 0))

    def pour(self, put: Callable[[int, bytes, int], None], arrived: threading.Event) -> None:
        """All of it at once, then the ends again and again until they have `arrived`."""
        for flow, data, stride in self.sends:
            put(flow, data, stride)
        for _ in range(int(SECONDS * 100)):
            for flow, data in self.ends:
                put(flow, data, 0)
            if arrived.wait(0.01):
                return


class Ledger:
    """The receiver's side of a Stream: numbers rise within each flow, and every byte is right."""

    def __init__(self, stream: Stream) -> None:
        self._sizes = stream.sizes
        self._last = [-1] * len(stream.sizes)
        self._open = set(range(len(stream.sizes)))
        self.count = 0

    def enter(self, data: bytes) -> int:
        """Its flow."""
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
    """One datagram, or the train of those of `stride` bytes."""
    if not stride:
        sock.sendto(data, to)
        return
    try:
        sock.sendmsg([data], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", stride))], 0, to)
    except OSError:
        pytest.skip("the kernel cannot cut datagrams")


def settled(relay: Running) -> None:
    """Waits until no entry's first datagrams wait any more: a worker may be at it, though an answer has come already."""
    tables = [state.table for state in relay.daemon._plan.relays.states.values()]
    eventually(
        lambda: all(entry.destination for table in tables for entry in list(table.entries.values()))
    )


@contextmanager
def held_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Sessions take their time with what they send back; what comes meanwhile they find as one batch.

    The event tells that one is at it: the caller sends the datagram that keeps it busy.
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
