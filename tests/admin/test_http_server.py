"""The small HTTP server: what it takes for a request, and that no client holds it up."""

from __future__ import annotations

import socket
from typing import Iterator

import pytest

from netproxy.errors import ListenError
from netproxy.interfaces.addresses import Address
from netproxy.admin import http_server
from netproxy.admin.http_server import Answer, BadRequest, Request, WebServer, encode, parse
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, read_to_end, wait_until

BIG = b"x" * 3_000_000


def answer(request: Request) -> Answer:
    if request.path == "/fault":
        raise RuntimeError("a fault")
    return Answer(
        200,
        BIG
        if request.path == "/big"
        else f"{request.method} {request.path} {request.peer}".encode(),
    )


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def server(log: Lines) -> Iterator[WebServer]:
    made = WebServer(Address("127.0.0.1", 0), answer, log)
    made.start()
    yield made
    made.stop()
    assert not made.thread.is_alive()


def connect(server: WebServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.address.port), SECONDS)


def say(server: WebServer, data: bytes) -> bytes:
    with connect(server) as client:
        client.sendall(data)
        return read_to_end(client)


class TestParse:
    def test_a_request(self) -> None:
        head = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a:1\r\nX-Y:  z "
        assert parse(head, "::1") == Request(
            "GET", "/metrics", 1, {"host": "a:1", "x-y": "z"}, "::1"
        )
        assert parse(b"GET / HTTP/1.0", "::1").minor == 0

    @pytest.mark.parametrize(
        "head, status",
        [
            (b"GET /", 400),
            (b"GET / HTTP/1.1", 400),
            (b"GET  / HTTP/1.1\r\nHost: a", 400),
            (b"GET http://a/ HTTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/2.0\r\nHost: a", 505),
            (b"GET / SMTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\n folded", 400),
            (b"GET / HTTP/1.1\r\nHost : a", 400),
            (b"GET /\x1b HTTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/1.1\r\nHost: " + b"a" * 9000, 431),
        ],
    )
    def test_what_is_none(self, head: bytes, status: int) -> None:
        with pytest.raises(BadRequest) as caught:
            parse(head, "")
        assert caught.value.status == status


def test_an_answer_says_what_a_browser_may_not_do_with_it() -> None:
    head, _, body = encode(Answer(200, b"ok"), "GET").partition(b"\r\n\r\n")
    for line in (
        b"Content-Length: 2",
        b"Connection: close",
        b"Cache-Control: no-store",
        b"X-Content-Type-Options: nosniff",
        b"Referrer-Policy: no-referrer",
        b"Cross-Origin-Resource-Policy: same-origin",
    ):
        assert line in head.split(b"\r\n")
    assert body == b"ok"
    assert encode(Answer(200, b"ok"), "HEAD") == head + b"\r\n\r\n"


class TestServing:
    def test_asks_and_gets_an_answer(self, server: WebServer) -> None:
        got = say(server, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 OK\r\n") and got.endswith(b"\r\n\r\nGET /a 127.0.0.1")

    def test_byte_by_byte(self, server: WebServer) -> None:
        with connect(server) as client:
            for byte in b"GET /a HTTP/1.0\r\n\r\n":
                client.sendall(bytes([byte]))
            assert read_to_end(client).endswith(b"GET /a 127.0.0.1")

    def test_what_is_no_request_is_told_so(self, server: WebServer) -> None:
        assert say(server, b"\x05\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert say(server, b"GET / HTTP/1.1\r\nX: " + b"a" * 9000).startswith(b"HTTP/1.1 431 ")

    def test_a_body_does_not_cost_the_answer(self, server: WebServer) -> None:
        assert say(server, b"POST / HTTP/1.0\r\n\r\n" + b"x" * 100_000).endswith(
            b"POST / 127.0.0.1"
        )

    def test_a_large_answer_comes_whole(self, server: WebServer) -> None:
        assert say(server, b"GET /big HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2] == BIG

    def test_a_fault_is_one_answer(self, server: WebServer, log: Lines) -> None:
        assert say(server, b"GET /fault HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 500 ")
        assert say(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert log.of("exception") == ["answering on the metrics listener: a fault"]

    def test_hazard_116_one_that_does_not_read_holds_up_nobody(self, server: WebServer) -> None:
        with connect(server) as slow:
            slow.sendall(b"GET /big HTTP/1.0\r\n\r\n")
            slow.recv(1)
            assert say(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    def test_hazard_116_a_silent_client_is_hung_up_on(
        self, monkeypatch: pytest.MonkeyPatch, server: WebServer
    ) -> None:
        monkeypatch.setattr(http_server, "SECONDS", 0.05)
        with connect(server) as silent:
            silent.sendall(b"GET / HT")
            assert read_to_end(silent) == b""

    def test_hazard_116_of_too_many_the_oldest_that_is_silent_goes(
        self, monkeypatch: pytest.MonkeyPatch, server: WebServer
    ) -> None:
        monkeypatch.setattr(http_server, "CLIENTS_LIMIT", 3)
        clients = [connect(server) for _ in range(3)]
        wait_until(lambda: len(server._clients) == 3)
        with connect(server) as late:
            late.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_end(late).startswith(b"HTTP/1.1 200 ")
        assert read_to_end(clients[0]) == b""
        for client in clients:
            client.close()

    def test_a_stop_ends_those_that_are_there(self, log: Lines) -> None:
        server = WebServer(Address("127.0.0.1", 0), answer, log)
        server.start()
        with connect(server) as client:
            wait_until(lambda: server._clients)
            server.stop()
            assert read_to_end(client) == b""


def test_a_port_in_use_is_named(server: WebServer, log: Lines) -> None:
    with pytest.raises(
        ListenError, match=f"metrics 127.0.0.1:{server.address.port}: Address already in use"
    ):
        WebServer(Address("127.0.0.1", server.address.port), answer, log)


def test_every_address(log: Lines) -> None:
    server = WebServer(Address("::", 0), answer, log)
    server.start()
    try:
        assert say(server, b"GET / HTTP/1.0\r\n\r\n").endswith(b"GET / 127.0.0.1")
    finally:
        server.stop()
