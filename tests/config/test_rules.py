"""Rules, auto and destinations in the file: every key and default, the words of every error."""

from __future__ import annotations

import pytest

from netproxy.config.sections import rules as rules_module
from netproxy.config.schema import (
    AutoConfig,
    ConditionsConfig,
    DestinationsConfig,
    HopConfig,
    RuleConfig,
)
from netproxy.interfaces.networks import IpNetwork
from tests.config.reading import HASH, errors, read

pytest.importorskip("yaml")

MAIN = "listeners: [{name: main, listen: '127.0.0.1:1080'}]\n"


def rule(text: str) -> RuleConfig:
    """Return the only rule of a file with a listener main and an upstream office."""
    users = f"users: {{alice: {{password: '{HASH}'}}, bob: {{password: '{HASH}'}}}}"
    more = f"upstreams: {{office: 'socks5://192.0.2.1:1'}}\n{users}"
    (config,) = read(f"{MAIN}{more}\nrules: [{text}]").rules
    return config


class TestRule:
    def test_rule_with_all_conditions_is_read(self) -> None:
        config = rule(
            "{domain: [a.test, '*.b.test'], domain_file: /d, ip: 10.0.0.0/8, "
            "ip_file: [/i, /j], geoip: cn, port: [443, 8000-8100], network: [tcp, udp], "
            "client: 192.168.0.0/16, user: alice, listener: main, via: office}"
        )
        assert config.conditions == ConditionsConfig(
            domain=("a.test", "*.b.test"),
            domain_file=("/d",),
            ip=("10.0.0.0/8",),
            ip_file=("/i", "/j"),
            geoip=("CN",),
            port=("443", "8000-8100"),
            network=("tcp", "udp"),
            client=(IpNetwork.parse("192.168.0.0/16"),),
            user=("alice",),
            listener=("main",),
        )
        assert config.but_not == ConditionsConfig() and config.upstream is None
        assert (
            config.via is not None and config.via.name == "office" and config.place == "c.yaml:4:9"
        )

    def test_rule_without_conditions_matches_everything(self) -> None:
        config = rule("{via: direct}")
        assert config.conditions == config.but_not == ConditionsConfig()
        assert config.via is not None and config.via.steps == (HopConfig("direct"),)

    def test_rule_with_not_has_negative_conditions(self) -> None:
        config = rule("{not: {user: [alice, bob], ip: '::1'}, via: block}")
        assert config.but_not == ConditionsConfig(user=("alice", "bob"), ip=("::1",))
        assert config.conditions == ConditionsConfig()

    def test_auto_rule_takes_a_named_upstream(self) -> None:
        config = rule("{via: auto, upstream: office}")
        assert (
            config.via is None and config.upstream is not None and config.upstream.name == "office"
        )

    def test_auto_rule_takes_a_chain(self) -> None:
        config = rule("{via: auto, upstream: [office, 'http://192.0.2.2:1']}")
        assert config.upstream is not None and len(config.upstream.steps) == 2

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("{via: direct}", "rules[0] (everything)"),
            ("{domain: a.test, via: auto, upstream: office}", "rules[0] (domain: a.test)"),
            (
                "{port: [1, 2, 3, 4, 5], not: {user: alice}, via: direct}",
                "rules[0] (port: [1, 2, 3, 4, 5], not: {user: alice})",
            ),
            ("{port: [1, 2, 3, 4, 5, 6], via: direct}", "rules[0] (port: [1, 2, 3, 4, 5, ...])"),
        ],
    )
    def test_rule_text_lists_its_conditions(self, text: str, expected: str) -> None:
        assert rule(text).text == expected

    def test_single_rule_needs_no_list(self) -> None:
        assert len(read("rules: {via: direct}\nlisteners: []").rules) == 1

    def test_empty_rules_are_accepted(self) -> None:
        assert read("rules: []").rules == () == read("").rules


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "{domian: a.test, via: direct}",
            "c.yaml:2:10: rules[0].domian: unknown key (did you mean 'domain'?)",
        ),
        (
            "{not: {prot: 25}, via: direct}",
            "c.yaml:2:16: rules[0].not.prot: unknown key (did you mean 'port'?)",
        ),
        (
            "{not: {not: {port: 1}, port: 2}, via: direct}",
            "c.yaml:2:16: rules[0].not.not: unknown key",
        ),
        (
            "{not: {port: 1, via: direct}, via: direct}",
            "c.yaml:2:25: rules[0].not.via: unknown key",
        ),
        ("{domain: a.test}", "c.yaml:2:9: rules[0].via: is missing"),
        (
            "{domain: a.test, upstream: direct}",
            "c.yaml:2:9: rules[0].via: is missing (write via in place of upstream)",
        ),
        ("{domain: [], via: direct}", "c.yaml:2:18: rules[0].domain: is an empty list"),
        ("{not: {client: []}, via: direct}", "c.yaml:2:24: rules[0].not.client: is an empty list"),
        ("{not: {}, via: direct}", "c.yaml:2:15: rules[0].not: is empty: it needs a condition"),
        ("{not: , via: direct}", "c.yaml:2:15: rules[0].not: is empty: it needs a condition"),
        (
            "{not: [a.test], via: direct}",
            "c.yaml:2:15: rules[0].not must be a mapping of keys to values "
            "(write the keys without '- ' before them)",
        ),
        ("{domain: , via: direct}", "c.yaml:2:18: rules[0].domain[0]: is empty"),
        ("{user: ['', alice], via: direct}", "c.yaml:2:17: rules[0].user[0]: is empty"),
        ("{port: [[1, 2]], via: direct}", "c.yaml:2:17: rules[0].port[0]: must be a single value"),
        (
            "{network: icmp, via: direct}",
            "c.yaml:2:19: rules[0].network[0]: 'icmp' is neither tcp nor udp",
        ),
        (
            "{client: [10.0.0.0/8, home], via: direct}",
            "c.yaml:2:31: rules[0].client[1]: 'home' is not a valid network (expected an "
            "address or CIDR, such as 10.0.0.0/8)",
        ),
        (
            "{geoip: China, via: direct}",
            "c.yaml:2:17: rules[0].geoip[0]: 'China' is not a country code of two letters",
        ),
        (
            "{geoip: C1, via: direct}",
            "c.yaml:2:17: rules[0].geoip[0]: 'C1' is not a country code of two letters",
        ),
        (
            "{listener: mian, via: direct}",
            "c.yaml:2:20: rules[0].listener[0]: there is no listener 'mian' (did you mean 'main'?)",
        ),
        (
            "{not: {listener: guests}, via: direct}",
            "c.yaml:2:26: rules[0].not.listener[0]: there is no listener 'guests'",
        ),
        ("{user: bbo, via: direct}", "c.yaml:2:16: rules[0].user[0]: there is no user 'bbo'"),
        (
            "{command: conect, via: direct}",
            "c.yaml:2:19: rules[0].command[0]: there is no command 'conect'"
            " (did you mean 'connect'?)",
        ),
        ("{user: '', via: direct}", "c.yaml:2:16: rules[0].user[0]: is empty"),
        (
            "{via: auto}",
            "c.yaml:2:9: rules[0].upstream: is missing: auto needs an upstream for when "
            "the direct connection fails",
        ),
        (
            "{via: direct, upstream: direct}",
            "c.yaml:2:33: rules[0].upstream: is only for via: auto",
        ),
        ("text", "c.yaml:2:9: rules[0] must be a mapping of keys to values"),
    ],
)
def test_rule_error_has_place_and_words(text: str, message: str) -> None:
    assert errors(f"{MAIN}rules: [{text}]")[0] == message


@pytest.mark.parametrize(
    "text",
    ["{not: {}, via: direct}", "{via: auto}", "{domain: a.test}", "{domain: [], via: direct}"],
)
def test_single_rule_error_is_a_single_line(text: str) -> None:
    assert len(errors(f"{MAIN}rules: [{text}]")) == 1


def test_misspelt_user_of_a_rule_gets_a_suggestion() -> None:
    rules = "rules: [{user: [bob, bbo], via: direct}, {not: {user: bbo}, via: block}]"
    message = "there is no user 'bbo' (did you mean 'bob'?)"
    assert errors(f"{rules}\nusers: {{bob: {{password: '{HASH}'}}}}") == [
        f"c.yaml:1:22: rules[0].user[1]: {message}",
        f"c.yaml:1:55: rules[1].not.user[0]: {message}",
    ]


def test_rule_with_an_unknown_upstream_has_its_place() -> None:
    assert errors(MAIN + "rules: [{via: offise}]\nupstreams: {office: direct}")[0].startswith(
        "c.yaml:2:15: rules[0].via: "
    )


def test_errors_of_all_rules_are_reported_at_once() -> None:
    assert len(errors(MAIN + "rules: [{via: auto}, {port: 1}, {nothing: 1, via: direct}]")) == 3


def test_rules_above_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules_module, "RULES_LIMIT", 2)
    assert len(read("rules: [{via: direct}, {via: direct}]").rules) == 2
    assert errors("rules: [{via: direct}, {via: direct}, {via: direct}]") == [
        "c.yaml:1:9: rules: more than 2 rules "
        "(put names into a domain_file and networks into an ip_file)"
    ]


class TestAuto:
    def test_auto_section_has_defaults(self) -> None:
        assert read("").auto == AutoConfig(2.0, 21600.0, 4096, (), ())
        assert read("auto: {}").auto._replace(place="") == AutoConfig()

    def test_auto_section_keys_are_read(self) -> None:
        auto = read(
            "auto: {deadline: 500ms, remember: 1h, entries: 10, "
            "direct: [.lan, 10.0.0.0/8], upstream: far.test}"
        ).auto
        assert auto == AutoConfig(
            0.5, 3600.0, 10, (".lan", "10.0.0.0/8"), ("far.test",), "c.yaml:1:7"
        )

    @pytest.mark.parametrize(
        "text, message",
        [
            ("{deadline: 0s}", "c.yaml:1:18: auto.deadline: must be longer than 0"),
            (
                "{remember: 3}",
                "c.yaml:1:18: auto.remember: '3' has no unit: write 3s for seconds or 3ms "
                "for milliseconds",
            ),
            ("{entries: 0}", "c.yaml:1:17: auto.entries: '0' is not a whole number above 0"),
            ("{entries: 99999999}", "c.yaml:1:17: auto.entries: must be at most 1048576"),
            ("{dirct: a}", "c.yaml:1:8: auto.dirct: unknown key (did you mean 'direct'?)"),
            ("{direct: ['']}", "c.yaml:1:17: auto.direct[0]: is empty"),
        ],
    )
    def test_auto_section_error_has_place_and_words(self, text: str, message: str) -> None:
        assert errors(f"auto: {text}") == [message]


class TestDestinations:
    def test_missing_destinations_are_none(self) -> None:
        assert read("").destinations is None

    @pytest.mark.parametrize(
        "text, deny, allow",
        [
            ("{}", None, ()),
            ("{deny: []}", (), ()),
            ("{deny: private}", ("private",), ()),
            ("{allow: [10.0.0.0/8]}", None, ("10.0.0.0/8",)),
            (
                "{deny: [private, 192.0.2.0/24], allow: [10.0.0.1, multicast]}",
                ("private", "192.0.2.0/24"),
                ("10.0.0.1", "multicast"),
            ),
        ],
    )
    def test_destinations_keys_are_read(
        self, text: str, deny: tuple[str, ...] | None, allow: tuple[str, ...]
    ) -> None:
        config = read(f"destinations: {text}").destinations
        assert config is not None and config._replace(place="") == DestinationsConfig(deny, allow)

    def test_unknown_destinations_key_is_refused(self) -> None:
        assert errors("destinations: {denny: private}") == [
            "c.yaml:1:16: destinations.denny: unknown key (did you mean 'deny'?)"
        ]
