"""The first byte of a connection tells its protocol."""

from __future__ import annotations

import string

import pytest

from netproxy.handler.sps import TUNNEL_FIRST, ClientProtocol, detect
from netproxy.protocol import tunnel


@pytest.mark.parametrize(
    ("first", "protocol"),
    [
        (0x04, ClientProtocol.SOCKS4),
        (0x05, ClientProtocol.SOCKS5),
        (0x16, ClientProtocol.TLS),
        (tunnel.MAGIC[0], ClientProtocol.TUNNEL),
        (ord("C"), ClientProtocol.HTTP),
        (ord("g"), ClientProtocol.HTTP),
        (ord("\r"), ClientProtocol.HTTP),
    ],
)
def test_protocol_is_detected_by_its_first_byte(first: int, protocol: ClientProtocol) -> None:
    """Hazard 20."""
    assert detect(first) is protocol


def test_every_letter_begins_an_http_method() -> None:
    assert {detect(ord(letter)) for letter in string.ascii_letters} == {ClientProtocol.HTTP}


def test_every_other_byte_is_unknown() -> None:
    """Hazard 19."""
    known = {0x04, 0x05, 0x16, TUNNEL_FIRST, *map(ord, string.ascii_letters + "\r")}
    assert {detect(first) for first in range(256) if first not in known} == {ClientProtocol.UNKNOWN}
