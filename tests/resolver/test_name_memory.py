"""The memory of the names that clients have asked for: ends, bounds, shares, processes."""

from __future__ import annotations

import os
import random

import pytest

from netproxy.resolver.client_names.name_memory import ADDRESSES_LIMIT, SETS, WAYS, NameMemory

CLIENT, OTHER = "192.168.1.5", "192.168.1.6"
ADDRESS, ADDRESS6 = "203.0.113.9", "2001:db8::9"
LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def test_name_is_found_for_the_client_that_asked() -> None:
    memory = NameMemory()
    memory.note(CLIENT, [ADDRESS, ADDRESS6], "a.example", 100.0, 0.0)
    assert memory.find(CLIENT, ADDRESS, 99.0) == "a.example"
    assert memory.find(CLIENT, ADDRESS6, 99.0) == "a.example"
    assert memory.find(OTHER, ADDRESS, 99.0) == ""
    assert memory.find(CLIENT, "203.0.113.8", 99.0) == ""


def test_name_is_forgotten_at_its_end() -> None:
    memory = NameMemory()
    memory.note(CLIENT, [ADDRESS], "a.example", 100.0, 0.0)
    assert memory.find(CLIENT, ADDRESS, 100.0) == ""


def test_last_name_of_an_address_counts() -> None:
    memory = NameMemory()
    for name in ("a.example", "longer.b.example", "c.example"):
        memory.note(CLIENT, [ADDRESS], name, 100.0, 0.0)
        assert memory.find(CLIENT, ADDRESS, 1.0) == name


def test_mapped_address_is_the_same_as_its_ipv4_address() -> None:
    memory = NameMemory()
    memory.note(f"::ffff:{CLIENT}", [ADDRESS], "a.example", 100.0, 0.0)
    assert memory.find(CLIENT, f"::ffff:{ADDRESS}", 1.0) == "a.example"


@pytest.mark.parametrize("name", ["a", LONGEST])
def test_longest_and_shortest_names_fit(name: str) -> None:
    memory = NameMemory()
    memory.note(CLIENT, [ADDRESS], name, 100.0, 0.0)
    assert memory.find(CLIENT, ADDRESS, 1.0) == name


def test_what_is_no_address_is_not_remembered() -> None:
    memory = NameMemory()
    memory.note("host", [ADDRESS], "a.example", 100.0, 0.0)
    memory.note(CLIENT, ["host"], "a.example", 100.0, 0.0)
    memory.note(CLIENT, [ADDRESS], "a" * 254, 100.0, 0.0)
    assert memory.find(CLIENT, ADDRESS, 1.0) == memory.find("host", ADDRESS, 1.0) == ""
    assert memory.find(CLIENT, "host", 1.0) == ""


def test_addresses_of_one_answer_are_bounded() -> None:
    memory = NameMemory()
    addresses = [f"203.0.113.{number}" for number in range(ADDRESSES_LIMIT + 1)]
    memory.note(CLIENT, addresses, "a.example", 100.0, 0.0)
    found = [memory.find(CLIENT, address, 1.0) for address in addresses]
    assert found == ["a.example"] * ADDRESSES_LIMIT + [""]


def test_client_that_asks_for_many_names_forgets_its_own() -> None:
    """Hazard 156."""
    memory = NameMemory(sets=1)
    for number in range(3):
        memory.note(OTHER, [f"203.0.113.{number}"], f"n{number}.example", 50.0, 0.0)
    for number in range(100):
        memory.note(CLIENT, [f"198.51.100.{number}"], f"m{number}.example", 100.0 + number, 0.0)
    kept = [memory.find(CLIENT, f"198.51.100.{number}", 1.0) for number in range(100)]
    assert [memory.find(OTHER, f"203.0.113.{number}", 1.0) for number in range(3)] == [
        f"n{number}.example" for number in range(3)
    ]
    assert [name for name in kept if name] == [f"m{number}.example" for number in range(95, 100)]


def test_expired_entries_make_room() -> None:
    memory = NameMemory(sets=1)
    for number in range(WAYS):
        memory.note(OTHER, [f"203.0.113.{number}"], "old.example", 10.0, 0.0)
    for number in range(WAYS):
        memory.note(CLIENT, [f"198.51.100.{number}"], "new.example", 100.0, 20.0)
    found = [memory.find(CLIENT, f"198.51.100.{number}", 21.0) for number in range(WAYS)]
    assert found == ["new.example"] * WAYS


def test_memory_never_grows() -> None:
    """Hazard 156."""
    memory, choose = NameMemory(sets=4), random.Random(1)
    size = len(memory._slots._memory)
    for number in range(2000):
        client = f"10.0.0.{choose.randrange(250)}"
        memory.note(client, [f"10.1.{number % 250}.1"], "a.example", 100.0, 0.0)
    assert len(memory._slots._memory) == size
    assert len(NameMemory()._slots._memory) // SETS == size // 4


def test_torn_entry_counts_as_free() -> None:
    memory = NameMemory(sets=1)
    memory.note(CLIENT, [ADDRESS], "a.example", 100.0, 0.0)
    at = memory._slots._memory[:].index(b"a.example")
    memory._slots._memory[at : at + 1] = b"b"
    assert memory.find(CLIENT, ADDRESS, 1.0) == ""
    memory.note(CLIENT, [ADDRESS], "c.example", 100.0, 0.0)
    assert memory.find(CLIENT, ADDRESS, 1.0) == "c.example"


def test_forked_processes_share_the_memory() -> None:
    memory = NameMemory()
    memory.note(CLIENT, [ADDRESS], "parent.example", 100.0, 0.0)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if memory.find(CLIENT, ADDRESS, 1.0) == "parent.example":
                memory.note(OTHER, [ADDRESS6], "child.example", 100.0, 0.0)
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert memory.find(OTHER, ADDRESS6, 1.0) == "child.example"
