"""A member of a group, or a whole upstream: a dialer with its state and statistics.

A Member wraps a dialer.  It counts dials, failures and live flows, averages the latency of
dials, and backs off after a failure of its proxy.  Health checks mark it up or down.  Members
outlive a reload.  Thread: any.
"""

from __future__ import annotations

import math
import threading
import time

from netproxy.errors import DialError
from netproxy.typed import TYPE_CHECKING, Callable, Hashable, Sequence, TypeVar

if TYPE_CHECKING:
    from netproxy.dialer.group import GroupDialer
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import Destination, PacketConn
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import Dialer

T = TypeVar("T")

BACK_OFF_SECONDS, BACK_OFF_LIMIT = 1.0, 60.0
"""How long a member is asked last after a failure; doubled with each failure in a row."""
LATENCY_WEIGHT = 0.2
"""The weight of the newest dial in the average latency."""


class Member:
    """A dialer around another dialer, with state and statistics."""

    def __init__(
        self, name: str, dialer: Dialer, weight: int = 1, groups: Sequence[GroupDialer] = ()
    ) -> None:
        """`weight` counts in the balance "weighted".  `groups` are those that `dialer` contains."""
        self.name = name
        self.dialer = dialer
        self.carries = dialer.carries
        self.refusal = dialer.refusal
        self.resolves_names = dialer.resolves_names
        self.weight = weight
        self.groups = groups
        self.checking = False
        """True while a health check is running."""
        self.checked_at = 0.0
        """When the last health check began; monotonic seconds."""
        self.credit = 0
        """The credit of the balance "weighted"; guarded by the group's lock."""
        # Guards everything below.  Readers that only display a number do not take it.
        self._lock = threading.Lock()
        self.up = True
        """False if the last health check failed."""
        self.live = 0
        """Connections and UDP sessions."""
        self.dialled = 0
        """Dials in total."""
        self.failed = 0
        """Dials in total that failed by a fault of the upstream."""
        self.latency = 0.0
        """The average duration of a dial in seconds; 0 if unknown."""
        self.error = ""
        """The last error."""
        self._failures = 0
        """Failures in a row."""
        self._failed_at = -1.0
        """When the last of them was noted; monotonic seconds."""
        self._backs_off_until = 0.0

    @property
    def symmetric(self) -> bool:
        """As the dialer's, which may change."""
        return self.dialer.symmetric

    @property
    def knows_bound(self) -> bool:
        """As the dialer's, which may change."""
        return self.dialer.knows_bound

    def dial(self, flow: Flow) -> Stream:
        """Connect to the flow's target.  Blocks.  Raises DialError."""
        stream = self._counted(self.dialer.dial, flow)
        stream.on_close(self.leave)
        return stream

    def dial_packet(self, flow: Flow) -> MemberPacketConn:
        """Open a packet connection.  Blocks.  Raises DialError."""
        return MemberPacketConn(self._counted(self.dialer.dial_packet, flow), self)

    def fixed_for(self, flow: Flow) -> Dialer:
        """Return the member itself, or its dialer with the members that its groups choose."""
        dialer = self.dialer.fixed_for(flow)
        return self if dialer is self.dialer else dialer

    def leave(self) -> None:
        """Count a live flow out."""
        with self._lock:
            self.live -= 1

    def backs_off(self, now: float) -> bool:
        """Return whether other members are asked first, at `now` (monotonic seconds)."""
        return now < self._backs_off_until

    def note_failure(self, error: DialError, started: float = math.inf) -> None:
        """Count a failed dial that began at `started` (monotonic seconds).

        Only a fault of the upstream makes the member back off.  Dials that were in progress at
        the same time count as one failure in a row.
        """
        now = time.monotonic()
        with self._lock:
            self.dialled += 1
            if not error.upstream:
                return
            self.failed += 1
            self.error = str(error)
            if started > self._failed_at:
                self._failures += 1
                seconds = BACK_OFF_SECONDS * 2.0 ** min(self._failures - 1, 16)
                self._backs_off_until = now + min(BACK_OFF_LIMIT, seconds)
                self._failed_at = now

    def note_check(self, error: str) -> bool:
        """Note the result of a health check, "" for success; return whether it is a change."""
        with self._lock:
            changed = self.up == bool(error)
            self.up = not error
            self.error = error or self.error
            if self.up:
                self._failures = 0
                self._backs_off_until = 0.0
            self.checking = False
        return changed

    @property
    def state(self) -> str:
        """One of "down", "failing", "up" and "unused"."""
        if not self.up:
            return "down"
        if self._failures:
            return "failing"
        return "up" if self.dialled or self.checked_at else "unused"

    def _counted(self, dial: Callable[[Flow], T], flow: Flow) -> T:
        """Dial and count the result."""
        started = time.monotonic()
        try:
            connection = dial(flow)
        except DialError as error:
            self.note_failure(error, started)
            raise
        seconds = time.monotonic() - started
        with self._lock:
            self.dialled += 1
            self.live += 1
            self._failures = 0
            self._backs_off_until = 0.0
            weight = LATENCY_WEIGHT if self.latency else 1.0
            self.latency += (seconds - self.latency) * weight
        return connection


class MemberPacketConn:
    """A packet connection that counts its member's live flow out when it is closed."""

    __slots__ = (
        *("_conn", "_member", "_closed", "member", "deliverer"),
        *("send", "wait", "receive", "reaches"),
    )

    def __init__(self, conn: PacketConn, member: Member) -> None:
        self._conn = conn
        self._member = member
        self.member, self.deliverer = conn.member, conn.deliverer
        # Acquired by the first close(): of several threads that close, one is the first.
        self._closed = threading.Lock()
        # The connection's own methods: no datagram pays for a call in between.
        self.send = conn.send
        self.wait = conn.wait
        self.receive = conn.receive
        self.reaches = conn.reaches

    @property
    def bound(self) -> Sequence[Address]:
        """The addresses that targets see."""
        return self._conn.bound

    def prepare(self, flow: Flow) -> Destination:
        """Return the destination for the flow's target.  May block.  Raises DialError."""
        return self._conn.prepare(flow)

    def source(self, peer: Hashable) -> Address:
        """Return the address that the key of a span stands for."""
        return self._conn.source(peer)

    def shutdown(self) -> None:
        """Wake the thread in wait(); the descriptor stays open until close()."""
        self._conn.shutdown()

    def close(self) -> None:
        """Close the descriptor and leave the member."""
        self._conn.close()
        if self._closed.acquire(blocking=False):
            self._member.leave()
