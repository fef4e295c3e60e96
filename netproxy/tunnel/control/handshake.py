"""The agent's side of the handshake: proves the token to the bridge, and checks the bridge's proof.

Runs on the thread that dials, within the deadline of the stream.
"""

from __future__ import annotations

import os

from netproxy.errors import DialError, EndOfStream, ProtocolError, Reason
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Welcome
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.net.connect import AbortableDials


class AgentIdentity(NamedTuple):
    """What an agent proves to the bridge."""

    name: str
    token: bytes

    def __repr__(self) -> str:
        return f"AgentIdentity({self.name!r})"


class AgentHandshake:
    """The agent's side of the handshake, for one kind of connection."""

    def __init__(
        self,
        dials: AbortableDials,
        identity: AgentIdentity,
        kind: int,
        session: bytes = b"",
        flow: tuple[int, int] = (0, 0),
    ) -> None:
        """`session` and `flow`: as in a Hello of this kind; `flow` begins with its path."""
        self._dials = dials
        self._identity = identity
        self._kind = kind
        self.session = session
        """Of a control connection: known after run()."""
        self._flow = flow
        self.refusal = 0
        """Why the bridge has refused, after run(): a key of tunnel.REFUSALS."""

    def run(self, stream: Stream) -> None:
        """Shake hands; blocks.

        Raises ProtocolError if the bridge does not know the token, DialError if it refuses.
        """
        # So that stop() can end it: the stream may have another socket than the dialled one.
        self._dials.note(stream.socket)
        name, token = self._identity
        hello = Hello(self._kind, name, os.urandom(tunnel.NONCE_SIZE), self.session, *self._flow)
        stream.write(tunnel.encode_hello(hello))
        nonce = self._read_challenge(stream)
        stream.write(tunnel.agent_proof(token, hello, nonce))
        welcome = complete(tunnel.read_welcome(stream))
        if not isinstance(welcome, Welcome):
            raise self._refused(welcome)
        expected = tunnel.bridge_proof(token, hello, nonce, welcome.session)
        if not tunnel.secrets_equal(welcome.proof, expected):
            raise ProtocolError("the bridge does not know the token")
        if self._kind == tunnel.CONTROL:
            self.session = welcome.session
        elif welcome.session != self.session:
            raise ProtocolError("the bridge has welcomed another session")

    def _read_challenge(self, stream: Stream) -> bytes:
        """Raises as run()."""
        try:
            nonce = complete(tunnel.read_challenge(stream))
        except EndOfStream:
            if self._kind not in (tunnel.CONTROL, tunnel.WORK):
                # So does a bridge that does not know this kind of connection.
                self.refusal = tunnel.NO_SESSION
            raise
        if isinstance(nonce, int):
            raise self._refused(nonce)
        return nonce

    def _refused(self, reason: int) -> DialError:
        self.refusal = reason
        text = tunnel.reason_text(tunnel.REFUSALS, reason)
        return DialError(Reason.AUTHENTICATION, said=f"the bridge has refused the agent: {text}")
