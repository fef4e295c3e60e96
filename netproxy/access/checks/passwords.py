"""Checks of hashed passwords for logins that wait without a thread."""

from __future__ import annotations

import os
from _blake2 import blake2b  # built in: hashlib would load libcrypto, which costs 4 MiB

from netproxy.access.checks.queue import CheckQueue
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.access.checks.lanes import PasswordLanes
    from netproxy.access.checks.known_users import KnownUsers
    from netproxy.access.login import Credentials, LoginCalls
    from netproxy.interfaces.connections import Steps, Stream

WAIT_SECONDS = 10.0
"""A login waits so long for its turn: as long as a handshake takes at most, by default."""


class PasswordChecks:
    """Checks the passwords of `users`.  Thread: any."""

    def __init__(self, users: KnownUsers, lanes: PasswordLanes) -> None:
        self._users, self._lanes = users, lanes
        self._queue = CheckQueue(self._check, lanes.submit, WAIT_SECONDS)
        self._key = os.urandom(32)

    def authenticate(
        self, credentials: Credentials, stream: Stream, calls: LoginCalls
    ) -> Steps[object]:
        """Return the stamp of a login, None if it is wrong.

        Does not block: waits without a thread.  Raises LoginUnavailable, LoginPenalised,
        ClientLeft.
        """
        # Before the check: a password that a reload changes meanwhile is not valid any more.
        stamp = self._users.stamp(credentials.user)
        place = self._place(credentials)
        if self._lanes.is_guess(credentials.client, credentials.user):
            # An equal login, as of a browser that opens several connections, is no guess.
            if not self._queue.is_under_way(place):
                calls.guess()
        is_right = yield from self._queue.wait(credentials, place, stream, calls)
        return stamp if is_right else None

    def _place(self, credentials: Credentials) -> bytes:
        """Return the keyed digest of a login: equal ones share a check."""
        client, user = (
            text.encode(errors="replace") for text in (credentials.client, credentials.user)
        )
        data = b"%b %d:%b%b" % (client, len(user), user, credentials.password)
        return blake2b(data, key=self._key, digest_size=32).digest()

    def _check(self, credentials: Credentials, deadline: float) -> bool:
        """Check a password; blocks.  Raises LoginUnavailable."""
        user = credentials.user
        is_suspect = self._lanes.serves_suspects()
        if is_suspect:
            self._lanes.give_way()
        is_right = self._users.check(user.encode(), credentials.password, is_suspect) is not None
        if not is_right:
            self._lanes.note_failure(user)
        return is_right
