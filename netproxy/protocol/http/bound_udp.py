"""Proxying bound UDP in HTTP: one stream of connect-udp (RFC 9298) for all targets.

An extension that both ends agree on by the field Connect-UDP-Bind (connect_udp.py), as in
draft-ietf-masque-connect-udp-listen-13 (June 2026).  Each datagram has a context ID: that of one
target or source, or the one whose datagrams begin with an address.  The endpoints register
contexts with capsules.  Both roles, no I/O.
"""

from __future__ import annotations

import re

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address, ip_text, pack_ip
from netproxy.protocol.http.capsule import encode_varint, parse_varint
from netproxy.protocol.http.connect_udp import BIND_FIELD
from netproxy.protocol.http1 import Fields, HttpError, field_values, parse_authority
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.protocol.http.capsule import Buffer

ADDRESS_FIELD = b"Proxy-Public-Address"
ADDRESSES_LIMIT = 8
"""Public addresses of a proxy that are read: a machine has one or two for each family."""

# Capsule types.
ASSIGN, ACK, CLOSE = 0x11, 0x12, 0x13
# IP Version: of a context whose datagrams have addresses, and of addresses.
UNCOMPRESSED, IPV4, IPV6 = 0, 4, 6
VALUE_LIMIT = 8 + 1 + 16 + 2
"""Bytes of the longest value of these capsules: context ID, version, address and port."""

ADDRESS_SIZES = {IPV4: 7, IPV6: 19}
"""Bytes of IP Version, IP Address and UDP Port."""

# These expressions are text: they are compiled on first use, which most daemons never reach.
# A list of strings, and a string in it.  Backslashes are of no use in an address.
_ADDRESSES = rb'"([^"\\]*)"(?:[ \t]*,[ \t]*"[^"\\]*")*\Z'
_ADDRESS = rb'"([^"\\]*)"'


# Connect-UDP-Bind: ?1
# Proxy-Public-Address: "192.0.2.45:54321", "[2001:db8::1234]:54321"
def accept_fields(addresses: Sequence[Address]) -> Fields:
    """Return the fields of an answer that accepts, with the public addresses of the stream."""
    text = ", ".join(f'"{address}"' for address in addresses)
    return [(BIND_FIELD, b"?1"), (ADDRESS_FIELD, text.encode("ascii"))]


def parse_public_addresses(fields: Fields) -> tuple[Address, ...]:
    """Return the public addresses in an answer; none if the field is missing or not valid."""
    value = b", ".join(field_values(fields, ADDRESS_FIELD.lower()))
    if re.match(_ADDRESSES, value) is None:
        return ()
    addresses: list[Address] = []
    for text in re.findall(_ADDRESS, value)[:ADDRESSES_LIMIT]:
        try:
            address = parse_authority(text)
        except HttpError:
            return ()
        packed = pack_ip(address.host)
        if packed is None or not any(packed):
            return ()
        addresses.append(address)
    return tuple(addresses)


# Address in a capsule and before a payload; IP Version is 4 or 6
# +--------------+--------------+------------+
# |  IP Version  |  IP Address  |  UDP Port  |
# |      1       |     4/16     |     2      |
# +--------------+--------------+------------+
def encode_address(address: Address) -> bytes:
    """Encode an address.  Raises ValueError for a name."""
    packed = pack_ip(address.host.partition("%")[0])
    if packed is None:
        raise ValueError(f"'{address.host}' is a name, and a bound stream has addresses only")
    return b"%c%b%b" % (address_version(address), packed, address.port.to_bytes(2, "big"))


def parse_address(raw: bytes) -> Address:
    """Parse exactly the bytes that encode_address() returns; a v4-mapped address as IPv4.

    Raises ProtocolError.
    """
    if not raw or len(raw) != ADDRESS_SIZES.get(raw[0]):
        raise ProtocolError("not an IP version with its address and port")
    return Address(ip_text(raw[1:-2]), int.from_bytes(raw[-2:], "big"))


def address_version(address: Address) -> int:
    """Return the IP version of an address, 4 or 6."""
    return IPV6 if ":" in address.host else IPV4


class Assignment(NamedTuple):
    """What COMPRESSION_ASSIGN registers."""

    context: int
    address: Address | None
    """None for the context whose datagrams have addresses."""


# COMPRESSION_ASSIGN; COMPRESSION_ACK and COMPRESSION_CLOSE have the context ID alone
# +------------+--------------+------------------+--------------+--------------+------------+
# |  Type (i)  |  Length (i)  |  Context ID (i)  |  IP Version  |  IP Address  |  UDP Port  |
# |    0x11    |              |                  |      1       |    0/4/16    |    0/2     |
# +------------+--------------+------------------+--------------+--------------+------------+
def encode_assign(assignment: Assignment) -> bytes:
    """Encode the registration of a context."""
    context, address = assignment
    tail = bytes((UNCOMPRESSED,)) if address is None else encode_address(address)
    return _encode(ASSIGN, encode_varint(context) + tail)


def encode_ack(context: int) -> bytes:
    """Encode the acceptance of a context."""
    return _encode(ACK, encode_varint(context))


def encode_close(context: int) -> bytes:
    """Encode the refusal or the end of a context."""
    return _encode(CLOSE, encode_varint(context))


def parse_assign(value: bytes) -> Assignment:
    """Parse the value of COMPRESSION_ASSIGN.  Raises ProtocolError."""
    context = parse_varint(value, 0, len(value))
    if context is None or not context[0] or context[1] == len(value):
        raise ProtocolError("COMPRESSION_ASSIGN without a context ID or an IP version")
    raw = value[context[1] :]
    return Assignment(context[0], None if raw == b"\0" else parse_address(raw))


def parse_context(value: bytes) -> int:
    """Parse the value of COMPRESSION_ACK or COMPRESSION_CLOSE.  Raises ProtocolError."""
    context = parse_varint(value, 0, len(value))
    if context is None or not context[0] or context[1] != len(value):
        raise ProtocolError("a capsule that is not one context ID above 0")
    return context[0]


def address_size(buffer: Buffer, start: int, end: int) -> int:
    """Return the bytes of the address at `start`, 0 if it is not whole or of another version."""
    size = ADDRESS_SIZES.get(buffer[start], 0) if start < end else 0
    return size if start + size <= end else 0


def _encode(kind: int, value: bytes) -> bytes:
    return b"%c%c%b" % (kind, len(value), value)
