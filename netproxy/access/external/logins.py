"""Logins that a program or a service checks, in place of `users`.

Asks it for what is not remembered, and remembers its answers.  An answer may name the upstream
of the user, and set limits.  Every failure refuses the login.
"""

from __future__ import annotations

import time

from netproxy.access.checks.queue import CheckQueue
from netproxy.access.external.answers import Answer, Answers
from netproxy.errors import LoginUnavailable
from netproxy.typed import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from netproxy.access.external.checker import Checker
    from netproxy.access.login import Credentials, LoginCalls
    from netproxy.interfaces.connections import Steps, Stream
    from netproxy.interfaces.fairness import FairSubmit

NAME_LIMIT, PASSWORD_LIMIT = 255, 1024
"""Bytes.  Both fit into a page, so that writing them to a program never waits for the program."""


class Granted(Protocol):
    """Is told the limits that an answer sets.  Thread: any; must not block."""

    def granted(self, user: str, limits: object) -> None:
        """Apply limits to a user from now on; they replace those of earlier answers.

        Called for each positive answer: one without limits takes earlier ones away.
        """


class AnswerParser(Protocol):
    """Parses the JSON object of an answer."""

    def parse(self, text: str) -> tuple[str, object]:
        """Return the name of the upstream, "" for none, and the limits.

        Raises ValueError for anything that the program does not know.
        """


class ExternalDependencies(NamedTuple):
    """What checks logins, and what is done with its answers."""

    source: object
    """Tells the program or the service: answers are kept over a reload while it is equal."""
    checker: Checker
    parser: AnswerParser
    submit: FairSubmit
    """Runs a check, which may block."""
    granted: Granted
    key: bytes
    """Secret, and the same in all workers: of the digests of logins."""


class CheckTimes(NamedTuple):
    """Seconds."""

    timeout: float
    """An answer may take so long."""
    allowed: float
    """A positive answer is fresh for so long."""
    refused: float
    """A negative answer counts for so long."""


class ExternalLogins:
    """Checks logins with a program or a service.  Thread: any."""

    def __init__(
        self,
        dependencies: ExternalDependencies,
        times: CheckTimes,
        previous: ExternalLogins | None = None,
    ) -> None:
        """`previous`: of the configuration before.  The answers of the same source are kept."""
        self.source = dependencies.source
        is_same = previous is not None and previous.source == self.source
        self.answers: Answers = (
            previous.answers if previous and is_same else Answers(dependencies.key, self.source)
        )
        self._dependencies = dependencies
        self._times = times
        self._queue = CheckQueue(self._check, dependencies.submit, times.timeout)

    def authenticate(
        self, credentials: Credentials, stream: Stream, calls: LoginCalls
    ) -> Steps[bytes | None]:
        """Return the stamp of a login, None if it is wrong.

        Does not block: waits without a thread.  Raises LoginUnavailable, LoginPenalised,
        ClientLeft.
        """
        if not _can_be_asked(credentials):
            return None
        key = self.answers.key(credentials)
        is_right = self.answers.find(key, time.monotonic())
        if is_right is None:
            is_right = yield from self._queue.wait(credentials, key.place, stream, calls)
        return key.stamp if is_right else None

    def stop(self) -> None:
        """End the checks that run: the daemon stops."""
        self._dependencies.checker.stop()

    def _check(self, credentials: Credentials, deadline: float) -> bool:
        """Ask and remember.  Raises LoginUnavailable."""
        answers, times = self.answers, self._times
        verdict = self._dependencies.checker.check(credentials, deadline)
        key, now = answers.key(credentials), time.monotonic()
        if verdict.allowed:
            answer = Answer(key, True, now + times.allowed, self._grant(key.user, verdict.text))
        else:
            answer = Answer(key, False, now + times.refused)
        answers.remember(answer)
        if answers.announce is not None:
            answers.announce(answer)
        return verdict.allowed

    def _grant(self, user: str, text: str) -> str:
        """Apply the limits of a positive answer; return the upstream.  Raises LoginUnavailable."""
        try:
            upstream, limits = self._dependencies.parser.parse(text or "{}")
        except ValueError as error:
            raise LoginUnavailable(f"the answer cannot be used: {error}") from error
        self._dependencies.granted.granted(user, limits)
        return upstream


def _can_be_asked(credentials: Credentials) -> bool:
    """Return whether the credentials can be sent as they are.

    An empty password is refused here: LDAP takes it for a login without a name, and accepts it.
    """
    user, password = credentials.user, credentials.password
    return (
        0 < len(user.encode(errors="replace")) <= NAME_LIMIT
        and user.isprintable()
        and ":" not in user
        # A name that was not UTF-8 would stand for several users.
        and "\ufffd" not in user
        and 0 < len(password) <= PASSWORD_LIMIT
        and not any(byte in password for byte in b"\r\n\0")
    )
