"""Datagrams of STUN: requests and responses, each written anew and read again."""

from __future__ import annotations

import ipaddress
import struct
import zlib

from netproxy.protocol import stun
from netproxy.protocol.stun import BindingError, BindingSuccess
from tests.fuzz.target import TRAILING, Target, accepted

_HEADER = 20
_COOKIE = b"\x21\x12\xa4\x42"


def _check(data: bytes) -> None:
    request, response = accepted(stun.parse_request, data), accepted(stun.parse_response, data)
    assert request is None or response is None
    message = request or response
    assert stun.is_message(data) or message is None
    if message is None:
        return
    attributes = _attributes(data)
    assert message.transaction == data[8:_HEADER]
    assert message.fingerprint == (0x8028 in dict(attributes))
    if message.fingerprint:
        check = zlib.crc32(data[:-8]) ^ 0x5354554E
        assert attributes[-1] == (0x8028, check.to_bytes(4, "big"))
    assert accepted(stun.parse_request, data + TRAILING) is None
    assert accepted(stun.parse_response, data + TRAILING) is None
    if request is not None:
        assert accepted(stun.parse_request, stun.encode_request(request)) == request
    else:
        assert accepted(stun.parse_response, stun.encode_response(response)) == response
    if isinstance(response, BindingSuccess):
        assert _mapped(data, attributes) == (response.mapped.host, response.mapped.port)
    elif isinstance(response, BindingError):
        assert 300 <= response.code < 700 and response.phrase.isprintable()
    assert message.software.isprintable() and len(message.software) <= stun.TEXT_LIMIT


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    """Return all attributes of a valid message, in the order they have in it."""
    attributes = []
    at = _HEADER
    while at < len(data):
        kind, length = struct.unpack_from(">HH", data, at)
        attributes.append((kind, data[at + 4 : at + 4 + length]))
        at += 4 + -(-length // 4) * 4
    return attributes


def _mapped(data: bytes, attributes: list[tuple[int, bytes]]) -> tuple[str, int]:
    """Return the address and port of a response, with the numbers as RFC 8489 has them."""
    # Behind a MESSAGE-INTEGRITY nothing counts.
    kinds = [kind for kind, _ in attributes]
    ends = [kinds.index(kind) for kind in (0x0008, 0x001C) if kind in kinds]
    first = dict(reversed(attributes[: min(ends, default=len(attributes))]))
    value = first.get(0x0020, first.get(0x0001, b""))
    port, address = int.from_bytes(value[2:4], "big"), int.from_bytes(value[4:], "big")
    if 0x0020 in first:
        port ^= 0x2112
        address ^= int.from_bytes((_COOKIE + data[8:_HEADER])[: len(value) - 4], "big")
    ip = (ipaddress.IPv4Address if len(value) == 8 else ipaddress.IPv6Address)(address)
    return str(getattr(ip, "ipv4_mapped", None) or ip), port


TARGETS = (
    Target(
        "stun",
        _check,
        (
            *(b"\0\1\0\0" + _COOKIE, b"\1\1\0\x0c" + _COOKIE, b"\1\x11\0\x08" + _COOKIE),
            *(b"\0\x20\0\x08\0\1", b"\0\1\0\x08\0\1", b"\0\x20\0\x14\0\2", b"\0\3\0\4\0\0\0\6"),
            *(b"\x80\x28\0\4", b"\x80\x22\0\4", b"\x80\x2b\0\x08\0\1", b"\x80\x2c\0\x08\0\1"),
            *(
                b"\0\x09\0\4\0\0\4\x14",
                b"\0\x0a\0\4",
                b"\0\x26\0\4",
                b"\0\x27\0\2",
                b"\0\x08\0\x14",
            ),
        ),
        1024,
    ),
)
