"""The upstream without a proxy: TCP and UDP from this machine's own sockets.

Every chain of proxies begins with a DirectDialer.  OSError becomes DialError here and in
net.connect.  Dials run on the thread that asks, and block.

A connection to a port of the daemon's own is checked again once it is made: the address may
have become this machine's since it was permitted.
"""

from __future__ import annotations

import math
import time
from functools import partial

from netproxy.dialer.plain.packet_conn import DirectPacketConn
from netproxy.errors import DialError, Reason
from netproxy.interfaces.routing import NonBlockingDialer
from netproxy.interfaces.routing import ANY_ROUTE, RouteSelectors
from netproxy.net.address import from_sockaddr
from netproxy.net.connect import REASONS, PendingDial, connect, tell_step
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions
from netproxy.net.stream import Stream
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    import socket

    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Bind, DestinationGuard, Nat64, Resolver
    from netproxy.net.udp_sockets import UdpSocketFactory

DIRECT = "direct"
"""The upstream's name, in logs and rules."""


class TargetResolver(NamedTuple):
    """Finds the addresses that a flow may be dialled to.

    These are the flow's own if the router looked them up.  Otherwise, as for the server of a
    proxy, the name is looked up and the guard decides.
    """

    resolver: Resolver
    guard: DestinationGuard
    nat64: Nat64 | None = None
    """None: IPv4 addresses are dialled as they are."""

    def addresses(
        self, flow: Flow, seconds: float = math.inf, selectors: RouteSelectors = ANY_ROUTE
    ) -> Sequence[Address]:
        """Return at least one address; a lookup blocks for at most `seconds`.

        `selectors`: of the socket that is to connect.  Raises DialError.
        """
        addresses = flow.addresses or self.guard.permitted(
            flow, self.resolver.resolve(flow.target, flow.client.host, seconds)
        )
        return self.reachable(flow, addresses, selectors)

    def reachable(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors
    ) -> Sequence[Address]:
        """Return those of permitted addresses that a socket with `selectors` may connect to.

        The guard has permitted them for a socket without options, which the kernel may route
        elsewhere.  Raises DialError(LOOP).
        """
        if selectors == ANY_ROUTE:
            return addresses
        return self.guard.without_own(flow, addresses, selectors)

    def through_nat64(
        self,
        flow: Flow,
        addresses: Sequence[Address],
        selectors: RouteSelectors,
        seconds: float = math.inf,
    ) -> dict[Address, Address]:
        """Return the addresses to dial in place of these, each with that which it leads to.

        Returns nothing if these can be dialled as they are.  A lookup blocks for at most
        `seconds`.  Raises DialError.
        """
        if self.nat64 is None:
            return {}
        translated = self.nat64.translate(addresses, selectors, seconds)
        if translated is addresses:
            return {}
        permitted = self.translated(flow, translated, selectors)
        pairs = zip(translated, addresses, strict=True)
        return {address: original for address, original in pairs if address in permitted}

    def translated(
        self, flow: Flow, translated: Sequence[Address], selectors: RouteSelectors
    ) -> Sequence[Address]:
        """Return those of translated addresses that may be dialled: a name server gave them.

        Raises DialError.
        """
        return self.reachable(flow, self.guard.permitted(flow, translated), selectors)


class DirectDialer(NonBlockingDialer):
    """Connects to targets without a proxy."""

    name = DIRECT
    carries = frozenset({"tcp", "udp", "bind"})
    refusal = Reason.UNSUPPORTED
    symmetric = False
    knows_bound = True
    resolves_names = False

    def __init__(
        self,
        target_resolver: TargetResolver,
        datagrams: UdpSocketFactory,
        seconds: float,
        outgoing: SocketOptions = DEFAULT_OPTIONS,
    ) -> None:
        """`seconds` limit one connection in total, a name lookup included."""
        self._target_resolver = target_resolver
        self._datagrams = datagrams
        self._seconds = seconds
        self._outgoing = outgoing
        self._selectors = outgoing.selectors
        self._takes_any_route = self._selectors == ANY_ROUTE

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target; of several addresses the first to answer wins.

        Blocks.  Raises DialError.
        """
        if flow.source is not None and (dialer := self._for_source(flow)) is not self:
            return dialer.dial(flow)
        target = flow.target
        if not target.port:
            raise DialError(Reason.REFUSED, f"{target}: port 0")
        deadline = time.monotonic() + self._seconds
        resolver, selectors = self._target_resolver, self._selectors
        addresses = resolver.addresses(flow, self._seconds, selectors)
        if not flow.addresses and addresses[0].host != target.host:
            tell_step("found", ", ".join(address.host for address in addresses))
        left = max(0.0, deadline - time.monotonic())
        addresses = tuple(resolver.through_nat64(flow, addresses, selectors, left)) or addresses
        if self._outgoing.label:
            addresses = self._outgoing.fitting(addresses, flow.target)
        sock = connect(addresses, max(0.0, deadline - time.monotonic()), self._outgoing)
        self._check_peer(flow, sock)
        return Stream(sock)

    def begin(self, flow: Flow) -> PendingDial | None:
        """Begin to connect without blocking; see interfaces.routing.NonBlockingDialer.

        Returns None unless the flow has exactly one address: a lookup, or a race between
        addresses, needs a thread.  Raises DialError.
        """
        if flow.source is not None and (dialer := self._for_source(flow)) is not self:
            return dialer.begin(flow)
        if len(flow.addresses) != 1 or not flow.target.port:
            return None
        resolver, (address,) = self._target_resolver, flow.addresses
        if not self._takes_any_route:
            (address,) = resolver.reachable(flow, flow.addresses, self._selectors)
        nat64 = resolver.nat64
        if nat64 is not None:
            translated = nat64.translate_now(flow.addresses, self._selectors)
            if translated is None:
                return None
            if translated is not flow.addresses:
                (address,) = resolver.translated(flow, translated, self._selectors)
        if self._outgoing.label:
            self._outgoing.fitting((address,), flow.target)
        if resolver.guard.is_own_port(flow):
            check = partial(self._check_peer, flow)
            return _CheckedDial(address, self._seconds, self._outgoing, check)
        return PendingDial(address, self._seconds, self._outgoing)

    def fixed_for(self, flow: Flow) -> DirectDialer:
        """Return the dialer itself."""
        return self

    def dial_packet(self, flow: Flow) -> DirectPacketConn:
        """Open one UDP socket for all datagrams of a client.  Raises DialError."""
        if flow.source is not None and (dialer := self._for_source(flow)) is not self:
            return dialer.dial_packet(flow)
        try:
            sock = self._datagrams.outgoing(self._outgoing, flow)
        except OSError as error:
            reason = REASONS.get(error.errno or 0, Reason.GENERAL)
            raise DialError(reason, said=error.strerror or "no socket") from error
        return DirectPacketConn(self._target_resolver, sock, self._outgoing)

    def leaving_from(self, bind: Bind, key: str, flow: Flow) -> DirectDialer:
        """Return a dialer like this one that leaves from where a bind says for a flow.

        `key` names the bind in errors: "users.alice.bind".
        """
        from netproxy.dialer.plain.rotation import bound_options  # late: few need it

        outgoing = bound_options(self._outgoing, bind, key, flow)
        return DirectDialer(self._target_resolver, self._datagrams, self._seconds, outgoing)

    def _for_source(self, flow: Flow) -> DirectDialer:
        """Return the dialer for the bind of the flow's user or listener.

        It is this dialer if there is none, or if the upstream has a bind of its own.
        """
        source = flow.source
        if source is None or source.bind is None or self._outgoing.address or self._outgoing.device:
            return self
        dialer = self.leaving_from(source.bind, source.label, flow)
        return dialer if dialer._outgoing.address or dialer._outgoing.device else self

    def _check_peer(self, flow: Flow, sock: socket.socket) -> None:
        """Close a connected socket whose peer is this daemon itself.

        Raises DialError(LOOP), or DialError(GENERAL) if the connection has ended already.
        """
        guard = self._target_resolver.guard
        if not guard.is_own_port(flow):
            return
        try:
            guard.without_own(flow, (from_sockaddr(sock.getpeername()),), self._selectors)
        except OSError as error:
            sock.close()
            raise DialError(Reason.GENERAL, str(flow.target), error.strerror or "") from error
        except BaseException:
            sock.close()
            raise


class _CheckedDial(PendingDial):
    """A pending dial whose peer is checked when it is connected."""

    __slots__ = ("_check",)

    def __init__(
        self,
        address: Address,
        seconds: float,
        outgoing: SocketOptions,
        check: Callable[[socket.socket], None],
    ) -> None:
        """`check(sock)` closes the socket and raises DialError if the peer is not wanted."""
        super().__init__(address, seconds, outgoing)
        self._check = check

    def finish(self) -> socket.socket:
        """Return the connected socket; see PendingDial.finish()."""
        sock = super().finish()
        self._check(sock)
        return sock
