"""Streams over real TCP connections: deadlines, reading ahead, and the ways to close."""

from __future__ import annotations

import select
import socket
import time
from typing import Iterator

import pytest

from netproxy.errors import DeadlineError, EndOfStream, LimitError, StreamError
from netproxy.net import stream as stream_module
from netproxy.net.stream import RECEIVE, Stream
from tests.support.sockets import Task, is_reset, nothing_comes, read_to_end, reset, tcp_pair

SHORT = 0.2  # seconds of a deadline that is meant to pass


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    with tcp_pair() as (ours, theirs):
        yield Stream(ours), theirs


def wait_readable(stream: Stream) -> None:
    """Until what the peer has sent is there."""
    poll = select.poll()
    poll.register(stream.socket, select.POLLIN)
    assert poll.poll(5000)


def drip(peer: socket.socket, data: bytes, pause: float) -> None:
    """A byte at a time, until the other side is gone."""
    try:
        for byte in data:
            peer.send(bytes((byte,)))
            time.sleep(pause)
    except OSError:
        pass


class TestReading:
    def test_exactly_so_many_bytes_across_many_arrivals(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        sender = Task(drip, peer, b"abcdef", 0.005)
        assert stream.read_exactly(5) == b"abcde"
        assert stream.read_exactly(1) == b"f"
        sender.result()

    def test_none_is_no_wait(self, pair: tuple[Stream, socket.socket]) -> None:
        assert pair[0].read_exactly(0) == b""

    def test_the_end_too_early(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        peer.send(b"abc")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            stream.read_exactly(4)
        assert caught.value.partial
        assert stream.read_exactly(3) == b"abc"
        with pytest.raises(EndOfStream) as caught:
            stream.read_exactly(1)
        assert not caught.value.partial

    def test_until_a_separator_that_comes_in_two_parts(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        peer.send(b"line one\r")
        wait_readable(stream)
        reader = Task(stream.read_until, b"\r\n", 100)
        peer.send(b"\nline two")
        assert reader.result() == b"line one\r\n"
        assert stream.unread() == b"line two" or stream.read_exactly(8) == b"line two"

    def test_until_byte_by_byte(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        sender = Task(drip, peer, b"a\r\r\n\r\nrest", 0.002)
        assert stream.read_until(b"\r\n\r\n", 64) == b"a\r\r\n\r\n"
        sender.result()

    @pytest.mark.parametrize("limit", [5, 6, 7])
    def test_a_separator_beyond_the_limit_is_refused(
        self, pair: tuple[Stream, socket.socket], limit: int
    ) -> None:
        stream, peer = pair
        peer.send(b"abcdef\r\n")
        with pytest.raises(LimitError):
            stream.read_until(b"\r\n", limit)

    def test_a_separator_just_within_the_limit_is_taken(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        peer.send(b"abcdef\r\n")
        assert stream.read_until(b"\r\n", 8) == b"abcdef\r\n"

    def test_the_limit_holds_without_waiting_for_more(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        peer.send(b"x" * 100)
        with pytest.raises(LimitError):
            stream.read_until(b"\n", 100)

    def test_the_end_within_a_line(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        peer.send(b"half a line")
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            stream.read_until(b"\n", 100)
        assert caught.value.partial

    def test_peek_leaves_the_byte(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        peer.send(b"\x05\x01")
        assert stream.peek() == 5
        assert stream.peek() == 5
        assert stream.read_exactly(2) == b"\x05\x01"

    def test_peek_at_the_end(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        peer.close()
        with pytest.raises(EndOfStream) as caught:
            stream.peek()
        assert not caught.value.partial

    def test_some_gives_what_is_there(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        peer.send(b"abcdef")
        wait_readable(stream)
        assert stream.read_some(4) == b"abcd"
        assert stream.read_some(4) == b"ef"
        peer.close()
        assert stream.read_some(4) == b""

    def test_some_asks_for_as_much_as_it_may_give(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        sender = Task(peer.sendall, bytes(3 * RECEIVE))
        got = 0
        while got < 3 * RECEIVE:
            piece = stream.read_some(2 * RECEIVE)
            assert 0 < len(piece) <= 2 * RECEIVE
            got += len(piece)
        sender.result()

    def test_skipping_drops_what_is_there_and_waits_for_nothing(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        assert stream.skip()
        peer.send(b"abc")
        wait_readable(stream)
        stream.peek()
        assert stream.skip()
        peer.send(b"d")
        assert stream.read_exactly(1) == b"d"
        peer.shutdown(socket.SHUT_WR)
        wait_readable(stream)
        assert not stream.skip()

    def test_skipping_what_was_reset_is_an_end(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        reset(peer)
        wait_readable(stream)
        assert not stream.skip()

    def test_a_reset_is_an_error_not_an_end(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        reset(peer)
        with pytest.raises(StreamError):
            stream.read_exactly(1)


class TestDeadline:
    def test_is_for_the_whole_and_not_for_each_byte(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        started = time.monotonic()
        sender = Task(drip, peer, bytes(100), SHORT / 8)
        with pytest.raises(DeadlineError):
            stream.read_exactly(100)
        assert SHORT * 0.9 <= time.monotonic() - started < SHORT * 3
        stream.close()
        sender.result()

    def test_is_for_all_calls_together(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        sender = Task(drip, peer, bytes(100), SHORT / 8)
        with pytest.raises(DeadlineError):
            for _ in range(100):
                stream.read_until(b"\0", 10)
        stream.close()
        sender.result()

    def test_holds_for_a_silent_peer(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, _ = pair
        stream.limit(SHORT)
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            stream.peek()
        assert time.monotonic() - started >= SHORT * 0.9

    def test_that_has_passed_fails_the_next_read(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.limit(SHORT)
        peer.send(b"ab")
        stream.read_exactly(2)
        time.sleep(SHORT)
        peer.send(b"c")
        with pytest.raises(DeadlineError):
            stream.read_exactly(1)

    def test_does_not_hold_back_what_was_read_ahead(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        peer.send(b"abc")
        wait_readable(stream)
        stream.limit(0.01)
        stream.read_exactly(1)
        time.sleep(0.02)
        assert stream.read_exactly(2) == b"bc"

    def test_can_be_lifted(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.limit(SHORT / 4)
        stream.limit(None)
        reader = Task(stream.read_exactly, 1)
        time.sleep(SHORT / 2)
        peer.send(b"x")
        assert reader.result() == b"x"

    def test_none_left_is_not_for_ever(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, _ = pair
        stream.limit(0)
        with pytest.raises(DeadlineError):
            stream.peek()

    def test_a_pace_is_for_each_read(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.limit(SHORT / 2)
        stream.pace(SHORT)
        sender = Task(drip, peer, b"abcdefgh", SHORT / 4)
        assert stream.read_exactly(8) == b"abcdefgh"
        sender.result()
        with pytest.raises(DeadlineError):
            stream.peek()

    def test_is_an_error_of_the_stream(self) -> None:
        assert issubclass(DeadlineError, StreamError)


class TestWriting:
    def test_a_peer_that_does_not_read(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, _ = pair
        stream.limit(SHORT)
        with pytest.raises(DeadlineError):
            stream.write(bytes(32 << 20))

    def test_a_peer_that_reads_a_little_now_and_then_does_not_gain_time(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        stop = time.monotonic() + 10 * SHORT

        def sip() -> None:
            while time.monotonic() < stop and peer.recv(65536):
                time.sleep(SHORT / 4)

        reader = Task(sip)
        stream.limit(SHORT)
        started = time.monotonic()
        try:
            with pytest.raises(DeadlineError):
                stream.write(bytes(32 << 20))
            assert time.monotonic() - started < 4 * SHORT
        finally:
            stream.reset()
            with pytest.raises(OSError):
                reader.result()
                raise ConnectionResetError  # it had read to the end

    def test_a_peer_that_has_gone(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        reset(peer)
        with pytest.raises(StreamError):
            for _ in range(10):
                stream.write(b"x")
                time.sleep(0.01)

    def test_all_arrives(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        data = bytes(range(256)) * 8192
        reader = Task(read_to_end, peer)
        stream.write(data)
        stream.shutdown_write()
        assert reader.result() == data

    def test_shutdown_leaves_reading(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.shutdown_write()
        assert read_to_end(peer) == b""
        peer.send(b"still here")
        assert stream.read_exactly(10) == b"still here"
        stream.shutdown_write()  # and again does no harm


class TestClosing:
    def test_in_stages_lets_the_peer_read_all_though_it_still_sends(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        """HAZARDS 87."""
        stream, peer = pair
        peer.sendall(b"request" * 4000)  # never read by the handler
        wait_readable(stream)
        stream.write(b"refused" * 100)
        closing = Task(stream.close_staged)
        peer.sendall(b"more")
        assert read_to_end(peer) == b"refused" * 100
        peer.close()
        closing.result()
        assert not stream.open

    def test_in_stages_waits_no_longer_than_it_has_to(
        self, pair: tuple[Stream, socket.socket], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_module, "LINGER_SECONDS", SHORT)
        stream, peer = pair
        started = time.monotonic()
        stream.close_staged()  # the peer neither sends nor closes
        assert SHORT * 0.9 <= time.monotonic() - started < 10 * SHORT
        assert read_to_end(peer) == b""

    def test_in_stages_reads_no_more_than_it_has_to(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        started = time.monotonic()

        def flood() -> None:
            with pytest.raises(OSError):
                while True:
                    peer.sendall(bytes(65536))

        sender = Task(flood)
        stream.close_staged()
        assert time.monotonic() - started < stream_module.LINGER_SECONDS
        sender.result()

    def test_in_stages_after_a_reset(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        reset(peer)
        stream.close_staged()
        assert not stream.open

    def test_reset_is_seen_as_a_reset(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.write(b"half of it")
        stream.reset()
        assert is_reset(peer)
        assert not stream.open

    def test_close_is_seen_as_an_end(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, peer = pair
        stream.write(b"all of it")
        stream.close()
        assert read_to_end(peer) == b"all of it"

    def test_twice_does_no_harm(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, _ = pair
        stream.close()
        stream.close()
        stream.reset()
        stream.shutdown_write()

    def test_a_closed_stream_fails_as_a_stream(self, pair: tuple[Stream, socket.socket]) -> None:
        stream, _ = pair
        stream.close()
        for call in (stream.peek, stream.local_address, lambda: stream.write(b"x")):
            with pytest.raises(StreamError):
                call()


class TestDetach:
    def test_gives_the_socket_that_does_not_block_any_more_and_what_was_read_ahead(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        stream, peer = pair
        stream.limit(SHORT / 4)
        peer.send(b"request and more")
        wait_readable(stream)
        stream.read_exactly(7)
        sock, unread = stream.detach()
        assert unread == b" and more"
        assert stream.unread() == b""
        assert sock.gettimeout() == 0

    def test_a_stream_can_be_made_with_unread_bytes(
        self, pair: tuple[Stream, socket.socket]
    ) -> None:
        sock, _ = pair[0].detach()
        stream = Stream(sock, b"before")
        pair[1].send(b"after")
        assert stream.read_exactly(11) == b"beforeafter"


def test_addresses_are_of_this_and_the_other_end(pair: tuple[Stream, socket.socket]) -> None:
    stream, peer = pair
    assert stream.local_address().port == peer.getpeername()[1]
    assert nothing_comes(peer)
