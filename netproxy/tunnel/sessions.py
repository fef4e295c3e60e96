"""Holds the sessions of connected agents, on the bridge: work connections and statistics.

An AgentSession lasts from the handshake of the control connection to its end.  Idle work
connections hold no thread and are not watched: a closed one is noticed when it is taken, or by
the janitor.  Any thread.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Callable, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.flows import Traffic
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel

if TYPE_CHECKING:
    from netproxy.interfaces import connections
    from netproxy.interfaces.addresses import Address
    from netproxy.tunnel.control import ControlConnection
    from netproxy.tunnel.ports import SessionPorts

IDLE_LIMIT = 256
"""Idle work connections of one agent."""

WAITING_LIMIT = 1024
"""Dials of one agent that wait for a work connection."""

# In struct tcp_info (Linux): tcpi_bytes_acked and tcpi_bytes_received, and the length up to them.
_INFO_BYTES = struct.Struct("=QQ")
_INFO_OFFSET = 120
_INFO_SIZE = 136


def tunnel_failure(agent: str, reason: Reason, said: str) -> DialError:
    """Return an error of the tunnel itself, not of the target: a group may try another member."""
    return DialError(reason, said=said, hop=f"tunnel://{agent}", upstream=True)


class WorkStream(Stream):
    """A work connection on the bridge; its session counts its traffic."""

    __slots__ = ("_session", "datagrams")

    def __init__(self, stream: connections.Stream, session: AgentSession) -> None:
        """Take the socket of `stream`, which may only be closed afterwards."""
        super().__init__(stream.socket)
        stream.move_to(self)
        self._session = session
        self.datagrams = False
        """True if it carries datagrams."""

    def is_usable(self) -> bool:
        """Return whether it is still idle: open, and the agent has sent nothing."""
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN | select.POLLRDHUP)
            return not self.unread() and not poll.poll(0)
        except (OSError, ValueError):
            return False

    def traffic(self) -> Traffic:
        """Return the bytes on the wire so far, those of TLS included."""
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            return Traffic(*_INFO_BYTES.unpack_from(info, _INFO_OFFSET))
        except (OSError, struct.error):
            # A unix socket, a closed socket, or a kernel before 4.1.
            return Traffic(0, 0)

    def close(self) -> None:
        """Close the socket, and tell the session first."""
        if self.open:
            self._session.discard(self)
        super().close()


class AgentSession:
    """A connected agent."""

    def __init__(
        self,
        name: str,
        identifier: bytes,
        client: Address,
        control: ControlConnection,
        ports: SessionPorts,
    ) -> None:
        """Begin without work connections.

        `identifier` is what the agent's work connections must show; `client` is the agent's
        address.
        """
        self.name = name
        self.identifier = identifier
        self.client = client
        self.control = control
        self.ports = ports
        self.since = time.time()
        self.is_exit = False
        self.challenged = False
        """True while the bridge waits whether the agent still answers; under the bridge's lock."""
        # Guards all below; notified of new work connections and of the end.
        self._changed = threading.Condition()
        self._idle: list[WorkStream] = []
        self._live: set[WorkStream] = set()
        """Work connections that were taken and have not ended."""
        self._waiting = 0
        self._opened = 0
        self._ended_traffic = Traffic(0, 0)
        """Of the work connections that have ended."""
        self.ended = False

    # -- work connections

    @property
    def has_room(self) -> bool:
        """Whether another idle work connection is accepted."""
        return not self.ended and len(self._idle) < IDLE_LIMIT

    def add(self, stream: WorkStream) -> bool:
        """Add an idle work connection; return False if there is no room for it."""
        with self._changed:
            if not self.has_room:
                return False
            self._idle.append(stream)
            self._changed.notify()
        return True

    def take(self, seconds: float) -> WorkStream:
        """Take an idle work connection, or ask the agent to dial one and wait for it.

        Blocks for at most `seconds`.  Raises DialError.
        """
        stream = self._pop()
        if stream is not None:
            return stream
        deadline = time.monotonic() + seconds
        with self._changed:
            if self._waiting >= WAITING_LIMIT:
                raise self._failure(Reason.GENERAL, "too many connections wait for this agent")
            self._waiting += 1
        try:
            self.control.send(tunnel.encode_number(tunnel.WANT, 1))
            while stream is None:
                with self._changed:
                    changed = self._changed.wait_for(self._has_news, deadline - time.monotonic())
                if self.ended:
                    raise self._failure(Reason.HOST_UNREACHABLE, "the agent has disconnected")
                if not changed:
                    raise self._failure(Reason.TIMEOUT, "the agent dialled no work connection")
                stream = self._pop()
        finally:
            with self._changed:
                self._waiting -= 1
        return stream

    def _has_news(self) -> bool:
        return bool(self._idle) or self.ended

    def _failure(self, reason: Reason, said: str) -> DialError:
        return tunnel_failure(self.name, reason, said)

    def _pop(self) -> WorkStream | None:
        """Take the newest, so that the agent can close old ones that are not needed."""
        while True:
            with self._changed:
                if not self._idle:
                    return None
                stream = self._idle.pop()
                self._live.add(stream)
            if stream.is_usable():
                with self._changed:
                    self._opened += 1
                return stream
            stream.close()

    def discard(self, stream: WorkStream) -> None:
        """Count the traffic of a work connection that is about to be closed."""
        sent, received, *_ = stream.traffic()
        with self._changed:
            if stream in self._live:
                self._live.discard(stream)
                ended = self._ended_traffic
                self._ended_traffic = Traffic(ended.sent + sent, ended.received + received)

    def sweep(self) -> None:
        """Close the idle work connections that the agent has closed."""
        with self._changed:
            unusable = [stream for stream in self._idle if not stream.is_usable()]
            self._idle = [stream for stream in self._idle if stream not in unusable]
        for stream in unusable:
            stream.close()

    def end(self) -> bool:
        """Open nothing any more; return False if the session has ended before.

        Streams of bytes continue; streams of datagrams are shut down, so that the next datagram
        of each client can take another upstream.
        """
        with self._changed:
            if self.ended:
                return False
            self.ended = True
            idle, self._idle = self._idle, []
            datagram_streams = [stream for stream in self._live if stream.datagrams]
            self._changed.notify_all()
        for stream in idle:
            stream.close()
        for stream in datagram_streams:
            stream.shutdown()
        return True

    # -- statistics

    def describe(self) -> dict[str, object]:
        """Return the state for netproxyctl; bytes are those on the wire."""
        with self._changed:
            live = list(self._live)
            idle, opened, traffic = len(self._idle), self._opened, [self._ended_traffic]
        traffic += [stream.traffic() for stream in live]
        return {
            "name": self.name,
            "client": str(self.client),
            "since": self.since,
            "rtt": self.control.rtt,
            "exit": self.is_exit,
            "streams": len(live),
            "opened": opened,
            "idle": idle,
            "ports": self.ports.served(),
            "refused": self.ports.refused(),
            "sent": sum(part.sent for part in traffic),
            "received": sum(part.received for part in traffic),
        }

    def summary(self) -> str:
        """Return the state for one line of the log."""
        return (
            f"tunnel {self.name} {self.client}: streams={len(self._live)} idle={len(self._idle)} "
            f"ports: {', '.join(self.ports.served()) or 'none'}"
        )


class AgentSessions:
    """The sessions of a bridge, by agent name.  They outlive every configuration."""

    def __init__(self) -> None:
        # Guards _sessions.
        self._lock = threading.Lock()
        self._sessions: dict[str, AgentSession] = {}

    def get(self, name: str) -> AgentSession | None:
        """Return the session of an agent, None if it is not connected."""
        return self._sessions.get(name)

    def all(self) -> list[AgentSession]:
        """Return all sessions, oldest first."""
        with self._lock:
            return list(self._sessions.values())

    def add(self, session: AgentSession) -> bool:
        """Add a session; return False if its name is taken."""
        with self._lock:
            return self._sessions.setdefault(session.name, session) is session

    def remove(self, session: AgentSession) -> None:
        """Remove a session, unless another one has its name."""
        with self._lock:
            if self._sessions.get(session.name) is session:
                del self._sessions[session.name]

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Return calls that close unusable work connections (interfaces.services.Expirable)."""
        return [session.sweep for session in self.all()]
