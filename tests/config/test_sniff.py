"""What a listener looks for in the first bytes: values, defaults and errors."""

from __future__ import annotations

import pytest

from netproxy.config.schema import SERVER_FIRST_PORTS, SniffConfig
from netproxy.daemon.build import build
from netproxy.daemon.runtime import Runtime
from tests.config.reading import errors, read
from tests.support.handlers import RecordingLog
from tests.support.relays import configuration

pytest.importorskip("yaml")

TCP = "protocol: tcp, listen: '127.0.0.1:1', target: 'a.test:1'"
REDIRECT = "protocol: redirect, listen: '127.0.0.1:1'"
BOTH = ("tls", "http")


def sniff(text: str) -> SniffConfig:
    (listener,) = read(f"listeners: [{{{text}}}]").listeners
    return listener.sniff


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("listen: '127.0.0.1:1'", SniffConfig()),
        (TCP, SniffConfig()),
        (f"{TCP}, sniff: tls", SniffConfig(("tls",))),
        (REDIRECT, SniffConfig(BOTH)),
        (f"{REDIRECT}, sniff: []", SniffConfig()),
        (f"{REDIRECT}, sniff: [http], sniff_dial: name", SniffConfig(("http",), by_name=True)),
        (
            f"{REDIRECT}, sniff_except: [25, 8000-8010]",
            SniffConfig(BOTH, (range(25, 26), range(8000, 8011))),
        ),
        (f"{REDIRECT}, sniff_except: []", SniffConfig(BOTH, ())),
    ],
)
def test_values_and_defaults(text: str, expected: SniffConfig) -> None:
    assert sniff(text) == expected


def test_default_leaves_out_protocols_whose_servers_speak_first() -> None:
    skipped = SniffConfig().skipped
    assert skipped == SERVER_FIRST_PORTS
    assert [port in ports for port in (22, 443) for ports in skipped if port in ports] == [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{TCP}, sniff: quic", "sniff[0]: 'quic' is not tls or http"),
        (f"{TCP}, sniff: tls, sniff_dial: host", "sniff_dial: 'host' is not one of address, name"),
        (f"{TCP}, sniff: tls, sniff_dial: name", "sniff_dial: the protocol tcp has a fixed target"),
        (f"{TCP}, sniff_except: 1", "sniff_except: has no meaning without sniff: [tls, http]"),
        (
            f"{REDIRECT}, sniff: [], sniff_dial: name",
            "sniff_dial: has no meaning without sniff: [tls, http]",
        ),
        (f"{REDIRECT}, sniff_except: [9-2]", "sniff_except[0]: '9-2' is not within 1-65535"),
        (f"{REDIRECT}, sniff_except: [0]", "sniff_except[0]: '0' is not within 1-65535"),
        (f"{REDIRECT}, sniff_except: [a]", "sniff_except[0]: 'a' is not a port or a range"),
        (
            "listen: '127.0.0.1:1', sniff: tls",
            "sniff: has no meaning for the protocol sps: only tcp, redirect, tproxy have it",
        ),
    ],
)
def test_mistake_is_named(text: str, message: str) -> None:
    (error,) = errors(f"listeners: [{{{text}}}]")
    assert f"listeners[0].{message}" in error


def test_empty_sni_is_a_mistake() -> None:
    (error,) = errors("rules: [{sni: [], via: direct}]")
    assert "rules[0].sni: is an empty list" in error


def test_rule_by_server_name_needs_a_listener_that_looks_for_it() -> None:
    rule = "rules: [{sni: a.example, via: block}]"
    warning = "rules[0].sni: can never match: no listener has sniff: [tls] or the protocol sni"
    for kinds, expected in (("[tls]", False), ("[http]", True)):
        config = configuration(f"listeners: [{{{TCP}, sniff: {kinds}}}]\n{rule}")
        warnings = build(config, Runtime(RecordingLog()), None).warnings  # type: ignore[arg-type]
        assert any(warning in line for line in warnings) == expected
