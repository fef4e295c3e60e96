"""Datagrams in a stream, over real TCP connections.

Frames are found however they arrive; runs are sent in whole frames.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import pytest

from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net import address
from netproxy.net.frames import framed
from netproxy.net.datagram import Arena, PinnedHeader
from netproxy.net.frames.framed import QUEUE_LIMIT, FramedConn, FramedSocket
from netproxy.net.frames.telling import TellingSocket
from netproxy.net.stream import Stream
from netproxy.protocol.http.capsule import Capsules
from netproxy.protocol.uot import Frames
from tests.support.batches import cut
from tests.support.doubles import Counts
from tests.support.flows import udp_to
from tests.support.sockets import (
    SECONDS,
    Task,
    nothing_comes,
    read_exactly,
    read_to_end,
    reset,
    tcp_pair,
    wait_until,
)

TARGET = Address("192.0.2.9", 443)
# Raw addresses of UoT: 192.0.2.1:53, 192.0.2.2:53 and a.bc:443.
FIRST = b"\x00\xc0\x00\x02\x01\x00\x35"
SECOND = b"\x00\xc0\x00\x02\x02\x00\x35"
NAMED = b"\x02\x04a.bc\x01\xbb"
# A capsule of a type that is reserved to be unknown (RFC 9297 section 5.4).
UNKNOWN = b"\x17\x05what?"
FULL = ("drops", "stream full")


class Kind(NamedTuple):
    """A framing, and an independent codec of its frames."""

    name: str
    framing: Callable[[], Any]
    key: bytes
    """The raw address in what frame() returns."""
    largest: int
    """Bytes of the longest payload."""

    def frame(self, payload: bytes) -> bytes:
        return (
            capsule(payload)
            if self.name == "capsules"
            else self.key + struct.pack(">H", len(payload)) + payload
        )

    def parse(self, data: bytes) -> list[bytes]:
        """Return the payloads of `data`, which must be whole frames."""
        payloads, at = [], 0
        while at < len(data):
            if self.name == "capsules":
                assert data[at] == 0
                size = 1 << (data[at + 1] >> 6)
                length = (
                    int.from_bytes(data[at + 1 : at + 1 + size], "big") & (1 << 8 * size - 2) - 1
                )
                at += 1 + size
                assert data[at] == 0
                end, at = at + length, at + 1
            else:
                assert data[at : at + len(self.key)] == self.key
                at += len(self.key) + 2
                end = at + int.from_bytes(data[at - 2 : at], "big")
            assert end <= len(data), "a frame is cut"
            payloads.append(data[at:end])
            at = end
        return payloads


def capsule(payload: bytes, context: bytes = b"\0") -> bytes:
    value = context + payload
    if len(value) < 1 << 6:
        return b"\0" + bytes((len(value),)) + value
    if len(value) < 1 << 14:
        return b"\0" + struct.pack(">H", len(value) | 0x4000) + value
    return b"\0" + struct.pack(">I", len(value) | 0x80000000) + value


CAPSULES = Kind("capsules", lambda: Capsules(TARGET), b"", 65527)
CONNECTED = Kind("connected", lambda: Frames(TARGET), b"", 65535)
FREE = Kind("free", Frames, FIRST, 65535)
KINDS = [CAPSULES, CONNECTED, FREE]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
both_roles = pytest.mark.parametrize("role", [FramedSocket, FramedConn])


class Rig:
    """A framed stream, and the test's end of its connection."""

    def __init__(self, framing: Any, peer: socket.socket, stream: Any, counts: Counts) -> None:
        self.framing = framing
        self.peer = peer
        self.framed = stream
        self.counts = counts
        self.arena = Arena()

    def arrived(self, count: int) -> None:
        """Wait until `count` bytes are there to be received."""
        wait_until(lambda: waiting(self.framed._socket) >= count)

    def feed(self, data: bytes) -> list[bytes]:
        """Send `data`; return what is received once all of it is there."""
        self.peer.sendall(data)
        self.arrived(len(data))
        return self.receive()

    def receive(self) -> list[bytes]:
        """Return the payloads of one receive."""
        return [payload for payload, _ in cut(self.framed.receive(self.arena))]

    def spans(self) -> list[tuple[Any, ...]]:
        """Return the spans of one receive."""
        return list(self.framed.receive(self.arena).spans)

    def collect(self, count: int) -> list[bytes]:
        """Return the next `count` datagrams, however many receives that takes."""
        payloads: list[bytes] = []
        while len(payloads) < count:
            self.arrived(1)
            payloads += self.receive()
        return payloads


@contextmanager
def open_rig(framing: Any, role: Any = FramedSocket, unread: bytes = b"") -> Iterator[Rig]:
    """Yield a rig; `role` is the class of its stream, `unread` are bytes read ahead."""
    counts = Counts()
    with tcp_pair() as (ours, theirs):
        framed_stream = role(Stream(ours, unread), framing, counts)
        try:
            yield Rig(framing, theirs, framed_stream, counts)
        finally:
            framed_stream.close()


def waiting(sock: socket.socket) -> int:
    """Return the bytes that have arrived and are not read."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0\0\0\0"), "little")


def unsent(sock: socket.socket) -> int:
    """Return the bytes that the kernel still holds for the peer."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"), "little")


def run_of(arena: Arena, payloads: Sequence[bytes], header: bytes = b"") -> Run:
    """Return a run as NatTable makes it; the payloads are in the arena from back to front."""
    pitch, offsets = max(map(len, payloads)) + 7, []
    for number, payload in enumerate(payloads):
        at = (len(payloads) - 1 - number) * pitch
        arena.view[at : at + len(payload)] = payload
        offsets.append(at)
    return Run(
        offsets, len(payloads[0]), len(payloads[-1]), PinnedHeader(header) if header else None
    )


def assert_receives(sock: socket.socket, data: bytes) -> None:
    """Assert that the next bytes are `data`, and that no others come with them."""
    assert read_exactly(sock, len(data)) == data
    assert nothing_comes(sock, 0)


class TestFinding:
    @every_kind
    @both_roles
    def test_frames_of_every_length_are_found_in_one_read(self, kind: Kind, role: Any) -> None:
        payloads = [b"one", b"", b"three", b"x" * 62, b"y" * 63, b"z" * 64, b"", b"w" * 1200]
        with open_rig(kind.framing(), role) as rig:
            assert rig.feed(b"".join(map(kind.frame, payloads))) == payloads
            assert rig.counts.counts == {}

    @every_kind
    @both_roles
    def test_frames_that_arrive_byte_by_byte_are_found(self, kind: Kind, role: Any) -> None:
        payloads, received = [b"abc", b"", b"abc", b"d" * 70], []
        with open_rig(kind.framing(), role) as rig:
            for byte in b"".join(map(kind.frame, payloads)):
                received.append(rig.feed(bytes((byte,))))
        assert [payload for piece in received for payload in piece] == payloads
        assert max(map(len, received)) == 1

    @every_kind
    def test_frames_cut_at_any_byte_are_found(self, kind: Kind) -> None:
        """Each frame comes once, whole, and as soon as it is whole."""
        payloads = [b"abc", b"", b"de", b"de", b"de", b"f" * 65]
        data = b"".join(map(kind.frame, payloads))
        ends = [
            len(b"".join(map(kind.frame, payloads[: count + 1]))) for count in range(len(payloads))
        ]
        with open_rig(kind.framing()) as rig:
            for at in range(1, len(data)):
                whole = sum(end <= at for end in ends)
                assert rig.feed(data[:at]) == payloads[:whole], at
                assert rig.feed(data[at:]) == payloads[whole:], at

    @every_kind
    @both_roles
    def test_largest_payload_is_received(self, kind: Kind, role: Any) -> None:
        """It is longer than what one read of a socket usually brings."""
        payload = bytes(range(256)) * 256
        payload = payload[: kind.largest]
        with open_rig(kind.framing(), role) as rig:
            sender = Task(rig.peer.sendall, kind.frame(payload) * 2 + kind.frame(b"behind"))
            assert rig.collect(3) == [payload, payload, b"behind"]
            sender.result()
            assert rig.counts.counts == {}

    def test_capsule_one_byte_too_long_ends_the_stream(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            sender = Task(rig.peer.sendall, capsule(b"before") + capsule(b"x" * 65528))
            assert rig.collect(1) == [b"before"]
            while not rig.framed.ended:
                rig.arrived(1)
                assert rig.receive() == []
            sender.result()
            assert rig.counts.counts == {("drops", "malformed"): 1}

    def test_key_of_a_frame_with_address_is_the_raw_address(self) -> None:
        with open_rig(Frames()) as rig:
            rig.peer.sendall(FIRST + b"\0\1a" + NAMED + b"\0\1b")
            rig.arrived(20)
            assert [key for _, _, _, key in rig.spans()] == [FIRST, NAMED]

    def test_frame_across_the_end_of_a_receive_is_received(self) -> None:
        """There are more than ROOM bytes, which are read at a time."""
        payloads = [struct.pack(">I", number) + b"x" * 1190 for number in range(600)]
        with open_rig(Capsules(TARGET)) as rig:
            sender = Task(rig.peer.sendall, b"".join(map(capsule, payloads)))
            assert rig.collect(600) == payloads
            sender.result()


class TestTrains:
    """Frames with equal headers are one span, as a train of the kernel is."""

    @staticmethod
    def spans(framing: Any, data: bytes, role: Any = FramedSocket) -> list[tuple[Any, ...]]:
        with open_rig(framing, role, data) as rig:
            return rig.spans()

    @both_roles
    def test_train_of_capsules_is_one_span(self, role: Any) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"abc") * 5, role) == [
            (range(3, 28, 6), 3, 3, b"")
        ]

    @both_roles
    def test_train_of_frames_with_address_is_one_span(self, role: Any) -> None:
        assert self.spans(Frames(), FREE.frame(b"abcd") * 4, role) == [
            (range(9, 49, 13), 4, 4, FIRST)
        ]

    def test_train_of_frames_without_address_is_one_span(self) -> None:
        assert self.spans(Frames(TARGET), CONNECTED.frame(b"a") * 3) == [
            (range(2, 9, 3), 1, 1, b"")
        ]

    def test_train_of_empty_payloads_is_one_span(self) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"") * 3) == [(range(3, 10, 3), 0, 0, b"")]

    @pytest.mark.parametrize("behind", [b"ab", b"abcd", b""])
    def test_frame_of_another_length_ends_the_train(self, behind: bytes) -> None:
        length = len(behind)
        assert self.spans(Capsules(TARGET), capsule(b"abc") * 2 + capsule(behind)) == [
            (range(3, 10, 6), 3, 3, b""),
            ((15,), length, length, b""),
        ]

    def test_frame_with_another_address_ends_the_train(self) -> None:
        data = FREE.frame(b"ab") * 3 + SECOND + b"\0\2cd" + FREE.frame(b"ef")
        assert self.spans(Frames(), data) == [
            (range(9, 32, 11), 2, 2, FIRST),
            ((42,), 2, 2, SECOND),
            ((53,), 2, 2, FIRST),
        ]

    @pytest.mark.parametrize("column", range(9))
    def test_header_that_differs_in_any_byte_ends_the_train(self, column: int) -> None:
        """Payloads that look like headers have no effect."""
        header = b"\x02\x03abc\x01\xbb\x00\x09"
        other = bytearray(header)
        other[column] = {0: 0x01, 1: 0x02, 7: 0x01, 8: 0x08}.get(column, other[column] ^ 1)
        with open_rig(Frames(), FramedSocket, (header + header) * 3 + bytes(other) + header) as rig:
            first = rig.spans()[0]
        assert first == (range(9, 46, 18), 9, 9, b"\x02\x03abc\x01\xbb")

    def test_two_encodings_of_a_length_are_two_trains(self) -> None:
        long = b"\0\x40\x04\0abc"
        assert self.spans(Capsules(TARGET), long * 2 + capsule(b"abc") * 2 + long) == [
            (range(4, 12, 7), 3, 3, b""),
            (range(17, 24, 6), 3, 3, b""),
            ((30,), 3, 3, b""),
        ]

    def test_skipped_frame_ends_the_train(self) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"a") * 2 + UNKNOWN + capsule(b"b") * 2) == [
            (range(3, 8, 4), 1, 1, b""),
            (range(18, 23, 4), 1, 1, b""),
        ]

    def test_last_frame_of_a_train_is_received_when_it_is_whole(self) -> None:
        train = b"".join(capsule(payload) for payload in (b"aaa", b"bbb", b"ccc"))
        with open_rig(Capsules(TARGET), FramedSocket, train[:-1]) as rig:
            assert rig.spans() == [(range(3, 10, 6), 3, 3, b"")]
            assert rig.feed(train[-1:]) == [b"ccc"]

    @every_kind
    def test_train_of_five_thousand_frames_is_one_span(self, kind: Kind) -> None:
        payloads = [struct.pack(">I", number) for number in range(5000)]
        with open_rig(kind.framing(), FramedSocket, b"".join(map(kind.frame, payloads))) as rig:
            batch = rig.framed.receive(rig.arena)
            assert len(batch.spans) == 1
            assert [payload for payload, _ in cut(batch)] == payloads


class TestSkipping:
    @pytest.mark.parametrize(
        "kind", [b"\x01", b"\x17", b"\x40\x40", b"\x80\x01\x00\x00", b"\xff" * 8]
    )
    @pytest.mark.parametrize("value", [b"", b"x", b"y" * 300])
    def test_capsules_of_unknown_types_are_skipped(self, kind: bytes, value: bytes) -> None:
        unknown = kind + struct.pack(">H", len(value) | 0x4000) + value
        data = capsule(b"a") + unknown + capsule(b"b") + unknown * 2 + capsule(b"c")
        with open_rig(Capsules(TARGET)) as rig:
            assert rig.feed(data) == [b"a", b"b", b"c"]
            assert rig.counts.counts == {} and not rig.framed.ended

    def test_unknown_capsule_cut_at_any_byte_is_skipped(self) -> None:
        data = UNKNOWN + capsule(b"abc")
        with open_rig(Capsules(TARGET)) as rig:
            for at in range(1, len(data)):
                assert rig.feed(data[:at]) == [], at
                assert rig.feed(data[at:]) == [b"abc"], at

    @both_roles
    def test_unknown_capsule_that_comes_in_many_reads_is_skipped(self, role: Any) -> None:
        """Its value looks like frames, but is none."""
        value = capsule(b"not this") * 100
        data = b"\x17" + struct.pack(">H", len(value) | 0x4000) + value
        with open_rig(Capsules(TARGET), role) as rig:
            assert rig.feed(capsule(b"before") + data[:3]) == [b"before"]
            for at in range(3, len(data), 97):
                assert rig.feed(data[at : at + 97]) == []
            assert rig.feed(capsule(b"behind")) == [b"behind"]
            assert rig.feed(data[:50]) == []
            assert rig.feed(data[50:] + capsule(b"again")) == [b"again"]

    def test_unknown_capsule_of_a_megabyte_is_skipped(self) -> None:
        """Nothing of it is kept."""
        with open_rig(Capsules(TARGET)) as rig:
            megabyte = b"\x17" + struct.pack(">I", 1 << 20 | 0x80000000) + capsule(b"n") * (1 << 18)
            sender = Task(rig.peer.sendall, megabyte + capsule(b"behind"))
            assert rig.collect(1) == [b"behind"]
            sender.result()

    def test_unknown_capsule_without_end_blocks_its_own_stream_only(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            assert rig.feed(b"\x17" + b"\xff" * 8) == []
            for _ in range(3):
                assert rig.feed(capsule(b"in it")) == []
            rig.peer.close()
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)

    @pytest.mark.parametrize("context", [b"\x01", b"\x02", b"\x40\x02", b"\xff" * 8])
    def test_datagram_of_an_unknown_context_is_dropped_and_counted(self, context: bytes) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            assert rig.feed(capsule(b"a") + capsule(b"no", context) * 2 + capsule(b"b")) == [
                b"a",
                b"b",
            ]
            assert rig.counts.counts == {("drops", "unknown context"): 2}

    def test_context_0_in_a_longer_encoding_is_accepted(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            assert rig.feed(capsule(b"a", b"\x40\x00") + capsule(b"b", b"\xc0" + bytes(7))) == [
                b"a",
                b"b",
            ]


MALFORMED = {
    "capsule without context": (CAPSULES, b"\0\0"),
    "half a context": (CAPSULES, b"\0\1\x40"),
    "capsule longer than any payload": (CAPSULES, b"\0" + struct.pack(">I", 70000 | 0x80000000)),
    "capsule of 2^62": (CAPSULES, b"\0" + b"\xff" * 8),
    "ATYP 3": (FREE, b"\x03\xc0\0\2\1\0\x35\0\1a"),
    "ATYP 255": (FREE, b"\xff\xff"),
    "empty name": (FREE, b"\x02\0\0\x35\0\1a"),
}


class TestEnds:
    @pytest.mark.parametrize("kind, bad", MALFORMED.values(), ids=MALFORMED)
    @both_roles
    def test_malformed_frame_ends_the_stream_and_is_counted(
        self, kind: Kind, bad: bytes, role: Any
    ) -> None:
        """Hazard 123: frames before it are received, what follows is ignored."""
        with open_rig(kind.framing(), role) as rig:
            assert rig.feed(kind.frame(b"before") + bad + kind.frame(b"behind")) == [b"before"]
            assert rig.framed.ended
            assert rig.counts.counts == {("drops", "malformed"): 1}

    @both_roles
    def test_frames_before_the_end_are_received(self, role: Any) -> None:
        with open_rig(Capsules(TARGET), role) as rig:
            rig.peer.sendall(capsule(b"last") + b"\0\4\0x")
            rig.peer.close()
            received: list[bytes] = []
            wait_until(lambda: received.extend(rig.receive()) or rig.framed.ended)
            assert received == [b"last"]

    @both_roles
    def test_reset_ends_the_stream(self, role: Any) -> None:
        with open_rig(Capsules(TARGET), role) as rig:
            reset(rig.peer)
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)
            assert rig.counts.counts == {}

    @both_roles
    def test_stream_without_bytes_has_not_ended(self, role: Any) -> None:
        with open_rig(Capsules(TARGET), role) as rig:
            assert rig.receive() == [] and not rig.framed.ended

    @both_roles
    def test_frames_are_not_received_after_shutdown(self, role: Any) -> None:
        with open_rig(Capsules(TARGET), role) as rig:
            rig.peer.sendall(capsule(b"late"))
            rig.arrived(1)
            rig.framed.shutdown()
            assert rig.receive() == []
            assert rig.peer.recv(1) == b""

    @both_roles
    def test_stream_can_be_shut_down_and_closed_twice(self, role: Any) -> None:
        with open_rig(Capsules(TARGET), role) as rig:
            rig.framed.shutdown()
            rig.framed.shutdown()
            rig.framed.close()
            rig.framed.shutdown()
            rig.framed.close()


class TestFresh:
    """Hazard 62: the descriptor does not tell of bytes that were read ahead."""

    def test_socket_is_fresh_until_its_first_receive(self) -> None:
        with open_rig(Capsules(TARGET), FramedSocket, capsule(b"early") * 2 + b"\0\3") as rig:
            assert rig.framed.fresh and nothing_comes(rig.framed._socket, 0)
            assert rig.receive() == [b"early"] * 2
            assert not rig.framed.fresh
            assert rig.feed(b"\0ab") == [b"ab"]

    def test_connection_does_not_wait_for_bytes_read_ahead(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn, capsule(b"early")) as rig:
            assert nothing_comes(rig.framed._socket, 0)
            assert Task(rig.framed.wait).result() is True
            assert rig.receive() == [b"early"]
            waiter = Task(rig.framed.wait)
            rig.peer.sendall(capsule(b"more"))
            assert waiter.result() is True
            assert rig.receive() == [b"more"]

    def test_malformed_bytes_read_ahead_end_the_stream(self) -> None:
        with open_rig(Capsules(TARGET), FramedSocket, capsule(b"early") + b"\0\0") as rig:
            assert rig.receive() == [b"early"]
            assert rig.framed.ended

    def test_first_receive_of_a_connection_may_be_empty(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            assert Task(rig.framed.wait).result() is True
            assert rig.receive() == [] and not rig.framed.ended


class TestSending:
    def test_replies_on_a_stream_with_one_target_have_no_address(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), None)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abcd", b"efgh", b"ij"]), None)
            assert_receives(rig.peer, b"\0\4\0abc" + b"\0\5\0abcd" + b"\0\5\0efgh" + b"\0\3\0ij")

    def test_message_goes_between_the_frames(self) -> None:
        with open_rig(Capsules(TARGET), TellingSocket) as rig:
            rig.framed.tell(UNKNOWN)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), None)
            rig.framed.tell(UNKNOWN)
            assert_receives(rig.peer, UNKNOWN + b"\0\4\0abc" + UNKNOWN)

    def test_message_waits_behind_what_the_stream_does_not_take(self) -> None:
        with open_rig(Capsules(TARGET), TellingSocket) as rig:
            while not rig.framed.waits:
                rig.framed.send(rig.arena, run_of(rig.arena, [bytes(60000)]), None)
            waited = len(rig.framed._queue)
            rig.framed.tell(UNKNOWN)
            assert len(rig.framed._queue) == waited + len(UNKNOWN)
            assert rig.framed._queue.endswith(UNKNOWN)

    def test_message_on_a_closed_stream_is_dropped(self) -> None:
        with open_rig(Capsules(TARGET), TellingSocket) as rig:
            rig.framed.shutdown()
            rig.framed.tell(UNKNOWN)
            assert not rig.framed.waits

    def test_client_that_reads_nothing_is_told_nothing_any_more(self) -> None:
        with open_rig(Capsules(TARGET), TellingSocket) as rig:
            while not rig.framed.waits:
                rig.framed.send(rig.arena, run_of(rig.arena, [bytes(60000)]), None)
            for _ in range(QUEUE_LIMIT // len(UNKNOWN) + 1):
                rig.framed.tell(UNKNOWN)
            assert len(rig.framed._queue) <= QUEUE_LIMIT
            assert rig.counts.counts[FULL]

    def test_address_of_a_reply_is_its_source(self) -> None:
        with open_rig(Frames()) as rig:
            rig.framed.send(rig.arena, run_of(rig.arena, [b"ab", b"cd", b"e"], FIRST), None)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"f"], NAMED), None)
            assert_receives(
                rig.peer,
                FIRST + b"\0\2ab" + FIRST + b"\0\2cd" + FIRST + b"\0\1e" + NAMED + b"\0\1f",
            )

    def test_frames_to_a_proxy_have_the_address_of_their_target(self) -> None:
        with open_rig(Frames(), FramedConn) as rig:
            first = rig.framed.prepare(udp_to(Address("192.0.2.1", 53)))
            named = rig.framed.prepare(udp_to(Address("a.bc", 443)))
            assert (first.address, first.sockaddr) == (FIRST, ("192.0.2.1", 53))
            assert (named.address, named.sockaddr) == (NAMED, ("a.bc", 443))
            rig.framed.send(rig.arena, run_of(rig.arena, [b"ab", b"c"]), first)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"d"]), named)
            assert_receives(rig.peer, FIRST + b"\0\2ab" + FIRST + b"\0\1c" + NAMED + b"\0\1d")

    def test_header_of_the_next_hop_is_part_of_the_payload(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rig.framed.send(
                rig.arena,
                run_of(rig.arena, [b"abc", b"de"], b"HEAD"),
                rig.framed.prepare(udp_to(TARGET)),
            )
            assert_receives(rig.peer, b"\0\x08\0HEADabc" + b"\0\x07\0HEADde")

    def test_address_precedes_the_header_of_the_next_hop(self) -> None:
        with open_rig(Frames(), FramedConn) as rig:
            rig.framed.send(
                rig.arena,
                run_of(rig.arena, [b"abc", b"d"], b"HEAD"),
                rig.framed.prepare(udp_to(Address("192.0.2.1", 53))),
            )
            assert_receives(rig.peer, FIRST + b"\0\7HEADabc" + FIRST + b"\0\5HEADd")

    @every_kind
    def test_empty_and_largest_payloads_are_sent(self, kind: Kind) -> None:
        """Hazards 27 and 28: an empty datagram is a datagram."""
        largest = (bytes(range(256)) * 256)[: kind.largest]
        with open_rig(kind.framing()) as rig:
            for payloads in ([b""], [b"", b"", b""], [largest], [largest[:1200], b""]):
                rig.framed.send(rig.arena, run_of(rig.arena, payloads, kind.key), None)
            wanted = [b""] * 4 + [largest, largest[:1200], b""]
            assert (
                kind.parse(read_exactly(rig.peer, len(b"".join(map(kind.frame, wanted))))) == wanted
            )

    def test_run_whose_offsets_are_a_range_is_sent(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            rig.arena.view[:20] = b"..aaa..bbb..ccc..d.."
            rig.framed.send(rig.arena, Run(range(2, 18, 5), 3, 1), None)
            assert_receives(rig.peer, b"\0\4\0aaa\0\4\0bbb\0\4\0ccc\0\2\0d")

    @pytest.mark.parametrize(
        "target", [Address("192.0.2.9", 444), Address("192.0.2.8", 443), Address("a.bc", 443)]
    )
    @pytest.mark.parametrize("framing", [Capsules(TARGET), Frames(TARGET)])
    def test_stream_with_one_target_refuses_others(self, framing: Any, target: Address) -> None:
        with open_rig(framing, FramedConn) as rig:
            with pytest.raises(DialError) as caught:
                rig.framed.prepare(udp_to(target))
            assert caught.value.reason is Reason.UNSUPPORTED
            assert str(caught.value) == f"{target}: the connection is to {TARGET} alone"

    def test_send_to_a_peer_that_is_gone_does_not_raise(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            reset(rig.peer)
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), None)

    @both_roles
    def test_send_that_fails_ends_the_stream(
        self, role: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A part of a frame may have gone: what follows would be read as nonsense."""
        with open_rig(Frames(), role) as rig:
            destination = (
                rig.framed.prepare(udp_to(Address("192.0.2.1", 53))) if role is FramedConn else None
            )

            def fail(stream: Stream, data: bytes) -> int:
                raise StreamError("no buffer space available")

            with monkeypatch.context() as patch:
                patch.setattr(Stream, "write_some", fail)
                rig.framed.send(rig.arena, run_of(rig.arena, [b"abc", b"def"]), destination)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"ghi"]), destination)
            assert rig.counts.counts == {("drops", "stream failed"): 3}
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)
            assert rig.framed.failed and read_to_end(rig.peer) == b""

    @both_roles
    def test_datagrams_after_shutdown_are_counted(self, role: Any) -> None:
        with open_rig(Frames(), role) as rig:
            destination = (
                rig.framed.prepare(udp_to(Address("192.0.2.1", 53))) if role is FramedConn else None
            )
            rig.framed.shutdown()
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc", b"def"]), destination)
            rig.framed.close()
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), destination)
            assert rig.counts.counts == {("drops", "closed"): 3}

    def test_datagrams_to_a_proxy_that_hung_up_are_counted(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rig.peer.close()
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)
            rig.framed.send(
                rig.arena, run_of(rig.arena, [b"abc", b"def"]), rig.framed.prepare(udp_to(TARGET))
            )
            assert rig.counts.counts == {("drops", "upstream closed"): 2}

    def test_frames_of_several_threads_are_not_mixed(self) -> None:
        """The replies of several sessions share a stream."""
        with open_rig(Capsules(TARGET)) as rig:

            def send(letter: bytes) -> None:
                arena = Arena()
                for number in range(50):
                    rig.framed.send(
                        arena,
                        run_of(arena, [letter + struct.pack(">H", number) + letter * 97] * 3),
                        None,
                    )

            senders = [Task(send, letter) for letter in (b"a", b"b", b"c")]
            payloads = CAPSULES.parse(read_exactly(rig.peer, 450 * 104))
            for sender in senders:
                sender.result()
            for letter in (b"a", b"b", b"c"):
                numbers = [
                    payload[1:3]
                    for payload in payloads
                    if payload == letter + payload[1:3] + letter * 97
                ]
                assert numbers == [struct.pack(">H", number // 3) for number in range(150)]
            assert rig.counts.counts == {}

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_run_longer_than_the_queue_is_sent_on_an_idle_stream(self, kind: Kind) -> None:
        """From stream to stream this is normal: a train is one run of up to ROOM bytes."""
        payloads = [struct.pack(">H", number) + b"x" * 1198 for number in range(300)]
        with open_rig(kind.framing(), FramedConn) as rig:
            destination = rig.framed.prepare(
                udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)
            )
            rig.framed.send(rig.arena, run_of(rig.arena, payloads), destination)
            assert rig.counts.counts == {}
            assert rig.framed.wait() and rig.receive() == []
            reader = Task(rig.framed.wait)
            size = len(b"".join(map(kind.frame, payloads)))
            assert kind.parse(read_exactly(rig.peer, size)) == payloads
            rig.framed.shutdown()
            reader.result()

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_datagram_too_big_with_its_header_is_dropped_and_counted(self, kind: Kind) -> None:
        """The header of the next hop makes it too long: the proxy would have to hang up."""
        with open_rig(kind.framing(), FramedConn) as rig:
            destination = rig.framed.prepare(
                udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)
            )
            rig.framed.send(rig.arena, run_of(rig.arena, [b"x" * 65507], b"h" * 300), destination)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), destination)
            assert_receives(rig.peer, kind.frame(b"abc"))
            assert rig.counts.counts == {("drops", "too big"): 1}

    @every_kind
    def test_datagram_one_byte_too_big_is_dropped_and_counted(self, kind: Kind) -> None:
        """UoT takes 65535 bytes; a stream of capsules would have to end at more than 65527."""
        with open_rig(kind.framing()) as rig:
            rig.framed.send(
                rig.arena, run_of(rig.arena, [b"x" * (kind.largest + 1)], kind.key), None
            )
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"], kind.key), None)
            assert_receives(rig.peer, kind.frame(b"abc"))
            assert rig.counts.counts == {("drops", "too big"): 1}


class NumberedRuns:
    """Sends runs of numbered datagrams.  `accepted`: those that were not counted as dropped.

    Nobody else may send meanwhile.
    """

    def __init__(self, rig: Rig, kind: Kind, destination: Any = None) -> None:
        self._rig, self._kind, self._destination = rig, kind, destination
        self._arena = Arena()
        self._next = 0
        self.sent: list[bytes] = []
        self.accepted: list[bytes] = []

    def send(self) -> bool:
        """Send a run of ten, the last one shorter; return whether all of it was accepted.

        What is not accepted is the end of the run.
        """
        payloads = [
            struct.pack(">I", self._next + number) + b"x" * (996 if number < 9 else 500)
            for number in range(10)
        ]
        self._next += 10
        self.sent += payloads
        before = self._rig.counts.of(*FULL)
        run = run_of(self._arena, payloads, b"" if self._destination else self._kind.key)
        self._rig.framed.send(self._arena, run, self._destination)
        dropped = self._rig.counts.of(*FULL) - before
        self.accepted += payloads[: 10 - dropped]
        return not dropped

    @property
    def dropped(self) -> int:
        """Return how many were dropped."""
        return len(self.sent) - len(self.accepted)

    def size(self) -> int:
        """Return the bytes of the accepted frames."""
        return len(b"".join(map(self._kind.frame, self.accepted)))


def drained(rig: Rig) -> bytes:
    """Let the peer read all that the kernel holds for it, and return that."""
    data = b""
    while unsent(rig.framed._socket) or waiting(rig.peer):
        data += rig.peer.recv(1 << 20) if waiting(rig.peer) else b""
    return data


def congest(rig: Rig, runs: NumberedRuns) -> None:
    """Send until something waits in the queue."""
    while not rig.framed._queue:
        assert runs.send()


class TestPeerThatDoesNotRead:
    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_queue_of_a_connection_is_bounded_and_its_reader_flushes_it(self, kind: Kind) -> None:
        """Hazards 85 and 124."""
        with open_rig(kind.framing(), FramedConn) as rig:
            assert rig.framed.wait() and rig.receive() == []
            runs = NumberedRuns(
                rig,
                kind,
                rig.framed.prepare(udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)),
            )
            while runs.send():
                pass
            for _ in range(5):
                assert not runs.send()
            assert 50 < runs.dropped <= 60 and rig.counts.counts == {FULL: runs.dropped}
            size, got = runs.size(), drained(rig)
            held = size - len(got)
            assert held == len(rig.framed._queue)
            assert QUEUE_LIMIT - len(kind.frame(b"x" * 1000)) < held <= QUEUE_LIMIT
            reader = Task(rig.framed.wait)
            got += read_exactly(rig.peer, held)
            assert kind.parse(got) == runs.accepted
            assert runs.send()
            assert kind.parse(read_exactly(rig.peer, runs.size() - size)) == runs.accepted[-10:]
            assert not reader.done and nothing_comes(rig.peer, 0)
            rig.framed.shutdown()
            reader.result()

    @every_kind
    @both_roles
    def test_run_longer_than_all_buffers_is_cut_between_frames(self, kind: Kind, role: Any) -> None:
        """Nothing waits before it; of the rest no more than the queue's limit is kept."""
        payloads = [struct.pack(">H", number) + b"x" * 998 for number in range(1500)]
        with open_rig(kind.framing(), role) as rig:
            destination = (
                rig.framed.prepare(udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET))
                if role is FramedConn
                else None
            )
            rig.framed.send(
                rig.arena,
                run_of(rig.arena, payloads, b"" if destination else kind.key),
                destination,
            )
            dropped = rig.counts.of(*FULL)
            assert 0 < dropped < 1500 and rig.counts.counts == {FULL: dropped}
            kept = payloads[: 1500 - dropped]
            assert 0 < len(rig.framed._queue) <= QUEUE_LIMIT
            got = drained(rig)
            size = sum(len(kind.frame(payload)) for payload in kept)
            left = Task(read_exactly, rig.peer, size - len(got))
            wait_until(rig.framed.flush)
            assert kind.parse(got + left.result()) == kept and nothing_comes(rig.peer, 0)

    @every_kind
    def test_frame_that_has_begun_is_finished_though_longer_than_the_queue(
        self, kind: Kind
    ) -> None:
        """Without its rest the stream would be useless.  The next frames are dropped."""
        payload = b"x" * kind.largest
        with open_rig(kind.framing()) as rig:
            sent = 0
            while not rig.counts.counts:
                rig.framed.send(rig.arena, run_of(rig.arena, [payload], kind.key), None)
                sent += 1
            assert rig.counts.counts == {FULL: 1}
            assert len(rig.framed._queue) < QUEUE_LIMIT + len(kind.frame(payload))
            reading = Task(read_exactly, rig.peer, (sent - 1) * len(kind.frame(payload)))
            rig.framed.drain(lambda: False)
            assert kind.parse(reading.result()) == [payload] * (sent - 1) and nothing_comes(
                rig.peer, 0
            )

    def test_datagrams_do_not_overtake_the_queue(self) -> None:
        """The kernel has room again, but the queue has not been flushed yet."""
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            runs = NumberedRuns(rig, CAPSULES, rig.framed.prepare(udp_to(TARGET)))
            congest(rig, runs)
            got = drained(rig)
            assert runs.send() and runs.send()
            assert drained(rig) == b""
            assert rig.framed.flush()
            got += read_exactly(rig.peer, runs.size() - len(got))
            assert CAPSULES.parse(got) == runs.accepted

    def test_reader_of_a_full_connection_receives(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rig.receive()
            runs = NumberedRuns(rig, CAPSULES, rig.framed.prepare(udp_to(TARGET)))
            while runs.send():
                pass
            reader = Task(rig.framed.wait)
            rig.peer.sendall(capsule(b"meanwhile"))
            assert reader.result() is True
            assert rig.receive() == [b"meanwhile"]

    def test_reader_that_already_waits_flushes(self) -> None:
        """The queue begins to fill only after the reader has begun to wait."""
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rig.receive()
            reader = Task(rig.framed.wait)
            runs = NumberedRuns(rig, CAPSULES, rig.framed.prepare(udp_to(TARGET)))
            while runs.send():
                pass
            assert CAPSULES.parse(read_exactly(rig.peer, runs.size())) == runs.accepted
            rig.framed.shutdown()
            reader.result()

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_drain_sends_the_queue_while_other_threads_send(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """send() itself does not block."""
        with open_rig(kind.framing()) as rig, waits_seen(monkeypatch) as congested:
            first, second = NumberedRuns(rig, kind), NumberedRuns(rig, kind)
            second._next = 1 << 20
            congest(rig, first)
            draining = Task(rig.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            assert not draining.done
            while second.send():
                pass
            assert not first.dropped and 0 < second.dropped <= 10 < len(second.accepted)
            assert rig.counts.counts == {FULL: second.dropped}
            size = len(b"".join(map(kind.frame, first.sent + second.accepted)))
            payloads = kind.parse(read_exactly(rig.peer, size))
            assert payloads == first.sent + second.accepted
            draining.result()
            assert second.send()
            last = b"".join(map(kind.frame, second.accepted[-10:]))
            assert read_exactly(rig.peer, len(last)) == last

    def test_drain_returns_at_once_if_the_queue_is_empty(self) -> None:
        with open_rig(Capsules(TARGET)) as rig:
            rig.framed.drain(lambda: False)
            rig.framed.send(rig.arena, run_of(rig.arena, [b"abc"]), None)
            rig.framed.drain(lambda: False)
            assert_receives(rig.peer, capsule(b"abc"))

    def test_drain_ends_with_the_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(framed, "FLUSH_SECONDS", 0.02)
        with open_rig(Capsules(TARGET)) as rig, waits_seen(monkeypatch) as congested:
            congest(rig, NumberedRuns(rig, CAPSULES))
            draining = Task(rig.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            rig.framed.close()
            draining.result()

    def test_drain_ends_with_the_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with open_rig(Capsules(TARGET)) as rig, waits_seen(monkeypatch) as congested:
            congest(rig, NumberedRuns(rig, CAPSULES))
            draining = Task(rig.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            reset(rig.peer)
            draining.result()

    def test_drain_of_a_stream_that_was_just_closed_does_not_raise(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor does send().  The stream's own thread may close it at any time."""
        with open_rig(Capsules(TARGET)) as rig:
            runs = NumberedRuns(rig, CAPSULES)
            congest(rig, runs)

            def closed_just_before() -> Any:
                rig.framed.close()
                return select.poll()

            monkeypatch.setattr(
                framed, "select", SimpleNamespace(poll=closed_just_before, POLLOUT=select.POLLOUT)
            )
            rig.framed.drain(lambda: False)
            assert rig.framed.closed and rig.counts.counts == {}
            runs.send()
            assert rig.counts.counts == {("drops", "closed"): 10}


@contextmanager
def waits_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Yield an event that is set when flush() was not complete, so that drain() will wait."""
    original, seen = FramedSocket.flush, threading.Event()

    def flush(self: FramedSocket) -> bool:
        complete = original(self)
        if not complete:
            seen.set()
        return complete

    monkeypatch.setattr(FramedSocket, "flush", flush)
    yield seen


class RecordedRest:
    """Stands for the event that ends the rest of a connection: records the rest, does not wait."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)


class TestEndOfAConnection:
    def test_connection_that_ends_at_once_is_not_replaced_at_once(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rest = rig.framed._shut_down = RecordedRest()
            rig.receive()
            rig.peer.close()
            assert Task(rig.framed.wait).result() is True
            assert rig.receive() == [] and rest.seconds == []
            assert Task(rig.framed.wait).result() is False
            (seconds,) = rest.seconds
            assert 0 < seconds <= framed.REST_SECONDS

    def test_connection_older_than_the_rest_is_replaced_at_once(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rest = rig.framed._shut_down = RecordedRest()
            rig.framed._opened -= framed.REST_SECONDS
            rig.peer.sendall(b"\0\0")
            rig.arrived(2)
            assert rig.receive() == [] and rig.framed.ended
            assert Task(rig.framed.wait).result() is False
            assert rest.seconds == [0.0]

    def test_shutdown_ends_the_rest_of_a_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(framed, "REST_SECONDS", 10 * SECONDS)
        with open_rig(Capsules(TARGET), FramedConn) as rig:
            rig.peer.close()
            wait_until(lambda: rig.receive() == [] and rig.framed.ended)
            reader = Task(rig.framed.wait)
            assert not reader.done
            rig.framed.shutdown()
            assert reader.result() is False

    def test_shutdown_ends_wait_of_a_connection(self) -> None:
        def read(rig: Rig) -> str:
            while rig.framed.wait():
                rig.framed.receive(rig.arena)
            return "ended"

        with open_rig(Capsules(TARGET), FramedConn) as rig:
            reader = Task(read, rig)
            rig.framed.shutdown()
            assert reader.result() == "ended"

    def test_wait_returns_false_after_shutdown(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn, capsule(b"early")) as rig:
            rig.framed.shutdown()
            assert Task(rig.framed.wait).result() is False


class TestSources:
    def test_source_on_a_stream_with_one_target_is_the_target(self) -> None:
        with open_rig(Capsules(TARGET), FramedConn, capsule(b"a")) as rig:
            [(_, _, _, key)] = rig.spans()
            assert rig.framed.source(key) == TARGET

    def test_source_of_a_frame_with_address_is_that_address(self) -> None:
        with open_rig(
            Frames(),
            FramedConn,
            FIRST + b"\0\1a" + NAMED + b"\0\1b" + b"\x01" + bytes(15) + b"\1\0\x35\0\1c",
        ) as rig:
            assert [rig.framed.source(key) for _, _, _, key in rig.spans()] == [
                Address("192.0.2.1", 53),
                Address("a.bc", 443),
                Address("::1", 53),
            ]

    def test_datagrams_with_a_malformed_source_are_dropped_and_counted(self) -> None:
        """Hazards 10 and 97: each datagram of a train counts."""
        bad = b"\x02\x03a b\x00\x35\0\1x"
        with open_rig(Frames(), FramedConn, bad * 3 + FREE.frame(b"good") + bad) as rig:
            assert rig.receive() == [b"good"]
            assert rig.counts.counts == {("drops", "malformed"): 4} and not rig.framed.ended

    def test_number_of_known_sources_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hazard 117: a proxy may name as many sources as it likes."""
        monkeypatch.setattr(address, "SOURCE_ADDRESSES_LIMIT", 4)
        with open_rig(Frames(), FramedConn) as rig:
            for number in range(20):
                rig.peer.sendall(b"\x00\xc0\0\2" + bytes((number,)) + b"\0\x35\0\1a")
                rig.arrived(10)
                [(_, _, _, key)] = rig.spans()
                assert rig.framed.source(key) == Address(f"192.0.2.{number}", 53)
                # The limit, and what the last receive has added.
                assert len(rig.framed._sources._known) <= 5

    def test_sources_of_a_batch_are_known_though_they_exceed_the_bound(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """source() is asked about a batch after all of it was received."""
        monkeypatch.setattr(address, "SOURCE_ADDRESSES_LIMIT", 4)
        data = b"".join(b"\x00\xc0\0\2" + bytes((number,)) + b"\0\x35\0\1a" for number in range(6))
        with open_rig(Frames(), FramedConn, data) as rig:
            keys = [key for _, _, _, key in rig.spans()]
            assert [rig.framed.source(key) for key in keys] == [
                Address(f"192.0.2.{number}", 53) for number in range(6)
            ]
