"""What is announced: a port mapping, what servers see, or the local address."""

from __future__ import annotations

import pytest

from netproxy.access.destinations import parse_networks
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import NetworkSet
from netproxy.public_address.changes import Bound, Changes, Observers
from netproxy.public_address.dialects import Port
from netproxy.public_address.public import AutoAddress, PublicAddress, PublicAddressDependencies
from tests.support.doubles import Counts
from tests.support.handlers import RecordingLog

SEEN, MAPPED = Address("203.0.113.5", 40000), Address("203.0.113.5", 1080)
SEEN6, OWN = Address("2001:db8::5", 40000), Address("198.51.100.1", 1080)
BEHIND_CARRIER = Address("100.64.1.2", 1080)
UDP, TCP = Port("udp", 1080), Port("tcp", 1080)
UNKNOWN = "listener 'main': no public address is known: the local one is announced"


class Rig:
    def __init__(self) -> None:
        self.log = RecordingLog()
        self.owned: list[tuple[str, Address]] = []
        self.published: list[list[Address]] = []
        changes = Changes("main", Observers(self._register, self.log, Counts()))
        changes.bound = Bound(("tcp", "udp"), 1080)
        inside = parse_networks(("private", "loopback", "link-local"))
        dependencies = PublicAddressDependencies(
            NetworkSet((), inside), lambda address: address == OWN
        )
        self.public = PublicAddress(dependencies, changes)
        self.public.publish = lambda addresses: self.published.append(list(addresses))
        self.public.begin()

    def _register(self, network: str, address: Address) -> object:
        self.owned.append((network, address))
        return lambda: self.owned.remove((network, address))

    @property
    def current(self) -> list[Address]:
        return list(self.public.current)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_nothing_is_announced_before_something_is_found(rig: Rig) -> None:
    assert rig.current == []
    assert rig.log.lines == [UNKNOWN]
    rig.public.begin()
    assert rig.log.lines == [UNKNOWN]
    assert rig.published == []


def test_address_that_servers_see_is_announced(rig: Rig) -> None:
    rig.public.seen(False, SEEN, "192.0.2.1:3478")
    rig.public.seen(True, SEEN6, "192.0.2.1:3478")
    assert sorted(rig.current) == [SEEN6, SEEN]
    assert rig.log.lines[1:] == [
        f"listener 'main' announces {SEEN} (seen by 192.0.2.1:3478)",
        f"listener 'main' announces {SEEN6} (seen by 192.0.2.1:3478)",
    ]
    assert rig.published == [[SEEN], [SEEN, SEEN6]]
    assert set(rig.owned) == {
        (network, address) for network in ("tcp", "udp") for address in (SEEN, SEEN6)
    }


def test_change_is_told_with_the_address_before(rig: Rig) -> None:
    rig.public.seen(False, SEEN, "a")
    rig.public.seen(False, SEEN, "a, b")
    rig.public.seen(False, MAPPED, "a, b")
    assert rig.log.lines[2:] == [
        f"listener 'main' announces {MAPPED} (seen by a, b, it was {SEEN})"
    ]
    assert rig.owned == [("tcp", MAPPED), ("udp", MAPPED)]
    rig.public.seen(False, None, "")
    assert rig.log.lines[-1] == f"{UNKNOWN}, it was {MAPPED}"
    assert (rig.current, rig.owned) == ([], [])


def test_port_mapping_of_udp_counts_first(rig: Rig) -> None:
    rig.public.seen(False, SEEN, "a")
    rig.public.mapped(TCP, Address("203.0.113.5", 7))
    assert rig.current == [SEEN]
    rig.public.mapped(UDP, MAPPED)
    assert rig.current == [MAPPED]
    assert rig.log.lines[-1] == (
        f"listener 'main' announces {MAPPED} (port mapping, it was {SEEN})"
    )
    rig.public.mapped(UDP, None)
    assert rig.current == [SEEN]


def test_router_behind_another_nat_is_not_believed(rig: Rig) -> None:
    rig.public.mapped(UDP, BEHIND_CARRIER)
    assert rig.current == [BEHIND_CARRIER]
    rig.public.seen(False, SEEN, "a")
    assert rig.current == [SEEN]
    assert "seen by a, because the router's 100.64.1.2 is not public" in rig.log.lines[-1]


def test_address_of_this_machine_needs_no_announcement(rig: Rig) -> None:
    """Without a NAT the client has reached an address of the machine: it is told that one."""
    rig.public.seen(False, SEEN, "a")
    rig.public.seen(False, OWN, "a")
    assert rig.current == []
    assert rig.log.lines[-1].startswith(
        "listener 'main': 198.51.100.1 is this machine's own: local addresses are announced"
    )


def test_port_that_servers_do_not_agree_on_is_that_of_the_listener(rig: Rig) -> None:
    rig.public.seen(False, SEEN._replace(port=0), "a, b, each sees another port")
    assert rig.current == [SEEN._replace(port=0)]
    assert f"announces {SEEN.host}:1080 (seen by a, b, each sees another port)" in rig.log.lines[-1]


def test_configured_port_replaces_the_one_that_was_found(rig: Rig) -> None:
    rig.public.seen(False, SEEN, "a")
    local = Address("192.168.1.7", 1080)
    assert list(AutoAddress(rig.public, 0).addresses(local)) == [SEEN]
    assert list(AutoAddress(rig.public, 2080).addresses(local)) == [SEEN._replace(port=2080)]


def test_other_worker_announces_what_it_is_told(rig: Rig) -> None:
    rig.public.follow([SEEN])
    assert rig.current == [SEEN]
    assert rig.log.lines == [UNKNOWN]
