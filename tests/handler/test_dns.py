"""A dns listener: its cache, shared answers, and what it changes in messages.

Messages are compared as bytes.
"""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import Any, Callable, Iterator

import pytest

from netproxy.errors import ProtocolError
from netproxy.handler.dns import handler as dns_module
from netproxy.handler.dns.handler import SERVER_SECONDS, STALE_SECONDS, DnsHandler
from netproxy.resolver.answer_cache import CACHED_SIZE, STALE_TTL, TTL_LIMIT, AnswerCache
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import READABLE
from netproxy.interfaces.fairness import ClientTask
from netproxy.interfaces.listeners import ALL_CLIENTS, AllowedClients
from netproxy.interfaces.networks import IpNetwork
from netproxy.listener.fair_queue import FairQueue
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
from tests.support.handlers import Conversation, permission, tcp_pair
from tests.support.nameservers import (
    answer_to,
    framed,
    question_of,
    nxdomain,
    read_framed,
    txt_records,
)
from tests.support.sockets import SECONDS, nothing_comes, udp, wait_until
from tests.support.waits import run_until_events

WWW = question("www.example")
FORMERR, SERVFAIL, NXDOMAIN, NOTIMP = 1, 2, 3, 4
COOKIE, SUBNET, PADDING = 10, 8, 12
CLIENT_COOKIE, WHOLE_COOKIE = (
    option(COOKIE, b"8 octets"),
    option(COOKIE, b"8 octets" + b"the server's"),
)
NETWORKS = AllowedClients(((IpNetwork.parse("127.0.0.1"), IpNetwork.parse("127.1.0.0/16")), ()))
ReplyTable = Callable[[bytes], bytes]


def sixty(asked: bytes) -> bytes:
    """Return an answer with a TTL of sixty seconds."""
    return answer_to(asked, a(60))


class Source:
    """A DnsSource that records queries.  `known` are answers that need no server, by question."""

    def __init__(self, reply: ReplyTable = sixty) -> None:
        self.reply = reply
        self.asked: list[bytes] = []
        self.seconds: list[float] = []
        self.known: dict[bytes, bytes] = {}

    def answer(self, query: bytes, client: str) -> bytes | None:
        if query[4:6] != b"\0\1":
            raise ProtocolError("not one question")
        return self.known.get(question_of(query))

    def forward(self, query: bytes, seconds: float) -> bytes:
        self.asked.append(query)
        self.seconds.append(seconds)
        return self.reply(query)


class Rig(BatchRig):
    """A handler whose datagrams the test hands over and whose workers the test runs."""

    def __init__(self, level: str = "single") -> None:
        super().__init__(level)
        self.source = Source()
        self.tasks: list[ClientTask] = []
        # False: no worker takes a task.
        self.room = True
        self.local = self.listen()
        self.client = self.open()
        self.handler = self.make()

    def make(
        self,
        cache: int = 16,
        clients: AllowedClients = ALL_CLIENTS,
        submit: Any = None,
        stale: float = 0.0,
    ) -> DnsHandler:
        self.handler = DnsHandler(
            self.source,
            AnswerCache(cache, stale),
            clients,
            submit or self._submit,
            self.datagrams.arenas,
            self.counts,
            permission(counter=self.counts),
        )
        return self.handler

    def open(self, host: str = "127.0.0.1") -> socket.socket:
        client = udp(host)
        client.connect(tuple(self.local.address))
        self.sockets = [*getattr(self, "sockets", []), client]
        return client

    def _submit(self, task: ClientTask) -> None:
        if self.room:
            self.tasks.append(task)
        else:
            task.drop()

    def hand_over(self, *queries: bytes, by: socket.socket | None = None) -> None:
        """Send datagrams, receive them and have them handled.  Workers do not run."""
        for asked in queries:
            (by or self.client).send(asked)
        left = len(queries)
        while left:
            batch = self.local.receive_waiting(self.arena)
            left -= sum(len(offsets) for offsets, *_ in batch.spans)
            self.handler.handle_packets(batch, self.local)

    def work(self) -> None:
        """Run the workers."""
        while self.tasks:
            self.tasks.pop(0).run()

    def ask(self, asked: bytes, by: socket.socket | None = None) -> bytes:
        """Return the answer to a datagram, with or without a worker."""
        self.hand_over(asked, by=by)
        self.work()
        return (by or self.client).recv(65536)

    def close(self) -> None:
        for sock in [*self.opened, *self.sockets]:
            sock.close()


@pytest.fixture(params=["single", "mmsg"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.close()


@pytest.fixture
def plain() -> Iterator[Rig]:
    """Return a rig for tests that do not depend on batching."""
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time of the handler, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(dns_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class TestCache:
    def test_hit_needs_no_server(self, rig: Rig, clock: list[float]) -> None:
        first, second = query(WWW, id=1), query(WWW, id=2)
        assert rig.ask(first) == answer_to(first, a(60))
        rig.hand_over(second)
        assert not rig.tasks
        assert rig.client.recv(512) == answer_to(second, a(60))
        assert rig.source.asked == [first]
        assert rig.counts.of("queries", "forwarded") == 1

    def test_batch_of_hits_and_misses_is_answered(self, rig: Rig, clock: list[float]) -> None:
        """All queries have one length."""
        rig.ask(query(WWW))
        asked = [query(question(f"{'wxyz'[id % 4]}ww.example"), id=id) for id in range(40)]
        rig.hand_over(*asked)
        rig.work()
        assert sorted(rig.client.recv(512) for _ in asked) == sorted(
            answer_to(message, a(60)) for message in asked
        )
        assert len(rig.source.asked) == 4

    def test_ttls_of_a_hit_are_reduced_by_its_age(self, plain: Rig, clock: list[float]) -> None:
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

    def test_expired_answer_is_asked_for_again(self, plain: Rig, clock: list[float]) -> None:
        asked = query(WWW)
        plain.ask(asked)
        clock[0] += 60
        assert plain.ask(asked) == answer_to(asked, a(60))
        assert plain.source.asked == [asked] * 2
        clock[0] += 59
        assert plain.ask(asked) == answer_to(asked, a(1))

    def test_answer_is_cached_for_a_day_at_most(self, plain: Rig, clock: list[float]) -> None:
        plain.source.reply = lambda asked: answer_to(asked, a(1 << 30))
        plain.ask(query(WWW))
        clock[0] += TTL_LIMIT
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_hit_has_the_spelling_of_its_query(self, plain: Rig, clock: list[float]) -> None:
        """A client that mixes cases (0x20) checks them in the answer."""
        plain.ask(query(WWW))
        mixed = query(question("wWW.eXamPLe"), id=7)
        assert plain.ask(mixed) == answer_to(mixed, a(60))
        assert len(plain.source.asked) == 1

    def test_nxdomain_is_cached_as_long_as_the_soa_says(
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
    def test_answer_that_must_not_be_cached_is_asked_for_each_time(
        self, plain: Rig, clock: list[float], reply: ReplyTable
    ) -> None:
        plain.source.reply = reply
        asked = query(WWW, opt(65535))
        for _ in range(2):
            assert plain.ask(asked) == reply(asked)
        assert len(plain.source.asked) == 2

    def test_cache_of_size_zero_keeps_nothing(self, plain: Rig, clock: list[float]) -> None:
        plain.make(cache=0)
        plain.ask(query(WWW))
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_oldest_answer_is_removed_at_the_limit(self, plain: Rig, clock: list[float]) -> None:
        plain.make(cache=3)
        names = [query(question(f"{number}.example")) for number in range(4)]
        for asked in (*names, names[3], names[2], names[1]):
            plain.ask(asked)
        assert plain.source.asked == names
        plain.ask(names[0])
        assert plain.source.asked == [*names, names[0]]
        assert len(plain.handler._cache) == 3

    def test_renewed_answer_replaces_the_expired_one(self, plain: Rig, clock: list[float]) -> None:
        plain.make(cache=2)
        for _ in range(3):
            plain.ask(query(WWW))
            clock[0] += 60
        assert len(plain.handler._cache) == 1

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
    def test_other_question_is_no_hit(self, plain: Rig, clock: list[float], other: bytes) -> None:
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
            query(WWW) + b"\0",
        ],
        ids=["ANY", "AXFR", "subnet", "cookie", "TSIG", "trailing"],
    )
    def test_query_for_one_client_is_asked_each_time(
        self, plain: Rig, clock: list[float], asked: bytes
    ) -> None:
        for id in (b"\0\1", b"\0\2"):
            plain.ask(id + asked[2:])
        assert plain.source.asked == [b"\0\1" + asked[2:], b"\0\2" + asked[2:]]

    def test_options_for_one_client_are_not_cached(self, plain: Rig, clock: list[float]) -> None:
        plain.source.reply = lambda asked: answer(WWW, (a(60),), (), (opt(1232, 0, WHOLE_COOKIE),))
        asked = query(WWW, opt(options=CLIENT_COOKIE))
        assert plain.ask(asked) == answer(WWW, (a(60),), (), (opt(1232, 0, WHOLE_COOKIE),))
        assert plain.ask(query(WWW, opt(4096, options=option(PADDING, b"\0\0")))) == answer(
            WWW, (a(60),), (), (opt(),)
        )
        assert len(plain.source.asked) == 1


class TestStale:
    """RFC 8767."""

    def failing(self, rig: Rig, clock: list[float], **options: Any) -> Rig:
        """Return a rig whose servers have failed when its answer became stale."""
        rig.make(stale=1000.0, **options)
        rig.ask(query(WWW, id=1))
        rig.source.reply = lambda asked: answer_to(asked, flags=QR | RD | RA | SERVFAIL)
        clock[0] += 60
        return rig

    def test_stale_answer_is_given_if_the_servers_fail(
        self, plain: Rig, clock: list[float]
    ) -> None:
        rig = self.failing(plain, clock)
        assert rig.ask(query(question("WWW.example"), id=2)) == answer_to(
            query(question("WWW.example"), id=2), a(STALE_TTL)
        )
        clock[0] += STALE_TTL - 1
        # The servers are not asked again at once.
        assert rig.ask(query(WWW, id=3)) == answer_to(query(WWW, id=3), a(1))
        assert len(rig.source.asked) == 2 and rig.counts.of("queries", "stale") == 1
        clock[0] += 1
        rig.source.reply = sixty
        assert rig.ask(query(WWW, id=4)) == answer_to(query(WWW, id=4), a(60))

    def test_stale_answer_is_given_over_a_connection(self, plain: Rig, clock: list[float]) -> None:
        rig = self.failing(plain, clock)
        with Conversation(rig.handler) as client:
            client.send(framed(query(WWW, id=2)))
            assert read_framed(client.socket) == answer_to(query(WWW, id=2), a(STALE_TTL))

    def test_servers_have_less_time_if_there_is_a_stale_answer(
        self, plain: Rig, clock: list[float]
    ) -> None:
        rig = self.failing(plain, clock)
        rig.ask(query(WWW, id=2))
        rig.ask(query(question("other.example"), id=3))
        assert rig.source.seconds == [SERVER_SECONDS, STALE_SECONDS, SERVER_SECONDS]

    def test_slow_server_is_asked_again_after_the_stale_answer(
        self, plain: Rig, clock: list[float]
    ) -> None:
        """A server that needs longer than a client waits would never be believed."""
        rig = self.failing(plain, clock)

        def reply(asked: bytes) -> bytes:
            clock[0] += 2.0
            late = rig.source.seconds[-1] > STALE_SECONDS
            return sixty(asked) if late else answer_to(asked, flags=QR | RD | RA | SERVFAIL)

        rig.source.reply = reply
        assert rig.ask(query(WWW, id=2)) == answer_to(query(WWW, id=2), a(STALE_TTL))
        assert rig.ask(query(WWW, id=3)) == answer_to(query(WWW, id=3), a(60))
        assert rig.source.seconds[1:] == [STALE_SECONDS, SERVER_SECONDS]

    def test_stale_answer_has_an_end(self, plain: Rig, clock: list[float]) -> None:
        rig = self.failing(plain, clock)
        clock[0] += 1000
        assert rig.ask(query(WWW))[3] & 15 == SERVFAIL
        assert rig.counts.of("queries", "stale") == 0

    @pytest.mark.parametrize("code", [0, NXDOMAIN])
    def test_answer_without_data_is_no_failure(
        self, plain: Rig, clock: list[float], code: int
    ) -> None:
        """The name is gone: what was there before is not used again."""
        rig = self.failing(plain, clock)
        fails = rig.source.reply
        rig.source.reply = lambda asked: answer_to(asked, flags=QR | RD | RA | code)
        assert rig.ask(query(WWW))[3] & 15 == code
        rig.source.reply = fails
        assert rig.ask(query(WWW))[3] & 15 == SERVFAIL

    def test_absence_is_never_stale(self, plain: Rig, clock: list[float]) -> None:
        plain.make(stale=1000.0)
        plain.source.reply = nxdomain
        plain.ask(query(WWW))
        clock[0] += 60
        plain.source.reply = lambda asked: answer_to(asked, flags=QR | RD | RA | SERVFAIL)
        assert plain.ask(query(WWW))[3] & 15 == SERVFAIL

    def test_serving_stale_answers_can_be_switched_off(
        self, plain: Rig, clock: list[float]
    ) -> None:
        plain.ask(query(WWW))
        clock[0] += 60
        plain.source.reply = lambda asked: answer_to(asked, flags=QR | RD | RA | SERVFAIL)
        assert plain.ask(query(WWW))[3] & 15 == SERVFAIL


class TestCoalescing:
    def test_clients_that_ask_the_same_share_an_answer(self, plain: Rig) -> None:
        asked = [
            query(question(name), id=id)
            for id, name in enumerate(("www.example", "WWW.example", "www.eXample"))
        ]
        clients = [plain.open() for _ in asked]
        for client, message in zip(clients, asked, strict=True):
            plain.hand_over(message, by=client)
        assert len(plain.tasks) == 1
        plain.work()
        assert [client.recv(512) for client in clients] == [
            answer_to(message, a(60)) for message in asked
        ]
        assert plain.source.asked == asked[:1]

    def test_clients_that_ask_the_same_share_an_error(self, plain: Rig) -> None:
        """An error without question gets the ID of each client's query."""
        plain.source.reply = lambda asked: asked[:2] + HEADER.pack(0, QR | FORMERR, 0, 0, 0, 0)[2:]
        plain.hand_over(query(WWW, id=1), query(WWW, id=2))
        plain.work()
        assert [plain.client.recv(512)[:4] for _ in range(2)] == [b"\0\1\x80\1", b"\0\2\x80\1"]
        assert len(plain.source.asked) == 1

    def test_query_that_is_not_cached_passes_a_circle_of_servers_once(self, plain: Rig) -> None:
        """It comes back with another ID."""
        anything = [query(question("www.example", 255), id=id) for id in (1, 2)]
        plain.hand_over(*anything)
        plain.work()
        assert plain.source.asked == anything[:1]
        assert [plain.client.recv(512) for _ in anything] == [
            answer_to(message, a(60)) for message in anything
        ]

    def test_query_after_the_answer_is_asked_again(self, plain: Rig) -> None:
        plain.make(cache=0)
        plain.ask(query(WWW))
        plain.ask(query(WWW))
        assert len(plain.source.asked) == 2

    def test_client_above_the_limit_loses_its_oldest_query(self, plain: Rig) -> None:
        plain.handler._pending._clients.limit = 20
        plain.hand_over(*[query(WWW, id=id) for id in range(22)])
        assert plain.counts.of("drops", "waiting queue full") == 2
        plain.work()
        assert {plain.client.recv(512)[:2] for _ in range(20)} == {
            id.to_bytes(2, "big") for id in range(2, 22)
        }
        assert nothing_comes(plain.client)

    @pytest.mark.parametrize("attackers", [1, 2, 50])
    def test_flood_of_others_leaves_room_for_a_client(self, plain: Rig, attackers: int) -> None:
        """Hazard 138.  All ask the same, and different questions."""
        plain.handler._pending._clients.limit = 60
        others = [plain.open(f"127.0.1.{number + 1}") for number in range(attackers)]
        asked = query(WWW, id=0xFFFF)
        for number in range(100):
            sender = others[number % attackers]
            flood = (query(WWW, id=number), query(question(f"n{number}.example"), id=number))
            plain.hand_over(*flood, by=sender)
            if number == 20:
                plain.hand_over(asked)
        assert plain.counts.of("drops", "waiting queue full") == 200 + 1 - 60
        plain.work()
        assert plain.client.recv(512) == answer_to(asked, a(60))

    def test_query_without_a_worker_is_dropped_and_counted(self, plain: Rig) -> None:
        plain.room = False
        plain.hand_over(query(WWW))
        assert plain.counts.of("drops", "lookup queue full") == 1
        plain.room = True
        assert plain.ask(query(WWW)) == answer_to(query(WWW), a(60))
        assert nothing_comes(plain.client)

    def test_exception_of_the_source_drops_the_waiting_clients_only(self, plain: Rig) -> None:
        def fail(asked: bytes) -> bytes:
            raise RuntimeError("broken")

        plain.source.reply = fail
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
            query(WWW, a(7), record(b"\0", 250, 0, b"signature", 255)),
        ],
        ids=["TYPE65280", "HTTPS CH", "Z AD CD", "EDNS", "EDNS version 5", "records"],
    )
    def test_unknown_types_flags_and_options_pass_unchanged(self, plain: Rig, asked: bytes) -> None:
        strange = answer_to(
            asked,
            record(ASKED, 65280, 60, b"\xff\0whatever"),
            flags=QR | AA | 0x0070 | int.from_bytes(asked[2:4], "big"),
        )
        plain.source.reply = lambda query: strange
        assert plain.ask(asked) == strange
        assert plain.source.asked == [asked]

    def test_client_without_edns_gets_512_bytes_at_most(
        self, plain: Rig, clock: list[float]
    ) -> None:
        long = txt_records(60, 4000)
        plain.source.reply = lambda asked: answer_to(asked, *long)
        asked = query(question("www.example", 16))
        # A miss and a hit.
        for _ in range(2):
            assert plain.ask(asked) == answer_to(asked, flags=QR | RD | RA | TC)
        assert plain.source.asked == [asked]

    def test_client_with_edns_gets_the_size_it_accepts(
        self, plain: Rig, clock: list[float]
    ) -> None:
        long = txt_records(60, 2000)
        plain.source.reply = lambda asked: answer(question("www.example", 16), long, (), (opt(),))
        asked = [query(question("www.example", 16), opt(size)) for size in (0, 512, 1232, 4096)]
        size = len(plain.source.reply(b""))
        assert 1232 < size < 4096
        answers = [plain.ask(message) for message in asked]
        assert (
            answers[:3]
            == [answer(question("www.example", 16), (), (), (opt(),), QR | RD | RA | TC)] * 3
        )
        assert answers[3] == plain.source.reply(b"")
        assert len(plain.source.asked) == 1

    def test_answer_without_a_server_needs_no_worker(self, plain: Rig) -> None:
        plain.source.known[question_of(query(WWW))] = b"whatever"
        plain.hand_over(query(WWW))
        assert not plain.tasks and plain.client.recv(512) == b"whatever"

    @pytest.mark.parametrize(
        "asked, answer",
        [
            (HEADER.pack(7, RD, 0, 0, 0, 0), HEADER.pack(7, QR | RD | RA | FORMERR, 0, 0, 0, 0)),
            (
                HEADER.pack(7, RD | CD, 2, 0, 0, 0) + WWW + WWW,
                HEADER.pack(7, QR | RD | RA | CD | FORMERR, 0, 0, 0, 0),
            ),
        ],
        ids=["no question", "two questions"],
    )
    def test_query_without_exactly_one_question_gets_formerr(
        self, plain: Rig, asked: bytes, answer: bytes
    ) -> None:
        plain.hand_over(asked)
        assert plain.client.recv(512) == answer
        assert not plain.tasks and plain.counts.of("queries", "malformed") == 1
        assert plain.counts.refusals[0].network == "udp"

    @pytest.mark.parametrize("opcode", [1, 2, 3, 4, 5, 6, 15])
    def test_other_opcode_than_query_is_not_implemented(self, plain: Rig, opcode: int) -> None:
        """No server is asked: an update or a notification is not for a forwarder."""
        asked = query(question("www.example", 6), a(7), flags=RD | opcode << 11)
        wanted = HEADER.pack(0x1234, QR | RD | RA | opcode << 11 | NOTIMP, 1, 0, 0, 0) + question(
            "www.example", 6
        )
        plain.hand_over(asked)
        assert plain.client.recv(512) == wanted
        with Conversation(plain.handler) as client:
            client.send(framed(asked) + framed(query(WWW)))
            assert read_framed(client.socket) == wanted
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))
        assert plain.source.asked == [query(WWW)] and not plain.tasks
        assert plain.counts.of("queries", "not implemented") == 2

    def test_opcode_counts_before_the_question(self, plain: Rig) -> None:
        plain.hand_over(HEADER.pack(7, 5 << 11, 0, 0, 1, 0) + b"\0")
        assert plain.client.recv(512) == HEADER.pack(7, QR | RA | 5 << 11 | NOTIMP, 0, 0, 0, 0)

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
    def test_answer_and_message_without_header_get_no_answer(
        self, plain: Rig, asked: bytes
    ) -> None:
        """Two servers that answer answers would never end."""
        plain.hand_over(asked)
        assert not plain.tasks and nothing_comes(plain.client, 0)
        assert plain.counts.of("drops", "malformed") == 1


class TestClients:
    def test_client_that_is_not_allowed_is_dropped_and_counted(self, plain: Rig) -> None:
        plain.make(clients=NETWORKS)
        plain.ask(query(WWW))
        stranger = plain.open("127.0.0.2")
        plain.hand_over(query(WWW), query(WWW), b"", by=stranger)
        assert plain.counts.of("drops", "client not allowed") == 3
        assert not plain.tasks and nothing_comes(stranger, 0)

    def test_record_names_the_key_that_decides(self, plain: Rig) -> None:
        plain.make(clients=AllowedClients(deny=((IpNetwork.parse("127.0.0.2"),), ())))
        plain.hand_over(query(WWW), by=plain.open("127.0.0.2"))
        assert [refusal.decided for refusal in plain.counts.refusals] == ["clients_deny"]
        assert plain.ask(query(WWW), by=plain.open("127.0.0.3"))

    def test_clients_of_the_allowed_networks_are_answered(
        self, plain: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dns_module, "ALLOWED_LIMIT", 2)
        plain.make(clients=NETWORKS)
        for host in ("127.0.0.1", "127.1.0.1", "127.1.0.2", "127.0.0.1", "127.1.255.1"):
            assert plain.ask(query(WWW), by=plain.open(host))
            assert len(plain.handler._allowed_hosts) <= 2
        assert plain.counts.of("drops", "client not allowed") == 0


def test_slow_name_delays_no_other_name(plain: Rig) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def reply(query: bytes) -> bytes:
        if question_of(query) == named_slow:
            asked.set()
            assert go_on.wait(SECONDS)
        return sixty(query)

    slow, other = query(question("slow.example")), query(WWW)
    named_slow = question_of(slow)
    plain.source.reply = reply
    pool = FairQueue(ThreadPool("pool-under-test", 4, 0, plain.log), 4)
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
    def test_queries_of_a_connection_are_answered(self, plain: Rig) -> None:
        asked = query(WWW)
        with Conversation(plain.handler) as client:
            for _ in range(2):
                client.send(framed(asked))
                assert client.read(2 + len(answer_to(asked, a(60)))) == framed(
                    answer_to(asked, a(60))
                )
        assert plain.source.asked == [asked]

    def test_connections_and_datagrams_share_the_cache(self, plain: Rig) -> None:
        plain.ask(query(WWW, id=1))
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW, id=2)))
            assert read_framed(client.socket) == answer_to(query(WWW, id=2), a(60))
        assert len(plain.source.asked) == 1

    def test_connections_and_datagrams_that_ask_the_same_share_an_answer(self, plain: Rig) -> None:
        """Otherwise a query in a circle of servers would take a thread for each round."""
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
            wait_until(lambda: plain.handler._pending.waiting == 3)
            go_on.set()
            assert read_framed(client.socket) == answer_to(first, a(60))
            assert read_framed(other.socket) == answer_to(second, a(60))
        assert plain.client.recv(512) == answer_to(query(WWW, id=3), a(60))
        assert plain.source.asked == [first] and not plain.tasks

    def test_answer_over_a_connection_is_not_truncated(self, plain: Rig) -> None:
        plain.source.reply = lambda asked: answer_to(asked, *txt_records(60, 60000))
        asked = query(question("www.example", 16))
        with Conversation(plain.handler) as client:
            client.send(framed(asked))
            assert read_framed(client.socket) == answer_to(asked, *txt_records(60, 60000))

    def test_pipelined_queries_are_answered_in_their_order(self, plain: Rig) -> None:
        asked = [query(question(f"{id}.example"), id=id) for id in range(20)]
        with Conversation(plain.handler) as client:
            client.send(b"".join(map(framed, asked)))
            assert [read_framed(client.socket) for _ in asked] == [
                answer_to(message, a(60)) for message in asked
            ]

    def test_query_may_come_byte_by_byte(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.trickle(framed(query(WWW)))
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))

    def test_half_close_after_the_last_query_gets_its_answer(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW)))
            client.socket.shutdown(socket.SHUT_WR)
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))
            client.expect_end()

    def test_query_without_question_over_a_connection_gets_formerr(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(HEADER.pack(7, RD, 0, 0, 0, 0)) + framed(query(WWW)))
            assert read_framed(client.socket) == HEADER.pack(7, QR | RD | RA | FORMERR, 0, 0, 0, 0)
            assert read_framed(client.socket) == answer_to(query(WWW), a(60))

    @pytest.mark.parametrize(
        "sent",
        [framed(b""), framed(b"\0\1"), framed(query(WWW, flags=QR))],
        ids=["nothing", "an ID", "an answer"],
    )
    def test_message_that_gets_no_answer_ends_the_connection(self, plain: Rig, sent: bytes) -> None:
        with Conversation(plain.handler) as client:
            client.send(sent)
            client.expect_closed()
        assert plain.counts.of("drops", "malformed") == 1
        assert plain.counts.refusals[0].network == "tcp"

    def test_half_a_query_ends_the_connection(self, plain: Rig) -> None:
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW))[:9])
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_end()
        assert not plain.source.asked

    def test_idle_connection_ends(self, plain: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dns_module, "IDLE_SECONDS", 0.05)
        with Conversation(plain.handler) as client:
            client.send(framed(query(WWW)))
            assert read_framed(client.socket)
            client.expect_end()

    def test_connection_holds_no_thread_between_queries(self, plain: Rig) -> None:
        """It is idle, so that a daemon that stops may drop it."""
        near, far = tcp_pair()
        with near, far:
            near.sendall(framed(query(WWW)))
            stream = Stream(far)
            handshake = plain.handler.handle(stream, Address("127.0.0.1", 1))
            need = run_until_events(handshake)
            watched = ((far, READABLE),)
            assert need.idle and need.watched() == (watched, dns_module.IDLE_SECONDS)
            assert read_framed(near) == answer_to(query(WWW), a(60))
            assert not stream.handshaking
            with pytest.raises(StopIteration) as stop:
                handshake.send({})
            assert stop.value.value is None

    def test_connection_that_waits_delays_no_other(self, plain: Rig) -> None:
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

    def test_exception_of_the_source_ends_the_connection(self, plain: Rig) -> None:
        def fail(asked: bytes) -> bytes:
            raise RuntimeError("broken")

        plain.source.reply = fail
        client = Conversation(plain.handler)
        client.send(framed(query(WWW)))
        client.expect_closed()
        client.close()
        wait_until(lambda: isinstance(client.raised, RuntimeError))
