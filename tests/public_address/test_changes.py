"""What is told of announced addresses: each change once, in the log and to the own sockets."""

from __future__ import annotations

import pytest

from netproxy.access.own_sockets import OwnSockets
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import NetworkSet
from netproxy.interfaces.routing import RouteSelectors
from netproxy.public_address import interface as interface_module
from netproxy.public_address.changes import Bound, Observers
from netproxy.public_address.listening import ListeningAddress, Settings
from netproxy.public_address.public import PublicAddressDependencies
from tests.support.doubles import Counts
from tests.support.handlers import RecordingLog

LOCAL, LOCAL6 = Address("192.0.2.1", 1080), Address("2001:db8::1", 1080)
BOUND = Settings(Bound(("tcp", "udp"), 1080), {"ppp0"})
FIRST, SECOND = "198.51.100.1", "198.51.100.2"


class _Rig:
    """A listening address whose interface ppp0 has the addresses in `hosts`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts = {False: "", True: ""}
        monkeypatch.setattr(
            interface_module, "interface_address", lambda name, ipv6: self.hosts[ipv6]
        )
        self.own = OwnSockets(self._is_local)
        self.log, self.counts = RecordingLog(), Counts()
        observers = Observers(self.own.register_everywhere, self.log, self.counts)
        dependencies = PublicAddressDependencies(NetworkSet(()), self._is_own)
        self.listening = ListeningAddress("main", observers, dependencies, None)
        self.listening.commit(BOUND)
        self.source = self.listening.source("ppp0", 0)

    def announced(self, local: Address = LOCAL) -> list[Address]:
        return list(self.source.addresses(local))

    def owned(self) -> list[str]:
        return [
            host
            for host in (FIRST, SECOND)
            if self.own.holds("udp", Address(host, 1080))
            and self.own.holds("tcp", Address(host, 1080))
        ]

    @staticmethod
    def _is_own(address: Address) -> bool:
        return False

    @staticmethod
    def _is_local(network: str, address: Address, selectors: RouteSelectors) -> bool:
        return False


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> _Rig:
    return _Rig(monkeypatch)


def test_address_is_that_of_the_moment_of_the_reply(rig: _Rig) -> None:
    assert rig.announced() == []
    rig.hosts[False] = FIRST
    assert rig.announced() == [Address(FIRST, 0)]
    rig.hosts[False] = SECOND
    assert rig.announced() == [Address(SECOND, 0)]
    assert rig.announced(LOCAL6) == []


def test_each_change_is_told_once(rig: _Rig) -> None:
    for host in ("", FIRST, SECOND, ""):
        rig.hosts[False] = host
        for _ in range(3):
            rig.announced()
    lost = "listener 'main': interface ppp0 has no IPv4 address to announce"
    assert rig.log.lines == [
        lost,
        f"listener 'main' announces {FIRST}:1080 (interface ppp0)",
        f"listener 'main' announces {SECOND}:1080 (interface ppp0, it was {FIRST}:1080)",
        f"{lost}, it was {SECOND}:1080",
    ]
    assert rig.counts.counts == {
        ("public_address", "lost"): 2,
        ("public_address", "found"): 1,
        ("public_address", "changed"): 1,
    }


def test_announced_address_is_an_own_one_as_long_as_it_is_announced(rig: _Rig) -> None:
    for host, owned in ((FIRST, [FIRST]), (SECOND, [SECOND]), ("", [])):
        rig.hosts[False] = host
        rig.announced()
        assert rig.owned() == owned


def test_interface_that_a_reload_removes_is_forgotten(rig: _Rig) -> None:
    rig.hosts[False] = FIRST
    rig.announced()
    rig.listening.commit(BOUND)
    assert rig.owned() == [FIRST]
    rig.listening.commit(BOUND._replace(interfaces={"eth0"}))
    assert rig.owned() == []


def test_reply_after_the_end_of_a_listener_owns_nothing(rig: _Rig) -> None:
    rig.hosts[False] = FIRST
    rig.announced()
    rig.listening.close()
    assert rig.owned() == []
    assert rig.announced() == [Address(FIRST, 0)]
    assert rig.owned() == []
