#!/usr/bin/env python3
"""Measures queries per second of the dns listener and of dnsmasq, with one unbound behind both.

  python3 tests/bench/dns.py                          six minutes: three rounds of 30 s each
  python3 tests/bench/dns.py --rounds 1 --seconds 2   some seconds, less exact

Needs unbound, dnsmasq and dnsperf (Debian: unbound, dnsmasq-base, dnsperf). While dnsperf runs, a
client of this program sends queries at a slow rate and checks each answer. The exit status is 1 if
an answer is wrong, or if cached answers come at less than a quarter of dnsmasq's rate.
"""

from __future__ import annotations

import argparse
import getpass
import random
import re
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rig import LOOPBACK, SECONDS, Netproxyd, free_port, print_row

# Names with an IPv4 and an IPv6 address each.
NAMES = 1000
# Names that no cache has: more than a run queries.
FRESH = 400_000
# Seconds between two queries of the client that checks answers.
PACE = 0.02
# Queries of dnsperf without an answer: its default.
IN_FLIGHT = 100
# The least ratio of cached answers to dnsmasq's.
REQUIRED = 0.25
WIDTHS = (10, 6, 10, 8, 8, 6, 8, 6, 11)
_RATE = re.compile(r"Queries per second: +([\d.]+)")
_LOST = re.compile(r"Queries lost: +(\d+)")
_CODES = re.compile(r"Response codes: +(.*)")


class Outcome(NamedTuple):
    """The result of a measurement."""

    rate: float
    """Queries per second."""
    lost: int
    codes: str
    """Response codes other than NOERROR."""
    checked: int
    wrong: int


def addresses(number: int) -> tuple[bytes, bytes]:
    """Return the IPv4 and the IPv6 address of a name."""
    packed = struct.pack(">H", number)
    return b"\x0a\1" + packed, b"\x20\1\x0d\xb8" + bytes(10) + packed


def need(program: str) -> str:
    """Return the path of a program."""
    path = shutil.which(
        program, path="/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    )
    if path is None:
        raise SystemExit(f"{program} is not installed")
    return path


def encode_query(name: str, kind: int, id: int) -> bytes:
    """Return a query with recursion desired (RFC 1035 section 4.1)."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack(">6H", id, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def is_right(answer: bytes, query: bytes, packed: bytes) -> bool:
    """Return True if the answer has the question and exactly one record with the address."""
    end = len(query)
    return (
        answer[:2] == query[:2]
        and answer[3] & 15 == 0
        and answer[12:end] == query[12:]
        and answer[6:8] == b"\0\1"
        and answer[end : end + 6] == b"\xc0\x0c" + query[-4:]
        and answer[end + 10 :] == struct.pack(">H", len(packed)) + packed
    )


class Checker:
    """Queries names and checks the answers."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((LOOPBACK, port))
        self._socket.settimeout(2.0)
        self.checked = self.wrong = 0

    def check(self) -> None:
        """Send a query, wait for its answer, and count it."""
        number, kind = random.randrange(NAMES), random.choice((1, 28))
        query = encode_query(f"name{number}.test", kind, random.randrange(65536))
        self._socket.send(query)
        try:
            # Skip late answers to earlier queries.
            while (answer := self._socket.recv(4096))[:2] != query[:2]:
                pass
        except TimeoutError:
            # Lost. dnsperf counts losses.
            return
        self.checked += 1
        self.wrong += not is_right(answer, query, addresses(number)[kind == 28])

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def start(stack: ExitStack, port: int, *command: str) -> None:
    """Start a name server and wait until it answers."""
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stack.callback(log.close)
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + SECONDS
    while True:
        checker = Checker(port)
        try:
            checker.check()
        except ConnectionRefusedError:
            pass
        finally:
            checker.close()
        if checker.checked:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise SystemExit(f"{command[0]} does not start:\n{log.read().decode()}")
        time.sleep(0.05)


def start_unbound(stack: ExitStack, directory: Path) -> int:
    """Start unbound with all names. Return its port."""
    port = free_port()
    lines = [
        "server:",
        f"interface: {LOOPBACK}@{port}",
        "access-control: 127.0.0.0/8 allow",
        'username: ""',
        'chroot: ""',
        'pidfile: ""',
        f'directory: "{directory}"',
        "use-syslog: no",
        "do-daemonize: no",
        'module-config: "iterator"',
        "so-rcvbuf: 0",
        'local-zone: "." static',
        'local-zone: "test." static',
        'local-zone: "fresh.test." redirect',
        "local-data: 'fresh.test. 3600 IN A 10.2.0.1'",
    ]
    for number in range(NAMES):
        four, six = addresses(number)
        for record in (
            f"A {socket.inet_ntop(socket.AF_INET, four)}",
            f"AAAA {socket.inet_ntop(socket.AF_INET6, six)}",
        ):
            lines.append(f"local-data: 'name{number}.test. 3600 IN {record}'")
    config = directory / "unbound.conf"
    config.write_text("\n".join([*lines, "remote-control:", "control-enable: no", ""]))
    start(stack, port, need("unbound"), "-d", "-c", str(config))
    return port


def start_dnsmasq(stack: ExitStack, behind: int) -> int:
    """Start dnsmasq in front of a name server. Return its port."""
    port = free_port()
    start(
        stack,
        port,
        need("dnsmasq"),
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--pid-file=",
        f"--user={getpass.getuser()}",
        f"--listen-address={LOOPBACK}",
        "--bind-interfaces",
        f"--port={port}",
        f"--server={LOOPBACK}#{behind}",
        "--cache-size=10000",
        "--dns-forward-max=1000",
        "--log-facility=-",
    )
    return port


def start_netproxyd(stack: ExitStack, behind: int) -> int:
    """Start netproxyd in front of a name server. Return its port."""
    daemon = stack.enter_context(
        Netproxyd(
            config=f"""
listeners: [{{protocol: dns, listen: "{LOOPBACK}:0"}}]
dns: {{servers: ["{LOOPBACK}:{behind}"], cache: 10000}}
"""
        )
    )
    return daemon.address[1]


def write_queries(path: Path, load: str, run: int) -> Path:
    """Write a file for dnsperf: the same queries each time ("kept"), or new names ("fresh")."""
    if load == "kept":
        lines = [f"name{number}.test {kind}" for number in range(NAMES) for kind in ("A", "AAAA")]
        random.Random(6).shuffle(lines)
    else:
        lines = [f"n{run}-{number}.fresh.test A" for number in range(FRESH)]
    path.write_text("\n".join([*lines, ""]))
    return path


def measure(port: int, queries: Path, seconds: float) -> Outcome:
    """Run dnsperf against a port."""
    process = subprocess.Popen(
        [
            need("dnsperf"),
            "-s",
            LOOPBACK,
            "-p",
            str(port),
            "-d",
            str(queries),
            "-l",
            f"{seconds:g}",
            "-q",
            str(IN_FLIGHT),
            "-c",
            "4",
            "-t",
            "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    checker = Checker(port)
    try:
        while process.poll() is None:
            checker.check()
            time.sleep(PACE)
        text = process.communicate()[0]
    finally:
        process.kill()
        process.wait()
        checker.close()
    rate, lost, codes = _RATE.search(text), _LOST.search(text), _CODES.search(text)
    if not (rate and lost):
        raise SystemExit(f"dnsperf says:\n{text}")
    others = ", ".join(
        code for code in (codes[1] if codes else "").split(", ") if not code.startswith("NOERROR")
    )
    return Outcome(float(rate[1]), int(lost[1]), others, checker.checked, checker.wrong)


def run(rounds: int, seconds: float) -> bool:
    """Print the measurements. Return True if all answers are right and fast enough."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-")))
        unbound = start_unbound(stack, directory)
        servers = [
            ("netproxyd", start_netproxyd(stack, unbound)),
            ("dnsmasq", start_dnsmasq(stack, unbound)),
        ]
        for turn in range(rounds):
            for server, port in servers if turn % 2 == 0 else servers[::-1]:
                for load in ("kept", "fresh"):
                    queries = write_queries(directory / "queries", load, turn)
                    outcomes.setdefault((server, load), []).append(measure(port, queries, seconds))
    columns = ("load", "queries/s", "least", "most", "lost", "checked", "wrong")
    print_row(WIDTHS, "server", *columns, "other codes")
    medians: dict[tuple[str, str], float] = {}
    for (server, load), results in outcomes.items():
        rates = [result.rate for result in results]
        medians[server, load] = statistics.median(rates)
        print_row(
            WIDTHS,
            server,
            load,
            *(f"{rate:,.0f}" for rate in (medians[server, load], min(rates), max(rates))),
            sum(result.lost for result in results),
            sum(result.checked for result in results),
            sum(result.wrong for result in results),
            "; ".join(filter(None, (result.codes for result in results))) or "-",
        )
    ratios = {
        load: medians["netproxyd", load] / medians["dnsmasq", load] for load in ("kept", "fresh")
    }
    print(
        f"Ratio to dnsmasq: kept {ratios['kept']:.2f}, fresh {ratios['fresh']:.2f} "
        f"(required: kept {REQUIRED})"
    )
    ours = outcomes["netproxyd", "kept"] + outcomes["netproxyd", "fresh"]
    return ratios["kept"] >= REQUIRED and not any(result.wrong or result.codes for result in ours)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    given = options.parse_args()
    raise SystemExit(0 if run(given.rounds, given.seconds) else 1)


if __name__ == "__main__":
    main()
