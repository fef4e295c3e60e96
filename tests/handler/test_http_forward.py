"""Requests in sequence: their targets, the reuse of outbound connections, and retries."""

from __future__ import annotations

import threading

import pytest

from netproxy.errors import Reason
from tests.support.origin import (
    OK,
    PATIENCE,
    LoopbackDialer,
    Origin,
    OriginConnection,
    Rig,
    answers,
    answers_and_closes,
    check_refused,
    get,
    in_turn,
)

BAD_GATEWAY = b"502 Bad Gateway"
POST = b"POST http://a.test/ HTTP/1.1\r\nHost: a.test\r\nContent-Length: 5\r\n\r\nhello"


def test_exact_bytes_of_request_and_response() -> None:
    with Rig(answers(b"HTTP/1.1 404 Not  Found\r\nServer:x\r\nContent-Length:2\r\n\r\nno")) as rig:
        client = rig.client(
            b"PUT http://A.Test:8080/%7Ex//..;y?q=a%20b&%zz HTTP/1.1\r\n"
            b"host: other\r\naccept:a\r\ncontent-length:5\r\n\r\nhello"
        )
        client.answer()
    via = rig.origin.requests()[0].get(b"via")[0]
    assert rig.origin.connections[0].seen == (
        b"PUT /%7Ex//..;y?q=a%20b&%zz HTTP/1.1\r\nHost: A.Test:8080\r\naccept: a\r\nVia: "
        + via
        + b"\r\nContent-Length: 5\r\n\r\nhello"
    )
    assert (
        client.seen
        == b"HTTP/1.1 404 Not  Found\r\nServer: x\r\nVia: "
        + via
        + b"\r\nContent-Length: 2\r\n\r\nno"
    )
    [record] = rig.records
    assert (
        str(record.flow.target),
        record.flow.command,
        record.flow.listener,
        record.upstream,
        record.received,
        record.ended,
    ) == ("a.test:8080", "http", "rig", "loopback", len(client.seen), "done")
    assert record.sent == len(rig.origin.connections[0].seen)


@pytest.mark.parametrize(
    "target,dialled,host,line",
    [
        (b"http://a.test", "a.test:80", b"a.test", b"GET / HTTP/1.1"),
        (b"http://a.test:81/x", "a.test:81", b"a.test:81", b"GET /x HTTP/1.1"),
        (b"HTTP://A.TEST/X", "a.test:80", b"A.TEST", b"GET /X HTTP/1.1"),
        (b"http://a.test?q", "a.test:80", b"a.test", b"GET /?q HTTP/1.1"),
        (b"http://a.test./", "a.test:80", b"a.test.", b"GET / HTTP/1.1"),
        (
            b"http://[2001:DB8::1]:8080/",
            "[2001:db8::1]:8080",
            b"[2001:DB8::1]:8080",
            b"GET / HTTP/1.1",
        ),
        (b"http://[::1]/", "[::1]:80", b"[::1]", b"GET / HTTP/1.1"),
        (b"http://127.1/", "127.0.0.1:80", b"127.1", b"GET / HTTP/1.1"),
        (b"http://a.test/http://b.test/", "a.test:80", b"a.test", b"GET /http://b.test/ HTTP/1.1"),
        (b"http://a.test/@b.test", "a.test:80", b"a.test", b"GET /@b.test HTTP/1.1"),
    ],
)
def test_flow_dial_and_host_come_from_the_request_target(
    target: bytes, dialled: str, host: bytes, line: bytes
) -> None:
    """Hazard 53."""
    with Rig() as rig:
        assert (
            rig.client(b"GET " + target + b" HTTP/1.1\r\nHost: b.test:99\r\n\r\n").answer().body
            == b"ok"
        )
    [request] = rig.origin.requests()
    assert (request.start, request.get(b"host")) == (line, [host])
    assert rig.dialled == [dialled] and [str(record.flow.target) for record in rig.records] == [
        dialled
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"GET a.test:80 HTTP/1.1\r\nHost: a.test\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a.test\r\n\r\n",
        get(b""),
        get(b"a.test:0"),
        get(b"a.test:99999"),
        get(b"a.test:x"),
        get(b"a.test").replace(b"http:", b"https:"),
        get(b"a.test").replace(b"http:", b"ftp:"),
        get(b"a.test").replace(b"//", b"/"),
        get(b"a.test", b"/#fragment"),
        get(b"::1"),
        get(b"[::1"),
        get(b"a.test\\b.test"),
    ],
    ids=lambda raw: raw.split(b"\r")[0].decode(),
)
def test_request_target_without_address_is_refused(raw: bytes) -> None:
    with Rig() as rig:
        check_refused(rig.client(raw), b"400 Bad Request")
    assert rig.dialled == []


HOSTS = {
    "none": b"GET http://a.test/ HTTP/1.1\r\n\r\n",
    "two": get(b"a.test", b"/", b"Host: a.test"),
    "two different": get(b"a.test", b"/", b"host: b.test"),
    "a list": b"GET http://a.test/ HTTP/1.1\r\nHost: a,b\r\n\r\n",
    "white space": b"GET http://a.test/ HTTP/1.1\r\nHost: a b\r\n\r\n",
    "a path": b"GET http://a.test/ HTTP/1.1\r\nHost: a.test/\r\n\r\n",
    "userinfo in Host": b"GET http://a.test/ HTTP/1.1\r\nHost: u@a.test\r\n\r\n",
    "userinfo in the target": b"GET http://u@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "user and password": b"GET http://u:p@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "empty userinfo": b"GET http://@a.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "a comma in the target": b"GET http://a.test,b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n",
    "two in CONNECT": b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
    "a list in CONNECT": b"CONNECT a.test:443 HTTP/1.1\r\nHost: a,b\r\n\r\n",
    "two in HTTP/1.0": b"GET http://a.test/ HTTP/1.0\r\nHost: a.test\r\nHost: a.test\r\n\r\n",
}


@pytest.mark.parametrize("raw", HOSTS.values(), ids=HOSTS)
def test_request_without_exactly_one_plain_host_is_refused(raw: bytes) -> None:
    """Hazard 54."""
    with Rig() as rig:
        check_refused(rig.client(raw), b"400 Bad Request")
    assert rig.dialled == []


def test_bytes_over_127_in_the_target_reach_the_origin_as_they_are() -> None:
    """Hazard 141: clients send UTF-8, in which any byte over 127 occurs."""
    path = b"/" + bytes(range(0x80, 0x100)) + b"?" + "à".encode()
    with Rig() as rig:
        assert rig.client(get(b"a.test", path)).answer().body == b"ok"
    assert rig.origin.requests()[0].start == b"GET " + path + b" HTTP/1.1"


def test_http_1_0_client_gets_one_response_and_the_end() -> None:
    """Hazard 63."""
    with Rig() as rig:
        client = rig.client(
            b"GET http://a.test/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + get(b"a.test", b"/2")
        )
        answer = client.answer()
        assert (answer.start, answer.body, answer.get(b"connection")) == (
            b"HTTP/1.1 200 OK",
            b"ok",
            [b"close"],
        )
        assert client.rest() == b"" and client.end == "closed"
    [request] = rig.origin.requests()
    assert request.start == b"GET / HTTP/1.1" and request.get(b"via")[0].startswith(b"1.0 ")


@pytest.mark.parametrize("option", [b"close", b"Close", b"x, close", b"keep-alive, close"])
def test_connection_close_ends_the_connection_behind_its_response(option: bytes) -> None:
    """Hazard 63."""
    with Rig() as rig:
        client = rig.client(get(b"a.test", b"/", b"Connection: " + option) + get(b"a.test", b"/2"))
        assert client.answer().get(b"connection") == [b"close"]
        assert client.rest() == b"" and client.end == "closed"
    assert len(rig.origin.requests()) == 1


def test_pipelined_requests_are_answered_in_order_and_routed_separately() -> None:
    """Hazard 63."""
    late = threading.Event()

    def slow(connection: OriginConnection) -> None:
        connection.request()
        assert late.wait(PATIENCE)
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")

    second, third = [Origin(answers(OK.replace(b"ok", body))) for body in (b"22", b"33")]
    with Rig(slow, elsewhere={"b.test": second}) as rig:
        rig.by_host["c.test"] = LoopbackDialer(third, {}, "another upstream")
        client = rig.client(
            get(b"a.test")
            + b"POST http://b.test/ HTTP/1.1\r\nHost: b.test\r\nContent-Length: 5\r\n\r\nGET /"
            + get(b"c.test")
            + get(b"b.test", b"/last")
        )
        late.set()
        assert [client.answer().body for _ in range(4)] == [b"1", b"22", b"33", b"22"]
    second.close()
    third.close()
    assert [(record.upstream, record.flow.target.host) for record in rig.records] == [
        ("loopback", "a.test"),
        ("loopback", "b.test"),
        ("another upstream", "c.test"),
        ("loopback", "b.test"),
    ]
    assert [(request.start, request.body) for request in second.requests()] == [
        (b"POST / HTTP/1.1", b"GET /"),
        (b"GET /last HTTP/1.1", b""),
    ]


def test_denied_second_request_does_not_affect_the_first() -> None:
    """Hazard 63."""
    with Rig() as rig:
        rig.by_host["b.test"] = forbidding = LoopbackDialer(rig.origin, {})
        forbidding.failing = [Reason.DENIED]
        client = rig.client(get(b"a.test") + get(b"b.test") + get(b"a.test"))
        assert client.answer().body == b"ok"
        check_refused(client, b"403 Forbidden")
    assert len(rig.origin.requests()) == 1


def test_connection_is_kept_behind_a_body_with_length() -> None:
    """Hazard 64."""
    with Rig() as rig:
        client = rig.client()
        for _ in range(3):
            client.send(POST)
            answer = client.answer()
            assert (answer.body, answer.get(b"connection")) == (b"ok", [])
    assert (
        len(rig.dialled) == 1
        and [request.body for request in rig.origin.requests()] == [b"hello"] * 3
    )


def test_requests_to_one_origin_share_an_outbound_connection() -> None:
    """Hazard 64."""
    with Rig() as rig:
        client = rig.client()
        for number in range(5):
            client.send(get(b"A.test" if number % 2 else b"a.test:80", b"/%d" % number))
            assert client.answer().body == b"ok"
        client.send(POST)
        assert client.answer().body == b"ok"
    assert rig.dialled == ["a.test:80"] and len(rig.origin.requests()) == 6
    assert [record.ended for record in rig.records] == ["done"] * 6


@pytest.mark.parametrize(
    "second,dialled",
    [(b"b.test", "b.test:80"), (b"a.test:81", "a.test:81"), (b"www.a.test", "www.a.test:80")],
)
def test_another_origin_is_dialled_anew(second: bytes, dialled: str) -> None:
    """Hazard 64."""
    with Rig() as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(second), get(b"a.test"))
        assert [client.answer().body, client.answer().body] == [b"ok", b"ok"]
    assert rig.dialled == ["a.test:80", dialled, "a.test:80"]
    assert [len(connection.requests()) for connection in rig.origin.connections] == [1, 1, 1]


def test_origin_is_dialled_anew_when_its_upstream_changes() -> None:
    """Hazard 64."""
    with Rig() as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        rig.by_host["a.test"] = new = LoopbackDialer(rig.origin, {}, "new")
        client.send(get(b"a.test"))
        assert client.answer().body == b"ok"
    assert len(new.dialled) == 1 and [record.upstream for record in rig.records] == [
        "loopback",
        "new",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"),
        OK.replace(b"OK\r\n", b"OK\r\nConnection: x, Close\r\n"),
        OK.replace(b"1.1", b"1.0"),
        OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
        OK + b"x",
    ],
    ids=["close", "a list", "HTTP/1.0", "two answers", "a byte too many"],
)
def test_outbound_connection_is_not_reused_behind_close_or_extra_bytes(answer: bytes) -> None:
    """Hazard 64."""
    with Rig(answers(answer)) as rig:
        client = rig.client()
        for _ in range(3):
            client.send(get(b"a.test"))
            assert client.answer().body == b"ok"
    assert len(rig.dialled) == 3 and [
        len(connection.requests()) for connection in rig.origin.connections
    ] == [1, 1, 1]


def test_outbound_connection_is_closed_with_the_client() -> None:
    ended = threading.Event()

    def play(connection: OriginConnection) -> None:
        answers(OK)(connection)
        ended.set()

    with Rig(play) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.close()
        assert ended.wait(PATIENCE)


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_closed_outbound_connection_is_replaced_before_the_next_request(method: bytes) -> None:
    """Hazard 72."""
    closed = threading.Event()

    def first(connection: OriginConnection) -> None:
        answers_and_closes(OK)(connection)
        closed.set()

    with Rig(in_turn(first, answers(OK))) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok" and closed.wait(PATIENCE)
        client.send(get(b"a.test") if method == b"GET" else POST)
        assert client.answer().body == b"ok"
    assert [len(connection.requests()) for connection in rig.origin.connections] == [1, 1]
    assert [record.ended for record in rig.records] == ["done", "done"]


def closes_on_the_second(connection: OriginConnection) -> None:
    connection.request()
    connection.send(OK)
    connection.request()
    connection.close()


def resets_on_the_second(connection: OriginConnection) -> None:
    connection.request()
    connection.send(OK)
    connection.request()
    connection.reset()


@pytest.mark.parametrize("first", [closes_on_the_second, resets_on_the_second])
@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS"])
def test_safe_request_is_sent_again_when_a_kept_connection_closes(
    first: object, method: bytes
) -> None:
    """Hazard 72."""
    with Rig(
        in_turn(first, answers(OK if method != b"HEAD" else b"HTTP/1.1 200 OK\r\n\r\n"))
    ) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(b"a.test", b"/2").replace(b"GET", method, 1))
        assert client.answer(method).status == 200
    assert [request.start for request in rig.origin.connections[1].requests()] == [
        method + b" /2 HTTP/1.1"
    ]
    ended = "closed" if first is closes_on_the_second else "reset"
    assert [record.ended for record in rig.records] == ["done", ended, "done"]


@pytest.mark.parametrize("first", [closes_on_the_second, resets_on_the_second])
@pytest.mark.parametrize(
    "raw",
    [
        POST,
        get(b"a.test").replace(b"GET", b"POST", 1),
        get(b"a.test").replace(b"GET", b"DELETE", 1),
        POST.replace(b"POST", b"GET"),
    ],
    ids=["POST", "POST without body", "DELETE", "GET with a body"],
)
def test_unsafe_request_is_not_sent_again(first: object, raw: bytes) -> None:
    """Hazard 72."""
    with Rig(in_turn(first, answers(OK))) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(raw)
        check_refused(client, BAD_GATEWAY)
    assert len(rig.dialled) == 1 and len(rig.origin.requests()) == 2


@pytest.mark.parametrize("raw", [POST, get(b"a.test")], ids=["POST", "GET"])
@pytest.mark.parametrize("end", [OriginConnection.close, OriginConnection.reset])
def test_request_is_not_sent_again_when_a_new_connection_closes(raw: bytes, end: object) -> None:
    """Hazard 72."""
    with Rig(lambda connection: (connection.request(), end(connection))) as rig:
        check_refused(rig.client(raw), BAD_GATEWAY)
    assert len(rig.dialled) == 1 and len(rig.origin.requests()) == 1 and len(rig.records) == 1


def test_request_is_sent_twice_at_most() -> None:
    """Hazard 72."""
    with Rig(
        in_turn(
            closes_on_the_second,
            lambda connection: (connection.request(), connection.close()),
            answers(OK),
        )
    ) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(b"a.test"))
        check_refused(client, BAD_GATEWAY)
    assert len(rig.dialled) == 2


def test_each_outbound_connection_is_recorded_once_when_the_second_dial_fails() -> None:
    with Rig(closes_on_the_second) as rig:
        rig.dialer.failing = [None, Reason.TIMEOUT]
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(b"a.test"))
        check_refused(client, b"504 Gateway Timeout")
    assert [record.ended for record in rig.records] == ["done", "closed", "timed out"]
