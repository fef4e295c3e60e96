"""Where clients reach us: BND.ADDR of our replies, and BIND, which listens once for a peer.

BND.ADDR is the configured address that fits the client, else the local address of the
control connection: never an unspecified one, and always of that connection's family.

BIND has two replies: the address that listens, then the peer that came.  It listens on
the address that the client has reached us by, never on all.  A peer other than the one
the client asked for is refused, and the right one awaited further.
"""

from __future__ import annotations

import select
import socket
import time
from typing import Callable, NamedTuple, Sequence, TYPE_CHECKING, TypeAlias

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.connections import Events, Steps
from netproxy.net import stream as net_stream
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.socket_options import tune

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Resolver
    from netproxy.interfaces.services import Counter

# Seconds until the peer must have come: the limit of the SOCKS4 memo.
BIND_SECONDS = 120.0

EncodeReply: TypeAlias = Callable[[Address], bytes]
"""Encodes the reply that names the address that listens, or the peer."""


class Binder:
    """Listens for the peers of a listener's BIND requests."""

    def __init__(
        self, announcer: Announcer, counter: Counter, seconds: float = BIND_SECONDS
    ) -> None:
        """Wait at most `seconds` for a peer."""
        self._announcer = announcer
        self._counter = counter
        self._seconds = seconds

    def accept(
        self, control: Stream, flow: Flow, encode: EncodeReply
    ) -> Steps[tuple[Stream, Address]]:
        """Listen, send the first reply, and wait for a peer; return its stream and address.

        The peer must have one of the flow's addresses; an unspecified target means any peer.
        Raises DialError(TIMEOUT) if nobody came, DialError(GENERAL) if the client left or
        nothing can be bound.
        """
        allowed = None
        if not is_unspecified(flow.target.host):
            allowed = {address.host for address in flow.addresses}
        local = control.local_address()
        try:
            listening = _listen(local.host)
        except OSError as error:
            raise DialError(Reason.GENERAL, error.strerror or "cannot listen") from error
        with listening:
            port = listening.getsockname()[1]
            control.reply(encode(self._announcer.bound(flow.client, local, port, shared=False)))
            return (yield from self._wait(listening, control, allowed))

    def _wait(
        self, listening: socket.socket, control: Stream, allowed: set[str] | None
    ) -> Steps[tuple[Stream, Address]]:
        deadline = time.monotonic() + self._seconds
        # Of the client only its end matters: it may have sent early what is for the peer.
        watched = ((listening, select.POLLIN), (control.socket, select.POLLRDHUP))
        while (left := deadline - time.monotonic()) > 0:
            ready = yield Events(watched, left, control.light)
            if listening.fileno() in ready and (peer := self._accept(listening, allowed)):
                return peer
            if control.socket.fileno() in ready:
                raise DialError(Reason.GENERAL, "the client left")
        raise DialError(Reason.TIMEOUT, "nobody connected")

    def _accept(
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
        return net_stream.Stream(sock), peer


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


class Announcement(NamedTuple):
    """An address to announce to some clients."""

    clients: HostSet | None
    """The client addresses; None for all."""
    address: Address
    """A literal or a name.  Port 0 announces the real port."""


class Announcer:
    """The announcements of a listener.  Thread: any."""

    def __init__(self, announcements: Sequence[Announcement], resolver: Resolver) -> None:
        """The first announcement that fits counts.  `resolver` looks names up, for each reply."""
        self._announcements = announcements
        self._resolver = resolver

    def bound(self, client: Address, local: Address, port: int, shared: bool = True) -> Address:
        """Return BND for a control connection from `client` that came to `local`.

        `port` is the port that listens.  An announced port can only stand for the relay
        port that all clients share; `shared` says that `port` is that one.
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
            return [resolved.host for resolved in self._resolver.resolve(address)]
        except DialError:
            return []  # the address of the control connection is the next best
