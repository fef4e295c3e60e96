"""The sessions of all agents that are connected to the bridge.  Any thread."""

from __future__ import annotations

import threading
from functools import partial

from netproxy.tunnel.control.session import NO_EXIT, NOT_CONNECTED
from netproxy.typed import TYPE_CHECKING, Callable, Sequence

if TYPE_CHECKING:
    from netproxy.tunnel.control.session import AgentSession
    from netproxy.tunnel.elsewhere import OtherWorkers


class AgentSessions:
    """The sessions of a bridge, by agent name.  They outlive every configuration."""

    def __init__(self) -> None:
        # Guards _sessions.
        self._lock = threading.Lock()
        self._sessions: dict[str, AgentSession] = {}
        self.elsewhere: OtherWorkers | None = None
        """None if this process is the only one."""
        self.give_up: Callable[[AgentSession], None]
        """Ends a session that was held for its agent in vain.  The bridge sets it."""

    def get(self, name: str) -> AgentSession | None:
        """Return the session of an agent, None if it is not connected."""
        return self._sessions.get(name)

    def obstacle(self, name: str, needs_exit: bool) -> str:
        """Return why a dial through an agent would fail at once, "" if it would not."""
        session = self.get(name)
        if session is not None:
            return NO_EXIT.format(name) if needs_exit and not session.is_exit else ""
        is_elsewhere = self.elsewhere is not None and self.elsewhere.is_elsewhere(name)
        return "" if is_elsewhere else NOT_CONNECTED.format(name)

    def all(self) -> list[AgentSession]:
        """Return all sessions, oldest first."""
        with self._lock:
            return list(self._sessions.values())

    def add(self, session: AgentSession) -> bool:
        """Add a session; return False if its name is taken."""
        with self._lock:
            if session.name in self._sessions:
                return False
            if self.elsewhere is not None and not self.elsewhere.note_begin(session.name):
                return False
            self._sessions[session.name] = session
            return True

    def remove(self, session: AgentSession) -> None:
        """Remove a session, unless another one has its name."""
        with self._lock:
            if self._sessions.get(session.name) is session:
                del self._sessions[session.name]
                if self.elsewhere is not None:
                    self.elsewhere.note_end(session.name)

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Return calls that close what is of no use (interfaces.services.Expirable)."""
        sessions = self.all()
        given_up = [session for session in sessions if session.is_given_up(now)]
        return [
            *(session.sweep for session in sessions),
            *(partial(self.give_up, session) for session in given_up),
        ]
