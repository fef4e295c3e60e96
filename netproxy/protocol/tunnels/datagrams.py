"""Datagrams of a tunnel's exit: what a work connection carries after ACCEPT, for both roles.

Each DATAGRAM capsule (RFC 9297) holds the address of its target or source before the payload,
so that one stream carries the datagrams of one client to all its targets.  Datagrams to a
service have the framing of protocol.http.capsule.  No I/O; any thread.
"""

from __future__ import annotations

from netproxy.errors import ProtocolError
from netproxy.protocol import socks5
from netproxy.protocol.http.capsule import DATAGRAM, VARINT_LONGEST, encode_varint, parse_varint
from netproxy.protocol.tunnel import address_size
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address


PAYLOAD_LIMIT = 65507
"""Bytes: the most that UDP over IPv4 carries."""

_CONTEXT = 2
_ADDRESS_LIMIT = 259
_VALUE_LIMIT = VARINT_LONGEST + _ADDRESS_LIMIT + PAYLOAD_LIMIT


# A DATAGRAM capsule of context 2: the payload follows the address of its target or its source.
# +----+------------+---------+----------+----------+------+
# | 00 | Length (i) |   02    |   ATYP   |   ADDR   | PORT |  DATA
# +----+------------+---------+----------+----------+------+
class AddressedDatagrams:
    """The framing of a stream that carries one client's datagrams to all targets.

    Implements interfaces.datagrams.Framing; an address of a frame is ATYP, ADDR and PORT.
    """

    payload_limit = PAYLOAD_LIMIT

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Find the frame at `start`, as Framing does.

        Other capsules are skipped, datagrams of other contexts are dropped.
        """
        kind = parse_varint(memory, start, end)
        length = parse_varint(memory, kind[1], end) if kind else None
        if not kind or not length:
            return None
        finish = length[1] + length[0]
        if kind[0] != DATAGRAM:
            return finish, finish, None
        if length[0] > _VALUE_LIMIT:
            raise ProtocolError("a DATAGRAM capsule is longer than any UDP payload")
        if finish > end:
            return None
        context = parse_varint(memory, length[1], finish)
        if not context:
            raise ProtocolError("a DATAGRAM capsule without a context ID")
        if context[0] != _CONTEXT:
            return length[1], finish, None
        size = address_size(memory, context[1], finish)
        payload = context[1] + size
        if not size or not 0 <= finish - payload <= self.payload_limit:
            raise ProtocolError("a datagram without its address, or too long")
        return payload, finish, bytes(memory[context[1] : payload])

    def prefix(self, address: bytes, size: int) -> bytes:
        """Return the bytes before a payload of `size` bytes."""
        return b"\0%b\2%b" % (encode_varint(1 + len(address) + size), address)

    def encode(self, target: Address) -> bytes:
        """Return the address of a frame to `target`."""
        return socks5.encode_address(target)

    def parse(self, address: bytes) -> Address:
        """Return the address of a frame as an Address.  Raises ProtocolError."""
        return socks5.parse_target(address)
