"""Rates: divides the bytes per second of a limit fairly among the flows that are under it.

A flow carries bytes until it reaches its mark; then it needs a lease.  It has asked for the lease
when the one before began, and gets it in the order of asking: so flows that want more than their
share get equal shares, and a flow that wants less finds its lease ready.  A flow whose lease is
not ready waits (TCP) or drops (UDP).  The path of a byte only compares two numbers, and no flow
has a thread or a timer of its own.

Several processes share a limit: each adds what the others have used since it looked last.  When
that was before its burst was whole again, or before it knew the limit at all, it cannot tell from
the amount when they used it; then it takes the time that they have noted in the ledger.

Thread: any; the caller of Bucket holds the lock of AccountBook.  LeasedPace.renew() takes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque

from netproxy.access.accounts.ledger import LEASED_UP, LEASED_UP_UNTIL, OPENED_UNTIL, Slot
from netproxy.interfaces.accounts import UNLIMITED
from netproxy.typed import Sequence

LEASE_SECONDS = 0.04
"""The lease of a flow alone: it wakes up 25 times a second."""
ROUND_SECONDS = 0.12
"""The leases of all flows that wait take so long, unless they would be shorter than LEASE_LEAST:
a flow is delayed by so much.  Each wake-up costs some 50 microseconds, however short the lease."""
LEASE_LEAST = 2048
"""Bytes: a shorter lease costs more system calls than it moves.  A datagram fits in."""
BURST_SECONDS, BURST_LEAST = 0.25, 65536
"""The burst of a limit that names none, in seconds of its rate, and the least one in bytes.  A
wake-up that comes late by less loses nothing."""
QUEUE_WEIGHT = 0.25
"""What the number of waiting flows at one lease counts in their mean, which sets the size of the
leases.  Without the mean, a flow that always asks when few wait always gets larger leases."""
FIRST_SECONDS = 0.5
"""A new flow gets a first lease at once, for a lone datagram, if less than this is leased ahead."""
_EXPECT = -1
"""The mark of a running flow that gets its first limit: it counts from what was moved by then."""


class Level:
    """What a limit allows at the moment: grows with time, shrinks with what was used."""

    __slots__ = ("rate", "burst", "amount", "_counted", "_at")

    def __init__(self, rate: float, burst: float, total: int, now: float) -> None:
        """`rate` is a second's; `total` is what was used before `now`, in monotonic seconds."""
        self.rate, self.burst = rate, burst
        self.amount = burst
        self._counted = total
        self._at = now

    def update(self, total: int, now: float) -> float:
        """Return the amount; `total` is what all processes have used so far."""
        grown = self.amount + self.rate * (now - self._at) - (total - self._counted)
        self.amount = min(self.burst, grown)
        self._counted, self._at = total, now
        return self.amount

    # -- for several processes; `slot` is that of the subject

    def begin(self, slot: Slot, now: float) -> None:
        """Begin with what other processes have left."""
        self._cap(slot, now)

    def follow(self, slot: Slot, total: int, now: float) -> float:
        """Return the amount, like update()."""
        was_whole = self.amount + self.rate * (now - self._at) >= self.burst
        is_used = total != self._counted
        self.update(total, now)
        if was_whole and is_used:
            self._cap(slot, now)
        return self.amount

    def note(self, slot: Slot) -> None:
        """Tell other processes until when the rate is used."""
        slot.note(OPENED_UNTIL, self._at - self.amount / self.rate)

    def _cap(self, slot: Slot, now: float) -> None:
        self.amount = min(self.amount, (now - slot.latest(OPENED_UNTIL)) * self.rate)


def default_burst(rate: int) -> int:
    """Return the burst of a rate that has no burst of its own, in bytes."""
    return max(BURST_LEAST, int(rate * BURST_SECONDS))


class Bucket:
    """A limit of bytes per second, in one direction."""

    __slots__ = (
        *("key", "slot", "_word", "_until", "_rate", "_burst_seconds"),
        *("_leased", "_counted", "_queue", "_waiting", "_alone"),
    )

    def __init__(self, key: str, slot: Slot, word: int, rate: int, burst: int) -> None:
        """`key` names the limit.  `word` of `slot` counts the leases."""
        self.key = key
        self.slot = slot
        self._word, self._until = word, word - LEASED_UP + LEASED_UP_UNTIL
        self._set(rate, burst)
        # Everything that was leased is allowed until then, in monotonic seconds.
        self._leased = max(0.0, slot.latest(self._until)) if slot.is_shared else 0.0
        # The leases of all processes that _leased contains.
        self._counted = slot.sum(word)
        # When the leases begin that flows wait for, the first one first.
        self._queue: deque[float] = deque()
        # How many flows wait, on the average of the last leases.
        self._waiting = 0.0

    def take_slot(self, slot: Slot) -> None:
        """Go on with another slot: the one before may belong to another subject."""
        self.slot, self._counted = slot, slot.sum(self._word)

    def configure(self, rate: int, burst: int) -> None:
        """Apply another rate and burst, in bytes."""
        now = time.monotonic()
        # What is leased ahead is the same number of bytes.
        self._leased = now + (self._leased - now) * self._rate / rate
        self._set(rate, burst)

    def _set(self, rate: int, burst: int) -> None:
        self._rate = float(rate)
        # Every lease needs these.
        self._burst_seconds = max(burst, LEASE_LEAST) / self._rate
        self._alone = max(LEASE_LEAST, int(LEASE_SECONDS * self._rate))

    def proposes(self, now: float) -> int:
        """Return the bytes of the next lease: fewer if many flows wait."""
        queue = self._queue
        while queue and queue[0] <= now:
            queue.popleft()
        waiting = self._waiting
        if queue or waiting:
            waiting += (len(queue) - waiting) * QUEUE_WEIGHT
            # Of a crowd that has gone nothing is left in the end: leases take fewer steps then.
            self._waiting = waiting if waiting > QUEUE_WEIGHT / 2 else 0.0
        else:
            return self._alone
        size = min(LEASE_SECONDS, ROUND_SECONDS / (waiting + 1)) * self._rate
        return max(LEASE_LEAST, int(size))

    def lease(self, size: int, now: float) -> float:
        """Lease so many bytes; return when the lease begins, in monotonic seconds."""
        if self.slot.is_shared:
            self._follow(now)
        leased, whole = self._leased, now - self._burst_seconds
        self._leased = leased = (leased if leased > whole else whole) + size / self._rate
        self._count(size)
        if leased > now:
            self._queue.append(leased)
        return leased

    def give_back(self, size: int) -> None:
        """Take back what was leased and not used, or lease more than asked if it is negative."""
        self._leased -= size / self._rate
        self._count(-size)

    def is_crowded(self, now: float) -> bool:
        """Return whether so much is leased ahead that a new flow has to wait like the others."""
        return self._leased > now + FIRST_SECONDS

    def is_full(self, now: float) -> bool:
        """Return whether nothing of the limit is used."""
        if self.slot.is_shared:
            self._follow(now)
        return self._leased <= now - self._burst_seconds

    def _count(self, size: int) -> None:
        """Count so many bytes as leased."""
        slot = self.slot
        slot.add(self._word, size)
        self._counted += size
        if slot.is_shared:
            slot.note(self._until, self._leased)

    def _follow(self, now: float) -> None:
        """Count what other processes have leased since the last time."""
        total = self.slot.sum(self._word)
        if total == self._counted:
            return
        was_whole = self._leased < now - self._burst_seconds
        self._leased += (total - self._counted) / self._rate
        self._counted = total
        if was_whole:
            self._leased = max(self._leased, self.slot.latest(self._until))


class LeasedPace:
    """How many bytes one direction of a flow may carry (interfaces.accounts.Pace)."""

    __slots__ = ("mark", "lease", "_lock", "_buckets", "_begins", "_blocked")

    def __init__(self, lock: threading.Lock) -> None:
        """`lock` guards the buckets; there are none before configure()."""
        self._lock = lock
        self._buckets: Sequence[Bucket] = ()
        self.mark = UNLIMITED
        # Bytes of the next lease, which the buckets have counted.
        self.lease = 0
        # When it begins, in monotonic seconds.
        self._begins = 0.0
        self._blocked = ""

    def renew(self, moved: int) -> int:
        """Return how many bytes may be carried now, 0 if none."""
        now = time.monotonic()
        if now < self._begins and self.mark != _EXPECT:
            # Without the lock: datagrams may come far beyond the rate.
            return max(0, self.mark - moved)
        with self._lock:
            if self.mark == _EXPECT:
                self.mark = moved
            while self._buckets and moved >= self.mark and now >= self._begins:
                self.mark += self.lease
                self._ask(now)
            return max(0, self.mark - moved)

    def delay(self) -> float:
        """Return the seconds after which renew() may return more."""
        return max(0.001, self._begins - time.monotonic())

    def decided(self) -> str:
        """Return the key of the limit that has refused more."""
        return self._blocked

    # -- the caller holds the lock

    def configure(self, buckets: Sequence[Bucket], is_new: bool) -> None:
        """Be under these buckets from now on; `is_new`: the flow has moved nothing yet."""
        if not buckets and not self._buckets:
            return
        if not self._buckets:
            self.mark = 0 if is_new else _EXPECT
        self._give_back(self.lease)
        self._buckets, self.lease, self._begins = buckets, 0, 0.0
        now = time.monotonic()
        if not buckets:
            self.mark = UNLIMITED
        elif is_new and not any(bucket.is_crowded(now) for bucket in buckets):
            for bucket in buckets:
                bucket.lease(LEASE_LEAST, now)
            self.mark = LEASE_LEAST

    def close(self, moved: int) -> None:
        """Give back what was leased and not used; `moved`: the count at the end."""
        unused = 0 if self.mark in (_EXPECT, UNLIMITED) else self.mark - moved
        self._give_back(self.lease + unused)
        self._buckets, self.lease, self.mark = (), 0, UNLIMITED

    def _ask(self, now: float) -> None:
        """Ask all buckets for the next lease: it begins when the last one allows it."""
        buckets = self._buckets
        if len(buckets) == 1:
            # The usual case, in few steps: flows far below their rate pay for nothing but this.
            bucket = buckets[0]
            self.lease = size = bucket.proposes(now)
            self._begins, self._blocked = bucket.lease(size, now), bucket.key
            return
        size = min(bucket.proposes(now) for bucket in buckets)
        self._begins, self.lease = 0.0, size
        for bucket in buckets:
            begins = bucket.lease(size, now)
            if begins > self._begins:
                self._begins, self._blocked = begins, bucket.key

    def _give_back(self, size: int) -> None:
        for bucket in self._buckets:
            bucket.give_back(size)
