"""The framing of datagrams through an exit of a tunnel: find, encode and refuse."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol.http.capsule import encode_varint
from netproxy.protocol.host import HostError
from netproxy.protocol.tunnels.datagrams import AddressedDatagrams

TARGETS = {
    "IPv4": (Address("192.0.2.1", 53), b"\1\xc0\0\2\1\0\x35"),
    "IPv6": (Address("2001:db8::1", 53), b"\4\x20\1\x0d\xb8" + bytes(11) + b"\1\0\x35"),
    "name": (Address("printer.lan", 9100), b"\3\x0bprinter.lan\x23\x8c"),
}


@pytest.mark.parametrize("size", [0, 1, 40, 1200, 65507])
@pytest.mark.parametrize(("target", "address"), TARGETS.values(), ids=TARGETS)
def test_datagram_is_found_within_a_buffer(target: Address, address: bytes, size: int) -> None:
    framing = AddressedDatagrams()
    assert framing.encode(target) == address and framing.parse(address) == target
    prefix = framing.prefix(address, size)
    assert prefix == b"\0" + encode_varint(1 + len(address) + size) + b"\2" + address
    memory = bytearray(b"before" + prefix + bytes(size) + b"behind")
    start, end = 6, 6 + len(prefix) + size
    assert framing.find(memory, start, len(memory)) == (6 + len(prefix), end, address)
    for cut in {*range(start, min(end, start + 60)), end - 1}:
        assert framing.find(memory, start, cut) is None


@pytest.mark.parametrize(
    "data", [b"\1\3abc", b"\0\3\0ab", b"\0\1\4"], ids=["other capsule", "context 0", "context 4"]
)
def test_other_capsules_and_contexts_are_skipped(data: bytes) -> None:
    frame = AddressedDatagrams().find(bytearray(data), 0, len(data))
    assert frame is not None and frame[1:] == (len(data), None)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0",
        b"\0\1\2",
        b"\0\2\2\1",
        b"\0\3\2\2\0",
        b"\0\7\2\1\0\0\0\0\0",
        b"\0" + encode_varint(1 << 32),
        b"\0" + encode_varint(65775),
        b"\0" + encode_varint(8 + 65508) + b"\2\1" + bytes(6 + 65508),
    ],
    ids=[
        "no context",
        "no address",
        "address type alone",
        "unknown address type",
        "address cut off",
        "capsule of 2^32 bytes",
        "capsule over the limit",
        "payload over the limit",
    ],
)
def test_malformed_datagram_ends_the_stream(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        AddressedDatagrams().find(bytearray(data), 0, len(data))


def test_invalid_name_in_an_address_is_refused() -> None:
    with pytest.raises(HostError):
        AddressedDatagrams().parse(b"\3\2..\0\1")


@given(strategies.binary(max_size=200))
def test_arbitrary_bytes_raise_no_other_error_than_protocol_error(data: bytes) -> None:
    framing, memory = AddressedDatagrams(), bytearray(data)
    try:
        frame = framing.find(memory, 0, len(memory))
        if frame and frame[2] is not None:
            assert 0 <= frame[0] <= frame[1] <= len(memory)
            framing.parse(frame[2])
    except ProtocolError:
        pass
