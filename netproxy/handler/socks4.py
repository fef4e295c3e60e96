"""SOCKS4 and SOCKS4a connections: CONNECT and BIND.

The protocol has no password: a listener with required login refuses every request.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import Flow
from netproxy.protocol import socks4

if TYPE_CHECKING:
    from netproxy.access.login import Login
    from netproxy.handler.bind import Binder
    from netproxy.handler.outbound import Outbound
    from netproxy.interfaces.connections import Handshake, Stream

_encode_grant = partial(socks4.encode_reply, socks4.GRANTED)


class Socks4Handler:
    """Serves SOCKS4 and SOCKS4a connections.  A Handler."""

    def __init__(self, listener: str, outbound: Outbound, binder: Binder, login: Login) -> None:
        self._listener = listener
        self._outbound = outbound
        self._binder = binder
        self._login = login

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Serve a connection.  Each error that has a reply gets it here."""
        try:
            request = yield from socks4.read_request(stream)
            if self._login.required:
                raise DialError(Reason.DENIED, "SOCKS4 has no password")
            stream.handshaking = False
            flow = Flow("tcp", client, request.target, self._listener, "")
            return (yield from self._serve(stream, flow, request.command))
        except (socks4.RequestError, DialError) as error:
            reason = error.reason if isinstance(error, DialError) else Reason.GENERAL
        stream.reply(socks4.encode_reply(socks4.REPLIES[reason], UNSPECIFIED_ADDRESS))
        yield from stream.close_staged()
        return None

    def _serve(self, stream: Stream, flow: Flow, command: int) -> Handshake:
        if command == socks4.CONNECT:
            connection = yield from self._outbound.tunnel(flow, stream)
            return connection.accept(stream, _encode_grant(connection.bound()))
        if command == socks4.BIND:
            peer = yield from self._outbound.bind(flow, stream, self._binder, _encode_grant)
            return peer.accept(stream, _encode_grant(peer.flow.target))
        raise DialError(Reason.UNSUPPORTED, f"SOCKS4 command {command}")
