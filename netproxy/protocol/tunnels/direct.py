"""The messages by which a bridge has a client and an agent talk directly.

The client is another NetProxy, whose requests for connect-udp lead to the agent.  It has the
messages as capsules beside the datagrams of a request; the agent has them on its control
connection.  Both are within TLS, because keys are among them.  The packets of a direct path are
those of protocol.tunnels.path.  Both roles; no I/O; any thread.
"""

from __future__ import annotations

import struct

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.protocol import socks5
from netproxy.protocol.http.capsule import Capsules, encode_varint, parse_head, parse_varint
from netproxy.protocol.tunnel import (
    DIRECT_END,
    DIRECT_FLOW,
    DIRECT_OFFER,
    DIRECT_STATE,
    MESSAGE_LIMIT,
    OF_PATHS,
    TunnelMessage,
    address_size,
    encode_message,
)
from netproxy.protocol.tunnels.path import ID_SIZE, KEY_SIZE
from netproxy.typed import Callable, NamedTuple

_OFFER = struct.Struct(f"!{ID_SIZE}s{ID_SIZE}s{KEY_SIZE}s{KEY_SIZE}s")


class DirectOffer(NamedTuple):
    """What one side of a pair is told with DIRECT OFFER: everything to reach the other side."""

    pair: int
    """Names the client and the agent in later messages; an offer with a known number begins
    anew, with other keys."""
    own_id: bytes
    """The connection ID of packets to this side."""
    peer_id: bytes
    own_key: bytes
    """Seals packets to this side."""
    peer_key: bytes
    peer: Address
    """Where packets of the other side have come from at the bridge."""

    def __repr__(self) -> str:
        return f"DirectOffer({self.pair}, {self.peer})"

    def mirrored(self, peer: Address) -> DirectOffer:
        """Return the offer to the other side; `peer` is this side's address."""
        pair, own_id, peer_id, own_key, peer_key, _ = self
        return DirectOffer(pair, peer_id, own_id, peer_key, own_key, peer)


class DirectFlow(NamedTuple):
    """Which flow of a pair may carry the datagrams of a request."""

    pair: int
    flow: int
    path: int = 0
    """To the agent: the path and the flow by which the bridge sends it the same datagrams."""
    path_flow: int = 0
    target: bytes = b""
    """To the agent: the only target of the flow, as ATYP, ADDR and PORT of SOCKS5."""


class DirectState(NamedTuple):
    """What an agent tells of a direct path: whether it is up, and the time there and back."""

    pair: int
    up: bool
    microseconds: int


# -- the messages


# DIRECT OFFER, behind the pair's number; PEER is ATYP, ADDR and PORT of SOCKS5
# +----------+--------+---------+---------+----------+------+
# | PAIR (i) | OWN ID | PEER ID | OWN KEY | PEER KEY | PEER |
# +----------+--------+---------+---------+----------+------+
# |          |   8    |    8    |   32    |    32    | 7-19 |
# +----------+--------+---------+---------+----------+------+
def encode_offer(offer: DirectOffer) -> bytes:
    """Return the bytes of a DIRECT OFFER message."""
    pair, *rest, peer = offer
    value = encode_varint(pair) + _OFFER.pack(*rest) + socks5.encode_address(peer)
    return encode_message(DIRECT_OFFER, value)


def parse_offer(value: bytes) -> DirectOffer:
    """Return the offer in a DIRECT OFFER message; bytes behind it are ignored.

    Raises ProtocolError; a name in place of an address is an error as well.
    """
    pair = parse_varint(value, 0, len(value))
    start = pair[1] + _OFFER.size if pair else 0
    size = address_size(value, start, len(value)) if pair else 0
    if not pair or not size or start + size > len(value):
        raise ProtocolError("a malformed DIRECT OFFER message")
    peer = socks5.parse_target(value[start : start + size])
    if pack_ip(peer.host) is None or not peer.port:
        raise ProtocolError("a DIRECT OFFER message without an address")
    own_id, peer_id, own_key, peer_key = _OFFER.unpack_from(value, pair[1])
    return DirectOffer(pair[0], own_id, peer_id, own_key, peer_key, peer)


# DIRECT FLOW to a client               to an agent, in addition
# +----------+----------+               +----------+----------+--------+
# | PAIR (i) | FLOW (i) |               | PATH (i) | FLOW (i) | TARGET |
# +----------+----------+               +----------+----------+--------+
def encode_flow(flow: DirectFlow) -> bytes:
    """Return the bytes of a DIRECT FLOW message: to an agent if it has a target."""
    pair, number, path, path_flow, target = flow
    value = encode_varint(pair) + encode_varint(number)
    if target:
        value += encode_varint(path) + encode_varint(path_flow) + target
    return encode_message(DIRECT_FLOW, value)


def parse_flow(value: bytes) -> DirectFlow:
    """Return the flow in a DIRECT FLOW message.  Raises ProtocolError."""
    numbers, start = _parse_numbers(value, 2)
    pair, flow = numbers
    if not flow:
        raise ProtocolError("a DIRECT FLOW message with the flow 0")
    if start == len(value):
        return DirectFlow(pair, flow)
    (path, path_flow), start = _parse_numbers(value, 2, start)
    size = address_size(value, start, len(value))
    if not size or start + size != len(value):
        raise ProtocolError("a DIRECT FLOW message without its target")
    return DirectFlow(pair, flow, path, path_flow, value[start:])


# DIRECT END                            DIRECT STATE
# +----------+----------+               +----------+----+------------------+
# | PAIR (i) | FLOW (i) |               | PAIR (i) | UP | MICROSECONDS (i) |
# +----------+----------+               +----------+----+------------------+
def encode_end(pair: int, flow: int = 0) -> bytes:
    """Return the bytes of a DIRECT END message: for one flow of a pair, 0: for all of it."""
    return encode_message(DIRECT_END, encode_varint(pair) + encode_varint(flow))


def parse_end(value: bytes) -> tuple[int, int]:
    """Return pair and flow of a DIRECT END message.  Raises ProtocolError."""
    (pair, flow), _ = _parse_numbers(value, 2)
    return pair, flow


def encode_state(state: DirectState) -> bytes:
    """Return the bytes of a DIRECT STATE message."""
    pair, up, microseconds = state
    numbers = (pair, int(up), microseconds)
    return encode_message(DIRECT_STATE, b"".join(map(encode_varint, numbers)))


def parse_state(value: bytes) -> DirectState:
    """Return the state in a DIRECT STATE message.  Raises ProtocolError."""
    (pair, up, microseconds), _ = _parse_numbers(value, 3)
    return DirectState(pair, up == 1, microseconds)


def _parse_numbers(value: bytes, count: int, start: int = 0) -> tuple[list[int], int]:
    """Return so many numbers from `start` on, and where the rest begins."""
    numbers: list[int] = []
    for _ in range(count):
        parsed = parse_varint(value, start, len(value))
        if parsed is None:
            raise ProtocolError("a message of a direct path is cut")
        number, start = parsed
        numbers.append(number)
    return numbers, start


class MessageCapsules(Capsules):
    """The framing of a client's request, beside whose datagrams the bridge sends messages.

    Implements net.framed.Framing.
    """

    def __init__(self, target: Address, obey: Callable[[TunnelMessage], None]) -> None:
        """`obey` takes each message of OF_PATHS; it raises ProtocolError for a malformed one."""
        super().__init__(target)
        self._obey = obey

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Find the frame at `start`; a message is obeyed, and then skipped."""
        head = parse_head(memory, start, end)
        if head is None or head[0] not in OF_PATHS:
            return super().find(memory, start, end)
        kind, value, length = head
        if length > MESSAGE_LIMIT:
            raise ProtocolError("a message of a direct path is too long")
        finish = value + length
        if finish > end:
            return None
        self._obey(TunnelMessage(kind, bytes(memory[value:finish])))
        return finish, finish, None
