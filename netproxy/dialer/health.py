"""Health checks of a group's members.

The janitor starts the checks that are due; each runs on a thread of the pool for checks.  A
check connects to a target through the member, and requests a path there by HTTP if the
configuration names one.  Without a target it connects to the member's first server.
"""

from __future__ import annotations

from functools import partial

from netproxy.errors import NetProxyError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import complete
from netproxy.protocol import http1
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.dialer.member import Member
    from netproxy.interfaces.routing import Dialer
    from netproxy.interfaces.services import Log

CHECK_CLIENT = Address("127.0.0.1", 0)
"""The client in the flow of a check."""


class Check(NamedTuple):
    """What is checked of one member of one group, and how often."""

    group: str
    member: Member
    target: Address
    dialer: Dialer
    """Leads to the target: the member's own dialer, or what leads to the member's server."""
    path: bytes
    """Requested by HTTP; b"" if a connection is enough."""
    interval: float
    """Seconds between the beginnings of two checks."""
    timeout: float
    """Seconds for the response."""


class HealthChecks:
    """All health checks of a configuration: a table that the janitor looks through."""

    def __init__(self, submit: Callable[[Callable[[], None]], bool], log: Log) -> None:
        """`submit` runs a task on another thread; it returns False if the queue is full."""
        self._submit = submit
        self._log = log
        self.checks: Sequence[Check] = ()
        """Replaced as a whole."""

    def expire(self, now: float) -> list[Callable[[], None]]:
        """Return the calls that begin the checks due at `now` (monotonic seconds)."""
        # By member: a group with two names has two checks of each member, and one is enough.
        due = {
            check.member: check
            for check in self.checks
            if not check.member.checking and now - check.member.checked_at >= check.interval
        }
        return [partial(self._begin, check, now) for check in due.values()]

    def _begin(self, check: Check, now: float) -> None:
        member = check.member
        before = member.checked_at
        member.checking, member.checked_at = True, now
        if not self._submit(partial(self._run, check)):
            # The queue is full: the check is due again in the next second.
            member.checking, member.checked_at = False, before

    def _run(self, check: Check) -> None:
        error = "the health check failed"
        try:
            error = _check(check)
        except NetProxyError as failure:
            error = str(failure)
        finally:
            if check.member.note_check(error):
                state = f"down: {error}" if error else "up"
                self._log.warning("group '%s': %s is %s", check.group, check.member.name, state)


def _check(check: Check) -> str:
    """Return "" for success, else what is wrong.  Raises NetProxyError."""
    stream = check.dialer.dial(Flow("tcp", CHECK_CLIENT, check.target, "", ""))
    try:
        if not check.path:
            return ""
        stream.limit(check.timeout)
        fields = [(b"Host", str(check.target).encode("ascii")), (b"Connection", b"close")]
        stream.write(http1.encode_request(http1.HttpRequest(b"GET", check.path, 1, fields)))
        # Interim responses (RFC 9110 section 15.2) come before the final one.
        while (status := complete(http1.read_response(stream)).status) < 200:
            pass
        return "" if status < 400 else f"{check.target} answered {status}"
    finally:
        stream.close()
