"""The login that one listener requires of its clients."""

from __future__ import annotations

import binascii
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol

from netproxy.errors import ClientLeft, LoginPenalised, LoginUnavailable
from netproxy.interfaces.connections import Events, Steps

if TYPE_CHECKING:
    from netproxy.access.backoff import BackOff
    from netproxy.access.users import Users
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream

ANSWER_SECONDS = 10.0
"""To send a refusal that was delayed."""


class LoginObserver(Protocol):
    """Is told which logins fail.  Thread: any."""

    def refused(self, client: str, user: str) -> None:
        """Note a login with a wrong user name or password; `client` is an address."""

    def unavailable(self, client: str, user: str, why: str) -> None:
        """Note a login that could not be checked."""

    def penalised(self, client: str, user: str) -> None:
        """Note a login that is refused unchecked because its client is under a penalty."""


class Login:
    """Checks the credentials of a listener's clients.  Thread: any.

    They are compared with the users of the running configuration.
    """

    def __init__(
        self,
        users: Users,
        mode: str,
        observer: LoginObserver | None = None,
        back_off: BackOff | None = None,
    ) -> None:
        """`mode` is "required", "optional" or "none".

        `back_off` delays refusals and has the penalties; None for neither.
        """
        self._back_off = back_off
        self._users = users
        self._observer = observer
        self.required = mode == "required"
        """True if clients without a login are refused."""
        self.offered = mode != "none"
        """True if clients may log in."""

    def check(self, name: bytes, password: bytes, client: Address) -> str | None:
        """Return the user's name if the password is right, else None.

        Takes some 50 ms if passwords are hashed, longer if other checks are running.
        Raises LoginUnavailable if there is no memory for the check, and as check_penalty() if a
        penalty has begun before its turn came.
        """
        text = name.decode("utf-8", "replace")
        try:
            again = partial(self.check_penalty, name, password, client)
            user = self._users.check(name, password, again)
        except LoginUnavailable as error:
            if self._observer is not None:
                self._observer.unavailable(client.host, text, str(error))
            raise
        if user is None:
            if self._observer is not None:
                self._observer.refused(client.host, text)
        elif self._back_off is not None:
            self._back_off.succeeded(client.host, time.monotonic())
        return user

    def check_penalty(self, name: bytes, password: bytes, client: Address) -> None:
        """Raise LoginPenalised, counted and recorded, if a login is refused unchecked.

        A password that was right before is accepted during a penalty: a client address may be
        that of many users.  Nothing here is slow.
        """
        back_off = self._back_off
        if back_off is None or not (seconds := back_off.penalty(client.host, time.monotonic())):
            return
        user = name.decode("utf-8", "replace")
        is_right = self._users.recall(user, password)
        if is_right is not None and back_off.passes(client.host, user, is_right):
            return
        if self._observer is not None:
            self._observer.penalised(client.host, user)
        raise LoginPenalised(seconds)

    def stamp(self, user: str) -> object:
        """Return a value that stays equal while the login of `user` is valid (access.users)."""
        return self._users.stamp(user)

    def follow(self, newer: Login) -> None:
        """Check as the login of a new configuration does."""
        self._users = newer._users
        self._observer = newer._observer
        self.required, self.offered = newer.required, newer.offered

    def delay_refusal(self, stream: Stream, client: Address) -> Steps[None]:
        """Wait, without a thread, until the client may be told that its login is refused.

        Raises ClientLeft if the client has gone meanwhile.
        """
        if self._back_off is None:
            return
        seconds = self._back_off.next_delay(client.host, time.monotonic())
        # The end of what the client sends does not count: it may still read.
        if (yield Events(((stream.socket, 0),), seconds, light=True, idle=True)):
            raise ClientLeft("the client left before its login was refused")
        stream.limit(ANSWER_SECONDS)


def parse_basic(value: bytes) -> tuple[bytes, bytes]:
    """Return user and password of "Basic ...", two empty ones for anything else."""
    scheme, _, encoded = value.partition(b" ")
    if scheme.lower() != b"basic":
        return b"", b""
    encoded = encoded.strip(b" ")
    try:
        decoded = binascii.a2b_base64(encoded)
    except binascii.Error:
        return b"", b""
    if binascii.b2a_base64(decoded, newline=False) != encoded:
        # a2b_base64() skips what is not base64.
        return b"", b""
    user, _, password = decoded.partition(b":")
    return user, password
