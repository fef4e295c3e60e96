"""Datagrams through a SOCKS5 proxy: headers there and back, whose datagrams count, and what becomes of the association."""

from __future__ import annotations

import socket
from typing import Any, Callable, Iterator

import pytest

from netproxy.dialer.direct import DirectDialer
from netproxy.dialer.hop import Hop
from netproxy.dialer.socks5 import Socks5Dialer
from netproxy.dialer.hop import Services
from netproxy.dialer.socks5_udp import Socks5PacketConn
from netproxy.errors import DialError, Reason, StreamError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.flows import Flow
from netproxy.net.datagram import Arena, PinnedHeader
from netproxy.net.stream import Stream
from netproxy.protocol.socks5 import encode_header, encode_reply
from tests.support.doubles import Counts
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import read_exactly, read_to_end, server
from tests.support.upstreams import FakeConn, FakeDialer, Workers, payloads

TARGET = Address("198.51.100.7", 53)
NAME = Address("example.com", 53)
RELAY, OTHER_RELAY = Address("192.0.2.1", 4000), Address("192.0.2.2", 4001)
CLIENT = Address("127.0.0.1", 5000)
PITCH = 2048


class Via(FakeConn):
    """Keeps headers as well, and is offered whole spans."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[tuple[Any, Run, Any]] = []
        self.spans: list[Span] = []

    def send(self, arena: Any, run: Run, destination: Any) -> None:
        self.runs.append((arena, run, destination))
        self.sent += [
            ((run.header.data if run.header else b"") + one, destination)
            for one in payloads(arena, run)
        ]

    def receive(self, arena: Any) -> Batch:
        return Batch(arena, self.spans) if self.spans else super().receive(arena)


class Upstream:
    """A connection under test and what is around it; `controls` are the proxy's ends of the control connections."""

    def __init__(self) -> None:
        self.via, self.counts, self.workers, self.arena = (
            Via(),
            Counts(),
            Workers(eager=False),
            Arena(),
        )
        self.watched: list[tuple[Stream, Callable[[], None]]] = []
        self.controls: list[socket.socket] = []
        self.bound = RELAY
        self.refusal: DialError | None = None  # what another associate() raises
        services = Services(
            lambda stream, said: self.watched.append((stream, said)),
            self.workers.submit,
            self.counts,
        )
        self.reached: list[Address] = []
        self.conn = Socks5PacketConn(self.associate, self.reach, None, services)

    def associate(self) -> tuple[Stream, Address]:
        if self.refusal:
            raise self.refusal
        near, far = socket.socketpair()
        self.controls.append(far)
        return Stream(near), self.bound

    def reach(self, bound: Address) -> Via:
        self.reached.append(bound)
        return self.via

    def lose(self) -> None:
        """The proxy ends the control connection, and the parker tells of it."""
        self.controls[-1].close()
        self.watched[-1][1]()

    def send(self, data: bytes, target: Address = TARGET) -> None:
        self.conn.send(self.arena, self.arena.put(data), self.conn.prepare(udp_to(target)))

    def train(self, datagrams: list[bytes], peer: Any = RELAY) -> list[tuple[bytes, Address]]:
        """One span of datagrams, all of one length but the last; what is received of it."""
        for number, data in enumerate(datagrams):
            self.arena.view[number * PITCH : number * PITCH + len(data)] = data
        offsets = range(0, len(datagrams) * PITCH, PITCH)
        self.via.spans = [(offsets, len(datagrams[0]), len(datagrams[-1]), peer)]
        self.batch = self.conn.receive(self.arena)
        return [
            (one, self.conn.source(key))
            for at, length, last, key in self.batch.spans
            for one in payloads(self.arena, Run(at, length, last))
        ]

    def drops(self, reason: str) -> int:
        return self.counts.of("drops", reason)

    def end(self) -> None:
        self.conn.close()
        for stream, said in self.watched:
            if stream.socket.fileno() >= 0:
                said()
        for far in self.controls:
            far.close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    one = Upstream()
    yield one
    one.end()


class TestSend:
    def test_a_run_goes_to_the_relay_behind_its_targets_header(self, upstream: Upstream) -> None:
        upstream.send(b"query")
        assert upstream.via.sent == [
            (b"\0\0\0\x01\xc6\x33\x64\x07\x00\x35query", "to 192.0.2.1:4000")
        ]
        assert upstream.reached == upstream.via.prepared == [RELAY]

    def test_payloads_are_not_copied(self, upstream: Upstream) -> None:
        run = Run(range(0, 3 * PITCH, PITCH), 100, 40)
        upstream.conn.send(upstream.arena, run, upstream.conn.prepare(udp_to(TARGET)))
        ((arena, sent, _),) = upstream.via.runs
        assert arena is upstream.arena and sent is run
        assert (run.offsets, run.length, run.last) == (range(0, 3 * PITCH, PITCH), 100, 40)

    def test_the_header_of_a_next_hop_comes_behind_ours(self, upstream: Upstream) -> None:
        destination, inner = (
            upstream.conn.prepare(udp_to(RELAY)),
            PinnedHeader(encode_header(TARGET)),
        )
        joined = []
        for _ in range(2):
            run = upstream.arena.put(b"x")
            run.header = inner
            upstream.conn.send(upstream.arena, run, destination)
            joined.append(run.header)
        assert [data for data, _ in upstream.via.sent] == [
            encode_header(RELAY) + encode_header(TARGET) + b"x"
        ] * 2
        assert joined[0] is joined[1]

    def test_a_name_goes_to_the_proxy_or_is_resolved_here(self, upstream: Upstream) -> None:
        upstream.send(b"x", NAME)
        assert upstream.via.sent[0][0] == b"\0\0\0\x03\x0bexample.com\x00\x35x"
        upstream.conn._find = lambda flow: [flow.target._replace(host="203.0.113.5")]
        upstream.send(b"x", NAME)
        assert upstream.via.sent[1][0] == b"\0\0\0\x01\xcb\x00\x71\x05\x00\x35x"


class TestReceive:
    @pytest.mark.parametrize("source", [TARGET, Address("2001:db8::7", 443), NAME])
    @pytest.mark.parametrize("payload", [b"", b"x", b"answer" * 200])
    def test_the_header_is_taken_off_and_names_the_source(
        self, upstream: Upstream, source: Address, payload: bytes
    ) -> None:
        assert upstream.train([encode_header(source) + payload]) == [(payload, source)]
        assert not upstream.counts.counts

    @pytest.mark.parametrize("count", [2, 16, 17, 40])
    def test_a_train_with_one_header_stays_one_span(self, upstream: Upstream, count: int) -> None:
        datagrams = [b"%04d" % number for number in range(count - 1)] + [b"end"]
        found = upstream.train([encode_header(TARGET) + data for data in datagrams])
        assert found == [(data, TARGET) for data in datagrams]
        assert len(upstream.batch.spans) == 1

    @pytest.mark.parametrize("count", [2, 16, 17, 40])
    def test_a_train_with_different_headers_is_split(self, upstream: Upstream, count: int) -> None:
        sources = [TARGET._replace(port=number + 1) for number in range(count)]
        found = upstream.train(
            [encode_header(source) + b"data"[: 4 - (source is sources[-1])] for source in sources]
        )
        assert found == [(b"data", source) for source in sources[:-1]] + [(b"dat", sources[-1])]
        assert len(upstream.batch.spans) == count

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
    def test_what_is_malformed_is_dropped_and_counted(
        self, upstream: Upstream, data: bytes
    ) -> None:
        assert upstream.train([data]) == []
        assert upstream.drops("malformed") == 1

    def test_a_fragment_is_dropped_and_counted_as_one(self, upstream: Upstream) -> None:
        assert upstream.train([b"\0\0\1" + encode_header(TARGET)[3:] + b"fragment"]) == []
        assert (upstream.drops("fragment"), upstream.drops("malformed")) == (1, 0)

    def test_a_bad_one_in_a_train_drops_no_other(self, upstream: Upstream) -> None:
        good = encode_header(TARGET) + b"good"
        assert (
            upstream.train([good, b"\0\0\1" + good[3:], good, good[:5]]) == [(b"good", TARGET)] * 2
        )
        assert (upstream.drops("fragment"), upstream.drops("malformed")) == (1, 1)

    def test_another_host_than_the_relays_is_a_stranger(self, upstream: Upstream) -> None:
        data = encode_header(TARGET) + b"x"
        assert upstream.train([data] * 3, OTHER_RELAY) == []
        assert upstream.drops("stranger") == 3
        assert upstream.train([data], RELAY._replace(port=9)) == [(b"x", TARGET)]


class TestAssociation:
    def test_its_end_makes_another_and_sends_go_to_the_new_relay(self, upstream: Upstream) -> None:
        destination = upstream.conn.prepare(udp_to(TARGET))
        upstream.bound = OTHER_RELAY
        upstream.lose()
        assert upstream.watched[0][0].socket.fileno() == -1
        assert len(upstream.workers.tasks) == 1 and not upstream.via.shut.is_set()
        upstream.workers.run()
        upstream.conn.send(upstream.arena, upstream.arena.put(b"x"), destination)
        assert upstream.via.sent == [(encode_header(TARGET) + b"x", "to 192.0.2.2:4001")]
        assert upstream.train([encode_header(TARGET) + b"y"], OTHER_RELAY) == [(b"y", TARGET)]
        assert upstream.train([encode_header(TARGET) + b"y"], RELAY) == []

    def test_what_is_sent_meanwhile_is_counted(self, upstream: Upstream) -> None:
        upstream.lose()
        upstream.conn.send(
            upstream.arena,
            Run(range(0, 3 * PITCH, PITCH), 10, 10),
            upstream.conn.prepare(udp_to(TARGET)),
        )
        assert upstream.via.sent == [] and upstream.drops("association lost") == 3
        upstream.workers.run()
        upstream.send(b"x")
        assert len(upstream.via.sent) == 1 and upstream.drops("association lost") == 3

    def test_what_is_sent_meanwhile_makes_no_second_association(self, upstream: Upstream) -> None:
        upstream.lose()
        upstream.send(b"x")
        upstream.workers.run()
        assert len(upstream.controls) == 2  # the lost one and its heir

    def test_what_the_control_connection_says_is_ignored_and_it_is_watched_on(
        self, upstream: Upstream
    ) -> None:
        for turn in range(1, 4):
            upstream.controls[0].sendall(b"hello?")
            upstream.watched[-1][1]()
            assert len(upstream.watched) == turn + 1
        upstream.send(b"x")
        assert len(upstream.via.sent) == 1 and upstream.workers.tasks == []

    def test_one_that_cannot_be_made_ends_the_connection(self, upstream: Upstream) -> None:
        """The session ends with it, and the client's next datagram begins another."""
        upstream.refusal = DialError(Reason.REFUSED)
        upstream.lose()
        upstream.workers.run()
        assert upstream.via.shut.is_set() and not upstream.conn.wait()
        upstream.send(b"x")
        assert upstream.via.sent == [] and upstream.drops("association lost") == 1
        assert upstream.workers.tasks == [] and len(upstream.controls) == 1

    def test_one_made_while_it_was_closed_is_let_go(self, upstream: Upstream) -> None:
        upstream.lose()
        upstream.conn.shutdown()
        upstream.workers.run()
        assert upstream.controls[-1].recv(1) == b""
        upstream.send(b"x")
        assert upstream.via.sent == [] and upstream.workers.tasks == []

    @pytest.mark.parametrize("lost", [False, True])
    def test_shutdown_and_close_end_everything(self, upstream: Upstream, lost: bool) -> None:
        if lost:
            upstream.lose()
        upstream.conn.shutdown()
        assert upstream.via.shut.is_set() and not upstream.via.closed.is_set()
        upstream.conn.close()
        assert upstream.via.closed.is_set()


class Before(FakeDialer):
    """The hop before: streams to the scripted server, packet connections that are fakes."""

    def __init__(self, direct: DirectDialer, at: Address, name: str) -> None:
        super().__init__(name)
        self._direct, self._at = direct, at

    def dial(self, flow: Flow) -> Stream:
        return self._direct.dial(tcp_to(self._at))


class TestAssociating:
    FLOW = Flow("udp", CLIENT, TARGET, "main", "")
    HOP = Address("192.0.2.99", 1080)

    def dial(
        self, direct: DirectDialer, reply: bytes, before: str = "direct", hop: Address = HOP
    ) -> FakeConn:
        """What came of a reply: the packet connection of the hop before."""

        def script(sock: socket.socket) -> None:
            assert read_exactly(sock, 3) == b"\5\1\0"
            sock.sendall(b"\5\0")
            assert read_exactly(sock, 10) == b"\5\3\0\1" + bytes(6)
            sock.sendall(reply)
            read_to_end(sock)

        with server(script) as address:
            way = Before(direct, address, before)
            watched: list[tuple[Stream, Callable[[], None]]] = []
            services = Services(
                lambda stream, said: watched.append((stream, said)), lambda work: False, Counts()
            )
            url = f"socks5h://{hop}"
            dialer = Socks5Dialer(Hop(url, url, hop, way, 2.0), None, services)
            self.way = way
            conn = dialer.dial_packet(self.FLOW)
            conn.close()
            for _, said in watched:
                said()
        return way.conns[0]

    def test_the_relay_is_where_the_reply_says(self, direct: DirectDialer) -> None:
        assert self.dial(direct, encode_reply(0, RELAY)).prepared == [RELAY]
        assert self.way.flows == [
            self.FLOW._replace(target=RELAY, listener="")
        ]  # the hop before must let pass what goes there

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    @pytest.mark.parametrize(
        "before, wanted", [("direct", "127.0.0.1"), ("socks5://192.0.2.98:1080", "192.0.2.99")]
    )
    def test_a_relay_at_no_address_is_at_the_hops_own(
        self, direct: DirectDialer, host: str, before: str, wanted: str
    ) -> None:
        assert self.dial(direct, encode_reply(0, Address(host, 4000)), before).prepared == [
            Address(wanted, 4000)
        ]

    @pytest.mark.parametrize(
        "reply, reason",
        [(1, Reason.GENERAL), (2, Reason.DENIED), (7, Reason.UNSUPPORTED), (99, Reason.GENERAL)],
    )
    def test_a_refusal_is_told_with_the_hop_and_opens_no_via(
        self, direct: DirectDialer, reply: int, reason: Reason
    ) -> None:
        with pytest.raises(DialError) as caught:
            self.dial(direct, encode_reply(reply, Address("0.0.0.0", 0)))
        assert caught.value.reason is reason
        assert str(caught.value).startswith(f"socks5h://{self.HOP}: UDP ASSOCIATE")
        assert self.way.conns == []

    @pytest.mark.parametrize("opened", [False, True])
    def test_a_relay_that_cannot_be_reached_closes_all_that_was_opened(self, opened: bool) -> None:
        near, far = socket.socketpair()
        via = Via()
        via.refusal = DialError(Reason.NAME)

        def reach(relay: Address) -> Via:
            if not opened:
                raise DialError(Reason.REFUSED)
            return via

        services = Services(lambda stream, said: None, lambda work: False, Counts())
        with far, pytest.raises(DialError):
            Socks5PacketConn(lambda: (Stream(near), RELAY), reach, None, services)
        assert near.fileno() == -1 and via.closed.is_set() is opened

    def test_a_connection_lost_right_after_the_reply_is_a_dial_error(
        self, direct: DirectDialer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lost(stream: Stream) -> Address:
            stream.close()  # what has been reset is nobody's peer
            raise StreamError("not connected")

        monkeypatch.setattr(Stream, "peer_address", lost)
        with pytest.raises(DialError):
            self.dial(direct, encode_reply(0, Address("0.0.0.0", 4000)))


def test_a_relay_that_the_hop_before_resolves_is_no_stranger(upstream: Upstream) -> None:
    near, far = socket.socketpair()
    services = Services(lambda stream, said: None, upstream.workers.submit, upstream.counts)
    outer = Socks5PacketConn(
        lambda: (Stream(near), Address("proxy.example", 4000)),
        lambda bound: upstream.conn,
        None,
        services,
    )
    data = encode_header(Address("203.0.113.9", 4000)) + encode_header(TARGET) + b"x"
    upstream.arena.view[: len(data)] = data
    upstream.via.spans = [((0,), len(data), len(data), RELAY)]
    with near, far:
        ((at, length, _, source),) = outer.receive(upstream.arena).spans
    assert (
        bytes(upstream.arena.view[at[0] : at[0] + length]) == b"x"
        and outer.source(source) == TARGET
    )
