"""Ways out as they stand in the file: every form, every option, and the exact words and place of every error."""

from __future__ import annotations

import re
from typing import Any

import pytest

from netproxy.config.schema import (
    Config,
    GroupConfig,
    HealthConfig,
    HopConfig,
    MemberConfig,
    UpstreamTlsConfig,
    UpstreamConfig,
)
from netproxy.config.upstreams import BALANCES, CHAIN_LIMIT, TLS_LIMIT
from netproxy.interfaces.addresses import Address
from tests.config.test_read import errors, read

pytest.importorskip("yaml")

H1, H2, H3 = (HopConfig("http", Address(f"h{number}", number)) for number in (1, 2, 3))
NAMES = "upstreams: {one: 'http://h1:1', two: 'http://h2:2'}"
ONE, TWO = UpstreamConfig((H1,), "one"), UpstreamConfig((H2,), "two")


def default(text: str, more: str = "") -> UpstreamConfig:
    """What `default: TEXT` means."""
    return read(f"default: {text}\n{more}").default


def hop(text: str) -> HopConfig:
    (one,) = default(text).steps
    assert isinstance(one, HopConfig)
    return one


def group(text: str, more: str = "") -> GroupConfig:
    (one,) = default(text, more).steps
    assert isinstance(one, GroupConfig)
    return one


def wrong(text: str, more: str = "") -> list[str]:
    """The errors of `default: TEXT`; its first column is 10."""
    return errors(f"default: {text}\n{more}")


class TestHop:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("direct", HopConfig("direct")),
            ("block", HopConfig("block")),
            ("http://h1:1", H1),
            ("HTTP://h1:1", None),
            ("http://H1:1/", H1),
            ("socks4://user@h1:1", HopConfig("socks4", Address("h1", 1), "user")),
            ("socks4a://h1:1", HopConfig("socks4a", Address("h1", 1))),
            (
                "socks5://u:p@10.0.0.1:1080",
                HopConfig("socks5", Address("10.0.0.1", 1080), "u", "p"),
            ),
            ("socks5h://[2001:db8::1]:1080", HopConfig("socks5h", Address("2001:db8::1", 1080))),
            ("https://u:p%40ss@h1:1", HopConfig("https", Address("h1", 1), "u", "p@ss")),
            ("socks5+tls://h1:1", HopConfig("socks5+tls", Address("h1", 1))),
            ("socks5h+tls://h1:1", HopConfig("socks5h+tls", Address("h1", 1))),
        ],
    )
    def test_as_a_url(self, text: str, expected: HopConfig | None) -> None:
        """Schemes are lower-case; hosts are made so."""
        if expected is None:
            assert wrong(f"'{text}'") == [
                "c.yaml:1:10: default: not an upstream: write scheme://host:port, direct or block"
            ]
        else:
            assert default(f"'{text}'") == UpstreamConfig((expected,))
            assert default(f"{{url: '{text}'}}") == UpstreamConfig((expected,))
            assert default(f"['{text}']") == UpstreamConfig((expected,))

    @pytest.mark.parametrize(
        "keys, query, field, value",
        [
            ("udp: uot", "udp=uot", "udp", "uot"),
            ("udp: none", "udp=none", "udp", "none"),
            ("udp: auto", "udp=auto", "udp", "auto"),
            ("timeout: 1h30m", "timeout=1h30m", "timeout", 5400.0),
            ("bind: 192.0.2.1", "bind=192.0.2.1", "bind", "192.0.2.1"),
            ("bind: '2001:db8::1'", "bind=2001:db8::1", "bind", "2001:db8::1"),
            ("bind: eth0.100", "bind=eth0.100", "bind", "eth0.100"),
            ("mark: 255", "mark=255", "mark", 255),
            ("mark: 0xff", "mark=0xff", "mark", 255),
            ("mark: 4294967295", "mark=4294967295", "mark", 0xFFFFFFFF),
            ("keepalive: 90s", "keepalive=90s", "keepalive", 90.0),
            ("keepalive: 0", "keepalive=0", "keepalive", 0.0),
            ("tls: {ca: /a b.pem}", "tls.ca=/a%20b.pem", "tls", UpstreamTlsConfig(ca="/a b.pem")),
            (
                "tls: {certificate: c, key: k}",
                "tls.certificate=c&tls.key=k",
                "tls",
                UpstreamTlsConfig(certificate="c", key="k"),
            ),
            (
                "tls: {certificate: c}",
                "tls.certificate=c",
                "tls",
                UpstreamTlsConfig(certificate="c"),
            ),
            (
                "tls: {server_name: n}",
                "tls.server_name=n",
                "tls",
                UpstreamTlsConfig(server_name="n"),
            ),
            ("tls: {insecure: true}", "tls.insecure=true", "tls", UpstreamTlsConfig(insecure=True)),
            ("tls: {insecure: false}", "tls.insecure=false", "tls", UpstreamTlsConfig()),
        ],
    )
    def test_options_beside_the_url_or_in_it(
        self, keys: str, query: str, field: str, value: Any
    ) -> None:
        expected = HopConfig("https", Address("h", 1), "u", "secret")._replace(**{field: value})
        assert hop(f"{{url: 'https://u:secret@h:1', {keys}}}") == expected
        assert hop(f"'https://u:secret@h:1?{query}'") == expected

    def test_all_options_at_once(self) -> None:
        url = (
            "'socks5h+tls://u:p@h:1?udp=none&timeout=2s&bind=eth0&mark=0x10&keepalive=30s&tls.ca=a&tls.certificate=c&tls.key=k"
            "&tls.server_name=n&tls.insecure=true'"
        )
        assert hop(url) == HopConfig(
            "socks5h+tls",
            Address("h", 1),
            "u",
            "p",
            "none",
            2.0,
            "eth0",
            16,
            30.0,
            UpstreamTlsConfig("a", "c", "k", "n", True),
        )

    def test_what_is_not_said_is_left_to_the_defaults(self) -> None:
        assert H1 == HopConfig(
            "http", Address("h1", 1), "", "", "auto", None, "", 0, None, UpstreamTlsConfig()
        )
        assert hop("{url: 'http://h1:1'}") == H1

    @pytest.mark.parametrize("scheme", ["direct", "block"])
    def test_this_machine_may_be_left_in_a_way_of_its_own(self, scheme: str) -> None:
        assert hop(f"{{url: {scheme}, bind: eth0, mark: 1, keepalive: 0}}") == HopConfig(
            scheme, bind="eth0", mark=1, keepalive=0.0
        )


class TestNames:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("one", ONE),
            ("[one]", ONE),
            ("[one, two]", UpstreamConfig((H1, H2))),
            ("[one, 'http://h3:3']", UpstreamConfig((H1, H3))),
            ("[one, one]", UpstreamConfig((H1, H1))),
            ("[[one, two], 'http://h3:3']", UpstreamConfig((H1, H2, H3))),
        ],
    )
    def test_are_used_in_chains(self, text: str, expected: UpstreamConfig) -> None:
        assert default(text, NAMES) == expected

    @pytest.mark.parametrize(
        "order", ["one, two, both, alias", "alias, both, two, one", "both, alias, one, two"]
    )
    def test_are_found_wherever_they_are_used_first(self, order: str) -> None:
        lines = {
            "one": "one: 'http://h1:1'",
            "two": "two: 'http://h2:2'",
            "both": "both: [one, two]",
            "alias": "alias: both",
        }
        config = read(
            "default: alias\nupstreams: {"
            + ", ".join(lines[name] for name in order.split(", "))
            + "}"
        )
        assert config.upstreams == {
            "one": ONE,
            "two": TWO,
            "both": UpstreamConfig((H1, H2), "both"),
            "alias": UpstreamConfig((H1, H2), "alias"),
        }
        assert list(config.upstreams) == order.split(", ")
        assert config.default == UpstreamConfig((H1, H2), "alias")

    def test_a_listener_uses_them(self) -> None:
        config = read(
            "listeners: [{listen: '127.0.0.1:1', upstream: [one, two]}, {listen: '127.0.0.1:2', upstream: two}]\n"
            + NAMES
        )
        assert [one.upstream for one in config.listeners] == [UpstreamConfig((H1, H2)), TWO]

    def test_an_error_in_one_is_told_once_however_often_it_is_used(self) -> None:
        assert wrong(
            "[a, a]",
            "upstreams: {a: nowhere, b: a}\nlisteners: [{listen: '127.0.0.1:1', upstream: a}]",
        ) == [
            "c.yaml:2:16: upstreams.a: not an upstream: write scheme://host:port, direct or block"
        ]

    def test_a_warning_is_told_once_however_often_it_is_used(self) -> None:
        config = read("default: [a, a]\nupstreams: {a: 'https://h:1?tls.insecure=true', b: a}")
        assert len(config.warnings) == 1


class TestText:
    """In logs, and no secret in it."""

    @pytest.mark.parametrize(
        "text, shown",
        [
            ("direct", "direct"),
            ("block", "block"),
            ("'socks5://u:secret@h:1'", "socks5://h:1"),
            (
                "['http://u:secret@h1:1', 'http://[2001:db8::1]:2']",
                "http://h1:1 -> http://[2001:db8::1]:2",
            ),
            ("one", "http://h1:1"),
            (
                "{members: [one, 'http://u:secret@h3:3'], balance: failover}",
                "failover of (one, http://h3:3)",
            ),
            (
                "['http://h3:3', {members: [one, [one, two]]}]",
                "http://h3:3 -> round-robin of (one, http://h1:1 -> http://h2:2)",
            ),
        ],
    )
    def test_is_in_the_order_it_is_gone(self, text: str, shown: str) -> None:
        assert default(text, NAMES).text == shown


class TestGroup:
    def test_members_in_all_their_forms(self) -> None:
        one = group(
            "{members: [one, 'http://h3:3?udp=none', {url: 'http://h3:4', timeout: 1s}, [one, two], direct]}",
            NAMES,
        )
        assert one == GroupConfig(
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
        "via, way",
        [
            ("one", ONE),
            ("'http://h3:3'", UpstreamConfig((H3,))),
            ("{url: 'http://h3:3', udp: uot}", UpstreamConfig((H3._replace(udp="uot"),))),
            ("[one, two]", UpstreamConfig((H1, H2))),
            ("direct", UpstreamConfig()),
        ],
    )
    def test_a_member_with_a_weight(self, via: str, way: UpstreamConfig) -> None:
        one = group(
            f"{{members: [{{via: {via}, weight: 3}}, {{via: 'http://h9:9'}}], balance: weighted}}",
            NAMES,
        )
        assert one.members == (
            MemberConfig(way, 3),
            MemberConfig(UpstreamConfig((HopConfig("http", Address("h9", 9)),)), 1),
        )

    def test_one_member_needs_no_list(self) -> None:
        assert group("{members: one}", NAMES).members == (MemberConfig(ONE),)

    @pytest.mark.parametrize("balance", BALANCES)
    def test_balances(self, balance: str) -> None:
        assert group(f"{{members: [one, two], balance: {balance}}}", NAMES).balance == balance

    def test_the_balance_is_round_robin_where_none_is_said(self) -> None:
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
    def test_health_checks(self, text: str, health: HealthConfig) -> None:
        assert group(f"{{members: [one], health_check: {text}}}", NAMES).health == health

    def test_no_health_check_where_none_is_said(self) -> None:
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
    def test_is_named_where_it_stands(self, text: str, name: str) -> None:
        step = read(text).default.steps[-1]
        assert isinstance(step, GroupConfig) and step.name == name

    def test_of_a_listeners_own(self) -> None:
        (one,) = read(
            "listeners: [{listen: '127.0.0.1:1', upstream: {members: [direct]}}]"
        ).listeners
        assert one.upstream == UpstreamConfig(
            (GroupConfig("listeners[0].upstream", (MemberConfig(UpstreamConfig()),)),)
        )

    def test_in_a_chain(self) -> None:
        way = default(
            "[one, pool, two]",
            "upstreams: {one: 'http://h1:1', two: 'http://h2:2', pool: {members: ['http://h3:3']}}",
        )
        assert way == UpstreamConfig(
            (H1, GroupConfig("pool", (MemberConfig(UpstreamConfig((H3,))),)), H2)
        )

    def test_in_a_group(self) -> None:
        text = "upstreams: {in: {members: ['http://h1:1'], balance: failover}, out: {members: [in, {members: ['http://h2:2']}]}}"
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


class TestErrors:
    @pytest.mark.parametrize(
        "text, message",
        [
            ("''", "10: default: not an upstream: write scheme://host:port, direct or block"),
            ("'h:1'", "10: default: not an upstream: write scheme://host:port, direct or block"),
            ("[]", "10: default: names no upstream"),
            ("{}", "10: default: needs url or members"),
            ("{balance: failover}", "10: default: needs url or members"),
            ("{udp: none, timout: 3s}", "10: default: needs url or members"),
            (
                "{url: ''}",
                "16: default.url: not an upstream: write scheme://host:port, direct or block",
            ),
            ("{url: ['http://h:1']}", "16: default.url: must be a single value"),
            (
                "{url: 'http://h:1?udp=none'}",
                "16: default.url: write what follows the '?' as keys beside the url",
            ),
            (
                "{url: 'sock5://h:1'}",
                "16: default.url: 'sock5' is not an upstream scheme (did you mean 'socks5'?)",
            ),
            ("'http://h'", "10: default: must be host:port with a port between 1 and 65535"),
            ("'http://h:0'", "10: default: must be host:port with a port between 1 and 65535"),
            (
                "'http://h:65536?udp=none'",
                "10: default.url: must be host:port with a port between 1 and 65535",
            ),
            ("'http://a b:1'", "10: default: must be host:port with a port between 1 and 65535"),
            (
                "'socks5://u@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks5://:p@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks5h+tls://u@h:1'",
                "10: default: SOCKS5 takes a user and a password of 1 to 255 bytes each",
            ),
            (
                "'socks4://u:secret@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            (
                "'socks4a://:secret@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            (
                "'socks4://a%00b@h:1'",
                "10: default: SOCKS4 takes a user of up to 255 bytes, and no password",
            ),
            ("'http://%ff@h:1'", "10: default: a %-escape is not UTF-8"),
            ("'direct?bind=eth0'", None),
            ("'http://h:1?timout=1s'", "10: default.timout: unknown key (did you mean 'timeout'?)"),
            ("'http://h:1?udp=none&udp=uot'", "10: default: 'udp' is given twice"),
            ("'http://h:1?url=http://h:2'", "10: default: 'url' is given twice"),
            ("'https://h:1?tls.ca=a&tls.ca=b'", "10: default: 'ca' is given twice"),
            ("'https://h:1?tls=x&tls.ca=b'", "10: default: 'tls' is given twice"),
            ("'https://h:1?tls=x'", "10: default.tls must be a mapping of keys to values"),
            ("'https://h:1?tls.caa=x'", "10: default.tls.caa: unknown key (did you mean 'ca'?)"),
        ],
    )
    def test_of_urls(self, text: str, message: str | None) -> None:
        if message is None:
            assert hop(text) == HopConfig("direct", bind="eth0")
        else:
            assert wrong(text) == [f"c.yaml:1:{message}"]

    @pytest.mark.parametrize(
        "keys, message",
        [
            ("udp: ^no", "udp: 'no' is not one of auto, uot, none (did you mean 'none'?)"),
            ("^upd: none", "upd: unknown key (did you mean 'udp'?)"),
            ("^weight: 3", "weight: unknown key"),
            (
                "timeout: ^5",
                "timeout: '5' has no unit: write 5s for seconds or 5ms for milliseconds",
            ),
            ("timeout: ^0", "timeout: must be longer than 0"),
            ("timeout: ^[1s]", "timeout: must be a single value"),
            ("bind: ^'a b'", "bind: 'a b' is neither an address nor an interface"),
            ("bind: ^''", "bind: '' is neither an address nor an interface"),
            ("bind: ^'eth0:1'", "bind: 'eth0:1' is neither an address nor an interface"),
            ("bind: ^a/b", "bind: 'a/b' is neither an address nor an interface"),
            (
                "bind: ^sixteen-letters.",
                "bind: 'sixteen-letters.' is neither an address nor an interface",
            ),
            ("bind: ^'2001:db8::g'", "bind: '2001:db8::g' is neither an address nor an interface"),
            ("mark: ^0", "mark: '0' is not a mark (expected a number above 0, decimal or 0x...)"),
            ("mark: ^-1", "mark: '-1' is not a mark (expected a number above 0, decimal or 0x...)"),
            ("mark: ^ff", "mark: 'ff' is not a mark (expected a number above 0, decimal or 0x...)"),
            (
                "mark: ^4294967296",
                "mark: '4294967296' is not a mark (expected a number above 0, decimal or 0x...)",
            ),
            (
                "keepalive: ^soon",
                "keepalive: 'soon' is not a duration (expected 500ms, 30s, 5m, 2h, 1d or 1h30m)",
            ),
            ("tls: ^x", "tls must be a mapping of keys to values"),
            ("tls: ^[a]", "tls must be a mapping of keys to values"),
            ("tls: ^{key: k}", "tls.certificate: is missing"),
            ("tls: {insecure: ^yes}", "tls.insecure: 'yes' is not one of true, false"),
            ("tls: {^cert: c}", "tls.cert: unknown key"),
            (
                "tls: {^server-name: n}",
                "tls.server-name: unknown key (did you mean 'server_name'?)",
            ),
        ],
    )
    def test_of_options(self, keys: str, message: str) -> None:
        """`^` is where the error is."""
        before = "default: {url: 'https://h:1', "
        assert errors(f"{before}{keys.replace('^', '')}}}") == [
            f"c.yaml:1:{len(before) + keys.index('^') + 1}: default.{message}"
        ]

    @pytest.mark.parametrize("keys", ["tls: {}", "tls: ''", "tls: "])
    def test_an_empty_mapping_is_none(self, keys: str) -> None:
        assert hop(f"{{url: 'https://h:1', {keys}}}") == HopConfig("https", Address("h", 1))

    def test_a_hop_is_no_group(self) -> None:
        assert wrong("{url: 'http://h:1', members: ['http://h:2']}") == [
            "c.yaml:1:11: default.url: unknown key"
        ]

    @pytest.mark.parametrize("text", ["1_0", "+5", "0b11", "0o17", " 7", "\u0667"])
    def test_a_mark_is_what_it_says_a_mark_is(self, text: str) -> None:
        """HAZARDS 1.2: int() takes more than people mean."""
        assert wrong(f"{{url: 'http://h:1', mark: '{text}'}}") == [
            f"c.yaml:1:36: default.mark: '{text}' is not a mark (expected a number above 0, decimal or 0x...)"
        ]

    def test_an_address_out_of_range_is_no_interface(self) -> None:
        assert wrong("{url: 'http://h:1', bind: 10.0.0.256}") == [
            "c.yaml:1:36: default.bind: '10.0.0.256' is neither an address nor an interface"
        ]

    @pytest.mark.parametrize("name", [".proxy.example", "proxy..example"])
    def test_a_server_name_is_a_name(self, name: str) -> None:
        """What a TLS handshake cannot ask for is said now, not when somebody dials."""
        assert len(wrong(f"{{url: 'https://h:1', tls: {{server_name: '{name}'}}}}")) == 1

    @pytest.mark.parametrize(
        "scheme, tls",
        [
            ("https", True),
            ("socks5+tls", True),
            ("socks5h+tls", True),
            ("http", False),
            ("socks4", False),
            ("socks4a", False),
            ("socks5", False),
            ("socks5h", False),
        ],
    )
    def test_tls_is_for_schemes_that_have_it(self, scheme: str, tls: bool) -> None:
        text = f"{{url: '{scheme}://h:1', tls: {{ca: x}}}}"
        if tls:
            assert hop(text).tls.ca == "x"
        else:
            assert wrong(text) == [
                f"c.yaml:1:10: default.tls: the scheme {scheme} has no TLS (use https or socks5+tls)"
            ]

    @pytest.mark.parametrize("scheme", ["direct", "block"])
    @pytest.mark.parametrize(
        "keys, message",
        [
            ("udp: none", "udp: {} is not a proxy"),
            ("udp: uot", "udp: {} is not a proxy"),
            ("timeout: 1s", "timeout: {} is not a proxy"),
            ("tls: {ca: x}", "tls: the scheme {} has no TLS (use https or socks5+tls)"),
        ],
    )
    def test_what_a_proxy_alone_has(self, scheme: str, keys: str, message: str) -> None:
        assert wrong(f"{{url: {scheme}, {keys}}}") == [
            f"c.yaml:1:10: default.{message.format(scheme)}"
        ]

    @pytest.mark.parametrize(
        "keys, message",
        [
            ("members: []", "10: default.members: names no upstream"),
            (
                "members: nowhere",
                "20: default.members[0]: not an upstream: write scheme://host:port, direct or block",
            ),
            (
                "members: [two, on]",
                "26: default.members[1]: not an upstream: write scheme://host:port, direct or block (did you mean 'one'?)",
            ),
            (
                "members: [one, [two, nowhere]]",
                "32: default.members[1][1]: not an upstream: write scheme://host:port, direct or block",
            ),
            (
                "members: [one, {url: x}]",
                "32: default.members[1].url: not an upstream: write scheme://host:port, direct or block",
            ),
            (
                "members: [{via: x}]",
                "27: default.members[0].via: not an upstream: write scheme://host:port, direct or block",
            ),
            (
                "members: [{via: {url: x}}]",
                "33: default.members[0].via.url: not an upstream: write scheme://host:port, direct or block",
            ),
            (
                "members: [one, two, one]",
                "10: default.members: names one upstream twice: give it a weight instead",
            ),
            (
                "members: ['http://h:1', 'http://h:1/']",
                "10: default.members: names one upstream twice: give it a weight instead",
            ),
            (
                "members: [one], balence: failover",
                "27: default.balence: unknown key (did you mean 'balance'?)",
            ),
            ("members: [one], timeout: 3s", "27: default.timeout: unknown key"),
            (
                "members: [one], balance: failovr",
                "36: default.balance: 'failovr' is not one of round-robin, least-connections, least-latency, hash-client, hash-target, "
                "weighted, failover (did you mean 'failover'?)",
            ),
            (
                "members: [{via: one, weight: 2}]",
                "21: default.members[0].weight: needs balance: weighted",
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
                "50: default.health_check.target: must be host:port with a port between 1 and 65535",
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
                "52: default.health_check.interval: '30' has no unit: write 30s for seconds or 30ms for milliseconds",
            ),
        ],
    )
    def test_of_groups(self, keys: str, message: str) -> None:
        assert wrong(f"{{{keys}}}", NAMES) == [f"c.yaml:1:{message}"]

    def test_an_interval_that_is_too_short_is_told_how_long_it_must_be(self) -> None:
        (said,) = wrong("{members: [one], health_check: {interval: 100ms}}", NAMES)
        assert said.startswith("c.yaml:1:52: default.health_check.interval: ")
        assert "500ms" in said or "0.5" in said

    def test_members_that_are_wrong_are_not_taken_for_the_same(self) -> None:
        said = "not an upstream: write scheme://host:port, direct or block"
        assert wrong("{members: [nowhere, neither]}") == [
            f"c.yaml:1:21: default.members[0]: {said}",
            f"c.yaml:1:30: default.members[1]: {said}",
        ]

    def test_two_accounts_of_one_proxy_are_two_ways_out(self) -> None:
        """Providers of proxies tell their exits apart by the user."""
        assert len(group("{members: ['http://a:1@h:1', 'http://b:2@h:1']}").members) == 2

    def test_places_are_those_of_the_lines(self) -> None:
        assert errors(
            "upstreams:\n  a:\n    url: http://h\n  b:\n    members:\n      - a\n      - http://h:1\n      - via: x\n"
            "        weight: 2\n    balance: weighted\n"
        ) == [
            "c.yaml:3:10: upstreams.a.url: must be host:port with a port between 1 and 65535",
            "c.yaml:8:14: upstreams.b.members[2].via: not an upstream: write scheme://host:port, direct or block",
        ]


class TestFirstHop:
    """What this machine does to reach it; the next one is reached by a proxy."""

    @pytest.mark.parametrize("option", ["bind: eth0", "mark: 1", "keepalive: 5s", "keepalive: 0"])
    def test_may_say_how_it_is_reached(self, option: str) -> None:
        way = default(f"[{{url: 'http://h:1', {option}}}, 'http://h2:2']")
        assert len(way.steps) == 2

    @pytest.mark.parametrize("option", ["bind: eth0", "mark: 1", "keepalive: 5s", "keepalive: 0"])
    @pytest.mark.parametrize(
        "chain",
        [
            "['http://h1:1', {%s}]",
            "['http://h1:1', {members: [{%s}]}]",
            "['http://h1:1', {members: [[{%s}, 'http://h2:2']]}]",
        ],
    )
    def test_alone_may(self, chain: str, option: str) -> None:
        assert wrong(chain % f"url: 'http://h:1', {option}") == [
            "c.yaml:1:10: default[1]: bind, mark and keepalive are for the first hop: this machine dials no other"
        ]

    def test_alone_may_though_it_has_a_name(self) -> None:
        assert errors("upstreams:\n  a: http://h:1?mark=1\n  b: [a, a]\n") == [
            "c.yaml:3:6: upstreams.b[1]: bind, mark and keepalive are for the first hop: this machine dials no other"
        ]

    @pytest.mark.parametrize("option", ["timeout: 5s", "udp: none", "udp: uot"])
    def test_other_options_are_for_all(self, option: str) -> None:
        assert len(default(f"['http://h1:1', {{url: 'http://h:1', {option}}}]").steps) == 2


class TestChains:
    @pytest.mark.parametrize(
        "text, at",
        [
            ("[direct, one]", 0),
            ("[one, direct]", 1),
            ("[one, block]", 1),
            ("[{url: direct, mark: 1}, one]", 0),
        ],
    )
    def test_have_proxies_alone(self, text: str, at: int) -> None:
        scheme = "block" if "block" in text else "direct"
        assert wrong(text, NAMES) == [
            f"c.yaml:1:10: default[{at}]: {scheme} cannot be a hop of a chain"
        ]

    @pytest.mark.parametrize(
        "text", ["[one, {members: [direct, two]}]", "[{members: [direct, one]}, two]"]
    )
    def test_may_leave_out_a_hop_by_a_group(self, text: str) -> None:
        assert len(default(text, NAMES).steps) == 2

    def test_have_a_limit(self) -> None:
        assert (
            len(default("[" + ", ".join(["one"] * CHAIN_LIMIT) + "]", NAMES).steps)
            == CHAIN_LIMIT
            == 16
        )
        assert wrong("[" + ", ".join(["one"] * 17) + "]", NAMES) == [
            "c.yaml:1:10: default: a chain of more than 16 hops"
        ]

    def test_have_a_limit_as_a_whole(self) -> None:
        nine = "upstreams: {nine: [" + ", ".join(["'http://h:1'"] * 9) + "]}"
        assert wrong("[nine, nine]", nine) == ["c.yaml:1:10: default: a chain of more than 16 hops"]

    @pytest.mark.parametrize(
        "text", ["[nine, {members: [nine]}]", "[{members: [nine]}, {members: [nine, direct]}]"]
    )
    def test_have_a_limit_through_groups_as_well(self, text: str) -> None:
        nine = "upstreams: {nine: [" + ", ".join(["'http://h:1'"] * 9) + "]}"
        assert wrong(text, nine) == ["c.yaml:1:10: default: a chain of more than 16 hops"]

    def test_of_chains_grow_no_bomb(self) -> None:
        """HAZARDS 113: each name is read once, and no chain is longer than its limit."""
        urls = ["'http://h:1'", *(f"n{at}" for at in range(19))]
        names = [f"n{at}: [" + ", ".join([url] * 16) + "]" for at, url in enumerate(urls)]
        assert errors("upstreams: {" + ", ".join(names) + "}") == [
            f"c.yaml:1:{_column(names, at)}: upstreams.n{at}: a chain of more than 16 hops"
            for at in range(1, 20)
        ]

    @pytest.mark.parametrize("depth", [50, 600, 5000])
    def test_of_names_may_be_long(self, depth: int) -> None:
        """A name for a name for a name: an error at the most, and never the interpreter's."""
        names = ", ".join(f"n{at}: n{at + 1}" for at in range(depth))
        text = f"upstreams: {{{names}, n{depth}: 'http://h1:1'}}\ndefault: n0"
        if depth < 64:
            assert read(text).default == UpstreamConfig((H1,), "n0")
        else:
            said = re.compile(
                r"c\.yaml:1:\d+: upstreams\.n\d+: names refer to names more than 64 levels deep"
            )
            assert all(said.fullmatch(line) for line in errors(text))

    @pytest.mark.parametrize(
        "url, layers", [("https://h:1", 1), ("socks5+tls://h:1", 1), ("http://h:1", 0)]
    )
    def test_have_a_limit_of_tls(self, url: str, layers: int) -> None:
        assert len(default("[" + ", ".join([f"'{url}'"] * TLS_LIMIT) + "]").steps) == TLS_LIMIT == 3
        four = "[" + ", ".join([f"'{url}'"] * 4) + "]"
        if layers:
            assert wrong(four) == [
                "c.yaml:1:10: default: more than 3 hops with TLS, one inside the other"
            ]
        else:
            assert len(default(four).steps) == 4

    @pytest.mark.parametrize(
        "text",
        [
            "[s, {members: [[s, s, s]]}]",
            "[s, {members: ['http://h:1', [s, s]]}, s]",
            "[{members: [[s, s]]}, {members: [[s, s], direct]}]",
            "[s, s, {members: [{members: [[s, s]]}]}]",
        ],
    )
    def test_have_a_limit_of_tls_through_groups(self, text: str) -> None:
        assert wrong(text, "upstreams: {s: 'https://h:1'}") == [
            "c.yaml:1:10: default: more than 3 hops with TLS, one inside the other"
        ]

    def test_members_of_a_group_are_not_one_within_the_other(self) -> None:
        assert default(
            "[s, {members: [[s, s], 'https://h:2', 'https://h:3', 'https://h:4']}]",
            "upstreams: {s: 'https://h:1'}",
        ).steps


def _column(names: list[str], at: int) -> int:
    """Where the value of a name begins in "upstreams: {NAMES}"."""
    return len("upstreams: {" + ", ".join(names[:at]) + ", ") + len(names[at].partition(" ")[0]) + 2


class TestLoops:
    @pytest.mark.parametrize(
        "upstreams, found",
        [
            ("{a: a}", ["16: upstreams.a"]),
            ("{a: b, b: a}", ["22: upstreams.a"]),
            ("{a: [b], b: [c], c: [a]}", ["33: upstreams.a"]),
            ("{a: {members: [a]}}", ["27: upstreams.a"]),
            ("{a: {members: [a, 'http://h:1']}}", ["27: upstreams.a"]),
            ("{a: {members: [b]}, b: {members: [{via: a}]}}", ["52: upstreams.a"]),
            ("{a: {members: [b]}, b: ['http://h:1', a]}", None),
            ("{a: [a, 'http://h:1']}", None),
        ],
    )
    def test_are_found(self, upstreams: str, found: list[str] | None) -> None:
        said = errors(f"upstreams: {upstreams}")
        assert any(
            line.endswith(": upstreams.a: the upstream refers back to itself") for line in said
        )
        if found:
            assert said == [f"c.yaml:1:{one}: the upstream refers back to itself" for one in found]

    @pytest.mark.parametrize(
        "upstreams, place",
        [
            ("{a: [a, 'http://h:1']}", "17"),
            ("{a: {members: [b]}, b: ['http://h:1', a]}", "50"),
            ("{a: [b, b], b: a}", "27"),
        ],
    )
    def test_are_all_that_is_said_of_them(self, upstreams: str, place: str) -> None:
        """Nobody has written `direct` there."""
        assert errors(f"upstreams: {upstreams}") == [
            f"c.yaml:1:{place}: upstreams.a: the upstream refers back to itself"
        ]

    def test_twice_the_same_is_none(self) -> None:
        assert read("upstreams: {a: b, c: b, b: 'http://h1:1', d: [a, b, c]}").upstreams[
            "d"
        ] == UpstreamConfig((H1, H1, H1), "d")


class TestInsecure:
    @pytest.mark.parametrize(
        "text, path",
        [
            ("default: {url: 'https://h:1', tls: {insecure: true}}", "default.tls"),
            ("default: 'https://h:1?tls.insecure=true'", "default.tls"),
            ("upstreams: {a: 'socks5+tls://h:1?tls.insecure=true'}", "upstreams.a.tls"),
            (
                "default: {members: [{via: {url: 'https://h:1', tls: {insecure: true}}}]}",
                "default.members[0].via.tls",
            ),
            (
                "listeners: [{listen: '127.0.0.1:1', upstream: 'https://h:1?tls.insecure=true'}]",
                "listeners[0].upstream.tls",
            ),
        ],
    )
    def test_is_warned_of(self, text: str, path: str) -> None:
        assert read(text).warnings == (
            f"{path}.insecure: the certificate of h:1 is not checked: any server that answers there can read all traffic",
        )


class TestSecrets:
    """HAZARDS 111."""

    TEXT = """
default: [a, {members: ['http://u:hunter2@h:1', {via: {url: 'http://v:hunter2@h:2', udp: none}, weight: 2}], balance: weighted}]
upstreams: {a: 'socks5+tls://u:hunter2@h:1?tls.insecure=true', b: {members: [a, ['http://w:hunter2@h:1', a]]}}
"""

    def test_are_in_no_repr_and_no_text(self) -> None:
        config: Config = read(self.TEXT)
        shown = [
            repr(config),
            str(config.upstreams),
            *config.warnings,
            config.default.text,
            config.upstreams["b"].text,
        ]
        assert not any("hunter2" in one for one in shown)
        assert hash(config.default) and config.upstreams["b"].steps  # it was there all the same
        first = config.default.steps[0]
        assert isinstance(first, HopConfig) and first.password == "hunter2"

    @pytest.mark.parametrize(
        "text",
        [
            "'http://u:hunter2@h'",
            "'http://u:hunter2@h:0'",
            "'xttp://u:hunter2@h:1'",
            "'u:hunter2@h:1'",
            "'socks4://u:hunter2@h:1'",
            "'socks5://:hunter2@h:1'",
            "{url: 'http://u:hunter2@h'}",
            "{url: 'http://u:hunter2@h:1?udp=none'}",
            "'http://u:hunter2@h:1?x=y'",
            "{url: ['http://u:hunter2@h:1']}",
            "'http://u:hunter2%ff@h:1'",
            "'http://u:hun?ter=hunter2&b@h:1'",
            "['http://u:hunter2@h:1', 'http://u:hunter2@h']",
            "{members: ['http://u:hunter2@h:1', 'http://u:hunter2@h:1']}",
            "{members: [{via: 'http://u:hunter2@h'}]}",
            "direct://u:hunter2@h:1",
            "'http://u:x?hunter2&hunter2@h:1'",
            "'http://u:x?a=1&hunter2=1&hunter2=2@h:1'",
            "'http://u:1?hunter2@h:1'",
            "'http://u:1?a.hunter2@h:1'",
        ],
    )
    def test_are_in_no_error(self, text: str) -> None:
        said = wrong(text)
        assert said and not any("hunter2" in line for line in said)
