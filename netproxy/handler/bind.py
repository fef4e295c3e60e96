"""Where clients reach us: BND.ADDR of our replies, and BIND, which listens once for a peer that connects back.

BND.ADDR is the configured one that fits the client, else the local address of the
control connection: never an unspecified one, always of that connection's family.
BIND (FTP's way) has two replies: where it listens, then who came.  It listens on the
address that the client has reached us by, never on all.  A peer other than the one
asked for is turned away, and the right one awaited on.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Callable, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.connect import keep_alive, tune
from netproxy.net.stream import Stream, poll_streams

BIND_SECONDS = 120.0  # the SOCKS4 memo's limit


class Announcement(NamedTuple):
    """`clients` is a container of addresses, None for all; `address` a literal or a name; port 0 keeps the real one."""

    clients: object | None
    address: Address


class Announcer:
    """`resolve(address)` gives the addresses of a name, DialError when there is none; asked for each reply."""

    def __init__(
        self, announcements: Sequence[Announcement], resolve: Callable[[Address], Sequence[Address]]
    ) -> None:
        self._announcements = announcements
        self._resolve = resolve

    def bound(self, client: Address, local: Address, port: int, shared: bool = True) -> Address:
        """For a control connection from `client` that came to `local`; `port` is the port that listens.

        `shared`: it is the relay port of all, the only one that an announced port can stand for.
        """
        for clients, address in self._announcements:
            if clients is None or client.host in clients:
                for host in self._hosts(address):
                    if is_ipv6(host) == is_ipv6(local.host) and not is_unspecified(host):
                        return Address(host, address.port if shared and address.port else port)
        return Address(local.host.partition("%")[0], port)

    def _hosts(self, address: Address) -> list[str]:
        if pack_ip(address.host) is not None:
            return [address.host]
        try:
            return [found.host for found in self._resolve(address)]
        except DialError:
            return []  # the control connection's own address is the next best


class Binder:
    def __init__(
        self, announcer: Announcer, counter: Counter, seconds: float = BIND_SECONDS
    ) -> None:
        self._announcer = announcer
        self._counter = counter
        self._seconds = seconds

    def accept(
        self, control: Stream, flow: Flow, announce: Callable[[Address], None]
    ) -> tuple[Stream, Address]:
        """Listens, tells by `announce` where, and waits for a peer at one of the addresses of the flow's target (unspecified: any).

        DialError(TIMEOUT) when nobody came, DialError(GENERAL) when the client left or nothing can be bound.
        """
        allowed = (
            None if is_unspecified(flow.target.host) else {each.host for each in flow.addresses}
        )
        local = control.local_address()
        try:
            listening = _listen(local.host)
        except OSError as error:
            raise DialError(Reason.GENERAL, error.strerror or "cannot listen") from error
        with listening:
            announce(
                self._announcer.bound(flow.client, local, listening.getsockname()[1], shared=False)
            )
            return self._wait(listening, control, allowed)

    def _wait(
        self, listening: socket.socket, control: Stream, allowed: set[str] | None
    ) -> tuple[Stream, Address]:
        deadline = time.monotonic() + self._seconds
        poll = select.poll()
        poll.register(listening, select.POLLIN)
        poll.register(
            control.socket, select.POLLRDHUP
        )  # its end, though it may have sent early what is for the peer
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll_streams(poll, left)]
            if listening.fileno() in ready and (found := self._take(listening, allowed)):
                return found
            if control.socket.fileno() in ready:
                raise DialError(Reason.GENERAL, "the client left")
        raise DialError(Reason.TIMEOUT, "nobody connected")

    def _take(
        self, listening: socket.socket, allowed: set[str] | None
    ) -> tuple[Stream, Address] | None:
        try:
            sock, sockaddr = listening.accept()
        except OSError:
            return None
        peer = from_sockaddr(sockaddr)
        if allowed is not None and peer.host not in allowed:
            self._counter.count("connections_refused", "wrong peer of a BIND")
            sock.close()
            return None
        tune(sock)
        keep_alive(sock)
        return Stream(sock), peer


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.bind(to_sockaddr(Address(host, 0), family))
        listening.listen(1)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening
