"""A dns listener: what comes out of the cache, what is asked, and what is altered on the way.  Messages are compared as bytes."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

from netproxy.interfaces.networks import NetworkSet
from netproxy.errors import ProtocolError
from netproxy.handler import dns as dns_module
from netproxy.handler.dns import WAITING_LIMIT, DnsHandler
from netproxy.handler.dns_cache import CACHED_SIZE, TTL_LIMIT
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.networks import IpNetwork
from netproxy.listener.pool import ThreadPool
from netproxy.net.stream import Stream
from tests.support.batches import BatchRig
from tests.support.dns import (
    AA,
    AD,
    ASKED,
    CD,
    HEADER,
    QR,
    RA,
    RD,
    TC,
    a,
    answer,
    opt,
    option,
    query,
    question,
    record,
    soa,
)
from tests.support.handlers import Conversation, tcp_pair
from tests.support.nameservers import answer_to, framed, question_of, nxdomain, read_framed, txt_records
from tests.support.sockets import SECONDS, nothing_comes, udp, wait_until

WWW = question("www.example")
FORMERR, SERVFAIL, NXDOMAIN = 1, 2, 3
COOKIE, SUBNET, PADDING = 10, 8, 12
CLIENT_COOKIE, WHOLE_COOKIE = (
    option(COOKIE, b"8 octets"),
    option(COOKIE, b"8 octets" + b"the server's"),
)
NETWORKS = NetworkSet((IpNetwork.parse("127.0.0.1"), IpNetwork.parse("127.1.0.0/16")))
ReplyTable = Callable[[bytes], bytes]


def sixty(asked: bytes) -> bytes:
    return answer_to(asked, a(60))


class Source:
    """Keeps what it was asked; `known` are answers that need no server."""

    def __init__(self, reply: ReplyTable = sixty) -> None:
        self.reply = reply
        self.asked: list[bytes] = []
        self.known: dict[bytes, bytes] = {}

    def answer(self, query: bytes) -> bytes | None:
        if query[4:6] != b"\0\1":
            raise ProtocolError("not one question")
        return self.known.get(question_of(query))

    def forward(self, query: bytes) -> bytes:
        self.asked.append(query)
        return self.reply(query)


class Rig(BatchRig):
    """A handler whose datagrams the test hands over, and whose workers it runs."""

    def __init__(self, level: str = "single") -> None:
        super().__init__(level)
        self.source = Source()
        self.tasks: list[Callable[[], None]] = []
        self.room = True
        self.local = self.listen()
        self.client = self.open()
        self.handler = self.make()

    def make(self, cache: int = 16, clients: Any = None, submit: Any = None) -> DnsHandler:
        self.handler = DnsHandler(
            self.source,
            cache,
            clients,
            submit or self._submit,
            self.datagrams.arenas(),
            self.counts,
        )
        return self.handler

    def open(self, host: str = "127.0.0.1") -> socket.socket:
        client = udp(host)
        client.connect(tuple(self.local.address))
        self.sockets = [*getattr(self, "sockets", []), client]
        return client

    def _submit(self, task: Callable[[], None]) -> bool:
        if self.room:
            self.tasks.append(task)
        return self.room

    def hand_over(self, *queries: bytes, by: socket.socket | None = None) -> None:
        """Sent, received and handled; workers wait."""
        for asked in queries:
            (by or self.client).send(asked)
        left = len(queries)
        while left:
            batch = self.local.receive_waiting(self.arena)
            left -= sum(len(offsets) for offsets, *_ in batch.spans)
            self.handler.handle_packets(batch, self.local)

    def work(self) -> None:
        while self.tasks:
            self.tasks.pop(0)()

    def ask(self, asked: bytes, by: socket.socket | None = None) -> bytes:
        """The answer, whoever gives it."""
        self.hand_over(asked, by=by)
        self.work()
        return (by or self.client).recv(65536)

    def close(self) -> None:
        for one in [*self.opened, *self.sockets]:
            one.close()


@pytest.fixture(params=["single", "mmsg"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(request.param)
    yield made
    made.close()


@pytest.fixture
def plain() -> Iterator[Rig]:
    """Where batching is nothing to the test."""
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as a list of one."""
    now = [1000.0]
    monkeypatch.setattr(dns_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class TestCache:
    def test_a_miss_is_asked_and_a_hit_is_not(self, rig: Rig, clock: list[float]) -> None:
        first, second = query(WWW, id=1), query(WWW, id=2)
        assert rig.ask(first) == answer_to(first, a(60))
        rig.hand_over(second)
        assert not rig.tasks
        assert rig.client.recv(512) == answer_to(second, a(60))
        assert rig.source.asked == [first]
        assert rig.counts.of("queries", "forwarded") == 1

    def test_many_at_once(self, rig: Rig, clock: list[float]) -> None:
        """Hits and misses of one length, as one batch may bring them."""
        rig.ask(query(WWW))
        asked = [query(question(f"{'wxyz'[at % 4]}ww.example"), id=at) for at in range(40)]
        rig.hand_over(*asked)
        rig.work()
        assert sorted(rig.client.recv(512) for _ in asked) == sorted(
            answer_to(one, a(60)) for one in asked
        )
        assert len(rig.source.asked) == 4

    def test_ttls_are_lessened_as_time_goes_by(self, plain: Rig, clock: list[float]) -> None:
        def lives(asked: bytes, first: int, second: int, third: int) -> bytes:
            return answer(
                WWW,
                (a(first),),
                (soa(second, 5),),
                (a(third, owner=b"\2ns\xc0\x10"), opt(4096, 0x8000)),
            )

        plain.source.reply = lambda asked: lives(asked, 60, 90, 70)
        asked = query(WWW, opt(4096, 0x8000))
        assert plain.ask(asked) == lives(asked, 60, 90, 70)
        clock[0] += 25.9
        assert plain.ask(asked) == lives(asked, 35, 65, 45)
        clock[0] += 34
        assert plain.ask(asked) == lives(asked, 1, 31, 11)
        assert len(plain.source.asked) == 1

    def test_what_has_expired_is_asked_for_again(self, plain: Rig, clock: list[float]) -> None:
        asked = query(WWW)
        plain.ask(asked)
        clock[0] += 60
        assert plain.ask(asked) == answer_to(asked, a(60))
        assert plain.source.asked == [asked] * 2
        clock[0] += 59
        assert plain.ask(asked) == answer_to(asked, a(1))

    def test_nothing_is_kept_for_longer_than_a_day(self, plain: Rig, clock: list[float]) -> None:
        plain.source.reply = lambda asked: answer_to(asked, a(1 << 30))
        plain.ask(query(WWW))
        clock[0] += TTL_LIMIT
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_a_hit_is_spelt_as_its_query(self, plain: Rig, clock: list[float]) -> None:
        """0x20: a client that mixes cases looks for them in the answer."""
        plain.ask(query(WWW))
        mixed = query(question("wWW.eXamPLe"), id=7)
        assert plain.ask(mixed) == answer_to(mixed, a(60))
        assert len(plain.source.asked) == 1

    def test_that_there_is_no_such_name_is_kept_as_long_as_its_zone_says(
        self, plain: Rig, clock: list[float]
    ) -> None:
        plain.source.reply = lambda asked: nxdomain(asked, 20)
        asked = query(WWW)
        assert plain.ask(asked) == nxdomain(asked, 20)
        clock[0] += 19
        plain.ask(asked)
        assert len(plain.source.asked) == 1
        clock[0] += 1
        plain.ask(asked)
        assert len(plain.source.asked) == 2

    @pytest.mark.parametrize(
        "reply",
        [
            lambda asked: answer_to(asked, a(0)),
            lambda asked: answer_to(asked),
            lambda asked: answer_to(asked, a(60), flags=QR | RD | RA | SERVFAIL),
            lambda asked: answer_to(asked, a(60), flags=QR | RD | RA | TC),
            lambda asked: answer_to(asked, *txt_records(60, CACHED_SIZE)),
            lambda asked: answer_to(asked, flags=QR | RD | RA | NXDOMAIN),
            lambda asked: answer_to(asked, a(60))[:-1],
            lambda asked: asked[:2] + HEADER.pack(0, QR | FORMERR, 0, 0, 0, 0)[2:],
        ],
        ids=[
            "TTL 0",
            "nothing",
            "SERVFAIL",
            "truncated",
            "too long",
            "no SOA",
            "half",
            "no question",
        ],
    )
    def test_what_must_not_be_kept_is_not(
        self, plain: Rig, clock: list[float], reply: ReplyTable
    ) -> None:
        plain.source.reply = reply
        asked = query(WWW, opt(65535))
        for _ in range(2):
            assert plain.ask(asked) == reply(asked)
        assert len(plain.source.asked) == 2

    def test_no_cache_keeps_nothing(self, plain: Rig, clock: list[float]) -> None:
        plain.make(cache=0)
        plain.ask(query(WWW))
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_the_oldest_yields_to_the_next(self, plain: Rig, clock: list[float]) -> None:
        plain.make(cache=3)
        names = [query(question(f"{at}.example")) for at in range(4)]
        for asked in (*names, names[3], names[2], names[1]):
            plain.ask(asked)
        assert plain.source.asked == names
        plain.ask(names[0])
        assert plain.source.asked == [*names, names[0]]
        assert len(plain.handler._answers) == 3

    def test_a_name_that_is_kept_anew_is_no_second_one(
        self, plain: Rig, clock: list[float]
    ) -> None:
        plain.make(cache=2)
        for _ in range(3):
            plain.ask(query(WWW))
            clock[0] += 60
        assert len(plain.handler._answers) == 1

    @pytest.mark.parametrize(
        "other",
        [
            query(question("www.example", 28)),
            query(question("www.example", 1, 3)),
            query(WWW, flags=0),
            query(WWW, flags=RD | CD),
            query(WWW, flags=RD | AD),
            query(WWW, opt()),
            query(WWW, opt(1232, 0x8000)),
            query(question("ww.example")),
        ],
        ids=["kind", "class", "no RD", "CD", "AD", "EDNS", "DO", "name"],
    )
    def test_another_question_is_not_answered_by_it(
        self, plain: Rig, clock: list[float], other: bytes
    ) -> None:
        plain.ask(query(WWW))
        plain.ask(other)
        assert plain.source.asked == [query(WWW), other]

    @pytest.mark.parametrize(
        "asked",
        [
            query(question("www.example", 255)),
            query(question("www.example", 252)),
            query(WWW, opt(options=option(SUBNET, b"\0\1\x18\0\xc0\0\2"))),
            query(WWW, opt(options=WHOLE_COOKIE)),
            query(WWW, record(b"\0", 250, 0, b"signature", 255)),
            query(WWW, flags=4 << 11),
            query(WWW) + b"\0",
        ],
        ids=["ANY", "AXFR", "subnet", "cookie", "TSIG", "opcode", "trailing"],
    )
    def test_what_is_meant_for_one_client_is_asked_each_time(
        self, plain: Rig, clock: list[float], asked: bytes
    ) -> None:
        for id in (b"\0\1", b"\0\2"):
            plain.ask(id + asked[2:])
        assert plain.source.asked == [b"\0\1" + asked[2:], b"\0\2" + asked[2:]]

    def test_what_a_server_says_to_one_client_is_not_said_to_the_next(
        self, plain: Rig, clock: list[float]
    ) -> None:
        plain.source.reply = lambda asked: answer(WWW, (a(60),), (), (opt(1232, 0, WHOLE_COOKIE),))
        asked = query(WWW, opt(options=CLIENT_COOKIE))
        assert plain.ask(asked) == answer(WWW, (a(60),), (), (opt(1232, 0, WHOLE_COOKIE),))
        assert plain.ask(query(WWW, opt(4096, options=option(PADDING, b"\0\0")))) == answer(
            WWW, (a(60),), (), (opt(),)
        )
        assert len(plain.source.asked) == 1


class TestCoalescing:
    def test_who_asks_the_same_meanwhile_waits_for_the_same_answer(self, plain: Rig) -> None:
        asked = [
            query(question(name), id=id)
            for id, name in enumerate(("www.example", "WWW.example", "www.eXample"))
        ]
        clients = [plain.open() for _ in asked]
        for client, one in zip(clients, asked):
            plain.hand_over(one, by=client)
        assert len(plain.tasks) == 1
        plain.work()
        assert [client.recv(512) for client in clients] == [answer_to(one, a(60)) for one in asked]
        assert plain.source.asked == asked[:1]

    def test_an_error_is_everybodys(self, plain: Rig) -> None:
        """One without a question, as from a server that cannot read it, is given to each with the ID of its own."""
        plain.source.reply = lambda asked: asked[:2] + HEADER.pack(0, QR | FORMERR, 0, 0, 0, 0)[2:]
        plain.hand_over(query(WWW, id=1), query(WWW, id=2))
        plain.work()
        assert [plain.client.recv(512)[:4] for _ in range(2)] == [b"\0\1\x80\1", b"\0\2\x80\1"]
        assert len(plain.source.asked) == 1

    def test_what_is_never_kept_goes_round_in_a_circle_of_servers_once(self, plain: Rig) -> None:
        """It comes back with another ID, as a server sends it on; an update, which is no question, is for itself."""
        anything = [query(question("www.example", 255), id=id) for id in (1, 2)]
        plain.hand_over(*anything)
        plain.work()
        assert plain.source.asked == anything[:1]
        assert [plain.client.recv(512) for _ in anything] == [
            answer_to(one, a(60)) for one in anything
        ]
        updates = [query(question("www.example", 6), id=id, flags=5 << 11) for id in (1, 2)]
        plain.hand_over(*updates)
        plain.work()
        assert plain.source.asked[1:] == updates

    def test_after_the_answer_it_is_asked_anew(self, plain: Rig) -> None:
        plain.make(cache=0)
        plain.ask(query(WWW))
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_too_many_do_not_wait(self, plain: Rig) -> None:
        plain.hand_over(*[query(WWW, id=id) for id in range(WAITING_LIMIT + 2)])
        assert plain.counts.of("drops", "waiting queue full") == 2
        plain.work()
        assert {plain.client.recv(512)[:2] for _ in range(WAITING_LIMIT)} == {
            id.to_bytes(2, "big") for id in range(WAITING_LIMIT)
        }
        assert nothing_comes(plain.client)

    def test_what_finds_no_worker_is_dropped_and_may_be_asked_again(self, plain: Rig) -> None:
        plain.room = False
        plain.hand_over(query(WWW))
        assert plain.counts.of("drops", "lookup queue full") == 1
        plain.room = True
        assert plain.ask(query(WWW)) == answer_to(query(WWW), a(60))
        assert nothing_comes(plain.client)

    def test_a_source_that_fails_costs_those_who_wait_alone(self, plain: Rig) -> None:
        def broken(asked: bytes) -> bytes:
            raise RuntimeError("broken")

        plain.source.reply = broken
        plain.hand_over(query(WWW, id=1), query(WWW, id=2))
        with pytest.raises(RuntimeError):
            plain.work()
        assert plain.counts.of("drops", "internal error") == 2
        plain.source.reply = sixty
        assert plain.ask(query(WWW)) == answer_to(query(WWW), a(60))


class TestMessages:
    @pytest.mark.parametrize(
        "asked",
        [
            query(question("www.example", 65280)),
            query(question("www.example", 65, 4)),
            query(WWW, flags=RD | 0x0070),
            query(WWW, opt(4096, 0x12348000, option(65001, b"\0\xff" * 9))),
            query(WWW, opt(512, 5 << 16)),
            query(WWW, flags=5 << 11),
            query(WWW, a(7), record(b"\0", 250, 0, b"signature", 255)),
        ],
        ids=["TYPE65280", "HTTPS CH", "Z AD CD", "EDNS", "EDNS version 5", "UPDATE", "records"],
    )
    def test_what_nobody_here_knows_passes_untouched(self, plain: Rig, asked: bytes) -> None:
        strange = answer_to(
            asked,
            record(ASKED, 65280, 60, b"\xff\0whatever"),
            flags=QR | AA | 0x0070 | int.from_bytes(asked[2:4], "big"),
        )
        plain.source.reply = lambda query: strange
        assert plain.ask(asked) == strange
        assert plain.source.asked == [asked]

    def test_clients_without_edns_get_512_bytes_at_most(
        self, plain: Rig, clock: list[float]
    ) -> None:
        long = txt_records(60, 4000)
        plain.source.reply = lambda asked: answer_to(asked, *long)
        asked = query(question("www.example", 16))
        for _ in range(2):  # a miss, a hit
            assert plain.ask(asked) == answer_to(asked, flags=QR | RD | RA | TC)
        assert plain.source.asked == [asked]

    def test_clients_with_edns_get_what_they_take(self, plain: Rig, clock: list[float]) -> None:
        long = txt_records(60, 2000)
        plain.source.reply = lambda asked: answer(question("www.example", 16), long, (), (opt(),))
        asked = [query(question("www.example", 16), opt(size)) for size in (0, 512, 1232, 4096)]
        size = len(plain.source.reply(b""))
        assert 1232 < size < 4096
        found = [plain.ask(one) for one in asked]
        assert (
            found[:3]
            == [answer(question("www.example", 16), (), (), (opt(),), QR | RD | RA | TC)] * 3
        )
        assert found[3] == plain.source.reply(b"")
        assert len(plain.source.asked) == 1

    def test_what_needs_no_server_is_answered_at_once(self, plain: Rig) -> None:
        plain.source.known[question_of(query(WWW))] = b"whatever"
        plain.hand_over(query(WWW))
        assert not plain.tasks and plain.client.recv(512) == b"whatever"

    @pytest.mark.parametrize(
        "asked, said",
        [
            (HEADER.pack(7, RD, 0, 0, 0, 0), HEADER.pack(7, QR | RD | RA | FORMERR, 0, 0, 0, 0)),
            (
                HEADER.pack(7, RD | CD, 2, 0, 0, 0) + WWW + WWW,
                HEADER.pack(7, QR | RD | RA | CD | FORMERR, 0, 0, 0, 0),
            ),
        ],
        ids=["no question", "two questions"],
    )
    def test_what_is_no_question_is_said_to_be_none(
        self, plain: Rig, asked: bytes, said: bytes
    ) -> None:
        plain.hand_over(asked)
        assert plain.client.recv(512) == said
        assert not plain.tasks and plain.counts.of("queries", "malformed") == 1

    @pytest.mark.parametrize(
        "asked",
        [
            b"",
            b"\0\1",
            query(WWW)[:11],
            query(WWW, flags=QR | RD),
            answer_to(query(WWW), a(60)),
            HEADER.pack(7, QR | FORMERR, 0, 0, 0, 0),
        ],
        ids=["nothing", "an ID", "11 bytes", "a response bit", "an answer", "an error"],
    )
    def test_an_answer_is_never_answered_nor_what_has_no_head(
        self, plain: Rig, asked: bytes
    ) -> None:
        """Or two servers could go on for ever."""
        plain.hand_over(asked)
        assert not plain.tasks and nothing_comes(plain.client, 0)
        assert plain.counts.of("drops", "malformed") == 1


class TestClients:
    def test_strangers_are_counted_and_have_no_answer(self, plain: Rig) -> None:
        plain.make(clients=NETWORKS)
        plain.ask(query(WWW))
        stranger = plain.open("127.0.0.2")
        plain.hand_over(query(WWW), query(WWW), b"", by=stranger)
        assert plain.counts.of("drops", "client not allowed") == 3
        assert not plain.tasks and nothing_comes(stranger, 0)

    def test_those_of_its_networks_are_answered(
        self, plain: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dns_module, "ALLOWED_LIMIT", 2)
        plain.make(clients=NETWORKS)
        for host in ("127.0.0.1", "127.1.0.1", "127.1.0.2", "127.0.0.1", "127.1.255.1"):
            assert plain.ask(query(WWW), by=plain.open(host))
            assert len(plain.handler._allowed_hosts) <= 2
        assert plain.counts.of("drops", "client not allowed") == 0


def test_a_slow_name_delays_no_other(plain: Rig) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def reply(query: bytes) -> bytes:
        if question_of(query) == named_slow:
            asked.set()
            assert go_on.wait(SECONDS)
        return sixty(query)

    slow, other = query(question("slow.example")), query(WWW)
    named_slow = question_of(slow)
    plain.source.reply = reply
    pool = ThreadPool("pool-under-test", 2, 4, plain.log)
    plain.make(submit=pool.submit)
    try:
        plain.hand_over(slow)
        assert asked.wait(SECONDS)
        plain.hand_over(other)
        assert plain.client.recv(512) == answer_to(other, a(60))
        plain.hand_over(other)
        assert plain.client.recv(512)[:2] == other[:2]
        go_on.set()
        assert plain.client.recv(512) == answer_to(slow, a(60))
    finally:
        go_on.set()
        pool.stop(SECONDS)


class TestConnections:
    def test_a_query_has_its_answer(self, plain: Rig) -> None:
        asked = query(WWW)
        with Conversation(plain.handler) as client:
            for _ in range(2):
                client.send(framed(asked))
                assert client.read(2 + len(answer_to(asked, a(60)))) == framed(
                    answer_to(asked, a(60))
                )
        assert plain.source.asked == [asked]

    def test_the_cache_is_the_datagrams_too(self, plain: Rig) -> None:
        plain.ask(query(WWW, id=1))
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW, id=2)))
            assert read_framed(client.socket) == answer_to(query(WWW, id=2), a(60))
        assert len(plain.source.asked) == 1

    def test_who_asks_the_same_meanwhile_waits_for_the_same_answer(self, plain: Rig) -> None:
        """As a question does that comes back in a circle of servers, which would else have a thread for each round."""
        begun, go_on = threading.Event(), threading.Event()

        def reply(asked: bytes) -> bytes:
            begun.set()
            assert go_on.wait(SECONDS)
            return sixty(asked)

        plain.source.reply = reply
        first, second = query(WWW, id=1), query(WWW, id=2)
        with Conversation(plain.handler) as client, Conversation(plain.handler) as other:
            client.send(framed(first))
            assert begun.wait(SECONDS)
            plain.hand_over(query(WWW, id=3))
            other.send(framed(second))
            wait_until(lambda: len(*plain.handler._pending.values()) == 3)
            go_on.set()
            assert read_framed(client.socket) == answer_to(first, a(60))
            assert read_framed(other.socket) == answer_to(second, a(60))
        assert plain.client.recv(512) == answer_to(query(WWW, id=3), a(60))
        assert plain.source.asked == [first] and not plain.tasks

    def test_nothing_is_truncated(self, plain: Rig) -> None:
        plain.source.reply = lambda asked: answer_to(asked, *txt_records(60, 60000))
        asked = query(question("www.example", 16))
        with Conversation(plain.handler) as client:
            client.send(framed(asked))
            assert read_framed(client.socket) == answer_to(asked, *txt_records(60, 60000))

    def test_queries_that_come_together_are_answered_in_their_order(self, plain: Rig) -> None:
        asked = [query(question(f"{at}.example"), id=at) for at in range(20)]
        with Conversation(plain.handler) as client:
            client.send(b"".join(map(framed, asked)))
            assert [read_framed(client.socket) for _ in asked] == [
                answer_to(one, a(60)) for one in asked
            ]

    def test_a_query_may_come_byte_by_byte(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.trickle(framed(query(WWW)))
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))

    def test_a_client_may_close_its_half_after_the_last_query(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW)))
            client.socket.shutdown(socket.SHUT_WR)
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))
            client.expect_end()

    def test_a_question_that_is_none_is_said_to_be_none(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(HEADER.pack(7, RD, 0, 0, 0, 0)) + framed(query(WWW)))
            assert read_framed(client.socket) == HEADER.pack(7, QR | RD | RA | FORMERR, 0, 0, 0, 0)
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))

    @pytest.mark.parametrize(
        "sent",
        [framed(b""), framed(b"\0\1"), framed(query(WWW, flags=QR))],
        ids=["nothing", "an ID", "an answer"],
    )
    def test_what_is_to_have_no_answer_ends_it(self, plain: Rig, sent: bytes) -> None:
        with Conversation(plain.handler) as client:
            client.send(sent)
            client.expect_closed()
        assert plain.counts.of("drops", "malformed") == 1

    def test_half_a_query_and_no_more_ends_it(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW))[:9])
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_end()
        assert not plain.source.asked

    def test_without_a_next_query_it_ends(
        self, plain: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dns_module, "IDLE_SECONDS", 0.05)
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW)))
            assert read_framed(client.socket)
            client.expect_end()

    def test_between_queries_it_holds_no_thread(self, plain: Rig) -> None:
        """It pauses, and may be dropped while it does where the daemon is to stop."""
        near, far = tcp_pair()
        with near, far:
            near.sendall(framed(query(WWW)))
            stream = Stream(far)
            pause = plain.handler.handle(stream, Address("127.0.0.1", 1))
            assert pause is not None and pause.idle and pause.seconds == dns_module.IDLE_SECONDS
            assert read_framed(near) == answer_to(query(WWW), a(60))
            assert stream.welcomed
            assert pause.resume(False) is None

    def test_one_that_waits_holds_up_no_other(self, plain: Rig) -> None:
        asked, go_on = threading.Event(), threading.Event()

        def reply(query: bytes) -> bytes:
            if question_of(query) != named_other:
                asked.set()
                assert go_on.wait(SECONDS)
            return sixty(query)

        other = query(question("other.example"))
        named_other = question_of(other)
        plain.source.reply = reply
        with Conversation(plain.handler) as slow, Conversation(plain.handler) as client:
            slow.send(framed(query(WWW)))
            assert asked.wait(SECONDS)
            client.send(framed(other))
            assert read_framed(client.socket) == answer_to(other, a(60))
            go_on.set()
            assert read_framed(slow.socket) == answer_to(query(WWW), a(60))

    def test_a_source_that_fails_ends_it(self, plain: Rig) -> None:
        def broken(asked: bytes) -> bytes:
            raise RuntimeError("broken")

        plain.source.reply = broken
        client = Conversation(plain.handler)
        client.send(framed(query(WWW)))
        client.expect_closed()
        client.close()
        wait_until(lambda: isinstance(client.raised, RuntimeError))
