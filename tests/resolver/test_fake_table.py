"""The numbers of names with fake addresses: who keeps them, who gets them next, who shares them."""

from __future__ import annotations

import os

import pytest

from netproxy.resolver.client_names import fake_memory, fake_table
from netproxy.resolver.client_names.fake_memory import ASKERS, FakeMemory
from netproxy.resolver.client_names.fake_table import KEPT_SECONDS, TRIES, FakeTable
from netproxy.resolver.client_names.name_tables import NameTables

CLIENT, OTHER = "192.168.1.5", "192.168.1.6"
LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])
LATER = 1000.0 + KEPT_SECONDS
MANY = 1 << 16


@pytest.fixture
def table() -> FakeTable:
    return FakeTable(FakeMemory(1), 0)


def owner(number: int) -> str:
    """Return the client for which fill() has asked."""
    return f"10.0.{number // 250}.{number % 250}"


def fill(table: FakeTable, count: int, now: float = 1000.0, limit: int = MANY) -> list[str]:
    """Give numbers to so many names, each for a client of its own; return the names."""
    names = [f"n{number}.example" for number in range(count)]
    for number, name in enumerate(names):
        assert table.number(name, owner(number), now, limit) is not None
    return names


@pytest.mark.parametrize("name", ["a", "www.example", LONGEST])
def test_number_leads_to_its_name(table: FakeTable, name: str) -> None:
    number = table.number(name, CLIENT, 1000.0, MANY)
    assert number is not None and table.name(number, CLIENT, 1000.0) == name
    assert table.name(number + 1, CLIENT, 1000.0) == table.name(MANY, CLIENT, 1000.0) == ""


def test_name_keeps_its_number_for_all_clients(table: FakeTable) -> None:
    first = table.number("www.example", CLIENT, 1000.0, MANY)
    fill(table, 20)
    for host, now in ((OTHER, 1001.0), (CLIENT, LATER), (OTHER, 10 * LATER)):
        assert table.number("www.example", host, now, MANY) == first


def test_number_that_was_not_asked_for_the_longest_goes_first(table: FakeTable) -> None:
    names = fill(table, 10, limit=10)
    numbers = [table.number(name, OTHER, 1001.0 + at, 10) for at, name in enumerate(names)]
    assert table.number(names[0], OTHER, 1050.0, 10) == numbers[0]
    assert table.number("new.example", CLIENT, LATER + 60.0, 10) == numbers[1]
    assert table.name(numbers[1] or 0, CLIENT, LATER) == "new.example"


def test_number_that_was_asked_for_lately_gets_no_other_name(table: FakeTable) -> None:
    """Hazard 159."""
    names = fill(table, 10, limit=10)
    assert table.number("new.example", CLIENT, LATER - 1.0, 10) is None
    assert [table.name(number, CLIENT, 1000.0) for number in range(10)] == names
    assert table.number("new.example", CLIENT, LATER, 10) == 0


def test_number_that_flows_use_gets_no_other_name(table: FakeTable) -> None:
    """Hazard 159."""
    fill(table, 10, limit=10)
    for number in range(9):
        table.name(number, owner(number), LATER)
    assert table.number("new.example", CLIENT, LATER, 10) == 9
    assert table.number("newer.example", CLIENT, LATER, 10) is None
    assert len(table) == 10


def test_search_for_a_number_without_flows_is_bounded(table: FakeTable) -> None:
    count = TRIES + 5
    fill(table, count, limit=count)
    for _ in range(3):
        table.number("n0.example", owner(0), LATER, count)
    for number in range(count - 1):
        table.name(number, owner(number), LATER)
    given = [table.number("new.example", CLIENT, LATER + 1, count) for _ in range(4)]
    assert given[0] is None and given[-1] == count - 1


def test_number_whose_flows_are_longest_ago_goes_if_all_had_some(table: FakeTable) -> None:
    fill(table, 10, limit=10)
    for number in range(10):
        table.name(number, CLIENT, LATER + (number + 5) % 10)
    assert table.number("new.example", CLIENT, 2 * LATER, 10) == 5


def test_client_that_asks_for_many_names_leaves_numbers_for_others(table: FakeTable) -> None:
    """Hazard 159."""
    given = [table.number(f"m{number}.example", CLIENT, 1000.0, 64) for number in range(64)]
    assert given == [*range(32), *[None] * 32]
    for host in (OTHER, "2001:db8::1"):
        assert table.number(f"{host}.example", host, 1000.0, 64) is not None
    # Addresses of one IPv6 network are one client.
    given = [
        table.number(f"six{number}.example", f"2001:db8::{number}", 1000.0, 64)
        for number in range(1, 65)
    ]
    # It gets what is free, and then as much as the other one keeps.
    assert sum(number is not None for number in given) == 15 + 8
    # The names that it has stay.
    assert table.number("m31.example", CLIENT, 1001.0, 64) == 31


def ask_for_many(table: FakeTable, host: str, limit: int, now: float = 1000.0) -> dict[int, str]:
    """Ask for more names than there are numbers; return those that have one, by number."""
    names = [f"{host}-{number}.example" for number in range(limit)]
    given = {table.number(name, host, now, limit): name for name in names}
    return {number: name for number, name in given.items() if number is not None}


def test_numbers_that_flows_keep_count_for_their_client(table: FakeTable) -> None:
    """Hazard 159.  One client keeps what it has by flows, and asks for more."""
    held = set()
    for now in (1000.0, LATER, LATER + KEPT_SECONDS, LATER + 2 * KEPT_SECONDS):
        for number in held:
            table.name(number, CLIENT, now - 1)
        held |= set(ask_for_many(table, CLIENT, 64, now))
    assert len(held) == 32
    assert len(ask_for_many(table, OTHER, 64, now)) > 16


def test_client_that_holds_most_loses_its_oldest_number(table: FakeTable) -> None:
    """Hazard 159.  Its flows go to no server that it does not want."""
    first = ask_for_many(table, CLIENT, 8)
    assert list(first) == [0, 1, 2, 3]
    second = ask_for_many(table, OTHER, 8, 1001.0)
    assert list(second) == [4, 5, 0]
    assert table.name(0, CLIENT, 1002.0) == table.name_asked(0, CLIENT) == ""
    assert table.name(0, OTHER, 1002.0) == second[0]
    assert [table.name(number, CLIENT, 1002.0) for number in (1, 2, 3)] == list(first.values())[1:]
    assert table.number(first[0], CLIENT, 1002.0, 8) is None
    # By then it has forgotten its former name; or it has asked for the new one.
    assert table.name(0, CLIENT, 1001.0 + KEPT_SECONDS + 1) == second[0]
    assert ask_for_many(table, OTHER, 8, 1003.0)[0] == second[0]
    assert table.number(second[0], CLIENT, 1004.0, 8) == 0
    assert table.name(0, CLIENT, 1004.0) == second[0]


def test_number_that_several_clients_use_gets_no_other_name(table: FakeTable) -> None:
    """Hazard 159."""
    first = ask_for_many(table, CLIENT, 8)
    for number in (0, 1, 2):
        table.name(number, OTHER, 1000.0)
        table.name(number, CLIENT, 1001.0)
    assert 3 in ask_for_many(table, "10.0.0.1", 8, 1002.0)
    ask_for_many(table, "10.0.0.2", 8, 1003.0)
    assert [table.name(number, OTHER, 1003.0) for number in (0, 1, 2)] == list(first.values())[:3]


def test_number_is_taken_from_one_client_at_a_time(table: FakeTable) -> None:
    """Hazard 159.  Each that has lost it may still mean its former name."""
    first = ask_for_many(table, CLIENT, 8)
    assert 0 in ask_for_many(table, OTHER, 8, 1001.0)
    for number in range(20):
        ask_for_many(table, f"10.0.0.{number}", 8, 1002.0)
    assert not table.name(0, CLIENT, 1003.0)
    assert first[0] not in {table.name(number, OTHER, 1003.0) for number in range(8)}


def test_use_by_clients_of_other_workers_counts() -> None:
    """Hazard 159."""
    memory = FakeMemory(2)
    first, second = FakeTable(memory, 0), FakeTable(memory, 1)
    numbers = list(ask_for_many(first, CLIENT, 16))
    second.name(numbers[0], OTHER, 1001.0)
    second.name(numbers[1], CLIENT, 1001.0)
    taken = set(ask_for_many(first, "10.0.0.1", 16, 1002.0)) & set(numbers)
    assert numbers[1] in taken and numbers[0] not in taken


def test_clients_that_have_asked_for_a_name_may_learn_it(table: FakeTable) -> None:
    for host in (CLIENT, CLIENT, "2001:db8::1"):
        assert table.number("www.example", host, 1000.0, MANY) == 0
    table.name(0, OTHER, 1000.0)
    for host, told in ((CLIENT, True), ("2001:db8::2", True), (OTHER, False)):
        assert table.name_asked(0, host) == ("www.example" if told else ""), host
    for number in range(ASKERS - 1):
        table.number("www.example", f"10.0.0.{number}", 1000.0, MANY)
    assert table.name_asked(0, CLIENT) == "" and table.name_asked(0, "2001:db8::1")


def test_names_of_a_process_are_bounded(table: FakeTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_memory, "SEGMENT", 40)
    table = FakeTable(FakeMemory(1), 0)
    for number in range(1000):
        table.number(f"n{number}.example", f"10.0.{number // 250}.{number % 250}", 1e3, MANY)
        assert len(table) <= 40
    assert len(table) == 40


def test_one_query_lets_few_numbers_grow_old(table: FakeTable) -> None:
    fill(table, 200)
    table.number("new.example", CLIENT, LATER, MANY)
    assert len(table._old) == fake_table.AGED_AT_ONCE


def test_workers_give_different_numbers_and_find_all_names() -> None:
    memory = FakeMemory(3)
    tables = [FakeTable(memory, index) for index in range(3)]
    given = {}
    for index, table in enumerate(tables):
        for name in ("www.example", f"only{index}.example"):
            number = table.number(name, CLIENT, 1000.0, 30)
            assert number is not None and number < 30
            given[number] = name
    assert len(given) == 6
    for table in tables:
        assert {number: table.name(number, CLIENT, 1000.0) for number in given} == given


def test_use_of_a_number_by_another_worker_keeps_it() -> None:
    memory = FakeMemory(2)
    first, second = FakeTable(memory, 0), FakeTable(memory, 1)
    number = first.number("www.example", CLIENT, 1000.0, 2)
    assert number is not None
    second.name(number, CLIENT, LATER)
    assert first.number("new.example", OTHER, LATER, 2) is None
    assert first.number("new.example", OTHER, LATER + KEPT_SECONDS, 2) == number


def test_successor_of_a_worker_keeps_its_numbers() -> None:
    """Hazard 161."""
    memory = FakeMemory(2)
    before = FakeTable(memory, 1)
    numbers = {name: before.number(name, CLIENT, 1000.0, 20) for name in ("a.example", "b.example")}
    before.number("old.example", CLIENT, 100.0, 20)
    successor = FakeTable(memory, 0)
    successor.become_worker(1)
    for name, number in numbers.items():
        assert successor.number(name, OTHER, 1001.0, 20) == number
    assert len(successor) == 3
    new = {
        successor.number(f"new{count}.example", f"10.0.0.{count}", 1002.0, 20) for count in range(7)
    }
    assert len(new) == 7 and not new & set(numbers.values())


def test_name_that_was_being_written_when_its_worker_died_is_nobody_s() -> None:
    """Hazard 161."""
    memory = FakeMemory(1)
    before = FakeTable(memory, 0)
    number = before.number("www.example", CLIENT, 1000.0, 4)
    assert number == 0
    at = memory._names._memory[:].index(b"www.example")
    memory._names._memory[at : at + 1] = b"W"
    assert before.name(number, CLIENT, 1000.0) == ""
    successor = FakeTable(memory, 0)
    given = [successor.number(f"n{count}.example", CLIENT, 2000.0, 4) for count in range(4)]
    assert number not in given and given[0] == 1


def test_fewer_addresses_of_a_new_configuration_bound_the_numbers(table: FakeTable) -> None:
    numbers = [table.number(name, CLIENT, 1000.0, 40) for name in ("a.example", "b.example")]
    fill(table, 30, limit=40)
    assert table.number("b.example", CLIENT, 1001.0, 10) == numbers[1]
    for count in range(20):
        number = table.number(f"new{count}.example", f"10.1.0.{count}", LATER + 1, 10)
        assert number is None or number < 10


def test_forked_processes_share_the_names() -> None:
    tables = NameTables(2)
    parent = tables.fakes
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tables.become_worker(1)
            if parent.number("child.example", CLIENT, 1000.0, MANY) == 1:
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert parent.name(1, CLIENT, 1000.0) == "child.example"
    assert parent.number("parent.example", CLIENT, 1000.0, MANY) == 0


def test_memory_of_fake_addresses_is_the_same_in_all_configurations() -> None:
    tables = NameTables()
    assert tables.fakes is tables.fakes
    for workers in (1, 2, 64):
        memory = FakeMemory(workers)
        assert memory.segment * workers <= fake_memory.TOTAL and memory.segment >= 1024
