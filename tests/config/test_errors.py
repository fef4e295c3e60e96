"""The exact words of errors in a configuration: the place, the mistake, the suggestion."""

from __future__ import annotations

import pytest

from netproxy.config.tree.hints import edit_distance, suggestion
from tests.config.reading import errors

pytest.importorskip("yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        ("listners: []", "c.yaml:1:1: listners: unknown key (did you mean 'listeners'?)"),
        ("xyzzy: 2", "c.yaml:1:1: xyzzy: unknown key"),
        ("<<: {a: b}", "c.yaml:1:1: <<: unknown key"),
        ("log:\n  levle: debug", "c.yaml:2:3: log.levle: unknown key (did you mean 'level'?)"),
        (
            "timeouts: {conect: 1s}",
            "c.yaml:1:12: timeouts.conect: unknown key (did you mean 'connect'?)",
        ),
        ("udp: {batch: auto}", "c.yaml:1:7: udp.batch: unknown key (did you mean 'batching'?)"),
        (
            "users: {a: {password: x, pasword: y}}",
            "c.yaml:1:26: users.a.pasword: unknown key (did you mean 'password'?)",
        ),
        (
            "[1, 2]",
            "c.yaml:1:1: the file must be a mapping of keys to values "
            "(write the keys without '- ' before them)",
        ),
        ("text", "c.yaml:1:1: the file must be a mapping of keys to values"),
        ("log: loud", "c.yaml:1:6: log must be a mapping of keys to values"),
        (
            "users: [a]",
            "c.yaml:1:8: users must be a mapping of keys to values "
            "(write the keys without '- ' before them)",
        ),
        (
            "log: {level: loud}",
            "c.yaml:1:14: log.level: 'loud' is not one of debug, info, warning, error",
        ),
        (
            "log: {level: inof}",
            "c.yaml:1:14: log.level: 'inof' is not one of debug, info, warning, error "
            "(did you mean 'info'?)",
        ),
        ("log: {level: [info]}", "c.yaml:1:14: log.level: must be a single value"),
        ("log: {access: yes}", "c.yaml:1:15: log.access: 'yes' is not one of true, false"),
        (
            "udp: {batching: x}",
            "c.yaml:1:17: udp.batching: 'x' is not one of auto, mmsg, trains, single",
        ),
        (
            "timeouts: {connect: 30}",
            "c.yaml:1:21: timeouts.connect: '30' has no unit: write 30s for seconds or "
            "30ms for milliseconds",
        ),
        (
            "timeouts: {drain: soon}",
            "c.yaml:1:19: timeouts.drain: 'soon' is not a duration (expected 500ms, 30s, "
            "5m, 2h, 1d or 1h30m)",
        ),
        ("timeouts: {handshake: 0}", "c.yaml:1:23: timeouts.handshake: must be longer than 0"),
        ("timeouts: {tcp_idle: 0s}", "c.yaml:1:22: timeouts.tcp_idle: must be longer than 0"),
        ("users: {a: {}}", "c.yaml:1:12: users.a.password: is missing or empty"),
        ("users: {a: {password: ''}}", "c.yaml:1:23: users.a.password: is missing or empty"),
        (
            "users: {'a:b': {password: x}}",
            "c.yaml:1:16: users.a: a user's name has 1 to 255 bytes and no ':'",
        ),
        (
            "users: {a: {password: x, limits: {sessions: -1}}}",
            "c.yaml:1:45: users.a.limits.sessions: '-1' is not a whole number (0 is no limit)",
        ),
        (
            "default: nowhere",
            "c.yaml:1:10: default: 'nowhere' is not an upstream: "
            "write scheme://host:port, direct or block",
        ),
        (
            "default: ofice\nupstreams: {office: direct}",
            "c.yaml:1:10: default: 'ofice' is not an upstream: write scheme://host:port, direct or "
            "block (did you mean 'office'?)",
        ),
        ("default: {a: b}", "c.yaml:1:10: default: needs url, members or command"),
        (
            "upstreams: {a: ['http://h:1', 'sock5://h:1']}",
            "c.yaml:1:31: upstreams.a[1]: 'sock5' is not an upstream scheme (did you mean "
            "'socks5'?)",
        ),
        (
            "upstreams: {a: [direct, 'http://h:1']}",
            "c.yaml:1:16: upstreams.a[0]: direct cannot be a hop of a chain",
        ),
        (
            "upstreams: {a: ['http://h:1', block]}",
            "c.yaml:1:16: upstreams.a[1]: block cannot be a hop of a chain",
        ),
        ("upstreams: {a: a}", "c.yaml:1:16: upstreams.a: the upstream refers back to itself"),
    ],
)
def test_error_of_a_file_has_place_and_words(text: str, message: str) -> None:
    assert errors(text) == [message]


def test_all_errors_of_a_file_are_reported_at_once() -> None:
    assert errors("a: 1\nlog: {level: loud, b: 2}\nlisteners: [{listen: 1, protocol: x}]\n") == [
        "c.yaml:3:35: listeners[0].protocol: 'x' is not one of sps, socks5, http, tcp, "
        "udp, dns, tunnel, redirect, tproxy, sni",
        "c.yaml:3:22: listeners[0].listen: '1' is not an address to listen on (write "
        "127.0.0.1:1 for this machine alone, :1 for every address)",
        "c.yaml:2:14: log.level: 'loud' is not one of debug, info, warning, error",
        "c.yaml:2:20: log.b: unknown key",
        "c.yaml:1:1: a: unknown key",
    ]


@pytest.mark.parametrize(
    "first, second, edits",
    [("", "", 0), ("http", "http", 0), ("htp", "http", 1), ("htpp", "http", 1), ("ssh", "sps", 2)],
)
def test_edit_distance_counts_letters(first: str, second: str, edits: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == edits


@pytest.mark.parametrize(
    "word, hint",
    [
        ("sock5", " (did you mean 'socks5'?)"),
        ("no", " (did you mean 'none'?)"),
        ("ssh", ""),
        ("socks5-over-tls", ""),
    ],
)
def test_suggestion_with_an_edit_limit_needs_a_close_word(word: str, hint: str) -> None:
    known = ("sps", "socks5", "socks5h", "socks5+tls", "none")
    assert suggestion(word, known, 2) == hint


@pytest.mark.parametrize(
    "text, message",
    [
        (
            'log: {level: "a\\nb"}',
            "c.yaml:1:14: log.level: 'a\\nb' is not one of debug, info, warning, error",
        ),
        ('"\\e[31m": x', "c.yaml:1:1: \\x1b[31m: unknown key"),
        ('"a\\u202eb": x', "c.yaml:1:1: a\\u202eb: unknown key"),
    ],
)
def test_error_repeats_what_is_written_on_one_printable_line(text: str, message: str) -> None:
    assert errors(text) == [message]
