"""Dials the connections of an agent to its bridge, each with its handshake.

Thread: the agent's, and those of the dial pool.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import NetProxyError
from netproxy.net.connect import AbortableDials
from netproxy.protocol import tunnel
from netproxy.tunnel.control.handshake import AgentHandshake
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.tunnel.control.handshake import AgentIdentity
    from netproxy.tunnel.path.dependencies import PathSocketDialer


class BridgeDialer(Protocol):
    """Connects to the bridge.  Thread: any."""

    def dial(self, greet: Callable[[Stream], None]) -> Stream:
        """Return a connection on which `greet` has made the tunnel's handshake.

        Blocks.  Raises DialError, and then the connection is closed.
        """

    def dial_datagrams(self, control: Stream, port: int) -> tuple[PacketConn, Destination]:
        """Return a packet connection to the bridge that `control` leads to, and its destination.

        `port`: as in PathOffer.  Blocks.  Raises DialError.
        """


class BegunSession(NamedTuple):
    """A control connection, and the session that it begins."""

    control: Stream
    identifier: bytes

    def __repr__(self) -> str:
        return "BegunSession()"


class BridgeDials:
    """Dials a bridge.  All calls block, and raise NetProxyError, unless said."""

    def __init__(self, identity: AgentIdentity) -> None:
        """Begin without a dialer: it is set before the first dial, and at each reload."""
        self._identity = identity
        self._running = AbortableDials()
        self.dialer: BridgeDialer

    def begin(self) -> BegunSession:
        """Return the control connection of a new session."""
        handshake = self._handshake(tunnel.CONTROL)
        stream = self._dial(handshake)
        return BegunSession(stream, handshake.session)

    def resume(self, session: bytes) -> Stream | None:
        """Return another control connection of a session, None if the bridge refuses."""
        return self._dial_again(self._handshake(tunnel.RESUME, session))

    def work(self, session: bytes) -> Stream:
        """Return a work connection of a session."""
        return self._dial(self._handshake(tunnel.WORK, session))

    def attach(self, session: bytes, path: int, flow: int) -> Stream | None:
        """Return another work connection of a flow, None if the bridge refuses."""
        return self._dial_again(self._handshake(tunnel.ATTACH, session, (path, flow)))

    def datagrams(self, control: Stream) -> PathSocketDialer:
        """Return what dials packet connections to the bridge that `control` leads to.

        Does not block.
        """
        return partial(self.dialer.dial_datagrams, control)

    def abort(self) -> None:
        """End all dials, for good.  Does not block."""
        self._running.abort()

    def _handshake(
        self, kind: int, session: bytes = b"", flow: tuple[int, int] = (0, 0)
    ) -> AgentHandshake:
        return AgentHandshake(self._running, self._identity, kind, session, flow)

    def _dial(self, handshake: AgentHandshake) -> Stream:
        with self._running.watched():
            return self.dialer.dial(handshake.run)

    def _dial_again(self, handshake: AgentHandshake) -> Stream | None:
        """Return a connection for what the bridge may have ended; None if it has."""
        try:
            return self._dial(handshake)
        except NetProxyError:
            if handshake.refusal:
                return None
            raise
