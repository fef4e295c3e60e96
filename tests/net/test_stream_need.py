"""A Stream as the need for more bytes, and complete(), which satisfies needs on one thread."""

from __future__ import annotations

import select
import socket
import time
from typing import Any, Iterator

import pytest

from netproxy.errors import (
    DeadlineError,
    EndOfStream,
    LimitError,
    NetProxyError,
    ProtocolError,
    StreamError,
)
from netproxy.interfaces.connections import (
    READABLE,
    Blocking,
    Events,
    Need,
    Progress,
    Ready,
    Steps,
    Watched,
)
from netproxy.net.stream import RECEIVE, ExactReader, Stream, complete, poll_watched, satisfy
from tests.support.sockets import Task, nothing_comes, reset, tcp_pair

Pair = tuple[Stream, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Stream(ours), theirs


def read_head_and_line(reader: Any) -> Steps[tuple[bytes, bytes]]:
    head = yield from reader.read_exactly(4)
    line = yield from reader.read_until(b"\n", 100)
    return head, line


def send(pair: Pair, data: bytes) -> Ready:
    """Send bytes of the peer, and return the event of the stream's need."""
    pair[1].sendall(data)
    return event(pair[0])


def event(need: Need) -> Ready:
    watched, _ = need.watched()
    ready = poll_watched(watched, 5)
    assert ready
    return ready


class TestStreamAsNeed:
    def test_reading_yields_the_stream_until_the_bytes_have_come(self, pair: Pair) -> None:
        stream, _ = pair
        steps = read_head_and_line(stream)
        assert next(steps) is stream
        for byte in b"headline":
            result = stream.proceed(send(pair, bytes((byte,))))
            assert result is True
            assert steps.send(result) is stream
        result = stream.proceed(send(pair, b"\nmore"))
        with pytest.raises(StopIteration) as stop:
            steps.send(result)
        assert stop.value.value == (b"head", b"line\n")
        assert stream.unread() == b"more"

    def test_unread_bytes_are_read_without_a_need(self, pair: Pair) -> None:
        stream = Stream(pair[0].socket, b"headline\n")
        with pytest.raises(StopIteration) as stop:
            next(read_head_and_line(stream))
        assert stop.value.value == (b"head", b"line\n")

    def test_light_stream_is_always_pending_at_first(self, pair: Pair) -> None:
        stream, peer = pair
        assert stream.light
        peer.send(b"x")
        event(stream)
        assert stream.begin() is Progress.PENDING and stream.unread() == b""

    def test_stream_that_is_not_light_receives_at_once(self, pair: Pair) -> None:
        """What TLS has decrypted already is announced by no event."""
        stream, peer = pair
        stream.light = False
        assert stream.begin() is Progress.PENDING
        peer.send(b"x")
        event(stream)
        assert stream.begin() is True and stream.unread() == b"x"

    def test_stream_that_is_not_light_checks_its_deadline_first(self, pair: Pair) -> None:
        stream, _ = pair
        stream.light = False
        send(pair, b"x")
        stream.limit(0)
        with pytest.raises(DeadlineError):
            stream.begin()

    def test_end_of_stream_is_the_result_false(self, pair: Pair) -> None:
        stream, peer = pair
        peer.shutdown(socket.SHUT_WR)
        assert stream.proceed(event(stream)) is False

    def test_reset_raises(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        with pytest.raises(StreamError):
            stream.proceed(event(stream))

    def test_event_without_a_byte_changes_nothing(self, pair: Pair) -> None:
        """It may have been about the last owner of the descriptor."""
        stream, _ = pair
        assert stream.proceed({stream.socket.fileno(): select.POLLIN}) is Progress.PENDING

    def test_watched_seconds_are_what_is_left_until_the_deadline(self, pair: Pair) -> None:
        stream, _ = pair
        assert stream.watched() == (((stream.socket, select.POLLIN),), None)
        stream.limit(10.0)
        _, first = stream.watched()
        time.sleep(0.01)
        _, second = stream.watched()
        assert first is not None and second is not None
        assert second <= first - 0.01 <= 10.0
        stream.limit(0)
        assert stream.watched()[1] == 0.0

    def test_watched_seconds_of_a_pace_are_always_the_same(self, pair: Pair) -> None:
        stream, _ = pair
        stream.limit(1.0)
        stream.pace(5.0)
        assert (stream.watched()[1], stream.deadline) == (5.0, None)

    def test_no_event_is_a_deadline_error(self, pair: Pair) -> None:
        with pytest.raises(DeadlineError):
            pair[0].proceed({})

    def test_byte_after_the_deadline_is_not_received(self, pair: Pair) -> None:
        """A client that sends byte by byte does not go on for ever."""
        stream, _ = pair
        stream.limit(0.01)
        ready = send(pair, b"x")
        time.sleep(0.02)
        with pytest.raises(DeadlineError):
            stream.proceed(ready)
        assert stream.unread() == b""

    @pytest.mark.parametrize("size", [1, RECEIVE - 1, RECEIVE])
    def test_each_byte_is_received_once(self, pair: Pair, size: int) -> None:
        stream, peer = pair
        data = bytes(range(256)) * (RECEIVE // 256)
        sender = Task(peer.sendall, data[:size])
        assert complete(stream.read_exactly(size)) == data[:size]
        sender.result()
        assert stream.unread() == b""


class TestComplete:
    def test_steps_that_need_nothing_return_at_once(self) -> None:
        def steps() -> Steps[int]:
            yield from ()
            return 5

        assert complete(steps()) == 5

    def test_result_of_a_blocking_call_is_sent_back(self) -> None:
        def steps() -> Steps[int]:
            first: int = yield Blocking(lambda: 5)
            second: int = yield Blocking(lambda: first + 1)
            return second

        assert complete(steps()) == 6

    def test_error_of_a_need_is_thrown_into_the_steps(self) -> None:
        def fail() -> None:
            raise ProtocolError("bad")

        def steps() -> Steps[str]:
            try:
                yield Blocking(fail)
            except ProtocolError as error:
                return str(error)
            return "not reached"

        assert complete(steps()) == "bad"

    def test_steps_may_need_more_after_an_error(self) -> None:
        def fail() -> None:
            raise ProtocolError("bad")

        def steps() -> Steps[int]:
            try:
                yield Blocking(fail)
            except ProtocolError:
                pass
            number: int = yield Blocking(lambda: 7)
            return number

        assert complete(steps()) == 7

    @pytest.mark.parametrize("error", [ProtocolError("bad"), KeyError("broken")], ids=repr)
    def test_error_that_the_steps_do_not_handle_is_raised(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        def steps() -> Steps[None]:
            yield Blocking(fail)

        with pytest.raises(type(error)):
            complete(steps())

    def test_fault_of_a_need_is_not_thrown_into_the_steps(self) -> None:
        """Only NetProxyErrors are; a handshake must not take a fault of ours for its client's."""
        caught: list[Exception] = []

        def fail() -> None:
            raise KeyError("broken")

        def steps() -> Steps[None]:
            try:
                yield Blocking(fail)
            except Exception as error:
                caught.append(error)

        with pytest.raises(KeyError):
            complete(steps())
        assert not caught

    def test_bytes_are_waited_for(self, pair: Pair) -> None:
        stream, peer = pair
        reading = Task(complete, read_head_and_line(stream))
        assert not reading.done
        for byte in b"headline\nmore":
            peer.send(bytes((byte,)))
        assert reading.result() == (b"head", b"line\n")

    def test_events_are_returned(self, pair: Pair) -> None:
        stream, peer = pair
        need = Events(((stream.socket, READABLE),), 5.0)
        peer.send(b"x")
        ready = satisfy(need)
        assert ready[stream.socket.fileno()] & select.POLLIN

    def test_events_that_do_not_come_in_time_are_an_empty_result(self, pair: Pair) -> None:
        assert satisfy(Events(((pair[0].socket, READABLE),), 0.01)) == {}

    def test_need_that_stays_pending_is_asked_again(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"x")
        need = Reluctant(stream.socket)
        assert satisfy(need) == "at last"
        assert need.asked == 4

    @pytest.mark.parametrize("light", [False, True])
    def test_need_that_asks_for_a_thread_is_blocked_for(self, light: bool) -> None:
        need = Blocking(lambda: "blocked")
        assert (need.begin(), need.proceed({})) == (Progress.NEEDS_THREAD,) * 2
        assert satisfy(need) == "blocked"

    def test_closed_socket_is_a_stream_error(self, pair: Pair) -> None:
        stream, _ = pair
        stream.close()
        with pytest.raises(StreamError):
            complete(stream.peek())


class Reluctant:
    """A need that stays pending for three events."""

    light = True

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.asked = 0

    def begin(self) -> Progress:
        return Progress.PENDING

    def watched(self) -> tuple[Watched, float | None]:
        return ((self._socket, select.POLLIN),), None

    def proceed(self, ready: Ready) -> Any:
        self.asked += 1
        return "at last" if self.asked == 4 else Progress.PENDING

    def block(self) -> Any:
        raise AssertionError


class TestExactReader:
    def test_no_byte_behind_the_read_ones_is_received(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"headline\nmore")
        assert complete(read_head_and_line(ExactReader(stream))) == (b"head", b"line\n")
        assert stream.unread() == b"" and stream.socket.recv(64) == b"more"

    def test_bytes_that_come_one_by_one_are_joined(self, pair: Pair) -> None:
        stream, peer = pair
        reading = Task(complete, read_head_and_line(ExactReader(stream)))
        for byte in b"headline\n":
            peer.send(bytes((byte,)))
        assert reading.result() == (b"head", b"line\n")

    def test_bytes_that_are_there_need_no_event(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"headline\n")
        event(stream)
        steps = read_head_and_line(ExactReader(stream))
        need = next(steps)
        with pytest.raises(StopIteration):
            while True:
                assert need.begin() is True
                need = steps.send(True)

    @pytest.mark.parametrize(
        ("sent", "partial"), [(b"", False), (b"he", True)], ids=["nothing", "half a head"]
    )
    def test_early_end_of_stream_raises(self, pair: Pair, sent: bytes, partial: bool) -> None:
        stream, peer = pair
        peer.send(sent)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(EndOfStream) as caught:
            complete(ExactReader(stream).read_exactly(4))
        assert caught.value.partial is partial

    def test_line_over_the_limit_is_refused(self, pair: Pair) -> None:
        stream, peer = pair
        peer.send(b"x" * 100)
        with pytest.raises(LimitError):
            complete(ExactReader(stream).read_until(b"\n", 10))
        assert len(stream.socket.recv(200)) == 90

    @pytest.mark.parametrize("sent", [b"", b"x"], ids=["silent", "with a byte"])
    def test_deadline_of_the_stream_holds(self, pair: Pair, sent: bytes) -> None:
        stream, peer = pair
        peer.send(sent)
        stream.limit(0)
        with pytest.raises(DeadlineError):
            complete(ExactReader(stream).read_exactly(1))

    def test_reset_raises(self, pair: Pair) -> None:
        stream, peer = pair
        reset(peer)
        event(stream)
        with pytest.raises(NetProxyError):
            complete(ExactReader(stream).read_exactly(1))


def test_peer_hears_nothing_of_reading(pair: Pair) -> None:
    stream, peer = pair
    peer.send(b"headline\n")
    complete(read_head_and_line(stream))
    assert nothing_comes(peer)
