"""What a stream goes on with while nothing has to be waited for: it begins anew at the same byte, or leaves that to a thread."""

from __future__ import annotations

import select
import socket
import time
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import (
    DeadlineError,
    EndOfStream,
    NeedsThread,
    ProtocolError,
    StreamError,
    Unready,
)
from netproxy.interfaces.connections import Wait
from netproxy.net import stream as stream_module
from netproxy.net.stream import RECEIVE, Stream
from tests.support.sockets import nothing_comes, reset, tcp_pair

DONE = Wait((), 1.0, lambda ready: None)  # what a walk ends with here


class Walk:
    """Reads four bytes and then a line; remembers from which byte it began each time, and what it was told otherwise."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.begun: list[bytes] = []
        self.read: list[tuple[bytes, bytes]] = []
        self.otherwise_at: list[bytes] = []
        self.raises: Exception | None = None

    def go_on(self) -> Wait | None:
        self.begun.append(self.stream.unread())
        head, line = self.stream.read_exactly(4), self.stream.read_until(b"\n", 100)
        if self.raises:
            raise self.raises
        self.read.append((head, line))
        return DONE

    def otherwise(self) -> None:
        self.otherwise_at.append(self.stream.unread())

    def attempt(self) -> Wait | None:
        return self.stream.attempt(self.go_on, self.otherwise)


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    with tcp_pair() as (ours, theirs):
        ours.setblocking(False)
        theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Stream(ours), theirs


Pair = tuple[Stream, socket.socket]


def say(pair: Pair, pause: Wait | None, data: bytes) -> Wait | None:
    """The next pause, once the client has sent `data`."""
    assert pause is not None and pause.step is not None
    ((sock, events),) = pause.watched
    assert sock is pair[0].socket and events == select.POLLIN and not pause.idle
    pair[1].sendall(data)
    return stepped(pause)


def stepped(pause: Wait) -> Wait | None:
    ((sock, events),) = pause.watched
    poll = select.poll()
    poll.register(sock, events)
    ((descriptor, found),) = poll.poll(5000)
    return pause.step(descriptor, found)  # type: ignore[misc]


def thread_of(pause: Wait | None) -> Callable[[], Any]:
    """A pause of nothing: a thread goes on with it at once."""
    assert pause is not None and not pause.watched and pause.step is None
    return lambda: pause.resume(True)


def test_nothing_is_begun_before_a_byte_has_come(pair: Pair) -> None:
    walk = Walk(pair[0])
    pause = walk.attempt()
    assert not walk.begun
    assert say(pair, pause, b"headline\n") is DONE
    assert walk.read == [(b"head", b"line\n")] and walk.begun == [b"headline\n"]


def test_it_begins_anew_at_the_same_byte_each_time_that_more_has_come(pair: Pair) -> None:
    walk = Walk(pair[0])
    pause = walk.attempt()
    for at in range(8):
        pause = say(pair, pause, b"headline\n"[at : at + 1])
    assert say(pair, pause, b"\n") is DONE
    assert walk.begun == [b"headline\n"[:end] for end in range(1, 10)]
    assert walk.read == [(b"head", b"line\n")] and not walk.otherwise_at


def test_what_comes_behind_stays_unread(pair: Pair) -> None:
    walk = Walk(pair[0])
    assert say(pair, walk.attempt(), b"headline\nmore") is DONE
    assert pair[0].unread() == b"more"


def test_what_is_unread_already_is_not_waited_for(pair: Pair) -> None:
    stream = Stream(pair[0].socket, b"headline\n")
    walk = Walk(stream)
    assert walk.attempt() is DONE and walk.read == [(b"head", b"line\n")]


@pytest.mark.parametrize(
    "error",
    [NeedsThread(), ProtocolError("bad"), EndOfStream("closed", True), StreamError("gone")],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_leaves_it_to_a_thread_with_the_bytes_as_they_were(
    pair: Pair, error: Exception
) -> None:
    walk = Walk(pair[0])
    walk.raises = error
    thread = thread_of(say(pair, walk.attempt(), b"headline\nmore"))
    assert not walk.otherwise_at
    thread()
    assert walk.otherwise_at == [b"headline\nmore"] and len(walk.begun) == 1


def test_on_that_thread_it_may_wait_again(pair: Pair) -> None:
    stream, peer = pair
    walk = Walk(stream)
    walk.raises = NeedsThread()
    thread_of(say(pair, walk.attempt(), b"headline\n"))
    stream.limit(0.1)
    with pytest.raises(DeadlineError):
        stream.read_exactly(100)


def test_what_is_no_error_of_ours_is_raised_and_the_haste_is_over(pair: Pair) -> None:
    stream, _ = pair
    walk = Walk(stream)
    walk.raises = KeyError("broken")
    with pytest.raises(KeyError):
        say(pair, walk.attempt(), b"headline\n")
    stream.limit(0.05)
    with pytest.raises(DeadlineError):
        stream.read_exactly(1)


@pytest.mark.parametrize("said", [b"", b"he"])
def test_the_end_of_the_stream_is_a_threads_to_tell(pair: Pair, said: bytes) -> None:
    walk = Walk(pair[0])
    pause = walk.attempt()
    if said:
        pause = say(pair, pause, said)
    pair[1].shutdown(socket.SHUT_WR)
    assert pause is not None
    thread_of(stepped(pause))()
    assert walk.otherwise_at == [said]


def test_a_reset_is_raised(pair: Pair) -> None:
    pause = Walk(pair[0]).attempt()
    reset(pair[1])
    assert pause is not None
    with pytest.raises(StreamError):
        stepped(pause)


def test_an_event_without_a_byte_changes_nothing(pair: Pair) -> None:
    """It may have been about the descriptor's last owner."""
    walk = Walk(pair[0])
    pause = walk.attempt()
    assert pause is not None and pause.step is not None
    again = pause.step(pair[0].socket.fileno(), select.POLLIN)
    assert say(pair, again, b"headline\n") is DONE and walk.begun == [b"headline\n"]


def test_the_time_is_up_for_whoever_drips(pair: Pair) -> None:
    """The deadline is absolute: each pause has what is left of it."""
    stream, _ = pair
    stream.limit(10.0)
    walk = Walk(stream)
    pause = walk.attempt()
    left = [pause.seconds]
    for byte in (b"h", b"e", b"a"):
        time.sleep(0.01)
        pause = say(pair, pause, byte)
        left.append(pause.seconds)
    assert left[0] <= 10.0 and all(
        later <= earlier - 0.01 for earlier, later in zip(left, left[1:])
    )
    pause.resume(False)
    assert walk.otherwise_at == [b"hea"]


def test_a_byte_after_the_deadline_does_not_begin_it_again(pair: Pair) -> None:
    stream, _ = pair
    stream.limit(0.02)
    walk = Walk(stream)
    pause = say(pair, walk.attempt(), b"he")
    time.sleep(0.03)
    thread_of(say(pair, pause, b"a"))()
    assert walk.otherwise_at == [b"hea"]
    with pytest.raises(DeadlineError):
        stream.read_exactly(4)


@pytest.mark.parametrize("said", [b"he", b"headline\n"])
def test_where_no_thread_can_be_had_nothing_is_gone_on_with(pair: Pair, said: bytes) -> None:
    """It is closed then, and what it has read would still lead somewhere: a name to look up, a target to dial."""
    walk = Walk(pair[0])
    walk.raises = NeedsThread()
    pause = say(pair, walk.attempt(), said)
    pair[0].close()
    assert pause is not None
    with pytest.raises(StreamError):
        pause.resume(False)
    assert not walk.otherwise_at


def test_without_a_deadline_it_waits_for_ever(pair: Pair) -> None:
    pause = Walk(pair[0]).attempt()
    assert pause is not None and pause.seconds is None


def test_one_within_another_begins_where_the_first_has_come_to(pair: Pair) -> None:
    stream, peer = pair
    inner = Walk(stream)
    outer: list[bytes] = []

    def go_on() -> Wait | None:
        outer.append(stream.read_exactly(2))
        stream.write(b"ok")
        return inner.attempt()

    pause = stream.attempt(go_on, lambda: None)
    pause = say(pair, pause, b"5")
    pause = say(pair, pause, b"1he")
    assert peer.recv(10) == b"ok"
    pause = say(pair, pause, b"adli")
    assert say(pair, pause, b"ne\nmore") is DONE
    assert outer == [b"51"] and inner.read == [(b"head", b"line\n")] and stream.unread() == b"more"
    assert nothing_comes(peer)


def test_bytes_that_come_in_ever_more_pieces_are_a_threads_to_read(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beginning anew costs whoever waits for everybody; a thread reads each byte once."""
    monkeypatch.setattr(stream_module, "AGAIN_LIMIT", 10)
    walk = Walk(pair[0])
    pause = walk.attempt()
    for at in range(4):  # 1 + 2 + 3 + 4 bytes in vain
        pause = say(pair, pause, b"headline"[at : at + 1])
    thread_of(say(pair, pause, b"l"))()
    assert walk.otherwise_at == [b"headl"] and len(walk.begun) == 5


def test_a_writer_in_haste_does_not_wait(pair: Pair) -> None:
    stream, _ = pair
    while stream.write_some(bytes(RECEIVE)):
        pass
    started = time.monotonic()
    with pytest.raises(StreamError):
        stream.hastily(lambda: stream.write(b"x"))  # type: ignore[arg-type, return-value]
    with pytest.raises(Unready):
        stream.hastily(lambda: stream.read_exactly(1))  # type: ignore[arg-type, return-value]
    assert time.monotonic() - started < 1.0
