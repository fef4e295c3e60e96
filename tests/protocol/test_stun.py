"""STUN in both roles: the vectors of RFC 5769, tables of messages, and what is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, strategies

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import stun
from netproxy.protocol.stun import (
    BindingError,
    BindingRequest,
    BindingSuccess,
    UnknownAttributes,
    encode_request,
    encode_response,
    is_message,
    parse_request,
    parse_response,
)
from tests.support.readers import TRAILING

ID = bytes.fromhex("b7e7a701bc34d686fa87dfae")
COOKIE = b"\x21\x12\xa4\x42"
USERNAME, PRIORITY, ICE_CONTROLLED, INTEGRITY = 0x0006, 0x0024, 0x8029, 0x0008

# RFC 5769 sections 2.1 to 2.3.
SAMPLE_REQUEST = bytes.fromhex(
    "00010058 2112a442 b7e7a701bc34d686fa87dfae"
    "80220010 5354554e207465737420636c69656e74"
    "00240004 6e0001ff"
    "80290008 932ff9b151263b36"
    "00060009 6576746a3a68367659202020"
    "00080014 9aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004 e57a3bcf"
)
SAMPLE_IPV4 = bytes.fromhex(
    "0101003c 2112a442 b7e7a701bc34d686fa87dfae"
    "8022000b 7465737420766563746f7220"
    "00200008 0001a147e112a643"
    "00080014 2b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004 c07d4c96"
)
SAMPLE_IPV6 = bytes.fromhex(
    "01010048 2112a442 b7e7a701bc34d686fa87dfae"
    "8022000b 7465737420766563746f7220"
    "00200014 0002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014 a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004 c8fb0b4c"
)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)


def message(kind: int, *attributes: bytes) -> bytes:
    body = b"".join(attributes)
    return struct.pack(">HH", kind, len(body)) + COOKIE + ID + body


MAPPED = attribute(0x0001, b"\0\1\x80\x55\xc0\0\2\1")
XORED = attribute(0x0020, bytes.fromhex("0001a147e112a643"))
MAPPED_AT = Address("192.0.2.1", 32853)

REQUESTS = {
    "empty": (message(1), BindingRequest(ID)),
    "change of address": (
        message(1, attribute(3, b"\0\0\0\4")),
        BindingRequest(ID, change_ip=True),
    ),
    "change of port": (message(1, attribute(3, b"\0\0\0\2")), BindingRequest(ID, change_port=True)),
    "change of both": (
        message(1, attribute(3, b"\0\0\0\6")),
        BindingRequest(ID, change_ip=True, change_port=True),
    ),
    "response port": (
        message(1, attribute(0x27, b"\x12\x34")),
        BindingRequest(ID, response_port=0x1234),
    ),
    "padding": (message(1, attribute(0x26, bytes(5))), BindingRequest(ID, padding=5)),
    "software": (message(1, attribute(0x8022, b"a b")), BindingRequest(ID, software="a b")),
    "fingerprint": (
        message(1)[:2] + b"\0\x08" + COOKIE + ID + bytes.fromhex("80280004 fdf6ae02"),
        BindingRequest(ID, fingerprint=True),
    ),
}

RESPONSES = {
    "IPv4": (message(0x101, XORED), BindingSuccess(ID, MAPPED_AT)),
    "IPv6": (
        message(0x101, attribute(0x20, bytes.fromhex("0002a1470113a9faa5d3f179bc25f4b5bed2b9d9"))),
        BindingSuccess(ID, Address("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ),
    "behaviour discovery": (
        message(
            0x101,
            XORED,
            attribute(0x802B, b"\0\1\x0d\x96\xc0\0\2\x0a"),
            attribute(0x802C, b"\0\1\x0d\x97\xc0\0\2\x0b"),
            attribute(0x26, bytes(8)),
            attribute(0x8022, b"server"),
        ),
        BindingSuccess(
            ID, MAPPED_AT, Address("192.0.2.10", 3478), Address("192.0.2.11", 3479), 8, "server"
        ),
    ),
    "error": (
        message(0x111, attribute(9, b"\0\0\4\0Bad Request")),
        BindingError(ID, 400, "Bad Request"),
    ),
    "error without phrase": (message(0x111, attribute(9, b"\0\0\6\x63")), BindingError(ID, 699)),
    "unknown attributes": (
        message(0x111, attribute(9, b"\0\0\4\x14?"), attribute(10, b"\0\x24\0\x25\0\x7f")),
        BindingError(ID, 420, "?", (0x24, 0x25, 0x7F)),
    ),
}

# What is read, but not written so.
READ_REQUESTS = {
    "response port of four bytes": (
        message(1, attribute(0x27, b"\x12\x34\0\0")),
        BindingRequest(ID, response_port=0x1234),
    ),
    "flags that mean nothing": (message(1, attribute(3, b"\xff\xff\xff\xf9")), BindingRequest(ID)),
    "first of two": (
        message(1, attribute(3, b"\0\0\0\4"), attribute(3, b"\0\0\0\2")),
        BindingRequest(ID, change_ip=True),
    ),
    "login": (message(1, attribute(USERNAME, b"alice")), BindingRequest(ID)),
    "behind the integrity": (
        message(1, attribute(INTEGRITY, bytes(20)), attribute(3, b"\0\0\0\4")),
        BindingRequest(ID),
    ),
    "unknown behind the integrity": (
        message(1, attribute(INTEGRITY, bytes(20)), attribute(PRIORITY, bytes(4))),
        BindingRequest(ID),
    ),
    "optional": (message(1, attribute(ICE_CONTROLLED, bytes(8))), BindingRequest(ID)),
    "software with NULs": (
        message(1, attribute(0x8022, b"a\0\0")),
        BindingRequest(ID, software="a"),
    ),
    "software in two lines": (
        message(1, attribute(0x8022, b"a\n\xff\x1b[2J")),
        BindingRequest(ID, software="a\\n\ufffd\\x1b[2J"),
    ),
    "software too long": (
        message(1, attribute(0x8022, b"a" * 763)),
        BindingRequest(ID, software="a" * 127),
    ),
}

READ_RESPONSES = {
    "IPv4 of RFC 5769": (
        SAMPLE_IPV4,
        BindingSuccess(ID, MAPPED_AT, software="test vector", fingerprint=True),
    ),
    "IPv6 of RFC 5769": (
        SAMPLE_IPV6,
        BindingSuccess(
            ID,
            Address("2001:db8:1234:5678:11:2233:4455:6677", 32853),
            software="test vector",
            fingerprint=True,
        ),
    ),
    "MAPPED-ADDRESS alone": (message(0x101, MAPPED), BindingSuccess(ID, MAPPED_AT)),
    "both, of which a router has rewritten the plain one": (
        message(0x101, attribute(1, b"\0\1\0\1\x0a\0\0\1"), XORED),
        BindingSuccess(ID, MAPPED_AT),
    ),
    "server of RFC 3489": (
        message(
            0x101,
            MAPPED,
            attribute(4, b"\0\1\x0d\x96\xc0\0\2\x0a"),
            attribute(5, b"\0\1\x0d\x97\xc0\0\2\x0b"),
            attribute(0x8020, bytes(8)),
        ),
        BindingSuccess(ID, MAPPED_AT, Address("192.0.2.10", 3478), Address("192.0.2.11", 3479)),
    ),
    "IPv4 within IPv6": (
        message(0x101, attribute(1, b"\0\2\0\1" + bytes(10) + b"\xff\xff\xc0\0\2\1")),
        BindingSuccess(ID, Address("192.0.2.1", 1)),
    ),
    "first byte of an address is ignored": (
        message(0x101, attribute(1, b"\xff\1\0\1\xc0\0\2\1")),
        BindingSuccess(ID, Address("192.0.2.1", 1)),
    ),
    "bits before the class of an error": (
        message(0x111, attribute(9, b"\xff\xff\xfc\0")),
        BindingError(ID, 400),
    ),
    "odd list of attributes": (
        message(0x111, attribute(9, b"\0\0\4\x14"), attribute(10, b"\0\x24\0")),
        BindingError(ID, 420, "", (0x24,)),
    ),
}

REFUSED = {
    "nothing": b"",
    "header of another protocol": b"\0\0\0\1\x7f\0\0\1" + bytes(12),
    "two bits of another protocol": b"\x80\1\0\0" + COOKIE + ID,
    "another cookie": message(1)[:4] + b"\x21\x12\xa4\x43" + ID,
    "length not a multiple of four": message(1)[:2] + b"\0\3" + COOKIE + ID + b"abc",
    "length that exceeds the datagram": message(1)[:2] + b"\0\4" + COOKIE + ID,
    "indication": message(0x11),
    "another method": message(0x0003),
    "attribute that exceeds its message": message(1, b"\x80\x22\0\5abcd"),
    "attribute of 65535 bytes": message(1, b"\x80\x22\xff\xff"),
    "wrong fingerprint": SAMPLE_REQUEST[:-1] + b"\xce",
    "fingerprint that is not the last": message(
        1, attribute(0x8028, bytes.fromhex("fdf6ae02")), attribute(0x8022, b"a")
    ),
    "fingerprint of three bytes": message(1, attribute(0x8028, b"abc")),
}
REFUSED_REQUESTS = {
    "change of three bytes": message(1, attribute(3, b"\0\0\4")),
    "response port of one byte": message(1, attribute(0x27, b"\1")),
    "success": message(0x101, XORED),
    "error": message(0x111, attribute(9, b"\0\0\4\0")),
}
REFUSED_RESPONSES = {
    "request": message(1),
    "no address": message(0x101),
    "address of three bytes": message(0x101, attribute(1, b"\0\1\0")),
    "IPv4 of three bytes": message(0x101, attribute(1, b"\0\1\0\1\xc0\0\2")),
    "IPv4 of 16 bytes": message(0x101, attribute(1, b"\0\1\0\1" + bytes(16))),
    "IPv6 of 4 bytes": message(0x101, attribute(1, b"\0\2\0\1" + bytes(4))),
    "unknown family": message(0x101, attribute(1, b"\0\3\0\1" + bytes(4))),
    "empty XORed address beside a plain one": message(0x101, attribute(0x20, b""), MAPPED),
    "other address malformed": message(0x101, XORED, attribute(0x802C, b"\0\1")),
    "origin malformed": message(0x101, XORED, attribute(0x802B, b"")),
    "error without code": message(0x111),
    "error of three bytes": message(0x111, attribute(9, b"\0\0\4")),
    "error 200": message(0x111, attribute(9, b"\0\0\2\0")),
    "error 700": message(0x111, attribute(9, b"\0\0\7\0")),
    "error 4 and 100": message(0x111, attribute(9, b"\0\0\4\x64")),
}


def check_datagram(parse: object, data: bytes, expected: object) -> None:
    """Check that `data` is read as `expected`, and not with bytes more or less."""
    assert parse(data) == expected  # type: ignore[operator]
    assert is_message(data) and is_message(memoryview(data)) and is_message(bytearray(data))
    for other in (data + TRAILING, data + bytes(4), *(data[:cut] for cut in range(len(data)))):
        with pytest.raises(ProtocolError):
            parse(other)  # type: ignore[operator]
        assert not is_message(other)


@pytest.mark.parametrize(("data", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_as_it_was_written(data: bytes, request_: BindingRequest) -> None:
    check_datagram(parse_request, data, request_)
    assert encode_request(request_) == data


@pytest.mark.parametrize(("data", "response"), RESPONSES.values(), ids=RESPONSES)
def test_response_is_read_as_it_was_written(
    data: bytes, response: BindingSuccess | BindingError
) -> None:
    check_datagram(parse_response, data, response)
    assert encode_response(response) == data


@pytest.mark.parametrize(("data", "request_"), READ_REQUESTS.values(), ids=READ_REQUESTS)
def test_request_of_other_programs_is_read(data: bytes, request_: BindingRequest) -> None:
    check_datagram(parse_request, data, request_)


@pytest.mark.parametrize(("data", "response"), READ_RESPONSES.values(), ids=READ_RESPONSES)
def test_response_of_other_programs_is_read(
    data: bytes, response: BindingSuccess | BindingError
) -> None:
    check_datagram(parse_response, data, response)


def test_request_of_rfc_5769_has_an_attribute_of_ice() -> None:
    """Its fingerprint is right, but a server without ICE does not know PRIORITY."""
    with pytest.raises(UnknownAttributes) as caught:
        parse_request(SAMPLE_REQUEST)
    assert (caught.value.transaction, caught.value.attributes) == (ID, (PRIORITY,))
    answer = encode_response(BindingError(ID, 420, "Unknown Attribute", caught.value.attributes))
    assert parse_response(answer) == BindingError(ID, 420, "Unknown Attribute", (PRIORITY,))


@pytest.mark.parametrize(
    "data", [*REFUSED.values(), *REFUSED_REQUESTS.values()], ids=[*REFUSED, *REFUSED_REQUESTS]
)
def test_invalid_request_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_request(data)
    assert not isinstance(caught.value, UnknownAttributes)


@pytest.mark.parametrize(
    "data", [*REFUSED.values(), *REFUSED_RESPONSES.values()], ids=[*REFUSED, *REFUSED_RESPONSES]
)
def test_invalid_response_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_response(data)
    assert not isinstance(caught.value, UnknownAttributes)


def test_each_unknown_attribute_is_named_once() -> None:
    required = [attribute(kind, b"") for kind in (0x7FFF, 0x24, 0x7FFF, 0x25, 0x26)]
    with pytest.raises(UnknownAttributes, match="0x7fff, 0x0024, 0x0025$") as caught:
        parse_request(message(1, *required))
    assert caught.value.attributes == (0x7FFF, 0x24, 0x25)
    with pytest.raises(UnknownAttributes) as caught:
        parse_response(message(0x101, XORED, *required))
    assert caught.value.attributes == (0x7FFF, 0x24, 0x25)


def test_fingerprint_behind_the_integrity_is_verified() -> None:
    """It is the only attribute there that counts (RFC 8489 section 14.5)."""
    assert parse_response(SAMPLE_IPV4).fingerprint
    for at in range(len(SAMPLE_IPV4)):
        changed = bytearray(SAMPLE_IPV4)
        changed[at] ^= 1
        if at in (len(changed) - 8, len(changed) - 7):
            # The attribute has another type: it is skipped.
            assert not parse_response(bytes(changed)).fingerprint
            continue
        with pytest.raises(ProtocolError):
            parse_response(bytes(changed))


def test_what_does_not_fit_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="not names"):
        encode_response(BindingSuccess(ID, Address("stun.example", 3478)))
    with pytest.raises(ValueError, match="127 characters"):
        encode_request(BindingRequest(ID, software="a" * 128))
    with pytest.raises(ValueError, match="PADDING"):
        encode_request(BindingRequest(ID, padding=stun.PADDING_LIMIT + 1))
    longest = BindingRequest(ID, padding=stun.PADDING_LIMIT, software="\U0001f600" * 127)
    assert parse_request(encode_request(longest)) == longest
    assert len(encode_request(longest)) <= 65507


def test_constants_have_the_values_of_the_rfcs() -> None:
    assert (stun.PORT, stun.COOKIE, stun.HEADER_SIZE) == (3478, COOKIE, 20)
    assert (stun.REQUEST, stun.INDICATION, stun.SUCCESS, stun.ERROR) == (1, 0x11, 0x101, 0x111)
    assert set(stun.PHRASES) == {400, 420, 500}


hosts = strategies.one_of(strategies.ip_addresses(v=4), strategies.ip_addresses(v=6)).map(
    lambda ip: str(getattr(ip, "ipv4_mapped", None) or ip)
)
addresses = strategies.builds(Address, hosts, strategies.integers(0, 65535))


@given(strategies.binary(min_size=12, max_size=12), addresses, addresses, strategies.booleans())
def test_any_addresses_are_read_back(
    transaction: bytes, mapped: Address, other: Address, fingerprint: bool
) -> None:
    response = BindingSuccess(transaction, mapped, None, other, fingerprint=fingerprint)
    assert parse_response(encode_response(response)) == response
