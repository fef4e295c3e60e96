"""PCP in both roles: tables of messages, and what is refused."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from hypothesis import given, strategies

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol.port_mapping.pcp import (
    RESULTS,
    Mapping,
    OtherVersion,
    Request,
    Response,
    encode_request,
    encode_response,
    parse_request,
    parse_response,
)

NONCE = bytes(range(12))
HEAD = "02 01 0000 00000e10 00000000000000000000ffffc0a80107"
WANTED = "000102030405060708090a0b 11 000000 0438 0438 00000000000000000000ffff00000000"
GOT = "000102030405060708090a0b 11 000000 0438 9c40 00000000000000000000ffffcb007105"
UDP = Mapping(NONCE, "udp", 1080, Address("0.0.0.0", 1080))
MAPPED = Mapping(NONCE, "udp", 1080, Address("203.0.113.5", 40000))

REQUESTS = {
    "map of UDP": (HEAD + WANTED, Request("192.168.1.7", 3600, UDP)),
    "map of TCP for IPv6": (
        "02 01 0000 00000078 20010db8000000000000000000000007"
        "000102030405060708090a0b 06 000000 01bb 0000 00000000000000000000000000000000",
        Request("2001:db8::7", 120, Mapping(NONCE, "tcp", 443, Address("::", 0))),
    ),
    "deletion": (
        "02 01 0000 00000000 00000000000000000000ffffc0a80107" + WANTED,
        Request("192.168.1.7", 0, UDP),
    ),
    "announce": ("02 00 0000 00000000 00000000000000000000ffffc0a80107", Request("192.168.1.7")),
}
RESPONSES = {
    "mapped": (
        "02 81 00 00 00000e10 0000002a 000000000000000000000000" + GOT,
        Response(0, 3600, 42, MAPPED),
    ),
    "refused": (
        "02 81 00 02 0000001e 0000002a 000000000000000000000000" + GOT,
        Response(2, 30, 42, MAPPED),
    ),
    "announced": (
        "02 80 00 00 00000000 ffffffff 000000000000000000000000",
        Response(0, 0, 0xFFFFFFFF),
    ),
}
READ_RESPONSES = {
    "error with the header alone": (
        "02 81 00 04 0000001e 00000001 000000000000000000000000",
        Response(4, 30, 1),
    ),
    "reserved fields with values": (
        "02 81 ff 00 00000e10 0000002a ffffffffffffffffffffffff"
        "000102030405060708090a0b 11 ffffff 0438 9c40 00000000000000000000ffffcb007105",
        Response(0, 3600, 42, MAPPED),
    ),
    "option": (
        "02 81 00 00 00000e10 0000002a 000000000000000000000000" + GOT + "02000000",
        Response(0, 3600, 42, MAPPED),
    ),
    "result that is not known yet": (
        "02 81 00 ff 0000001e 00000001 000000000000000000000000",
        Response(255, 30, 1),
    ),
}
REFUSED = {
    "another opcode": "02 03 0000" + "00" * 20,
    "length not a multiple of four": HEAD + WANTED + "00",
    "too long": HEAD + WANTED + "00" * 1044,
    "another protocol": HEAD + WANTED.replace(" 11 ", " 84 "),
}


def check_datagram(parse: Callable[[bytes], Any], data: bytes, expected: object) -> None:
    """Check that `data` is read as `expected`, and not with bytes more or less."""
    assert parse(data) == expected
    longer = (data + b"\0", data + bytes(1104 - len(data)))
    shorter = (data[:cut] for cut in range(len(data)))
    for other in (*longer, *shorter):
        # An error may end with the header, and a request to ANNOUNCE has nothing else.
        if len(other) == 24 and getattr(expected, "result", 0):
            continue
        with pytest.raises(ProtocolError):
            parse(other)


@pytest.mark.parametrize(("text", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_as_it_was_written(text: str, request_: Request) -> None:
    check_datagram(parse_request, bytes.fromhex(text), request_)
    assert encode_request(request_) == bytes.fromhex(text)


@pytest.mark.parametrize(("text", "response"), RESPONSES.values(), ids=RESPONSES)
def test_response_is_read_as_it_was_written(text: str, response: Response) -> None:
    check_datagram(parse_response, bytes.fromhex(text), response)
    assert encode_response(response) == bytes.fromhex(text)


@pytest.mark.parametrize(("text", "response"), READ_RESPONSES.values(), ids=READ_RESPONSES)
def test_response_of_another_server_is_read(text: str, response: Response) -> None:
    assert parse_response(bytes.fromhex(text)) == response


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("is_response", [False, True])
def test_malformed_message_is_refused(text: str, is_response: bool) -> None:
    data = bytearray.fromhex(text)
    if is_response:
        data[1] |= 0x80
        # The result: success.
        data[3] = 0
    with pytest.raises(ProtocolError):
        (parse_response if is_response else parse_request)(bytes(data))


def test_roles_are_not_mixed_up() -> None:
    with pytest.raises(ProtocolError):
        parse_response(encode_request(Request("192.168.1.7", 3600, UDP)))
    with pytest.raises(ProtocolError):
        parse_request(encode_response(Response(0, 3600, 42, MAPPED)))


@pytest.mark.parametrize("text", ["0081 0001 00000001", "0080", "0101 0000" + "00" * 56])
def test_server_of_another_version_is_told_apart(text: str) -> None:
    data = bytes.fromhex(text)
    with pytest.raises(OtherVersion) as caught:
        parse_response(data)
    assert caught.value.version == data[0]


def test_name_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="addresses, not names"):
        encode_request(Request("router.example"))


def test_every_result_has_words() -> None:
    assert all(RESULTS[result] for result in range(14))


@given(strategies.binary(max_size=80))
def test_any_datagram_is_parsed_or_refused(data: bytes) -> None:
    for start in (b"", b"\2\x81\0\0", b"\2\1"):
        for parse in (parse_request, parse_response):
            try:
                parse(start + data)
            except ProtocolError:
                pass
