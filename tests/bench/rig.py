"""What the programs of this folder share: netproxyd as a process, what it takes, clients with an association.

Standard library only.  Everything is on loopback.
"""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
BUFFER = 4 << 20
SECONDS = 10.0  # of patience with a daemon that starts, answers or ends
PORT = re.compile(r"tcp 127\.0\.0\.1:(\d+)")
LIVE = re.compile(r" connections=(\d+) .*\n")
TICK = os.sysconf("SC_CLK_TCK")
OPEN_AT_ONCE = 100  # associations asked for before their answers are read

Where = tuple[str, int]


class Netproxyd:
    """One daemon with one listener for everybody on this machine."""

    def __init__(
        self, batching: str = "auto", sessions: int = 8192, way: str = "direct", config: str = ""
    ) -> None:
        """`way`: by which everything leaves; `config`: a whole file in place of what is said here."""
        self._directory = tempfile.TemporaryDirectory(prefix="netproxy-bench-")
        path, log = (Path(self._directory.name) / name for name in ("netproxyd.yaml", "log"))
        path.write_text(
            config
            or f"""
listeners:
  - listen: "{LOOPBACK}:0"
    limits: {{connections: {sessions}}}
    udp: {{max_sessions: {sessions}}}
udp: {{batching: {batching}}}
default: "{way}"
log: {{access: false}}
"""
        )
        self._log = log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "netproxy", "-c", str(path)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + SECONDS
        while not (found := PORT.search(log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise SystemExit(f"netproxyd did not start:\n{log.read_text()}")
            time.sleep(0.01)
        self.address: Where = LOOPBACK, int(found[1])

    def processor_seconds(self) -> float:
        """User and system time until now; exact to a tick, which is 10 ms on most machines."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def resident_mib(self) -> float:
        return (
            int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            * resource.getpagesize()
            / (1 << 20)
        )

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def connections(self) -> int:
        """That it says it has."""
        said = len(LIVE.findall(self._log.read_text()))
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + SECONDS
        while len(found := LIVE.findall(self._log.read_text())) == said:
            if time.monotonic() > deadline:
                raise SystemExit("netproxyd does not say what it has")
            time.sleep(0.01)
        return int(found[-1])

    def stop(self) -> None:
        """Ends it; whatever it complained about is printed."""
        self._process.terminate()
        try:
            self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for line in self._log.read_text().splitlines():
            if " error " in line or "internal error" in line:
                print(line)
        self._directory.cleanup()

    def __enter__(self) -> Netproxyd:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Client:
    """An association: its control connection, and a UDP socket that talks to the relay."""

    def __init__(self, server: Where) -> None:
        """The request has been sent; established() reads the answer."""
        self.socket = udp_socket()
        self.control = socket.create_connection(server, SECONDS)
        port = struct.pack("!H", self.socket.getsockname()[1])
        self.control.sendall(b"\5\1\0" + b"\5\3\0\1\0\0\0\0" + port)

    def established(self) -> None:
        answer = b""
        while len(answer) < 12:
            piece = self.control.recv(12 - len(answer))
            if not piece:
                raise SystemExit("netproxyd has closed a control connection")
            answer += piece
        if answer[:4] != b"\5\0\5\0":
            raise SystemExit(f"netproxyd refuses an association: {answer[3:4].hex()}")
        self.socket.connect((socket.inet_ntoa(answer[6:10]), struct.unpack("!H", answer[10:])[0]))

    def close(self, abruptly: bool = False) -> None:
        """`abruptly`: the control connection ends with RST."""
        if abruptly:
            self.control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.control.close()
        self.socket.close()


def open_clients(server: Where, count: int) -> list[Client]:
    clients: list[Client] = []
    while len(clients) < count:
        fresh = [Client(server) for _ in range(min(OPEN_AT_ONCE, count - len(clients)))]
        for client in fresh:
            client.established()
        clients += fresh
    return clients


def udp_socket(gro: bool = False) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    if gro:
        try:
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        except OSError:
            pass  # an older kernel: one by one, then
    sock.bind((LOOPBACK, 0))
    return sock


def header(target: Where) -> bytes:
    """SOCKS5's, before a datagram to an IPv4 target."""
    return b"\0\0\0\1" + socket.inet_aton(target[0]) + struct.pack("!H", target[1])


def can_segment() -> bool:
    """Whether the kernel cuts a train, so that one call sends several datagrams."""
    with udp_socket() as sender, udp_socket() as receiver:
        try:
            send_train(sender, b"abcd", 2, receiver.getsockname())
        except OSError:
            return False
    return True


def send_train(sock: socket.socket, data: bytes, stride: int, to: Any = None) -> None:
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", stride))]
    sock.sendmsg([data], control, 0, *(() if to is None else (to,)))


def raise_descriptor_limit(wanted: int) -> int:
    """How many descriptors this process may have, if possible as many as `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def readable(sockets: Iterable[socket.socket]) -> Any:
    """An epoll of them."""
    found = select.epoll()
    for sock in sockets:
        found.register(sock, select.EPOLLIN)
    return found


def print_row(widths: Sequence[int], *cells: object) -> None:
    print("  ".join(str(cell).rjust(width) for width, cell in zip(widths, cells)), flush=True)
