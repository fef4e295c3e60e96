"""Probes of NAT behaviour discovery from this machine: UDP sockets of one family.

Errors that the network reports are read as well: a closed port is not silence.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import time

from netproxy.admin.nat.discovery import PORTS
from netproxy.admin.nat.exchange import Arrival, SendError
from netproxy.net.address import from_sockaddr, is_ipv6, to_sockaddr
from netproxy.net.datagram import (
    ICMP_ERRORS,
    IP_RECVERR,
    IPV6_RECVERR,
    MSG_ERRQUEUE,
    enable,
    icmp_errno,
)
from netproxy.typed import TYPE_CHECKING, Iterator, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

_LONGEST = 2048
"""Bytes of a datagram that are read: an answer has some hundred."""
_CONTROL = 512
"""Bytes of control messages."""


class SocketTransport:
    """Sockets that send to all servers of one family (exchange.Transport)."""

    per_target = False

    def __init__(self, ipv6: bool, ports: int = len(PORTS)) -> None:
        """Open the sockets.  Raises OSError, for instance on a machine without IPv6."""
        self._family = socket.AF_INET6 if ipv6 else socket.AF_INET
        self._sockets: list[socket.socket] = []
        self._poll = select.poll()
        try:
            for _ in range(ports):
                self._sockets.append(self._open())
        except OSError:
            self.close()
            raise
        self._by_number = {sock.fileno(): port for port, sock in enumerate(self._sockets)}
        self._ready: Iterator[tuple[int, int]] = iter(())

    def close(self) -> None:
        """Close the sockets."""
        for sock in self._sockets:
            sock.close()

    def local(self, target: Address) -> Sequence[Address | None]:
        """Return the local address of each port towards a target, None without a route to it."""
        with socket.socket(self._family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(to_sockaddr(target, self._family))
            except OSError:
                return [None for _ in self._sockets]
            host = from_sockaddr(probe.getsockname()).host
        names = [from_sockaddr(sock.getsockname()) for sock in self._sockets]
        return [name._replace(host=host) for name in names]

    def send(self, port: int, target: Address, data: bytes) -> None:
        """Send a datagram.  Raises SendError."""
        if is_ipv6(target.host) != (self._family == socket.AF_INET6):
            raise SendError("an address of another family")
        for tries in itertools.count(1):
            try:
                self._sockets[port].sendto(data, to_sockaddr(target, self._family))
                return
            except OSError as error:
                # It may be an error that the network has reported of another target.
                if tries >= ICMP_ERRORS.get(error.errno or 0, 1):
                    raise SendError(_text(error.errno or 0)) from error

    def receive(self, seconds: float) -> Arrival | None:
        """Wait for at most `seconds`; return what has come, None if nothing has."""
        deadline = time.monotonic() + seconds
        while True:
            for number, events in self._ready:
                port = self._by_number[number]
                arrival = self._read_error(port) if events & select.POLLERR else self._read(port)
                if arrival is not None:
                    return arrival
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._ready = iter(self._poll.poll(left * 1000))

    def _open(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            if self._family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                enable(sock, socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
            else:
                enable(sock, socket.IPPROTO_IP, IP_RECVERR, 1)
            sock.bind(("", 0))
            self._poll.register(sock, select.POLLIN)
        except OSError:
            sock.close()
            raise
        return sock

    def _read(self, port: int) -> Arrival | None:
        # OSError: nothing is left, or an error that waits in the queue.
        with contextlib.suppress(OSError):
            data, sender = self._sockets[port].recvfrom(_LONGEST)
            return Arrival(port, from_sockaddr(sender), data)
        return None

    def _read_error(self, port: int) -> Arrival | None:
        with contextlib.suppress(OSError):
            _, messages, _, target = self._sockets[port].recvmsg(1, _CONTROL, MSG_ERRQUEUE)
            code = icmp_errno(messages)
            if code and target:
                return Arrival(port, from_sockaddr(target), b"", _text(code))
        return None


def _text(code: int) -> str:
    """Return an errno in words, as errors of the command have them."""
    return os.strerror(code).lower()
