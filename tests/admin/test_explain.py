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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:80",
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
