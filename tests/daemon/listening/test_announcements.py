"""A daemon that finds what it announces: by STUN servers, and by the mappings of a router."""

from __future__ import annotations

from typing import Iterator

import pytest

from netproxy.admin.stats import families
from netproxy.admin.stats.snapshot import Snapshot
from netproxy.daemon.listening import finding
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.answers import ListenerRow
from netproxy.net.local.routes import KernelRoutes
from netproxy.net.stream import Stream, complete
from netproxy.protocol.socks5 import read_reply
from netproxy.public_address.dialects import Port
from tests.support.handlers import LOCALHOST, eventually
from tests.support.relays import Running, UdpPort, associate, running
from tests.support.router import OUTSIDE, Router
from tests.support.stun_server import StunServer, stun_server

MAPPED = Address("203.0.113.5", 40000)
LISTEN = "listeners: [{listen: '0.0.0.0:0', name: main, clients: [127.0.0.0/8], %s}]"
FOR_ALL = "announce: [{clients: 127.0.0.0/8, address: %s}], stun: ['%s']"


@pytest.fixture
def server() -> Iterator[StunServer]:
    with stun_server() as server:
        server.mapped = MAPPED
        yield server


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Router:
    """Return a router that stands in for the gateway of this machine."""
    router = Router()
    monkeypatch.setattr(KernelRoutes, "gateway_to", lambda *_: "192.168.1.1")
    monkeypatch.setattr(finding, "connect_router", router.connect)
    return router


def by_stun(server: StunServer, address: str = "auto") -> str:
    return LISTEN % (FOR_ALL % (address, server.address))


def told(relay: Running) -> Address:
    """Return the address that a client is told for its datagrams."""
    with associate(relay.port) as control:
        code, address = complete(read_reply(Stream(control)))
        assert code == 0
        return address


def row(relay: Running) -> ListenerRow:
    return relay.daemon.listening()[0]


def metrics(relay: Running) -> dict[str, float]:
    """Return the values of netproxy_port_mapping_up, by network."""
    shown = families.listener_families(Snapshot(listeners=relay.daemon.listening()))
    (family,) = [family for family in shown if family.name == "port_mapping_up"]
    assert all(sample.labels["listener"] == "main" for sample in family.samples)
    return {sample.labels["network"]: sample.value for sample in family.samples}


def test_client_is_told_what_servers_see(server: StunServer) -> None:
    with running(by_stun(server)) as relay:
        eventually(lambda: told(relay) == MAPPED)
        assert row(relay)["announced"] == [str(MAPPED)]
        assert server.requests[0].port == relay.port
        assert relay.drops() == {}
        assert relay.count("public_address", "found") == 1


def test_configured_port_is_told(server: StunServer) -> None:
    with running(by_stun(server, "'auto:2080'")) as relay:
        eventually(lambda: told(relay) == Address(MAPPED.host, 2080))


def test_client_with_a_private_address_is_told_the_local_one(server: StunServer) -> None:
    text = LISTEN % f"announce: auto, stun: ['{server.address}']"
    with running(text) as relay:
        eventually(lambda: row(relay)["announced"] == [str(MAPPED)])
        assert told(relay) == Address(LOCALHOST, relay.port)


def test_local_address_is_told_until_a_server_answers(server: StunServer) -> None:
    server.silent = True
    with running(by_stun(server)) as relay:
        eventually(lambda: len(server.requests) == 2)
        assert told(relay) == Address(LOCALHOST, relay.port)
        assert [line for line in relay.log.lines if "announce" in line] == [
            "listener 'main': no public address is known: the local one is announced"
        ]
        server.silent = False
        eventually(lambda: told(relay) == MAPPED)


def test_datagrams_of_clients_pass_between_the_answers(server: StunServer) -> None:
    with (
        running(by_stun(server) + "\ndestinations: {deny: []}") as relay,
        associate(relay.port) as control,
        UdpPort() as client,
        UdpPort() as target,
    ):
        complete(read_reply(Stream(control)))
        request = b"\0\0\0\1\x7f\0\0\1" + target.address.port.to_bytes(2, "big")
        server.copies = 5
        client.send(request + b"hello", Address(LOCALHOST, relay.port))
        target.expect(b"hello")
        client.send(b"\0\0\0\x0c" + bytes(20), Address(LOCALHOST, relay.port))
        relay.wait_for_count("drops", "malformed", 1)


def test_reload_keeps_what_was_found(server: StunServer) -> None:
    with running(by_stun(server)) as relay:
        eventually(lambda: told(relay) == MAPPED)
        asked = len(server.requests)
        server.silent = True
        relay.reload(by_stun(server) + "\nlog: {level: debug}")
        assert told(relay) == MAPPED
        # It asks at once whether that is still so.
        eventually(lambda: len(server.requests) > asked)
        server.silent = False
        # What it announces is one of its own addresses.
        assert relay.daemon._runtime.own.holds("udp", MAPPED)
        relay.reload(LISTEN % "announce: 203.0.113.99")
        assert told(relay) == Address("203.0.113.99", relay.port)
        assert not relay.daemon._runtime.own.holds("udp", MAPPED)
        relay.reload(by_stun(server))
        eventually(lambda: told(relay) == MAPPED)


def test_reload_may_ask_another_server(server: StunServer) -> None:
    with stun_server() as other, running(by_stun(server)) as relay:
        other.mapped = Address("203.0.113.9", 1080)
        eventually(lambda: told(relay) == MAPPED)
        relay.reload(by_stun(other))
        eventually(lambda: told(relay) == other.mapped)


def test_loopback_listener_asks_nobody(server: StunServer) -> None:
    text = f"listeners: [{{listen: '127.0.0.1:0', announce: auto, stun: ['{server.address}']}}]"
    with running(text) as relay:
        relay.sweep(1.0)
        assert told(relay) == Address(LOCALHOST, relay.port)
        assert server.requests == []
        (warning,) = relay.log.lines
        assert "auto has no effect: only this machine reaches the listener" in warning


def test_port_mapping_is_announced_and_released(router: Router) -> None:
    router.shift = 1
    announce = "announce: [{clients: 127.0.0.0/8, address: auto}], port_mapping: pcp"
    with running(LISTEN % announce) as relay:
        outside = Address(OUTSIDE, relay.port + 1)
        eventually(lambda: told(relay) == outside)
        ports = [Port(network, relay.port) for network in ("tcp", "udp")]
        eventually(lambda: sorted(router.mappings) == ports)
        mappings = sorted(row(relay)["mappings"], key=lambda mapping: mapping["network"])
        assert [(mapping["network"], mapping["external"]) for mapping in mappings] == [
            ("tcp", str(outside)),
            ("udp", str(outside)),
        ]
        assert all(mapping["how"] == "pcp, router 192.168.1.1" for mapping in mappings)
        assert metrics(relay) == {"tcp": 1, "udp": 1}
    assert router.mappings == {}


def test_port_that_a_reload_removes_is_released(router: Router) -> None:
    with running(LISTEN % "port_mapping: nat-pmp") as relay:
        eventually(lambda: len(router.mappings) == 2)
        assert told(relay) == Address(LOCALHOST, relay.port)
        relay.reload(LISTEN % "auth: none")
        eventually(lambda: router.mappings == {})
        assert row(relay)["mappings"] == []
        # Nothing is left that the janitor would look through.
        relay.reload(LISTEN % "auth: none")
        assert not relay.daemon.found_addresses()


def test_listener_that_is_auto_no_more_announces_nothing_that_was_found(router: Router) -> None:
    auto = "announce: [{clients: 127.0.0.0/8, address: auto}], port_mapping: pcp"
    with running(LISTEN % auto) as relay:
        eventually(lambda: told(relay) == Address(OUTSIDE, relay.port))
        relay.reload(LISTEN % "announce: {interface: lo}, port_mapping: pcp")
        assert told(relay) == Address(LOCALHOST, relay.port)
        assert row(relay)["announced"] == []
        assert not relay.daemon._runtime.own.holds("udp", Address(OUTSIDE, relay.port))
        relay.reload(LISTEN % auto)
        assert told(relay) == Address(OUTSIDE, relay.port)


def test_refused_mapping_stands_in_the_row(router: Router) -> None:
    router.result = 2
    with running(LISTEN % "port_mapping: pcp") as relay:
        eventually(lambda: all(mapping["fault"] for mapping in row(relay)["mappings"]))
        assert row(relay)["mappings"][0]["fault"] == "refused: not authorized"
        assert metrics(relay) == {"tcp": 0, "udp": 0}
