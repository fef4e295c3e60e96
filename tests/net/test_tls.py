"""TLS on a stream: the handshake, what it refuses, half-close, and bytes both ways."""

from __future__ import annotations

import hashlib
import random
import select
import socket
import ssl
import threading
from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator

import pytest

from netproxy.errors import DeadlineError, NetProxyError, ProtocolError, StreamError
from netproxy.net import tls
from netproxy.net.stream import Stream
from tests.support.certificates import PASS_PHRASE, Certificates, certificates
from tests.support.handlers import SECONDS, tcp_pair

BULK = random.Random(7).randbytes(2_000_000)
TIMES = 30  # of it, where it takes many to meet


@pytest.fixture
def made() -> Certificates:
    return certificates()


class Doing(threading.Thread):
    """Something on another thread; result() is what it gave, or raises what it raised."""

    def __init__(self, what: Callable[[], Any]) -> None:
        super().__init__(name="test-tls", daemon=True)
        self._what = what
        self._value: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._what()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(4 * SECONDS)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error
        return self._value


@contextmanager
def pair(
    seconds: float | None = SECONDS, unread: bytes = b""
) -> Iterator[tuple[socket.socket, Stream]]:
    """A client's plain socket, and the stream that serves it."""
    near, far = tcp_pair()
    stream = Stream(far, unread, seconds)
    near.settimeout(SECONDS)
    try:
        yield near, stream
    finally:
        stream.close()
        near.close()


def server(made: Certificates, client_ca: str = "") -> ssl.SSLContext:
    return tls.server_context(
        made.path("server.pem"), made.path("server.key"), client_ca and made.path(client_ca)
    )


@contextmanager
def secured(
    made: Certificates, context: ssl.SSLContext | None = None, client_ca: str = ""
) -> Iterator[tuple[ssl.SSLSocket, Stream]]:
    """Both ends behind the handshake; the client does not take a cut stream for a whole one."""
    context = context or made.client_context()
    with pair() as (near, stream):
        serving = Doing(lambda: tls.accept(stream, server(made, client_ca)))
        with context.wrap_socket(
            near, server_hostname="localhost", suppress_ragged_eofs=False
        ) as client:
            serving.result()
            stream.limit(SECONDS)
            yield client, stream


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


# -- the handshake


@pytest.mark.parametrize(
    "version, name", ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3"))
)
def test_handshake(made: Certificates, version: ssl.TLSVersion, name: str) -> None:
    context = made.client_context()
    context.maximum_version = version
    with secured(made, context) as (client, stream):
        assert client.version() == name
        assert not stream.plain
        client.sendall(b"ping")
        assert stream.read_exactly(4) == b"ping"
        stream.write(b"pong")
        assert client.recv(16) == b"pong"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_1_is_refused(made: Certificates) -> None:
    context = made.client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pair() as (near, stream):
        serving = Doing(lambda: tls.accept(stream, server(made)))
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(near, server_hostname="localhost").close()
        with pytest.raises(ProtocolError):
            serving.result()


@pytest.mark.parametrize("sent", (b"", b"\x16\x03\x01"), ids=("nothing", "half-a-hello"))
def test_silent_peer_meets_the_deadline(made: Certificates, sent: bytes) -> None:
    with pair(seconds=0.1) as (near, stream):
        near.sendall(sent)
        with pytest.raises(DeadlineError):
            tls.accept(stream, server(made))


@pytest.mark.parametrize(
    "sent", (b"\5\1\0", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64), ids=("socks5", "http", "zeros")
)
def test_plaintext_is_a_protocol_error(made: Certificates, sent: bytes) -> None:
    with pair() as (near, stream):
        near.sendall(sent)
        near.shutdown(socket.SHUT_WR)
        with pytest.raises(ProtocolError):
            tls.accept(stream, server(made))


@pytest.mark.parametrize("sent", (b"", b"\x16\x03\x01"), ids=("at-once", "within-the-hello"))
def test_peer_that_leaves_is_no_fault_of_ours(made: Certificates, sent: bytes) -> None:
    with pair() as (near, stream):
        near.sendall(sent)
        near.close()
        with pytest.raises(NetProxyError):
            tls.accept(stream, server(made))


def test_bytes_before_tls_are_refused(made: Certificates) -> None:
    with pair(unread=b"\5\1\0") as (_, stream):
        with pytest.raises(ProtocolError, match="before TLS"):
            tls.accept(stream, server(made))


def test_stream_that_is_closed_already(made: Certificates) -> None:
    with pair() as (_, stream):
        stream.close()
        with pytest.raises(StreamError):
            tls.accept(stream, server(made))


# -- clients' certificates


def test_client_of_the_ca_is_accepted(made: Certificates) -> None:
    with secured(made, made.client_context("client"), client_ca="ca.pem") as (client, stream):
        client.sendall(b"ping")
        assert stream.read_exactly(4) == b"ping"


@pytest.mark.parametrize("version", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
@pytest.mark.parametrize("shown", ("", "stranger"))
def test_client_of_no_or_another_ca_is_refused(
    made: Certificates, shown: str, version: ssl.TLSVersion
) -> None:
    context = made.client_context(shown)
    context.maximum_version = version
    with pair() as (near, stream):
        serving = Doing(lambda: tls.accept(stream, server(made, "ca.pem")))
        with pytest.raises(
            (ssl.SSLError, ConnectionResetError)
        ):  # in TLS 1.3 the client learns it when it reads
            with context.wrap_socket(
                near, server_hostname="localhost", suppress_ragged_eofs=False
            ) as client:
                client.recv(1)
        with pytest.raises(ProtocolError):
            serving.result()


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
def test_file_that_cannot_be_used_is_named(
    made: Certificates, certificate: str, key: str, client_ca: str, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        tls.server_context(
            made.path(certificate), key and made.path(key), client_ca and made.path(client_ca)
        )
    said = str(caught.value)
    assert named in said and "\n" not in said
    assert "PRIVATE" not in said and PASS_PHRASE not in said and "not what it should be" not in said


# -- the ends of a stream


def test_reading_goes_on_after_our_end(made: Certificates) -> None:
    with secured(made) as (client, stream):
        stream.write(b"last")
        stream.shutdown_write()
        assert read_all(client) == b"last"
        client.sendall(b"late")
        assert stream.read_exactly(4) == b"late"


def test_what_had_come_before_our_end_is_read_after_it(made: Certificates) -> None:
    with secured(made) as (client, stream):
        client.sendall(b"early")
        stream.wait(select.POLLIN)  # it is there, unread
        stream.shutdown_write()
        assert read_all(client) == b""
        client.sendall(b" and late")
        assert stream.read_exactly(14) == b"early and late"


def test_writing_goes_on_after_the_peers_end(made: Certificates) -> None:
    with secured(made) as (client, stream):
        client.sendall(b"last")
        with pytest.raises(ssl.SSLError):
            client.setblocking(False)
            client.unwrap()  # sends its end; ours has not come, and it does not wait for it
        client.settimeout(SECONDS)
        assert (stream.read_exactly(4), stream.read_some(16)) == (b"last", b"")
        stream.write(b"late")
        assert client.recv(16) == b"late"


def test_writing_goes_on_after_an_end_in_tcp_alone(made: Certificates) -> None:
    with secured(made) as (client, stream):
        client.sendall(b"last")
        socket.socket.shutdown(client, socket.SHUT_WR)
        assert (stream.read_exactly(4), stream.read_some(16)) == (b"last", b"")
        stream.write(b"late")
        assert client.recv(16) == b"late"


def test_peer_that_does_not_read_meets_the_deadline(made: Certificates) -> None:
    with secured(made) as (_, stream):
        stream.limit(0.1)
        with pytest.raises(DeadlineError):
            stream.write(BULK * 8)


def test_two_megabytes_both_ways(made: Certificates) -> None:
    with secured(made) as (client, stream):
        sending = Doing(lambda: client.sendall(BULK))
        assert stream.read_exactly(len(BULK)) == BULK
        sending.result()
        reading = Doing(lambda: read_all(client))
        stream.write(BULK[::-1])
        stream.shutdown_write()
        assert reading.result() == BULK[::-1]


@pytest.mark.parametrize("version", (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3))
def test_one_thread_reads_while_another_writes(made: Certificates, version: ssl.TLSVersion) -> None:
    """As an upload goes on beside its answer: OpenSSL allows that to no two threads by itself."""
    context = made.client_context()
    context.maximum_version = version
    with secured(made, context) as (client, stream):
        client.setblocking(False)
        stream.limit(8 * SECONDS)
        there = Doing(lambda: exchange(client, BULK * TIMES))
        writing = Doing(
            lambda: [stream.write(BULK) for _ in range(TIMES)] and stream.shutdown_write()
        )
        reading = Doing(lambda: digest(iter(lambda: stream.read_some(65536), b"")))
        whole = digest([BULK] * TIMES)
        assert there.result() == whole
        assert reading.result() == whole
        writing.result()


def exchange(sock: ssl.SSLSocket, data: bytes) -> str:
    """Sends `data` and its end, and reads all at the same time, on one thread; the hash of what came."""
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
