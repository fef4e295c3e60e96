"""NAT64: addresses of RFC 6052, the prefix of RFC 7050, and what is never translated."""

from __future__ import annotations

from socket import inet_aton
from typing import Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address, ip_text
from netproxy.interfaces.networks import IpNetwork
from netproxy.interfaces.routing import ANY_ROUTE, RouteSelectors
from netproxy.resolver import nat64 as module
from netproxy.resolver.nat64 import (
    GLOBAL_IPV4,
    OCTETS,
    ROUTE_SECONDS,
    SECONDS,
    WELL_KNOWN_NAME,
    Nat64,
    Nat64Prefix,
    find_prefix,
)
from tests.support.nat import Clock

# RFC 6052 section 2.4.
EXAMPLES = [
    ("2001:db8::/32", "2001:db8:c000:221::"),
    ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
    ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
    ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100:0"),
    ("2001:db8:122:344::/96", "2001:db8:122:344::c000:221"),
    ("64:ff9b::/96", "64:ff9b::c000:221"),
]
PREFIX = "64:ff9b::/96"
FOUR = Address("198.51.100.1", 80)
SIX = Address("64:ff9b::c633:6401", 80)


def prefix(text: str = PREFIX) -> Nat64Prefix:
    return Nat64Prefix.of_network(IpNetwork.parse(text))


@pytest.mark.parametrize("text, address", EXAMPLES)
def test_address_is_embedded_behind_the_prefix(text: str, address: str) -> None:
    assert prefix(text).translate("192.0.2.33") == address


@pytest.mark.parametrize("text", [text for text, _ in EXAMPLES])
@pytest.mark.parametrize("well_known", ["192.0.0.170", "192.0.0.171"])
def test_prefix_is_found_in_a_translated_address(text: str, well_known: str) -> None:
    """RFC 7050 section 3."""
    wanted = prefix(text)
    packed = bytearray(wanted.packed)
    for index, octet in zip(OCTETS[wanted.bits], inet_aton(well_known), strict=True):
        packed[index] = octet
    translated = ip_text(bytes(packed))
    assert find_prefix(["192.0.0.170", "2001:db8::1", translated]) == wanted


@pytest.mark.parametrize(
    "addresses", [[], ["192.0.0.170", "192.0.0.171"], ["2001:db8::1"], ["64:ff9b::c000:a9"]]
)
def test_network_without_nat64_has_no_prefix(addresses: list[str]) -> None:
    assert find_prefix(addresses) is None


def test_octet_between_prefix_and_address_must_be_zero() -> None:
    assert find_prefix(["2001:db8:122:344:1c0:0:aa00:0"]) is None


@pytest.mark.parametrize("text", [PREFIX, "2001:db8::/32"])
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "0.0.0.0", "169.254.1.1", "224.0.0.1", "255.255.255.255", "2001:db8::1", "::1"],
)
def test_local_address_is_never_translated(text: str, host: str) -> None:
    assert prefix(text).translate(host) == host


@pytest.mark.parametrize("host", ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1"])
def test_well_known_prefix_stands_for_global_addresses_only(host: str) -> None:
    """RFC 6052 section 3.1."""
    assert prefix().translate(host) == host
    assert prefix("2001:db8::/96").translate(host).startswith("2001:db8::")


class StubResolver:
    """A Resolver with one outcome."""

    def __init__(self, outcome: Sequence[str] | Reason, is_known: bool = False) -> None:
        self.outcome = outcome
        self.is_known = is_known
        self.asked: list[tuple[Address, str, float]] = []

    def resolve(self, target: Address, client: str = "", seconds: float = 0.0) -> list[Address]:
        self.asked.append((target, client, seconds))
        self.is_known = True
        return self._result(target)

    def known(self, target: Address) -> list[Address] | None:
        return self._result(target) if self.is_known else None

    def _result(self, target: Address) -> list[Address]:
        if isinstance(self.outcome, Reason):
            raise DialError(self.outcome, target.host)
        return [target._replace(host=host) for host in self.outcome]


TRANSLATED = ["192.0.0.170", "64:ff9b::c000:aa"]


class Kernel:
    """A kernel with routes to some hosts; it records who is asked for."""

    def __init__(self, *routed: str) -> None:
        self.routed = set(routed)
        self.asked: list[tuple[str, RouteSelectors]] = []

    def has_route(self, address: Address, selectors: RouteSelectors) -> bool:
        self.asked.append((address.host, selectors))
        return address.host in self.routed


def nat64(
    resolver: StubResolver, text: str = "", find: bool = True, kernel: Kernel | None = None
) -> Nat64:
    """Return a Nat64 that is configured, by default on a machine without routes for IPv4."""
    made = Nat64(resolver, (kernel or Kernel()).has_route)
    made.configure(IpNetwork.parse(text) if text else None, find)
    return made


class TestNat64:
    def test_prefix_is_looked_up_for_netproxy_itself(self) -> None:
        resolver = StubResolver(TRANSLATED)
        found, other = nat64(resolver), FOUR._replace(host="198.51.100.2")
        assert found.translate_now([FOUR], ANY_ROUTE) is None
        assert found.translate([FOUR, other], ANY_ROUTE, 99.0) == (
            SIX,
            SIX._replace(host="64:ff9b::c633:6402"),
        )
        assert resolver.asked == [(WELL_KNOWN_NAME, "", SECONDS)]
        assert found.translate_now([FOUR], ANY_ROUTE) == (SIX,)

    def test_configured_prefix_needs_no_lookup(self) -> None:
        resolver = StubResolver([])
        configured = nat64(resolver, PREFIX, find=False)
        assert configured.translate_now([FOUR], ANY_ROUTE) == (SIX,)
        assert configured.translate([FOUR], ANY_ROUTE, 1.0) == (SIX,)
        assert not resolver.asked

    @pytest.mark.parametrize("outcome", [["192.0.0.170"], Reason.NAME, Reason.TIMEOUT])
    def test_addresses_stay_without_nat64(self, outcome: Sequence[str] | Reason) -> None:
        found, addresses = nat64(StubResolver(outcome)), [FOUR]
        assert found.translate(addresses, ANY_ROUTE, 1.0) is addresses
        assert found.translate_now(addresses, ANY_ROUTE) is addresses

    def test_nothing_is_translated_if_it_is_off(self) -> None:
        resolver, kernel, addresses = StubResolver(TRANSLATED), Kernel(), [FOUR]
        off = nat64(resolver, find=False, kernel=kernel)
        assert off.translate_now(addresses, ANY_ROUTE) is addresses
        assert off.translate(addresses, ANY_ROUTE, 1.0) is addresses
        assert not resolver.asked and not kernel.asked

    def test_ipv6_address_of_a_name_needs_no_nat64(self) -> None:
        addresses = [FOUR, Address("2001:db8::1", 80)]
        assert nat64(StubResolver(TRANSLATED)).translate(addresses, ANY_ROUTE, 1.0) is addresses


class TestRoutes:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Clock:
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        return clock

    def test_default_route_is_asked_for_now_and_then(self, clock: Clock) -> None:
        kernel, addresses = Kernel(GLOBAL_IPV4.host), [FOUR]
        found = nat64(StubResolver(TRANSLATED), PREFIX, kernel=kernel)
        for _ in range(100):
            assert found.translate_now(addresses, ANY_ROUTE) is addresses
        assert kernel.asked == [(GLOBAL_IPV4.host, ANY_ROUTE)]
        clock.now += ROUTE_SECONDS
        kernel.routed = set()
        assert found.translate_now(addresses, ANY_ROUTE) == (SIX,)

    def test_local_network_is_reached_without_a_default_route(self, clock: Clock) -> None:
        near = [FOUR._replace(host="192.0.2.9")]
        found = nat64(StubResolver(TRANSLATED), PREFIX, kernel=Kernel("192.0.2.9"))
        assert found.translate_now(near, ANY_ROUTE) is near
        assert found.translate_now([FOUR], ANY_ROUTE) == (SIX,)

    def test_each_kind_of_socket_has_its_routes(self, clock: Clock) -> None:
        marked = RouteSelectors(mark=7)
        kernel, addresses = Kernel(GLOBAL_IPV4.host), [FOUR]
        found = nat64(StubResolver(TRANSLATED), PREFIX, kernel=kernel)
        assert found.translate_now(addresses, ANY_ROUTE) is addresses
        kernel.routed = set()
        assert found.translate_now(addresses, marked) == (SIX,)
        assert found.translate_now(addresses, ANY_ROUTE) is addresses
