"""Flows to fake addresses: they become flows to names before rules are asked."""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, FlowRefused, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, SeenName
from netproxy.router.named import UNKNOWN, FakeTargets
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")

CONFIG = """
listeners: [{name: main, listen: "127.0.0.1:1080"}]
upstreams:
  far: socks5h://192.0.2.1:1
  branch: socks5://192.0.2.3:1
destinations: {deny: [10.0.0.0/8]}
rules:
  - {ip: [198.18.0.0/15], via: block}
  - {sni: "*.sni.example", via: branch}
  - {domain: far.example, via: far}
default: direct
"""
NAMES = {
    "198.18.0.16": "far.example",
    "198.18.0.17": "www.example",
    "198.18.0.18": "inside.example",
    "198.18.0.99": "",
}
HOSTS = {"www.example": ["203.0.113.9"], "inside.example": ["10.0.0.1"]}


class Fakes:
    """The FakeAddresses that NAMES has."""

    def name(self, host: str, client: str) -> str | None:
        assert client == "192.168.1.5"
        return NAMES.get(host)


class OtherNames:
    """NamedFlows that see one name everywhere."""

    def named(self, flow: Flow) -> Flow:
        return flow._replace(seen=SeenName("seen.example", "dns"))


def named(host: str, seen: SeenName | None = None, network: str = "tcp") -> Flow:
    to = flow(f"{network} 192.168.1.5 -> {host}:443 on main")._replace(seen=seen)
    return FakeTargets(Fakes(), None).named(to)


@pytest.mark.parametrize("network", ["tcp", "udp"])
def test_flow_to_a_fake_address_is_a_flow_to_the_name(network: str) -> None:
    to = named("198.18.0.17", network=network)
    assert (to.target, to.seen, to.addresses) == (Address("www.example", 443), None, ())


def test_name_in_the_first_bytes_is_for_rules_alone() -> None:
    to = named("198.18.0.17", SeenName("a.sni.example", "tls", True))
    assert (to.target.host, to.seen) == ("www.example", SeenName("a.sni.example", "tls"))
    routes = routing(CONFIG, StubResolver(HOSTS)).router
    route = routes.route(to)
    assert (route.rule, route.flow.target.host) == ("rules[1]", "www.example")


def test_rule_by_name_decides_and_its_upstream_is_asked_for_the_name() -> None:
    names = StubResolver(HOSTS)
    route = routing(CONFIG, names).router.route(named("198.18.0.16"))
    assert (route.rule, route.flow.target, route.flow.addresses) == (
        "rules[2]",
        Address("far.example", 443),
        (),
    )


def test_addresses_of_the_name_decide_where_the_upstream_needs_them() -> None:
    """Hazard 160."""
    routes = routing(CONFIG, StubResolver(HOSTS)).router
    route = routes.route(named("198.18.0.17"))
    assert route.flow.addresses == (Address("203.0.113.9", 443),)
    with pytest.raises(DialError) as refusal:
        routes.route(named("198.18.0.18"))
    assert refusal.value.reason is Reason.DENIED


def test_fake_address_that_nobody_was_told_is_refused() -> None:
    """Hazard 158."""
    with pytest.raises(FlowRefused) as refusal:
        named("198.18.0.99")
    assert (refusal.value.said, refusal.value.decided) == (UNKNOWN, "dns.fake")
    assert refusal.value.reason is Reason.HOST_UNREACHABLE


def test_flows_to_other_addresses_get_their_names_elsewhere() -> None:
    to = flow("tcp 192.168.1.5 -> 203.0.113.9:443 on main")
    assert FakeTargets(Fakes(), None).named(to) is to
    seen = FakeTargets(Fakes(), OtherNames()).named(to).seen
    assert seen == SeenName("seen.example", "dns")
