"""The codec of UDP over TCP, version 2: requests in both roles, and frames within a buffer."""

from __future__ import annotations

from typing import Any

import pytest

from netproxy.errors import EndOfStream, ProtocolError
from netproxy.interfaces.addresses import Address, ip_text
from netproxy.net.stream import complete
from netproxy.protocol import uot
from netproxy.protocol.host import HostError, parse_host
from netproxy.protocol.uot import (
    UotRequest,
    encode_address,
    encode_request,
    parse_address,
    parse_frame,
    read_request,
)
from tests.support.names import REFUSED_NAMES
from tests.support.readers import TRAILING, BytesReader, check_read, check_refused

LONGEST = b".".join([b"a" * 63, b"a" * 63, b"a" * 63, b"a" * 61])
PACKED6 = b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1"
MAPPED = b"\0" * 10 + b"\xff\xff\x7f\0\0\1"

# An address, its bytes in a request and its bytes in a frame.
ADDRESSES = {
    "IPv4": (Address("192.0.2.1", 53), b"\x01\xc0\0\2\1\0\x35", b"\x00\xc0\0\2\1\0\x35"),
    "IPv4 unspecified": (Address("0.0.0.0", 0), b"\x01" + b"\0" * 6, b"\x00" + b"\0" * 6),
    "IPv6": (
        Address("2001:db8::1", 65535),
        b"\x04" + PACKED6 + b"\xff\xff",
        b"\x01" + PACKED6 + b"\xff\xff",
    ),
    "IPv6 unspecified": (Address("::", 0), b"\x04" + b"\0" * 18, b"\x01" + b"\0" * 18),
    "name": (
        Address("example.com", 443),
        b"\x03\x0bexample.com\x01\xbb",
        b"\x02\x0bexample.com\x01\xbb",
    ),
    "name of one byte": (Address("a", 1), b"\x03\x01a\0\1", b"\x02\x01a\0\1"),
    "name of 253 bytes": (
        Address(LONGEST.decode(), 80),
        b"\x03\xfd" + LONGEST + b"\0\x50",
        b"\x02\xfd" + LONGEST + b"\0\x50",
    ),
}

# Bytes behind ATYP, and the address they are read as; they are never written so.
CANONICAL = {
    "name in upper case": (b"\x0bExample.COM\0\x50", Address("example.com", 80)),
    "name with a dot behind it": (b"\x02a.\0\x50", Address("a", 80)),
    "name that is loose IPv4": (b"\x060x7f.1\0\x50", Address("127.0.0.1", 80)),
    "name that is IPv6": (b"\x05[::1]\0\x50", Address("::1", 80)),
}

IPV4_FRAME = b"\x00\xc0\0\2\1\0\x35\0\4data"
# A frame, whether its stream is connected, and the offset of its payload.
FRAMES = {
    "connected": (b"\0\4data", True, 2),
    "connected, empty": (b"\0\0", True, 2),
    "connected, 256 bytes": (b"\1\0" + b"d" * 256, True, 2),
    "connected, longest": (b"\xff\xff" + b"d" * 65535, True, 2),
    "IPv4": (IPV4_FRAME, False, 9),
    "IPv4, empty": (b"\x00\xc0\0\2\1\0\x35\0\0", False, 9),
    "IPv6": (b"\x01" + PACKED6 + b"\0\x35\0\4data", False, 21),
    "name": (b"\x02\x0bexample.com\x01\xbb\0\4data", False, 17),
    "name of one byte": (b"\x02\x01a\0\1\0\1d", False, 7),
    "name of 255 bytes, longest": (
        b"\x02\xff" + b"a" * 255 + b"\0\x50\xff\xff" + b"d" * 65535,
        False,
        261,
    ),
}

# With the longest name and the longest datagram.
FRAME_LIMIT = 1 + 1 + 255 + 2 + 2 + 65535


class Watched(bytearray):
    """A buffer that only lets single bytes be read: nothing of it may be copied."""

    def __getitem__(self, at: Any) -> Any:
        assert isinstance(at, int)
        assert 0 <= at < len(self)
        return super().__getitem__(at)


def cuts(length: int) -> list[int]:
    """Return every length below `length`; of a long payload only those at its ends."""
    return [cut for cut in range(length) if cut < 600 or cut > length - 20]


def test_constants_have_the_values_of_the_protocol() -> None:
    assert uot.MAGIC == "sp.v2.udp-over-tcp.arpa"
    assert uot.MAGIC_V1 == "sp.udp-over-tcp.arpa"
    assert (uot.IPV4, uot.IPV6, uot.NAME) == (0, 1, 2)
    for name in (uot.MAGIC, uot.MAGIC_V1):
        assert parse_host(name.encode()) == name


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(("target", "data", "_"), ADDRESSES.values(), ids=ADDRESSES)
def test_server_reads_the_request_that_the_client_encodes(
    connected: bool, target: Address, data: bytes, _: bytes
) -> None:
    request = UotRequest(connected, target)
    assert encode_request(request) == bytes((connected,)) + data
    check_read(read_request, encode_request(request), request)


@pytest.mark.parametrize(("data", "target"), CANONICAL.values(), ids=CANONICAL)
def test_host_is_read_in_its_canonical_spelling(data: bytes, target: Address) -> None:
    """Hazard 11."""
    check_read(read_request, b"\0\3" + data, UotRequest(False, target))
    assert parse_address(b"\2" + data) == target


def test_v4_mapped_address_is_ipv4() -> None:
    """Hazard 11."""
    check_read(
        read_request, b"\1\4" + MAPPED + b"\0\x50", UotRequest(True, Address("127.0.0.1", 80))
    )
    assert parse_address(b"\1" + MAPPED + b"\0\x50") == Address("127.0.0.1", 80)


def test_connected_is_read_as_a_boolean() -> None:
    check_read(read_request, b"\0\1\xc0\0\2\1\0\x35", UotRequest(False, Address("192.0.2.1", 53)))
    check_read(read_request, b"\1\1\xc0\0\2\1\0\x35", UotRequest(True, Address("192.0.2.1", 53)))
    assert complete(read_request(BytesReader(b"\1\1\xc0\0\2\1\0\x35"))).connected is True


@pytest.mark.parametrize("connected", [2, 5, 0xFF])
def test_connected_above_1_is_refused(connected: int) -> None:
    check_refused(read_request, bytes((connected, 1)), ProtocolError)


@pytest.mark.parametrize("address_type", [0, 2, 5, 0xFF])
def test_request_with_unknown_address_type_is_refused(address_type: int) -> None:
    check_refused(read_request, bytes((0, address_type)), ProtocolError)


@pytest.mark.parametrize("name", REFUSED_NAMES.values(), ids=REFUSED_NAMES)
def test_invalid_name_is_refused(name: bytes) -> None:
    data = bytes((len(name),)) + name + b"\0\x50"
    check_refused(read_request, b"\0\3" + data, HostError)
    with pytest.raises(ProtocolError):
        parse_address(b"\2" + data)


def test_end_of_stream_within_a_request_is_partial() -> None:
    with pytest.raises(EndOfStream) as caught:
        complete(read_request(BytesReader(b"\0")))
    assert caught.value.partial


@pytest.mark.parametrize(("target", "_", "data"), ADDRESSES.values(), ids=ADDRESSES)
def test_address_of_a_frame_has_these_bytes(target: Address, _: bytes, data: bytes) -> None:
    assert encode_address(target) == data
    assert parse_address(data) == target
    for cut in range(len(data)):
        with pytest.raises(ProtocolError):
            parse_address(data[:cut])
    with pytest.raises(ProtocolError):
        parse_address(data + b"\0")


@pytest.mark.parametrize("address_type", [3, 4, 5, 0xFF])
@pytest.mark.parametrize(
    "rest", [b"", b"\xc0\0\2\1\0\x35", b"\x01a\0\1", PACKED6 + b"\0\1"], ids=len
)
def test_address_of_unknown_type_is_refused(address_type: int, rest: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_address(bytes((address_type,)) + rest)


def test_scope_of_a_link_local_address_is_not_encoded() -> None:
    assert (
        encode_address(Address("fe80::1%2", 1080)) == b"\x01\xfe\x80" + b"\0" * 13 + b"\1\x04\x38"
    )


@pytest.mark.parametrize(("frame", "connected", "payload"), FRAMES.values(), ids=FRAMES)
def test_frame_is_found_at_any_offset(frame: bytes, connected: bool, payload: int) -> None:
    for before in (b"", b"x", IPV4_FRAME):
        start, end = len(before), len(before) + len(frame)
        for behind in (b"", b"\xff", frame):
            data = before + frame + behind
            for buffer in (bytearray(data), memoryview(data), Watched(data)):
                assert parse_frame(buffer, start, len(data), connected) == (
                    start,
                    start + payload,
                    end,
                )


@pytest.mark.parametrize(("frame", "connected", "payload"), FRAMES.values(), ids=FRAMES)
def test_incomplete_frame_is_none(frame: bytes, connected: bool, payload: int) -> None:
    for start in (0, 3):
        data = b"xxx"[:start] + frame
        # Behind `end` are bytes of an earlier read.
        filled = Watched(data + b"behind")
        for cut in cuts(len(frame)):
            assert parse_frame(filled, start, start + cut, connected) is None
            assert parse_frame(Watched(data[: start + cut]), start, start + cut, connected) is None


def test_consecutive_frames_are_found_in_order() -> None:
    frames = [data for data, connected, _ in FRAMES.values() if not connected]
    buffer = bytearray(b"".join(frames) + frames[0][:5])
    start, parsed = 0, []
    while (frame := parse_frame(buffer, start, len(buffer), False)) is not None:
        parsed.append(bytes(buffer[start : frame[2]]))
        start = frame[2]
    assert parsed == frames
    assert len(buffer) - start == 5


@pytest.mark.parametrize(("target", "_", "address"), ADDRESSES.values(), ids=ADDRESSES)
def test_address_lies_between_start_and_length(target: Address, _: bytes, address: bytes) -> None:
    buffer = bytearray(b"xx" + address + b"\0\3abc")
    at, payload, end = parse_frame(buffer, 2, len(buffer), False) or (0, 0, 0)
    assert parse_address(bytes(buffer[at : payload - 2])) == target
    assert bytes(buffer[payload:end]) == b"abc"


def test_address_of_a_connected_frame_is_empty() -> None:
    at, payload, _ = parse_frame(bytearray(b"xx\0\3abc"), 2, 7, True) or (0, 0, 0)
    assert at == payload - 2 == 2


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "data", [b"\3\x0b", b"\4\0", b"\xff\xff", b"\2\0", b"\3\1a\0\1\0\1d", b"\2\0\0\1\0\1d"]
)
def test_frame_of_unknown_type_or_empty_name_is_refused_at_once(data: bytes, start: int) -> None:
    buffer = Watched(b"xxx"[:start] + data)
    for end in range(start + 2, len(buffer) + 1):
        with pytest.raises(ProtocolError):
            parse_frame(buffer, start, end, False)
    assert parse_frame(buffer, start, start + 1, False) is None
    assert parse_frame(buffer, start, start, False) is None


def test_longest_frame_has_65796_bytes() -> None:
    assert FRAME_LIMIT == 65796 == max(len(frame) for frame, _, _ in FRAMES.values())


def test_any_addresses_are_read_as_they_were_encoded() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    names = (
        st.lists(st.text("abcxyz019-_", min_size=1, max_size=63), min_size=1, max_size=3)
        .map(".".join)
        .filter(is_name)
    )
    hosts = st.one_of(names, st.ip_addresses().map(lambda address: ip_text(address.packed)))
    targets = st.builds(Address, hosts, st.integers(0, 65535))

    @settings(max_examples=200, deadline=None)
    @given(targets, st.booleans(), st.binary(max_size=20), st.binary(max_size=300))
    def check(target: Address, connected: bool, before: bytes, payload: bytes) -> None:
        reader = BytesReader(encode_request(UotRequest(connected, target)) + TRAILING)
        assert complete(read_request(reader)) == (connected, target)
        assert reader.rest() == TRAILING
        address = b"" if connected else encode_address(target)
        buffer = Watched(before + address + len(payload).to_bytes(2, "big") + payload)
        at, start = len(before), len(buffer) - len(payload)
        assert parse_frame(buffer, at, len(buffer), connected) == (at, start, len(buffer))
        assert parse_frame(buffer, at, len(buffer) - 1, connected) is None
        assert connected or parse_address(address) == target

    check()


def test_any_bytes_parse_or_raise_a_protocol_error() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings, strategies as st

    pieces = st.sampled_from(
        [
            b"\0",
            b"\1",
            b"\2",
            b"\3",
            b"\4",
            b"a",
            b".",
            b"\x0bexample.com",
            b"\0" * 6,
            b"\0" * 18,
            b"\0\4data",
        ]
    )
    soup = st.one_of(st.lists(pieces, max_size=8).map(b"".join), st.binary(max_size=40))

    def outcome(data: bytes, step: int) -> object:
        reader = BytesReader(data, step)
        try:
            return complete(read_request(reader)), reader.rest()
        except ProtocolError as error:
            return type(error), str(error)

    @settings(max_examples=200, deadline=None)
    @given(soup)
    def check(data: bytes) -> None:
        assert outcome(data, 0) == outcome(data, 1)
        try:
            parse_address(data)
        except ProtocolError:
            pass
        for connected in (False, True):
            try:
                frame = parse_frame(Watched(data), 0, len(data), connected)
            except ProtocolError:
                continue
            assert frame is None or 0 == frame[0] < frame[1] <= frame[2] <= len(data)

    check()


def is_name(host: str) -> bool:
    try:
        return parse_host(host.encode()) == host
    except HostError:
        return False
