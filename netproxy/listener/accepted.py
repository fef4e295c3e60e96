"""A connection that a TCP listener has accepted.

It is counted twice: among the unfinished handshakes of its listener (listener.shedding), and
among the connections of its admission (access.limits).  Either of them may close it to make
room for another client.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from netproxy.errors import StreamError
from netproxy.interfaces.listeners import EVICTED
from netproxy.listener.handshake_driver import Connection
from netproxy.net.stream import poll_watched

if TYPE_CHECKING:
    from netproxy.interfaces.listeners import Admission
    from netproxy.listener.tcp import TcpListener


class Accepted(Connection):
    """A connection that an admission has counted in (interfaces.listeners.Resident)."""

    __slots__ = ("listener", "admission")

    listener: TcpListener
    admission: Admission

    def listener_name(self) -> str:
        """Return the name of the listener, for records."""
        return self.listener.name

    # -- among the handshakes

    def has_unread(self) -> bool:
        """Return whether the socket holds bytes, or an end, that were not read yet."""
        try:
            return bool(poll_watched(((self.stream.socket, select.POLLIN),), 0))
        except (StreamError, ValueError):
            return True  # it has ended just now

    def left_handshake(self) -> None:
        """Count the handshake out."""
        self.listener.handshakes.leave(self)
        self.counted = ""

    # -- among the connections

    @property
    def handshaking(self) -> bool:
        """True until the client has said what it wants."""
        return self.stream.handshaking

    def idle(self) -> float:
        """Return the seconds since a byte came or went."""
        return self.stream.idle()

    def evict(self) -> None:
        """End: its client has most connections, and another client needs one.  Thread: any."""
        self.end_because(EVICTED)

    def end_because(self, why: str) -> None:
        """End for a reason of interfaces.listeners.DECIDED_BY.  Thread: any."""
        self.refused = self.stream.evicted = why
        self.stream.shutdown()

    def ended(self) -> None:
        """Close the stream, and count the connection out."""
        if self.refused == EVICTED:
            self.listener.note_eviction(self)
        self.listener.forget(self)
        if self.stream.trace is not None:
            self.stream.trace.step("closed")
        self.stream.close()
        self.admission.leave(self.client.host, self)
