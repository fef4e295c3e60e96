"""SOCKS5 connections: CONNECT, BIND and UDP ASSOCIATE (RFC 1928, RFC 1929).

A handshake goes through method, credentials, request and command.  Each step returns or
raises; handle() alone turns an error into the one reply.  The datagrams of an association
are handled by socks5_udp.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from netproxy.errors import (
    DialError,
    EndOfStream,
    LoginPenalised,
    LoginUnavailable,
    ProtocolError,
    StreamError,
)
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.connections import READABLE, Blocking, Handshake, Steps, Wait
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import socks5

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.bind import Binder
    from netproxy.handler.outbound import Outbound
    from netproxy.handler.socks5_udp import Socks5UdpRelay
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.services import Counter
    from netproxy.relay.association import Association

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
        udp: Socks5UdpRelay | None,
        login: Socks5Login,
    ) -> None:
        """Serve `listener`.  `udp` serves UDP ASSOCIATE; None without UDP."""
        self._permission = login.permission
        self._listener = listener
        self._outbound = outbound
        self._binder = binder
        self._udp = udp
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
            flow = Flow("tcp", client, request.target, self._listener, user, (), stamp, source)
            if stream.trace is not None:
                stream.trace.step("request", command=request.command, target=flow.target, user=user)
            self._permission.check(flow)  # a reload may have come since the login
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
        if command == socks5.CONNECT:
            connection = yield from self._outbound.tunnel(flow, stream)
            return connection.accept(stream, _encode_success(connection.bound()))
        if command == socks5.BIND:
            peer = yield from self._outbound.bind(flow, stream, self._binder, _encode_success)
            return peer.accept(stream, _encode_success(peer.flow.target))
        if command == socks5.UDP_ASSOCIATE and self._udp is not None:
            udp = self._udp
            wait: Wait | None = yield Blocking(partial(self._associate, udp, stream, flow))
            return wait
        message = f"command {command} for {flow.target} is not supported"
        raise socks5.RequestError(socks5.COMMAND_NOT_SUPPORTED, message)

    def _associate(self, udp: Socks5UdpRelay, stream: Stream, flow: Flow) -> Wait | None:
        """Open an association; it is closed with its control connection (RFC 1928 section 7)."""
        try:
            association, bound = udp.open(stream, flow)
        except DialError as error:
            decided = error.decided or str(error)
            refusal = flow.refusal("requests_refused", error.reason.value, decided)
            self._outbound.counter.refuse(refusal._replace(asked="UDP ASSOCIATE", network="udp"))
            raise
        try:
            stream.reply(_encode_success(bound))
        except StreamError:
            udp.close(association)
            raise
        return _ControlConnection(udp, stream, association).wait()


class _ControlConnection:
    """The control connection of an association.  It waits for its end."""

    __slots__ = ("_udp", "_stream", "_association")

    def __init__(self, udp: Socks5UdpRelay, stream: Stream, association: Association) -> None:
        self._udp = udp
        self._stream = stream
        self._association = association

    def wait(self) -> Wait:
        return Wait(((self._stream.socket, READABLE),), None, self._resume)

    def _resume(self, ready: bool) -> Wait | None:
        """Drop what the client sends; close the association at the end of the stream."""
        if ready and self._stream.skip():
            return self.wait()
        self._udp.close(self._association)
        return None


class Socks5Login:
    """Negotiates the method of SOCKS5 connections and checks their credentials (RFC 1929)."""

    def __init__(self, permission: Permission, counter: Counter) -> None:
        self.permission = permission
        self._login = permission.login
        self._counter = counter

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
            self._counter.count("authentication", "refused")
            yield from self._login.delay_refusal(stream, client)
            raise LoginRefused(failure, "")
        stream.reply(socks5.encode_credentials_status(True))
        return login
