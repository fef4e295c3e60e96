"""Caps of listeners and users that several worker processes share."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.access.accounts.account import FlowAccount
from netproxy.access.accounts.gauges import ListenerCounts
from netproxy.access.accounts.ledger import CONNECTIONS, OPENED, SESSIONS, Ledger, digest_of
from netproxy.access.accounts.subject import CLIENT, USER, Limits, Subject
from netproxy.access.limits import Admission
from netproxy.errors import FlowRefused
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.listeners import ALL_CLIENTS
from tests.access.test_limits import Resident
from tests.support.accounts import a_flow
from tests.support.processes import Parent, Race, Worker, counts_seen_by, kill_after

A, B, C, D = (f"192.0.2.{number}" for number in range(1, 5))


class Listener:
    """The admissions of one listener in several processes."""

    def __init__(self, total: int, per_client: int, workers: int = 2) -> None:
        self.counts = ListenerCounts(workers + 1)
        self._limits = total, per_client
        self.admissions = [self.of(index) for index in range(workers)]

    def of(self, index: int) -> Admission:
        """Return the admission as a process makes it."""
        shared = counts_seen_by(index, self.counts).connections("main")
        return Admission(ALL_CLIENTS, *self._limits, shared=shared)


class TestConnections:
    def test_limit_is_that_of_all_workers(self) -> None:
        first, second = Listener(3, 3).admissions
        assert [first.enter(A), second.enter(A), second.enter(A)] == [""] * 3
        assert [first.enter(A), second.enter(A)] == ["connection limit"] * 2
        first.leave(A)
        assert [second.enter(A), first.enter(A)] == ["", "connection limit"]

    def test_full_listener_refuses_in_every_worker(self) -> None:
        first, second = Listener(2, 2).admissions
        assert [first.enter(A), second.enter(B)] == [""] * 2
        assert [first.enter(C), second.enter(C)] == ["connection limit"] * 2
        second.leave(B)
        assert first.enter(C) == ""

    def test_limit_of_a_client_is_that_of_all_workers(self) -> None:
        first, second = Listener(10, 2).admissions
        assert [first.enter(A), second.enter(A), second.enter(B)] == [""] * 3
        assert [first.enter(A), second.enter(A)] == ["client limit"] * 2
        first.leave(A)
        assert second.enter(A) == ""

    def test_limit_of_an_ipv6_client_is_for_an_address(self) -> None:
        first, second = Listener(10, 1).admissions
        assert [first.enter("2001:db8::1"), second.enter("2001:db8::2")] == ["", ""]
        assert second.enter("2001:db8::1") == "client limit"
        first.leave("2001:db8::1")
        assert second.enter("2001:db8::1") == ""

    def test_refused_connection_does_not_count(self) -> None:
        listener = Listener(2, 1)
        first, second = listener.admissions
        first.enter(A)
        for _ in range(5):
            assert second.enter(A) == "client limit"
        assert second.enter(B) == ""
        assert [first.live, second.live] == [1, 1]
        first.leave(A)
        second.leave(B)
        assert self.gauges(listener) == 0

    def test_other_limits_count_the_same_connections(self) -> None:
        listener = Listener(4, 4)
        first, second = listener.admissions
        first.enter(A)
        later = first.with_limits(ALL_CLIENTS, 1, 1)
        assert later.enter(B) == "connection limit"
        first.leave(A)
        assert later.enter(B) == "" and second.enter(B) == ""

    def test_connection_that_was_taken_over_counts_without_a_limit(self) -> None:
        listener = Listener(2, 1)
        first, second = listener.admissions
        first.enter(A)
        second.take_over(A)
        first.leave(A)
        assert [first.live, second.live, first.entered, second.entered] == [0, 1, 1, 0]
        assert first.enter(A) == "client limit"
        second.take_over("2001:db8::1")
        assert first.enter(B) == "connection limit"
        second.leave(A)
        second.leave("2001:db8::1")
        assert self.gauges(listener) == 0 and not second.live

    def test_killed_worker_frees_its_connections(self) -> None:
        listener = Listener(2, 2)

        def work() -> None:
            admission = listener.of(0)
            assert admission.enter(A) == admission.enter("2001:db8::1") == ""

        kill_after(work)
        other = listener.of(1)
        assert other.enter(B) == "connection limit"
        listener.counts.ledger.clear_gauges(0)
        assert [other.enter(client) for client in (A, A)] == ["", ""]
        assert listener.of(0).enter(B) == "connection limit"

    def test_processes_at_the_same_limit_never_exceed_it(self) -> None:
        race = Race(2, 3)
        counts = ListenerCounts(3)

        def enter(index: int) -> Callable[[], bool]:
            admission = Admission(
                ALL_CLIENTS, 3, 3, shared=counts_seen_by(index, counts).connections("main")
            )
            admissions.append(admission)
            return lambda: not admission.enter(A)

        admissions: list[Admission] = []
        race.run(enter, lambda: admissions[0].leave(A))
        assert race.too_many == 0 and race.admitted > 0
        assert counts.sum("listener", "main", CONNECTIONS) == 0

    def test_full_table_leaves_the_limits_to_each_process(self) -> None:
        listener = Listener(100, 2)
        counts = counts_seen_by(0, listener.counts)
        counts.ledger = Ledger(3, slots=1)
        counts.ledger.slot("user", "alice").add(CONNECTIONS, 1)
        door = Admission(ALL_CLIENTS, 3, 2, shared=counts.connections("main"))
        assert [door.enter(client) for client in (A, A, A, B, C)] == [
            *("", "", "client limit", "", "connection limit")
        ]
        counts.ledger.slot("user", "alice").add(CONNECTIONS, -1)
        door.leave(A)
        assert counts.ledger.tables[0].tolist().count(-1) == 0
        # Now there is room, but the others were not counted.
        assert door.enter(C) == ""
        for client in (A, B, C):
            door.leave(client)
        assert not door.live and counts.sum("listener", "main", CONNECTIONS) == 0
        assert counts.ledger.tables[0].tolist().count(-1) == 0

    def gauges(self, listener: Listener) -> int:
        """Return all connections and evicted ones that the tables have."""
        ledger = listener.counts.ledger
        tables = [(ledger.tables[index], ledger.listed(index)) for index in range(3)]
        words = CONNECTIONS, SESSIONS
        return sum(table[start + word] for table, at in tables for start in at for word in words)


class TestEviction:
    def test_worker_ends_a_connection_of_its_own_when_all_together_are_full(self) -> None:
        first, second = Listener(8, 8).admissions
        of_first = [Resident(first, A) for _ in range(4)]
        of_second = [Resident(second, B) for _ in range(4)]
        newcomer = Resident(second, C)
        assert [resident.must_end for resident in of_first] == [False] * 4
        assert [resident.must_end for resident in of_second] == [True, False, False, False]
        of_second[0].leave()
        newcomer.leave()
        assert [second.enter(C), first.enter(C)] == ["", ""]

    def test_client_with_connections_in_another_worker_is_no_newcomer(self) -> None:
        first, second = Listener(8, 8).admissions
        for _ in range(5):
            Resident(first, A)
        of_second = [Resident(second, B) for _ in range(3)]
        assert second.enter(A) == "connection limit"
        assert not any(resident.must_end for resident in of_second)

    def test_connections_beyond_the_limit_are_few_over_all_workers(self) -> None:
        first, second = Listener(8, 8).admissions
        residents = [Resident(first, A) for _ in range(4)] + [Resident(second, A) for _ in range(4)]
        residents += [Resident(first, B), Resident(second, C)]
        assert [first.enter(D), second.enter(D)] == ["connection limit"] * 2
        next(resident for resident in residents if resident.must_end).leave()
        assert second.enter(D) == ""

    def test_client_of_an_evicted_connection_may_come_again(self) -> None:
        first, second = Listener(4, 3).admissions
        residents = [Resident(first, A) for _ in range(3)] + [Resident(second, B)]
        residents.append(Resident(first, C))
        (evicted,) = (resident for resident in residents if resident.must_end)
        assert evicted.client.host == A
        second.leave(B, residents[3])
        assert second.enter(A) == ""
        assert second.enter(A) == "client limit"


class TestUsers:
    def workers(self, **users: Limits) -> tuple[Parent, list[Worker]]:
        parent = Parent(2, lambda: 0.0)
        workers = [Worker(parent, index) for index in (0, 1)]
        for worker in workers:
            worker.book.configure(users, {})
        return parent, workers

    @pytest.mark.parametrize("network, key", [("tcp", "connections"), ("udp", "sessions")])
    def test_limit_of_a_user_is_that_of_all_workers(self, network: str, key: str) -> None:
        _, (first, second) = self.workers(alice=Limits(connections=2, sessions=2))
        flow = a_flow(network=network)
        account = first.book.open(flow)
        second.book.open(flow)
        for worker in (first, second):
            with pytest.raises(FlowRefused) as refusal:
                worker.book.open(flow)
            assert refusal.value.decided == f"users.alice.limits.{key}"
        account.close()
        second.book.open(flow)

    def test_refused_flow_leaves_nothing_behind(self) -> None:
        _, (first, second) = self.workers(alice=Limits(connections=1))
        account = first.book.open(a_flow())
        for _ in range(3):
            with pytest.raises(FlowRefused):
                second.book.open(a_flow())
        assert second.book.stats(USER) == [] and not second.book._subjects
        account.close()
        second.book.open(a_flow()).close()

    def test_processes_at_the_same_limit_never_exceed_it(self) -> None:
        parent = Parent(2, lambda: 0.0, slots=64)
        race = Race(2, 3)
        books: list[Worker] = []
        accounts: list[FlowAccount] = []

        def enter(index: int) -> Callable[[], bool]:
            books.append(Worker(parent, index))
            books[0].book.configure({"alice": Limits(connections=3)}, {})
            return opens

        def opens() -> bool:
            try:
                accounts.append(books[0].book.open(a_flow()))
            except FlowRefused:
                return False
            return True

        race.run(enter, lambda: accounts.pop().close())
        assert race.too_many == 0 and race.admitted > 0

    def test_flow_that_two_workers_count_at_once_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Both have looked before the other one has counted its flow in."""
        monkeypatch.setattr(Subject, "reached", lambda *_: "")
        parent, (first, second) = self.workers(alice=Limits(connections=1))
        first.book.open(a_flow())
        with pytest.raises(FlowRefused) as refusal:
            second.book.open(a_flow())
        assert refusal.value.decided == "users.alice.limits.connections"
        alice = digest_of(USER, "alice")
        assert [parent.ledger.sum(alice, word) for word in (CONNECTIONS, OPENED)] == [1, 1]
        assert not second.book._subjects

    def test_killed_worker_frees_what_its_users_had(self) -> None:
        parent, (_, second) = self.workers(alice=Limits(connections=1, sessions=1))

        def work() -> None:
            worker = Worker(parent, 0)
            worker.book.open(a_flow())
            worker.book.open(a_flow(network="udp"))

        kill_after(work)
        with pytest.raises(FlowRefused):
            second.book.open(a_flow())
        parent.ledger.clear_gauges(0)
        second.book.open(a_flow())
        second.book.open(a_flow(network="udp"))

    def test_subject_counts_in_the_first_process_that_has_flows_of_it(self) -> None:
        _, (first, second) = self.workers()
        flows = [a_flow("alice"), a_flow("bob", client=Address("192.0.2.9", 1))]
        kept = [worker.book.open(flow) for worker in (first, second) for flow in flows]
        second.book.open(a_flow("carol"))
        counts = [worker.book.count(kind) for kind in (USER, CLIENT) for worker in (first, second)]
        assert counts == [2, 1, 2, 0]
        for account in kept[:2]:
            account.close()
        assert [first.book.count(USER), second.book.count(USER)] == [0, 3]
