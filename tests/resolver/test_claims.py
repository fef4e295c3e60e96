"""Lookups on behalf of clients: which wait, which are dropped, which nobody wants any more."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.fairness import ClientTask
from netproxy.resolver import resolver as module
from netproxy.resolver.resolver import LOOKUP_SECONDS, LookupPlan, LookupResult, Resolver
from tests.support.doubles import Counts
from tests.support.nat import Clock
from tests.support.sockets import Task, wait_until

HOST = Address("a.test", 80)
FOUND = [Address("192.0.2.1", 80)]


class Rig:
    """A resolver whose tasks the test runs."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.tasks: list[ClientTask] = []
        self.asked: list[str] = []
        self.resolver = Resolver(self.tasks.append, self.counts, LookupPlan(self._ask))

    def _ask(self, host: str) -> LookupResult:
        self.asked.append(host)
        return LookupResult(("192.0.2.1",), 60.0)

    def resolve(self, client: str, target: Address = HOST) -> Task:
        """Resolve on a thread; return when the lookup waits."""
        wanted = len(self.tasks) + 1
        task = Task(self.resolver.resolve, target, client)
        wait_until(lambda: len(self.tasks) == wanted)
        return task


@pytest.fixture
def rig() -> Rig:
    return Rig()


def failure(task: Task) -> DialError:
    """Return the DialError of a call of resolve()."""
    with pytest.raises(DialError) as caught:
        task.result()
    return caught.value


def test_lookup_waits_on_behalf_of_each_client(rig: Rig) -> None:
    """Hazard 138.  A name that waits behind a client's slow names delays no other client."""
    callers = [rig.resolve(client) for client in ("192.0.2.7", "192.0.2.8", "2001:db8::1")]
    assert [task.client for task in rig.tasks] == ["192.0.2.7", "192.0.2.8", "2001:db8::1"]
    rig.tasks[1].run()
    assert [caller.result() for caller in callers] == [FOUND] * 3
    for task in (rig.tasks[0], rig.tasks[2]):
        task.run()
    assert rig.asked == ["a.test"]


def test_client_has_one_claim_to_a_name(rig: Rig) -> None:
    first = rig.resolve("2001:db8::1")
    second = Task(rig.resolver.resolve, HOST, "2001:db8::2")
    wait_until(lambda: rig.resolver._lookups["a.test"].wanted_until > 0)
    rig.tasks[0].run()
    assert first.result() == second.result() == FOUND and len(rig.tasks) == 1


def test_dropped_claim_leaves_the_lookup_to_other_clients(rig: Rig) -> None:
    first, second = rig.resolve("192.0.2.7"), rig.resolve("192.0.2.8")
    rig.tasks[0].drop()
    assert not first.done
    rig.tasks[1].run()
    assert first.result() == second.result() == FOUND
    assert rig.counts.of("lookups", "queue full") == 0


def test_lookup_fails_with_its_last_claim(rig: Rig) -> None:
    callers = [rig.resolve("192.0.2.7"), rig.resolve("192.0.2.8")]
    for task in rig.tasks:
        task.drop()
    for caller in callers:
        error = failure(caller)
        assert error.reason is Reason.NAME and "too many lookups are waiting" in str(error)
    assert rig.counts.of("lookups", "queue full") == 1 and not rig.asked
    again = rig.resolve("192.0.2.7")
    rig.tasks[-1].run()
    assert again.result() == FOUND


def test_lookup_that_nobody_wants_any_more_is_not_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "LOOKUP_SECONDS", 0.1)
    caller = rig.resolve("192.0.2.7")
    clock.now += 0.1
    rig.tasks[0].run()
    assert not rig.asked and not rig.resolver._lookups
    assert failure(caller).reason is Reason.TIMEOUT
    monkeypatch.setattr(module, "LOOKUP_SECONDS", LOOKUP_SECONDS)
    again = rig.resolve("192.0.2.7")
    rig.tasks[1].run()
    assert again.result() == FOUND


def test_lookup_that_a_later_caller_wants_is_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    rig.resolve("192.0.2.7")
    clock.now += LOOKUP_SECONDS - 1
    late = rig.resolve("192.0.2.8")
    clock.now += 2
    rig.tasks[0].run()
    assert late.result() == FOUND
