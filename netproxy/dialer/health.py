"""Health checks of a group's members: each is asked now and then whether it can be used, on a thread of the dial pool.

The janitor's clock starts them.  A check connects to a target through the member,
asks it by HTTP where a path is given, or only connects to the member's first server.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

from netproxy.dialer.group import Member
from netproxy.errors import NetProxyError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import complete
from netproxy.interfaces.routing import Dialer
from netproxy.interfaces.services import Log
from netproxy.protocol import http1

NOBODY = Address("127.0.0.1", 0)  # whose flow a check is


class Check(NamedTuple):
    """What is asked of one member of one group."""

    group: str
    member: Member
    target: Address
    dialer: Dialer  # to the target: the member itself, or what leads to its own server
    path: bytes  # b"": to have connected is enough
    interval: float  # seconds
    timeout: float


class HealthChecks:
    """Expirable: the janitor asks it each second what is due."""

    def __init__(self, submit: Callable[[Callable[[], None]], bool], log: Log) -> None:
        self._submit = submit
        self._log = log
        self.checks: Sequence[Check] = ()  # replaced whole

    def expire(self, now: float) -> list[Callable[[], None]]:
        due = {
            check.member: check
            for check in self.checks  # a member that two names lead to is checked once
            if not check.member.checking and now - check.member.checked_at >= check.interval
        }
        return [lambda check=check: self._begin(check, now) for check in due.values()]

    def _begin(self, check: Check, now: float) -> None:
        member = check.member
        before = member.checked_at
        member.checking, member.checked_at = True, now
        if not self._submit(lambda: self._run(check)):
            member.checking, member.checked_at = (
                False,
                before,
            )  # the pool is busy: the next second will do

    def _run(self, check: Check) -> None:
        error = "the check failed"
        try:
            error = _ask(check)
        except NetProxyError as failure:
            error = str(failure)
        finally:
            if check.member.note_check(error):
                self._log.warning(
                    "group '%s': %s is %s",
                    check.group,
                    check.member.name,
                    f"down: {error}" if error else "up",
                )


def _ask(check: Check) -> str:
    """ "" where the member is well; NetProxyError or a word for what is wrong."""
    stream = check.dialer.dial(Flow("tcp", NOBODY, check.target, "", ""))
    try:
        if not check.path:
            return ""
        stream.limit(check.timeout)
        host = str(check.target).encode("ascii")
        stream.write(
            http1.encode_request(
                http1.HttpRequest(
                    b"GET", check.path, 1, [(b"Host", host), (b"Connection", b"close")]
                )
            )
        )
        while (status := complete(http1.read_response(stream)).status) < 200:
            pass
        return "" if 200 <= status < 400 else f"{check.target} answered {status}"
    finally:
        stream.close()
