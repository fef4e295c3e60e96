"""Packets of a tunnel's datagram path, from strangers and from the other side, and its messages."""

from __future__ import annotations

from typing import Any

from netproxy.protocol import tunnel
from netproxy.protocol.tunnels import path
from netproxy.protocol.tunnels.path import Ping, Pong
from tests.fuzz.target import Target, accepted
from tests.tunnel.path.rig import AGENT, BRIDGE, Pair, Received

_ADDRESSES = (b"\1\x7f\0\0\1\0\x50", b"\3\x0bexample.com\0\x50", b"\4" + bytes(15) + b"\1\0\x50")


def _check_packets(data: bytes) -> None:
    """Send the bytes as a packet, behind a header, and sealed by the other side."""
    pair = Pair()
    plain_flow, _ = pair.flows()
    addressed, _ = pair.flows(is_addressed=True)
    side, sealer = pair.agent, pair.bridge.path._keys.current.sealer
    for packet in (data, sealer.seal(b"", 0)[:17] + data):
        before = sum(side.drops().values())
        if packet:
            side.take(packet, peer=BRIDGE)
            assert sum(side.drops().values()) == before + 1, "a forged packet was taken"
    assert not side.out, "a forged packet was answered"
    for prefix in (b"", b"\1", b"\2", b"\0"):
        _check_sealed(pair, (plain_flow, addressed), prefix + data[:1400])
    pair.bridge.take(sealer.seal(data[:1400], 9), peer=AGENT)
    assert pair.bridge.drops(), "a reflected packet was taken"


def _check_sealed(pair: Pair, flows: tuple[Received, Received], plain: bytes) -> None:
    """Take one packet: it is delivered, answered, skipped, or dropped and counted."""
    side, sealer = pair.agent, pair.bridge.path._keys.current.sealer
    sealer.counter += 1
    dropped, delivered = sum(side.drops().values()), sum(len(flow.datagrams) for flow in flows)
    side.take(sealer.seal(plain, sealer.counter), peer=BRIDGE)
    dropped = sum(side.drops().values()) - dropped
    delivered = sum(len(flow.datagrams) for flow in flows) - delivered
    number = accepted(path.parse_flow_number, plain)
    message: Any = accepted(path.parse_message, plain) if number and not number[0] else None
    if isinstance(message, Ping):
        ((answer, _),) = side.out
        assert len(answer) <= path.OVERHEAD + len(plain), "an answer is longer than its question"
        assert not (dropped or delivered)
    else:
        # A flow that is not there is told, to who has the keys.
        has_flow = number is None or number[0] <= 2
        assert not (side.out and has_flow)
        is_skipped = number is not None and not number[0] and len(plain) >= 18
        assert dropped + delivered == (0 if is_skipped or isinstance(message, Pong) else 1)
    side.out.clear()
    if delivered and number is not None and number[0] == 1:
        assert flows[0].datagrams[-1] == (plain[number[1] :], b"")
    elif delivered:
        payload, address = flows[1].datagrams[-1]
        assert number is not None and address + payload == plain[number[1] :]


def _check_offers(data: bytes) -> None:
    """Read the bytes as each message about paths."""
    offer = accepted(path.parse_offer, data)
    if offer is not None:
        assert path.parse_offer(_value_of(path.encode_offer(offer))) == offer
        assert offer.bridge_key.hex() not in repr(offer)
    flow = accepted(path.parse_flow, data)
    if flow is not None:
        assert flow.flow and path.parse_flow(_value_of(path.encode_flow(flow))) == flow
    taken = accepted(tunnel.parse_accept, data)
    if taken:
        assert tunnel.parse_accept(_value_of(tunnel.encode_accept(taken))) == taken


def _value_of(message: bytes) -> bytes:
    parsed = tunnel.parse_message(message)
    assert parsed is not None and parsed[1] == len(message)
    return parsed[0].value


TARGETS = (
    Target(
        "tunnel-packets",
        _check_packets,
        (b"\x9e", b"\0\1", b"\0\2", bytes(16), b"\1", b"\2", b"\x41\x2c", *_ADDRESSES),
        256,
    ),
    Target(
        "tunnel-offers",
        _check_offers,
        (b"\1", b"\x40\x46", b"\0\0", bytes(8), bytes(32), b"\x1b\x58"),
        256,
    ),
)
