"""Streams over real TCP connections: deadlines, reading ahead, and the ways to close."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import termios
import time
from typing import Iterator

import pytest

from netproxy.errors import DeadlineError, EndOfStream, LimitError, StreamError
from netproxy.net import stream as stream_module
from netproxy.net.stream import RECEIVE, Stream, complete
from tests.support.sockets import (
    SECONDS,
    Task,
    is_reset,
    nothing_comes,
    read_to_end,
    reset,
    tcp_pair,
    wait_until,
)

# Seconds of a deadline that passes.
SHORT = 0.2

Pair = tuple[Stream, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        yield Stream(ours), theirs


def wait_readable(stream: Stream) -> None:
    """Wait until something of the peer has come."""
    poll = select.poll()
    poll.register(stream.socket, select.POLLIN)
    assert poll.poll(SECONDS * 1000)


def bytes_in_kernel(stream: Stream) -> int:
    """Return how many bytes have come and were not received."""
    (count,) = struct.unpack("i", fcntl.ioctl(stream.socket.fileno(), termios.FIONREAD, bytes(4)))
    return int(count)


def drip(peer: socket.socket, data: bytes, pause: float) -> None:
    """Send byte by byte until the other end is gone."""
    try:
        for byte in data:
            peer.send(bytes((byte,)))
            time.sleep(pause)
    except OSError:
        pass


class TestReading:
    def test_read_exactly_joins_what_comes_in_pieces(self, pair: Pair) -> None:
        stream, peer = pair
        sender = Task(drip, peer, b"abcdef", 0.005)
        assert complete(stream.read_exactly(5)) == b"abcde"
        assert complete(stream.read_exactly(1)) == b"f"
        sender.result()

    def test_read_exactly_of_0_bytes_does_not_wait(self, pair: Pair) -> None:
        assert complete(pair[0].read_exactly(0)) == b""

    def test_early_end_of_stream_leaves_the_bytes_unread(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"abc")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            complete(stream.read_exactly(4))
        assert caught.value.partial
        assert complete(stream.read_exactly(3)) == b"abc"
        with pytest.raises(EndOfStream) as caught:
            complete(stream.read_exactly(1))
        assert not caught.value.partial

    def test_read_until_finds_a_separator_that_comes_in_two_parts(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"line one\r")
        wait_readable(stream)
        reader = Task(complete, stream.read_until(b"\r\n", 100))
        peer.send(b"\nline two")
        assert reader.result() == b"line one\r\n"
        assert stream.unread() == b"line two" or complete(stream.read_exactly(8)) == b"line two"

    def test_read_until_finds_a_separator_that_comes_byte_by_byte(self, pair: Pair) -> None:
        stream, peer = pair
        sender = Task(drip, peer, b"a\r\r\n\r\nrest", 0.002)
        assert complete(stream.read_until(b"\r\n\r\n", 64)) == b"a\r\r\n\r\n"
        sender.result()

    @pytest.mark.parametrize("limit", [5, 6, 7])
    def test_separator_beyond_the_limit_is_refused(self, pair: Pair, limit: int) -> None:
        stream, peer = pair
        peer.send(b"abcdef\r\n")
        with pytest.raises(LimitError):
            complete(stream.read_until(b"\r\n", limit))

    def test_separator_at_the_limit_is_found(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"abcdef\r\n")
        assert complete(stream.read_until(b"\r\n", 8)) == b"abcdef\r\n"

    def test_limit_is_exceeded_without_waiting_for_more(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"x" * 100)
        with pytest.raises(LimitError):
            complete(stream.read_until(b"\n", 100))

    def test_end_of_stream_within_a_line_is_partial(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"half a line")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            complete(stream.read_until(b"\n", 100))
        assert caught.value.partial

    def test_peek_leaves_the_byte_unread(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"\x05\x01")
        assert complete(stream.peek()) == 5
        assert complete(stream.peek()) == 5
        assert complete(stream.read_exactly(2)) == b"\x05\x01"

    def test_peek_at_the_end_of_stream_raises(self, pair: Pair) -> None:
        stream, peer = pair
        peer.close()
        with pytest.raises(EndOfStream) as caught:
            complete(stream.peek())
        assert not caught.value.partial

    def test_read_some_returns_what_is_there(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"abcdef")
        wait_readable(stream)
        assert complete(stream.read_some(4)) == b"abcd"
        assert complete(stream.read_some(4)) == b"ef"
        peer.close()
        assert complete(stream.read_some(4)) == b""

    def test_read_some_asks_for_as_much_as_it_may_return(self, pair: Pair) -> None:
        stream, peer = pair
        sender = Task(peer.sendall, bytes(2 * RECEIVE))
        wait_until(lambda: bytes_in_kernel(stream) == 2 * RECEIVE)
        assert len(complete(stream.read_some(2 * RECEIVE))) == 2 * RECEIVE
        sender.result()

    def test_read_some_never_returns_more_than_its_limit(self, pair: Pair) -> None:
        stream, peer = pair
        sender = Task(peer.sendall, bytes(3 * RECEIVE))
        received = 0
        while received < 3 * RECEIVE:
            piece = complete(stream.read_some(2 * RECEIVE))
            assert 0 < len(piece) <= 2 * RECEIVE
            received += len(piece)
        sender.result()

    def test_skip_drops_what_is_there_and_does_not_wait(self, pair: Pair) -> None:
        stream, peer = pair
        assert stream.skip()
        peer.send(b"abc")
        wait_readable(stream)
        complete(stream.peek())
        assert stream.skip()
        peer.send(b"d")
        assert complete(stream.read_exactly(1)) == b"d"
        peer.shutdown(socket.SHUT_WR)
        wait_readable(stream)
        assert not stream.skip()

    def test_skip_reports_a_reset_as_the_end(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        wait_readable(stream)
        assert not stream.skip()

    def test_read_after_a_reset_raises(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        with pytest.raises(StreamError):
            complete(stream.read_exactly(1))

    def test_read_ahead_keeps_what_has_come(self, pair: Pair) -> None:
        stream, peer = pair
        assert stream.read_ahead() and stream.unread() == b""
        peer.send(b"abc")
        wait_readable(stream)
        assert stream.read_ahead() and stream.unread() == b"abc"
        peer.close()
        wait_until(lambda: not stream.read_ahead())
        assert complete(stream.read_exactly(3)) == b"abc"


class TestDeadline:
    def test_deadline_is_for_all_bytes_of_a_read_together(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        sender = Task(drip, peer, bytes(100), SHORT / 8)
        with pytest.raises(DeadlineError):
            complete(stream.read_exactly(100))
        stream.close()
        sender.result()

    def test_deadline_is_for_all_reads_together(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        sender = Task(drip, peer, bytes(100), SHORT / 8)
        with pytest.raises(DeadlineError):
            for _ in range(100):
                complete(stream.read_until(b"\0", 10))
        stream.close()
        sender.result()

    def test_read_of_a_silent_peer_ends_at_the_deadline(self, pair: Pair) -> None:
        stream, _ = pair
        stream.limit(SHORT)
        with pytest.raises(DeadlineError):
            complete(stream.peek())
        assert stream.deadline is not None and time.monotonic() >= stream.deadline

    def test_bytes_after_the_deadline_are_not_read(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        peer.send(b"ab")
        complete(stream.read_exactly(2))
        time.sleep(SHORT)
        peer.send(b"c")
        with pytest.raises(DeadlineError):
            complete(stream.read_exactly(1))

    def test_unread_bytes_can_be_read_after_the_deadline(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"abc")
        wait_readable(stream)
        stream.limit(0.01)
        complete(stream.read_exactly(1))
        time.sleep(0.02)
        assert complete(stream.read_exactly(2)) == b"bc"

    def test_deadline_can_be_lifted(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT / 4)
        stream.limit(None)
        reader = Task(complete, stream.read_exactly(1))
        time.sleep(SHORT / 2)
        peer.send(b"x")
        assert reader.result() == b"x"

    def test_limit_of_0_seconds_has_passed(self, pair: Pair) -> None:
        stream, _ = pair
        stream.limit(0)
        with pytest.raises(DeadlineError):
            complete(stream.peek())

    def test_pace_is_for_each_wait(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT / 2)
        stream.pace(2 * SHORT)
        sender = Task(drip, peer, b"abcdefgh", SHORT / 2)
        assert complete(stream.read_exactly(8)) == b"abcdefgh"
        sender.result()
        with pytest.raises(DeadlineError):
            complete(stream.peek())

    def test_deadline_error_is_a_stream_error(self) -> None:
        assert issubclass(DeadlineError, StreamError)


class TestWriting:
    def test_write_to_a_peer_that_does_not_read_ends_at_the_deadline(self, pair: Pair) -> None:
        stream, _ = pair
        stream.limit(SHORT)
        with pytest.raises(DeadlineError):
            stream.write(bytes(32 << 20))

    def test_slow_reader_does_not_extend_the_deadline(self, pair: Pair) -> None:
        stream, peer = pair
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        stop = time.monotonic() + 10 * SHORT

        def sip() -> None:
            while time.monotonic() < stop and peer.recv(65536):
                time.sleep(SHORT / 4)

        reader = Task(sip)
        stream.limit(SHORT)
        try:
            with pytest.raises(DeadlineError):
                stream.write(bytes(32 << 20))
            assert not reader.done
        finally:
            stream.reset()
            with pytest.raises(OSError):
                reader.result()
                raise ConnectionResetError  # it had read to the end

    def test_room_after_the_deadline_is_not_used(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        writing = stream.write_all(bytes(32 << 20))
        need = next(writing)
        time.sleep(SHORT)
        with pytest.raises(DeadlineError):
            need.proceed({stream.socket.fileno(): select.POLLOUT})

    def test_write_to_a_peer_that_has_gone_raises(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        with pytest.raises(StreamError):
            for _ in range(10):
                stream.write(b"x")
                time.sleep(0.01)

    def test_all_written_bytes_arrive(self, pair: Pair) -> None:
        stream, peer = pair
        data = bytes(range(256)) * 8192
        reader = Task(read_to_end, peer)
        stream.write(data)
        stream.shutdown_write()
        assert reader.result() == data

    def test_reply_is_sent_at_once(self, pair: Pair) -> None:
        stream, peer = pair
        stream.reply(b"few bytes")
        assert peer.recv(64) == b"few bytes"

    def test_reply_to_a_peer_that_reads_nothing_raises(self, pair: Pair) -> None:
        stream, _ = pair
        while stream.write_some(bytes(RECEIVE)):
            pass
        with pytest.raises(StreamError):
            stream.reply(b"x")

    def test_shutdown_write_leaves_reading(self, pair: Pair) -> None:
        stream, peer = pair
        stream.shutdown_write()
        assert read_to_end(peer) == b""
        peer.send(b"still here")
        assert complete(stream.read_exactly(10)) == b"still here"
        stream.shutdown_write()  # a second call does no harm


class TestClosing:
    def test_staged_close_lets_the_peer_read_everything(self, pair: Pair) -> None:
        """Hazard 87: the peer is still sending, and nobody reads its request."""
        stream, peer = pair
        peer.sendall(b"request" * 4000)
        wait_readable(stream)
        stream.write(b"refused" * 100)
        closing = Task(complete, stream.close_staged())
        peer.sendall(b"more")
        assert read_to_end(peer) == b"refused" * 100
        peer.close()
        closing.result()
        assert not stream.open

    def test_staged_close_ends_though_the_peer_neither_sends_nor_closes(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "LINGER_SECONDS", SHORT)
        stream, peer = pair
        complete(stream.close_staged())
        assert not stream.open
        assert read_to_end(peer) == b""

    def test_staged_close_reads_a_limited_number_of_bytes(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "LINGER_SECONDS", 10 * SECONDS)
        stream, peer = pair

        def flood() -> None:
            with pytest.raises(OSError):
                while True:
                    peer.sendall(bytes(65536))

        sender = Task(flood)
        Task(complete, stream.close_staged()).result()
        sender.result()

    def test_staged_close_after_a_reset_closes(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        complete(stream.close_staged())
        assert not stream.open

    def test_reset_reaches_the_peer_as_a_reset(self, pair: Pair) -> None:
        stream, peer = pair
        stream.write(b"half of it")
        stream.reset()
        assert is_reset(peer)
        assert not stream.open

    def test_close_reaches_the_peer_as_an_end(self, pair: Pair) -> None:
        stream, peer = pair
        stream.write(b"all of it")
        stream.close()
        assert read_to_end(peer) == b"all of it"

    def test_second_close_does_no_harm(self, pair: Pair) -> None:
        stream, _ = pair
        stream.close()
        stream.close()
        stream.reset()
        stream.shutdown_write()

    def test_calls_on_a_closed_stream_raise_stream_errors(self, pair: Pair) -> None:
        stream, _ = pair
        stream.close()
        for call in (
            lambda: complete(stream.peek()),
            stream.local_address,
            lambda: stream.write(b"x"),
        ):
            with pytest.raises(StreamError):
                call()

    def test_close_makes_the_calls_of_on_close_once(self, pair: Pair) -> None:
        stream, _ = pair
        calls: list[str] = []
        stream.on_close(lambda: calls.append("first"))
        stream.on_close(lambda: calls.append("second"))
        stream.close()
        stream.close()
        assert calls == ["first", "second"]


class TestSocket:
    def test_detach_returns_the_non_blocking_socket_and_the_unread_bytes(self, pair: Pair) -> None:
        stream, peer = pair
        stream.limit(SHORT / 4)
        peer.send(b"request and more")
        wait_readable(stream)
        complete(stream.read_exactly(7))
        sock, unread = stream.detach()
        assert unread == b" and more"
        assert stream.unread() == b""
        assert sock.gettimeout() == 0

    def test_stream_begins_with_the_unread_bytes_it_is_given(self, pair: Pair) -> None:
        sock, _ = pair[0].detach()
        stream = Stream(sock, b"before")
        pair[1].send(b"after")
        assert complete(stream.read_exactly(11)) == b"beforeafter"

    def test_move_to_hands_over_socket_and_unread_bytes(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"ab")
        complete(stream.read_exactly(1))
        with socket.socket() as unused:
            other = Stream(unused)
            stream.move_to(other)
        stream.close()
        peer.send(b"c")
        assert complete(other.read_exactly(2)) == b"bc"
        with pytest.raises(StreamError):
            stream.write(b"x")

    def test_addresses_are_those_of_the_socket(self, pair: Pair) -> None:
        stream, peer = pair
        assert stream.local_address().port == peer.getpeername()[1]
        assert stream.peer_address().port == peer.getsockname()[1]
        assert nothing_comes(peer)
