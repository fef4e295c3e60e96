"""The upstream `auto`: what counts against direct, what is remembered, and what is never tried."""

from __future__ import annotations

import socket
import threading
from typing import Any, Iterator, Sequence

import pytest

from netproxy.errors import DialError, Reason
from netproxy.handler.forward import TcpForward
from netproxy.handler.http import HttpHandler
from netproxy.handler.http_forward import Forwarder
from netproxy.handler.outbound import Outbound
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow, Record
from netproxy.observe.flows import ObserverGroup
from netproxy.observe.metrics import Counters
from netproxy.relay.pipe import PipeLimits
from netproxy.router import auto as auto_module
from netproxy.router.auto import AutoDialer, AutoDialers, Pins, Verdicts
from netproxy.router.factory import Routing
from tests.support.accounts import account_book
from tests.support.doubles import Records
from tests.support.handlers import Conversation, permission
from tests.support.nat import Clock
from tests.support.relays import configuration
from tests.support.routing import StubResolver, flow, make_guard, routing
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
NO_PINS = Pins((), ())


class FakeStream(str):
    """A stream that tells who made it."""

    member = ""


class RecordingDialer:
    """A Dialer that records the flows it is asked to dial; it raises `failure` if it is set."""

    symmetric = knows_bound = False
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
        return FakeStream(f"stream by {self.name}")

    def dial_packet(self, flow: Flow) -> Any:
        return self.dial(flow)

    def fixed_for(self, flow: Flow) -> Any:
        return self


class Rig:
    """An AutoDialer over recording dialers."""

    def __init__(self, pins: Pins = NO_PINS, verdicts: Verdicts | None = None) -> None:
        self.direct, self.trial = RecordingDialer("direct"), RecordingDialer("trial")
        self.upstream = RecordingDialer("upstream", True, "tcp udp")
        self.verdicts = verdicts or Verdicts(60.0, 100)
        self.dialer = AutoDialer(
            AutoDialers(self.direct, self.trial, self.upstream), pins, self.verdicts
        )

    def dial(self, given: Flow = FLOW) -> tuple[str, str]:
        """Dial; return the dialers that were asked, and which gave the stream or the reason."""
        dialers = (self.direct, self.trial, self.upstream)
        for dialer in dialers:
            dialer.dialled.clear()
        try:
            outcome = self.dialer.dial(given)
        except DialError as error:
            outcome = error.reason.name
        asked = [dialer.name for dialer in dialers if dialer.dialled]
        return " ".join(asked), outcome.removeprefix("stream by ")

    def ended(
        self, ended: str = "reset", sent: int = 100, received: int = 0, given: Flow = FLOW
    ) -> None:
        """Hand the record of a connection over."""
        self.dialer.finished(Record(given, "auto", sent, received, 1.0, ended))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auto_module, "time", clock)
    return clock


class TestDial:
    def test_target_that_answers_is_dialled_direct_each_time(self) -> None:
        rig = Rig()
        assert rig.dial() == rig.dial() == ("trial", "trial")
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
    def test_direct_failure_moves_the_target_to_the_upstream(self, reason: Reason) -> None:
        rig = Rig()
        rig.trial.failure = reason
        assert rig.dial() == ("trial upstream", "upstream")
        assert rig.dial() == ("upstream", "upstream")
        assert list(rig.verdicts.items())[0][:2] == (TARGET, "upstream")

    @pytest.mark.parametrize("reason", [Reason.DENIED, Reason.LOOP])
    def test_denied_target_is_not_tried_by_the_upstream(self, reason: Reason) -> None:
        rig = Rig()
        rig.trial.failure = reason
        assert rig.dial() == rig.dial() == ("trial", reason.name)
        assert not list(rig.verdicts.items())

    def test_failure_of_both_dialers_is_the_upstreams_and_teaches_nothing(self) -> None:
        rig = Rig()
        rig.trial.failure, rig.upstream.failure = Reason.TIMEOUT, Reason.HOST_UNREACHABLE
        assert rig.dial() == ("trial upstream", "HOST_UNREACHABLE")
        assert not list(rig.verdicts.items())

    def test_target_that_needs_the_upstream_is_never_dialled_direct(self) -> None:
        rig = Rig()
        rig.verdicts.learn(TARGET, True)
        rig.upstream.failure = Reason.REFUSED
        assert rig.dial() == ("upstream", "REFUSED")

    def test_verdict_is_for_host_and_port(self) -> None:
        rig = Rig()
        rig.verdicts.learn(TARGET, True)
        assert rig.dial(FLOW._replace(target=Address("a.test", 80))) == ("trial", "trial")

    def test_both_dialers_get_the_flow_with_its_addresses(self) -> None:
        rig = Rig()
        rig.trial.failure = Reason.REFUSED
        given = FLOW._replace(addresses=(Address("203.0.113.1", 443),))
        rig.dial(given)
        assert rig.trial.dialled == rig.upstream.dialled == [given]

    def test_auto_carries_tcp_and_udp_but_no_bind(self) -> None:
        """Two dialers cannot wait for the peer of one BIND."""
        assert Rig().dialer.carries == {"tcp", "udp"}


@pytest.mark.parametrize(
    "scheme, lookups", [("socks5", ["a.test"]), ("socks4", ["a.test"]), ("socks5h", [])]
)
def test_lookup_serves_both_dialers(scheme: str, lookups: list[str]) -> None:
    """Hazard 75: an upstream that gets addresses gets those that direct has had."""
    names = StubResolver({"a.test": ["203.0.113.1"]})
    router = routing(TestDatagrams.TEXT.replace("SCHEME", scheme), names).router
    route = router.route(flow("tcp 192.0.2.9 -> a.test:443 on main"))
    hosts = [address.host for address in route.flow.addresses]
    assert route.dialer.name == "auto" and hosts == ["203.0.113.1"] * len(lookups)
    assert names.lookups == lookups


class TestReset:
    def test_reset_before_the_first_byte_moves_the_target_to_the_upstream(self) -> None:
        rig = Rig()
        rig.dial()
        rig.ended()
        assert rig.dial() == ("upstream", "upstream")

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
    def test_other_ends_of_a_connection_do_not_count_against_direct(
        self, ended: str, sent: int, received: int
    ) -> None:
        """A byte of the target is an answer; a client that sends nothing has not waited for any."""
        rig = Rig()
        rig.dial()
        rig.ended(ended, sent, received)
        assert rig.dial() == ("trial", "trial")

    def test_reset_of_a_connection_by_the_upstream_does_not_count(self) -> None:
        rig = Rig()
        rig.ended()
        assert rig.dial() == ("trial", "trial")

    def test_only_the_first_record_of_a_connection_counts(self) -> None:
        """A server may reset a kept connection at a later request."""
        rig = Rig()
        rig.dial()
        rig.ended("done", 100, 100)
        rig.ended()
        assert rig.dial() == ("trial", "trial")

    def test_record_of_another_client_does_not_count(self) -> None:
        rig = Rig()
        rig.dial()
        rig.ended(given=FLOW._replace(client=CLIENT._replace(port=5001)))
        assert rig.dial() == ("trial", "trial")

    def test_number_of_watched_connections_is_bounded(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(auto_module, "WATCHED_LIMIT", 10)
        rig = Rig()
        for port in range(20):
            rig.dial(FLOW._replace(client=Address("192.0.2.1", port)))
        assert len(rig.dialer._watched) == 10
        for port in range(20):
            rig.ended("done", 1, 1, FLOW._replace(client=Address("192.0.2.1", port)))
        assert not rig.dialer._watched


class TestPins:
    def test_pin_to_direct_dials_without_a_trial(self) -> None:
        rig = Rig(Pins({"a.test"}, ()))
        assert rig.dial() == ("direct", "direct")
        rig.direct.failure = Reason.TIMEOUT
        assert rig.dial() == ("direct", "TIMEOUT")
        rig.ended()
        assert not list(rig.verdicts.items())

    def test_pin_to_the_upstream_dials_it_alone(self) -> None:
        rig = Rig(Pins((), {"a.test"}))
        assert rig.dial() == ("upstream", "upstream")
        rig.upstream.failure = Reason.REFUSED
        assert rig.dial() == ("upstream", "REFUSED")

    def test_pins_win_over_verdicts_and_direct_over_upstream(self) -> None:
        rig = Rig(Pins({"a.test"}, {"a.test", "b.test"}))
        rig.verdicts.learn(TARGET, True)
        rig.verdicts.learn(Address("b.test", 443), False)
        assert rig.dial() == ("direct", "direct")
        assert rig.dial(FLOW._replace(target=Address("b.test", 443))) == ("upstream", "upstream")

    @pytest.mark.parametrize(
        "host, pinned",
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
    def test_pins_in_the_configuration_are_domains_and_networks(
        self, host: str, pinned: str
    ) -> None:
        [dialer] = routing("""
listeners: []
rules: [{via: auto, upstream: 'socks5h://192.0.2.1:1'}]
auto:
  direct: [.lan.test, 10.0.0.0/8, 'fd00::/8', 192.0.2.55]
  upstream: [far.test, '*.far.test', 198.51.100.0/24, 'regex:^tracker[0-9]']
""").autos
        dialers = {"direct": dialer.direct, "upstream": dialer.upstream, "": None}
        flow_to_host = FLOW._replace(target=Address(host, 443))
        assert dialer.pinned_dialer(flow_to_host) is dialers[pinned]


class TestVerdicts:
    def test_verdict_expires(self, clock: Clock) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        clock.now += 59.9
        assert verdicts.needs_upstream(TARGET) is True
        clock.now += 0.2
        assert verdicts.needs_upstream(TARGET) is None and not verdicts._verdicts

    def test_verdict_that_is_learnt_again_is_renewed(self, clock: Clock) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        clock.now += 50.0
        verdicts.learn(TARGET, False)
        clock.now += 50.0
        assert verdicts.needs_upstream(TARGET) is False

    def test_oldest_verdict_is_removed_at_the_limit(self) -> None:
        verdicts = Verdicts(60.0, 3)
        for number in (1, 2, 3, 1, 4):
            verdicts.learn(Address(f"{number}.test", 1), True)
        assert [str(target) for target, _, _ in verdicts.items()] == [
            "3.test:1",
            "1.test:1",
            "4.test:1",
        ]

    def test_lower_limit_of_a_reload_takes_effect_with_the_next_verdict(self) -> None:
        verdicts = Verdicts(60.0, 100)
        for number in range(50):
            verdicts.learn(Address(f"{number}.test", 1), True)
        verdicts.configure(60.0, 2)
        verdicts.learn(TARGET, True)
        assert len(list(verdicts.items())) == 2

    def test_verdicts_are_listed_with_the_seconds_left(self, clock: Clock) -> None:
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

    def test_cleared_verdicts_are_forgotten(self) -> None:
        verdicts = Verdicts(60.0, 10)
        verdicts.learn(TARGET, True)
        assert verdicts.clear() == 1 and verdicts.needs_upstream(TARGET) is None
        assert verdicts.clear() == 0

    def test_verdicts_are_shared_by_all_auto_dialers(self) -> None:
        verdicts = Verdicts(60.0, 10)
        first, second = Rig(verdicts=verdicts), Rig(verdicts=verdicts)
        first.trial.failure = Reason.REFUSED
        first.dial()
        assert second.dial() == ("upstream", "upstream")


class TestDatagrams:
    """A lost datagram is not noticed: datagrams follow what connections have learnt."""

    UDP = "udp 192.0.2.9 -> a.test:443 on main"
    TEXT = """
listeners: [{name: main, listen: '127.0.0.1:1080'}]
rules: [{via: auto, upstream: far}]
upstreams: {far: 'SCHEME://192.0.2.1:1'}
"""

    def outcome(
        self, names: StubResolver, verdicts: Verdicts, text: str = "", scheme: str = "socks5h"
    ) -> str:
        """Return the upstream of the flow and the addresses in its route."""
        config = self.TEXT.replace("SCHEME", scheme) + text
        route = routing(config, names, verdicts=verdicts).router.route(flow(self.UDP))
        return " ".join([route.dialer.name, *(address.host for address in route.flow.addresses)])

    def test_datagrams_without_verdict_go_direct(self) -> None:
        names = StubResolver({"a.test": ["203.0.113.1"]})
        assert self.outcome(names, Verdicts(60.0, 10)) == "direct 203.0.113.1"

    def test_datagrams_follow_the_verdict(self) -> None:
        verdicts, names = Verdicts(60.0, 10), StubResolver({"a.test": ["203.0.113.1"]})
        verdicts.learn(Address("a.test", 443), True)
        assert self.outcome(names, verdicts) == "far" and not names.lookups
        assert self.outcome(names, verdicts, scheme="socks5") == "far 203.0.113.1"

    def test_datagrams_to_a_name_not_found_here_go_by_the_upstream(self) -> None:
        names = StubResolver({})
        assert self.outcome(names, Verdicts(60.0, 10)) == "far" and names.lookups == ["a.test"]

    def test_datagrams_to_a_name_pinned_to_direct_need_its_address(self) -> None:
        names = StubResolver({})
        with pytest.raises(DialError) as caught:
            self.outcome(names, Verdicts(60.0, 10), "auto: {direct: a.test}")
        assert caught.value.reason is Reason.NAME and names.lookups == ["a.test"]

    def test_datagrams_to_a_name_pinned_to_the_upstream_need_no_lookup(self) -> None:
        names = StubResolver({})
        assert self.outcome(names, Verdicts(60.0, 10), "auto: {upstream: a.test}") == "far"
        assert not names.lookups

    def test_datagrams_to_a_denied_address_have_no_route(self) -> None:
        with pytest.raises(DialError) as caught:
            names = StubResolver({"a.test": ["10.0.0.1"]})
            self.outcome(names, Verdicts(60.0, 10), "destinations: {deny: private}")
        assert caught.value.reason is Reason.DENIED


class Running:
    """A TCP forward to a target by auto, whose upstream is a SOCKS5 proxy, and its records."""

    def __init__(
        self, names: StubResolver, upstream: Address, target: Address, more: str = ""
    ) -> None:
        config = configuration(f"""
listeners: [{{protocol: tcp, name: main, listen: '127.0.0.1:0', target: 'a.test:1'}}]
rules: [{{via: auto, upstream: 'socks5h://{upstream}'}}]
auto: {{deadline: 300ms}}
{more}""")
        self.verdicts = Verdicts(60.0, 10)
        self.routing: Routing = routing(config, names, make_guard(config), verdicts=self.verdicts)
        self.records, counters = Records(), Counters()
        observer = ObserverGroup(self.records, self.routing.autos)
        self.connector = Outbound(
            self.routing.router, PipeLimits(SECONDS, SECONDS), counters, observer, account_book()
        )
        self.target = target
        self.http = HttpHandler(
            "main", self.connector, Forwarder(self.connector, SECONDS), permission(), counters
        )

    def conversation(self) -> Conversation:
        """Return a client of the TCP forward."""
        return Conversation(TcpForward("main", self.connector, self.target))

    def verdict(self) -> str:
        """Return the only verdict, "" for none."""
        return "".join(verdict for _, verdict, _ in self.verdicts.items())


class Proxy:
    """A SOCKS5 proxy that echoes.  `asked` has the hosts, `sent` what clients sent after that."""

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
    script = Proxy()
    with server(script) as address:
        yield script, address


def expect_echo(running: Running, data: bytes = b"ping") -> None:
    """Connect, send data and expect it back."""
    with running.conversation() as client:
        client.send(data)
        client.expect(data)
        client.socket.shutdown(socket.SHUT_WR)
        client.expect_end()


class TestConnections:
    def test_target_that_answers_is_reached_direct(self, proxy: tuple[Proxy, Address]) -> None:
        def echo(sock: socket.socket) -> None:
            while data := sock.recv(100):
                sock.sendall(data)

        with server(echo) as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            expect_echo(running)
        assert running.verdict() == "direct" and not proxy[0].asked

    def test_target_that_refuses_is_reached_by_the_upstream(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        with refusing() as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            expect_echo(running)
            expect_echo(running, b"pong")
        assert proxy[0].asked == [b"a.test"] * 2 and running.verdict() == "upstream"

    def test_silent_target_is_reached_by_the_upstream_after_the_trial(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        with black_hole() as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            expect_echo(running)
        assert proxy[0].asked == [b"a.test"] and running.verdict() == "upstream"

    @pytest.mark.parametrize(
        "hosts", [{}, {"a.test": None}], ids=["not found", "name server silent"]
    )
    def test_name_that_is_not_found_here_is_reached_by_the_upstream(
        self, proxy: tuple[Proxy, Address], hosts: dict[str, None]
    ) -> None:
        running = Running(StubResolver(hosts), proxy[1], Address("a.test", 443))
        expect_echo(running)
        assert proxy[0].asked == [b"a.test"]

    def test_reset_before_the_first_byte_ends_one_connection_and_moves_the_next(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        """Bytes that were sent are never sent again."""
        received: list[bytes] = []

        def reset_after_reading(sock: socket.socket) -> None:
            received.append(sock.recv(100))
            reset(sock)

        with server(reset_after_reading) as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with running.conversation() as client:
                client.send(b"POST /once")
                client.expect_closed()
            assert running.records.records[0].ended == "reset"
            assert not proxy[0].asked and running.verdict() == "upstream"
            expect_echo(running, b"again")
        assert received == [b"POST /once"] and proxy[0].sent == [b"again"]

    def test_reset_by_the_client_does_not_count_against_direct(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        def swallow(sock: socket.socket) -> None:
            while sock.recv(100):
                pass

        with server(swallow) as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with running.conversation() as client:
                client.send(b"GET /")
                wait_until(lambda: running.records.records or running.verdict())
                reset(client.socket)
                running.records.wait_for(1)
        assert running.records.records[0].ended == "client reset" and running.verdict() == "direct"

    def test_reset_of_a_forwarded_request_moves_the_target_to_the_upstream(
        self, proxy: tuple[Proxy, Address]
    ) -> None:
        def reset_after_reading(sock: socket.socket) -> None:
            sock.recv(1000)
            reset(sock)

        with server(reset_after_reading) as target:
            running = Running(
                StubResolver({"a.test": ["127.0.0.1"]}), proxy[1], Address("a.test", target.port)
            )
            with Conversation(running.http) as client:
                client.send(b"GET http://a.test:%d/ HTTP/1.1\r\nHost: a.test\r\n\r\n" % target.port)
                assert client.read(12) == b"HTTP/1.1 502"
                while client.socket.recv(1000):
                    pass
        assert running.verdict() == "upstream" and not proxy[0].asked

    @pytest.mark.parametrize(
        "target, hosts",
        [
            (Address("10.0.0.1", 443), {}),
            (Address("a.test", 443), {"a.test": ["10.0.0.1", "10.0.0.2"]}),
            (Address("169.254.169.254", 80), {}),
        ],
    )
    def test_denied_target_never_reaches_the_upstream(
        self, proxy: tuple[Proxy, Address], target: Address, hosts: dict[str, Sequence[str]]
    ) -> None:
        running = Running(
            StubResolver(hosts), proxy[1], target, "destinations: {deny: [private, metadata]}"
        )
        with running.conversation() as client:
            client.expect_closed()
        assert not proxy[0].asked and not running.verdict()
        assert [record.ended for record in running.records.records] == [Reason.DENIED.value]


def test_verdicts_are_safe_with_many_threads() -> None:
    verdicts = Verdicts(60.0, 50)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(2000):
                target = Address(f"{(number * seed) % 97}.test", 1)
                verdicts.learn(target, number % 2 == 0)
                verdicts.needs_upstream(target)
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
