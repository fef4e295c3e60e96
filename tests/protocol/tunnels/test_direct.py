"""The messages about direct paths, and those beside the datagrams of a request."""

from __future__ import annotations

from typing import Any, Callable

import pytest

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol import tunnel
from netproxy.protocol.tunnel import TunnelMessage
from netproxy.protocol.tunnels import direct
from netproxy.protocol.tunnels.direct import DirectFlow, DirectOffer, DirectState, MessageCapsules

PEER, OWN = Address("198.51.100.7", 4000), Address("2001:db8::9", 5000)
OFFER = DirectOffer(3, b"own id 8", b"peer id8", b"o" * 32, b"p" * 32, PEER)
PEER_BYTES = bytes.fromhex("01c63364070fa0")
OFFER_BYTES = b"\3own id 8peer id8" + b"o" * 32 + b"p" * 32 + PEER_BYTES
TARGET = bytes.fromhex("0109090909003 5".replace(" ", ""))


def value_of(message: bytes) -> TunnelMessage:
    parsed = tunnel.parse_message(message)
    assert parsed is not None and parsed[1] == len(message)
    return parsed[0]


def test_offer_is_what_the_page_says() -> None:
    kind, value = value_of(direct.encode_offer(OFFER))
    assert (kind, value) == (0x4E5410, OFFER_BYTES)
    assert direct.parse_offer(value) == direct.parse_offer(value + b"later") == OFFER


def test_offer_to_the_other_side_has_all_the_other_way_round() -> None:
    other = OFFER.mirrored(OWN)
    assert other == DirectOffer(3, b"peer id8", b"own id 8", b"p" * 32, b"o" * 32, OWN)
    assert other.mirrored(PEER) == OFFER
    assert direct.parse_offer(value_of(direct.encode_offer(other)).value) == other


def test_keys_of_a_pair_are_in_no_repr() -> None:
    assert "ooo" not in repr(OFFER) and "ppp" not in repr(OFFER) and "198.51.100.7" in repr(OFFER)


@pytest.mark.parametrize("size", range(len(OFFER_BYTES)))
def test_cut_offer_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        direct.parse_offer(OFFER_BYTES[:size])


@pytest.mark.parametrize(
    "peer", [b"\3\7example\0\x50", bytes.fromhex("01c633640700") + b"\0", b"\5abcdef"]
)
def test_offer_without_an_address_and_a_port_is_refused(peer: bytes) -> None:
    with pytest.raises(ProtocolError):
        direct.parse_offer(OFFER_BYTES[: -len(PEER_BYTES)] + peer)


@pytest.mark.parametrize(
    "flow, encoded",
    [
        (DirectFlow(3, 300), b"\3\x41\x2c"),
        (DirectFlow(3, 1, 2, 5, TARGET), b"\3\1\2\5" + TARGET),
        (DirectFlow(3, 1, 2, 5, b"\3\1a\0\x35"), b"\3\1\2\5\3\1a\0\x35"),
    ],
)
def test_flow_is_what_the_page_says(flow: DirectFlow, encoded: bytes) -> None:
    assert value_of(direct.encode_flow(flow)) == (0x4E5411, encoded)
    assert direct.parse_flow(encoded) == flow


@pytest.mark.parametrize(
    "value", [b"", b"\3", b"\3\x41", b"\3\0", b"\3\1\2", b"\3\1\2\5", b"\3\1\2\5" + TARGET[:-1]]
)
def test_bad_flow_is_refused(value: bytes) -> None:
    with pytest.raises(ProtocolError):
        direct.parse_flow(value)


def test_end_and_state_are_what_the_page_says() -> None:
    assert value_of(direct.encode_end(3)) == (0x4E5412, b"\3\0")
    assert value_of(direct.encode_end(3, 300)) == (0x4E5412, b"\3\x41\x2c")
    assert direct.parse_end(b"\3\x41\x2c") == (3, 300)
    state = DirectState(3, True, 12000)
    assert value_of(direct.encode_state(state)) == (0x4E5413, b"\3\1\x6e\xe0")
    assert direct.parse_state(b"\3\1\x6e\xe0") == state
    assert direct.parse_state(b"\3\0\0") == DirectState(3, False, 0)


@pytest.mark.parametrize("parse", [direct.parse_end, direct.parse_state])
@pytest.mark.parametrize("value", [b"", b"\3", b"\3\x41"])
def test_cut_numbers_are_refused(parse: Callable[[bytes], Any], value: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(value)


# -- messages beside datagrams

DATAGRAM = b"\0\3\0hi"


def frames(data: bytes, end: int | None = None) -> tuple[list[Any], list[TunnelMessage]]:
    """Return the frames found in the first `end` bytes, and the messages obeyed."""
    obeyed: list[TunnelMessage] = []
    framing, memory, at, found = MessageCapsules(PEER, obeyed.append), bytearray(data), 0, []
    end = len(data) if end is None else end
    while at < end and (frame := framing.find(memory, at, end)) is not None:
        found.append(frame)
        at = frame[1]
    return found, obeyed


def test_messages_are_obeyed_between_datagrams() -> None:
    message = direct.encode_flow(DirectFlow(3, 1))
    found, obeyed = frames(DATAGRAM + message + DATAGRAM)
    assert [frame[2] for frame in found] == [b"", None, b""]
    assert obeyed == [TunnelMessage(0x4E5411, b"\3\1")]


def test_message_is_obeyed_once_it_is_complete() -> None:
    message = direct.encode_offer(OFFER)
    for end in range(len(message)):
        assert frames(message, end)[1] == []
    assert frames(message)[1] == [TunnelMessage(0x4E5410, OFFER_BYTES)]


def test_unknown_capsules_are_skipped() -> None:
    found, obeyed = frames(tunnel.encode_message(tunnel.OPEN, b"x") + DATAGRAM)
    assert [frame[2] for frame in found] == [None, b""] and not obeyed


def test_long_message_ends_the_stream() -> None:
    with pytest.raises(ProtocolError):
        frames(tunnel.encode_message(tunnel.DIRECT_END, bytes(4097))[:8])
