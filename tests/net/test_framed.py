"""Datagrams in a stream, over real TCP connections: frames found however they arrive, runs sent whole or not at all."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net import address, framed
from netproxy.net.datagram import Arena, PinnedHeader
from netproxy.net.framed import QUEUE_LIMIT, FramedConn, FramedSocket
from netproxy.net.stream import Stream
from netproxy.protocol.capsule import Capsules
from netproxy.protocol.uot import Frames
from tests.support.batches import cut
from tests.support.doubles import Counts
from tests.support.flows import udp_to
from tests.support.sockets import (
    SECONDS,
    Task,
    nothing_comes,
    read_exactly,
    reset,
    tcp_pair,
    wait_until,
)

TARGET = Address("192.0.2.9", 443)
HERE = b"\x00\xc0\x00\x02\x01\x00\x35"  # 192.0.2.1:53 in a UoT frame
THERE = b"\x00\xc0\x00\x02\x02\x00\x35"  # 192.0.2.2:53
NAMED = b"\x02\x04a.bc\x01\xbb"  # a.bc:443
UNKNOWN = b"\x17\x05what?"  # a capsule of a type that is reserved for being unknown
FULL = ("drops", "stream full")


class Kind(NamedTuple):
    """A framing, and what its frames look like, spelt out anew."""

    name: str
    framing: Callable[[], Any]
    key: bytes  # of the frames that frame() makes
    largest: int

    def frame(self, payload: bytes) -> bytes:
        return (
            capsule(payload)
            if self.name == "capsules"
            else self.key + struct.pack(">H", len(payload)) + payload
        )

    def parse(self, data: bytes) -> list[bytes]:
        """The payloads of whole frames, and nothing else."""
        found, at = [], 0
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
            found.append(data[at:end])
            at = end
        return found


def capsule(payload: bytes, context: bytes = b"\0") -> bytes:
    value = context + payload
    if len(value) < 1 << 6:
        return b"\0" + bytes((len(value),)) + value
    if len(value) < 1 << 14:
        return b"\0" + struct.pack(">H", len(value) | 0x4000) + value
    return b"\0" + struct.pack(">I", len(value) | 0x80000000) + value


CAPSULES = Kind("capsules", lambda: Capsules(TARGET), b"", 65527)
CONNECTED = Kind("connected", lambda: Frames(TARGET), b"", 65535)
FREE = Kind("free", Frames, HERE, 65535)
KINDS = [CAPSULES, CONNECTED, FREE]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
both_roles = pytest.mark.parametrize("role", [FramedSocket, FramedConn])


class Rig:
    """One end, framed, and the test's end of the same connection."""

    def __init__(self, framing: Any, peer: socket.socket, made: Any, counts: Counts) -> None:
        self.framing = framing
        self.peer = peer
        self.framed = made
        self.counts = counts
        self.arena = Arena()

    def arrived(self, count: int) -> None:
        """`count` bytes are there to be received."""
        wait_until(lambda: waiting(self.framed._socket) >= count)

    def feed(self, data: bytes) -> list[bytes]:
        """What is received of `data`, which has all arrived."""
        self.peer.sendall(data)
        self.arrived(len(data))
        return self.receive()

    def receive(self) -> list[bytes]:
        return [payload for payload, _ in cut(self.framed.receive(self.arena))]

    def spans(self) -> list[tuple]:
        return list(self.framed.receive(self.arena).spans)

    def collect(self, count: int) -> list[bytes]:
        """The next `count` datagrams, however many receives that takes."""
        found: list[bytes] = []
        while len(found) < count:
            self.arrived(1)
            found += self.receive()
        return found


@contextmanager
def rig(framing: Any, role: Any = FramedSocket, unread: bytes = b"") -> Iterator[Rig]:
    counts = Counts()
    with tcp_pair() as (ours, theirs):
        made = role(Stream(ours, unread), framing, counts)
        try:
            yield Rig(framing, theirs, made, counts)
        finally:
            made.close()


def waiting(sock: socket.socket) -> int:
    """Bytes that have arrived and are not read."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0\0\0\0"), "little")


def unsent(sock: socket.socket) -> int:
    """Bytes that the kernel still holds for the peer."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"), "little")


def run_of(arena: Arena, payloads: Sequence[bytes], header: bytes = b"") -> Run:
    """As NatTable hands them over; they lie in the arena from back to front."""
    pitch, offsets = max(map(len, payloads)) + 7, []
    for number, payload in enumerate(payloads):
        at = (len(payloads) - 1 - number) * pitch
        arena.view[at : at + len(payload)] = payload
        offsets.append(at)
    return Run(
        offsets, len(payloads[0]), len(payloads[-1]), PinnedHeader(header) if header else None
    )


def assert_gets(sock: socket.socket, data: bytes) -> None:
    """The next bytes are these, and no others come with them."""
    assert read_exactly(sock, len(data)) == data
    assert nothing_comes(sock, 0)


class TestFinding:
    @every_kind
    @both_roles
    def test_frames_of_every_length_in_one_read(self, kind: Kind, role: Any) -> None:
        payloads = [b"one", b"", b"three", b"x" * 62, b"y" * 63, b"z" * 64, b"", b"w" * 1200]
        with rig(kind.framing(), role) as one:
            assert one.feed(b"".join(map(kind.frame, payloads))) == payloads
            assert one.counts.counts == {}

    @every_kind
    @both_roles
    def test_byte_by_byte(self, kind: Kind, role: Any) -> None:
        payloads, found = [b"abc", b"", b"abc", b"d" * 70], []
        with rig(kind.framing(), role) as one:
            for byte in b"".join(map(kind.frame, payloads)):
                found.append(one.feed(bytes((byte,))))
        assert [payload for piece in found for payload in piece] == payloads
        assert max(map(len, found)) == 1

    @every_kind
    def test_a_stream_cut_at_every_byte(self, kind: Kind) -> None:
        """Each frame comes once, whole, and as soon as it is whole."""
        payloads = [b"abc", b"", b"de", b"de", b"de", b"f" * 65]
        data = b"".join(map(kind.frame, payloads))
        ends = [
            len(b"".join(map(kind.frame, payloads[: count + 1]))) for count in range(len(payloads))
        ]
        with rig(kind.framing()) as one:
            for at in range(1, len(data)):
                whole = sum(end <= at for end in ends)
                assert one.feed(data[:at]) == payloads[:whole], at
                assert one.feed(data[at:]) == payloads[whole:], at

    @every_kind
    @both_roles
    def test_the_largest_payload(self, kind: Kind, role: Any) -> None:
        """Larger than one read of a socket usually brings: it is put together."""
        payload = bytes(range(256)) * 256
        payload = payload[: kind.largest]
        with rig(kind.framing(), role) as one:
            sender = Task(one.peer.sendall, kind.frame(payload) * 2 + kind.frame(b"behind"))
            assert one.collect(3) == [payload, payload, b"behind"]
            sender.result()
            assert one.counts.counts == {}

    def test_one_byte_over_the_largest_payload_of_a_capsule_ends_the_stream(self) -> None:
        with rig(Capsules(TARGET)) as one:
            sender = Task(one.peer.sendall, capsule(b"before") + capsule(b"x" * 65528))
            assert one.collect(1) == [b"before"]
            while not one.framed.ended:
                one.arrived(1)
                assert one.receive() == []
            sender.result()
            assert one.counts.counts == {("drops", "malformed"): 1}

    def test_free_frames_have_their_raw_address_as_key(self) -> None:
        with rig(Frames()) as one:
            one.peer.sendall(HERE + b"\0\1a" + NAMED + b"\0\1b")
            one.arrived(20)
            assert [key for _, _, _, key in one.spans()] == [HERE, NAMED]

    def test_what_there_is_room_for_comes_at_once_and_the_rest_next(self) -> None:
        """More than ROOM bytes: the frame on the border is put together."""
        payloads = [struct.pack(">I", number) + b"x" * 1190 for number in range(600)]
        with rig(Capsules(TARGET)) as one:
            sender = Task(one.peer.sendall, b"".join(map(capsule, payloads)))
            assert one.collect(600) == payloads
            sender.result()


class TestTrains:
    """Equal frames are one span, as a train of the kernel's is."""

    @staticmethod
    def spans(framing: Any, data: bytes, role: Any = FramedSocket) -> list[tuple]:
        with rig(framing, role, data) as one:
            return one.spans()

    @both_roles
    def test_capsules(self, role: Any) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"abc") * 5, role) == [
            (range(3, 28, 6), 3, 3, b"")
        ]

    @both_roles
    def test_free_frames(self, role: Any) -> None:
        assert self.spans(Frames(), FREE.frame(b"abcd") * 4, role) == [
            (range(9, 49, 13), 4, 4, HERE)
        ]

    def test_connected_frames(self) -> None:
        assert self.spans(Frames(TARGET), CONNECTED.frame(b"a") * 3) == [
            (range(2, 9, 3), 1, 1, b"")
        ]

    def test_empty_payloads(self) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"") * 3) == [(range(3, 10, 3), 0, 0, b"")]

    @pytest.mark.parametrize("behind", [b"ab", b"abcd", b""])
    def test_another_length_behind_it_is_a_span_of_its_own(self, behind: bytes) -> None:
        length = len(behind)
        assert self.spans(Capsules(TARGET), capsule(b"abc") * 2 + capsule(behind)) == [
            (range(3, 10, 6), 3, 3, b""),
            ((15,), length, length, b""),
        ]

    def test_another_address_behind_it_is_a_span_of_its_own(self) -> None:
        data = FREE.frame(b"ab") * 3 + THERE + b"\0\2cd" + FREE.frame(b"ef")
        assert self.spans(Frames(), data) == [
            (range(9, 32, 11), 2, 2, HERE),
            ((42,), 2, 2, THERE),
            ((53,), 2, 2, HERE),
        ]

    @pytest.mark.parametrize("column", range(9))
    def test_a_header_that_differs_in_any_one_byte_ends_it(self, column: int) -> None:
        """The payloads look like headers, to no effect."""
        header = b"\x02\x03abc\x01\xbb\x00\x09"
        other = bytearray(header)
        other[column] = {0: 0x01, 1: 0x02, 7: 0x01, 8: 0x08}.get(column, other[column] ^ 1)
        with rig(Frames(), FramedSocket, (header + header) * 3 + bytes(other) + header) as one:
            first = one.spans()[0]
        assert first == (range(9, 46, 18), 9, 9, b"\x02\x03abc\x01\xbb")

    def test_two_spellings_of_a_length_are_two_trains(self) -> None:
        long = b"\0\x40\x04\0abc"
        assert self.spans(Capsules(TARGET), long * 2 + capsule(b"abc") * 2 + long) == [
            (range(4, 12, 7), 3, 3, b""),
            (range(17, 24, 6), 3, 3, b""),
            ((30,), 3, 3, b""),
        ]

    def test_what_is_skipped_ends_it(self) -> None:
        assert self.spans(Capsules(TARGET), capsule(b"a") * 2 + UNKNOWN + capsule(b"b") * 2) == [
            (range(3, 8, 4), 1, 1, b""),
            (range(18, 23, 4), 1, 1, b""),
        ]

    def test_its_last_frame_comes_when_it_is_whole(self) -> None:
        train = b"".join(capsule(payload) for payload in (b"aaa", b"bbb", b"ccc"))
        with rig(Capsules(TARGET), FramedSocket, train[:-1]) as one:
            assert one.spans() == [(range(3, 10, 6), 3, 3, b"")]
            assert one.feed(train[-1:]) == [b"ccc"]

    @every_kind
    def test_a_long_one(self, kind: Kind) -> None:
        payloads = [struct.pack(">I", number) for number in range(5000)]
        with rig(kind.framing(), FramedSocket, b"".join(map(kind.frame, payloads))) as one:
            batch = one.framed.receive(one.arena)
            assert len(batch.spans) == 1
            assert [payload for payload, _ in cut(batch)] == payloads


class TestSkipping:
    @pytest.mark.parametrize(
        "kind", [b"\x01", b"\x17", b"\x40\x40", b"\x80\x01\x00\x00", b"\xff" * 8]
    )
    @pytest.mark.parametrize("value", [b"", b"x", b"y" * 300])
    def test_capsules_of_unknown_types(self, kind: bytes, value: bytes) -> None:
        unknown = kind + struct.pack(">H", len(value) | 0x4000) + value
        data = capsule(b"a") + unknown + capsule(b"b") + unknown * 2 + capsule(b"c")
        with rig(Capsules(TARGET)) as one:
            assert one.feed(data) == [b"a", b"b", b"c"]
            assert one.counts.counts == {} and not one.framed.ended

    def test_cut_at_every_byte(self) -> None:
        data = UNKNOWN + capsule(b"abc")
        with rig(Capsules(TARGET)) as one:
            for at in range(1, len(data)):
                assert one.feed(data[:at]) == [], at
                assert one.feed(data[at:]) == [b"abc"], at

    @both_roles
    def test_one_that_is_longer_than_what_is_there(self, role: Any) -> None:
        """It comes in many reads, whose bytes are no frames though they look so."""
        value = capsule(b"not this") * 100
        data = b"\x17" + struct.pack(">H", len(value) | 0x4000) + value
        with rig(Capsules(TARGET), role) as one:
            assert one.feed(capsule(b"before") + data[:3]) == [b"before"]
            for at in range(3, len(data), 97):
                assert one.feed(data[at : at + 97]) == []
            assert one.feed(capsule(b"behind")) == [b"behind"]
            assert one.feed(data[:50]) == []
            assert one.feed(data[50:] + capsule(b"again")) == [b"again"]

    def test_one_of_a_megabyte(self) -> None:
        """Nothing of it is kept, and its end is found."""
        with rig(Capsules(TARGET)) as one:
            megabyte = b"\x17" + struct.pack(">I", 1 << 20 | 0x80000000) + capsule(b"n") * (1 << 18)
            sender = Task(one.peer.sendall, megabyte + capsule(b"behind"))
            assert one.collect(1) == [b"behind"]
            sender.result()

    def test_one_that_never_ends_blocks_nothing_but_its_stream(self) -> None:
        with rig(Capsules(TARGET)) as one:
            assert one.feed(b"\x17" + b"\xff" * 8) == []
            for _ in range(3):
                assert one.feed(capsule(b"in it")) == []
            one.peer.close()
            wait_until(lambda: one.receive() == [] and one.framed.ended)

    @pytest.mark.parametrize("context", [b"\x01", b"\x02", b"\x40\x02", b"\xff" * 8])
    def test_a_context_that_was_never_agreed_on(self, context: bytes) -> None:
        with rig(Capsules(TARGET)) as one:
            assert one.feed(capsule(b"a") + capsule(b"no", context) * 2 + capsule(b"b")) == [
                b"a",
                b"b",
            ]
            assert one.counts.counts == {}

    def test_a_context_of_0_in_a_longer_form(self) -> None:
        with rig(Capsules(TARGET)) as one:
            assert one.feed(capsule(b"a", b"\x40\x00") + capsule(b"b", b"\xc0" + bytes(7))) == [
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
    def test_malformed_ends_the_stream_and_is_counted(
        self, kind: Kind, bad: bytes, role: Any
    ) -> None:
        """HAZARDS 123: what came before it is good, what comes behind it is nobody's."""
        with rig(kind.framing(), role) as one:
            assert one.feed(kind.frame(b"before") + bad + kind.frame(b"behind")) == [b"before"]
            assert one.framed.ended
            assert one.counts.counts == {("drops", "malformed"): 1}

    @both_roles
    def test_frames_and_the_end_behind_them(self, role: Any) -> None:
        with rig(Capsules(TARGET), role) as one:
            one.peer.sendall(capsule(b"last") + b"\0\4\0x")
            one.peer.close()
            found: list[bytes] = []
            wait_until(lambda: found.extend(one.receive()) or one.framed.ended)
            assert found == [b"last"]

    @both_roles
    def test_a_reset(self, role: Any) -> None:
        with rig(Capsules(TARGET), role) as one:
            reset(one.peer)
            wait_until(lambda: one.receive() == [] and one.framed.ended)
            assert one.counts.counts == {}

    @both_roles
    def test_nothing_yet_is_no_end(self, role: Any) -> None:
        with rig(Capsules(TARGET), role) as one:
            assert one.receive() == [] and not one.framed.ended

    @both_roles
    def test_nothing_is_received_after_shutdown(self, role: Any) -> None:
        with rig(Capsules(TARGET), role) as one:
            one.peer.sendall(capsule(b"late"))
            one.arrived(1)
            one.framed.shutdown()
            assert one.receive() == []
            assert one.peer.recv(1) == b""

    @both_roles
    def test_ends_may_come_twice(self, role: Any) -> None:
        with rig(Capsules(TARGET), role) as one:
            one.framed.shutdown()
            one.framed.shutdown()
            one.framed.close()
            one.framed.shutdown()
            one.framed.close()


class TestFresh:
    """What was read ahead is there without a byte more from the socket (HAZARDS 62)."""

    def test_a_socket_tells_that_nobody_has_looked_yet(self) -> None:
        with rig(Capsules(TARGET), FramedSocket, capsule(b"early") * 2 + b"\0\3") as one:
            assert one.framed.fresh and nothing_comes(one.framed._socket, 0)
            assert one.receive() == [b"early"] * 2
            assert not one.framed.fresh
            assert one.feed(b"\0ab") == [b"ab"]

    def test_a_connection_does_not_wait_for_it(self) -> None:
        with rig(Capsules(TARGET), FramedConn, capsule(b"early")) as one:
            assert nothing_comes(one.framed._socket, 0)
            assert Task(one.framed.wait).result() is True
            assert one.receive() == [b"early"]
            waiter = Task(one.framed.wait)
            one.peer.sendall(capsule(b"more"))
            assert waiter.result() is True
            assert one.receive() == [b"more"]

    def test_read_ahead_and_malformed(self) -> None:
        with rig(Capsules(TARGET), FramedSocket, capsule(b"early") + b"\0\0") as one:
            assert one.receive() == [b"early"]
            assert one.framed.ended

    def test_without_anything_read_ahead_a_look_does_no_harm(self) -> None:
        with rig(Capsules(TARGET), FramedConn) as one:
            assert Task(one.framed.wait).result() is True
            assert one.receive() == [] and not one.framed.ended


class TestSending:
    def test_answers_of_a_connected_stream_have_no_header(self) -> None:
        with rig(Capsules(TARGET)) as one:
            one.framed.send(one.arena, run_of(one.arena, [b"abc"]), None)
            one.framed.send(one.arena, run_of(one.arena, [b"abcd", b"efgh", b"ij"]), None)
            assert_gets(one.peer, b"\0\4\0abc" + b"\0\5\0abcd" + b"\0\5\0efgh" + b"\0\3\0ij")

    def test_the_header_of_an_answer_is_its_source(self) -> None:
        with rig(Frames()) as one:
            one.framed.send(one.arena, run_of(one.arena, [b"ab", b"cd", b"e"], HERE), None)
            one.framed.send(one.arena, run_of(one.arena, [b"f"], NAMED), None)
            assert_gets(
                one.peer, HERE + b"\0\2ab" + HERE + b"\0\2cd" + HERE + b"\0\1e" + NAMED + b"\0\1f"
            )

    def test_a_connection_names_the_target_of_each(self) -> None:
        with rig(Frames(), FramedConn) as one:
            here, there = (
                one.framed.prepare(udp_to(Address("192.0.2.1", 53))),
                one.framed.prepare(udp_to(Address("a.bc", 443))),
            )
            assert (here.address, here.sockaddr) == (HERE, ("192.0.2.1", 53))
            assert (there.address, there.sockaddr) == (NAMED, ("a.bc", 443))
            one.framed.send(one.arena, run_of(one.arena, [b"ab", b"c"]), here)
            one.framed.send(one.arena, run_of(one.arena, [b"d"]), there)
            assert_gets(one.peer, HERE + b"\0\2ab" + HERE + b"\0\1c" + NAMED + b"\0\1d")

    def test_the_header_of_a_hop_behind_is_part_of_the_payload(self) -> None:
        with rig(Capsules(TARGET), FramedConn) as one:
            one.framed.send(
                one.arena,
                run_of(one.arena, [b"abc", b"de"], b"HEAD"),
                one.framed.prepare(udp_to(TARGET)),
            )
            assert_gets(one.peer, b"\0\x08\0HEADabc" + b"\0\x07\0HEADde")

    def test_both_headers_at_once(self) -> None:
        with rig(Frames(), FramedConn) as one:
            one.framed.send(
                one.arena,
                run_of(one.arena, [b"abc", b"d"], b"HEAD"),
                one.framed.prepare(udp_to(Address("192.0.2.1", 53))),
            )
            assert_gets(one.peer, HERE + b"\0\7HEADabc" + HERE + b"\0\5HEADd")

    @every_kind
    def test_empty_and_largest(self, kind: Kind) -> None:
        """HAZARDS 27, 28: an empty datagram is one."""
        largest = (bytes(range(256)) * 256)[: kind.largest]
        with rig(kind.framing()) as one:
            for payloads in ([b""], [b"", b"", b""], [largest], [largest[:1200], b""]):
                one.framed.send(one.arena, run_of(one.arena, payloads, kind.key), None)
            wanted = [b""] * 4 + [largest, largest[:1200], b""]
            assert (
                kind.parse(read_exactly(one.peer, len(b"".join(map(kind.frame, wanted))))) == wanted
            )

    def test_a_range_of_places(self) -> None:
        with rig(Capsules(TARGET)) as one:
            one.arena.view[:20] = b"..aaa..bbb..ccc..d.."
            one.framed.send(one.arena, Run(range(2, 18, 5), 3, 1), None)
            assert_gets(one.peer, b"\0\4\0aaa\0\4\0bbb\0\4\0ccc\0\2\0d")

    @pytest.mark.parametrize(
        "target", [Address("192.0.2.9", 444), Address("192.0.2.8", 443), Address("a.bc", 443)]
    )
    @pytest.mark.parametrize("framing", [Capsules(TARGET), Frames(TARGET)])
    def test_a_connected_stream_leads_nowhere_else(self, framing: Any, target: Address) -> None:
        with rig(framing, FramedConn) as one:
            with pytest.raises(DialError) as caught:
                one.framed.prepare(udp_to(target))
            assert caught.value.reason is Reason.UNSUPPORTED
            assert str(caught.value) == f"{target}: the connection is to {TARGET} alone"

    def test_to_a_peer_that_is_gone_nothing_is_raised(self) -> None:
        with rig(Capsules(TARGET)) as one:
            reset(one.peer)
            wait_until(lambda: one.receive() == [] and one.framed.ended)
            one.framed.send(one.arena, run_of(one.arena, [b"abc"]), None)

    @both_roles
    def test_after_the_end_it_is_counted(self, role: Any) -> None:
        with rig(Frames(), role) as one:
            destination = (
                one.framed.prepare(udp_to(Address("192.0.2.1", 53))) if role is FramedConn else None
            )
            one.framed.shutdown()
            one.framed.send(one.arena, run_of(one.arena, [b"abc", b"def"]), destination)
            one.framed.close()
            one.framed.send(one.arena, run_of(one.arena, [b"abc"]), destination)
            assert one.counts.counts == {("drops", "closed"): 3}

    def test_to_a_proxy_that_has_hung_up_it_is_counted(self) -> None:
        with rig(Capsules(TARGET), FramedConn) as one:
            one.peer.close()
            wait_until(lambda: one.receive() == [] and one.framed.ended)
            one.framed.send(
                one.arena, run_of(one.arena, [b"abc", b"def"]), one.framed.prepare(udp_to(TARGET))
            )
            assert one.counts.counts == {("drops", "upstream closed"): 2}

    def test_many_threads_mix_no_frames(self) -> None:
        """Answers of several sessions leave by one stream."""
        with rig(Capsules(TARGET)) as one:

            def send(letter: bytes) -> None:
                arena = Arena()
                for number in range(50):
                    one.framed.send(
                        arena,
                        run_of(arena, [letter + struct.pack(">H", number) + letter * 97] * 3),
                        None,
                    )

            senders = [Task(send, letter) for letter in (b"a", b"b", b"c")]
            found = CAPSULES.parse(read_exactly(one.peer, 450 * 104))
            for sender in senders:
                sender.result()
            for letter in (b"a", b"b", b"c"):
                numbers = [
                    payload[1:3]
                    for payload in found
                    if payload == letter + payload[1:3] + letter * 97
                ]
                assert numbers == [struct.pack(">H", number // 3) for number in range(150)]
            assert one.counts.counts == {}

    # -- what leaves is always whole

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_a_run_longer_than_the_queue_is_not_lost_to_an_idle_stream(self, kind: Kind) -> None:
        """A train of frames comes as one run of up to ROOM bytes: from stream to stream it is the ordinary case."""
        payloads = [struct.pack(">H", number) + b"x" * 1198 for number in range(300)]
        with rig(kind.framing(), FramedConn) as one:
            destination = one.framed.prepare(
                udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)
            )
            one.framed.send(one.arena, run_of(one.arena, payloads), destination)
            assert one.counts.counts == {}
            assert one.framed.wait() and one.receive() == []
            reader = Task(one.framed.wait)
            size = len(b"".join(map(kind.frame, payloads)))
            assert kind.parse(read_exactly(one.peer, size)) == payloads
            one.framed.shutdown()
            reader.result()

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_what_no_frame_can_hold_is_dropped_and_counted(self, kind: Kind) -> None:
        """A header of a hop behind makes it too long, or a stream that takes longer ones: the proxy would have to hang up."""
        with rig(kind.framing(), FramedConn) as one:
            destination = one.framed.prepare(
                udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)
            )
            one.framed.send(one.arena, run_of(one.arena, [b"x" * 65507], b"h" * 300), destination)
            one.framed.send(one.arena, run_of(one.arena, [b"abc"]), destination)
            assert_gets(one.peer, kind.frame(b"abc"))
            assert one.counts.counts == {("drops", "too big"): 1}

    @every_kind
    def test_one_byte_over_the_largest_is_dropped_and_counted(self, kind: Kind) -> None:
        """A stream that takes UoT's 65535 may lead into one of capsules, which has to end at more than 65527."""
        with rig(kind.framing()) as one:
            one.framed.send(
                one.arena, run_of(one.arena, [b"x" * (kind.largest + 1)], kind.key), None
            )
            one.framed.send(one.arena, run_of(one.arena, [b"abc"], kind.key), None)
            assert_gets(one.peer, kind.frame(b"abc"))
            assert one.counts.counts == {("drops", "too big"): 1}


class Numbered:
    """Runs whose datagrams are numbered; `accepted` are those that were not counted as dropped, if nobody else sends."""

    def __init__(self, one: Rig, kind: Kind, destination: Any = None) -> None:
        self._one, self._kind, self._destination = one, kind, destination
        self._arena = Arena()
        self._next = 0
        self.sent: list[bytes] = []
        self.accepted: list[bytes] = []

    def send(self) -> bool:
        """A run of ten, the last shorter; whether all of it was taken.  What is not taken is its end."""
        payloads = [
            struct.pack(">I", self._next + number) + b"x" * (996 if number < 9 else 500)
            for number in range(10)
        ]
        self._next += 10
        self.sent += payloads
        before = self._one.counts.of(*FULL)
        run = run_of(self._arena, payloads, b"" if self._destination else self._kind.key)
        self._one.framed.send(self._arena, run, self._destination)
        dropped = self._one.counts.of(*FULL) - before
        self.accepted += payloads[: 10 - dropped]
        return not dropped

    @property
    def dropped(self) -> int:
        return len(self.sent) - len(self.accepted)

    def size(self) -> int:
        """Of the frames that were accepted."""
        return len(b"".join(map(self._kind.frame, self.accepted)))


def drained(one: Rig) -> bytes:
    """All that the kernel holds for the peer, read by it; what waits in the queue is not there yet."""
    data = b""
    while unsent(one.framed._socket) or waiting(one.peer):
        data += one.peer.recv(1 << 20) if waiting(one.peer) else b""
    return data


def congest(one: Rig, runs: Numbered) -> None:
    """Sends until something waits."""
    while not one.framed._queue:
        assert runs.send()


class TestPeerThatDoesNotRead:
    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_a_connection_keeps_a_bounded_queue_that_its_reader_flushes(self, kind: Kind) -> None:
        """HAZARDS 85, 124."""
        with rig(kind.framing(), FramedConn) as one:
            assert one.framed.wait() and one.receive() == []
            runs = Numbered(
                one,
                kind,
                one.framed.prepare(udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET)),
            )
            while runs.send():
                pass
            for _ in range(5):
                assert not runs.send()
            assert 50 < runs.dropped <= 60 and one.counts.counts == {FULL: runs.dropped}
            size, got = runs.size(), drained(one)
            held = size - len(got)
            assert held == len(one.framed._queue)
            assert QUEUE_LIMIT - len(kind.frame(b"x" * 1000)) < held <= QUEUE_LIMIT
            reader = Task(one.framed.wait)
            got += read_exactly(one.peer, held)
            assert kind.parse(got) == runs.accepted
            assert runs.send()
            assert kind.parse(read_exactly(one.peer, runs.size() - size)) == runs.accepted[-10:]
            assert not reader.done and nothing_comes(one.peer, 0)
            one.framed.shutdown()
            reader.result()

    @every_kind
    @both_roles
    def test_a_first_run_longer_than_all_room_is_sent_in_whole_frames(
        self, kind: Kind, role: Any
    ) -> None:
        """Nothing waits before it, and yet no more than the queue's limit is kept of it."""
        payloads = [struct.pack(">H", number) + b"x" * 998 for number in range(1500)]
        with rig(kind.framing(), role) as one:
            destination = (
                one.framed.prepare(udp_to(Address("192.0.2.1", 53) if kind is FREE else TARGET))
                if role is FramedConn
                else None
            )
            one.framed.send(
                one.arena,
                run_of(one.arena, payloads, b"" if destination else kind.key),
                destination,
            )
            dropped = one.counts.of(*FULL)
            assert 0 < dropped < 1500 and one.counts.counts == {FULL: dropped}
            kept = payloads[: 1500 - dropped]
            assert 0 < len(one.framed._queue) <= QUEUE_LIMIT
            got = drained(one)
            size = sum(len(kind.frame(payload)) for payload in kept)
            left = Task(read_exactly, one.peer, size - len(got))
            wait_until(one.framed.flush)
            assert kind.parse(got + left.result()) == kept and nothing_comes(one.peer, 0)

    @every_kind
    def test_a_frame_begun_is_finished_though_it_is_longer_than_the_queue(self, kind: Kind) -> None:
        """Without its rest the stream would be lost; others behind it wait no more."""
        payload = b"x" * kind.largest
        with rig(kind.framing()) as one:
            sent = 0
            while not one.counts.counts:
                one.framed.send(one.arena, run_of(one.arena, [payload], kind.key), None)
                sent += 1
            assert one.counts.counts == {FULL: 1}
            assert len(one.framed._queue) < QUEUE_LIMIT + len(kind.frame(payload))
            reading = Task(read_exactly, one.peer, (sent - 1) * len(kind.frame(payload)))
            one.framed.drain(lambda: False)
            assert kind.parse(reading.result()) == [payload] * (sent - 1) and nothing_comes(
                one.peer, 0
            )

    def test_while_something_waits_nothing_goes_past_it(self) -> None:
        """Though the kernel has room again, and nobody has flushed yet."""
        with rig(Capsules(TARGET), FramedConn) as one:
            runs = Numbered(one, CAPSULES, one.framed.prepare(udp_to(TARGET)))
            congest(one, runs)
            got = drained(one)
            assert runs.send() and runs.send()
            assert drained(one) == b""
            assert one.framed.flush()
            got += read_exactly(one.peer, runs.size() - len(got))
            assert CAPSULES.parse(got) == runs.accepted

    def test_a_reader_that_flushes_still_receives(self) -> None:
        with rig(Capsules(TARGET), FramedConn) as one:
            one.receive()
            runs = Numbered(one, CAPSULES, one.framed.prepare(udp_to(TARGET)))
            while runs.send():
                pass
            reader = Task(one.framed.wait)
            one.peer.sendall(capsule(b"meanwhile"))
            assert reader.result() is True
            assert one.receive() == [b"meanwhile"]

    def test_a_reader_that_waits_already_is_told_to_flush(self) -> None:
        """The queue begins to fill only after the reader has gone to sleep."""
        with rig(Capsules(TARGET), FramedConn) as one:
            one.receive()
            reader = Task(one.framed.wait)
            runs = Numbered(one, CAPSULES, one.framed.prepare(udp_to(TARGET)))
            while runs.send():
                pass
            assert CAPSULES.parse(read_exactly(one.peer, runs.size())) == runs.accepted
            one.framed.shutdown()
            reader.result()

    @pytest.mark.parametrize("kind", [CAPSULES, FREE], ids=lambda kind: kind.name)
    def test_answers_are_drained_while_others_queue_and_drop(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """send() itself waits for nobody."""
        with rig(kind.framing()) as one, waits_seen(monkeypatch) as congested:
            first, second = Numbered(one, kind), Numbered(one, kind)
            second._next = 1 << 20
            congest(one, first)
            draining = Task(one.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            assert not draining.done
            while second.send():
                pass
            assert not first.dropped and 0 < second.dropped <= 10 < len(second.accepted)
            assert one.counts.counts == {FULL: second.dropped}
            size = len(b"".join(map(kind.frame, first.sent + second.accepted)))
            found = kind.parse(read_exactly(one.peer, size))
            assert found == first.sent + second.accepted
            draining.result()
            assert second.send()
            last = b"".join(map(kind.frame, second.accepted[-10:]))
            assert read_exactly(one.peer, len(last)) == last

    def test_draining_waits_for_nothing_where_nothing_waits(self) -> None:
        with rig(Capsules(TARGET)) as one:
            one.framed.drain(lambda: False)
            one.framed.send(one.arena, run_of(one.arena, [b"abc"]), None)
            one.framed.drain(lambda: False)
            assert_gets(one.peer, capsule(b"abc"))

    def test_draining_ends_with_the_stream(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(framed, "FLUSH_SECONDS", 0.02)
        with rig(Capsules(TARGET)) as one, waits_seen(monkeypatch) as congested:
            congest(one, Numbered(one, CAPSULES))
            draining = Task(one.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            one.framed.close()
            draining.result()

    def test_draining_ends_with_the_peer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with rig(Capsules(TARGET)) as one, waits_seen(monkeypatch) as congested:
            congest(one, Numbered(one, CAPSULES))
            draining = Task(one.framed.drain, lambda: False)
            assert congested.wait(SECONDS)
            reset(one.peer)
            draining.result()

    def test_a_stream_that_closes_as_draining_begins_raises_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor does send(): between a write and the wait for its rest the stream's own thread may close."""
        with rig(Capsules(TARGET)) as one:
            runs = Numbered(one, CAPSULES)
            congest(one, runs)

            def closed_just_before() -> Any:
                one.framed.close()
                return select.poll()

            monkeypatch.setattr(
                framed, "select", SimpleNamespace(poll=closed_just_before, POLLOUT=select.POLLOUT)
            )
            one.framed.drain(lambda: False)
            assert one.framed.closed and one.counts.counts == {}
            runs.send()
            assert one.counts.counts == {("drops", "closed"): 10}


@contextmanager
def waits_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Set when somebody has found that not all could be flushed, and is about to wait for the client."""
    original, seen = FramedSocket.flush, threading.Event()

    def flush(self: FramedSocket) -> bool:
        done = original(self)
        if not done:
            seen.set()
        return done

    monkeypatch.setattr(FramedSocket, "flush", flush)
    yield seen


class TestEndOfAConnection:
    def test_one_that_ends_at_once_is_not_replaced_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(framed, "REST_SECONDS", 0.15)
        started = time.monotonic()
        with rig(Capsules(TARGET), FramedConn) as one:
            one.receive()
            one.peer.close()
            assert Task(one.framed.wait).result() is True
            assert one.receive() == []
            assert Task(one.framed.wait).result() is False
            assert 0.15 <= time.monotonic() - started < 1.0

    def test_one_that_has_lived_ends_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with rig(Capsules(TARGET), FramedConn) as one:
            monkeypatch.setattr(framed, "REST_SECONDS", 0.0)
            one.peer.sendall(b"\0\0")
            one.arrived(2)
            assert one.receive() == [] and one.framed.ended
            started = time.monotonic()
            assert Task(one.framed.wait).result() is False
            assert time.monotonic() - started < 0.5

    def test_shutdown_ends_the_rest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(framed, "REST_SECONDS", 60.0)
        with rig(Capsules(TARGET), FramedConn) as one:
            one.peer.close()
            wait_until(lambda: one.receive() == [] and one.framed.ended)
            reader = Task(one.framed.wait)
            assert not reader.done
            one.framed.shutdown()
            assert reader.result() is False

    def test_shutdown_wakes_its_reader(self) -> None:
        def read(one: Rig) -> str:
            while one.framed.wait():
                one.framed.receive(one.arena)
            return "ended"

        with rig(Capsules(TARGET), FramedConn) as one:
            reader = Task(read, one)
            one.framed.shutdown()
            assert reader.result() == "ended"

    def test_after_shutdown_there_is_nothing_to_wait_for(self) -> None:
        with rig(Capsules(TARGET), FramedConn, capsule(b"early")) as one:
            one.framed.shutdown()
            assert Task(one.framed.wait).result() is False


class TestSources:
    def test_of_a_connected_stream_it_is_the_target(self) -> None:
        with rig(Capsules(TARGET), FramedConn, capsule(b"a")) as one:
            [(_, _, _, key)] = one.spans()
            assert one.framed.source(key) == TARGET

    def test_of_free_frames_each_names_its_own(self) -> None:
        with rig(
            Frames(),
            FramedConn,
            HERE + b"\0\1a" + NAMED + b"\0\1b" + b"\x01" + bytes(15) + b"\1\0\x35\0\1c",
        ) as one:
            assert [one.framed.source(key) for _, _, _, key in one.spans()] == [
                Address("192.0.2.1", 53),
                Address("a.bc", 443),
                Address("::1", 53),
            ]

    def test_a_name_that_is_none_is_dropped_and_counted_alone(self) -> None:
        """HAZARDS 10, 97: of a train each datagram counts."""
        bad = b"\x02\x03a b\x00\x35\0\1x"
        with rig(Frames(), FramedConn, bad * 3 + FREE.frame(b"good") + bad) as one:
            assert one.receive() == [b"good"]
            assert one.counts.counts == {("drops", "malformed"): 4} and not one.framed.ended

    def test_they_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """HAZARDS 117: a proxy may name as many as it likes."""
        monkeypatch.setattr(address, "SOURCE_ADDRESSES_LIMIT", 4)
        with rig(Frames(), FramedConn) as one:
            for number in range(20):
                one.peer.sendall(b"\x00\xc0\0\2" + bytes((number,)) + b"\0\x35\0\1a")
                one.arrived(10)
                [(_, _, _, key)] = one.spans()
                assert one.framed.source(key) == Address(f"192.0.2.{number}", 53)
                assert len(one.framed._sources._known) <= 5  # and what one receive adds

    def test_those_of_the_batch_are_known_though_the_bound_is_met_within_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """source() is asked about a batch after all of it was received."""
        monkeypatch.setattr(address, "SOURCE_ADDRESSES_LIMIT", 4)
        data = b"".join(b"\x00\xc0\0\2" + bytes((number,)) + b"\0\x35\0\1a" for number in range(6))
        with rig(Frames(), FramedConn, data) as one:
            keys = [key for _, _, _, key in one.spans()]
            assert [one.framed.source(key) for key in keys] == [
                Address(f"192.0.2.{number}", 53) for number in range(6)
            ]
