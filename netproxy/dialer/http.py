"""The upstream through an HTTP proxy: CONNECT for TCP, connect-udp (RFC 9298) for datagrams.

Nothing is sent behind a request before the proxy has answered (RFC 9931).  Target names go to
the proxy unresolved.  A request has the credentials of Basic; a proxy that wants Digest alone
gets that, and each further connection begins with the nonce that the proxy has accepted.
"""

from __future__ import annotations

import binascii
import itertools
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Callable

from netproxy.dialer.hop import Hop, ProxyDialer
from netproxy.errors import DeadlineError, DialError, ProtocolError, Reason, StreamError
from netproxy.net.framed import FramedConn
from netproxy.net.stream import complete
from netproxy.protocol import connect_udp, digest, http1
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.http1_message import Body, response_framing

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps, Stream
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
SWITCHING_PROTOCOLS = 101
AUTHENTICATION_REQUIRED = 407
REFUSAL_LIMIT = 65536
"""Bytes of the body of a 407 that are read so that the connection can be used again."""


class HttpDialer(ProxyDialer):
    """A dialer through an HTTP proxy."""

    resolves_names = True
    # A connection for connect-udp has one target.
    symmetric = True

    def __init__(
        self,
        hop: Hop,
        counter: Counter,
        udp: bool = True,
        credentials: ProxyCredentials | None = None,
    ) -> None:
        """`udp` is True if the proxy may be asked for connect-udp.

        `credentials` are those of another dialer through the same proxy.
        """
        super().__init__(hop)
        self.carries = frozenset({"tcp", "udp"} if udp else {"tcp"})
        self._counter = counter
        self._udp = udp
        self._credentials = credentials or ProxyCredentials(hop.user, hop.password)

    def with_via(self, via: Dialer) -> HttpDialer:
        """Return a dialer like this one that reaches its proxy through `via`."""
        hop = self.hop._replace(via=via)
        return HttpDialer(hop, self._counter, self._udp, self._credentials)

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target with CONNECT (RFC 9110 section 9.3.6).  Raises DialError."""
        authority = str(flow.target).encode()
        encode = partial(_encode_connect, authority)
        exchange = _Exchange(self._credentials, (b"CONNECT", authority), encode)
        return self._open(flow, exchange, _check_connect, "")

    def dial_packet(self, flow: Flow) -> FramedConn:
        """Open a packet connection to the flow's target with connect-udp.  Raises DialError."""
        if not self._udp:
            raise self.no_udp()
        encode = partial(connect_udp.encode_request, flow.target, str(self.hop.server))
        request = b"GET", connect_udp.encode_path(flow.target)
        exchange = _Exchange(self._credentials, request, encode)
        stream = self._open(flow, exchange, _check_upgrade, _connect_udp_to(flow))
        return FramedConn(stream, Capsules(flow.target), self._counter)

    def _open(
        self,
        flow: Flow,
        exchange: _Exchange,
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
            except _ConnectionSpent:
                if stream.deadline is not None:
                    seconds_left = max(0.0, stream.deadline - time.monotonic())
                raise

        try:
            return self.hop.open(flow, handshake, wanted)
        except _ConnectionSpent:
            # An exchange answers one challenge, so that this cannot happen again.
            return self.hop._replace(seconds=seconds_left).open(flow, handshake, wanted)


class ProxyCredentials:
    """The credentials for one proxy, and what it has accepted of them.  Thread: any."""

    def __init__(self, user: str, password: str) -> None:
        """Without a `user` there are none."""
        self.login = digest.Credentials(user, password)
        # The nonce that the proxy has accepted last; None while it takes Basic.  Replaced as a
        # whole.
        self.nonce: _Nonce | None = None

    def encode(self, nonce: _Nonce | None, request: tuple[bytes, bytes]) -> bytes:
        """Return the credentials of Digest with `nonce`, else of Basic (RFC 7617); b"" if none."""
        user, password = self.login
        if not user:
            return b""
        if nonce is not None:
            return nonce.answer(self.login, request)
        return b"Basic " + binascii.b2a_base64(f"{user}:{password}".encode(), newline=False)


class _Nonce:
    """A challenge of a proxy, and how often it has been answered."""

    def __init__(self, challenge: digest.Challenge) -> None:
        self._challenge = challenge
        self._client_nonce = os.urandom(16).hex().encode()
        # next() is atomic: a nonce must not have the same count twice.
        self._counts = itertools.count(1)

    def answer(self, login: digest.Credentials, request: tuple[bytes, bytes]) -> bytes:
        count = next(self._counts)
        return digest.encode_credentials(self._challenge, login, request, count, self._client_nonce)


class _ConnectionSpent(Exception):
    """The proxy has asked for Digest, and takes no second request on the connection."""


class _Exchange:
    """A request to the proxy and its answer; sent a second time if the proxy wants Digest."""

    def __init__(
        self,
        credentials: ProxyCredentials,
        request: tuple[bytes, bytes],
        encode: Callable[[bytes], bytes],
    ) -> None:
        """`request` is method and target; `encode` gives the head with some credentials."""
        self._credentials = credentials
        self._request = request
        self._encode = encode
        self._nonce = credentials.nonce
        # True once a challenge of this exchange is answered.
        self._answered = False

    def run(self, stream: Stream) -> Steps[http1.HttpResponse]:
        """Return the response.

        Raises _ConnectionSpent if the request must be sent again on a new connection.
        """
        response = yield from self._send(stream)
        if response.status == AUTHENTICATION_REQUIRED and self._accept_challenge(response):
            try:
                if not (yield from _read_refusal(stream, response)):
                    raise _ConnectionSpent
                response = yield from self._send(stream)
            except DeadlineError:
                raise
            except (ProtocolError, StreamError) as error:
                raise _ConnectionSpent from error
        if response.status != AUTHENTICATION_REQUIRED:
            # Not shared before: a proxy may refuse a nonce whose counts come in another order.
            self._credentials.nonce = self._nonce
        return response

    def _send(self, stream: Stream) -> Steps[http1.HttpResponse]:
        """Send the request; return the first response that is not interim; 101 is final."""
        credentials = self._credentials.encode(self._nonce, self._request)
        yield from stream.write_all(self._encode(credentials))
        while True:
            response = yield from http1.read_response(stream)
            if response.status >= 200 or response.status == SWITCHING_PROTOCOLS:
                return response

    def _accept_challenge(self, response: http1.HttpResponse) -> bool:
        """Return whether a 407 has a challenge to answer; it is the first that this dial gets."""
        values = http1.field_values(response.fields, b"proxy-authenticate")
        schemes = [scheme for scheme, _ in digest.parse_challenges(values)]
        # A proxy that offers Basic has refused the password.
        refused = self._answered or (self._nonce is None and b"basic" in schemes)
        if self._credentials.nonce is self._nonce:
            self._credentials.nonce = None
        challenge = digest.choose_challenge(values)
        if refused or challenge is None or not self._credentials.login.user:
            return False
        self._answered, self._nonce = True, _Nonce(challenge)
        return True


def _read_refusal(stream: Stream, response: http1.HttpResponse) -> Steps[bool]:
    """Read the body of a 407; return whether another request may follow on the connection."""
    options = http1.field_list(response.fields, b"connection")
    options += http1.field_list(response.fields, b"proxy-connection")
    framing = response_framing(response, b"CONNECT")
    persistent = response.minor == 1 or b"keep-alive" in options
    if b"close" in options or framing.until_close or not persistent:
        return False
    body, left = Body(stream, framing, 502), REFUSAL_LIMIT
    while left > 0:
        piece = yield from body.read()
        if not piece:
            return True
        left -= len(piece)
    return False


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
