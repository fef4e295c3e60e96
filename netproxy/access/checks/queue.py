"""The logins that wait for their check, and the checks that are under way.

A login waits for an event, without a thread.  The checks run on pools of their own, fairly by
client: those of one client hold up no other client.  Equal logins of one client share a check.
"""

from __future__ import annotations

import os
import select
import threading
import time

from netproxy.errors import ClientLeft, LoginPenalised, LoginUnavailable
from netproxy.interfaces.connections import Events, Steps
from netproxy.interfaces.fairness import ClientTask
from netproxy.typed import TYPE_CHECKING, Callable, Protocol, TypeAlias

if TYPE_CHECKING:
    from netproxy.access.login import Credentials, LoginCalls
    from netproxy.interfaces.connections import Stream

QUEUE_SHARE = 2.0
"""How many times the time of a check a login waits: once in the queue, once for the check."""
TOO_MANY = "too many logins wait for their check"

Outcome: TypeAlias = bool | LoginUnavailable | LoginPenalised
"""Whether a login is right, or why that is not known."""


class LoginTask(ClientTask, Protocol):
    """The check of a login."""

    user: str
    """The name that the client gives."""


class LoginSubmit(Protocol):
    """Takes checks to bounded pools of threads, which serve clients fairly."""

    def __call__(self, task: LoginTask, /) -> None:
        """Run a check on another thread, or drop it.  Does not block."""


class CheckQueue:
    """Runs checks on a pool, and lets logins wait for them.  Thread: any."""

    def __init__(
        self, check: Callable[[Credentials, float], bool], submit: LoginSubmit, seconds: float
    ) -> None:
        """Run `check(credentials, deadline)`, which takes `seconds` at most, with `submit`.

        `check` returns whether the login is right and remembers that.  Raises LoginUnavailable.
        """
        self.check = check
        self._submit = submit
        self.seconds = seconds
        # Guards _running, and the waiters and outcome of each check.
        self.lock = threading.Lock()
        self._running: dict[bytes, _Check] = {}
        """The checks that wait or run, by place (access.external.answers)."""

    def wait(
        self, credentials: Credentials, place: bytes, stream: Stream, calls: LoginCalls
    ) -> Steps[bool]:
        """Return whether a login is right; wait without a thread.

        Raises LoginUnavailable, what `calls.begin` raises, and ClientLeft if the client of
        `stream` has gone.
        """
        try:
            waiter = _Waiter()
        except OSError as error:
            raise LoginUnavailable(f"no descriptor for the check ({error.strerror})") from error
        check = self._join(_Check(self, credentials, place, calls.begin), waiter)
        try:
            # The end of what the client sends does not count: it may still read.
            watched = ((waiter, select.POLLIN), (stream.socket, 0))
            give_up = time.monotonic() + QUEUE_SHARE * self.seconds
            while check.outcome is None:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise LoginUnavailable(f"no answer within {QUEUE_SHARE * self.seconds:g}s")
                ready = yield Events(watched, left, stream.light)
                if check.outcome is None and stream.socket.fileno() in ready:
                    raise ClientLeft("the client left before its login was checked")
        except LoginUnavailable:
            # Its caller counts and records it.
            raise
        except BaseException:
            self._leave(check, calls.absent)
            raise
        finally:
            with self.lock:
                check.waiters.discard(waiter)
            waiter.close()
        if not isinstance(check.outcome, bool):
            raise check.outcome.with_traceback(None)
        return check.outcome

    def is_under_way(self, place: bytes) -> bool:
        """Return whether a login with this place waits or is checked."""
        return place in self._running

    def _join(self, new: _Check, waiter: _Waiter) -> _Check:
        """Return the same check if it is under way, else begin the new one and return that."""
        with self.lock:
            check = self._running.setdefault(new.key, new)
            check.waiters.add(waiter)
        if check is new:
            self._submit(check)
        return check

    def _leave(self, check: _Check, absent: Callable[[Outcome], None]) -> None:
        """Have a login that ends early told the outcome of its check, if it is made."""
        with self.lock:
            outcome = check.outcome
            if outcome is None:
                check.absent.append(absent)
        if outcome is not None:
            absent(outcome)

    def begin(self, check: _Check) -> bool:
        """Return whether a login waits for a check; forget the check if none does.

        A login that comes later begins a new check.
        """
        with self.lock:
            if not check.waiters:
                del self._running[check.key]
            return bool(check.waiters)

    def end(self, check: _Check, outcome: Outcome) -> None:
        """Tell the outcome of a check to the logins that wait, and for those that have ended."""
        with self.lock:
            del self._running[check.key]
            check.outcome = outcome
            waiters, absent = list(check.waiters), list(check.absent)
        for waiter in waiters:
            waiter.wake()
        for tell in absent:
            tell(outcome)


class _Check:
    """One check.  A LoginTask."""

    __slots__ = (
        *(
            "client",
            "user",
            "key",
            "outcome",
            "waiters",
            "absent",
            "_queue",
            "_credentials",
            "_begin",
            "_began",
        ),
    )

    def __init__(
        self, queue: CheckQueue, credentials: Credentials, place: bytes, begin: Callable[[], None]
    ) -> None:
        self.client, self.user = credentials.client, credentials.user
        self.key = place
        self.outcome: Outcome | None = None
        """None before the end."""
        self.waiters: set[_Waiter] = set()
        self.absent: list[Callable[[Outcome], None]] = []
        """Of logins that have ended before the check."""
        self._queue = queue
        self._credentials = credentials
        self._begin = begin
        self._began = time.monotonic()

    def run(self) -> None:
        """Check, unless nobody waits any more."""
        if not self._queue.begin(self):
            return
        now, seconds = time.monotonic(), self._queue.seconds
        if now - self._began > seconds:
            self.drop()
            return
        outcome: Outcome = LoginUnavailable("the check has failed")
        try:
            self._begin()
            outcome = self._queue.check(self._credentials, now + seconds)
        except (LoginUnavailable, LoginPenalised) as error:
            outcome = error
        finally:
            self._queue.end(self, outcome)

    def drop(self) -> None:
        """Refuse the logins that wait."""
        self._queue.end(self, LoginUnavailable(TOO_MANY))


class _Waiter:
    """An event on a descriptor that a login waits for."""

    __slots__ = ("_lock", "_descriptor")

    def __init__(self) -> None:
        """Raises OSError if no descriptor can be had."""
        # Guards _descriptor: another thread must not write into a later owner of the number.
        self._lock = threading.Lock()
        self._descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._descriptor

    def wake(self) -> None:
        """Wake the login; does nothing once it has gone."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
