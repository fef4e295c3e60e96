"""BND.ADDR: the address that a client is told, by Announcer and in the replies of a real daemon."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.handler.announce import Announcement, Announcer, ConfiguredAddress
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork, NetworkSet
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
    """Return an Announcer. Each argument: the networks of clients ("" for all), and the address."""
    return Announcer(
        [
            Announcement(
                NetworkSet(map(IpNetwork.parse, clients.split())) if clients else None,
                ConfiguredAddress(address, NamesResolver()),
            )
            for clients, address in announced
        ]
    )


def test_without_announcement_the_local_address_of_the_control_connection_is_told() -> None:
    assert announcer().bound(CLIENT, LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert announcer().bound(CLIENT6, LOCAL6, 5000) == Address("2001:db8::1", 5000)


def test_scope_is_not_told() -> None:
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
def test_announced_address_is_told(announced: Address, told: Address) -> None:
    assert announcer(("", announced)).bound(CLIENT, LOCAL, 5000) == told


@pytest.mark.parametrize(
    "announced", ["0.0.0.0", "::", "2001:db8::5", "six.example", "nothing.example", "gone.example"]
)
def test_ipv4_client_is_never_told_ipv6_or_unspecified_address(announced: str) -> None:
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
def test_ipv6_client_is_never_told_ipv4_or_unspecified_address(announced: str) -> None:
    """Hazard 43."""
    assert announcer(("", Address(announced, 0))).bound(CLIENT6, LOCAL6, 5000) == Address(
        "2001:db8::1", 5000
    )


def test_each_address_family_may_have_its_announcement() -> None:
    both = announcer(("", Address("203.0.113.5", 0)), ("", Address("2001:db8::5", 0)))
    assert both.bound(CLIENT, LOCAL, 5000) == Address("203.0.113.5", 5000)
    assert both.bound(CLIENT6, LOCAL6, 5000) == Address("2001:db8::5", 5000)
    assert announcer(("", Address("both.example", 0))).bound(CLIENT6, LOCAL6, 5000) == Address(
        "2001:db8::5", 5000
    )


def test_first_announcement_for_the_client_is_told() -> None:
    by_client = announcer(
        ("192.168.0.0/16 10.0.0.0/8", Address("192.168.1.1", 0)), ("", Address("203.0.113.5", 1080))
    )
    assert by_client.bound(CLIENT, LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert by_client.bound(Address("10.9.9.9", 1), LOCAL, 5000) == Address("192.168.1.1", 5000)
    assert by_client.bound(Address("198.51.100.9", 1), LOCAL, 5000) == Address("203.0.113.5", 1080)


def test_client_without_announcement_is_told_the_local_address() -> None:
    assert announcer(("10.0.0.0/8", Address("10.0.0.1", 0))).bound(CLIENT, LOCAL, 5000) == Address(
        "192.168.1.1", 5000
    )


# Replies to ASSOCIATE.

LISTEN = "listeners: [{listen: '%s', allow_open: true, announce: %s, udp: {relay_port: %s}}]"


def bound(text: str, server: str = LOCALHOST, source: str = LOCALHOST) -> tuple[Address, int]:
    """Return the bound address of the reply, and the port of the listener."""
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
        ("{interface: lo}", "127.0.0.1", 0),
        ("[{interface: nonexistent0}, 203.0.113.5]", "203.0.113.5", 0),
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
def test_daemon_announces_the_configured_address(announce: str, host: str, port: int) -> None:
    address, listening = bound(LISTEN % ("127.0.0.1:0", announce, "shared"))
    assert address == Address(host, port or listening)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", ":0"])
def test_wildcard_address_of_listener_is_never_told(listen: str) -> None:
    for server in ("127.0.0.1", "127.0.0.2"):
        address, listening = bound("listeners: [{listen: '%s', allow_open: true}]" % listen, server)
        assert address == Address(server, listening)


@pytest.mark.parametrize("spelling", ["::", "::0", "0:0:0:0:0:0:0:0", "::0.0.0.0"])
def test_unspecified_address_is_never_told_in_any_spelling(spelling: str) -> None:
    """Hazard 43."""
    address, listening = bound(LISTEN % ("[::1]:0", f"'{spelling}'", "shared"), "::1", "::1")
    assert address == Address("::1", listening)


def test_ipv6_client_of_dual_stack_listener_is_told_ipv6() -> None:
    address, listening = bound(LISTEN % (":0", "203.0.113.5", "shared"), "::1", "::1")
    assert address == Address("::1", listening)
    address, listening = bound(
        LISTEN % (":0", "[203.0.113.5, '2001:db8::5']", "shared"), "::1", "::1"
    )
    assert address == Address("2001:db8::5", listening)


def test_association_with_its_own_port_is_told_that_port() -> None:
    """The port in `announce` is that of the shared socket, so an own port is told as it is."""
    address, listening = bound(LISTEN % ("127.0.0.1:0", "203.0.113.5", "any"))
    assert address.host == "203.0.113.5" and address.port != listening
    with running(LISTEN % ("127.0.0.1:0", "203.0.113.5:1234", "any")) as relay:
        with associate(relay.port) as first, associate(relay.port) as second:
            told = [complete(read_reply(Stream(control)))[1] for control in (first, second)]
            assert told[0] != told[1]


def test_announced_port_does_not_change_the_listening_port() -> None:
    with (
        running(LISTEN % ("127.0.0.1:0", "203.0.113.5:1234", "shared")) as relay,
        associate(relay.port) as control,
    ):
        complete(read_reply(Stream(control)))
        with UdpPort() as client, UdpPort() as target:
            request = b"\0\0\0\1\x7f\0\0\1" + target.address.port.to_bytes(2, "big")
            client.send(request + b"hello", Address(LOCALHOST, relay.port))
            target.expect(b"hello")
