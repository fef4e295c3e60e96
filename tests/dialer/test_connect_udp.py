"""UDP through an HTTP proxy with connect-udp (RFC 9298), against scripted servers on loopback."""

from __future__ import annotations

import base64
import errno
import select
import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import Arena
from tests.support.batches import cut, receive
from tests.support.doubles import Counts
from tests.support.flows import udp_to
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    nothing_comes,
    read_exactly,
    read_to_end,
    refusing,
    reset,
    server,
)

TARGET = Address("192.0.2.6", 443)
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
    b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
)
LABEL = "hop 2 of 'office' (http://proxy.test:3128)"


def request(server: Address, path: bytes = b"192.0.2.6/443", authorization: bytes = b"") -> bytes:
    """Return all bytes that a client may send before the response."""
    return (
        b"GET /.well-known/masque/udp/%b/ HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\n"
        b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n%b\r\n"
    ) % (path, str(server).encode(), authorization)


def dialer(
    server: Address,
    via: DirectDialer,
    counts: Counts,
    user: str = "",
    password: str = "",
    seconds: float = SECONDS,
) -> HttpDialer:
    return HttpDialer(Hop("office", LABEL, server, via, seconds, user, password), counts)


def head(sock: socket.socket) -> bytes:
    """Read a request up to the empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def answers(
    data: bytes,
    *,
    step: int = 0,
    heads: list[bytes] | None = None,
    then: Callable[[socket.socket], Any] = read_to_end,
) -> Callable[[socket.socket], None]:
    """Return a script that answers one request, `step` bytes at a time (0: at once).

    `then` does the rest of the connection; it returns what it received and must not.
    """

    def script(sock: socket.socket) -> None:
        received = head(sock)
        if heads is not None:
            heads.append(received)
        # RFC 9931: nothing may follow the request before the response.
        assert nothing_comes(sock, 0.01)
        for at in range(0, len(data), step or max(1, len(data))):
            sock.sendall(data[at : at + (step or len(data))])
        assert not then(sock)

    return script


def failure(http: HttpDialer, target: Address = TARGET) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        http.dial_packet(udp_to(target))
    return caught.value


@pytest.fixture
def counts() -> Counts:
    return Counts()


class TestRequest:
    @pytest.mark.parametrize(
        "target, path",
        [
            (TARGET, b"192.0.2.6/443"),
            (Address("2001:db8::42", 443), b"2001%3Adb8%3A%3A42/443"),
            (Address("game.test", 65535), b"game.test/65535"),
            (Address("a_b-c.test", 1), b"a_b-c.test/1"),
        ],
        ids=str,
    )
    def test_request_byte_for_byte(
        self, direct: DirectDialer, counts: Counts, target: Address, path: bytes
    ) -> None:
        """A name goes to the proxy unresolved."""
        heads: list[bytes] = []
        with server(answers(ACCEPTED, heads=heads)) as address:
            dialer(address, direct, counts).dial_packet(udp_to(target)).close()
        assert heads == [request(address, path)]

    @pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")
    def test_proxy_at_an_ipv6_address_has_brackets_in_the_host_field(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        heads: list[bytes] = []
        with server(answers(ACCEPTED, heads=heads), "::1") as address:
            dialer(address, direct, counts).dial_packet(udp_to(TARGET)).close()
        assert heads == [request(address)] and b"\r\nHost: [::1]:%d\r\n" % address.port in heads[0]

    @pytest.mark.parametrize(
        "user, password, encoded",
        [
            ("Aladdin", "open sesame", b"QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ("test", "123\u00a3", b"dGVzdDoxMjPCow=="),
            ("u", "x" * 255, base64.b64encode(b"u:" + b"x" * 255)),
            ("u", "", b"dTo="),
        ],
    )
    def test_request_has_basic_credentials(
        self, direct: DirectDialer, counts: Counts, user: str, password: str, encoded: bytes
    ) -> None:
        """RFC 7617."""
        heads: list[bytes] = []
        with server(answers(ACCEPTED, heads=heads)) as address:
            dialer(address, direct, counts, user, password).dial_packet(udp_to(TARGET)).close()
        assert heads == [
            request(address, authorization=b"Proxy-Authorization: Basic " + encoded + b"\r\n")
        ]

    def test_connect_udp_has_one_target_a_connection(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        http = dialer(Address("192.0.2.1", 3128), direct, counts)
        assert (http.carries, http.symmetric) == ({"tcp", "udp"}, True)

    def test_upstream_without_udp_sends_no_request(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with refusing() as address:
            http = HttpDialer(Hop("office", LABEL, address, direct, 2.0), counts, udp=False)
            error = failure(http)
        assert http.carries == {"tcp"}
        assert (error.reason, str(error)) == (Reason.UNSUPPORTED, f"{LABEL} carries no UDP")


class TestDatagrams:
    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize(
        "data",
        [
            ACCEPTED,
            b"HTTP/1.1 101\r\nconnection: upgrade\r\nupgrade: Connect-UDP\r\n\r\n",
            b"HTTP/1.1 101 OK\r\nConnection: keep-alive, Upgrade\r\nUpgrade: connect-udp\r\n"
            b"Server: x\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" + ACCEPTED,
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + ACCEPTED,
        ],
    )
    def test_capsules_in_the_segment_of_the_response_are_delivered(
        self, direct: DirectDialer, counts: Counts, data: bytes, step: int
    ) -> None:
        """Hazard 62, whatever else the response says."""
        with server(answers(data + b"\0\6\0early" + b"\0\3\0la", step=step)) as address:
            conn = dialer(address, direct, counts).dial_packet(udp_to(TARGET))
            assert receive(conn, 2) == [(b"early", TARGET), (b"la", TARGET)]
            conn.close()

    def test_datagrams_go_both_ways_in_capsules(self, direct: DirectDialer, counts: Counts) -> None:
        def exchange(sock: socket.socket) -> None:
            wanted = b"\0\4\0abc" + b"\0\4\0def" + b"\0\2\0g" + b"\0\1\0"
            assert read_exactly(sock, len(wanted)) == wanted
            sock.sendall(b"\0\4\0cba" + b"\x17\2no" + b"\0\3\2no" + b"\0\1\0" + b"\0\4\0fed")
            assert read_to_end(sock) == b""

        with server(answers(ACCEPTED, then=exchange)) as address:
            conn = dialer(address, direct, counts).dial_packet(udp_to(TARGET))
            arena, destination = Arena(), conn.prepare(udp_to(TARGET))
            arena.view[:7] = b"abcdefg"
            conn.send(arena, Run([0, 3, 6], 3, 1), destination)
            conn.send(arena, Run([0], 0, 0), destination)
            assert receive(conn, 3) == [(b"cba", TARGET), (b"", TARGET), (b"fed", TARGET)]
            conn.close()
        assert counts.counts == {("drops", "unknown context"): 1}

    def test_connection_refuses_another_target(self, direct: DirectDialer, counts: Counts) -> None:
        with server(answers(ACCEPTED)) as address:
            conn = dialer(address, direct, counts).dial_packet(udp_to(TARGET))
            with pytest.raises(DialError) as caught:
                conn.prepare(udp_to(TARGET._replace(port=444)))
            assert caught.value.reason is Reason.UNSUPPORTED
            conn.close()

    def test_packet_connection_has_no_time_limit(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        """The handshake had 0.1 seconds."""

        def late(sock: socket.socket) -> None:
            assert nothing_comes(sock, 0.15)
            sock.sendall(b"\0\5\0late")
            assert read_to_end(sock) == b""

        with server(answers(ACCEPTED, then=late)) as address:
            conn = dialer(address, direct, counts, seconds=0.1).dial_packet(udp_to(TARGET))
            assert receive(conn, 1) == [(b"late", TARGET)]
            conn.close()

    @pytest.mark.parametrize("end", [reset, lambda sock: None], ids=["reset", "closed"])
    def test_connection_closed_by_the_proxy_drops_and_counts_datagrams(
        self, direct: DirectDialer, counts: Counts, end: Any
    ) -> None:
        """Hazard 48."""
        with server(answers(ACCEPTED, then=end)) as address:
            conn = dialer(address, direct, counts).dial_packet(udp_to(TARGET))
            while not conn.ended:
                assert Task(conn.wait).result()
                assert cut(conn.receive(Arena())) == []
            conn.send(Arena(), Run([0], 1, 1), conn.prepare(udp_to(TARGET)))
            conn.close()
        assert counts.counts == {("drops", "upstream closed"): 1}


class TestRefusals:
    @pytest.mark.parametrize(
        "answer, reason, said",
        [
            (b"404 Not Found\r\n", Reason.UNSUPPORTED, "404 not found"),
            (b"400 Bad Request\r\n", Reason.UNSUPPORTED, "400 bad request"),
            (b"501 Not Implemented\r\n", Reason.UNSUPPORTED, "501 not implemented"),
            (b"302 Found\r\nLocation: http://a.test/\r\n", Reason.UNSUPPORTED, "302 found"),
            (b"403 Forbidden\r\n", Reason.DENIED, "403 forbidden"),
            (b"504 Gateway Timeout\r\n", Reason.TIMEOUT, "504 gateway timeout"),
            (
                b"502 Bad Gateway\r\nProxy-Status: far; error=dns_error\r\n",
                Reason.NAME,
                "502 bad gateway (dns_error)",
            ),
            (
                b"502 Bad Gateway\r\nProxy-Status: far; error=dns_timeout\r\n",
                Reason.TIMEOUT,
                "502 bad gateway (dns_timeout)",
            ),
            (
                b"502 Bad Gateway\r\nProxy-Status: a, far; error=connection_refused; "
                b'details="x"\r\n',
                Reason.REFUSED,
                "502 bad gateway (connection_refused)",
            ),
            (
                b"502 Bad Gateway\r\nproxy-status: far;error=destination_ip_unroutable\r\n",
                Reason.HOST_UNREACHABLE,
                "502 bad gateway (destination_ip_unroutable)",
            ),
            (
                b"403 Forbidden\r\nProxy-Status: far; error=destination_ip_prohibited\r\n",
                Reason.DENIED,
                "403 forbidden (destination_ip_prohibited)",
            ),
            (
                b"502 Bad Gateway\r\nProxy-Status: far; error=proxy_loop_detected\r\n",
                Reason.LOOP,
                "502 bad gateway (proxy_loop_detected)",
            ),
            (
                b"503 Oops\r\nProxy-Status: far; error=something_new\r\n",
                Reason.UNSUPPORTED,
                "503 oops (something_new)",
            ),
        ],
        ids=lambda value: value.split(b"\r\n")[0].decode() if isinstance(value, bytes) else None,
    )
    def test_refusal_has_the_hops_label_a_reason_and_the_status_line(
        self, direct: DirectDialer, counts: Counts, answer: bytes, reason: Reason, said: str
    ) -> None:
        """Hazard 60: nothing follows the request, before the response or after it."""
        with server(answers(b"HTTP/1.1 " + answer + b"Content-Length: 4\r\n\r\nbody")) as address:
            error = failure(dialer(address, direct, counts))
        assert error.reason is reason
        assert str(error).startswith(f"{LABEL}: connect-udp to {TARGET}: {said}")
        # The response is about the target, or about what the proxy can do.
        assert not error.upstream

    @pytest.mark.parametrize("user", ["", "user"])
    def test_407_is_a_fault_of_the_upstream(
        self, direct: DirectDialer, counts: Counts, user: str
    ) -> None:
        data = (
            b"HTTP/1.1 407 Proxy Authentication Required\r\n"
            b'Proxy-Authenticate: Basic realm="x"\r\n\r\n'
        )
        with server(answers(data)) as address:
            error = failure(dialer(address, direct, counts, user, "hunter2" if user else ""))
        assert (error.reason, error.upstream) == (Reason.AUTHENTICATION, True)
        assert str(error) == f"{LABEL}: 407 proxy authentication required"

    @pytest.mark.parametrize(
        "data",
        [
            b"HTTP/1.1 407 No\r\n\r\n",
            b"HTTP/1.1 404 No\r\n\r\n",
            b"HTTP/1.1 502 No\r\nProxy-Status: a; error=dns_error\r\n\r\n",
            b"garbage\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"",
        ],
    )
    def test_connect_udp_errors_contain_no_password(
        self, direct: DirectDialer, counts: Counts, data: bytes
    ) -> None:
        """Hazard 111."""
        with server(answers(data, then=lambda sock: None)) as address:
            http = dialer(address, direct, counts, "user", "hunter2")
            error = failure(http)
        assert str(error).startswith(LABEL)
        shown = f"{error} {error!r} {error.__cause__!r} {http.name} {http!r}"
        assert not any(secret in shown for secret in ("hunter2", "dXNlcjpodW50ZXIy"))

    @pytest.mark.parametrize(
        "data",
        [
            ACCEPTED[:-2] + b"Content-Length: 0\r\n\r\n",
            ACCEPTED[:-2] + b"Content-Length: 5\r\n\r\nhello",
            ACCEPTED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
            ACCEPTED[:-2] + b"Content-Type: text/plain\r\n\r\n",
            ACCEPTED.replace(b"connect-udp", b"websocket"),
            ACCEPTED.replace(b"connect-udp", b"connect-udp, h2c"),
            ACCEPTED[:-2] + b"Upgrade: connect-udp\r\n\r\n",
            ACCEPTED.replace(b"Connection: Upgrade", b"Connection: close"),
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nUpgrade: connect-udp\r\nConnection: upgrade\r\n\r\n",
        ],
    )
    def test_response_that_does_not_switch_is_a_protocol_error(
        self, direct: DirectDialer, counts: Counts, data: bytes
    ) -> None:
        """RFC 9297 section 3.2: fields of a body make the response malformed."""
        with server(answers(data + b"\0\4\0abc")) as address:
            error = failure(dialer(address, direct, counts))
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
        said = f"the proxy did not switch to connect-udp: it answered {data[9:12].decode()}"
        assert str(error) == f"{LABEL}: connect-udp to {TARGET}: {said}"

    @pytest.mark.parametrize(
        "data",
        [
            b"garbage\r\n\r\n",
            b"HTTP/2 101 x\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"\x05\x00\r\n\r\n",
            b"HTTP/1.1 101 x\n\n",
            b"\r\n",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"HTTP/1.1 101 x\r\n" + b"A: b\r\n" * 101 + b"\r\n",
            b"HTTP/1.1 101 x\r\nA: " + b"x" * (1 << 17) + b"\r\n\r\n",
        ],
        ids=lambda data: data[:20].decode("latin-1"),
    )
    def test_malformed_response_is_a_protocol_error(
        self, direct: DirectDialer, counts: Counts, data: bytes
    ) -> None:
        """Hazard 61."""
        with server(answers(data)) as address:
            error = failure(dialer(address, direct, counts))
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True)
        assert str(error).startswith(f"{LABEL}: ")

    @pytest.mark.parametrize("cut", [0, 1, 15, len(ACCEPTED) - 1])
    def test_incomplete_response_is_a_protocol_error(
        self, direct: DirectDialer, counts: Counts, cut: int
    ) -> None:
        with server(answers(ACCEPTED[:cut], then=lambda sock: None)) as address:
            assert failure(dialer(address, direct, counts)).reason is Reason.PROTOCOL

    def test_silent_proxy_is_a_timeout(self, direct: DirectDialer, counts: Counts) -> None:
        with server(lambda sock: read_to_end(sock)) as address:
            error = failure(dialer(address, direct, counts, seconds=0.1))
        assert (error.reason, str(error), error.upstream) == (
            Reason.TIMEOUT,
            f"{LABEL}: connect-udp to {TARGET}: timed out",
            True,
        )

    def test_refused_connection_to_the_proxy_is_its_fault(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with refusing() as address:
            error = failure(dialer(address, direct, counts))
        assert (error.reason, str(error), error.upstream) == (
            Reason.REFUSED,
            f"{LABEL}: connection refused",
            True,
        )

    def test_missing_descriptor_is_a_dial_error_and_closes_the_stream(
        self, direct: DirectDialer, counts: Counts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 92.  The stream to the proxy is closed."""
        closed = threading.Event()

        def script(sock: socket.socket) -> None:
            answers(ACCEPTED)(sock)
            closed.set()

        def none_left(*_: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        with server(script) as address:
            monkeypatch.setattr(select, "epoll", none_left)
            error = failure(dialer(address, direct, counts))
            assert closed.wait(SECONDS)
        assert error.reason is Reason.GENERAL
