"""The agents that a bridge has: work connections that wait to be used, openings that wait for one, and figures.

A Link is one agent, from its control connection's handshake to its end.  Its work
connections have no thread and are watched by nobody while they wait: one that was
closed meanwhile is found when it is taken, or by the janitor.  Any thread.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from typing import Any, Callable, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import Service
from netproxy.tunnel.control import Control

IDLE_LIMIT = 256  # work connections of one agent that wait
WAITING_LIMIT = 1024  # openings of one agent that wait for a work connection
_INFO_SIZE = 136
_INFO_BYTES = struct.Struct("=QQ")  # of struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received
_INFO_AT = 120


class Traffic(NamedTuple):
    """Bytes on the wire, what TLS adds with them."""

    sent: int
    received: int


class Port(NamedTuple):
    """A port that is open for an agent."""

    host: str
    close: Callable[[], None]


class WorkStream(Stream):
    """A work connection on the bridge's side; its link counts it."""

    __slots__ = ("link", "datagrams")

    def __init__(self, stream: Stream, link: AgentSession) -> None:
        """Takes the connection over: `stream` is only closed afterwards."""
        super().__init__(stream.socket)
        stream.move_to(self)
        self.link = link
        self.datagrams = False

    def quiet(self) -> bool:
        """Whether it is as it should be while it waits: neither closed, nor anything said."""
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN | select.POLLRDHUP)
            return not self.unread() and not poll.poll(0)
        except (OSError, ValueError):
            return False

    def traffic(self) -> Traffic:
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            return Traffic(*_INFO_BYTES.unpack_from(info, _INFO_AT))
        except (OSError, struct.error):  # a unix socket, closed, or a kernel before 4.1
            return Traffic(0, 0)

    def close(self) -> None:
        if self.open:
            self.link.forget(self)
        super().close()


class AgentSession:
    def __init__(self, name: str, control: Control, session: bytes, client: Address) -> None:
        self.name = name
        self.control = control
        self.session = session
        self.client = client
        self.since = time.time()
        self.leads_out = False  # whether its agent is an exit
        self.challenged = False  # another one has asked for its name; guarded by the bridge's lock
        self.ports: dict[Service, Port] = {}  # that are served: the bridge's affair
        self.refused: dict[Service, int] = {}  # that are not, and why
        self.ports_lock = (
            threading.Lock()
        )  # guards these two, also while a port is bound, which does not wait
        self._changed = (
            threading.Condition()
        )  # guards all below, and tells of work connections and of the end
        self._idle: list[WorkStream] = []
        self._waiting = 0
        self._live: set[WorkStream] = set()  # that were taken
        self._opened = 0
        self._moved = Traffic(0, 0)  # by those that have ended
        self.ended = False

    # -- work connections

    @property
    def has_room(self) -> bool:
        return not self.ended and len(self._idle) < IDLE_LIMIT

    def add(self, stream: WorkStream) -> bool:
        """One more that waits; False where there are enough of them, or the link has ended."""
        with self._changed:
            if not self.has_room:
                return False
            self._idle.append(stream)
            self._changed.notify()
        return True

    def take(self, seconds: float) -> WorkStream:
        """One that has waited, or that the agent dials when asked to; DialError."""
        stream = self._pop()
        if stream is not None:
            return stream
        deadline = time.monotonic() + seconds
        with self._changed:
            if self._waiting >= WAITING_LIMIT:
                raise _failure(Reason.GENERAL, "too many connections wait for this agent")
            self._waiting += 1
        try:
            self.control.send(tunnel.encode_number(tunnel.WANT, 1))
            while stream is None:
                with self._changed:
                    there = self._changed.wait_for(
                        lambda: self._idle or self.ended, deadline - time.monotonic()
                    )
                if self.ended:
                    raise _failure(Reason.HOST_UNREACHABLE, "the agent has gone")
                if not there:
                    raise _failure(Reason.TIMEOUT, "the agent gave no work connection")
                stream = self._pop()
        finally:
            with self._changed:
                self._waiting -= 1
        return stream

    def _pop(self) -> WorkStream | None:
        """The one that came last, so that an agent can let go of those that nobody needs."""
        while True:
            with self._changed:
                if not self._idle:
                    return None
                stream = self._idle.pop()
                self._live.add(stream)
            if stream.quiet():
                with self._changed:
                    self._opened += 1
                return stream
            stream.close()

    def forget(self, stream: WorkStream) -> None:
        """It is about to be closed."""
        sent, received = stream.traffic()
        with self._changed:
            if stream in self._live:
                self._live.discard(stream)
                self._moved = Traffic(self._moved.sent + sent, self._moved.received + received)

    def sweep(self) -> None:
        """Lets go of those that wait and were closed by the agent."""
        with self._changed:
            gone = [stream for stream in self._idle if not stream.quiet()]
            self._idle = [stream for stream in self._idle if stream not in gone]
        for stream in gone:
            stream.close()

    def end(self) -> bool:
        """Nothing is opened any more; streams of bytes go on, those of datagrams are cut.  False where it had ended before."""
        with self._changed:
            if self.ended:
                return False
            self.ended = True
            idle, self._idle = self._idle, []
            cut = [stream for stream in self._live if stream.datagrams]
            self._changed.notify_all()
        for stream in idle:
            stream.close()
        for stream in cut:
            stream.shutdown()  # their clients' next datagrams find another way, where there is one
        return True

    # -- figures

    def describe(self) -> dict[str, Any]:
        """For people: bytes are those on the wire."""
        with self._changed:
            live = list(self._live)
            idle, opened, traffic = len(self._idle), self._opened, [self._moved]
        traffic += [stream.traffic() for stream in live]
        with self.ports_lock:
            ports = [
                f"{Address(port.host, service.port)}/{service.network}"
                for service, port in sorted(self.ports.items())
            ]
            refused = {
                str(service): tunnel.OUTCOMES[outcome]
                for service, outcome in sorted(self.refused.items())
            }
        return {
            "name": self.name,
            "client": str(self.client),
            "since": self.since,
            "rtt": self.control.rtt,
            "exit": self.leads_out,
            "streams": len(live),
            "opened": opened,
            "idle": idle,
            "ports": ports,
            "refused": refused,
            "sent": sum(one.sent for one in traffic),
            "received": sum(one.received for one in traffic),
        }


class AgentSessions:
    """By agent's name.  Outlives every configuration."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _links
        self._sessions: dict[str, AgentSession] = {}

    def get(self, name: str) -> AgentSession | None:
        return self._sessions.get(name)

    def all(self) -> list[AgentSession]:
        with self._lock:
            return list(self._sessions.values())

    def add(self, link: AgentSession) -> bool:
        """False where its name is taken."""
        with self._lock:
            return self._sessions.setdefault(link.name, link) is link

    def remove(self, link: AgentSession) -> None:
        with self._lock:
            if self._sessions.get(link.name) is link:
                del self._sessions[link.name]

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """For the janitor."""
        return [link.sweep for link in self.all()]


def _failure(reason: Reason, said: str) -> DialError:
    return DialError(reason, said=said, upstream=True)
