"""Handshakes without a thread: by a whole daemon, the same bytes, records and counters as on a thread of the pool."""

from __future__ import annotations

import base64
import errno
import os
import socket
import time
from contextlib import ExitStack
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from netproxy.errors import NeedsThread
from netproxy.handler.sps import SpsHandler
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import Flow
from netproxy.listener import poller as parker_module
from netproxy.listener import tcp as tcp_module
from netproxy.net import syscalls
from tests.support.handlers import LOCALHOST, SECONDS, HandlerDependencies
from tests.support.pools import Gate
from tests.support.relays import SPS, Running, running
from tests.support.sockets import (
    address_of,
    black_hole,
    listen,
    nothing_comes,
    read_exactly,
    read_to_end,
    refusing,
    reset,
    server,
    wait_until,
)

HELLO, ANONYMOUS = b"\5\1\0", b"\5\0"
CONNECTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
PASSWORDS = (
    "listeners: [{listen: '127.0.0.1:0', auth: required}]\nusers: {alice: {password: secret}}"
)
OPTIONAL = (
    "listeners: [{listen: '127.0.0.1:0', auth: optional}]\nusers: {alice: {password: secret}}"
)
BLOCK = SPS + "\ndefault: block"
BASIC = b"Proxy-Authorization: Basic " + base64.b64encode(b"alice:secret") + b"\r\n"


def packed(address: Address) -> bytes:
    return b"\1" + bytes(map(int, address.host.split("."))) + address.port.to_bytes(2, "big")


def connect(address: Address, command: int = 1) -> bytes:
    return bytes((5, command, 0)) + packed(address)


def named(name: bytes, port: int = 80) -> bytes:
    return b"\5\1\0\3" + bytes((len(name),)) + name + port.to_bytes(2, "big")


def http(address: object, fields: bytes = b"") -> bytes:
    return b"CONNECT %b HTTP/1.1\r\nHost: x\r\n" % str(address).encode() + fields + b"\r\n"


class Exchange(NamedTuple):
    """What a client says, as far as a target is known; then it stops sending."""

    says: Callable[[Address], bytes]
    threads: int = 0  # of the pool that it takes by attempt
    text: str = SPS


EXCHANGES = {
    "socks5": Exchange(lambda target: HELLO + connect(target)),
    "socks5, data behind": Exchange(lambda target: HELLO + connect(target) + b"early" * 3000),
    "socks5, many methods": Exchange(lambda target: b"\5\3\1\2\0" + connect(target) + b"x"),
    "socks5, a mapped address": Exchange(
        lambda target: HELLO + b"\5\1\0\4" + bytes(10) + b"\xff\xff" + packed(target)[1:] + b"x"
    ),
    "socks5, an address as a name": Exchange(
        lambda target: HELLO + named(b"127.0.0.1", target.port) + b"x"
    ),
    "http": Exchange(lambda target: http(target)),
    "http, data behind": Exchange(lambda target: http(target) + b"early" * 3000),
    "http, an empty line before": Exchange(lambda target: b"\r\n" + http(target) + b"x", 1),
    "socks5, no method": Exchange(lambda target: b"\5\0" + connect(target), 1),
    "socks5, no method that fits": Exchange(lambda target: b"\5\1\2" + connect(target), 1),
    "socks5, another version": Exchange(lambda target: HELLO + b"\4" + connect(target)[1:], 1),
    "socks5, a command that is none": Exchange(lambda target: HELLO + connect(target, 9), 1),
    "socks5, ASSOCIATE": Exchange(
        lambda target: HELLO + connect(target, 3),
        1,
        "listeners: [{listen: '127.0.0.1:0', network: [tcp]}]",
    ),
    "socks5, an address of no type": Exchange(lambda target: HELLO + b"\5\1\0\x09" + bytes(6), 1),
    "socks5, no name": Exchange(lambda target: HELLO + named(b"a b"), 1),
    "socks5, port 0": Exchange(lambda target: HELLO + connect(Address(LOCALHOST, 0)), 1),
    "socks5, not allowed": Exchange(lambda target: HELLO + connect(target), 1, BLOCK),
    "socks5, not allowed, data behind": Exchange(
        lambda target: HELLO + connect(target) + b"x" * 50000, 1, BLOCK
    ),
    "socks5, a network that is none": Exchange(
        lambda target: HELLO + connect(Address("255.255.255.255", 80)), 1
    ),
    "socks5, the proxy itself": Exchange(lambda target: HELLO + connect(Address("0.0.0.0", 1)), 1),
    "socks5, half a greeting": Exchange(lambda target: b"\5\2\0", 1),
    "socks5, a greeting alone": Exchange(lambda target: HELLO, 1),
    "socks5, half a request": Exchange(lambda target: HELLO + connect(target)[:-1], 1),
    "socks5, a password": Exchange(
        lambda target: b"\5\1\2\1\5alice\6secret" + connect(target) + b"x", 1, PASSWORDS
    ),
    "socks5, a wrong password": Exchange(
        lambda target: b"\5\1\2\1\5alice\6wrong!" + connect(target), 1, PASSWORDS
    ),
    "socks5, no password": Exchange(lambda target: HELLO + connect(target), 1, PASSWORDS),
    "socks5, an optional password": Exchange(
        lambda target: HELLO + connect(target) + b"x", 1, OPTIONAL
    ),
    "socks4": Exchange(
        lambda target: b"\4\1" + packed(target)[5:] + packed(target)[1:5] + b"me\0x", 1
    ),
    "http, not allowed": Exchange(lambda target: http(target), 1, BLOCK),
    "http, port 25": Exchange(lambda target: http(Address(LOCALHOST, 25)), 1),
    "http, no target": Exchange(lambda target: http("a.test"), 1),
    "http, a head that is none": Exchange(lambda target: b"CONNECT a:1 HTTP/1.1\nHost: x\n\n", 1),
    "http, two hosts": Exchange(lambda target: http(target, b"Host: y\r\n"), 1),
    "http, 101 fields": Exchange(lambda target: http(target, b"a: b\r\n" * 101), 1),
    "http, a line of 9 KB": Exchange(lambda target: b"CONNECT " + b"a" * 9000, 1),
    "http, half a head": Exchange(lambda target: http(target)[:-2], 1),
    "http, a password": Exchange(lambda target: http(target, BASIC) + b"x", 1, PASSWORDS),
    "http, no password": Exchange(lambda target: http(target), 1, PASSWORDS),
    "http, an optional password": Exchange(lambda target: http(target) + b"x", 1, OPTIONAL),
    "http, another method": Exchange(lambda target: b"PUT x HTTP/1.0\r\n\r\n", 1),
    "tls": Exchange(lambda target: b"\x16\3\1", 1),
    "nothing that is known": Exchange(lambda target: b"\0\1\2", 1),
    "nothing": Exchange(lambda target: b"", 1),
}


class Outcome(NamedTuple):
    answer: bytes  # to its end; the port that the target sees is left out
    received: list[bytes]  # by the target
    records: list[tuple]
    counters: list[tuple[str, str, int]]


class Target:
    """Gives back, at the end, what it was sent."""

    def __init__(self) -> None:
        self.received: list[bytes] = []

    def __call__(self, sock: socket.socket) -> None:
        data = read_to_end(sock)
        self.received.append(data)
        sock.sendall(b"got " + data)


def by_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SpsHandler, "attempt")


def tell(sock: socket.socket, pieces: list[bytes]) -> bytes:
    """The answer, to its end."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for piece in pieces:
            sock.sendall(piece)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # refused before it had said all
    pieces = []
    try:
        while piece := sock.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass  # closed without an answer, which nobody has to get to read
    return b"".join(pieces)


def outcome(relay: Running, answer: bytes, target: Target) -> Outcome:
    wait_until(lambda: not relay.daemon.live)
    if answer[:4] == ANONYMOUS + b"\5\0" or answer[:6] == b"\5\2\1\0\5\0":
        at = answer.index(b"\5\0", 2) + 8
        answer = answer[:at] + b"??" + answer[at + 2 :]
    elif answer[:2] == b"\0\x5a":
        answer = answer[:2] + b"??" + answer[4:]
    records = [
        (
            one.flow.network,
            one.flow.target.host,
            one.flow.user,
            one.flow.addresses != (),
            one.upstream,
            one.sent,
            one.received,
            one.ended,
        )
        for one in relay.log.records
    ]
    return Outcome(answer, target.received, records, sorted(relay.daemon.counters.items()))


def play(exchange: Exchange, cut: Callable[[bytes], list[bytes]]) -> tuple[Outcome, int]:
    """What came of it, and the threads that it took."""
    with ExitStack() as stack:
        target = Target()
        address = stack.enter_context(server(target))
        relay = stack.enter_context(running(exchange.text))
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            answer = tell(sock, cut(exchange.says(address)))
        return outcome(relay, answer, target), relay.daemon.pools["connection"]._number


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_comes_to_the_same_either_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = EXCHANGES[name]
    whole, threads = play(exchange, lambda data: [data])
    assert threads == exchange.threads
    dripped, _ = play(
        exchange,
        lambda data: [data[at : at + 1] for at in range(min(len(data), 200))] + [data[200:]],
    )
    by_handle(monkeypatch)
    handled, threads = play(exchange, lambda data: [data])
    assert threads == 1
    assert whole == handled and dripped == handled


def test_a_refused_connection_is_told_and_counted_once_either_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = []
    for way in ("attempt", "handle"):
        if way == "handle":
            by_handle(monkeypatch)
        for ask in (HELLO + connect(Address(LOCALHOST, 1)), http(Address(LOCALHOST, 1))):
            with (
                refusing() as address,
                running() as relay,
                socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
            ):
                ask = ask.replace(b"127.0.0.1:1 ", b"%b " % str(address).encode()).replace(
                    packed(Address(LOCALHOST, 1)), packed(address)
                )
                outcomes.append(outcome(relay, tell(sock, [ask]), Target()))
    assert outcomes[:2] == outcomes[2:]
    assert outcomes[0].answer == ANONYMOUS + b"\5\5\0\1" + bytes(6)
    for one in outcomes:
        assert [record[-1] for record in one.records] == ["connection refused"]
        assert ("dial_failures", "connection refused", 1) in one.counters and (
            "connections",
            "accepted",
            1,
        ) in one.counters


@pytest.mark.parametrize("way", ["attempt", "handle"])
def test_without_a_descriptor_for_the_target_the_client_is_told(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "handle":
        by_handle(monkeypatch)

    def none_left(family: int) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with (
        listen() as listening,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        monkeypatch.setattr(syscalls, "open_tcp", none_left)
        assert tell(
            sock, [HELLO + connect(address_of(listening))]
        ) == ANONYMOUS + b"\5\1\0\1" + bytes(6)
        wait_until(lambda: not relay.daemon.live)
        assert [record.ended for record in relay.log.records] == ["failed"] and relay.count(
            "dial_failures", "failed"
        ) == 1


@pytest.mark.parametrize(
    "ask",
    [
        named(b"sp.v2.udp-over-tcp.arpa"),
        connect(Address(LOCALHOST, 9), 2),
        connect(Address(LOCALHOST, 9), 3),
    ],
    ids=["UoT", "BIND", "ASSOCIATE"],
)
def test_what_may_wait_is_a_threads(ask: bytes) -> None:
    """And is served by it."""
    with running() as relay, socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        sock.sendall(HELLO + ask)
        assert read_exactly(sock, 4) == ANONYMOUS + b"\5\0"
        assert relay.daemon.pools["connection"]._number == 1


def test_a_name_that_is_known_needs_no_thread() -> None:
    target = Target()
    with server(target) as address, running(SPS + "\ndns: {hosts: {a.test: 127.0.0.1}}") as relay:
        for _ in range(2):
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                assert tell(sock, [HELLO + named(b"a.test", address.port) + b"hello"]).endswith(
                    b"got hello"
                )
    assert target.received == [b"hello"] * 2 and relay.daemon.pools["connection"]._number <= 1


# -- a dial under way


class Slow:
    """A target that answers no attempt to connect, until it is open or gone; the kernel tries again after a second."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._listening = self._stack.enter_context(listen(backlog=0))
        self.address = address_of(self._listening)
        for _ in range(2):
            sock = self._stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(self.address)

    def open(self) -> socket.socket:
        """Gives the first connection whose client has said anything."""
        while True:
            sock, _ = self._listening.accept()
            self._stack.enter_context(sock)
            sock.settimeout(SECONDS)
            if not nothing_comes(sock, 0.2):
                return sock

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.close()


def dialling(relay: Running, address: Address, data: bytes = b"") -> socket.socket:
    """A client whose target is being dialled, without a thread."""
    sock = socket.create_connection((LOCALHOST, relay.port), SECONDS)
    sock.sendall(HELLO + connect(address) + data)
    assert read_exactly(sock, 2) == ANONYMOUS
    poller = relay.daemon._runtime.poller
    wait_until(
        lambda: any(len(parked.descriptors) == 2 for parked in list(poller._parked.values()))
    )
    assert relay.daemon.pools["connection"]._number == 0
    return sock


def test_nothing_is_said_before_the_dial_is_done_and_then_all_is(slow: Slow) -> None:
    """Hazard 15."""
    with running() as relay, dialling(relay, slow.address, b"early") as sock:
        assert nothing_comes(sock)
        upstream = slow.open()
        assert read_exactly(sock, 10) == b"\5\0\0" + packed(Address(*upstream.getpeername()))
        assert read_exactly(upstream, 5) == b"early"
        upstream.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
        assert relay.daemon.pools["connection"]._number == 0
        sock.close()
        wait_until(lambda: not relay.daemon.live or upstream.recv(1) == b"")


def test_one_that_fails_after_a_while_is_told(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address) as sock:
        slow.close()
        assert read_to_end(sock) == b"\5\5\0\1" + bytes(6)
        wait_until(lambda: not relay.daemon.live)
        assert [(record.upstream, record.ended) for record in relay.log.records] == [
            ("direct", "connection refused")
        ]
        assert relay.count("dial_failures", "connection refused") == 1


@pytest.mark.parametrize(
    "ask, answer",
    [
        (lambda address: HELLO + connect(address), ANONYMOUS + b"\5\6\0\1" + bytes(6)),
        (http, b"HTTP/1.1 504 Gateway Timeout\r\n"),
    ],
    ids=["socks5", "http"],
)
def test_one_whose_time_is_up_is_told_whatever_its_client_says_meanwhile(
    ask: Callable[[Address], bytes], answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    with black_hole() as address, running(SPS + "\ntimeouts: {connect: 300ms}") as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            started = time.monotonic()
            sock.sendall(ask(address))
            for _ in range(20):
                sock.sendall(b"x")
                time.sleep(0.01)
            assert read_to_end(sock)[: len(answer)] == answer
            assert 0.3 <= time.monotonic() - started < 2.0
        wait_until(lambda: not relay.daemon.live)
        assert [(record.upstream, record.ended) for record in relay.log.records] == [
            ("direct", "timed out")
        ]
        assert relay.count("dial_failures", "timed out") == 1


def test_a_client_that_resets_meanwhile_ends_it_at_once() -> None:
    with black_hole() as address, running() as relay:
        before = len(os.listdir("/proc/self/fd"))
        reset(dialling(relay, address))
        wait_until(lambda: not relay.daemon.live, 2.0)
        assert len(os.listdir("/proc/self/fd")) == before
        assert [(record.upstream, record.sent, record.ended) for record in relay.log.records] == [
            ("direct", 0, "client left")
        ]
        assert relay.daemon.pools["connection"]._number == 0 and not relay.count(
            "dial_failures", "timed out"
        )


def test_a_client_that_only_stops_sending_meanwhile_still_gets_its_answer(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address, b"all I say") as sock:
        sock.shutdown(socket.SHUT_WR)
        upstream = slow.open()
        assert read_to_end(upstream) == b"all I say"
        upstream.sendall(b"answer")
        upstream.shutdown(socket.SHUT_WR)
        assert read_to_end(sock)[10:] == b"answer"
    assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
        (9, 6, "closed")
    ]


def test_a_stop_meanwhile_ends_it_at_once_and_leaves_nothing_open() -> None:
    relay = Running(SPS)
    with black_hole() as address, dialling(relay, address) as sock:
        started = time.monotonic()
        relay.daemon.stop()
        assert time.monotonic() - started < 1.5
        assert read_to_end(sock) == b"" and not relay.daemon.live
        assert [record.ended for record in relay.log.records] == ["client left"]


def test_a_reload_meanwhile_changes_nothing_for_it(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address, b"x") as sock:
        relay.reload(BLOCK)
        upstream = slow.open()
        assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"


def test_an_event_of_the_last_owner_of_its_descriptor_does_not_end_it(slow: Slow) -> None:
    with running() as relay, dialling(relay, slow.address) as sock:
        poller = relay.daemon._runtime.poller
        [parked] = {id(one): one for one in poller._parked.values()}.values()
        number = parked.pause.watched[0][0].fileno()
        before, seconds = parked.pause, parked.pause.seconds
        again: Any = before.step(number, 4)  # on the test's thread: the parker's has nothing to do
        assert [(one, events) for one, events in again.watched] == list(
            before.watched
        ) and again.seconds < seconds
        sock.sendall(b"x")
        upstream = slow.open()
        assert read_exactly(sock, 10)[1] == 0 and read_exactly(upstream, 1) == b"x"
    assert [record.ended for record in relay.log.records] != ["timed out"]


# -- a handshake under way


def test_a_reload_between_greeting_and_request_changes_nothing_for_it() -> None:
    target = Target()
    with (
        server(target) as address,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(HELLO)
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.reload(BLOCK)
        assert tell(sock, [connect(address) + b"x"])[10:] == b"got x"


def test_a_drain_lets_it_go_on() -> None:
    target = Target()
    with (
        server(target) as address,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(HELLO)
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.daemon.stop_accepting()
        assert tell(sock, [connect(address) + b"x"])[10:] == b"got x"


def test_a_stop_ends_it() -> None:
    relay = Running(SPS)
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        sock.sendall(HELLO + b"\5\1")
        assert read_exactly(sock, 2) == ANONYMOUS
        relay.daemon.stop()
        assert read_to_end(sock) == b"" and not relay.daemon.live and not relay.log.records


@pytest.mark.parametrize(
    "said, answer",
    [
        (b"", b""),
        (b"\5", b""),
        (HELLO + b"\5\1", ANONYMOUS),
        (b"CONNECT a:1 HTTP/1.1\r\n", b"HTTP/1.1 408 Request Timeout\r\n"),
    ],
    ids=["silent", "half a greeting", "half a request", "half a head"],
)
def test_the_handshakes_time_is_up(
    said: bytes, answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parker_module, "TICK", 0.02)
    with (
        running(SPS + "\ntimeouts: {handshake: 200ms}") as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        sock.sendall(said)
        found = read_to_end(sock)
        assert found[: len(answer)] == answer and bool(found) == bool(answer)
        wait_until(lambda: not relay.daemon.live)
        assert (
            not relay.log.records
            and relay.daemon._runtime.serving.counter.value("connections", "accepted") == 1
        )


def test_uot_is_no_target_where_it_is_served() -> None:
    dependencies = HandlerDependencies()
    dependencies.outbound._datagrams = object()  # type: ignore[assignment]
    flow = Flow("tcp", Address(LOCALHOST, 1), Address("sp.v2.udp-over-tcp.arpa", 0), "test", "")
    with pytest.raises(NeedsThread):
        dependencies.outbound.attempt(None, flow, lambda passage: None, lambda error: None)  # type: ignore[arg-type]
    assert dependencies.untouched()


# -- with no thread to be had


def test_a_pool_that_is_busy_keeps_no_connection_to_an_address_waiting() -> None:
    gate, target = Gate(), Target()
    with (
        server(target) as address,
        running("listeners: [{listen: '127.0.0.1:0', limits: {connections: 100}}]") as relay,
    ):
        pool = relay.daemon.pools["connection"]
        try:
            for _ in range(pool.limit):
                assert pool.submit(gate)
            for ask in (HELLO + connect(address), http(address)) * 3:
                with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                    assert tell(sock, [ask + b"hello"]).endswith(b"got hello")
            assert pool.busy == pool.limit
        finally:
            gate.let_go()
    assert target.received == [b"hello"] * 6
    assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
        (5, 9, "closed")
    ] * 6


def test_a_thousand_silent_clients_take_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_module, "GREETERS_LIMIT", 1000)
    target = Target()
    with (
        server(target) as address,
        running("listeners: [{listen: '127.0.0.1:0', limits: {connections: 2000}}]") as relay,
        ExitStack() as stack,
    ):
        for _ in range(1000):
            stack.enter_context(socket.create_connection((LOCALHOST, relay.port), SECONDS))
        wait_until(lambda: len(relay.daemon._runtime.poller) == 1000)
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            assert tell(sock, [HELLO + connect(address) + b"hello"]).endswith(b"got hello")
        assert (
            relay.daemon.pools["connection"]._number <= 1
        )  # for the oldest, which makes room, to be told apart
