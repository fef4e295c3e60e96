"""Sets of networks: which addresses are in them.  The table says how networks are read."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import ip_text
from netproxy.interfaces.networks import IpNetwork, NetworkSet

# A network: addresses in it, and hosts that are not.
NETWORKS = {
    "10.0.0.0/8": (
        "10.0.0.0 10.255.255.255 ::ffff:10.1.2.3 ::ffff:a01:203",
        "9.255.255.255 11.0.0.0 ::10.0.0.1 a00:: example ten.10",
    ),
    "192.0.2.7": ("192.0.2.7 ::ffff:192.0.2.7", "192.0.2.6 192.0.2.8 ::c000:207"),
    "0.0.0.0/0": ("0.0.0.0 255.255.255.255", ":: ::1 example"),
    "255.255.255.255/32": ("255.255.255.255", "255.255.255.254"),
    "128.0.0.0/1": ("128.0.0.0 255.255.255.255", "127.255.255.255"),
    "fd00::/8": (
        "fd00:: fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fd12::1%eth0",
        "fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff fe00::",
    ),
    "FE80::/10": ("fe80::1 fe80::1%2 febf::", "fec0:: example"),
    "2001:db8::1": ("2001:db8::1", "2001:db8:: 2001:db8::2 2001:db8:0:1::1"),
    "2001:db8::/64": (
        "2001:db8:: 2001:db8::ffff:ffff:ffff:ffff",
        "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff 2001:db8:0:1::",
    ),
    "2001:db8::8000:0:0:0/65": (
        "2001:db8::8000:0:0:0 2001:db8::ffff:ffff:ffff:ffff",
        "2001:db8::7fff:ffff:ffff:ffff 2001:db8:0:1::",
    ),
    "::/0": (":: ::1 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "0.0.0.0 ::ffff:10.0.0.1 example"),
    "::ffff:10.0.0.0/104": ("10.0.0.1 ::ffff:10.0.0.1", "11.0.0.1 ::a00:1"),
    "::ffff:0:0/96": ("0.0.0.0 255.255.255.255", ":: ::fffe:ffff:ffff ::1:0:0:0"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_network_holds_its_addresses_only(network: str) -> None:
    """Hazard 81: a v4-mapped address is the IPv4 address it stands for."""
    inside, outside = (set(hosts.split()) for hosts in NETWORKS[network])
    networks = NetworkSet([IpNetwork.parse(network)])
    assert {host for host in inside | outside if host in networks} == inside


def test_adjacent_and_nested_networks_are_merged() -> None:
    texts = (
        "10.0.2.0/24 10.0.0.0/23 10.0.0.8/29 10.0.0.0/23 10.0.4.0/24 "
        "fd00::/16 fd01::/16 fd00:1::/32"
    )
    networks = NetworkSet(map(IpNetwork.parse, texts.split()))
    hosts = (
        "9.255.255.255 10.0.0.0 10.0.0.9 10.0.0.16 10.0.1.255 10.0.2.0 10.0.2.255 "
        "10.0.3.0 10.0.3.255 10.0.4.0 10.0.5.0 "
        "fcff:: fd00::1 fd00:2:: fd01:ffff:: fd02::"
    )
    assert [host for host in hosts.split() if host not in networks] == [
        "9.255.255.255",
        "10.0.3.0",
        "10.0.3.255",
        "10.0.5.0",
        "fcff::",
        "fd02::",
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "::", "::1", "example", ""])
def test_empty_set_of_networks_holds_nothing(host: str) -> None:
    assert host not in NetworkSet([])


def test_set_of_networks_agrees_with_comparing_each_network() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    def network(size: int, value: int, shift: int) -> IpNetwork:
        return IpNetwork(size, value >> shift, shift)

    def number(raw: bytes) -> int:
        return int.from_bytes(raw, "big")

    def edges(network: IpNetwork) -> list[str]:
        """Return the first and the last address, and their neighbours outside."""
        first, limit = network.prefix << network.shift, 1 << network.size * 8
        behind = (network.prefix + 1) << network.shift
        return [
            ip_text(value.to_bytes(network.size, "big"))
            for value in (first - 1, first, behind - 1, behind)
            if 0 <= value < limit
        ]

    # Few different bytes, so that networks touch and hold each other.
    few = st.sampled_from([0, 1, 127, 128, 254, 255])
    four, sixteen = (st.lists(few, min_size=size, max_size=size).map(bytes) for size in (4, 16))
    hosts = st.one_of(four, sixteen).map(ip_text)
    networks = st.one_of(
        st.builds(network, st.just(4), four.map(number), st.integers(0, 32)),
        st.builds(network, st.just(16), sixteen.map(number), st.integers(0, 128)),
    )

    @settings(max_examples=150, deadline=None)
    @given(st.lists(networks, max_size=12), st.lists(hosts, max_size=12))
    def check(members: list[IpNetwork], others: list[str]) -> None:
        merged = NetworkSet(members)
        for host in others + [edge for member in members for edge in edges(member)]:
            assert (host in merged) == any(member.holds(host) for member in members)

    check()
