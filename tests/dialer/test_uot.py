"""UDP over TCP through another proxy, against scripted SOCKS and HTTP servers on loopback."""

from __future__ import annotations

import errno
import select
import socket
import threading
from typing import Any, Callable

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.factory import DialerFactory
from netproxy.dialer.hop import Hop
from netproxy.dialer.http import HttpDialer
from netproxy.dialer.socks4 import Socks4Dialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.uot import UotDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Run
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.datagram import Arena
from netproxy.net.framed import FramedConn
from tests.support.batches import cut, receive
from tests.support.doubles import Counts, Lines, no_services
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import Task, read_exactly, read_to_end, refusing, reset, server

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
UOT = b"\0\1\xc6\x33\x64\7\x23\x28"  # not connected; TARGET as a hint
UOT_NAME = b"\0\3\x09game.test\x23\x28"
FRAME = b"\0\xc6\x33\x64\7\x23\x28"  # TARGET before a datagram
OTHER = b"\0\xc0\0\2\x05\0\x35"  # 192.0.2.5:53
FRAME_NAME = b"\2\x09game.test\x23\x28"


class NoLookups:
    """A Resolver that must not be asked."""

    def resolve(self, target: Address, *_: Any) -> list[Address]:
        raise AssertionError(f"{target} was looked up here")


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
    """As the factory makes it for socks5, which otherwise resolves names here."""
    there = hop(address, via, **login)
    reach: Any = NoLookups()
    return UotDialer(
        Socks5Dialer(there, reach, no_services()),
        Socks5Dialer(there, None, no_services(), False),
        counts,
    )


def by_socks4(address: Address, via: DirectDialer, counts: Counts) -> UotDialer:
    reach: Any = NoLookups()
    return UotDialer(
        Socks4Dialer(hop(address, via), reach), Socks4Dialer(hop(address, via), None), counts
    )


def by_http(address: Address, via: DirectDialer, counts: Counts, **login: str) -> UotDialer:
    there = hop(address, via, **login)
    return UotDialer(HttpDialer(there, counts), HttpDialer(there, counts, False), counts)


SCRIPTS: dict[Any, tuple[bytes, ...]] = {
    by_socks5: (GREETING, METHOD, SOCKS5, SOCKS5_DONE),
    by_socks4: (SOCKS4A, SOCKS4_DONE),
    by_http: (CONNECT, CONNECT_DONE),
}
every_way = pytest.mark.parametrize("way", list(SCRIPTS))


def play(
    *steps: bytes, end: Callable[[socket.socket], Any] = read_to_end
) -> Callable[[socket.socket], None]:
    """Alternately what must come, and nothing else, and what goes back."""

    def script(sock: socket.socket) -> None:
        for number, data in enumerate(steps):
            if number % 2 == 0:
                assert read_exactly(sock, len(data)) == data
            else:
                sock.sendall(data)
        assert not end(sock)

    return script


def send(conn: FramedConn, target: Address, *payloads: bytes) -> None:
    """One run."""
    arena, offsets = Arena(), []
    for number, payload in enumerate(payloads):
        arena.view[number * 100 : number * 100 + len(payload)] = payload
        offsets.append(number * 100)
    conn.send(
        arena, Run(offsets, len(payloads[0]), len(payloads[-1])), conn.prepare(udp_to(target))
    )


def failure(dialer: UotDialer) -> DialError:
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
    @every_way
    def test_datagrams_both_ways(self, way: Any, direct: DirectDialer, counts: Counts) -> None:
        """The magic name goes to the proxy as it is, then a request that is not connected, then frames."""
        steps = (
            *SCRIPTS[way],
            UOT + FRAME + b"\0\3abc",
            FRAME + b"\0\3cba",
            FRAME + b"\0\0" + OTHER + b"\0\2de",
            OTHER + b"\0\2ed",
        )
        with server(play(*steps)) as address:
            conn = way(address, direct, counts).dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"abc")
            assert receive(conn, 1) == [(b"cba", TARGET)]
            send(conn, TARGET, b"")
            send(conn, Address("192.0.2.5", 53), b"de")
            assert receive(conn, 1) == [(b"ed", Address("192.0.2.5", 53))]
            conn.close()
        assert counts.counts == {}

    @every_way
    def test_nothing_is_sent_before_the_proxy_has_agreed(
        self, way: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        """HAZARDS 60, RFC 9931."""
        refusals = {
            by_socks5: b"\5\2\0\1" + bytes(6),
            by_socks4: b"\0\x5b" + bytes(6),
            by_http: b"HTTP/1.1 403 No\r\n\r\n",
        }
        with server(
            play(*SCRIPTS[way][:-1], refusals[way])
        ) as address:  # and then the end, not a byte more
            failure(way(address, direct, counts))

    @every_way
    def test_a_name_goes_to_the_proxy_as_it_is(
        self, way: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        with server(
            play(*SCRIPTS[way], UOT_NAME + FRAME_NAME + b"\0\3abc" + FRAME_NAME + b"\0\1d")
        ) as address:
            conn = way(address, direct, counts).dial_packet(udp_to(NAME))
            send(conn, NAME, b"abc", b"d")
            conn.close()

    def test_an_ipv6_target(self, direct: DirectDialer, counts: Counts) -> None:
        packed = b"\x20\1\x0d\xb8" + bytes(11) + b"\1\x23\x28"
        with server(
            play(*SCRIPTS[by_socks5], b"\0\4" + packed + b"\1" + packed + b"\0\1a")
        ) as address:
            target = Address("2001:db8::1", 9000)
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(target))
            send(conn, target, b"a")
            conn.close()

    @every_way
    def test_frames_in_the_segment_of_the_answer_are_received(
        self, way: Any, direct: DirectDialer, counts: Counts
    ) -> None:
        """HAZARDS 62."""
        *steps, done = SCRIPTS[way]
        with server(play(*steps, done + FRAME + b"\0\5early", UOT)) as address:
            conn = way(address, direct, counts).dial_packet(udp_to(TARGET))
            assert receive(conn, 1) == [(b"early", TARGET)]
            conn.close()

    def test_with_user_and_password(self, direct: DirectDialer, counts: Counts) -> None:
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

    def test_one_stream_for_all_targets_of_a_client(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        """HAZARDS 31."""
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
    def test_a_socks5_proxy_that_knows_no_such_name(
        self, direct: DirectDialer, counts: Counts, code: int, said: str
    ) -> None:
        with server(
            play(GREETING, METHOD, SOCKS5, b"\5" + bytes((code,)) + b"\0\1" + bytes(6))
        ) as address:
            error = failure(by_socks5(address, direct, counts))
        assert str(error) == f"'far' ({address}): no UoT there ({said})"

    def test_a_socks4_proxy_that_knows_no_such_name(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with server(play(SOCKS4A, b"\0\x5b" + bytes(6))) as address:
            error = failure(by_socks4(address, direct, counts))
        assert str(error).startswith(f"'far' ({address}): no UoT there (")

    @pytest.mark.parametrize(
        "status", ["404 Not Found", "500 Oops", "502 Bad Gateway", "503 Service Unavailable"]
    )
    def test_an_http_proxy_that_knows_no_such_name(
        self, direct: DirectDialer, counts: Counts, status: str
    ) -> None:
        with server(
            play(CONNECT, f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        ) as address:
            error = failure(by_http(address, direct, counts))
        assert str(error) == f"'far' ({address}): no UoT there ({status.lower()})"
        assert error.reason is Reason.GENERAL

    @pytest.mark.parametrize(
        "code, reason", [(2, Reason.DENIED), (6, Reason.TIMEOUT), (7, Reason.UNSUPPORTED)]
    )
    def test_a_refusal_for_another_reason_is_told_as_it_is(
        self, direct: DirectDialer, counts: Counts, code: int, reason: Reason
    ) -> None:
        with server(
            play(GREETING, METHOD, SOCKS5, b"\5" + bytes((code,)) + b"\0\1" + bytes(6))
        ) as address:
            error = failure(by_socks5(address, direct, counts))
        assert error.reason is reason
        assert str(error).startswith(f"'far' ({address}): ") and "UoT" not in str(error)

    def test_a_proxy_that_is_not_there_is_another_matter(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        with refusing() as address:
            error = failure(by_socks5(address, direct, counts))
        assert (error.reason, error.upstream) == (Reason.REFUSED, True)
        assert str(error) == f"'far' ({address}): connection refused"

    @pytest.mark.parametrize(
        "way, answer",
        [(by_socks5, b"\5\xff"), (by_http, b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")],
    )
    def test_no_message_has_the_password(
        self, direct: DirectDialer, counts: Counts, way: Any, answer: bytes
    ) -> None:
        """HAZARDS 111."""

        def script(sock: socket.socket) -> None:
            sock.recv(4096)
            sock.sendall(answer)
            read_to_end(sock)

        with server(script) as address:
            one = way(address, direct, counts, user="user", password="hunter2")
            error = failure(one)
        assert error.reason is Reason.AUTHENTICATION
        assert not any(
            secret in f"{error} {error!r} {one.name} {one!r}"
            for secret in ("hunter2", "dXNlcjpodW50ZXIy")
        )

    @every_way
    def test_a_proxy_that_breaks_off(self, way: Any, direct: DirectDialer, counts: Counts) -> None:
        with server(play(*SCRIPTS[way][:-1], b"", end=lambda sock: None)) as address:
            error = failure(way(address, direct, counts))
        assert (error.reason, error.upstream) == (Reason.PROTOCOL, True) and "UoT" not in str(error)

    def test_one_that_breaks_off_later_ends_the_connection(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        """HAZARDS 48."""
        with server(play(*SCRIPTS[by_socks5], UOT + FRAME + b"\0\1a", end=reset)) as address:
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"a")
            while not conn.ended:
                assert Task(conn.wait).result()
                assert cut(conn.receive(Arena())) == []
            send(conn, TARGET, b"b")
            conn.close()
        assert counts.counts == {("drops", "upstream closed"): 1}

    def test_frames_that_are_none_end_it_and_are_counted(
        self, direct: DirectDialer, counts: Counts
    ) -> None:
        *steps, done = SCRIPTS[by_socks5]
        with server(play(*steps, done + FRAME + b"\0\4good" + b"\3\0", UOT)) as address:
            conn = by_socks5(address, direct, counts).dial_packet(udp_to(TARGET))
            assert receive(conn, 1) == [(b"good", TARGET)]
            assert conn.ended
            conn.close()
        assert counts.counts == {("drops", "malformed"): 1}

    def test_without_descriptors_it_is_a_dial_that_failed(
        self, direct: DirectDialer, counts: Counts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """HAZARDS 92: and the stream to the proxy is closed."""
        closed = threading.Event()

        def script(sock: socket.socket) -> None:
            sock.settimeout(0.5)  # what fails here is not waited for
            play(*SCRIPTS[by_http], UOT)(sock)
            closed.set()

        def none_left(*_: Any) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

        with server(script) as address:
            monkeypatch.setattr(select, "epoll", none_left)
            error = failure(by_http(address, direct, counts))
            assert closed.wait(2.0)
        assert error.reason is Reason.GENERAL


class TestShape:
    def test_it_is_the_plain_way_with_datagrams(self, direct: DirectDialer, counts: Counts) -> None:
        one = by_http(Address("192.0.2.1", 3128), direct, counts)
        assert (one.name, one.carries, one.symmetric) == ("far", {"tcp", "udp"}, False)
        assert by_socks4(Address("192.0.2.1", 1080), direct, counts).carries == {"tcp", "udp"}

    def test_connections_go_the_plain_way(self, direct: DirectDialer, counts: Counts) -> None:
        wanted = b"CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n"
        with server(play(wanted, CONNECT_DONE)) as address:
            by_http(address, direct, counts).dial(tcp_to(Address("a.test", 443))).close()

    @pytest.mark.parametrize(
        "scheme, way",
        [
            ("socks5", by_socks5),
            ("socks5h", by_socks5),
            ("socks4", by_socks4),
            ("socks4a", by_socks4),
            ("http", by_http),
        ],
    )
    def test_as_the_factory_makes_it(
        self, reach: TargetResolver, counts: Counts, scheme: str, way: Any
    ) -> None:
        """Whatever the scheme does with other names, the magic one is never looked up here."""
        with server(play(*SCRIPTS[way], UOT + FRAME + b"\0\1a")) as address:
            factory = DialerFactory(reach, UdpSocketFactory(counts, Lines()), 2.0, no_services())
            one = factory.dialer(way_to(scheme, address))
            assert "udp" in one.carries
            conn = one.dial_packet(udp_to(TARGET))
            send(conn, TARGET, b"a")
            conn.close()


def way_to(scheme: str, address: Address) -> UpstreamConfig:
    return UpstreamConfig((HopConfig(scheme, address, udp="uot"),), "")
