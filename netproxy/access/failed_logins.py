"""Counts and records the failed logins of a listener."""

from __future__ import annotations

from netproxy.interfaces.services import Refusal
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.services import Counter, Log


class FailedLogins:
    """A LoginObserver.  Thread: any."""

    def __init__(self, listener: str, counter: Counter, log: Log) -> None:
        self._listener, self._counter, self._log = listener, counter, log

    def refused(self, client: str, user: str) -> None:
        """Count and record a login with a wrong user name or password."""
        self._counter.count("authentication", "refused")
        self._log.auth_failed(client, user, self._listener)

    def unavailable(self, client: str, user: str, why: str) -> None:
        """Count and record a login that could not be checked."""
        refusal = Refusal("authentication", "unavailable", self._listener, client, "", why)
        self._counter.refuse(refusal._replace(user=user))

    def penalised(self, client: str, user: str) -> None:
        """Count and record a login that is refused because of failed ones before."""
        refusal = Refusal("authentication", "penalty", self._listener, client, "", "penalty")
        self._counter.refuse(refusal._replace(user=user))
