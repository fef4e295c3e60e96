"""SOCKS4 and SOCKS4a connections: CONNECT and BIND.

The protocol has no password: a listener with required login refuses every request.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.services import Refusal
from netproxy.protocol import socks4
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.permission import Permission
    from netproxy.handler.bind import Binder
    from netproxy.handler.outbound import Outbound
    from netproxy.interfaces.connections import Handshake, Stream

_encode_grant = partial(socks4.encode_reply, socks4.GRANTED)


class Socks4Handler:
    """Serves SOCKS4 and SOCKS4a connections.  A Handler."""

    def __init__(
        self, listener: str, outbound: Outbound, binder: Binder, permission: Permission
    ) -> None:
        self._listener = listener
        self._outbound = outbound
        self._binder = binder
        self._permission = permission

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Serve a connection.  Each error that has a reply gets it here."""
        asked: Address | str = ""
        try:
            request = yield from socks4.read_request(stream)
            asked = request.target
            if stream.trace is not None:
                stream.trace.step("request", command=request.command, target=asked)
            if not self._permission.login.required:
                stream.handshaking = False
                sources = self._permission.sources
                source = None if sources is None else sources.of("", stream.local_address)
                listener, route = self._listener, stream.port_route
                flow = Flow(
                    "tcp", client, request.target, listener, "", (), None, source, port_route=route
                )
                self._permission.check(flow)
                return (yield from self._serve(stream, flow, request.command))
            reason = Reason.DENIED
            self._refuse("login required", client, asked, "auth: SOCKS4 has no password")
        except DialError as error:
            reason = error.reason  # it has been counted and recorded
        except socks4.RequestError as error:
            reason = Reason.GENERAL
            self._refuse("bad request", client, asked, str(error))
        stream.reply(socks4.encode_reply(socks4.REPLIES[reason], UNSPECIFIED_ADDRESS))
        yield from stream.close_staged()
        return None

    def _refuse(self, reason: str, client: Address, asked: object, decided: str) -> None:
        refusal = Refusal("requests_refused", reason, self._listener, client.host, asked, decided)
        self._outbound.counter.refuse(refusal)

    def _serve(self, stream: Stream, flow: Flow, command: int) -> Handshake:
        if command == socks4.CONNECT:
            connection = yield from self._outbound.tunnel(flow, stream)
            return connection.accept(stream, _encode_grant(connection.bound()))
        if command == socks4.BIND:
            flow = flow._replace(command="bind")
            peer = yield from self._outbound.bind(flow, stream, self._binder, _encode_grant)
            return peer.accept(stream, _encode_grant(peer.flow.target))
        raise socks4.RequestError(f"command {command} for {flow.target} is not supported")
