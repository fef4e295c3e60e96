"""Checks after every test that it has left no descriptor and no thread.

A test that is skipped because a program or a module is missing fails if the variable CI is set.

Everything that a test opens must be gone some seconds after it: sockets and threads of the code
under test as well as the test's own. Idle threads of a pool that a fixture of the module still uses
may stay. There is no check after a failed test, and none with @pytest.mark.leaves_things_open.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
import types
from typing import Any, Iterator

import pytest

from netproxy.listener.pool import ThreadPool
from tests.support.sockets import SECONDS

# The pause between two looks.
STEP = 0.01
# Why a test is skipped whose program or module is missing.
MISSING = re.compile(r"is not installed$|could not import ")
# How threads of the package and of tests/support are named.
NAMES = (
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
    "answers-",
    "question",
    "metrics",
    "pool-under-test-",
    "test-",
)

_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leaves_things_open: descriptors and threads are not counted after this test"
    )
    config.addinivalue_line("markers", "many_inputs: coverage of this test is not measured")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let files begin that take long: none of them is left alone at the end of side by side."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage while there is none."""
    gc.disable()
    yield
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let no collection of garbage look at the tests themselves again.

    They are more than a million objects, which live until the end.
    """
    _freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Do the same with all reports and caches that the tests of a module have left."""
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Measure no coverage of tests with thousands of inputs, which run the same lines again.

    Measured, they take more than twice as much processor time.
    """
    if not _has_many_inputs(item):
        yield
        return
    measure = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(measure)


def _has_many_inputs(item: pytest.Item) -> bool:
    """Return whether Hypothesis or the test itself makes up the inputs."""
    by_hypothesis = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    return by_hypothesis or item.get_closest_marker("many_inputs") is not None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    _fail_if_incomplete(report)
    if report.failed:
        item.stash[_failed] = True


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome: Any = yield
    _fail_if_incomplete(outcome.get_result())


def _fail_if_incomplete(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a skip for want of a program or a module a failure in continuous integration."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if os.environ.get("CI") and MISSING.search(reason):
            report.outcome = "failed"
            report.longrepr = f"in CI every test runs: {reason}"


@pytest.fixture(autouse=True)
def nothing_is_left_open(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test if descriptors or threads are left some seconds after it."""
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
            # Objects in a reference cycle have no owner, and are no leak.
            gc.collect()
            collected = True
            continue
        assert time.monotonic() < deadline, f"left open: {', '.join(left)}"
        time.sleep(STEP)


def _left(threads: set[threading.Thread], descriptors: dict[int, str]) -> list[str]:
    """Return the new threads that are not idle in a pool, and the new descriptors."""
    running = [
        thread
        for thread in threading.enumerate()
        if thread not in threads and thread.name.startswith(NAMES) and not _is_idle(thread)
    ]
    opened = [
        f"descriptor {number} ({target})"
        for number, target in _descriptors().items()
        if descriptors.get(number) != target
    ]
    return [f"thread '{thread.name}'" for thread in running] + opened


def _descriptors() -> dict[int, str]:
    """Return the open descriptors and what they refer to, except files of coverage."""
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            # The descriptor of the directory itself.
            continue
        if "coverage" not in target:
            descriptors[int(name)] = target
    return descriptors


def _is_idle(thread: threading.Thread) -> bool:
    """Return True if the thread waits for work in a pool to which others refer."""
    pool = getattr(getattr(thread, "_target", None), "__self__", None)
    if not isinstance(pool, ThreadPool) or pool.busy:
        return False
    return any(
        not isinstance(referrer, types.FrameType)
        and not (isinstance(referrer, types.MethodType) and referrer.__name__ == "_work")
        for referrer in gc.get_referrers(pool)
    )
