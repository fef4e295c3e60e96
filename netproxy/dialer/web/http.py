"""The upstream through an HTTP proxy: CONNECT for TCP, connect-udp (RFC 9298) for datagrams.

Target names go to the proxy unresolved.  exchange.py sends the requests.  bound_udp.py has the
stream for all targets of a client, which proxies may agree to.
"""

from __future__ import annotations

import time
from functools import partial

from netproxy.dialer.hop import Hop, ProxyDialer
from netproxy.dialer.web.bound_udp import BoundConn
from netproxy.dialer.web.exchange import (
    SWITCHING_PROTOCOLS,
    ConnectionSpent,
    Exchange,
    ProxyCredentials,
)
from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, UnixAddress, pack_ip
from netproxy.interfaces.flows import FlowCounter
from netproxy.net.frames.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import http1
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http import digest
from netproxy.protocol.http.bound_udp import parse_public_addresses
from netproxy.protocol.http.capsule import Capsules
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.dialer.web.bound_udp import Agreement
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import DirectUpstream, PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import Counter

STATUS_REASONS = {
    401: Reason.AUTHENTICATION,
    403: Reason.DENIED,
    407: Reason.AUTHENTICATION,
    504: Reason.TIMEOUT,
}
STATUS_LIMIT = 100
"""Characters of a proxy's status line that an error shows."""


class HttpDialer(ProxyDialer):
    """A dialer through an HTTP proxy."""

    resolves_names = True

    def __init__(
        self,
        hop: Hop,
        counter: Counter,
        udp: bool = True,
        credentials: ProxyCredentials | None = None,
        agreement: Agreement | None = None,
        direct: DirectUpstream | None = None,
    ) -> None:
        """`udp` is True if the proxy may be asked for connect-udp.

        `credentials` are those of another dialer through the same proxy.  `agreement` is what the
        proxy has agreed to; None: it is asked for one stream for each target.  `direct`: None if
        all datagrams go through the proxy.
        """
        super().__init__(hop)
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"})
        self._counter = counter
        self._udp = udp
        self._credentials = credentials or ProxyCredentials(hop.user, hop.password)
        self._agreement = agreement
        self._direct = direct

    @property
    def symmetric(self) -> bool:
        """True if the proxy is asked for a stream for each target."""
        return self._agreement is None or self._agreement.is_refused

    @property
    def knows_bound(self) -> bool:
        """True if the proxy may tell which address targets see."""
        return not self.symmetric

    def with_via(self, via: Dialer) -> HttpDialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        hop = self.hop._replace(via=via)
        credentials, agreement = self._credentials, self._agreement
        return HttpDialer(hop, self._counter, self._udp, credentials, agreement, self._direct)

    def with_direct(self, direct: DirectUpstream) -> HttpDialer:
        """Return a dialer like this one whose datagrams may go directly to an agent.

        It has a stream for each target: on a direct path a flow has one.
        """
        counter, udp = self._counter, self._udp
        return HttpDialer(self.hop, counter, udp, self._credentials, direct=direct)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target with CONNECT (RFC 9110 section 9.3.6).  Raises DialError."""
        authority = str(flow.target).encode()
        encode = partial(_encode_connect, authority)
        exchange = Exchange(self._credentials, (b"CONNECT", authority), encode)
        return self._open(flow, exchange, _check_connect, "")

    def dial_packet(self, flow: Flow) -> PacketConn:
        """Open a packet connection to the flow's target with connect-udp.

        It is for all targets if the proxy agrees.  Raises DialError.
        """
        if not self._udp:
            raise self.no_udp()
        target, agreement = flow.target, self._agreement
        asks = not self.symmetric and pack_ip(target.host) is not None
        if target == UNSPECIFIED_ADDRESS and not asks:
            raise self._one_target()
        server = self.hop.server
        authority = "localhost" if isinstance(server, UnixAddress) else str(server)
        wish = self._direct.wish() if self._direct is not None else None
        more = [wish] if wish is not None else []
        encode = partial(connect_udp.encode_request, target, authority, is_bound=asks, more=more)
        request = b"GET", connect_udp.encode_path(target)
        exchange = Exchange(self._credentials, request, encode)
        fields: http1.Fields = []

        def check(flow: Flow, response: http1.HttpResponse) -> None:
            _check_upgrade(flow, response)
            fields[:] = response.fields

        stream = self._open(flow, exchange, check, _connect_udp_to(flow))
        counter = FlowCounter(self._counter, flow)
        if self._direct is not None and wish is not None:
            return self._direct.connect(stream, target, counter)
        if agreement is None or not asks:
            return FramedConn(stream, Capsules(target), counter)
        if connect_udp.is_bind_offered(fields):
            conn = BoundConn(stream, target, parse_public_addresses(fields), counter)
            conn.agreement = agreement
            return conn
        agreement.note_refusal()
        if target == UNSPECIFIED_ADDRESS:
            stream.close()
            raise self._one_target()
        return FramedConn(stream, Capsules(target), counter)

    def _one_target(self) -> DialError:
        """Return the error for a connection to all targets, which the proxy does not have."""
        return DialError(Reason.UNSUPPORTED, said=f"{self.hop.label} has a stream for each target")

    def _open(
        self,
        flow: Flow,
        exchange: Exchange,
        check: Callable[[Flow, http1.HttpResponse], None],
        wanted: str,
    ) -> Stream:
        """Connect to the proxy, twice if it closes behind its challenge.  Raises DialError.

        Both handshakes together have the time limit of the hop.
        """
        seconds_left = self.hop.seconds

        def handshake(stream: Stream) -> None:
            nonlocal seconds_left
            try:
                check(flow, complete(exchange.run(stream)))
            except ConnectionSpent:
                if stream.deadline is not None:
                    seconds_left = max(0.0, stream.deadline - time.monotonic())
                raise

        try:
            return self.hop.open(flow, handshake, wanted)
        except ConnectionSpent:
            # An exchange answers one challenge, so that this cannot happen again.
            return self.hop._replace(seconds=seconds_left).open(flow, handshake, wanted)


def _encode_connect(authority: bytes, credentials: bytes) -> bytes:
    fields = [(b"Host", authority)]
    if credentials:
        fields.append((b"Proxy-Authorization", credentials))
    return http1.encode_request(http1.HttpRequest(b"CONNECT", authority, 1, fields))


def _check_connect(flow: Flow, response: http1.HttpResponse) -> None:
    # A length or a coding in a 2xx response to CONNECT has no meaning (section 9.3.6).
    if response.status == SWITCHING_PROTOCOLS:
        raise ProtocolError("the proxy answered CONNECT with 101")
    if response.status >= 300:
        reason = STATUS_REASONS.get(response.status, Reason.GENERAL)
        raise _refusal(response, reason, str(flow.target), _status_line(response))


def _check_upgrade(flow: Flow, response: http1.HttpResponse) -> None:
    if response.status >= 300:
        error = connect_udp.proxy_error(response)
        reason = connect_udp.REASONS.get(error) or STATUS_REASONS.get(
            response.status, Reason.UNSUPPORTED
        )
        said = _status_line(response) + (f" ({error})" if error else "")
        raise _refusal(response, reason, _connect_udp_to(flow), said)
    connect_udp.check_response(response)


def _refusal(response: http1.HttpResponse, reason: Reason, wanted: str, said: str) -> DialError:
    """Return the error for a response; 401 and 407 are about our credentials, not the target."""
    if STATUS_REASONS.get(response.status) is not Reason.AUTHENTICATION:
        return DialError(reason, wanted, said)
    values = http1.field_values(response.fields, b"proxy-authenticate")
    schemes = [scheme for scheme, _ in digest.parse_challenges(values)]
    if schemes and b"basic" not in schemes and digest.choose_challenge(values) is None:
        names = b", ".join(schemes).decode("ascii")[:STATUS_LIMIT]
        said += f" (it offers {names}, which is not supported)"
    return DialError(Reason.AUTHENTICATION, said=said)


def _connect_udp_to(flow: Flow) -> str:
    return f"connect-udp to {flow.target}"


def _status_line(response: http1.HttpResponse) -> str:
    return f"{response.status} {response.phrase.decode('latin-1').lower()}".rstrip()[:STATUS_LIMIT]
