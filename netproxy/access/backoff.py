"""Delays the refusals of a client's failed logins, and then refuses its logins unchecked.

The delay of a refusal doubles with each failure from the same client, so that passwords and tokens
cannot be guessed fast; the connection waits on the poller.  After more failures the client is
under a penalty: its logins are refused unchecked for a time.  A client is an IPv4 address or
an IPv6 network of 64 bits.  A class for users and for agents; agents have no penalty.  Any thread.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.networks import is_loopback

AGENT_SECONDS, LOGIN_SECONDS = 1.0, 0.25
"""The first delay of an agent, which is a program, and of a user, who may have mistyped."""
LONGEST_SECONDS = 8.0
"""Many clients give up after ten seconds: a user should see that the password was wrong."""
FORGET_SECONDS = 60.0
"""A client without a failure for so long starts again at the first delay.

It is also the time within which failures lead to a penalty."""
CLIENTS_LIMIT = 1024
"""Clients remembered.  The oldest is forgotten: attackers choose their addresses."""
GUESSED_LIMIT = 16
"""Users whose passwords a client may try to guess during a penalty; beyond that nobody passes."""


class Penalty(NamedTuple):
    """When a client is under a penalty, and for how long."""

    after: int = 0
    """Failures within FORGET_SECONDS; 0 for no penalty."""
    first: float = 0.0
    """Seconds of the first penalty."""
    longest: float = 0.0
    """Seconds of the longest one: each is twice as long as the one before."""


class _Failures:
    """The failed logins of one client.  Times are monotonic seconds."""

    __slots__ = ("number", "last", "times", "length", "until", "guessed")

    def __init__(self, now: float) -> None:
        self.number = 0
        """Failures in a row, for the delay."""
        self.last = now
        self.times: list[float] = []
        """When the last failures were, oldest first: as many as begin a penalty."""
        self.length = 0.0
        """Seconds of the last penalty; 0.0 if there was none since the last right login."""
        self.until = 0.0
        """The end of the last penalty."""
        self.guessed: set[str] = set()
        """Users for whom a wrong password was given during the penalty."""

    def is_forgotten(self, now: float) -> bool:
        """Return whether the client begins anew."""
        return now - max(self.last, self.until) >= FORGET_SECONDS

    def add(self, now: float, penalty: Penalty) -> None:
        """Count a failure, and begin a penalty if it is time."""
        self.number += 1
        self.last = now
        if not penalty.after:
            return
        self.times.append(now)
        del self.times[: -penalty.after]
        # A login that failed during the penalty had begun before.
        if now < self.until:
            return
        if self.length:
            self.length = min(penalty.longest, 2 * self.length)
        elif len(self.times) == penalty.after and now - self.times[0] < FORGET_SECONDS:
            self.length = penalty.first
        else:
            return
        self.until = now + self.length
        self.guessed.clear()


class BackOff:
    """The failed logins of each client, and the delays and penalties that follow from them."""

    def __init__(self, first: float, longest: float = LONGEST_SECONDS) -> None:
        """Begin with a delay of `first` seconds, and go up to `longest`."""
        self._first = first
        self._longest = longest
        self.rules = Penalty()
        """When penalties begin.  A reload replaces it; penalties that have begun continue."""
        # Guards _failures.
        self._lock = threading.Lock()
        self._failures: dict[str, _Failures] = {}
        """By client, oldest first."""

    def __len__(self) -> int:
        return len(self._failures)

    def next_delay(self, host: str, now: float) -> float:
        """Count one more failure of a client's host; return its delay in seconds.

        Loopback addresses get no penalty.
        """
        client = client_key(host)
        # The key of an IPv4 address within IPv6 is the IPv4 address.
        is_local = is_loopback(host) or is_loopback(client)
        rules = Penalty() if is_local else self.rules
        with self._lock:
            failures = self._failures.pop(client, None)
            if failures is None or failures.is_forgotten(now):
                failures = _Failures(now)
            number = failures.number
            failures.add(now, rules)
            while len(self._failures) >= CLIENTS_LIMIT:
                del self._failures[next(iter(self._failures))]
            self._failures[client] = failures
        return min(self._longest, self._first * 2.0 ** min(number, 16))

    def penalty(self, host: str, now: float) -> float:
        """Return for how many seconds logins of a client's host are refused, 0.0 for none."""
        # Without the lock: nobody has failed on most days.
        if not self._failures or not self.rules.after:
            return 0.0
        with self._lock:
            failures = self._failures.get(client_key(host))
            return 0.0 if failures is None else max(0.0, failures.until - now)

    def passes(self, host: str, user: str, is_right: bool) -> bool:
        """Return whether a user, whose password was right before, may log in during a penalty.

        `is_right` tells whether this is the same password.  A wrong one ends the exception for
        the user until the penalty is over: else passwords could be guessed without a delay.
        """
        with self._lock:
            failures = self._failures.get(client_key(host))
            if failures is None:
                return is_right
            guessed = failures.guessed
            if not is_right and len(guessed) < GUESSED_LIMIT:
                guessed.add(user)
            return is_right and user not in guessed and len(guessed) < GUESSED_LIMIT

    def succeeded(self, host: str, now: float) -> None:
        """Note a right login: failures before it lead to no penalty.

        A penalty that has begun goes on: else another client of the same address could end it.
        """
        if not self._failures:
            return
        with self._lock:
            failures = self._failures.get(client_key(host))
            if failures is not None and now >= failures.until:
                failures.times.clear()
                failures.length = 0.0
