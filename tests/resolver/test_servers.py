"""Exchanges with name servers that misbehave: what is accepted, and what is tried next."""

from __future__ import annotations

import socket
import threading
import time
from typing import Callable, Sequence

import pytest

from netproxy.errors import DialError, ProtocolError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.net.stream import Stream
from netproxy.resolver import servers as servers_module
from netproxy.resolver.group import NameServerGroup
from netproxy.resolver.servers import (
    IDLE_KEPT,
    KEPT_SECONDS,
    HttpsServer,
    NameServer,
    ServerError,
    StreamServer,
    UdpServer,
)
from tests.support.dns import QR, RA, RD, TC, a, question
from tests.support.nameservers import (
    MAIL,
    RIGHT,
    WWW,
    answer_to,
    dial_to,
    far_deadline,
    framed,
    is_answer,
    question_of,
    read_framed,
    serve,
    txt_records,
    udp_server,
)
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    address_of,
    read_exactly,
    read_to_end,
    server,
    udp,
    wait_until,
)

WRONG = a(60, b"\xc6\x33\x64\x42")


class Unasked:
    """A server over TCP that must not be asked."""

    name = "unasked"

    def exchange(self, queries: Sequence[bytes], deadline: float) -> list[bytes]:
        raise AssertionError("asked by TCP")

    def close(self) -> None:
        pass


def udp_client(address: Address, stream: NameServer | None = None) -> UdpServer:
    """Return the UDP side of a name server; `stream` is its TCP side."""
    return UdpServer(f"udp://{address}", address, stream or Unasked(), lambda: None)


class RecordedDials:
    """A dial function that keeps the streams it has opened."""

    def __init__(self, address: Address) -> None:
        self.streams: list[Stream] = []
        self._dial = dial_to(address)

    def dial(self, deadline: float) -> Stream:
        """Open a stream."""
        self.streams.append(self._dial(deadline))
        return self.streams[-1]


class TestUdp:
    def test_answer_over_udp_has_the_id_of_its_query(self) -> None:
        def script(sock: socket.socket) -> None:
            asked, peer = sock.recvfrom(512)
            assert asked[2:] == WWW[2:]
            sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script) as address:
            (answer,) = udp_client(address).exchange([WWW], far_deadline())
        assert is_answer(answer, WWW, RIGHT)

    def test_answers_over_udp_may_come_in_any_order(self) -> None:
        def script(sock: socket.socket) -> None:
            (first, peer), (second, _) = sock.recvfrom(512), sock.recvfrom(512)
            assert {question_of(first), question_of(second)} == {
                question_of(WWW),
                question_of(MAIL),
            }
            for asked in (second, first, second):
                sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script) as address:
            answers = udp_client(address).exchange([WWW, MAIL], far_deadline())
        assert answers == [answer_to(WWW, RIGHT), answer_to(MAIL, RIGHT)]

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda asked: answer_to(asked, WRONG, id=int.from_bytes(asked[:2], "big") ^ 1),
            lambda asked: answer_to(asked[:12] + question("evil.example"), WRONG),
            lambda asked: answer_to(asked[:12] + question("www.example", 28), WRONG),
            lambda asked: answer_to(asked[:12] + question("www.example", 1, 3), WRONG),
            lambda asked: answer_to(asked, WRONG, flags=RD),
            lambda asked: answer_to(asked, WRONG, flags=QR | 5 << 11),
            lambda asked: asked[:2],
            lambda asked: b"",
            lambda asked: answer_to(asked)[:20],
            lambda asked: b"\xff" * 600,
        ],
        ids=[
            "another id",
            "another name",
            "another kind",
            "another class",
            "a query",
            "another opcode",
            "two bytes",
            "nothing",
            "half",
            "garbage",
        ],
    )
    def test_datagram_that_is_no_answer_is_ignored(self, spoil: Callable[[bytes], bytes]) -> None:
        def script(sock: socket.socket) -> None:
            asked, peer = sock.recvfrom(512)
            sock.sendto(spoil(asked), peer)
            sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script) as address:
            (answer,) = udp_client(address).exchange([WWW], far_deadline())
        assert is_answer(answer, WWW, RIGHT)

    def test_answer_from_another_source_is_ignored(self) -> None:
        def script(sock: socket.socket) -> None:
            asked, peer = sock.recvfrom(512)
            with udp() as other:
                other.sendto(answer_to(asked, WRONG), peer)
            sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script) as address:
            (answer,) = udp_client(address).exchange([WWW], far_deadline())
        assert is_answer(answer, WWW, RIGHT)

    def test_flood_of_guessed_ids_does_not_end_an_exchange(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An attacker knows the port, forges the server's address and guesses IDs."""
        monkeypatch.setattr(servers_module, "TRY_SECONDS", 0.2)
        monkeypatch.setattr(servers_module, "TRIES", 100)

        def script(sock: socket.socket) -> None:
            asked, peer = sock.recvfrom(512)
            right = int.from_bytes(asked[:2], "big")
            for guess in range(1, 2000):
                sock.sendto(answer_to(asked, WRONG, id=(right + guess) % 65536), peer)
            # The second query shows that the client's buffer has room for the answer.
            again, peer = sock.recvfrom(512)
            sock.sendto(answer_to(again, RIGHT), peer)

        with udp_server(script) as address:
            (answer,) = udp_client(address).exchange([WWW], far_deadline())
        assert is_answer(answer, WWW, RIGHT)

    def test_only_unanswered_queries_are_sent_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(servers_module, "TRY_SECONDS", 0.1)
        monkeypatch.setattr(servers_module, "TRIES", 100)

        def script(sock: socket.socket) -> None:
            first = dict(
                (question_of(asked), (asked, peer))
                for asked, peer in (sock.recvfrom(512), sock.recvfrom(512))
            )
            asked, peer = first[question_of(WWW)]
            sock.sendto(answer_to(asked, RIGHT), peer)
            again = sock.recv(512)
            # On a busy machine the answer was late.
            while again == asked:
                again = sock.recv(512)
            assert again == first[question_of(MAIL)][0]
            sock.sendto(answer_to(again, RIGHT), peer)

        with udp_server(script) as address:
            answers = udp_client(address).exchange([WWW, MAIL], far_deadline())
        assert answers == [answer_to(WWW, RIGHT), answer_to(MAIL, RIGHT)]

    def test_exchange_over_udp_ends_after_the_last_try(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(servers_module, "TRY_SECONDS", 0.02)
        with udp() as silent:
            with pytest.raises(ServerError) as caught:
                udp_client(address_of(silent)).exchange([WWW], far_deadline())
            asked = [silent.recv(512) for _ in range(servers_module.TRIES)]
        assert str(caught.value).endswith(": no answer")
        assert len(set(asked)) == 1
        assert asked[0][2:] == WWW[2:]

    def test_exchange_over_udp_ends_with_its_deadline(self) -> None:
        with udp() as silent, pytest.raises(ServerError):
            udp_client(address_of(silent)).exchange([WWW], time.monotonic() + 0.05)

    def test_no_query_is_sent_after_the_deadline(self) -> None:
        with udp() as silent, pytest.raises(ServerError):
            udp_client(address_of(silent)).exchange([WWW], time.monotonic())
        with udp() as silent:
            silent.settimeout(0)
            with pytest.raises(ServerError):
                udp_client(address_of(silent)).exchange([WWW], time.monotonic() - 1)
            with pytest.raises(BlockingIOError):
                silent.recv(512)

    def test_refused_datagram_ends_an_exchange_at_once(self) -> None:
        with udp() as sock:
            address = address_of(sock)
        began = time.monotonic()
        with pytest.raises(ServerError, match="Connection refused"):
            udp_client(address).exchange([WWW], began + 60)

    def test_truncated_answer_is_asked_for_again_over_tcp(self) -> None:
        whole = txt_records(60, 4000)

        def script(sock: socket.socket) -> None:
            for _ in range(2):
                asked, peer = sock.recvfrom(512)
                full = question_of(asked) == question_of(MAIL)
                sock.sendto(
                    answer_to(asked, RIGHT) if full else answer_to(asked, flags=QR | RD | RA | TC),
                    peer,
                )

        with (
            udp_server(script) as address,
            server(serve(lambda asked: answer_to(asked, *whole))) as by_tcp,
        ):
            stream = StreamServer("tcp", dial_to(by_tcp))
            answers = udp_client(address, stream).exchange([WWW, MAIL], far_deadline())
            stream.close()
        assert answers == [answer_to(WWW, *whole), answer_to(MAIL, RIGHT)]

    def test_ids_and_source_ports_over_udp_are_random(self) -> None:
        seen: list[tuple[int, int]] = []

        def script(sock: socket.socket) -> None:
            for _ in range(40):
                asked, peer = sock.recvfrom(512)
                seen.append((int.from_bytes(asked[:2], "big"), peer[1]))
                sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script) as address:
            client = udp_client(address)
            for _ in range(40):
                client.exchange([WWW], far_deadline())
        ids, ports = [id for id, _ in seen], [port for _, port in seen]
        assert len(set(ids)) > 35 and len(set(ports)) > 30
        assert len({after - before for before, after in zip(ids, ids[1:], strict=False)}) > 30
        # The chance that 40 of 65,536 numbers are within a quarter is 1 in 10^21.
        assert max(ids) - min(ids) > 16384

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6")
    def test_server_is_asked_over_ipv6(self) -> None:
        def script(sock: socket.socket) -> None:
            asked, peer = sock.recvfrom(512)
            sock.sendto(answer_to(asked, RIGHT), peer)

        with udp_server(script, "::1") as address:
            (answer,) = udp_client(address).exchange([WWW], far_deadline())
        assert is_answer(answer, WWW, RIGHT)


class TestStream:
    def test_queries_over_tcp_are_sent_at_once_and_answered_in_any_order(self) -> None:
        def script(sock: socket.socket) -> None:
            first, second = read_framed(sock), read_framed(sock)
            assert (first[2:], second[2:]) == (WWW[2:], MAIL[2:])
            sock.sendall(framed(answer_to(second, RIGHT)) + framed(answer_to(first, RIGHT)))

        with server(script) as address:
            client = StreamServer("tcp", dial_to(address))
            answers = client.exchange([WWW, MAIL], far_deadline())
            client.close()
        assert answers == [answer_to(WWW, RIGHT), answer_to(MAIL, RIGHT)]

    def test_answer_over_tcp_may_come_byte_by_byte(self) -> None:
        def script(sock: socket.socket) -> None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in framed(answer_to(read_framed(sock), RIGHT)):
                sock.sendall(bytes((byte,)))

        with server(script) as address:
            client = StreamServer("tcp", dial_to(address))
            (answer,) = client.exchange([WWW], far_deadline())
            client.close()
        assert is_answer(answer, WWW, RIGHT)

    @pytest.mark.parametrize(
        "reply",
        [
            lambda asked: framed(answer_to(asked, WRONG, id=int.from_bytes(asked[:2], "big") ^ 1)),
            lambda asked: framed(answer_to(asked[:12] + question("evil.example"), WRONG)),
            lambda asked: framed(answer_to(asked, RIGHT))[:-1],
            lambda asked: framed(answer_to(asked, RIGHT))[:1],
            lambda asked: framed(b""),
            lambda asked: framed(b"\xff" * 40),
            lambda asked: b"",
        ],
        ids=[
            "another id",
            "another name",
            "closed within",
            "closed within its length",
            "empty",
            "garbage",
            "closed",
        ],
    )
    def test_message_over_tcp_that_is_no_answer_is_an_error(
        self, reply: Callable[[bytes], bytes]
    ) -> None:
        with (
            server(lambda sock: sock.sendall(reply(read_framed(sock)))) as address,
            pytest.raises(ServerError, match="^tcp: "),
        ):
            StreamServer("tcp", dial_to(address)).exchange([WWW], far_deadline())

    def test_exchange_over_tcp_ends_with_its_deadline(self) -> None:
        with server(read_to_end) as address, pytest.raises(ServerError, match="out of time"):
            StreamServer("tcp", dial_to(address)).exchange([WWW], time.monotonic() + 0.05)

    def test_answer_byte_by_byte_ends_with_the_deadline(self) -> None:
        def script(sock: socket.socket) -> None:
            read_framed(sock)
            try:
                while True:
                    sock.sendall(b"\xff")
                    time.sleep(0.005)
            except OSError:
                pass

        with server(script) as address, pytest.raises(ServerError, match="out of time"):
            StreamServer("tcp", dial_to(address)).exchange([WWW], time.monotonic() + 0.1)

    def test_ids_over_tcp_are_random(self) -> None:
        ids: list[bytes] = []

        def reply(asked: bytes) -> bytes:
            ids.append(asked[:2])
            return answer_to(asked)

        with server(serve(reply)) as address:
            client = StreamServer("tcp", dial_to(address))
            for _ in range(20):
                client.exchange([WWW], far_deadline())
            client.close()
        assert len(set(ids)) > 15


class TestKeptConnections:
    def test_connection_is_kept_for_the_next_exchange(self) -> None:
        with server(serve()) as address:
            dialled = RecordedDials(address)
            client = StreamServer("tcp", dialled.dial)
            for _ in range(3):
                client.exchange([WWW], far_deadline())
            client.close()
        assert len(dialled.streams) == 1

    def test_kept_connection_that_the_server_closed_is_replaced(self) -> None:
        def once(sock: socket.socket) -> None:
            sock.sendall(framed(answer_to(read_framed(sock), RIGHT)))

        with server(once) as address:
            client = StreamServer("tcp", dial_to(address))
            for _ in range(3):
                assert is_answer(client.exchange([WWW], far_deadline())[0], WWW, RIGHT)
            client.close()

    def test_kept_connection_that_is_silent_is_replaced_in_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A NAT that has forgotten a connection does not say so."""
        monkeypatch.setattr(
            servers_module, "share_of_time", lambda deadline, attempts: time.monotonic() + 0.05
        )

        def once(sock: socket.socket) -> None:
            sock.sendall(framed(answer_to(read_framed(sock), RIGHT)))
            read_to_end(sock)

        with server(once) as address:
            client = StreamServer("tcp", dial_to(address))
            for _ in range(2):
                assert is_answer(client.exchange([WWW], far_deadline())[0], WWW, RIGHT)
            client.close()

    def test_no_connection_is_dialled_after_the_deadline(self) -> None:
        def never(deadline: float) -> Stream:
            raise AssertionError("dialled")

        with pytest.raises(ServerError, match="no answer"):
            StreamServer("tcp", never).exchange([WWW], time.monotonic())

    def test_only_a_few_connections_are_kept(self) -> None:
        together = threading.Barrier(IDLE_KEPT + 2)

        def reply(asked: bytes) -> bytes:
            together.wait(SECONDS)
            return answer_to(asked)

        with server(serve(reply)) as address:
            dialled = RecordedDials(address)
            streams = dialled.streams
            client = StreamServer("tcp", dialled.dial)
            tasks = [Task(client.exchange, [WWW], far_deadline()) for _ in range(IDLE_KEPT + 2)]
            for task in tasks:
                task.result()
            assert sum(stream.open for stream in streams) == IDLE_KEPT
            client.close()
            assert not any(stream.open for stream in streams)

    def test_kept_connection_expires(self) -> None:
        with server(serve()) as address:
            dialled = RecordedDials(address)
            streams = dialled.streams
            client = NameServerGroup(
                [
                    udp_client(address, StreamServer("tcp", dialled.dial)),
                    StreamServer("tcp", dialled.dial),
                ]
            )
            client.servers[1].exchange([WWW], far_deadline())
            now = time.monotonic()
            assert client.expire(now) == [] and streams[0].open
            for close in client.expire(now + KEPT_SECONDS + 1):
                close()
            assert not streams[0].open
            assert client.expire(now + 2 * KEPT_SECONDS) == []
            client.servers[1].exchange([WWW], far_deadline())
            assert len(streams) == 2
            client.close()

    def test_connection_in_use_at_the_close_is_not_kept(self) -> None:
        asked, go_on = threading.Event(), threading.Event()

        def reply(query: bytes) -> bytes:
            asked.set()
            assert go_on.wait(SECONDS)
            return answer_to(query, RIGHT)

        with server(serve(reply)) as address:
            dialled = RecordedDials(address)
            streams = dialled.streams
            client = StreamServer("tcp", dialled.dial)
            task = Task(client.exchange, [WWW], far_deadline())
            assert asked.wait(SECONDS)
            client.close()
            go_on.set()
            assert is_answer(task.result()[0], WWW, RIGHT)
            assert not streams[0].open

    @pytest.mark.parametrize(
        "failure, message",
        [
            (DialError(Reason.REFUSED, "192.0.2.1:853"), "tcp: 192.0.2.1:853: connection refused"),
            (ProtocolError("TLS: no"), "tcp: TLS: no"),
        ],
    )
    def test_failed_dial_is_a_server_error(self, failure: Exception, message: str) -> None:
        def fail(deadline: float) -> Stream:
            raise failure

        with pytest.raises(ServerError) as caught:
            StreamServer("tcp", fail).exchange([WWW], far_deadline())
        assert str(caught.value) == message


def read_post(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return head and body of a request."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += read_exactly(sock, 1)
    size = next(
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length:")
    )
    return head, read_exactly(sock, size)


def response(
    body: bytes, *fields: bytes, status: bytes = b"200 OK", version: bytes = b"HTTP/1.1"
) -> bytes:
    """Return an HTTP response."""
    return b"\r\n".join(
        [version + b" " + status, b"Content-Length: %d" % len(body), *fields, b"", body]
    )


def https(address: Address, host: str = "dns.example", path: str = "/dns-query") -> HttpsServer:
    """Return an HTTPS client that connects without TLS."""
    return HttpsServer("https", dial_to(address), host, path)


class TestHttps:
    def test_https_posts_a_message_with_id_zero(self) -> None:
        heads: list[tuple[bytes, bytes]] = []

        def script(sock: socket.socket) -> None:
            heads.append(read_post(sock))
            sock.sendall(
                response(answer_to(heads[0][1], RIGHT), b"Content-Type: application/dns-message")
            )

        with server(script) as address:
            client = https(address, "dns.example:8443", "/q?a=b")
            (answer,) = client.exchange([WWW], far_deadline())
            client.close()
        assert is_answer(answer, WWW, RIGHT)
        ((head, body),) = heads
        assert body == b"\0\0" + WWW[2:]
        assert head.split(b"\r\n") == [
            b"POST /q?a=b HTTP/1.1",
            b"Host: dns.example:8443",
            b"Accept: application/dns-message",
            b"Content-Type: application/dns-message",
            b"Content-Length: %d" % len(WWW),
            b"",
            b"",
        ]

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda body: (
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                + b"5;x=y\r\n"
                + body[:5]
                + b"\r\n%x\r\n" % (len(body) - 5)
                + body[5:]
                + b"\r\n0\r\nTrailer: x\r\n\r\n"
            ),
            lambda body: (
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
                + response(body)
            ),
            lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body,
            lambda body: response(body, b"Connection: close"),
            lambda body: response(body, version=b"HTTP/1.0"),
        ],
        ids=["chunked", "1xx", "until the close", "close", "HTTP/1.0"],
    )
    def test_https_answer_may_have_any_framing(self, wrap: Callable[[bytes], bytes]) -> None:
        """The server closes after each response: two queries need two connections."""

        def script(sock: socket.socket) -> None:
            sock.sendall(wrap(answer_to(read_post(sock)[1], RIGHT)))

        with server(script) as address:
            client = https(address)
            answers = client.exchange([WWW, MAIL], far_deadline())
            client.close()
        assert answers == [answer_to(WWW, RIGHT), answer_to(MAIL, RIGHT)]

    def test_https_connection_is_kept_for_the_next_query(self) -> None:
        connections: list[socket.socket] = []

        def script(sock: socket.socket) -> None:
            connections.append(sock)
            for _ in range(4):
                sock.sendall(response(answer_to(read_post(sock)[1], RIGHT)))
            read_to_end(sock)

        with server(script) as address:
            client = https(address)
            for _ in range(2):
                client.exchange([WWW, MAIL], far_deadline())
            client.close()
        assert len(connections) == 1

    @pytest.mark.parametrize(
        "reply, message",
        [
            (lambda asked: response(b"no", status=b"404 Not Found"), "answered 404"),
            (
                lambda asked: response(answer_to(asked), status=b"429 Too Many Requests"),
                "answered 429",
            ),
            (lambda asked: response(b"", b"Location: /", status=b"301 Moved"), "answered 301"),
            (lambda asked: response(b"<html>hello</html>"), "the answer is to another question"),
            (
                lambda asked: response(answer_to(asked, WRONG, id=7)),
                "the answer is to another question",
            ),
            (
                lambda asked: response(answer_to(asked[:12] + question("evil.example"), WRONG)),
                "the answer is to another question",
            ),
            (lambda asked: response(b"x" * 65536), "the answer is too long"),
            (
                lambda asked: (
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
                    + b"10000\r\n"
                    + b"x" * 65536
                    + b"\r\n"
                ),
                "the answer is too long",
            ),
            (lambda asked: b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 70000, "the answer is too long"),
            (lambda asked: response(answer_to(asked))[:-1], "closed"),
            (lambda asked: b"SSH-2.0-OpenSSH\r\n", ""),
            (lambda asked: b"", "closed"),
        ],
        ids=[
            "404",
            "429",
            "301",
            "a page",
            "another id",
            "another name",
            "too long",
            "too long in chunks",
            "too long to the close",
            "closed within",
            "no HTTP",
            "closed",
        ],
    )
    def test_https_response_that_is_no_answer_is_an_error(
        self, reply: Callable[[bytes], bytes], message: str
    ) -> None:
        with (
            server(lambda sock: sock.sendall(reply(read_post(sock)[1]))) as address,
            pytest.raises(ServerError) as caught,
        ):
            https(address).exchange([WWW], far_deadline())
        assert str(caught.value).startswith("https: ") and message in str(caught.value)

    def test_endless_informational_responses_end_with_the_deadline(self) -> None:
        def script(sock: socket.socket) -> None:
            read_post(sock)
            try:
                while True:
                    sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    time.sleep(0.005)
            except OSError:
                pass

        with server(script) as address, pytest.raises(ServerError, match="out of time"):
            https(address).exchange([WWW], time.monotonic() + 0.1)


def test_exchanges_with_one_server_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two exchanges with one server run at once."""
    asked, go_on = threading.Event(), threading.Event()

    def reply(query: bytes) -> bytes:
        if question_of(query) == question_of(WWW):
            asked.set()
            assert go_on.wait(SECONDS)
        return answer_to(query, RIGHT)

    with server(serve(reply)) as address:
        client = StreamServer("tcp", dial_to(address))
        slow = Task(client.exchange, [WWW], far_deadline())
        assert asked.wait(SECONDS)
        assert is_answer(client.exchange([MAIL], far_deadline())[0], MAIL, RIGHT)
        assert not slow.done
        go_on.set()
        slow.result()
        client.close()
    wait_until(lambda: slow.done)
