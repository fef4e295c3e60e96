"""Streams in chunks: the parser of lengths, and a stream on a connection that is kept."""

from __future__ import annotations

import socket
import ssl
from typing import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netproxy.errors import ProtocolError
from netproxy.net import syscalls, tls
from netproxy.net.stream import Stream, complete
from netproxy.net.syscalls import ROOM
from netproxy.net.tls_socket import ENCRYPT_LIMIT, JOIN_LIMIT, TlsSocket
from netproxy.tunnel.streams.chunks import (
    CHUNK_LIMIT,
    CHUNKED_BYTES,
    END,
    HEAD_SIZE,
    REST,
    ChunkedSocket,
    ChunkLengths,
    can_carry_chunks,
)
from netproxy.tunnel.streams.reusable_stream import ReusableStream
from tests.support.certificates import Certificates, certificates
from tests.support.records import Records
from tests.support.sockets import tcp_pair


def chunk(data: bytes) -> bytes:
    """Return the bytes of a chunk."""
    return len(data).to_bytes(HEAD_SIZE, "big") + data


@pytest.fixture
def records() -> Callable[..., Records]:
    """Return a function that makes Records."""

    def make(*pieces: bytes, is_cut: bool = False) -> Records:
        return Records(list(pieces), is_cut)

    return make


def read_all(stream: ChunkedSocket, size: int = ROOM) -> bytes:
    """Return what can be read now, with a buffer of `size` bytes."""
    view, data = memoryview(bytearray(size)), b""
    while True:
        try:
            count = stream.recv_into(view)
        except BlockingIOError:
            return data
        if not count:
            return data
        data += view[:count]


# -- the parser of lengths


@pytest.mark.parametrize("length", [0, 1, 255, 256, 65536, CHUNK_LIMIT])
def test_length_is_parsed_whole_and_byte_by_byte(length: int) -> None:
    head = length.to_bytes(HEAD_SIZE, "big")
    lengths = ChunkLengths()
    # The same parser twice: nothing of the first length is left.
    for _ in range(2):
        assert lengths.parse(head) == length
        for at in range(HEAD_SIZE - 1):
            assert lengths.parse(head[at : at + 1]) is None
            assert lengths.missing == HEAD_SIZE - 1 - at
        assert lengths.parse(head[-1:]) == length


@pytest.mark.parametrize("cut", range(HEAD_SIZE))
def test_truncated_length_is_no_length(cut: int) -> None:
    lengths = ChunkLengths()
    assert lengths.parse(b"\0\0\1\0"[:cut]) is None
    assert lengths.missing == HEAD_SIZE - cut


@pytest.mark.parametrize("length", [CHUNK_LIMIT + 1, 0xFFFFFFFE])
def test_longer_length_than_the_limit_is_refused(length: int) -> None:
    with pytest.raises(ProtocolError, match="a chunk of"):
        ChunkLengths().parse(length.to_bytes(HEAD_SIZE, "big"))


# -- reading


@given(
    parts=st.lists(st.binary(max_size=40), max_size=6),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    size=st.integers(1, 50),
    ahead=st.integers(0, 60),
)
def test_stream_is_read_in_whatever_pieces_it_comes(
    parts: list[bytes], cuts: list[int], size: int, ahead: int
) -> None:
    """Whole, byte by byte, and in any other pieces; what is behind the end stays unread."""
    wire = b"".join(chunk(part) for part in parts if part) + END
    ahead = min(ahead, len(wire))
    pieces, at, turn = [], ahead, 0
    while at < len(wire):
        pieces.append(wire[at : at + cuts[turn % len(cuts)]])
        at, turn = at + len(pieces[-1]), turn + 1
    behind = b"the next request"
    connection = Records([*pieces, behind])
    stream = ChunkedSocket(connection, wire[:ahead])
    data, view = b"", memoryview(bytearray(size))
    while count := stream.recv_into(view):
        data += view[:count]
    assert data == b"".join(parts) and stream.peer_ended
    rest = memoryview(bytearray(64))
    count = connection.recv_ready(rest) or connection.recv_into(rest)
    assert bytes(rest[:count]) == behind


WIRE = chunk(b"first") + chunk(b"second") + END


@pytest.mark.parametrize("cut", range(len(WIRE)))
def test_connection_that_closes_before_the_end_is_a_reset(
    records: Callable[..., Records], cut: int
) -> None:
    pieces = [WIRE[:cut]] if cut else []
    stream = ChunkedSocket(records(*pieces, is_cut=True))
    with pytest.raises(ConnectionResetError):
        for _ in range(3):
            assert stream.recv_into(memoryview(bytearray(ROOM)))
    assert not stream.peer_ended and not stream.release()


@pytest.mark.parametrize("cut", range(len(WIRE)))
def test_stream_that_is_incomplete_waits(records: Callable[..., Records], cut: int) -> None:
    pieces = [WIRE[:cut]] if cut else []
    connection = records(*pieces)
    stream = ChunkedSocket(connection)
    data = read_all(stream)
    assert b"firstsecond".startswith(data) and not stream.peer_ended
    connection._pieces.append(WIRE[cut:])
    assert data + read_all(stream) == b"firstsecond" and stream.peer_ended


def test_too_long_chunk_is_an_error_of_the_connection(records: Callable[..., Records]) -> None:
    stream = ChunkedSocket(records(b"\xff\xff\xff\xfedata"))
    with pytest.raises(OSError, match="a chunk of 4294967294 bytes"):
        stream.recv_into(memoryview(bytearray(ROOM)))


# -- writing


def test_no_bytes_are_no_chunk(records: Callable[..., Records]) -> None:
    """A chunk without bytes would be the end."""
    connection = records()
    assert ChunkedSocket(connection).send(b"") == 0 and not connection.sent


def test_chunk_that_has_to_wait_is_sent_once(records: Callable[..., Records]) -> None:
    connection = records()
    stream = ChunkedSocket(connection)
    connection.room = 0
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            stream.send(b"data")
        # The end waits for the chunk.
        with pytest.raises(BlockingIOError):
            stream.shutdown(socket.SHUT_WR)
    connection.room = 1
    assert stream.send(b"data and more") == 4
    stream.shutdown(socket.SHUT_WR)
    stream.shutdown(socket.SHUT_WR)
    assert bytes(connection.sent) == chunk(b"data") + END


def test_long_data_is_sent_in_several_chunks(records: Callable[..., Records]) -> None:
    connection = records()
    stream, data = ChunkedSocket(connection), bytes(ENCRYPT_LIMIT + 5)
    assert stream.send(data) == ENCRYPT_LIMIT
    assert stream.send(data[ENCRYPT_LIMIT:]) == 5
    assert bytes(connection.sent) == chunk(data[:ENCRYPT_LIMIT]) + chunk(bytes(5))


# -- the rest without chunks


@given(
    first=st.binary(max_size=30),
    rest=st.binary(max_size=60),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    size=st.integers(1, 50),
    ahead=st.integers(0, 60),
)
def test_rest_is_read_up_to_the_end_of_the_connection(
    first: bytes, rest: bytes, cuts: list[int], size: int, ahead: int
) -> None:
    wire = (chunk(first) if first else b"") + REST + rest
    ahead = min(ahead, len(wire))
    pieces, at, turn = [], ahead, 0
    while at < len(wire):
        pieces.append(wire[at : at + cuts[turn % len(cuts)]])
        at, turn = at + len(pieces[-1]), turn + 1
    stream = ChunkedSocket(Records(pieces, is_cut=True), wire[:ahead])
    data, view = b"", memoryview(bytearray(size))
    while count := stream.recv_into(view):
        data += view[:count]
    assert data == first + rest and stream.peer_ended
    stream.shutdown(socket.SHUT_WR)
    # Its end is the end of the connection.
    assert not stream.release()


@pytest.mark.parametrize("blocked", [False, True])
def test_bytes_behind_the_first_mebibyte_go_without_chunks(
    records: Callable[..., Records], blocked: bool
) -> None:
    connection = records(END)
    stream, expected, data = ChunkedSocket(connection), bytearray(), bytes(range(256)) * 512
    while len(expected) + len(data) < CHUNKED_BYTES:
        assert stream.send(data) == len(data)
        expected += chunk(data)
    for head in (REST, b"", b""):
        if blocked:
            connection.room = 0
            with pytest.raises(BlockingIOError):
                stream.send(data)
            connection.room = 1
        assert stream.send(data) == len(data)
        expected += head + data
    assert bytes(connection.sent) == bytes(expected)
    assert stream.recv_into(memoryview(bytearray(9))) == 0
    stream.shutdown(socket.SHUT_WR)
    assert connection.shut == [socket.SHUT_WR] and bytes(connection.sent) == bytes(expected)
    assert not stream.release()


# -- the end of a stream


@pytest.mark.parametrize(
    ("fault", "is_clean"),
    [
        ("", True),
        ("own end", False),
        ("peer's end", False),
        ("shut down", False),
        ("spoiled", False),
        ("unread", False),
        ("closed", False),
    ],
)
def test_connection_is_used_again_only_after_a_clean_end(
    records: Callable[..., Records], fault: str, is_clean: bool
) -> None:
    wire = b"" if fault == "peer's end" else END
    connection = records(*([wire] if wire else []))
    stream = ChunkedSocket(connection, END + b"more" if fault == "unread" else b"")
    read_all(stream)
    if fault != "own end":
        stream.shutdown(socket.SHUT_WR)
    if fault == "shut down":
        stream.shutdown(socket.SHUT_RDWR)
    elif fault == "spoiled":
        stream.spoil()
    elif fault == "closed":
        connection.peer_ended = True
    assert stream.release() is is_clean


def test_shutdown_of_a_stream_that_is_over_leaves_the_next_one_alone(
    records: Callable[..., Records],
) -> None:
    connection = records(END)
    stream = ChunkedSocket(connection)
    stream.release()
    with pytest.raises(OSError, match="Bad file descriptor"):
        stream.shutdown(socket.SHUT_RDWR)
    assert not connection.shut and stream.fileno() == stream.detach() == -1


def test_records_reserved_for_inner_tls_are_returned_at_the_end(
    records: Callable[..., Records],
) -> None:
    connection = records(END)
    stream = ChunkedSocket(connection)
    stream.reserve_record()
    stream.reserve_record()
    assert connection.reserved == 2
    stream.release()
    assert connection.reserved == 0


def test_connection_without_tls_carries_no_chunks() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not can_carry_chunks(Stream(ours))
        with pytest.raises(ProtocolError, match="outside TLS"):
            ChunkedSocket(ours)


# -- within TLS


@pytest.fixture(scope="module")
def pem() -> Certificates:
    return certificates()


class TlsPair:
    """Both ends of a connection within TLS; each may carry one stream after the other."""

    def __init__(self, near: socket.socket, far: socket.socket, pem: Certificates) -> None:
        server: ssl.SSLContext = tls.server_context(pem.path("server.pem"), pem.path("server.key"))
        self.near = Stream(near)
        self.far = Stream(far)
        client = TlsSocket(near, syscalls, pem.client_context(), "localhost")
        secured = TlsSocket(far, syscalls, server)
        left = {client, secured}
        while left:
            left -= {end for end in tuple(left) if not end.handshake()}
        self.near.become(client, tls.LayeredCalls)  # type: ignore[arg-type]
        self.far.become(secured, tls.LayeredCalls)  # type: ignore[arg-type]
        self.ended: list[bool] = []

    def streams(self) -> tuple[ReusableStream, ReusableStream]:
        """Begin the next stream at both ends."""
        return tuple(  # type: ignore[return-value]
            ReusableStream(end, self.ended.append) for end in (self.near, self.far)
        )


@pytest.fixture
def pair(pem: Certificates) -> Iterator[TlsPair]:
    with tcp_pair() as (near, far):
        for sock in (near, far):
            sock.setblocking(False)
        yield TlsPair(near, far, pem)


def exchange(pair: TlsPair, sizes: tuple[int, ...]) -> None:
    """Carry a stream with data of these sizes in both directions."""
    left, right = pair.streams()
    for size in sizes:
        data = bytes(range(256)) * (size // 256) + bytes(size % 256)
        for sender, receiver in ((left, right), (right, left)):
            sent, received = 0, b""
            while len(received) < size:
                sent += sender.write_some(memoryview(data)[sent:])
                came = receiver.receive(ROOM)
                received += came or b""
            assert received == data
    for stream, other in ((left, right), (right, left)):
        stream.shutdown_write()
        assert complete(other.read_some(1)) == b""
    left.close()
    right.close()


def test_streams_follow_each_other_on_one_connection(pair: TlsPair) -> None:
    for _ in range(3):
        exchange(pair, (1, JOIN_LIMIT, JOIN_LIMIT + 1, ROOM, 3 * ROOM + 1))
    assert pair.ended == [True] * 6
    assert pair.near.open and pair.far.open


def test_reset_of_a_stream_closes_the_connection_for_its_owner(pair: TlsPair) -> None:
    left, right = pair.streams()
    left.shutdown_write()
    right.shutdown_write()
    assert complete(left.read_some(1)) == complete(right.read_some(1)) == b""
    left.reset()
    left.reset()
    assert pair.ended == [False]
    right.close()
    right.close()
    assert pair.ended == [False, True]
