"""The keys of a path: the one in use, the next one and those of before.

A key is renewed while packets pass.  The bridge offers the next one and uses it as soon as a
packet of the agent has come with it; the agent uses it at once.  Packets of the key before are
accepted for a while.  Pure; the path guards it.
"""

from __future__ import annotations

from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.tunnel.path.sealing import Opener, Sealer

KEPT_SECONDS = 30.0
"""How long packets of a former key are accepted: those that are still on their way."""


class Epoch(NamedTuple):
    """One key in each direction, and the connection IDs that go with it."""

    identifier: bytes
    """This side's connection ID."""
    sealer: Sealer
    opener: Opener
    since: float
    """Monotonic seconds of its beginning."""

    def __repr__(self) -> str:
        return f"Epoch({self.identifier.hex()})"


class PathKeys:
    """The keys of one path, as one side has them."""

    __slots__ = ("current", "_offered", "_former")

    def __init__(self, epoch: Epoch) -> None:
        self.current = epoch
        """The one that seals."""
        self._offered: Epoch | None = None
        self._former: list[tuple[Epoch, float]] = []
        """Each with the time until which its packets are accepted."""

    def take(self, count: int) -> tuple[Sealer, int]:
        """Return what seals `count` packets, and the counter of the first."""
        sealer = self.current.sealer
        counter = sealer.counter
        sealer.counter += count
        return sealer, counter

    def offer(self, epoch: Epoch) -> Epoch | None:
        """Use a key as soon as the other side does; return an offer before that was not taken."""
        before, self._offered = self._offered, epoch
        return before

    def seen(self, epoch: Epoch, now: float) -> bool:
        """Note a packet of a key; return True if that has brought it into use."""
        if epoch is not self._offered:
            return False
        self.use(epoch, now)
        return True

    def use(self, epoch: Epoch, now: float) -> None:
        """Use a key from now on."""
        self._offered = None
        self._former.append((self.current, now + KEPT_SECONDS))
        self.current = epoch

    def needs_renewal(self, now: float, seconds: float) -> bool:
        """Return whether the key is that old, and none has been offered lately."""
        latest = self._offered or self.current
        return now - latest.since >= seconds

    def expire(self, now: float) -> list[Epoch]:
        """Return the former keys whose packets are accepted no more, and forget them."""
        gone = [epoch for epoch, until in self._former if now >= until]
        self._former = [pair for pair in self._former if now < pair[1]]
        return gone

    def all(self) -> list[Epoch]:
        """Return all keys whose packets are accepted."""
        offered = [self._offered] if self._offered is not None else []
        return [self.current, *offered, *(epoch for epoch, _ in self._former)]
