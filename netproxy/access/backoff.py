"""Delays the refusal of failed logins, of users and of agents.

The delay doubles with each failure from the same client, so that passwords and tokens cannot be
guessed fast.  A client is an IPv4 address or an IPv6 network of 64 bits.  Only delays are
computed here; the connection waits on the poller.  Any thread.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from netproxy.interfaces.fairness import client_key

AGENT_SECONDS, LOGIN_SECONDS = 1.0, 0.25
"""The first delay of an agent, which is a program, and of a user, who may have mistyped."""
LONGEST_SECONDS = 8.0
"""Many clients give up after ten seconds: a user should see that the password was wrong."""
FORGET_SECONDS = 60.0
"""A client without a failure for so long starts again at the first delay."""
CLIENTS_LIMIT = 1024
"""Clients remembered.  The oldest is forgotten: attackers choose their addresses."""


class _Failures(NamedTuple):
    number: int
    last: float
    """Monotonic seconds."""


class BackOff:
    """The failed logins of each client, and the delay that follows from them."""

    def __init__(self, first: float, longest: float = LONGEST_SECONDS) -> None:
        """Begin with a delay of `first` seconds, and go up to `longest`."""
        self._first = first
        self._longest = longest
        # Guards _failures.
        self._lock = threading.Lock()
        self._failures: dict[str, _Failures] = {}
        """By client, oldest first."""

    def __len__(self) -> int:
        return len(self._failures)

    def next_delay(self, host: str, now: float) -> float:
        """Count one more failure of a client's host; return its delay in seconds."""
        client = client_key(host)
        with self._lock:
            before = self._failures.pop(client, _Failures(0, now))
            number = before.number if now - before.last < FORGET_SECONDS else 0
            while len(self._failures) >= CLIENTS_LIMIT:
                del self._failures[next(iter(self._failures))]
            self._failures[client] = _Failures(number + 1, now)
        return min(self._longest, self._first * 2.0 ** min(number, 16))
