"""Datagrams within a client's stream: connect-udp by HttpHandler, and UDP over TCP by every CONNECT, up to real UDP sockets."""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator

import pytest

from netproxy.access.users import Login, Users
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.dialer.http import HttpDialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.uot import UotDialer
from netproxy.errors import DialError, Reason
from netproxy.handler import stream_udp
from netproxy.handler.outbound import Connector
from netproxy.handler.http import Forwarder, HttpHandler
from netproxy.handler.socks4 import Socks4Handler
from netproxy.handler.socks5 import Entrance, Socks5Handler
from netproxy.handler.stream_udp import StreamUdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.datagram import Arena, ArenaPool
from netproxy.net.framed import QUEUE_LIMIT
from netproxy.net.stream import Stream
from netproxy.relay.nat import NatDependencies, NatPolicy, NatTable
from netproxy.relay.quota import SessionLimits
from tests.support.batches import cut
from tests.support.doubles import Counts, Lines, Records, no_services
from tests.support.flows import Anywhere, udp_to
from tests.support.handlers import PIPE_LIMITS, Conversation, HandlerDependencies, tcp_pair
from tests.support.waits import run_to_end
from tests.support.sockets import (
    HAS_IPV6,
    SECONDS,
    Task,
    address_of,
    is_reset,
    nothing_comes,
    read_exactly,
    read_to_end,
    server,
    udp,
    wait_until,
)
from tests.support.upstreams import FakeDialer

IDLE = 120.0
ACCEPTED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
MAGIC, MAGIC_V1 = b"sp.v2.udp-over-tcp.arpa", b"sp.udp-over-tcp.arpa"
UPGRADE = [b"Connection: Upgrade", b"Upgrade: connect-udp", b"Capsule-Protocol: ?1"]


class Names:
    """In the place of a Resolver; lookups of names wait while `gate` is shut."""

    def __init__(self) -> None:
        self.found = {"localhost.test": "127.0.0.1"}
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def resolve(self, target: Address, seconds: float = SECONDS) -> list[Address]:
        if target.host[-1].isdigit() or ":" in target.host:
            return [target]
        self.asked.set()
        assert self.gate.wait(SECONDS)
        if target.host not in self.found:
            raise DialError(Reason.NAME, target.host)
        return [target._replace(host=self.found[target.host])]


class Rig:
    """The handlers of one listener with datagrams in streams.  A Router too."""

    def __init__(
        self, dialer: Dialer | None = None, auth: str = "none", arenas: Any = ArenaPool
    ) -> None:
        self.counts, self.records, self.log, self.names = Counts(), Records(), Lines(), Names()
        datagrams = UdpSocketFactory(self.counts, self.log)
        self.dialer: Any = dialer or DirectDialer(
            TargetResolver(self.names, Anywhere()), datagrams, 2.0
        )  # type: ignore[arg-type]
        self.flows: list[Flow] = []
        self.arenas = arenas(datagrams.arena)
        dependencies = NatDependencies(
            self.arenas, self._run, self._run, self.counts, self.records, self.log
        )
        self.table = NatTable(NatPolicy(SessionLimits(100, 100)), dependencies)
        relay = StreamUdpRelay(self, self.table, self.arenas, self.counts, self.records, IDLE)
        connector = Connector(self, PIPE_LIMITS, self.counts, self.records, relay)
        login = Login(Users({"user": "secret"}), auth)
        self.http = HttpHandler(
            "test", connector, Forwarder(connector, IDLE), login, self.counts, relay
        )
        self.socks4 = Socks4Handler("test", connector, None, login)  # type: ignore[arg-type]
        self.socks5 = Socks5Handler("test", connector, None, None, Entrance(login, self.counts))  # type: ignore[arg-type]

    def route(self, flow: Flow) -> Route:
        self.flows.append(flow)
        return Route(self.dialer, flow)

    def route_without_blocking(self, flow: Flow) -> Route:
        return self.route(flow)

    def candidates(self, flow: Flow) -> list[Dialer]:
        return [self.dialer]

    def empty(self) -> bool:
        return not (len(self.table) or self.table.clients or self.table.entries)

    def check_clean(self) -> None:
        """What every stream must leave behind: nothing."""
        wait_until(self.empty)
        wait_until(
            lambda: (
                not [one for one in threading.enumerate() if one.name.startswith("udp-session ")]
            )
        )
        assert not self.log.of("exception") and not self.counts.of("drops", "internal error")

    @staticmethod
    def _run(task: Callable[[], None]) -> bool:
        task()
        return True


@contextmanager
def rig(dialer: Dialer | None = None, auth: str = "none", arenas: Any = ArenaPool) -> Iterator[Rig]:
    one = Rig(dialer, auth, arenas)
    try:
        yield one
    finally:
        one.names.gate.set()
    one.check_clean()


def path(target: Address) -> bytes:
    return b"/.well-known/masque/udp/%b/%d/" % (
        target.host.replace(":", "%3A").encode(),
        target.port,
    )


def request(where: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join(
        [b"GET %b HTTP/1.1" % where, b"Host: proxy.test", *UPGRADE, *fields, b"", b""]
    )


def capsule(payload: bytes) -> bytes:
    """Of up to 16382 bytes."""
    length = len(payload) + 1
    return (
        b"\0"
        + (bytes((length,)) if length < 64 else struct.pack(">H", length | 0x4000))
        + b"\0"
        + payload
    )


def frame(target: Address, payload: bytes) -> bytes:
    return place(target) + struct.pack(">H", len(payload)) + payload


def place(target: Address) -> bytes:
    """A literal IPv4 address and its port in a UoT frame."""
    return b"\0" + socket.inet_aton(target.host) + struct.pack(">H", target.port)


@contextmanager
def echo(host: str = "127.0.0.1") -> Iterator[tuple[Address, list[tuple[bytes, tuple]]]]:
    """A UDP server that answers with the same in reverse; what came, and from where."""
    seen: list[tuple[bytes, tuple]] = []
    with udp(host) as sock:

        def serve() -> None:
            while True:
                data, peer = sock.recvfrom(65536)
                if data == b"stop":
                    return
                seen.append((data, peer))
                sock.sendto(data[::-1], peer)

        task = Task(serve)
        try:
            yield address_of(sock), seen
        finally:
            with udp(host) as other:
                other.sendto(b"stop", sock.getsockname())
            task.result()


class TestConnectUdp:
    RFC_9298 = (
        b"GET https://example.org/.well-known/masque/udp/192.0.2.6/443/ HTTP/1.1\r\nHost: example.org\r\n"
        b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
    )

    def test_the_example_of_rfc_9298_is_answered_with_exactly_these_bytes(self) -> None:
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(self.RFC_9298)
            client.expect(ACCEPTED)
            assert client.silent()
            assert (
                dialer.flows
                == [Flow("udp", client.local, Address("192.0.2.6", 443), "test", "")]
                == one.flows
            )
            assert dialer.conns[0].prepared == [Address("192.0.2.6", 443)]

    @pytest.mark.parametrize(
        "where",
        [
            b"https://proxy.test/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/",
            b"http://proxy.test:8080/.well-known/masque/udp/2001%3adb8%3a%3a42/443/",
            b"/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/",
        ],
        ids=["https", "http", "origin"],
    )
    def test_an_ipv6_target_in_absolute_and_origin_form(self, where: bytes) -> None:
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(where))
            client.expect(ACCEPTED)
            assert [flow.target for flow in dialer.flows] == [Address("2001:db8::42", 443)]

    def test_datagrams_both_ways(self) -> None:
        with rig() as one, echo() as (target, seen):
            with Conversation(one.http) as client:
                client.send(request(path(target)))
                client.expect(ACCEPTED)
                for payload in (b"ping", b"", b"p", b"x" * 62, b"y" * 63, b"z" * 9000):
                    client.send(capsule(payload))
                    client.expect(capsule(payload[::-1]))
                client.send(b"\0\5\0last")
                client.expect(b"\0\5\0tsal")
            assert len({peer for _, peer in seen}) == 1
            assert [len(data) for data, _ in seen] == [4, 0, 1, 62, 63, 9000, 4]
            one.check_clean()
            [record] = one.records.records
            assert (
                record.flow.target == target
                and record.flow.network == "udp"
                and record.upstream == "direct"
            )
            assert (
                record.datagrams_sent,
                record.datagrams_received,
                record.sent,
                record.received,
            ) == (7, 7, 9134, 9134)

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
    def test_to_an_ipv6_target(self) -> None:
        with rig() as one, echo("::1") as (target, _), Conversation(one.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            client.send(capsule(b"six"))
            client.expect(capsule(b"xis"))

    def test_byte_by_byte(self) -> None:
        """HAZARDS 1."""
        with rig() as one, echo() as (target, _), Conversation(one.http) as client:
            client.trickle(request(path(target)))
            client.expect(ACCEPTED)
            client.trickle(capsule(b"abc") + b"\x17\2no" + capsule(b"def"))
            client.expect(capsule(b"cba") + capsule(b"fed"))

    def test_trains_arrive_whole_and_in_order(self) -> None:
        payloads = [struct.pack(">H", number) + b"x" * 98 for number in range(100)] + [b"short"]
        with rig() as one, udp() as target, Conversation(one.http) as client:
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            client.send(b"".join(map(capsule, payloads)))
            came = [target.recvfrom(65536) for _ in payloads]
            assert [data for data, _ in came] == payloads
            for data, peer in came:
                target.sendto(data, peer)
            client.expect(b"".join(map(capsule, payloads)))

    def test_a_train_of_empty_datagrams(self) -> None:
        """HAZARDS 27."""
        with rig() as one, echo() as (target, _), Conversation(one.http) as client:
            client.send(request(path(target)) + capsule(b"") * 5 + capsule(b"end"))
            client.expect(ACCEPTED + capsule(b"") * 5 + capsule(b"dne"))

    def test_capsules_in_the_segment_of_the_request_are_seen(self) -> None:
        """HAZARDS 16, 60: RFC 9931 forbids clients to be so early; they are not left in a buffer."""
        with rig() as one, echo() as (target, _), Conversation(one.http) as client:
            client.send(request(path(target)) + capsule(b"early") + b"\0\4\0la")
            client.expect(ACCEPTED + capsule(b"ylrae"))
            client.send(b"t")
            client.expect(capsule(b"tal"))

    def test_only_the_target_may_answer(self) -> None:
        """HAZARDS 30: neither another address nor another port of it."""
        with rig() as one, udp() as target, udp() as stranger, Conversation(one.http) as client:
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            client.send(capsule(b"ping"))
            _, peer = target.recvfrom(64)
            stranger.sendto(b"forged", peer)
            one.counts.wait_for("drops", "filtered")
            target.sendto(b"pong", peer)
            client.expect(capsule(b"pong"))
            assert client.silent() and one.counts.of("drops", "filtered") == 1

    def test_a_client_that_sends_nothing_lets_nobody_answer(self) -> None:
        """HAZARDS 44."""
        with rig() as one, Conversation(one.http) as client, udp() as target:
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            assert nothing_comes(target, 0) and client.silent()

    def test_a_name_is_resolved_before_the_answer(self) -> None:
        with rig() as one, echo() as (target, _), Conversation(one.http) as client:
            one.names.gate.clear()
            client.send(request(path(Address("LocalHost.Test", target.port))))
            assert one.names.asked.wait(SECONDS)
            assert client.silent()
            one.names.gate.set()
            client.expect(ACCEPTED)
            client.send(capsule(b"named"))
            client.expect(capsule(b"deman"))
            assert one.flows[0].target == Address("localhost.test", target.port)

    def test_a_loose_spelling_of_an_address_is_that_address(self) -> None:
        """HAZARDS 11: what rules see is what is dialled."""
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(b"/.well-known/masque/udp/%30x7f.1/53/"))
            client.expect(ACCEPTED)
            assert one.flows[0].target == Address("127.0.0.1", 53)

    def test_it_pauses_and_goes_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream that is quiet holds no thread."""
        monkeypatch.setattr(stream_udp, "STAY_SECONDS", 0.0)
        with rig() as one, echo() as (target, _), Conversation(one.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            for _ in range(20):
                client.send(capsule(b"abc"))
                client.expect(capsule(b"cba"))

    def test_it_pauses_for_the_idle_time_and_then_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_udp, "STAY_SECONDS", 0.0)
        dialer = FakeDialer()
        near, far = tcp_pair()
        with rig(dialer) as one, near, far:
            near.sendall(request(path(Address("192.0.2.1", 443))))
            pause: Any = one.http.handle(Stream(far), address_of(near))
            assert isinstance(pause, Wait) and not pause.idle
            assert (pause.watched, pause.seconds) == (((far, READABLE),), IDLE)
            assert read_exactly(near, len(ACCEPTED)) == ACCEPTED
            near.sendall(capsule(b"abc"))
            pause = pause.resume(True)
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"abc"]
            assert pause.resume(False) is None
            assert near.recv(1) == b""

    def test_a_session_that_expired_is_opened_anew_by_the_next_datagram(self) -> None:
        """HAZARDS 34: the stream lives on."""
        with rig() as one, echo() as (target, seen), Conversation(one.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            for payload in (b"one", b"two"):
                client.send(capsule(payload))
                client.expect(capsule(payload[::-1]))
                if payload == b"one":
                    one.table.expire(time.monotonic())
                    for close in one.table.expire(time.monotonic() + 1000):
                        close()
            assert len(one.records.records) == 1
            assert [data for data, _ in seen] == [b"one", b"two"]
            assert seen[0][1] != seen[1][1]


class TestConnectUdpEnds:
    @pytest.mark.parametrize("way", ["close", "half-close", "reset"])
    def test_with_the_clients_stream(self, way: str) -> None:
        """HAZARDS 25: the session ends with it, and its upstream."""
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))) + capsule(b"one"))
            client.expect(ACCEPTED)
            [conn] = dialer.conns
            assert len(one.table) == 1 and len(one.table.clients) == 1
            if way == "half-close":
                client.socket.shutdown(socket.SHUT_WR)
                client.expect_end()
            elif way == "reset":
                client.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                client.socket.close()
            else:
                client.socket.close()
            client.wait()
            assert conn.shut.is_set() and conn.closed.wait(SECONDS)
            one.check_clean()
            assert [record.ended for record in one.records.records] == ["association ended"]

    @pytest.mark.parametrize("bad", [b"\0\0", b"\0\xc0\0\1\0\0\0\0\0"])
    def test_with_a_malformed_capsule_which_is_counted(self, bad: bytes) -> None:
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(
                request(path(Address("192.0.2.1", 443)))
                + capsule(b"good")
                + bad
                + capsule(b"never")
            )
            client.expect(ACCEPTED)
            client.expect_closed()
            client.wait()
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"good"]
            assert one.counts.of("drops", "malformed") == 1

    def test_an_upstream_that_ends_is_dialled_anew(self) -> None:
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))))
            client.expect(ACCEPTED)
            dialer.conns[0].shutdown()
            wait_until(lambda: len(one.table) == 0)
            client.send(capsule(b"again"))
            wait_until(lambda: len(dialer.conns) == 2 and dialer.conns[1].sent)
            assert [payload for payload, _ in dialer.conns[1].sent] == [b"again"]


class TestListenerThatIsGone:
    """A reload has removed it, and closed its table: streams that it has accepted end with their next datagram."""

    def test_a_connect_udp_stream(self) -> None:
        dialer = FakeDialer()
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))) + capsule(b"one"))
            client.expect(ACCEPTED)
            wait_until(lambda: dialer.conns[0].sent)
            one.table.close()
            client.send(capsule(b"two"))
            client.expect_closed()
            client.wait()
            assert one.counts.of("drops", "association ended") == 1
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"one"] and len(
                dialer.conns
            ) == 1
            assert [record.ended for record in one.records.records] == ["shutdown"]

    def test_a_uot_stream(self) -> None:
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with rig(dialer) as one, opened(one) as client:
            client.send(ANY + frame(target, b"one"))
            wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            one.table.close()
            client.send(frame(target, b"two") + frame(target._replace(port=10), b"three"))
            client.expect_closed()
            client.wait()
            assert len(dialer.conns) == 1

    def test_one_without_a_session_to_be_closed(self) -> None:
        with rig(FakeDialer()) as one, opened(one) as client:
            client.send(ANY)
            wait_until(lambda: one.table.clients)
            one.table.close()
            client.send(frame(Address("192.0.2.1", 9), b"one"))
            client.expect_closed()
            client.wait()

    def test_a_limit_of_sessions_ends_no_stream(self) -> None:
        """Its table is there still: that datagram is dropped, and later ones may pass."""
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with rig(dialer) as one, opened(one) as client:
            one.table.set_policy(NatPolicy(SessionLimits(0, 0)))
            client.send(ANY + frame(target, b"one"))
            one.counts.wait_for("drops", "session limit")
            one.table.set_policy(NatPolicy(SessionLimits(100, 100)))
            client.send(frame(target, b"two"))
            wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"two"]


NOT_A_TARGET = {
    "port 0": b"/.well-known/masque/udp/192.0.2.1/0/",
    "port 65536": b"/.well-known/masque/udp/192.0.2.1/65536/",
    "no port": b"/.well-known/masque/udp/192.0.2.1/",
    "port +1": b"/.well-known/masque/udp/192.0.2.1/+1/",
    "no slash": b"/.well-known/masque/udp/192.0.2.1/443",
    "TCP": b"/.well-known/masque/tcp/192.0.2.1/443/",
    "root": b"/",
    "asterisk": b"*",
    "query": b"/.well-known/masque/udp/192.0.2.1/443/?a",
    "bare colons": b"/.well-known/masque/udp/2001:db8::42/443/",
    "a zone": b"/.well-known/masque/udp/fe80%3A%3A1%25lo/443/",
    "CRLF": b"/.well-known/masque/udp/a%0D%0Ab/443/",
    "NUL": b"/.well-known/masque/udp/a%00/443/",
    "any target": b"/.well-known/masque/udp/*/*/",
    "userinfo": b"https://u@proxy.test/.well-known/masque/udp/192.0.2.1/443/",
}
BODIES = [
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Transfer-Encoding: chunked",
    b"Content-Type: text/plain",
]


class TestConnectUdpRefusals:
    @staticmethod
    def refused(one: Rig, data: bytes, status: bytes, *fields: bytes) -> None:
        """A whole answer that closes, with these fields, and nothing is left of the session."""
        with Conversation(one.http) as client:
            client.send(data)
            head, _, body = read_to_end(client.socket).partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0] == b"HTTP/1.1 " + status
            assert {b"Connection: close", b"Content-Length: %d" % len(body), *fields} <= set(lines)
            assert not [line for line in lines if line.startswith(b"Upgrade")]
            if not fields:
                assert not [line for line in lines if line.startswith(b"Proxy-Status")]
        one.check_clean()

    @pytest.mark.parametrize("where", NOT_A_TARGET.values(), ids=NOT_A_TARGET)
    def test_a_bad_path_is_400(self, where: bytes) -> None:
        """HAZARDS 10, 41, 58."""
        with rig() as one:
            self.refused(one, request(where), b"400 Bad Request")
            assert one.flows == []

    @pytest.mark.parametrize("field", BODIES)
    def test_a_request_that_declares_a_body_is_400(self, field: bytes) -> None:
        """Its bytes would be read as capsules."""
        with rig() as one:
            self.refused(
                one, request(path(Address("192.0.2.1", 443)), field) + b"hello", b"400 Bad Request"
            )
            assert one.flows == []

    def test_a_name_that_is_not_found_is_502_dns_error(self) -> None:
        with rig() as one:
            self.refused(
                one,
                request(path(Address("nowhere.test", 443))),
                b"502 Bad Gateway",
                b"Proxy-Status: netproxy; error=dns_error",
            )

    def test_a_way_out_without_udp_is_501(self) -> None:
        dialer = without_udp()
        with rig(dialer) as one:
            self.refused(
                one,
                request(path(Address("192.0.2.1", 443))),
                b"501 Not Implemented",
                b"Proxy-Status: netproxy; error=proxy_configuration_error",
            )
            assert dialer.flows == []

    @pytest.mark.parametrize(
        "reason, status, error",
        [
            (Reason.DENIED, b"403 Forbidden", b"http_request_denied"),
            (Reason.TIMEOUT, b"504 Gateway Timeout", b"connection_timeout"),
            (Reason.REFUSED, b"502 Bad Gateway", b"connection_refused"),
            (Reason.LOOP, b"403 Forbidden", b"proxy_loop_detected"),
        ],
    )
    def test_a_dial_that_fails_tells_why(self, reason: Reason, status: bytes, error: bytes) -> None:
        dialer = FakeDialer()
        dialer.refusal = DialError(reason, "hunter2")
        with rig(dialer) as one:
            self.refused(
                one,
                request(path(Address("192.0.2.1", 443))),
                status,
                b"Proxy-Status: netproxy; error=" + error,
            )

    def test_port_0_is_recorded_once(self) -> None:
        with rig(FakeDialer()) as one, opened(one) as client:
            client.send(b"\1\1\xc0\0\2\1\0\0")
            assert is_reset(client.socket)
            check_refused_once(
                one, Reason.REFUSED, "192.0.2.1:0: port 0: connection refused", "192.0.2.1"
            )

    def test_a_way_out_without_udp_is_recorded_once(self) -> None:
        with rig(without_udp()) as one:
            self.refused(
                one,
                request(path(Address("192.0.2.1", 443))),
                b"501 Not Implemented",
                b"Proxy-Status: netproxy; error=proxy_configuration_error",
            )
            check_refused_once(one, Reason.UNSUPPORTED, "fake carries no UDP", "192.0.2.1")

    @pytest.mark.parametrize("reason", [Reason.REFUSED, Reason.TIMEOUT, Reason.DENIED])
    def test_a_dial_that_fails_is_recorded_once(self, reason: Reason) -> None:
        dialer = FakeDialer()
        dialer.refusal = DialError(reason, "192.0.2.1:443")
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 ")
            check_refused_once(one, reason, reason.value, "192.0.2.1")

    def test_a_name_that_is_not_found_is_recorded_once(self) -> None:
        dialer = FakeDialer()
        dialer.refuse_names = DialError(Reason.NAME, "nowhere.test")
        with rig(dialer) as one, Conversation(one.http) as client:
            client.send(request(path(Address("nowhere.test", 443))))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 502 ")
            check_refused_once(one, Reason.NAME, Reason.NAME.value, "nowhere.test")

    def test_no_room_for_another_session(self) -> None:
        """HAZARDS 33."""
        with rig() as one:
            one.table.set_policy(NatPolicy(SessionLimits(0, 0)))
            self.refused(
                one,
                request(path(Address("192.0.2.1", 443))),
                b"502 Bad Gateway",
                b"Proxy-Status: netproxy; error=destination_unavailable",
            )

    def test_what_was_sent_behind_a_refused_request_is_no_request(self) -> None:
        """HAZARDS 60, RFC 9931: pipelined bytes of an upgrade that was refused are discarded."""
        with rig() as one:
            self.refused(
                one,
                request(b"/nowhere") + request(path(Address("192.0.2.1", 443))),
                b"400 Bad Request",
            )
            assert one.flows == []

    @pytest.mark.parametrize(
        "fields",
        [
            (),
            (b"Proxy-Authorization: Basic " + base64.b64encode(b"user:wrong"),),
            (b"Proxy-Authorization: Bearer x",),
        ],
    )
    def test_without_credentials_it_is_407(self, fields: tuple) -> None:
        """HAZARDS 7, 8."""
        with rig(auth="required") as one:
            self.refused(
                one,
                request(path(Address("192.0.2.1", 443)), *fields),
                b"407 Proxy Authentication Required",
                b'Proxy-Authenticate: Basic realm="netproxy", charset="UTF-8"',
            )
            assert one.flows == []

    def test_with_credentials_the_flow_has_its_user(self) -> None:
        dialer = FakeDialer()
        with rig(dialer, auth="required") as one, Conversation(one.http) as client:
            login = b"Proxy-Authorization: Basic " + base64.b64encode(b"user:secret")
            client.send(request(path(Address("192.0.2.1", 443)), login))
            client.expect(ACCEPTED)
            assert [flow.user for flow in one.flows] == ["user"]

    def test_without_a_relay_it_is_a_request_like_any_other(self) -> None:
        dependencies = HandlerDependencies()
        handler = HttpHandler(
            "test",
            dependencies.connector,
            Forwarder(dependencies.connector, IDLE),
            dependencies.login,
            dependencies.counters,
        )
        with Conversation(handler) as client:
            client.send(request(path(Address("192.0.2.1", 443))))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 400 ")
        assert dependencies.untouched()

    @pytest.mark.parametrize(
        "changed",
        [
            (b"GET ", b"POST "),
            (b"HTTP/1.1", b"HTTP/1.0"),
            (b"connect-udp", b"websocket"),
            (b"Connection: Upgrade", b"Connection: close"),
        ],
    )
    def test_what_does_not_ask_for_it_gets_none(self, changed: tuple[bytes, bytes]) -> None:
        with rig() as one, Conversation(one.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))).replace(*changed))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 400 ")
            assert one.flows == []


# -- UDP over TCP


def by_socks5(one: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    """A handler, what asks it for a connection to `name`, and its answers."""
    return (
        one.socks5,
        b"\5\1\0" + b"\5\1\0\3" + bytes((len(name),)) + name + b"\1\xbb",
        b"\5\0" + b"\5\0\0\1" + bytes(6),
    )


def by_socks4a(one: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    return one.socks4, b"\4\1\1\xbb\0\0\0\1\0" + name + b"\0", b"\0\x5a" + bytes(6)


def by_http(one: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    return one.http, b"CONNECT %b:443 HTTP/1.1\r\nHost: %b:443\r\n\r\n" % (name, name), ESTABLISHED


every_way = pytest.mark.parametrize("way", [by_socks5, by_socks4a, by_http])
ANY = b"\0\1" + bytes(6)  # of a request that is not connected: no hint


def without_udp() -> FakeDialer:
    dialer = FakeDialer()
    dialer.carries, dialer.refusal = frozenset({"tcp"}), Reason.UNSUPPORTED  # type: ignore[assignment]
    return dialer


def check_no_udp(way: Any, answer: bytes) -> None:
    """A refusal that says that this proxy cannot do it."""
    if way is by_http:
        lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert lines[0] == b"HTTP/1.1 501 Not Implemented"
        assert b"Proxy-Status: netproxy; error=proxy_configuration_error" in lines
    else:
        assert answer == (
            b"\5\0" + b"\5\7\0\1" + bytes(6) if way is by_socks5 else b"\0\x5b" + bytes(6)
        )


def check_refused_once(
    one: Rig, reason: Reason, ended: str, host: str, network: str = "udp", way: str = "fake"
) -> None:
    """One failed dial was counted, and it left one record, with its reason."""
    assert {
        key: count for key, count in one.counts.counts.items() if key[0] == "dial_failures"
    } == {("dial_failures", reason.value): 1}
    [record] = one.records.records
    assert (record.flow.target.host, record.flow.network, record.upstream, record.ended) == (
        host,
        network,
        way,
        ended,
    )
    assert (record.sent, record.received, record.datagrams_sent, record.datagrams_received) == (
        0,
        0,
        0,
        0,
    )


@contextmanager
def opened(one: Rig, way: Any = by_socks5, name: bytes = MAGIC) -> Iterator[Conversation]:
    """A client that has been accepted."""
    handler, ask, answer = way(one, name)
    with Conversation(handler) as client:
        client.send(ask)
        client.expect(answer)
        yield client


def connected_to(target: Address) -> bytes:
    return b"\1\1" + socket.inet_aton(target.host) + struct.pack(">H", target.port)


class TestUot:
    @every_way
    def test_two_targets_see_one_port(self, way: Any) -> None:
        """HAZARDS 36: endpoint-independent, and each answer behind its source."""
        with (
            rig() as one,
            echo() as (here, first),
            echo() as (there, second),
            opened(one, way) as client,
        ):
            client.send(ANY + frame(here, b"one"))
            client.expect(frame(here, b"eno"))
            client.send(frame(there, b"two"))
            client.expect(frame(there, b"owt"))
            client.send(frame(here, b"three"))
            client.expect(frame(here, b"eerht"))
            assert len({peer for _, peer in first + second}) == 1
            assert [data for data, _ in first] == [b"one", b"three"]
            assert [(flow.network, flow.target) for flow in one.flows] == [
                ("udp", here),
                ("udp", there),
            ]
            assert len(one.table) == 1

    @every_way
    def test_connected_to_one_target(self, way: Any) -> None:
        with rig() as one, echo() as (target, seen), opened(one, way) as client:
            client.send(connected_to(target) + b"\0\3abc" + b"\0\0" + b"\0\2de")
            client.expect(b"\0\3cba" + b"\0\0" + b"\0\2ed")
            assert [data for data, _ in seen] == [b"abc", b"", b"de"]

    @every_way
    def test_version_1_is_frames_alone(self, way: Any) -> None:
        with (
            rig() as one,
            echo() as (here, first),
            echo() as (there, second),
            opened(one, way, MAGIC_V1) as client,
        ):
            client.send(frame(here, b"one") + frame(there, b"two"))
            answers = client.read(len(frame(here, b"one") * 2))
            assert sorted((answers[:12], answers[12:])) == sorted(
                (frame(here, b"eno"), frame(there, b"owt"))
            )
            assert first[0][1] == second[0][1]

    @every_way
    def test_everything_in_one_segment(self, way: Any) -> None:
        """HAZARDS 16: nothing of what follows the request is lost."""
        with rig() as one, echo() as (target, _):
            handler, ask, answer = way(one, MAGIC)
            with Conversation(handler) as client:
                client.send(ask + ANY + frame(target, b"early"))
                client.expect(answer + frame(target, b"ylrae"))

    @every_way
    def test_byte_by_byte(self, way: Any) -> None:
        """HAZARDS 1."""
        with rig() as one, echo() as (target, _):
            handler, ask, answer = way(one, MAGIC)
            with Conversation(handler) as client:
                client.trickle(ask + ANY + frame(target, b"abc") + frame(target, b"de"))
                client.expect(answer + frame(target, b"cba") + frame(target, b"ed"))

    @every_way
    def test_the_name_in_any_spelling(self, way: Any) -> None:
        with (
            rig() as one,
            echo() as (target, _),
            opened(one, way, b"SP.v2.UDP-over-TCP.arpa.") as client,
        ):
            client.send(ANY + frame(target, b"abc"))
            client.expect(frame(target, b"cba"))

    @every_way
    def test_without_a_relay_it_is_a_name_like_any_other(self, way: Any) -> None:
        dependencies = HandlerDependencies()
        plain = Rig()
        plain.socks4, plain.socks5 = dependencies.socks4(), dependencies.socks5()
        plain.http = HttpHandler(
            "test",
            dependencies.connector,
            Forwarder(dependencies.connector, IDLE),
            dependencies.login,
            dependencies.counters,
        )
        handler, ask, _ = way(plain, MAGIC)
        with Conversation(handler) as client:
            client.send(ask)
            dependencies.dialer.target().close()
            read_to_end(client.socket)
        assert dependencies.dialled == [Address("sp.v2.udp-over-tcp.arpa", 443)]

    @pytest.mark.parametrize(
        "hint",
        [
            b"\0\1\xc0\0\2\1\1\xbb",
            b"\0\3\4a.bc\1\xbb",
            b"\0\4" + bytes(18),
            b"\0\1" + bytes(4) + b"\1\xbb",
        ],
    )
    def test_the_target_of_a_request_that_is_not_connected_is_a_hint(self, hint: bytes) -> None:
        """HAZARDS 26: nothing is routed or dialled for it."""
        with rig() as one, echo() as (target, _), opened(one) as client:
            client.send(hint + frame(target, b"abc"))
            client.expect(frame(target, b"cba"))
            assert [flow.target for flow in one.flows] == [target]

    def test_names(self) -> None:
        """Answers come from where the name led."""
        with rig() as one, echo() as (target, _), opened(one) as client:
            named = b"\2\x0elocalhost.test" + struct.pack(">H", target.port)
            client.send(ANY + named + b"\0\3abc" + frame(target, b"de"))
            client.expect(frame(target, b"cba") + frame(target, b"ed"))
            assert [flow.target.host for flow in one.flows] == ["localhost.test", "127.0.0.1"]
            assert len(one.table) == 1

    def test_a_name_that_is_not_found_is_counted_and_others_go_on(self) -> None:
        with rig() as one, echo() as (target, _), opened(one) as client:
            client.send(ANY + b"\2\x0cnowhere.test\0\x35\0\3abc" + frame(target, b"de"))
            client.expect(frame(target, b"ed"))
            assert one.counts.of("drops", "target failed") == 1

    def test_connected_to_a_name(self) -> None:
        with rig() as one, echo() as (target, _), opened(one) as client:
            client.send(b"\1\3\x0elocalhost.test" + struct.pack(">H", target.port) + b"\0\3abc")
            client.expect(b"\0\3cba")

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
    def test_an_ipv6_target_and_its_answers(self) -> None:
        with rig() as one, echo("::1") as (target, _), opened(one) as client:
            head = b"\1" + bytes(15) + b"\1" + struct.pack(">H", target.port)
            client.send(ANY + head + b"\0\3abc")
            client.expect(head + b"\0\3cba")

    def test_anybody_may_answer_one_that_is_not_connected(self) -> None:
        """HAZARDS 30: with its true source."""
        with rig() as one, udp() as target, udp() as stranger, opened(one) as client:
            client.send(ANY + frame(address_of(target), b"ping"))
            _, peer = target.recvfrom(64)
            stranger.sendto(b"hello", peer)
            client.expect(frame(address_of(stranger), b"hello"))

    def test_only_its_target_may_answer_one_that_is(self) -> None:
        with rig() as one, udp() as target, udp() as stranger, opened(one) as client:
            client.send(connected_to(address_of(target)) + b"\0\4ping")
            _, peer = target.recvfrom(64)
            stranger.sendto(b"forged", peer)
            one.counts.wait_for("drops", "filtered")
            target.sendto(b"pong", peer)
            client.expect(b"\0\4pong")

    def test_two_streams_share_nothing(self) -> None:
        with rig() as one, echo() as (target, seen), opened(one) as first, opened(one) as second:
            for client in (first, second):
                client.send(ANY + frame(target, b"abc"))
                client.expect(frame(target, b"cba"))
            assert len({peer for _, peer in seen}) == 2 and len(one.table) == 2

    def test_trains_to_two_targets(self) -> None:
        with rig() as one, udp() as here, udp() as there, opened(one) as client:
            data = [
                frame(address_of(target), struct.pack(">H", number) * 20)
                for number in range(5)
                for target in (here,) * 5 + (there,) * 3
            ]
            client.send(ANY + b"".join(data))
            for target, times in ((here, 5), (there, 3)):
                assert [target.recv(64) for _ in range(5 * times)] == [
                    struct.pack(">H", number) * 20 for number in range(5) for _ in range(times)
                ]


class TestUotEnds:
    @every_way
    def test_with_the_clients_stream(self, way: Any) -> None:
        """HAZARDS 25."""
        dialer = FakeDialer()
        with rig(dialer) as one:
            with opened(one, way) as client:
                client.send(ANY + frame(Address("192.0.2.1", 9), b"a"))
                wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            one.check_clean()
            assert dialer.conns[0].closed.wait(SECONDS)

    BAD = {
        "ATYP 3": b"\3\xc0\0\2\1\0\x35\0\1a",
        "ATYP 255": b"\xff\xff\xff",
        "empty name": b"\2\0\0\x35\0\1a",
    }

    @pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
    @every_way
    def test_with_a_bad_frame_which_is_counted(self, way: Any, bad: bytes) -> None:
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with rig(dialer) as one, opened(one, way) as client:
            client.send(ANY + frame(target, b"good") + bad + frame(target, b"never"))
            client.expect_closed()
            client.wait()
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"good"]
            assert one.counts.of("drops", "malformed") == 1

    TARGETS = {
        "port 0": b"\0\xc0\0\2\1\0\0",
        "name with a space": b"\2\3a b\0\x35",
        "CRLF": b"\2\6a\r\nb:c\0\x35",
        "not ASCII": b"\2\2\xc3\xbc\0\x35",
        "two dots": b"\2\4a..b\0\x35",
    }

    @pytest.mark.parametrize("bad", TARGETS.values(), ids=TARGETS)
    def test_a_target_that_is_none_is_dropped_and_counted_alone(self, bad: bytes) -> None:
        """HAZARDS 10, 41: each datagram of a train."""
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with rig(dialer) as one, opened(one) as client:
            client.send(ANY + (bad + b"\0\1x") * 3 + frame(target, b"good") + bad + b"\0\1x")
            one.counts.wait_for("drops", "bad target", 4)
            wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            assert [flow.target for flow in one.flows] == [target]

    @pytest.mark.parametrize(
        "bad", [b"\2\1" + bytes(6), b"\0\2" + bytes(6), b"\0\5" + bytes(20), b"\1\3\3a b\0\x35"]
    )
    @every_way
    def test_a_bad_request_closes_the_stream(self, way: Any, bad: bytes) -> None:
        """And not a byte is said that could be taken for a frame."""
        with rig() as one, opened(one, way) as client:
            client.send(bad)
            client.expect_closed()
            client.wait()
            assert one.flows == []
            assert one.counts.of("connections_refused", "no UoT request") == 1

    @pytest.mark.parametrize("cut", range(0, 8))
    def test_a_request_cut_short(self, cut: int) -> None:
        with rig() as one, opened(one) as client:
            client.send(ANY[:cut])
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_closed()
            client.wait()
            assert one.flows == []

    def test_a_request_that_does_not_come_is_not_answered_in_http(self) -> None:
        """HAZARDS 2, 19: the tunnel is open, and what is in it is the client's protocol."""
        with rig() as one:
            handler, ask, answer = by_http(one, MAGIC)
            with Conversation(handler, deadline=0.1) as client:
                client.send(ask)
                client.expect(answer)
                client.expect_closed()

    @every_way
    @pytest.mark.parametrize(
        "asked",
        [b"\1\3\x0cnowhere.test\0\x35", b"\1\1\xc0\0\2\1\0\0"],
        ids=["no such name", "port 0"],
    )
    def test_connected_to_what_cannot_be_is_reset(self, way: Any, asked: bytes) -> None:
        """There is no other way to say it."""
        with rig() as one, opened(one, way) as client:
            client.send(asked + b"\0\1a")
            assert is_reset(client.socket)

    @every_way
    def test_a_way_out_without_udp_is_refused_before_it_is_accepted(self, way: Any) -> None:
        """Each protocol says it in its own words; nothing is dialled, and it is counted and recorded once."""
        dialer = without_udp()
        with rig(dialer) as one:
            handler, ask, _ = way(one, MAGIC)
            with Conversation(handler) as client:
                client.send(ask)
                check_no_udp(way, read_to_end(client.socket))
            assert dialer.flows == []
            check_refused_once(
                one,
                Reason.UNSUPPORTED,
                "fake carries no UDP",
                "sp.v2.udp-over-tcp.arpa",
                "tcp",
                "-",
            )

    def test_connected_by_a_way_out_without_udp_is_reset(self) -> None:
        """Where only that of the target has none: the connection was accepted before it was named."""
        dialer, fine = without_udp(), FakeDialer()
        with rig(dialer) as one:
            one.candidates = lambda flow: [dialer, fine]  # type: ignore[method-assign]
            with opened(one) as client:
                client.send(connected_to(Address("192.0.2.1", 443)))
                assert is_reset(client.socket)
                assert dialer.flows == fine.flows == []
            check_refused_once(one, Reason.UNSUPPORTED, "fake carries no UDP", "192.0.2.1")

    def test_a_denied_target_is_dropped_and_others_pass(self) -> None:
        """HAZARDS 40."""

        class Denied(FakeDialer):
            def dial_packet(self, flow: Flow) -> Any:
                raise DialError(Reason.DENIED)

        fine, denied = FakeDialer(), Denied("denied")
        with rig() as one, opened(one) as client:
            one.route = lambda flow: Route(denied if flow.target.port == 1 else fine, flow)  # type: ignore[method-assign, assignment]
            client.send(
                ANY + frame(Address("192.0.2.1", 1), b"no") + frame(Address("192.0.2.1", 2), b"yes")
            )
            wait_until(lambda: fine.conns and fine.conns[0].sent)
            assert [payload for payload, _ in fine.conns[0].sent] == [b"yes"]
            assert one.counts.of("drops", "target failed") == 1

    def test_a_fault_on_the_way_ends_all_that_the_stream_had(self) -> None:
        """HAZARDS 97: that connection alone, and nothing of it stays in the table."""
        dialer = FakeDialer()

        def route(flow: Flow) -> Route:
            if flow.target.port == 1:
                raise RuntimeError("a fault of ours")
            return Route(dialer, flow)

        one = Rig(dialer)
        one.route = route  # type: ignore[method-assign]
        client = Conversation(one.socks5)
        client.send(
            b"\5\1\0\5\1\0\3\x17" + MAGIC + b"\1\xbb" + ANY + frame(Address("192.0.2.1", 9), b"a")
        )
        wait_until(lambda: dialer.conns and dialer.conns[0].sent)
        client.send(frame(Address("192.0.2.1", 1), b"b"))
        wait_until(lambda: client.raised)
        client.close()
        left = one.empty()
        one.table.close()
        assert isinstance(client.raised, RuntimeError)
        assert left

    def test_port_25_stays_closed_to_connect(self) -> None:
        """HAZARDS 59: though the port beside the name means nothing."""
        with rig() as one, Conversation(one.http) as client:
            client.send(b"CONNECT %b:25 HTTP/1.1\r\nHost: a\r\n\r\n" % MAGIC)
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 403 ")


# -- clients that do not read


class CountedArenas(ArenaPool):
    """Knows how many are taken and not given back."""

    def __init__(self, make: Callable[[], Arena]) -> None:
        super().__init__(make)
        self._lock = threading.Lock()
        self.out = 0

    def take(self) -> Arena:
        with self._lock:
            self.out += 1
        return super().take()

    def give(self, arena: Arena) -> None:
        super().give(arena)
        with self._lock:
            self.out -= 1


class TestClientsThatDoNotRead:
    STREAMS, SIZE = 20, 60_000

    def test_hold_neither_memory_nor_arenas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """HAZARDS 85, 124: while their target floods them each has one small queue, and a thread that waits with nothing."""
        monkeypatch.setattr(stream_udp, "STAY_SECONDS", 0.0)
        with rig(arenas=CountedArenas) as one, udp() as target, ExitStack() as clients:
            peers = [self.open(one, clients, target) for _ in range(self.STREAMS)]
            streams = list(one.table.clients)
            assert len(streams) == self.STREAMS
            longest = self.flood(target, peers, streams)
            wait_until(lambda: one.arenas.out == 0)
            for peer in peers:  # more, though nobody takes it
                target.sendto(bytes(self.SIZE), peer)
            longest = max(longest, *(len(stream._queue) for stream in streams))
            assert one.arenas.out == 0 and all(stream._queue for stream in streams)
            assert longest < QUEUE_LIMIT + 70_000

    @staticmethod
    def open(one: Rig, clients: ExitStack, target: socket.socket) -> tuple:
        """A stream to `target`, and from where its datagrams come there."""
        client = clients.enter_context(Conversation(one.http))
        client.send(request(path(address_of(target))) + capsule(b"hello"))
        client.expect(ACCEPTED)
        return target.recvfrom(64)[1]

    def flood(self, target: socket.socket, peers: list[tuple], streams: list[Any]) -> int:
        """Until something waits for each client, and then some; the most bytes that were seen to wait for one."""
        longest, deadline = 0, time.monotonic() + 4 * SECONDS
        while not all(stream._queue for stream in streams):
            assert time.monotonic() < deadline
            for peer in peers:
                target.sendto(bytes(self.SIZE), peer)
            longest = max(longest, *(len(stream._queue) for stream in streams))
        return longest


# -- both roles against each other, and answers by ways out that resolve elsewhere


@contextmanager
def listening(one: Rig, handler: Any) -> Iterator[Address]:
    def script(sock: socket.socket) -> None:
        stream = Stream(sock)
        stream.limit(SECONDS)
        try:
            run_to_end(handler.handle(stream, Address(*sock.getpeername()[:2])))
        finally:
            stream.close()

    with server(script) as address:
        yield address


def exchange(conn: Any, target: Address, payload: bytes) -> list[bytes]:
    """What comes back for one datagram."""
    arena = Arena()
    conn.send(arena, arena.put(payload), conn.prepare(udp_to(target)))
    found: list[tuple[bytes, Any]] = []
    while not found:
        assert Task(conn.wait).result()
        found = cut(conn.receive(arena))
    assert {conn.source(key) for _, key in found} == {target}
    return [data for data, _ in found]


class TestOurOwnClients:
    @pytest.fixture
    def near(self) -> DirectDialer:
        return DirectDialer(
            TargetResolver(Names(), Anywhere()), UdpSocketFactory(Counts(), Lines()), 2.0
        )  # type: ignore[arg-type]

    def test_connect_udp(self, near: DirectDialer) -> None:
        with (
            rig(auth="required") as one,
            echo() as (target, _),
            listening(one, one.http) as address,
        ):
            conn = HttpDialer(
                Hop("http", "http", address, near, 2.0, "user", "secret"), Counts()
            ).dial_packet(udp_to(target))
            try:
                assert exchange(conn, target, b"abc" * 400) == [b"cba" * 400]
            finally:
                conn.close()

    @pytest.mark.parametrize("kind", ["socks5", "http"])
    def test_uot(self, near: DirectDialer, kind: str) -> None:
        with (
            rig() as one,
            echo() as (here, first),
            echo() as (there, second),
            listening(one, getattr(one, kind)) as address,
        ):
            hop = Hop(kind, kind, address, near, 2.0)
            plain: Any = (
                HttpDialer(hop, Counts(), False)
                if kind == "http"
                else Socks5Dialer(hop, None, no_services(), False)
            )
            conn = UotDialer(plain, plain, Counts()).dial_packet(udp_to(here))
            try:
                assert exchange(conn, here, b"abc") == [b"cba"]
                assert exchange(conn, there, b"defg") == [b"gfed"]
                assert first[0][1] == second[0][1]
            finally:
                conn.close()

    @pytest.mark.parametrize(
        "ask",
        [
            request(path(Address("game.test", 9000))),
            b"CONNECT %b:443 HTTP/1.1\r\nHost: a\r\n\r\n\1\3\x09game.test\x23\x28" % MAGIC,
        ],
        ids=["connect-udp", "connected UoT"],
    )
    def test_a_name_that_is_resolved_by_the_proxy_behind_us_gets_its_answers(
        self, near: DirectDialer, ask: bytes
    ) -> None:
        """They come from an address that nobody here could know."""

        def far_end(sock: socket.socket) -> None:
            read_exactly(sock, 3)
            sock.sendall(b"\5\0")
            read_exactly(sock, 7 + len(MAGIC))
            sock.sendall(b"\5\0\0\1" + bytes(6))
            assert read_exactly(sock, 14) == b"\0\3\x09game.test\x23\x28"
            assert read_exactly(sock, 18) == b"\2\x09game.test\x23\x28\0\3abc"
            sock.sendall(b"\0\xc6\x33\x64\7\x23\x28\0\3cba")
            read_to_end(sock)

        with server(far_end) as address:
            plain = Socks5Dialer(Hop("s", "s", address, near, 2.0), None, no_services(), False)
            with rig(UotDialer(plain, plain, Counts())) as one, Conversation(one.http) as client:
                upgrade = ask.startswith(b"GET")
                client.send(ask)
                client.expect(ACCEPTED if upgrade else ESTABLISHED)
                client.send(capsule(b"abc") if upgrade else b"\0\3abc")
                wait_until(lambda: one.counts.of("drops", "filtered") or not client.silent())
                assert one.counts.of("drops", "filtered") == 0
                client.expect(capsule(b"cba") if upgrade else b"\0\3cba")
