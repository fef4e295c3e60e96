"""The codec of SOCKS5, its user/password method and its UDP header, in both roles."""

from __future__ import annotations

import pytest

from netproxy.errors import ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.protocol import socks5
from netproxy.protocol.socks5 import (
    BIND,
    CONNECT,
    NO_ACCEPTABLE,
    NO_AUTHENTICATION,
    UDP_ASSOCIATE,
    USERNAME_PASSWORD,
    RequestError,
    Socks5Request,
)
from tests.support.names import REFUSED_NAMES
from tests.support.readers import check_read, check_refused

LONGEST = b".".join([b"a" * 63, b"a" * 63, b"a" * 63, b"a" * 61])
PACKED6 = b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
MAPPED = b"\0" * 10 + b"\xff\xff\x7f\0\0\1"


def request_for_name(name: bytes, command: int = CONNECT) -> bytes:
    """Return a request for port 80 of a name."""
    return bytes((5, command, 0, 3, len(name))) + name + b"\x00\x50"


ADDRESSES = {
    "IPv4": (Address("192.0.2.1", 80), b"\x01\xc0\0\2\1\x00\x50"),
    "IPv4 unspecified": (Address("0.0.0.0", 0), b"\x01\0\0\0\0\0\0"),
    "IPv6": (Address("2001:db8::1", 65535), b"\x04" + PACKED6 + b"\xff\xff"),
    "IPv6 unspecified": (Address("::", 0), b"\x04" + b"\0" * 18),
    "name": (Address("example.com", 443), b"\x03\x0bexample.com\x01\xbb"),
    "name of one byte": (Address("a", 1), b"\x03\x01a\0\1"),
    "name of 253 bytes": (Address(LONGEST.decode(), 80), b"\x03\xfd" + LONGEST + b"\x00\x50"),
}

REQUESTS = {
    "CONNECT IPv4": (
        b"\5\1\0\1\xc0\0\2\1\x00\x50",
        Socks5Request(CONNECT, Address("192.0.2.1", 80)),
    ),
    "BIND": (b"\5\2\0\1\0\0\0\0\0\0", Socks5Request(BIND, Address("0.0.0.0", 0))),
    "ASSOCIATE": (
        b"\5\3\0\1\0\0\0\0\x04\xd2",
        Socks5Request(UDP_ASSOCIATE, Address("0.0.0.0", 1234)),
    ),
    "CONNECT IPv6": (
        b"\5\1\0\4" + PACKED6 + b"\x00\x50",
        Socks5Request(CONNECT, Address("2001:db8::1", 80)),
    ),
    "CONNECT name": (
        request_for_name(b"Example.COM"),
        Socks5Request(CONNECT, Address("example.com", 80)),
    ),
    "unknown command is left to the handler": (
        b"\5\x7f\0\1\xc0\0\2\1\x00\x50",
        Socks5Request(0x7F, Address("192.0.2.1", 80)),
    ),
    "RSV is not zero": (
        b"\5\1\xff\1\xc0\0\2\1\x00\x50",
        Socks5Request(CONNECT, Address("192.0.2.1", 80)),
    ),
    "name of 253 bytes": (
        request_for_name(LONGEST),
        Socks5Request(CONNECT, Address(LONGEST.decode(), 80)),
    ),
    "name 127.1": (request_for_name(b"127.1"), Socks5Request(CONNECT, Address("127.0.0.1", 80))),
    "name 0x7f.1": (request_for_name(b"0x7f.1"), Socks5Request(CONNECT, Address("127.0.0.1", 80))),
    "name [::1]": (request_for_name(b"[::1]"), Socks5Request(CONNECT, Address("::1", 80))),
    "name ::ffff:127.0.0.1": (
        request_for_name(b"::ffff:127.0.0.1"),
        Socks5Request(CONNECT, Address("127.0.0.1", 80)),
    ),
    "IPv6 v4-mapped": (
        b"\5\1\0\4" + MAPPED + b"\x00\x50",
        Socks5Request(CONNECT, Address("127.0.0.1", 80)),
    ),
    # PySocks and others send rubbish as the address of an ASSOCIATE.
    "ASSOCIATE name 0": (
        request_for_name(b"0", UDP_ASSOCIATE),
        Socks5Request(UDP_ASSOCIATE, Address("0.0.0.0", 80)),
    ),
    "ASSOCIATE name empty": (
        request_for_name(b"", UDP_ASSOCIATE),
        Socks5Request(UDP_ASSOCIATE, Address("0.0.0.0", 80)),
    ),
    "ASSOCIATE name not ASCII": (
        request_for_name(b"\xff\0", UDP_ASSOCIATE),
        Socks5Request(UDP_ASSOCIATE, Address("0.0.0.0", 80)),
    ),
    "ASSOCIATE name of 255 bytes": (
        request_for_name(b"." * 255, UDP_ASSOCIATE),
        Socks5Request(UDP_ASSOCIATE, Address("0.0.0.0", 80)),
    ),
}

CREDENTIALS = {
    "short": (b"\1\1u\1p", (b"u", b"p")),
    "255/255": (b"\1\xff" + b"u" * 255 + b"\xff" + b"p" * 255, (b"u" * 255, b"p" * 255)),
    "any bytes": (b"\1\2\0\xff\2:\n", (b"\0\xff", b":\n")),
}

REFUSED_CREDENTIALS = {
    "version 5": b"\5\1u\1p",
    "version 0": b"\0\1u\1p",
    "ULEN 0": b"\1\0\1p",
    "PLEN 0": b"\1\1u\0",
    "both 0": b"\1\0\0",
}


@pytest.mark.parametrize("methods", [b"\0", b"\2", b"\0\2", bytes(range(255))], ids=len)
def test_server_reads_the_methods_that_the_client_encodes(methods: bytes) -> None:
    data = socks5.encode_methods(methods)
    assert data == bytes((5, len(methods))) + methods
    check_read(socks5.read_methods, data, methods)


def test_greeting_without_methods_is_read_and_answered_ff() -> None:
    """Hazard 3."""
    check_read(socks5.read_methods, b"\5\0", b"")
    assert socks5.encode_method(NO_ACCEPTABLE) == b"\5\xff"


@pytest.mark.parametrize("method", [NO_AUTHENTICATION, USERNAME_PASSWORD, NO_ACCEPTABLE])
def test_client_reads_the_method_that_the_server_encodes(method: int) -> None:
    data = socks5.encode_method(method)
    assert data == bytes((5, method))
    check_read(socks5.read_method, data, method)


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (socks5.read_methods, b"\4\1\0"),
        (socks5.read_method, b"\4\0"),
        (socks5.read_method, b"HT"),
        (socks5.read_request, b"\4\1\0\1\xc0\0\2\1\x00\x50"),
        (socks5.read_reply, b"\1\0\0\1\xc0\0\2\1\x00\x50"),
        (socks5.read_credentials_status, b"\0\0"),
        (socks5.read_credentials_status, b"\2\0"),
    ],
)
def test_other_version_is_refused(read: object, data: bytes) -> None:
    check_refused(read, data, ProtocolError)


@pytest.mark.parametrize(("data", "credentials"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credentials_are_read(data: bytes, credentials: tuple[bytes, bytes]) -> None:
    """Hazard 6."""
    check_read(socks5.read_credentials, data, credentials)


@pytest.mark.parametrize("data", REFUSED_CREDENTIALS.values(), ids=REFUSED_CREDENTIALS)
def test_invalid_credentials_are_refused(data: bytes) -> None:
    """Hazard 6."""
    check_refused(socks5.read_credentials, data, ProtocolError)


@pytest.mark.parametrize(
    ("user", "password"), [("u", "p"), ("u" * 255, "p" * 255), ("grün", "pässwörd"), (" ", ":")]
)
def test_server_reads_the_credentials_that_the_client_encodes(user: str, password: str) -> None:
    check_read(
        socks5.read_credentials,
        socks5.encode_credentials(user, password),
        (user.encode(), password.encode()),
    )


def test_credentials_have_these_bytes() -> None:
    assert socks5.encode_credentials("fred", "käse") == b"\1\4fred\5k\xc3\xa4se"


@pytest.mark.parametrize(
    ("user", "password"),
    [("", "p"), ("u", ""), ("u" * 256, "p"), ("u", "p" * 256), ("ü" * 128, "p")],
)
def test_credentials_that_are_empty_or_too_long_are_not_encoded(user: str, password: str) -> None:
    with pytest.raises(ValueError, match="1 to 255 bytes"):
        socks5.encode_credentials(user, password)


@pytest.mark.parametrize(
    ("data", "accepted"),
    [(b"\1\0", True), (b"\1\1", False), (b"\1\xff", False), (b"\5\0", True), (b"\5\1", False)],
)
def test_status_of_credentials_is_read(data: bytes, accepted: bool) -> None:
    """Servers in use answer with version 5 instead of 1."""
    check_read(socks5.read_credentials_status, data, accepted)


def test_status_of_credentials_is_encoded_with_version_1() -> None:
    """Hazard 6."""
    assert socks5.encode_credentials_status(True) == b"\1\0"
    assert socks5.encode_credentials_status(False) == b"\1\1"


@pytest.mark.parametrize(("data", "request_"), REQUESTS.values(), ids=REQUESTS)
def test_request_is_read_to_its_last_byte(data: bytes, request_: Socks5Request) -> None:
    """Hazards 9, 10 and 11."""
    check_read(socks5.read_request, data, request_)


@pytest.mark.parametrize("address_type", [0, 2, 5, 0xFF])
@pytest.mark.parametrize("command", [CONNECT, BIND, UDP_ASSOCIATE, 9])
def test_unknown_address_type_is_answered_08(address_type: int, command: int) -> None:
    """Hazard 9."""
    check_refused(socks5.read_request, bytes((5, command, 0, address_type)), RequestError, reply=8)


@pytest.mark.parametrize("command", [CONNECT, BIND, 9])
@pytest.mark.parametrize("name", REFUSED_NAMES.values(), ids=REFUSED_NAMES)
def test_invalid_name_is_answered_04(name: bytes, command: int) -> None:
    """Hazard 10."""
    check_refused(socks5.read_request, request_for_name(name, command), RequestError, reply=4)


@pytest.mark.parametrize(("address", "data"), ADDRESSES.values(), ids=ADDRESSES)
def test_address_has_these_bytes_in_every_message(address: Address, data: bytes) -> None:
    assert socks5.encode_address(address) == data
    assert socks5.parse_target(data) == address
    assert socks5.encode_request(CONNECT, address) == b"\5\1\0" + data
    check_read(socks5.read_request, b"\5\1\0" + data, Socks5Request(CONNECT, address))
    assert socks5.encode_reply(5, address) == b"\5\5\0" + data
    check_read(socks5.read_reply, b"\5\5\0" + data, (5, address))


def test_scope_of_a_link_local_address_is_not_encoded() -> None:
    address = b"\x04\xfe\x80" + b"\0" * 13 + b"\1\x04\x38"
    assert socks5.encode_reply(0, Address("fe80::1%2", 1080)) == b"\5\0\0" + address
    assert socks5.encode_header(Address("fe80::1%2", 1080)) == b"\0\0\0" + address


def test_refusals_have_these_bytes() -> None:
    """Hazard 9."""
    for reply, code in (
        (socks5.COMMAND_NOT_SUPPORTED, b"\7"),
        (socks5.ADDRESS_NOT_SUPPORTED, b"\x08"),
    ):
        data = socks5.encode_reply(reply, Address("0.0.0.0", 0))
        assert data == b"\5" + code + b"\0\1\0\0\0\0\0\0"


@pytest.mark.parametrize("name", [b"", b"a b", b"\xff"])
def test_invalid_bound_name_reads_as_unspecified_address(name: bytes) -> None:
    data = bytes((5, 0, 0, 3, len(name))) + name + b"\x00\x50"
    check_read(socks5.read_reply, data, (0, Address("0.0.0.0", 80)))


def test_reply_with_unknown_address_type_is_refused() -> None:
    check_refused(socks5.read_reply, b"\5\0\0\2", RequestError)


def test_every_reason_has_a_reply() -> None:
    """Hazard 14."""
    assert set(socks5.REPLIES) == set(Reason)
    assert set(socks5.REPLIES.values()) <= set(range(1, 9))
    assert socks5.REPLIES[Reason.REFUSED] == 5
    assert socks5.REPLIES[Reason.TIMEOUT] in (4, 6)
    assert socks5.REPLIES[Reason.NETWORK_UNREACHABLE] == 3
    assert socks5.REPLIES[Reason.HOST_UNREACHABLE] == 4
    assert socks5.REPLIES[Reason.NAME] == 4
    assert socks5.REPLIES[Reason.DENIED] == 2


def test_reply_of_an_upstream_is_repeated_to_the_client() -> None:
    assert {reply: socks5.REPLIES[reason] for reply, reason in socks5.REASONS.items()} == {
        2: 2,
        3: 3,
        4: 4,
        5: 5,
        6: 6,
        7: 7,
        8: 7,
    }


@pytest.mark.parametrize(("address", "data"), ADDRESSES.values(), ids=ADDRESSES)
def test_udp_header_is_read_as_it_was_encoded(address: Address, data: bytes) -> None:
    header = socks5.encode_header(address)
    assert header == b"\0\0\0" + data
    assert socks5.header_length(header) == len(header)
    arena = memoryview(b"before" + header + b"payload")
    assert socks5.header_length(arena, 6) == len(header)
    assert socks5.parse_target(bytes(arena[6 + socks5.ATYP_AT : 6 + len(header)])) == address


def test_udp_header_length_by_address_type() -> None:
    assert socks5.header_length(b"\0\0\0\1\0") == socks5.HEADER_IPV4 == 10
    assert socks5.header_length(b"\0\0\0\4\0") == socks5.HEADER_IPV6 == 22
    assert socks5.header_length(b"\0\0\0\3\1") == socks5.HEADER_SHORTEST == 8
    assert socks5.header_length(b"\0\0\0\3\xff") == 262
    for address_type in (0, 2, 5, 0xFF):
        assert socks5.header_length(bytes((0, 0, 0, address_type, 9))) == 0


@pytest.mark.parametrize("name", REFUSED_NAMES.values(), ids=REFUSED_NAMES)
def test_invalid_name_of_a_udp_target_is_refused(name: bytes) -> None:
    """Hazard 10."""
    with pytest.raises(ProtocolError):
        socks5.parse_target(bytes((3, len(name))) + name + b"\x00\x50")


@pytest.mark.parametrize(
    "data", [b"", b"\1", b"\1\x7f\0\0", b"\3", b"\3\5a", b"\4" + b"\0" * 17, b"\x09abcd\0\1"]
)
def test_udp_target_cut_short_or_of_unknown_type_is_refused(data: bytes) -> None:
    """No IndexError passes."""
    with pytest.raises(ProtocolError):
        socks5.parse_target(data)
