"""A request to an HTTP proxy and its answer, with the credentials that the proxy wants.

A request has the credentials of Basic; a proxy that wants Digest alone gets that, and each further
connection begins with the nonce that the proxy has accepted.  Nothing is sent behind a request
before the proxy has answered (RFC 9931).
"""

from __future__ import annotations

import binascii
import itertools
import os

from netproxy.errors import DeadlineError, ProtocolError, StreamError
from netproxy.protocol import http1
from netproxy.protocol.http import digest
from netproxy.protocol.http.http1_message import Body, response_framing
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps, Stream

SWITCHING_PROTOCOLS = 101
AUTHENTICATION_REQUIRED = 407
REFUSAL_LIMIT = 65536
"""Bytes of the body of a 407 that are read so that the connection can be used again."""


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


class ConnectionSpent(Exception):
    """The proxy has asked for Digest, and takes no second request on the connection."""


class Exchange:
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

        Raises ConnectionSpent if the request must be sent again on a new connection.
        """
        response = yield from self._send(stream)
        if response.status == AUTHENTICATION_REQUIRED and self._accept_challenge(response):
            try:
                if not (yield from _read_refusal(stream, response)):
                    raise ConnectionSpent
                response = yield from self._send(stream)
            except DeadlineError:
                raise
            except (ProtocolError, StreamError) as error:
                raise ConnectionSpent from error
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
