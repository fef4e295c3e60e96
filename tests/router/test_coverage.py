"""Rules that can never match, because an earlier one takes all their flows."""

from __future__ import annotations

import pytest

from netproxy.router.factory import unreachable_rules
from tests.config.reading import read

pytest.importorskip("yaml")

USERS = "users: {alice: {password: x}, bob: {password: y}}"
LISTENERS = "listeners: [{listen: '127.0.0.1:1', name: one}, {listen: '127.0.0.1:2', name: two}]"
# An earlier rule, and one that it leaves no flow to.
COVERED = [
    ("", "domain: a.test"),
    ("", ""),
    ("network: [tcp, udp]", "port: 25"),
    ("domain: a.test", "domain: A.TEST."),
    ("domain: a.test", "domain: a.test, port: 443"),
    ("domain: .test", "domain: [a.test, '*.b.test', .c.test, .test, '*.test', test]"),
    ("domain: '*.test'", "domain: [a.test, '*.b.test', .c.test, '*.test']"),
    ("domain: [test, '*.test']", "domain: .test"),
    ("domain: 'keyword:ads'", "domain: [ads.test, .x.ads.test, 'keyword:bads']"),
    ("domain: 'regex:^x'", "domain: 'regex:^x'"),
    ("domain_file: [a, b], domain: .test", "domain_file: a, domain: b.test"),
    ("ip: 10.0.0.0/8", "ip: [10.1.0.0/16, 10.2.3.4]"),
    ("ip: '::/0'", "ip: 'fd00::/8'"),
    ("ip_file: [a, b], geoip: [CN, RU]", "ip_file: a, geoip: ru"),
    ("port: [1-100, 101-200]", "port: [50-150, 200]"),
    ("client: 192.168.0.0/16", "client: 192.168.1.0/24, user: alice"),
    ("user: [alice, bob]", "user: bob"),
    ("user: '*'", "user: bob"),
    ("command: [connect, http]", "command: http"),
    ("listener: [one, two]", "listener: one"),
    ("network: udp", "network: udp, port: 53"),
    ("hours: [mon-fri, 'sat 00:00-24:00']", "hours: ['tue 22:00-06:00', sat]"),
    ("hours: sat-mon", "hours: 'sun 22:00-06:00', port: 25"),
    ("not: {hours: mon}", "not: {hours: mon-tue}"),
    ("not: {domain: a.test}", "not: {domain: [a.test, b.test]}"),
    ("port: 443, not: {user: bob}", "port: 443, not: {user: [alice, bob]}, client: 10.0.0.1"),
]
# An earlier rule, and one that has flows of its own.
NOT_COVERED = [
    ("domain: a.test", ""),
    ("domain: a.test", "domain: [a.test, b.test]"),
    ("domain: '*.test'", "domain: .test"),
    ("domain: '*.a.test'", "domain: '*.test'"),
    ("domain: a.test", "domain: .a.test"),
    ("domain: .st", "domain: .test"),
    ("domain: 'keyword:ads'", "domain: 'keyword:ad'"),
    ("domain: 'keyword:ads'", "domain: 'regex:ads'"),
    ("domain: .test", "domain: .test, domain_file: a"),
    ("domain: a.test, port: 443", "domain: a.test"),
    ("domain: a.test", "ip: 10.0.0.1"),
    ("ip: 10.0.0.0/16", "ip: 10.0.0.0/8"),
    ("ip: 0.0.0.0/0", "ip: '::1'"),
    ("ip: 10.0.0.0/8", "ip: 10.0.0.1, geoip: CN"),
    ("port: [1-100, 102-200]", "port: 50-150"),
    ("network: tcp", "port: 25"),
    ("user: alice", "user: [alice, bob]"),
    ("user: bob", "user: '*'"),
    ("command: connect", "network: tcp"),
    ("hours: '00:00-24:00'", ""),
    ("hours: '08:00-18:00'", "hours: '08:00-18:01'"),
    ("hours: mon", "not: {hours: tue-sun}"),
    ("not: {domain: a.test}", ""),
    ("not: {domain: [a.test, b.test]}", "not: {domain: a.test}"),
    ("user: alice, not: {port: 25}", "user: alice"),
]


def pairs(*rules: str) -> list[tuple[str, str]]:
    """Return the numbers of unreachable rules and of the rules before them."""
    lines = "".join(f"  - {{{', '.join(filter(None, (rule, 'via: block')))}}}\n" for rule in rules)
    config = read(f"{USERS}\n{LISTENERS}\nrules:\n{lines}")
    return [
        (rule.text.partition(" ")[0], earlier.text.partition(" ")[0])
        for rule, earlier in unreachable_rules(config.rules)
    ]


@pytest.mark.parametrize("earlier, later", COVERED)
def test_rule_without_flows_of_its_own_is_found(earlier: str, later: str) -> None:
    assert pairs(earlier, later) == [("rules[1]", "rules[0]")]


@pytest.mark.parametrize("earlier, later", NOT_COVERED)
def test_rule_with_flows_of_its_own_is_not_reported(earlier: str, later: str) -> None:
    assert pairs(earlier, later) == []


def test_each_rule_names_the_first_one_that_takes_its_flows() -> None:
    assert pairs("port: 25", "", "port: 25-26", "port: 25, user: bob") == [
        ("rules[2]", "rules[1]"),
        ("rules[3]", "rules[0]"),
    ]


def test_rule_that_takes_everything_is_found_behind_many_others() -> None:
    rules = [f"port: {port}" for port in range(1, 400)]
    assert pairs(*rules, "", "port: 500") == [("rules[400]", "rules[399]")]
