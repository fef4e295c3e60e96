"""The session of a connected agent, on the bridge: work connections and statistics.

An AgentSession lasts from the handshake of the control connection to its end, or longer: if its
datagrams go on without the connection, the agent may resume it by another one.  Idle work
connections hold no thread and are not watched: a closed one is noticed when it is taken, or by
the janitor.  Any thread.
"""

from __future__ import annotations

import threading
import time

from netproxy.errors import DialError, Reason
from netproxy.interfaces.flows import Traffic
from netproxy.protocol import tunnel
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.tunnel.control.connection import ControlConnection
    from netproxy.tunnel.control.login import Arrival
    from netproxy.tunnel.path.flows import PathFlow
    from netproxy.tunnel.path.path import Path
    from netproxy.tunnel.ports import SessionPorts
    from netproxy.tunnel.streams.work_stream import WorkStream

IDLE_LIMIT = 256
"""Idle work connections of one agent."""

HELD_SECONDS = 120.0
"""How long a session waits for another control connection while its datagrams go on: for several
dials of an agent whose TCP is blocked."""

WAITING_LIMIT = 1024
"""Dials of one agent that wait for a work connection."""
NOT_CONNECTED, NO_EXIT = "agent '{}' is not connected", "agent '{}' is not an exit"
"""Why a dial through an agent fails at once."""


def tunnel_failure(agent: str, reason: Reason, said: str) -> DialError:
    """Return an error of the tunnel itself, not of the target: a group may try another member."""
    return DialError(reason, said=said, hop=f"tunnel://{agent}", upstream=True)


class AgentSession:
    """A connected agent."""

    def __init__(
        self,
        name: str,
        identifier: bytes,
        arrival: Arrival,
        control: ControlConnection,
        ports: SessionPorts,
    ) -> None:
        """Begin without work connections.

        `identifier` is what the agent's other connections must show; `arrival`: of the control
        connection.
        """
        self.name = name
        self.identifier = identifier
        self.arrival = arrival
        self.control = control
        self.ports = ports
        self.since = time.time()
        self.is_exit = True  # until it registers: an agent that is no exit refuses by itself
        self.reuses = self.takes_paths = self.resumes = self.takes_direct = False
        """What the agent has registered (protocol.tunnel.Registration)."""
        self.path: Path | None = None
        """Carries datagrams beside the work connections; None without one."""
        self.challenged = False
        """True while the bridge waits whether the agent still answers; under the lock of claims."""
        # Guards all below; notified of new work connections and of the end.
        self._changed = threading.Condition()
        self._idle: list[WorkStream] = []
        self._live: set[WorkStream] = set()
        """Work connections that were taken and have not ended."""
        self._waiting = self._opened = self._renewals = 0
        self._ended_traffic = Traffic(0, 0)
        """Of the work connections that have ended."""
        self._held_until: float | None = None
        """Monotonic; None while there is a control connection."""
        self.ended = False

    @property
    def client(self) -> Address:
        """The agent's address."""
        return self.arrival.client

    # -- another control connection

    @property
    def is_held(self) -> bool:
        """Whether the control connection is lost, and the agent may come back."""
        return self._held_until is not None

    def hold(self, control: ControlConnection, now: float) -> bool:
        """Wait for another control connection; return False if nothing goes on meanwhile."""
        path = self.path
        with self._changed:
            if self.control is not control:
                return True
            if self.ended or not self.resumes or path is None or not path.up:
                return False
            self._held_until = now + HELD_SECONDS
        path.probe()  # an agent that has died is noticed soon
        return True

    def resume(self, control: ControlConnection, arrival: Arrival) -> ControlConnection | None:
        """Go on with another control connection; return that of before.

        Returns None if the session cannot be resumed.
        """
        with self._changed:
            if self.ended or not self.resumes or not arrival.is_sealed:
                return None
            before, self.control, self.arrival = self.control, control, arrival
            self._held_until = None
            self._renewals += 1
            # They are of the agent's former address.
            idle, self._idle, waiting = self._idle, [], self._waiting
        self.ports.use_control(control)
        for stream in idle:
            stream.close()
        if waiting:
            control.send(tunnel.encode_number(tunnel.WANT, waiting))
        return before

    def is_given_up(self, now: float) -> bool:
        """Return whether nobody will come back any more: datagrams do not pass either."""
        until, path = self._held_until, self.path
        return until is not None and (now >= until or path is None or not path.up)

    def flow(self, path: int, number: int) -> PathFlow | None:
        """Return a flow of datagrams, None if it has ended; `path`: its path's number."""
        own = self.path
        return own.flows.get(number) if own is not None and own.number == path else None

    # -- work connections

    def renew(self) -> None:
        """Take no work connection of before back: the agent's certificate is verified anew."""
        with self._changed:
            self._renewals += 1

    @property
    def has_room(self) -> bool:
        """Whether another idle work connection is accepted."""
        return not self.ended and len(self._idle) < IDLE_LIMIT

    def add(self, stream: WorkStream) -> bool:
        """Add an idle work connection; return False if there is no room for it."""
        with self._changed:
            if not self.has_room:
                return False
            stream.renewals = self._renewals
            self._idle.append(stream)
            self._changed.notify()
        return True

    def take_back(self, stream: WorkStream) -> bool:
        """Return whether a work connection whose stream has ended is idle again."""
        with self._changed:
            if not self.has_room or stream.renewals != self._renewals:
                return False
            self._live.discard(stream)
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
                stream.counted = True
            if stream.is_usable():
                with self._changed:
                    self._opened += 1
                return stream
            stream.close()

    def discard(self, stream: WorkStream) -> None:
        """Count the traffic of a work connection that is about to be closed."""
        traffic = stream.traffic()
        with self._changed:
            self._live.discard(stream)
            if stream.counted:
                stream.counted = False
                self._add_traffic(traffic)

    def note_replaced(self, stream: WorkStream) -> None:
        """Count the traffic of a work connection whose stream goes on by another one."""
        traffic = stream.traffic()
        with self._changed:
            if stream.counted:
                self._add_traffic(traffic)

    def _add_traffic(self, traffic: Traffic) -> None:
        ended = self._ended_traffic
        sent, received = ended.sent + traffic.sent, ended.received + traffic.received
        self._ended_traffic = Traffic(sent, received)

    def sweep(self) -> None:
        """Close the idle work connections that the agent has closed."""
        with self._changed:
            unusable = [stream for stream in self._idle if not stream.is_usable()]
            self._idle = [stream for stream in self._idle if stream not in unusable]
        for stream in unusable:
            stream.close()

    def end(self) -> bool:
        """Open nothing any more; return False if the session has ended before.

        Streams of bytes go on; those of datagrams end, and clients may take another upstream.
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
            live, idle, opened = len(self._live), len(self._idle), self._opened
            counted = [*self._live, *(stream for stream in self._idle if stream.counted)]
            traffic = [self._ended_traffic]
        traffic += [stream.traffic() for stream in counted]
        path = self.path
        return {
            "name": self.name,
            "client": str(self.client),
            "since": self.since,
            "rtt": self.control.rtt or None,
            "exit": self.is_exit,
            "streams": live,
            "opened": opened,
            "idle": idle,
            "ports": self.ports.served(),
            "refused": self.ports.refused(),
            "sent": sum(part.sent for part in traffic),
            "received": sum(part.received for part in traffic),
            "path": path.describe() if path is not None else None,
        }

    def summary(self) -> str:
        """Return the state for one line of the log."""
        return (
            f"tunnel {self.name} {self.client}: streams={len(self._live)} idle={len(self._idle)} "
            f"ports: {', '.join(self.ports.served()) or 'none'}"
        )
