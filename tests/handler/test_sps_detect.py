"""The first byte of a connection tells its protocol."""

from __future__ import annotations

import string

import pytest

from netproxy.handler.sps import ClientProtocol, detect
from netproxy.protocol import tunnel


@pytest.mark.parametrize(
    ("first", "speech"),
    [
        (0x04, ClientProtocol.SOCKS4),
        (0x05, ClientProtocol.SOCKS5),
        (0x16, ClientProtocol.TLS),  # HAZARDS 20
        (tunnel.MAGIC[0], ClientProtocol.TUNNEL),
        (ord("C"), ClientProtocol.HTTP),
        (ord("g"), ClientProtocol.HTTP),
    ],
)
def test_protocol_is_known_by_its_first_byte(first: int, speech: ClientProtocol) -> None:
    assert detect(first) is speech


def test_every_letter_begins_a_method() -> None:
    assert {detect(ord(letter)) for letter in string.ascii_letters} == {ClientProtocol.HTTP}


def test_every_other_byte_is_unknown() -> None:  # HAZARDS 19
    known = {0x04, 0x05, 0x16, 0x9E, *map(ord, string.ascii_letters)}
    assert {detect(first) for first in range(256) if first not in known} == {ClientProtocol.UNKNOWN}
