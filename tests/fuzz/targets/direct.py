"""Messages about direct paths: alone, and between the datagrams of a client's request."""

from __future__ import annotations

from typing import Any

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import tunnel
from netproxy.protocol.http1 import HttpRequest
from netproxy.protocol.tunnel import TunnelMessage
from netproxy.protocol.tunnels import direct, wish
from netproxy.protocol.tunnels.direct import MessageCapsules
from tests.fuzz.target import Target, accepted

_TARGET = Address("192.0.2.9", 443)
_PARSERS = {
    tunnel.DIRECT_OFFER: direct.parse_offer,
    tunnel.DIRECT_FLOW: direct.parse_flow,
    tunnel.DIRECT_END: direct.parse_end,
    tunnel.DIRECT_STATE: direct.parse_state,
}


def _value_of(message: bytes) -> bytes:
    parsed = tunnel.parse_message(message)
    assert parsed is not None and parsed[1] == len(message)
    return parsed[0].value


def _check_messages(data: bytes) -> None:
    """Read the bytes as each message, and as a wish."""
    offer = accepted(direct.parse_offer, data)
    if offer is not None:
        assert direct.parse_offer(_value_of(direct.encode_offer(offer))) == offer
        assert offer.own_key.hex() not in repr(offer) and offer.peer.port
        assert offer.mirrored(offer.peer).mirrored(offer.peer) == offer
    flow = accepted(direct.parse_flow, data)
    if flow is not None:
        assert flow.flow and direct.parse_flow(_value_of(direct.encode_flow(flow))) == flow
    end = accepted(direct.parse_end, data)
    if end is not None:
        assert direct.parse_end(_value_of(direct.encode_end(*end))) == end
    state = accepted(direct.parse_state, data)
    if state is not None:
        assert direct.parse_state(_value_of(direct.encode_state(state))) == state
    identifier = wish.parse_wish(HttpRequest(b"GET", b"/", 1, [(b"netproxy-direct", data)]))
    assert not identifier or wish.encode_wish(identifier)[1] == data


def _check_stream(data: bytes) -> None:
    """Find frames and messages in the bytes, whole and as they come byte by byte."""
    assert _found(data, len(data)) == _found(data, 1)


def _found(data: bytes, step: int) -> tuple[list[Any], list[TunnelMessage]]:
    obeyed: list[TunnelMessage] = []
    framing, memory = MessageCapsules(_TARGET, obeyed.append), bytearray(data)
    frames: list[Any] = []
    at = 0
    for end in range(step, len(data) + 1, max(1, step)):
        while at < end:
            try:
                frame = framing.find(memory, at, end)
            except ProtocolError:
                return [*frames, "malformed"], obeyed
            if frame is None:
                break
            assert at < frame[1] and (frame[2] is None or frame[1] <= end)
            frames.append(frame)
            at = frame[1]
    for message in obeyed:
        assert message.kind in tunnel.OF_PATHS and len(message.value) <= tunnel.MESSAGE_LIMIT
        if message.kind in _PARSERS:
            accepted(_PARSERS[message.kind], message.value)
    return frames, obeyed


TARGETS = (
    Target(
        "direct-messages",
        _check_messages,
        (b"\1", b"\x40\x46", bytes(8), bytes(32), b"\1\x7f\0\0\1\0\x50", b"\4" + bytes(18)),
        256,
    ),
    Target(
        "direct-stream",
        _check_stream,
        (b"\0\3\0hi", b"\x80\x4e\x54\x10", b"\x80\x4e\x54\x11\2\1\1", b"\x40\x80", b"\x17\5"),
        256,
    ),
)
