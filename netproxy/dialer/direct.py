"""The way out that needs no other proxy: this machine's own sockets."""

from __future__ import annotations

import math
import time
from typing import Hashable, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import DestinationGuard, Resolver
from netproxy.net.address import from_sockaddr
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.connect import DEFAULT_OPTIONS, REASONS, PendingDial, SocketOptions, connect
from netproxy.net.datagram import Destination
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream

DIRECT = "direct"  # its name, in logs and rules


class TargetResolver(NamedTuple):
    """Where a flow may be dialled to: what the router has found, else, for servers of proxies, what is looked up here."""

    resolver: Resolver
    guard: DestinationGuard

    def addresses(self, flow: Flow, seconds: float = math.inf) -> Sequence[Address]:
        """DialError."""
        return flow.addresses or self.guard.permitted(
            flow, self.resolver.resolve(flow.target, seconds)
        )


class DirectDialer:
    name = DIRECT
    carries = frozenset({"tcp", "udp", "bind"})
    refusal = Reason.UNSUPPORTED
    symmetric = False
    resolves_names = False

    def __init__(
        self,
        reach: TargetResolver,
        datagrams: UdpSocketFactory,
        seconds: float,
        outgoing: SocketOptions = DEFAULT_OPTIONS,
    ) -> None:
        """`seconds` for a connection in total, its name's lookup included if it is made here."""
        self._outgoing = outgoing
        self._reach = reach
        self._datagrams = datagrams
        self._seconds = seconds

    def dial(self, flow: Flow) -> Stream:
        target = flow.target
        if not target.port:
            raise DialError(Reason.REFUSED, f"{target}: port 0")
        deadline = time.monotonic() + self._seconds
        addresses = self._reach.addresses(flow, self._seconds)
        return Stream(connect(addresses, max(0.0, deadline - time.monotonic()), self._outgoing))

    def begin(self, flow: Flow) -> PendingDial | None:
        """The same as dial(), begun and not waited for; None where there is more to do than to connect to one address."""
        if len(flow.addresses) != 1 or not flow.target.port:
            return None
        return PendingDial(flow.addresses[0], self._seconds, self._outgoing)

    def fixed_for(self, flow: Flow) -> DirectDialer:
        return self

    def dial_packet(self, flow: Flow) -> DirectPacketConn:
        try:
            return DirectPacketConn(self._reach, self._datagrams.outgoing(self._outgoing))
        except OSError as error:
            raise DialError(
                REASONS.get(error.errno, Reason.GENERAL), error.strerror or "no socket"
            ) from error


class DirectPacketConn:
    """One UDP socket, hence one port, for all targets of one client.  The twin of Stream for datagrams."""

    __slots__ = ("_reach", "_socket", "send", "wait", "receive", "shutdown", "close")

    def __init__(self, reach: TargetResolver, sock: DatagramSocket) -> None:
        self._reach = reach
        self._socket = sock
        # nothing is added to what the socket does, so nothing is put in its way
        self.send = self._socket.send
        self.wait = self._socket.wait
        self.receive = self._socket.receive
        self.shutdown = self._socket.shutdown
        self.close = self._socket.close

    def prepare(self, flow: Flow) -> Destination:
        failure: ValueError | None = None
        for address in self._reach.addresses(flow):
            try:
                return self._socket.destination(address)
            except ValueError as error:  # IPv6 on a machine that has none
                failure = error
        raise DialError(Reason.NETWORK_UNREACHABLE, str(failure))

    def source(self, peer: Hashable) -> Address:
        return from_sockaddr(self._socket.peer(peer))
