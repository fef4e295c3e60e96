"""TCP connections that rules of the kernel lead here: their clients know of no proxy.

The target is the address that the client has connected to.  A connection that no rule has led
here is refused: its target is this listener, and to dial it would be a loop.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, StreamError
from netproxy.handler.transparent.loops import LOOP, NOT_LED_HERE, OwnConnections
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS
from netproxy.interfaces.flows import Flow
from netproxy.net.address import from_sockaddr
from netproxy.net.socket_options import original_target
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.transparent.sniffer import Sniffer
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter

    IsOwn = Callable[[str, Address], bool]


def redirected_target(stream: Stream) -> Address:
    """Return the target of a connection that a rule REDIRECT has led here.  Raises OSError."""
    return from_sockaddr(original_target(stream.socket))


def addressed_target(stream: Stream) -> Address:
    """Return the target of a connection that a rule TPROXY has led here: its local address.

    Raises OSError.
    """
    return from_sockaddr(stream.socket.getsockname())


class TransparentTcp:
    """Connects every connection to the address that its client wanted.  A Handler."""

    def __init__(
        self,
        target_of: Callable[[Stream], Address],
        outbound: Outbound,
        permission: Permission,
        is_own: IsOwn,
        counter: Counter,
        sniffer: Sniffer | None = None,
    ) -> None:
        """`target_of`: redirected_target or addressed_target.

        `is_own(network, address)`: whether an address is a listener of this daemon.
        `sniffer` finds the names that clients want, None if nothing looks for them.
        """
        self._target_of = target_of
        self._outbound = outbound
        self._permission = permission
        self._is_own = is_own
        self._counter = counter
        self._sniffer = sniffer
        self._own = OwnConnections()

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Connect to the target and relay."""
        try:
            target = self._target_of(stream)
        except OSError:
            # Connection tracking does not know it.
            target = UNSPECIFIED_ADDRESS
        sources = self._permission.sources
        source = None if sources is None else sources.of("", stream.local_address)
        flow = Flow("tcp", client, target, self._permission.listener, "", source=source)
        if not target.port or self._is_own("tcp", target):
            self._refuse(flow, stream, NOT_LED_HERE, "no rule of the kernel has led it here")
            return None
        if not self._own.arrives(client, target):
            self._refuse(flow, stream, LOOP, "the connection is this daemon's own")
            return None
        stream.on_close(partial(self._own.leaves, client, target))
        try:
            self._permission.check(flow)
            if self._sniffer is not None:
                flow = yield from self._sniffer.named(flow, stream)
            stream.handshaking = False
            connection = yield from self._outbound.connect(flow, stream)
        except DialError:
            # The client has no protocol that could tell it; the refusal has been recorded.
            stream.reset()
            return None
        if self._returns(connection.upstream):
            connection.finish(LOOP, fault="the connection came back to this listener")
            stream.reset()
            return None
        return connection.accept(stream, b"")

    def _returns(self, upstream: Stream) -> bool:
        """Return whether a connection of ours has come back to this listener; remember it."""
        try:
            local, peer = upstream.local_address(), upstream.peer_address()
        except StreamError:
            return False  # not a socket of IP, or gone: the relay will find out
        if self._own.dials(local, peer):
            return True
        upstream.on_close(partial(self._own.ends, local, peer))
        return False

    def _refuse(self, flow: Flow, stream: Stream, reason: str, decided: str) -> None:
        self._counter.refuse(flow.refusal("requests_refused", reason, decided))
        stream.reset()
