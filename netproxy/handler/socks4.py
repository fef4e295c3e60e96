"""SOCKS4 and SOCKS4a connections: CONNECT and BIND.

The protocol has no password, so that a listener that requires one refuses it.
"""

from __future__ import annotations

from netproxy.access.login import Login
from netproxy.errors import DialError, Reason
from netproxy.handler.bind import Binder
from netproxy.handler.outbound import Connector
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Wait
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import Stream
from netproxy.protocol import socks4

UNSPECIFIED_ADDRESS = Address("0.0.0.0", 0)


class Socks4Handler:
    def __init__(self, listener: str, connector: Connector, binder: Binder, login: Login) -> None:
        self._listener = listener
        self._connector = connector
        self._binder = binder
        self._login = login

    def handle(self, stream: Stream, client: Address) -> Wait | None:
        try:
            request = socks4.read_request(stream)
            if self._login.required:
                raise DialError(Reason.DENIED, "SOCKS4 has no password")
            flow = Flow("tcp", client, request.target, self._listener, "")
            stream.welcome()
            return self._serve(stream, flow, request.command)
        except (socks4.RequestError, DialError) as error:
            reason = error.reason if isinstance(error, DialError) else Reason.GENERAL
            stream.write(socks4.encode_reply(socks4.REPLIES[reason], UNSPECIFIED_ADDRESS))
            stream.close_staged()
            return None

    def _serve(self, stream: Stream, flow: Flow, command: int) -> Wait | None:
        if command == socks4.CONNECT:
            passage = self._connector.tunnel(flow)
            return passage.accept(stream, socks4.encode_reply(socks4.GRANTED, passage.bound()))
        if command == socks4.BIND:
            passage = self._connector.bind(
                flow,
                stream,
                self._binder,
                lambda bound: stream.write(socks4.encode_reply(socks4.GRANTED, bound)),
            )
            return passage.accept(stream, socks4.encode_reply(socks4.GRANTED, passage.flow.target))
        raise DialError(Reason.UNSUPPORTED, f"SOCKS4 command {command}")
