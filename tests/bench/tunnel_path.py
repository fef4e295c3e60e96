"""Compares the ways of a tunnel's datagrams: its UDP path, its TLS connections, and no tunnel.

    python3 tests/bench/tunnel_path.py [--seconds 20] [--flows 8] [--loss 2] [--delay 40]

First the latency of flows of 60 datagrams a second over a network that delays every packet, and
loses some of them, in both directions alike, TCP and UDP. The network is a pair of TUN devices in
two network namespaces, and a program between them. Then throughput and processor time on loopback.
Needs root, pytest, openssl, Debian's iproute2, and the Python package cryptography.
"""

from __future__ import annotations

import argparse
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from multiprocessing import Process
from typing import Iterator, NamedTuple

from rig import BUFFER, LOOPBACK, SOL_UDP, UDP_GRO, Netproxyd, free_port, print_row

from tests.e2e.namespaces import Namespace, hosts
from tests.support.certificates import certificates

NEAR, FAR = "10.90.0.1", "10.90.0.2"
RATE, SIZE = 60, 120
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
TOKEN = "a token for a bench of datagrams"
STAMP = struct.Struct("!Iq")
# Seconds after the last datagram until its answer counts as lost.
LATE = 3.0
WIDTHS = (10, 8, 9, 7, 8, 8, 8)
LOAD_WIDTHS = (10, 9, 12, 8, 12, 12)
TRAIN = 8


class Network(NamedTuple):
    """What happens to the packets between the namespaces."""

    delay: float
    """Seconds, one way."""
    loss: float
    """The part of packets that is lost, each way."""


# -- the network


def open_tun(host: Namespace, address: str, peer: str) -> int:
    """Make a TUN device in a namespace; return its descriptor."""
    opened: list[int] = []

    def make() -> None:
        host.enter()
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(descriptor, TUNSETIFF, flags)
        opened.append(descriptor)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    host.ip("address", "add", address, "peer", peer, "dev", "tun0")
    host.ip("link", "set", "tun0", "mtu", "1500", "up")
    return opened[0]


def carry(ends: tuple[int, int], network: Network) -> None:
    """Carry packets between two TUN devices, late, and not all of them.  Never returns."""
    source, waiting, number = random.Random(1), [], 0
    other = dict(zip(ends, reversed(ends), strict=True))
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for end, _ in poll.poll(int(pause * 1000)):
            packet = os.read(end, 2048)
            if source.random() >= network.loss:
                number += 1
                due = time.monotonic() + network.delay
                heapq.heappush(waiting, (due, number, other[end], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            try:
                os.write(end, packet)
            except OSError:
                pass  # the device's queue is full: the packet is lost


# -- latency


class Result(NamedTuple):
    """Datagrams sent, and the round trips of the answered ones in seconds, sorted."""

    sent: int
    trips: list[float]

    def quantile(self, part: float) -> float:
        """Return a quantile of the round trips in milliseconds."""
        return self.trips[min(len(self.trips) - 1, int(len(self.trips) * part))] * 1e3


def play(host: Namespace, target: tuple[str, int], flows: int, seconds: float) -> Result:
    """Send from so many flows to an echo server, from a namespace, and measure."""
    sockets = [host.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(flows)]
    trips: list[float] = []
    ended = threading.Event()

    def receive() -> None:
        poll = select.poll()
        by_descriptor = {sock.fileno(): sock for sock in sockets}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        while not ended.is_set():
            for descriptor, _ in poll.poll(100):
                number, sent = STAMP.unpack_from(by_descriptor[descriptor].recv(2048))
                if number:
                    trips.append((time.monotonic_ns() - sent) / 1e9)

    for sock in sockets:
        sock.connect(target)
        # Opens the session, and is not measured.
        sock.send(STAMP.pack(0, 0).ljust(SIZE))
    time.sleep(1.0)
    reader = threading.Thread(target=receive)
    reader.start()
    total, began = int(seconds * RATE), time.monotonic()
    for number in range(1, total + 1):
        time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        for sock in sockets:
            sock.send(STAMP.pack(number, time.monotonic_ns()).ljust(SIZE))
    time.sleep(LATE)
    ended.set()
    reader.join()
    for sock in sockets:
        sock.close()
    return Result(total * flows, sorted(trips))


class Tunnel(NamedTuple):
    """The daemons of a tunnel, and its public UDP port."""

    bridge: Netproxyd
    agent: Netproxyd
    port: int

    def processor_seconds(self) -> tuple[float, float]:
        """Return the processor time of the bridge and of the agent."""
        return self.bridge.processor_seconds(), self.agent.processor_seconds()


@contextmanager
def tunnel(
    by_udp: bool, target: tuple[str, int], ends: tuple[Namespace, Namespace] | None = None
) -> Iterator[Tunnel]:
    """Run a tunnel with TLS to a UDP service, in two namespaces or on loopback."""
    files, port, agents = certificates(), free_port(), free_port()
    host = NEAR if ends else LOOPBACK
    log = 'log: {access: false}\nlisteners: [{listen: "127.0.0.1:0"}]\n'
    datagrams = f"datagrams: {str(by_udp).lower()}"
    bridge = f"""{log}tunnel: {{bridge: {{listen: "{host}:{agents}", {datagrams},
  tls: {files.listener()}, agents: {{home: {{token: {TOKEN}, ports: [{port}/udp]}}}}}}}}
"""
    agent = f"""{log}tunnel: {{agent: {{bridge: "tls://{host}:{agents}", {datagrams}, name: home,
  token: {TOKEN}, tls: {{ca: "{files.path("ca.pem")}", server_name: localhost}},
  services: {{"{port}/udp": "{target[0]}:{target[1]}"}}}}}}
"""
    near, far = (end.enter for end in ends) if ends else (None, None)
    with Netproxyd(config=bridge, enter=near) as first, Netproxyd(config=agent, enter=far) as last:
        last.said("go by UDP" if by_udp else "connected as 'home'")
        yield Tunnel(first, last, port)


def echo(sock: socket.socket) -> None:
    """Send everything back.  Never returns."""
    while True:
        data, peer = sock.recvfrom(2048)
        sock.sendto(data, peer)


def measure_latency(network: Network, flows: int, seconds: float) -> None:
    """Print the round trips of flows without a tunnel and through it, by UDP and by TLS."""
    with ExitStack() as stack:
        near, far = stack.enter_context(hosts("near", "far"))
        ends = open_tun(near, NEAR, FAR), open_tun(far, FAR, NEAR)
        for end in ends:
            stack.callback(os.close, end)
        target = far.socket(socket.AF_INET, socket.SOCK_DGRAM)
        target.bind((FAR, 0))
        for program in (
            Process(target=carry, args=(ends, network)),
            Process(target=echo, args=(target,)),
        ):
            program.start()
            stack.callback(program.join)
            stack.callback(program.kill)
        address = target.getsockname()
        results = {"direct": play(near, address, flows, seconds)}
        for name, by_udp in (("udp path", True), ("tls stream", False)):
            with tunnel(by_udp, address, (near, far)) as path:
                time.sleep(2.0)
                results[name] = play(near, (LOOPBACK, path.port), flows, seconds)
    print_row(WIDTHS, "way", "sent", "answered", "lost %", "p50 ms", "p99 ms", "max ms")
    for name, result in results.items():
        lost = 100 * (1 - len(result.trips) / result.sent)
        figures = [f"{result.quantile(part):.1f}" for part in (0.5, 0.99, 1)]
        print_row(WIDTHS, name, result.sent, len(result.trips), f"{lost:.1f}", *figures)
    ratio = results["udp path"].quantile(0.99) / results["direct"].quantile(0.99)
    print(f"\np99 of the UDP path: {ratio:.2f} x direct\n")


# -- throughput


@contextmanager
def counting(sock: socket.socket, size: int) -> Iterator[list[int]]:
    """Count the datagrams of `size` bytes that a socket receives."""
    received, ended = [0], threading.Event()

    def count() -> None:
        poll, buffer = select.poll(), bytearray(65536)
        poll.register(sock, select.POLLIN)
        while not ended.is_set():
            if poll.poll(100):
                received[0] += -(-sock.recv_into(buffer) // size)

    reader = threading.Thread(target=count)
    reader.start()
    try:
        yield received
    finally:
        ended.set()
        reader.join()


def send(target: tuple[str, int], size: int, rate: float, seconds: float) -> int:
    """Send trains of TRAIN datagrams at a rate, 0 for as fast as possible; return how many."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(SOL_UDP, 103, size)
        sock.connect(target)
        sent, began, data = 0, time.monotonic(), bytes(size * TRAIN)
        while (now := time.monotonic() - began) < seconds:
            if rate and sent > now * rate:
                time.sleep(0.0005)
                continue
            try:
                sock.send(data, socket.MSG_DONTWAIT)
                sent += TRAIN
            except BlockingIOError:
                time.sleep(0.0005)
        return sent


def measure_load(seconds: float, rate: float, size: int = 1200) -> None:
    """Print how many datagrams pass on loopback, and what each costs both daemons."""
    print_row(LOAD_WIDTHS, "way", "size", "datagrams/s", "lost %", "us, bridge", "us, agent")
    for name, by_udp in (("udp path", True), ("tls stream", False)):
        for pace in (rate, 0.0):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
                sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                sink.setsockopt(SOL_UDP, UDP_GRO, 1)
                sink.bind((LOOPBACK, 0))
                with counting(sink, size) as received, tunnel(by_udp, sink.getsockname()) as path:
                    send((LOOPBACK, path.port), size, 100.0, 0.5)
                    time.sleep(1.5)
                    before, spent = received[0], path.processor_seconds()
                    sent = send((LOOPBACK, path.port), size, pace, seconds)
                    time.sleep(0.5)
                    passed = received[0] - before
                    used = [
                        (after - then) / max(1, passed) * 1e6
                        for then, after in zip(spent, path.processor_seconds(), strict=True)
                    ]
                rate_text = f"{passed / seconds:,.0f}"
                lost = f"{100 * (1 - passed / max(1, sent)):.1f}"
                load = name if pace else "  flooded"
                print_row(LOAD_WIDTHS, load, size, rate_text, lost, *(f"{us:.1f}" for us in used))


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares the ways of a tunnel's datagrams.")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--flows", type=int, default=8)
    parser.add_argument("--loss", type=float, default=2.0, help="per cent, each way")
    parser.add_argument("--delay", type=float, default=40.0, help="milliseconds, each way")
    parser.add_argument("--rate", type=float, default=10000.0, help="datagrams a second of a load")
    parser.add_argument("--load-seconds", type=float, default=3.0)
    options = parser.parse_args()
    network = Network(options.delay / 1e3, options.loss / 100)
    print(
        f"{options.flows} flows x {RATE}/s x {SIZE} bytes, {options.seconds:g} s, "
        f"{options.loss:g} % lost and {options.delay:g} ms each way\n"
    )
    measure_latency(network, options.flows, options.seconds)
    measure_load(options.load_seconds, options.rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
