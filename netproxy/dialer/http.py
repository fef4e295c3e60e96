"""The upstream through an HTTP proxy: CONNECT for TCP, connect-udp (RFC 9298) for datagrams.

Nothing is sent behind a request before the proxy has answered (RFC 9931).  Target names go to
the proxy unresolved.
"""

from __future__ import annotations

import binascii
from functools import partial
from typing import TYPE_CHECKING

from netproxy.dialer.hop import Hop, ProxyDialer
from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.net.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import connect_udp, http1
from netproxy.protocol.capsule import Capsules

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import Counter

STATUS_REASONS = {403: Reason.DENIED, 407: Reason.AUTHENTICATION, 504: Reason.TIMEOUT}
STATUS_LIMIT = 100
"""Characters of a proxy's status line that an error shows."""
SWITCHING_PROTOCOLS = 101
AUTHENTICATION_REQUIRED = 407


class HttpDialer(ProxyDialer):
    """A dialer through an HTTP proxy."""

    resolves_names = True
    # A connection for connect-udp has one target.
    symmetric = True

    def __init__(self, hop: Hop, counter: Counter, udp: bool = True) -> None:
        """`udp` is True if the proxy may be asked for connect-udp."""
        super().__init__(hop)
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"})
        self._counter = counter
        self._udp = udp

    def with_via(self, via: Dialer) -> HttpDialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        return HttpDialer(self.hop._replace(via=via), self._counter, self._udp)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target with CONNECT (RFC 9110 section 9.3.6).  Raises DialError."""
        return self.hop.open(flow, partial(self._connect, flow))

    def dial_packet(self, flow: Flow) -> FramedConn:
        """Open a packet connection to the flow's target with connect-udp.  Raises DialError."""
        if not self._udp:
            raise self.no_udp()
        stream = self.hop.open(flow, partial(self._upgrade, flow), _connect_udp_to(flow))
        return FramedConn(stream, Capsules(flow.target), self._counter)

    def _connect(self, flow: Flow, stream: Stream) -> None:
        authority = str(flow.target).encode()
        fields = [(b"Host", authority)]
        if self.hop.user:
            fields.append((b"Proxy-Authorization", self._authorization()))
        stream.write(http1.encode_request(http1.HttpRequest(b"CONNECT", authority, 1, fields)))
        response = _final_response(stream)
        # A length or a coding in a 2xx response to CONNECT has no meaning (section 9.3.6).
        if response.status == SWITCHING_PROTOCOLS:
            raise ProtocolError("the proxy answered CONNECT with 101")
        if response.status >= 300:
            reason = STATUS_REASONS.get(response.status, Reason.GENERAL)
            raise _refusal(response, reason, str(flow.target), _status_line(response))

    def _upgrade(self, flow: Flow, stream: Stream) -> None:
        request = connect_udp.encode_request(
            flow.target, str(self.hop.server), self._authorization()
        )
        stream.write(request)
        response = _final_response(stream)
        if response.status >= 300:
            error = connect_udp.proxy_error(response)
            reason = connect_udp.REASONS.get(error) or STATUS_REASONS.get(
                response.status, Reason.UNSUPPORTED
            )
            said = _status_line(response) + (f" ({error})" if error else "")
            raise _refusal(response, reason, _connect_udp_to(flow), said)
        connect_udp.check_response(response)

    def _authorization(self) -> bytes:
        """Return the credentials of Basic authentication (RFC 7617), b"" without a user."""
        if not self.hop.user:
            return b""
        return b"Basic " + binascii.b2a_base64(
            f"{self.hop.user}:{self.hop.password}".encode(), newline=False
        )


def _refusal(response: http1.HttpResponse, reason: Reason, wanted: str, said: str) -> DialError:
    """Return the error for a response; 407 is about the client's credentials, not the target."""
    if response.status == AUTHENTICATION_REQUIRED:
        return DialError(Reason.AUTHENTICATION, said=said)
    return DialError(reason, wanted, said)


def _connect_udp_to(flow: Flow) -> str:
    return f"connect-udp to {flow.target}"


def _final_response(stream: Stream) -> http1.HttpResponse:
    """Return the first response that is not interim (RFC 9110 section 15.2); 101 is final."""
    while True:
        response = complete(http1.read_response(stream))
        if response.status >= 200 or response.status == SWITCHING_PROTOCOLS:
            return response


def _status_line(response: http1.HttpResponse) -> str:
    return f"{response.status} {response.phrase.decode('latin-1').lower()}".rstrip()[:STATUS_LIMIT]
