"""Packets of a datagram path, and the messages by which agent and bridge agree on a path.

A path is a row of UDP packets beside a tunnel's control connection.  This module lays out what
is in front of the ciphertext and what is inside; tunnel.path seals and opens.  Both roles; no I/O,
no keys in use; any thread.  man/netproxy-tunnel.7 describes the same for others.
"""

from __future__ import annotations

import struct

from netproxy.errors import ProtocolError
from netproxy.protocol.http.capsule import encode_varint, parse_varint
from netproxy.protocol.tunnel import FLOW, PATH_OFFER, address_size, encode_message
from netproxy.typed import NamedTuple

TYPE = 0x9E
"""The first byte of each packet, version 1: no datagram of SOCKS5 (00), STUN (00-3f), TURN
channels (40-4f) or QUIC's first flight (c0-ff) begins with it."""

ID_SIZE, KEY_SIZE, TAG_SIZE = 8, 32, 16
"""Bytes of a connection ID, of a key and of what an AEAD adds."""

ID_OFFSET = 1
"""Where the connection ID begins in a packet."""

HEADER = struct.Struct(f"!B{ID_SIZE}sQ")
"""The type, the receiver's connection ID, the counter."""

OVERHEAD = HEADER.size + TAG_SIZE
"""Bytes of a packet beyond what is sealed in it."""

NONCE_START = bytes(4)
"""Precedes the counter in a nonce of 12 bytes."""

BASE_PACKET = 1200
"""Bytes of the packets that a path must carry: IPv6 guarantees them (RFC 8200 section 5)."""

MESSAGES = 0
"""The flow number of messages of the path itself."""

STAMP_SIZE = 8
"""Bytes of what a PING holds, and its PONG repeats."""

_PING, _PONG, _GONE, _MOVED = 1, 2, 3, 4
_MESSAGE = struct.Struct(f"!BB{STAMP_SIZE}sQ")
_OFFER = struct.Struct(f"!H{ID_SIZE}s{ID_SIZE}s{KEY_SIZE}s{KEY_SIZE}s")


class PathOffer(NamedTuple):
    """What a bridge offers with PATH OFFER: where a path leads, and everything to use it."""

    number: int
    """Names the path in FLOW; an offer with the number of a path renews its keys."""
    port: int
    """The UDP port of the bridge; 0: that number to which the agent has dialled by TCP."""
    bridge_id: bytes
    """The connection ID of packets to the bridge."""
    agent_id: bytes
    bridge_key: bytes
    """Seals packets to the bridge."""
    agent_key: bytes

    def __repr__(self) -> str:
        return f"PathOffer({self.number}, port={self.port})"


class FlowOffer(NamedTuple):
    """Which flow of which path may carry the datagrams of the work connection that it is sent on.

    Sent before OPEN; an agent that takes it repeats the flow's number in ACCEPT.
    """

    path: int
    flow: int


class Ping(NamedTuple):
    """Asks for a PONG with the same stamp."""

    stamp: bytes


class Pong(NamedTuple):
    """The answer to a PING."""

    stamp: bytes
    received: int
    """Valid packets of the connection ID that this side has received so far."""


class Gone(NamedTuple):
    """Says that datagrams of a flow have come that is not there."""

    flow: int


class Moved(NamedTuple):
    """Says that the packets of the agent now come from another address than before."""

    stamp: bytes = bytes(STAMP_SIZE)


PathMessage = Ping | Pong | Gone | Moved


# -- messages of the control connection and of a work connection


# PATH OFFER, behind the path's number            FLOW
# +------+-----------+----------+------------+-----------+     +----------+----------+
# | PORT | BRIDGE ID | AGENT ID | BRIDGE KEY | AGENT KEY |     | PATH (i) | FLOW (i) |
# |  2   |     8     |    8     |     32     |    32     |     +----------+----------+
# +------+-----------+----------+------------+-----------+
def encode_offer(offer: PathOffer) -> bytes:
    """Return the bytes of a PATH OFFER message."""
    number, *rest = offer
    return encode_message(PATH_OFFER, encode_varint(number) + _OFFER.pack(*rest))


def parse_offer(value: bytes) -> PathOffer:
    """Return the offer in a PATH OFFER message; bytes of later versions behind it are ignored.

    Raises ProtocolError.
    """
    number = parse_varint(value, 0, len(value))
    if number is None or len(value) < number[1] + _OFFER.size:
        raise ProtocolError("a malformed PATH OFFER message")
    return PathOffer(number[0], *_OFFER.unpack_from(value, number[1]))


def encode_flow(offer: FlowOffer) -> bytes:
    """Return the bytes of a FLOW message."""
    return encode_message(FLOW, encode_varint(offer.path) + encode_varint(offer.flow))


def parse_flow(value: bytes) -> FlowOffer:
    """Return the offer in a FLOW message.  Raises ProtocolError."""
    path = parse_varint(value, 0, len(value))
    flow = parse_varint(value, path[1], len(value)) if path else None
    if not path or not flow or flow[0] == MESSAGES:
        raise ProtocolError("a malformed FLOW message")
    return FlowOffer(path[0], flow[0])


# -- packets


# A packet; all before the ciphertext is associated data, the nonce is four zeros and the counter
# +----+---------------+---------+----------------------------+
# | 9E | CONNECTION ID | COUNTER | CIPHERTEXT with its tag    |
# | 1  |       8       |    8    | 16 more than its plaintext |
# +----+---------------+---------+----------------------------+
#
# The plaintext: a datagram of a flow (ADDRESS: exits alone), or a message of the path
# +----------+-----------------------+---------+     +----+------+--------+----------+
# | FLOW (i) | [ATYP] [ADDR] [PORT]  | PAYLOAD |     | 00 | KIND | STAMP  | RECEIVED |  padding
# +----------+-----------------------+---------+     | 1  |  1   |   8    |    8     |
#                                                    +----+------+--------+----------+
def encode_ping(stamp: bytes, packet: int) -> bytes:
    """Return the plaintext of a PING, in a packet of `packet` bytes or of the fewest it needs."""
    plain = _MESSAGE.pack(MESSAGES, _PING, stamp, 0)
    return plain.ljust(packet - OVERHEAD, b"\0")


def encode_pong(pong: Pong) -> bytes:
    """Return the plaintext of a PONG, which is never longer than the PING it answers."""
    return _MESSAGE.pack(MESSAGES, _PONG, *pong)


def encode_gone(gone: Gone) -> bytes:
    """Return the plaintext of a GONE."""
    return _MESSAGE.pack(MESSAGES, _GONE, gone.flow.to_bytes(STAMP_SIZE, "big"), 0)


def encode_moved() -> bytes:
    """Return the plaintext of a MOVED."""
    return _MESSAGE.pack(MESSAGES, _MOVED, *Moved(), 0)


def parse_message(plain: bytes) -> PathMessage | None:
    """Return the message in a plaintext of flow 0, None for a kind of a later version.

    Raises ProtocolError.
    """
    if len(plain) < _MESSAGE.size:
        raise ProtocolError("a message of a path is cut")
    _, kind, stamp, received = _MESSAGE.unpack_from(plain)
    if kind == _PING:
        return Ping(stamp)
    if kind == _GONE:
        return Gone(int.from_bytes(stamp, "big"))
    if kind == _MOVED:
        return Moved(stamp)
    return Pong(stamp, received) if kind == _PONG else None


def parse_flow_number(plain: bytes) -> tuple[int, int]:
    """Return the flow of a plaintext, and where the rest begins.  Raises ProtocolError."""
    parsed = parse_varint(plain, 0, len(plain))
    if parsed is None:
        raise ProtocolError("a packet of a path without its flow")
    return parsed


def find_payload(plain: bytes, start: int) -> int:
    """Return where the payload begins behind the address at `start`.  Raises ProtocolError."""
    size = address_size(plain, start, len(plain))
    if not size or start + size > len(plain):
        raise ProtocolError("a datagram of a path without its address")
    return start + size
