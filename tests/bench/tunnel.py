"""Compares a reverse tunnel with `ssh -R`: throughput, and streams opened per second.

    python3 tests/bench/tunnel.py [--mib 512] [--streams 400] [--rounds 5] \\
                                  [--unread-rounds 25] [--at-once 8]

Throughput is also measured beside a stream that is not read. Bridge, agent, sshd and ssh are
processes on loopback with one target. Rounds alternate; the results are medians. Needs Debian's
openssh-server and openssl. Keys are created for each run.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from rig import LOOPBACK, ROOT, SECONDS, free_port

PIECE = 1 << 18
# MiB of a measurement beside an unread stream. Single ones differ by a quarter, so that many short
# ones are better than few long ones.
BESIDE_MIB = 128
# Seconds without progress after which all buffers of an unread stream are full.
FULL_SECONDS = 0.2
TOKEN = "a token for a bench of tunnels"


class Route(NamedTuple):
    """A port that leads to the target, with its name in the results."""

    name: str
    port: int


class Target:
    """A server for all measurements. It runs in threads of this process."""

    def __init__(self) -> None:
        self._listening = socket.create_server((LOOPBACK, 0), backlog=1024)
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listening.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    @staticmethod
    def _serve(client: socket.socket) -> None:
        """Serve a connection. Its first byte is the request.

        "u": receive everything and answer with the number of bytes. "d": send as many bytes as the
        next eight bytes say. "e": answer with one byte. "b": send everything back.
        """
        with client:
            request = client.recv(1)
            if request == b"e":
                client.sendall(b"e")
                client.recv(1)
            elif request == b"b":
                try:
                    while data := client.recv(PIECE):
                        client.sendall(data)
                except ConnectionError:
                    # The client does not read, and resets the connection in the end.
                    pass
            elif request == b"d":
                left = int.from_bytes(_exactly(client, 8), "big")
                piece = memoryview(bytes(PIECE))
                while left:
                    left -= client.send(piece[:left])
            elif request == b"u":
                buffer, total = memoryview(bytearray(PIECE)), 0
                while count := client.recv_into(buffer):
                    total += count
                client.sendall(total.to_bytes(8, "big"))


def _exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise SystemExit("a connection ended too early")
        data += piece
    return data


def download(port: int, mib: int) -> float:
    """Receive so many MiB from the target. Return MiB per second."""
    with socket.create_connection((LOOPBACK, port), SECONDS) as sock:
        began = time.monotonic()
        sock.sendall(b"d" + (mib << 20).to_bytes(8, "big"))
        buffer, total = memoryview(bytearray(PIECE)), 0
        while count := sock.recv_into(buffer):
            total += count
        assert total == mib << 20
        return mib / (time.monotonic() - began)


def upload(port: int, mib: int) -> float:
    """Send so many MiB to the target. Return MiB per second."""
    with socket.create_connection((LOOPBACK, port), SECONDS) as sock:
        sock.settimeout(60)
        began = time.monotonic()
        piece = bytes(PIECE)
        sock.sendall(b"u")
        for _ in range((mib << 20) // PIECE):
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
        assert int.from_bytes(_exactly(sock, 8), "big") == mib << 20
        return mib / (time.monotonic() - began)


@contextmanager
def unread(port: int) -> Iterator[None]:
    """Hold a stream that is echoed and not read. All its buffers are full in both directions."""
    with socket.create_connection((LOOPBACK, port), SECONDS) as sock:
        # close() sends RST.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall(b"b")
        sock.setblocking(False)
        last = time.monotonic()
        while time.monotonic() - last < FULL_SECONDS:
            try:
                sock.send(bytes(PIECE))
                last = time.monotonic()
            except BlockingIOError:
                time.sleep(0.005)
        yield


def beside(port: int, mib: int, measure: Callable[[int, int], float], unread_first: bool) -> float:
    """Measure with and without an unread stream. Return the ratio of the speeds."""
    speeds: dict[bool, float] = {}
    for is_unread in (unread_first, not unread_first):
        with unread(port) if is_unread else nullcontext():
            speeds[is_unread] = measure(port, mib)
    return speeds[True] / speeds[False]


DIRECTIONS = {"to the user": download, "to the service": upload}


def open_streams(port: int, count: int, at_once: int) -> float:
    """Open streams, `at_once` at the same time. Return how many per second were answered."""

    def work(number: int) -> None:
        for _ in range(number):
            with socket.create_connection((LOOPBACK, port), SECONDS) as sock:
                sock.sendall(b"e")
                assert _exactly(sock, 1) == b"e"

    threads = [threading.Thread(target=work, args=(count // at_once,)) for _ in range(at_once)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count // at_once * at_once / (time.monotonic() - began)


# -- the programs


def start(
    stack: ExitStack, command: list[str], log: Path, root: Path = ROOT
) -> subprocess.Popen[bytes]:
    """Start a program that ends with the stack, in the folder `root`."""
    output = stack.enter_context(open(log, "wb"))
    process = subprocess.Popen(
        command, cwd=root, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )

    def end() -> None:
        process.terminate()
        process.wait(SECONDS)

    stack.callback(end)
    return process


def wait_for_port(port: int, log: Path) -> None:
    """Wait until the target answers behind the port."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((LOOPBACK, port), 1) as sock:
                sock.settimeout(1)
                sock.sendall(b"e")
                if sock.recv(1) == b"e":
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"port {port} does not answer:\n{log.read_text()}")


def tunnel(stack: ExitStack, directory: Path, target: int, tls: bool, root: Path = ROOT) -> Route:
    """Start a bridge and an agent of the checkout `root`, with or without TLS."""
    name = "tunnel, TLS" if tls else "tunnel, plain"
    port, bridge = free_port(), free_port()
    files = Path(tempfile.mkdtemp(dir=directory))
    listen, dial, trust = (f"tcp://{LOOPBACK}:{bridge}",) * 2 + ("",)
    security = ""
    if tls:
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-keyout",
                "key",
                "-out",
                "pem",
                "-subj",
                "/CN=localhost",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
            ],
            cwd=files,
            check=True,
            capture_output=True,
        )
        listen, dial = f"{LOOPBACK}:{bridge}", f"tls://{LOOPBACK}:{bridge}"
        security = f", tls: {{certificate: {files}/pem, key: {files}/key}}"
        trust = f", tls: {{ca: {files}/pem}}"
    agents = f"{{bench: {{token: {TOKEN}, ports: [{port}]}}}}"
    services = f"{{'{port}': '{LOOPBACK}:{target}'}}"
    login = f"name: bench, token: {TOKEN}"
    texts = {
        "bridge": f"bridge: {{listen: '{listen}'{security}, agents: {agents}}}",
        "agent": f"agent: {{bridge: '{dial}', {login}{trust}, services: {services}}}",
    }
    for side, text in texts.items():
        (files / side).write_text(f"listeners: []\ntunnel:\n  {text}\nlog: {{access: false}}\n")
        start(
            stack,
            [sys.executable, "-m", "netproxy", "-c", str(files / side)],
            files / f"{side}.log",
            root,
        )
        if side == "bridge":
            time.sleep(1)
    wait_for_port(port, files / "agent.log")
    return Route(name, port)


def ssh(stack: ExitStack, directory: Path, target: int) -> Route:
    """Start sshd and `ssh -R`."""
    port, daemon = free_port(), free_port()
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / key)], check=True
        )
    (directory / "sshd_config").write_text(f"""
ListenAddress {LOOPBACK}:{daemon}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
""")
    os.makedirs("/run/sshd", exist_ok=True)
    start(
        stack,
        ["/usr/sbin/sshd", "-D", "-e", "-f", str(directory / "sshd_config")],
        directory / "sshd.log",
    )
    time.sleep(1)
    start(
        stack,
        [
            "ssh",
            "-N",
            "-F",
            "none",
            "-p",
            str(daemon),
            "-i",
            str(directory / "user"),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "ExitOnForwardFailure=yes",
            "-R",
            f"{LOOPBACK}:{port}:{LOOPBACK}:{target}",
            f"{getpass.getuser()}@{LOOPBACK}",
        ],
        directory / "ssh.log",
    )
    wait_for_port(port, directory / "ssh.log")
    return Route("ssh -R", port)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--unread-rounds", type=int, default=25)
    parser.add_argument("--at-once", type=int, default=8)
    options = parser.parse_args(arguments)
    measures: dict[str, Callable[[int], float]] = {
        "MiB/s to the user": lambda port: download(port, options.mib),
        "MiB/s to the service": lambda port: upload(port, options.mib),
        "streams/s, one by one": lambda port: open_streams(port, options.streams, 1),
        f"streams/s, {options.at_once} at once": lambda port: open_streams(
            port, options.streams, options.at_once
        ),
    }
    missing = [
        name
        for name in ("openssl", "ssh", "ssh-keygen", "/usr/sbin/sshd")
        if shutil.which(name) is None
    ]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="netproxy-bench-")))
        target = Target().port
        routes = [
            tunnel(stack, directory, target, True),
            tunnel(stack, directory, target, False),
            ssh(stack, directory, target),
        ]
        figures: dict[tuple[str, str], list[float]] = {}
        ratios: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for name, measure in measures.items():
                for route in routes:
                    figures.setdefault((name, route.name), []).append(measure(route.port))
        for turn in range(options.unread_rounds):
            for direction, bulk in DIRECTIONS.items():
                for route in routes[:2]:
                    ratio = beside(route.port, min(BESIDE_MIB, options.mib), bulk, turn % 2 == 0)
                    ratios.setdefault((direction, route.name), []).append(ratio)
    for name in measures:
        medians = {route.name: statistics.median(figures[name, route.name]) for route in routes}
        print(
            name.ljust(24),
            "  ".join(
                f"{route}: {value:8.1f} ({value / medians['ssh -R']:4.2f} x)"
                for route, value in medians.items()
            ),
        )
    print("Ratio of the speed beside a stream that is not read to the speed without it:")
    for direction in DIRECTIONS:
        print(
            direction.ljust(24),
            "  ".join(
                f"{route.name}: {statistics.median(ratios[direction, route.name]):4.2f} x"
                for route in routes[:2]
            ),
        )


if __name__ == "__main__":
    main()
