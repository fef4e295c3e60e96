"""How long those wait for their refusal who could not prove who they are: the longer, the more often from one address."""

from __future__ import annotations

import threading
from typing import NamedTuple

FIRST_SECONDS, LONGEST_SECONDS = (
    1.0,
    8.0,
)  # doubled with each refusal; below what a handshake may take
FORGET_SECONDS = 60.0  # without another one
ADDRESSES_LIMIT = 1024  # the oldest is forgotten: strangers choose where they come from


class _Doubt(NamedTuple):
    times: int
    last: float  # monotonic


class BackOff:
    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _known
        self._known: dict[str, _Doubt] = {}  # by client's address, oldest first

    def __len__(self) -> int:
        return len(self._known)

    def seconds(self, host: str, now: float) -> float:
        """One more refusal of a client; how long it is to wait for it."""
        with self._lock:
            before = self._known.pop(host, _Doubt(0, now))
            times = before.times if now - before.last < FORGET_SECONDS else 0
            while len(self._known) >= ADDRESSES_LIMIT:
                del self._known[next(iter(self._known))]
            self._known[host] = _Doubt(times + 1, now)
        return min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(times, 16))
