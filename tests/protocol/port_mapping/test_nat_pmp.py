"""NAT-PMP in both roles: tables of messages, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies

from netproxy.errors import ProtocolError
from netproxy.protocol.port_mapping.nat_pmp import (
    RESULTS,
    AddressRequest,
    AddressResponse,
    MapRequest,
    MapResponse,
    encode_request,
    encode_response,
    parse_request,
    parse_response,
)

REQUESTS = {
    "address": ("0000", AddressRequest()),
    "UDP": ("0001 0000 0438 9c40 00000e10", MapRequest("udp", 1080, 40000, 3600)),
    "TCP": ("0002 0000 0438 0000 00000e10", MapRequest("tcp", 1080, 0, 3600)),
    "deletion": ("0002 0000 0438 0000 00000000", MapRequest("tcp", 1080, 0, 0)),
}
RESPONSES = {
    "address": ("0080 0000 0000002a cb007105", AddressResponse(0, 42, "203.0.113.5")),
    "UDP": ("0081 0000 0000002a 0438 9c40 00000e10", MapResponse(0, 42, "udp", 1080, 40000, 3600)),
    "TCP": ("0082 0000 0000002a 0438 0438 00000000", MapResponse(0, 42, "tcp", 1080, 1080, 0)),
    "refused": ("0082 0002 0000002a 0438 0000 00000000", MapResponse(2, 42, "tcp", 1080)),
}
READ_RESPONSES = {
    "error with the header alone": ("0081 0005 0000002a", MapResponse(5, 42, "udp")),
    "no address": ("0080 0003 0000002a", AddressResponse(3, 42)),
    "no address, with one": ("0080 0003 0000002a cb007105", AddressResponse(3, 42)),
}
REFUSED_REQUESTS = ["0100", "0003", "0003 0000 0438 0438 00000e10", "0081 0000 0438 0438 00000e10"]
REFUSED_RESPONSES = [
    "0180 0000 0000002a cb007105",
    "0000 0000 0000002a cb007105",
    "0083 0000 0000002a 0438 9c40 00000e10",
    "0281 0000 0000002a 0438 9c40 00000e10",
]


def check_datagram(parse: Any, data: bytes, expected: Any) -> None:
    """Check that `data` is read as `expected`, and not with bytes more or less."""
    assert parse(data) == expected
    for other in (data + b"\0", *(data[:cut] for cut in range(len(data)))):
        # The request for the address is the beginning of no other; errors may be shorter.
        if getattr(expected, "result", 0) and len(other) >= 8:
            continue
        with pytest.raises(ProtocolError):
            parse(other)


@pytest.mark.parametrize(("text", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_as_it_was_written(
    text: str, request_: AddressRequest | MapRequest
) -> None:
    check_datagram(parse_request, bytes.fromhex(text), request_)
    assert encode_request(request_) == bytes.fromhex(text)


@pytest.mark.parametrize(("text", "response"), RESPONSES.values(), ids=RESPONSES)
def test_response_is_read_as_it_was_written(
    text: str, response: AddressResponse | MapResponse
) -> None:
    check_datagram(parse_response, bytes.fromhex(text), response)
    assert encode_response(response) == bytes.fromhex(text)


@pytest.mark.parametrize(("text", "response"), READ_RESPONSES.values(), ids=READ_RESPONSES)
def test_error_of_another_gateway_is_read(
    text: str, response: AddressResponse | MapResponse
) -> None:
    assert parse_response(bytes.fromhex(text)) == response


@pytest.mark.parametrize("text", REFUSED_REQUESTS)
def test_malformed_request_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_request(bytes.fromhex(text))


@pytest.mark.parametrize("text", REFUSED_RESPONSES)
def test_malformed_response_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        parse_response(bytes.fromhex(text))


@pytest.mark.parametrize("host", ["router.example", "2001:db8::1"])
def test_only_ipv4_is_encoded(host: str) -> None:
    with pytest.raises(ValueError, match="IPv4 addresses alone"):
        encode_response(AddressResponse(0, 1, host))


def test_every_result_has_words() -> None:
    assert all(RESULTS[result] for result in range(6))


@given(strategies.binary(max_size=20))
def test_any_datagram_is_parsed_or_refused(data: bytes) -> None:
    for start in (b"", b"\0\x81\0\0", b"\0\x80\0\0", b"\0\1"):
        for parse in (parse_request, parse_response):
            try:
                parse(start + data)
            except ProtocolError:
                pass
