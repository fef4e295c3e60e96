"""The cache of the resolver, shared lookups, and plans."""

from __future__ import annotations

import threading
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.fairness import ClientTask, FairSubmit
from netproxy.resolver import resolver as module
from netproxy.resolver.resolver import (
    FAILURE_TTL,
    NEGATIVE_LIMIT,
    TTL_LIMIT,
    LookupResult,
    LookupFailed,
    LookupPlan,
    Resolver,
)
from tests.support.doubles import Counts
from tests.support.nat import Clock
from tests.support.sockets import SECONDS, Task

HOST = Address("a.test", 80)
RESULT = LookupResult(("192.0.2.1",), 60.0)


class Source:
    """The ask() of a plan.  It waits for `gate` and records names.

    It finds `answers` by name, RESULT for other names; None raises LookupFailed.
    """

    def __init__(self, answers: dict[str, LookupResult | None] | None = None) -> None:
        self.answers = answers or {}
        self.names: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def __call__(self, host: str) -> LookupResult:
        self.names.append(host)
        self.entered.release()
        assert self.gate.wait(SECONDS)
        result = self.answers.get(host, RESULT)
        if result is None:
            raise LookupFailed
        return result


def at_once(task: ClientTask) -> None:
    task.run()


def on_a_thread(task: ClientTask) -> None:
    Task(at_once, task)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def resolver_of(source: Source, submit: FairSubmit = at_once, **plan: Any) -> Resolver:
    """Return a resolver that asks `source`."""
    return Resolver(submit, Counts(), LookupPlan(source, **plan))


def hosts(resolver: Resolver, target: Address = HOST) -> list[str]:
    """Return the hosts that a target resolves to."""
    return [address.host for address in resolver.resolve(target)]


def reason(call: Callable[[Address], Any], target: Address = HOST) -> Reason:
    """Return the reason of the DialError that a call raises."""
    with pytest.raises(DialError) as caught:
        call(target)
    return caught.value.reason


class TestCache:
    def test_result_is_cached_for_its_ttl_for_any_port(self, clock: Clock) -> None:
        source = Source()
        resolver = resolver_of(source)
        assert resolver.known(HOST) is None
        assert resolver.resolve(HOST) == [Address("192.0.2.1", 80)]
        assert (
            resolver.resolve(Address("a.test", 443))
            == resolver.known(Address("a.test", 443))
            == [Address("192.0.2.1", 443)]
        )
        clock.now += 59.9
        assert resolver.known(HOST)
        clock.now += 0.2
        assert resolver.known(HOST) is None and len(resolver) == 0
        resolver.resolve(HOST)
        assert source.names == ["a.test"] * 2

    def test_name_without_addresses_is_cached(self, clock: Clock) -> None:
        source = Source({"a.test": LookupResult((), 30.0)})
        resolver = resolver_of(source)
        assert (
            reason(resolver.resolve)
            is reason(resolver.resolve)
            is reason(resolver.known)
            is Reason.NAME
        )
        assert source.names == ["a.test"]
        clock.now += 30.1
        assert resolver.known(HOST) is None

    def test_failed_lookup_is_repeated_after_a_short_time(self, clock: Clock) -> None:
        source = Source({"a.test": None})
        resolver = resolver_of(source)
        assert reason(resolver.resolve) is reason(resolver.resolve) is Reason.NAME
        assert source.names == ["a.test"]
        clock.now += FAILURE_TTL + 0.1
        source.answers = {}
        assert hosts(resolver) == ["192.0.2.1"]

    @pytest.mark.parametrize(
        "result, seconds",
        [(LookupResult(("192.0.2.1",), 1e9), TTL_LIMIT), (LookupResult((), 1e9), NEGATIVE_LIMIT)],
    )
    def test_ttl_of_a_server_is_limited(
        self, result: LookupResult, seconds: float, clock: Clock
    ) -> None:
        source = Source({"a.test": result})
        resolver = resolver_of(source)
        for _ in range(2):
            try:
                resolver.resolve(HOST)
            except DialError:
                pass
        assert len(source.names) == 1
        clock.now += seconds + 0.1
        assert resolver.known(HOST) is None

    def test_result_with_ttl_zero_is_not_cached(self) -> None:
        source = Source({"a.test": LookupResult(("192.0.2.1",), 0.0)})
        resolver = resolver_of(source)
        assert hosts(resolver) == hosts(resolver) == ["192.0.2.1"]
        assert source.names == ["a.test"] * 2 and len(resolver) == 0

    def test_oldest_name_is_removed_at_the_limit(self) -> None:
        source = Source()
        resolver = resolver_of(source, cache=3)
        for number in range(5):
            resolver.resolve(Address(f"{number}.test", 1))
        assert len(resolver) == 3
        assert [bool(resolver.known(Address(f"{number}.test", 1))) for number in range(5)] == [
            False,
            False,
            True,
            True,
            True,
        ]

    def test_cache_of_size_zero_keeps_nothing(self) -> None:
        source = Source()
        resolver = resolver_of(source, cache=0)
        assert (
            hosts(resolver) == hosts(resolver) == ["192.0.2.1"]
            and len(source.names) == 2
            and len(resolver) == 0
        )


class TestSharedLookups:
    def test_callers_that_ask_for_one_name_share_a_lookup(self) -> None:
        source = Source()
        source.gate.clear()
        resolver = resolver_of(source, on_a_thread)
        tasks = [Task(resolver.resolve, Address("a.test", port)) for port in range(1, 9)]
        assert source.entered.acquire(timeout=SECONDS)
        source.gate.set()
        assert [task.result() for task in tasks] == [
            [Address("192.0.2.1", port)] for port in range(1, 9)
        ]
        assert source.names == ["a.test"]

    def test_callers_share_a_failed_lookup(self) -> None:
        source = Source({"a.test": None})
        source.gate.clear()
        resolver = resolver_of(source, on_a_thread)
        tasks = [Task(reason, resolver.resolve) for _ in range(4)]
        assert source.entered.acquire(timeout=SECONDS)
        source.gate.set()
        assert {task.result() for task in tasks} == {Reason.NAME} and len(source.names) == 1

    def test_slow_name_delays_no_other_name(self) -> None:
        slow, ready = threading.Event(), threading.Event()

        def ask(host: str) -> LookupResult:
            if host == "slow.test":
                ready.set()
                slow.wait(SECONDS)
            return RESULT

        resolver = Resolver(on_a_thread, Counts(), LookupPlan(ask))
        task = Task(resolver.resolve, Address("slow.test", 1))
        assert ready.wait(SECONDS)
        assert hosts(resolver) == ["192.0.2.1"] and not task.done
        slow.set()
        task.result()

    def test_lookup_goes_on_after_its_caller_has_given_up(self) -> None:
        source = Source()
        source.gate.clear()
        resolver = resolver_of(source, on_a_thread)
        with pytest.raises(DialError) as caught:
            resolver.resolve(HOST, seconds=0.01)
        assert caught.value.reason is Reason.TIMEOUT and resolver.known(HOST) is None
        task = Task(resolver.resolve, HOST)
        source.gate.set()
        assert task.result() == [Address("192.0.2.1", 80)] and source.names == ["a.test"]

    def test_exception_in_a_lookup_is_a_name_that_is_not_found(self) -> None:
        def ask(host: str) -> LookupResult:
            raise ZeroDivisionError

        def submit(task: ClientTask) -> None:
            with pytest.raises(ZeroDivisionError):
                task.run()

        resolver = Resolver(submit, Counts(), LookupPlan(ask))
        assert reason(resolver.resolve) is Reason.NAME


class TestPlans:
    def test_hosts_of_the_plan_are_not_looked_up(self) -> None:
        source = Source()
        resolver = resolver_of(
            source, hosts={"printer.lan": ("192.168.1.9", "fd00::9"), "gone.lan": ()}
        )
        assert (
            resolver.known(Address("printer.lan", 9))
            == resolver.resolve(Address("printer.lan", 9))
            == [Address("192.168.1.9", 9), Address("fd00::9", 9)]
        )
        assert reason(resolver.known, Address("gone.lan", 9)) is Reason.NAME and not source.names

    @pytest.mark.parametrize("host", ["localhost", "a.localhost"])
    def test_localhost_is_never_looked_up(self, host: str) -> None:
        source = Source()
        resolver = resolver_of(source)
        assert (
            resolver.known(Address(host, 1)) == [Address("127.0.0.1", 1), Address("::1", 1)]
            and not source.names
        )
        assert resolver_of(source, hosts={host: ("192.0.2.7",)}).known(Address(host, 1)) == [
            Address("192.0.2.7", 1)
        ]

    def test_name_that_ends_like_localhost_is_looked_up(self) -> None:
        assert resolver_of(Source()).known(Address("notlocalhost", 1)) is None

    @pytest.mark.parametrize(
        "prefer, order",
        [
            ("", ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"]),
            ("ipv4", ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]),
            ("ipv6", ["2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"]),
        ],
    )
    def test_preferred_family_comes_first(self, prefer: str, order: list[str]) -> None:
        result = LookupResult(("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"), 60.0)
        resolver = resolver_of(Source({"a.test": result}), prefer=prefer)
        assert hosts(resolver) == order == [address.host for address in resolver.known(HOST) or ()]

    def test_new_plan_empties_the_cache(self) -> None:
        first, second = Source(), Source({"a.test": LookupResult(("192.0.2.2",), 60.0)})
        resolver = resolver_of(first)
        assert hosts(resolver) == ["192.0.2.1"]
        resolver.configure(LookupPlan(second))
        assert resolver.known(HOST) is None and hosts(resolver) == ["192.0.2.2"]

    def test_late_answer_under_an_old_plan_is_not_cached(self) -> None:
        first, second = Source(), Source({"a.test": LookupResult(("192.0.2.2",), 60.0)})
        first.gate.clear()
        resolver = resolver_of(first, on_a_thread)
        task = Task(resolver.resolve, HOST)
        assert first.entered.acquire(timeout=SECONDS)
        resolver.configure(LookupPlan(second))
        first.gate.set()
        task.result()
        assert hosts(resolver) == ["192.0.2.2"]

    def test_literal_address_needs_no_plan(self) -> None:
        source = Source()
        for host in ("192.0.2.1", "2001:db8::1", "fe80::1%2"):
            assert resolver_of(source).known(Address(host, 1)) == [Address(host, 1)]
        assert not source.names


def test_lookups_of_many_threads_all_end() -> None:
    """No lookup is left behind."""
    resolver = resolver_of(Source(), on_a_thread, cache=4)
    tasks = [
        Task(
            lambda seed: [
                hosts(resolver, Address(f"{(number * seed) % 9}.test", 1)) for number in range(30)
            ],
            seed,
        )
        for seed in (2, 5, 7)
    ]
    for task in tasks:
        assert task.result() == [["192.0.2.1"]] * 30
    assert len(resolver) <= 4 and not resolver._lookups
