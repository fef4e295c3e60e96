"""The unfinished handshakes of a TCP listener, and whose is shed if there are too many.

The client (interfaces.fairness) that has most of them loses one of its own, a silent one
first; a client with fewer loses nothing.  Up to the limit a connection costs one dictionary
entry and its client is not looked at.  Beyond the limit each connection is counted for its
client once: when it comes, or when the limit is first exceeded.

Beyond the limit a silent connection is shed, beyond twice as many any: in a burst clients have
sent their requests, and the daemon is late.  Nothing is refused by chance below the limit, as
OpenSSH's MaxStartups does: that would only meet clients that take nothing from others.
"""

from __future__ import annotations

import threading

from netproxy.interfaces.fairness import FairTable, client_key
from netproxy.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream

SHED_CANDIDATES = 16
"""How many of a client's oldest handshakes are examined to find a silent one.  Each examination
is a system call."""


class Handshaking(Protocol):
    """A connection that may not have finished its handshake.  Must be hashable."""

    client: Address
    stream: Stream
    counted: str
    """The client that it counts for, "" if it is not counted."""
    refused: str
    """Why the daemon ends it, "" if it does not."""

    def listener_name(self) -> str:
        """Return the name of the listener that accepted it, for records."""

    def has_unread(self) -> bool:
        """Return whether the socket holds bytes, or an end, that were not read yet."""


class Handshakes:
    """The connections of one listener that may not have finished their handshake.

    The accepting thread adds to `uncounted`, and calls shed() if there are more than `room`.
    The thread that ends a handshake or a connection calls leave() if the connection is counted.
    set_limit() comes before all of them.
    """

    __slots__ = ("uncounted", "room", "_limit", "_lock", "_counted")

    def __init__(self) -> None:
        self.uncounted: dict[Handshaking, None] = {}
        """Oldest first; some may have finished their handshake.  Others remove what has ended."""
        self.room = self._limit = 0
        """`room`: how many may be uncounted."""
        # Guards _counted, _limit and room.
        self._lock = threading.Lock()
        self._counted: FairTable[Handshaking] = FairTable(0)

    def set_limit(self, limit: int) -> None:
        """Shed beyond so many from now on; a lower limit ends nothing at once.  Thread: any."""
        with self._lock:
            self._limit, self._counted.limit = limit, 2 * limit
            self._set_room()

    def shed(self) -> Handshaking | None:
        """Count what is uncounted; return the connection to close, None if there is room.

        Thread: the accepting one.
        """
        for connection in list(self.uncounted):  # others remove theirs meanwhile
            self.uncounted.pop(connection, None)
            yielded = self._count(connection)
            if yielded is not None:
                return yielded
        with self._lock:
            candidates = self._candidates()
        for candidate in candidates:
            if not candidate.has_unread():
                return candidate if self.leave(candidate) else None
        return None

    def leave(self, connection: Handshaking) -> bool:
        """Count a connection out; return False if it was not counted.

        Its stream is no longer `handshaking`, or its end has come.
        """
        with self._lock:
            try:
                self._counted.remove(connection.counted, connection)
            except KeyError:
                return False
            self._set_room()
            return True

    def _count(self, connection: Handshaking) -> Handshaking | None:
        """Count a connection for its client unless its handshake is over; return what yields."""
        # Set before the stream is examined.  The thread that ends the handshake does both in
        # reverse order, so at least one of the two threads sees the other's change.
        key = connection.counted = client_key(connection.client.host)
        with self._lock:
            if not connection.stream.handshaking:
                return None
            yielded = self._counted.put(key, connection)
            self._set_room()
            return yielded

    def _candidates(self) -> list[Handshaking]:
        """Return the connections of which one must go.  Under the lock."""
        if len(self._counted) <= self._limit:
            return []
        return self._counted.yielding(SHED_CANDIDATES)

    def _set_room(self) -> None:
        self.room = max(0, self._limit - len(self._counted))
