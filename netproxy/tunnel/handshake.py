"""The agent's side of the handshake: proves the token to the bridge, and checks the bridge's proof.

Runs on the thread that dials, within the deadline of the stream.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.net.stream import complete
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Hello, Welcome

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
        self, dials: AbortableDials, identity: AgentIdentity, kind: int, session: bytes = b""
    ) -> None:
        self._dials = dials
        self._identity = identity
        self._kind = kind
        self.session = session
        """Of a control connection: known after run()."""

    def run(self, stream: Stream) -> None:
        """Shake hands; blocks.

        Raises ProtocolError if the bridge does not know the token, DialError if it refuses.
        """
        # So that stop() can end it: the stream may have another socket than the dialled one.
        self._dials.note(stream.socket)
        name, token = self._identity
        hello = Hello(self._kind, name, os.urandom(tunnel.NONCE_SIZE), self.session)
        stream.write(tunnel.encode_hello(hello))
        nonce = complete(tunnel.read_challenge(stream))
        if isinstance(nonce, int):
            raise _refused(nonce)
        stream.write(tunnel.agent_proof(token, hello, nonce))
        welcome = complete(tunnel.read_welcome(stream))
        if not isinstance(welcome, Welcome):
            raise _refused(welcome)
        expected = tunnel.bridge_proof(token, hello, nonce, welcome.session)
        if not tunnel.secrets_equal(welcome.proof, expected):
            raise ProtocolError("the bridge does not know the token")
        if self._kind == tunnel.CONTROL:
            self.session = welcome.session


def _refused(reason: int) -> DialError:
    text = tunnel.reason_text(tunnel.REFUSALS, reason)
    return DialError(Reason.AUTHENTICATION, said=f"the bridge has refused the agent: {text}")
