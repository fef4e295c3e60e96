#!/usr/bin/env python3
"""Measures what wrong logins cost good clients: their logins, memory and processor time.

  python3 tests/bench/logins.py                             some minutes
  python3 tests/bench/logins.py --seconds 60 --spread 50    one kind of attack, for a minute

Starts netproxyd on loopback, with users whose passwords are hashed and the default penalty. An
attacker makes wrong logins by SOCKS5 and HTTP. PROXY headers give each client its address, because
loopback addresses have no penalty.
"""

from __future__ import annotations

import argparse
import base64
import math
import re
import select
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from load import Process
from rig import LOOPBACK, Endpoint, Netproxyd, free_port, print_row, raise_descriptor_limit

from netproxy.access.users import hash_password

PASSWORD = "a good password"
KEPT, FIRST = "kept", "first{}"
# Logins a second of good clients: remembered ones, and ones that need the check of a hash.
KEPT_RATE, FIRST_RATE = 20, 2
# Seconds that a good client waits, and that an attacker keeps a connection.
PATIENCE, KEEP = 60.0, 10.0
# Connections of the attacker at once.
OPEN_LIMIT = 4000
# Logins a second of the last part, whose passwords cost little to check.
FAST = 2500
LISTENER = f"""
listeners:
  - listen: "{LOOPBACK}:0"
    auth: required
    proxy_protocol: [{LOOPBACK}]
    limits: {{connections: 16384, handshakes: 8192}}
metrics: "{LOOPBACK}:%d"
log: {{access: false}}
"""
WIDTHS = (16, 8, 8, 9, 9, 8, 8, 7, 7, 9, 9)
COUNTER = re.compile(r"^(netproxy_\w*(?:fail|refus|shed|unavail|delay)\w*)(\{.*\})? (\d+)$", re.M)


class Times(NamedTuple):
    """Milliseconds of the logins of good clients, sorted, and how many have failed."""

    trips: list[float]
    lost: int

    def quantile(self, part: float) -> float:
        """Return the smallest time that so many logins do not exceed."""
        return self.trips[math.ceil(part * len(self.trips)) - 1] if self.trips else math.nan


def proxied(source: str, server: Endpoint) -> bytes:
    """Return the PROXY header of a client with the address `source`."""
    return f"PROXY TCP4 {source} {server[0]} 40000 {server[1]}\r\n".encode()


def address(network: int, number: int) -> str:
    """Return an address of 10.NETWORK.0.0, which goes on into the networks behind it."""
    return f"10.{network + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def socks5_login(user: str, password: str) -> bytes:
    """Return greeting and credentials, sent at once."""
    name, secret = user.encode(), password.encode()
    return b"\5\1\2\1%c%b%c%b" % (len(name), name, len(secret), secret)


def http_login(user: str, password: str) -> bytes:
    """Return a CONNECT with credentials."""
    pair = base64.b64encode(f"{user}:{password}".encode())
    head = b"CONNECT 192.0.2.1:1 HTTP/1.1\r\nHost: a\r\nProxy-Authorization: Basic %b\r\n\r\n"
    return head % pair


class GoodClients(Process):
    """A process whose clients log in one after the other."""

    def run_logins(self, server: Endpoint, first: bool, until: float) -> Times:
        """Log in at a steady pace until a monotonic time; each client has its address."""
        pause = 1 / (FIRST_RATE if first else KEPT_RATE)
        trips, lost, number, due = [], 0, 0, time.monotonic()
        while due < until:
            time.sleep(max(0.0, due - time.monotonic()))
            user = FIRST.format(number) if first else KEPT
            began = time.perf_counter()
            if log_in(server, user, address(200 if first else 210, number)):
                trips.append((time.perf_counter() - began) * 1000)
            else:
                lost += 1
            number += 1
            # A slow answer delays the next login: others would only wait behind it.
            due = max(due + pause, time.monotonic())
        return Times(sorted(trips), lost)


def log_in(server: Endpoint, user: str, source: str) -> bool:
    """Log in by SOCKS5 and leave."""
    try:
        with socket.create_connection(server, PATIENCE) as sock:
            sock.sendall(proxied(source, server) + socks5_login(user, PASSWORD))
            answer = b""
            while len(answer) < 4 and (piece := sock.recv(4 - len(answer))):
                answer += piece
    except OSError:
        return False
    return answer == b"\5\2\1\0"


class Attacker(Process):
    """A process that makes wrong logins at a rate, from many addresses."""

    def attack(self, server: Endpoint, rate: int, spread: int, numbers: range) -> dict[str, int]:
        """Make a login for each number. Return how they have ended."""
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, float]] = {}
        self._ends: dict[str, int] = {}
        began = time.monotonic()
        for index, number in enumerate(numbers):
            while (wait := began + index / rate - time.monotonic()) > 0:
                self._receive(wait)
            if not number % 50:
                self._receive(0)
            while len(self._open) >= OPEN_LIMIT:
                self._receive(0.01)
            self._begin(server, address(100, number % spread), number)
        deadline = time.monotonic() + KEEP
        while self._open and time.monotonic() < deadline:
            self._receive(0.1)
        for sock, _ in self._open.values():
            sock.close()
        self._count("no answer", len(self._open))
        self._poll.close()
        return self._ends

    def _begin(self, server: Endpoint, source: str, number: int) -> None:
        login = http_login if number % 2 else socks5_login
        try:
            sock = socket.create_connection(server, PATIENCE)
            sock.sendall(proxied(source, server) + login(KEPT, f"guess {number}"))
        except OSError as error:
            self._count(type(error).__name__)
            return
        sock.setblocking(False)
        self._open[sock.fileno()] = sock, time.monotonic()
        self._poll.register(sock, select.EPOLLIN)

    def _receive(self, seconds: float) -> None:
        for descriptor, _ in self._poll.poll(seconds):
            sock, _ = self._open[descriptor]
            try:
                data = sock.recv(4096)
            except OSError:
                data = b""
            # The method comes at once, the refusal later.
            if data == b"\5\2":
                continue
            del self._open[descriptor]
            self._poll.unregister(descriptor)
            sock.close()
            self._count(kind_of(data))

    def _count(self, kind: str, number: int = 1) -> None:
        self._ends[kind] = self._ends.get(kind, 0) + number


def kind_of(answer: bytes) -> str:
    """Return the kind of an answer."""
    if answer.startswith(b"HTTP/"):
        return answer[9:12].decode()
    return {b"": "closed", b"\1\1": "refused", b"\5\2\1\1": "refused"}.get(answer, "other")


def configuration(folder: Path, port: int, hashed: str, users: int) -> str:
    """Return a configuration; `hashed` is the hash of PASSWORD, "" for one in plain text."""
    text = LISTENER % port
    if not hashed:
        return f'{text}users: {{{KEPT}: {{password: "{PASSWORD}"}}}}\n'
    names = [KEPT, *map(FIRST.format, range(users))]
    path = folder / "users"
    path.touch(0o600)
    path.write_text("".join(f"{name}:{hashed}\n" for name in names))
    return f"{text}users_file: {path}\n"


def counters(port: int) -> dict[str, int]:
    """Return the counters of refusals."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics") as response:
        text = response.read().decode()
    return {
        name + labels: int(value) for name, labels, value in COUNTER.findall(text) if int(value)
    }


class Bench:
    """The parts of a run."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.hashed = hash_password(PASSWORD)
        self.quiet: list[Times] = []

    def logins(self, spread: int) -> list[str]:
        """Measure logins of good clients beside an attack from `spread` addresses, 0 for none.

        Print a row. Return lines with what has become of the attack.
        """
        seconds, rate, port = self.options.seconds, self.options.rate, free_port()
        text = configuration(self.folder, port, self.hashed, int(seconds * FIRST_RATE) + 1)
        with Netproxyd(config=text) as daemon:
            assert log_in(daemon.address, KEPT, address(210, 0))
            processes = GoodClients(), GoodClients(), Attacker()
            kept, first, attacker = processes
            memory, spent = daemon.resident_mib(), daemon.processor_seconds()
            if spread:
                request = daemon.address, rate, spread, range(int(rate * seconds))
                attacker._ours.send(("attack", request))
            until = time.monotonic() + seconds
            for process, is_first in ((kept, False), (first, True)):
                process._ours.send(("run_logins", (daemon.address, is_first, until)))
            times = [process._ours.recv() for process in (kept, first)]
            spent = daemon.processor_seconds() - spent
            ends = attacker._ours.recv() if spread else {}
            self.quiet = self.quiet or times
            cells = [
                cell
                for measured in zip(times, self.quiet, strict=True)
                for cell in _cells(*measured)
            ]
            lost = sum(measured.lost for measured in times)
            print_row(
                WIDTHS,
                f"{spread:,} addresses" if spread else "none",
                *cells,
                lost,
                f"{spent / seconds:.2f}",
                f"{memory:.1f}",
                f"{daemon.resident_mib():.1f}",
            )
            # Later processes hold the pipes of earlier ones.
            for process in reversed(processes):
                process.stop()
            return [f"{spread:,} addresses: {_told(ends)}", *_lines(counters(port))]

    def addresses(self, count: int) -> None:
        """Make a wrong login from each of `count` addresses, and print what the daemon keeps."""
        port = free_port()
        with Netproxyd(config=configuration(self.folder, port, "", 0)) as daemon:
            assert log_in(daemon.address, KEPT, address(210, 0))
            attacker = Attacker()
            print(f"\n{count:,} client addresses, a wrong login each")
            for part in range(4):
                numbers = range(part * count // 4, (part + 1) * count // 4)
                before, began = daemon.processor_seconds(), time.monotonic()
                start = daemon.resident_mib()
                ends = attacker.call("attack", daemon.address, FAST, count, numbers)
                print(
                    f"  {numbers.stop:>9,}: {start:.1f} -> "
                    f"{daemon.resident_mib():.1f} MiB resident, "
                    f"{daemon.processor_seconds() - before:.1f} s of processor time in "
                    f"{time.monotonic() - began:.0f} s; {_told(ends)}"
                )
            attacker.stop()
            print("\n".join(_lines(counters(port))))


def _cells(times: Times, quiet: Times) -> tuple[str, str, str]:
    p99 = times.quantile(0.99)
    ratio = f"{p99 / quiet.quantile(0.99):.2f}" if quiet.trips else "-"
    return f"{times.quantile(0.5):.1f}", f"{p99:.1f}", ratio


def _told(ends: dict[str, int]) -> str:
    return ", ".join(f"{kind} {number:,}" for kind, number in sorted(ends.items())) or "no logins"


def _lines(counts: dict[str, int]) -> list[str]:
    return [f"  {name} {value:,}" for name, value in sorted(counts.items())]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures logins beside wrong logins.")
    parser.add_argument("--rate", type=int, default=200, help="wrong logins a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each attack")
    parser.add_argument(
        "--spread", default="1,50,5000", help="addresses of each attack (default: 1,50,5000)"
    )
    parser.add_argument(
        "--addresses", type=int, default=100_000, help="of the last part; 0 leaves it out"
    )
    options = parser.parse_args()
    raise_descriptor_limit(20_000)
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
        bench = Bench(options, Path(folder))
        print(f"{options.rate} wrong logins/s for {options.seconds:g} s; logins in ms\n")
        remembered, first = ("p50", "p99", "ratio"), ("p50", "p99", "ratio")
        print_row((16, 27, 27), "", "remembered", "first login")
        print_row(WIDTHS, "attack", *remembered, *first, "lost", "cpu", "MiB", "MiB after")
        bench.logins(0)
        lines = [bench.logins(int(spread)) for spread in options.spread.split(",")]
        print("\nHow the wrong logins ended, and what was counted")
        for told in lines:
            print("\n".join(told))
        if options.addresses:
            bench.addresses(options.addresses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
