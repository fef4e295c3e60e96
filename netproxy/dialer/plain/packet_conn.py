"""A packet connection without a proxy, over a UDP socket of this machine.

Thread: a session's reader receives; any thread prepares and sends.
"""

from __future__ import annotations

import threading

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.bounded import BoundedDict
from netproxy.net.address import from_sockaddr
from netproxy.typed import TYPE_CHECKING, Any, Callable, Hashable, Sequence

if TYPE_CHECKING:
    from netproxy.dialer.direct import TargetResolver
    from netproxy.interfaces.datagrams import Batch, Deliverer, Run
    from netproxy.interfaces.flows import Flow
    from netproxy.net.datagram import Destination
    from netproxy.net.datagram_socket import DatagramSocket
    from netproxy.net.socket_options import SocketOptions

ORIGINALS_LIMIT = 4096
"""IPv4 targets of one packet connection whose translated addresses are kept, as many as a
session has entries."""


class DirectPacketConn:
    """A packet connection over one UDP socket, so that all targets see the same port."""

    member = ""
    deliverer: Deliverer | None = None
    __slots__ = (
        *("_target_resolver", "_socket", "_outgoing", "_selectors", "_originals", "_lock"),
        *("send", "wait", "receive", "shutdown", "close"),
    )

    def __init__(
        self, target_resolver: TargetResolver, sock: DatagramSocket, outgoing: SocketOptions
    ) -> None:
        """Take over a socket that was opened with the options `outgoing`."""
        self._target_resolver = target_resolver
        self._socket = sock
        self._outgoing = outgoing
        self._selectors = outgoing.selectors
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

    @property
    def bound(self) -> Sequence[Address]:
        """The address of the socket; an unspecified one has a port of both families."""
        host, port = self._socket.address
        hosts = ("0.0.0.0", host) if host == "::" else (host,)
        return [Address(host, port) for host in hosts]

    def reaches(self, target: Address) -> bool:
        """Return True: one socket reaches all targets."""
        return True

    def prepare(self, flow: Flow) -> Destination:
        """Return the destination for the flow's target.

        May block for a name lookup.  Raises DialError, for instance for an IPv6 target on a
        machine without IPv6.
        """
        failure: ValueError | None = None
        resolver, selectors = self._target_resolver, self._selectors
        addresses = resolver.addresses(flow, selectors=selectors)
        originals = resolver.through_nat64(flow, addresses, selectors)
        addresses = tuple(originals) or addresses
        if self._outgoing.label:
            addresses = self._outgoing.fitting(addresses, flow.target)
        for address in addresses:
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
