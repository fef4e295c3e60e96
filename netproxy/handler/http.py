"""HTTP proxy connections: CONNECT, and requests for absolute addresses (RFC 9110 section 7).

Reads a request, checks the credentials it carries, and hands it to a tunnel or to the
Forwarder (http_forward).  Pipelined requests wait unread until their turn, so that the
answers come in order and each is routed for itself.
"""

from __future__ import annotations

import math
import re
from functools import partial

from netproxy.access.login import parse_basic
from netproxy.errors import (
    DeadlineError,
    DialError,
    EndOfStream,
    LoginPenalised,
    LoginUnavailable,
    Reason,
    StreamError,
)
from netproxy.handler.datagrams.connect_udp import ConnectUdp
from netproxy.interfaces.connections import READABLE, Blocking, Events, Steps, Wait
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import http1
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http.http1_error import RecordedError, encode_error
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.http_forward import Forwarder
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Handshake, Stream
    from netproxy.interfaces.services import Counter
    from netproxy.relay.connection import OutboundConnection

# Seconds for the next request of a connection to begin, and for its head once it has begun.
KEEPALIVE_SECONDS, HEAD_SECONDS = 60.0, 10.0
RETRY_SECONDS = 5
"""What a client that has met a limit is told to wait."""
# SMTP: a proxy that allows it sends spam, and is soon on every block list.
CONNECT_PORTS_REFUSED = frozenset({25})
CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
WANTS_LOGIN = "this proxy wants a user name and a password"
CANNOT_CHECK = "the login cannot be checked now"
# Our name in Proxy-Status (RFC 9209).
PROXY_NAME = "netproxy"
# A request target up to its authority.  Group 1: host and port, without name and password.
_AUTHORITY = re.compile(
    rb"(?:[A-Za-z][A-Za-z0-9+.-]*://)?(?:[^/?#]*@)?"
    rb"((?:\[[^]@/?#]*]|[^:@/?#]*)(?::[0-9]*)?)(?=[/?#]|\Z)"
)
_CHALLENGE = (b"Proxy-Authenticate", b'Basic realm="netproxy", charset="UTF-8"')


class HttpHandler:
    """Serves HTTP proxy connections.  A Handler."""

    def __init__(
        self,
        listener: str,
        outbound: Outbound,
        forwarder: Forwarder,
        permission: Permission,
        counter: Counter,
        datagrams: StreamUdpRelay | None = None,
    ) -> None:
        """Serve requests.  `datagrams` serves connect-udp; None without UDP."""
        self._permission = permission  # asked for each request
        self._datagrams = None if datagrams is None else ConnectUdp(datagrams)
        self._listener = listener
        self._outbound, self._forwarder = outbound, forwarder
        self._login, self._counter = permission.login, counter

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Serve requests until the connection ends.  Each error becomes a response here."""
        connection = _HttpConnection(stream)
        try:
            return (yield from self._serve(connection, client))
        except EndOfStream as error:
            if error.partial:
                raise
            return None
        except DeadlineError:
            late = http1.HttpError(408, "the request did not come in time")
            answer = self._refuse(connection, client, late)
        except http1.HttpError as error:
            answer = self._refuse(connection, client, error)
        except LoginUnavailable:
            # Its record has the details, which are none of the client's business.
            answer = connection.encode_error(503, CANNOT_CHECK)
        except LoginPenalised as error:
            retry_after = (b"Retry-After", b"%d" % math.ceil(error.seconds))
            answer = connection.encode_error(429, str(error), [retry_after])
        except DialError as error:
            fields = [connect_udp.status_field(error.reason, PROXY_NAME)]
            if error.reason is Reason.LIMIT:
                fields.append((b"Retry-After", b"%d" % RETRY_SECONDS))
            text = error.why if error.hop else error.said or error.why
            answer = connection.encode_error(http1.REPLIES[error.reason], text, fields, error.id)
        finally:
            connection.close_kept()
        # Bytes that follow an error are not parsed as requests.
        try:
            stream.reply(answer)
        except StreamError:
            pass  # the client has gone
        yield from stream.close_staged()
        return None

    def _refuse(
        self, connection: _HttpConnection, client: Address, error: http1.HttpError
    ) -> bytes:
        """Return the response to a refused request; count and record it if nobody has yet."""
        challenge = [_CHALLENGE] if error.status == 407 else []
        counter, reason = "requests_refused", http1.PHRASES[error.status].lower()
        if isinstance(error, RecordedError):
            name = error.id
        else:
            asked, host, decided = connection.asked(), client.host, str(error)
            refusal = Refusal(counter, reason, self._listener, host, asked, decided)
            name = self._counter.refuse(refusal)
        return connection.encode_error(error.status, str(error), challenge, name)

    def _serve(self, connection: _HttpConnection, client: Address) -> Handshake:
        """Serve one request after the other."""
        stream = connection.stream
        while True:
            connection.request = None
            connection.request = request = yield from http1.read_request(stream)
            if stream.trace is not None:
                stream.trace.step("request", asked=connection.asked())
            # A reload may have come since the last request, or during the login.
            self._permission.check_client(client.host)
            user, stamp = yield from self._authenticate(stream, request, client)
            stream.handshaking = False
            sources = self._permission.sources
            source = None if sources is None else sources.of(user, stream.local_address)
            listener, route = self._listener, stream.port_route
            flow = Flow("tcp", client, client, listener, user, (), stamp, source, port_route=route)
            stream.login = (user, stamp) if user else None
            if user:
                self._permission.check(flow, connection.asked)
            if request.method == b"CONNECT":
                flow = flow._replace(target=_tunnel_target(request))
                tunnel = yield from self._outbound.tunnel(flow, stream)
                return tunnel.accept(stream, CONNECTED)
            if self._datagrams is not None and connect_udp.asks_for(request):
                serve = partial(self._datagrams.serve, stream, request, flow)
                wait: Wait | None = yield Blocking(serve)
                return wait
            kept, connection.kept = connection.kept, None
            outcome = yield from self._forwarder.forward(stream, request, flow, kept)
            if isinstance(outcome, Wait):
                return outcome
            connection.kept = outcome
            if not stream.open:
                return None
            if not stream.unread():
                watched = ((stream.socket, READABLE),)
                if not (yield Events(watched, KEEPALIVE_SECONDS, stream.light, idle=True)):
                    return None
            stream.limit(HEAD_SECONDS)

    def _authenticate(
        self, stream: Stream, request: http1.HttpRequest, client: Address
    ) -> Steps[tuple[str, object]]:
        """Return the user of this request and the stamp of the login, ("", None) for none.

        Each request needs its own credentials.
        Raises HttpError 407, LoginUnavailable, LoginPenalised.
        """
        values = http1.field_values(request.fields, b"proxy-authorization")
        if not values and self._datagrams is not None and connect_udp.asks_for(request):
            # To a client of connect-udp the proxy is the origin (RFC 9298 section 3).
            values = http1.field_values(request.fields, b"authorization")
        if not self._login.offered or (not values and not self._login.required):
            return "", None
        if values:
            # Several fields are as good as a wrong password.
            name, password = parse_basic(values[0]) if len(values) == 1 else (b"", b"")
            login = yield from self._login.authenticate(name, password, client, stream)
            if login is not None:
                return login
            yield from self._login.delay_refusal(stream, client)
            raise RecordedError(407, WANTS_LOGIN)
        raise http1.HttpError(407, WANTS_LOGIN)


class _HttpConnection:
    """The state of a client's connection between its requests."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        # The request that is being served; None while one is read.
        self.request: http1.HttpRequest | None = None
        # The outbound connection of the last request, for the next one.
        self.kept: OutboundConnection | None = None

    def encode_error(
        self, status: int, message: str, extra: Sequence[tuple[bytes, bytes]] = (), name: str = ""
    ) -> bytes:
        is_head = self.request is not None and self.request.method == b"HEAD"
        return encode_error(status, message, extra, is_head, name)

    def asked(self) -> str:
        """Return method and authority of the request, for its record.

        Secrets may be in the rest: a password before the host, a token in the path or query.
        """
        if self.request is None:
            return ""
        found = _AUTHORITY.match(self.request.target)
        asked = b"%s %s" % (self.request.method, found[1] if found is not None else b"")
        return asked.decode("ascii", "backslashreplace").rstrip()

    def close_kept(self) -> None:
        if self.kept is not None:
            self.kept.upstream.close()


def _tunnel_target(request: http1.HttpRequest) -> Address:
    """Return the target of a CONNECT.  Raises HttpError."""
    target = http1.parse_authority(request.target)
    if target.port in CONNECT_PORTS_REFUSED:
        raise http1.HttpError(403, f"CONNECT to port {target.port} is not allowed")
    return target
