"""Two lanes for checks of hashed passwords, so that wrong guesses do not delay first logins.

A check of a hash takes a processor and memory, on purpose.  Each lane makes one check at a time,
fairly by client.  The second lane is for suspects: clients that have failed lately, and names for
which a password was wrong lately.  Its thread has a lower priority, and a check there waits, for
GIVE_WAY_SECONDS at most, while first logins wait or are checked: two checks at once slow each
other down, even on processors of their own.  A suspect loses nothing but time.  The choice depends
on failures alone, and so tells nobody which users there are.  Each lane has memory of its own: a
first login never waits for the check of a suspect that has begun.
"""

from __future__ import annotations

import os
import threading
import time

from netproxy.access.backoff import FORGET_SECONDS
from netproxy.interfaces.fairness import client_key
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.backoff import BackOff
    from netproxy.access.checks.queue import LoginTask
    from netproxy.interfaces.fairness import FairSubmit

NAMES_LIMIT = 1024
"""Names remembered of failed logins.  The oldest is forgotten: attackers choose their names."""
SUSPECT_NICE = 5
"""The priority of the suspects' thread: a third of a relay's share of a busy processor.  With
a lower one a user who has mistyped would wait for seconds, and hold memory all the time."""
GIVE_WAY_SECONDS = 0.1
"""How long the check of a suspect waits for first logins at most: as long as a check takes or two.
The limit keeps a flood of first logins from stopping the checks of users who have mistyped."""


class PasswordLanes:
    """Runs checks in the lane of their login.  Thread: any."""

    def __init__(self, clean: FairSubmit, suspect: FairSubmit, back_off: BackOff) -> None:
        """`clean` and `suspect` have one thread each; `back_off` knows the clients' failures."""
        self._clean, self._suspect, self._back_off = clean, suspect, back_off
        # Guards _names, _held and _first_logins.
        self._lock = threading.Lock()
        self._first_logins = 0
        """How many first logins wait or are checked."""
        # Notified when _first_logins becomes 0.
        self._no_first_login = threading.Condition(self._lock)
        self._names: dict[int, float] = {}
        """The hashes of names, each with the time of its last failure, oldest first."""
        self._held: dict[tuple[str, str], int] = {}
        """How many checks wait or run, by client and name."""
        self._suspects_thread = 0
        """The thread that checks a suspect at the moment, 0 if none does."""

    def submit(self, task: LoginTask) -> None:
        """Run a check as soon as it is its client's turn, or drop it.  Does not block."""
        turn = _Turn(self, task, self.is_suspect(task))
        with self._lock:
            self._held[turn.key] = self._held.get(turn.key, 0) + 1
            self._first_logins += not turn.is_suspect
        if turn.is_suspect:
            self._suspect(turn)
        else:
            self._clean(turn)

    def distrust(self, turn: _Turn) -> None:
        """Move a check to the lane for suspects."""
        turn.is_suspect = True
        with self._lock:
            self._leave_first_login()
        self._suspect(turn)

    def is_suspect(self, task: LoginTask) -> bool:
        """Return whether the client or the name of a login has failed lately."""
        now = time.monotonic()
        if now - self._names.get(hash(task.user), -FORGET_SECONDS) < FORGET_SECONDS:
            return True
        return self._back_off.has_failed(task.client, now)

    def is_guess(self, client: str, user: str) -> bool:
        """Return whether another check of the user is under way for a client that has failed.

        Clients without penalties make no guesses: such an address may be that of all clients.
        """
        if (client_key(client), user) not in self._held:
            return False
        back_off = self._back_off
        return back_off.punishes(client) and back_off.has_failed(client, time.monotonic())

    def note_failure(self, user: str) -> None:
        """Note a wrong password for a name, whether there is such a user or not."""
        name = hash(user)
        with self._lock:
            self._names.pop(name, None)
            while len(self._names) >= NAMES_LIMIT:
                del self._names[next(iter(self._names))]
            self._names[name] = time.monotonic()

    def begin_suspect(self) -> None:
        """Note that this thread checks a suspect; lower its priority."""
        self._suspects_thread = threading.get_ident()
        _lower_priority()

    def give_way(self) -> None:
        """Wait for first logins, before the check of a suspect."""
        with self._lock:
            self._no_first_login.wait_for(self._has_no_first_login, GIVE_WAY_SECONDS)

    def serves_suspects(self) -> bool:
        """Return whether this thread checks a suspect."""
        return threading.get_ident() == self._suspects_thread

    def leave(self, turn: _Turn) -> None:
        """Count a check out.  Thread: that of its lane, if it was made."""
        if self.serves_suspects():
            self._suspects_thread = 0
        key = turn.key
        with self._lock:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
            if not turn.is_suspect:
                self._leave_first_login()

    def _leave_first_login(self) -> None:
        """Count a first login out; under the lock."""
        self._first_logins -= 1
        if self._has_no_first_login():
            self._no_first_login.notify()

    def _has_no_first_login(self) -> bool:
        """Return whether no first login waits or is checked; under the lock."""
        return not self._first_logins


class _Turn:
    """A check in one of the lanes.  A ClientTask."""

    __slots__ = ("client", "key", "is_suspect", "_lanes", "_task")

    def __init__(self, lanes: PasswordLanes, task: LoginTask, is_suspect: bool) -> None:
        self.client = task.client
        self.key = client_key(task.client), task.user
        self.is_suspect = is_suspect
        self._lanes, self._task = lanes, task

    def run(self) -> None:
        """Make the check, unless failures since then put it into the other lane."""
        if not self.is_suspect and self._lanes.is_suspect(self._task):
            self._lanes.distrust(self)
            return
        if self.is_suspect:
            self._lanes.begin_suspect()
        try:
            self._task.run()
        finally:
            self._lanes.leave(self)

    def drop(self) -> None:
        """Give up."""
        self._lanes.leave(self)
        self._task.drop()


def _lower_priority() -> None:
    """Let other threads go first.  On Linux a thread has a priority of its own."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, SUSPECT_NICE)
    except OSError:
        # A filter of system calls forbids it, or the priority of the daemon is lower already.
        pass
