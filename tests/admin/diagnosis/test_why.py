"""Why something was refused or has failed: which incidents are found, and what is told of them."""

from __future__ import annotations

import pytest

from netproxy.admin.diagnosis.advice import advice
from netproxy.admin.diagnosis.why import ANSWERED, answer, find
from netproxy.config.read import read_config
from netproxy.config.schema import Config
from netproxy.config.tree.node import Source
from netproxy.config.tree.parse import parse_text
from netproxy.config.tree.problems import Problems
from netproxy.errors import OF_OTHERS, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Failure, Flow, Record, SeenName
from netproxy.router.named import UNKNOWN
from netproxy.observe.incidents import FAILED, LOGIN, REFUSED, Incidents

pytest.importorskip("yaml")
TEXT = b"""\
listeners:
  - {listen: "127.0.0.1:1080", name: main}
users:
  alice: {password: x}
rules:
  - {domain: a.example, via: block}
dns: {servers: [9.9.9.9], rules: [{domain: b.example, block: true}]}
destinations: {deny: [private]}
"""


@pytest.fixture
def config() -> Config:
    problems = Problems()
    config = read_config(parse_text(TEXT, Source("n.yaml")), problems)
    assert not problems.errors
    return config


@pytest.fixture
def incidents() -> Incidents:
    return Incidents()


def add_flow(incidents: Incidents, target: str, client: str = "10.0.0.9", **fields: object) -> str:
    flow = Flow("tcp", Address(client, 41000), Address(target, 443), "main", "alice")
    flow = flow._replace(seen=SeenName("seen.example", "tls"))
    failure = Failure("timed out", "", (("[2001:db8::9]:443", "timed out"),))
    record = Record(flow, "direct", 0, 0, 1.5, "timed out", failure=failure, rule="rules[0]")
    return incidents.add_flow(record._replace(**fields), FAILED)


@pytest.mark.parametrize(
    "about",
    [
        *("a.example", "A.example:443", "10.0.0.9", "10.0.0.9:41000", "alice", "seen.example"),
        *("2001:db8::9", "[2001:db8::9]", "[2001:db8::9]:443"),
    ],
)
def test_flow_is_found_by_each_of_its_names(incidents: Incidents, about: str) -> None:
    name = add_flow(incidents, "a.example")
    add = incidents.add(REFUSED, "192.0.2.1", {"reason": "forbidden", "asked": "GET b.example"})
    assert [row["id"] for row in find(incidents, about)] == [name]
    assert [row["id"] for row in find(incidents, add)] == [add]


def test_request_is_found_by_its_target_and_a_client_by_its_network(incidents: Incidents) -> None:
    fields = {"reason": "forbidden", "asked": "CONNECT b.example:25"}
    name = incidents.add(REFUSED, "2001:db8::1", fields)
    for about in ("b.example", "b.example:25", "2001:db8::/64", ""):
        assert [row["id"] for row in find(incidents, about)] == [name]
    assert find(incidents, "example") == []


def test_last_incidents_are_answered_in_the_order_of_time(
    incidents: Incidents, config: Config
) -> None:
    names = [add_flow(incidents, "a.example") for _ in range(ANSWERED + 3)]
    found = answer(list(reversed(find(incidents, "a.example"))), 5, config)
    assert [row["id"] for row in found["incidents"]] == names[3:]
    assert (found["remembered"], found["limit"]) == (5, 256)


@pytest.mark.parametrize(
    "decided, place",
    [
        ("rules[0]", "n.yaml:6:5"),
        ("rules[7]", ""),
        ("dns.rules[0]", "n.yaml:7:35"),
        ("users.alice.limits.connections", "n.yaml:4:21"),
        ("users.bob.limits.connections", ""),
        ("destinations.deny 10.0.0.0/8 (private)", "n.yaml:8:15"),
        ("clients", "n.yaml:2:14"),
        ("limits.connections", "n.yaml:2:14"),
        ("CONNECT to port 25 is not allowed", ""),
    ],
)
def test_place_of_what_has_decided_is_told(
    incidents: Incidents, config: Config, decided: str, place: str
) -> None:
    add_flow(incidents, "a.example", decided=decided)
    (row,) = answer(find(incidents, "a.example"), 1, config)["incidents"]
    assert (row["place"], row["rule_place"]) == (place, "n.yaml:6:5")


def test_place_of_an_earlier_configuration_is_not_told(
    incidents: Incidents, config: Config
) -> None:
    add_flow(incidents, "a.example", decided="rules[0]")
    incidents.note_reload()
    (row,) = answer(find(incidents, "a.example"), 1, config)["incidents"]
    assert (row["place"], row["rule_place"], row["outdated"]) == ("", "", True)


@pytest.mark.parametrize("reason", Reason)
def test_each_reason_of_a_failed_dial_has_advice(reason: Reason) -> None:
    assert advice(reason.value, "", of_flow=True)


@pytest.mark.parametrize("reason", OF_OTHERS)
def test_refusal_of_others_has_advice_about_them(reason: str) -> None:
    text = advice(reason, "", of_flow=True, hop="'office'")
    assert "proxy" in text or "firewall" in text


def test_advice_is_about_what_has_decided_first(incidents: Incidents, config: Config) -> None:
    incidents.add(LOGIN, "192.0.2.1", {"reason": "wrong login", "user": "eve"})
    (row,) = answer(find(incidents, "eve"), 1, config)["incidents"]
    assert "hash-password" in row["advice"]
    assert "rule" in advice(Reason.DENIED.value, "rules[3]")
    assert "destinations.allow" in advice(Reason.DENIED.value, "destinations.deny private")
    assert "proxy" in advice(Reason.REFUSED.value, "", of_flow=True, hop="'office'")
    assert "timeouts.connect" in advice("timed out", "", of_flow=True)
    assert "timeouts.handshake" in advice("timed out", "")
    assert advice("no such reason", "") == ""
    # Both are decided by dns.fake, and so is an answer that leads back to this daemon.
    unknown = advice(UNKNOWN, "dns.fake", of_flow=True)
    assert "dns listener" in unknown and "again" in unknown
    assert "wider" in advice("no fake address left", "dns.fake 198.18.0.0/15")
    assert "must not be this daemon" in advice(Reason.LOOP.value, "dns.fake 198.18.0.0/15")
