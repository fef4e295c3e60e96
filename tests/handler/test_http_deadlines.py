"""Clients and origins that are slow on purpose: each is let go in time, and told so where it can be told."""

from __future__ import annotations

import threading
import time
from typing import Callable

import pytest

from tests.support.origin import (
    OK,
    PATIENCE,
    OriginConnection,
    Rig,
    Wire,
    answers,
    check_refused,
    get,
)

SHORT = 0.3  # seconds, in place of the real ones
TIMEOUT = b"408 Request Timeout"
POST = b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\n"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http.HEAD_SECONDS", "http.KEEPALIVE_SECONDS", "http_exchange.BODY_SECONDS"):
        monkeypatch.setattr("netproxy.handler." + name, SHORT)
    monkeypatch.setattr("netproxy.net.stream.LINGER_SECONDS", SHORT)


def drip(client: Wire, piece: bytes) -> Callable[[], None]:
    """Sends `piece` every 20 ms until called; what the other end does not want is dropped."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(0.02):
            try:
                client.socket.sendall(piece)
            except OSError:
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return lambda: (done.set(), thread.join(PATIENCE))


def test_a_head_that_drips_is_refused_by_the_deadline() -> None:
    """Hazard 69."""
    with Rig(handshake=SHORT) as rig:
        client = rig.client(b"GET http://a.test/ HTTP/1.1\r\n")
        stop = drip(client, b"X: y\r\n")
        started = time.monotonic()
        answer = client.answer()
        assert (
            answer.start == b"HTTP/1.1 " + TIMEOUT
            and SHORT / 2 < time.monotonic() - started < 10 * SHORT
        )
        assert client.rest() == b""
        stop()
    assert rig.dialled == []


@pytest.mark.parametrize(
    "raw",
    [b"G", b"GET http://a.test/ HTTP/1.1\r\nHost: a.te", get(b"a.test")[:-2], get(b"a.test")[:-1]],
)
def test_a_head_that_stops_is_refused_by_the_deadline(raw: bytes) -> None:
    """Hazard 69."""
    with Rig(handshake=SHORT) as rig:
        check_refused(rig.client(raw), TIMEOUT)
    assert rig.dialled == []


def test_the_head_of_a_later_request_has_a_deadline_of_its_own() -> None:
    """Hazard 69."""
    with Rig() as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(b"GET http://a.test/ HTTP/1.1\r\n")
        stop = drip(client, b"X: y\r\n")
        assert client.answer().start == b"HTTP/1.1 " + TIMEOUT
        stop()
    assert len(rig.origin.requests()) == 1


def test_a_kept_connection_ends_when_nothing_comes_and_takes_its_upstream_along() -> None:
    """Hazard 69."""
    ended = threading.Event()

    def play(connection: OriginConnection) -> None:
        answers(OK)(connection)
        ended.set()

    with Rig(play) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.rest()
        assert client.end == "closed" and ended.wait(PATIENCE)


BODIES = {
    "length": POST + b"Content-Length: 1000\r\n\r\n",
    "chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n",
    "within a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nfff\r\na",
}


@pytest.mark.parametrize("raw", BODIES.values(), ids=BODIES)
def test_a_body_that_stops_is_given_up_by_the_deadline(raw: bytes) -> None:
    """Hazard 69.  However long an origin may be silent: it is not its turn."""
    with Rig(idle=100 * PATIENCE) as rig:
        check_refused(rig.client(raw), TIMEOUT)
        rig.join()
    assert [request.whole for request in rig.origin.requests()] == [False]


@pytest.mark.parametrize(
    "raw,piece",
    [(BODIES["length"], b"x"), (BODIES["chunk size"], b"1\r\nx\r\n"), (BODIES["chunk size"], b"0")],
    ids=["length", "chunks", "within a chunk size"],
)
def test_a_body_that_drips_is_given_up_by_the_deadline(raw: bytes, piece: bytes) -> None:
    """Hazard 69."""
    with Rig(idle=100 * PATIENCE) as rig:
        client = rig.client(raw)
        stop = drip(client, piece)
        answer = client.answer()
        stop()
        assert answer.start == b"HTTP/1.1 " + TIMEOUT
    assert [request.whole for request in rig.origin.requests()] == [False]


def test_a_long_body_that_goes_on_is_not_given_up() -> None:
    """Hazard 69.  The time is for each step of it, not for the whole."""
    with Rig() as rig:
        client = rig.client(POST + b"Content-Length: 20480\r\n\r\n")
        for _ in range(20):
            client.send(b"x" * 1024)
            threading.Event().wait(SHORT / 10)
        assert client.answer().body == b"ok"
    assert rig.origin.requests()[0].whole


def test_a_client_that_does_not_read_its_answer_is_given_up() -> None:
    """Hazard 69."""
    ended = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n", *[b"x" * 1_000_000] * 100
        )
        ended.set()

    with Rig(play) as rig:
        client = rig.client(get(b"a.test"))
        assert ended.wait(PATIENCE)
        rig.join()
        assert client.rest() and client.end == "reset"


def test_a_refused_client_that_stays_and_sends_on_is_let_go() -> None:
    """Hazard 69."""
    with Rig() as rig:
        client = rig.client(b"nonsense\r\n\r\n")
        stop = drip(client, b"x" * 100)
        assert client.answer().status == 400
        rig.join(SHORT * 10)
        stop()


def test_a_client_that_was_answered_early_and_stays_is_let_go() -> None:
    """Hazard 69.  Its body was not wanted, it neither sends it nor leaves."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(OK)

    with Rig(play) as rig:
        client = rig.client(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert client.answer().body == b"ok"
        rig.join(SHORT * 10)


def test_a_good_client_is_served_while_others_drip() -> None:
    """Hazard 69."""
    with Rig(handshake=SHORT * 5) as rig:
        slow = [rig.client(b"GET http://a.test/ HTTP/1.1\r\nHost") for _ in range(50)]
        started = time.monotonic()
        assert rig.client(get(b"a.test")).answer().body == b"ok"
        assert time.monotonic() - started < 1
        for client in slow:
            assert client.answer().start == b"HTTP/1.1 " + TIMEOUT


@pytest.mark.parametrize(
    "raw", [get(b"a.test"), POST + b"Content-Length: 5\r\n\r\nhello"], ids=["GET", "POST"]
)
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-"])
def test_an_origin_that_is_silent_is_a_gateway_timeout(raw: bytes, answer: bytes) -> None:
    over = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(answer)
        assert over.wait(PATIENCE)

    with Rig(play, idle=SHORT) as rig:
        client = rig.client(raw)
        try:
            check_refused(client, b"504 Gateway Timeout")
        finally:
            over.set()
    assert len(rig.dialled) == 1


def test_an_origin_that_falls_silent_in_its_answer_is_cut() -> None:
    over = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(OK[:-1])
        assert over.wait(PATIENCE)

    with Rig(play, idle=SHORT) as rig:
        client = rig.client(get(b"a.test"))
        answer = client.answer()
        over.set()
        assert (answer.whole, answer.body, client.end) == (False, b"o", "reset")


def test_a_silent_origin_is_not_asked_twice_over_a_kept_upstream() -> None:
    over = threading.Event()

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(OK)
        connection.request()
        assert over.wait(PATIENCE)

    with Rig(play, idle=SHORT) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(b"a.test"))
        try:
            check_refused(client, b"504 Gateway Timeout")
        finally:
            over.set()
    assert len(rig.dialled) == 1
