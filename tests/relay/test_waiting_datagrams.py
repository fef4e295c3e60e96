"""The queues of a NAT table: their limits, and who loses datagrams when they are full."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena
from netproxy.relay.table import waiting_datagrams
from netproxy.relay.client import Client, no_header
from netproxy.relay.entry import Entry
from netproxy.relay.table.waiting_datagrams import WaitingQueues
from tests.support.upstreams import FakeSocket

FLOW = Flow("udp", Address("192.0.2.1", 5000), Address("198.51.100.1", 9000), "main", "")


def make_client(host: str = "192.0.2.1") -> Client:
    """Return a client endpoint at an address."""
    return Client("peer", Address(host, 5000), FakeSocket(), no_header, None)


def fill(queues: WaitingQueues, entry: Entry, count: int) -> int:
    """Let datagrams wait; return how many were lost."""
    arena = Arena()
    return sum(queues.put(entry, arena, arena.put(b"%d" % number)) for number in range(count))


def test_datagrams_are_taken_in_order_once() -> None:
    queues, entry, arena = WaitingQueues(), Entry(("peer", 1), make_client(), FLOW), Arena()
    for data in (b"first", b"", b"third"):
        assert queues.put(entry, arena, arena.put(data)) == 0
    assert queues.total == entry.client.waiting == 3
    assert queues.take(entry) == [b"first", b"", b"third"]
    assert queues.take(entry) == []
    assert queues.total == entry.client.waiting == 0


def test_every_limit_bounds_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two endpoints of one address share its room: the oldest datagrams are lost."""
    monkeypatch.setattr(waiting_datagrams, "ENTRY_WAITING_LIMIT", 2)
    monkeypatch.setattr(waiting_datagrams, "CLIENT_WAITING_LIMIT", 3)
    monkeypatch.setattr(waiting_datagrams, "TOTAL_WAITING_LIMIT", 4)
    queues, client, other = WaitingQueues(), make_client(), make_client()
    entries = [Entry(("peer", n), client, FLOW) for n in range(3)]
    entries += [Entry(("other", n), other, FLOW) for n in range(2)]
    assert [fill(queues, entry, 3) for entry in entries] == [1, 2, 3, 2, 3]
    assert (queues.total, client.waiting, other.waiting) == (4, 1, 3)
    assert [queues.take(entry) for entry in entries] == [[], [b"0"], [], [b"0", b"1"], [b"0"]]
    assert (queues.total, client.waiting, other.waiting) == (0, 0, 0)


@pytest.mark.parametrize("attackers", [1, 2, 50])
def test_flood_of_other_addresses_leaves_room_for_a_client(attackers: int) -> None:
    """Hazard 138.  The flood has many endpoints at each address."""
    queues = WaitingQueues()
    flood = [
        Entry((host, number), make_client(f"198.51.100.{host}"), FLOW)
        for host in range(attackers)
        for number in range(2000 // waiting_datagrams.ENTRY_WAITING_LIMIT // attackers + 1)
    ]
    before = sum(fill(queues, entry, waiting_datagrams.ENTRY_WAITING_LIMIT) for entry in flood)
    entry = Entry(("good", 1), make_client("192.0.2.1"), FLOW)
    assert fill(queues, entry, 10) == 10
    after = sum(fill(queues, entry, waiting_datagrams.ENTRY_WAITING_LIMIT) for entry in flood)
    assert before and after
    assert queues.take(entry) == [b"%d" % number for number in range(10)]
    assert queues.total == waiting_datagrams.TOTAL_WAITING_LIMIT - 10
