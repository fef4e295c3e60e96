"""What the resolver remembers, and who shares a lookup: coalescing, negative entries, bounds, hosts, preference, a new plan."""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
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
ONE = LookupResult(("192.0.2.1",), 60.0)


class Asked:
    """ask() of a plan: `answers` of a name, else ONE; LookupFailed for None.  Waits at `gate`."""

    def __init__(self, answers: dict[str, LookupResult | None] | None = None) -> None:
        self.answers = answers or {}
        self.names: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.came = threading.Semaphore(0)

    def __call__(self, host: str) -> LookupResult:
        self.names.append(host)
        self.came.release()
        assert self.gate.wait(SECONDS)
        found = self.answers.get(host, ONE)
        if found is None:
            raise LookupFailed
        return found


def at_once(task: Callable[[], None]) -> bool:
    task()
    return True


def run(task: Callable[[], None]) -> None:
    task()


def on_a_thread(task: Callable[[], None]) -> bool:
    Task(run, task)
    return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def made(asked: Asked, submit: Callable[..., bool] = at_once, **plan: Any) -> Resolver:
    return Resolver(submit, Counts(), LookupPlan(asked, **plan))


def hosts(resolver: Resolver, target: Address = HOST) -> list[str]:
    return [one.host for one in resolver.resolve(target)]


def reason(call: Callable[[Address], Any], target: Address = HOST) -> Reason:
    with pytest.raises(DialError) as caught:
        call(target)
    return caught.value.reason


class TestMemory:
    def test_of_a_name_for_its_time_whatever_the_port(self, clock: Clock) -> None:
        asked = Asked()
        resolver = made(asked)
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
        assert asked.names == ["a.test"] * 2

    def test_that_a_name_is_none(self, clock: Clock) -> None:
        asked = Asked({"a.test": LookupResult((), 30.0)})
        resolver = made(asked)
        assert (
            reason(resolver.resolve)
            is reason(resolver.resolve)
            is reason(resolver.known)
            is Reason.NAME
        )
        assert asked.names == ["a.test"]
        clock.now += 30.1
        assert resolver.known(HOST) is None

    def test_of_a_failure_is_short(self, clock: Clock) -> None:
        asked = Asked({"a.test": None})
        resolver = made(asked)
        assert reason(resolver.resolve) is reason(resolver.resolve) is Reason.NAME
        assert asked.names == ["a.test"]
        clock.now += FAILURE_TTL + 0.1
        asked.answers = {}
        assert hosts(resolver) == ["192.0.2.1"]

    @pytest.mark.parametrize(
        "found, seconds",
        [(LookupResult(("192.0.2.1",), 1e9), TTL_LIMIT), (LookupResult((), 1e9), NEGATIVE_LIMIT)],
    )
    def test_has_an_end_whatever_a_server_says(
        self, found: LookupResult, seconds: float, clock: Clock
    ) -> None:
        asked = Asked({"a.test": found})
        resolver = made(asked)
        for _ in range(2):
            try:
                resolver.resolve(HOST)
            except DialError:
                pass
        assert len(asked.names) == 1
        clock.now += seconds + 0.1
        assert resolver.known(HOST) is None

    def test_of_nothing_for_no_time(self) -> None:
        asked = Asked({"a.test": LookupResult(("192.0.2.1",), 0.0)})
        resolver = made(asked)
        assert hosts(resolver) == hosts(resolver) == ["192.0.2.1"]
        assert asked.names == ["a.test"] * 2 and len(resolver) == 0

    def test_is_bounded_and_the_oldest_goes(self) -> None:
        asked = Asked()
        resolver = made(asked, cache=3)
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

    def test_can_be_none(self) -> None:
        asked = Asked()
        resolver = made(asked, cache=0)
        assert (
            hosts(resolver) == hosts(resolver) == ["192.0.2.1"]
            and len(asked.names) == 2
            and len(resolver) == 0
        )


class TestTogether:
    def test_those_that_ask_for_one_name_at_once_share_a_lookup(self) -> None:
        asked = Asked()
        asked.gate.clear()
        resolver = made(asked, on_a_thread)
        tasks = [Task(resolver.resolve, Address("a.test", port)) for port in range(1, 9)]
        assert asked.came.acquire(timeout=SECONDS)
        asked.gate.set()
        assert [task.result() for task in tasks] == [
            [Address("192.0.2.1", port)] for port in range(1, 9)
        ]
        assert asked.names == ["a.test"]

    def test_a_failure_is_shared_too(self) -> None:
        asked = Asked({"a.test": None})
        asked.gate.clear()
        resolver = made(asked, on_a_thread)
        tasks = [Task(reason, resolver.resolve) for _ in range(4)]
        assert asked.came.acquire(timeout=SECONDS)
        asked.gate.set()
        assert {task.result() for task in tasks} == {Reason.NAME} and len(asked.names) == 1

    def test_a_slow_name_delays_no_other(self) -> None:
        slow, ready = threading.Event(), threading.Event()

        def ask(host: str) -> LookupResult:
            if host == "slow.test":
                ready.set()
                slow.wait(SECONDS)
            return ONE

        resolver = Resolver(on_a_thread, Counts(), LookupPlan(ask))
        task = Task(resolver.resolve, Address("slow.test", 1))
        assert ready.wait(SECONDS)
        assert hosts(resolver) == ["192.0.2.1"] and not task.done
        slow.set()
        task.result()

    def test_who_has_no_more_patience_leaves_the_answer_to_the_next(self) -> None:
        asked = Asked()
        asked.gate.clear()
        resolver = made(asked, on_a_thread)
        with pytest.raises(DialError) as caught:
            resolver.resolve(HOST, 0.01)
        assert caught.value.reason is Reason.TIMEOUT and resolver.known(HOST) is None
        task = Task(resolver.resolve, HOST)
        asked.gate.set()
        assert task.result() == [Address("192.0.2.1", 80)] and asked.names == ["a.test"]

    def test_a_fault_in_the_asking_is_a_name_that_is_not_found(self) -> None:
        def ask(host: str) -> LookupResult:
            raise ZeroDivisionError

        def submit(task: Callable[[], None]) -> bool:
            with pytest.raises(ZeroDivisionError):
                task()
            return True

        resolver = Resolver(submit, Counts(), LookupPlan(ask))
        assert reason(resolver.resolve) is Reason.NAME


class TestPlans:
    def test_names_that_the_plan_knows_are_not_asked_for(self) -> None:
        asked = Asked()
        resolver = made(asked, hosts={"printer.lan": ("192.168.1.9", "fd00::9"), "gone.lan": ()})
        assert (
            resolver.known(Address("printer.lan", 9))
            == resolver.resolve(Address("printer.lan", 9))
            == [Address("192.168.1.9", 9), Address("fd00::9", 9)]
        )
        assert reason(resolver.known, Address("gone.lan", 9)) is Reason.NAME and not asked.names

    @pytest.mark.parametrize("host", ["localhost", "a.localhost"])
    def test_this_machine_is_never_asked_for(self, host: str) -> None:
        asked = Asked()
        resolver = made(asked)
        assert (
            resolver.known(Address(host, 1)) == [Address("127.0.0.1", 1), Address("::1", 1)]
            and not asked.names
        )
        assert made(asked, hosts={host: ("192.0.2.7",)}).known(Address(host, 1)) == [
            Address("192.0.2.7", 1)
        ]

    def test_what_only_looks_like_it_is(self) -> None:
        assert made(Asked()).known(Address("notlocalhost", 1)) is None

    @pytest.mark.parametrize(
        "prefer, order",
        [
            ("", ["2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"]),
            ("ipv4", ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]),
            ("ipv6", ["2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"]),
        ],
    )
    def test_which_family_comes_first(self, prefer: str, order: list[str]) -> None:
        found = LookupResult(("2001:db8::1", "192.0.2.1", "2001:db8::2", "192.0.2.2"), 60.0)
        resolver = made(Asked({"a.test": found}), prefer=prefer)
        assert hosts(resolver) == order == [one.host for one in resolver.known(HOST) or ()]

    def test_a_new_one_forgets_what_the_old_one_was_told(self) -> None:
        first, second = Asked(), Asked({"a.test": LookupResult(("192.0.2.2",), 60.0)})
        resolver = made(first)
        assert hosts(resolver) == ["192.0.2.1"]
        resolver.configure(LookupPlan(second))
        assert resolver.known(HOST) is None and hosts(resolver) == ["192.0.2.2"]

    def test_what_the_old_one_answers_late_is_not_kept(self) -> None:
        first, second = Asked(), Asked({"a.test": LookupResult(("192.0.2.2",), 60.0)})
        first.gate.clear()
        resolver = made(first, on_a_thread)
        task = Task(resolver.resolve, HOST)
        assert first.came.acquire(timeout=SECONDS)
        resolver.configure(LookupPlan(second))
        first.gate.set()
        task.result()
        assert hosts(resolver) == ["192.0.2.2"]

    def test_a_literal_address_with_its_scope_needs_none(self) -> None:
        asked = Asked()
        for host in ("192.0.2.1", "2001:db8::1", "fe80::1%2"):
            assert made(asked).known(Address(host, 1)) == [Address(host, 1)]
        assert not asked.names


def test_many_threads_and_few_names() -> None:
    """Each lookup that was begun ends, and nothing of it is left."""
    resolver = made(Asked(), on_a_thread, cache=4)
    deadline = time.monotonic() + SECONDS
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
    assert time.monotonic() < deadline + SECONDS and len(resolver) <= 4 and not resolver._lookups
