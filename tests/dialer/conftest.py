from __future__ import annotations

from typing import Callable

import pytest

from netproxy.dialer.direct import DirectDialer, Reach
from netproxy.net.batching import Datagrams
from netproxy.resolver.resolver import Resolver
from tests.support.doubles import Counts, Lines
from tests.support.flows import Anywhere


def run(task: Callable[[], None]) -> bool:
    """In the place of a pool: at once, on the caller's thread."""
    task()
    return True


@pytest.fixture
def reach() -> Reach:
    return Reach(Resolver(run, Counts()), Anywhere())


@pytest.fixture
def direct(reach: Reach) -> DirectDialer:
    return DirectDialer(reach, Datagrams(Counts(), Lines()), 2.0)
