"""Capsules, their variable-length integers, and the UDP payloads in DATAGRAM capsules."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.errors import ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.protocol.http.capsule import (
    CAPSULE_LIMIT,
    DATAGRAM,
    UDP_PAYLOAD_LIMIT,
    VALUE_LIMIT,
    VARINT_LIMIT,
    Buffer,
    Capsules,
    datagram_header,
    encode_varint,
    parse_head,
    parse_varint,
    udp_payload,
)

TARGET = Address("192.0.2.1", 53)

VARINTS = {
    # RFC 9000 section A.1
    "RFC 9000, 8 bytes": (151288809941952652, "c2197c5eff14e88c"),
    "RFC 9000, 4 bytes": (494878333, "9d7f3e7d"),
    "RFC 9000, 2 bytes": (15293, "7bbd"),
    "RFC 9000, 1 byte": (37, "25"),
    # On both sides of every boundary.
    "0": (0, "00"),
    "2^6 - 1": (63, "3f"),
    "2^6": (64, "4040"),
    "2^14 - 1": (16383, "7fff"),
    "2^14": (16384, "80004000"),
    "2^30 - 1": ((1 << 30) - 1, "bfffffff"),
    "2^30": (1 << 30, "c000000040000000"),
    "2^62 - 1": ((1 << 62) - 1, "ffffffffffffffff"),
}

LONGER_FORMS = {
    "37 in 2 bytes, RFC 9000": (37, "4025"),
    "0 in 2 bytes": (0, "4000"),
    "0 in 4 bytes": (0, "80000000"),
    "0 in 8 bytes": (0, "c000000000000000"),
    "63 in 8 bytes": (63, "c00000000000003f"),
    "16383 in 4 bytes": (16383, "80003fff"),
    "2^30 - 1 in 8 bytes": ((1 << 30) - 1, "c00000003fffffff"),
}

# The bytes of a capsule, its type, and the bytes of its value.
CAPSULES = {
    "DATAGRAM of 3 bytes": ("0004 00 616263", DATAGRAM, "00616263"),
    "empty payload": ("0001 00", DATAGRAM, "00"),
    "empty value": ("0000", DATAGRAM, ""),
    "type in 8 bytes": ("c000000000000000 01 00", DATAGRAM, "00"),
    "length in 8 bytes": ("00 c000000000000001 00", DATAGRAM, "00"),
    "both in 2 bytes": ("4000 4002 0061", DATAGRAM, "0061"),
    "another context": ("0003 026162", DATAGRAM, "026162"),
    "grease 0x17": ("17 02 ffff", 0x17, "ffff"),
    "grease 0x29 * 1000 + 0x17": ("8000a03f 00", 0x29 * 1000 + 0x17, ""),
    "largest type": ("ffffffffffffffff 01 61", VARINT_LIMIT, "61"),
}

REFUSED_PAYLOADS = {
    "no context ID": b"",
    "half a context ID of 2 bytes": b"\x40",
    "half a context ID of 4 bytes": b"\x80\0\0",
    "half a context ID of 8 bytes": b"\xc0\0\0\0\0\0\0",
    "65528 bytes": bytes(1 + 65528),
    "65528 bytes behind an ID of 2 bytes": b"\x40\0" + bytes(65528),
    "65528 bytes behind an ID of 4 bytes": b"\x80\0\0\0" + bytes(65528),
    "70000 bytes": bytes(70000),
}

BUFFERS: dict[str, Callable[[bytes], Buffer]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
}
buffers = pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS)


def next_capsule(buffer: Buffer, start: int, end: int) -> tuple[int, int, int] | None:
    """Return type, start and end of the value of a capsule that is whole."""
    head = parse_head(buffer, start, end)
    if head is None or head[1] + head[2] > end:
        return None
    return head[0], head[1], head[1] + head[2]


@pytest.mark.parametrize(("value", "data"), VARINTS.values(), ids=VARINTS)
def test_varint_has_these_bytes(value: int, data: str) -> None:
    assert encode_varint(value) == bytes.fromhex(data)


@buffers
@pytest.mark.parametrize(
    ("value", "data"), [*VARINTS.values(), *LONGER_FORMS.values()], ids=[*VARINTS, *LONGER_FORMS]
)
def test_varint_is_read_in_any_form_and_at_any_offset(
    value: int, data: str, buffer: Callable[[bytes], Buffer]
) -> None:
    raw = bytes.fromhex(data)
    assert parse_varint(buffer(raw), 0, len(raw)) == (value, len(raw))
    assert parse_varint(buffer(b"\xff\x05" + raw + b"\xff"), 2, 3 + len(raw)) == (
        value,
        2 + len(raw),
    )


@pytest.mark.parametrize(
    ("value", "data"), [*VARINTS.values(), *LONGER_FORMS.values()], ids=[*VARINTS, *LONGER_FORMS]
)
def test_incomplete_varint_is_none_whatever_lies_behind_the_end(value: int, data: str) -> None:
    raw = bytes.fromhex(data)
    for cut in range(len(raw)):
        assert parse_varint(raw[:cut], 0, cut) is None
        assert parse_varint(b"\xff" + raw, 1, 1 + cut) is None


@pytest.mark.parametrize("value", [-1, VARINT_LIMIT + 1, 1 << 64])
def test_number_out_of_range_is_a_value_error(value: int) -> None:
    with pytest.raises(ValueError):
        encode_varint(value)


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (0, "000100"),
        (3, "000400"),
        (62, "003f00"),
        (63, "00404000"),
        (1200, "0044b100"),
        (1472, "0045c100"),
        (16382, "007fff00"),
        (16383, "008000400000"),
        (65507, "008000ffe400"),
        (65527, "008000fff800"),
    ],
)
def test_datagram_header_has_these_bytes(length: int, header: str) -> None:
    assert datagram_header(length) == bytes.fromhex(header)


@pytest.mark.parametrize(
    "length", [0, 1, 62, 63, 64, 1200, 16381, 16382, 16383, 65507, UDP_PAYLOAD_LIMIT]
)
def test_payload_is_found_behind_its_header(length: int) -> None:
    raw = b"\xff" + datagram_header(length) + b"\x61" * length
    capsule_type, start, size = parse_head(memoryview(raw), 1, len(raw)) or (None, 0, 0)
    assert (capsule_type, start + size) == (DATAGRAM, len(raw))
    assert udp_payload(raw, start, len(raw)) == len(raw) - length
    assert len(raw) - 1 <= CAPSULE_LIMIT


@buffers
@pytest.mark.parametrize(("data", "capsule_type", "value"), CAPSULES.values(), ids=CAPSULES)
def test_head_is_parsed_at_any_offset(
    data: str, capsule_type: int, value: str, buffer: Callable[[bytes], Buffer]
) -> None:
    raw, length = bytes.fromhex(data), len(bytes.fromhex(value))
    for before, behind in ((b"", b""), (b"\xc0\xff", b""), (b"", b"\0\1"), (b"\0", b"\xff" * 9)):
        whole = before + raw + behind
        end = len(before) + len(raw)
        assert parse_head(buffer(whole), len(before), len(whole)) == (
            capsule_type,
            end - length,
            length,
        )
        assert whole[end - length : end] == bytes.fromhex(value)


@pytest.mark.parametrize(("data", "capsule_type", "value"), CAPSULES.values(), ids=CAPSULES)
def test_head_is_none_until_it_is_complete(data: str, capsule_type: int, value: str) -> None:
    raw, length = bytes.fromhex(data), len(bytes.fromhex(value))
    for cut in range(len(raw)):
        expected = None if cut < len(raw) - length else (capsule_type, len(raw) - length, length)
        assert parse_head(raw[:cut], 0, cut) == parse_head(raw, 0, cut) == expected


def test_consecutive_capsules_are_found_in_order() -> None:
    raw = b"".join(bytes.fromhex(data) for data, _, _ in CAPSULES.values())
    at, capsule_types = 0, []
    while capsule := next_capsule(raw, at, len(raw)):
        capsule_types.append(capsule[0])
        at = capsule[2]
    assert at == len(raw)
    assert capsule_types == [capsule_type for _, capsule_type, _ in CAPSULES.values()]


@pytest.mark.parametrize(("data", "capsule_type", "value"), CAPSULES.values(), ids=CAPSULES)
def test_framing_finds_payloads_and_skips_everything_else(
    data: str, capsule_type: int, value: str
) -> None:
    raw, start = bytes.fromhex(data), len(bytes.fromhex(data)) - len(bytes.fromhex(value))
    if capsule_type == DATAGRAM and not value:
        with pytest.raises(ProtocolError):
            Capsules(TARGET).find(bytearray(raw), 0, len(raw))
        return
    payload = udp_payload(raw, start, len(raw)) if capsule_type == DATAGRAM else None
    # What is skipped has a payload if it is a datagram.
    skipped_from = start if capsule_type == DATAGRAM else len(raw)
    expected = (skipped_from, len(raw), None) if payload is None else (payload, len(raw), b"")
    for before in (b"", b"\xc0"):
        memory = bytearray(before + raw + b"\0")
        at, end = len(before), len(before) + len(raw)
        shifted = (expected[0] + at, expected[1] + at, expected[2])
        assert Capsules(TARGET).find(memory, at, len(memory)) == shifted
        for cut in range(at, end):
            # The value of another type is skipped as soon as its length is known.
            skipped = capsule_type != DATAGRAM and cut >= at + start
            assert Capsules(TARGET).find(memory, at, cut) == (shifted if skipped else None)


def test_framing_is_for_one_target() -> None:
    framing = Capsules(TARGET)
    assert (framing.encode(TARGET), framing.parse(b"")) == (b"", TARGET)
    assert framing.prefix(b"", 3) == datagram_header(3)
    with pytest.raises(ValueError, match="192.0.2.1:53 alone"):
        framing.encode(Address("192.0.2.2", 53))


@pytest.mark.parametrize("length", [VALUE_LIMIT + 1, 1 << 30, VARINT_LIMIT])
def test_unknown_capsule_of_any_length_is_skipped(length: int) -> None:
    raw = b"\x17" + encode_varint(length)
    assert parse_head(raw, 0, len(raw)) == (0x17, len(raw), length)
    assert Capsules(TARGET).find(bytearray(raw), 0, len(raw)) == (
        *(len(raw) + length, len(raw) + length),
        None,
    )


@pytest.mark.parametrize("capsule_type", ["00", "4000", "80000000", "c000000000000000"])
def test_datagram_too_long_for_a_payload_is_refused_at_its_header(capsule_type: str) -> None:
    raw = bytes.fromhex(capsule_type) + encode_varint(VALUE_LIMIT)
    assert parse_head(raw, 0, len(raw)) == (DATAGRAM, len(raw), VALUE_LIMIT)
    for length in (VALUE_LIMIT + 1, 1 << 30, VARINT_LIMIT):
        raw = bytes.fromhex(capsule_type) + encode_varint(length)
        for parse in (parse_head, Capsules(TARGET).find):
            with pytest.raises(ProtocolError):
                parse(bytearray(raw), 0, len(raw))
            assert parse(bytearray(raw), 0, len(raw) - 1) is None


def test_largest_datagram_in_its_longest_form_has_the_size_of_the_limit() -> None:
    raw = (
        b"\xc0"
        + bytes(7)
        + (VALUE_LIMIT | 3 << 62).to_bytes(8, "big")
        + b"\xc0"
        + bytes(7)
        + bytes(UDP_PAYLOAD_LIMIT)
    )
    assert len(raw) == CAPSULE_LIMIT == 65551
    assert parse_head(raw, 0, len(raw)) == (DATAGRAM, 16, CAPSULE_LIMIT - 16)
    assert udp_payload(raw, 16, CAPSULE_LIMIT) == 24
    assert Capsules(TARGET).find(bytearray(raw), 0, len(raw)) == (24, CAPSULE_LIMIT, b"")


@buffers
@pytest.mark.parametrize(
    ("value", "begins"),
    [
        (b"\0", 1),
        (b"\0abc", 1),
        (b"\x40\0abc", 2),
        (b"\x80\0\0\0", 4),
        (b"\xc0" + bytes(7) + b"a", 8),
        (b"\0" + bytes(65527), 1),
        (b"\x40\0" + bytes(65527), 2),
        (b"\1abc", None),
        (b"\2", None),
        (b"\x3f", None),
        (b"\x40\2", None),
        (b"\xff" * 8, None),
        (b"\1" + bytes(65534), None),
    ],
)
def test_payload_of_context_0_follows_its_context_id(
    value: bytes, begins: int | None, buffer: Callable[[bytes], Buffer]
) -> None:
    assert udp_payload(buffer(value), 0, len(value)) == begins
    assert udp_payload(buffer(b"\7" + value + b"\7"), 1, 1 + len(value)) == (
        None if begins is None else begins + 1
    )


@pytest.mark.parametrize("value", REFUSED_PAYLOADS.values(), ids=REFUSED_PAYLOADS)
def test_value_without_context_or_with_too_long_payload_is_refused(value: bytes) -> None:
    for before in (b"", b"\0"):
        with pytest.raises(ProtocolError):
            udp_payload(before + value + b"\0" * 8, len(before), len(before) + len(value))


def test_limits_are_those_of_the_rfcs() -> None:
    assert (DATAGRAM, VARINT_LIMIT, UDP_PAYLOAD_LIMIT) == (0, 4611686018427387903, 65535 - 8)


def check_stream(raw: bytes) -> None:
    """Read capsules from any bytes: offsets are in order and within them, or a ProtocolError comes.

    It does not matter how far the buffer is filled.
    """
    at = 0
    try:
        while capsule := next_capsule(raw, at, len(raw)):
            capsule_type, start, end = capsule
            assert at < start <= end <= len(raw)
            assert next_capsule(raw[at:end], 0, end - at) == (capsule_type, start - at, end - at)
            assert next_capsule(raw, at, end - 1) is None
            payload = udp_payload(raw, start, end)
            assert payload is None or start < payload <= end
            at = end
    except ProtocolError:
        return
    head = parse_head(raw, at, len(raw))
    assert head is None or head[1] + head[2] > len(raw)


def test_every_stream_of_two_bytes_is_read_or_refused() -> None:
    for number in range(1 << 16):
        check_stream(number.to_bytes(2, "big"))


try:
    from hypothesis import given, settings, strategies as st
except ImportError:  # the tables above are enough
    pass
else:
    many = settings(max_examples=150, deadline=None)
    numbers = st.one_of(st.integers(0, 100), st.integers(0, VARINT_LIMIT))

    @many
    @given(numbers, st.binary(max_size=9), st.binary(max_size=9))
    def test_any_number_is_read_back_and_has_its_shortest_form(
        value: int, before: bytes, behind: bytes
    ) -> None:
        raw = encode_varint(value)
        end = len(before) + len(raw)
        assert parse_varint(before + raw + behind, len(before), end + len(behind)) == (value, end)
        assert len(raw) == 1 or value >= 1 << (4 * len(raw) - 2)

    @many
    @given(st.lists(st.tuples(numbers, st.binary(max_size=40)), max_size=6), st.integers(0, 400))
    def test_capsules_are_found_up_to_where_the_buffer_ends(
        capsules: list[tuple[int, bytes]], cut: int
    ) -> None:
        encoded = [
            encode_varint(capsule_type) + encode_varint(len(value)) + value
            for capsule_type, value in capsules
        ]
        raw, at = b"".join(encoded), 0
        end = min(cut, len(raw))
        for (capsule_type, value), piece in zip(capsules, encoded, strict=True):
            capsule = next_capsule(raw, at, end)
            if at + len(piece) > end:
                assert capsule is None
                return
            at += len(piece)
            assert capsule == (capsule_type, at - len(value), at)
            assert raw[capsule[1] : capsule[2]] == value

    @many
    @given(
        st.lists(
            st.one_of(
                st.sampled_from([b"\0", b"\1", b"\x40\0", b"\x17", b"\0\2\0a", b"\xc0" + bytes(7)]),
                st.binary(max_size=3),
            )
        ).map(b"".join)
    )
    def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
        check_stream(raw)
