"""Registry of the running flows, and totals of what flows have carried.

It is the Observer of all handlers and passes each record on to the log.  A flow costs two
dictionary operations and nothing for the bytes that it carries: these are read when somebody
asks, and added to the totals at the end of the flow.  Any thread may call everything here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Callable, Iterable, NamedTuple, Protocol, Sequence

from netproxy.interfaces.flows import LiveFlow, Record, Traffic
from netproxy.observe.metrics import Histogram

if TYPE_CHECKING:
    from netproxy.interfaces.answers import FlowRow

DIAL_BOUNDS = (0.01, 0.05, 0.25, 1.0, 5.0)
"""Seconds: this network, this continent, another continent, trouble, almost a timeout."""
TOTALS_LIMIT = 512
"""Keys of totals.  After many reloads with other names, flows of new names go under OTHER."""
OTHER = "other"
FAILURES = 20
"""Failed flows to remember."""


class TotalKey(NamedTuple):
    """What totals are grouped by: names from the configuration only.

    Names that clients can choose (users, targets) would make the number of totals unbounded.
    """

    network: str
    listener: str
    upstream: str


class FlowTotal(NamedTuple):
    """What the flows of one TotalKey have carried since the start."""

    flows: int
    """Flows that have begun."""
    live: int
    """Flows that are running."""
    traffic: Traffic


class FailedFlow(NamedTuple):
    """A flow that ended before it began: it was refused, or the dial failed."""

    at: float
    """Seconds since the epoch."""
    target: str
    upstream: str
    why: str


class RecordObserver(Protocol):
    """Is told the records of flows.  Thread: any; must not block."""

    def finished(self, record: Record) -> None:
        """Note the record of a flow that has ended or was refused."""


class Flows:
    """The Observer that keeps the running flows and the totals."""

    def __init__(self, finished: Callable[[Record], None]) -> None:
        """Pass each record to `finished` after it has been added to the totals."""
        self._finished = finished
        self._numbers = itertools.count(1)
        # Guards everything below.
        self._lock = threading.Lock()
        self._live: dict[int, LiveFlow] = {}
        # Of ended flows: their number, then the four fields of Traffic.
        self._ended: dict[TotalKey, list[int]] = {}
        self._dial_times: dict[str, Histogram] = {}
        self._failures: deque[FailedFlow] = deque(maxlen=FAILURES)

    def began(self, live: LiveFlow, dialled: float | None = None) -> None:
        """Register a new flow and give it its number; `dialled` as in Observer."""
        live.number = next(self._numbers)
        with self._lock:
            self._live[live.number] = live
            if dialled is not None:
                upstream = live.dialer.name
                histogram = self._dial_times.get(upstream) or self._new_histogram(upstream)
                histogram.add(dialled)

    def finished(self, record: Record) -> None:
        """Add a flow to the totals, or remember it as failed if it never began."""
        with self._lock:
            if self._live.pop(record.number, None) is None:
                self._failures.append(
                    FailedFlow(time.time(), str(record.flow.target), record.upstream, record.ended)
                )
            else:
                key = TotalKey(record.flow.network, record.flow.listener, record.upstream)
                sums = self._sums(key)
                sums[0] += 1
                sums[1] += record.sent
                sums[2] += record.received
                sums[3] += record.datagrams_sent
                sums[4] += record.datagrams_received
        self._finished(record)

    # -- reading

    def __len__(self) -> int:
        """Return the number of running flows."""
        return len(self._live)

    def live(self) -> list[LiveFlow]:
        """Return the running flows, the oldest first."""
        with self._lock:
            return list(self._live.values())

    def totals(self) -> dict[TotalKey, FlowTotal]:
        """Return the totals, running flows included.  No total is ever less than before."""
        with self._lock:
            running = list(self._live.values())
            totals = {
                key: FlowTotal(sums[0], 0, Traffic(*sums[1:])) for key, sums in self._ended.items()
            }
        for live in running:
            key = TotalKey(live.flow.network, live.flow.listener, live.dialer.name)
            if key not in totals and len(totals) >= TOTALS_LIMIT:
                key = _other(key)
            total = totals.get(key) or FlowTotal(0, 0, Traffic(0, 0))
            totals[key] = FlowTotal(
                total.flows + 1,
                total.live + 1,
                Traffic(*map(sum, zip(total.traffic, live.traffic(), strict=True))),
            )
        return totals

    def dial_times(self) -> dict[str, Histogram]:
        """Return how long dials have taken, by upstream, as copies."""
        with self._lock:
            return {name: histogram.copy() for name, histogram in self._dial_times.items()}

    def failures(self) -> list[FailedFlow]:
        """Return the last FAILURES failed flows, the newest last."""
        with self._lock:
            return list(self._failures)

    # -- ending

    def kill(self, wanted: Callable[[LiveFlow], bool]) -> int:
        """End the flows for which `wanted` is true; return their number."""
        killed = [live for live in self.live() if wanted(live)]
        for live in killed:
            live.kill()
        return len(killed)

    # -- the caller holds the lock

    def _sums(self, key: TotalKey) -> list[int]:
        if key not in self._ended:
            if len(self._ended) >= TOTALS_LIMIT:
                key = _other(key)
            self._ended.setdefault(key, [0] * 5)
        return self._ended[key]

    def _new_histogram(self, upstream: str) -> Histogram:
        """Return the histogram of an upstream that has none, or the one for the rest."""
        if len(self._dial_times) >= TOTALS_LIMIT:
            upstream = OTHER
        return self._dial_times.setdefault(upstream, Histogram(DIAL_BOUNDS))


class ObserverGroup:
    """The Observer of one configuration's handlers: the flows, and others that want records."""

    def __init__(self, flows: Flows, others: Sequence[RecordObserver]) -> None:
        self._flows = flows
        self._others = others
        # The method itself: one call less for each flow.
        self.began = flows.began

    def finished(self, record: Record) -> None:
        """Pass a record to all."""
        self._flows.finished(record)
        for other in self._others:
            other.finished(record)


def describe_flows(flows: Iterable[LiveFlow], now: float) -> list[FlowRow]:
    """Return flows as netproxyctl and the status page show them; `now` in monotonic seconds."""
    return [_row(live, now) for live in flows]


def _row(live: LiveFlow, now: float) -> FlowRow:
    flow, traffic = live.flow, live.traffic()
    return {
        "id": live.number,
        "network": flow.network,
        "listener": flow.listener,
        "client": str(flow.client),
        "user": flow.user,
        "target": str(flow.target),
        "upstream": live.dialer.name,
        "age": round(now - live.started, 3),
        "idle": round(min(live.idle(), now - live.started), 3),
        "sent": traffic.sent,
        "received": traffic.received,
        "datagrams_sent": traffic.datagrams_sent,
        "datagrams_received": traffic.datagrams_received,
    }


def _other(key: TotalKey) -> TotalKey:
    return TotalKey(key.network, OTHER, OTHER)
