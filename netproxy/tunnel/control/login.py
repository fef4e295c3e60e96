"""The connection of an agent that has proven its token to the bridge.  Any thread."""

from __future__ import annotations

from netproxy.errors import StreamError
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Welcome
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream


class Arrival(NamedTuple):
    """How a connection of an agent has come to this machine."""

    client: Address
    """The agent's address."""
    port: int
    """The port that the agent has dialled, 0 if it is not known any more."""
    is_sealed: bool
    """True if it came within TLS, which another worker may have taken off."""


def arrival_of(stream: Stream, client: Address) -> Arrival:
    """Return how a connection has come that this process has accepted."""
    try:
        port = stream.local_address().port
    except StreamError:
        # It has just ended.
        port = 0
    return Arrival(client, port, not stream.plain)


class AgentLogin(NamedTuple):
    """The connection of an agent whose proof is valid, before its welcome."""

    stream: Stream
    arrival: Arrival
    hello: Hello
    nonce: bytes
    """The bridge's."""
    token: bytes

    def __repr__(self) -> str:
        return f"AgentLogin({self.hello.name!r})"

    def welcome(self, session: bytes) -> bytes:
        """Return the bytes of the welcome; from now on the connection is not shed."""
        self.stream.handshaking = False
        proof = tunnel.bridge_proof(self.token, self.hello, self.nonce, session)
        return tunnel.encode_welcome(Welcome(proof, session))
