"""The login that one listener requires of its clients."""

from __future__ import annotations

import binascii
import time
from functools import partial

from netproxy.errors import ClientLeft, LoginPenalised, LoginUnavailable
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Events, Steps
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.access.backoff import BackOff
    from netproxy.access.checks.known_users import KnownUsers
    from netproxy.access.checks.passwords import PasswordChecks
    from netproxy.access.checks.queue import Outcome
    from netproxy.access.external.logins import ExternalLogins
    from netproxy.interfaces.connections import Stream

ANSWER_SECONDS = 10.0
"""To send a refusal that was delayed."""
GUESS_SECONDS = 1.0
"""A client that tries two passwords of a user at a time may log in again after so long."""


class Credentials(NamedTuple):
    """What a client logs in with, and where."""

    user: str
    password: bytes
    client: str
    """The client's host."""
    listener: str

    def __repr__(self) -> str:
        return f"Credentials({self.user!r}, {self.client!r}, {self.listener!r})"


class LoginCalls(NamedTuple):
    """What is called for a login that waits.  Thread: any; must not block."""

    begin: Callable[[], None]
    """Before the check; may raise LoginPenalised instead of it."""
    absent: Callable[[Outcome], None]
    """With the outcome of a check that was under way when the login ended early."""
    guess: Callable[[], None]
    """For a login that is not checked because it is a guess; raises LoginPenalised."""


class LoginChecks(Protocol):
    """Checks logins that wait without a thread."""

    def authenticate(
        self, credentials: Credentials, stream: Stream, calls: LoginCalls
    ) -> Steps[object]:
        """Return the stamp of a login, None if it is wrong.

        Raises LoginUnavailable, LoginPenalised, ClientLeft.
        """


class LoginObserver(Protocol):
    """Counts and records the logins that fail.  Thread: any."""

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
        users: KnownUsers,
        mode: str,
        observer: LoginObserver | None = None,
        back_off: BackOff | None = None,
        listener: str = "",
        external: ExternalLogins | None = None,
        passwords: PasswordChecks | None = None,
    ) -> None:
        """`mode` is "required", "optional" or "none".

        `back_off` delays refusals and has the penalties; None for neither.  `external` checks
        unknown users; None refuses them.  `passwords` checks hashed passwords; None: the thread
        of the connection checks them.
        """
        self._back_off = back_off
        self._listener = listener
        self._external, self._passwords = external, passwords
        self._users = users
        self._observer = observer
        self.required = mode == "required"
        """True if clients without a login are refused."""
        self.offered = mode != "none"
        """True if clients may log in."""

    def authenticate(
        self, name: bytes, password: bytes, client: Address, stream: Stream
    ) -> Steps[tuple[str, object] | None]:
        """Return the user's name and the stamp of the login, None if it is wrong.

        Raises LoginUnavailable, LoginPenalised, and ClientLeft if the client of `stream` does
        not wait for the result.
        """
        if self._back_off is not None:
            self._back_off.catch_up()
        self.check_penalty(name, password, client)
        text = name.decode("utf-8", "replace")
        # Before the check: a password that a reload changes meanwhile is not valid any more.
        stamp = self.stamp(text)
        checks: LoginChecks | None = self._passwords
        if stamp is None and self._external is not None:
            checks = self._external
        elif self._users.recall(text, password):
            # Without a thread: checks that take one do not delay a login that is remembered.
            self._note_success(client.host)
            return text, stamp
        if checks is not None:
            credentials = Credentials(text, password, client.host, self._listener)
            return (yield from self._ask(checks, credentials, stream))
        user: str | None = yield Blocking(partial(self.check, name, password, client))
        return None if user is None else (user, stamp)

    def _ask(
        self, checks: LoginChecks, credentials: Credentials, stream: Stream
    ) -> Steps[tuple[str, object] | None]:
        """Have a login checked while it waits; as authenticate()."""
        user, client = credentials.user, credentials.client
        calls = LoginCalls(
            partial(self.check_penalty, user.encode(), credentials.password, Address(client, 0)),
            partial(self._note_absent, credentials),
            partial(self._refuse_guess, credentials),
        )
        try:
            stamp = yield from checks.authenticate(credentials, stream, calls)
        except LoginUnavailable as error:
            if self._observer is not None:
                self._observer.unavailable(client, user, str(error))
            raise
        if stamp is not None:
            self._note_success(client)
            return user, stamp
        if self._observer is not None:
            self._observer.refused(client, user)
        return None

    def _refuse_guess(self, credentials: Credentials) -> None:
        """Count and record a guess that is not checked; raise LoginPenalised."""
        seconds = GUESS_SECONDS
        if self._back_off is not None:
            now = time.monotonic()
            self._back_off.next_delay(credentials.client, now)
            seconds = max(seconds, self._back_off.penalty(credentials.client, now))
        if self._observer is not None:
            self._observer.penalised(credentials.client, credentials.user)
        raise LoginPenalised(seconds)

    def _note_absent(self, credentials: Credentials, outcome: Outcome) -> None:
        """Count and record a failed check whose client left before its end.

        A client could otherwise guess passwords without a delay, penalty or record.
        """
        user, client = credentials.user, credentials.client
        if outcome is False and self._back_off is not None:
            self._back_off.next_delay(client, time.monotonic())
        if self._observer is None:
            return
        if outcome is False:
            self._observer.refused(client, user)
        elif isinstance(outcome, LoginUnavailable):
            self._observer.unavailable(client, user, str(outcome))

    def check(self, name: bytes, password: bytes, client: Address) -> str | None:
        """Return the user's name if the password is right, else None.

        Takes some 50 ms if passwords are hashed, longer if other checks are running.
        Raises LoginUnavailable if there is no memory for the check.
        """
        text = name.decode("utf-8", "replace")
        try:
            user = self._users.check(name, password)
        except LoginUnavailable as error:
            if self._observer is not None:
                self._observer.unavailable(client.host, text, str(error))
            raise
        if user is None:
            if self._observer is not None:
                self._observer.refused(client.host, text)
        else:
            self._note_success(client.host)
        return user

    def _note_success(self, host: str) -> None:
        if self._back_off is not None:
            self._back_off.succeeded(host, time.monotonic())

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
        if is_right is None and self._external is not None:
            is_right = self._external.answers.recall(user, password)
        if is_right is not None and back_off.passes(client.host, user, is_right):
            return
        if self._observer is not None:
            self._observer.penalised(client.host, user)
        raise LoginPenalised(seconds)

    def stamp(self, user: str) -> object:
        """Return a value that stays equal while the login of `user` is valid (access.users)."""
        return self._users.stamp(user)

    def is_granted(self, user: str, stamp: object) -> bool:
        """Return whether the external check has accepted a login, and not withdrawn it since."""
        return self._external is not None and self._external.answers.is_valid(user, stamp)

    def follow(self, newer: Login) -> None:
        """Check as the login of a new configuration does."""
        self._users, self._external = newer._users, newer._external
        self._passwords, self._observer = newer._passwords, newer._observer
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
