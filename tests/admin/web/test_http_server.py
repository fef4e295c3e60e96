"""The small HTTP server: what it takes as a request, and that no client delays another."""

from __future__ import annotations

import socket
from typing import Iterator

import pytest

from netproxy.admin.web import http_server
from netproxy.admin.web.http_server import HeadReader, HttpAnswer, HttpServer, encode, parse_request
from netproxy.errors import EndOfStream, LimitError, ListenError
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import complete
from netproxy.protocol.http1 import HttpError, HttpRequest
from tests.support.doubles import Lines
from tests.support.sockets import SECONDS, read_to_end, wait_until

BIG = b"x" * 3_000_000


def answer(request: HttpRequest, peer: str) -> HttpAnswer:
    if request.target == b"/fault":
        raise RuntimeError("a fault")
    if request.target == b"/big":
        return HttpAnswer(200, BIG)
    return HttpAnswer(200, b"%b %b %b" % (request.method, request.target, peer.encode()))


@pytest.fixture
def log() -> Lines:
    return Lines()


@pytest.fixture
def server(log: Lines) -> Iterator[HttpServer]:
    server = HttpServer("metrics", Address("127.0.0.1", 0), answer, log)
    server.start()
    yield server
    server.stop()
    assert not server.thread.is_alive()


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.address.port), SECONDS)


def exchange(server: HttpServer, data: bytes) -> bytes:
    """Send `data` on a new connection; return everything that comes back."""
    with connect(server) as client:
        client.sendall(data)
        return read_to_end(client)


class TestParseRequest:
    def test_request_is_parsed_without_its_query(self) -> None:
        head = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a:1\r\nX-Y:  z \r\n\r\n"
        fields = [(b"Host", b"a:1"), (b"X-Y", b"z")]
        assert parse_request(head) == HttpRequest(b"GET", b"/metrics", 1, fields)

    def test_http_1_0_request_needs_no_host(self) -> None:
        assert parse_request(b"GET / HTTP/1.0\r\n\r\n").minor == 0

    @pytest.mark.parametrize(
        "head, status",
        [
            (b"", 400),
            (b"GET /", 400),
            (b"GET / HTTP/1.1", 400),
            (b"GET  / HTTP/1.1\r\nHost: a", 400),
            (b"GET http://a/ HTTP/1.1\r\nHost: a", 400),
            (b"OPTIONS * HTTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/2.0\r\nHost: a", 400),
            (b"GET / SMTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b", 400),
            (b"GET / HTTP/1.1\r\nHost: [fe80::1%25eth0]:9180", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nOrigin: b\r\norigin: b", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: b\r\nAuthorization: b", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\n folded", 400),
            (b"GET / HTTP/1.1\r\nHost : a", 400),
            (b"GET /\x1b HTTP/1.1\r\nHost: a", 400),
            (b"GET / HTTP/1.1\r\nHost: " + b"a" * 9000, 431),
        ],
    )
    def test_bad_request_has_a_status(self, head: bytes, status: int) -> None:
        with pytest.raises(HttpError) as caught:
            parse_request(head + b"\r\n\r\n")
        assert caught.value.status == status


class TestHeadReader:
    def test_bytes_come_in_order(self) -> None:
        reader = HeadReader(b"ab\ncd\n")
        assert (complete(reader.read_until(b"\n", 3)), complete(reader.read_exactly(1))) == (
            b"ab\n",
            b"c",
        )
        assert complete(reader.read_until(b"\n", 2)) == b"d\n"

    def test_end_of_the_head_is_an_error(self) -> None:
        with pytest.raises(EndOfStream):
            complete(HeadReader(b"ab").read_until(b"\n", 3))
        with pytest.raises(EndOfStream):
            complete(HeadReader(b"ab").read_exactly(3))

    def test_late_separator_is_an_error(self) -> None:
        with pytest.raises(LimitError):
            complete(HeadReader(b"abc\n").read_until(b"\n", 3))


def test_answer_tells_browsers_what_they_may_not_do() -> None:
    head, _, body = encode(HttpAnswer(200, b"ok"), b"GET").partition(b"\r\n\r\n")
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
    assert encode(HttpAnswer(200, b"ok"), b"HEAD") == head + b"\r\n\r\n"


class TestServing:
    def test_request_is_answered(self, server: HttpServer) -> None:
        got = exchange(server, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 OK\r\n") and got.endswith(b"\r\n\r\nGET /a 127.0.0.1")

    def test_request_may_come_byte_by_byte(self, server: HttpServer) -> None:
        with connect(server) as client:
            for byte in b"GET /a HTTP/1.0\r\n\r\n":
                client.sendall(bytes([byte]))
            assert read_to_end(client).endswith(b"GET /a 127.0.0.1")

    def test_bad_request_is_answered_with_its_status(self, server: HttpServer) -> None:
        assert exchange(server, b"\x05\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        too_long = b"GET / HTTP/1.1\r\nX: " + b"a" * 9000
        assert exchange(server, too_long).startswith(b"HTTP/1.1 431 ")

    def test_unread_body_does_not_cost_the_client_its_answer(self, server: HttpServer) -> None:
        request = b"POST / HTTP/1.0\r\n\r\n" + b"x" * 100_000
        assert exchange(server, request).endswith(b"POST / 127.0.0.1")

    def test_large_answer_is_complete(self, server: HttpServer) -> None:
        assert exchange(server, b"GET /big HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")[2] == BIG

    def test_fault_costs_one_answer_only(self, server: HttpServer, log: Lines) -> None:
        assert exchange(server, b"GET /fault HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 500 ")
        assert exchange(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        assert log.of("exception") == ["answering for metrics: a fault"]

    def test_client_that_does_not_read_delays_nobody(
        self, monkeypatch: pytest.MonkeyPatch, server: HttpServer
    ) -> None:
        """Hazard 116."""
        monkeypatch.setattr(http_server, "SECONDS", 10 * SECONDS)
        with connect(server) as slow:
            slow.sendall(b"GET /big HTTP/1.0\r\n\r\n")
            slow.recv(1)
            assert exchange(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    def test_silent_client_is_disconnected(
        self, monkeypatch: pytest.MonkeyPatch, server: HttpServer
    ) -> None:
        """Hazard 116."""
        monkeypatch.setattr(http_server, "SECONDS", 0.05)
        with connect(server) as silent:
            silent.sendall(b"GET / HT")
            assert read_to_end(silent) == b""

    def test_oldest_silent_client_makes_room(
        self, monkeypatch: pytest.MonkeyPatch, server: HttpServer
    ) -> None:
        """Hazard 116."""
        monkeypatch.setattr(http_server, "SECONDS", 10 * SECONDS)
        monkeypatch.setattr(http_server, "CLIENTS_LIMIT", 3)
        clients = [connect(server) for _ in range(3)]
        wait_until(lambda: len(server._clients) == 3)
        with connect(server) as late:
            late.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_end(late).startswith(b"HTTP/1.1 200 ")
        assert read_to_end(clients[0]) == b""
        for client in clients:
            client.close()

    def test_address_with_most_clients_loses_its_oldest(
        self, monkeypatch: pytest.MonkeyPatch, server: HttpServer
    ) -> None:
        """Hazard 116."""
        monkeypatch.setattr(http_server, "SECONDS", 10 * SECONDS)
        monkeypatch.setattr(http_server, "CLIENTS_LIMIT", 4)
        clients = []
        for source in ("127.0.0.2", *["127.0.0.3"] * 9, "127.0.0.4"):
            address = (server.address.host, server.address.port)
            clients.append(socket.create_connection(address, SECONDS, (source, 0)))
        closed = clients[1:8]
        assert [read_to_end(client) for client in closed] == [b""] * 7
        for client in (clients[0], *clients[8:]):
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_end(client).startswith(b"HTTP/1.1 200 ")
        for client in clients:
            client.close()

    def test_stop_disconnects_clients(self, log: Lines) -> None:
        server = HttpServer("metrics", Address("127.0.0.1", 0), answer, log)
        server.start()
        with connect(server) as client:
            wait_until(lambda: server._clients)
            server.stop()
            assert read_to_end(client) == b""


def test_error_for_a_port_in_use_names_the_address(server: HttpServer, log: Lines) -> None:
    with pytest.raises(
        ListenError, match=f"metrics 127.0.0.1:{server.address.port}: Address already in use"
    ):
        HttpServer("metrics", Address("127.0.0.1", server.address.port), answer, log)


def test_wildcard_address_takes_ipv4_clients(log: Lines) -> None:
    server = HttpServer("metrics", Address("::", 0), answer, log)
    server.start()
    try:
        assert exchange(server, b"GET / HTTP/1.0\r\n\r\n").endswith(b"GET / 127.0.0.1")
    finally:
        server.stop()
