"""TCP through an HTTP proxy with CONNECT, against scripted servers on loopback."""

from __future__ import annotations

import base64
import socket
import time
from typing import Callable

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.net.stream import complete
from tests.support.doubles import Counts
from tests.support.flows import tcp_to
from tests.support.sockets import SECONDS, nothing_comes, read_to_end, server

TARGET = Address("example.com", 443)
REQUEST = b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
OK = b"HTTP/1.1 200 Connection established\r\n\r\n"


def dialer(
    server: Address,
    direct: DirectDialer,
    seconds: float = SECONDS,
    user: str = "",
    password: str = "",
    udp: bool = True,
) -> HttpDialer:
    url = f"http://{server}"
    return HttpDialer(Hop(url, url, server, direct, seconds, user, password), Counts(), udp)


def failure(dialer: HttpDialer, target: Address = TARGET) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial(tcp_to(target))
    return caught.value


def head(sock: socket.socket) -> bytes:
    """Read a request up to the empty line."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += sock.recv(1)
    return data


def answer(
    data: bytes, wanted: bytes = REQUEST, step: int = 0, stay: bool = True
) -> Callable[[socket.socket], None]:
    """Return a script that answers a request, `step` bytes at a time (0: at once)."""

    def script(sock: socket.socket) -> None:
        assert head(sock) == wanted
        # RFC 9931: nothing may follow the request before the answer.
        assert nothing_comes(sock, 0.01)
        for at in range(0, len(data), step or len(data) or 1):
            sock.sendall(data[at : at + (step or len(data))])
        if stay:
            read_to_end(sock)

    return script


class TestConnect:
    @pytest.mark.parametrize("step", [0, 1])
    @pytest.mark.parametrize(
        "data",
        [
            OK,
            b"HTTP/1.0 200 OK\r\n\r\n",
            b"HTTP/1.1 200\r\n\r\n",
            b"HTTP/1.1 200 \r\n\r\n",
            b"HTTP/1.1 299 odd\r\nA: b\r\n\r\n",
            b"HTTP/1.1 200 OK\n\n",
            b"HTTP/1.1 200 OK\nA: b\n c\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + OK,
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        ],
    )
    def test_2xx_response_is_a_connection_whatever_its_fields(
        self, direct: DirectDialer, data: bytes, step: int
    ) -> None:
        """Hazards 61 and 62: a length has no meaning, and what follows is the target's."""
        with server(answer(data + b"first bytes", step=step)) as address:
            stream = dialer(address, direct).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(11)) == b"first bytes"
            stream.close()

    def test_ipv6_target_has_brackets_in_connect(self, direct: DirectDialer) -> None:
        wanted = b"CONNECT [2001:db8::1]:443 HTTP/1.1\r\nHost: [2001:db8::1]:443\r\n\r\n"
        with server(answer(OK, wanted)) as address:
            dialer(address, direct).dial(tcp_to(Address("2001:db8::1", 443))).close()

    @pytest.mark.parametrize(
        "user, password, encoded",
        [
            ("Aladdin", "open sesame", b"QWxhZGRpbjpvcGVuIHNlc2FtZQ=="),
            ("test", "123\u00a3", b"dGVzdDoxMjPCow=="),
            ("u", "x" * 255, base64.b64encode(b"u:" + b"x" * 255)),
        ],
    )
    def test_connect_has_basic_credentials(
        self, direct: DirectDialer, user: str, password: str, encoded: bytes
    ) -> None:
        """RFC 7617."""
        wanted = REQUEST[:-2] + b"Proxy-Authorization: Basic " + encoded + b"\r\n\r\n"
        with server(answer(OK, wanted)) as address:
            dialer(address, direct, user=user, password=password).dial(tcp_to(TARGET)).close()

    def test_stream_has_no_time_limit_after_connect(self, direct: DirectDialer) -> None:
        def script(sock: socket.socket) -> None:
            head(sock)
            sock.sendall(OK)
            time.sleep(0.3)
            sock.sendall(b"late")

        with server(script) as address:
            stream = dialer(address, direct, 0.2).dial(tcp_to(TARGET))
            assert complete(stream.read_exactly(4)) == b"late"
            stream.close()


class TestFailures:
    @pytest.mark.parametrize(
        "status, reason",
        [
            (b"300 Multiple Choices", Reason.GENERAL),
            (b"302 Found", Reason.GENERAL),
            (b"400 Bad Request", Reason.GENERAL),
            (b"403 Forbidden", Reason.DENIED),
            (b"404 Not Found", Reason.GENERAL),
            (b"407 Proxy Authentication Required", Reason.AUTHENTICATION),
            (b"500 Oops", Reason.GENERAL),
            (b"502 Bad Gateway", Reason.GENERAL),
            (b"503 Service Unavailable", Reason.GENERAL),
            (b"504 Gateway Timeout", Reason.TIMEOUT),
        ],
    )
    def test_refused_connect_has_a_reason_and_the_status_line(
        self, direct: DirectDialer, status: bytes, reason: Reason
    ) -> None:
        with server(
            answer(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nbody")
        ) as address:
            error = failure(dialer(address, direct))
        assert error.reason is reason
        where = "" if reason is Reason.AUTHENTICATION else f"{TARGET}: "
        assert (str(error), error.hop) == (
            f"http://{address}: {where}{status.decode().lower()}",
            f"http://{address}",
        )
        # All other reasons are about the target.
        assert error.upstream is (reason is Reason.AUTHENTICATION)

    @pytest.mark.parametrize(
        "data",
        [
            b"garbage\r\n\r\n",
            b"HTTP/2 200 OK\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"\x05\x00\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n",
            b"HTTP/1.1 000 x\r\n\r\n",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 501 + b"\r\n",
            b"HTTP/1.1 200 " + b"x" * 9000 + b"\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: " + b"x" * (1 << 20) + b"\r\n\r\n",
            b"\r\n",
        ],
        ids=lambda data: data[:20].decode("latin-1"),
    )
    def test_malformed_response_to_connect_is_a_protocol_error(
        self, direct: DirectDialer, data: bytes
    ) -> None:
        """Hazard 61.  One head has a megabyte."""
        with server(answer(data)) as address:
            error = failure(dialer(address, direct))
        assert error.reason is Reason.PROTOCOL
        assert str(error).startswith(f"http://{address}: ") and error.upstream

    @pytest.mark.parametrize("cut", [0, 1, 15, len(OK) - 1])
    def test_incomplete_response_to_connect_is_a_protocol_error(
        self, direct: DirectDialer, cut: int
    ) -> None:
        with server(answer(OK[:cut], stay=False)) as address:
            assert failure(dialer(address, direct)).reason is Reason.PROTOCOL

    def test_silent_http_proxy_is_a_timeout(self, direct: DirectDialer) -> None:
        with server(read_to_end) as address:
            error = failure(dialer(address, direct, 0.1))
        assert (error.reason, str(error), error.upstream) == (
            Reason.TIMEOUT,
            f"http://{address}: timed out",
            True,
        )

    def test_endless_interim_responses_end_with_the_time_limit(self, direct: DirectDialer) -> None:
        def script(sock: socket.socket) -> None:
            head(sock)
            while True:
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                time.sleep(0.002)

        with server(script) as address:
            assert failure(dialer(address, direct, 0.2)).reason is Reason.TIMEOUT

    def test_101_response_to_connect_is_a_protocol_error(self, direct: DirectDialer) -> None:
        with server(
            answer(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + b"\0\0", stay=False)
        ) as address:
            assert failure(dialer(address, direct)).reason is Reason.PROTOCOL

    def test_http_errors_contain_no_password(self, direct: DirectDialer) -> None:
        """Hazard 111."""

        def script(sock: socket.socket) -> None:
            head(sock)
            sock.sendall(b"HTTP/1.1 407 No\r\n\r\n")

        with server(script) as address:
            http = dialer(address, direct, user="user", password="hunter2")
            error = failure(http)
        assert "hunter2" not in f"{error} {error!r} {http.name} {http!r}"


def test_http_upstream_carries_udp_to_one_target_a_connection(direct: DirectDialer) -> None:
    http = dialer(Address("192.0.2.1", 3128), direct)
    assert http.carries == {"tcp", "udp"} and http.symmetric


def test_http_upstream_without_udp_says_so(direct: DirectDialer) -> None:
    http = dialer(Address("192.0.2.1", 3128), direct, udp=False)
    assert http.carries == {"tcp"}
    with pytest.raises(DialError) as caught:
        http.dial_packet(Flow("udp", TARGET, TARGET, "main", ""))
    assert caught.value.reason is Reason.UNSUPPORTED
    assert str(caught.value).startswith("http://192.0.2.1:3128 carries no UDP")
