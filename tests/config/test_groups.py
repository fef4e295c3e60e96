"""Groups in the file: members, balances, health checks; the place and words of every error."""

from __future__ import annotations

import pytest

from netproxy.config.schema import (
    GroupConfig,
    HealthConfig,
    HopConfig,
    MemberConfig,
    UpstreamConfig,
)
from netproxy.config.sections.upstreams import BALANCES
from netproxy.interfaces.addresses import Address
from tests.config.reading import H1, H2, H3, NAMES, ONE, default, default_errors, read

pytest.importorskip("yaml")


def group(text: str, more: str = "") -> GroupConfig:
    """Return the only group of `default: TEXT`."""
    (step,) = default(text, more).steps
    assert isinstance(step, GroupConfig)
    return step


class TestGroup:
    def test_group_takes_members_in_every_form(self) -> None:
        whole = group(
            "{members: [one, 'http://h3:3?udp=none', {url: 'http://h3:4', timeout: 1s}, "
            "[one, two], direct]}",
            NAMES,
        )
        assert whole == GroupConfig(
            "default",
            (
                MemberConfig(ONE),
                MemberConfig(UpstreamConfig((H3._replace(udp="none"),))),
                MemberConfig(UpstreamConfig((HopConfig("http", Address("h3", 4), timeout=1.0),))),
                MemberConfig(UpstreamConfig((H1, H2))),
                MemberConfig(UpstreamConfig()),
            ),
        )

    @pytest.mark.parametrize(
        "via, upstream",
        [
            ("one", ONE),
            ("'http://h3:3'", UpstreamConfig((H3,))),
            ("{url: 'http://h3:3', udp: uot}", UpstreamConfig((H3._replace(udp="uot"),))),
            ("[one, two]", UpstreamConfig((H1, H2))),
            ("direct", UpstreamConfig()),
        ],
    )
    def test_group_member_takes_a_weight(self, via: str, upstream: UpstreamConfig) -> None:
        members = group(
            f"{{members: [{{via: {via}, weight: 3}}, {{via: 'http://h9:9'}}], balance: weighted}}",
            NAMES,
        ).members
        assert members == (
            MemberConfig(upstream, 3),
            MemberConfig(UpstreamConfig((HopConfig("http", Address("h9", 9)),)), 1),
        )

    def test_single_member_needs_no_list(self) -> None:
        assert group("{members: one}", NAMES).members == (MemberConfig(ONE),)

    @pytest.mark.parametrize("balance", BALANCES)
    def test_group_takes_every_balance(self, balance: str) -> None:
        assert group(f"{{members: [one, two], balance: {balance}}}", NAMES).balance == balance

    def test_group_balance_is_round_robin_by_default(self) -> None:
        assert group("{members: [one, two]}", NAMES).balance == "round-robin"

    @pytest.mark.parametrize(
        "text, health",
        [
            ("{}", HealthConfig()),
            ("", HealthConfig()),
            ("{interval: 500ms, timeout: 1s}", HealthConfig(None, "", 0.5, 1.0)),
            ("{target: '1.1.1.1:443'}", HealthConfig(Address("1.1.1.1", 443))),
            (
                "{target: 'Example.com:80', path: '/health?x=1', interval: 1m}",
                HealthConfig(Address("example.com", 80), "/health?x=1", 60.0),
            ),
        ],
    )
    def test_group_health_check_keys_are_read(self, text: str, health: HealthConfig) -> None:
        assert group(f"{{members: [one], health_check: {text}}}", NAMES).health == health

    def test_group_has_no_health_check_by_default(self) -> None:
        assert group("{members: [one]}", NAMES).health is None
        assert HealthConfig() == HealthConfig(None, "", 30.0, 5.0)

    @pytest.mark.parametrize(
        "text, name",
        [
            ("default: {members: [direct]}", "default"),
            ("default: p\nupstreams: {p: {members: [direct]}}", "p"),
            ("default: q\nupstreams: {p: {members: [direct]}, q: p}", "p"),
            ("default: ['http://h:1', {members: [direct]}]", "default[1]"),
            ("default: [p]\nupstreams: {p: ['http://h:1', {members: [direct]}]}", "p[1]"),
        ],
    )
    def test_group_is_named_after_its_place(self, text: str, name: str) -> None:
        step = read(text).default.steps[-1]
        assert isinstance(step, GroupConfig) and step.name == name

    def test_group_of_a_listener_is_named_after_it(self) -> None:
        (listener,) = read(
            "listeners: [{listen: '127.0.0.1:1', upstream: {members: [direct]}}]"
        ).listeners
        assert listener.upstream == UpstreamConfig(
            (GroupConfig("listeners[0].upstream", (MemberConfig(UpstreamConfig()),)),)
        )

    def test_group_may_be_a_step_of_a_chain(self) -> None:
        upstream = default(
            "[one, pool, two]",
            "upstreams: {one: 'http://h1:1', two: 'http://h2:2', pool: {members: ['http://h3:3']}}",
        )
        assert upstream == UpstreamConfig(
            (H1, GroupConfig("pool", (MemberConfig(UpstreamConfig((H3,))),)), H2)
        )

    def test_group_may_be_a_member_of_a_group(self) -> None:
        text = (
            "upstreams: {in: {members: ['http://h1:1'], balance: failover}, "
            "out: {members: [in, {members: ['http://h2:2']}]}}"
        )
        inner = GroupConfig("in", (MemberConfig(UpstreamConfig((H1,))),), "failover")
        unnamed = GroupConfig("out.members[1]", (MemberConfig(UpstreamConfig((H2,))),))
        assert default("out", text) == UpstreamConfig(
            (
                GroupConfig(
                    "out",
                    (
                        MemberConfig(UpstreamConfig((inner,), "in")),
                        MemberConfig(UpstreamConfig((unnamed,))),
                    ),
                ),
            ),
            "out",
        )


class TestGroupErrors:
    @pytest.mark.parametrize(
        "keys, message",
        [
            ("members: []", "20: default.members: names no upstream"),
            (
                "members: nowhere",
                "20: default.members[0]: 'nowhere' is not an upstream: write scheme://host:port, "
                "direct or block",
            ),
            (
                "members: [two, on]",
                "26: default.members[1]: 'on' is not an upstream: write scheme://host:port, "
                "direct or block (did you mean 'one'?)",
            ),
            (
                "members: [one, [two, nowhere]]",
                "32: default.members[1][1]: 'nowhere' is not an upstream: "
                "write scheme://host:port, "
                "direct or block",
            ),
            (
                "members: [one, {url: x}]",
                "32: default.members[1].url: 'x' is not an upstream: write scheme://host:port, "
                "direct or block",
            ),
            (
                "members: [{via: x}]",
                "27: default.members[0].via: 'x' is not an upstream: write scheme://host:port, "
                "direct or block",
            ),
            (
                "members: [{via: {url: x}}]",
                "33: default.members[0].via.url: 'x' is not an upstream: write "
                "scheme://host:port, direct or block",
            ),
            (
                "members: [one, two, one]",
                "20: default.members: names the same upstream twice: give it a weight instead",
            ),
            (
                "members: ['http://h:1', 'http://h:1/']",
                "20: default.members: names the same upstream twice: give it a weight instead",
            ),
            (
                "members: [one], balence: failover",
                "27: default.balence: unknown key (did you mean 'balance'?)",
            ),
            ("members: [one], timeout: 3s", "27: default.timeout: unknown key"),
            (
                "members: [one], balance: failovr",
                "36: default.balance: 'failovr' is not one of round-robin, "
                "least-connections, least-latency, hash-client, hash-target, "
                "weighted, failover (did you mean 'failover'?)",
            ),
            (
                "members: [{via: one, weight: 2}]",
                "40: default.members[0].weight: needs balance: weighted",
            ),
            (
                "members: [{via: one, weight: 0}], balance: weighted",
                "40: default.members[0].weight: '0' is not a whole number above 0",
            ),
            (
                "members: [{via: one, weight: 1.5}], balance: weighted",
                "40: default.members[0].weight: '1.5' is not a whole number above 0",
            ),
            (
                "members: [{via: one, weigth: 3}], balance: weighted",
                "32: default.members[0].weigth: unknown key (did you mean 'weight'?)",
            ),
            (
                "members: [{url: 'http://h:1', weight: 3}], balance: weighted",
                "41: default.members[0].weight: unknown key",
            ),
            (
                "members: [one], health_check: often",
                "41: default.health_check must be a mapping of keys to values",
            ),
            (
                "members: [one], health_check: {path: /}",
                "41: default.health_check.target: is missing: the path is requested from it",
            ),
            (
                "members: [one], health_check: {target: h}",
                "50: default.health_check.target: must be host:port with a port between 1 "
                "and 65535",
            ),
            (
                "members: [one], health_check: {target: 'h:1', path: health}",
                "63: default.health_check.path: must begin with / and hold no spaces",
            ),
            (
                "members: [one], health_check: {target: 'h:1', path: '/a b'}",
                "63: default.health_check.path: must begin with / and hold no spaces",
            ),
            (
                "members: [one], health_check: {target: 'h:1', path: \"/a\\r\\nb\"}",
                "63: default.health_check.path: must begin with / and hold no spaces",
            ),
            (
                "members: [one], health_check: {intervall: 1s}",
                "42: default.health_check.intervall: unknown key (did you mean 'interval'?)",
            ),
            (
                "members: [one], health_check: {interval: 30}",
                "52: default.health_check.interval: '30' has no unit: write 30s for "
                "seconds or 30ms for milliseconds",
            ),
        ],
    )
    def test_group_error_has_place_and_words(self, keys: str, message: str) -> None:
        assert default_errors(f"{{{keys}}}", NAMES) == [f"c.yaml:1:{message}"]

    def test_short_health_interval_error_names_the_minimum(self) -> None:
        (line,) = default_errors("{members: [one], health_check: {interval: 100ms}}", NAMES)
        assert line == "c.yaml:1:52: default.health_check.interval: must be at least 0.5s"

    def test_invalid_members_are_not_reported_as_duplicates(self) -> None:
        message = "is not an upstream: write scheme://host:port, direct or block"
        assert default_errors("{members: [nowhere, neither]}") == [
            f"c.yaml:1:21: default.members[0]: 'nowhere' {message}",
            f"c.yaml:1:30: default.members[1]: 'neither' {message}",
        ]

    def test_two_users_of_the_same_proxy_are_two_members(self) -> None:
        """Providers of proxies choose the exit by the user name."""
        assert len(group("{members: ['http://a:1@h:1', 'http://b:2@h:1']}").members) == 2
