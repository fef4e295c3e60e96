"""The upstream without a proxy: TCP and UDP from this machine's own sockets.

Every chain of proxies begins with a DirectDialer.  OSError becomes DialError here and in
net.connect.  Dials run on the thread that asks, and block.

A connection to a port of the daemon's own is checked again once it is made: the address may
have become this machine's since it was permitted.
"""

from __future__ import annotations

import math
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Hashable, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.routing import NonBlockingDialer
from netproxy.interfaces.bounded import BoundedDict
from netproxy.interfaces.routing import ANY_ROUTE, RouteSelectors
from netproxy.net.address import from_sockaddr
from netproxy.net.connect import REASONS, PendingDial, connect
from netproxy.net.socket_options import DEFAULT_OPTIONS, SocketOptions
from netproxy.net.stream import Stream

if TYPE_CHECKING:
    import socket

    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Batch, Run
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import DestinationGuard, Nat64, Resolver
    from netproxy.net.datagram import Destination
    from netproxy.net.datagram_socket import DatagramSocket
    from netproxy.net.udp_sockets import UdpSocketFactory

DIRECT = "direct"
"""The upstream's name, in logs and rules."""
ORIGINALS_LIMIT = 4096
"""IPv4 targets of one packet connection whose translated addresses are kept, as many as a
session has entries."""


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
        self._selectors = RouteSelectors(outgoing.mark, outgoing.device, outgoing.address)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target; of several addresses the first to answer wins.

        Blocks.  Raises DialError.
        """
        target = flow.target
        if not target.port:
            raise DialError(Reason.REFUSED, f"{target}: port 0")
        deadline = time.monotonic() + self._seconds
        resolver, selectors = self._target_resolver, self._selectors
        addresses = resolver.addresses(flow, self._seconds, selectors)
        left = max(0.0, deadline - time.monotonic())
        addresses = tuple(resolver.through_nat64(flow, addresses, selectors, left)) or addresses
        sock = connect(addresses, max(0.0, deadline - time.monotonic()), self._outgoing)
        self._check_peer(flow, sock)
        return Stream(sock)

    def begin(self, flow: Flow) -> PendingDial | None:
        """Begin to connect without blocking; see interfaces.routing.NonBlockingDialer.

        Returns None unless the flow has exactly one address: a lookup, or a race between
        addresses, needs a thread.  Raises DialError(LOOP).
        """
        if len(flow.addresses) != 1 or not flow.target.port:
            return None
        (address,) = self._target_resolver.reachable(flow, flow.addresses, self._selectors)
        nat64 = self._target_resolver.nat64
        if nat64 is not None:
            translated = nat64.translate_now(flow.addresses, self._selectors)
            if translated is None:
                return None
            if translated is not flow.addresses:
                resolver = self._target_resolver
                (address,) = resolver.translated(flow, translated, self._selectors)
        if self._target_resolver.guard.is_own_port(flow):
            check = partial(self._check_peer, flow)
            return _CheckedDial(address, self._seconds, self._outgoing, check)
        return PendingDial(address, self._seconds, self._outgoing)

    def fixed_for(self, flow: Flow) -> DirectDialer:
        """Return the dialer itself."""
        return self

    def dial_packet(self, flow: Flow) -> DirectPacketConn:
        """Open one UDP socket for all datagrams of a client.  Raises DialError."""
        try:
            sock = self._datagrams.outgoing(self._outgoing)
        except OSError as error:
            reason = REASONS.get(error.errno or 0, Reason.GENERAL)
            raise DialError(reason, error.strerror or "no socket") from error
        return DirectPacketConn(self._target_resolver, sock, self._selectors)

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


class DirectPacketConn:
    """A packet connection over one UDP socket, so that all targets see the same port."""

    member = ""
    __slots__ = (
        *("_target_resolver", "_socket", "_selectors", "_originals", "_lock"),
        *("send", "wait", "receive", "shutdown", "close"),
    )

    def __init__(
        self, target_resolver: TargetResolver, sock: DatagramSocket, selectors: RouteSelectors
    ) -> None:
        self._target_resolver = target_resolver
        self._socket = sock
        self._selectors = selectors
        # The IPv4 addresses of targets by the addresses that lead to them through a NAT64.
        # Workers put, each with the lock; the reader gets.
        self._originals: BoundedDict[str, str] = BoundedDict(ORIGINALS_LIMIT)
        self._lock = threading.Lock()
        # The socket's own methods: no datagram pays for a call in between.
        # Any: each kind of socket has arenas and destinations of its own.
        self.send: Callable[[Any, Run, Any], None] = sock.send
        self.receive: Callable[[Any], Batch] = sock.receive
        self.wait = sock.wait
        self.shutdown = sock.shutdown
        self.close = sock.close

    def prepare(self, flow: Flow) -> Destination:
        """Return the destination for the flow's target.

        May block for a name lookup.  Raises DialError, for instance for an IPv6 target on a
        machine without IPv6.
        """
        failure: ValueError | None = None
        resolver, selectors = self._target_resolver, self._selectors
        addresses = resolver.addresses(flow, selectors=selectors)
        originals = resolver.through_nat64(flow, addresses, selectors)
        for address in originals or addresses:
            try:
                destination: Destination = self._socket.destination(address)
            except ValueError as error:
                failure = error
                continue
            if originals:
                with self._lock:
                    self._originals.put(address.host, originals[address].host)
            return destination
        raise DialError(Reason.NETWORK_UNREACHABLE, str(failure))

    def source(self, peer: Hashable) -> Address:
        """Return the address that the key of a span stands for."""
        address = from_sockaddr(self._socket.peer(peer))
        if self._originals:
            address = address._replace(host=self._originals.get(address.host, address.host))
        return address
