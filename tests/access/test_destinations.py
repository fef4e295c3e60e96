"""Addresses that clients may reach: special ranges, embedded IPv4 addresses, and own ports."""

from __future__ import annotations

import pytest

from netproxy.access.destinations import (
    DEFAULT_DENY,
    RANGES,
    DestinationPolicy,
    Destinations,
    embedded_ipv4,
    parse_networks,
)
from netproxy.access.factory import make_policies
from netproxy.access.own_sockets import OwnSockets
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import TUNNEL_DIRECT, Flow
from netproxy.interfaces.routing import RouteSelectors
from tests.support.relays import configuration
from tests.support.routing import LocalAddresses

pytest.importorskip("yaml")

ALL = DestinationPolicy(parse_networks(RANGES))
FLOW = Flow("tcp", Address("192.0.2.1", 5), Address("a.test", 80), "main", "")


def ranges_of(host: str) -> set[str]:
    """Return the names of the ranges that an address is in."""
    policies = {name: DestinationPolicy(parse_networks((name,))) for name in RANGES}
    return {name for name, policy in policies.items() if not policy.permits(host)}


@pytest.mark.parametrize(
    "host, ranges",
    [
        ("127.0.0.1", "loopback"),
        ("127.255.255.255", "loopback"),
        ("::1", "loopback"),
        ("0.0.0.0", "loopback"),
        ("::", "loopback"),
        ("0.1.2.3", "loopback"),
        ("10.0.0.1", "private"),
        ("172.16.0.1", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fc00::1", "private"),
        ("fdff::1", "private"),
        ("fec0::1", "private"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%2", "link-local"),
        ("febf::1", "link-local"),
        ("169.254.169.254", "link-local metadata"),
        ("fd00:ec2::254", "private metadata"),
        ("168.63.129.16", "metadata"),
        ("100.100.100.200", "private metadata"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "multicast reserved"),
        ("240.0.0.1", "reserved"),
        ("192.0.0.8", "reserved"),
        ("192.0.2.1", "reserved"),
        ("198.18.0.1", "reserved"),
        ("198.51.100.1", "reserved"),
        ("203.0.113.1", "reserved"),
        ("2001:db8::1", "reserved"),
        ("100::1", "reserved"),
        ("128.0.0.1", ""),
        ("9.255.255.255", ""),
        ("11.0.0.0", ""),
        ("172.32.0.1", ""),
        ("172.15.255.255", ""),
        ("100.63.255.255", ""),
        ("100.128.0.0", ""),
        ("169.253.255.255", ""),
        ("192.167.255.255", ""),
        ("223.255.255.255", ""),
        ("2606:4700::1111", ""),
        ("fbff::1", ""),
        ("fe00::1", ""),
        ("1.1.1.1", ""),
    ],
)
def test_addresses_are_in_the_special_ranges(host: str, ranges: str) -> None:
    """Hazard 73."""
    assert ranges_of(host) == set(ranges.split())


@pytest.mark.parametrize(
    "inner, name",
    [
        ("127.0.0.1", "loopback"),
        ("10.0.0.1", "private"),
        ("169.254.169.254", "metadata"),
        ("224.0.0.1", "multicast"),
        ("0.0.0.0", "loopback"),
    ],
)
@pytest.mark.parametrize(
    "form", ["v4-mapped", "NAT64", "6to4", "Teredo's client", "Teredo's server"]
)
def test_embedded_ipv4_address_is_judged_too(form: str, inner: str, name: str) -> None:
    """Hazard 73."""
    a, b, c, d = map(int, inner.split("."))
    high, low = f"{a << 8 | b:x}", f"{c << 8 | d:x}"
    inverted = f"{(a << 8 | b) ^ 0xFFFF:x}:{(c << 8 | d) ^ 0xFFFF:x}"
    outer = {
        "v4-mapped": f"::ffff:{high}:{low}",
        "NAT64": f"64:ff9b::{high}:{low}",
        "6to4": f"2002:{high}:{low}::1",
        "Teredo's client": f"2001:0:808:808:0:0:{inverted}",
        "Teredo's server": f"2001:0:{high}:{low}:0:0:f7f7:f7f7",
    }[form]
    assert name in ranges_of(outer)


@pytest.mark.parametrize("host", ["::127.0.0.1", "::10.0.0.1", "::a9fe:a9fe"])
def test_v4_compatible_address_is_judged_too(host: str) -> None:
    """Hazard 73."""
    assert ranges_of(host)


@pytest.mark.parametrize(
    "host, inner",
    [
        ("::1", ()),
        ("::", ()),
        ("::5", ()),
        ("10.0.0.1", ()),
        ("2001:db8::1", ()),
        ("::ffff:0.0.0.0", ("0.0.0.0",)),
        ("::ffff:1.2.3.4", ("1.2.3.4",)),
        ("::1.2.3.4", ("1.2.3.4",)),
        ("64:ff9b::1.2.3.4", ("1.2.3.4",)),
        ("64:ff9b:1::1.2.3.4", ()),
        ("2002:102:304::", ("1.2.3.4",)),
        ("2001:0:102:304::fafa:f9f8", ("1.2.3.4", "5.5.6.7")),
        ("2001:1::1", ()),
        ("fe80::1%eth0", ()),
        ("::ffff:0:1.2.3.4", ()),
    ],
)
def test_embedded_ipv4_addresses_of_an_address(host: str, inner: tuple[str, ...]) -> None:
    assert embedded_ipv4(host) == inner


@pytest.mark.parametrize(
    "host, permitted",
    [
        ("192.168.1.5", True),
        ("192.168.2.5", False),
        ("::ffff:192.168.1.5", True),
        ("64:ff9b::c0a8:105", True),
        ("64:ff9b::c0a8:205", False),
        ("8.8.8.8", True),
    ],
)
def test_allow_is_an_exception_to_deny(host: str, permitted: bool) -> None:
    policy = DestinationPolicy(parse_networks(("private",)), parse_networks(("192.168.1.0/24",)))
    assert policy.permits(host) is permitted


def test_network_of_v4_mapped_addresses_denies_the_ipv4_addresses() -> None:
    """Hazard 81."""
    policy = DestinationPolicy(parse_networks(("::ffff:10.0.0.0/104", "::ffff:192.0.2.1")))
    for host in ("10.0.0.1", "::ffff:10.0.0.1", "192.0.2.1"):
        assert not policy.permits(host)
    assert policy.permits("11.0.0.1") and policy.permits("192.0.2.2")


def test_allowed_ipv6_address_does_not_allow_a_denied_address_within_it() -> None:
    policy = DestinationPolicy(
        parse_networks(("private", "2000::/3")), parse_networks(("2002::/16",))
    )
    assert policy.permits("2002:808:808::1") and not policy.permits("2002:a00:1::1")


class TestPolicies:
    """The policies that the factory makes for listeners."""

    @staticmethod
    def policies(text: str) -> dict[str, DestinationPolicy]:
        return make_policies(configuration(text))

    LISTENERS = """listeners:
  - {name: here, listen: '127.0.0.1:1'}
  - {name: here6, listen: '[::1]:1'}
  - {name: lan, listen: '192.0.2.1:1', clients: 192.0.2.0/24}
  - {name: all, listen: ':2', clients: 192.0.2.0/24}
  - {name: fixed, protocol: tcp, listen: ':3', target: '127.0.0.1:22', clients: 192.0.2.0/24}
"""

    def test_clients_of_other_machines_do_not_reach_this_machine(self) -> None:
        """Hazard 73.  Private networks are not denied by default."""
        policies = self.policies(self.LISTENERS)
        guarded = {name for name, policy in policies.items() if policy.deny}
        assert guarded == {"lan", "all", TUNNEL_DIRECT}
        assert policies["lan"].deny == parse_networks(DEFAULT_DENY)
        assert not any(
            policies["lan"].permits(host)
            for host in ("127.0.0.1", "::", "169.254.169.254", "fe80::1", "224.0.0.1")
        )
        assert policies["lan"].permits("10.0.0.1") and policies["lan"].permits("fd00::1")

    def test_allow_is_an_exception_to_the_default_policy(self) -> None:
        policies = self.policies(
            self.LISTENERS + "destinations: {allow: [127.0.0.1, 169.254.7.0/24]}"
        )
        assert policies["lan"].permits("127.0.0.1") and policies["lan"].permits("169.254.7.7")
        assert not policies["lan"].permits("127.0.0.2") and not policies["here"].deny

    def test_configured_deny_replaces_the_default_policy_of_all_listeners(self) -> None:
        text = self.LISTENERS + "destinations: {deny: [private, 203.0.113.0/24]}"
        for policy in self.policies(text).values():
            assert not policy.permits("10.0.0.1")
            assert not policy.permits("203.0.113.7")
            assert policy.permits("127.0.0.1")

    def test_empty_deny_denies_nothing(self) -> None:
        policies = self.policies(self.LISTENERS + "destinations: {deny: []}")
        assert not any(policy.deny for policy in policies.values())

    @pytest.mark.parametrize("key", ["deny", "allow"])
    @pytest.mark.parametrize("text", ["privat", "10.0.0.1/8", "a.test"])
    def test_text_that_is_no_network_and_no_range_is_a_config_error(
        self, key: str, text: str
    ) -> None:
        """Hazard 79."""
        with pytest.raises(ConfigError) as caught:
            self.policies(f"listeners: []\ndestinations: {{{key}: {text}}}")
        assert str(caught.value) == (
            f"test.yaml:2:15: destinations.{key}: '{text}' is neither a network nor one of "
            "loopback, private, link-local, metadata, multicast, reserved"
        )


class TestPermitted:
    @staticmethod
    def guard(policy: DestinationPolicy = ALL, own: OwnSockets | None = None) -> Destinations:
        """Return a guard with a policy for the listener "main"."""
        guard = Destinations(own or OwnSockets(LocalAddresses()))
        guard.configure({"main": policy})
        return guard

    def permitted(self, *hosts: str, flow: Flow = FLOW) -> list[str]:
        """Return the permitted hosts."""
        addresses = self.guard().permitted(flow, [Address(host, 80) for host in hosts])
        return [address.host for address in addresses]

    def test_denied_addresses_are_removed_and_the_order_is_kept(self) -> None:
        """Hazard 74."""
        assert self.permitted("2606:4700::1", "127.0.0.1", "1.1.1.1", "::1", "::ffff:0.0.0.0") == [
            "2606:4700::1",
            "1.1.1.1",
        ]

    def test_flow_with_denied_addresses_only_is_denied(self) -> None:
        """Hazard 74."""
        with pytest.raises(DialError) as caught:
            self.permitted("127.0.0.1", "::1")
        assert (caught.value.reason, str(caught.value)) == (
            Reason.DENIED,
            "a.test:80: not allowed by the rules",
        )

    def test_own_flow_may_reach_any_address(self) -> None:
        """A proxy on loopback is an upstream like any other."""
        assert self.permitted("127.0.0.1", flow=FLOW.to_hop(Address("127.0.0.1", 80))) == [
            "127.0.0.1"
        ]

    def test_listener_without_a_policy_has_the_default_policy(self) -> None:
        guard = Destinations(OwnSockets(LocalAddresses()))
        with pytest.raises(DialError):
            guard.permitted(FLOW, [Address("127.0.0.1", 80)])
        assert guard.permitted(FLOW, [Address("10.0.0.1", 80)])

    def test_removed_listener_keeps_its_policy(self) -> None:
        guard = self.guard(DestinationPolicy(parse_networks(("private",))))
        guard.configure({"other": DestinationPolicy()})
        with pytest.raises(DialError):
            guard.permitted(FLOW, [Address("10.0.0.1", 80)])
        assert guard.permitted(FLOW._replace(listener="other"), [Address("10.0.0.1", 80)])

    def test_own_addresses_are_removed_and_a_flow_without_others_is_a_loop(self) -> None:
        """Hazard 77."""
        own = OwnSockets(LocalAddresses())
        own.set([("tcp", Address("203.0.113.5", 80))])
        guard = self.guard(DestinationPolicy(), own)
        both = [Address("203.0.113.5", 80), Address("1.1.1.1", 80)]
        assert guard.permitted(FLOW, both) == (both[1],)
        with pytest.raises(DialError) as caught:
            guard.permitted(FLOW, both[:1])
        assert caught.value.reason is Reason.LOOP

    def test_port_opened_by_an_agent_is_for_own_flows_only(self) -> None:
        """Hazard 77.  An upstream at that port is in the agent's network and causes no loop.

        A reload does not know the agents' ports and does not change them.
        """
        own = OwnSockets(LocalAddresses())
        own.set([("tcp", Address("127.0.0.1", 1080))])
        guard, port = self.guard(DestinationPolicy(), own), Address("127.0.0.1", 8022)
        flow = FLOW._replace(target=port)
        unregister = own.register("tcp", port, of_agent=True)
        for set_again in (False, True):
            if set_again:
                own.set([("tcp", Address("127.0.0.1", 1080))])
            with pytest.raises(DialError) as caught:
                guard.permitted(flow, [port])
            assert caught.value.reason is Reason.LOOP
            assert guard.permitted(flow.to_hop(port), [port]) == (port,)
            assert guard.permitted(flow._replace(network="udp"), [port]) == (port,)
        with pytest.raises(DialError):
            guard.permitted(flow.to_hop(Address("127.0.0.1", 1080)), [Address("127.0.0.1", 1080)])
        unregister()
        assert guard.permitted(flow, [port]) == (port,)

    def test_registered_socket_is_for_all_flows_and_survives_a_reload(self) -> None:
        """Hazard 77.  The relay port of an association is such a socket."""
        own = OwnSockets(LocalAddresses())
        guard, port = self.guard(DestinationPolicy(), own), Address("127.0.0.1", 20001)
        flow = FLOW._replace(target=port)
        assert not guard.is_own_port(flow)
        unregister = own.register("tcp", port)
        own.set([("tcp", Address("127.0.0.1", 1080))])
        for client in (flow, flow.to_hop(port)):
            assert guard.is_own_port(client)
            with pytest.raises(DialError) as caught:
                guard.permitted(client, [port])
            assert caught.value.reason is Reason.LOOP
        unregister()
        assert not guard.is_own_port(flow) and guard.permitted(flow, [port]) == (port,)

    def test_own_addresses_depend_on_the_options_of_the_socket(self) -> None:
        """Hazard 136.  An address that only marked packets reach by a local route."""
        marked = RouteSelectors(mark=5)
        own = OwnSockets(lambda network, address, selectors: selectors == marked)
        own.set([("tcp", Address("0.0.0.0", 80))])
        guard, address = self.guard(DestinationPolicy(), own), Address("203.0.113.5", 80)
        assert guard.permitted(FLOW, [address]) == (address,)
        assert guard.without_own(FLOW, [address], RouteSelectors(mark=6)) == (address,)
        with pytest.raises(DialError) as caught:
            guard.without_own(FLOW, [address], marked)
        assert caught.value.reason is Reason.LOOP


class TestOwnSockets:
    """Hazard 77."""

    @staticmethod
    def own(
        *sockets: str, local: tuple[str, ...] = ("127.0.0.1", "127.0.0.2", "::1", "192.168.1.7")
    ) -> OwnSockets:
        """Return own sockets, each written as "tcp 127.0.0.1 1080"."""
        own = OwnSockets(LocalAddresses(local))
        entries = [text.split() for text in sockets]
        own.set([(network, Address(host, int(port))) for network, host, port in entries])
        return own

    @pytest.mark.parametrize(
        "host",
        [
            "127.0.0.1",
            "127.0.0.2",
            "::1",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:7f00:1",
            "::ffff:0.0.0.0",
            "192.168.1.7",
            "::ffff:192.168.1.7",
            "64:ff9b::c0a8:107",
            "2002:c0a8:107::1",
            "::127.0.0.1",
        ],
    )
    @pytest.mark.parametrize("wildcard", ["::", "0.0.0.0"])
    def test_wildcard_socket_is_reached_by_every_local_address(
        self, wildcard: str, host: str
    ) -> None:
        own = self.own(f"tcp {wildcard} 1080")
        assert own.holds("tcp", Address(host, 1080))
        assert not own.holds("tcp", Address(host, 1081)) and not own.holds(
            "udp", Address(host, 1080)
        )

    @pytest.mark.parametrize(
        "host, held",
        [
            ("127.0.0.1", True),
            ("::ffff:127.0.0.1", True),
            ("0.0.0.0", True),
            ("::", True),
            ("127.0.0.2", False),
            ("192.168.1.7", False),
            ("::1", False),
            ("203.0.113.1", False),
        ],
    )
    def test_bound_socket_is_reached_by_its_address(self, host: str, held: bool) -> None:
        assert self.own("tcp 127.0.0.1 1080").holds("tcp", Address(host, 1080)) is held

    def test_wildcard_socket_is_not_reached_by_addresses_of_other_machines(self) -> None:
        assert not self.own("tcp :: 1080").holds("tcp", Address("203.0.113.1", 1080))

    def test_sockets_on_one_port_are_told_apart_by_network_and_address(self) -> None:
        own = self.own("udp 127.0.0.1 1080", "udp 192.168.1.7 1080", "tcp 127.0.0.1 1081")
        assert own.holds("udp", Address("192.168.1.7", 1080)) and own.holds(
            "udp", Address("127.0.0.1", 1080)
        )
        assert not own.holds("udp", Address("127.0.0.1", 1081))

    def test_link_local_socket_is_reached_by_its_address_with_a_scope(self) -> None:
        own = self.own("tcp fe80::1%2 1080")
        assert own.holds("tcp", Address("fe80::1%2", 1080))
        assert not own.holds("tcp", Address("fe80::2%2", 1080))

    def test_wildcard_socket_is_reached_by_link_local_addresses(self) -> None:
        """The kernel is asked with the scope, and for nothing else."""
        own = self.own("tcp :: 1080", local=("fe80::1%2",))
        assert own.holds("tcp", Address("fe80::1%2", 1080))
        assert not own.holds("tcp", Address("fe80::1%3", 1080))

    def test_kernel_is_only_asked_for_ports_of_wildcard_sockets(self) -> None:
        """A query costs two system calls."""
        queries: list[tuple[str, Address, RouteSelectors]] = []

        def is_local(network: str, address: Address, selectors: RouteSelectors) -> bool:
            queries.append((network, address, selectors))
            return False

        own, host = OwnSockets(is_local), "203.0.113.1"
        own.set([("tcp", Address("::", 1080)), ("tcp", Address("192.168.1.7", 1081))])
        for network, port in (("tcp", 1081), ("tcp", 1082), ("udp", 1080)):
            assert not own.holds(network, Address(host, port))
        assert not queries
        assert not own.holds("tcp", Address(host, 1080), selectors=RouteSelectors(mark=5))
        assert queries == [("tcp", Address(host, 1080), RouteSelectors(mark=5))]

    def test_set_replaces_all_own_sockets(self) -> None:
        own = self.own("tcp 127.0.0.1 1080")
        own.set([])
        assert not own.holds("tcp", Address("127.0.0.1", 1080))


@pytest.mark.parametrize("listener", ["main", ""])
def test_fake_addresses_are_never_dialled(listener: str) -> None:
    """Hazard 160.  A name server may say that a name has one."""
    guard = Destinations(OwnSockets(LocalAddresses()))
    guard.configure({"main": DestinationPolicy()}, parse_networks(["198.18.0.0/15", "fc00:1::/64"]))
    flow = FLOW._replace(listener=listener)
    real = Address("203.0.113.9", 80)
    fakes = [
        Address(host, 80)
        for host in ("198.18.0.1", "198.19.255.255", "fc00:1::9", "64:ff9b::c612:5")
    ]
    assert guard.permitted(flow, [*fakes, real]) == (real,)
    for fake in fakes:
        with pytest.raises(DialError) as refusal:
            guard.permitted(flow, [fake])
        assert (refusal.value.reason, refusal.value.decided) == (
            Reason.LOOP,
            "dns.fake 198.18.0.0/15",
        )
