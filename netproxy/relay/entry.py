"""The state machine of the UDP relay: what must happen before a target's datagrams are sent.

An Entry is one target of one client endpoint.  A NatMapping is one upstream of a client
endpoint, shared by all entries that use it.  Until an entry is READY its datagrams wait.
This module changes states only.  It does no I/O and has no lock: NatTable, which
owns the lock, holds it for every call.  The listener's reader thread alone reads
Entry.destination without it.
"""

from __future__ import annotations

import enum
import math

from netproxy.typed import TYPE_CHECKING, Hashable, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import Destination
    from netproxy.interfaces.flows import Flow
    from netproxy.relay.client import Client
    from netproxy.relay.session import Session
    from netproxy.relay.table.waiting_datagrams import WaitingDatagram

DNS_PORT = 53
ONE_WAY_SECONDS = 60.0
"""Idle time of a session that has received nothing."""
DNS_SECONDS = 10.0
"""Idle time of a session that has sent to name servers only and lacks a reply."""

Key: TypeAlias = tuple[Hashable, Hashable]
"""The key of an entry: the client's key at its socket, and the bytes that name the target."""


class Action(enum.Enum):
    """What is left to do for an entry once the lock is released."""

    NONE = "none"
    DIAL = "dial the upstream of its mapping"
    PREPARE = "prepare its destination"


class EntryState(enum.Enum):
    """What an entry waits for.

    ROUTING: a lookup, because the choice of the upstream depends on the target's address.
    DIALLING: the upstream of its mapping.  PREPARING: its destination, which may need a lookup.
    FLUSHING: the thread that prepared it sends what has waited; newer datagrams queue behind.
    READY: nothing.  FAILED: a dial or a lookup has failed.  GONE: out of the table.

    Rows are events.  "-": the event does not happen, or changes nothing.

    ========  =========  =========  =========  ========  =====  ========  ====
    event     ROUTING    DIALLING   PREPARING  FLUSHING  READY  FAILED    GONE
    ========  =========  =========  =========  ========  =====  ========  ====
    datagram  wait       wait       wait       wait      send   retry(1)  drop
    routed    (2)        -          -          -         -      -         -
    moved     -          (2)(4)     -          -         -      -         -
    retry     -          -          -          -         -      (2)       -
    dialled   -          PREPARING  -          -         -      -         -
    prepared  -          -          FLUSHING   -         -      -         -
    flushed   -          -          -          READY     -      -         -
    failed    GONE(3)    FAILED     FAILED     -         -      FAILED    -
    removed   GONE       GONE       GONE       GONE      GONE   GONE      -
    ========  =========  =========  =========  ========  =====  ========  ====

    (1) From retry_at on; before, the datagram is dropped.
    (2) PREPARING if the mapping is OPEN, DIALLING if it is or can be dialled, FAILED if its last
        dial has failed a moment ago.
    (3) NatTable removes it, so that the next datagram starts again with the router.
    (4) With another mapping: the connection of the mapping is for another target.
    """

    ROUTING = "routing"
    DIALLING = "dialling"
    PREPARING = "preparing"
    FLUSHING = "flushing"
    READY = "ready"
    FAILED = "failed"
    GONE = "gone"


_QUEUEING = frozenset(
    (EntryState.ROUTING, EntryState.DIALLING, EntryState.PREPARING, EntryState.FLUSHING)
)
_CAN_FAIL = frozenset((EntryState.DIALLING, EntryState.PREPARING, EntryState.FAILED))


class MappingState(enum.Enum):
    """The state of a mapping's upstream connection.

    Rows are events.  "-": the event does not happen, or changes nothing.

    ===========  ===========  ===========  =====  =====
    event        CLOSED       DIALLING     OPEN   ENDED
    ===========  ===========  ===========  =====  =====
    needed       DIALLING(1)  -            -      -
    dialled      -            OPEN         -      -
    dial failed  -            CLOSED       -      -
    removed      ENDED        ENDED        ENDED  -
    ===========  ===========  ===========  =====  =====

    (1) From retry_at on.
    """

    CLOSED = "closed"
    DIALLING = "dialling"
    OPEN = "open"
    ENDED = "ended"


class Entry:
    """One target of one client endpoint.  Its on_ methods are the events of EntryState."""

    __slots__ = (
        *("key", "client", "flow", "state", "mapping", "session", "prepared", "destination"),
        *("written", "waiting", "retry_at", "ended"),
    )

    def __init__(
        self, key: Key, client: Client, flow: Flow, written: Address | None = None
    ) -> None:
        """Make an entry in state ROUTING.  `flow` has no addresses yet.

        `written`: the fake address that the client writes to; None if it is the flow's target.
        """
        self.key = key
        self.client = client
        self.flow = flow
        self.state = EntryState.ROUTING
        self.mapping: NatMapping
        """Not set before the event "routed"."""
        self.session: Session
        """The mapping's, at hand for the reader thread."""
        self.prepared: Destination | None = None
        """Set by "prepared": from then on the target may reply."""
        self.destination: Destination | None = None
        """Set by "flushed", for good: the reader thread sends there and looks at no state."""
        self.written = written
        self.waiting: list[WaitingDatagram] = []
        self.retry_at = 0.0
        """Monotonic time of the next attempt, in state FAILED."""
        self.ended = ""
        """Why it was removed, in state GONE; why it has failed, in state FAILED."""

    @property
    def queueing(self) -> bool:
        """True if the entry's datagrams wait."""
        return self.state in _QUEUEING

    def on_routed(self, flow: Flow, mapping: NatMapping, now: float) -> Action:
        """Note the upstream; `flow` has the addresses that were looked up for it."""
        if self.state is not EntryState.ROUTING:
            return Action.NONE
        self.flow = flow
        self.mapping = mapping
        self.session = mapping.session
        mapping.add(self)
        return self._begin(now)

    def on_moved(self) -> bool:
        """Leave a mapping whose connection is for another target; on_routed() follows.

        Returns False if it does not wait for that connection.
        """
        if self.state is not EntryState.DIALLING:
            return False
        del self.mapping.entries[self.key]
        self.state = EntryState.ROUTING
        return True

    def on_retry(self, now: float) -> Action:
        """Try again, if it is time."""
        if self.state is not EntryState.FAILED or now < self.retry_at:
            return Action.NONE
        return self._begin(now)

    def _begin(self, now: float) -> Action:
        mapping = self.mapping
        if mapping.state is MappingState.OPEN:
            self.state = EntryState.PREPARING
            return Action.PREPARE
        needs_dial = mapping.on_needed(now)
        if mapping.state is MappingState.DIALLING:
            self.state = EntryState.DIALLING
            return Action.DIAL if needs_dial else Action.NONE
        self.state = EntryState.FAILED
        self.retry_at = mapping.retry_at
        return Action.NONE

    def on_dialled(self) -> bool:
        """Return True if the destination is to be prepared now."""
        if self.state is not EntryState.DIALLING:
            return False
        self.state = EntryState.PREPARING
        return True

    def on_prepared(self, destination: Destination) -> bool:
        """Return True if the caller is to send what waits."""
        if self.state is not EntryState.PREPARING:
            return False
        self.state = EntryState.FLUSHING
        self.prepared = destination
        return True

    def on_flushed(self) -> None:
        """Let the reader thread send.  The queue must be empty, to keep the order."""
        if self.state is EntryState.FLUSHING:
            self.state = EntryState.READY
            self.destination = self.prepared

    def on_failed(self, retry_at: float) -> bool:
        """Return True if the entry has failed; what waits for it is lost."""
        if self.state not in _CAN_FAIL:
            return False
        self.state = EntryState.FAILED
        self.retry_at = retry_at
        return True

    def on_removed(self, reason: str) -> None:
        """Leave the table.

        A run whose entry was looked up before still goes to `destination`, if it is set.
        """
        self.state = EntryState.GONE
        self.ended = reason


class NatMapping:
    """One upstream of a client endpoint: the entries that use it, and the state of its dial.

    It has the same session from beginning to end.  Its on_ methods are the events of
    MappingState.
    """

    __slots__ = ("client", "key", "session", "state", "retry_at", "entries", "only_dns", "name")

    def __init__(self, client: Client, key: object, session: Session) -> None:
        """Make a mapping in state CLOSED.  `key` is its key among the client's mappings."""
        self.client = client
        self.key = key
        self.session = session
        self.state = MappingState.CLOSED
        self.retry_at = 0.0
        """Monotonic time from which on the upstream may be dialled."""
        self.entries: dict[Key, Entry] = {}
        """Oldest first."""
        self.only_dns = True
        """True if all targets so far were name servers."""
        self.name = ""
        """The name of the first target with a fake address, "" for none."""

    def add(self, entry: Entry) -> None:
        """Add an entry that uses this mapping."""
        self.entries[entry.key] = entry
        self.only_dns = self.only_dns and entry.flow.target.port == DNS_PORT
        if entry.written is not None and not self.name:
            self.name = entry.flow.target.host

    def reaches(self, target: Address) -> bool:
        """Return whether the connection is for a target, as far as is known."""
        return self.state is not MappingState.OPEN or self.session.conn.reaches(target)

    def idle_limit(self, idle: float) -> float:
        """Return the seconds that the session may be idle; `idle` is the timeout of the table."""
        session = self.session
        if self.client.bound_ended is not None:
            return math.inf
        if self.only_dns:
            # It ends with its last reply: a resolver asks from a new port each time.
            answered = 0 < session.datagrams_sent <= session.datagrams_received
            return 0.0 if answered else min(DNS_SECONDS, idle)
        return idle if session.received else min(ONE_WAY_SECONDS, idle)

    def on_needed(self, now: float) -> bool:
        """Return True if the caller is to dial."""
        if self.state is not MappingState.CLOSED or now < self.retry_at:
            return False
        self.state = MappingState.DIALLING
        return True

    def on_dialled(self) -> bool:
        """Return False if the mapping was removed meanwhile: the connection is not wanted."""
        if self.state is not MappingState.DIALLING:
            return False
        self.state = MappingState.OPEN
        return True

    def on_dial_failed(self, retry_at: float) -> bool:
        """Return False if the mapping was removed meanwhile."""
        if self.state is not MappingState.DIALLING:
            return False
        self.state = MappingState.CLOSED
        self.retry_at = retry_at
        return True

    def on_removed(self) -> None:
        """Leave the table."""
        self.state = MappingState.ENDED
