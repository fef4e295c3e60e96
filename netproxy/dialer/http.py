"""The way out through an HTTP proxy: CONNECT, and for datagrams an upgrade to connect-udp (RFC 9298)."""

from __future__ import annotations

import base64

from netproxy.dialer.hop import Hop
from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.framed import FramedConn
from netproxy.net.stream import Stream, complete
from netproxy.protocol import connect_udp, http1
from netproxy.protocol.capsule import Capsules

STATUS_REASONS = {403: Reason.DENIED, 407: Reason.AUTHENTICATION, 504: Reason.TIMEOUT}
STATUS_LIMIT = 100  # characters of a proxy's own words in a message


class HttpDialer:
    """Names go to the proxy as they are."""

    refusal = Reason.UNSUPPORTED
    resolves_names = True
    symmetric = True  # a connection for connect-udp has one target

    def __init__(self, hop: Hop, counter: Counter, udp: bool = True) -> None:
        """`udp`: the proxy may be asked for connect-udp."""
        self.name = hop.name
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"})
        self._hop = hop
        self._counter = counter

    def dial(self, flow: Flow) -> Stream:
        return self._hop.open(flow, lambda stream: self._connect(stream, flow))

    def fixed_for(self, flow: Flow) -> HttpDialer:
        return self._hop.fixed_for(self, flow)

    def dial_packet(self, flow: Flow) -> FramedConn:
        if "udp" not in self.carries:
            raise DialError(Reason.UNSUPPORTED, said=f"{self._hop.label} carries no UDP")
        stream = self._hop.open(flow, lambda stream: self._upgrade(stream, flow), _wanted(flow))
        return FramedConn(stream, Capsules(flow.target), self._counter)

    def _connect(self, stream: Stream, flow: Flow) -> None:
        """Sends nothing behind the request before the answer is read (RFC 9931)."""
        authority = str(flow.target).encode()
        fields = [(b"Host", authority)]
        if self._hop.user:
            fields.append((b"Proxy-Authorization", self._authorization()))
        stream.write(http1.encode_request(http1.HttpRequest(b"CONNECT", authority, 1, fields)))
        response = _final_response(stream)
        # a length or coding in a 2xx answer to CONNECT means nothing (RFC 9110 section 9.3.6)
        if response.status == 101:
            raise ProtocolError("it switches protocols unasked")
        if response.status >= 300:
            reason = STATUS_REASONS.get(response.status, Reason.GENERAL)
            raise DialError(
                reason, "" if response.status == 407 else str(flow.target), _status_line(response)
            )

    def _upgrade(self, stream: Stream, flow: Flow) -> None:
        stream.write(
            connect_udp.encode_request(flow.target, str(self._hop.server), self._authorization())
        )
        response = _final_response(stream)
        if response.status >= 300:
            error = connect_udp.proxy_error(response)
            reason = (
                Reason.AUTHENTICATION
                if response.status == 407
                else (
                    connect_udp.REASONS.get(error)
                    or STATUS_REASONS.get(response.status, Reason.UNSUPPORTED)
                )
            )
            raise DialError(
                reason,
                "" if response.status == 407 else _wanted(flow),
                _status_line(response) + (f" ({error})" if error else ""),
            )
        connect_udp.check_response(response)

    def _authorization(self) -> bytes:
        if not self._hop.user:
            return b""
        return b"Basic " + base64.b64encode(f"{self._hop.user}:{self._hop.password}".encode())


def _wanted(flow: Flow) -> str:
    return f"connect-udp to {flow.target}"


def _final_response(stream: Stream) -> http1.HttpResponse:
    """The answer that is not an interim one; 101 is final."""
    while True:
        response = complete(http1.read_response(stream))
        if response.status >= 200 or response.status == 101:
            return response


def _status_line(response: http1.HttpResponse) -> str:
    return f"{response.status} {response.phrase.decode('latin-1').lower()}".rstrip()[:STATUS_LIMIT]
