#!/usr/bin/env python3
"""Measures the latency that the relay adds for a game: many clients, small datagrams, steady rate.

  python3 tests/bench/game.py [--seconds 10] [--clients 200] [--rate 60] [--size 100]

First directly to an echo server, then through netproxyd, all on loopback. A round trip ends when
the kernel has received the answer, not when this program reads it.
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
    Endpoint,
    header,
    open_clients,
    print_row,
    raise_descriptor_limit,
    readable,
    udp_socket,
)

# The option, and the type of its control message.
SO_TIMESTAMPNS = 35
# Seconds between two looks at the clock.
PAUSE = 0.0002
# Seconds without an answer after which none is awaited.
LAST = 0.3
STAMP = struct.Struct("!q")
KERNEL_STAMP = struct.Struct("@ll")
WIDTHS = (8, 9, 9, 7, 8, 8, 8, 8)


class Load(NamedTuple):
    """Clients, datagrams per second of each, bytes of a datagram, and the duration."""

    clients: int
    rate: int
    size: int
    seconds: float


class Result(NamedTuple):
    """Datagrams sent, and the round trips of the answered ones in nanoseconds, sorted."""

    sent: int
    trips: list[int]

    def quantile(self, part: float) -> float:
        """Return a quantile of the round trips in milliseconds."""
        if not self.trips:
            return float("nan")
        return self.trips[min(len(self.trips) - 1, int(len(self.trips) * part))] / 1e6


class Receiver(Process):
    """A process that receives the answers and computes the round trips."""

    def __init__(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets = sockets
        super().__init__()

    # -- calls

    def trips(self) -> list[int]:
        """Return the round trips in nanoseconds."""
        return self._trips

    def count(self) -> int:
        """Return the number of answers."""
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
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
                seconds, nanoseconds = KERNEL_STAMP.unpack_from(stamp)
                arrived = seconds * 1_000_000_000 + nanoseconds
        self._trips.append(arrived - STAMP.unpack_from(data, len(data) - STAMP.size)[0])


def play(sockets: Sequence[socket.socket], before: bytes, load: Load) -> Result:
    """Send from all clients in turn at their rate. `before` precedes each datagram."""
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
                # The datagram is lost.
                pass
            sent += 1
        time.sleep(PAUSE)
    count = -1
    while count < (count := receiver.call("count")) < total:
        time.sleep(LAST)
    trips = receiver.call("trips")
    receiver.stop()
    return Result(sent, sorted(trips))


def direct(target: Endpoint, load: Load) -> Result:
    """Measure without the relay."""
    sockets = [udp_socket() for _ in range(load.clients)]
    for sock in sockets:
        sock.connect(target)
    result = play(sockets, b"", load)
    for sock in sockets:
        sock.close()
    return result


def relayed(target: Endpoint, load: Load) -> tuple[Result, float]:
    """Measure with the relay. Return also its processor time in microseconds per datagram."""
    with Netproxyd() as daemon:
        clients = open_clients(daemon.address, load.clients)
        for client in clients:
            # Opens the session before the measurement.
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
        "--rate", type=int, default=60, help="datagrams per second of each client (default: 60)"
    )
    parser.add_argument("--size", type=int, default=100, help="bytes of a datagram (default: 100)")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    load = Load(options.clients, options.rate, max(STAMP.size, options.size), options.seconds)
    raise_descriptor_limit(load.clients * 2 + 100)
    print(
        f"{load.clients} clients x {load.rate} datagrams/s x {load.size} bytes, "
        f"{load.seconds:g} s, {os.cpu_count()} processors\n"
    )
    sink = Sink(1, echo=True)
    results = {"direct": direct(sink.targets[0], load)}
    results["relay"], cost = relayed(sink.targets[0], load)
    sink.stop()
    print_row(WIDTHS, "path", "sent", "answered", "lost", "p50 ms", "p90 ms", "p99 ms", "max ms")
    for path, result in results.items():
        print_row(
            WIDTHS,
            path,
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
    print(f"\nProcessor time of the relay: {cost:.1f} us per datagram.")
    return 0 if results["relay"].trips else 1


if __name__ == "__main__":
    sys.exit(main())
