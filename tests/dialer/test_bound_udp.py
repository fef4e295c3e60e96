"""One stream of connect-udp for all targets of a client, and proxies that do not agree to it."""

from __future__ import annotations

import socket
from typing import Any, Callable

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.group import GroupDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.member import Member
from netproxy.dialer.web import bound_udp
from netproxy.dialer.web.bound_udp import REFUSED_SECONDS, Agreement
from netproxy.dialer.web.http import HttpDialer
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import UNSPECIFIED_ADDRESS, Address
from netproxy.interfaces.datagrams import Run
from netproxy.net.datagram import Arena
from netproxy.net.frames import answering
from tests.dialer.doubles import Clock
from tests.support.batches import cut, receive
from tests.support.doubles import Counts
from tests.support.flows import udp_to
from tests.support.sockets import Task, read_exactly, read_to_end, server

FIRST, OTHER = Address("192.0.2.1", 53), Address("192.0.2.2", 443)
RAW_FIRST, RAW_OTHER = b"\x04\xc0\0\2\1\x00\x35", b"\x04\xc0\0\2\2\x01\xbb"
ALL = b"\x11\x02\x02\x00"
SWITCHES = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
    b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n"
)
AGREES = SWITCHES + (b'Connect-UDP-Bind: ?1\r\nProxy-Public-Address: "198.51.100.7:4000"\r\n\r\n')
OLD = SWITCHES + b"\r\n"
LABEL = "hop 2 of 'office' (http://proxy.test:3128)"
ASKS = b"Connect-UDP-Bind: ?1\r\n"


class Proxy:
    """A script for server(): it answers each connection and notes its request."""

    def __init__(self, *answers: bytes, then: Callable[[socket.socket], Any] = read_to_end) -> None:
        """`then` does the rest of each connection; the last answer is given again and again."""
        self.requests: list[bytes] = []
        self._answers = list(answers)
        self._then = then

    def __call__(self, sock: socket.socket) -> None:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            piece = sock.recv(1)
            assert piece, f"closed after {data!r}"
            data += piece
        self.requests.append(data)
        more = len(self._answers) > 1
        sock.sendall(self._answers.pop(0) if more else self._answers[0])
        self._then(sock)


def dialer(address: Address, direct: DirectDialer, counts: Counts) -> HttpDialer:
    hop = Hop("office", LABEL, address, direct, 2.0)
    return HttpDialer(hop, counts, agreement=Agreement())


@pytest.fixture
def counts() -> Counts:
    return Counts()


def send(conn: Any, target: Address, data: bytes) -> None:
    arena = Arena()
    arena.view[: len(data)] = data
    conn.send(arena, Run([0], len(data), len(data)), conn.prepare(udp_to(target)))


def test_request_asks_for_all_targets_and_names_the_first(
    direct: DirectDialer, counts: Counts
) -> None:
    proxy = Proxy(AGREES)
    with server(proxy) as address:
        http = dialer(address, direct, counts)
        assert not http.symmetric and http.knows_bound
        conn = http.dial_packet(udp_to(FIRST))
        assert conn.bound == (Address("198.51.100.7", 4000),)
        assert conn.reaches(FIRST) and conn.reaches(OTHER)
        assert not conn.reaches(Address("game.test", 1))
        conn.close()
        assert not http.symmetric
    assert proxy.requests == [
        b"GET /.well-known/masque/udp/192.0.2.1/53/ HTTP/1.1\r\nHost: %b\r\n"
        b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n%b\r\n"
        % (str(address).encode(), ASKS)
    ]


def test_datagrams_of_all_targets_go_both_ways_in_one_stream(
    direct: DirectDialer, counts: Counts
) -> None:
    def exchange(sock: socket.socket) -> None:
        wanted = ALL + b"\0\x06\0hello" + b"\0\x0c\2" + RAW_OTHER + b"four"
        assert read_exactly(sock, len(wanted)) == wanted
        # The proxy registers an address, and uses it and others: whoever writes is heard.
        sock.sendall(b"\x12\x01\x02" + b"\x11\x08\x03" + RAW_OTHER + b"\0\3\3ab")
        sock.sendall(b"\0\x0b\2\x04\xc0\0\2\x09\x00\x07cde" + b"\0\2\0f" + b"\0\2\x05x")
        assert read_exactly(sock, 3) == b"\x12\x01\x03"
        assert read_to_end(sock) == b"\0\3\3gh"

    with server(Proxy(AGREES, then=exchange)) as address:
        conn = dialer(address, direct, counts).dial_packet(udp_to(FIRST))
        send(conn, FIRST, b"hello")
        send(conn, OTHER, b"four")
        assert receive(conn, 3) == [
            (b"ab", OTHER),
            (b"cde", Address("192.0.2.9", 7)),
            (b"f", FIRST),
        ]
        send(conn, OTHER, b"gh")
        conn.close()
    assert counts.counts == {("drops", "unknown context"): 1}


def test_request_without_a_target_has_asterisks(direct: DirectDialer, counts: Counts) -> None:
    proxy = Proxy(AGREES)
    with server(proxy) as address:
        conn = dialer(address, direct, counts).dial_packet(udp_to(UNSPECIFIED_ADDRESS))
        assert conn.reaches(FIRST)
        conn.close()
    assert proxy.requests[0].startswith(b"GET /.well-known/masque/udp/%2A/%2A/ HTTP/1.1\r\n")


def test_old_proxy_has_a_stream_for_each_target_and_is_not_asked_for_a_while(
    direct: DirectDialer, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 178."""
    clock = Clock()
    monkeypatch.setattr(bound_udp, "time", clock)
    proxy = Proxy(OLD)
    with server(proxy) as address:
        http = dialer(address, direct, counts)
        conn = http.dial_packet(udp_to(FIRST))
        assert conn.reaches(FIRST) and not conn.reaches(OTHER) and conn.bound == ()
        conn.close()
        assert http.symmetric and not http.knows_bound
        http.dial_packet(udp_to(OTHER)).close()
        # A dialer that reaches the proxy in another way knows as well.
        assert http.with_via(direct).symmetric
        clock.now += REFUSED_SECONDS
        assert not http.symmetric
        http.dial_packet(udp_to(OTHER)).close()
    assert [ASKS in request for request in proxy.requests] == [True, False, True]


@pytest.mark.parametrize("target", [Address("game.test", 1), Address("fe80::1%1", 1)])
def test_target_that_a_bound_stream_cannot_name_has_a_stream_of_its_own(
    direct: DirectDialer, counts: Counts, target: Address
) -> None:
    proxy = Proxy(OLD)
    with server(proxy) as address:
        http = dialer(address, direct, counts)
        http.dial_packet(udp_to(target)).close()
        assert not http.symmetric
    assert ASKS not in proxy.requests[0]


def test_answer_without_public_addresses_is_good_for_both_ip_versions(
    direct: DirectDialer, counts: Counts
) -> None:
    with server(Proxy(SWITCHES + ASKS + b"\r\n")) as address:
        conn = dialer(address, direct, counts).dial_packet(udp_to(FIRST))
        assert conn.bound == () and conn.reaches(Address("2001:db8::1", 1))
        conn.close()


def test_proxy_without_ipv6_does_not_reach_ipv6(direct: DirectDialer, counts: Counts) -> None:
    with server(Proxy(AGREES)) as address:
        conn = dialer(address, direct, counts).dial_packet(udp_to(FIRST))
        sixth = Address("2001:db8::1", 1)
        assert not conn.reaches(sixth)
        with pytest.raises(DialError) as caught:
            conn.prepare(udp_to(sixth))
        assert caught.value.reason is Reason.UNSUPPORTED
        conn.close()


def test_proxy_that_closes_the_context_is_not_asked_again(
    direct: DirectDialer, counts: Counts
) -> None:
    """Hazard 176."""

    def close(sock: socket.socket) -> None:
        sock.sendall(b"\x13\x01\x02")
        read_to_end(sock)

    with server(Proxy(AGREES, then=close)) as address:
        http = dialer(address, direct, counts)
        conn = http.dial_packet(udp_to(FIRST))
        while not conn.ended:
            assert Task(conn.wait).result()
            assert cut(conn.receive(Arena())) == []
        conn.close()
        assert http.symmetric
    assert counts.counts == {("drops", "malformed"): 1}


def test_answers_that_the_proxy_does_not_read_end_the_stream(
    direct: DirectDialer, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard 177."""
    monkeypatch.setattr(answering, "ANSWERS_LIMIT", 9)

    def register(sock: socket.socket) -> None:
        sock.sendall(b"".join(b"\x11\x08%c\4\xc0\0\2\1\0%c" % (at, at) for at in range(1, 9, 2)))
        read_to_end(sock)

    with server(Proxy(AGREES, then=register)) as address:
        conn = dialer(address, direct, counts).dial_packet(udp_to(FIRST))
        # The stream takes nothing from now on.
        conn._write = lambda data: 0  # type: ignore[method-assign]
        while not conn.ended:
            assert Task(conn.wait).result()
            conn.receive(Arena())
        conn.close()
    assert counts.counts == {("drops", "too many answers"): 1}


def test_only_one_target_is_asked_for_without_an_agreement(
    direct: DirectDialer, counts: Counts
) -> None:
    """`udp: connect-udp`."""
    proxy = Proxy(OLD)
    with server(proxy) as address:
        http = HttpDialer(Hop("office", LABEL, address, direct, 2.0), counts)
        http.dial_packet(udp_to(FIRST)).close()
        with pytest.raises(DialError) as caught:
            http.dial_packet(udp_to(UNSPECIFIED_ADDRESS))
    assert (http.symmetric, http.knows_bound) == (True, False)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert ASKS not in proxy.requests[0] and len(proxy.requests) == 1


def test_old_proxy_that_switches_for_asterisks_is_an_error(
    direct: DirectDialer, counts: Counts
) -> None:
    with server(Proxy(OLD)) as address:
        http = dialer(address, direct, counts)
        with pytest.raises(DialError, match="has a stream for each target"):
            http.dial_packet(udp_to(UNSPECIFIED_ADDRESS))
        assert http.symmetric


def test_member_and_group_follow_what_is_known_of_the_proxy(
    direct: DirectDialer, counts: Counts
) -> None:
    with server(Proxy(OLD)) as address:
        http = dialer(address, direct, counts)
        member = Member("office", http)
        group = GroupDialer("pool", [member], "failover", 2.0)
        assert not group.symmetric and group.knows_bound
        conn = group.dial_packet(udp_to(FIRST))
        assert conn.reaches(FIRST) and not conn.reaches(OTHER) and conn.bound == ()
        conn.close()
        assert group.symmetric and member.symmetric and not group.knows_bound
