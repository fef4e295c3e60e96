#!/usr/bin/env python3
"""Measures the TCP relay: memory of connections, time to start, throughput, connection rate.

  python3 tests/bench/tcp.py            less than a minute
  python3 tests/bench/tcp.py --quick    some seconds, less exact

Starts netproxyd on loopback. The target is a process of its own.
"""

from __future__ import annotations

import argparse
import select
import socket
import struct
import time
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any, Callable

from rig import LOOPBACK, Netproxyd, Endpoint, raise_descriptor_limit

# Connections whose memory is measured.
IDLE, BURST = 1000, 2000
# Seconds after which the idle threads of a burst have ended.
REST = 12.0
PIECE = bytes(1 << 18)
SECONDS = 10.0


def target(
    ready: Any, host: str = LOOPBACK, make: Callable[..., socket.socket] = socket.socket
) -> None:
    """Run the target: an echo server, unless a connection begins with "d" or "u".

    After "d" (down) it sends zeros, after "u" (up) it discards what it receives.  `make` creates
    its socket, perhaps in another network namespace.
    """
    listening = make(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind((host, 0))
    listening.listen(1024)
    ready.send(listening.getsockname())
    poll = select.epoll()
    poll.register(listening, select.EPOLLIN)
    live: dict[int, tuple[socket.socket, list[bytes]]] = {}
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == listening.fileno():
                sock, _ = listening.accept()
                live[sock.fileno()] = sock, []
                poll.register(sock, select.EPOLLIN)
                continue
            sock, kind = live[descriptor]
            try:
                data = sock.recv(1 << 20)
                kind += [data[:1]] if not kind else []
                if kind[0] == b"d":
                    while True:
                        sock.sendall(PIECE)
                if data and kind[0] != b"u":
                    sock.sendall(data)
            except OSError:
                data = b""
            if not data:
                poll.unregister(descriptor)
                del live[descriptor]
                sock.close()


def connect(server: Endpoint, to: Endpoint) -> socket.socket:
    """Return a connection to the target through the daemon."""
    sock = socket.create_connection(server, SECONDS)
    sock.sendall(b"\5\1\0" + b"\5\1\0\1" + socket.inet_aton(to[0]) + struct.pack("!H", to[1]))
    answer = b""
    while len(answer) < 12:
        piece = sock.recv(12 - len(answer))
        if not piece:
            raise SystemExit("netproxyd has refused a connection")
        answer += piece
    return sock


def memory(daemon: Netproxyd, to: Endpoint, idle: int, burst: int, rest: float) -> None:
    """Print the memory of connections, each time after `rest` seconds."""
    base = daemon.resident_mib()
    print(f"idle daemon                       {base:8.1f} MiB resident, {daemon.threads()} threads")
    with ExitStack() as stack:
        for _ in range(idle):
            stack.enter_context(connect(daemon.address, to))
        time.sleep(rest)
        held = daemon.resident_mib() - base
        print(f"{idle} idle connections           {held:+8.1f} MiB, {daemon.threads()} threads")
        for _ in range(max(0, burst - idle)):
            stack.enter_context(connect(daemon.address, to))
        print(f"{burst} connections               {daemon.resident_mib() - base:+8.1f} MiB")
    time.sleep(rest)
    left = daemon.resident_mib() - base
    print(f"after they have gone              {left:+8.1f} MiB, {daemon.threads()} threads")


def bulk(daemon: Netproxyd, to: Endpoint, direction: bytes, seconds: float) -> None:
    """Print the throughput of one connection in the direction b"u" (up) or b"d" (down)."""
    with connect(daemon.address, to) as sock:
        before, traffic, end = daemon.processor_seconds(), 0, time.monotonic() + seconds
        sock.sendall(direction)
        while time.monotonic() < end:
            traffic += sock.send(PIECE) if direction == b"u" else len(sock.recv(1 << 20))
        cost = (daemon.processor_seconds() - before) / (traffic / 1e9)
    name = "client to target" if direction == b"u" else "target to client"
    speed = traffic * 8 / seconds / 1e9
    print(
        f"{name}, one connection  {speed:8.1f} Gbit/s, "
        f"{cost * 1000:.0f} ms of processor time per GB"
    )


def rate(daemon: Netproxyd, to: Endpoint, seconds: float) -> None:
    """Print how many connections per second one client opens, one after the other."""
    before, done, end = daemon.processor_seconds(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        with connect(daemon.address, to) as sock:
            sock.sendall(b"x")
            sock.recv(1)
        done += 1
    cost = (daemon.processor_seconds() - before) / done
    print(
        f"connections, one after the other  {done / seconds:8.0f} per second, "
        f"{cost * 1e6:.0f} us of processor time each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    raise_descriptor_limit(3 * BURST)
    ours, theirs = get_context("fork").Pipe()
    server = get_context("fork").Process(target=target, args=(theirs,), daemon=True)
    server.start()
    to = ours.recv()
    try:
        with Netproxyd() as daemon:
            start = daemon.processor_seconds() * 1000
            print(f"start to listening                {start:8.0f} ms of processor time")
            bulk(daemon, to, b"u", 0.3 if quick else 3.0)
            bulk(daemon, to, b"d", 0.3 if quick else 3.0)
            rate(daemon, to, 0.3 if quick else 3.0)
        with Netproxyd() as daemon:
            memory(daemon, to, *((50, 100, 0.5) if quick else (IDLE, BURST, REST)))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
