"""Decides whose an agent's name is that a second agent has proven.  Any thread."""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.protocol import tunnel
from netproxy.tunnel.control.refusals import ANSWER_SECONDS, wait_for_end
from netproxy.typed import TYPE_CHECKING, Callable

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Wait
    from netproxy.tunnel.control.login import AgentLogin
    from netproxy.tunnel.control.refusals import HandshakeRefusals
    from netproxy.tunnel.control.session import AgentSession

CHALLENGE_SECONDS = 2.0
"""For an agent to answer a ping when another agent asks for its name."""

Replace = Callable[["AgentLogin", "AgentSession"], "Wait | None"]
"""Ends the session that has a name, and begins that of the login."""


class NameClaims:
    """Claims of names that other agents have."""

    def __init__(self, refusals: HandshakeRefusals, replace: Replace) -> None:
        self._refusals = refusals
        self._replace = replace
        # Guards `challenged` of the sessions.
        self._lock = threading.Lock()

    def claim(self, login: AgentLogin, holder: AgentSession) -> Wait | None:
        """Find out whether the agent that has the name still answers, and decide then."""
        if holder.is_held:
            # Its connection is lost, and the claim is not from the agent of the session.
            return self._replace(login, holder)
        with self._lock:
            already_challenged, holder.challenged = holder.challenged, True
        if already_challenged:
            self._refusals.refuse(login, tunnel.NAME_IN_USE, "another agent claims the name")
            return None
        asked = time.monotonic()
        holder.control.ping()
        decide = partial(self._decide, login, holder, asked)
        return wait_for_end(login.stream, CHALLENGE_SECONDS, decide)

    def _decide(
        self, login: AgentLogin, holder: AgentSession, asked: float, closed: bool
    ) -> Wait | None:
        """Decide whose the name is; `asked` is when the holder was pinged (monotonic)."""
        with self._lock:
            holder.challenged = False
        if closed:
            return None
        login.stream.limit(ANSWER_SECONDS)
        if holder.control.last_pong >= asked and not holder.ended:
            decided = f"the agent that answers from {holder.client.host}"
            self._refusals.refuse(login, tunnel.NAME_IN_USE, decided)
            return None
        return self._replace(login, holder)
