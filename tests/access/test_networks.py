"""Lists of networks, as access control uses them."""

from __future__ import annotations

import random

import pytest

from netproxy.interfaces.networks import IpNetwork, NetworkSet


def test_network_list_holds_addresses_of_all_its_networks() -> None:
    networks = NetworkSet(
        [IpNetwork.parse("10.0.0.0/8"), IpNetwork.parse("fd00::/8"), IpNetwork.parse("192.0.2.1")]
    )
    for host in ("10.1.2.3", "fd00::1", "fd00::1%eth0", "192.0.2.1"):
        assert host in networks
    for host in ("11.0.0.1", "fe80::1", "192.0.2.2", "ten.example", ""):
        assert host not in networks


def test_empty_network_list_holds_no_address() -> None:
    assert "127.0.0.1" not in NetworkSet([])


def excluding(*texts: str) -> NetworkSet:
    """Return the set of the networks; those with "!" are excluded."""
    return NetworkSet(
        [IpNetwork.parse(text) for text in texts if text[0] != "!"],
        [IpNetwork.parse(text[1:]) for text in texts if text[0] == "!"],
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "texts, inside, outside",
    [
        (
            ["192.168.0.0/16", "!192.168.9.0/24", "192.168.9.7"],
            ["192.168.0.0", "192.168.8.255", "192.168.9.7", "192.168.10.0", "192.168.255.255"],
            ["192.167.255.255", "192.168.9.0", "192.168.9.6", "192.168.9.8", "192.169.0.0"],
        ),
        (
            ["!192.168.9.0/24", "!fd00::/8"],
            ["0.0.0.0", "192.168.8.255", "192.168.10.0", "255.255.255.255", "::", "fe00::"],
            ["192.168.9.0", "192.168.9.255", "::ffff:192.168.9.1", "fd00::", "fdff::1"],
        ),
        (
            ["0.0.0.0/0", "!0.0.0.0/1", "!255.255.255.255"],
            ["128.0.0.0", "255.255.255.254"],
            ["0.0.0.0", "127.255.255.255", "255.255.255.255", "::1"],
        ),
        (
            ["10.0.0.0/24", "!10.0.0.0/25", "10.0.0.0/26", "!10.0.0.0"],
            ["10.0.0.1", "10.0.0.63", "10.0.0.128", "10.0.0.255"],
            ["10.0.0.0", "10.0.0.64", "10.0.0.127", "10.0.1.0"],
        ),
        (
            ["2001:db8::/32", "!2001:db8:1::/48", "2001:db8:1:ffff::/64", "!10.0.0.0/8"],
            ["2001:db8::1", "2001:db8:1:ffff::1", "2001:db8:2::"],
            ["2001:db8:1::", "2001:db8:1:fffe:ffff::", "2001:db9::", "10.0.0.1", "11.0.0.1"],
        ),
        (["!0.0.0.0/0"], ["::1"], ["0.0.0.0", "255.255.255.255"]),
        (["10.0.0.0/8", "!10.0.0.0/9", "!10.128.0.0/9"], [], ["10.0.0.0", "10.255.255.255"]),
    ],
)
def test_longest_network_decides_in_any_order(
    texts: list[str], inside: list[str], outside: list[str], turned: bool
) -> None:
    networks = excluding(*reversed(texts)) if turned else excluding(*texts)
    assert [host for host in inside if host not in networks] == []
    assert [host for host in outside if host in networks] == []


def test_exclusions_agree_with_the_longest_of_the_networks_that_hold_an_address() -> None:
    chance = random.Random(7)
    for _ in range(60):
        texts: dict[str, None] = {}
        for _ in range(chance.randrange(1, 12)):
            bits = chance.randrange(0, 9)
            network = IpNetwork(4, chance.randrange(1 << bits), 32 - bits)
            if f"!{network}" not in texts and str(network) not in texts:
                texts[chance.choice(("", "!")) + str(network)] = None
        networks = excluding(*texts)
        others = all(text[0] == "!" for text in texts)
        for first in range(256):
            for host in (f"{first}.0.0.0", f"{first}.255.255.255"):
                found = [text for text in texts if IpNetwork.parse(text.lstrip("!")).holds(host)]
                longest = max(found, key=lambda text: int(text.partition("/")[2]), default="")
                expected = longest[0] != "!" if longest else others
                excluded = any(text[0] == "!" for text in texts)
                assert (host in networks) == (expected if excluded else bool(found)), (host, texts)
