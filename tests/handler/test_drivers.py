"""Handshakes in a whole daemon: every driver comes to the same bytes, records and counters.

The poller's thread drives a handshake as its bytes come, all at once or byte by byte.
complete() drives it on one pool thread from beginning to end.
"""

from __future__ import annotations

import re
import base64
import errno
import os
import socket
from contextlib import ExitStack
from functools import partial
from typing import Any, Callable, NamedTuple

import pytest

from netproxy.handler.outbound import Outbound
from netproxy.handler.sps import SpsHandler
from netproxy.handler.datagrams.stream_udp import UotStream
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Blocking, Handshake, Stream
from netproxy.interfaces.flows import Flow
from netproxy.net import syscalls
from netproxy.net.stream import complete
from tests.support.accounts import account_book
from tests.support.exchanges import (
    ANONYMOUS,
    GREETING,
    EchoTarget,
    converse,
    http_connect,
    pack_address,
    socks5_request,
    socks5_request_by_name,
)
from tests.support.handlers import LOCALHOST, PIPE_LIMITS, SECONDS, HandlerDependencies
from tests.support.relays import SPS, Running, running
from tests.support.sockets import address_of, listen, read_exactly, refusing, server, wait_until

PASSWORDS = (
    "listeners: [{listen: '127.0.0.1:0', auth: required}]\nusers: {alice: {password: secret}}"
)
OPTIONAL = (
    "listeners: [{listen: '127.0.0.1:0', auth: optional}]\nusers: {alice: {password: secret}}"
)
BLOCK = SPS + "\ndefault: block"
BASIC = b"Proxy-Authorization: Basic " + base64.b64encode(b"alice:secret") + b"\r\n"
NO_ADDRESS = b"\0\1" + bytes(6)
"""The rest of a reply of SOCKS5 behind its code, in a refusal."""


class Exchange(NamedTuple):
    """What a client sends for a target, before it ends its stream."""

    request: Callable[[Address], bytes]
    threads: int = 0
    """Pool threads that the exchange takes when the poller's thread drives it."""
    text: str = SPS
    """The configuration of the daemon."""


EXCHANGES = {
    "socks5": Exchange(lambda target: GREETING + socks5_request(target)),
    "socks5, data behind the request": Exchange(
        lambda target: GREETING + socks5_request(target) + b"early" * 3000
    ),
    "socks5, several methods": Exchange(
        lambda target: b"\5\3\1\2\0" + socks5_request(target) + b"x"
    ),
    "socks5, a mapped address": Exchange(
        lambda target: (
            GREETING + b"\5\1\0\4" + bytes(10) + b"\xff\xff" + pack_address(target)[1:] + b"x"
        )
    ),
    "socks5, an address as a name": Exchange(
        lambda target: GREETING + socks5_request_by_name(b"127.0.0.1", target.port) + b"x"
    ),
    "http": Exchange(lambda target: http_connect(target)),
    "http, data behind the request": Exchange(
        lambda target: http_connect(target) + b"early" * 3000
    ),
    "http, an empty line before": Exchange(lambda target: b"\r\n" + http_connect(target) + b"x"),
    "socks5, no method": Exchange(lambda target: b"\5\0" + socks5_request(target)),
    "socks5, no acceptable method": Exchange(lambda target: b"\5\1\2" + socks5_request(target)),
    "socks5, another version": Exchange(
        lambda target: GREETING + b"\4" + socks5_request(target)[1:]
    ),
    "socks5, an unknown command": Exchange(lambda target: GREETING + socks5_request(target, 9)),
    "socks5, ASSOCIATE": Exchange(
        lambda target: GREETING + socks5_request(target, 3),
        0,
        "listeners: [{listen: '127.0.0.1:0', network: [tcp]}]",
    ),
    "socks5, an unknown type of address": Exchange(
        lambda target: GREETING + b"\5\1\0\x09" + bytes(6)
    ),
    "socks5, an invalid name": Exchange(lambda target: GREETING + socks5_request_by_name(b"a b")),
    "socks5, port 0": Exchange(lambda target: GREETING + socks5_request(Address(LOCALHOST, 0)), 1),
    "socks5, blocked by a rule": Exchange(
        lambda target: GREETING + socks5_request(target), 1, BLOCK
    ),
    "socks5, blocked by a rule, data behind the request": Exchange(
        lambda target: GREETING + socks5_request(target) + b"x" * 50000, 1, BLOCK
    ),
    "socks5, an unreachable target": Exchange(
        lambda target: GREETING + socks5_request(Address("255.255.255.255", 80))
    ),
    "socks5, an unspecified target": Exchange(
        lambda target: GREETING + socks5_request(Address("0.0.0.0", 1))
    ),
    "socks5, truncated greeting": Exchange(lambda target: b"\5\2\0"),
    "socks5, greeting without request": Exchange(lambda target: GREETING),
    "socks5, truncated request": Exchange(lambda target: GREETING + socks5_request(target)[:-1]),
    "socks5, a password": Exchange(
        lambda target: b"\5\1\2\1\5alice\6secret" + socks5_request(target) + b"x", 1, PASSWORDS
    ),
    "socks5, a wrong password": Exchange(
        lambda target: b"\5\1\2\1\5alice\6wrong!" + socks5_request(target), 1, PASSWORDS
    ),
    "socks5, no password": Exchange(lambda target: GREETING + socks5_request(target), 0, PASSWORDS),
    "socks5, an optional password": Exchange(
        lambda target: GREETING + socks5_request(target) + b"x", 0, OPTIONAL
    ),
    "socks4": Exchange(
        lambda target: b"\4\1" + pack_address(target)[5:] + pack_address(target)[1:5] + b"me\0x"
    ),
    "http, blocked by a rule": Exchange(lambda target: http_connect(target), 1, BLOCK),
    "http, port 25": Exchange(lambda target: http_connect(Address(LOCALHOST, 25))),
    "http, a target without port": Exchange(lambda target: http_connect("a.test")),
    "http, a malformed head": Exchange(lambda target: b"CONNECT a:1 HTTP/1.1\nHost: x\n\n"),
    "http, two hosts": Exchange(lambda target: http_connect(target, b"Host: y\r\n")),
    "http, 101 fields": Exchange(lambda target: http_connect(target, b"a: b\r\n" * 101)),
    "http, a line of 9 KB": Exchange(lambda target: b"CONNECT " + b"a" * 9000),
    "http, truncated head": Exchange(lambda target: http_connect(target)[:-2]),
    "http, a password": Exchange(lambda target: http_connect(target, BASIC) + b"x", 1, PASSWORDS),
    "http, no password": Exchange(lambda target: http_connect(target), 0, PASSWORDS),
    "http, an optional password": Exchange(lambda target: http_connect(target) + b"x", 0, OPTIONAL),
    "http, another method": Exchange(lambda target: b"PUT x HTTP/1.0\r\n\r\n"),
    "tls": Exchange(lambda target: b"\x16\3\1"),
    "an unknown protocol": Exchange(lambda target: b"\0\1\2"),
    "nothing": Exchange(lambda target: b""),
}


class Outcome(NamedTuple):
    """What an exchange came to."""

    answer: bytes
    """All that the client got, without the port that the target sees, and the ids of records."""
    received: list[bytes]
    """What each connection to the target carried."""
    records: list[tuple[Any, ...]]
    counters: list[tuple[str, str, int]]


def drive_by_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let complete() drive every handshake, on a pool thread."""
    handle = SpsHandler.handle

    def handle_blocking(self: SpsHandler, stream: Stream, client: Address) -> Handshake:
        wait = yield Blocking(partial(complete, handle(self, stream, client)))
        return wait

    monkeypatch.setattr(SpsHandler, "handle", handle_blocking)


DRIVERS = pytest.mark.parametrize("driver", ["the poller", "complete()"])


def threads(relay: Running) -> int:
    """Return the number of threads that the pool has started."""
    return relay.daemon.pools["connection"].threads


def outcome(relay: Running, answer: bytes, target: EchoTarget) -> Outcome:
    """Return what came of one exchange, once its connection has ended."""
    wait_until(lambda: not relay.daemon.live)
    if answer[:4] == ANONYMOUS + b"\5\0" or answer[:6] == b"\5\2\1\0\5\0":
        at = answer.index(b"\5\0", 2) + 8
        answer = answer[:at] + b"??" + answer[at + 2 :]
    elif answer[:2] == b"\0\x5a":
        answer = answer[:2] + b"??" + answer[4:]
    records = [
        (
            record.flow.network,
            record.flow.target.host,
            record.flow.user,
            record.flow.addresses != (),
            record.upstream,
            record.sent,
            record.received,
            record.ended,
        )
        for record in relay.log.records
    ]
    answer = re.sub(rb"(Netproxy-Id: |\(id )[0-9a-z]{6}", rb"\g<1>??????", answer)
    return Outcome(answer, target.received, records, sorted(relay.daemon.counters.items()))


def play(exchange: Exchange, cut: Callable[[bytes], list[bytes]]) -> tuple[Outcome, int]:
    """Return what came of the exchange, and the pool threads that it took."""
    with ExitStack() as stack:
        target = EchoTarget()
        address = stack.enter_context(server(target))
        relay = stack.enter_context(running(exchange.text))
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
            answer = converse(sock, *cut(exchange.request(address)))
        return outcome(relay, answer, target), threads(relay)


def all_at_once(data: bytes) -> list[bytes]:
    """Return the data as one segment."""
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    """Return the first 200 bytes, which hold every request, one by one."""
    return [data[at : at + 1] for at in range(min(len(data), 200))] + [data[200:]]


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchange_comes_to_the_same_with_every_driver(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = EXCHANGES[name]
    by_poller, threads_of_poller = play(exchange, all_at_once)
    by_bytes, _ = play(exchange, byte_by_byte)
    drive_by_complete(monkeypatch)
    by_complete, threads_of_complete = play(exchange, all_at_once)
    assert by_poller == by_complete and by_bytes == by_complete
    assert (threads_of_poller, threads_of_complete) == (exchange.threads, 1)


@DRIVERS
@pytest.mark.parametrize("protocol", ["socks5", "http"])
def test_refused_dial_is_answered_counted_and_recorded_once(
    driver: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver == "complete()":
        drive_by_complete(monkeypatch)
    with (
        refusing() as address,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        if protocol == "socks5":
            answer = converse(sock, GREETING + socks5_request(address))
            assert answer == ANONYMOUS + b"\5\5" + NO_ADDRESS
        else:
            answer = converse(sock, http_connect(address))
            assert answer.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        result = outcome(relay, answer, EchoTarget())
    assert [record[-1] for record in result.records] == ["connection refused"]
    assert ("dial_failures", "connection refused", 1) in result.counters
    assert ("connections", "accepted", 1) in result.counters


@DRIVERS
def test_dial_without_descriptors_is_answered_and_counted(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if driver == "complete()":
        drive_by_complete(monkeypatch)

    def fail(family: int) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with (
        listen() as listening,
        running() as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock,
    ):
        monkeypatch.setattr(syscalls, "open_tcp", fail)
        answer = converse(sock, GREETING + socks5_request(address_of(listening)))
        assert answer == ANONYMOUS + b"\5\1" + NO_ADDRESS
        wait_until(lambda: not relay.daemon.live)
        assert [record.ended for record in relay.log.records] == [os.strerror(errno.EMFILE)]
        assert relay.count("dial_failures", "failed") == 1


@pytest.mark.parametrize(
    "request_bytes, pool_threads",
    [
        (socks5_request_by_name(b"sp.v2.udp-over-tcp.arpa"), 1),
        (socks5_request(Address(LOCALHOST, 9), 3), 1),
        (socks5_request(Address(LOCALHOST, 9), 2), 0),
    ],
    ids=["UoT", "ASSOCIATE", "BIND"],
)
def test_request_without_target_takes_the_threads_that_it_needs(
    request_bytes: bytes, pool_threads: int
) -> None:
    """A BIND that waits for its peer needs no thread."""
    with running() as relay, socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
        sock.sendall(GREETING + request_bytes)
        assert read_exactly(sock, 4) == ANONYMOUS + b"\5\0"
        assert threads(relay) == pool_threads


def test_known_name_needs_no_thread() -> None:
    target = EchoTarget()
    with server(target) as address, running(SPS + "\ndns: {hosts: {a.test: 127.0.0.1}}") as relay:
        request = GREETING + socks5_request_by_name(b"a.test", address.port)
        for _ in range(2):
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as sock:
                assert converse(sock, request + b"hello").endswith(b"got hello")
        assert target.received == [b"hello"] * 2 and threads(relay) <= 1


class PermittingRelay:
    """A StreamUdpRelay that permits every flow."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []

    def permit(self, flow: Flow) -> None:
        self.flows.append(flow)


def test_uot_target_is_served_as_datagrams_without_a_dial() -> None:
    dependencies = HandlerDependencies()
    relay: Any = PermittingRelay()
    outbound = Outbound(
        dependencies.router,
        PIPE_LIMITS,
        dependencies.counters,
        dependencies.log,
        account_book(),
        relay,
    )
    flow = Flow("tcp", Address(LOCALHOST, 1), Address("sp.v2.udp-over-tcp.arpa", 0), "test", "")
    no_client: Any = None
    assert isinstance(complete(outbound.tunnel(flow, no_client)), UotStream)
    assert relay.flows == [flow] and dependencies.untouched()
