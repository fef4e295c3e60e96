"""The smart proxy service: who is served by the first byte, who is closed without a word, and by when."""

from __future__ import annotations

import re
import socket
import threading
import time
from typing import Any

import pytest

from netproxy.errors import EndOfStream
from netproxy.handler.sps import ClientProtocol, SpsHandler
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch
from netproxy.net.stream import Stream
from netproxy.observe.metrics import Counters
from tests.support.handlers import (
    LOCALHOST,
    SECONDS,
    Conversation,
    RecordingLog,
    descriptors,
    eventually,
    silent,
)
from tests.support.relays import Running, running

SPOKEN = (ClientProtocol.SOCKS4, ClientProtocol.SOCKS5, ClientProtocol.HTTP)
HANDSHAKE = (
    "listeners: [{listen: '127.0.0.1:0', limits: {connections: %d}}]\ntimeouts: {handshake: %s}"
)
GREETING = b"\5\1\0"
BEGINNINGS = [
    b"",
    b"\5",
    b"\5\1\0",
    b"\5\1\0\5\1\0\3\x0bexam",
    b"\4\1\0\x50",
    b"\4\1\0\x50\x7f\0\0\1user",
    b"G",
    b"GET / HTTP/1.1\r\n",
    b"CONNECT example.com:443 HTTP/1.1\r\nHost:",
]


class Answers:
    """A handler that says who it is, without reading."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.batches: list[tuple[Any, Any]] = []

    def handle(self, stream: Stream, client: Address) -> None:
        stream.write(self.name + stream.read_exactly(1))

    def handle_packets(self, batch: Batch, local: Any) -> None:
        self.batches.append((batch, local))


class Sps:
    def __init__(self) -> None:
        self.counters, self.log = Counters(), RecordingLog()
        self.packets = Answers(b"udp")
        self.handler = SpsHandler(
            {speech: Answers(speech.value.encode()) for speech in SPOKEN},
            self.packets,
            self.counters,
            self.log,
        )


@pytest.mark.parametrize(
    "first, name",
    [
        (b"\4", b"socks4"),
        (b"\5", b"socks5"),
        (b"G", b"http"),
        (b"C", b"http"),
        (b"A", b"http"),
        (b"Z", b"http"),
        (b"p", b"http"),
    ],
)
def test_the_first_byte_decides_and_is_left_to_the_handler(first: bytes, name: bytes) -> None:
    with Conversation(Sps().handler) as client:
        client.send(first)
        client.expect(name + first)
        client.expect_end()


def test_hazard_19_every_other_first_byte_is_closed_without_a_word_and_counted() -> None:
    sps = Sps()
    others = [
        byte
        for byte in range(256)
        if byte not in (4, 5, 0x16, 0x9E) and not bytes((byte,)).isalpha()
    ]
    for byte in others:
        with Conversation(sps.handler) as client:
            client.send(bytes((byte,)))
            client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks unknown") == len(others)
    assert len(sps.log.lines) == 1


def test_agent_of_a_tunnel_is_closed_without_a_word_where_there_is_no_bridge() -> None:
    sps = Sps()
    with Conversation(sps.handler) as client:
        client.send(b"\x9eNPT\1\0")
        client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks tunnel") == 1


def test_hazard_20_tls_is_closed_without_a_word_and_logged_once_for_each_source() -> None:
    sps = Sps()
    for source in ("127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.2", "127.0.0.1"):
        with Conversation(sps.handler, source) as client:
            client.send(b"\x16\3\1\2\0\1\0\1\xfc\3\3")
            client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks tls") == 5
    assert len(sps.log.lines) == 2
    assert all("tls" in line for line in sps.log.lines)
    assert {re.search(r"127\.0\.0\.\d", line)[0] for line in sps.log.lines} == {
        "127.0.0.1",
        "127.0.0.2",
    }  # type: ignore[index]


def test_a_protocol_that_is_not_served_here_is_refused_as_well() -> None:
    """As a socks5 listener does with HTTP."""
    counters = Counters()
    with Conversation(
        SpsHandler({ClientProtocol.SOCKS5: Answers(b"5")}, None, counters, RecordingLog())
    ) as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        client.expect_closed()
    assert counters.value("connections_refused", "speaks http") == 1


def test_who_says_nothing_and_leaves_is_nobody() -> None:
    sps = Sps()
    with Conversation(sps.handler) as client:
        client.close()
        client.wait()
        assert isinstance(client.raised, EndOfStream)
    assert not sps.counters.items() and not sps.log.lines


def test_datagrams_are_the_packet_handlers() -> None:
    sps = Sps()
    batch, local = Batch(None, []), object()
    sps.handler.handle_packets(batch, local)  # type: ignore[arg-type]
    assert sps.packets.batches == [(batch, local)]


# -- through a listener: hazards 1 and 2


def ask(relay: Running, target: Address) -> None:
    """A good client, from greeting to data."""
    with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
        client.sendall(
            GREETING + b"\5\1\0\1\x7f\0\0\1" + target.port.to_bytes(2, "big") + b"question"
        )
        with client.makefile("rb") as stream:
            assert stream.read(6) == b"\5\0\5\0\0\1"
            stream.read(6)
            assert stream.read(6) == b"answer"


def answer(listening: socket.socket) -> None:
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            assert connection.recv(8) == b"question"
            connection.sendall(b"answer")
            connection.recv(1)


def test_hazard_02_handshakes_that_never_finish_end_at_the_deadline_and_hold_nobody_up() -> None:
    limit, seconds = 100, 0.5
    with (
        socket.create_server((LOCALHOST, 0), backlog=64) as listening,
        running(HANDSHAKE % (limit, "500ms")) as relay,
    ):
        server = threading.Thread(target=answer, args=(listening,), daemon=True)
        server.start()
        threads, started = threading.active_count(), time.monotonic()
        before = descriptors()
        lazy = [socket.create_connection((LOCALHOST, relay.port), SECONDS) for _ in range(9 * 10)]
        for at, sock in enumerate(lazy):
            sock.sendall(BEGINNINGS[at % len(BEGINNINGS)])
        served = 0
        while time.monotonic() - started < seconds * 0.8:
            ask(relay, Address(*listening.getsockname()))
            served += 1
        assert threading.active_count() <= threads + limit
        for sock in lazy:
            while sock.recv(4096):
                pass
            sock.close()
        assert seconds * 0.9 < time.monotonic() - started < seconds + 4
        assert served
        ask(relay, Address(*listening.getsockname()))
        eventually(lambda: relay.daemon.live == 0 and descriptors() == before)
        listening.shutdown(socket.SHUT_RDWR)
        server.join(SECONDS)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\5\1\0\5\1\0\3\xff" + b"a" * 200,
        b"\4\1\0\x50\x7f\0\0\1" + b"u" * 200,
        b"GET http://127.0.0.1/ HTTP/1.1\r\n" + b"X: y\r\n" * 40,
    ],
    ids=["socks5", "socks4", "http"],
)
def test_hazard_01_the_deadline_is_for_the_whole_handshake_and_not_for_each_byte(
    request_bytes: bytes,
) -> None:
    with (
        running(HANDSHAKE % (10, "300ms")) as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as client,
    ):
        started, sent = time.monotonic(), 0
        while not ended(client):
            try:
                client.sendall(request_bytes[sent : sent + 1])
            except OSError:
                break
            sent += 1
            time.sleep(0.03)  # the client's pace: what the test is about
        assert sent < len(request_bytes)
        assert 0.2 < time.monotonic() - started < 2


def ended(client: socket.socket) -> bool:
    """Reads what has come; whether the other side has closed."""
    while not silent(client):
        try:
            if not client.recv(4096):
                return True
        except ConnectionResetError:
            return True
    return False


@pytest.mark.parametrize(
    "protocol, sent, answered",
    [
        ("sps", b"\4\1\0\1\x7f\0\0\1\0", b"\0\x5b\0\0\0\0\0\0"),
        ("socks5", b"\4\1\0\1\x7f\0\0\1\0", b"\0\x5b\0\0\0\0\0\0"),
        ("sps", GREETING, b"\5\0"),
        ("socks5", GREETING, b"\5\0"),
        ("sps", b"G\r\n\r\n", b"HTTP/1.1 400"),
        ("http", b"G\r\n\r\n", b"HTTP/1.1 400"),
        ("socks5", b"GET / HTTP/1.1\r\n\r\n", b""),
        ("sps", b"\x16\3\1", b""),
    ],
)
def test_each_listener_serves_the_protocols_it_is_for(
    protocol: str, sent: bytes, answered: bytes
) -> None:
    with running(
        "listeners: [{protocol: %s, listen: '127.0.0.1:0'}]\ndefault: block" % protocol
    ) as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(sent)
            got = b""
            try:
                while len(got) < (len(answered) or 1) and (piece := client.recv(4096)):
                    got += piece
            except ConnectionResetError:
                pass
            assert got[: len(answered) or 1] == answered
