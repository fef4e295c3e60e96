"""Capsules (RFC 9297) and the UDP payloads in them (RFC 9298 section 5), for both roles.

Pure functions over the places in a caller's buffer: what is found is told as
offsets, so that no payload is copied here.  Skipping kinds that nobody knows,
and a stream that ends within a capsule, are the caller's.  No I/O; any thread.
"""

from __future__ import annotations

from typing import NamedTuple

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address

DATAGRAM = 0x00
VARINT_LIMIT = (1 << 62) - 1  # the largest number, RFC 9000 section 16
VARINT_LONGEST = 8  # bytes
UDP_PAYLOAD_LIMIT = 65527  # RFC 9298 section 5: UDP's length field counts its own header of 8
VALUE_LIMIT = VARINT_LONGEST + UDP_PAYLOAD_LIMIT
# the largest DATAGRAM that is accepted, header and all: whatever form its numbers take, a buffer of this size holds it
CAPSULE_LIMIT = 2 * VARINT_LONGEST + VALUE_LIMIT

Buffer = bytes | bytearray | memoryview


class Capsule(NamedTuple):
    kind: int
    start: int  # of its value in the buffer
    end: int


# RFC 9000 section 16: the first two bits tell the length
# +----+----------------------+
# | 00 | 6 bits               |
# | 01 | 14 bits, 2 bytes     |
# | 10 | 30 bits, 4 bytes     |     big-endian
# | 11 | 62 bits, 8 bytes     |
# +----+----------------------+
def encode_varint(value: int) -> bytes:
    """The shortest form; ValueError outside 0 to VARINT_LIMIT."""
    if not 0 <= value <= VARINT_LIMIT:
        raise ValueError("a variable-length integer has at most 62 bits and no sign")
    prefix = 0 if value < 1 << 6 else 1 if value < 1 << 14 else 2 if value < 1 << 30 else 3
    size = 1 << prefix
    return (value | prefix << (8 * size - 2)).to_bytes(size, "big")


def parse_varint(buffer: Buffer, start: int, end: int) -> tuple[int, int] | None:
    """The number at `start` and where it ends; None where `end` comes first.  Any of its forms will do."""
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


# Capsule (RFC 9297 section 3.2), and the value of a DATAGRAM (RFC 9298 section 5)
# +-------------+---------------+-------------------+      +-------------------+-------------+
# |   Type (i)  |  Length (i)   |  Value (Length)   |      |  Context ID (i)   | UDP payload |
# +-------------+---------------+-------------------+      +-------------------+-------------+
def datagram_header(length: int) -> bytes:
    """What goes before a UDP payload of `length` bytes, context 0 and all; the same for every one of that length."""
    return b"\0%b\0" % encode_varint(length + 1)


def head(buffer: Buffer, start: int, end: int) -> tuple[int, int, int] | None:
    """Kind, start of the value and its length, whether the value is there or not; None for half a header.

    ProtocolError for a DATAGRAM that can hold no UDP payload, however its numbers are written: nobody
    has to wait until it is whole.  Other kinds may be of any length, to be skipped.
    """
    kind = parse_varint(buffer, start, end)
    length = parse_varint(buffer, kind[1], end) if kind else None
    if not kind or not length:
        return None
    if kind[0] == DATAGRAM and length[0] > VALUE_LIMIT:
        raise ProtocolError("a DATAGRAM capsule is longer than any UDP payload")
    return kind[0], length[1], length[0]


def next_capsule(buffer: Buffer, start: int, end: int) -> Capsule | None:
    """The capsule at `start` of a buffer that is filled up to `end`; None until it is whole.  ProtocolError as head()."""
    found = head(buffer, start, end)
    if not found or found[1] + found[2] > end:
        return None
    return Capsule(found[0], found[1], found[1] + found[2])


def udp_payload(buffer: Buffer, start: int, end: int) -> int | None:
    """Where the UDP payload begins in the value of a DATAGRAM, up to `end`; it may be empty.

    None for a context that was never agreed on, which is dropped.  ProtocolError for a value that ends within its
    context ID, or a payload over UDP_PAYLOAD_LIMIT: both end the stream.
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
    """The framing of a stream that carries the datagrams of one target (net.framed.Framing)."""

    payload_limit = UDP_PAYLOAD_LIMIT

    def __init__(self, target: Address) -> None:
        self._target = target

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """As net.framed.Framing says: capsules of other kinds, and contexts that nobody agreed on, are to be skipped."""
        found = head(memory, start, end)
        if not found:
            return None
        kind, value, length = found
        finish = value + length
        if kind != DATAGRAM:
            return value, finish, None
        if finish > end:
            return None
        payload = udp_payload(memory, value, finish)
        return (value, finish, None) if payload is None else (payload, finish, b"")

    def prefix(self, address: bytes, size: int) -> bytes:
        return datagram_header(size)

    def encode(self, target: Address) -> bytes:
        if target != self._target:
            raise ValueError(f"the connection is to {self._target} alone")
        return b""

    def parse(self, address: bytes) -> Address:
        return self._target
