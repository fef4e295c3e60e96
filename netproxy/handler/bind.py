"""BIND of SOCKS4 and SOCKS5 (RFC 1928 section 4): listens once for a peer of the client.

BIND has two replies: the address that listens, then that of the peer.  It listens on the
local address of the client's connection, never on all.  A peer other than the one that the
client named is refused; the right one may still come.
"""

from __future__ import annotations

import select
import socket
import time
from functools import partial

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Events, Steps
from netproxy.net import stream as net_stream
from netproxy.net.address import from_sockaddr, is_ipv6, is_unspecified, to_sockaddr
from netproxy.net.socket_options import tune
from netproxy.relay.connection import CLIENT_LEFT
from netproxy.typed import TYPE_CHECKING, Callable, TypeAlias

if TYPE_CHECKING:
    from netproxy.handler.announce import Announcer
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter

# Seconds until the peer must have come: the limit of the SOCKS4 memo.
BIND_SECONDS = 120.0

EncodeReply: TypeAlias = Callable[[Address], bytes]
"""Encodes a reply: that with the address that listens, or that with the peer's."""


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
        Raises DialError(TIMEOUT) if no peer came, DialError(GENERAL) if the client left or no
        socket can be bound.
        """
        local = control.local_address()
        try:
            listening, port = _listen(local.host)
        except OSError as error:
            raise DialError(Reason.GENERAL, said=error.strerror or "cannot listen") from error
        with listening:
            choose = partial(self._announcer.bound, flow.client, local, port, shared=False)
            bound = (yield Blocking(choose)) if self._announcer.may_block else choose()
            control.reply(encode(bound))
            return (yield from self._wait(listening, control, flow))

    def _wait(
        self, listening: socket.socket, control: Stream, flow: Flow
    ) -> Steps[tuple[Stream, Address]]:
        deadline = time.monotonic() + self._seconds
        # The client is watched for its end alone: it may send early data for the peer.
        watched = ((listening, select.POLLIN), (control.socket, select.POLLRDHUP))
        while (left := deadline - time.monotonic()) > 0:
            ready = yield Events(watched, left, control.light)
            if listening.fileno() in ready and (peer := self._accept(listening, flow)):
                return peer
            if control.socket.fileno() in ready:
                raise DialError(Reason.GENERAL, said=CLIENT_LEFT)
        raise DialError(Reason.TIMEOUT, "nobody connected")

    def _accept(self, listening: socket.socket, flow: Flow) -> tuple[Stream, Address] | None:
        try:
            sock, sockaddr = listening.accept()
        except OSError:
            return None
        peer = from_sockaddr(sockaddr)
        allowed = {address.host for address in flow.addresses}
        if peer.host not in allowed and not is_unspecified(flow.target.host):
            refusal = flow.refusal("connections_refused", "wrong peer of a BIND", "BIND's target")
            self._counter.refuse(refusal._replace(asked=f"{flow.target} for peer {peer}"))
            sock.close()
            return None
        tune(sock)
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
