"""What holds after every test: descriptors and threads are back to what they were before it.

Whatever a test opened has to be gone a few seconds after it, the sockets and
threads of the code under test as well as the test's own.  Threads of a pool that
somebody still holds (a fixture of the module) may idle.  A test that failed is
not asked.  Opt out with @pytest.mark.leaves_things_open.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import types
from typing import Any, Iterator

import pytest

from netproxy.listener.pool import ThreadPool

SECONDS = 5.0
STEP = 0.01
# how our threads are named, and those of tests/support
OURS = (
    "tcp-listener ",
    "udp-listener ",
    "udp-session ",
    "janitor",
    "log",
    "poller",
    "connection-",
    "dial-",
    "lookup-",
    "query-",
    "control",
    "metrics",
    "pool-under-test-",
    "test-",
)

_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leaves_things_open: descriptors and threads are not counted after this test"
    )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed:
        item.stash[_failed] = True


@pytest.fixture(autouse=True)
def nothing_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("leaves_things_open"):
        yield
        return
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    if request.node.stash.get(_failed, False):
        return
    deadline = time.monotonic() + SECONDS
    collected = False
    while left := _left(threads, descriptors):
        if not collected:
            gc.collect()  # what hangs in a circle has no owner, and is no leak
            collected = True
            continue
        assert time.monotonic() < deadline, f"left open: {', '.join(left)}"
        time.sleep(STEP)


def _left(threads: set[threading.Thread], descriptors: dict[int, str]) -> list[str]:
    """Our threads that are new and live, and the new descriptors."""
    lively = [
        thread
        for thread in threading.enumerate()
        if thread not in threads and thread.name.startswith(OURS) and not _idles(thread)
    ]
    opened = [
        f"descriptor {number} ({target})"
        for number, target in _descriptors().items()
        if descriptors.get(number) != target
    ]
    return [f"thread '{thread.name}'" for thread in lively] + opened


def _descriptors() -> dict[int, str]:
    """What is open, and what it is; files of the coverage measurement are its own business."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the directory's own descriptor
        if "coverage" not in target:
            found[int(name)] = target
    return found


def _idles(thread: threading.Thread) -> bool:
    """Whether it waits for work in a pool that more than its own threads refer to."""
    pool = getattr(getattr(thread, "_target", None), "__self__", None)
    if not isinstance(pool, ThreadPool) or pool.busy:
        return False
    return any(
        not isinstance(referrer, types.FrameType)
        and not (isinstance(referrer, types.MethodType) and referrer.__name__ == "_work")
        for referrer in gc.get_referrers(pool)
    )
