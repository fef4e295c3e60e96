"""Bodies on their way up, and answers that come before their end: Expect, early refusals, origins that answer as they read."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net import tls
from netproxy.net.connect import connect
from netproxy.net.stream import Stream
from tests.net.test_tls_client import MEGABYTE, Peer, bulk, digest
from tests.net.test_tls_client import server as offering
from tests.support.certificates import certificates
from tests.support.origin import (
    OK,
    PATIENCE,
    OriginConnection,
    LoopbackDialer,
    Rig,
    Wire,
    answers,
    check_refused,
    get,
)
from tests.support.sockets import Task, server

SIZE = 2_000_000
BODY = random.Random(1).randbytes(SIZE)
REFUSAL = b"HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\n\r\ntoo much"


def post(*fields: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    return (
        get(b"a.test", b"/", *fields).replace(b"GET", b"POST", 1).replace(b"1.1", version, 1) + body
    )


def chunks(data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return (
        b"".join(b"%X;n=%d\r\n%b\r\n" % (len(piece), len(piece), piece) for piece in pieces)
        + b"0\r\nX-Trailer: y\r\n\r\n"
    )


def send_beside(client: Wire, *data: bytes) -> threading.Thread:
    thread = threading.Thread(target=client.send, args=data, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("size", [700, 16384, 1_000_000])
def test_2_mb_in_chunks_both_ways(size: int) -> None:
    with Rig(
        answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(BODY[::-1], size))
    ) as rig:
        client = rig.client()
        for _ in range(2):
            sender = send_beside(
                client, post(b"Transfer-Encoding: chunked", body=chunks(BODY, size))
            )
            answer = client.answer()
            sender.join(PATIENCE)
            assert answer.whole and answer.body == BODY[::-1]
    assert [request.body == BODY and request.whole for request in rig.origin.requests()] == [
        True,
        True,
    ]
    assert len(rig.dialled) == 1 and sum(record.received for record in rig.records) == len(
        client.seen
    )


def test_2_mb_with_a_length_both_ways() -> None:
    with Rig(answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE + BODY[::-1])) as rig:
        client = rig.client()
        sender = send_beside(client, post(b"Content-Length: %d" % SIZE, body=BODY) + get(b"a.test"))
        assert client.answer().body == BODY[::-1] and client.answer().body == BODY[::-1]
        sender.join(PATIENCE)
    first, second = rig.origin.requests()
    assert first.body == BODY and second.start == b"GET / HTTP/1.1"


def test_2_mb_from_an_http_1_0_client_come_back_until_close() -> None:
    with Rig(
        answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(BODY, 5000))
    ) as rig:
        client = rig.client()
        sender = send_beside(client, post(b"Content-Length: %d" % SIZE, body=BODY, version=b"1.0"))
        assert client.answer().body == BODY and client.end == "closed"
        sender.join(PATIENCE)
    assert rig.origin.requests()[0].body == BODY


@pytest.mark.parametrize("method", [b"GET", b"DELETE", b"PUT", b"PATCH", b"OPTIONS", b"M-SEARCH"])
def test_a_body_belongs_to_its_request_whatever_the_method(method: bytes) -> None:
    inner = get(b"a.test", b"/inner")
    with Rig() as rig:
        client = rig.client(
            post(b"Content-Length: %d" % len(inner), body=inner).replace(b"POST", method, 1)
            + get(b"a.test", b"/next")
        )
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    assert [(request.start.split()[0], request.body) for request in rig.origin.requests()] == [
        (method, inner),
        (b"GET", b""),
    ]


def test_a_post_without_framing_has_no_body() -> None:
    with Rig() as rig:
        client = rig.client(post() + get(b"a.test"))
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    assert [request.body for request in rig.origin.requests()] == [b"", b""]


# -- Expect

FRAMINGS = {
    "length": (b"Content-Length: 5", b"hello"),
    "chunked": (b"Transfer-Encoding: chunked", b"5\r\nhello\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("field,body", FRAMINGS.values(), ids=FRAMINGS)
def test_the_100_of_the_origin_lets_the_client_send(field: bytes, body: bytes) -> None:
    def play(connection: OriginConnection) -> None:
        for _ in range(2):
            head = connection.head()
            assert head.get(b"expect") == [b"100-continue"]
            connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert connection.take(len(body)) == body
            connection.send(OK)

    with Rig(play) as rig:
        client = rig.client()
        for _ in range(2):
            client.send(post(b"Expect: 100-continue", field))
            assert client.answer().start == b"HTTP/1.1 100 Continue"
            client.send(body)
            answer = client.answer()
            assert (answer.body, answer.get(b"connection")) == (b"ok", [])
    assert len(rig.dialled) == 1


@pytest.mark.parametrize("field,body", FRAMINGS.values(), ids=FRAMINGS)
def test_a_client_that_waits_for_no_100_is_served(field: bytes, body: bytes) -> None:
    with Rig() as rig:
        client = rig.client(post(b"Expect: 100-continue", field))
        client.send(body)
        assert client.answer().body == b"ok"
    assert rig.origin.requests()[0].body == b"hello"


def test_an_http_1_0_client_that_expects_gets_no_100() -> None:
    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.take(5)
        connection.send(OK)

    with Rig(play) as rig:
        client = rig.client(
            post(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello", version=b"1.0")
        )
        assert client.answer().start == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize("field", [field for field, _ in FRAMINGS.values()], ids=FRAMINGS)
@pytest.mark.parametrize("ending", [OriginConnection.rest, OriginConnection.close])
def test_a_refusal_reaches_a_client_that_still_expects(field: bytes, ending: object) -> None:
    """Hazard 66."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 2\r\n\r\nno")
        ending(connection)

    with Rig(play) as rig:
        client = rig.client(post(b"Expect: 100-continue", field))
        answer = client.answer()
        assert (answer.status, answer.body, answer.get(b"connection")) == (417, b"no", [b"close"])
        assert client.rest() == b"" and client.end == "closed"
    assert bytes(rig.origin.connections[0].seen).endswith(b"\r\n\r\n") and len(rig.dialled) == 1


def test_a_refusal_of_ours_needs_no_body() -> None:
    """Hazard 66."""
    with Rig() as rig:
        check_refused(
            rig.client(post(b"Expect: 100-continue", b"Content-Length: 5", b"Host: b.test")),
            b"400 Bad Request",
        )


# -- answers before the end of the body


def test_an_early_answer_of_an_origin_that_reads_on_arrives_while_the_client_sends() -> None:
    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(REFUSAL)

    with Rig(play) as rig:
        client = rig.client(post(b"Content-Length: 1000", body=b"begun"))
        answer = client.answer()
        assert (answer.status, answer.body, answer.get(b"connection")) == (
            413,
            b"too much",
            [b"close"],
        )
        client.send(b"x" * 995 + get(b"a.test"))
        assert client.rest() == b""
    assert len(rig.origin.requests()) == 1


def test_an_early_answer_is_not_lost_to_a_reset_because_the_client_has_not_stopped_yet() -> None:
    """RFC 9112 section 9.6: what still comes is read for a while, or other systems than ours throw the answer away."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(REFUSAL)

    with Rig(play) as rig:
        client = rig.client(post(b"Content-Length: 1000", body=b"begun"))
        assert client.answer().body == b"too much"
        assert (
            client.rest() == b"" and client.end == "closed"
        )  # our side of it, while the client's is open
        for _ in range(20):
            client.socket.sendall(b"x" * 10)  # raises behind a reset
            threading.Event().wait(0.005)


@pytest.mark.parametrize(
    "size", [None, 100, 100_000], ids=["length", "small chunks", "large chunks"]
)
@pytest.mark.parametrize("attempt", range(3))
def test_an_early_answer_of_an_origin_that_closes_reaches_the_client_that_sends_on(
    size: int | None, attempt: int
) -> None:
    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(REFUSAL)
        connection.close()  # with bytes unread: a reset follows the answer

    raw = (
        post(b"Transfer-Encoding: chunked", body=chunks(BODY, size))
        if size
        else post(b"Content-Length: %d" % SIZE, body=BODY)
    )
    with Rig(play) as rig:
        client = rig.client()
        sender = send_beside(client, raw)
        answer = client.answer()
        assert (answer.status, answer.body) == (413, b"too much")
        client.close()
        sender.join(PATIENCE)


class Stalling:
    """An origin that reads the head and nothing more, and answers in two parts: `before` the upload is stuck, and `behind`."""

    def __init__(self, before: bytes, behind: bytes, small: bool) -> None:
        """`small`: its receive buffer is, and does not grow."""
        self._before, self._behind, self._small = before, behind, small
        self.stuck, self.over = threading.Event(), threading.Event()

    def play(self, connection: OriginConnection) -> None:
        if self._small:
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.head()
        connection.send(self._before)
        assert self.stuck.wait(PATIENCE)
        connection.send(self._behind)
        assert self.over.wait(2 * PATIENCE)
        connection.reset()

    def fill(self, client: Wire) -> None:
        """Sends until nobody takes any more."""
        client.socket.settimeout(0.3)
        try:
            while True:
                client.socket.send(BODY)
        except TimeoutError:
            client.socket.settimeout(PATIENCE / 2)
            self.stuck.set()


class NarrowDialer(LoopbackDialer):
    """Its send buffers hold less than a piece of a body, so that a write that is stuck stays stuck."""

    def dial(self, flow: Flow) -> Stream:
        stream = super().dial(flow)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return stream


@pytest.mark.parametrize("small", [True, False], ids=["small buffers", "large buffers"])
@pytest.mark.parametrize(
    "early", [0, len(REFUSAL) - 4], ids=["answer when stuck", "answer begun before"]
)
def test_an_upload_that_is_stuck_holds_up_neither_the_answer_nor_the_thread(
    early: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netproxy.net.stream.LINGER_SECONDS", 0.2)
    monkeypatch.setattr("netproxy.handler.http_exchange.BODY_SECONDS", 0.5)
    origin = Stalling(REFUSAL[:early], REFUSAL[early:], small)
    with Rig(origin.play) as rig:
        if small:
            rig.by_host["a.test"] = NarrowDialer(rig.origin, {})
        client = rig.client(post(b"Content-Length: %d" % (64 << 20)))
        if early:
            head = client.head()
        origin.fill(client)
        try:
            answer = head._replace(body=client.take(8)) if early else client.answer()
            assert (answer.status, answer.body) == (413, b"too much")
            client.close()
            rig.join(PATIENCE / 2)
        finally:
            origin.over.set()


@pytest.mark.parametrize(
    "raw",
    [
        post(b"Content-Length: 64000", body=BODY[:64000]),
        post(b"Transfer-Encoding: chunked", body=chunks(BODY[:64000], 64000)),
    ],
    ids=["length", "chunked"],
)
def test_an_upstream_that_has_answered_before_the_last_piece_went_out_gets_it_or_nothing_more(
    raw: bytes,
) -> None:
    """The next request would be the rest of the body to it."""

    def play(connection: OriginConnection) -> None:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = connection.head()
        if head.start.startswith(b"POST"):
            threading.Event().wait(
                0.2
            )  # until the proxy has read all of the body and cannot write it
            connection.send(OK)
            connection.with_body(head, True)
        else:
            connection.send(OK)
        answers(OK)(connection)

    with Rig(play) as rig:
        rig.by_host["a.test"] = NarrowDialer(rig.origin, {})
        client = rig.client(raw)
        answer = client.answer()
        assert answer.body == b"ok"
        if answer.get(b"connection") != [b"close"]:
            client.send(get(b"a.test", b"/2"))
            assert client.answer().body == b"ok"
    first, *others = rig.origin.requests()
    assert first.body == BODY[:64000] or (not first.whole and BODY.startswith(first.body))
    assert [other.start for other in others] in ([], [b"GET /2 HTTP/1.1"])


def test_an_origin_that_answers_as_it_reads_gets_the_whole_body() -> None:
    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        left = SIZE
        while left:
            piece = connection.take(min(left, 50_000))
            left -= len(piece)
            connection.send(piece)

    with Rig(play) as rig:
        client = rig.client()
        sender = send_beside(client, post(b"Content-Length: %d" % SIZE, body=BODY))
        answer = client.answer()
        sender.join(PATIENCE)
    assert answer.whole and answer.body == BODY


def test_an_origin_that_answers_when_it_has_read_all_has_read_all() -> None:
    """The head of the answer comes first, its end only behind the end of the body."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert connection.chunks() == (BODY, True)
        connection.send(b"2\r\nok\r\n0\r\n\r\n")

    with Rig(play) as rig:
        client = rig.client(post(b"Transfer-Encoding: chunked"))
        assert client.head().status == 200
        sender = send_beside(client, chunks(BODY, 3000))
        assert client.take(12) == b"2\r\nok\r\n0\r\n\r\n"
        sender.join(PATIENCE)


def test_an_origin_that_closes_in_the_middle_of_the_body_is_a_bad_gateway() -> None:
    with Rig(lambda connection: (connection.head(), connection.reset())) as rig:
        client = rig.client()
        sender = send_beside(client, post(b"Content-Length: %d" % SIZE, body=BODY))
        assert client.answer().status == 502
        client.close()
        sender.join(PATIENCE)
    assert len(rig.dialled) == 1


class SecureDialer(LoopbackDialer):
    """The origin is reached within TLS, as through an https:// upstream."""

    def __init__(self, address: Address) -> None:
        self.name = "secure"
        self.address = address

    def dial(self, flow: Flow) -> Stream:
        stream = Stream(connect([self.address], PATIENCE))
        tls.connect(stream, tls.client_context(certificates().path("ca.pem")), "localhost")
        return stream


def test_an_early_answer_within_tls_arrives_whole_while_the_body_goes_up() -> None:
    """One thread of ours reads the TLS connection that another writes."""
    size, context = 12 * MEGABYTE, offering(certificates())

    def answer(sock: socket.socket) -> None:
        peer = Peer(sock)
        peer.secure(context)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += peer.read(1)
        early = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (size + 1)
        assert peer.exchange(early + bulk(size), 16384, size) == digest(size)
        peer.send(b"!")  # the answer ends when all of the body has come
        peer.read_to_end()

    with server(answer) as address, Rig() as rig:
        rig.by_host["secure.test"] = SecureDialer(address)
        for _ in range(3):
            client = rig.client(
                b"POST http://secure.test/ HTTP/1.1\r\nHost: secure.test\r\nContent-Length: %d\r\n\r\n"
                % size
            )
            sending = Task(client.send, bulk(size))
            found = client.answer(b"POST")
            assert found.status == 200 and found.whole and found.body == bulk(size) + b"!"
            sending.result()
        rig.join()
        assert [record.ended for record in rig.records] == ["done"] * 3
