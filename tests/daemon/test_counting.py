"""What a daemon of several worker processes counts: runtime, plan and file of usage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Iterator

import pytest

from netproxy.access.accounts.subject import USER
from netproxy.access.accounts.usage_store import UsageStore
from netproxy.access.factory import make_terms
from netproxy.access.limits import Admission
from netproxy.daemon.build import build
from netproxy.daemon.runtime import Runtime
from netproxy.errors import FlowRefused
from tests.access.test_accounts import Live
from tests.config.reading import HASH, read
from tests.support.accounts import a_flow
from tests.support.handlers import RecordingLog
from tests.support.processes import Child, kill_after

pytest.importorskip("yaml")
CONFIGURATION = f"""
listeners: [{{name: main, listen: "127.0.0.1:1080", limits: {{connections: 2}}}}]
users: {{alice: {{password: {HASH}, limits: {{quota: {{total: 100B}}}}}}}}
"""


@pytest.fixture
def parent() -> Iterator[Runtime]:
    runtime = Runtime(RecordingLog(), workers=2)  # type: ignore[arg-type]
    yield runtime
    runtime.stop()


def move(runtime: Runtime, up: int) -> None:
    """Let a flow of alice begin, carry bytes and end."""
    account = runtime.accounts.open(a_flow())
    account.attach(Live(a_flow(), up))
    account.close()


def total(runtime: Runtime) -> int:
    """Collect; return what alice has moved."""
    counting = runtime.counting
    assert counting.collector is not None
    counting.collector.collect()
    return counting.book.of("alice")[2].up


def admission(runtime: Runtime) -> Admission:
    """Return the admission of the listener in a plan that this process makes."""
    return build(read(CONFIGURATION), runtime, None).admissions["main"]


def test_one_process_has_nothing_that_is_shared() -> None:
    runtime = Runtime(RecordingLog())  # type: ignore[arg-type]
    counting = runtime.counting
    assert not counting._ledger.is_shared
    assert counting.listeners is counting.collector is None
    assert counting.connections("main") is counting.sessions("main") is None
    runtime.stop()


def test_forked_workers_count_together_and_the_parent_stores(
    parent: Runtime, tmp_path: Path
) -> None:
    counting = parent.counting
    log = RecordingLog()
    counting.use_store(UsageStore(str(tmp_path), log))
    counting.reserve({"alice"})
    # The store has written something, to a side file.
    counting.book.moved("alice", 1000, 0)
    counting.book.save(time.monotonic())
    assert total(parent) == 1000

    def work(index: int) -> None:
        parent.become_worker(index)
        move(parent, 10 ** (index + 1))
        # A worker has no store: it neither saves nor closes that of its parent.
        counting.use_store(None)
        parent.accounts.expire(time.monotonic())
        assert parent.usage.of("alice")[2] == (0, 0)

    children = [Child(lambda index=index: work(index)) for index in (0, 1)]
    assert [child.join() for child in children] == [0, 0]
    assert (tmp_path / "usage.sqlite-wal").stat().st_size > 0
    # Collects first.
    counting.use_store(None)
    store = UsageStore(str(tmp_path), log)
    assert store.load("2026-01-01", "2026-01")["alice"][2] == (1110, 0)
    store.close()
    assert not log.lines


def test_killed_worker_leaves_its_bytes_and_frees_its_places(parent: Runtime) -> None:
    parent.counting.reserve({"alice"})

    def work() -> None:
        parent.become_worker(0)
        move(parent, 7)
        parent.accounts.open(a_flow())
        assert admission(parent).enter("192.0.2.1") == ""

    def look() -> None:
        parent.become_worker(1)
        successor = admission(parent)
        assert [successor.enter("192.0.2.2") for _ in range(2)] == ["", ""]
        assert successor.enter("192.0.2.3") == "connection limit"
        assert parent.accounts.count(USER) == 0

    kill_after(work)
    parent.counting.clear_gauges(0)
    assert Child(look).join() == 0
    assert total(parent) == 7


def test_plan_of_the_parent_counts_for_each_worker(parent: Runtime) -> None:
    """The admissions are made before the fork."""
    inherited = admission(parent)

    def work(index: int) -> None:
        parent.become_worker(index)
        assert inherited.enter(f"192.0.2.{index}") == ""

    for index in (0, 1):
        kill_after(lambda index=index: work(index))

    def look() -> None:
        parent.become_worker(0)
        assert inherited.enter("192.0.2.9") == "connection limit"

    assert Child(look).join() == 0


def test_quota_that_one_worker_uses_up_refuses_in_the_other(parent: Runtime) -> None:
    config = read(CONFIGURATION)
    parent.counting.reserve(config.users)
    parent.standing.configure(make_terms(config))
    total(parent)

    def work() -> None:
        parent.become_worker(0)
        move(parent, 99)
        parent.accounts.open(a_flow()).close()
        move(parent, 1)

    def look() -> None:
        parent.become_worker(1)
        with pytest.raises(FlowRefused):
            parent.accounts.open(a_flow())

    kill_after(work)
    assert Child(look).join() == 0
    assert total(parent) == 100
    assert Child(look).join() == 0
