"""Agents that are connected to another worker of the same daemon, as this room needs them.

daemon.workers has the implementation; a daemon of one process has none.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream, Wait
    from netproxy.protocol.tunnel import OpenRequest
    from netproxy.tunnel.control.login import AgentLogin


class OtherWorkers(Protocol):
    """The agents of all workers.  Thread: any."""

    def is_elsewhere(self, agent: str) -> bool:
        """Return whether another worker has the session of an agent.  Never blocks."""

    def hand_over(self, login: AgentLogin) -> Wait | None:
        """Give a connection of an agent to the worker that has its session.

        Returns what relays the connection if it cannot be given, None if it is gone.
        Raises StreamError.  Never blocks.
        """

    def open(self, agent: str, request: OpenRequest, seconds: float) -> Stream:
        """Return a stream to a target that the agent, an exit, has accepted.

        Blocks.  Raises DialError.
        """

    def note_begin(self, agent: str) -> bool:
        """Note that the agent's session is here; return False if another worker has one."""

    def note_end(self, agent: str) -> None:
        """Note that the agent's session here has ended."""
