#!/usr/bin/env python3
"""Whether netproxyd holds very many TCP connections, and stays as it is while they come and go.

  python3 tests/bench/soak_tcp.py                                     20,000 connections, ten minutes
  python3 tests/bench/soak_tcp.py --connections 500 --minutes 0.1     a short look

Connections by SOCKS5 CONNECT to echo servers: at any time some hundred of them
exchange bytes, which are checked; fifty a second close, half of them by RST, and as
many are opened again.  A connection takes two descriptors of the daemon: where
RLIMIT_NOFILE does not allow so many there are fewer, and it says so.  The exit
status is 1 if anything grows.
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
from rig import SECONDS, Netproxyd, Where, print_row, raise_descriptor_limit
from soak import CLEAN_SECONDS, PATIENT_FROM, SPARE, WARM_UP, TcpEcho, halves, left_over, verdict

EXCHANGING = 300  # connections at a time that send and receive, a tenth of all at the most
PIECES = 5  # that each of them sends before another takes its turn
TICK = 0.1  # seconds between two pieces of a connection
CHANGES = 50.0  # connections that close a second, a tenth of all at the most
SIZES = (1, 60, 200, 1200, 1400, 4000, 20_000)
PER_PROCESS = 5000  # connections of one process of clients, one echo server and one source address
PER_CONNECTION = 2  # descriptors of the daemon
RESERVED = 500  # descriptors of the daemon, and of each other process, for all else
GROWTH = 0.01  # of the connections by which the daemon may have more than there are
KEPT = 0.5  # of the memory that connections took, which may stay when they have gone
KEPT_MIB = 10.0  # and what may stay in any case
WIDTHS = (7, 9, 12, 8, 12, 12, 10, 8)


class Sample(NamedTuple):
    at: float  # seconds from the start
    resident: float  # MiB
    descriptors: int
    threads: int
    connections: int  # that the daemon says it has
    answered: float  # part of the pieces sent since the last sample


class Exchange:
    """A connection's turn to send and receive."""

    __slots__ = ("expected", "left")

    def __init__(self) -> None:
        self.expected = b""  # bytes under way
        self.left = PIECES


class Crowd(Process):
    """Clients with connections, from a source address of their own."""

    # -- calls

    def open(
        self,
        number: int,
        server: Where,
        echo: Where,
        connections: int,
        exchanging: int,
        changes: float,
    ) -> None:
        self._source, self._server, self._echo = f"127.0.0.{number + 2}", server, echo
        self._chance = random.Random(number)
        self._noise = self._chance.randbytes(1 << 17)
        self._exchanging, self._changes, self._due = exchanging, changes, 0.0
        self._poll = select.epoll()
        self._active: dict[int, Exchange] = {}
        self._at: dict[int, int] = {}  # where in _connections a descriptor's is
        self._connections: list[socket.socket] = []
        for place in range(connections):
            self._connections.append(self._connect())
            self._at[self._connections[-1].fileno()] = place
        self._sent = self._answered = self._gone = 0

    def work(self, seconds: float) -> tuple[int, int, int]:
        """Pieces sent, answers, connections closed, since the last time."""
        began = now = time.monotonic()
        while now < began + seconds:
            self._send_pieces()
            self._change(TICK * self._changes)
            self._receive(now + TICK)
            now = time.monotonic()
        self._settle()
        found = self._sent, self._answered, self._gone
        self._sent = self._answered = self._gone = 0
        return found

    def close(self) -> None:
        for number, sock in enumerate(self._connections):
            hang_up(sock, abruptly=number % 2 == 1)
        self._poll.close()

    # -- in its process

    def _send_pieces(self) -> None:
        while len(self._active) < self._exchanging:
            sock = self._chance.choice(self._connections)
            if sock.fileno() not in self._active:
                self._active[sock.fileno()] = Exchange()
                self._poll.register(sock, select.EPOLLIN)
        for descriptor, exchange in list(self._active.items()):
            if exchange.expected:
                continue  # the last piece is still under way
            if not exchange.left:
                self._poll.unregister(descriptor)
                del self._active[descriptor]
                continue
            start = self._chance.randrange(len(self._noise) - SIZES[-1])
            exchange.expected = self._noise[start : start + self._chance.choice(SIZES)]
            exchange.left -= 1
            self._connections[self._at[descriptor]].sendall(exchange.expected)
            self._sent += 1

    def _receive(self, until: float) -> None:
        while (left := until - time.monotonic()) > 0:
            for descriptor, _ in self._poll.poll(left):
                self._take(descriptor)

    def _take(self, descriptor: int) -> None:
        exchange = self._active[descriptor]
        data = self._connections[self._at[descriptor]].recv(65536)
        if not data:
            raise SystemExit("a connection has ended by itself")
        if not exchange.expected.startswith(data):
            raise SystemExit("other bytes have come than were sent")
        exchange.expected = exchange.expected[len(data) :]
        self._answered += not exchange.expected

    def _settle(self) -> None:
        """What is under way has some time to come."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(
            exchange.expected for exchange in self._active.values()
        ):
            for descriptor, _ in self._poll.poll(TICK):
                self._take(descriptor)

    def _change(self, count: float) -> None:
        """So many go, others come; every second one goes abruptly."""
        self._due += count
        while self._due >= 1:
            self._due -= 1
            self._gone += 1
            place = self._chance.randrange(len(self._connections))
            sock = self._connections[place]
            self._sent -= self._forget(sock)
            hang_up(sock, abruptly=self._gone % 2 == 1)
            self._connections[place] = self._connect()
            self._at[self._connections[place].fileno()] = place

    def _forget(self, sock: socket.socket) -> bool:
        """Whether a piece of it was under way."""
        del self._at[sock.fileno()]
        exchange = self._active.pop(sock.fileno(), None)
        if exchange is None:
            return False
        self._poll.unregister(sock)
        return bool(exchange.expected)

    def _connect(self) -> socket.socket:
        """A connection to the echo server, by SOCKS5 CONNECT."""
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


class Crowds:
    """All of them at once: each method is called in all processes and waited for."""

    def __init__(self, connections: int) -> None:
        self._count = -(-connections // PER_PROCESS)
        self._connections = connections
        self._processes = [Crowd() for _ in range(self._count)]
        self._threads: ThreadPoolExecutor | None = None  # after all forks

    def open(self, server: Where, echoes: Sequence[Where]) -> None:
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
        sent, answered, gone = map(sum, zip(*self._all("work", *[(seconds,)] * self._count)))
        return sent, answered, gone

    def close(self) -> None:
        self._all("close", *[()] * self._count)

    def stop(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        stop(self._processes)

    def _all(self, name: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return list(
            self._threads.map(
                lambda process, given: process.call(name, *given), self._processes, arguments
            )
        )


def hang_up(sock: socket.socket, abruptly: bool) -> None:
    if abruptly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def stop(processes: Sequence[Process]) -> None:
    """The last one first: each has been forked with the pipes of those before it, which only then are closed for good."""
    for process in reversed(processes):
        process.stop()


def possible(wanted: int) -> int:
    """So many connections, or as many as descriptors allow."""
    limit = raise_descriptor_limit(PER_CONNECTION * wanted + RESERVED)
    room = max(1, (limit - RESERVED) // PER_CONNECTION)
    if room < wanted:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        print(
            f"only {hard:,} descriptors may be had (ulimit -Hn): {room:,} connections, not {wanted:,}"
        )
    return min(room, wanted)


def watch(daemon: Netproxyd, crowds: Crowds, seconds: float) -> list[Sample]:
    """A row for each interval."""
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
        sent, answered, gone = crowds.work(interval)
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
    """Whether the daemon counts more and more of them."""
    first, second = halves(
        [sample.connections for sample in samples if sample.at >= seconds * WARM_UP]
    )
    print(
        f"connections: {first:.1f} in the first half of it, {second:.1f} in the second; {connections} clients"
    )
    return (
        ["connections"] if second - max(first, connections) > SPARE + GROWTH * connections else []
    )


def kept(daemon: Netproxyd, idle: float, held: float, seconds: float) -> list[str]:
    """Connections and memory when all clients have gone; MiB: `idle` before the first, `held` with all of them.

    They have `seconds` to come back: a daemon that has had much to do gives memory back when its threads have idled.
    """
    allowed, deadline = idle + KEPT_MIB + KEPT * (held - idle), time.monotonic() + seconds
    while (connections := daemon.connections()) or daemon.resident_mib() > allowed:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    resident = daemon.resident_mib()
    print(
        f"with all clients gone: {connections} connections, RSS {resident:.1f} MiB ({idle:.1f} before the first, "
        f"{held:.1f} with all)"
    )
    faults = ["connections left over"] if connections else []
    return faults + (["memory left over"] if resident > allowed else [])


def run(connections: int, seconds: float) -> list[str]:
    echoes = [TcpEcho() for _ in range(-(-connections // PER_PROCESS))]
    crowds = Crowds(connections)
    with Netproxyd(sessions=connections + connections // 10) as daemon:
        idle, before = daemon.resident_mib(), (daemon.descriptors(), daemon.threads())
        began = time.monotonic()
        crowds.open(daemon.address, [echo.address for echo in echoes])
        took, opened = time.monotonic() - began, daemon.resident_mib()
        print(
            f"{connections:,} connections opened in {took:.1f} s: RSS {idle:.1f} MiB before, {opened:.1f} with them, "
            f"{(opened - idle) * 1024 / connections:.1f} KiB each"
        )
        samples = watch(daemon, crowds, seconds)
        crowds.close()
        faults = verdict(samples, seconds) + too_many(samples, seconds, connections)
        faults += left_over(daemon, before, seconds >= PATIENT_FROM) + kept(
            daemon, idle, samples[-1].resident, CLEAN_SECONDS
        )
    crowds.stop()
    stop(echoes)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Watches netproxyd while it holds very many TCP connections."
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
