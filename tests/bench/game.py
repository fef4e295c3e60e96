#!/usr/bin/env python3
"""What the relay adds to the round trip of a game: many clients, small datagrams, a steady pace.

  python3 tests/bench/game.py [--seconds 10] [--clients 200] [--rate 60] [--size 100]

Once straight to an echo server, once by way of netproxyd, all on loopback.  A round
trip ends when the kernel has the answer, not when this program finds time for it.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
import sys
import time
from typing import NamedTuple, Sequence

from load import Sink, Process
from rig import (
    Netproxyd,
    Where,
    header,
    open_clients,
    print_row,
    raise_descriptor_limit,
    readable,
    udp_socket,
)

SO_TIMESTAMPNS = 35  # and the type of its control message
PAUSE = 0.0002  # seconds between two looks at the clock
LAST = 0.3  # seconds without an answer after which none is awaited
STAMP = struct.Struct("!q")
KERNEL_STAMP = struct.Struct("@ll")
WIDTHS = (8, 9, 9, 7, 8, 8, 8, 8)


class Load(NamedTuple):
    clients: int
    rate: int  # datagrams a second of each
    size: int  # bytes
    seconds: float


class Result(NamedTuple):
    sent: int
    trips: list[int]  # nanoseconds, sorted

    def quantile(self, part: float) -> float:
        """Milliseconds."""
        return (
            self.trips[min(len(self.trips) - 1, int(len(self.trips) * part))] / 1e6
            if self.trips
            else float("nan")
        )


class Receiver(Process):
    """Notes how long each answer took."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets
        super().__init__()

    # -- calls

    def trips(self) -> list[int]:
        return self._trips

    def count(self) -> int:
        return len(self._trips)

    # -- in its process

    def begin(self) -> None:
        self._trips: list[int] = []
        self._poll = readable(self._sockets)
        self._poll.register(self.pipe.fileno(), select.EPOLLIN)
        self._by_descriptor = {sock.fileno(): sock for sock in self._sockets}

    def serve(self) -> None:
        for descriptor, _ in self._poll.poll():
            sock = self._by_descriptor.get(descriptor)
            if sock is None:
                super().serve()
                continue
            try:
                while True:
                    data, control, _, _ = sock.recvmsg(2048, 64, socket.MSG_DONTWAIT)
                    self._note(data, control)
            except OSError:
                pass

    def _note(self, data: bytes, control: list[tuple[int, int, bytes]]) -> None:
        arrived = time.time_ns()
        for level, kind, stamp in control:
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(
                stamp
            ) >= KERNEL_STAMP.size:
                seconds, nanoseconds = KERNEL_STAMP.unpack_from(stamp)
                arrived = seconds * 1_000_000_000 + nanoseconds
        self._trips.append(arrived - STAMP.unpack_from(data, len(data) - STAMP.size)[0])


def play(sockets: Sequence[socket.socket], before: bytes, load: Load) -> Result:
    """All clients at their pace, one after the other; `before` stands before each datagram."""
    for sock in sockets:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    receiver = Receiver(sockets)
    message = before + bytes(load.size - STAMP.size)
    total, rate = int(load.clients * load.rate * load.seconds), load.clients * load.rate
    started, sent = time.perf_counter(), 0
    while sent < total:
        due = min(total, int((time.perf_counter() - started) * rate) + 1)
        while sent < due:
            try:
                sockets[sent % load.clients].send(
                    message + STAMP.pack(time.time_ns()), socket.MSG_DONTWAIT
                )
            except OSError:
                pass  # that one is lost
            sent += 1
        time.sleep(PAUSE)
    count = -1
    while count < (count := receiver.call("count")) < total:
        time.sleep(LAST)
    trips = receiver.call("trips")
    receiver.stop()
    return Result(sent, sorted(trips))


def direct(target: Where, load: Load) -> Result:
    sockets = [udp_socket() for _ in range(load.clients)]
    for sock in sockets:
        sock.connect(target)
    result = play(sockets, b"", load)
    for sock in sockets:
        sock.close()
    return result


def relayed(target: Where, load: Load) -> tuple[Result, float]:
    """And the processor time of the daemon, microseconds a datagram."""
    with Netproxyd() as daemon:
        clients = open_clients(daemon.address, load.clients)
        for client in clients:  # the way is there when the game begins
            client.socket.send(header(target) + bytes(load.size))
            client.socket.recv(2048)
        spent = daemon.processor_seconds()
        result = play([client.socket for client in clients], header(target), load)
        spent = daemon.processor_seconds() - spent
        for client in clients:
            client.close()
    return result, spent / max(1, 2 * len(result.trips)) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measures the latency that netproxyd adds to small datagrams."
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument(
        "--rate", type=int, default=60, help="datagrams a second of each client (default: 60)"
    )
    parser.add_argument("--size", type=int, default=100, help="bytes of a datagram (default: 100)")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    load = Load(options.clients, options.rate, max(STAMP.size, options.size), options.seconds)
    raise_descriptor_limit(load.clients * 2 + 100)
    print(
        f"{load.clients} clients x {load.rate} datagrams/s x {load.size} bytes, {load.seconds:g} s, "
        f"{os.cpu_count()} processors\n"
    )
    sink = Sink(1, echo=True)
    results = {"direct": direct(sink.targets[0], load)}
    results["relay"], cost = relayed(sink.targets[0], load)
    sink.stop()
    print_row(WIDTHS, "way", "sent", "answered", "lost", "p50 ms", "p90 ms", "p99 ms", "max ms")
    for way, result in results.items():
        print_row(
            WIDTHS,
            way,
            result.sent,
            len(result.trips),
            result.sent - len(result.trips),
            *(f"{result.quantile(part):.3f}" for part in (0.5, 0.9, 0.99, 1)),
        )
    added = [
        results["relay"].quantile(part) - results["direct"].quantile(part)
        for part in (0.5, 0.9, 0.99)
    ]
    print_row(WIDTHS, "added", "", "", "", *(f"{value:.3f}" for value in added))
    print(f"\nThe relay's processor time: {cost:.1f} us a datagram.")
    return 0 if results["relay"].trips else 1


if __name__ == "__main__":
    sys.exit(main())
