"""TLS with clients: the handshake, what it refuses, half-close, bytes in both directions."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import ssl
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator

import pytest

from netproxy.errors import DeadlineError, NetProxyError, ProtocolError, StreamError
from netproxy.net import tls
from netproxy.net.stream import Stream, complete
from tests.support.certificates import PASS_PHRASE, Certificates, certificates
from tests.support.handlers import SECONDS, tcp_pair
from tests.support.sockets import Task

BULK = random.Random(7).randbytes(2_000_000)
TIMES = 30
"""How often BULK is sent where two threads have to meet."""


@pytest.fixture
def pem() -> Certificates:
    return certificates()


@contextmanager
def pair(
    seconds: float | None = SECONDS, unread: bytes = b""
) -> Iterator[tuple[socket.socket, Stream]]:
    """Yield a client's plain socket, and the stream that serves it."""
    near, far = tcp_pair()
    stream = Stream(far, unread, seconds)
    near.settimeout(SECONDS)
    try:
        yield near, stream
    finally:
        stream.close()
        near.close()


def server(pem: Certificates, client_ca: str = "") -> ssl.SSLContext:
    return tls.server_context(
        pem.path("server.pem"), pem.path("server.key"), client_ca and pem.path(client_ca)
    )


@contextmanager
def secured(
    pem: Certificates, context: ssl.SSLContext | None = None, client_ca: str = ""
) -> Iterator[tuple[ssl.SSLSocket, Stream]]:
    """Yield both ends after the handshake.  The client raises an error for a cut stream."""
    context = context or pem.client_context()
    with pair() as (near, stream):
        serving = Task(lambda: tls.accept(stream, server(pem, client_ca)))
        with context.wrap_socket(
            near, server_hostname="localhost", suppress_ragged_eofs=False
        ) as client:
            serving.result(4 * SECONDS)
            stream.limit(SECONDS)
            yield client, stream


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


# -- the handshake


@pytest.mark.parametrize(
    "version, name", ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3"))
)
def test_handshake_leads_to_bytes_in_both_directions(
    pem: Certificates, version: ssl.TLSVersion, name: str
) -> None:
    context = pem.client_context()
    context.maximum_version = version
    with secured(pem, context) as (client, stream):
        assert client.version() == name
        assert not stream.plain
        client.sendall(b"ping")
        assert complete(stream.read_exactly(4)) == b"ping"
        stream.write(b"pong")
        assert client.recv(16) == b"pong"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_1_is_refused(pem: Certificates) -> None:
    context = pem.client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pair() as (near, stream):
        serving = Task(lambda: tls.accept(stream, server(pem)))
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(near, server_hostname="localhost").close()
        with pytest.raises(ProtocolError):
            serving.result(4 * SECONDS)


@pytest.mark.parametrize("sent", (b"", b"\x16\x03\x01"), ids=("nothing", "half-a-hello"))
def test_handshake_with_a_silent_client_meets_the_deadline(pem: Certificates, sent: bytes) -> None:
    with pair(seconds=0.1) as (near, stream):
        near.sendall(sent)
        with pytest.raises(DeadlineError):
            tls.accept(stream, server(pem))


@pytest.mark.parametrize(
    "sent", (b"\5\1\0", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64), ids=("socks5", "http", "zeros")
)
def test_plaintext_instead_of_tls_is_a_protocol_error(pem: Certificates, sent: bytes) -> None:
    with pair() as (near, stream):
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError):
            tls.accept(stream, server(pem))


@pytest.mark.parametrize("sent", (b"", b"\x16\x03\x01"), ids=("at-once", "within-the-hello"))
def test_client_that_leaves_in_the_handshake_raises_our_error(
    pem: Certificates, sent: bytes
) -> None:
    with pair() as (near, stream):
        near.sendall(sent)
        near.close()
        with pytest.raises(NetProxyError):
            tls.accept(stream, server(pem))


def test_bytes_read_ahead_are_the_first_of_the_handshake(pem: Certificates) -> None:
    """Hazard 120: a listener may look at them, but they are never taken as data."""
    with pair(unread=b"\5\1\0" + bytes(8)) as (_, stream):
        with pytest.raises(ProtocolError, match="TLS: "):
            tls.accept(stream, server(pem))
    with pair() as (near, stream):
        client = pem.client_context()
        connecting = Task(lambda: client.wrap_socket(near, server_hostname="localhost"))
        complete(stream.peek())
        assert stream.unread()
        tls.accept(stream, server(pem))
        with connecting.result() as secure:
            assert stream.unread() == b""
            secure.sendall(b"ping")
            assert complete(stream.read_exactly(4)) == b"ping"


def test_handshake_on_a_closed_stream_raises_stream_error(pem: Certificates) -> None:
    with pair() as (_, stream):
        stream.close()
        with pytest.raises(StreamError):
            tls.accept(stream, server(pem))


# -- clients' certificates


def test_client_with_a_certificate_of_the_ca_is_accepted(pem: Certificates) -> None:
    with secured(pem, pem.client_context("client"), client_ca="ca.pem") as (client, stream):
        client.sendall(b"ping")
        assert complete(stream.read_exactly(4)) == b"ping"


@pytest.mark.parametrize("version", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
@pytest.mark.parametrize("shown", ("", "stranger"))
def test_client_without_a_certificate_of_the_ca_is_refused(
    pem: Certificates, shown: str, version: ssl.TLSVersion
) -> None:
    context = pem.client_context(shown)
    context.maximum_version = version
    with pair() as (near, stream):
        serving = Task(lambda: tls.accept(stream, server(pem, "ca.pem")))
        # In TLS 1.3 the client learns it when it reads.
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            with context.wrap_socket(
                near, server_hostname="localhost", suppress_ragged_eofs=False
            ) as client:
                client.recv(1)
        with pytest.raises(ProtocolError):
            serving.result(4 * SECONDS)


# -- files that cannot be used


@pytest.mark.parametrize(
    "certificate, key, client_ca, named",
    (
        ("missing.pem", "server.key", "", "missing.pem"),
        ("server.pem", "missing.key", "", "missing.key"),
        ("broken.pem", "server.key", "", "broken.pem"),
        ("server.pem", "broken.key", "", "broken.key"),
        ("server.pem", "client.key", "", "client.key"),
        ("server.pem", "encrypted.key", "", "encrypted.key"),
        ("server.pem", "", "", "server.pem"),
        ("server.pem", "server.key", "missing.pem", "missing.pem"),
        ("server.pem", "server.key", "broken.pem", "broken.pem"),
    ),
)
def test_error_names_a_file_of_the_server_that_cannot_be_used(
    pem: Certificates, certificate: str, key: str, client_ca: str, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        tls.server_context(
            pem.path(certificate), key and pem.path(key), client_ca and pem.path(client_ca)
        )
    text = str(caught.value)
    assert text.count(named) == 1 and "\n" not in text
    assert "PRIVATE" not in text and PASS_PHRASE not in text and "not what it should be" not in text
    hint = "(without a key file it must contain the private key as well)"
    assert text.endswith(hint) == (not key)


def test_fifo_in_place_of_a_file_is_not_waited_for(pem: Certificates, tmp_path: Path) -> None:
    """OpenSSL would open it and wait until another process writes into it."""
    fifo, certificate, key = str(tmp_path / "fifo"), pem.path("server.pem"), pem.path("server.key")
    os.mkfifo(fifo)
    for files in ((fifo, key), (certificate, fifo), (certificate, key, fifo)):
        with pytest.raises(ValueError, match=f"cannot use {fifo}: .*it is not a regular file"):
            tls.server_context(*files)
    with pytest.raises(ValueError, match=f"cannot use {fifo}: .*it is not a regular file"):
        tls.client_context(fifo)


# -- the ends of a stream


def test_stream_is_read_after_its_own_end(pem: Certificates) -> None:
    with secured(pem) as (client, stream):
        stream.write(b"last")
        stream.shutdown_write()
        assert read_all(client) == b"last"
        client.sendall(b"late")
        assert complete(stream.read_exactly(4)) == b"late"


def test_bytes_that_came_before_our_end_are_read_after_it(pem: Certificates) -> None:
    with secured(pem) as (client, stream):
        client.sendall(b"early")
        # The bytes are there, unread.
        stream.wait(select.POLLIN)
        stream.shutdown_write()
        assert read_all(client) == b""
        client.sendall(b" and late")
        assert complete(stream.read_exactly(14)) == b"early and late"


def test_stream_is_written_after_the_clients_end(pem: Certificates) -> None:
    with secured(pem) as (client, stream):
        client.sendall(b"last")
        with pytest.raises(ssl.SSLError):
            client.setblocking(False)
            # Sends its alert.  Ours has not come, and the call does not wait for it.
            client.unwrap()
        client.settimeout(SECONDS)
        assert (complete(stream.read_exactly(4)), complete(stream.read_some(16))) == (b"last", b"")
        stream.write(b"late")
        assert client.recv(16) == b"late"


def test_stream_is_written_after_the_clients_end_in_tcp_alone(pem: Certificates) -> None:
    with secured(pem) as (client, stream):
        client.sendall(b"last")
        socket.socket.shutdown(client, socket.SHUT_WR)
        assert (complete(stream.read_exactly(4)), complete(stream.read_some(16))) == (b"last", b"")
        stream.write(b"late")
        assert client.recv(16) == b"late"


def test_write_to_a_client_that_does_not_read_meets_the_deadline(pem: Certificates) -> None:
    with secured(pem) as (_, stream):
        stream.limit(0.1)
        with pytest.raises(DeadlineError):
            stream.write(BULK * 8)


def test_two_megabytes_arrive_in_each_direction(pem: Certificates) -> None:
    with secured(pem) as (client, stream):
        sending = Task(lambda: client.sendall(BULK))
        assert complete(stream.read_exactly(len(BULK))) == BULK
        sending.result(4 * SECONDS)
        reading = Task(lambda: read_all(client))
        stream.write(BULK[::-1])
        stream.shutdown_write()
        assert reading.result(4 * SECONDS) == BULK[::-1]


@pytest.mark.parametrize("version", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
def test_one_thread_reads_while_another_writes(pem: Certificates, version: ssl.TLSVersion) -> None:
    """As when an upload goes on beside its response.  OpenSSL alone does not allow it."""
    context = pem.client_context()
    context.maximum_version = version
    with secured(pem, context) as (client, stream):
        client.setblocking(False)
        stream.limit(8 * SECONDS)
        there = Task(lambda: exchange(client, BULK * TIMES))
        writing = Task(
            lambda: [stream.write(BULK) for _ in range(TIMES)] and stream.shutdown_write()
        )
        reading = Task(lambda: digest(iter(lambda: complete(stream.read_some(65536)), b"")))
        whole = digest([BULK] * TIMES)
        assert there.result(4 * SECONDS) == whole
        assert reading.result(4 * SECONDS) == whole
        writing.result(4 * SECONDS)


def exchange(sock: ssl.SSLSocket, data: bytes) -> str:
    """Send `data` and the end while reading to the end; return the hash of what was read."""
    seen, left, ended = hashlib.sha256(), memoryview(data), False
    poll = select.poll()
    while left or not ended:
        poll.register(sock, select.POLLIN * (not ended) | select.POLLOUT * bool(left))
        assert poll.poll(SECONDS * 1000), "stuck"
        try:
            while left:
                left = left[sock.send(left[:65536]) :]
                if not left:
                    socket.socket.shutdown(sock, socket.SHUT_WR)
        except ssl.SSLWantWriteError:
            pass
        try:
            while not ended:
                piece = sock.recv(65536)
                seen.update(piece)
                ended = not piece
        except ssl.SSLWantReadError:
            pass
    return seen.hexdigest()


def digest(pieces: Iterable[bytes]) -> str:
    seen = hashlib.sha256()
    for piece in pieces:
        seen.update(piece)
    return seen.hexdigest()
