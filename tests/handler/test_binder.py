"""BND.ADDR: which address a client is told, alone and in the replies of a real daemon."""

from __future__ import annotations

import pytest

from netproxy.interfaces.networks import NetworkSet
from netproxy.errors import DialError, Reason
from netproxy.handler.announce import Announcement, Announcer
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.net.stream import Stream, complete
from netproxy.protocol.socks5 import read_reply
from tests.support.handlers import LOCALHOST
from tests.support.relays import UdpPort, associate, running

CLIENT, LOCAL = Address("192.168.1.7", 40000), Address("192.168.1.1", 1080)
CLIENT6, LOCAL6 = Address("2001:db8::7", 40000), Address("2001:db8::1", 1080)
NAMES = {
    "one.example": ["203.0.113.5"],
    "both.example": ["2001:db8::5", "203.0.113.5"],
    "six.example": ["2001:db8::5"],
    "nothing.example": ["0.0.0.0", "::"],
}


class NamesResolver:
    """Resolves NAMES."""

    def resolve(self, target: Address, seconds: float = 0.0) -> list[Address]:
        if target.host not in NAMES:
            raise DialError(Reason.NAME, target.host)
        return [Address(host, target.port) for host in NAMES[target.host]]

    known = resolve


def announcer(*announced: tuple[str, Address]) -> Announcer:
    """Each by the networks it is for ("" for all) and the address."""
    return Announcer(
        [
            Announcement(
                NetworkSet(map(IpNetwork.parse, clients.split())) if clients else None, address
            )
            for clients, address in announced
        ],
        NamesResolver(),
    )


def test_with_nothing_announced_it_is_the_control_connections_own_address() -> None:
    assert announcer().bound(CLIENT, LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert announcer().bound(CLIENT6, LOCAL6, 5000) == Address("2001:db8::1", 5000)


def test_a_scope_means_nothing_to_the_client() -> None:
    assert announcer().bound(Address("fe80::7%2", 1), Address("fe80::1%2", 1080), 5000) == Address(
        "fe80::1", 5000
    )


@pytest.mark.parametrize(
    "announced, told",
    [
        (Address("203.0.113.5", 0), Address("203.0.113.5", 5000)),
        (Address("203.0.113.5", 1234), Address("203.0.113.5", 1234)),
        (Address("one.example", 0), Address("203.0.113.5", 5000)),
        (Address("one.example", 1234), Address("203.0.113.5", 1234)),
        (Address("both.example", 0), Address("203.0.113.5", 5000)),
    ],
)
def test_the_announced_address_is_told(announced: Address, told: Address) -> None:
    assert announcer(("", announced)).bound(CLIENT, LOCAL, 5000) == told


@pytest.mark.parametrize(
    "announced", ["0.0.0.0", "::", "2001:db8::5", "six.example", "nothing.example", "gone.example"]
)
def test_what_is_no_address_of_that_family_is_never_told(announced: str) -> None:
    """Hazard 43."""
    assert announcer(("", Address(announced, 0))).bound(CLIENT, LOCAL, 5000) == Address(
        "192.168.1.1", 5000
    )
    assert announcer(("", Address(announced, 1234))).bound(CLIENT, LOCAL, 5000) == Address(
        "192.168.1.1", 5000
    )


@pytest.mark.parametrize(
    "announced", ["::", "0.0.0.0", "203.0.113.5", "one.example", "nothing.example"]
)
def test_an_ipv6_client_is_told_an_ipv6_address_that_is_one(announced: str) -> None:
    """Hazard 43."""
    assert announcer(("", Address(announced, 0))).bound(CLIENT6, LOCAL6, 5000) == Address(
        "2001:db8::1", 5000
    )


def test_each_family_may_have_its_own() -> None:
    both = announcer(("", Address("203.0.113.5", 0)), ("", Address("2001:db8::5", 0)))
    assert both.bound(CLIENT, LOCAL, 5000) == Address("203.0.113.5", 5000)
    assert both.bound(CLIENT6, LOCAL6, 5000) == Address("2001:db8::5", 5000)
    assert announcer(("", Address("both.example", 0))).bound(CLIENT6, LOCAL6, 5000) == Address(
        "2001:db8::5", 5000
    )


def test_the_first_entry_that_fits_the_client_is_told() -> None:
    by_client = announcer(
        ("192.168.0.0/16 10.0.0.0/8", Address("192.168.1.1", 0)), ("", Address("203.0.113.5", 1080))
    )
    assert by_client.bound(CLIENT, LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert by_client.bound(Address("10.9.9.9", 1), LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert by_client.bound(Address("198.51.100.9", 1), LOCAL, 5000) == Address("203.0.113.5", 1080)


def test_a_client_that_no_entry_is_for_is_told_the_connections_own_address() -> None:
    assert announcer(("10.0.0.0/8", Address("10.0.0.1", 0))).bound(CLIENT, LOCAL, 5000) == Address(
        "192.168.1.1", 5000
    )


# -- in the replies to ASSOCIATE

LISTEN = "listeners: [{listen: '%s', allow_open: true, announce: %s, udp: {relay_port: %s}}]"


def bound(text: str, server: str = LOCALHOST, source: str = LOCALHOST) -> tuple[Address, int]:
    """BND, and the port of the listener."""
    with running(text) as relay, associate(relay.port, server, source) as control:
        code, address = complete(read_reply(Stream(control)))
        assert code == 0
        return address, relay.port


@pytest.mark.parametrize(
    "announce, host, port",
    [
        ("203.0.113.5", "203.0.113.5", 0),
        ("203.0.113.5:1234", "203.0.113.5", 1234),
        ("localhost", "127.0.0.1", 0),
        ("0.0.0.0", "127.0.0.1", 0),
        ("'[2001:db8::5]:1234'", "127.0.0.1", 0),
        ("['2001:db8::5', 203.0.113.5]", "203.0.113.5", 0),
        ("[{clients: 127.0.0.0/8, address: 198.51.100.1}, 203.0.113.5]", "198.51.100.1", 0),
        (
            "[{clients: 10.0.0.0/8, address: 198.51.100.1}, {address: 203.0.113.5}]",
            "203.0.113.5",
            0,
        ),
        ("[{clients: 10.0.0.0/8, address: 198.51.100.1}]", "127.0.0.1", 0),
    ],
)
def test_a_daemon_announces_what_the_file_says(announce: str, host: str, port: int) -> None:
    address, listening = bound(LISTEN % ("127.0.0.1:0", announce, "shared"))
    assert address == Address(host, port or listening)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", ":0"])
def test_a_wildcard_is_never_told(listen: str) -> None:
    for server in ("127.0.0.1", "127.0.0.2"):
        address, listening = bound("listeners: [{listen: '%s', allow_open: true}]" % listen, server)
        assert address == Address(server, listening)


@pytest.mark.parametrize("spelling", ["::", "::0", "0:0:0:0:0:0:0:0", "::0.0.0.0"])
def test_an_unspecified_address_is_never_told_however_it_is_spelled(spelling: str) -> None:
    """Hazard 43."""
    address, listening = bound(LISTEN % ("[::1]:0", f"'{spelling}'", "shared"), "::1", "::1")
    assert address == Address("::1", listening)


def test_an_ipv6_client_of_a_dual_stack_listener_is_told_ipv6() -> None:
    address, listening = bound(LISTEN % (":0", "203.0.113.5", "shared"), "::1", "::1")
    assert address == Address("::1", listening)
    address, listening = bound(
        LISTEN % (":0", "[203.0.113.5, '2001:db8::5']", "shared"), "::1", "::1"
    )
    assert address == Address("2001:db8::5", listening)


def test_with_ports_of_their_own_associations_are_told_their_own() -> None:
    """A port in `announce` is where the shared one is published: it cannot be that of every association."""
    address, listening = bound(LISTEN % ("127.0.0.1:0", "203.0.113.5", "any"))
    assert address.host == "203.0.113.5" and address.port != listening
    with running(LISTEN % ("127.0.0.1:0", "203.0.113.5:1234", "any")) as relay:
        with associate(relay.port) as one, associate(relay.port) as other:
            told = [complete(read_reply(Stream(control)))[1] for control in (one, other)]
            assert told[0] != told[1]


def test_what_is_announced_does_not_change_where_it_listens() -> None:
    with (
        running(LISTEN % ("127.0.0.1:0", "203.0.113.5:1234", "shared")) as relay,
        associate(relay.port) as control,
    ):
        complete(read_reply(Stream(control)))
        with UdpPort() as client, UdpPort() as target:
            from_here = b"\0\0\0\1\x7f\0\0\1" + target.address.port.to_bytes(2, "big")
            client.send(from_here + b"hello", Address(LOCALHOST, relay.port))
            target.expect(b"hello")
