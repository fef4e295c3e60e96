from __future__ import annotations

from typing import Callable

import pytest

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.resolver.resolver import Resolver
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere


def run(task: Callable[[], None]) -> bool:
    """In the place of a pool: at once, on the caller's thread."""
    task()
    return True


@pytest.fixture
def reach() -> TargetResolver:
    return TargetResolver(Resolver(run, Counts()), Anywhere())


@pytest.fixture
def direct(reach: TargetResolver) -> DirectDialer:
    return DirectDialer(reach, UdpSocketFactory(Counts(), Lines()), 2.0)
