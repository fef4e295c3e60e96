"""Which addresses may be reached: the table of special ranges, what stands within IPv6 addresses, and ourselves."""

from __future__ import annotations

import pytest

from netproxy.access.destinations import (
    GUARD,
    RANGES,
    Destinations,
    OwnSockets,
    Policy,
    embedded,
    networks,
)
from netproxy.access.factory import make_policies
from netproxy.errors import ConfigError, DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.address import is_local
from tests.support.relays import configuration

pytest.importorskip("yaml")

ALL = Policy(networks(RANGES))
FLOW = Flow("tcp", Address("192.0.2.1", 5), Address("a.test", 80), "main", "")


def host_in(name: str) -> set[str]:
    """The names of the ranges that deny an address."""
    return {one for one in RANGES if not Policy(networks((one,))).permits(name)}


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
def test_hazard_73_the_table_of_ranges(host: str, ranges: str) -> None:
    assert host_in(host) == set(ranges.split())


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
def test_hazard_73_an_address_within_an_address_is_judged_too(
    form: str, inner: str, name: str
) -> None:
    a, b, c, d = map(int, inner.split("."))
    high, low = f"{a << 8 | b:x}", f"{c << 8 | d:x}"
    outer = {
        "v4-mapped": f"::ffff:{high}:{low}",
        "NAT64": f"64:ff9b::{high}:{low}",
        "6to4": f"2002:{high}:{low}::1",
        "Teredo's client": f"2001:0:808:808:0:0:{(a << 8 | b) ^ 0xFFFF:x}:{(c << 8 | d) ^ 0xFFFF:x}",
        "Teredo's server": f"2001:0:{high}:{low}:0:0:f7f7:f7f7",
    }[form]
    assert name in host_in(outer)


@pytest.mark.parametrize("host", ["::127.0.0.1", "::10.0.0.1", "::a9fe:a9fe"])
def test_hazard_73_v4_compatible_addresses_too(host: str) -> None:
    assert host_in(host)


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
def test_what_stands_within_an_address(host: str, inner: tuple[str, ...]) -> None:
    assert embedded(host) == inner


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
def test_what_is_allowed_in_spite_of_it(host: str, permitted: bool) -> None:
    assert Policy(networks(("private",)), networks(("192.168.1.0/24",))).permits(host) is permitted


def test_hazard_81_a_network_of_v4_mapped_addresses_denies_the_ipv4_addresses() -> None:
    policy = Policy(networks(("::ffff:10.0.0.0/104", "::ffff:192.0.2.1")))
    assert (
        not policy.permits("10.0.0.1")
        and not policy.permits("::ffff:10.0.0.1")
        and not policy.permits("192.0.2.1")
    )
    assert policy.permits("11.0.0.1") and policy.permits("192.0.2.2")


def test_an_allowed_outer_form_does_not_allow_what_it_leads_to() -> None:
    policy = Policy(networks(("private", "2000::/3")), networks(("2002::/16",)))
    assert policy.permits("2002:808:808::1") and not policy.permits("2002:a00:1::1")


class TestPolicies:
    """Whose clients are kept from where, unless the file says otherwise."""

    @staticmethod
    def of(text: str) -> dict[str, Policy]:
        return make_policies(configuration(text))

    LISTENERS = """listeners:
  - {name: here, listen: '127.0.0.1:1'}
  - {name: here6, listen: '[::1]:1'}
  - {name: lan, listen: '192.0.2.1:1', clients: 192.0.2.0/24}
  - {name: all, listen: ':2', clients: 192.0.2.0/24}
  - {name: fixed, protocol: tcp, listen: ':3', target: '127.0.0.1:22', clients: 192.0.2.0/24}
"""

    def test_hazard_73_those_of_other_machines_are_kept_from_this_one(self) -> None:
        policies = self.of(self.LISTENERS)
        assert {name for name, policy in policies.items() if policy.deny} == {"lan", "all"}
        assert policies["lan"].deny == networks(GUARD)
        assert not any(
            policies["lan"].permits(host)
            for host in ("127.0.0.1", "::", "169.254.169.254", "fe80::1", "224.0.0.1")
        )
        assert policies["lan"].permits("10.0.0.1") and policies["lan"].permits("fd00::1")

    def test_an_exception_to_what_is_usual(self) -> None:
        policies = self.of(self.LISTENERS + "destinations: {allow: [127.0.0.1, 169.254.7.0/24]}")
        assert policies["lan"].permits("127.0.0.1") and policies["lan"].permits("169.254.7.7")
        assert not policies["lan"].permits("127.0.0.2") and not policies["here"].deny

    def test_what_the_file_denies_holds_for_all_and_for_nothing_else(self) -> None:
        for policy in self.of(
            self.LISTENERS + "destinations: {deny: [private, 203.0.113.0/24]}"
        ).values():
            assert (
                not policy.permits("10.0.0.1")
                and not policy.permits("203.0.113.7")
                and policy.permits("127.0.0.1")
            )

    def test_nothing_is_denied(self) -> None:
        assert not any(
            policy.deny for policy in self.of(self.LISTENERS + "destinations: {deny: []}").values()
        )

    @pytest.mark.parametrize("key", ["deny", "allow"])
    @pytest.mark.parametrize("text", ["privat", "10.0.0.1/8", "a.test"])
    def test_hazard_79_neither_a_network_nor_a_range(self, key: str, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            self.of(f"listeners: []\ndestinations: {{{key}: {text}}}")
        assert str(caught.value) == (
            f"test.yaml:2:15: destinations.{key}: '{text}' is neither a network nor one of "
            "loopback, private, link-local, metadata, multicast, reserved"
        )


class TestPermitted:
    @staticmethod
    def guard(policy: Policy = ALL, own: OwnSockets | None = None) -> Destinations:
        guard = Destinations(own or OwnSockets(lambda host: False))
        guard.configure({"main": policy})
        return guard

    def permitted(self, *hosts: str, flow: Flow = FLOW) -> list[str]:
        return [
            one.host for one in self.guard().permitted(flow, [Address(host, 80) for host in hosts])
        ]

    def test_hazard_74_denied_addresses_are_removed_and_the_order_is_kept(self) -> None:
        assert self.permitted("2606:4700::1", "127.0.0.1", "1.1.1.1", "::1", "::ffff:0.0.0.0") == [
            "2606:4700::1",
            "1.1.1.1",
        ]

    def test_hazard_74_all_denied(self) -> None:
        with pytest.raises(DialError) as caught:
            self.permitted("127.0.0.1", "::1")
        assert (caught.value.reason, str(caught.value)) == (
            Reason.DENIED,
            "a.test:80: not allowed by the rules",
        )

    def test_a_flow_of_our_own_goes_anywhere(self) -> None:
        """A proxy on loopback is a way out like any other."""
        assert self.permitted("127.0.0.1", flow=FLOW.to_hop(Address("127.0.0.1", 80))) == [
            "127.0.0.1"
        ]

    def test_a_listener_that_nobody_has_told_of_is_guarded(self) -> None:
        guard = Destinations(OwnSockets(lambda host: False))
        with pytest.raises(DialError):
            guard.permitted(FLOW, [Address("127.0.0.1", 80)])
        assert guard.permitted(FLOW, [Address("10.0.0.1", 80)])

    def test_what_is_left_of_a_listener_that_a_reload_took_away_keeps_its_policy(self) -> None:
        guard = self.guard(Policy(networks(("private",))))
        guard.configure({"other": Policy()})
        with pytest.raises(DialError):
            guard.permitted(FLOW, [Address("10.0.0.1", 80)])
        assert guard.permitted(FLOW._replace(listener="other"), [Address("10.0.0.1", 80)])

    def test_hazard_77_a_name_with_an_own_address_and_another(self) -> None:
        own = OwnSockets(lambda host: False)
        own.set([("tcp", Address("203.0.113.5", 80))])
        guard = self.guard(Policy(), own)
        both = [Address("203.0.113.5", 80), Address("1.1.1.1", 80)]
        assert guard.permitted(FLOW, both) == (both[1],)
        with pytest.raises(DialError) as caught:
            guard.permitted(FLOW, both[:1])
        assert caught.value.reason is Reason.LOOP

    def test_hazard_77_a_port_that_an_agent_has_open_is_for_upstreams_alone(self) -> None:
        """Which the file names; it is in the agent's network, and nothing of it comes back by itself."""
        own = OwnSockets(lambda host: False)
        own.set([("tcp", Address("127.0.0.1", 1080))])
        guard, port = self.guard(Policy(), own), Address("127.0.0.1", 8022)
        flow = FLOW._replace(target=port)
        take_back = own.register("tcp", port)
        for set_again in (False, True):
            if set_again:
                own.set(
                    [("tcp", Address("127.0.0.1", 1080))]
                )  # a reload, which knows nothing of it
            with pytest.raises(DialError) as caught:
                guard.permitted(flow, [port])
            assert caught.value.reason is Reason.LOOP
            assert guard.permitted(flow.to_hop(port), [port]) == (port,)
            assert guard.permitted(flow._replace(network="udp"), [port]) == (port,)
        with pytest.raises(DialError):
            guard.permitted(flow.to_hop(Address("127.0.0.1", 1080)), [Address("127.0.0.1", 1080)])
        take_back()
        assert guard.permitted(flow, [port]) == (port,)


class TestOwnSockets:
    """Hazard 77."""

    @staticmethod
    def own(
        *sockets: str, local: tuple[str, ...] = ("127.0.0.1", "127.0.0.2", "::1", "192.168.1.7")
    ) -> OwnSockets:
        own = OwnSockets(local.__contains__)
        own.set(
            [
                (network, Address(host, int(port)))
                for network, host, port in (one.split() for one in sockets)
            ]
        )
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
    def test_of_every_address(self, wildcard: str, host: str) -> None:
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
    def test_of_one_address(self, host: str, held: bool) -> None:
        assert self.own("tcp 127.0.0.1 1080").holds("tcp", Address(host, 1080)) is held

    def test_of_another_machine_it_is_none(self) -> None:
        assert not self.own("tcp :: 1080").holds("tcp", Address("203.0.113.1", 1080))

    def test_several_on_one_port(self) -> None:
        own = self.own("udp 127.0.0.1 1080", "udp 192.168.1.7 1080", "tcp 127.0.0.1 1081")
        assert own.holds("udp", Address("192.168.1.7", 1080)) and own.holds(
            "udp", Address("127.0.0.1", 1080)
        )
        assert not own.holds("udp", Address("127.0.0.1", 1081))

    def test_a_reload_replaces_them(self) -> None:
        own = self.own("tcp 127.0.0.1 1080")
        own.set([])
        assert not own.holds("tcp", Address("127.0.0.1", 1080))

    def test_what_is_local_the_kernel_knows(self) -> None:
        assert is_local("127.0.0.1") and is_local("127.3.2.1") and is_local("0.0.0.0")
        assert not is_local("203.0.113.1") and not is_local("a.test") and not is_local("")
