"""The codec of SOCKS4 and SOCKS4a in both roles: bytes read, refused and written."""

from __future__ import annotations

import pytest

from netproxy.errors import EndOfStream, LimitError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import complete
from netproxy.protocol import socks4
from netproxy.protocol.socks4 import (
    BIND,
    CONNECT,
    GRANTED,
    REJECTED,
    RequestError,
    Socks4Request,
    encode_reply,
    encode_request,
    read_reply,
    read_request,
)
from tests.support.readers import BytesReader, check_read, check_refused

HEAD_4A = b"\x04\x01\x00\x50\0\0\0\x01"
LONGEST = b".".join([b"a" * 63, b"a" * 63, b"a" * 63, b"a" * 61])

REQUESTS = {
    "CONNECT": (
        b"\x04\x01\x00\x50\xc0\0\2\1\0",
        Socks4Request(CONNECT, Address("192.0.2.1", 80), b""),
    ),
    "BIND": (
        b"\x04\x02\xff\xff\xc0\0\2\1\0",
        Socks4Request(BIND, Address("192.0.2.1", 65535), b""),
    ),
    "BIND for any peer": (
        b"\x04\x02\x00\x00\0\0\0\0user\0",
        Socks4Request(BIND, Address("0.0.0.0", 0), b"user"),
    ),
    "BIND for any peer as 4a name": (
        b"\x04\x02\x00\x50\0\0\0\1\x000.0.0.0\0",
        Socks4Request(BIND, Address("0.0.0.0", 80), b""),
    ),
    "unknown command is left to the handler": (
        b"\x04\x09\x00\x50\xc0\0\2\1\0",
        Socks4Request(9, Address("192.0.2.1", 80), b""),
    ),
    "user id": (
        b"\x04\x01\x00\x50\xc0\0\2\1fred\0",
        Socks4Request(CONNECT, Address("192.0.2.1", 80), b"fred"),
    ),
    "user id of any bytes": (
        b"\x04\x01\x00\x50\xc0\0\2\1\xff\r\n\0",
        Socks4Request(CONNECT, Address("192.0.2.1", 80), b"\xff\r\n"),
    ),
    "user id of 255 bytes": (
        b"\x04\x01\x00\x50\xc0\0\2\1" + b"u" * 255 + b"\0",
        Socks4Request(CONNECT, Address("192.0.2.1", 80), b"u" * 255),
    ),
    "0.0.1.0 is an address": (
        b"\x04\x01\x00\x50\0\0\1\0\0",
        Socks4Request(CONNECT, Address("0.0.1.0", 80), b""),
    ),
    "4a name": (
        HEAD_4A + b"\0Example.COM\0",
        Socks4Request(CONNECT, Address("example.com", 80), b""),
    ),
    "4a name with 0.0.0.255": (
        b"\x04\x01\x01\xbb\0\0\0\xff\0example.com\0",
        Socks4Request(CONNECT, Address("example.com", 443), b""),
    ),
    "4a user id and name": (
        HEAD_4A + b"fred\0example.com\0",
        Socks4Request(CONNECT, Address("example.com", 80), b"fred"),
    ),
    "4a name of 253 bytes": (
        HEAD_4A + b"\0" + LONGEST + b"\0",
        Socks4Request(CONNECT, Address(LONGEST.decode(), 80), b""),
    ),
    "4a name that is loose IPv4": (
        HEAD_4A + b"\x000x7f.1\0",
        Socks4Request(CONNECT, Address("127.0.0.1", 80), b""),
    ),
    "4a name that is IPv6": (
        HEAD_4A + b"\0[::1]\0",
        Socks4Request(CONNECT, Address("::1", 80), b""),
    ),
    "4a name that is v4-mapped": (
        HEAD_4A + b"\0::ffff:127.0.0.1\0",
        Socks4Request(CONNECT, Address("127.0.0.1", 80), b""),
    ),
}

REFUSED = {
    "0.0.0.0": (b"\x04\x01\x00\x50\0\0\0\0\0", RequestError),
    "0.0.0.0 with an unknown command": (b"\x04\x03\x00\x50\0\0\0\0\0", RequestError),
    "0.0.0.0 as 4a name": (HEAD_4A + b"\x000.0.0.0\0", RequestError),
    "version 5": (b"\x05\x01\x00\x50\xc0\0\2\1\0", ProtocolError),
    "version 0": (b"\x00\x01\x00\x50\xc0\0\2\1\0", ProtocolError),
    "name empty": (HEAD_4A + b"\0\0", RequestError),
    "name of 255 bytes": (HEAD_4A + b"\0" + b".".join([b"a" * 63] * 4) + b"\0", RequestError),
    "name with CRLF": (HEAD_4A + b"\0a\r\nb\0", RequestError),
    "name with space": (HEAD_4A + b"\0a b\0", RequestError),
    "name with two dots": (HEAD_4A + b"\0a..b\0", RequestError),
    "name with label of 64 bytes": (HEAD_4A + b"\0" + b"a" * 64 + b"\0", RequestError),
    "name not ASCII": (HEAD_4A + b"\0b\xc3\xbccher\0", RequestError),
    # All strings are bounded.
    "name of 256 bytes": (HEAD_4A + b"\0" + b"a" * 256 + b"\0", LimitError),
    "user id of 256 bytes": (b"\x04\x01\x00\x50\xc0\0\2\1" + b"u" * 256 + b"\0", LimitError),
}

REPLIES = {
    "granted": (b"\0\x5a\x1f\x90\xc0\0\2\1", GRANTED, Address("192.0.2.1", 8080)),
    "rejected": (b"\0\x5b\0\0\0\0\0\0", REJECTED, Address("0.0.0.0", 0)),
    "no identd": (b"\0\x5c\0\0\0\0\0\0", 0x5C, Address("0.0.0.0", 0)),
}

ROUND_TRIPS = [
    (CONNECT, Address("192.0.2.1", 80), b""),
    (BIND, Address("255.255.255.255", 65535), b"fred"),
    (CONNECT, Address("example.com", 443), b""),
    (CONNECT, Address("example.com", 443), b"fred"),
    (CONNECT, Address("2001:db8::1", 443), b""),
    (CONNECT, Address(LONGEST.decode(), 1), b"u" * 255),
    (CONNECT, Address("0.0.1.0", 1), b""),
    # As an IP address it would read as the mark of a SOCKS4a request.
    (CONNECT, Address("0.0.0.5", 80), b""),
    (CONNECT, Address("0.0.0.255", 80), b"fred"),
]


@pytest.mark.parametrize(("data", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_to_its_last_byte(data: bytes, request_: Socks4Request) -> None:
    """Hazards 9, 11 and 13."""
    check_read(read_request, data, request_)


@pytest.mark.parametrize(("data", "error"), REFUSED.values(), ids=REFUSED)
def test_invalid_request_is_refused(data: bytes, error: type[ProtocolError]) -> None:
    """Hazards 10, 11 and 13."""
    check_refused(read_request, data, error)


def test_user_id_without_end_is_read_up_to_its_limit() -> None:
    """Hazard 12."""
    reader = BytesReader(b"\x04\x01\x00\x50\xc0\0\2\1" + b"u" * 1_000_000, step=1)
    with pytest.raises(LimitError):
        complete(read_request(reader))
    assert reader.taken <= 1024


def test_name_without_end_is_read_up_to_its_limit() -> None:
    """Hazard 12."""
    reader = BytesReader(HEAD_4A + b"\0" + b"a" * 1_000_000, step=1)
    with pytest.raises(LimitError):
        complete(read_request(reader))
    assert reader.taken <= 1024


def test_end_of_stream_within_a_request_is_partial() -> None:
    with pytest.raises(EndOfStream) as caught:
        complete(read_request(BytesReader(b"\x04\x01")))
    assert caught.value.partial


@pytest.mark.parametrize(("data", "code", "bound"), REPLIES.values(), ids=REPLIES)
def test_reply_has_these_bytes_in_both_roles(data: bytes, code: int, bound: Address) -> None:
    assert encode_reply(code, bound) == data
    check_read(read_reply, data, (code, bound))


@pytest.mark.parametrize("host", ["2001:db8::1", "example.com"])
def test_bound_address_that_is_not_ipv4_is_encoded_as_0_0_0_0(host: str) -> None:
    assert encode_reply(GRANTED, Address(host, 80)) == b"\0\x5a\x00\x50\0\0\0\0"


@pytest.mark.parametrize("version", [4, 5])
def test_reply_of_another_version_is_refused(version: int) -> None:
    check_refused(read_reply, bytes((version,)) + b"\x5a\0\0\0\0\0\0", ProtocolError)


def test_request_for_an_ipv4_address_has_these_bytes() -> None:
    assert encode_request(CONNECT, Address("192.0.2.1", 80)) == b"\x04\x01\x00\x50\xc0\0\2\1\0"
    assert (
        encode_request(BIND, Address("192.0.2.1", 80), b"fred")
        == b"\x04\x02\x00\x50\xc0\0\2\1fred\0"
    )


@pytest.mark.parametrize("host", ["example.com", "::1"])
def test_target_that_is_not_ipv4_is_encoded_as_socks4a_name(host: str) -> None:
    assert (
        encode_request(CONNECT, Address(host, 80), b"fred")
        == HEAD_4A + b"fred\0" + host.encode() + b"\0"
    )


@pytest.mark.parametrize(("command", "target", "user_id"), ROUND_TRIPS, ids=str)
def test_server_reads_what_the_client_encodes(
    command: int, target: Address, user_id: bytes
) -> None:
    check_read(
        read_request,
        encode_request(command, target, user_id),
        Socks4Request(command, target, user_id),
    )


def test_every_reason_is_a_rejection() -> None:
    """Hazard 14."""
    assert socks4.REPLIES == {reason: 0x5B for reason in Reason}
