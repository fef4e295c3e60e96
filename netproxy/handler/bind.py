"""BIND: listens once for a peer that connects back, as the target of FTP does.

BIND has two replies: the address that listens, then the peer that came.  It listens on
the address that the client has reached us by, never on all.  A peer other than the one
the client asked for is refused, and the right one awaited further.
"""

from __future__ import annotations

import select
import socket
import time
from typing import TYPE_CHECKING, Callable, TypeAlias

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Events, Steps
from netproxy.net import stream as net_stream
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.socket_options import keep_alive, tune

if TYPE_CHECKING:
    from netproxy.handler.announce import Announcer
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
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
            listening, port = _listen(local.host)
        except OSError as error:
            raise DialError(Reason.GENERAL, error.strerror or "cannot listen") from error
        with listening:
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
        keep_alive(sock)
        return net_stream.Stream(sock), peer


def _listen(host: str) -> tuple[socket.socket, int]:
    """Return a socket that listens, and its port.  Raises OSError."""
    family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.bind(to_sockaddr(Address(host, 0), family))
        listening.listen(1)
        listening.setblocking(False)
        return listening, listening.getsockname()[1]
    except OSError:
        listening.close()
        raise
