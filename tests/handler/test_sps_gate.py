"""TLS and the PROXY header before the protocol of a connection, in a whole daemon."""

from __future__ import annotations

import random
import socket
import ssl
import threading
from contextlib import closing, contextmanager, suppress
from typing import Callable, Iterator

import pytest

from netproxy.interfaces.addresses import Address
from netproxy.protocol import proxy_protocol, socks5
from netproxy.protocol.proxy_protocol import LOCAL, PROXY, SIGNATURE, TCP4, UNSPEC, VERSION
from tests.support.certificates import certificates
from tests.support.handlers import LOCALHOST, SECONDS, eventually
from tests.support.origin import OK, Wire, get
from tests.support.proxy_header import encode_v1
from tests.support.relays import NO_HINT, Running, UdpPort, running

BULK = random.Random(9).randbytes(2_000_000)
CLIENT, SERVER = Address("10.1.2.3", 45678), Address("10.9.9.9", 443)
V1, V2 = encode_v1(CLIENT, SERVER), proxy_protocol.encode_v2(CLIENT, SERVER)
HEADERS = pytest.mark.parametrize("header", (V1, V2), ids=("v1", "v2"))
GREETING, SOCKS4, GET = b"\5\1\0", b"\4\1\0\x50\1\2\3\4\0", b"GET http://a/ HTTP/1.1\r\n\r\n"
IDLE_RELAYS, FEW_THREADS = 50, 6


def listener(more: str = "", tls: bool = True) -> str:
    secure = f", tls: {certificates().listener()}" if tls else ""
    return f"listeners: [{{listen: '{LOCALHOST}:0'{secure}{more}}}]"


def behind(proxies: str = LOCALHOST, more: str = "", tls: bool = False) -> str:
    return listener(f", proxy_protocol: ['{proxies}']{more}", tls)


@contextmanager
def target() -> Iterator[tuple[socket.socket, Address]]:
    with socket.create_server((LOCALHOST, 0)) as listening:
        listening.settimeout(SECONDS)
        yield listening, Address(*listening.getsockname())


def connect(relay: Running) -> socket.socket:
    return socket.create_connection((LOCALHOST, relay.port), SECONDS)


def secured(relay: Running) -> ssl.SSLSocket:
    return certificates().secure(connect(relay))


def read(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (piece := sock.recv(min(65536, count - len(data)))):
        data += piece
    return bytes(data)


def send(sock: socket.socket, data: bytes) -> None:
    """Send on a thread. A failure shows at the reader, which checks the bytes."""
    with suppress(OSError):
        sock.sendall(data)


def by_socks5(client: socket.socket, to: Address, greeted: bool = False) -> None:
    """Open a CONNECT by SOCKS5. `greeted`: the greeting has been sent already."""
    if not greeted:
        client.sendall(GREETING)
    assert read(client, 2) == b"\5\0"
    client.sendall(socks5.encode_request(socks5.CONNECT, to))
    assert read(client, 10)[:2] == b"\5\0"


def by_socks4(client: socket.socket, to: Address) -> None:
    """Open a CONNECT by SOCKS4."""
    client.sendall(b"\4\1" + to.port.to_bytes(2, "big") + socket.inet_aton(to.host) + b"\0")
    assert read(client, 8)[:2] == b"\0\x5a"


def by_http(client: socket.socket, to: Address) -> None:
    """Open a CONNECT by HTTP."""
    client.sendall(b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n" % ((str(to).encode(),) * 2))
    wire = Wire(client)
    assert wire.head().status == 200 and wire.all_taken()


def expect_closed(sock: socket.socket, sent: bytes = b"") -> None:
    """Send `sent` and check that the proxy closes or resets, perhaps after an alert of TLS."""
    if sent:
        # The proxy may have closed before.
        with suppress(OSError):
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        while sock.recv(4096):
            pass


# TLS.


@pytest.mark.parametrize("step", (by_socks5, by_socks4, by_http))
def test_connect_over_tls_carries_bytes_in_both_directions(
    step: Callable[[socket.socket, Address], None],
) -> None:
    """2 MB pass in both directions, and then the end of the target."""
    with running(listener()) as relay, target() as (listening, address), secured(relay) as client:
        step(client, address)
        with listening.accept()[0] as far:
            far.settimeout(SECONDS)
            for source, sink, data in ((client, far, BULK), (far, client, BULK[::-1])):
                sending = threading.Thread(target=source.sendall, args=(data,), name="test-sending")
                sending.start()
                assert read(sink, len(data)) == data
                sending.join(SECONDS)
        assert client.recv(16) == b""
        client.close()
        eventually(lambda: relay.log.records)
        assert [(record.sent, record.received, record.ended) for record in relay.log.records] == [
            (len(BULK), len(BULK), "closed")
        ]


def test_upload_over_tls_continues_after_the_end_of_the_target() -> None:
    with running(listener()) as relay, target() as (listening, address), secured(relay) as client:
        by_socks5(client, address)
        with listening.accept()[0] as far:
            far.settimeout(SECONDS)
            sending = threading.Thread(target=send, args=(client, BULK), name="test-sending")
            sending.start()
            first = read(far, 1000)
            far.sendall(b"early")
            far.shutdown(socket.SHUT_WR)
            rest = read(far, len(BULK) - len(first))
            assert first + rest == BULK
            sending.join(SECONDS)
            assert read(client, 16) == b"early"


def test_close_notify_of_client_reaches_target_and_its_answer_arrives() -> None:
    with running(listener()) as relay, target() as (listening, address), secured(relay) as client:
        by_socks5(client, address)
        with listening.accept()[0] as far:
            far.settimeout(SECONDS)
            client.sendall(b"question")
            client.setblocking(False)
            # The client's close_notify; it does not wait for the proxy's.
            with pytest.raises(ssl.SSLWantReadError):
                client.unwrap()
            socket.socket.shutdown(client, socket.SHUT_WR)
            client.settimeout(SECONDS)
            assert (read(far, 8), far.recv(16)) == (b"question", b"")
            far.sendall(b"answer")
        assert read(client, 6) == b"answer"
        # The proxy has sent close_notify too.
        with pytest.raises(ssl.SSLZeroReturnError):
            client.recv(1)


def test_udp_association_with_control_connection_over_tls() -> None:
    with (
        running(listener()) as relay,
        UdpPort() as port,
        UdpPort() as far,
        secured(relay) as control,
    ):
        control.sendall(GREETING)
        assert read(control, 2) == b"\5\0"
        control.sendall(socks5.encode_request(socks5.UDP_ASSOCIATE, NO_HINT))
        reply = read(control, 10)
        assert reply[:4] == b"\5\0\0\1"
        bound = socks5.parse_target(reply[3:])
        control.sendall(b"ignored")
        port.send(socks5.encode_header(far.address) + b"ping", bound)
        far.send(b"pong", far.expect(b"ping"))
        port.expect(socks5.encode_header(far.address) + b"pong")
        assert relay.state()["associations"] == 1
        control.close()
        eventually(relay.idle)


def test_http_keep_alive_over_tls_is_idle_without_a_thread() -> None:
    with running(listener()) as relay, target() as (listening, address), secured(relay) as client:
        wire, host = Wire(client), str(address).encode()
        wire.send(get(host, b"/1"))
        with closing(listening.accept()[0]) as far:
            origin = Wire(far)
            for path in (b"/1", b"/2", b"/3"):
                assert origin.request().start.split(b" ")[1] == path
                origin.send(OK)
                assert wire.answer().body == b"ok"
                if path == b"/1":
                    # The idle connection holds no thread. Then two requests come at once.
                    eventually(lambda: relay.daemon._runtime.connections.busy == 0)
                    wire.send(get(host, b"/2"), get(host, b"/3"))
        assert relay.count("connections", "accepted") == 1


@pytest.mark.parametrize("sent", (GREETING, SOCKS4, GET), ids=("socks5", "socks4", "http"))
def test_plaintext_client_of_tls_listener_is_closed(sent: bytes) -> None:
    with running(listener()) as relay, connect(relay) as client:
        expect_closed(client, sent)
        eventually(lambda: relay.count("connections", "bad protocol") == 1)


def test_stalled_tls_handshakes_end_at_the_deadline_and_delay_no_client() -> None:
    with (
        running(listener() + "\ntimeouts: {handshake: 700ms}") as relay,
        target() as (listening, address),
    ):
        stalled = [connect(relay) for _ in range(40)]
        for client in stalled[::2]:
            client.sendall(b"\x16\x03\x01\x02")
        with secured(relay) as client:
            by_socks5(client, address)
            listening.accept()[0].close()
            assert client.recv(1) == b""
            assert relay.count("connections", "timed out") == 0, "a handshake ended too early"
        for stalled_client in stalled:
            with stalled_client:
                expect_closed(stalled_client)
        eventually(lambda: relay.count("connections", "timed out") == len(stalled))


def test_idle_relays_over_tls_hold_few_threads() -> None:
    with running(listener()) as relay, target() as (listening, address):
        clients, far = [], []
        for _ in range(IDLE_RELAYS):
            clients.append(secured(relay))
            by_socks5(clients[-1], address)
            far.append(listening.accept()[0])
        eventually(lambda: relay.daemon._runtime.connections.busy == 0, 1.0)
        assert relay.daemon._runtime.connections.threads <= FEW_THREADS
        # Each relay still works.
        for near, other in zip(clients, far, strict=True):
            near.sendall(b"ping")
            assert read(other, 4) == b"ping"
            near.close()
            other.close()


# The PROXY header.


def check_served(
    relay: Running, client: socket.socket, source: Address, greeted: bool = False
) -> None:
    """Check that a CONNECT succeeds, and that its record names `source` as client."""
    with target() as (listening, address):
        by_socks5(client, address, greeted)
        listening.accept()[0].close()
        assert client.recv(1) == b""
        client.close()
    eventually(lambda: relay.log.records)
    assert [(record.flow.client, record.flow.target) for record in relay.log.records] == [
        (source, address)
    ]


@HEADERS
@pytest.mark.parametrize("segments", ("apart", "bytes", "with-the-greeting"))
def test_client_is_the_source_of_the_proxy_header(header: bytes, segments: str) -> None:
    with running(behind()) as relay, connect(relay) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        together = segments == "with-the-greeting"
        for at in range(len(header) - 1) if segments == "bytes" else ():
            client.sendall(header[at : at + 1])
        client.sendall(
            (header[-1:] if segments == "bytes" else header) + (GREETING if together else b"")
        )
        check_served(relay, client, CLIENT, together)


@HEADERS
@pytest.mark.parametrize("together", (False, True), ids=("apart", "with-the-hello"))
def test_proxy_header_comes_before_tls(header: bytes, together: bool) -> None:
    with running(behind(tls=True)) as relay, connect(relay) as plain:
        # Corked, the kernel sends the header and the ClientHello in one segment.
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, together)
        plain.sendall(header)
        with certificates().secure(plain) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            check_served(relay, client, CLIENT)


@pytest.mark.parametrize(
    "header",
    (
        b"PROXY UNKNOWN\r\n",
        SIGNATURE + bytes((VERSION | LOCAL, UNSPEC, 0, 0)),
        SIGNATURE + bytes((VERSION | PROXY, UNSPEC, 0, 0)),
        SIGNATURE + bytes((VERSION | LOCAL, TCP4, 0, 12)) + b"\1" * 12,
    ),
    ids=("unknown", "local", "unspecified", "local-with-more"),
)
def test_header_without_source_keeps_the_peer_as_client(header: bytes) -> None:
    with running(behind()) as relay, connect(relay) as client:
        client.sendall(header)
        check_served(relay, client, Address(*client.getsockname()))


def test_peer_outside_proxy_protocol_needs_no_header() -> None:
    with running(behind("192.0.2.0/24")) as relay, connect(relay) as client:
        check_served(relay, client, Address(*client.getsockname()))


@HEADERS
def test_header_of_peer_outside_proxy_protocol_is_not_believed(header: bytes) -> None:
    with running(behind("192.0.2.0/24")) as relay, connect(relay) as client:
        # HTTP answers the header as a bad request.
        expect_closed(client, header)
        eventually(lambda: relay.daemon.live == 0)
        assert relay.count("connections", "accepted") == 1 and not relay.log.records


@pytest.mark.parametrize("tls", (False, True))
@pytest.mark.parametrize(
    "sent",
    (
        GREETING,
        SOCKS4,
        GET,
        b"POST / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\0\1",
        b"PROXY TCP4 nobody\r\n",
    ),
    ids=("socks5", "socks4", "get", "post", "tls", "no-addresses"),
)
def test_missing_or_malformed_header_is_bad_protocol(sent: bytes, tls: bool) -> None:
    with running(behind(tls=tls)) as relay, connect(relay) as client:
        expect_closed(client, sent)
        eventually(lambda: relay.count("connections", "bad protocol") == 1)
        assert not relay.log.records


def test_header_cut_short_by_the_client_is_closed_early() -> None:
    with running(behind()) as relay, connect(relay) as client:
        expect_closed(client, V2[:-1])
        eventually(lambda: relay.count("connections", "closed early") == 1)


def test_truncated_header_ends_at_the_handshake_deadline() -> None:
    with running(behind() + "\ntimeouts: {handshake: 200ms}") as relay, connect(relay) as client:
        client.sendall(V1[:-1])
        expect_closed(client)
        eventually(lambda: relay.count("connections", "timed out") == 1)


def test_clients_setting_applies_to_the_source_of_the_header() -> None:
    with running(behind(more=", clients: [10.1.2.0/24]")) as relay, connect(relay) as client:
        client.sendall(V2)
        check_served(relay, client, CLIENT)


@pytest.mark.parametrize(
    "header", (V1, V2, b"PROXY UNKNOWN\r\n"), ids=("v1", "v2", "the-proxy-itself")
)
def test_client_of_the_header_that_is_not_allowed_is_refused(header: bytes) -> None:
    with (
        running(behind(more=", clients: [10.1.3.0/24, 192.0.2.7]")) as relay,
        connect(relay) as client,
    ):
        client.sendall(header + GREETING)
        expect_closed(client)
        eventually(lambda: relay.count("connections_refused", "client not allowed") == 1)
        assert not relay.log.records
