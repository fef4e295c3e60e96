"""Records of what is refused or dropped: connections, requests and datagrams.

A client may cause RECORDS records of one counter and reason in a minute, and all clients
together RECORDS_PER_SECOND of one counter a second.  What is beyond that is only counted; its
number is in a record that follows later.  Thread: any; nothing here waits.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Callable, NamedTuple, Protocol, Sequence

from netproxy.interfaces.fairness import client_key
from netproxy.observe.records import INFO, WARNING, Fields

if TYPE_CHECKING:
    from netproxy.interfaces.services import Refusal

RECORDS, WINDOW_SECONDS = 5, 60.0
"""Records of a client, a counter and a reason in so many seconds: enough to see what it tries.

Ordinary refusals, such as the 407 of a client that has not logged in yet, hide no other ones."""
RECORDS_PER_SECOND = 10
"""Records of all clients and a counter: datagrams have forged senders, each of them a client."""
WINDOWS_LIMIT = 1024
"""Windows to remember, 200 bytes each."""
TEXT_LIMIT = 200
"""Characters of what a client has asked for: the target of a request may have thousands."""
MESSAGE = "refused"
SUPPRESSED = "refusals without a record"
OTHERS = "others"
"""Stands for the clients whose windows had to be forgotten."""
# What is refused before anything was asked for is worth a warning: somebody cannot connect.
_LEVELS = {"connections_refused": WARNING, "tunnel_handshakes": WARNING}


class RecordLog(Protocol):
    """What writes the records."""

    def record(self, level: int, fields: Fields) -> None:
        """Write a record, unless the level of the log hides it."""


class _Key(NamedTuple):
    client: str
    counter: str
    reason: str


class _Window:
    """The refusals of one key in one minute."""

    __slots__ = ("began", "left", "suppressed")

    def __init__(self, began: float) -> None:
        self.began = began
        # Records that may still be written.
        self.left = RECORDS
        # Refusals without a record.
        self.suppressed = 0


class RefusalLog:
    """Writes the records of refusals.  Expirable: reports later how many it has left out."""

    def __init__(self, log: RecordLog) -> None:
        self._log = log
        # Guards everything below.
        self._lock = threading.Lock()
        # The oldest first.
        self._windows: dict[_Key, _Window] = {}
        # The refusals without a record of windows that had to be forgotten, by counter and
        # reason.
        self._forgotten: dict[tuple[str, str], int] = {}
        # By counter: the current second (monotonic), and how many records there were in it.
        self._seconds: dict[str, tuple[float, int]] = {}

    def note(self, refusal: Refusal, amount: int) -> None:
        """Write the record of `amount` refusals, or count them as left out."""
        key = _Key(client_key(refusal.client), refusal.counter, refusal.reason)
        if self._admits(key, amount, time.monotonic()):
            self._log.record(_LEVELS.get(refusal.counter, INFO), _fields(refusal, amount))

    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """Forget the windows that have ended; return calls that report what they left out."""
        if not self._windows:
            return ()
        with self._lock:
            ended = {
                key: window
                for key, window in self._windows.items()
                if now - window.began >= WINDOW_SECONDS
            }
            for key in ended:
                del self._windows[key]
            forgotten, self._forgotten = self._forgotten, {}
        left_out = {key: window.suppressed for key, window in ended.items()}
        left_out.update((_Key(OTHERS, *kind), amount) for kind, amount in forgotten.items())
        return [partial(self._report, key, amount) for key, amount in left_out.items() if amount]

    def _admits(self, key: _Key, amount: int, now: float) -> bool:
        """Return whether a record may be written; count it as left out if not."""
        with self._lock:
            window = self._windows.get(key)
            if window is None:
                window = self._windows[key] = self._make_window(now)
            second, count = self._seconds.get(key.counter, (0.0, 0))
            if now - second >= 1.0:
                second, count = now, 0
            if not window.left or count >= RECORDS_PER_SECOND:
                window.suppressed += amount
                return False
            window.left -= 1
            self._seconds[key.counter] = second, count + 1
        return True

    def _make_window(self, now: float) -> _Window:
        """Return a new window; forget the oldest one if there are too many."""
        if len(self._windows) >= WINDOWS_LIMIT:
            key = next(iter(self._windows))
            amount = self._windows.pop(key).suppressed
            kind = key.counter, key.reason
            self._forgotten[kind] = self._forgotten.get(kind, 0) + amount
        return _Window(now)

    def _report(self, key: _Key, amount: int) -> None:
        fields = {"msg": SUPPRESSED, **key._asdict(), "amount": amount}
        self._log.record(INFO, fields)


def _fields(refusal: Refusal, amount: int) -> Fields:
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
