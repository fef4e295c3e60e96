#!/usr/bin/env python3
"""Measures netproxyd beside other SOCKS5 proxies: connections, throughput, datagrams, memory.

Programs are measured in turn within a round, so that what else the machine does meets all of them.
Those that are not installed are left out; THREE_PROXY and SING_BOX name programs that Debian has
not.  `--json FILE` keeps the medians for plots.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from load import Clients, Sink, settle
from rig import LOOPBACK, ROOT, SECONDS, TICK, Endpoint, free_port, print_row
from tcp import PIECE, target

CLIENTS = 8
IDLE = 200
WIDTHS = (12, 26, 14, 10, 12)


class Peer(NamedTuple):
    """A SOCKS5 proxy."""

    name: str
    command: Callable[[Path, int], list[str]]
    """Writes the configuration into a folder and returns the command, for a port of loopback."""
    udp: bool = True


def _netproxyd(folder: Path, port: int) -> list[str]:
    path = folder / "netproxyd.yaml"
    path.write_text(f'listeners: [{{listen: "{LOOPBACK}:{port}"}}]\nlog: {{access: false}}\n')
    return [sys.executable, "-m", "netproxy", "-q", "-c", str(path)]


def _dante(folder: Path, port: int) -> list[str]:
    path = folder / "danted.conf"
    path.write_text(f"""logoutput: {folder}/log
internal: {LOOPBACK} port = {port}
external: {LOOPBACK}
clientmethod: none
socksmethod: none
user.unprivileged: nobody
client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 command: connect udpassociate }}
socks pass {{ from: 0.0.0.0/0 to: 127.0.0.0/8 command: udpreply }}
""")
    return ["danted", "-f", str(path), "-p", f"{folder}/pid"]


def _microsocks(folder: Path, port: int) -> list[str]:
    return ["microsocks", "-i", LOOPBACK, "-p", str(port)]


def _v2ray(folder: Path, port: int) -> list[str]:
    settings = {"auth": "noauth", "udp": True, "ip": LOOPBACK}
    inbound = {"listen": LOOPBACK, "port": port, "protocol": "socks", "settings": settings}
    content = {
        "log": {"loglevel": "none", "access": "none"},
        "inbounds": [inbound],
        "outbounds": [{"protocol": "freedom"}],
    }
    (folder / "config.json").write_text(json.dumps(content))
    return ["v2ray", "-config", f"{folder}/config.json"]


def _three_proxy(folder: Path, port: int) -> list[str]:
    path = folder / "3proxy.cfg"
    lines = ("log /dev/null", "maxconn 4000", "auth none", f"internal {LOOPBACK}")
    path.write_text("\n".join((*lines, f"external {LOOPBACK}", f"socks -p{port}", "")))
    return [os.environ["THREE_PROXY"], str(path)]


def _sing_box(folder: Path, port: int) -> list[str]:
    inbound = {"type": "mixed", "tag": "in", "listen": LOOPBACK, "listen_port": port}
    content = {
        "log": {"disabled": True},
        "inbounds": [inbound],
        "outbounds": [{"type": "direct", "tag": "direct"}],
    }
    (folder / "config.json").write_text(json.dumps(content))
    return [os.environ["SING_BOX"], "run", "-c", f"{folder}/config.json"]


def installed() -> list[Peer]:
    """Return netproxyd and those of the others that are there."""
    found = [Peer("netproxyd", _netproxyd)]
    for name, program, command, udp in (
        ("dante", "danted", _dante, True),
        ("3proxy", os.environ.get("THREE_PROXY", "3proxy"), _three_proxy, True),
        ("v2ray", "v2ray", _v2ray, True),
        ("sing-box", os.environ.get("SING_BOX", "sing-box"), _sing_box, True),
        ("microsocks", "microsocks", _microsocks, False),
    ):
        if shutil.which(program):
            found.append(Peer(name, command, udp))
    return found


class Started:
    """A program that serves, with all processes that it has started."""

    def __init__(
        self, name: str, command: list[str], folder: Path, enter: Callable[[], None] | None = None
    ) -> None:
        """Wait until the program answers.  `enter` moves it to a network namespace."""
        with open(folder / "out", "wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=enter,
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + SECONDS
        while not self.answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise SystemExit(f"{name} did not start: {(folder / 'out').read_text()}")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Return whether the program serves."""
        raise NotImplementedError

    def _processes(self) -> Iterator[tuple[int, list[str]]]:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            if int(fields[3]) == self.pid:
                yield int(path.parent.name), fields

    def processor_seconds(self) -> float:
        """Return user and system time so far, with that of children that have ended."""
        return sum(sum(map(int, fields[11:15])) for _, fields in self._processes()) / TICK

    def memory_mib(self, kind: str = "Pss") -> float:
        """Return the memory of all processes; with "Pss" pages that they share count once."""
        total = 0
        for pid, _ in self._processes():
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            lines = (line.split() for line in text.split("\n"))
            total += next(int(fields[1]) for fields in lines if fields[0] == f"{kind}:")
        return total / 1024

    def stop(self) -> None:
        """End all processes."""
        try:
            os.killpg(self.pid, signal.SIGTERM)
            self._process.wait(SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


class Running(Started):
    """A SOCKS5 proxy that serves."""

    def __init__(self, peer: Peer, folder: Path) -> None:
        self.address: Endpoint = LOOPBACK, free_port()
        folder.chmod(0o777)  # some give up their rights before they open their files
        super().__init__(peer.name, peer.command(folder, self.address[1]), folder)

    def answers(self) -> bool:
        """Return whether the program accepts connections."""
        try:
            socket.create_connection(self.address, 1).close()
        except OSError:
            return False
        return True


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    """Start a program for a measurement."""
    with tempfile.TemporaryDirectory(prefix="netproxy-bench-") as folder:
        program = Running(peer, Path(folder))
        try:
            yield program
        finally:
            program.stop()


def connect(server: Endpoint, to: Endpoint) -> socket.socket:
    """Return a connection to the target through a proxy.

    Each message waits for the reply before: some programs read one message only.
    """
    sock = socket.create_connection(server, SECONDS)
    request = b"\5\1\0\1" + socket.inet_aton(to[0]) + to[1].to_bytes(2, "big")
    for message, size in ((b"\5\1\0", 2), (request, 10)):
        sock.sendall(message)
        answer = b""
        while len(answer) < size:
            piece = sock.recv(size - len(answer))
            if not piece:
                raise SystemExit(f"the proxy at {server} has refused a connection")
            answer += piece
    return sock


class Figures(NamedTuple):
    """What one program did in one round."""

    connections: float
    """Per second, one after the other, with a byte to the target and back."""
    connection_us: float
    """Processor time of each."""
    bulk: float
    """Gbit/s of one connection, target to client."""
    idle_mib: float
    """Memory with IDLE connections that wait."""
    datagrams: float = 0.0
    """Delivered per second, single ones of 1,200 bytes, sent as fast as possible."""
    trains: float = 0.0
    """The same in trains of 8, as browsers send them (UDP_SEGMENT)."""


def measure(peer: Peer, to: Endpoint, sink: Sink, clients: Clients, seconds: float) -> Figures:
    """Measure a program that is started for it."""
    with running(peer) as program:
        before, done, end = program.processor_seconds(), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            with connect(program.address, to) as sock:
                sock.sendall(b"x")
                sock.recv(1)
            done += 1
        cost = (program.processor_seconds() - before) / done * 1e6
        with connect(program.address, to) as sock:
            traffic, end = 0, time.monotonic() + seconds
            sock.sendall(b"d")
            while time.monotonic() < end:
                traffic += len(sock.recv(len(PIECE)))
        waiting = [connect(program.address, to) for _ in range(IDLE)]
        figures = Figures(done / seconds, cost, traffic * 8 / seconds / 1e9, program.memory_mib())
        for sock in waiting:
            sock.close()
        if not peer.udp:
            return figures
        clients.call("open", program.address, CLIENTS, sink.targets)
        settle(sink)
        rates = []
        for load in ("lone", "train"):
            took = clients.call("run", load, 0, seconds).seconds
            rates.append(settle(sink) / took)
        clients.call("close")
        return figures._replace(datagrams=rates[0], trains=rates[1])


def main() -> None:
    """Measure in rounds; print the medians, and what they are beside the first program's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--only", help="names of programs, separated by commas")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    peers = [
        peer for peer in installed() if not options.only or peer.name in options.only.split(",")
    ]
    sink, clients = Sink(CLIENTS), Clients()
    ours, theirs = get_context("fork").Pipe()
    server = get_context("fork").Process(target=target, args=(theirs,), daemon=True)
    server.start()
    to = ours.recv()
    seen: dict[str, list[Figures]] = {peer.name: [] for peer in peers}
    try:
        for number in range(options.rounds):
            for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
                seen[peer.name].append(measure(peer, to, sink, clients, options.seconds))
    finally:
        server.terminate()
        server.join()
        clients.stop()  # first: it was forked later and has a copy of the other's pipe
        sink.stop()
    medians = {
        name: Figures(*map(statistics.median, zip(*rounds, strict=True)))
        for name, rounds in seen.items()
    }
    print_row(WIDTHS, "program", "figure", "median", "ratio", "range")
    for field in Figures._fields:
        first = getattr(next(iter(medians.values())), field)
        for name, median in medians.items():
            values = [getattr(figures, field) for figures in seen[name]]
            if value := getattr(median, field):
                spread = f"{min(values):,.1f}-{max(values):,.1f}"
                print_row(WIDTHS, name, field, f"{value:,.1f}", f"{value / first:.2f}", spread)
    if options.json:
        release = platform.release().partition("-")[0]  # the rest names a build
        about = {
            "date": date.today().isoformat(),
            "machine": f"{platform.system()} {release}, CPython "
            f"{platform.python_version()}, {os.cpu_count()} processors",
            "rounds": options.rounds,
            "seconds": options.seconds,
        }
        figures = {name: median._asdict() for name, median in medians.items()}
        options.json.write_text(json.dumps({**about, "medians": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
