"""Remembers the last refusals and failures, each under the id that its record has.

netproxyctl why and the status page read them.  An id is short, stands for one incident of this run
of the daemon, and tells a client nothing: numbers are permuted with a key of the run.  Only what
has a record is remembered; a flood that is merely counted is not.  Thread: any; nothing waits.
"""

from __future__ import annotations

import itertools
import os
import threading
import time

from netproxy.interfaces.fairness import FairTable, client_key
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.interfaces.answers import IncidentRow
    from netproxy.interfaces.flows import Record
    from netproxy.observe.records import Fields

LIMIT = 256
"""Incidents to remember, about one KiB each: a bad quarter of an hour of an office.

At the limit the client that has most loses its oldest: no client hides what others have met.
"""
TRIED_LIMIT = 8
"""Addresses of a failed dial to remember: a name may have many."""
REFUSED, LOGIN, FAILED, ENDED = "refused", "login", "failed", "ended"
"""Kinds: a refusal, a wrong login, a flow that never began, and one that a fault or limit ended."""
ID_BITS = 30
"""The bits of an id, five for each of its six characters."""
_LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Without i, l, o and u, which people confuse with others."""


class Incident(NamedTuple):
    """A refusal or a failure: the fields of its record, or the record of a flow."""

    id: str
    at: float
    """Seconds since the epoch."""
    kind: str
    client: str
    """The client's host."""
    fields: Fields
    """() for that of a flow."""
    record: Record | None = None

    def row(self, reloaded: float) -> IncidentRow:
        """Return the incident as netproxyctl gets it; `reloaded`: when the configuration came."""
        record, fields = self.record, self.fields
        if record is not None:
            return _flow_row(self, record, reloaded)
        return {
            "id": self.id,
            "at": self.at,
            "outdated": self.at < reloaded,
            "kind": self.kind,
            "reason": _text(fields, "reason"),
            "listener": _text(fields, "listener"),
            "client": self.client,
            "user": _text(fields, "user"),
            "network": _text(fields, "network"),
            "asked": _text(fields, "asked"),
            "name": "",
            "decided": _text(fields, "decided"),
            "rule": "",
            "upstream": "",
            "hop": "",
            "addresses": [],
            "tried": [],
            "seconds": 0.0,
        }


class Incidents:
    """The last LIMIT incidents."""

    def __init__(self, step: int = 1) -> None:
        """Number incidents from 0 in steps, so that other processes have numbers in between."""
        key = int.from_bytes(os.urandom(8), "big")
        # An odd factor permutes the numbers below 2^ID_BITS.
        self._factor, self._offset = key >> 32 | 1, key & 0xFFFFFFFF
        self._start, self._step = 0, step
        # When the configuration in force came, seconds since the epoch.
        self._reloaded = 0.0
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: its parent remembers what it had itself.

        The key stays: all processes of a daemon have it, and numbers of their own.
        """
        # Guards everything below.
        self._lock = threading.Lock()
        self._numbers = itertools.count(self._start, self._step)
        self._by_id: dict[str, Incident] = {}
        self._held: FairTable[str] = FairTable(LIMIT)

    def use_numbers(self, start: int) -> None:
        """Number incidents from `start` on: no other process uses these numbers."""
        self._start = start
        self._numbers = itertools.count(start, self._step)

    def add(self, kind: str, client: str, fields: Fields) -> str:
        """Remember an incident with the fields of its record; return its id."""
        name = self._next_id()
        self._remember(Incident(name, time.time(), kind, client, fields))
        return name

    def add_flow(self, record: Record, kind: str) -> str:
        """Remember the record of a flow; return its id."""
        name = self._next_id()
        client = record.flow.client.host
        self._remember(Incident(name, time.time(), kind, client, {}, record))
        return name

    def __len__(self) -> int:
        """Return the number of incidents that are remembered."""
        return len(self._by_id)

    def all(self) -> list[Incident]:
        """Return the incidents, the oldest first."""
        with self._lock:
            return list(self._by_id.values())

    def rows(self) -> list[IncidentRow]:
        """Return the incidents as netproxyctl gets them, the oldest first."""
        return [incident.row(self._reloaded) for incident in self.all()]

    def note_reload(self) -> None:
        """Note that another configuration is in force: what has decided before may have moved."""
        self._reloaded = time.time()

    def _next_id(self) -> str:
        value = (next(self._numbers) * self._factor + self._offset) & ((1 << ID_BITS) - 1)
        return "".join(_LETTERS[value >> shift & 31] for shift in range(ID_BITS - 5, -1, -5))

    def _remember(self, incident: Incident) -> None:
        with self._lock:
            self._by_id[incident.id] = incident
            gone = self._held.put(client_key(incident.client), incident.id)
            if gone is not None:
                del self._by_id[gone]


def _flow_row(incident: Incident, record: Record, reloaded: float) -> IncidentRow:
    flow, failure = record.flow, record.failure
    member = f"/{record.member}" if record.member else ""
    return {
        "id": incident.id,
        "at": incident.at,
        "outdated": incident.at < reloaded,
        "kind": incident.kind,
        "reason": failure.reason if failure is not None else record.ended,
        "listener": flow.listener,
        "client": str(flow.client),
        "user": flow.user,
        "network": flow.network,
        "asked": str(flow.target),
        "name": flow.seen.host if flow.seen is not None else "",
        "decided": record.decided or (record.ended if failure is not None else ""),
        "rule": record.rule,
        "upstream": f"{record.upstream}{member}",
        "hop": failure.hop if failure is not None else "",
        "addresses": [address.host for address in flow.addresses[:TRIED_LIMIT]],
        "tried": [list(attempt) for attempt in failure.tried] if failure is not None else [],
        "seconds": round(record.seconds, 3),
    }


def _text(fields: Fields, name: str) -> str:
    value = str(fields.get(name, ""))
    return "" if value == "-" else value
