"""Registry of the running flows, and totals of what flows have carried.

It is the Observer of all handlers and passes each record on to the log.  A flow costs two
dictionary operations and nothing for the bytes that it carries: these are read when somebody
asks, and added to the totals at the end of the flow.  Any thread may call everything here.
"""

from __future__ import annotations

import itertools
import threading

from netproxy.interfaces.flows import Flow, LiveFlow, Record, Traffic
from netproxy.observe.incidents import ENDED, FAILED, Incidents
from netproxy.observe.metrics import Histogram
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.answers import FlowRow

DIAL_BOUNDS = (0.01, 0.05, 0.25, 1.0, 5.0)
"""Seconds: this network, this continent, another continent, trouble, almost a timeout."""
TOTALS_LIMIT = 512
"""Keys of totals.  After many reloads with other names, flows of new names go under OTHER."""
OTHER = "other"


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


class Carried(NamedTuple):
    """What all flows together have carried since the start."""

    up: int
    """Bytes, client to target."""
    down: int
    live: int
    """Flows that are running."""


class RecordObserver(Protocol):
    """Is told the records of flows.  Thread: any; must not block."""

    def finished(self, record: Record) -> None:
        """Note the record of a flow that has ended or was refused."""


class Flows:
    """The Observer that keeps the running flows and the totals."""

    def __init__(
        self, finished: Callable[[Record], None], incidents: Incidents | None = None
    ) -> None:
        """Pass each record to `finished` after it has been added to the totals.

        `incidents` remembers those that have failed; None for a new one.
        """
        self._finished = finished
        self._incidents = Incidents() if incidents is None else incidents
        self._numbers = itertools.count(1)
        # Guards everything below.
        self._lock = threading.Lock()
        self._live: dict[int, LiveFlow] = {}
        # Of ended flows: their number, then the four fields of Traffic.
        self._ended: dict[tuple[str, str, str], list[int]] = {}
        self._dial_times: dict[str, Histogram] = {}

    def use_numbers(self, start: int, step: int) -> None:
        """Number flows from `start` in steps: no other process uses these numbers.

        Call it before the first flow.
        """
        self._numbers = itertools.count(start, step)

    def began(self, live: LiveFlow, dialled: float | None = None) -> None:
        """Register a new flow and give it its number; `dialled` as in Observer."""
        live.number = next(self._numbers)
        with self._lock:
            self._live[live.number] = live
            if dialled is not None:
                upstream = live.dialer.name
                histogram = self._dial_times.get(upstream) or self._new_histogram(upstream)
                histogram.add(dialled)

    def finished(self, record: Record) -> str:
        """Add a flow to the totals, unless it never began.

        Remember it if it has failed, and return its id then; "" for every other end.
        """
        with self._lock:
            has_lived = self._live.pop(record.number, None) is not None
            if has_lived:
                flow = record.flow
                key = flow.network, flow.listener, record.upstream  # equals its TotalKey
                sums = self._ended.get(key) or self._sums(TotalKey(*key))
                sums[0] += 1
                sums[1] += record.sent
                sums[2] += record.received
                sums[3] += record.datagrams_sent
                sums[4] += record.datagrams_received
        if not has_lived or record.decided:
            kind = ENDED if has_lived else FAILED
            record = record._replace(id=self._incidents.add_flow(record, kind))
        self._finished(record)
        return record.id

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
                TotalKey(*key): FlowTotal(sums[0], 0, Traffic(*sums[1:]))
                for key, sums in self._ended.items()
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

    def carried(self) -> Carried:
        """Return the sums of the totals."""
        return sum_of(self.totals().values())

    def dial_times(self) -> dict[str, Histogram]:
        """Return how long dials have taken, by upstream, as copies."""
        with self._lock:
            return {name: histogram.copy() for name, histogram in self._dial_times.items()}

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

    def finished(self, record: Record) -> str:
        """Pass a record to all; return the id of its incident, as Flows does."""
        name = self._flows.finished(record)
        for other in self._others:
            other.finished(record)
        return name


def sum_of(totals: Iterable[FlowTotal]) -> Carried:
    """Return what flows have carried together."""
    up = down = live = 0
    for total in totals:
        up += total.traffic.sent
        down += total.traffic.received
        live += total.live
    return Carried(up, down, live)


def carried_by(live: LiveFlow) -> int:
    """Return the bytes that a flow has carried in both directions."""
    traffic = live.traffic()
    return traffic.sent + traffic.received


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
        "name": _name(flow),
        "route": flow.port_route.place if flow.port_route is not None else "",
        "upstream": live.dialer.name,
        "age": round(now - live.started, 3),
        "idle": round(min(live.idle(), now - live.started), 3),
        "sent": traffic.sent,
        "received": traffic.received,
        "datagrams_sent": traffic.datagrams_sent,
        "datagrams_received": traffic.datagrams_received,
    }


def _name(flow: Flow) -> str:
    """Return the name that was seen in the client's first bytes, "" for none."""
    if flow.seen is not None:
        return flow.seen.host
    return flow.port_route.name if flow.port_route is not None else ""


def _other(key: TotalKey) -> TotalKey:
    return TotalKey(key.network, OTHER, OTHER)
