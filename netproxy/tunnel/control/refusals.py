"""Refuses handshakes of agents: tells the agent, counts and records.  Any thread."""

from __future__ import annotations

import select
import time
from functools import partial

from netproxy.interfaces.connections import Wait
from netproxy.interfaces.services import Refusal
from netproxy.net.stream import poll_watched
from netproxy.protocol import tunnel
from netproxy.typed import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.services import Counter
    from netproxy.protocol.tunnel import Hello
    from netproxy.tunnel.control.login import AgentLogin

AGENTS = "tunnel.bridge.agents"
"""The key that decides which agents may connect."""
BRIDGE = "tunnel-bridge"
"""The listener in records of refused agents."""
ANSWER_SECONDS = 10.0
"""To send the rest of a handshake that was delayed."""


class RefusalDelays(Protocol):
    """Computes the delay of a refusal: access.backoff.BackOff."""

    def next_delay(self, host: str, now: float) -> float:
        """Count one more failure of a client's host; return its delay in seconds."""


class HandshakeRefusals:
    """Refuses handshakes of agents."""

    def __init__(self, back_off: RefusalDelays, counter: Counter) -> None:
        self._back_off = back_off
        self._counter = counter

    def refuse(self, login: AgentLogin, reason: int, decided: str) -> None:
        """Tell an agent whose proof is valid why it is refused: a key of tunnel.REFUSALS."""
        self._note(login.arrival.client, login.hello, reason, decided)
        login.stream.write(tunnel.encode_refusal(reason))

    def refuse_later(self, stream: Stream, client: Address, hello: Hello) -> Wait:
        """Refuse an agent that has proven nothing, after a delay."""
        self._note(client, hello, tunnel.NOT_PROVEN, AGENTS)
        seconds = self._back_off.next_delay(client.host, time.monotonic())
        return wait_for_end(stream, seconds, partial(_refuse_unless_closed, stream))

    def _note(self, client: Address, hello: Hello, reason: int, decided: str) -> None:
        text, asked = tunnel.REFUSALS[reason], f"agent '{hello.name}'"
        refusal = Refusal("tunnel_handshakes", text, BRIDGE, client.host, asked, decided)
        self._counter.refuse(refusal)


def wait_for_end(stream: Stream, seconds: float, then: Callable[[bool], Wait | None]) -> Wait:
    """Return a wait for the end of a stream; then(True) goes on after it, then(False) without it.

    An event may be about the last owner of the descriptor: the wait goes on for what is left.
    """
    watched = ((stream.socket, select.POLLRDHUP),)
    deadline = time.monotonic() + seconds

    def resume(ready: bool) -> Wait | None:
        if ready and not poll_watched(watched, 0):
            return wait_for_end(stream, max(0.0, deadline - time.monotonic()), then)
        return then(ready)

    return Wait(watched, seconds, resume, idle=True)


def _refuse_unless_closed(stream: Stream, closed: bool) -> None:
    """Send the refusal that was delayed."""
    if not closed:
        stream.limit(ANSWER_SECONDS)
        stream.write(tunnel.encode_refusal(tunnel.NOT_PROVEN))
