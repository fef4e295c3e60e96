"""Records of what is refused or dropped: connections, requests and datagrams.

A client may cause RECORDS records of one counter and reason in a minute, and all clients
together RECORDS_PER_SECOND of one counter a second.  What is beyond that is only counted; its
number is in a record that follows later.  leaves_out() tells so before a refusal is made: a flood
must not pay for records that nobody gets.  Thread: any; nothing here waits.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from netproxy.interfaces.fairness import client_key
from netproxy.observe.incidents import REFUSED, Incidents
from netproxy.observe.records import INFO, WARNING
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Refusal
    from netproxy.observe.records import RecordLog

RECORDS, WINDOW_SECONDS = 5, 60.0
"""Records of a client, a counter and a reason in so many seconds: enough to see what it tries.

Ordinary refusals, such as the 407 of a client that has not logged in yet, hide no other ones.
"""
RECORDS_PER_SECOND = 10
"""Records of all clients and a counter: datagrams have forged senders, each of them a client.

Also how many clients a report of one counter and reason names.
"""
WINDOWS_LIMIT = 1024
"""Windows to remember, 200 bytes each."""
TEXT_LIMIT = 200
"""Characters of what a client has asked for: the target of a request may have thousands."""
MESSAGE = "refused"
SUPPRESSED = "refusals without a record"
OTHERS = "others"
"""Stands for the clients without a window, and for those that a report does not name."""
# What is refused before anything was asked for is worth a warning: somebody cannot connect.
_LEVELS = {"connections_refused": WARNING, "tunnel_handshakes": WARNING}


class _Key(NamedTuple):
    client: str
    counter: str
    reason: str


class _Window:
    """The refusals of one key in one minute, or those of a reason that have no other window."""

    __slots__ = ("began", "left", "suppressed")

    def __init__(self, began: float) -> None:
        self.began = began
        # Records that may still be written.
        self.left = RECORDS
        # Refusals without a record.
        self.suppressed = 0


class RefusalLog:
    """Writes the records of refusals.  Expirable: reports later how many it has left out."""

    def __init__(self, log: RecordLog, incidents: Incidents | None = None) -> None:
        """Write the records to a log; `incidents` remembers them, None for a new one."""
        self._log = log
        self._incidents = Incidents() if incidents is None else incidents
        self.begin_in_child()

    def begin_in_child(self) -> None:
        """Begin anew in a process that was forked: its parent writes what it has noted itself.

        Another thread of the parent may have held the lock.
        """
        # Guards everything below.
        self._lock = threading.Lock()
        # The oldest first.
        self._windows: dict[_Key, _Window] = {}
        # Windows of which no record may be written, by counter, reason and host: a client that is
        # an IPv6 network has several hosts.  Read without the lock.
        self._silent: dict[tuple[str, str, str], _Window] = {}
        # The refusals without a record that no other window has, by counter and reason.
        self._others: dict[tuple[str, str], _Window] = {}
        # By counter: the current second (monotonic), and how many records there were in it.
        # Read without the lock.
        self._seconds: dict[str, tuple[float, int]] = {}

    def note(self, refusal: Refusal, amount: int) -> str:
        """Write the record of `amount` refusals, or count them as left out.

        Return the id of the record, "" for none.
        """
        if not self._admits(refusal, amount, time.monotonic()):
            return ""
        fields = _fields(refusal, amount)
        name = self._incidents.add(REFUSED, refusal.client, fields)
        fields["id"] = name
        self._log.record(_LEVELS.get(refusal.counter, INFO), fields)
        return name

    def leaves_out(self, counter: str, reason: str, host: str, amount: int) -> bool:
        """Return whether `amount` refusals of a client get no record now; they count as left out.

        False if that is not certain: note() decides then.
        """
        now, window = time.monotonic(), self._silent.get((counter, reason, host))
        if window is None or window.left:
            second, count = self._seconds.get(counter, (now, 0))
            if count < RECORDS_PER_SECOND or now - second >= 1.0:
                return False
            with self._lock:
                self._add_to_others((counter, reason), amount, now)
            return True
        with self._lock:
            if window.left:
                # It has ended meanwhile.
                return False
            window.suppressed += amount
        return True

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget the windows that have ended; return calls that report what they left out."""
        if not self._windows and not self._others:
            return ()
        left_out: dict[tuple[str, str], list[tuple[int, str]]] = {}
        others: dict[tuple[str, str], int] = {}
        with self._lock:
            for key in [key for key, window in self._windows.items() if _has_ended(window, now)]:
                suppressed = self._end(key)
                if suppressed:
                    left_out.setdefault(key[1:], []).append((suppressed, key.client))
            for kind in [kind for kind, window in self._others.items() if _has_ended(window, now)]:
                others[kind] = self._others.pop(kind).suppressed
            self._silent = {at: window for at, window in self._silent.items() if not window.left}
        reports: list[Callable[[], None]] = []
        for kind, clients in left_out.items():
            clients.sort(reverse=True)
            for amount, client in clients[:RECORDS_PER_SECOND]:
                reports.append(partial(self._report, _Key(client, *kind), amount))
            if rest := sum(amount for amount, _ in clients[RECORDS_PER_SECOND:]):
                others[kind] = others.get(kind, 0) + rest
        for kind, amount in others.items():
            reports.append(partial(self._report, _Key(OTHERS, *kind), amount))
        return reports

    def _admits(self, refusal: Refusal, amount: int, now: float) -> bool:
        """Return whether a record may be written; count it as left out if not."""
        counter, reason, host = refusal.counter, refusal.reason, refusal.client
        key = _Key(client_key(host), counter, reason)
        with self._lock:
            window = self._windows.get(key)
            if window is None:
                window = self._windows[key] = self._make_window(now)
            second, count = self._seconds.get(counter, (0.0, 0))
            if now - second >= 1.0:
                second, count = now, 0
            if not window.left:
                if len(self._silent) < WINDOWS_LIMIT:
                    self._silent[counter, reason, host] = window
            elif count < RECORDS_PER_SECOND:
                window.left -= 1
                self._seconds[counter] = second, count + 1
                return True
            window.suppressed += amount
            return False

    def _make_window(self, now: float) -> _Window:
        """Return a new window; forget the oldest one if there are too many."""
        if len(self._windows) >= WINDOWS_LIMIT:
            key = next(iter(self._windows))
            self._add_to_others(key[1:], self._end(key), now)
        return _Window(now)

    def _add_to_others(self, kind: tuple[str, str], amount: int, now: float) -> None:
        window = self._others.get(kind)
        if window is None:
            window = self._others[kind] = _Window(now)
        window.suppressed += amount

    def _end(self, key: _Key) -> int:
        """Remove a window; return its refusals without a record.

        leaves_out() may still have it, and does not use it: it is no longer silent.
        """
        window = self._windows.pop(key)
        window.left = RECORDS
        return window.suppressed

    def _report(self, key: _Key, amount: int) -> None:
        fields = {"msg": SUPPRESSED, **key._asdict(), "amount": amount}
        self._log.record(INFO, fields)


def _has_ended(window: _Window, now: float) -> bool:
    return now - window.began >= WINDOW_SECONDS


def _fields(refusal: Refusal, amount: int) -> dict[str, object]:
    fields: dict[str, object] = {
        "msg": MESSAGE,
        "reason": refusal.reason,
        "listener": refusal.listener or "-",
        "client": refusal.client or "-",
        "user": refusal.user or "-",
        "network": refusal.network,
        "asked": _shortened(refusal.asked),
        "decided": _shortened(refusal.decided or refusal.reason),
    }
    if refusal.counter == "drops":
        fields["datagrams"] = amount
    return fields


def _shortened(value: object) -> str:
    text = str(value)
    return (text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}...") or "-"
