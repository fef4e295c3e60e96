"""Upstreams in the file: names, chains and loops; the place and words of every error."""

from __future__ import annotations

import re

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.config.sections.upstreams import CHAIN_LIMIT, TLS_LIMIT
from tests.config.reading import H1, H2, H3, NAMES, ONE, TWO, default, default_errors, errors, read

pytest.importorskip("yaml")

LOOP = "the upstream refers back to itself"
TOO_LONG = "c.yaml:1:10: default: a chain of more than 16 hops"
TOO_MUCH_TLS = "c.yaml:1:10: default: more than 3 hops with TLS, one inside the other"
FIRST_HOP_ONLY = "bind, mark and keepalive are for the first hop: this machine dials no other"


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
    def test_upstream_names_are_used_in_chains(self, text: str, expected: UpstreamConfig) -> None:
        assert default(text, NAMES) == expected

    @pytest.mark.parametrize(
        "order", ["one, two, both, alias", "alias, both, two, one", "both, alias, one, two"]
    )
    def test_upstream_name_may_be_used_before_it_is_defined(self, order: str) -> None:
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

    @pytest.mark.parametrize("name", ["block", "direct", "auto"])
    def test_word_with_a_meaning_is_no_upstream_name(self, name: str) -> None:
        assert errors(f"upstreams: {{a: direct, {name}: direct}}") == [
            f"c.yaml:1:24: upstreams: '{name}' is a reserved word (choose another name)"
        ]

    @pytest.mark.parametrize("name", ["http://h:1", "a b", "a\\tb", "a\\u00a0b", "a\\e[0m"])
    def test_upstream_name_has_no_spaces_and_is_no_url(self, name: str) -> None:
        (message,) = errors(f'upstreams: {{"{name}": direct}}')
        assert message.startswith("c.yaml:1:13: upstreams: '")
        assert message.endswith(
            "' is not a name (it takes no spaces, no control characters and no '://')"
        )

    def test_upstream_name_is_not_empty(self) -> None:
        assert errors("upstreams: {'': direct}") == ["c.yaml:1:13: upstreams: a name is empty"]

    @pytest.mark.parametrize("name", ["blocked", "Ünïcode", "a.b-c_d", "10.0.0.1:1"])
    def test_other_upstream_names_are_accepted(self, name: str) -> None:
        assert list(read(f"upstreams: {{'{name}': direct}}").upstreams) == [name]

    def test_listener_uses_upstream_names(self) -> None:
        config = read(
            "listeners: [{listen: '127.0.0.1:1', upstream: [one, two]}, "
            "{listen: '127.0.0.1:2', upstream: two}]\n" + NAMES
        )
        assert [listener.upstream for listener in config.listeners] == [
            UpstreamConfig((H1, H2)),
            TWO,
        ]

    def test_error_in_a_named_upstream_is_reported_once(self) -> None:
        assert default_errors(
            "[a, a]",
            "upstreams: {a: nowhere, b: a}\nlisteners: [{listen: '127.0.0.1:1', upstream: a}]",
        ) == [
            "c.yaml:2:16: upstreams.a: 'nowhere' is not an upstream: "
            "write scheme://host:port, direct or block"
        ]

    def test_warning_of_a_named_upstream_is_given_once(self) -> None:
        config = read("default: [a, a]\nupstreams: {a: 'https://h:1?tls.insecure=true', b: a}")
        assert len(config.warnings) == 1


class TestText:
    """The text of an upstream stands in logs."""

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
    def test_upstream_text_has_the_hops_in_order(self, text: str, shown: str) -> None:
        assert default(text, NAMES).text == shown


class TestFirstHop:
    """This machine dials only the first hop: socket options are for it alone."""

    @pytest.mark.parametrize("option", ["bind: eth0", "mark: 1", "keepalive: 5s", "keepalive: 0"])
    def test_first_hop_takes_socket_options(self, option: str) -> None:
        upstream = default(f"[{{url: 'http://h:1', {option}}}, 'http://h2:2']")
        assert len(upstream.steps) == 2

    @pytest.mark.parametrize("option", ["bind: eth0", "mark: 1", "keepalive: 5s", "keepalive: 0"])
    @pytest.mark.parametrize(
        "chain",
        [
            "['http://h1:1', {%s}]",
            "['http://h1:1', {members: [{%s}]}]",
            "['http://h1:1', {members: [[{%s}, 'http://h2:2']]}]",
        ],
    )
    def test_later_hop_refuses_socket_options(self, chain: str, option: str) -> None:
        assert default_errors(chain % f"url: 'http://h:1', {option}") == [
            f"c.yaml:1:10: default[1]: {FIRST_HOP_ONLY}"
        ]

    def test_later_hop_with_a_name_refuses_socket_options(self) -> None:
        assert errors("upstreams:\n  a: http://h:1?mark=1\n  b: [a, a]\n") == [
            f"c.yaml:3:6: upstreams.b[1]: {FIRST_HOP_ONLY}"
        ]

    @pytest.mark.parametrize("option", ["timeout: 5s", "udp: none", "udp: uot"])
    def test_later_hop_takes_other_options(self, option: str) -> None:
        assert len(default(f"['http://h1:1', {{url: 'http://h:1', {option}}}]").steps) == 2


class TestChains:
    @pytest.mark.parametrize(
        "text, index",
        [
            ("[direct, one]", 0),
            ("[one, direct]", 1),
            ("[one, block]", 1),
            ("[{url: direct, mark: 1}, one]", 0),
        ],
    )
    def test_chain_refuses_direct_and_block(self, text: str, index: int) -> None:
        scheme = "block" if "block" in text else "direct"
        assert default_errors(text, NAMES) == [
            f"c.yaml:1:10: default[{index}]: {scheme} cannot be a hop of a chain"
        ]

    @pytest.mark.parametrize(
        "text", ["[one, {members: [direct, two]}]", "[{members: [direct, one]}, two]"]
    )
    def test_chain_accepts_a_group_with_direct(self, text: str) -> None:
        assert len(default(text, NAMES).steps) == 2

    def test_chain_above_the_limit_is_refused(self) -> None:
        longest = default("[" + ", ".join(["one"] * CHAIN_LIMIT) + "]", NAMES)
        assert len(longest.steps) == CHAIN_LIMIT == 16
        assert default_errors("[" + ", ".join(["one"] * 17) + "]", NAMES) == [TOO_LONG]

    def test_chain_of_chains_above_the_limit_is_refused(self) -> None:
        nine = "upstreams: {nine: [" + ", ".join(["'http://h:1'"] * 9) + "]}"
        assert default_errors("[nine, nine]", nine) == [TOO_LONG]

    @pytest.mark.parametrize(
        "text", ["[nine, {members: [nine]}]", "[{members: [nine]}, {members: [nine, direct]}]"]
    )
    def test_chain_with_groups_above_the_limit_is_refused(self, text: str) -> None:
        nine = "upstreams: {nine: [" + ", ".join(["'http://h:1'"] * 9) + "]}"
        assert default_errors(text, nine) == [TOO_LONG]

    def test_chains_of_chains_are_read_once(self) -> None:
        """Hazard 113: each name is read once, and no chain is longer than its limit."""
        urls = ["'http://h:1'", *(f"n{index}" for index in range(19))]
        names = [f"n{index}: [" + ", ".join([url] * 16) + "]" for index, url in enumerate(urls)]
        assert errors("upstreams: {" + ", ".join(names) + "}") == [
            f"c.yaml:1:{_column(names, index)}: upstreams.n{index}: a chain of more than 16 hops"
            for index in range(1, 20)
        ]

    @pytest.mark.parametrize("depth", [50, 600, 5000])
    def test_long_line_of_names_is_read_or_refused(self, depth: int) -> None:
        """A long line of names never reaches the recursion limit of the interpreter."""
        names = ", ".join(f"n{index}: n{index + 1}" for index in range(depth))
        text = f"upstreams: {{{names}, n{depth}: 'http://h1:1'}}\ndefault: n0"
        if depth < 64:
            assert read(text).default == UpstreamConfig((H1,), "n0")
        else:
            expected = re.compile(
                r"c\.yaml:1:\d+: upstreams\.n\d+: names refer to names more than 64 levels deep"
            )
            assert all(expected.fullmatch(line) for line in errors(text))

    @pytest.mark.parametrize(
        "url, layers", [("https://h:1", 1), ("socks5+tls://h:1", 1), ("http://h:1", 0)]
    )
    def test_chain_with_too_many_tls_hops_is_refused(self, url: str, layers: int) -> None:
        assert len(default("[" + ", ".join([f"'{url}'"] * TLS_LIMIT) + "]").steps) == TLS_LIMIT == 3
        four = "[" + ", ".join([f"'{url}'"] * 4) + "]"
        if layers:
            assert default_errors(four) == [TOO_MUCH_TLS]
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
    def test_chain_with_too_many_tls_hops_in_groups_is_refused(self, text: str) -> None:
        assert default_errors(text, "upstreams: {s: 'https://h:1'}") == [TOO_MUCH_TLS]

    def test_tls_of_group_members_is_not_added_up(self) -> None:
        assert default(
            "[s, {members: [[s, s], 'https://h:2', 'https://h:3', 'https://h:4']}]",
            "upstreams: {s: 'https://h:1'}",
        ).steps


def _column(names: list[str], index: int) -> int:
    """Return the column where the value of a name begins in "upstreams: {NAMES}"."""
    before = "upstreams: {" + ", ".join(names[:index]) + ", "
    return len(before) + len(names[index].partition(" ")[0]) + 2


class TestLoops:
    @pytest.mark.parametrize(
        "upstreams, places",
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
    def test_loop_of_upstreams_is_refused(self, upstreams: str, places: list[str] | None) -> None:
        lines = errors(f"upstreams: {upstreams}")
        assert any(line.endswith(f": upstreams.a: {LOOP}") for line in lines)
        if places:
            assert lines == [f"c.yaml:1:{place}: {LOOP}" for place in places]

    @pytest.mark.parametrize(
        "upstreams, place",
        [
            ("{a: [a, 'http://h:1']}", "17"),
            ("{a: {members: [b]}, b: ['http://h:1', a]}", "50"),
            ("{a: [b, b], b: a}", "27"),
        ],
    )
    def test_loop_of_upstreams_is_the_only_error(self, upstreams: str, place: str) -> None:
        """What stands for the upstream in error is not checked as a hop of the chain."""
        assert errors(f"upstreams: {upstreams}") == [f"c.yaml:1:{place}: upstreams.a: {LOOP}"]

    def test_upstream_named_twice_is_not_a_loop(self) -> None:
        upstreams = read("upstreams: {a: b, c: b, b: 'http://h1:1', d: [a, b, c]}").upstreams
        assert upstreams["d"] == UpstreamConfig((H1, H1, H1), "d")

    def test_branching_loop_ends_with_few_errors(self) -> None:
        """Hazard 113: each name is read once, so that few names do not give many errors."""
        assert len(errors("upstreams: {a: [" + ", ".join("a" * 12) + "]}")) < 100

    def test_chain_of_names_is_not_a_loop(self) -> None:
        text = "n0: ['http://h1:1'], n1: [n0], n2: [n1], n3: [n2], n4: [n3]"
        assert read(f"upstreams: {{{text}}}").upstreams["n4"] == UpstreamConfig((H1,), "n4")


class TestSecrets:
    """Hazard 111: a password is in no message."""

    TEXT = """
default:
  - a
  - members:
      - http://u:hunter2@h:1
      - {via: {url: 'http://v:hunter2@h:2', udp: none}, weight: 2}
    balance: weighted
upstreams:
  a: socks5+tls://u:hunter2@h:1?tls.insecure=true
  b: {members: [a, ['http://w:hunter2@h:1', a]]}
"""

    def test_passwords_are_not_in_repr_or_text(self) -> None:
        config = read(self.TEXT)
        shown = [
            repr(config),
            str(config.upstreams),
            *config.warnings,
            config.default.text,
            config.upstreams["b"].text,
        ]
        assert not any("hunter2" in text for text in shown)
        assert hash(config.default) and config.upstreams["b"].steps
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
    def test_passwords_are_not_in_errors(self, text: str) -> None:
        lines = default_errors(text)
        assert lines and not any("hunter2" in line for line in lines)


def test_upstream_errors_have_their_lines() -> None:
    assert errors("""
upstreams:
  a:
    url: http://h
  b:
    members:
      - a
      - http://h:1
      - via: x
        weight: 2
    balance: weighted
""") == [
        "c.yaml:4:10: upstreams.a.url: must be host:port with a port between 1 and 65535",
        "c.yaml:9:14: upstreams.b.members[2].via: 'x' is not an upstream: "
        "write scheme://host:port, "
        "direct or block",
    ]
