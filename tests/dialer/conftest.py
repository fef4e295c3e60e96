from __future__ import annotations

from typing import Callable

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.net.batching import Datagrams
from netproxy.net.resolve import Resolver
from tests.support.doubles import Counts, Lines


def run(task: Callable[[], None]) -> bool:
    """In the place of a pool: at once, on the caller's thread."""
    task()
    return True


@pytest.fixture
def resolver() -> Resolver:
    return Resolver(run, Counts())


@pytest.fixture
def direct(resolver: Resolver) -> DirectDialer:
    return DirectDialer(resolver, Datagrams(Counts(), Lines()), 2.0)
