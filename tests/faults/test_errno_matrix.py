"""Every system call of the relay paths fails once, with each errno that it can have.

For each scenario, call and errno: the first such call of the daemon fails, then in another
flow the second, and so on.  Each time the client is served or sees a failure that has left a
record or a counter, all that the flow had is gone, and the next client is served.  At the end
no descriptor and no thread is left (tests/conftest.py).
"""

from __future__ import annotations

import errno
import socket
from typing import Iterator

import pytest

from netproxy.daemon.daemon import Daemon
from netproxy.errors import ListenError
from tests.faults import scenarios
from tests.faults.scenarios import SCENARIOS, Scenario, Targets
from tests.support.faults import Faults, installed
from tests.support.handlers import RecordingLog
from tests.support.relays import Running, configuration, running
from tests.support.results import note
from tests.support.sockets import wait_until

pytest.importorskip("yaml")

pytestmark = pytest.mark.long

_EXHAUSTED = (errno.ENOBUFS, errno.ENOMEM)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
# From the manual pages, and what the kernel passes on of ICMP and of netfilter.
ERRNOS = {
    "accept": (
        *(errno.ECONNABORTED, errno.EMFILE, errno.ENFILE, errno.EPERM, errno.EPROTO),
        *(*_EXHAUSTED, *_UNREACHABLE),
    ),
    "socket": (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EAFNOSUPPORT, *_EXHAUSTED),
    "connect": (
        *(errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EADDRNOTAVAIL, errno.EADDRINUSE),
        *(errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EINVAL, *_EXHAUSTED, *_UNREACHABLE),
    ),
    "recv": (
        *(errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT, errno.EPIPE),
        *(errno.EIO, errno.ENOMEM, *_UNREACHABLE),
    ),
    "send": (
        *(errno.EAGAIN, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM),
        *(*_EXHAUSTED, *_UNREACHABLE),
    ),
    "shutdown": (errno.ENOTCONN,),
    "bind": (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES, errno.EINVAL, errno.ENOMEM),
    "listen": (errno.EADDRINUSE, errno.EOPNOTSUPP),
    "getsockopt": (errno.ENOPROTOOPT, errno.EINVAL, *_EXHAUSTED),
    "setsockopt": (errno.ENOPROTOOPT, errno.EPERM, errno.EINVAL, *_EXHAUSTED),
    "getsockname": (errno.ENOBUFS, errno.EINVAL),
    "getpeername": (errno.ENOTCONN, errno.ENOBUFS),
    "splice": (errno.EAGAIN, errno.EINVAL, errno.ENOMEM, errno.ECONNRESET, errno.EPIPE, errno.EIO),
    "pipe": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "fcntl": (errno.EPERM, errno.EBUSY, errno.ENOMEM),
    "poll": (errno.ENOMEM, errno.EINVAL),
    "epoll_create": (errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    "epoll_ctl": (errno.ENOMEM, errno.ENOSPC, errno.EPERM),
    "recvmsg": (errno.EAGAIN, errno.ECONNREFUSED, errno.ENOMEM, errno.EMSGSIZE, *_UNREACHABLE),
    "recvmmsg": (
        *(errno.EAGAIN, errno.EINTR, errno.ECONNREFUSED, errno.ENOMEM, errno.EMSGSIZE),
        *_UNREACHABLE,
    ),
    "sendmsg": (
        *(errno.EAGAIN, errno.ECONNREFUSED, errno.EMSGSIZE, errno.EINVAL, errno.EIO),
        *(errno.EPERM, errno.EACCES, *_EXHAUSTED, *_UNREACHABLE),
    ),
}
# Calls of a flow that repeat with its bytes: the first ones stand for all.
REPEATED = 12
COMMAND = "python3 -m pytest tests/faults"


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    with scenarios.targets() as targets:
        yield targets


class Traces:
    """What a daemon has said about its flows until now."""

    def __init__(self, daemon: Running) -> None:
        self.failed_flows = [record.ended for record in daemon.log.records if record.ended]
        self.counters = {
            (name, reason): value
            for name, reason, value in daemon.daemon.counters.items()
            if (name, reason) != ("connections", "accepted")
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Traces) and vars(self) == vars(other)


def idle(daemon: Running) -> bool:
    return not daemon.daemon.live and not len(daemon.daemon.flows) and daemon.idle()


def calls_of(faults: Faults, scenario: Scenario, daemon: Running, targets: Targets) -> set[str]:
    faults.begin()
    assert scenario.served(daemon, targets)
    wait_until(lambda: idle(daemon), scenarios.PATIENCE)
    return set(faults.counts)


def check_call(
    faults: Faults, scenario: Scenario, daemon: Running, targets: Targets, call: str, code: int
) -> int:
    """Let the first call fail, then the second, until a flow has no more such calls.

    Return how many have failed.
    """
    for number in range(1, REPEATED + 1):
        before = Traces(daemon)
        faults.begin(call, number, code)
        served = scenario.served(daemon, targets)
        what = f"{call} {number}: {errno.errorcode[code]}"
        try:
            wait_until(lambda: idle(daemon), scenarios.PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{what}: the flow does not end") from error
        fired = faults.end()
        assert served or fired, f"{what}: not served, though no call has failed"
        if not served:
            assert Traces(daemon) != before, f"{what}: nothing tells why the client was not served"
        if not fired:
            return number - 1
        assert scenario.served(daemon, targets), f"{what}: the next client was not served"
    return REPEATED


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("call", [call for call in ERRNOS if call != "epoll_create"])
def test_failed_call_ends_its_flow_only(name: str, call: str, targets: Targets) -> None:
    scenario = SCENARIOS[name]
    config = scenario.config.format(proxy=targets.proxy)
    with installed() as faults, running(config) as daemon:
        if call not in calls_of(faults, scenario, daemon, targets):
            pytest.skip("this flow makes no such call")
        failed = [
            check_call(faults, scenario, daemon, targets, call, code) for code in ERRNOS[call]
        ]
    note("errno", True, COMMAND, flow=name, call=call, errnos=len(failed), failures=sum(failed))


# -- the start

START = """
listeners: [{listen: '127.0.0.1:0'}, {listen: '127.0.0.1:0', protocol: dns}]
metrics: 127.0.0.1:0
dns: {servers: [127.0.0.1]}
"""
START_CALLS = ("socket", "bind", "listen", "setsockopt", "getsockname", "epoll_create", "pipe")


@pytest.mark.parametrize("call", START_CALLS)
def test_failed_call_at_the_start_leaves_nothing(call: str) -> None:
    """The daemon serves, or says in a ListenError what it cannot have."""
    with installed() as faults:
        for code in ERRNOS[call]:
            for number in range(1, 100):
                faults.begin(call, number, code, main=True)
                daemon = Daemon(RecordingLog())  # type: ignore[arg-type]  # it is one
                try:
                    daemon.start(configuration(START))
                except ListenError as error:
                    assert str(error)
                finally:
                    fired = faults.end()
                    daemon.stop()
                if not fired:
                    break
            assert number > 1, "the start makes no such call"


def test_failed_call_of_a_reload_changes_nothing(targets: Targets) -> None:
    scenario = SCENARIOS["connect"]
    config = scenario.config.format(proxy=targets.proxy)
    more = config.replace("]", ", {listen: '127.0.0.1:0', name: more}]", 1)
    with installed() as faults, running(config) as daemon:
        for call in ("socket", "bind", "listen"):
            for number in range(1, 100):
                faults.begin(call, number, errno.ENOBUFS, main=True)
                try:
                    daemon.reload(more)
                except ListenError:
                    assert [row["name"] for row in daemon.daemon.listening()] == ["sps-0"]
                fired = faults.end()
                assert scenario.served(daemon, targets)
                daemon.reload(config)
                if not fired:
                    break
            assert number > 1, "the reload makes no such call"


def test_stand_ins_leave_threads_of_tests_alone() -> None:
    with installed() as faults:
        faults.begin("socket", 1, errno.EMFILE)
        socket.socket().close()
        assert not faults.end() and not faults.counts
