"""The way out through a SOCKS5 proxy, TCP and UDP."""

from __future__ import annotations

from netproxy.dialer.direct import DIRECT, TargetResolver
from netproxy.dialer.group import TRIES
from netproxy.dialer.hop import Hop, Services
from netproxy.dialer.socks5_udp import Socks5PacketConn
from netproxy.errors import DeadlineError, DialError, EndOfStream, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketConn
from netproxy.interfaces.flows import Flow
from netproxy.net.address import is_unspecified
from netproxy.net.stream import Stream, complete
from netproxy.protocol import socks5

ASSOCIATE = "UDP ASSOCIATE"  # in errors
UNSPECIFIED_ADDRESS = Address(
    "0.0.0.0", 0
)  # a hint that says nothing: our port may look different from there


class Socks5Dialer:
    """`reach` finds where names are (socks5); None leaves them to the proxy (socks5h)."""

    refusal = Reason.UNSUPPORTED
    symmetric = False

    def __init__(
        self, hop: Hop, reach: TargetResolver | None, services: Services, udp: bool = True
    ) -> None:
        """`udp`: the proxy may be asked for associations."""
        self.name = hop.name
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"}) & hop.via.carries
        self._hop = hop
        self.resolves_names = reach is None
        self._reach = reach
        self._services = services

    def dial(self, flow: Flow) -> Stream:
        target = flow.target if self._reach is None else self._reach.addresses(flow)[0]
        return self._hop.open(flow, lambda stream: self._connect(stream, target))

    def fixed_for(self, flow: Flow) -> Socks5Dialer:
        return self._hop.fixed_for(self, flow)

    def dial_packet(self, flow: Flow) -> Socks5PacketConn:
        if "udp" not in self.carries:
            raise DialError(Reason.UNSUPPORTED, said=f"{self._hop.label} carries no UDP")

        # the proxy must see its datagrams come from where the control connection comes
        way = self.fixed_for(flow)
        for _ in range(TRIES - 1 if way is not self else 0):
            try:
                return way._open(flow)
            except DialError as error:
                if not error.upstream:
                    raise
                way = self.fixed_for(flow)  # the member that failed rests, and another is chosen
        return way._open(flow)

    def _open(self, flow: Flow) -> Socks5PacketConn:
        def reach(relay: Address) -> PacketConn:
            return self._hop.via.dial_packet(flow.to_hop(relay, "udp"))

        return Socks5PacketConn(
            lambda: self._associate(flow),
            reach,
            self._reach and self._reach.addresses,
            self._services,
        )

    def _associate(self, flow: Flow) -> tuple[Stream, Address]:
        """A control connection with an association, and the address of its relay."""
        bound = UNSPECIFIED_ADDRESS

        def ask(stream: Stream) -> None:
            nonlocal bound
            self._authenticate(stream)
            stream.write(socks5.encode_request(socks5.UDP_ASSOCIATE, UNSPECIFIED_ADDRESS))
            reply, bound = complete(socks5.read_reply(stream))
            if reply != socks5.SUCCEEDED:
                raise DialError(socks5.REASONS.get(reply, Reason.GENERAL), ASSOCIATE)

        stream = self._hop.open(flow, ask, ASSOCIATE)
        if is_unspecified(bound.host):  # the proxy means: where you have reached me
            try:
                near = self._hop.via.name == DIRECT
                bound = bound._replace(
                    host=stream.peer_address().host if near else self._hop.server.host
                )
            except StreamError as error:
                stream.close()
                raise DialError(Reason.GENERAL, self._hop.label, str(error)) from error
        return stream, bound

    def _connect(self, stream: Stream, target: Address) -> None:
        self._authenticate(stream)
        stream.write(socks5.encode_request(socks5.CONNECT, target))
        try:
            complete(stream.peek())
        except (
            DeadlineError
        ) as error:  # it has spoken to us, and not begun to answer: what is silent is the target
            raise DialError(Reason.TIMEOUT, str(target)) from error
        except EndOfStream:
            pass  # as the next line will tell
        reply, _ = complete(socks5.read_reply(stream))
        if reply != socks5.SUCCEEDED:
            raise DialError(socks5.REASONS.get(reply, Reason.GENERAL), str(target))

    def _authenticate(self, stream: Stream) -> None:
        hop = self._hop
        wanted = socks5.USERNAME_PASSWORD if hop.user else socks5.NO_AUTHENTICATION
        stream.write(socks5.encode_methods(bytes((wanted,))))
        if complete(socks5.read_method(stream)) != wanted:
            raise DialError(
                Reason.AUTHENTICATION,
                "it takes no " + ("password" if hop.user else "anonymous client"),
            )
        if hop.user:
            stream.write(socks5.encode_credentials(hop.user, hop.password))
            if not complete(socks5.read_credentials_status(stream)):
                raise DialError(Reason.AUTHENTICATION)
