"""The limit of UDP sessions of a listener that several worker processes share."""

from __future__ import annotations

from typing import Callable, Iterator

import pytest

from netproxy.access.accounts.gauges import ListenerCounts, SessionGauge
from netproxy.relay.quota import EVICTABLE_SECONDS, SessionLimits, SessionQuota
from tests.support.accounts import account_book
from tests.support.nat import NatRig
from tests.support.processes import Race, counts_seen_by, kill_after

TABLE = "main 0.0.0.0:1080"


class Tables:
    """The table of one listener in two processes."""

    def __init__(self) -> None:
        self.counts = ListenerCounts(3)
        self.rigs = [NatRig(shared=self.gauge(index)) for index in (0, 1)]
        for rig in self.rigs:
            rig.workers.eager = True

    def gauge(self, index: int) -> SessionGauge:
        """Return the gauge as a process has it."""
        return counts_seen_by(index, self.counts).sessions(TABLE)

    @property
    def sessions(self) -> int:
        """What all processes have by the gauge."""
        return self.gauge(0).sum()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tables]:
    tables = Tables()
    # Both have one clock.
    tables.rigs[1].clock = tables.rigs[0].clock
    tables.rigs[0].use_clock(monkeypatch)
    yield tables
    for rig in tables.rigs:
        rig.close()
    assert tables.sessions == 0


def test_limit_is_that_of_all_workers(tables: Tables) -> None:
    first, second = tables.rigs
    for rig in tables.rigs:
        rig.policy(2)
    kept = [rig.client(host=f"192.0.2.{number}") for number, rig in enumerate(tables.rigs, 1)]
    assert all(rig.open(client) for rig, client in zip(tables.rigs, kept, strict=True))
    for rig in tables.rigs:
        assert rig.open(rig.client(host="192.0.2.9")) is None
        assert rig.counts.of("drops", "session limit") == 1
    assert tables.sessions == 2
    first.table.end_client(kept[0], "idle")
    assert tables.sessions == 1
    assert second.open(second.client(host="192.0.2.8")) is not None


def test_limit_of_a_client_is_that_of_all_workers(tables: Tables) -> None:
    """Its streams with datagrams in them may be in any worker."""
    first, second = tables.rigs
    for rig in tables.rigs:
        rig.policy(100, 2)
    client = first.client(5000)
    assert first.open(client) and second.open(second.client(5001))
    for port, rig in enumerate(tables.rigs, 5002):
        assert rig.open(rig.client(port)) is None
        (refusal,) = rig.counts.refusals
        assert (refusal.reason, refusal.decided) == ("session limit", "udp.max_sessions_per_client")
        assert rig.open(rig.client(port, host="192.0.2.2")) is not None
    first.table.end_client(client, "idle")
    assert second.open(second.client(5004)) is not None


def test_worker_evicts_an_idle_session_of_its_own(tables: Tables) -> None:
    first, second = tables.rigs
    for rig in tables.rigs:
        rig.policy(2)
        rig.opened(rig.client(host="192.0.2.1"))
    first.later(EVICTABLE_SECONDS)
    for rig in tables.rigs:
        rig.expire()
    first.later(EVICTABLE_SECONDS)
    assert second.open(second.client(host="192.0.2.2")) is not None
    assert [len(rig.table) for rig in tables.rigs] == [1, 1] and tables.sessions == 2
    assert [rig.counts.of("sessions_evicted", "evicted") for rig in tables.rigs] == [0, 1]


def test_session_that_its_user_may_not_have_gives_its_room_back(tables: Tables) -> None:
    first = tables.rigs[0]
    first.accounts._standing.ban_user("alice")
    assert first.open(first.client(), user="alice") is None
    assert first.counts.of("drops", "user banned") == 1
    assert tables.sessions == 0


def test_session_that_two_workers_open_at_once_is_refused(
    tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see that there is room before the other one has counted its session in."""
    first = tables.rigs[0]
    first.policy(1)
    quota = first.table._quota
    has_room: Callable[[str, str], bool] = quota.has_room

    def has_room_meanwhile(client: str, user: str) -> bool:
        answer = has_room(client, user)
        tables.gauge(1).add(1, "192.0.2.9")
        return answer

    monkeypatch.setattr(quota, "has_room", has_room_meanwhile)
    assert first.open(first.client()) is None
    assert first.counts.of("drops", "session limit") == 1
    assert len(first.table) == 0 and tables.sessions > 0
    tables.gauge(1).add(-tables.sessions, "192.0.2.9")


def test_killed_worker_frees_its_sessions(tables: Tables) -> None:
    kill_after(lambda: tables.gauge(0).add(2, "192.0.2.9"))
    second = tables.rigs[1]
    second.policy(2)
    assert second.open(second.client()) is None
    tables.counts.ledger.clear_gauges(0)
    assert second.open(second.client()) is not None


def test_processes_at_the_same_limit_never_exceed_it() -> None:
    race, counts = Race(2, 3), ListenerCounts(3)
    quotas: list[SessionQuota] = []

    def enter(index: int) -> Callable[[], bool]:
        gauge = counts_seen_by(index, counts).sessions(TABLE)
        quotas.append(SessionQuota(SessionLimits(3, 3), account_book(), gauge))
        return lambda: quotas[0].has_room("192.0.2.1", "") and quotas[0].claim("192.0.2.1")

    race.run(enter, lambda: quotas[0].give_up("192.0.2.1"))
    assert race.too_many == 0 and race.admitted > 0
    assert counts.sessions(TABLE).sum() == 0
