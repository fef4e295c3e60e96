"""Finds the name that a client wants in the first bytes that it sends: TLS or HTTP.

For flows whose target is an address that the client has not named here.  The bytes stay unread,
and are relayed as they came.  A client that is silent, because its server speaks first, waits
for SECONDS; meanwhile it holds no thread.  The name is what the client says, and proves nothing.
"""

from __future__ import annotations

import time

from netproxy.errors import DeadlineError, ProtocolError
from netproxy.handler.sni.first_bytes import HTTP, TLS, look
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.flows import SeenName, is_public
from netproxy.protocol.tls_hello import HANDSHAKE
from netproxy.typed import TYPE_CHECKING, Container, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Steps, Stream
    from netproxy.interfaces.flows import Flow

SECONDS = 0.3
"""How long a client may take to send the bytes with the name."""


class Sniffer:
    """Looks at the first bytes of connections to one listener.  Thread: any."""

    def __init__(
        self, kinds: Container[str], skipped: Sequence[range], is_fixed: bool, by_name: bool
    ) -> None:
        """Look for `kinds`, TLS and HTTP, except in flows to the ports `skipped`.

        `is_fixed`: all flows of the listener go to one target, so that the name leads nowhere.
        `by_name`: the name is looked up and dialled in place of the address.
        """
        self._kinds = kinds
        self._skipped = skipped
        self._is_fixed = is_fixed
        self._by_name = by_name

    def named(self, flow: Flow, stream: Stream) -> Steps[Flow]:
        """Return the flow with the name that the client sends; as it is if none comes in time.

        Raises StreamError if the client is gone.
        """
        if any(flow.target.port in ports for ports in self._skipped):
            return flow
        before, limit = stream.deadline, time.monotonic() + SECONDS
        stream.deadline = limit if before is None else min(before, limit)
        try:
            kind, name = yield from self._look(stream)
        except (DeadlineError, ProtocolError):
            return flow
        finally:
            stream.deadline = before
        if not name:
            return flow
        if stream.trace is not None:
            stream.trace.step("name", host=name, seen_in=kind)
        leads = not self._is_fixed and pack_ip(flow.target.host) is not None and is_public(name)
        if leads and self._by_name:
            return flow._replace(target=Address(name, flow.target.port))
        return flow._replace(seen=SeenName(name, kind, leads))

    def _look(self, stream: Stream) -> Steps[tuple[str, str]]:
        """Return what the client speaks and the name that it sends, "" without one.

        Raises DeadlineError, StreamError; ProtocolError for anything that is not looked for.
        """
        first = yield from stream.peek()
        kind = TLS if first == HANDSHAKE else HTTP
        if kind not in self._kinds:
            return kind, ""
        seen = yield from look(stream, kind)
        return kind, seen.name
