"""The socket of an end: which addresses packets of direct paths go to, and how many at first."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Destination
from netproxy.tunnel.direct import origin
from netproxy.tunnel.direct.origin import ConnOrigin

PEER, DENIED = Address("198.51.100.7", 4000), Address("127.0.0.1", 80)


class FakeConn:
    """A packet connection that refuses one address; peers are addresses."""

    def __init__(self) -> None:
        self.prepared: list[Flow] = []
        self.sent: list[Any] = []

    def prepare(self, flow: Flow) -> Destination:
        self.prepared.append(flow)
        if flow.target == DENIED:
            raise DialError(Reason.DENIED, str(flow.target))
        return Destination([], flow.target)

    def source(self, peer: Any) -> Address:
        address: Address = peer
        return address

    def send(self, *arguments: Any) -> None:
        self.sent.append(arguments)


class Rig:
    """An origin whose checks wait until a test makes them."""

    def __init__(self) -> None:
        self.conn, self.tasks = FakeConn(), list[Callable[[], None]]()
        self.is_full = False
        self.origin = ConnOrigin(self.conn, self._submit)  # type: ignore[arg-type]  # a double

    def _submit(self, task: Callable[[], None]) -> bool:
        if not self.is_full:
            self.tasks.append(task)
        return not self.is_full

    def run(self) -> None:
        while self.tasks:
            self.tasks.pop()()


def test_named_address_gets_the_packets_of_one_attempt() -> None:
    """Hazard 182."""
    rig = Rig()
    remote = rig.origin.lead_to(PEER)
    assert remote.destination.sockaddr == PEER and not remote.validated
    assert [remote.may_send(1200) for _ in range(17)] == [True] * 16 + [False]
    assert [flow.listener for flow in rig.conn.prepared] == ["tunnel-direct"]


def test_address_that_is_refused_gets_nothing() -> None:
    """Hazard 182."""
    rig = Rig()
    with pytest.raises(DialError):
        rig.origin.lead_to(DENIED)
    assert rig.origin.remote(DENIED) is None


def test_peer_at_the_named_address_is_followed_at_once() -> None:
    rig = Rig()
    rig.origin.lead_to(PEER)
    remote = rig.origin.remote(PEER)
    assert remote is not None and remote.peer == PEER and not remote.may_send(1)
    remote.allow(1200)
    assert remote.may_send(3600) and not remote.may_send(1)
    assert not rig.tasks


def test_peer_elsewhere_is_followed_once_its_address_is_checked() -> None:
    """Hazard 182: the thread that reads never waits for a check."""
    rig = Rig()
    assert rig.origin.remote(PEER) is None and rig.origin.remote(PEER) is None
    assert len(rig.tasks) == 1 and not rig.conn.prepared
    rig.run()
    assert rig.origin.remote(PEER) is not None


def test_peer_at_a_denied_address_is_checked_once() -> None:
    rig = Rig()
    for _ in range(3):
        assert rig.origin.remote(DENIED) is None
        rig.run()
    assert len(rig.conn.prepared) == 1


def test_check_that_finds_no_thread_is_made_later() -> None:
    rig = Rig()
    rig.is_full = True
    assert rig.origin.remote(PEER) is None
    rig.is_full = False
    assert rig.origin.remote(PEER) is None
    rig.run()
    assert rig.origin.remote(PEER) is not None


def test_addresses_are_forgotten_at_the_limit() -> None:
    rig = Rig()
    for port in range(1, 2 * origin.PEERS_LIMIT):
        rig.origin.lead_to(PEER._replace(port=port))
    assert len(rig.origin._destinations) == origin.PEERS_LIMIT
