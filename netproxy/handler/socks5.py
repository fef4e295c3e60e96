"""SOCKS5 connections: CONNECT, BIND and UDP ASSOCIATE; its datagrams go to socks5_udp.

One connection is one walk: methods, credentials, request, command.  Each step
returns or raises; _answered() alone turns an error into the one reply.
"""

from __future__ import annotations

from typing import Callable

from netproxy.access.login import Login
from netproxy.errors import DialError, EndOfStream, NeedsThread, ProtocolError, StreamError
from netproxy.handler.bind import Binder
from netproxy.handler.outbound import Connector, Passage
from netproxy.handler.socks5_udp import Socks5UdpRelay
from netproxy.handler.stream_udp import UotStream
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Counter
from netproxy.net.datagram_socket import DatagramSocket
from netproxy.net.stream import Stream
from netproxy.protocol import socks5
from netproxy.relay.association import Association

UNSPECIFIED_ADDRESS = Address("0.0.0.0", 0)


class Refused(ProtocolError):
    """The client was told, in the words of the step it failed at; `answer` are those bytes."""

    def __init__(self, answer: bytes, message: str) -> None:
        super().__init__(message)
        self.answer = answer


class Socks5Handler:
    """Handler and, where `udp` is there, PacketHandler."""

    def __init__(
        self,
        listener: str,
        connector: Connector,
        binder: Binder,
        udp: Socks5UdpRelay | None,
        entrance: Entrance,
    ) -> None:
        self._listener = listener
        self._connector = connector
        self._binder = binder
        self._udp = udp
        self._entrance = entrance

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        return self._answered(
            stream, lambda: self._serve_next(stream, client, self._entrance.enter(stream, client))
        )

    def attempt(self, stream: Stream, client: Address) -> Wait | None:
        """For CONNECT by those who need no password: what most connections are."""
        return stream.attempt(
            lambda: self._attempt(stream, client), lambda: self.handle(stream, client)
        )

    def _attempt(self, stream: Stream, client: Address) -> Wait | None:
        self._entrance.enter_at_once(stream)
        return stream.attempt(
            lambda: self._attempt_next(stream, client),
            lambda: self._answered(stream, lambda: self._serve_next(stream, client, "")),
        )

    def _attempt_next(self, stream: Stream, client: Address) -> Wait | None:
        request = socks5.read_request(stream)
        if request.command != socks5.CONNECT:
            raise NeedsThread
        stream.welcome()
        return self._connector.attempt(
            stream,
            Flow("tcp", client, request.target, self._listener, ""),
            lambda passage: self._accept(stream, passage),
            lambda error: self._refuse(stream, _answer(error)),
        )

    def _answered(self, stream: Stream, serve: Callable[[], Wait | None]) -> Wait | None:
        """The one place where an error becomes a reply."""
        try:
            return serve()
        except Refused as error:
            return self._refuse(stream, error.answer)
        except socks5.RequestError as error:
            return self._refuse(stream, socks5.encode_reply(error.reply, UNSPECIFIED_ADDRESS))
        except DialError as error:
            return self._refuse(stream, _answer(error))

    @staticmethod
    def _refuse(stream: Stream, answer: bytes) -> None:
        stream.write(answer)
        stream.close_staged()

    def _serve_next(self, stream: Stream, client: Address, user: str) -> Wait | None:
        request = socks5.read_request(stream)
        return self._serve(
            stream, Flow("tcp", client, request.target, self._listener, user), request.command
        )

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        if self._udp is not None:
            self._udp.handle_packets(batch, local)

    def _serve(self, stream: Stream, flow: Flow, command: int) -> Wait | None:
        stream.welcome()
        if command == socks5.CONNECT:
            return self._accept(stream, self._connector.tunnel(flow))
        elif command == socks5.BIND:
            passage = self._connector.bind(
                flow,
                stream,
                self._binder,
                lambda bound: stream.write(socks5.encode_reply(socks5.SUCCEEDED, bound)),
            )
            return passage.accept(
                stream, socks5.encode_reply(socks5.SUCCEEDED, passage.flow.target)
            )
        elif command == socks5.UDP_ASSOCIATE and self._udp is not None:
            return self._associate(stream, flow)
        raise socks5.RequestError(socks5.COMMAND_NOT_SUPPORTED, f"command {command}")

    @staticmethod
    def _accept(stream: Stream, passage: Passage | UotStream) -> Wait | None:
        return passage.accept(stream, socks5.encode_reply(socks5.SUCCEEDED, passage.bound()))

    def _associate(self, stream: Stream, flow: Flow) -> Wait | None:
        """The association lives exactly as long as its control connection, which only waits from here on."""
        association, bound = self._udp.open(stream, flow)
        try:
            stream.write(socks5.encode_reply(socks5.SUCCEEDED, bound))
        except StreamError:
            self._udp.close(association)
            raise
        return self._watched(stream, association)

    def _watched(self, stream: Stream, association: Association) -> Wait:
        return Wait(
            ((stream.socket, READABLE),),
            None,
            lambda ready: self._watch(stream, association, ready),
        )

    def _watch(self, stream: Stream, association: Association, ready: bool) -> Wait | None:
        """Nothing is due on a control connection but its end; whatever comes is ignored."""
        if ready and stream.skip():
            return self._watched(stream, association)
        self._udp.close(association)
        return None


def _answer(error: DialError) -> bytes:
    return socks5.encode_reply(socks5.REPLIES[error.reason], UNSPECIFIED_ADDRESS)


class Entrance:
    """The walk up to the request: which method, and whether the client may come in."""

    def __init__(self, login: Login, counter: Counter) -> None:
        self._login = login
        self._counter = counter

    def enter(self, stream: Stream, client: Address) -> str:
        """The user's name, "" for nobody; Refused."""
        methods = socks5.read_methods(stream)
        if self._login.offered and socks5.USERNAME_PASSWORD in methods:
            stream.write(socks5.encode_method(socks5.USERNAME_PASSWORD))
            return self._authenticate(stream, client)
        if self._login.required or socks5.NO_AUTHENTICATION not in methods:
            raise Refused(socks5.encode_method(socks5.NO_ACCEPTABLE), "no acceptable method")
        stream.write(socks5.encode_method(socks5.NO_AUTHENTICATION))
        return ""

    def enter_at_once(self, stream: Stream) -> None:
        """enter() for nobody in particular, whose methods have come; NeedsThread where a password may be wanted."""
        if socks5.NO_AUTHENTICATION not in socks5.read_methods(stream) or self._login.offered:
            raise NeedsThread
        stream.write(socks5.encode_method(socks5.NO_AUTHENTICATION))

    def _authenticate(self, stream: Stream, client: Address) -> str:
        failure = socks5.encode_credentials_status(False)
        try:
            name, password = socks5.read_credentials(stream)
        except EndOfStream:
            raise
        except ProtocolError as error:
            raise Refused(failure, str(error)) from error
        user = self._login.check(name, password, client)
        if user is None:
            self._counter.count("authentication", "refused")
            raise Refused(failure, "wrong user name or password")
        stream.write(socks5.encode_credentials_status(True))
        return user
