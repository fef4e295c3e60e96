"""Packets of a datagram path, and the messages that offer one."""

from __future__ import annotations

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol import tunnel
from netproxy.protocol.tunnels import path
from netproxy.protocol.tunnels.path import FlowOffer, Gone, Moved, PathOffer, Ping, Pong

OFFER = PathOffer(3, 7000, bytes(8), bytes(range(8)), b"b" * 32, b"a" * 32)
OFFER_BYTES = bytes.fromhex("1b58") + bytes(8) + bytes(range(8)) + b"b" * 32 + b"a" * 32
STAMP = b"8 bytes."


def value_of(message: bytes) -> tuple[int, bytes]:
    parsed = tunnel.parse_message(message)
    assert parsed is not None and parsed[1] == len(message)
    return parsed[0]


@pytest.mark.parametrize("number, encoded", [(3, b"\3"), (70, b"\x40\x46")])
def test_offer_is_what_the_page_says(number: int, encoded: bytes) -> None:
    offer = OFFER._replace(number=number)
    kind, value = value_of(path.encode_offer(offer))
    assert (kind, value) == (0x4E540B, encoded + OFFER_BYTES)
    assert path.parse_offer(value) == path.parse_offer(value + b"later") == offer


def test_keys_are_in_no_repr() -> None:
    assert "bbb" not in repr(OFFER) and "aaa" not in repr(OFFER) and "7000" in repr(OFFER)


@pytest.mark.parametrize("size", range(len(OFFER_BYTES) + 1))
def test_cut_offer_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        path.parse_offer((b"\3" + OFFER_BYTES)[:size])


def test_flow_is_offered_and_taken() -> None:
    kind, value = value_of(path.encode_flow(FlowOffer(3, 300)))
    assert (kind, value) == (0x4E540D, b"\3\x41\x2c")
    assert path.parse_flow(value) == FlowOffer(3, 300)
    assert value_of(tunnel.encode_accept(300)) == (tunnel.ACCEPT, b"\x41\x2c")
    assert tunnel.parse_accept(b"\x41\x2c") == 300
    assert (
        value_of(tunnel.encode_accept()) == (tunnel.ACCEPT, b"") and tunnel.parse_accept(b"") == 0
    )


@pytest.mark.parametrize("value", [b"", b"\3", b"\3\x41", b"\3\0"])
def test_bad_flow_is_refused(value: bytes) -> None:
    """Flow 0 is the path's own."""
    with pytest.raises(ProtocolError):
        path.parse_flow(value)


@pytest.mark.parametrize("packet, size", [(0, 18), (40, 18), (1200, 1200 - 33)])
def test_ping_fills_its_packet(packet: int, size: int) -> None:
    plain = path.encode_ping(STAMP, packet)
    assert len(plain) == size and plain[:10] == b"\0\1" + STAMP and not any(plain[10:])
    assert path.parse_message(plain) == Ping(STAMP)


def test_pong_is_no_longer_than_its_ping() -> None:
    plain = path.encode_pong(Pong(STAMP, 258))
    assert plain == b"\0\2" + STAMP + bytes(6) + b"\1\2"
    assert path.parse_message(plain) == Pong(STAMP, 258)
    assert len(plain) <= len(path.encode_ping(STAMP, 0))


def test_flow_that_is_gone_is_told() -> None:
    plain = path.encode_gone(Gone(300))
    assert plain == b"\0\3" + bytes(6) + b"\1\x2c" + bytes(8)
    assert path.parse_message(plain) == Gone(300)


def test_agent_is_told_that_it_has_moved() -> None:
    plain = path.encode_moved()
    assert plain == b"\0\4" + bytes(16)
    assert path.parse_message(plain) == Moved()


def test_message_of_a_later_version_is_skipped() -> None:
    assert path.parse_message(b"\0\7" + bytes(16)) is None


@pytest.mark.parametrize("size", range(18))
def test_cut_message_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError):
        path.parse_message(path.encode_ping(STAMP, 0)[:size])


def test_flow_number_precedes_the_payload() -> None:
    assert path.parse_flow_number(b"\x41\x2cpayload") == (300, 2)
    for plain in (b"", b"\x41"):
        with pytest.raises(ProtocolError):
            path.parse_flow_number(plain)


ADDRESSES = [b"\1\x7f\0\0\1\0\x35", b"\3\x04a.bc\1\xbb", b"\4" + bytes(15) + b"\1\0\x35"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_payload_begins_behind_its_address(address: bytes) -> None:
    assert path.find_payload(b"\5" + address + b"payload", 1) == 1 + len(address)
    assert path.find_payload(b"\5" + address, 1) == 1 + len(address)
    for size in range(len(address)):
        with pytest.raises(ProtocolError):
            path.find_payload(b"\5" + address[:size], 1)


def test_first_byte_belongs_to_no_other_protocol() -> None:
    """A listener could tell packets from datagrams of SOCKS5, STUN, TURN and QUIC."""
    assert path.TYPE not in {0, *range(0x40), *range(0x40, 0x50), *range(0xC0, 0x100)}
    assert path.HEADER.size + path.TAG_SIZE == path.OVERHEAD == 33
