"""The flows that live, what has passed by each way out, and what failed lately.

The Observer of all handlers: it hands each record on to the log.  A flow costs two
entries in a dictionary and nothing for what it carries: its bytes are asked for
when somebody wants to know, and added up at its end.  Any thread.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from netproxy.interfaces.flows import LiveFlow, Record, Traffic
from netproxy.observe.metrics import Histogram

DIAL_BOUNDS = (
    0.01,
    0.05,
    0.25,
    1.0,
    5.0,
)  # seconds: this network, this continent, far away, trouble, almost given up
TOTALS_LIMIT = 512  # keys of totals: after many reloads with other names the rest is called OTHER
OTHER = "other"
FAILURES = 20  # remembered


class Key(NamedTuple):
    """What totals are kept by: names of the configuration alone, never of clients, users or targets."""

    network: str
    listener: str
    upstream: str


class Total(NamedTuple):
    flows: int  # that have begun
    live: int
    traffic: Traffic


class Failure(NamedTuple):
    """A flow that never lived."""

    at: float  # seconds since the epoch
    target: str
    upstream: str
    why: str


class Flows:
    def __init__(self, finished: Callable[[Record], None]) -> None:
        """`finished` gets each record after its flow has been added up."""
        self._finished = finished
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # guards all below
        self._live: dict[int, LiveFlow] = {}
        self._ended: dict[Key, list[int]] = {}  # flows, and the four of Moved
        self._dials: dict[str, Histogram] = {}
        self._failures: deque[Failure] = deque(maxlen=FAILURES)

    def began(self, live: LiveFlow, dialled: float | None = None) -> None:
        live.number = next(self._numbers)
        with self._lock:
            self._live[live.number] = live
            if dialled is not None:
                self._histogram(live.dialer.name).add(dialled)

    def finished(self, record: Record) -> None:
        with self._lock:
            if self._live.pop(record.number, None) is None:
                self._failures.append(
                    Failure(time.time(), str(record.flow.target), record.upstream, record.ended)
                )
            else:
                key = Key(record.flow.network, record.flow.listener, record.upstream)
                sums = self._sums(key)
                sums[0] += 1
                for at, amount in enumerate(
                    (
                        record.sent,
                        record.received,
                        record.datagrams_sent,
                        record.datagrams_received,
                    ),
                    1,
                ):
                    sums[at] += amount
        self._finished(record)

    # -- asking

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[LiveFlow]:
        """Oldest first."""
        with self._lock:
            return list(self._live.values())

    def totals(self) -> dict[Key, Total]:
        """What has passed, of the flows that live too.  Never less than it was before."""
        with self._lock:
            live = list(self._live.values())
            found = {
                key: Total(sums[0], 0, Traffic(*sums[1:])) for key, sums in self._ended.items()
            }
        for one in live:
            key = Key(one.flow.network, one.flow.listener, one.dialer.name)
            if key not in found and len(found) >= TOTALS_LIMIT:
                key = _other(key)
            total = found.get(key) or Total(0, 0, Traffic(0, 0))
            found[key] = Total(
                total.flows + 1,
                total.live + 1,
                Traffic(*map(sum, zip(total.traffic, one.traffic()))),
            )
        return found

    def dials(self) -> dict[str, Histogram]:
        """Copies, by way out: how long the dials of its connections took."""
        with self._lock:
            return {way: one.copy() for way, one in self._dials.items()}

    def failures(self) -> list[Failure]:
        """The newest, last."""
        with self._lock:
            return list(self._failures)

    # -- ending

    def kill(self, wanted: Callable[[LiveFlow], bool]) -> int:
        """Ends the flows that are wanted; how many."""
        found = [one for one in self.live() if wanted(one)]
        for one in found:
            one.kill()
        return len(found)

    # -- under the lock

    def _sums(self, key: Key) -> list[int]:
        if key not in self._ended:
            if len(self._ended) >= TOTALS_LIMIT:
                key = _other(key)
            self._ended.setdefault(key, [0] * 5)
        return self._ended[key]

    def _histogram(self, way: str) -> Histogram:
        if way not in self._dials:
            if len(self._dials) >= TOTALS_LIMIT:
                way = OTHER
            self._dials.setdefault(way, Histogram(DIAL_BOUNDS))
        return self._dials[way]


class ObserverGroup:
    """The Observer of a configuration's handlers: the flows, and others who want their records."""

    def __init__(self, flows: Flows, others: Sequence[Any]) -> None:
        self._others = others
        self._flows = flows
        self.began = flows.began

    def finished(self, record: Record) -> None:
        self._flows.finished(record)
        for other in self._others:
            other.finished(record)


def describe_flows(lives: Iterable[LiveFlow], now: float) -> list[dict[str, Any]]:
    """Flows as netproxyctl and the status page get them; `now` is monotonic."""
    return [
        {
            "id": one.number,
            "network": one.flow.network,
            "listener": one.flow.listener,
            "client": str(one.flow.client),
            "user": one.flow.user,
            "target": str(one.flow.target),
            "upstream": one.dialer.name,
            "age": round(now - one.started, 3),
            "idle": round(min(one.idle(), now - one.started), 3),
            **one.traffic()._asdict(),
        }
        for one in lives
    ]


def _other(key: Key) -> Key:
    return Key(key.network, OTHER, OTHER)
