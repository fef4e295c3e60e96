#!/usr/bin/env python3
"""Watches memory, descriptors and threads of netproxyd under a mixed load.

  python3 tests/bench/soak.py                 ten minutes
  python3 tests/bench/soak.py --minutes 0.3   a short run

Clients with associations and TCP connections send data of mixed sizes to many targets, one of which
refuses. Clients come and go, half of them abruptly. Prints a row every ten seconds. The exit status
is 1 if anything grows.
"""

from __future__ import annotations

import argparse
import random
import select
import socket
import statistics
import struct
import sys
import time
from typing import NamedTuple, Sequence

from load import Sink, Process
from rig import (
    LOOPBACK,
    SECONDS,
    Client,
    Netproxyd,
    Endpoint,
    header,
    open_clients,
    print_row,
    raise_descriptor_limit,
)

# At a time.
ASSOCIATIONS, CONNECTIONS = 60, 40
TARGETS = 20
# The part of the clients that is replaced every second.
CHANGES = 0.1
# Seconds between two rounds of sending.
STEP = 0.02
SIZES = (0, 1, 60, 60, 200, 512, 1200, 1200, 1200, 1400, 4000, 20_000, 60_000)
# The part of the time before anything is expected to be flat.
WARM_UP = 0.3
# MiB of resident memory that may be added in the rest of the time.
GROWTH_MIB = 3.0
# The part of the answers that the second half may have less than the first.
FEWER_ANSWERS = 0.02
# Descriptors and threads that the second half may have more than the first, besides a twentieth.
SPARE = 3
# The limit of a wait for the end of everything after the last client.
CLEAN_SECONDS = 60.0
# A run of so many seconds waits for the end of idle threads, which takes ten seconds.
LONG_RUN = 60.0
WIDTHS = (7, 9, 12, 8, 12, 10, 10)


class Sample(NamedTuple):
    """A row of the table."""

    at: float
    """Seconds from the start."""
    resident: float
    """MiB."""
    descriptors: int
    threads: int
    answered: float
    """Part of the datagrams that were sent since the last sample."""


class TcpEcho(Process):
    """A process with an echo server for any number of connections."""

    def __init__(self) -> None:
        self._listening = socket.create_server((LOOPBACK, 0), backlog=128)
        self.address: Endpoint = self._listening.getsockname()
        super().__init__()
        self._listening.close()

    def begin(self) -> None:
        self._poll = select.epoll()
        self._poll.register(self._listening, select.EPOLLIN)
        self._poll.register(self.pipe.fileno(), select.EPOLLIN)
        self._open: dict[int, socket.socket] = {}

    def serve(self) -> None:
        for descriptor, _ in self._poll.poll():
            if descriptor == self.pipe.fileno():
                super().serve()
            elif descriptor == self._listening.fileno():
                sock, _ = self._listening.accept()
                sock.settimeout(SECONDS)
                self._open[sock.fileno()] = sock
                self._poll.register(sock, select.EPOLLIN)
            else:
                self._echo(descriptor)

    def _echo(self, descriptor: int) -> None:
        sock = self._open[descriptor]
        try:
            data = sock.recv(65536)
            sock.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._poll.unregister(sock)
            self._open.pop(descriptor).close()


class MixedClients(Process):
    """A process with clients that come, send, receive and go."""

    # -- calls

    def open(self, server: Endpoint, targets: Sequence[Endpoint], tcp: Endpoint) -> None:
        """Open associations and connections through the daemon."""
        self._server, self._tcp = server, tcp
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
            closed.bind((LOOPBACK, 0))
            refusing: Endpoint = closed.getsockname()
        self._random = random.Random(4)
        name = b"\0\0\0\3\x09localhost" + struct.pack("!H", targets[0][1])
        self._headers = [header(target) for target in (*targets, refusing)] + [name]
        self._noise = self._random.randbytes(65536)
        self._clients = open_clients(server, ASSOCIATIONS)
        self._connections = [self._connect() for _ in range(CONNECTIONS)]
        self._sent = self._answered = self._changes = 0

    def work(self, seconds: float) -> tuple[int, int, int]:
        """Send and receive for so many seconds. Return datagrams, answers and replaced clients."""
        deadline = time.monotonic() + seconds
        while (now := time.monotonic()) < deadline:
            for client in self._clients:
                self._use(client)
            self._use_connections()
            if self._random.random() < STEP * CHANGES * (ASSOCIATIONS + CONNECTIONS):
                self._replace()
            time.sleep(max(0.0, STEP - (time.monotonic() - now)))
        counts = self._sent, self._answered, self._changes
        self._sent = self._answered = self._changes = 0
        return counts

    def close(self) -> None:
        """Close all clients."""
        for client in (*self._clients, *self._connections):
            client.close()

    # -- in its process

    def _use(self, client: Client) -> None:
        try:
            for _ in range(self._random.randrange(3)):
                size = self._random.choice(SIZES)
                datagram = self._random.choice(self._headers) + self._noise[:size]
                client.socket.send(datagram, socket.MSG_DONTWAIT)
                self._sent += 1
            while True:
                client.socket.recv(65536, socket.MSG_DONTWAIT)
                self._answered += 1
        except OSError:
            # No more answers.
            pass

    def _use_connections(self) -> None:
        connection = self._random.choice(self._connections)
        data = self._noise[: self._random.choice(SIZES)]
        connection.sendall(data)
        left = len(data)
        while left:
            piece = connection.recv(left)
            if not piece:
                raise SystemExit("a TCP connection has ended by itself")
            left -= len(piece)

    def _replace(self) -> None:
        """Replace one client by another. Every second one ends abruptly."""
        self._changes += 1
        abruptly = self._changes % 2 == 0
        if self._random.random() < ASSOCIATIONS / (ASSOCIATIONS + CONNECTIONS):
            index = self._random.randrange(ASSOCIATIONS)
            self._clients[index].close(abruptly)
            (self._clients[index],) = open_clients(self._server, 1)
            return
        index = self._random.randrange(CONNECTIONS)
        connection = self._connections[index]
        if abruptly:
            # The answer is not read.
            connection.sendall(self._noise)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        self._connections[index] = self._connect()

    def _connect(self) -> socket.socket:
        """Return a connection to the echo server, through SOCKS5 CONNECT."""
        sock = socket.create_connection(self._server, SECONDS)
        request = b"\5\1\0\1" + socket.inet_aton(self._tcp[0]) + struct.pack("!H", self._tcp[1])
        sock.sendall(b"\5\1\0" + request)
        answer = b""
        while len(answer) < 12:
            piece = sock.recv(12 - len(answer))
            if not piece:
                break
            answer += piece
        if answer[:4] != b"\5\0\5\0":
            raise SystemExit(f"netproxyd refuses a connection: {answer.hex()}")
        return sock


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line that fits the points best."""
    x, y = (statistics.mean(values) for values in zip(*points, strict=True))
    spread = sum((at - x) ** 2 for at, _ in points)
    return sum((at - x) * (value - y) for at, value in points) / spread if spread else 0.0


def verdict(samples: Sequence[Sample], seconds: float) -> list[str]:
    """Print how memory, descriptors, threads and answers change. Return what grows too much."""
    rest = [sample for sample in samples if sample.at >= seconds * WARM_UP]
    growth = slope([(sample.at, sample.resident) for sample in rest])
    window = rest[-1].at - rest[0].at
    print(
        f"\nRSS: {growth * 600:+.2f} MiB in ten minutes, "
        f"{growth * window:+.2f} MiB in the {window:.0f} s after the warm-up"
    )
    faults = ["resident memory"] if growth * window > GROWTH_MIB else []
    for name in ("descriptors", "threads"):
        first, second = halves([getattr(sample, name) for sample in rest])
        print(f"{name}: {first:.1f} in the first half of it, {second:.1f} in the second")
        if second - first > SPARE + first / 20:
            faults.append(name)
    first, second = halves([sample.answered for sample in rest])
    print(f"answered: {first:.1%} in the first half of it, {second:.1%} in the second")
    return faults + (["fewer answers"] if first - second > FEWER_ANSWERS else [])


def halves(values: Sequence[float]) -> tuple[float, float]:
    """Return the averages of the first half and of the second."""
    middle = len(values) // 2
    return sum(values[:middle]) / max(1, middle), sum(values[middle:]) / (len(values) - middle)


def left_over(daemon: Netproxyd, before: tuple[int, int], threads: bool) -> list[str]:
    """Wait for the end of everything, idle `threads` included. Return what is left."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while True:
        left = {"descriptors": daemon.descriptors() - before[0]}
        if threads:
            left["threads"] = daemon.threads() - before[1]
        if max(left.values()) <= SPARE or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    print("with all clients gone:", ", ".join(f"{count:+d} {name}" for name, count in left.items()))
    return [f"{name} left over" for name, count in left.items() if count > SPARE]


def run(seconds: float) -> list[str]:
    """Run the load and print a row for each interval. Return what grows."""
    interval = max(0.5, min(10.0, seconds / 12))
    sink, echo, clients = Sink(TARGETS, echo=True), TcpEcho(), MixedClients()
    samples: list[Sample] = []
    with Netproxyd() as daemon:
        before = daemon.descriptors(), daemon.threads()
        clients.call("open", daemon.address, sink.targets, echo.address)
        print_row(
            WIDTHS,
            "seconds",
            "RSS MiB",
            "descriptors",
            "threads",
            "datagrams/s",
            "answered",
            "gone",
        )
        started = time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            sent, answered, gone = clients.call("work", interval)
            now = time.monotonic() - started
            samples.append(
                Sample(
                    now,
                    daemon.resident_mib(),
                    daemon.descriptors(),
                    daemon.threads(),
                    answered / max(1, sent),
                )
            )
            print_row(
                WIDTHS,
                f"{now:.0f}",
                f"{samples[-1].resident:.2f}",
                samples[-1].descriptors,
                samples[-1].threads,
                f"{(sent + answered) / interval:,.0f}",
                f"{samples[-1].answered:.1%}",
                gone,
            )
        clients.call("close")
        faults = verdict(samples, seconds) + left_over(daemon, before, seconds >= LONG_RUN)
    for process in (clients, echo, sink):
        process.stop()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watch netproxyd's memory, descriptors and threads under load."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    options = parser.parse_args()
    raise_descriptor_limit(4096)
    faults = run(options.minutes * 60)
    print("flat" if not faults else f"NOT FLAT: {', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
