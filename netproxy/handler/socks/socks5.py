"""SOCKS5 connections: CONNECT, BIND and UDP ASSOCIATE (RFC 1928, RFC 1929).

A handshake goes through method, credentials, request and command.  Each step returns or
raises; handle() alone turns an error into the one reply.  The datagrams of an association
are handled by associate and socks5_udp.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, EndOfStream, LoginPenalised, LoginUnavailable, ProtocolError
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.connections import Handshake, Steps
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import socks5
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.bind import Binder
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.socks.associate import Associating
    from netproxy.interfaces.connections import Stream

_NO_LOGIN = socks5.encode_method(socks5.NO_AUTHENTICATION)
_encode_success = partial(socks5.encode_reply, socks5.SUCCEEDED)


class LoginRefused(ProtocolError):
    """The client has not logged in; `answer` is the reply that refuses it."""

    def __init__(self, answer: bytes, reason: str, decided: str = "") -> None:
        """Refuse with `answer`; `reason` and `decided` are those of the record.

        `reason` is "" for a login whose refusal has a record of its own.
        """
        super().__init__(decided)
        self.answer = answer
        self.reason = reason


class Socks5Handler:
    """Serves SOCKS5 connections.  A Handler."""

    def __init__(
        self,
        listener: str,
        outbound: Outbound,
        binder: Binder,
        associating: Associating | None,
        login: Socks5Login,
    ) -> None:
        """Serve `listener`.  `associating` serves UDP ASSOCIATE; None without UDP."""
        self._permission = login.permission
        self._listener = listener
        self._outbound = outbound
        self._binder = binder
        self._associating = associating
        self._login = login

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Serve a connection.  Each error that has a reply gets it here."""
        user = ""
        try:
            user, stamp = yield from self._login.authenticate(stream, client)
            request = yield from socks5.read_request(stream)
            stream.handshaking = False
            if user:
                stream.login = user, stamp
            sources = self._permission.sources
            source = None if sources is None else sources.of(user, stream.local_address)
            listener, route = self._listener, stream.port_route
            flow = Flow(
                "tcp", client, request.target, listener, user, (), stamp, source, port_route=route
            )
            if stream.trace is not None:
                stream.trace.step("request", command=request.command, target=flow.target, user=user)
            self._permission.check(flow)  # a reload may have come since the login
            if request.command == socks5.CONNECT:
                connection = yield from self._outbound.tunnel(flow, stream)
                return connection.accept(stream, _encode_success(connection.bound()))
            return (yield from self._serve(stream, flow, request.command))
        except LoginRefused as error:
            answer = error.answer
            if error.reason:
                self._refuse(client, user, error.reason, str(error))
        except socks5.RequestError as error:
            answer = socks5.encode_reply(error.reply, UNSPECIFIED_ADDRESS)
            self._refuse(client, user, "bad request", str(error))
        except DialError as error:
            answer = socks5.encode_reply(socks5.REPLIES[error.reason], UNSPECIFIED_ADDRESS)
        stream.reply(answer)
        yield from stream.close_staged()
        return None

    def _refuse(self, client: Address, user: str, reason: str, decided: str) -> None:
        refusal = Refusal("requests_refused", reason, self._listener, client.host, "", decided)
        self._outbound.counter.refuse(refusal._replace(user=user))

    def _serve(self, stream: Stream, flow: Flow, command: int) -> Handshake:
        if command == socks5.BIND:
            flow = flow._replace(command="bind")
            peer = yield from self._outbound.bind(flow, stream, self._binder, _encode_success)
            return peer.accept(stream, _encode_success(peer.flow.target))
        if command == socks5.UDP_ASSOCIATE and self._associating is not None:
            return (yield from self._associating.serve(stream, flow))
        message = f"command {command} for {flow.target} is not supported"
        raise socks5.RequestError(socks5.COMMAND_NOT_SUPPORTED, message)


class Socks5Login:
    """Negotiates the method of SOCKS5 connections and checks their credentials (RFC 1929)."""

    def __init__(self, permission: Permission) -> None:
        self.permission = permission
        self._login = permission.login

    def authenticate(self, stream: Stream, client: Address) -> Steps[tuple[str, object]]:
        """Return the user's name and the stamp of the login, ("", None) without a login.

        Raises LoginRefused.
        """
        methods = yield from socks5.read_methods(stream)
        if stream.trace is not None:
            stream.trace.step("methods", offered=" ".join(map(str, methods)))
        if self._login.offered and socks5.USERNAME_PASSWORD in methods:
            stream.reply(socks5.encode_method(socks5.USERNAME_PASSWORD))
            return (yield from self._check_credentials(stream, client))
        if self._login.required or socks5.NO_AUTHENTICATION not in methods:
            answer = socks5.encode_method(socks5.NO_ACCEPTABLE)
            offered = ", ".join(map(str, methods)) or "none"
            raise LoginRefused(answer, "no acceptable method", f"auth; methods offered: {offered}")
        stream.reply(_NO_LOGIN)
        return "", None

    def _check_credentials(self, stream: Stream, client: Address) -> Steps[tuple[str, object]]:
        failure = socks5.encode_credentials_status(False)
        try:
            name, password = yield from socks5.read_credentials(stream)
        except EndOfStream:
            raise
        except ProtocolError as error:
            raise LoginRefused(failure, "bad request", str(error)) from error
        try:
            login = yield from self._login.authenticate(name, password, client, stream)
        except (LoginUnavailable, LoginPenalised) as error:
            raise LoginRefused(failure, "") from error
        if login is None:
            yield from self._login.delay_refusal(stream, client)
            raise LoginRefused(failure, "")
        stream.reply(socks5.encode_credentials_status(True))
        return login
