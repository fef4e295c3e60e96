from __future__ import annotations

import pytest

from netproxy.dialer import group as group_module
from netproxy.dialer import member as member_module
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.factory import DialerFactory
from netproxy.interfaces.fairness import ClientTask
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.resolver.resolver import Resolver
from tests.dialer.doubles import Clock, make_factory
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere


def run(task: ClientTask) -> None:
    """Stand in for a pool: run the task at once, on the caller's thread."""
    task.run()


@pytest.fixture
def target_resolver() -> TargetResolver:
    return TargetResolver(Resolver(run, Counts()), Anywhere())


@pytest.fixture
def direct(target_resolver: TargetResolver) -> DirectDialer:
    return DirectDialer(target_resolver, UdpSocketFactory(Counts(), Lines()), 2.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of groups and members; it stands still."""
    clock = Clock()
    monkeypatch.setattr(group_module, "time", clock)
    monkeypatch.setattr(member_module, "time", clock)
    return clock


@pytest.fixture
def factory(target_resolver: TargetResolver) -> DialerFactory:
    """A factory whose own time limit no test waits for."""
    return make_factory(target_resolver)
