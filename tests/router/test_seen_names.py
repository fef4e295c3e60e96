"""Flows to an address whose name was seen: rules decide by it, and some upstreams are asked for it.

The upstreams are as in test_router: `far` resolves names itself, `branch` does not.
"""

from __future__ import annotations

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import SeenName
from netproxy.interfaces.routing import Route
from tests.support.routing import StubResolver, flow, routing

pytest.importorskip("yaml")

BASE = """
listeners: [{name: main, listen: "127.0.0.1:1080"}]
upstreams:
  far: socks5h://192.0.2.1:1
  branch: socks5://192.0.2.3:1
destinations: {deny: [10.0.0.0/8]}
"""
TARGET, NAMED = Address("203.0.113.10", 443), Address("a.example", 443)
LEADING, QUIET = SeenName("a.example", "tls", True), SeenName("a.example", "tls")


def route(
    rest: str, seen: SeenName | None, text: str = "tcp 192.168.1.5 -> 203.0.113.10:443"
) -> Route:
    names = StubResolver({"a.example": ["198.51.100.1"]})
    wanted = flow(f"{text} on main")._replace(seen=seen)
    decision = routing(BASE + rest, names).router.route(wanted)
    assert names.lookups == []
    return decision


RULES = """
rules:
- {sni: "*.example", via: far}
- {domain: a.example, via: branch}
default: direct
"""


@pytest.mark.parametrize(
    ("seen", "rule"),
    [
        (SeenName("a.example", "tls"), "rules[0]"),
        (SeenName("example", "tls"), "default"),
        (SeenName("a.example", "http"), "rules[1]"),
        (SeenName("a.example", "dns"), "rules[1]"),
        (SeenName("b.example", "http"), "default"),
        (None, "default"),
    ],
)
def test_rules_decide_by_the_name_that_was_seen(seen: SeenName | None, rule: str) -> None:
    assert route(RULES, seen).rule == rule


def test_rule_by_network_sees_the_address() -> None:
    rules = "rules: [{ip: 198.51.100.0/24, via: block}, {ip: 203.0.113.0/24, via: far}]"
    assert route(rules, LEADING).rule == "rules[1]"


@pytest.mark.parametrize("upstream", ["far", "[branch, far]"])
def test_upstream_that_resolves_names_is_asked_for_the_name(upstream: str) -> None:
    decision = route(f"default: {upstream}", LEADING)
    assert decision.flow.target == NAMED
    assert decision.flow.addresses == (TARGET,)


@pytest.mark.parametrize("upstream", ["direct", "branch"])
def test_upstream_that_needs_an_address_gets_that_of_the_client(upstream: str) -> None:
    decision = route(f"default: {upstream}", LEADING)
    assert (decision.flow.target, decision.flow.addresses) == (TARGET, (TARGET,))


def test_name_that_does_not_lead_is_for_rules_alone() -> None:
    decision = route("default: far", QUIET)
    assert (decision.flow.target, decision.flow.addresses) == (TARGET, (TARGET,))
    assert decision.flow.seen == QUIET


@pytest.mark.parametrize("upstream", ["direct", "branch", "far"])
def test_name_does_not_lead_to_a_denied_address(upstream: str) -> None:
    """Hazard 155."""
    with pytest.raises(DialError) as refusal:
        route(f"default: {upstream}", LEADING, "tcp 192.168.1.5 -> 10.0.0.1:443")
    assert refusal.value.reason is Reason.DENIED


def test_auto_dials_the_address_directly() -> None:
    rules = "rules: [{via: auto, upstream: far}]"
    decision = route(rules, LEADING)
    assert decision.flow.addresses == (TARGET,)
