"""UDP over TCP through a proxy, against scripted SOCKS and HTTP servers on loopback."""

from __future__ import annotations

import errno
import select
import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.dialer.socks4 import Socks4Dialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.uot import UotDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena
from netproxy.net.frames.framed import FramedConn
from tests.dialer.doubles import make_factory
from tests.support.batches import cut, receive
from tests.support.doubles import Counts, no_packets
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import SECONDS, Task, read_exactly, read_to_end, refusing, reset, server

TARGET = Address("198.51.100.7", 9000)
NAME = Address("game.test", 9000)
MAGIC = b"sp.v2.udp-over-tcp.arpa"
GREETING, METHOD = b"\5\1\0", b"\5\0"
SOCKS5 = b"\5\1\0\3\x17" + MAGIC + b"\1\xbb"
SOCKS5_DONE = b"\5\0\0\1" + bytes(6)
SOCKS4A = b"\4\1\1\xbb\0\0\0\1\0" + MAGIC + b"\0"
SOCKS4_DONE = b"\0\x5a" + bytes(6)
CONNECT = b"CONNECT %b:443 HTTP/1.1\r\nHost: %b:443\r\n\r\n" % (MAGIC, MAGIC)
CONNECT_DONE = b"HTTP/1.1 200 OK\r\n\r\n"
UOT = b"\0\1\xc6\x33\x64\7\x23\x28"
"""The request: not connected, TARGET as a hint."""
UOT_NAME = b"\0\3\x09game.test\x23\x28"
FRAME = b"\0\xc6\x33\x64\7\x23\x28"
"""TARGET, as it precedes a datagram."""
OTHER = b"\0\xc0\0\2\x05\0\x35"
"""The same of 192.0.2.5:53."""
FRAME_NAME = b"\2\x09game.test\x23\x28"


class NoLookups:
    """A TargetResolver that must not be used."""

    def addresses(self, flow: Flow, seconds: float = 0.0) -> list[Address]:
        raise AssertionError(f"{flow.target} was looked up here")


def hop(address: Address, via: DirectDialer, **login: str) -> Hop:
    return Hop(
        "far",
        f"'far' ({address})",
        address,
        via,
        2.0,
        login.get("user", ""),
        login.get("password", ""),
    )


def by_socks5(address: Address, via: DirectDialer, counts: Counts, **login: str) -> UotDialer:
    """Return what the factory builds for socks5, which resolves other names here."""
    proxy = hop(address, via, **login)
    target_resolver: Any = NoLookups()
    return UotDialer(
        Socks5Dialer(proxy, target_resolver, no_packets()),
        Socks5Dialer(proxy, None, no_packets(), False),
        counts,
    )


def by_socks4(address: Address, via: DirectDialer, counts: Counts) -> UotDialer:
    target_resolver: Any = NoLookups()
    return UotDialer(
        Socks4Dialer(hop(address, via), target_resolver),
        Socks4Dialer(hop(address, via), None),
        counts,
    )


def by_http(address: Address, via: DirectDialer, counts: Counts, **login: str) -> UotDialer:
    proxy = hop(address, via, **login)
    return UotDialer(HttpDialer(proxy, counts), HttpDialer(proxy, counts, False), counts)


SCRIPTS: dict[Any, tuple[bytes, ...]] = {
    by_socks5: (GREETING, METHOD, SOCKS5, SOCKS5_DONE),
    by_socks4: (SOCKS4A, SOCKS4_DONE),
    by_http: (CONNECT, CONNECT_DONE),
}
each_proxy = pytest.mark.parametrize("through", list(SCRIPTS))


def play(
    *steps: bytes, end: Callable[[socket.socket], Any] = read_to_end
) -> Callable[[socket.socket], None]:
    """Return a script: in turn, what the client must send and what it gets.

    `end` reads the rest and must return nothing.
    """

    def script(sock: socket.socket) -> None:
        for number, data in enumerate(steps):
            if number % 2 == 0:
                assert read_exactly(sock, len(data)) == data
            else:
                sock.sendall(data)
        assert not end(sock)

    return script


def send(conn: FramedConn, target: Address, *payloads: bytes) -> None:
    """Send payloads as one run."""
    arena, offsets = Arena(), []
    for number, payload in enumerate(payloads):
        arena.view[number * 100 : number * 100 + len(payload)] = payload
        offsets.append(number * 100)
    conn.send(
        arena, Run(offsets, len(payloads[0]), len(payloads[-1])), conn.prepare(udp_to(target))
    )


def failure(dialer: UotDialer) -> DialError:
    """Dial and return the error."""
    with pytest.raises(DialError) as caught:
        dialer.dial_packet(udp_to(TARGET))
    return caught.value


@pytest.fixture
def counts() -> Counts:
    return Counts()


@pytest.fixture(autouse=True)
def no_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"{arguments} was looked up here")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)


class TestBytes:
    @each_proxy
    def test_datagrams_go_both_ways_over_one_stream(
        self, through: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        """The magic name goes to the proxy unresolved, then a request, then frames."""
        steps = (
            *SCRIPTS[through],
            UOT + FRAME + b"\0\3abc",
            FRAME + b"\0\3cba",
            FRAME + b"\0\0" + OTHER + b"\0\2de",
            OTHER + b"\0\2ed",
        )
        with server(play(*steps)) as address:
            conn = through(address, direct, counts).dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"abc")
            assert receive(conn, 1) == [(b"cba", TARGET)]
            send(conn, TARGET, b"")
            send(conn, Address("192.0.2.5", 53), b"de")
            assert receive(conn, 1) == [(b"ed", Address("192.0.2.5", 53))]
            conn.close()
        assert counts.counts == {}

    @each_proxy
    def test_nothing_is_sent_before_the_proxy_has_accepted(
        self, through: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        """Hazard 60; RFC 9931.  After the refusal no byte may come before the end."""
        refusals = {
            by_socks5: b"\5\2\0\1" + bytes(6),
            by_socks4: b"\0\x5b" + bytes(6),
            by_http: b"HTTP/1.1 403 No\r\n\r\n",
        }
        with server(play(*SCRIPTS[through][:-1], refusals[through])) as address:
            failure(through(address, direct, counts))

    @each_proxy
    def test_target_name_goes_to_the_proxy_unresolved(
        self, through: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        with server(
            play(*SCRIPTS[through], UOT_NAME + FRAME_NAME + b"\0\3abc" + FRAME_NAME + b"\0\1d")
        ) as address:
            conn = through(address, direct, counts).dial_packet(udp_to(NAME))
            send(conn, NAME, b"abc", b"d")
            conn.close()

    def test_ipv6_target_over_tcp(self, direct: DirectDialer, counts: Counts) -> None:
        packed = b"\x20\1\x0d\xb8" + bytes(11) + b"\1\x23\x28"
        with server(
            play(*SCRIPTS[by_socks5], b"\0\4" + packed + b"\1" + packed + b"\0\1a")
        ) as address:
            target = Address("2001:db8::1", 9000)
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(target))
            send(conn, target, b"a")
            conn.close()

    @each_proxy
    def test_frames_in_the_segment_of_the_reply_are_received(
        self, through: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        """Hazard 62."""
        *steps, done = SCRIPTS[through]
        with server(play(*steps, done + FRAME + b"\0\5early", UOT)) as address:
            conn = through(address, direct, counts).dial_packet(udp_to(TARGET))
            assert receive(conn, 1) == [(b"early", TARGET)]
            conn.close()

    def test_carrier_logs_in_with_username_and_password(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with server(
            play(b"\5\1\2", b"\5\2", b"\1\4user\6secret", b"\1\0", SOCKS5, SOCKS5_DONE, UOT)
        ) as address:
            by_socks5(address, direct, counts, user="user", password="secret").dial_packet(
                udp_to(TARGET)
            ).close()
        wanted = CONNECT[:-2] + b"Proxy-Authorization: Basic dXNlcjpzZWNyZXQ=\r\n\r\n"
        with server(play(wanted, CONNECT_DONE, UOT)) as address:
            by_http(address, direct, counts, user="user", password="secret").dial_packet(
                udp_to(TARGET)
            ).close()

    def test_one_stream_carries_all_targets_of_a_client(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        """Hazard 31."""
        connections: list[Any] = []

        def script(sock: socket.socket) -> None:
            connections.append(sock)
            play(
                *SCRIPTS[by_socks5],
                UOT + b"".join(b"\0\xc0\0\2" + bytes((n,)) + b"\0\x35\0\1x" for n in range(100)),
            )(sock)

        with server(script) as address:
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(TARGET))
            for number in range(100):
                send(conn, Address(f"192.0.2.{number}", 53), b"x")
            conn.close()
        assert len(connections) == 1


class TestFailures:
    @pytest.mark.parametrize(
        "code, said",
        [
            (1, "failed"),
            (3, "network unreachable"),
            (4, "host unreachable"),
            (5, "connection refused"),
        ],
    )
    def test_socks5_proxy_without_uot_is_named(
        self, direct: DirectDialer, counts: Counts, code: int, said: str
    ) -> None:
        with server(
            play(GREETING, METHOD, SOCKS5, b"\5" + bytes((code,)) + b"\0\1" + bytes(6))
        ) as address:
            error = failure(by_socks5(address, direct, counts))
        assert str(error) == f"'far' ({address}): UDP over TCP is not supported ({said})"

    def test_socks4_proxy_without_uot_is_named(self, direct: DirectDialer, counts: Counts) -> None:
        with server(play(SOCKS4A, b"\0\x5b" + bytes(6))) as address:
            error = failure(by_socks4(address, direct, counts))
        assert str(error).startswith(f"'far' ({address}): UDP over TCP is not supported (")

    @pytest.mark.parametrize(
        "status", ["404 Not Found", "500 Oops", "502 Bad Gateway", "503 Service Unavailable"]
    )
    def test_http_proxy_without_uot_is_named(
        self, direct: DirectDialer, counts: Counts, status: str
    ) -> None:
        with server(
            play(CONNECT, f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        ) as address:
            error = failure(by_http(address, direct, counts))
        assert str(error) == f"'far' ({address}): UDP over TCP is not supported ({status.lower()})"
        assert error.reason is Reason.GENERAL

    @pytest.mark.parametrize(
        "code, reason", [(2, Reason.DENIED), (6, Reason.TIMEOUT), (7, Reason.UNSUPPORTED)]
    )
    def test_refusal_for_another_reason_keeps_its_words(
        self, direct: DirectDialer, counts: Counts, code: int, reason: Reason
    ) -> None:
        with server(
            play(GREETING, METHOD, SOCKS5, b"\5" + bytes((code,)) + b"\0\1" + bytes(6))
        ) as address:
            error = failure(by_socks5(address, direct, counts))
        assert error.reason is reason
        assert str(error).startswith(f"'far' ({address}): ") and "UDP over TCP" not in str(error)

    def test_refused_connection_to_the_proxy_is_its_fault(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with refusing() as address:
            error = failure(by_socks5(address, direct, counts))
        assert (error.reason, error.upstream) == (Reason.REFUSED, True)
        assert str(error) == f"'far' ({address}): connection refused"

    @pytest.mark.parametrize(
        "through, answer",
        [(by_socks5, b"\5\xff"), (by_http, b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")],
    )
    def test_uot_errors_contain_no_password(
        self, direct: DirectDialer, counts: Counts, through: Any, answer: bytes
    ) -> None:
        """Hazard 111."""

        def script(sock: socket.socket) -> None:
            sock.recv(4096)
            sock.sendall(answer)
            read_to_end(sock)

        with server(script) as address:
            uot = through(address, direct, counts, user="user", password="hunter2")
            error = failure(uot)
        assert error.reason is Reason.AUTHENTICATION
        shown = f"{error} {error!r} {uot.name} {uot!r}"
        assert not any(secret in shown for secret in ("hunter2", "dXNlcjpodW50ZXIy"))

    @each_proxy
    def test_proxy_that_closes_early_is_a_protocol_error(
        self, through: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        with server(play(*SCRIPTS[through][:-1], b"", end=lambda sock: None)) as address:
            error = failure(through(address, direct, counts))
        assert (error.reason, error.upstream) == (
            Reason.PROTOCOL,
            True,
        ) and "UDP over TCP" not in str(error)

    def test_stream_that_ends_drops_and_counts_datagrams(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        """Hazard 48."""
        with server(play(*SCRIPTS[by_socks5], UOT + FRAME + b"\0\1a", end=reset)) as address:
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"a")
            while not conn.ended:
                assert Task(conn.wait).result()
                assert cut(conn.receive(Arena())) == []
            send(conn, TARGET, b"b")
            conn.close()
        assert counts.counts == {("drops", "upstream closed"): 1}

    def test_malformed_frame_ends_the_connection_and_is_counted(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        *steps, done = SCRIPTS[by_socks5]
        with server(play(*steps, done + FRAME + b"\0\4good" + b"\3\0", UOT)) as address:
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(TARGET))
            assert receive(conn, 1) == [(b"good", TARGET)]
            assert conn.ended
            conn.close()
        assert counts.counts == {("drops", "malformed"): 1}

    def test_missing_descriptor_is_a_dial_error_and_closes_the_stream(
        self, direct: DirectDialer, counts: Counts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazard 92.  The stream to the proxy is closed."""
        closed = threading.Event()

        def script(sock: socket.socket) -> None:
            play(*SCRIPTS[by_http], UOT)(sock)
            closed.set()

        def none_left(*_: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        with server(script) as address:
            monkeypatch.setattr(select, "epoll", none_left)
            error = failure(by_http(address, direct, counts))
            assert closed.wait(SECONDS)
        assert error.reason is Reason.GENERAL


class TestShape:
    def test_uot_upstream_carries_udp_whatever_the_proxy_does(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        uot = by_http(Address("192.0.2.1", 3128), direct, counts)
        assert (uot.name, uot.carries, uot.symmetric) == ("far", {"tcp", "udp"}, False)
        assert by_socks4(Address("192.0.2.1", 1080), direct, counts).carries == {"tcp", "udp"}

    def test_tcp_of_a_uot_upstream_uses_no_uot(self, direct: DirectDialer, counts: Counts) -> None:
        wanted = b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n"
        with server(play(wanted, CONNECT_DONE)) as address:
            by_http(address, direct, counts).dial(tcp_to(Address("a.test", 443))).close()

    @pytest.mark.parametrize(
        "scheme, through",
        [
            ("socks5", by_socks5),
            ("socks5h", by_socks5),
            ("socks4", by_socks4),
            ("socks4a", by_socks4),
            ("http", by_http),
        ],
    )
    def test_factory_builds_uot_for_every_scheme(
        self, target_resolver: TargetResolver, counts: Counts, scheme: str, through: Any
    ) -> None:
        """Whatever the scheme does with other names, the magic name is never looked up here."""
        with server(play(*SCRIPTS[through], UOT + FRAME + b"\0\1a")) as address:
            config = UpstreamConfig((HopConfig(scheme, address, udp="uot"),), "")
            uot = make_factory(target_resolver).dialer(config)
            assert "udp" in uot.carries
            conn: Any = uot.dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"a")
            conn.close()
