#!/usr/bin/env python3
"""Watches netproxyd while it holds very many TCP connections that come and go.

  python3 tests/bench/soak_tcp.py                                   20,000 connections, ten minutes
  python3 tests/bench/soak_tcp.py --connections 500 --minutes 0.1   a short run

Connections go through SOCKS5 CONNECT to echo servers. Some hundred of them at a time exchange data,
which is checked. Every second fifty are closed, half of them with RST, and replaced. A connection
needs two descriptors of the daemon: if RLIMIT_NOFILE is too low, the program says so and opens
fewer. The exit status is 1 if anything grows.
"""

from __future__ import annotations

import argparse
import random
import resource
import select
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Sequence

from load import Process
from rig import SECONDS, Netproxyd, Endpoint, print_row, raise_descriptor_limit
from soak import CLEAN_SECONDS, LONG_RUN, SPARE, WARM_UP, TcpEcho, halves, left_over, verdict

# Connections that send and receive at a time; at most a tenth of all.
EXCHANGING = 300
# Messages of each of them before another connection takes its turn.
PIECES = 5
# Seconds between two messages of a connection.
TICK = 0.1
# Connections that close every second; at most a tenth of all.
CHANGES = 50.0
SIZES = (1, 60, 200, 1200, 1400, 4000, 20_000)
# Connections of one client process, with its own echo server and source address.
PER_PROCESS = 5000
# Descriptors of the daemon for each connection.
PER_CONNECTION = 2
# Descriptors of each process for everything else.
RESERVED = 500
# The part of the connections that the daemon may count too many.
GROWTH = 0.01
# The part of the connections' memory that may remain when they have gone, besides KEPT_MIB.
KEPT = 0.5
KEPT_MIB = 10.0
WIDTHS = (7, 9, 12, 8, 12, 12, 10, 8)


class Sample(NamedTuple):
    """A row of the table."""

    at: float
    """Seconds from the start."""
    resident: float
    """MiB."""
    descriptors: int
    threads: int
    connections: int
    """As the daemon counts them."""
    answered: float
    """Part of the messages that were sent since the last sample."""


class Exchange:
    """The messages of a connection. `expected` are the bytes that have not come back yet."""

    __slots__ = ("expected", "left")

    def __init__(self) -> None:
        self.expected = b""
        self.left = PIECES


class TcpClients(Process):
    """A process with connections from its own source address."""

    # -- calls

    def open(
        self,
        number: int,
        server: Endpoint,
        echo: Endpoint,
        connections: int,
        exchanging: int,
        changes: float,
    ) -> None:
        """Open the connections to the echo server, through the daemon."""
        self._source, self._server, self._echo = f"127.0.0.{number + 2}", server, echo
        self._random = random.Random(number)
        self._noise = self._random.randbytes(1 << 17)
        self._exchanging, self._changes, self._due = exchanging, changes, 0.0
        self._poll = select.epoll()
        self._active: dict[int, Exchange] = {}
        # Descriptor -> index in _connections.
        self._index: dict[int, int] = {}
        self._connections: list[socket.socket] = []
        for index in range(connections):
            self._connections.append(self._connect())
            self._index[self._connections[-1].fileno()] = index
        self._sent = self._answered = self._gone = 0

    def work(self, seconds: float) -> tuple[int, int, int]:
        """Exchange messages for so many seconds. Count messages, answers and closed connections."""
        began = now = time.monotonic()
        while now < began + seconds:
            self._send_pieces()
            self._replace(TICK * self._changes)
            self._receive(now + TICK)
            now = time.monotonic()
        self._settle()
        counts = self._sent, self._answered, self._gone
        self._sent = self._answered = self._gone = 0
        return counts

    def close(self) -> None:
        """Close all connections, every second one with RST."""
        for number, sock in enumerate(self._connections):
            close_connection(sock, abruptly=number % 2 == 1)
        self._poll.close()

    # -- in its process

    def _send_pieces(self) -> None:
        while len(self._active) < self._exchanging:
            sock = self._random.choice(self._connections)
            if sock.fileno() not in self._active:
                self._active[sock.fileno()] = Exchange()
                self._poll.register(sock, select.EPOLLIN)
        for descriptor, exchange in list(self._active.items()):
            if exchange.expected:
                # The last message has not come back yet.
                continue
            if not exchange.left:
                self._poll.unregister(descriptor)
                del self._active[descriptor]
                continue
            start = self._random.randrange(len(self._noise) - SIZES[-1])
            exchange.expected = self._noise[start : start + self._random.choice(SIZES)]
            exchange.left -= 1
            self._connections[self._index[descriptor]].sendall(exchange.expected)
            self._sent += 1

    def _receive(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(left):
                self._receive_from(descriptor)

    def _receive_from(self, descriptor: int) -> None:
        exchange = self._active[descriptor]
        data = self._connections[self._index[descriptor]].recv(65536)
        if not data:
            raise SystemExit("a connection has ended by itself")
        if not exchange.expected.startswith(data):
            raise SystemExit("a connection has received other bytes than it has sent")
        exchange.expected = exchange.expected[len(data) :]
        self._answered += not exchange.expected

    def _settle(self) -> None:
        """Wait until all messages have come back, at most SECONDS."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(
            exchange.expected for exchange in self._active.values()
        ):
            for descriptor, _ in self._poll.poll(TICK):
                self._receive_from(descriptor)

    def _replace(self, count: float) -> None:
        """Replace so many connections by new ones. Every second one ends abruptly."""
        self._due += count
        while self._due >= 1:
            self._due -= 1
            self._gone += 1
            index = self._random.randrange(len(self._connections))
            sock = self._connections[index]
            self._sent -= self._remove(sock)
            close_connection(sock, abruptly=self._gone % 2 == 1)
            self._connections[index] = self._connect()
            self._index[self._connections[index].fileno()] = index

    def _remove(self, sock: socket.socket) -> bool:
        """Remove a connection. Return True if a message has not come back."""
        del self._index[sock.fileno()]
        exchange = self._active.pop(sock.fileno(), None)
        if exchange is None:
            return False
        self._poll.unregister(sock)
        return bool(exchange.expected)

    def _connect(self) -> socket.socket:
        """Return a connection to the echo server, through SOCKS5 CONNECT."""
        sock = socket.create_connection(self._server, SECONDS, (self._source, 0))
        sock.sendall(
            b"\5\1\0\5\1\0\1" + socket.inet_aton(self._echo[0]) + struct.pack("!H", self._echo[1])
        )
        answer = b""
        while len(answer) < 12 and (piece := sock.recv(12 - len(answer))):
            answer += piece
        if answer[:4] != b"\5\0\5\0":
            raise SystemExit(f"netproxyd refuses a connection: {answer.hex()}")
        return sock


class ClientProcesses:
    """All client processes. Each method is called in all of them at the same time."""

    def __init__(self, connections: int) -> None:
        self._count = -(-connections // PER_PROCESS)
        self._connections = connections
        self._processes = [TcpClients() for _ in range(self._count)]
        # Created after all processes were forked.
        self._threads: ThreadPoolExecutor | None = None

    def open(self, server: Endpoint, echoes: Sequence[Endpoint]) -> None:
        """Open all connections."""
        self._threads = ThreadPoolExecutor(self._count)
        exchanging = max(1, min(EXCHANGING, self._connections // 10) // self._count)
        changes = min(CHANGES, self._connections / 10) / self._count
        shares = [
            self._connections // self._count + (number < self._connections % self._count)
            for number in range(self._count)
        ]
        self._all(
            "open",
            *(
                (number, server, echoes[number], share, exchanging, changes)
                for number, share in enumerate(shares)
            ),
        )

    def work(self, seconds: float) -> tuple[int, int, int]:
        """Exchange messages. Return the sums of messages, answers and closed connections."""
        counts = self._all("work", *[(seconds,)] * self._count)
        sent, answered, gone = map(sum, zip(*counts, strict=True))
        return sent, answered, gone

    def close(self) -> None:
        """Close all connections."""
        self._all("close", *[()] * self._count)

    def stop(self) -> None:
        """End all processes."""
        if self._threads is not None:
            self._threads.shutdown()
        stop(self._processes)

    def _all(self, name: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return list(
            self._threads.map(
                lambda process, given: process.call(name, *given), self._processes, arguments
            )
        )


def close_connection(sock: socket.socket, abruptly: bool) -> None:
    """Close a connection, with RST if `abruptly`."""
    if abruptly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def stop(processes: Sequence[Process]) -> None:
    """End processes, the last one first.

    Each was forked with copies of the pipes of earlier ones, whose ends see the end of file only
    when all copies are closed.
    """
    for process in reversed(processes):
        process.stop()


def possible(wanted: int) -> int:
    """Return the wanted number of connections, or as many as descriptors allow."""
    limit = raise_descriptor_limit(PER_CONNECTION * wanted + RESERVED)
    room = max(1, (limit - RESERVED) // PER_CONNECTION)
    if room < wanted:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        print(
            f"the limit of descriptors is {hard:,} (ulimit -Hn): "
            f"{room:,} connections, not {wanted:,}"
        )
    return min(room, wanted)


def watch(daemon: Netproxyd, clients: ClientProcesses, seconds: float) -> list[Sample]:
    """Run the clients and print a row for each interval."""
    interval = max(0.5, min(10.0, seconds / 12))
    samples: list[Sample] = []
    print_row(
        WIDTHS,
        "seconds",
        "RSS MiB",
        "descriptors",
        "threads",
        "connections",
        "exchanges/s",
        "answered",
        "gone/s",
    )
    started = time.monotonic()
    while (now := time.monotonic() - started) < seconds:
        sent, answered, gone = clients.work(interval)
        took, now = time.monotonic() - started - now, time.monotonic() - started
        sample = Sample(
            now,
            daemon.resident_mib(),
            daemon.descriptors(),
            daemon.threads(),
            daemon.connections(),
            answered / max(1, sent),
        )
        samples.append(sample)
        print_row(
            WIDTHS,
            f"{now:.0f}",
            f"{sample.resident:.2f}",
            sample.descriptors,
            sample.threads,
            sample.connections,
            f"{answered / took:,.0f}",
            f"{sample.answered:.1%}",
            f"{gone / took:.1f}",
        )
    return samples


def too_many(samples: Sequence[Sample], seconds: float, connections: int) -> list[str]:
    """Return a fault if the daemon counts more and more connections."""
    first, second = halves(
        [sample.connections for sample in samples if sample.at >= seconds * WARM_UP]
    )
    print(
        f"connections: {first:.1f} in the first half of it, {second:.1f} in the second; "
        f"{connections} clients"
    )
    excess = second - max(first, connections)
    return ["connections"] if excess > SPARE + GROWTH * connections else []


def kept(daemon: Netproxyd, idle: float, held: float, seconds: float) -> list[str]:
    """Return connections and memory that are left when all clients have gone.

    `idle` is the memory in MiB before the first client, `held` that with all of them. Memory is
    free when idle threads have ended, for which there are `seconds`.
    """
    allowed, deadline = idle + KEPT_MIB + KEPT * (held - idle), time.monotonic() + seconds
    while (connections := daemon.connections()) or daemon.resident_mib() > allowed:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    resident = daemon.resident_mib()
    print(
        f"with all clients gone: {connections} connections, RSS {resident:.1f} MiB "
        f"({idle:.1f} before the first, {held:.1f} with all)"
    )
    faults = ["connections left over"] if connections else []
    return faults + (["memory left over"] if resident > allowed else [])


def run(connections: int, seconds: float) -> list[str]:
    """Run the load. Return what grows or is left."""
    echoes = [TcpEcho() for _ in range(-(-connections // PER_PROCESS))]
    clients = ClientProcesses(connections)
    with Netproxyd(sessions=connections + connections // 10) as daemon:
        idle, before = daemon.resident_mib(), (daemon.descriptors(), daemon.threads())
        began = time.monotonic()
        clients.open(daemon.address, [echo.address for echo in echoes])
        took, opened = time.monotonic() - began, daemon.resident_mib()
        print(
            f"{connections:,} connections opened in {took:.1f} s: RSS {idle:.1f} MiB before, "
            f"{opened:.1f} with them, {(opened - idle) * 1024 / connections:.1f} KiB each"
        )
        samples = watch(daemon, clients, seconds)
        clients.close()
        faults = verdict(samples, seconds) + too_many(samples, seconds, connections)
        faults += left_over(daemon, before, seconds >= LONG_RUN)
        faults += kept(daemon, idle, samples[-1].resident, CLEAN_SECONDS)
    clients.stop()
    stop(echoes)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watch netproxyd while it holds very many TCP connections."
    )
    parser.add_argument(
        "--connections", type=int, default=20_000, help="how many at a time (default: 20000)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    options = parser.parse_args()
    faults = run(possible(options.connections), options.minutes * 60)
    print("flat" if not faults else f"NOT FLAT: {', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
