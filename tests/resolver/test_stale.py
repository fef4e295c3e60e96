"""Stale names (RFC 8767): when they are used, for how long, and what ends their use."""

from __future__ import annotations

import threading

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.fairness import ClientTask
from netproxy.resolver import resolver as module
from netproxy.resolver.name_cache import STALE_TTL, NameCache
from netproxy.resolver.resolver import LookupFailed, LookupPlan, LookupResult, Resolver
from tests.support.doubles import Counts
from tests.support.nat import Clock
from tests.support.sockets import SECONDS, Task

HOST = Address("a.test", 80)
OLD, NEW = ("192.0.2.1",), ("192.0.2.2",)
TTL, STALE = 60.0, 1000.0


class TestNameCache:
    def test_name_is_stale_after_its_ttl(self) -> None:
        cache = NameCache(4, STALE)
        cache.keep("a.test", OLD, TTL, 0.0)
        assert cache.fresh("a.test", TTL - 1) == OLD and not cache.has_stale("a.test", TTL - 1)
        assert cache.fresh("a.test", TTL) is None and cache.has_stale("a.test", TTL)
        assert cache.fresh("a.test", TTL + STALE) is None
        assert not cache.has_stale("a.test", TTL + STALE) and not len(cache)

    def test_revived_name_is_fresh_for_a_while(self) -> None:
        """RFC 8767 section 5: the servers are not asked again at once."""
        cache = NameCache(4, STALE)
        cache.keep("a.test", OLD, TTL, 0.0)
        assert cache.revive("a.test", TTL) == OLD
        assert cache.fresh("a.test", TTL + STALE_TTL - 1) == OLD
        assert cache.fresh("a.test", TTL + STALE_TTL) is None
        assert cache.has_stale("a.test", TTL + STALE_TTL)

    def test_revived_name_ends_at_the_limit(self) -> None:
        cache = NameCache(4, STALE)
        cache.keep("a.test", OLD, TTL, 0.0)
        assert cache.revive("a.test", TTL + STALE - 1) == OLD
        assert cache.fresh("a.test", TTL + STALE) is None
        assert cache.revive("a.test", TTL + STALE) == ()

    def test_fresh_name_is_not_changed(self) -> None:
        cache = NameCache(4, STALE)
        cache.keep("a.test", OLD, TTL, 0.0)
        assert cache.revive("a.test", 1.0) == OLD
        assert cache.fresh("a.test", TTL - 1) == OLD and cache.fresh("a.test", TTL) is None

    def test_absence_is_never_stale(self) -> None:
        cache = NameCache(4, STALE)
        cache.keep("a.test", (), TTL, 0.0)
        assert cache.fresh("a.test", 1.0) == () and not cache.has_stale("a.test", TTL)
        assert cache.fresh("a.test", TTL) is None and not len(cache)

    def test_answer_that_is_not_kept_removes_the_name(self) -> None:
        cache = NameCache(4, STALE)
        cache.keep("a.test", OLD, TTL, 0.0)
        cache.keep("a.test", NEW, 0.0, TTL)
        assert not cache.has_stale("a.test", TTL)

    def test_names_are_bounded(self) -> None:
        cache = NameCache(2, STALE)
        for number in range(5):
            cache.keep(f"{number}.test", OLD, 1.0, 0.0)
        assert len(cache) == 2 and cache.has_stale("4.test", 2.0)


class Rig:
    """A resolver with a clock of its own, whose server answers as the test says."""

    def __init__(self, clock: Clock, stale: float = STALE) -> None:
        self.clock = clock
        self.counts = Counts()
        self.asked = 0
        self.outcome: LookupResult | Exception = LookupResult(OLD, TTL)
        self.gate = threading.Event()
        self.gate.set()
        self.resolver = Resolver(self._submit, self.counts, LookupPlan(self._ask, stale=stale))

    def _submit(self, task: ClientTask) -> None:
        if self.gate.is_set():
            task.run()
        else:
            Task(task.run)

    def _ask(self, host: str) -> LookupResult:
        self.asked += 1
        assert self.gate.wait(SECONDS)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def hosts(self) -> tuple[str, ...]:
        return tuple(address.host for address in self.resolver.resolve(HOST, "192.0.2.9"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_stale_addresses_are_used_if_the_servers_fail(clock: Clock) -> None:
    rig = Rig(clock)
    assert rig.hosts() == OLD
    rig.outcome = LookupFailed()
    clock.now += TTL
    assert rig.hosts() == rig.hosts() == OLD and rig.asked == 2
    assert rig.counts.of("lookups", "stale") == 1
    clock.now += STALE_TTL
    rig.outcome = LookupResult(NEW, TTL)
    assert rig.hosts() == NEW and rig.asked == 3


def test_stale_addresses_are_not_used_for_longer_than_configured(clock: Clock) -> None:
    rig = Rig(clock)
    rig.hosts()
    rig.outcome = LookupFailed()
    clock.now += TTL + STALE
    with pytest.raises(DialError) as caught:
        rig.hosts()
    assert caught.value.reason is Reason.NAME and rig.counts.of("lookups", "stale") == 0


def test_serving_stale_names_can_be_switched_off(clock: Clock) -> None:
    rig = Rig(clock, stale=0.0)
    rig.hosts()
    rig.outcome = LookupFailed()
    clock.now += TTL
    with pytest.raises(DialError):
        rig.hosts()


def test_name_that_is_gone_is_not_stale(clock: Clock) -> None:
    """An answer that the name does not exist is no failure."""
    rig = Rig(clock)
    rig.hosts()
    rig.outcome = LookupResult((), 5.0)
    clock.now += TTL
    for outcome in (rig.outcome, LookupFailed()):
        rig.outcome = outcome
        with pytest.raises(DialError) as caught:
            rig.hosts()
        assert caught.value.reason is Reason.NAME
        clock.now += 10.0


def test_caller_does_not_wait_for_silent_servers(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RFC 8767 section 5, the client response timer.  The lookup goes on."""
    monkeypatch.setattr(module, "STALE_SECONDS", 0.05)
    rig = Rig(clock)
    rig.hosts()
    clock.now += TTL
    rig.gate.clear()
    rig.outcome = LookupResult(NEW, TTL)
    assert rig.hosts() == rig.hosts() == OLD and rig.asked == 2
    lookup = rig.resolver._lookups["a.test"]
    rig.gate.set()
    assert lookup.done.wait(SECONDS)
    assert rig.hosts() == NEW and rig.asked == 2


def test_stale_addresses_are_used_if_too_many_lookups_wait(clock: Clock) -> None:
    rig = Rig(clock)
    rig.hosts()
    clock.now += TTL
    rig.resolver._submit = lambda task: task.drop()
    assert rig.hosts() == OLD


def test_reload_forgets_stale_names(clock: Clock) -> None:
    rig = Rig(clock)
    rig.hosts()
    clock.now += TTL
    rig.outcome = LookupFailed()
    rig.resolver.configure(LookupPlan(rig._ask, stale=STALE))
    with pytest.raises(DialError):
        rig.hosts()
