"""Reserves port numbers of this machine that are free for TCP and for UDP.

The kernel keeps the ports of the two protocols apart: a number that it gives for TCP may be in use
for UDP. Programs that listen on both under one number get a reserved one.

A reserved port is free for a moment, until the program binds it. So that no other process of tests
reserves it meanwhile, each process has a block of numbers for itself.
"""

from __future__ import annotations

import itertools
import socket
from typing import Callable

# Below the range that Linux hands out by itself (net.ipv4.ip_local_port_range). A client that keeps
# connecting to a port of that range, before a server listens there, may be given that very port as
# its own: it then connects to itself, and no server can bind the port any more.
ALL = range(22_000, 30_000)
# The ports of one process of tests: many more than one test reserves.
BLOCK = 250


def _take_block() -> tuple[range, socket.socket | None]:
    """Return ports that no other process of tests reserves, and the socket that says so.

    The socket has an abstract name, which the kernel frees when the process ends. If all blocks are
    taken, all processes share all ports.
    """
    marker = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for start in range(ALL.start, ALL.stop, BLOCK):
        try:
            marker.bind(f"\0netproxy-tests-ports-{start}")
        except OSError:
            continue
        return range(start, start + BLOCK), marker
    marker.close()
    return ALL, None


CANDIDATES, _MARKER = _take_block()
# In turn: a number that was released a moment ago does not come again soon.
_numbers = itertools.cycle(CANDIDATES)


class ReservedPort:
    """A port number, bound for TCP and UDP until release(). Also a context manager."""

    def __init__(self, number: int, *sockets: socket.socket) -> None:
        self.number = number
        self._sockets = sockets

    def release(self) -> int:
        """Free the port for a program that is about to bind it. Return its number."""
        for sock in self._sockets:
            sock.close()
        return self.number

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def reserve_port(
    host: str = "127.0.0.1", make: Callable[..., socket.socket] = socket.socket
) -> ReservedPort:
    """Bind a port of `host` that is free for TCP and UDP.

    `make` creates sockets as socket.socket does, possibly in another network namespace.
    """
    while True:
        number = next(_numbers)
        tcp, udp = make(socket.AF_INET, socket.SOCK_STREAM), make(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            tcp.bind((host, number))
            udp.bind((host, number))
        except OSError:
            tcp.close()
            udp.close()
            continue
        return ReservedPort(number, tcp, udp)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that was free for TCP and UDP a moment ago."""
    return reserve_port(host).release()
