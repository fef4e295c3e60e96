"""Upgrades: a websocket becomes a tunnel behind the 101 that was asked for; everything else stays HTTP."""

from __future__ import annotations

import pytest

from tests.support.origin import OK, OriginConnection, Rig, answers, check_refused, get

ASKED = (
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Key: a",
    b"Sec-WebSocket-Version: 13",
)
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: b\r\n\r\n"
BAD_GATEWAY = b"502 Bad Gateway"


def switches(connection: OriginConnection) -> None:
    """101, with first data behind it, then an echo."""
    connection.head()
    connection.send(SWITCHED + b"first")
    while data := connection.take(1):
        connection.send(data)


def test_a_websocket_becomes_a_tunnel_behind_the_101() -> None:
    """Hazard 57."""
    with Rig(switches) as rig:
        client = rig.client(get(b"a.test", b"/chat", *ASKED) + b"early")
        head = client.answer()
        assert head.start == b"HTTP/1.1 101 Switching Protocols"
        assert (
            head.get(b"connection"),
            head.get(b"upgrade"),
            head.get(b"sec-websocket-accept"),
        ) == ([b"Upgrade"], [b"websocket"], [b"b"])
        assert b"content-length" not in head.names() and b"transfer-encoding" not in head.names()
        assert client.take(10) == b"firstearly"
        client.send(get(b"b.test"))
        assert client.take(len(get(b"b.test"))) == get(b"b.test")
        client.stop_sending()
        assert client.rest() == b"" and client.end == "closed"
    [record] = rig.records
    assert (str(record.flow.target), record.ended, len(rig.dialled)) == ("a.test:80", "closed", 1)


def test_the_request_arrives_whole_or_not_at_all() -> None:
    """Hazard 57."""
    with Rig() as rig:
        assert rig.client(get(b"a.test", b"/", *ASKED)).answer().body == b"ok"
    [request] = rig.origin.requests()
    assert (
        request.get(b"connection"),
        request.get(b"upgrade"),
        request.get(b"sec-websocket-key"),
    ) == ([b"Upgrade"], [b"websocket"], [b"a"])


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request", b"426 Upgrade Required"])
def test_an_origin_that_does_not_switch_is_an_origin(status: bytes) -> None:
    """Hazard 57."""
    with Rig(
        answers(
            b"HTTP/1.1 "
            + status
            + b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nno"
        )
    ) as rig:
        client = rig.client(get(b"a.test", b"/", *ASKED) + get(b"a.test"))
        first = client.answer()
        assert first.start == b"HTTP/1.1 " + status and first.names() == {b"via", b"content-length"}
        assert client.answer().body == b"no"
    assert len(rig.origin.requests()) == 2


@pytest.mark.parametrize(
    "fields",
    [
        (b"Upgrade: websocket",),
        (b"Connection: Upgrade",),
        (b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"),
        (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: a"),
        (b"Connection: Upgrade", b"Upgrade: websocket, h2c"),
        (b"Connection: Upgrade", b"Upgrade: websocket", b"Upgrade: h2c"),
        (b"Connection: Upgrade", b"Upgrade: TLS/1.0"),
    ],
)
def test_any_other_upgrade_is_stripped(fields: tuple[bytes, ...]) -> None:
    """Hazard 57."""
    with Rig() as rig:
        assert rig.client(get(b"a.test", b"/", *fields)).answer().body == b"ok"
    assert not {b"upgrade", b"connection"} & rig.origin.requests()[0].names()


def test_an_http_1_0_client_cannot_upgrade() -> None:
    """Hazard 57.  RFC 9110 section 7.8: Upgrade in an HTTP/1.0 request is ignored."""
    with Rig() as rig:
        assert (
            rig.client(get(b"a.test", b"/", *ASKED).replace(b"HTTP/1.1", b"HTTP/1.0")).answer().body
            == b"ok"
        )
    assert not {b"upgrade", b"connection"} & rig.origin.requests()[0].names()


@pytest.mark.parametrize(
    "fields", [(), (b"Upgrade: websocket",), (b"Connection: Upgrade", b"Upgrade: h2c")]
)
def test_a_101_that_nobody_asked_for_is_no_answer(fields: tuple[bytes, ...]) -> None:
    """Hazard 57."""
    with Rig(switches) as rig:
        check_refused(
            rig.client(get(b"a.test", b"/", *fields) + get(b"a.test", b"/2")), BAD_GATEWAY
        )
    assert b"/2" not in rig.origin.connections[0].seen


def test_a_101_that_nobody_asked_for_is_none_in_the_middle_of_a_body_either() -> None:
    """Hazard 57."""
    with Rig(switches) as rig:
        client = rig.client(
            get(b"a.test", b"/", b"Content-Length: 10").replace(b"GET", b"POST", 1) + b"begun"
        )
        check_refused(client, BAD_GATEWAY)


@pytest.mark.parametrize("body", [b"", b"begun"])
def test_a_101_before_the_end_of_the_body_is_never_half_an_upgrade(body: bytes) -> None:
    """Hazard 57.  Asked for, but too early: a refusal is as good as a tunnel behind the whole body, an interim answer is not."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(SWITCHED)
        if connection.take(10) == b"begun-ends":
            connection.send(b"tunnel")

    with Rig(play) as rig:
        client = rig.client(get(b"a.test", b"/", b"Content-Length: 10", *ASKED) + body)
        answer = client.answer()
        if answer.status != 101:
            assert answer.status == 502
            return
        assert answer.get(b"upgrade") == [b"websocket"]
        client.send(b"begun-ends"[len(body) :])
        assert client.take(6) == b"tunnel"


def test_interim_answers_may_come_before_the_101() -> None:
    """Hazard 57."""

    def play(connection: OriginConnection) -> None:
        connection.head()
        connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + SWITCHED + b"data")

    with Rig(play) as rig:
        client = rig.client(get(b"a.test", b"/", *ASKED))
        assert [client.answer().status, client.answer().status] == [103, 101]
        assert client.take(4) == b"data"


def test_a_websocket_on_a_connection_that_has_served_requests_before() -> None:
    """Hazard 57."""

    def play(connection: OriginConnection) -> None:
        connection.request()
        connection.send(OK)
        switches(connection)

    with Rig(play) as rig:
        client = rig.client(get(b"a.test"))
        assert client.answer().body == b"ok"
        client.send(get(b"a.test", b"/", *ASKED))
        assert client.answer().status == 101 and client.take(5) == b"first"
    assert len(rig.dialled) == 1
