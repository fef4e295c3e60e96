"""UDP through a SOCKS5 proxy: headers in both directions, drops, and the life of an association."""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.dialer.direct import DirectDialer, TargetResolver
from netproxy.dialer.hop import Hop
from netproxy.interfaces.datagrams import PacketDependencies
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.socks5_udp import Socks5PacketConn
from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, PacketConn, Run, Span
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena, PinnedHeader
from netproxy.net.stream import Stream
from netproxy.protocol.socks5 import encode_header, encode_reply
from tests.support.doubles import Counts
from tests.support.flows import Anywhere, tcp_to, udp_to
from tests.support.sockets import read_exactly, read_to_end, server
from tests.support.upstreams import FakeConn, FakeDialer, FakePool, payloads

TARGET = Address("198.51.100.7", 53)
NAME = Address("example.com", 53)
RELAY, OTHER_RELAY = Address("192.0.2.1", 4000), Address("192.0.2.2", 4001)
CLIENT = Address("127.0.0.1", 5000)
PITCH = 2048

Watched = list[tuple[Stream, Callable[[], None]]]


class FakeVia(FakeConn):
    """The packet connection of the hop before: keeps headers, and can deliver whole spans."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[Any, Run, Any]] = []
        self.spans: list[Span] = []
        """Received instead of what was offered, if there are any."""

    def send(self, arena: Any, run: Run, destination: Any) -> None:
        self.runs.append((arena, run, destination))
        header = run.header.data if run.header else b""
        self.sent += [(header + payload, destination) for payload in payloads(arena, run)]

    def receive(self, arena: Any) -> Batch:
        return Batch(arena, self.spans) if self.spans else super().receive(arena)


class FakeRelay:
    """A RelaySource: control connections are socket pairs, the way to the relay is a double."""

    def __init__(self, bound: Address = RELAY, via: PacketConn | None = None) -> None:
        self.bound = bound
        self.via: Any = via or FakeVia()
        self.controls: list[socket.socket] = []
        """The proxy's ends of the control connections."""
        self.dialled: list[Address] = []
        self.refusal: DialError | None = None
        """Raised by associate()."""
        self.unreachable: DialError | None = None
        """Raised by dial_relay()."""

    def associate(self) -> tuple[Stream, Address]:
        if self.refusal:
            raise self.refusal
        near, far = socket.socketpair()
        self.controls.append(far)
        return Stream(near), self.bound

    def dial_relay(self, relay: Address) -> Any:
        self.dialled.append(relay)
        if self.unreachable:
            raise self.unreachable
        return self.via

    def end(self) -> None:
        for control in self.controls:
            control.close()


class Rig:
    """A connection under test with its relay, its dependencies and an arena."""

    def __init__(self, target_resolver: TargetResolver | None = None) -> None:
        self.relay, self.counts, self.pool = FakeRelay(), Counts(), FakePool(eager=False)
        self.via: FakeVia = self.relay.via
        self.arena = Arena()
        self.watched: Watched = []
        self.dependencies = PacketDependencies(
            lambda stream, call: self.watched.append((stream, call)), self.pool.submit, self.counts
        )
        self.conn = Socks5PacketConn(self.relay, target_resolver, self.dependencies)

    def lose_association(self) -> None:
        """Let the proxy end the control connection, and the poller notice it."""
        self.relay.controls[-1].close()
        self.watched[-1][1]()

    def send(self, data: bytes, target: Address = TARGET) -> None:
        self.conn.send(self.arena, self.arena.put(data), self.conn.prepare(udp_to(target)))

    def receive(self, datagrams: list[bytes], peer: Any = RELAY) -> list[tuple[bytes, Address]]:
        """Receive datagrams that the relay sends as one span; only the last may be shorter."""
        for number, data in enumerate(datagrams):
            self.arena.view[number * PITCH : number * PITCH + len(data)] = data
        offsets = range(0, len(datagrams) * PITCH, PITCH)
        self.via.spans = [(offsets, len(datagrams[0]), len(datagrams[-1]), peer)]
        self.batch = self.conn.receive(self.arena)
        return [
            (payload, self.conn.source(key))
            for at, length, last, key in self.batch.spans
            for payload in payloads(self.arena, Run(at, length, last))
        ]

    def drops(self, reason: str) -> int:
        return self.counts.of("drops", reason)

    def end(self) -> None:
        self.conn.close()
        for stream, call in self.watched:
            if stream.socket.fileno() >= 0:
                call()
        self.relay.end()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.end()


class TestSend:
    def test_run_goes_to_the_relay_behind_the_header_of_its_target(self, rig: Rig) -> None:
        rig.send(b"query")
        assert rig.via.sent == [(b"\0\0\0\x01\xc6\x33\x64\x07\x00\x35query", "to 192.0.2.1:4000")]
        assert rig.relay.dialled == rig.via.prepared == [RELAY]

    def test_send_does_not_copy_payloads(self, rig: Rig) -> None:
        run = Run(range(0, 3 * PITCH, PITCH), 100, 40)
        rig.conn.send(rig.arena, run, rig.conn.prepare(udp_to(TARGET)))
        ((arena, sent, _),) = rig.via.runs
        assert arena is rig.arena and sent is run
        assert (run.offsets, run.length, run.last) == (range(0, 3 * PITCH, PITCH), 100, 40)

    def test_header_of_the_next_hop_follows_ours(self, rig: Rig) -> None:
        """The joined header is made once."""
        destination = rig.conn.prepare(udp_to(RELAY))
        inner = PinnedHeader(encode_header(TARGET))
        joined = []
        for _ in range(2):
            run = rig.arena.put(b"x")
            run.header = inner
            rig.conn.send(rig.arena, run, destination)
            joined.append(run.header)
        data = encode_header(RELAY) + encode_header(TARGET) + b"x"
        assert [sent for sent, _ in rig.via.sent] == [data] * 2
        assert joined[0] is joined[1]

    def test_name_of_a_target_goes_to_the_proxy_without_a_resolver(self, rig: Rig) -> None:
        rig.send(b"x", NAME)
        assert rig.via.sent[0][0] == b"\0\0\0\x03\x0bexample.com\x00\x35x"

    def test_name_of_a_target_is_looked_up_with_a_resolver(self) -> None:
        class Resolver:
            def resolve(
                self, target: Address, client: str = "", seconds: float = 0.0
            ) -> list[Address]:
                return [target._replace(host="203.0.113.5")]

            def known(self, target: Address) -> None:
                raise AssertionError

        rig = Rig(TargetResolver(Resolver(), Anywhere()))
        rig.send(b"x", NAME)
        assert rig.via.sent[0][0] == b"\0\0\0\x01\xcb\x00\x71\x05\x00\x35x"
        rig.end()


class TestReceive:
    @pytest.mark.parametrize("source", [TARGET, Address("2001:db8::7", 443), NAME])
    @pytest.mark.parametrize("payload", [b"", b"x", b"answer" * 200])
    def test_header_is_removed_and_names_the_source(
        self, rig: Rig, source: Address, payload: bytes
    ) -> None:
        assert rig.receive([encode_header(source) + payload]) == [(payload, source)]
        assert not rig.counts.counts

    @pytest.mark.parametrize("count", [2, 16, 17, 40])
    def test_span_with_one_header_stays_one_span(self, rig: Rig, count: int) -> None:
        datagrams = [b"%04d" % number for number in range(count - 1)] + [b"end"]
        received = rig.receive([encode_header(TARGET) + data for data in datagrams])
        assert received == [(data, TARGET) for data in datagrams]
        assert len(rig.batch.spans) == 1

    @pytest.mark.parametrize("count", [2, 16, 17, 40])
    def test_span_with_different_headers_is_split(self, rig: Rig, count: int) -> None:
        sources = [TARGET._replace(port=number + 1) for number in range(count)]
        datagrams = [encode_header(source) + b"data" for source in sources]
        received = rig.receive([*datagrams[:-1], datagrams[-1][:-1]])
        assert received == [(b"data", source) for source in sources[:-1]] + [(b"dat", sources[-1])]
        assert len(rig.batch.spans) == count

    def test_span_without_a_regular_pitch_is_split(self, rig: Rig) -> None:
        data = encode_header(TARGET) + b"x"
        for offset in (0, PITCH, 3 * PITCH):
            rig.arena.view[offset : offset + len(data)] = data
        rig.via.spans = [((0, PITCH, 3 * PITCH), len(data), len(data), RELAY)]
        spans = rig.conn.receive(rig.arena).spans
        assert [span[0] for span in spans] == [(10,), (PITCH + 10,), (3 * PITCH + 10,)]

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0\0\0\1",
            encode_header(TARGET)[:-1],
            b"\0\0\0\2" + bytes(30),
            encode_header(NAME)[:-1],
            b"\0\0\0\3\xff" + bytes(100),
            b"\0\0\0\3\0" + bytes(5),
            b"\0\0\0\3\3a b\0\x35x",
            encode_header(Address("::1", 1))[:-1],
        ],
    )
    def test_malformed_datagram_is_dropped_and_counted(self, rig: Rig, data: bytes) -> None:
        assert rig.receive([data]) == []
        assert rig.drops("malformed") == 1

    def test_fragment_is_dropped_and_counted_as_one(self, rig: Rig) -> None:
        assert rig.receive([b"\0\0\1" + encode_header(TARGET)[3:] + b"fragment"]) == []
        assert (rig.drops("fragment"), rig.drops("malformed")) == (1, 0)

    def test_bad_datagrams_in_a_span_do_not_affect_the_others(self, rig: Rig) -> None:
        good = encode_header(TARGET) + b"good"
        received = rig.receive([good, b"\0\0\1" + good[3:], good, good[:5]])
        assert received == [(b"good", TARGET)] * 2
        assert (rig.drops("fragment"), rig.drops("malformed")) == (1, 1)

    def test_datagrams_of_another_host_are_dropped_and_counted(self, rig: Rig) -> None:
        """Another port of the relay's host is accepted."""
        data = encode_header(TARGET) + b"x"
        assert rig.receive([data] * 3, OTHER_RELAY) == []
        assert rig.drops("unknown sender") == 3
        assert rig.receive([data], RELAY._replace(port=9)) == [(b"x", TARGET)]


class TestLostAssociation:
    def test_lost_association_is_replaced_and_datagrams_go_to_the_new_relay(self, rig: Rig) -> None:
        destination = rig.conn.prepare(udp_to(TARGET))
        rig.relay.bound = OTHER_RELAY
        rig.lose_association()
        assert rig.watched[0][0].socket.fileno() == -1
        assert len(rig.pool.tasks) == 1 and not rig.via.shut.is_set()
        rig.pool.run()
        rig.conn.send(rig.arena, rig.arena.put(b"x"), destination)
        assert rig.via.sent == [(encode_header(TARGET) + b"x", "to 192.0.2.2:4001")]
        assert rig.receive([encode_header(TARGET) + b"y"], OTHER_RELAY) == [(b"y", TARGET)]
        assert rig.receive([encode_header(TARGET) + b"y"], RELAY) == []

    def test_datagrams_without_an_association_are_dropped_and_counted(self, rig: Rig) -> None:
        rig.lose_association()
        run = Run(range(0, 3 * PITCH, PITCH), 10, 10)
        rig.conn.send(rig.arena, run, rig.conn.prepare(udp_to(TARGET)))
        assert rig.via.sent == [] and rig.drops("association lost") == 3
        rig.pool.run()
        rig.send(b"x")
        assert len(rig.via.sent) == 1 and rig.drops("association lost") == 3

    def test_datagram_without_an_association_does_not_open_a_second_one(self, rig: Rig) -> None:
        rig.lose_association()
        rig.send(b"x")
        rig.pool.run()
        assert len(rig.relay.controls) == 2

    def test_bytes_on_the_control_connection_are_ignored(self, rig: Rig) -> None:
        """The connection is watched again after each of them."""
        for turn in range(1, 4):
            rig.relay.controls[0].sendall(b"hello?")
            rig.watched[-1][1]()
            assert len(rig.watched) == turn + 1
        rig.send(b"x")
        assert len(rig.via.sent) == 1 and rig.pool.tasks == []

    def test_refused_replacement_ends_the_packet_connection(self, rig: Rig) -> None:
        """The session ends with it; the client's next datagram begins another one."""
        rig.relay.refusal = DialError(Reason.REFUSED)
        rig.lose_association()
        rig.pool.run()
        assert rig.via.shut.is_set() and not rig.conn.wait()
        rig.send(b"x")
        assert rig.via.sent == [] and rig.drops("association lost") == 1
        assert rig.pool.tasks == [] and len(rig.relay.controls) == 1

    def test_replacement_that_comes_after_shutdown_is_closed(self, rig: Rig) -> None:
        rig.lose_association()
        rig.conn.shutdown()
        rig.pool.run()
        assert rig.relay.controls[-1].recv(1) == b""
        rig.send(b"x")
        assert rig.via.sent == [] and rig.pool.tasks == []

    @pytest.mark.parametrize("lost", [False, True])
    def test_shutdown_and_close_pass_to_the_hop_before(self, rig: Rig, lost: bool) -> None:
        if lost:
            rig.lose_association()
        rig.conn.shutdown()
        assert rig.via.shut.is_set() and not rig.via.closed.is_set()
        rig.conn.close()
        assert rig.via.closed.is_set()


class HopBefore(FakeDialer):
    """The hop before: streams go to a scripted server, packet connections are doubles."""

    def __init__(self, direct: DirectDialer, server: Address, name: str) -> None:
        super().__init__(name)
        self._direct, self._server = direct, server

    def dial(self, flow: Flow) -> Stream:
        return self._direct.dial(tcp_to(self._server))


class TestAssociate:
    FLOW = Flow("udp", CLIENT, TARGET, "main", "")
    HOP = Address("192.0.2.99", 1080)

    def dial(
        self, direct: DirectDialer, reply: bytes, before: str = "direct", hop: Address = HOP
    ) -> FakeConn:
        """Dial through a proxy that replies so; return the packet connection of the hop before."""

        def script(sock: socket.socket) -> None:
            assert read_exactly(sock, 3) == b"\5\1\0"
            sock.sendall(b"\5\0")
            assert read_exactly(sock, 10) == b"\5\3\0\1" + bytes(6)
            sock.sendall(reply)
            read_to_end(sock)

        with server(script) as address:
            self.before = HopBefore(direct, address, before)
            watched: Watched = []
            dependencies = PacketDependencies(
                lambda stream, call: watched.append((stream, call)), lambda task: False, Counts()
            )
            url = f"socks5h://{hop}"
            dialer = Socks5Dialer(Hop(url, url, hop, self.before, 2.0), None, dependencies)
            dialer.dial_packet(self.FLOW).close()
            for _, call in watched:
                call()
        return self.before.conns[0]

    def test_relay_is_at_the_address_in_the_reply(self, direct: DirectDialer) -> None:
        """The flow to the relay has no listener: it is NetProxy's own."""
        assert self.dial(direct, encode_reply(0, RELAY)).prepared == [RELAY]
        assert self.before.flows == [self.FLOW._replace(target=RELAY, listener="")]

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    @pytest.mark.parametrize(
        "before, relay", [("direct", "127.0.0.1"), ("socks5://192.0.2.98:1080", "192.0.2.99")]
    )
    def test_relay_at_an_unspecified_address_is_at_the_proxys(
        self, direct: DirectDialer, host: str, before: str, relay: str
    ) -> None:
        conn = self.dial(direct, encode_reply(0, Address(host, 4000)), before)
        assert conn.prepared == [Address(relay, 4000)]

    @pytest.mark.parametrize(
        "reply, reason",
        [(1, Reason.GENERAL), (2, Reason.DENIED), (7, Reason.UNSUPPORTED), (99, Reason.GENERAL)],
    )
    def test_refused_association_names_the_hop_and_dials_no_relay(
        self, direct: DirectDialer, reply: int, reason: Reason
    ) -> None:
        with pytest.raises(DialError) as caught:
            self.dial(direct, encode_reply(reply, Address("0.0.0.0", 0)))
        assert caught.value.reason is reason
        assert str(caught.value).startswith(f"socks5h://{self.HOP}: UDP ASSOCIATE")
        assert self.before.conns == []

    @pytest.mark.parametrize("dialled", [False, True])
    def test_unreachable_relay_closes_everything(self, dialled: bool) -> None:
        """The dial to the relay fails, or the relay's name is not found afterwards."""
        relay = FakeRelay()
        if dialled:
            relay.via.refusal = DialError(Reason.NAME)
        else:
            relay.unreachable = DialError(Reason.REFUSED)
        dependencies = PacketDependencies(lambda stream, call: None, lambda task: False, Counts())
        with pytest.raises(DialError):
            Socks5PacketConn(relay, None, dependencies)
        assert relay.controls[0].recv(1) == b""
        assert relay.via.closed.is_set() is dialled
        relay.end()

    def test_connection_lost_right_after_the_reply_is_a_dial_error(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def peer_address(stream: Stream) -> Address:
            """Do what a reset connection does."""
            stream.close()
            raise StreamError("not connected")

        monkeypatch.setattr(Stream, "peer_address", peer_address)
        with pytest.raises(DialError):
            self.dial(direct, encode_reply(0, Address("0.0.0.0", 4000)))


def test_relay_with_a_name_is_accepted_from_any_address(rig: Rig) -> None:
    """Only the hop before knows the relay's address, here another SOCKS5 proxy."""
    relay = FakeRelay(Address("proxy.example", 4000), rig.conn)
    dependencies = PacketDependencies(lambda stream, call: None, rig.pool.submit, rig.counts)
    outer = Socks5PacketConn(relay, None, dependencies)
    data = encode_header(Address("203.0.113.9", 4000)) + encode_header(TARGET) + b"x"
    rig.arena.view[: len(data)] = data
    rig.via.spans = [((0,), len(data), len(data), RELAY)]
    ((at, length, _, source),) = outer.receive(rig.arena).spans
    assert bytes(rig.arena.view[at[0] : at[0] + length]) == b"x"
    assert outer.source(source) == TARGET
    outer._control.close()
    relay.end()
