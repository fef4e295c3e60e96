"""The way out that finds out: direct first, and where that fails by the upstream; what has worked is remembered.

Three failures speak against the direct way: it does not connect in the short time it
has, it is refused, or it is reset before the target has said a word; the last is
noticed when the connection's record comes, since bytes that were sent are never sent
again.  The verdict is a target's (host and port), for a while.  Any thread.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Container, Iterator, NamedTuple

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketConn
from netproxy.interfaces.flows import Flow, Record
from netproxy.interfaces.routing import Dialer

WATCHED_LIMIT = 65536  # connections of which the record is awaited; a port each, so that a client can have no more
_FINAL = frozenset({Reason.DENIED, Reason.LOOP})  # where nobody may go the upstream is not asked to


class Pins(NamedTuple):
    """Hosts that are not tried out."""

    direct: Container[str]
    upstream: Container[str]


class Ways(NamedTuple):
    direct: Dialer
    impatient: Dialer  # the same, but gives up soon
    upstream: Dialer


class Verdicts:
    """Which way a target takes: "direct" or "upstream".  Outlives a reload."""

    def __init__(self, seconds: float, limit: int) -> None:
        """A verdict holds for `seconds`; `limit` of them are kept, the oldest goes."""
        self.seconds = seconds
        self.limit = limit
        self._lock = threading.Lock()  # guards _known
        self._known: dict[
            Address, tuple[float, bool]
        ] = {}  # until when (monotonic), whether by the upstream; oldest first

    def learn(self, target: Address, upstream: bool) -> None:
        with self._lock:
            self._known.pop(target, None)
            while len(self._known) >= self.limit:
                del self._known[next(iter(self._known))]
            self._known[target] = (time.monotonic() + self.seconds, upstream)

    def by_upstream(self, target: Address) -> bool | None:
        """None where nothing is known."""
        with self._lock:
            until, upstream = self._known.get(target, (0.0, False))
            if time.monotonic() < until:
                return upstream
            self._known.pop(target, None)
            return None

    def clear(self) -> int:
        """Forgets all; how many there were."""
        with self._lock:
            count = len(self._known)
            self._known.clear()
            return count

    def items(self) -> Iterator[tuple[Address, str, float]]:
        """Target, way and for how many seconds still."""
        now = time.monotonic()
        with self._lock:
            known = list(self._known.items())
        return (
            (target, "upstream" if upstream else "direct", until - now)
            for target, (until, upstream) in known
            if until > now
        )


class AutoDialer:
    """A Dialer, and an Observer of what comes of its connections."""

    name = "auto"
    refusal = Reason.UNSUPPORTED
    symmetric = False

    def __init__(self, ways: Ways, pins: Pins, verdicts: Verdicts) -> None:
        self.direct, self._impatient, self.upstream = ways
        self.resolves_names = (
            ways.upstream.resolves_names
        )  # it may know a name that is not found here; else one lookup is for both
        self.carries = (ways.direct.carries | ways.upstream.carries) - {"bind"}
        self._pins = pins
        self._verdicts = verdicts
        self._lock = threading.Lock()  # guards _watched
        self._watched: set[tuple[Address, Address]] = (
            set()
        )  # (client, target) of connections that went directly

    def pinned_way(self, flow: Flow) -> Dialer | None:
        """None for what is to be tried out."""
        host = flow.target.host
        return (
            self.direct
            if host in self._pins.direct
            else self.upstream
            if host in self._pins.upstream
            else None
        )

    def known_way(self, flow: Flow) -> Dialer:
        """By pins and verdicts; directly, while nothing speaks against it."""
        return self.pinned_way(flow) or (
            self.upstream if self._verdicts.by_upstream(flow.target) else self.direct
        )

    def fixed_for(self, flow: Flow) -> Dialer:
        return self

    def dial_packet(self, flow: Flow) -> PacketConn:
        return self.known_way(flow).dial_packet(flow)

    def dial(self, flow: Flow) -> Any:
        way = self.known_way(flow)
        if way is self.upstream or self.pinned_way(flow):
            return way.dial(flow)
        try:
            stream = self._impatient.dial(flow)
        except DialError as error:
            if error.reason in _FINAL:
                raise
            stream = self.upstream.dial(flow)
            self._verdicts.learn(flow.target, True)
            return stream
        self._verdicts.learn(flow.target, False)
        with self._lock:
            if len(self._watched) < WATCHED_LIMIT:
                self._watched.add((flow.client, flow.target))
        return stream

    def finished(self, record: Record) -> None:
        key = record.flow.client, record.flow.target
        with self._lock:
            if key not in self._watched:
                return
            self._watched.discard(key)
        if record.ended == "reset" and record.sent and not record.received:
            self._verdicts.learn(key[1], True)
