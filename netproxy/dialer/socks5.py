"""The upstream through a SOCKS5 proxy (RFC 1928): CONNECT for TCP, UDP ASSOCIATE for datagrams.

The login is a username and a password (RFC 1929), or none.  dialer.socks5_udp carries the
datagrams of an association.
"""

from __future__ import annotations

from functools import partial

from netproxy.dialer.direct import DIRECT, TargetResolver
from netproxy.dialer.group import MEMBER_TRIES
from netproxy.dialer.hop import Hop, ProxyDialer
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.dialer.socks5_udp import Socks5PacketConn
from netproxy.errors import DeadlineError, DialError, EndOfStream, Reason, StreamError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.address import is_unspecified
from netproxy.net.stream import complete
from netproxy.protocol import socks5
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer

ASSOCIATE = "UDP ASSOCIATE"
"""The name of the request in errors."""


class Socks5Dialer(ProxyDialer):
    """A dialer through a SOCKS5 proxy."""

    def __init__(
        self,
        hop: Hop,
        target_resolver: TargetResolver | None,
        dependencies: PacketDependencies,
        udp: bool = True,
    ) -> None:
        """`target_resolver` looks names up (socks5); None leaves them to the proxy (socks5h).

        `udp` is True if the proxy may be asked for UDP associations.
        """
        super().__init__(hop)
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"}) & hop.via.carries
        self.resolves_names = target_resolver is None
        self._target_resolver = target_resolver
        self._dependencies = dependencies
        self._udp = udp

    def with_via(self, via: Dialer) -> Socks5Dialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        hop = self.hop._replace(via=via)
        return Socks5Dialer(hop, self._target_resolver, self._dependencies, self._udp)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target with CONNECT.  Raises DialError."""
        resolver = self._target_resolver
        target = flow.target if resolver is None else resolver.addresses(flow)[0]
        return self.hop.open(flow, partial(_connect, self.hop, target))

    def dial_packet(self, flow: Flow) -> Socks5PacketConn:
        """Open a UDP association for all datagrams of a client.  Raises DialError.

        The proxy accepts datagrams only from where the control connection comes from (RFC 1928
        section 7).  Both must pass the same members of the groups before the proxy, so the
        members are fixed first.  If they fail, the groups choose others.
        """
        if "udp" not in self.carries:
            raise self.no_udp()
        hop = self.hop.fixed_for(flow)
        for _ in range(0 if hop is self.hop else MEMBER_TRIES - 1):
            try:
                return self._open(hop, flow)
            except DialError as error:
                if not error.upstream:
                    raise
                # The member that failed now backs off, so that the group chooses another one.
                hop = self.hop.fixed_for(flow)
        return self._open(hop, flow)

    def _open(self, hop: Hop, flow: Flow) -> Socks5PacketConn:
        counter = FlowCounter(self._dependencies.counter, flow)
        dependencies = self._dependencies._replace(counter=counter)
        return Socks5PacketConn(UdpAssociator(hop, flow), self._target_resolver, dependencies)


class UdpAssociator:
    """Opens UDP associations at one proxy for one client (socks5_udp.RelaySource)."""

    def __init__(self, hop: Hop, flow: Flow) -> None:
        """`flow` is any flow of the client."""
        self._hop = hop
        self._flow = flow

    def associate(self) -> tuple[Stream, Address]:
        """Return a control connection with an association, and the address of its relay.

        Raises DialError.
        """
        bound = UNSPECIFIED_ADDRESS

        def handshake(stream: Stream) -> None:
            nonlocal bound
            bound = _associate(self._hop, stream)

        stream = self._hop.open(self._flow, handshake, ASSOCIATE)
        if is_unspecified(bound.host):
            # The proxy means the address that the control connection has reached.
            try:
                is_first = self._hop.via.name == DIRECT
                host = stream.peer_address().host if is_first else self._hop.server.host
            except StreamError as error:
                stream.close()
                raise DialError(Reason.GENERAL, self._hop.label, str(error)) from error
            bound = bound._replace(host=host)
        return stream, bound

    def dial_relay(self, relay: Address) -> PacketConn:
        """Open a packet connection to a relay, through the hop before the proxy.

        Raises DialError.
        """
        return self._hop.via.dial_packet(self._flow.to_hop(relay, "udp"))


def _associate(hop: Hop, stream: Stream) -> Address:
    """Request an association and return the address in the reply, which may be unspecified."""
    _log_in(hop, stream)
    # The request names no address: the proxy may see another one than this machine knows.
    stream.write(socks5.encode_request(socks5.UDP_ASSOCIATE, UNSPECIFIED_ADDRESS))
    reply, bound = complete(socks5.read_reply(stream))
    if reply != socks5.SUCCEEDED:
        raise DialError(socks5.REASONS.get(reply, Reason.GENERAL), ASSOCIATE)
    return bound


def _connect(hop: Hop, target: Address, stream: Stream) -> None:
    _log_in(hop, stream)
    stream.write(socks5.encode_request(socks5.CONNECT, target))
    try:
        complete(stream.peek())
    except DeadlineError as error:
        # The proxy has answered the login and is silent now: the target is at fault.
        raise DialError(Reason.TIMEOUT, str(target)) from error
    except EndOfStream:
        # read_reply() raises it again.
        pass
    reply, _ = complete(socks5.read_reply(stream))
    if reply != socks5.SUCCEEDED:
        raise DialError(socks5.REASONS.get(reply, Reason.GENERAL), str(target))


def _log_in(hop: Hop, stream: Stream) -> None:
    """Negotiate the method (RFC 1928 section 3) and send the credentials (RFC 1929)."""
    method = socks5.USERNAME_PASSWORD if hop.user else socks5.NO_AUTHENTICATION
    stream.write(socks5.encode_methods(bytes((method,))))
    if complete(socks5.read_method(stream)) != method:
        kind = "username and password" if hop.user else "access without a login"
        raise DialError(Reason.AUTHENTICATION, f"{kind} not accepted")
    if hop.user:
        stream.write(socks5.encode_credentials(hop.user, hop.password))
        if not complete(socks5.read_credentials_status(stream)):
            raise DialError(Reason.AUTHENTICATION)
