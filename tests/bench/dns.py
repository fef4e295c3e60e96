#!/usr/bin/env python3
"""How many queries a second the dns listener answers, against dnsmasq in the same run, with one unbound behind both.

  python3 tests/bench/dns.py                          six minutes: three rounds of 30 s for each server and load
  python3 tests/bench/dns.py --rounds 1 --seconds 2   seconds, and less exact

Needs unbound, dnsmasq and dnsperf (Debian: unbound, dnsmasq-base, dnsperf).  While dnsperf asks, a client of this
program asks as well, at an easy pace, and compares each answer; the exit status is 1 where one is wrong, or where
kept answers come at less than a quarter of dnsmasq's rate.
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

from rig import LOOPBACK, SECONDS, Netproxyd

NAMES = 1000  # each with an IPv4 and an IPv6 address
FRESH = 400_000  # names for queries that no cache has: more than a run asks for
PACE = 0.02  # seconds between two queries of the client that looks at answers
IN_FLIGHT = 100  # of dnsperf, as it has it
REQUIRED = 0.25
_RATE = re.compile(r"Queries per second: +([\d.]+)")
_LOST = re.compile(r"Queries lost: +(\d+)")
_CODES = re.compile(r"Response codes: +(.*)")


class Outcome(NamedTuple):
    rate: float  # queries a second
    lost: int
    codes: str  # other than NOERROR
    looked_at: int
    wrong: int


def addresses(number: int) -> tuple[bytes, bytes]:
    return b"\x0a\1" + struct.pack(">H", number), b"\x20\1\x0d\xb8" + bytes(10) + struct.pack(
        ">H", number
    )


def need(program: str) -> str:
    path = shutil.which(
        program, path="/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    )
    if path is None:
        raise SystemExit(f"{program} is not installed")
    return path


def free_port() -> int:
    """One that is free for TCP and UDP."""
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
            udp.bind((LOOPBACK, 0))
            try:
                tcp.bind(udp.getsockname())
            except OSError:
                continue  # somebody has it for the one of them
            return udp.getsockname()[1]


def encode_query(name: str, kind: int, id: int) -> bytes:
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return struct.pack(">6H", id, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)


def is_right(answer: bytes, query: bytes, packed: bytes) -> bool:
    """Exactly one record, behind the very question, with the address that was expected."""
    end = len(query)
    return (
        answer[:2] == query[:2]
        and answer[3] & 15 == 0
        and answer[12:end] == query[12:]
        and answer[6:8] == b"\0\1"
        and answer[end : end + 6] == b"\xc0\x0c" + query[-4:]
        and answer[end + 10 :] == struct.pack(">H", len(packed)) + packed
    )


class Looker:
    """Asks for one name after the other, and looks at what comes."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((LOOPBACK, port))
        self._socket.settimeout(2.0)
        self.looked_at = self.wrong = 0

    def look(self) -> None:
        number, kind = random.randrange(NAMES), random.choice((1, 28))
        query = encode_query(f"name{number}.test", kind, random.randrange(65536))
        self._socket.send(query)
        try:
            while (answer := self._socket.recv(4096))[:2] != query[:2]:
                pass  # of one before that was late
        except TimeoutError:
            return  # lost, which dnsperf counts as well
        self.looked_at += 1
        self.wrong += not is_right(answer, query, addresses(number)[kind == 28])

    def close(self) -> None:
        self._socket.close()


def start(stack: ExitStack, port: int, *command: str) -> None:
    """A name server, which answers when this returns."""
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    stack.callback(log.close)
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + SECONDS
    while True:
        looker = Looker(port)
        try:
            looker.look()
        except ConnectionRefusedError:
            pass
        finally:
            looker.close()
        if looker.looked_at:
            return
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise SystemExit(f"{command[0]} does not start:\n{log.read().decode()}")
        time.sleep(0.05)


def start_unbound(stack: ExitStack, directory: Path) -> int:
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
        for kind, family, packed in zip(
            ("A", "AAAA"), (socket.AF_INET, socket.AF_INET6), addresses(number)
        ):
            lines.append(
                f"local-data: 'name{number}.test. 3600 IN {kind} {socket.inet_ntop(family, packed)}'"
            )
    config = directory / "unbound.conf"
    config.write_text("\n".join([*lines, "remote-control:", "control-enable: no", ""]))
    start(stack, port, need("unbound"), "-d", "-c", str(config))
    return port


def start_dnsmasq(stack: ExitStack, behind: int) -> int:
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
    """For dnsperf: the same ones each time, or such as nobody has asked for before."""
    if load == "kept":
        lines = [f"name{number}.test {kind}" for number in range(NAMES) for kind in ("A", "AAAA")]
        random.Random(6).shuffle(lines)
    else:
        lines = [f"n{run}-{number}.fresh.test A" for number in range(FRESH)]
    path.write_text("\n".join([*lines, ""]))
    return path


def measure(port: int, queries: Path, seconds: float) -> Outcome:
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
    looker = Looker(port)
    try:
        while process.poll() is None:
            looker.look()
            time.sleep(PACE)
        text = process.communicate()[0]
    finally:
        process.kill()
        process.wait()
        looker.close()
    rate, lost, codes = _RATE.search(text), _LOST.search(text), _CODES.search(text)
    if not (rate and lost):
        raise SystemExit(f"dnsperf says:\n{text}")
    others = ", ".join(
        one for one in (codes[1] if codes else "").split(", ") if not one.startswith("NOERROR")
    )
    return Outcome(float(rate[1]), int(lost[1]), others, looker.looked_at, looker.wrong)


def run(rounds: int, seconds: float) -> bool:
    """Whether all is as it must be."""
    outcomes: dict[tuple[str, str], list[Outcome]] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-")))
        unbound = start_unbound(stack, directory)
        servers = [
            ("netproxyd", start_netproxyd(stack, unbound)),
            ("dnsmasq", start_dnsmasq(stack, unbound)),
        ]
        for at in range(rounds):
            for server, port in servers if at % 2 == 0 else servers[::-1]:
                for load in ("kept", "fresh"):
                    queries = write_queries(directory / "queries", load, at)
                    outcomes.setdefault((server, load), []).append(measure(port, queries, seconds))
    print(
        f"{'server':>10} {'load':>6} {'queries/s':>10} {'least':>8} {'most':>8} {'lost':>6} {'looked at':>10} {'wrong':>6}  other codes"
    )
    for (server, load), found in outcomes.items():
        rates = [one.rate for one in found]
        print(
            f"{server:>10} {load:>6} {statistics.median(rates):>10,.0f} {min(rates):>8,.0f} {max(rates):>8,.0f} "
            f"{sum(one.lost for one in found):>6} {sum(one.looked_at for one in found):>10} {sum(one.wrong for one in found):>6}  "
            f"{'; '.join(filter(None, (one.codes for one in found))) or '-'}"
        )
    ratios = {
        load: statistics.median(one.rate for one in outcomes["netproxyd", load])
        / statistics.median(one.rate for one in outcomes["dnsmasq", load])
        for load in ("kept", "fresh")
    }
    print(
        f"Ratio to dnsmasq: kept {ratios['kept']:.2f}, fresh {ratios['fresh']:.2f} (required: kept {REQUIRED})"
    )
    ours = outcomes["netproxyd", "kept"] + outcomes["netproxyd", "fresh"]
    return ratios["kept"] >= REQUIRED and not any(one.wrong or one.codes for one in ours)


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
