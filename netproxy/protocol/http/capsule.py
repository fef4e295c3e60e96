"""Capsules (RFC 9297) and the UDP payloads in them (RFC 9298 section 5), for both roles.

Pure functions over positions in the caller's buffer: they return offsets, so that no
payload is copied here.  The caller skips capsules of unknown types, and decides what to do
with a stream that ends within a capsule.  No I/O.  Thread: any.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.typed import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address

# Capsule type (RFC 9298 section 5).
DATAGRAM = 0x00
# The largest number, and the most bytes it takes (RFC 9000 section 16).
VARINT_LIMIT = (1 << 62) - 1
VARINT_LONGEST = 8
# RFC 9298 section 5: the length field of UDP counts its own header of 8 bytes.
UDP_PAYLOAD_LIMIT = 65527
VALUE_LIMIT = VARINT_LONGEST + UDP_PAYLOAD_LIMIT
# The largest DATAGRAM capsule that is accepted, with its header.  A buffer of this size holds
# it, whatever form its numbers have.
CAPSULE_LIMIT = 2 * VARINT_LONGEST + VALUE_LIMIT

Buffer: TypeAlias = bytes | bytearray | memoryview


# Variable-length integer (RFC 9000 section 16), big-endian.  The first two bits give the length.
# +----+----------------------+
# | 00 | 6 bits               |
# | 01 | 14 bits, 2 bytes     |
# | 10 | 30 bits, 4 bytes     |
# | 11 | 62 bits, 8 bytes     |
# +----+----------------------+
def encode_varint(value: int) -> bytes:
    """Encode a number in its shortest form.  Raises ValueError outside 0 to VARINT_LIMIT."""
    if not 0 <= value <= VARINT_LIMIT:
        raise ValueError("a variable-length integer has at most 62 bits and no sign")
    prefix = 0 if value < 1 << 6 else 1 if value < 1 << 14 else 2 if value < 1 << 30 else 3
    size = 1 << prefix
    return (value | prefix << (8 * size - 2)).to_bytes(size, "big")


def parse_varint(buffer: Buffer, start: int, end: int) -> tuple[int, int] | None:
    """Return the number at `start`, in any of its forms, and the offset behind it.

    Returns None if the buffer, which is filled up to `end`, ends within the number.
    """
    if start >= end:
        return None
    first = buffer[start]
    if first < 0x40:
        return first, start + 1
    size = 1 << (first >> 6)
    if start + size > end:
        return None
    bits = 8 * size - 2
    return int.from_bytes(buffer[start : start + size], "big") & ((1 << bits) - 1), start + size


# Capsule (RFC 9297 section 3.2), and the value of a DATAGRAM capsule (RFC 9298 section 5)
# +-------------+---------------+-------------------+      +-------------------+-------------+
# |  Type (i)   |  Length (i)   |  Value (Length)   |      |  Context ID (i)   | UDP payload |
# +-------------+---------------+-------------------+      +-------------------+-------------+
def datagram_header(length: int) -> bytes:
    """Return what precedes a UDP payload of `length` bytes: type, length and context ID 0."""
    return b"\0%b\0" % encode_varint(length + 1)


def parse_head(buffer: Buffer, start: int, end: int) -> tuple[int, int, int] | None:
    """Return a capsule's type, the offset of its value and the length of the value.

    The value may not have come yet.  Returns None if the buffer ends within the head.
    Raises ProtocolError for a DATAGRAM capsule that is too long to hold a UDP payload, as
    soon as its length is known.  Other types may have any length: the caller skips them.
    """
    capsule_type = parse_varint(buffer, start, end)
    length = parse_varint(buffer, capsule_type[1], end) if capsule_type else None
    if not capsule_type or not length:
        return None
    if capsule_type[0] == DATAGRAM and length[0] > VALUE_LIMIT:
        raise ProtocolError("a DATAGRAM capsule is longer than any UDP payload")
    return capsule_type[0], length[1], length[0]


def udp_payload(buffer: Buffer, start: int, end: int) -> int | None:
    """Return the offset of the UDP payload in a DATAGRAM capsule's value, from `start` to `end`.

    The payload may be empty.  Returns None for a context ID other than 0: nobody has agreed
    on it, and the datagram is dropped.  Raises ProtocolError for a value that ends within its
    context ID and for a payload over UDP_PAYLOAD_LIMIT: both end the stream.
    """
    context = parse_varint(buffer, start, end)
    if not context:
        raise ProtocolError("a DATAGRAM capsule without a context ID")
    if context[0]:
        return None
    if end - context[1] > UDP_PAYLOAD_LIMIT:
        raise ProtocolError("a UDP payload of over 65527 bytes")
    return context[1]


class Capsules:
    """The framing of a stream that carries the datagrams of one target.

    Implements interfaces.datagrams.Framing.
    """

    payload_limit = UDP_PAYLOAD_LIMIT

    def __init__(self, target: Address) -> None:
        self._target = target

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Return as Framing.find().

        A capsule of another type is skipped, a datagram of an unknown context is dropped.
        Raises ProtocolError.
        """
        head = parse_head(memory, start, end)
        if not head:
            return None
        capsule_type, value, length = head
        finish = value + length
        if capsule_type != DATAGRAM:
            return finish, finish, None
        if finish > end:
            return None
        payload = udp_payload(memory, value, finish)
        return (value, finish, None) if payload is None else (payload, finish, b"")

    def prefix(self, address: bytes, size: int) -> bytes:
        """Return what precedes a payload of `size` bytes."""
        return datagram_header(size)

    def encode(self, target: Address) -> bytes:
        """Return b"": a capsule has no address.  Raises ValueError for another target."""
        if target != self._target:
            raise ValueError(f"the connection is to {self._target} alone")
        return b""

    def parse(self, address: bytes) -> Address:
        """Return the target."""
        return self._target
