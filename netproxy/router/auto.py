"""The upstream `auto`: direct first, and the configured upstream if that fails.

What has worked for a target (host and port) is remembered for a while.  Three failures
count against direct: no connection within the short time of a trial, a refusal, and a
reset before the target has sent a byte.  A reset shows in the record of the connection
only, because bytes that were sent are never sent again.  Any thread.
"""

from __future__ import annotations

import threading
import time

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.bounded import BoundedDict
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.datagrams import PacketConn
    from netproxy.interfaces.flows import Flow, Record
    from netproxy.interfaces.networks import HostSet
    from netproxy.interfaces.routing import Dialer

# Connections whose record is awaited: one for each port of a client, which has no more.
WATCHED_LIMIT = 65536
# The upstream must not be tried for a target that may not be reached.
_FINAL = frozenset({Reason.DENIED, Reason.LOOP})


class Pins(NamedTuple):
    """Hosts whose dialer is configured, so that nothing is tried.  `direct` wins."""

    direct: HostSet
    upstream: HostSet


class AutoDialers(NamedTuple):
    """The dialers that `auto` chooses from."""

    direct: Dialer
    trial: Dialer
    """Direct as well, with a short time to connect."""
    upstream: Dialer


class Verdicts:
    """Remembers which targets need the upstream.  Outlives a reload."""

    def __init__(self, seconds: float, limit: int) -> None:
        """Keep a verdict for `seconds`, and at most `limit` of them; the oldest is removed."""
        self._seconds = seconds
        # Guards _verdicts.
        self._lock = threading.Lock()
        # When the verdict expires (monotonic seconds), and whether the upstream is needed.
        self._verdicts: BoundedDict[Address, tuple[float, bool]] = BoundedDict(limit)

    def configure(self, seconds: float, limit: int) -> None:
        """Apply the settings of a new configuration to what is learnt from now on."""
        with self._lock:
            self._seconds = seconds
            self._verdicts.limit = limit

    def learn(self, target: Address, needs_upstream: bool) -> None:
        """Remember whether a target needs the upstream."""
        with self._lock:
            self._verdicts.put(target, (time.monotonic() + self._seconds, needs_upstream))

    def needs_upstream(self, target: Address) -> bool | None:
        """Return the verdict on a target, None if there is none."""
        with self._lock:
            until, needs_upstream = self._verdicts.get(target, (0.0, False))
            if time.monotonic() < until:
                return needs_upstream
            self._verdicts.pop(target, None)
            return None

    def clear(self) -> int:
        """Forget all verdicts; return how many there were."""
        with self._lock:
            count = len(self._verdicts)
            self._verdicts.clear()
            return count

    def items(self) -> Iterator[tuple[Address, str, float]]:
        """Return target, "direct" or "upstream", and the seconds left, oldest first."""
        now = time.monotonic()
        with self._lock:
            verdicts = list(self._verdicts.items())
        return (
            (target, "upstream" if needs_upstream else "direct", until - now)
            for target, (until, needs_upstream) in verdicts
            if until > now
        )


class AutoDialer:
    """A Dialer that learns from its dials and from the records of its connections."""

    name = "auto"
    refusal = Reason.UNSUPPORTED
    symmetric = knows_bound = False

    def __init__(self, dialers: AutoDialers, pins: Pins, verdicts: Verdicts) -> None:
        self.direct, self._trial, self.upstream = dialers
        # An upstream that resolves names may know names that are not found here; with any other
        # upstream, one lookup serves both dialers.
        self.resolves_names = dialers.upstream.resolves_names
        # Two dialers cannot wait for the peer of one BIND.
        self.carries = (dialers.direct.carries | dialers.upstream.carries) - {"bind"}
        self._pins = pins
        self._verdicts = verdicts
        # Guards _watched.
        self._lock = threading.Lock()
        # (client, target) of the direct connections that were tried and still run.
        self._watched: set[tuple[Address, Address]] = set()

    def pinned_dialer(self, flow: Flow) -> Dialer | None:
        """Return the dialer that is configured for the target; None if it is to be tried."""
        host = flow.target.host
        if host in self._pins.direct:
            return self.direct
        return self.upstream if host in self._pins.upstream else None

    def preferred_dialer(self, flow: Flow) -> Dialer:
        """Return the dialer by pins and verdicts; direct if there is neither."""
        pinned = self.pinned_dialer(flow)
        if pinned is not None:
            return pinned
        return self.upstream if self._verdicts.needs_upstream(flow.target) else self.direct

    def fixed_for(self, flow: Flow) -> Dialer:
        """Return this dialer; no group is involved."""
        return self

    def dial_packet(self, flow: Flow) -> PacketConn:
        """Open a packet connection by the preferred dialer.  Raises DialError.

        A datagram that is lost is no failure that could be noticed: nothing is tried.
        """
        return self.preferred_dialer(flow).dial_packet(flow)

    def dial(self, flow: Flow) -> Stream:
        """Connect: direct first, then by the upstream.  Blocks.  Raises DialError.

        A pinned target and a target that needs the upstream have one attempt.
        """
        dialer = self.preferred_dialer(flow)
        if dialer is self.upstream or self.pinned_dialer(flow):
            return _named(dialer, dialer.dial(flow))
        try:
            stream = self._trial.dial(flow)
        except DialError as error:
            if error.reason in _FINAL:
                raise
            stream = _named(self.upstream, self.upstream.dial(flow))
            self._verdicts.learn(flow.target, True)
            return stream
        self._verdicts.learn(flow.target, False)
        with self._lock:
            if len(self._watched) < WATCHED_LIMIT:
                self._watched.add((flow.client, flow.target))
        return _named(self.direct, stream)

    def finished(self, record: Record) -> None:
        """Learn from the record of a connection that ended; other records are ignored.

        A connection has one record that counts: later requests of a connection that was
        kept open may be reset by the server at any time.
        """
        connection = record.flow.client, record.flow.target
        with self._lock:
            if connection not in self._watched:
                return
            self._watched.discard(connection)
        if record.ended == "reset" and record.sent and not record.received:
            self._verdicts.learn(record.flow.target, True)


def _named(dialer: Dialer, stream: Stream) -> Stream:
    """Return the stream, with the dialer that made it as its member."""
    stream.member = f"{dialer.name}/{stream.member}" if stream.member else dialer.name
    return stream
