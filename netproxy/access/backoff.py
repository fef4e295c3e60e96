"""Delays the refusals of a client's failed logins, and then refuses its logins unchecked.

The delay of a refusal doubles with each failure from the same client, so that passwords and tokens
cannot be guessed fast; the connection waits on the poller.  After more failures the client is
under a penalty: its logins are refused unchecked for a time.  A client is an IPv4 address or
an IPv6 network of 64 bits.  A class for users and for agents; agents have no penalty.  Any thread.
"""

from __future__ import annotations

import threading

from netproxy.interfaces.fairness import client_key
from netproxy.interfaces.networks import is_loopback
from netproxy.typed import NamedTuple, Protocol

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


class OtherWorkers(Protocol):
    """Tells the other workers what happens to logins here.  Thread: any; must not block."""

    def failed(self, host: str) -> None:
        """Tell of a failure of a client's host."""

    def guessed(self, host: str, user: str) -> None:
        """Tell that a wrong password of a user was tried during a penalty of the host."""

    def succeeded(self, host: str) -> None:
        """Tell of a right login of a client's host that had failed before."""

    def catch_up(self) -> None:
        """Take what the others have told until now."""


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
        self.others: OtherWorkers | None = None
        """None if this process is alone."""
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
        if self.others is not None:
            self.others.failed(host)
        return self.learn(host, now)

    def catch_up(self) -> None:
        """Know all that other workers had told when this is called.

        A client that has its answer from one worker finds the next one no less strict.
        """
        if self.others is not None:
            self.others.catch_up()

    def learn(self, host: str, now: float) -> float:
        """Count a failure as next_delay(), and tell nobody: another process has done so."""
        client = client_key(host)
        rules = self.rules if self.punishes(host) else Penalty()
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

    def punishes(self, host: str) -> bool:
        """Return whether a client's host can get a penalty."""
        # The key of an IPv4 address within IPv6 is the IPv4 address.
        return bool(self.rules.after) and not (is_loopback(host) or is_loopback(client_key(host)))

    def penalty(self, host: str, now: float) -> float:
        """Return for how many seconds logins of a client's host are refused, 0.0 for none."""
        # Without the lock: nobody has failed on most days.
        if not self._failures or not self.rules.after:
            return 0.0
        with self._lock:
            failures = self._failures.get(client_key(host))
            return 0.0 if failures is None else max(0.0, failures.until - now)

    def has_failed(self, host: str, now: float) -> bool:
        """Return whether a client's host has failed lately."""
        # Without the lock: a failure that is counted right now may be missed.
        failures = self._failures.get(client_key(host)) if self._failures else None
        return failures is not None and not failures.is_forgotten(now)

    def passes(self, host: str, user: str, is_right: bool) -> bool:
        """Return whether a user, whose password was right before, may log in during a penalty.

        `is_right` tells whether this is the same password.  A wrong one ends the exception for
        the user until the penalty is over: else passwords could be guessed without a delay.
        """
        if not is_right and self.learn_guess(host, user) and self.others is not None:
            self.others.guessed(host, user)
        with self._lock:
            failures = self._failures.get(client_key(host))
            if failures is None:
                return is_right
            guessed = failures.guessed
            return is_right and user not in guessed and len(guessed) < GUESSED_LIMIT

    def learn_guess(self, host: str, user: str) -> bool:
        """Note a wrong password of a user during a penalty; return False if it was known."""
        with self._lock:
            failures = self._failures.get(client_key(host))
            if failures is None or user in failures.guessed:
                return False
            if len(failures.guessed) >= GUESSED_LIMIT:  # nobody passes any more
                return False
            failures.guessed.add(user)
            return True

    def succeeded(self, host: str, now: float) -> None:
        """Note a right login: failures before it lead to no penalty.

        A penalty that has begun goes on: else another client of the same address could end it.
        """
        if self._failures and self.learn_success(host, now) and self.others is not None:
            self.others.succeeded(host)

    def learn_success(self, host: str, now: float) -> bool:
        """Note a right login as succeeded(), but tell nobody; return whether it changes a thing."""
        with self._lock:
            failures = self._failures.get(client_key(host))
            if failures is None or now < failures.until:
                return False
            if not (failures.times or failures.length):
                return False
            failures.times.clear()
            failures.length = 0.0
            return True
