"""The field by which a client asks for a direct path."""

from __future__ import annotations

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol.http import connect_udp
from netproxy.protocol.http1 import HttpRequest
from netproxy.protocol.tunnels import wish

PEER = Address("192.0.2.9", 443)


def request(*values: bytes) -> HttpRequest:
    return HttpRequest(b"GET", b"/", 1, [(b"netproxy-direct", value) for value in values])


def test_wish_is_a_field_of_the_request() -> None:
    field = wish.encode_wish(bytes(range(16)))
    assert field == (b"Netproxy-Direct", b"000102030405060708090a0b0c0d0e0f")
    encoded = connect_udp.encode_request(PEER, "proxy.example", more=[field])
    assert b"\r\nNetproxy-Direct: 000102030405060708090a0b0c0d0e0f\r\n" in encoded
    assert wish.parse_wish(request(field[1])) == bytes(range(16))


@pytest.mark.parametrize(
    "values", [(), (b"",), (b"0" * 31,), (b"0" * 33,), (b"x" * 32,), (b"0" * 32, b"0" * 32)]
)
def test_malformed_wish_is_none(values: tuple[bytes, ...]) -> None:
    assert wish.parse_wish(request(*values)) == b""
