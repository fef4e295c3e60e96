"""Flows as people write them for --explain."""

from __future__ import annotations

import pytest

from netproxy.admin.explain import FlowError, parse_flow
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow


def test_flow_is_parsed() -> None:
    assert parse_flow("udp alice@192.168.1.5 -> Example.COM:443 on main", "other") == Flow(
        "udp", Address("192.168.1.5", 0), Address("example.com", 443), "main", "alice"
    )


def test_only_the_target_must_be_given() -> None:
    assert parse_flow("-> 10.0.0.1:80", "main") == Flow(
        "tcp", Address("127.0.0.1", 0), Address("10.0.0.1", 80), "main", ""
    )


@pytest.mark.parametrize("text", ["10.0.0.1:80", " 10.0.0.1:80 ", "tcp 10.0.0.1:80"])
def test_target_alone_is_a_flow(text: str) -> None:
    assert parse_flow(text, "main") == parse_flow("-> 10.0.0.1:80", "main")


def test_target_without_an_arrow_takes_a_network_and_a_listener() -> None:
    assert parse_flow("udp b.example:53 on guests", "main") == Flow(
        "udp", Address("127.0.0.1", 0), Address("b.example", 53), "guests", ""
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:65536",
        "a b:80",
        "alice@a:80",
        "a->b:80",
        "-> a",
        "-> a:65536",
        "-> a b:80",
        "-> a\0b:80",
        # Bytes of an argument that are not UTF-8, and an escape of half a character in JSON.
        "-> \udcff:80",
        "10\ud800.0.0.1 -> a:80",
        "-> a:\uff18\uff10",
    ],
)
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(FlowError):
        parse_flow(text, "main")
