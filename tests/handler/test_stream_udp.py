"""Datagrams in a client's stream: connect-udp, and UDP over TCP through every protocol's CONNECT.

Behind the handlers are the NAT table and real UDP sockets.
"""

from __future__ import annotations

import base64
import socket
import struct
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator

import pytest

from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.dialer.web.http import HttpDialer
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.uot import UotDialer
from netproxy.errors import DialError, EndOfStream, Reason, StreamError
from netproxy.handler.datagrams import stream_service
from netproxy.handler.outbound import Outbound
from netproxy.handler.http import HttpHandler
from netproxy.handler.http_forward import Forwarder
from netproxy.handler.socks.socks4 import Socks4Handler
from netproxy.handler.socks.socks5 import Socks5Handler, Socks5Login
from netproxy.handler.datagrams.stream_udp import StreamUdpRelay
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE, Wait
from netproxy.interfaces.fairness import ClientTask
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.routing import Dialer, Route
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.net.datagram import Arena, ArenaPool
from netproxy.net.frames.framed import QUEUE_LIMIT, FramedSocket
from netproxy.net.stream import Stream, complete
from netproxy.relay.nat import NatTable
from netproxy.resolver.client_names.name_tables import NameTables
from netproxy.relay.quota import SessionLimits
from netproxy.relay.table.policy import NatDependencies, NatPolicy
from tests.support.accounts import account_book
from tests.support.batches import cut
from tests.support.doubles import Counts, Lines, Records, no_packets
from tests.support.flows import Anywhere, NamesNothing, udp_to
from tests.support.handlers import (
    PIPE_LIMITS,
    Conversation,
    HandlerDependencies,
    permission,
    tcp_pair,
)
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
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: connect-udp\r\n"
    b"Capsule-Protocol: ?1\r\n\r\n"
)
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
MAGIC, MAGIC_V1 = b"sp.v2.udp-over-tcp.arpa", b"sp.udp-over-tcp.arpa"
UPGRADE = [b"Connection: Upgrade", b"Upgrade: connect-udp", b"Capsule-Protocol: ?1"]


class Names:
    """Stands in for a Resolver.  Lookups of names block while `gate` is cleared."""

    def __init__(self) -> None:
        self.known = {"localhost.test": "127.0.0.1"}
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def resolve(self, target: Address, client: str = "", seconds: float = SECONDS) -> list[Address]:
        if target.host[-1].isdigit() or ":" in target.host:
            return [target]
        self.asked.set()
        assert self.gate.wait(SECONDS)
        if target.host not in self.known:
            raise DialError(Reason.NAME, target.host)
        return [target._replace(host=self.known[target.host])]


class Rig(NamesNothing):
    """The handlers of a listener that serves datagrams in streams.  It is their Router."""

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
        recorders = (self.counts, self.records, account_book(), self.log)
        renew = NameTables().renew_fake
        dependencies = NatDependencies(self.arenas, self._run, self._run, *recorders, renew)
        self.table = NatTable(NatPolicy(SessionLimits(100, 100)), dependencies)
        permitted = permission(Login(Users({"user": "secret"}), auth), self.counts)
        relay = StreamUdpRelay(
            self, self.table, self.arenas, self.counts, self.records, IDLE, permitted
        )
        connector = Outbound(self, PIPE_LIMITS, self.counts, self.records, account_book(), relay)
        self.http = HttpHandler(
            "test", connector, Forwarder(connector, IDLE), permitted, self.counts, relay
        )
        self.socks4 = Socks4Handler("test", connector, None, permitted)  # type: ignore[arg-type]
        login = Socks5Login(permitted)
        self.socks5 = Socks5Handler("test", connector, None, None, login)  # type: ignore[arg-type]

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
        """Wait until the streams have left nothing behind."""
        wait_until(self.empty)
        wait_until(
            lambda: (
                not [
                    thread
                    for thread in threading.enumerate()
                    if thread.name.startswith("udp-session ")
                ]
            )
        )
        assert not self.log.of("exception") and not self.counts.of("drops", "internal error")

    def _run(self, task: ClientTask) -> None:
        task.run()


@contextmanager
def make_rig(
    dialer: Dialer | None = None, auth: str = "none", arenas: Any = ArenaPool
) -> Iterator[Rig]:
    rig = Rig(dialer, auth, arenas)
    try:
        yield rig
    finally:
        rig.names.gate.set()
    rig.check_clean()


def path(target: Address) -> bytes:
    return b"/.well-known/masque/udp/%b/%d/" % (
        target.host.replace(":", "%3A").encode(),
        target.port,
    )


def request(resource: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join(
        [b"GET %b HTTP/1.1" % resource, b"Host: proxy.test", *UPGRADE, *fields, b"", b""]
    )


def capsule(payload: bytes) -> bytes:
    """Return a DATAGRAM capsule with a payload of up to 16382 bytes."""
    length = len(payload) + 1
    return (
        b"\0"
        + (bytes((length,)) if length < 64 else struct.pack(">H", length | 0x4000))
        + b"\0"
        + payload
    )


def frame(target: Address, payload: bytes) -> bytes:
    return encode_literal(target) + struct.pack(">H", len(payload)) + payload


def encode_literal(target: Address) -> bytes:
    """Return an IPv4 address and its port as a UoT frame has them."""
    return b"\0" + socket.inet_aton(target.host) + struct.pack(">H", target.port)


@contextmanager
def echo(host: str = "127.0.0.1") -> Iterator[tuple[Address, list[tuple[bytes, tuple]]]]:
    """Run a UDP server that replies with each payload reversed.

    Yields its address, and a list of the datagrams it has received with their sources.
    """
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
        b"GET https://example.org/.well-known/masque/udp/192.0.2.6/443/ HTTP/1.1\r\n"
        b"Host: example.org\r\n"
        b"Connection: Upgrade\r\nUpgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
    )

    def test_connect_udp_example_of_rfc_9298_gets_exactly_these_bytes(self) -> None:
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(self.RFC_9298)
            client.expect(ACCEPTED)
            assert client.silent()
            assert (
                dialer.flows
                == [Flow("udp", client.local, Address("192.0.2.6", 443), "test", "")]
                == rig.flows
            )
            assert dialer.conns[0].prepared == [Address("192.0.2.6", 443)]

    @pytest.mark.parametrize(
        "resource",
        [
            b"https://proxy.test/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/",
            b"http://proxy.test:8080/.well-known/masque/udp/2001%3adb8%3a%3a42/443/",
            b"/.well-known/masque/udp/2001%3Adb8%3A%3A42/443/",
        ],
        ids=["https", "http", "origin"],
    )
    def test_connect_udp_to_an_ipv6_target_in_absolute_and_origin_form(
        self, resource: bytes
    ) -> None:
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(resource))
            client.expect(ACCEPTED)
            assert [flow.target for flow in dialer.flows] == [Address("2001:db8::42", 443)]

    def test_connect_udp_carries_datagrams_in_both_directions(self) -> None:
        with make_rig() as rig, echo() as (target, seen):
            with Conversation(rig.http) as client:
                client.send(request(path(target)))
                client.expect(ACCEPTED)
                for payload in (b"ping", b"", b"p", b"x" * 62, b"y" * 63, b"z" * 9000):
                    client.send(capsule(payload))
                    client.expect(capsule(payload[::-1]))
                client.send(b"\0\5\0last")
                client.expect(b"\0\5\0tsal")
            assert len({peer for _, peer in seen}) == 1
            assert [len(data) for data, _ in seen] == [4, 0, 1, 62, 63, 9000, 4]
            rig.check_clean()
            [record] = rig.records.records
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
    def test_connect_udp_reaches_an_ipv6_target(self) -> None:
        with make_rig() as rig, echo("::1") as (target, _), Conversation(rig.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            client.send(capsule(b"six"))
            client.expect(capsule(b"xis"))

    def test_connect_udp_byte_by_byte_is_served(self) -> None:
        """Hazard 1."""
        with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
            client.trickle(request(path(target)))
            client.expect(ACCEPTED)
            client.trickle(capsule(b"abc") + b"\x17\2no" + capsule(b"def"))
            client.expect(capsule(b"cba") + capsule(b"fed"))

    def test_connect_udp_trains_arrive_complete_and_in_order(self) -> None:
        payloads = [struct.pack(">H", number) + b"x" * 98 for number in range(100)] + [b"short"]
        with make_rig() as rig, udp() as target, Conversation(rig.http) as client:
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            client.send(b"".join(map(capsule, payloads)))
            came = [target.recvfrom(65536) for _ in payloads]
            assert [data for data, _ in came] == payloads
            for data, peer in came:
                target.sendto(data, peer)
            client.expect(b"".join(map(capsule, payloads)))

    def test_connect_udp_carries_a_train_of_empty_datagrams(self) -> None:
        """Hazard 27."""
        with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
            client.send(request(path(target)) + capsule(b"") * 5 + capsule(b"end"))
            client.expect(ACCEPTED + capsule(b"") * 5 + capsule(b"dne"))

    def test_connect_udp_capsules_in_the_segment_of_the_request_are_forwarded(self) -> None:
        """Hazards 16, 60.  RFC 9931 forbids them, but they must not stay in a buffer."""
        with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
            client.send(request(path(target)) + capsule(b"early") + b"\0\4\0la")
            client.expect(ACCEPTED + capsule(b"ylrae"))
            client.send(b"t")
            client.expect(capsule(b"tal"))

    def test_connect_udp_lets_only_the_target_reply(self) -> None:
        """Hazard 30.  Neither another address nor another port of the target may."""
        with (
            make_rig() as rig,
            udp() as target,
            udp() as other_host,
            Conversation(rig.http) as client,
        ):
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            client.send(capsule(b"ping"))
            _, peer = target.recvfrom(64)
            other_host.sendto(b"forged", peer)
            rig.counts.wait_for("drops", "filtered")
            target.sendto(b"pong", peer)
            client.expect(capsule(b"pong"))
            assert client.silent() and rig.counts.of("drops", "filtered") == 1

    def test_connect_udp_client_that_sends_nothing_opens_no_mapping_for_replies(self) -> None:
        """Hazard 44."""
        with make_rig() as rig, Conversation(rig.http) as client, udp() as target:
            client.send(request(path(address_of(target))))
            client.expect(ACCEPTED)
            assert nothing_comes(target, 0) and client.silent()

    def test_connect_udp_resolves_a_name_before_it_accepts(self) -> None:
        with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
            rig.names.gate.clear()
            client.send(request(path(Address("LocalHost.Test", target.port))))
            assert rig.names.asked.wait(SECONDS)
            assert client.silent()
            rig.names.gate.set()
            client.expect(ACCEPTED)
            client.send(capsule(b"named"))
            client.expect(capsule(b"deman"))
            assert rig.flows[0].target == Address("localhost.test", target.port)

    def test_connect_udp_loose_spelling_of_an_address_is_that_address(self) -> None:
        """Hazard 11.  The address that rules see is the address that is dialled."""
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(b"/.well-known/masque/udp/%30x7f.1/53/"))
            client.expect(ACCEPTED)
            assert rig.flows[0].target == Address("127.0.0.1", 53)

    def test_connect_udp_stream_that_waits_goes_on_with_the_next_frame(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stream without frames holds no thread."""
        monkeypatch.setattr(stream_service, "STAY_SECONDS", 0.0)
        with make_rig() as rig, echo() as (target, _), Conversation(rig.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            for _ in range(20):
                client.send(capsule(b"abc"))
                client.expect(capsule(b"cba"))

    def test_connect_udp_stream_waits_for_the_idle_time_and_then_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stream_service, "STAY_SECONDS", 0.0)
        dialer = FakeDialer()
        near, far = tcp_pair()
        with make_rig(dialer) as rig, near, far:
            near.sendall(request(path(Address("192.0.2.1", 443))))
            wait: Any = complete(rig.http.handle(Stream(far), address_of(near)))
            assert isinstance(wait, Wait) and not wait.idle
            assert (wait.watched, wait.seconds) == (((far, READABLE),), IDLE)
            assert read_exactly(near, len(ACCEPTED)) == ACCEPTED
            near.sendall(capsule(b"abc"))
            wait = wait.resume(True)
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"abc"]
            assert wait.resume(False) is None
            assert near.recv(1) == b""

    def test_connect_udp_session_that_expired_is_opened_again_by_the_next_datagram(self) -> None:
        """Hazard 34.  The stream lives on."""
        with make_rig() as rig, echo() as (target, seen), Conversation(rig.http) as client:
            client.send(request(path(target)))
            client.expect(ACCEPTED)
            for payload in (b"one", b"two"):
                client.send(capsule(payload))
                client.expect(capsule(payload[::-1]))
                if payload == b"one":
                    rig.table.expire(time.monotonic())
                    for close in rig.table.expire(time.monotonic() + 1000):
                        close()
            assert len(rig.records.records) == 1
            assert [data for data, _ in seen] == [b"one", b"two"]
            assert seen[0][1] != seen[1][1]


class TestConnectUdpEnds:
    @pytest.mark.parametrize("ending", ["close", "half-close", "reset"])
    def test_connect_udp_session_ends_with_the_clients_stream(self, ending: str) -> None:
        """Hazard 25.  The session and its upstream end with the stream."""
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))) + capsule(b"one"))
            client.expect(ACCEPTED)
            [conn] = dialer.conns
            assert len(rig.table) == 1 and len(rig.table.clients) == 1
            if ending == "half-close":
                client.socket.shutdown(socket.SHUT_WR)
                client.expect_end()
            elif ending == "reset":
                client.socket.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                client.socket.close()
            else:
                client.socket.close()
            client.wait()
            assert conn.shut.is_set() and conn.closed.wait(SECONDS)
            rig.check_clean()
            # Of a reset it depends on who notices it first: the reader, or a write of a reply.
            endings = (
                {"association ended", "client reset"}
                if ending == "reset"
                else {"association ended"}
            )
            [record] = rig.records.records
            assert record.ended in endings

    @pytest.mark.parametrize("bad", [b"\0\0", b"\0\xc0\0\1\0\0\0\0\0"])
    def test_connect_udp_stream_ends_with_a_malformed_capsule_which_is_counted(
        self, bad: bytes
    ) -> None:
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
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
            assert rig.counts.of("drops", "malformed") == 1

    def test_connect_udp_datagrams_of_unknown_contexts_are_dropped_and_counted(self) -> None:
        """The record names the client; a capsule of an unknown type is no datagram."""
        dialer = FakeDialer()
        target = Address("192.0.2.1", 443)
        unknown = b"\0\3\1ab" + b"\0\5\x40\2abc" + b"\x17\3abc"
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(target)) + unknown + capsule(b"good"))
            client.expect(ACCEPTED)
            wait_until(lambda: dialer.conns[0].sent)
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"good"]
            assert rig.counts.of("drops", "unknown context") == 2
            for refusal in rig.counts.refusals:
                assert (refusal.client, refusal.listener) == (client.local.host, "test")
                assert refusal.asked == target

    def test_connect_udp_upstream_that_ends_is_dialled_again(self) -> None:
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))))
            client.expect(ACCEPTED)
            dialer.conns[0].shutdown()
            wait_until(lambda: len(rig.table) == 0)
            client.send(capsule(b"again"))
            wait_until(lambda: len(dialer.conns) == 2 and dialer.conns[1].sent)
            assert [payload for payload, _ in dialer.conns[1].sent] == [b"again"]


class TestListenerThatIsGone:
    """A reload has removed the listener and closed its table.

    Streams that it has accepted end with their next datagram.
    """

    def test_connect_udp_stream_of_a_removed_listener_ends(self) -> None:
        dialer = FakeDialer()
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))) + capsule(b"one"))
            client.expect(ACCEPTED)
            wait_until(lambda: dialer.conns[0].sent)
            rig.table.close()
            client.send(capsule(b"two"))
            client.expect_closed()
            client.wait()
            assert rig.counts.of("drops", "association ended") == 1
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"one"] and len(
                dialer.conns
            ) == 1
            assert [record.ended for record in rig.records.records] == ["shutdown"]

    def test_uot_stream_of_a_removed_listener_ends(self) -> None:
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with make_rig(dialer) as rig, opened(rig) as client:
            client.send(ANY + frame(target, b"one"))
            wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            rig.table.close()
            client.send(frame(target, b"two") + frame(target._replace(port=10), b"three"))
            client.expect_closed()
            client.wait()
            assert len(dialer.conns) == 1

    def test_uot_stream_without_session_of_a_removed_listener_ends(self) -> None:
        with make_rig(FakeDialer()) as rig, opened(rig) as client:
            client.send(ANY)
            wait_until(lambda: rig.table.clients)
            rig.table.close()
            client.send(frame(Address("192.0.2.1", 9), b"one"))
            client.expect_closed()
            client.wait()

    def test_session_limit_ends_no_uot_stream(self) -> None:
        """The table is still open: the datagram is dropped, and later ones may pass."""
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with make_rig(dialer) as rig, opened(rig) as client:
            rig.table.set_policy(NatPolicy(SessionLimits(0, 0)))
            client.send(ANY + frame(target, b"one"))
            rig.counts.wait_for("drops", "session limit")
            rig.table.set_policy(NatPolicy(SessionLimits(100, 100)))
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
    def refused(rig: Rig, data: bytes, status: bytes, *fields: bytes) -> None:
        """Check a complete response that closes, and that nothing is left of the session."""
        with Conversation(rig.http) as client:
            client.send(data)
            head, _, body = read_to_end(client.socket).partition(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            assert lines[0] == b"HTTP/1.1 " + status
            assert {b"Connection: close", b"Content-Length: %d" % len(body), *fields} <= set(lines)
            assert not [line for line in lines if line.startswith(b"Upgrade")]
            if not fields:
                assert not [line for line in lines if line.startswith(b"Proxy-Status")]
        rig.check_clean()

    @pytest.mark.parametrize("resource", NOT_A_TARGET.values(), ids=NOT_A_TARGET)
    def test_connect_udp_with_a_bad_path_is_400(self, resource: bytes) -> None:
        """Hazards 10, 41, 58."""
        with make_rig() as rig:
            self.refused(rig, request(resource), b"400 Bad Request")
            assert rig.flows == []

    @pytest.mark.parametrize("field", BODIES)
    def test_connect_udp_that_declares_a_body_is_400(self, field: bytes) -> None:
        """The body would be read as capsules."""
        with make_rig() as rig:
            self.refused(
                rig, request(path(Address("192.0.2.1", 443)), field) + b"hello", b"400 Bad Request"
            )
            assert rig.flows == []

    def test_connect_udp_to_a_name_that_is_not_found_is_502_dns_error(self) -> None:
        with make_rig() as rig:
            self.refused(
                rig,
                request(path(Address("nowhere.test", 443))),
                b"502 Bad Gateway",
                b"Proxy-Status: netproxy; error=dns_error",
            )

    def test_connect_udp_through_an_upstream_without_udp_is_501(self) -> None:
        dialer = without_udp()
        with make_rig(dialer) as rig:
            self.refused(
                rig,
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
    def test_connect_udp_whose_dial_fails_gets_the_reason(
        self, reason: Reason, status: bytes, error: bytes
    ) -> None:
        dialer = FakeDialer()
        dialer.refusal = DialError(reason, "hunter2")
        with make_rig(dialer) as rig:
            self.refused(
                rig,
                request(path(Address("192.0.2.1", 443))),
                status,
                b"Proxy-Status: netproxy; error=" + error,
            )

    def test_uot_to_port_0_is_recorded_once(self) -> None:
        with make_rig(FakeDialer()) as rig, opened(rig) as client:
            client.send(b"\1\1\xc0\0\2\1\0\0")
            assert is_reset(client.socket)
            check_refused_once(
                rig, Reason.REFUSED, "192.0.2.1:0: port 0: connection refused", "192.0.2.1"
            )

    def test_connect_udp_through_an_upstream_without_udp_is_recorded_once(self) -> None:
        with make_rig(without_udp()) as rig:
            self.refused(
                rig,
                request(path(Address("192.0.2.1", 443))),
                b"501 Not Implemented",
                b"Proxy-Status: netproxy; error=proxy_configuration_error",
            )
            check_refused_once(rig, Reason.UNSUPPORTED, "fake carries no UDP", "192.0.2.1")

    @pytest.mark.parametrize("reason", [Reason.REFUSED, Reason.TIMEOUT, Reason.DENIED])
    def test_connect_udp_whose_dial_fails_is_recorded_once(self, reason: Reason) -> None:
        dialer = FakeDialer()
        dialer.refusal = DialError(reason, "192.0.2.1:443")
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 ")
            check_refused_once(rig, reason, reason.value, "192.0.2.1")

    def test_connect_udp_to_a_name_that_is_not_found_is_recorded_once(self) -> None:
        dialer = FakeDialer()
        dialer.refuse_names = DialError(Reason.NAME, "nowhere.test")
        with make_rig(dialer) as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("nowhere.test", 443))))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 502 ")
            check_refused_once(rig, Reason.NAME, Reason.NAME.value, "nowhere.test")

    def test_connect_udp_at_the_session_limit_is_429(self) -> None:
        """Hazard 33."""
        with make_rig() as rig:
            rig.table.set_policy(NatPolicy(SessionLimits(0, 0)))
            self.refused(
                rig,
                request(path(Address("192.0.2.1", 443))),
                b"429 Too Many Requests",
                b"Proxy-Status: netproxy; error=connection_limit_reached",
            )
            assert rig.counts.of("requests_refused", "session limit") == 1

    def test_bytes_behind_a_refused_connect_udp_are_no_request(self) -> None:
        """Hazard 60.  RFC 9931: pipelined bytes of a refused upgrade are discarded."""
        with make_rig() as rig:
            self.refused(
                rig,
                request(b"/nowhere") + request(path(Address("192.0.2.1", 443))),
                b"400 Bad Request",
            )
            assert rig.flows == []

    @pytest.mark.parametrize(
        "fields",
        [
            (),
            (b"Proxy-Authorization: Basic " + base64.b64encode(b"user:wrong"),),
            (b"Proxy-Authorization: Bearer x",),
        ],
    )
    def test_connect_udp_without_credentials_is_407(self, fields: tuple) -> None:
        """Hazards 7, 8."""
        with make_rig(auth="required") as rig:
            self.refused(
                rig,
                request(path(Address("192.0.2.1", 443)), *fields),
                b"407 Proxy Authentication Required",
                b'Proxy-Authenticate: Basic realm="netproxy", charset="UTF-8"',
            )
            assert rig.flows == []

    def test_connect_udp_with_credentials_has_its_user_in_the_flow(self) -> None:
        dialer = FakeDialer()
        with make_rig(dialer, auth="required") as rig, Conversation(rig.http) as client:
            login = b"Proxy-Authorization: Basic " + base64.b64encode(b"user:secret")
            client.send(request(path(Address("192.0.2.1", 443)), login))
            client.expect(ACCEPTED)
            assert [flow.user for flow in rig.flows] == ["user"]

    def test_connect_udp_on_a_listener_without_udp_is_an_ordinary_request(self) -> None:
        dependencies = HandlerDependencies()
        handler = HttpHandler(
            "test",
            dependencies.outbound,
            Forwarder(dependencies.outbound, IDLE),
            dependencies.permission,
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
    def test_request_that_does_not_ask_for_connect_udp_is_400(
        self, changed: tuple[bytes, bytes]
    ) -> None:
        with make_rig() as rig, Conversation(rig.http) as client:
            client.send(request(path(Address("192.0.2.1", 443))).replace(*changed))
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 400 ")
            assert rig.flows == []


# -- UDP over TCP


def by_socks5(rig: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    """Return a handler, the bytes that ask it to connect to `name`, and its replies."""
    return (
        rig.socks5,
        b"\5\1\0" + b"\5\1\0\3" + bytes((len(name),)) + name + b"\1\xbb",
        b"\5\0" + b"\5\0\0\1" + bytes(6),
    )


def by_socks4a(rig: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    return rig.socks4, b"\4\1\1\xbb\0\0\0\1\0" + name + b"\0", b"\0\x5a" + bytes(6)


def by_http(rig: Rig, name: bytes) -> tuple[Any, bytes, bytes]:
    return rig.http, b"CONNECT %b:443 HTTP/1.1\r\nHost: %b:443\r\n\r\n" % (name, name), ESTABLISHED


every_protocol = pytest.mark.parametrize("protocol", [by_socks5, by_socks4a, by_http])
ANY = b"\0\1" + bytes(6)
"""A UoT request that is not connected and has no hint."""


def without_udp() -> FakeDialer:
    dialer = FakeDialer()
    dialer.carries, dialer.refusal = frozenset({"tcp"}), Reason.UNSUPPORTED  # type: ignore[assignment]
    return dialer


def check_no_udp(protocol: Any, answer: bytes) -> None:
    """Check a refusal that says that the proxy does not support UDP."""
    if protocol is by_http:
        lines = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert lines[0] == b"HTTP/1.1 501 Not Implemented"
        assert b"Proxy-Status: netproxy; error=proxy_configuration_error" in lines
    else:
        assert answer == (
            b"\5\0" + b"\5\7\0\1" + bytes(6) if protocol is by_socks5 else b"\0\x5b" + bytes(6)
        )


def check_refused_once(
    rig: Rig, reason: Reason, ended: str, host: str, network: str = "udp", protocol: str = "fake"
) -> None:
    """Check that one failed dial was counted and left one record with its reason."""
    assert {
        key: count for key, count in rig.counts.counts.items() if key[0] == "dial_failures"
    } == {("dial_failures", reason.value): 1}
    [record] = rig.records.records
    assert (record.flow.target.host, record.flow.network, record.upstream, record.ended) == (
        host,
        network,
        protocol,
        ended,
    )
    assert (record.sent, record.received, record.datagrams_sent, record.datagrams_received) == (
        0,
        0,
        0,
        0,
    )


@contextmanager
def opened(rig: Rig, protocol: Any = by_socks5, name: bytes = MAGIC) -> Iterator[Conversation]:
    """Run a client that has been accepted."""
    handler, ask, answer = protocol(rig, name)
    with Conversation(handler) as client:
        client.send(ask)
        client.expect(answer)
        yield client


def connected_to(target: Address) -> bytes:
    return b"\1\1" + socket.inet_aton(target.host) + struct.pack(">H", target.port)


class TestUot:
    @every_protocol
    def test_two_targets_of_a_uot_stream_see_one_port(self, protocol: Any) -> None:
        """Hazard 36.  The mapping is endpoint-independent; a reply names its source."""
        with (
            make_rig() as rig,
            echo() as (here, first),
            echo() as (there, second),
            opened(rig, protocol) as client,
        ):
            client.send(ANY + frame(here, b"one"))
            client.expect(frame(here, b"eno"))
            client.send(frame(there, b"two"))
            client.expect(frame(there, b"owt"))
            client.send(frame(here, b"three"))
            client.expect(frame(here, b"eerht"))
            assert len({peer for _, peer in first + second}) == 1
            assert [data for data, _ in first] == [b"one", b"three"]
            assert [(flow.network, flow.target) for flow in rig.flows] == [
                ("udp", here),
                ("udp", there),
            ]
            assert len(rig.table) == 1

    @every_protocol
    def test_connected_uot_stream_reaches_its_target(self, protocol: Any) -> None:
        with make_rig() as rig, echo() as (target, seen), opened(rig, protocol) as client:
            client.send(connected_to(target) + b"\0\3abc" + b"\0\0" + b"\0\2de")
            client.expect(b"\0\3cba" + b"\0\0" + b"\0\2ed")
            assert [data for data, _ in seen] == [b"abc", b"", b"de"]

    @every_protocol
    def test_uot_version_1_has_frames_without_a_request(self, protocol: Any) -> None:
        with (
            make_rig() as rig,
            echo() as (here, first),
            echo() as (there, second),
            opened(rig, protocol, MAGIC_V1) as client,
        ):
            client.send(frame(here, b"one") + frame(there, b"two"))
            answers = client.read(len(frame(here, b"one") * 2))
            assert sorted((answers[:12], answers[12:])) == sorted(
                (frame(here, b"eno"), frame(there, b"owt"))
            )
            assert first[0][1] == second[0][1]

    @every_protocol
    def test_uot_request_and_frames_in_one_segment_are_served(self, protocol: Any) -> None:
        """Hazard 16.  No byte behind the request is lost."""
        with make_rig() as rig, echo() as (target, _):
            handler, ask, answer = protocol(rig, MAGIC)
            with Conversation(handler) as client:
                client.send(ask + ANY + frame(target, b"early"))
                client.expect(answer + frame(target, b"ylrae"))

    @every_protocol
    def test_uot_byte_by_byte_is_served(self, protocol: Any) -> None:
        """Hazard 1."""
        with make_rig() as rig, echo() as (target, _):
            handler, ask, answer = protocol(rig, MAGIC)
            with Conversation(handler) as client:
                client.trickle(ask + ANY + frame(target, b"abc") + frame(target, b"de"))
                client.expect(answer + frame(target, b"cba") + frame(target, b"ed"))

    @every_protocol
    def test_uot_name_is_recognized_in_any_spelling(self, protocol: Any) -> None:
        with (
            make_rig() as rig,
            echo() as (target, _),
            opened(rig, protocol, b"SP.v2.UDP-over-TCP.arpa.") as client,
        ):
            client.send(ANY + frame(target, b"abc"))
            client.expect(frame(target, b"cba"))

    @every_protocol
    def test_uot_name_on_a_listener_without_udp_is_an_ordinary_name(self, protocol: Any) -> None:
        dependencies = HandlerDependencies()
        plain = Rig()
        plain.socks4, plain.socks5 = dependencies.socks4(), dependencies.socks5()
        plain.http = HttpHandler(
            "test",
            dependencies.outbound,
            Forwarder(dependencies.outbound, IDLE),
            dependencies.permission,
            dependencies.counters,
        )
        handler, ask, _ = protocol(plain, MAGIC)
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
    def test_target_of_an_unconnected_uot_request_is_a_hint(self, hint: bytes) -> None:
        """Hazard 26.  Nothing is routed or dialled for it."""
        with make_rig() as rig, echo() as (target, _), opened(rig) as client:
            client.send(hint + frame(target, b"abc"))
            client.expect(frame(target, b"cba"))
            assert [flow.target for flow in rig.flows] == [target]

    def test_uot_frames_may_name_their_targets(self) -> None:
        """Replies have the address of the name as their source."""
        with make_rig() as rig, echo() as (target, _), opened(rig) as client:
            named = b"\2\x0elocalhost.test" + struct.pack(">H", target.port)
            client.send(ANY + named + b"\0\3abc" + frame(target, b"de"))
            client.expect(frame(target, b"cba") + frame(target, b"ed"))
            assert [flow.target.host for flow in rig.flows] == ["localhost.test", "127.0.0.1"]
            assert len(rig.table) == 1

    def test_uot_name_that_is_not_found_is_counted_and_others_go_on(self) -> None:
        with make_rig() as rig, echo() as (target, _), opened(rig) as client:
            client.send(ANY + b"\2\x0cnowhere.test\0\x35\0\3abc" + frame(target, b"de"))
            client.expect(frame(target, b"ed"))
            assert rig.counts.of("drops", "target failed") == 1

    def test_connected_uot_stream_reaches_a_target_by_name(self) -> None:
        with make_rig() as rig, echo() as (target, _), opened(rig) as client:
            client.send(b"\1\3\x0elocalhost.test" + struct.pack(">H", target.port) + b"\0\3abc")
            client.expect(b"\0\3cba")

    @pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
    def test_uot_reaches_an_ipv6_target(self) -> None:
        with make_rig() as rig, echo("::1") as (target, _), opened(rig) as client:
            head = b"\1" + bytes(15) + b"\1" + struct.pack(">H", target.port)
            client.send(ANY + head + b"\0\3abc")
            client.expect(head + b"\0\3cba")

    def test_anyone_may_reply_to_an_unconnected_uot_stream(self) -> None:
        """Hazard 30.  The reply has its true source."""
        with make_rig() as rig, udp() as target, udp() as other_host, opened(rig) as client:
            client.send(ANY + frame(address_of(target), b"ping"))
            _, peer = target.recvfrom(64)
            other_host.sendto(b"hello", peer)
            client.expect(frame(address_of(other_host), b"hello"))

    def test_only_the_target_may_reply_to_a_connected_uot_stream(self) -> None:
        with make_rig() as rig, udp() as target, udp() as other_host, opened(rig) as client:
            client.send(connected_to(address_of(target)) + b"\0\4ping")
            _, peer = target.recvfrom(64)
            other_host.sendto(b"forged", peer)
            rig.counts.wait_for("drops", "filtered")
            target.sendto(b"pong", peer)
            client.expect(b"\0\4pong")

    def test_two_uot_streams_share_no_session(self) -> None:
        with (
            make_rig() as rig,
            echo() as (target, seen),
            opened(rig) as first,
            opened(rig) as second,
        ):
            for client in (first, second):
                client.send(ANY + frame(target, b"abc"))
                client.expect(frame(target, b"cba"))
            assert len({peer for _, peer in seen}) == 2 and len(rig.table) == 2

    def test_uot_trains_to_two_targets_arrive_in_order(self) -> None:
        with make_rig() as rig, udp() as here, udp() as there, opened(rig) as client:
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
    @every_protocol
    def test_uot_session_ends_with_the_clients_stream(self, protocol: Any) -> None:
        """Hazard 25."""
        dialer = FakeDialer()
        with make_rig(dialer) as rig:
            with opened(rig, protocol) as client:
                client.send(ANY + frame(Address("192.0.2.1", 9), b"a"))
                wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            rig.check_clean()
            assert dialer.conns[0].closed.wait(SECONDS)

    BAD_FRAMES = {
        "ATYP 3": b"\3\xc0\0\2\1\0\x35\0\1a",
        "ATYP 255": b"\xff\xff\xff",
        "empty name": b"\2\0\0\x35\0\1a",
    }

    @pytest.mark.parametrize("bad", BAD_FRAMES.values(), ids=BAD_FRAMES)
    @every_protocol
    def test_uot_stream_ends_with_a_bad_frame_which_is_counted(
        self, protocol: Any, bad: bytes
    ) -> None:
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with make_rig(dialer) as rig, opened(rig, protocol) as client:
            client.send(ANY + frame(target, b"good") + bad + frame(target, b"never"))
            client.expect_closed()
            client.wait()
            assert [payload for payload, _ in dialer.conns[0].sent] == [b"good"]
            assert rig.counts.of("drops", "malformed") == 1

    BAD_TARGETS = {
        "port 0": b"\0\xc0\0\2\1\0\0",
        "name with a space": b"\2\3a b\0\x35",
        "CRLF": b"\2\6a\r\nb:c\0\x35",
        "not ASCII": b"\2\2\xc3\xbc\0\x35",
        "two dots": b"\2\4a..b\0\x35",
    }

    @pytest.mark.parametrize("bad", BAD_TARGETS.values(), ids=BAD_TARGETS)
    def test_uot_datagram_to_a_bad_target_is_dropped_and_counted_alone(self, bad: bytes) -> None:
        """Hazards 10, 41.  So is each datagram of a train."""
        dialer, target = FakeDialer(), Address("192.0.2.1", 9)
        with make_rig(dialer) as rig, opened(rig) as client:
            client.send(ANY + (bad + b"\0\1x") * 3 + frame(target, b"good") + bad + b"\0\1x")
            rig.counts.wait_for("drops", "bad target", 4)
            wait_until(lambda: dialer.conns and dialer.conns[0].sent)
            assert [flow.target for flow in rig.flows] == [target]

    @pytest.mark.parametrize(
        "bad", [b"\2\1" + bytes(6), b"\0\2" + bytes(6), b"\0\5" + bytes(20), b"\1\3\3a b\0\x35"]
    )
    @every_protocol
    def test_bad_uot_request_closes_the_stream(self, protocol: Any, bad: bytes) -> None:
        """No byte is sent that could be taken for a frame."""
        with make_rig() as rig, opened(rig, protocol) as client:
            client.send(bad)
            client.expect_closed()
            client.wait()
            assert rig.flows == []
            assert rig.counts.of("connections_refused", "no UoT request") == 1

    @pytest.mark.parametrize("cut", range(0, 8))
    def test_uot_request_that_is_cut_short_closes_the_stream(self, cut: int) -> None:
        with make_rig() as rig, opened(rig) as client:
            client.send(ANY[:cut])
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_closed()
            client.wait()
            assert rig.flows == []
            assert isinstance(client.raised, EndOfStream)
            assert not rig.counts.of("connections_refused", "no UoT request")

    @pytest.mark.parametrize("asked", [ANY, b"\1\1\xc0\0\2\1\0\x35"], ids=["any", "connected"])
    def test_fault_of_an_open_uot_stream_is_no_bad_request(
        self, asked: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def receive(*_: object) -> Any:
            raise StreamError("the stream failed")

        monkeypatch.setattr(FramedSocket, "receive", receive)
        with make_rig(FakeDialer()) as rig:
            with opened(rig) as client:
                client.send(asked + b"\0\1a")
                client.expect_closed()
                client.wait()
                assert isinstance(client.raised, StreamError)
                assert not rig.counts.of("connections_refused", "no UoT request")
            rig.check_clean()

    def test_missing_uot_request_is_not_answered_in_http(self) -> None:
        """Hazards 2, 19.  The stream is open and belongs to the client's protocol."""
        with make_rig() as rig:
            handler, ask, answer = by_http(rig, MAGIC)
            with Conversation(handler, deadline=0.1) as client:
                client.send(ask)
                client.expect(answer)
                client.expect_closed()

    @every_protocol
    @pytest.mark.parametrize(
        "asked",
        [b"\1\3\x0cnowhere.test\0\x35", b"\1\1\xc0\0\2\1\0\0"],
        ids=["no such name", "port 0"],
    )
    def test_uot_stream_connected_to_an_impossible_target_is_reset(
        self, protocol: Any, asked: bytes
    ) -> None:
        """UoT has no message for an error."""
        with make_rig() as rig, opened(rig, protocol) as client:
            client.send(asked + b"\0\1a")
            assert is_reset(client.socket)

    @every_protocol
    def test_uot_through_an_upstream_without_udp_is_refused_before_it_is_accepted(
        self, protocol: Any
    ) -> None:
        """Each protocol has its own reply.  Nothing is dialled; one record is written."""
        dialer = without_udp()
        with make_rig(dialer) as rig:
            handler, ask, _ = protocol(rig, MAGIC)
            with Conversation(handler) as client:
                client.send(ask)
                check_no_udp(protocol, read_to_end(client.socket))
            assert dialer.flows == []
            check_refused_once(
                rig,
                Reason.UNSUPPORTED,
                "fake carries no UDP",
                "sp.v2.udp-over-tcp.arpa",
                "tcp",
                "-",
            )

    def test_uot_stream_connected_through_an_upstream_without_udp_is_reset(self) -> None:
        """Other upstreams carry UDP: the stream was accepted before it named its target."""
        dialer, fine = without_udp(), FakeDialer()
        with make_rig(dialer) as rig:
            rig.candidates = lambda flow: [dialer, fine]  # type: ignore[method-assign]
            with opened(rig) as client:
                client.send(connected_to(Address("192.0.2.1", 443)))
                assert is_reset(client.socket)
                assert dialer.flows == fine.flows == []
            check_refused_once(rig, Reason.UNSUPPORTED, "fake carries no UDP", "192.0.2.1")

    def test_uot_datagram_to_a_denied_target_is_dropped_and_others_pass(self) -> None:
        """Hazard 40."""

        class Denied(FakeDialer):
            def dial_packet(self, flow: Flow) -> Any:
                raise DialError(Reason.DENIED)

        fine, denied = FakeDialer(), Denied("denied")
        with make_rig() as rig, opened(rig) as client:
            rig.route = lambda flow: Route(denied if flow.target.port == 1 else fine, flow)  # type: ignore[method-assign, assignment]
            client.send(
                ANY + frame(Address("192.0.2.1", 1), b"no") + frame(Address("192.0.2.1", 2), b"yes")
            )
            wait_until(lambda: fine.conns and fine.conns[0].sent)
            assert [payload for payload, _ in fine.conns[0].sent] == [b"yes"]
            assert rig.counts.of("drops", "target failed") == 1

    def test_exception_in_the_router_ends_the_stream_and_its_sessions(self) -> None:
        """Hazard 97.  It ends that connection alone, and nothing of it stays in the table."""
        dialer = FakeDialer()

        def route(flow: Flow) -> Route:
            if flow.target.port == 1:
                raise RuntimeError("a fault of ours")
            return Route(dialer, flow)

        rig = Rig(dialer)
        rig.route = route  # type: ignore[method-assign]
        client = Conversation(rig.socks5)
        client.send(
            b"\5\1\0\5\1\0\3\x17" + MAGIC + b"\1\xbb" + ANY + frame(Address("192.0.2.1", 9), b"a")
        )
        wait_until(lambda: dialer.conns and dialer.conns[0].sent)
        client.send(frame(Address("192.0.2.1", 1), b"b"))
        wait_until(lambda: client.raised)
        client.close()
        left = rig.empty()
        rig.table.close()
        assert isinstance(client.raised, RuntimeError)
        assert left

    def test_connect_to_port_25_is_refused_for_the_uot_name_too(self) -> None:
        """Hazard 59.  It does, although the port beside the name has no meaning."""
        with make_rig() as rig, Conversation(rig.http) as client:
            client.send(b"CONNECT %b:25 HTTP/1.1\r\nHost: a\r\n\r\n" % MAGIC)
            assert read_to_end(client.socket).startswith(b"HTTP/1.1 403 ")


# -- clients that do not read


class CountedArenas(ArenaPool):
    """Counts the arenas that are taken and not given back."""

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

    def test_clients_that_do_not_read_hold_neither_memory_nor_arenas(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Hazards 85, 124.  Their target floods them.

        Each has one small queue, and a thread that waits without an arena.
        """
        monkeypatch.setattr(stream_service, "STAY_SECONDS", 0.0)
        with make_rig(arenas=CountedArenas) as rig, udp() as target, ExitStack() as clients:
            peers = [self.open(rig, clients, target) for _ in range(self.STREAMS)]
            streams = list(rig.table.clients)
            assert len(streams) == self.STREAMS
            longest = self.flood(target, peers, streams)
            wait_until(lambda: rig.arenas.out == 0)
            # More datagrams, though no client takes them.
            for peer in peers:
                target.sendto(bytes(self.SIZE), peer)
            longest = max(longest, *(len(stream._queue) for stream in streams))
            assert rig.arenas.out == 0 and all(stream._queue for stream in streams)
            assert longest < QUEUE_LIMIT + 70_000

    @staticmethod
    def open(rig: Rig, clients: ExitStack, target: socket.socket) -> tuple:
        """Open a stream to `target`; return the source of its datagrams there."""
        client = clients.enter_context(Conversation(rig.http))
        client.send(request(path(address_of(target))) + capsule(b"hello"))
        client.expect(ACCEPTED)
        return target.recvfrom(64)[1]

    def flood(self, target: socket.socket, peers: list[tuple], streams: list[Any]) -> int:
        """Send until bytes wait for each client; return the most that waited for one."""
        longest, deadline = 0, time.monotonic() + 4 * SECONDS
        while not all(stream._queue for stream in streams):
            assert time.monotonic() < deadline
            for peer in peers:
                target.sendto(bytes(self.SIZE), peer)
            longest = max(longest, *(len(stream._queue) for stream in streams))
        return longest


# -- our own dialers as clients, and upstreams that resolve names


@contextmanager
def listening(rig: Rig, handler: Any) -> Iterator[Address]:
    def script(sock: socket.socket) -> None:
        stream = Stream(sock)
        stream.limit(SECONDS)
        try:
            run_to_end(complete(handler.handle(stream, Address(*sock.getpeername()[:2]))))
        finally:
            stream.close()

    with server(script) as address:
        yield address


def exchange(conn: Any, target: Address, payload: bytes) -> list[bytes]:
    """Send one datagram; return the replies."""
    arena = Arena()
    conn.send(arena, arena.put(payload), conn.prepare(udp_to(target)))
    received: list[tuple[bytes, Any]] = []
    while not received:
        assert Task(conn.wait).result()
        received = cut(conn.receive(arena))
    assert {conn.source(key) for _, key in received} == {target}
    return [data for data, _ in received]


class TestOurOwnClients:
    @pytest.fixture
    def near(self) -> DirectDialer:
        return DirectDialer(
            TargetResolver(Names(), Anywhere()), UdpSocketFactory(Counts(), Lines()), 2.0
        )  # type: ignore[arg-type]

    def test_our_http_dialer_reaches_a_target_through_connect_udp(self, near: DirectDialer) -> None:
        with (
            make_rig(auth="required") as rig,
            echo() as (target, _),
            listening(rig, rig.http) as address,
        ):
            conn = HttpDialer(
                Hop("http", "http", address, near, 2.0, "user", "secret"), Counts()
            ).dial_packet(udp_to(target))
            try:
                assert exchange(conn, target, b"abc" * 400) == [b"cba" * 400]
            finally:
                conn.close()

    @pytest.mark.parametrize("kind", ["socks5", "http"])
    def test_our_uot_dialer_reaches_targets_through_our_relay(
        self, near: DirectDialer, kind: str
    ) -> None:
        with (
            make_rig() as rig,
            echo() as (here, first),
            echo() as (there, second),
            listening(rig, getattr(rig, kind)) as address,
        ):
            hop = Hop(kind, kind, address, near, 2.0)
            plain: Any = (
                HttpDialer(hop, Counts(), False)
                if kind == "http"
                else Socks5Dialer(hop, None, no_packets(), False)
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
    def test_replies_to_a_name_that_the_upstream_resolves_pass_the_filtering(
        self, near: DirectDialer, ask: bytes
    ) -> None:
        """They come from an address that only the upstream proxy knows."""

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
            plain = Socks5Dialer(Hop("s", "s", address, near, 2.0), None, no_packets(), False)
            with (
                make_rig(UotDialer(plain, plain, Counts())) as rig,
                Conversation(rig.http) as client,
            ):
                upgrade = ask.startswith(b"GET")
                client.send(ask)
                client.expect(ACCEPTED if upgrade else ESTABLISHED)
                client.send(capsule(b"abc") if upgrade else b"\0\3abc")
                wait_until(lambda: rig.counts.of("drops", "filtered") or not client.silent())
                assert rig.counts.of("drops", "filtered") == 0
                client.expect(capsule(b"cba") if upgrade else b"\0\3cba")
