"""Capsules, the numbers they are made of, and the UDP payloads in DATAGRAM capsules."""

from __future__ import annotations

from typing import Callable

import pytest

from netproxy.errors import ProtocolError
from netproxy.protocol.capsule import (
    CAPSULE_LIMIT,
    DATAGRAM,
    UDP_PAYLOAD_LIMIT,
    VALUE_LIMIT,
    VARINT_LIMIT,
    Buffer,
    Capsule,
    datagram_header,
    encode_varint,
    head,
    next_capsule,
    parse_varint,
    udp_payload,
)

VARINTS = {
    # RFC 9000 section A.1
    "RFC 9000, 8 bytes": (151288809941952652, "c2197c5eff14e88c"),
    "RFC 9000, 4 bytes": (494878333, "9d7f3e7d"),
    "RFC 9000, 2 bytes": (15293, "7bbd"),
    "RFC 9000, 1 byte": (37, "25"),
    # both sides of every boundary
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

CAPSULES = {  # kind, value
    "DATAGRAM of 3 bytes": ("0004 00 616263", DATAGRAM, "00616263"),
    "empty payload": ("0001 00", DATAGRAM, "00"),
    "empty value": ("0000", DATAGRAM, ""),
    "kind in 8 bytes": ("c000000000000000 01 00", DATAGRAM, "00"),
    "length in 8 bytes": ("00 c000000000000001 00", DATAGRAM, "00"),
    "both in 2 bytes": ("4000 4002 0061", DATAGRAM, "0061"),
    "another context": ("0003 026162", DATAGRAM, "026162"),
    "grease 0x17": ("17 02 ffff", 0x17, "ffff"),
    "grease 0x29 * 1000 + 0x17": ("8000a03f 00", 0x29 * 1000 + 0x17, ""),
    "largest kind": ("ffffffffffffffff 01 61", VARINT_LIMIT, "61"),
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


@pytest.mark.parametrize(("value", "data"), VARINTS.values(), ids=VARINTS)
def test_varint_has_these_bytes(value: int, data: str) -> None:
    assert encode_varint(value) == bytes.fromhex(data)


@buffers
@pytest.mark.parametrize(
    ("value", "data"), [*VARINTS.values(), *LONGER_FORMS.values()], ids=[*VARINTS, *LONGER_FORMS]
)
def test_varint_is_read_in_any_form_and_place(
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
def test_varint_cut_short_is_none_whatever_lies_behind_the_end(value: int, data: str) -> None:
    raw = bytes.fromhex(data)
    for cut in range(len(raw)):
        assert parse_varint(raw[:cut], 0, cut) is None
        assert parse_varint(b"\xff" + raw, 1, 1 + cut) is None


@pytest.mark.parametrize("value", [-1, VARINT_LIMIT + 1, 1 << 64])
def test_number_that_is_no_varint_is_a_value_error(value: int) -> None:
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
def test_payload_behind_its_header_reads_back(length: int) -> None:
    raw = b"\xff" + datagram_header(length) + b"\x61" * length
    found = next_capsule(memoryview(raw), 1, len(raw))
    assert found and (found.kind, found.end) == (DATAGRAM, len(raw))
    assert udp_payload(raw, found.start, found.end) == len(raw) - length
    assert len(raw) - 1 <= CAPSULE_LIMIT


@buffers
@pytest.mark.parametrize(("data", "kind", "value"), CAPSULES.values(), ids=CAPSULES)
def test_capsule_is_found_in_its_place(
    data: str, kind: int, value: str, buffer: Callable[[bytes], Buffer]
) -> None:
    raw, length = bytes.fromhex(data), len(bytes.fromhex(value))
    for before, behind in ((b"", b""), (b"\xc0\xff", b""), (b"", b"\0\1"), (b"\0", b"\xff" * 9)):
        whole = before + raw + behind
        end = len(before) + len(raw)
        assert head(buffer(whole), len(before), len(whole)) == (kind, end - length, length)
        found = next_capsule(buffer(whole), len(before), len(whole))
        assert found == Capsule(kind, end - length, end)
        assert whole[found.start : found.end] == bytes.fromhex(value)


@pytest.mark.parametrize(("data", "kind", "value"), CAPSULES.values(), ids=CAPSULES)
def test_capsule_cut_short_is_none_but_its_header_is_told_when_it_is_there(
    data: str, kind: int, value: str
) -> None:
    raw, length = bytes.fromhex(data), len(bytes.fromhex(value))
    for cut in range(len(raw)):
        assert next_capsule(raw[:cut], 0, cut) is None
        assert next_capsule(raw, 0, cut) is None
        assert head(raw, 0, cut) == (
            None if cut < len(raw) - length else (kind, len(raw) - length, length)
        )


def test_capsules_follow_each_other() -> None:
    raw = b"".join(bytes.fromhex(data) for data, _, _ in CAPSULES.values())
    at, kinds = 0, []
    while found := next_capsule(raw, at, len(raw)):
        kinds.append(found.kind)
        at = found.end
    assert at == len(raw)
    assert kinds == [kind for _, kind, _ in CAPSULES.values()]


@pytest.mark.parametrize("length", [VALUE_LIMIT + 1, 1 << 30, VARINT_LIMIT])
def test_unknown_capsule_of_any_length_is_told_to_be_skipped(length: int) -> None:
    raw = b"\x17" + encode_varint(length)
    assert head(raw, 0, len(raw)) == (0x17, len(raw), length)
    assert next_capsule(raw, 0, len(raw)) is None


@pytest.mark.parametrize("kind", ["00", "4000", "80000000", "c000000000000000"])
def test_datagram_that_can_hold_no_payload_is_refused_by_its_header_alone(kind: str) -> None:
    raw = bytes.fromhex(kind) + encode_varint(VALUE_LIMIT)
    assert head(raw, 0, len(raw)) == (DATAGRAM, len(raw), VALUE_LIMIT)
    for length in (VALUE_LIMIT + 1, 1 << 30, VARINT_LIMIT):
        raw = bytes.fromhex(kind) + encode_varint(length)
        for found in (head, next_capsule):
            with pytest.raises(ProtocolError):
                found(raw, 0, len(raw))
            assert found(raw, 0, len(raw) - 1) is None


def test_largest_datagram_in_its_longest_form_is_of_the_limit() -> None:
    raw = (
        b"\xc0"
        + bytes(7)
        + (VALUE_LIMIT | 3 << 62).to_bytes(8, "big")
        + b"\xc0"
        + bytes(7)
        + bytes(UDP_PAYLOAD_LIMIT)
    )
    assert len(raw) == CAPSULE_LIMIT == 65551
    assert next_capsule(raw, 0, len(raw)) == Capsule(DATAGRAM, 16, CAPSULE_LIMIT)
    assert udp_payload(raw, 16, CAPSULE_LIMIT) == 24


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
def test_payload_of_context_0_begins_behind_it(
    value: bytes, begins: int | None, buffer: Callable[[bytes], Buffer]
) -> None:
    assert udp_payload(buffer(value), 0, len(value)) == begins
    assert udp_payload(buffer(b"\7" + value + b"\7"), 1, 1 + len(value)) == (
        None if begins is None else begins + 1
    )


@pytest.mark.parametrize("value", REFUSED_PAYLOADS.values(), ids=REFUSED_PAYLOADS)
def test_value_without_a_context_or_with_too_much_is_refused(value: bytes) -> None:
    for before in (b"", b"\0"):
        with pytest.raises(ProtocolError):
            udp_payload(before + value + b"\0" * 8, len(before), len(before) + len(value))


def test_limits_are_those_of_the_rfcs() -> None:
    assert (DATAGRAM, VARINT_LIMIT, UDP_PAYLOAD_LIMIT) == (0, 4611686018427387903, 65535 - 8)


def check_stream(raw: bytes) -> None:
    """Whatever the bytes: places in order and within them, the same for every filling, or a ProtocolError."""
    at = 0
    try:
        while found := next_capsule(raw, at, len(raw)):
            assert at < found.start <= found.end <= len(raw)
            assert next_capsule(raw[at : found.end], 0, found.end - at) == (
                found.kind,
                found.start - at,
                found.end - at,
            )
            assert next_capsule(raw, at, found.end - 1) is None
            payload = udp_payload(raw, found.start, found.end)
            assert payload is None or found.start < payload <= found.end
            at = found.end
    except ProtocolError:
        return
    told = head(raw, at, len(raw))
    assert told is None or told[1] + told[2] > len(raw)


def test_every_stream_of_two_bytes_is_read_or_refused() -> None:
    for number in range(1 << 16):
        check_stream(number.to_bytes(2, "big"))


try:
    from hypothesis import given, settings, strategies as st
except ImportError:  # the tables above stand alone
    pass
else:
    many = settings(max_examples=300, deadline=None)
    numbers = st.one_of(st.integers(0, 100), st.integers(0, VARINT_LIMIT))

    @many
    @given(numbers, st.binary(max_size=9), st.binary(max_size=9))
    def test_any_number_reads_back_and_is_shortest(
        value: int, before: bytes, behind: bytes
    ) -> None:
        raw = encode_varint(value)
        end = len(before) + len(raw)
        assert parse_varint(before + raw + behind, len(before), end + len(behind)) == (value, end)
        assert len(raw) == 1 or value >= 1 << (4 * len(raw) - 2)

    @many
    @given(st.lists(st.tuples(numbers, st.binary(max_size=40)), max_size=6), st.integers(0, 400))
    def test_any_capsules_read_back_up_to_where_they_are_cut(
        capsules: list[tuple[int, bytes]], cut: int
    ) -> None:
        encoded = [
            encode_varint(kind) + encode_varint(len(value)) + value for kind, value in capsules
        ]
        raw, at = b"".join(encoded), 0
        end = min(cut, len(raw))
        for (kind, value), piece in zip(capsules, encoded):
            found = next_capsule(raw, at, end)
            if at + len(piece) > end:
                assert found is None
                return
            assert found and (found.kind, raw[found.start : found.end]) == (kind, value)
            at = found.end

    @many
    @given(
        st.lists(
            st.one_of(
                st.sampled_from([b"\0", b"\1", b"\x40\0", b"\x17", b"\0\2\0a", b"\xc0" + bytes(7)]),
                st.binary(max_size=3),
            )
        ).map(b"".join)
    )
    def test_garbage_is_read_or_refused(raw: bytes) -> None:
        check_stream(raw)
