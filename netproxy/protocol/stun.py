"""STUN's Binding (RFC 8489) and the attributes of NAT behaviour discovery (RFC 5780), both roles.

One datagram is one message.  There is no authentication: attributes of it are skipped.
Parsers refuse a message whose lengths or fingerprint are wrong, or that has an unknown
attribute which must be understood.  Who sends requests has to try again (section 6.2.1),
and to compare the source and the transaction ID of what comes.  No I/O.  Thread: any.
"""

from __future__ import annotations

import binascii
import struct

from netproxy.errors import ProtocolError, printable
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.typed import NamedTuple, Sequence

PORT = 3478
"""The port of a server unless another one is given (RFC 8489 section 18.6)."""
HEADER_SIZE, TRANSACTION_SIZE = 20, 12
COOKIE = b"\x21\x12\xa4\x42"
# Message types: the method Binding with each class (RFC 8489 section 5).
REQUEST, INDICATION, SUCCESS, ERROR = 0x0001, 0x0011, 0x0101, 0x0111
# Attributes (RFC 8489 section 18.3, RFC 5780 section 9.1).  The lower half must be understood.
MAPPED_ADDRESS, CHANGE_REQUEST, MESSAGE_INTEGRITY, ERROR_CODE = 0x0001, 0x0003, 0x0008, 0x0009
UNKNOWN_ATTRIBUTES, XOR_MAPPED_ADDRESS, PADDING, RESPONSE_PORT = 0x000A, 0x0020, 0x0026, 0x0027
MESSAGE_INTEGRITY_SHA256 = 0x001C
SOFTWARE, FINGERPRINT, RESPONSE_ORIGIN, OTHER_ADDRESS = 0x8022, 0x8028, 0x802B, 0x802C
# RFC 3489 sections 11.2.3 and 11.2.4: the names before RFC 5780 of the last two.
SOURCE_ADDRESS, CHANGED_ADDRESS = 0x0004, 0x0005
# Flags of CHANGE-REQUEST.
CHANGE_IP, CHANGE_PORT = 4, 2
# Error codes.
BAD_REQUEST, UNKNOWN_ATTRIBUTE, SERVER_ERROR = 400, 420, 500
PHRASES = {
    BAD_REQUEST: "Bad Request",
    UNKNOWN_ATTRIBUTE: "Unknown Attribute",
    SERVER_ERROR: "Server Error",
}

TEXT_LIMIT = 127
"""Characters of SOFTWARE and of a reason phrase (RFC 8489 sections 14.8 and 14.14)."""
PADDING_LIMIT = 64000
"""Bytes of PADDING: more may not fit in a datagram beside the other attributes."""

_HEADER = struct.Struct(">HH4s12s")
_ATTRIBUTE = struct.Struct(">HH")
_OPTIONAL = 0x8000
_FINGERPRINT_SIZE = 8
_FINGERPRINT_MASK = 0x5354554E
_FAMILIES = {4: 1, 16: 2}
_SIZES = {family: size for size, family in _FAMILIES.items()}
_NO_MASK = bytes(16)
# USERNAME, MESSAGE-INTEGRITY, REALM, NONCE and their like: of no use without a password.
_AUTHENTICATION = {0x0006, MESSAGE_INTEGRITY, 0x0014, 0x0015, MESSAGE_INTEGRITY_SHA256}
_AUTHENTICATION |= {0x001D, 0x001E}
_OF_REQUESTS = _AUTHENTICATION | {CHANGE_REQUEST, PADDING, RESPONSE_PORT}
# 0x000B is REFLECTED-FROM of RFC 3489.
_OF_RESPONSES = _AUTHENTICATION | {MAPPED_ADDRESS, XOR_MAPPED_ADDRESS, ERROR_CODE, PADDING}
_OF_RESPONSES |= {UNKNOWN_ATTRIBUTES, SOURCE_ADDRESS, CHANGED_ADDRESS, 0x000B}


class BindingRequest(NamedTuple):
    """Asks a server for the address that it sees."""

    transaction: bytes
    """12 random bytes, so that nobody else can write the answer."""
    change_ip: bool = False
    """True if the answer is to come from the server's other address."""
    change_port: bool = False
    """True if the answer is to come from the server's other port."""
    response_port: int = 0
    """The port of the client that the answer is to go to; 0 for the source of the request."""
    padding: int = 0
    """Bytes of PADDING, which the answer is to have too; 0 for none."""
    software: str = ""
    fingerprint: bool = False


class BindingSuccess(NamedTuple):
    """Tells a client the address that its request came from."""

    transaction: bytes
    mapped: Address
    origin: Address | None = None
    """Where the server has sent this from."""
    other: Address | None = None
    """The server's other address and port; None if it cannot answer from there."""
    padding: int = 0
    software: str = ""
    fingerprint: bool = False


class BindingError(NamedTuple):
    """Refuses a request."""

    transaction: bytes
    code: int
    """300 to 699, as HTTP's."""
    phrase: str = ""
    unknown: tuple[int, ...] = ()
    """The attributes that code 420 is about."""
    software: str = ""
    fingerprint: bool = False


class UnknownAttributes(ProtocolError):
    """A message has attributes that must be understood, and are not.

    A server answers such a request with `BindingError(transaction, 420, ..., attributes)`.
    """

    def __init__(self, transaction: bytes, attributes: Sequence[int]) -> None:
        names = ", ".join(f"0x{attribute:04x}" for attribute in attributes[:3])
        super().__init__(f"unknown attributes of STUN that must be understood: {names}")
        self.transaction = transaction
        self.attributes = tuple(attributes)


def is_message(datagram: bytes | bytearray | memoryview) -> bool:
    """Return whether a datagram can be of STUN, where others come too (RFC 8489 section 6.3)."""
    size = len(datagram)
    return (
        size >= HEADER_SIZE
        and datagram[0] < 0x40
        and datagram[4:8] == COOKIE
        and int.from_bytes(datagram[2:4], "big") == size - HEADER_SIZE
        and size % 4 == 0
    )


# Header (RFC 8489 section 5), before any number of attributes (section 14).
# +------+--------+--------+----------------+      +------+--------+----------------+-------+
# | Type | Length | Cookie | Transaction ID |      | Type | Length | Value (Length) | 0...3 |
# |  2   |   2    |   4    |       12       |      |  2   |   2    |                |       |
# +------+--------+--------+----------------+      +------+--------+----------------+-------+
def encode_request(request: BindingRequest) -> bytes:
    """Encode a request."""
    values = []
    if change := CHANGE_IP * request.change_ip + CHANGE_PORT * request.change_port:
        values.append((CHANGE_REQUEST, change.to_bytes(4, "big")))
    if request.response_port:
        values.append((RESPONSE_PORT, request.response_port.to_bytes(2, "big")))
    return _encode(REQUEST, request, values + _padding(request.padding))


def parse_request(datagram: bytes) -> BindingRequest:
    """Return the request in a datagram.

    Raises UnknownAttributes, and ProtocolError for anything else that is not a request; a
    server answers the former alone.
    """
    _, transaction, values = _parse(datagram, (REQUEST,), _OF_REQUESTS)
    change = values.get(CHANGE_REQUEST, b"\0\0\0\0")
    port = values.get(RESPONSE_PORT, b"\0\0")
    # RFC 5780 section 7.5 has a value of two bytes and two of padding: both lengths are in use.
    if len(change) != 4 or len(port) not in (2, 4):
        raise ProtocolError("a STUN request whose attributes have wrong lengths")
    return BindingRequest(
        transaction,
        change_ip=bool(change[3] & CHANGE_IP),
        change_port=bool(change[3] & CHANGE_PORT),
        response_port=int.from_bytes(port[:2], "big"),
        padding=len(values.get(PADDING, b"")),
        software=_parse_text(values.get(SOFTWARE, b"")),
        fingerprint=FINGERPRINT in values,
    )


def encode_response(response: BindingSuccess | BindingError) -> bytes:
    """Encode the answer to a request.  Raises ValueError for a name in place of an address."""
    if isinstance(response, BindingError):
        values = [(ERROR_CODE, _encode_error(response))]
        if response.unknown:
            value = b"".join(attribute.to_bytes(2, "big") for attribute in response.unknown)
            values.append((UNKNOWN_ATTRIBUTES, value))
        return _encode(ERROR, response, values)
    mask = COOKIE + response.transaction
    values = [(XOR_MAPPED_ADDRESS, _encode_address(response.mapped, mask))]
    if response.origin:
        values.append((RESPONSE_ORIGIN, _encode_address(response.origin)))
    if response.other:
        values.append((OTHER_ADDRESS, _encode_address(response.other)))
    return _encode(SUCCESS, response, values + _padding(response.padding))


def parse_response(datagram: bytes) -> BindingSuccess | BindingError:
    """Return the answer in a datagram.

    MAPPED-ADDRESS, and the attributes of RFC 3489, are taken if their successors are missing.
    Raises ProtocolError for anything that is no answer, and for an answer without an address.
    """
    kind, transaction, values = _parse(datagram, (SUCCESS, ERROR), _OF_RESPONSES)
    software, fingerprint = _parse_text(values.get(SOFTWARE, b"")), FINGERPRINT in values
    if kind == ERROR:
        code, phrase = _parse_error(values.get(ERROR_CODE, b""))
        value = values.get(UNKNOWN_ATTRIBUTES, b"")
        unknown = struct.unpack(f">{len(value) // 2}H", value[: len(value) & ~1])
        return BindingError(transaction, code, phrase, unknown, software, fingerprint)
    if XOR_MAPPED_ADDRESS in values:
        mapped = _parse_address(values[XOR_MAPPED_ADDRESS], COOKIE + transaction)
    else:
        mapped = _parse_address(values.get(MAPPED_ADDRESS, b""))
    origin = values.get(RESPONSE_ORIGIN, values.get(SOURCE_ADDRESS))
    other = values.get(OTHER_ADDRESS, values.get(CHANGED_ADDRESS))
    return BindingSuccess(
        transaction,
        mapped,
        origin=None if origin is None else _parse_address(origin),
        other=None if other is None else _parse_address(other),
        padding=len(values.get(PADDING, b"")),
        software=software,
        fingerprint=fingerprint,
    )


_Values = list[tuple[int, bytes]]


def _encode(
    kind: int, message: BindingRequest | BindingSuccess | BindingError, values: _Values
) -> bytes:
    """Encode a message of some attributes, SOFTWARE and FINGERPRINT."""
    if message.software:
        values.append((SOFTWARE, _encode_text(message.software)))
    attributes = b"".join(
        _ATTRIBUTE.pack(attribute, len(value)) + value + bytes(-len(value) % 4)
        for attribute, value in values
    )
    length = len(attributes) + _FINGERPRINT_SIZE * message.fingerprint
    data = _HEADER.pack(kind, length, COOKIE, message.transaction) + attributes
    return data + _encode_fingerprint(data) if message.fingerprint else data


def _parse(
    datagram: bytes, kinds: tuple[int, ...], known: set[int]
) -> tuple[int, bytes, dict[int, bytes]]:
    """Return the type of a message, its transaction ID and the first value of each attribute."""
    if not is_message(datagram):
        raise ProtocolError("not a message of STUN")
    kind, _, _, transaction = _HEADER.unpack_from(datagram)
    if kind not in kinds:
        raise ProtocolError("another type of message of STUN than expected")
    values: dict[int, bytes] = {}
    unknown: dict[int, None] = {}
    at, size, protected = HEADER_SIZE, len(datagram), False
    while at < size:
        attribute, length = _ATTRIBUTE.unpack_from(datagram, at)
        start, at = at, at + 4 + (length + 3 & ~3)
        if at > size:
            raise ProtocolError("an attribute of STUN is longer than its message")
        if attribute == FINGERPRINT:
            if at < size or datagram[start:] != _encode_fingerprint(datagram[:start]):
                raise ProtocolError("the fingerprint of a message of STUN is wrong")
        elif protected:
            # Section 14.5: whoever is on the path may have added what follows.
            continue
        elif attribute < _OPTIONAL and attribute not in known:
            unknown[attribute] = None
        values.setdefault(attribute, datagram[start + 4 : start + 4 + length])
        protected |= attribute in (MESSAGE_INTEGRITY, MESSAGE_INTEGRITY_SHA256)
    if unknown:
        raise UnknownAttributes(transaction, list(unknown))
    return kind, transaction, values


# MAPPED-ADDRESS and the like (RFC 8489 section 14.1); XOR-MAPPED-ADDRESS has the port XORed
# with the first bytes of the cookie, the address with the cookie and the transaction ID.
# +---+--------+------+--------------+
# | 0 | Family | Port | Address 4/16 |
# +---+--------+------+--------------+
def _encode_address(address: Address, mask: bytes = _NO_MASK) -> bytes:
    packed = pack_ip(address.host)
    if packed is None:
        raise ValueError("STUN carries addresses, not names")
    plain = address.port.to_bytes(2, "big") + packed
    return bytes((0, _FAMILIES[len(packed)])) + _xor(plain, mask)


def _parse_address(value: bytes, mask: bytes = _NO_MASK) -> Address:
    if len(value) < 4 or _SIZES.get(value[1]) != len(value) - 4:
        raise ProtocolError("an address of STUN is missing or malformed")
    plain = _xor(value[2:], mask)
    return Address(ip_text(plain[2:]), int.from_bytes(plain[:2], "big"))


def _xor(port_and_address: bytes, mask: bytes) -> bytes:
    masks = mask[:2] + mask
    return bytes(first ^ second for first, second in zip(port_and_address, masks, strict=False))


# ERROR-CODE (RFC 8489 section 14.8): the class is in the lower 3 bits of its byte.
# +-----+-------+--------+---------------+
# | 0 0 | Class | Number | Reason phrase |
# +-----+-------+--------+---------------+
def _encode_error(error: BindingError) -> bytes:
    return bytes((0, 0, *divmod(error.code, 100))) + _encode_text(error.phrase)


def _parse_error(value: bytes) -> tuple[int, str]:
    """Return the code and the phrase; raises ProtocolError for a code out of range."""
    if len(value) < 4 or not 3 <= value[2] & 7 <= 6 or value[3] > 99:
        raise ProtocolError("an error of STUN without a valid code")
    return (value[2] & 7) * 100 + value[3], _parse_text(value[4:])


def _encode_text(text: str) -> bytes:
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"a text of STUN has at most {TEXT_LIMIT} characters")
    return text.encode()


def _parse_text(value: bytes) -> str:
    """Return a text in one printable line; some servers fill it up with NULs."""
    text = value.rstrip(b"\0").decode(errors="replace")
    return printable(text)[:TEXT_LIMIT].strip()


def _padding(size: int) -> _Values:
    if size > PADDING_LIMIT:
        raise ValueError(f"at most {PADDING_LIMIT} bytes of PADDING")
    return [(PADDING, bytes(size))] if size else []


def _encode_fingerprint(before: bytes) -> bytes:
    """Return the attribute FINGERPRINT behind these bytes, whose length includes it."""
    check = binascii.crc32(before) ^ _FINGERPRINT_MASK
    return _ATTRIBUTE.pack(FINGERPRINT, 4) + check.to_bytes(4, "big")
