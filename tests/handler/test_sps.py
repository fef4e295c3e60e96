"""The smart proxy service: the first byte chooses the protocol; unfinished handshakes end."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from netproxy.errors import EndOfStream
from netproxy.handler.sps import ClientProtocol, SpsHandler
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.connections import Handshake, Stream
from netproxy.interfaces.datagrams import Batch
from netproxy.interfaces.services import Refusal
from netproxy.observe.metrics import Counters
from tests.support.handlers import LOCALHOST, SECONDS, Conversation, descriptors, eventually, silent
from tests.support.relays import Running, running

SERVED = (ClientProtocol.SOCKS4, ClientProtocol.SOCKS5, ClientProtocol.HTTP)
HANDSHAKE = (
    "listeners: [{listen: '127.0.0.1:0', limits: {connections: %d}}]\ntimeouts: {handshake: %s}"
)
GREETING = b"\5\1\0"
UNFINISHED = [
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


class NamedHandler:
    """A handler that answers its name and the first byte."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.batches: list[tuple[Any, Any]] = []

    def handle(self, stream: Stream, client: Address) -> Handshake:
        stream.reply(self.name + (yield from stream.read_exactly(1)))
        return None

    def handle_packets(self, batch: Batch, local: Any) -> None:
        self.batches.append((batch, local))


class Sps:
    """An SpsHandler over handlers that tell their names."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self.counters = Counters(lambda refusal, amount: self.refusals.append(refusal))
        self.packets = NamedHandler(b"udp")
        self.handler = SpsHandler(
            {protocol: NamedHandler(protocol.value.encode()) for protocol in SERVED},
            self.packets,
            self.counters,
            "main",
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
        (b"\r", b"http"),
    ],
)
def test_first_byte_chooses_the_handler_and_stays_unread(first: bytes, name: bytes) -> None:
    with Conversation(Sps().handler) as client:
        client.send(first)
        client.expect(name + first)
        client.expect_end()


def test_unknown_first_byte_is_closed_without_an_answer_and_counted() -> None:
    """Hazard 19."""
    sps = Sps()
    others = [
        byte
        for byte in range(256)
        if byte not in (4, 5, 0x0D, 0x16, 0x9E) and not bytes((byte,)).isalpha()
    ]
    for byte in others:
        with Conversation(sps.handler) as client:
            client.send(bytes((byte,)))
            client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks unknown") == len(others)
    assert len(sps.refusals) == len(others)


def test_tunnel_agent_is_closed_without_an_answer_if_there_is_no_bridge() -> None:
    sps = Sps()
    with Conversation(sps.handler) as client:
        client.send(b"\x9eNPT\1\0")
        client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks tunnel") == 1


def test_tls_is_closed_without_an_answer_and_recorded_with_its_source() -> None:
    """Hazard 20."""
    sps = Sps()
    sources = ("127.0.0.1", "127.0.0.2")
    for source in sources:
        with Conversation(sps.handler, source) as client:
            client.send(b"\x16\3\1\2\0\1\0\1\xfc\3\3")
            client.expect_closed()
    assert sps.counters.value("connections_refused", "speaks tls") == 2
    decided = "the port serves http, socks4, socks5"
    assert sps.refusals == [
        Refusal("connections_refused", "speaks tls", "main", source, "", decided)
        for source in sources
    ]


@pytest.mark.parametrize("port", ["sps", "http"])
def test_empty_line_before_the_first_request_is_skipped(port: str) -> None:
    """Hazard 141: RFC 9112 section 2.2.  Port 25 is refused, so that no target is needed."""
    with running(f"listeners: [{{listen: '127.0.0.1:0', protocol: {port}}}]") as relay:
        for empty_lines, status in ((0, b"403"), (1, b"403"), (2, b"400")):
            with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
                client.sendall(b"\r\n" * empty_lines + b"CONNECT a.test:25 HTTP/1.1\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 " + status


def test_protocol_without_a_handler_is_closed_and_counted() -> None:
    """A socks5 listener refuses HTTP so."""
    counters = Counters()
    handlers = {ClientProtocol.SOCKS5: NamedHandler(b"5")}
    with Conversation(SpsHandler(handlers, None, counters, "main")) as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        client.expect_closed()
    assert counters.value("connections_refused", "speaks http") == 1


def test_client_that_closes_without_a_byte_is_not_counted() -> None:
    sps = Sps()
    with Conversation(sps.handler) as client:
        client.close()
        client.wait()
        assert isinstance(client.raised, EndOfStream)
    assert not sps.counters.items() and not sps.refusals


def test_datagrams_go_to_the_packet_handler() -> None:
    sps = Sps()
    batch, local = Batch(None, []), object()
    sps.handler.handle_packets(batch, local)  # type: ignore[arg-type]
    assert sps.packets.batches == [(batch, local)]


# -- through a listener


def ask(relay: Running, target: Address) -> None:
    """Exchange data with a target, as a client does whose handshake is complete."""
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


def test_unfinished_handshakes_end_at_the_deadline_and_delay_no_other_client() -> None:
    """Hazard 2."""
    with (
        socket.create_server((LOCALHOST, 0), backlog=64) as listening,
        running(HANDSHAKE % (100, "500ms")) as relay,
    ):
        server = threading.Thread(target=answer, args=(listening,), daemon=True)
        server.start()
        before = descriptors()
        unfinished = [
            socket.create_connection((LOCALHOST, relay.port), SECONDS) for _ in range(9 * 10)
        ]
        for at, sock in enumerate(unfinished):
            sock.sendall(UNFINISHED[at % len(UNFINISHED)])
        ask(relay, Address(*listening.getsockname()))
        assert relay.daemon.pools["connection"].threads == 0
        for sock in unfinished:
            while sock.recv(4096):
                pass
            sock.close()
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
def test_deadline_is_for_the_whole_handshake_and_not_for_each_byte(request_bytes: bytes) -> None:
    """Hazard 1."""
    with (
        running(HANDSHAKE % (10, "300ms")) as relay,
        socket.create_connection((LOCALHOST, relay.port), SECONDS) as client,
    ):
        sent = 0
        while not has_closed(client):
            try:
                client.sendall(request_bytes[sent : sent + 1])
            except OSError:
                break
            sent += 1
            time.sleep(0.03)  # no single byte comes late
        assert sent < len(request_bytes)


def has_closed(client: socket.socket) -> bool:
    """Read what has come; return whether the other end has closed."""
    while not silent(client):
        try:
            if not client.recv(4096):
                return True
        except ConnectionResetError:
            return True
    return False


@pytest.mark.parametrize(
    "protocol, sent, reply",
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
def test_listener_serves_only_its_protocols(protocol: str, sent: bytes, reply: bytes) -> None:
    with running(
        "listeners: [{protocol: %s, listen: '127.0.0.1:0'}]\ndefault: block" % protocol
    ) as relay:
        with socket.create_connection((LOCALHOST, relay.port), SECONDS) as client:
            client.sendall(sent)
            got = b""
            try:
                while len(got) < (len(reply) or 1) and (piece := client.recv(4096)):
                    got += piece
            except ConnectionResetError:
                pass
            assert got[: len(reply) or 1] == reply
