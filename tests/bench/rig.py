"""Code that the benchmarks share: netproxyd as a process, its resources, clients with associations.

Needs only the standard library. Everything is on loopback.
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
from typing import Any, Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.ports import free_port as free_port  # noqa: E402

LOOPBACK = "127.0.0.1"
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
BUFFER = 4 << 20
# The limit of a wait for a daemon to start, answer or end.
SECONDS = 60.0
PORT = re.compile(r"tcp 127\.0\.0\.1:(\d+)")
LIVE = re.compile(r" connections=(\d+) .*\n")
TICK = os.sysconf("SC_CLK_TCK")
# Associations requested before their answers are read.
OPEN_AT_ONCE = 100

Endpoint = tuple[str, int]


class Netproxyd:
    """A daemon with one listener on loopback, without access log."""

    def __init__(
        self,
        batching: str = "auto",
        sessions: int = 8192,
        upstream: str = "direct",
        config: str = "",
        root: Path = ROOT,
        enter: Callable[[], None] | None = None,
    ) -> None:
        """`config` is a whole configuration file, which replaces the arguments before it.

        `root` is the checkout whose netproxyd is started.  `enter` moves its process to a network
        namespace.
        """
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
default: "{upstream}"
log: {{access: false}}
"""
        )
        self._log = log
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "netproxy", "-c", str(path)],
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=enter,
            )
        self.pid = self._process.pid
        deadline = time.monotonic() + SECONDS
        while not (match := PORT.search(log.read_text())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise SystemExit(f"netproxyd did not start:\n{log.read_text()}")
            time.sleep(0.01)
        self.address: Endpoint = LOOPBACK, int(match[1])

    def said(self, text: str) -> None:
        """Wait until the log has a text."""
        deadline = time.monotonic() + SECONDS
        while text not in (log := self._log.read_text()):
            if time.monotonic() > deadline:
                raise SystemExit(f"netproxyd did not say '{text}':\n{log}")
            time.sleep(0.01)

    def count_said(self, text: str) -> int:
        """Return how often the log has a text."""
        return self._log.read_text().count(text)

    def processor_seconds(self) -> float:
        """Return user and system time so far, in ticks of 10 ms on most machines."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def resident_mib(self) -> float:
        """Return the resident memory."""
        return (
            int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            * resource.getpagesize()
            / (1 << 20)
        )

    def descriptors(self) -> int:
        """Return the number of open descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        """Return the number of threads."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def connections(self) -> int:
        """Return the number of connections that the daemon reports on SIGUSR1."""
        before = len(LIVE.findall(self._log.read_text()))
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + SECONDS
        while len(reports := LIVE.findall(self._log.read_text())) == before:
            if time.monotonic() > deadline:
                raise SystemExit("netproxyd does not answer SIGUSR1")
            time.sleep(0.01)
        return int(reports[-1])

    def kill(self) -> None:
        """End the daemon with SIGKILL."""
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()

    def stop(self) -> None:
        """End the daemon, and print the errors in its log."""
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
    """An association: its control connection, and a UDP socket for the relay."""

    def __init__(self, server: Endpoint) -> None:
        """Send the request. established() reads the answer."""
        self.socket = udp_socket()
        self.control = socket.create_connection(server, SECONDS)
        port = struct.pack("!H", self.socket.getsockname()[1])
        self.control.sendall(b"\5\1\0" + b"\5\3\0\1\0\0\0\0" + port)

    def established(self) -> None:
        """Read the answer, and connect the UDP socket to the relay."""
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
        """Close both sockets, the control connection with RST if `abruptly`."""
        if abruptly:
            self.control.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.control.close()
        self.socket.close()


def open_clients(server: Endpoint, count: int) -> list[Client]:
    """Open associations, OPEN_AT_ONCE at a time."""
    clients: list[Client] = []
    while len(clients) < count:
        group = [Client(server) for _ in range(min(OPEN_AT_ONCE, count - len(clients)))]
        for client in group:
            client.established()
        clients += group
    return clients


def udp_socket(
    gro: bool = False, host: str = LOOPBACK, make: Callable[..., socket.socket] = socket.socket
) -> socket.socket:
    """Return a bound UDP socket with large buffers, and with UDP_GRO if wanted and possible.

    `make` creates it, perhaps in another network namespace.
    """
    sock = make(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    if gro:
        try:
            sock.setsockopt(SOL_UDP, UDP_GRO, 1)
        except OSError:
            # An older kernel: datagrams arrive one by one.
            pass
    sock.bind((host, 0))
    return sock


def header(target: Endpoint) -> bytes:
    """Return the SOCKS5 header before a datagram to an IPv4 target."""
    return b"\0\0\0\1" + socket.inet_aton(target[0]) + struct.pack("!H", target[1])


def can_segment() -> bool:
    """Return True if the kernel supports UDP_SEGMENT."""
    with udp_socket() as sender, udp_socket() as receiver:
        try:
            send_train(sender, b"abcd", 2, receiver.getsockname())
        except OSError:
            return False
    return True


def send_train(sock: socket.socket, data: bytes, stride: int, to: Any = None) -> None:
    """Send datagrams of `stride` bytes with one call. The kernel cuts `data` into them."""
    control = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", stride))]
    sock.sendmsg([data], control, 0, *(() if to is None else (to,)))


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the limit of descriptors to `wanted` if possible. Return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def readable(sockets: Iterable[socket.socket]) -> Any:
    """Return an epoll object that watches the sockets."""
    poll = select.epoll()
    for sock in sockets:
        poll.register(sock, select.EPOLLIN)
    return poll


def print_row(widths: Sequence[int], *cells: object) -> None:
    """Print the cells, right-aligned in columns of these widths. A row may be shorter."""
    columns = zip(widths, cells, strict=False)
    print("  ".join(str(cell).rjust(width) for width, cell in columns), flush=True)
