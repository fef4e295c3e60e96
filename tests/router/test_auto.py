"""The way out that finds out: what speaks against the direct way, what is remembered, and what is never done."""

from __future__ import annotations

import socket
import threading
from typing import Any, Iterator

import pytest

from netproxy.errors import DialError, Reason
from netproxy.handler.outbound import Connector
from netproxy.handler.forward import TcpForward
from netproxy.handler.http import Forwarder, HttpHandler
from netproxy.access.login import Login
from netproxy.access.users import Users
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.observe.flows import ObserverGroup
from netproxy.observe.metrics import Counters
from netproxy.relay.pipe import PipeLimits
from netproxy.router import auto as auto_module
from netproxy.router.auto import AutoDialer, Pins, Verdicts, Ways
from netproxy.router.factory import Routing
from tests.support.doubles import Records
from tests.support.handlers import Conversation
from tests.support.nat import Clock
from tests.support.routing import Names, flow, make_guard, routing
from tests.support.relays import configuration
from tests.support.sockets import (
    SECONDS,
    black_hole,
    read_exactly,
    refusing,
    reset,
    server,
    wait_until,
)

pytest.importorskip("yaml")

TARGET = Address("a.test", 443)
CLIENT = Address("192.0.2.1", 5000)
FLOW = Flow("tcp", CLIENT, TARGET, "main", "")


class Way:
    """A way out that remembers who was dialled; `failure` is what it says instead."""

    symmetric = False
    refusal = Reason.UNSUPPORTED

    def __init__(
        self, name: str, resolves_names: bool = False, carries: str = "tcp udp bind"
    ) -> None:
        self.name, self.resolves_names = name, resolves_names
        self.carries = frozenset(carries.split())
        self.failure: Reason | None = None
        self.dialled: list[Flow] = []

    def dial(self, flow: Flow) -> Any:
        self.dialled.append(flow)
        if self.failure:
            raise DialError(self.failure, str(flow.target))
        return f"stream by {self.name}"

    def dial_packet(self, flow: Flow) -> Any:
        return self.dial(flow)

    def fixed_for(self, flow: Flow) -> Any:
        return self


class Rig:
    def __init__(self, pins: Pins = Pins((), ()), verdicts: Verdicts | None = None) -> None:
        self.direct, self.impatient = Way("direct"), Way("impatient")
        self.upstream = Way("upstream", True, "tcp udp")
        self.verdicts = verdicts or Verdicts(60.0, 100)
        self.dialer = AutoDialer(
            Ways(self.direct, self.impatient, self.upstream), pins, self.verdicts
        )

    def visit(self, given: Flow = FLOW) -> tuple[str, str]:
        """Who was asked, in order, and who gave the stream, or why nobody did."""
        ways = (self.direct, self.impatient, self.upstream)
        before = [len(way.dialled) for way in ways]
        try:
            said = self.dialer.dial(given)
        except DialError as error:
            said = error.reason.name
        asked = [way.name for way, count in zip(ways, before) if len(way.dialled) > count]
        return " ".join(asked), said.removeprefix("stream by ")

    def ended(
        self, ended: str = "reset", sent: int = 100, received: int = 0, given: Flow = FLOW
    ) -> None:
        self.dialer.finished(Record(given, "auto", sent, received, 1.0, ended))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auto_module, "time", clock)
    return clock


class TestADial:
    def test_direct_first_and_again(self) -> None:
        rig = Rig()
        assert rig.visit() == rig.visit() == ("impatient", "impatient")
        assert list(rig.verdicts.items())[0][:2] == (TARGET, "direct")

    @pytest.mark.parametrize(
        "reason",
        [
            Reason.REFUSED,
            Reason.TIMEOUT,
            Reason.NAME,
            Reason.NETWORK_UNREACHABLE,
            Reason.HOST_UNREACHABLE,
            Reason.GENERAL,
        ],
    )
    def test_a_failure_goes_to_the_upstream_and_the_next_visit_there_at_once(
        self, reason: Reason
    ) -> None:
        rig = Rig()
        rig.impatient.failure = reason
        assert rig.visit() == ("impatient upstream", "upstream")
        assert rig.visit() == ("upstream", "upstream")
        assert list(rig.verdicts.items())[0][:2] == (TARGET, "upstream")

    @pytest.mark.parametrize("reason", [Reason.DENIED, Reason.LOOP])
    def test_where_nobody_may_go_the_upstream_is_not_asked_to(self, reason: Reason) -> None:
        rig = Rig()
        rig.impatient.failure = reason
        assert rig.visit() == rig.visit() == ("impatient", reason.name)
        assert not list(rig.verdicts.items())

    def test_where_the_upstream_fails_too_its_words_count_and_nothing_is_learnt(self) -> None:
        rig = Rig()
        rig.impatient.failure, rig.upstream.failure = Reason.TIMEOUT, Reason.HOST_UNREACHABLE
        assert rig.visit() == ("impatient upstream", "HOST_UNREACHABLE")
        assert not list(rig.verdicts.items())

    def test_a_known_upstream_that_fails_is_not_replaced_by_the_direct_way(self) -> None:
        rig = Rig()
        rig.verdicts.learn(TARGET, True)
        rig.upstream.failure = Reason.REFUSED
        assert rig.visit() == ("upstream", "REFUSED")

    def test_a_verdict_is_of_host_and_port(self) -> None:
        rig = Rig()
        rig.verdicts.learn(TARGET, True)
        assert rig.visit(FLOW._replace(target=Address("a.test", 80))) == ("impatient", "impatient")

    def test_the_flow_with_its_addresses_is_handed_on(self) -> None:
        rig = Rig()
        rig.impatient.failure = Reason.REFUSED
        given = FLOW._replace(addresses=(Address("203.0.113.1", 443),))
        rig.visit(given)
        assert rig.impatient.dialled == rig.upstream.dialled == [given]

    def test_what_it_carries(self) -> None:
        assert Rig().dialer.carries == {
            "tcp",
            "udp",
        }  # a BIND's peer could not be reached by two ways


@pytest.mark.parametrize(
    "scheme, asked", [("socks5", ["a.test"]), ("socks4", ["a.test"]), ("socks5h", [])]
)
def test_hazard_75_one_lookup_is_for_both_ways(scheme: str, asked: list[str]) -> None:
    """Where the upstream is told addresses, it is told those that the direct way has had; else nobody here need know any."""
    names = Names({"a.test": ["203.0.113.1"]})
    found = routing(TestDatagrams.TEXT.replace("SCHEME", scheme), names).router.route(
        flow("tcp 192.0.2.9 -> a.test:443 on main")
    )
    assert found.dialer.name == "auto" and [one.host for one in found.flow.addresses] == [
        "203.0.113.1"
    ] * len(asked)
    assert names.asked == asked


class TestAReset:
    def test_before_the_first_byte_speaks_against_the_direct_way(self) -> None:
        rig = Rig()
        rig.visit()
        rig.ended()
        assert rig.visit() == ("upstream", "upstream")

    @pytest.mark.parametrize(
        "ended, sent, received",
        [
            ("reset", 100, 1),
            ("closed", 100, 0),
            ("reset", 0, 0),
            ("client reset", 100, 0),
            ("idle", 1, 0),
        ],
    )
    def test_other_ends_do_not(self, ended: str, sent: int, received: int) -> None:
        """A byte of the target's is an answer; a client that says nothing and goes has not been let down."""
        rig = Rig()
        rig.visit()
        rig.ended(ended, sent, received)
        assert rig.visit() == ("impatient", "impatient")

    def test_of_a_connection_by_the_upstream_does_not(self) -> None:
        rig = Rig()
        rig.ended()
        assert rig.visit() == ("impatient", "impatient")

    def test_a_record_counts_once(self) -> None:
        """Later requests of a connection that was kept are closed by servers as they like."""
        rig = Rig()
        rig.visit()
        rig.ended("done", 100, 100)
        rig.ended()
        assert rig.visit() == ("impatient", "impatient")

    def test_another_clients_record_does_not_count(self) -> None:
        rig = Rig()
        rig.visit()
        rig.ended(given=FLOW._replace(client=CLIENT._replace(port=5001)))
        assert rig.visit() == ("impatient", "impatient")

    def test_what_is_awaited_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auto_module, "WATCHED_LIMIT", 10)
        rig = Rig()
        for port in range(20):
            rig.visit(FLOW._replace(client=Address("192.0.2.1", port)))
        assert len(rig.dialer._watched) == 10
        for port in range(20):
            rig.ended("done", 1, 1, FLOW._replace(client=Address("192.0.2.1", port)))
        assert not rig.dialer._watched


class TestPins:
    def test_to_the_direct_way_which_has_all_its_time(self) -> None:
        rig = Rig(Pins({"a.test"}, ()))
        assert rig.visit() == ("direct", "direct")
        rig.direct.failure = Reason.TIMEOUT
        assert rig.visit() == ("direct", "TIMEOUT")
        rig.ended()
        assert not list(rig.verdicts.items())

    def test_to_the_upstream(self) -> None:
        rig = Rig(Pins((), {"a.test"}))
        assert rig.visit() == ("upstream", "upstream")
        rig.upstream.failure = Reason.REFUSED
        assert rig.visit() == ("upstream", "REFUSED")

    def test_the_direct_one_wins_and_both_win_over_verdicts(self) -> None:
        rig = Rig(Pins({"a.test"}, {"a.test", "b.test"}))
        rig.verdicts.learn(TARGET, True)
        rig.verdicts.learn(Address("b.test", 443), False)
        assert rig.visit() == ("direct", "direct")
        assert rig.visit(FLOW._replace(target=Address("b.test", 443))) == ("upstream", "upstream")

    @pytest.mark.parametrize(
        "host, way",
        [
            ("lan.test", "direct"),
            ("a.lan.test", "direct"),
            ("10.1.2.3", "direct"),
            ("fd00::7", "direct"),
            ("192.0.2.55", "direct"),
            ("far.test", "upstream"),
            ("www.far.test", "upstream"),
            ("198.51.100.9", "upstream"),
            ("tracker7.test", "upstream"),
            ("203.0.113.1", ""),
            ("10.lan.testing", ""),
            ("else.test", ""),
        ],
    )
    def test_in_the_file_are_domains_and_networks(self, host: str, way: str) -> None:
        [dialer] = routing("""
listeners: []
rules: [{via: auto, upstream: 'socks5h://192.0.2.1:1'}]
auto: {direct: [.lan.test, 10.0.0.0/8, 'fd00::/8', 192.0.2.55], upstream: [far.test, '*.far.test', 198.51.100.0/24, 'regex:^tracker[0-9]']}
""").autos
        fixed_for = dialer.pinned_way(FLOW._replace(target=Address(host, 443)))
        assert (fixed_for is dialer.direct, fixed_for is dialer.upstream) == (
            way == "direct",
            way == "upstream",
        )


class TestVerdicts:
    def test_hold_for_their_time(self, clock: Clock) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        clock.now += 59.9
        assert verdicts.by_upstream(TARGET) is True
        clock.now += 0.2
        assert verdicts.by_upstream(TARGET) is None and not verdicts._known

    def test_are_renewed_by_what_is_learnt_anew(self, clock: Clock) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        clock.now += 50.0
        verdicts.learn(TARGET, False)
        clock.now += 50.0
        assert verdicts.by_upstream(TARGET) is False

    def test_are_bounded_and_the_oldest_goes(self) -> None:
        verdicts = Verdicts(60.0, 3)
        for number in (1, 2, 3, 1, 4):
            verdicts.learn(Address(f"{number}.test", 1), True)
        assert [str(target) for target, _, _ in verdicts.items()] == [
            "3.test:1",
            "1.test:1",
            "4.test:1",
        ]

    def test_a_lower_bound_of_a_reload_holds_with_the_next(self) -> None:
        verdicts = Verdicts(60.0, 100)
        for number in range(50):
            verdicts.learn(Address(f"{number}.test", 1), True)
        verdicts.limit = 2
        verdicts.learn(TARGET, True)
        assert len(list(verdicts.items())) == 2

    def test_are_listed_with_the_time_they_have(self, clock: Clock) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(Address("old.test", 1), True)
        clock.now += 45.0
        verdicts.learn(TARGET, False)
        assert list(verdicts.items()) == [
            (Address("old.test", 1), "upstream", 15.0),
            (TARGET, "direct", 60.0),
        ]
        clock.now += 20.0
        assert list(verdicts.items()) == [(TARGET, "direct", 40.0)]

    def test_are_cleared(self) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        assert (
            verdicts.clear() == 1 and verdicts.by_upstream(TARGET) is None and verdicts.clear() == 0
        )

    def test_are_shared_by_all_that_are_auto_and_outlive_a_reload(self) -> None:
        verdicts = Verdicts(60.0, 10)
        first, second = Rig(verdicts=verdicts), Rig(verdicts=verdicts)
        first.impatient.failure = Reason.REFUSED
        first.visit()
        assert second.visit() == ("upstream", "upstream")


class TestDatagrams:
    """They tell of no failure, and follow what connections have found."""

    UDP = "udp 192.0.2.9 -> a.test:443 on main"
    TEXT = "listeners: [{name: main, listen: '127.0.0.1:1080'}]\nrules: [{via: auto, upstream: far}]\nupstreams: {far: 'SCHEME://192.0.2.1:1'}\n"

    def way(self, names: Names, verdicts: Verdicts, text: str = "", scheme: str = "socks5h") -> str:
        route = routing(
            self.TEXT.replace("SCHEME", scheme) + text, names, verdicts=verdicts
        ).router.route(flow(self.UDP))
        return f"{route.dialer.name} {' '.join(one.host for one in route.flow.addresses)}".strip()

    def test_go_directly_while_nothing_is_known_to_the_address_that_was_found(self) -> None:
        assert (
            self.way(Names({"a.test": ["203.0.113.1"]}), Verdicts(60.0, 10)) == "direct 203.0.113.1"
        )

    def test_follow_the_verdict_and_are_not_looked_up_for_a_proxy_that_does_it(self) -> None:
        verdicts, names = Verdicts(60.0, 10), Names({"a.test": ["203.0.113.1"]})
        verdicts.learn(Address("a.test", 443), True)
        assert self.way(names, verdicts) == "far" and not names.asked
        assert self.way(names, verdicts, scheme="socks5") == "far 203.0.113.1"

    def test_of_a_name_that_is_not_found_here_go_to_the_upstream(self) -> None:
        names = Names({})
        assert self.way(names, Verdicts(60.0, 10)) == "far" and names.asked == ["a.test"]

    def test_but_not_where_it_is_pinned_to_the_direct_way(self) -> None:
        names = Names({})
        with pytest.raises(DialError) as caught:
            self.way(names, Verdicts(60.0, 10), "auto: {direct: a.test}")
        assert caught.value.reason is Reason.NAME and names.asked == ["a.test"]

    def test_pinned_to_the_upstream(self) -> None:
        names = Names({})
        assert (
            self.way(names, Verdicts(60.0, 10), "auto: {upstream: a.test}") == "far"
            and not names.asked
        )

    def test_that_are_denied_go_nowhere(self) -> None:
        with pytest.raises(DialError) as caught:
            self.way(
                Names({"a.test": ["10.0.0.1"]}), Verdicts(60.0, 10), "destinations: {deny: private}"
            )
        assert caught.value.reason is Reason.DENIED


class Running:
    """A TCP forward to a target by auto, an upstream that is a SOCKS5 proxy played here, and its records."""

    def __init__(self, names: Names, upstream: Address, target: Address, more: str = "") -> None:
        config = configuration(
            f"listeners: [{{protocol: tcp, name: main, listen: '127.0.0.1:0', target: 'a.test:1'}}]\n"
            f"rules: [{{via: auto, upstream: 'socks5h://{upstream}'}}]\nauto: {{deadline: 300ms}}\n{more}"
        )
        self.verdicts = Verdicts(60.0, 10)
        self.routing: Routing = routing(config, names, make_guard(config), verdicts=self.verdicts)
        self.records, counters = Records(), Counters()
        observer = ObserverGroup(self.records, self.routing.autos)
        self.connector = Connector(
            self.routing.router, PipeLimits(SECONDS, SECONDS), counters, observer
        )
        self.target = target
        self.http = HttpHandler(
            "main",
            self.connector,
            Forwarder(self.connector, SECONDS),
            Login(Users({}), "none"),
            counters,
        )

    def conversation(self) -> Conversation:
        return Conversation(TcpForward("main", self.connector, self.target))

    def verdict(self) -> str:
        return "".join(way for _, way, _ in self.verdicts.items())


class Proxy:
    """The upstream: what it was asked for, and what it was sent behind that; it echoes."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.sent: list[bytes] = []

    def __call__(self, sock: socket.socket) -> None:
        assert read_exactly(sock, 3) == b"\5\1\0"
        sock.sendall(b"\5\0")
        head = read_exactly(sock, 5)
        self.asked.append(
            read_exactly(sock, head[4] + 2)[:-2]
            if head[3] == 3
            else head[4:] + read_exactly(sock, 5)
        )
        sock.sendall(b"\5\0\0\1\0\0\0\0\0\0")
        while data := sock.recv(1000):
            self.sent.append(data)
            sock.sendall(data)


@pytest.fixture
def proxy() -> Iterator[tuple[Proxy, Address]]:
    played = Proxy()
    with server(played) as address:
        yield played, address


def echoes(running: Running, data: bytes = b"ping") -> None:
    with running.conversation() as client:
        client.send(data)
        client.expect(data)
        client.socket.shutdown(socket.SHUT_WR)
        client.expect_end()


class TestForReal:
    def test_a_target_that_answers_is_reached_directly(self, proxy: tuple[Proxy, Address]) -> None:
        def echo(sock: socket.socket) -> None:
            while data := sock.recv(100):
                sock.sendall(data)

        with server(echo) as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            echoes(running)
        assert running.verdict() == "direct" and not proxy[0].asked

    def test_a_target_that_refuses(self, proxy: tuple[Proxy, Address]) -> None:
        with refusing() as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            echoes(running)
            echoes(running, b"pong")
        assert proxy[0].asked == [b"a.test"] * 2 and running.verdict() == "upstream"

    def test_a_target_that_is_silent_has_the_short_deadline(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        with black_hole() as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            echoes(running)
        assert proxy[0].asked == [b"a.test"] and running.verdict() == "upstream"

    @pytest.mark.parametrize(
        "there", [{}, {"a.test": None}], ids=["not found", "name server silent"]
    )
    def test_a_name_that_is_not_found_here(
        self, proxy: tuple[Proxy, Address], there: dict[str, None]
    ) -> None:
        running = Running(Names(there), proxy[1], Address("a.test", 443))
        echoes(running)
        assert proxy[0].asked == [b"a.test"]

    def test_a_reset_before_the_first_byte_loses_that_connection_and_saves_the_next(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        """Bytes that were sent are never sent again."""
        got: list[bytes] = []

        def reset_it(sock: socket.socket) -> None:
            got.append(sock.recv(100))
            reset(sock)

        with server(reset_it) as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with running.conversation() as client:
                client.send(b"POST /once")
                client.expect_closed()
            assert running.records.records[0].ended == "reset"
            assert not proxy[0].asked and running.verdict() == "upstream"
            echoes(running, b"again")
        assert got == [b"POST /once"] and proxy[0].sent == [b"again"]

    def test_a_client_that_resets_says_nothing_of_its_target(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        def swallow(sock: socket.socket) -> None:
            while sock.recv(100):
                pass

        with server(swallow) as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with running.conversation() as client:
                client.send(b"GET /")
                wait_until(lambda: running.records.records or running.verdict())
                reset(client.socket)
                running.records.wait_for(1)
        assert running.records.records[0].ended == "client reset" and running.verdict() == "direct"

    def test_a_reset_of_a_forwarded_request_is_one_too(self, proxy: tuple[Proxy, Address]) -> None:
        def reset_it(sock: socket.socket) -> None:
            sock.recv(1000)
            reset(sock)

        with server(reset_it) as target:
            running = Running(
                Names({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with Conversation(running.http) as client:
                client.send(b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a.test\r\n\r\n" % target.port)
                assert client.read(12) == b"HTTP/1.1 502"
                while client.socket.recv(1000):
                    pass
        assert running.verdict() == "upstream" and not proxy[0].asked

    @pytest.mark.parametrize(
        "target, there",
        [
            (Address("10.0.0.1", 443), {}),
            (Address("a.test", 443), {"a.test": ["10.0.0.1", "10.0.0.2"]}),
            (Address("169.254.169.254", 80), {}),
        ],
    )
    def test_what_is_denied_never_goes_to_the_upstream(
        self, proxy: tuple[Proxy, Address], target: Address, there: dict
    ) -> None:
        running = Running(
            Names(there), proxy[1], target, "destinations: {deny: [private, metadata]}"
        )
        with running.conversation() as client:
            client.expect_closed()
        assert not proxy[0].asked and not running.verdict()
        assert [record.ended for record in running.records.records] == [Reason.DENIED.value]


def test_many_threads_learn_and_ask() -> None:
    verdicts = Verdicts(60.0, 50)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(2000):
                target = Address(f"{(number * seed) % 97}.test", 1)
                verdicts.learn(target, number % 2 == 0)
                verdicts.by_upstream(target)
                if number % 500 == 0:
                    list(verdicts.items())
                    verdicts.clear()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(list(verdicts.items())) <= 50
