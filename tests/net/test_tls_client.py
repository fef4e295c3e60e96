"""TLS with a server: certificates, relays, half-close, cut streams, TLS within TLS within TLS.

The server is a Peer: TLS on memory, as many layers as a test wants, on one thread.
"""

from __future__ import annotations

import functools
import hashlib
import random
import select
import socket
import ssl
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import pytest

from netproxy.config.sections.upstreams import TLS_LIMIT
from netproxy.errors import DeadlineError, ProtocolError, StreamError
from netproxy.net import syscalls, tls, tls_socket
from netproxy.net.stream import Stream, complete
from netproxy.relay.pipe import Outcome, PipeLimits, Relay
from tests.support.accounts import free_account
from tests.support.certificates import Certificates, certificates
from tests.support.outcomes import Outcomes
from tests.support.waits import run_to_end
from tests.support.sockets import SECONDS, Task, reset, tcp_pair

MEGABYTE = 1 << 20
RECORD = 16384
"""Bytes in clear of the longest record."""
LIMITS = PipeLimits(idle=10 * SECONDS, half_close=10 * SECONDS)
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)


class Layer:
    """One end of TLS on memory."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.ended = False
        """True once the alert of its peer has come."""

    def drain(self) -> bytes:
        """Return what is there in clear."""
        pieces = []
        while not self.ended:
            try:
                piece = self.tls.read(65536)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                piece = b""
            self.ended = not piece
            pieces.append(piece)
        return b"".join(pieces)

    def seal(self, data: bytes, record: int = RECORD) -> bytes:
        """Encrypt data in records of `record` bytes."""
        for at in range(0, len(data), record):
            self.tls.write(data[at : at + record])
        return self.outgoing.read()

    def end(self) -> bytes:
        """Return the alert that there will be no more."""
        try:
            self.tls.unwrap()
        except (ssl.SSLWantReadError, ssl.SSLSyscallError):
            pass
        return self.outgoing.read()


class Peer:
    """The server's end of a connection.  Its layers of TLS, none at first, begin outermost."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.layers: list[Layer] = []
        self._unread = b""

    def secure(self, context: ssl.SSLContext, last_flight: bytes = b"") -> Layer:
        """Do the handshake of one more layer.

        `last_flight` is sent with the last message of the handshake, in one call.
        """
        layer = Layer(context)
        layer.incoming.write(self._unread)
        self._unread = b""
        while True:
            try:
                layer.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send(layer.outgoing.read())
                received = self.pull()
                assert received, "the client has left"
                layer.incoming.write(received)
            except ssl.SSLError:
                self._send(layer.outgoing.read())
                raise
        head = layer.outgoing.read()
        self._send(head + layer.seal(last_flight))
        self.layers.append(layer)
        self._unread = layer.drain()
        return layer

    def open(self, sealed: bytes) -> bytes:
        """Decrypt bytes that came."""
        for layer in self.layers:
            layer.incoming.write(sealed)
            sealed = layer.drain()
        return sealed

    def seal(self, data: bytes, record: int = RECORD) -> bytes:
        """Encrypt data on all layers; `record` is that of the innermost one."""
        for at, layer in enumerate(reversed(self.layers)):
            data = layer.seal(data, record if at == 0 else RECORD)
        return data

    def pull(self) -> bytes:
        """Return what is there in clear, at least a byte; b"" at the end."""
        data, self._unread = self._unread, b""
        while not data and not (self.layers and self.layers[-1].ended):
            sealed = self.sock.recv(65536)
            if not sealed:
                break
            data = self.open(sealed)
        return data

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.pull()
            assert piece, f"closed after {data!r}"
            data += piece
        self._unread = data[count:]
        return data[:count]

    def read_to_end(self) -> bytes:
        return b"".join(iter(self.pull, b""))

    def alerts(self) -> list[bool]:
        """Wait for the end of TCP; return for each layer whether its alert came, and only that."""
        while sealed := self.sock.recv(65536):
            assert not self.open(sealed)
        return [layer.ended for layer in self.layers]

    def send(self, data: bytes, record: int = RECORD) -> None:
        self.sock.sendall(self.seal(data, record))

    def ending(self, layers: int | None = None) -> bytes:
        """Encrypt the alerts of all layers, or of so many outer ones, the innermost first."""
        sealed = b""
        for layer in reversed(self.layers[:layers]):
            sealed = layer.seal(sealed) + layer.end()
        return sealed

    def end(self) -> None:
        """Send the end in TLS and in TCP."""
        try:
            self.sock.sendall(self.ending())
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the client has left

    def exchange(self, data: bytes, record: int, count: int) -> str:
        """Send `data` in records of `record` bytes and read `count` bytes; return their hash."""
        digest, waiting, at = hashlib.sha256(self._unread), b"", 0
        got, self._unread = len(self._unread), b""
        poll = select.poll()
        while got < count or at < len(data) or waiting:
            if not waiting and at < len(data):
                step = max(record, 65536 // record * record)
                waiting, at = self.seal(data[at : at + step], record), at + step
            poll.register(self.sock, select.POLLIN * (got < count) | select.POLLOUT * bool(waiting))
            ready = poll.poll(SECONDS * 1000)
            assert ready, (
                f"stuck: {got} of {count} bytes came, {min(at, len(data))} of {len(data)} went"
            )
            if ready[0][1] & select.POLLOUT:
                waiting = waiting[self.sock.send(waiting, socket.MSG_DONTWAIT) :]
            if ready[0][1] & ~select.POLLOUT:
                sealed = self.sock.recv(65536)
                assert sealed, f"closed: {got} of {count} bytes came"
                received = self.open(sealed)
                digest.update(received)
                got += len(received)
        assert got == count
        return digest.hexdigest()

    def _send(self, data: bytes) -> None:
        """Send what the handshake of an inner layer has to say."""
        self.sock.sendall(self.seal(data))


@functools.cache
def bulk(size: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(size)


@functools.cache
def digest(size: int, seed: int = 7) -> str:
    return hashlib.sha256(bulk(size, seed)).hexdigest()


@pytest.fixture(scope="module")
def pem() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def expired(pem: Certificates, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """Return a server's context with a certificate of the CA that expired yesterday."""
    return expired_context(pem, tmp_path_factory.mktemp("expired"))


def expired_context(pem: Certificates, directory: Path) -> ssl.SSLContext:
    names, certificate = directory / "names", directory / "expired.pem"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    sign = (
        *("openssl", "x509", "-req", "-in", pem.path("server.csr")),
        *("-CA", pem.path("ca.pem"), "-CAkey", pem.path("ca.key"), "-set_serial", "77"),
        *("-extfile", str(names), "-out", str(certificate)),
    )
    # Old versions of openssl accept only the first of these, new versions only the second.
    for validity in (
        ("-days", "-1"),
        ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z"),
    ):
        if not subprocess.run(
            (*sign, *validity), capture_output=True, stdin=subprocess.DEVNULL
        ).returncode:
            break
    return serving(str(certificate), pem.path("server.key"))


def serving(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def server(
    pem: Certificates, name: str = "server", version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    context = serving(pem.path(f"{name}.pem"), pem.path(f"{name}.key"))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@functools.cache
def trusting(pem: Certificates, **more: Any) -> ssl.SSLContext:
    return tls.client_context(pem.path("ca.pem"), **more)


@contextmanager
def pair(seconds: float | None = SECONDS) -> Iterator[tuple[Stream, Peer]]:
    """Yield our stream and the peer at its other end, without TLS."""
    with tcp_pair() as (ours, theirs):
        stream = Stream(ours, b"", seconds)
        try:
            yield stream, Peer(theirs)
        finally:
            stream.close()


@contextmanager
def secured(pem: Certificates, contexts: Sequence[ssl.SSLContext]) -> Iterator[tuple[Stream, Peer]]:
    """Yield both after a handshake for each context, one within the other."""
    with pair() as (stream, peer):
        accepting = Task(lambda: [peer.secure(context) for context in contexts])
        for _ in contexts:
            tls.connect(stream, trusting(pem), "localhost")
        accepting.result()
        yield stream, peer


def refusal(context: ssl.SSLContext, offered: ssl.SSLContext, name: str = "localhost") -> str:
    """Return why connect() refuses the server, which gets an alert."""
    with pair() as (stream, peer):
        accepting = Task(peer.secure, offered)
        with pytest.raises(ProtocolError) as caught:
            tls.connect(stream, context, name)
        stream.close()
        with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
            accepting.result()
    return str(caught.value)


def greet(context: ssl.SSLContext, offered: ssl.SSLContext, name: str = "localhost") -> Peer:
    """Do the handshake and exchange bytes; return the server's end."""
    with pair() as (stream, peer):
        accepting = Task(peer.secure, offered)
        tls.connect(stream, context, name)
        accepting.result()
        stream.write(b"ping")
        assert peer.read(4) == b"ping"
        peer.send(b"pong")
        assert complete(stream.read_exactly(4)) == b"pong"
        assert not stream.plain
    return peer


class TestServerCertificate:
    """Hazard 118."""

    @each_version
    @pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1"])
    def test_certificate_of_the_ca_for_the_name_is_accepted(
        self, pem: Certificates, name: str, version: ssl.TLSVersion
    ) -> None:
        peer = greet(trusting(pem), server(pem, version=version), name)
        assert peer.layers[0].tls.version() == version.name.replace("_", ".")

    @pytest.mark.parametrize(
        "name, reason",
        [
            ("example.com", "Hostname mismatch, certificate is not valid for 'example.com'."),
            (
                "localhost.example.com",
                "Hostname mismatch, certificate is not valid for 'localhost.example.com'.",
            ),
            ("127.0.0.2", "IP address mismatch, certificate is not valid for '127.0.0.2'."),
            ("::1", "IP address mismatch, certificate is not valid for '::1'."),
        ],
    )
    def test_certificate_for_another_name_is_refused(
        self, pem: Certificates, name: str, reason: str
    ) -> None:
        assert refusal(trusting(pem), server(pem), name) == f"TLS: {reason}"

    @each_version
    def test_self_signed_certificate_is_refused(
        self, pem: Certificates, version: ssl.TLSVersion
    ) -> None:
        assert (
            refusal(trusting(pem), server(pem, "stranger", version))
            == "TLS: self-signed certificate"
        )

    def test_expired_certificate_is_refused(
        self, pem: Certificates, expired: ssl.SSLContext
    ) -> None:
        assert refusal(trusting(pem), expired) == "TLS: certificate has expired"

    def test_authorities_of_the_system_are_the_default(self, pem: Certificates) -> None:
        assert (
            refusal(tls.client_context(), server(pem))
            == "TLS: unable to get local issuer certificate"
        )

    @pytest.mark.parametrize("name", ["localhost", "example.com", "127.0.0.2"])
    def test_insecure_client_accepts_any_certificate(
        self, pem: Certificates, expired: ssl.SSLContext, name: str
    ) -> None:
        for offered in (server(pem), server(pem, "stranger"), expired):
            greet(tls.client_context(insecure=True), offered, name)
            greet(trusting(pem, insecure=True), offered, name)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    @pytest.mark.parametrize("insecure", [False, True])
    def test_server_with_old_tls_versions_alone_is_refused(
        self, pem: Certificates, version: ssl.TLSVersion, insecure: bool
    ) -> None:
        offered = server(pem)
        offered.set_ciphers("ALL:@SECLEVEL=0")
        offered.minimum_version, offered.maximum_version = version, version
        assert (
            refusal(trusting(pem, insecure=insecure), offered)
            == "TLS: TLSV1_ALERT_PROTOCOL_VERSION"
        )

    @pytest.mark.parametrize(
        "name, expected",
        [("localhost", "localhost"), ("some.example.com", "some.example.com"), ("127.0.0.1", None)],
    )
    def test_server_name_indication_has_a_name_but_not_an_address(
        self, pem: Certificates, name: str, expected: str | None
    ) -> None:
        """SNI, RFC 6066 section 3: literal addresses are not permitted there."""
        seen: list[str | None] = []
        offered = server(pem)
        offered.sni_callback = lambda connection, name, context: seen.append(name)
        greet(trusting(pem, insecure=True), offered, name)
        assert seen == [expected]


class TestClientCertificate:
    def asking(self, pem: Certificates, version: ssl.TLSVersion) -> ssl.SSLContext:
        context = server(pem, version=version)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(pem.path("ca.pem"))
        return context

    @each_version
    def test_client_certificate_is_sent(self, pem: Certificates, version: ssl.TLSVersion) -> None:
        context = trusting(pem, certificate=pem.path("client.pem"), key=pem.path("client.key"))
        shown: Any = greet(context, self.asking(pem, version)).layers[0].tls.getpeercert()
        assert shown["subject"] == ((("commonName", "test client"),),)

    def test_client_certificate_and_key_may_be_in_one_file(
        self, pem: Certificates, tmp_path: Path
    ) -> None:
        both = tmp_path / "both.pem"
        both.write_text(
            Path(pem.path("client.key")).read_text() + Path(pem.path("client.pem")).read_text()
        )
        greet(trusting(pem, certificate=str(both)), self.asking(pem, VERSIONS[1]))

    @pytest.mark.parametrize("shown", ["", "stranger"])
    def test_missing_client_certificate_is_reported(self, pem: Certificates, shown: str) -> None:
        """In TLS 1.2 the handshake fails; in 1.3 the next read does."""
        more = (
            {"certificate": pem.path(f"{shown}.pem"), "key": pem.path(f"{shown}.key")}
            if shown
            else {}
        )
        assert refusal(trusting(pem, **more), self.asking(pem, VERSIONS[0])).startswith("TLS: ")
        with pair() as (stream, peer):
            accepting = Task(peer.secure, self.asking(pem, VERSIONS[1]))
            tls.connect(stream, trusting(pem, **more), "localhost")
            with pytest.raises(StreamError, match="(?i)certificate|unknown.ca"):
                complete(stream.peek())
            with pytest.raises(ssl.SSLError):
                accepting.result()


@pytest.mark.parametrize(
    "ca, certificate, key, named",
    [
        ("missing.pem", "", "", "missing.pem"),
        ("broken.pem", "", "", "broken.pem"),
        ("server.key", "", "", "server.key"),
        ("ca.pem", "missing.pem", "client.key", "missing.pem"),
        ("ca.pem", "client.pem", "server.key", "client.pem"),
        ("ca.pem", "client.pem", "encrypted.key", "encrypted.key"),
        ("ca.pem", "client.pem", "", "client.pem"),
    ],
)
def test_error_names_a_file_of_the_client_that_cannot_be_used(
    pem: Certificates, ca: str, certificate: str, key: str, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        tls.client_context(
            pem.path(ca), certificate and pem.path(certificate), key and pem.path(key)
        )
    text = str(caught.value)
    assert text.count(named) == 1 and "\n" not in text


class TestHandshake:
    def test_handshake_with_a_silent_server_meets_the_deadline(self, pem: Certificates) -> None:
        """Hazard 119."""
        with pair(0.1) as (stream, _), pytest.raises(DeadlineError):
            tls.connect(stream, trusting(pem), "localhost")

    @pytest.mark.parametrize(
        "sent",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"\5\0",
            b"\0" * 100,
            b"\x16\x03\x03",
        ],
    )
    def test_server_without_tls_is_a_protocol_error(self, pem: Certificates, sent: bytes) -> None:
        with pair() as (stream, peer):
            peer.sock.sendall(sent)
            peer.sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="^TLS: [A-Za-z]"):
                tls.connect(stream, trusting(pem), "localhost")

    def test_server_that_closes_or_resets_in_the_handshake_is_reported(
        self, pem: Certificates
    ) -> None:
        with pair() as (stream, peer):
            peer.sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="^TLS: "):
                tls.connect(stream, trusting(pem), "localhost")
        with pair() as (stream, peer):
            reset(peer.sock)
            with pytest.raises(StreamError, match="."):
                tls.connect(stream, trusting(pem), "localhost")

    def test_bytes_of_the_server_before_tls_are_refused(self, pem: Certificates) -> None:
        """Hazard 120: bytes that came in clear must not count as bytes within TLS."""
        with pair() as (stream, peer):
            peer.sock.sendall(b"xy")
            assert complete(stream.read_exactly(1)) == b"x"
            with pytest.raises(ProtocolError, match="plaintext before TLS"):
                tls.connect(stream, trusting(pem), "localhost")

    def test_handshake_succeeds_if_the_server_sends_byte_by_byte(self, pem: Certificates) -> None:
        with pair() as (stream, peer):
            far, near = socket.socketpair()
            with far, near:
                far.settimeout(SECONDS)
                inner = Peer(far)
                accepting = Task(inner.secure, server(pem, version=VERSIONS[1]))
                connecting = Task(tls.connect, stream, trusting(pem), "localhost")
                near.setblocking(False)
                while not connecting.done:
                    carry(peer.sock, near)
                connecting.result()
                carry(peer.sock, near)
                accepting.result()


def carry(left: socket.socket, right: socket.socket) -> None:
    """Forward what is there in both directions, to the left byte by byte."""
    poll = select.poll()
    for sock in (left, right):
        poll.register(sock, select.POLLIN)
    for descriptor, _ in poll.poll(20):
        if descriptor == left.fileno():
            right.sendall(left.recv(65536))
        else:
            for byte in right.recv(65536):
                left.sendall(bytes((byte,)))


class Ends:
    """A client, and the far end of a relay that has a thread of its own."""

    def __init__(self, client: Peer, far: Peer, task: Task) -> None:
        self.client, self.far, self._task = client, far, task

    def outcome(self) -> Outcome:
        return self._task.result()


def relay(client: Stream, upstream: Stream, limits: PipeLimits) -> Outcome:
    owner = Outcomes()
    run_to_end(Relay(client, upstream, limits, owner, free_account()).begin())
    (outcome,) = owner.outcomes
    return outcome


@contextmanager
def relayed(
    pem: Certificates, contexts: Sequence[ssl.SSLContext], limits: PipeLimits = LIMITS
) -> Iterator[Ends]:
    with tcp_pair() as (ours, theirs), secured(pem, contexts) as (upstream, far):
        upstream.limit(None)
        ends = Ends(Peer(theirs), far, Task(relay, Stream(ours), upstream, limits))
        try:
            yield ends
        finally:
            theirs.close()
            far.sock.close()
            ends.outcome()


def exchange(ends: Ends, up: int, down: int, record: int = RECORD) -> None:
    """Send so many bytes in each direction at the same time; every byte arrives."""
    sending = Task(ends.far.exchange, bulk(down, 8), record, up)
    assert ends.client.exchange(bulk(up), record, down) == digest(down, 8)
    assert sending.result() == digest(up)


def layers(pem: Certificates, depth: int) -> list[ssl.SSLContext]:
    """Return contexts of both versions in turn, 1.3 the outermost."""
    return [server(pem, version=VERSIONS[1 - at % 2]) for at in range(depth)]


class TestRelay:
    """Hazards 62, 82, 83, 84 and 89."""

    @each_version
    def test_eight_megabytes_are_relayed_in_each_direction(
        self, pem: Certificates, version: ssl.TLSVersion
    ) -> None:
        with relayed(pem, [server(pem, version=version)]) as ends:
            exchange(ends, 8 * MEGABYTE, 8 * MEGABYTE)
            ends.client.end()
            assert ends.far.read_to_end() == b""
            ends.far.end()
            assert ends.client.read_to_end() == b""
            assert ends.outcome() == Outcome(8 * MEGABYTE, 8 * MEGABYTE, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_clients_end_leaves_the_other_direction_open(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth)) as ends:
            ends.client.send(b"last")
            ends.client.end()
            assert ends.far.read_to_end() == b"last"
            assert ends.far.alerts() == [True] * depth
            ends.far.send(bulk(MEGABYTE))
            ends.far.end()
            assert ends.client.read_to_end() == bulk(MEGABYTE)
            assert ends.outcome() == Outcome(4, MEGABYTE, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_servers_end_leaves_the_other_direction_open(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth)) as ends:
            ends.far.send(b"last")
            ends.far.end()
            assert ends.client.read_to_end() == b"last"
            sending = Task(ends.far.read_to_end)
            ends.client.send(bulk(MEGABYTE))
            ends.client.end()
            assert sending.result() == bulk(MEGABYTE)
            assert ends.outcome() == Outcome(MEGABYTE, 4, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_servers_end_in_tcp_alone_ends_one_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        """No layer gets an alert.  What came before it arrives."""
        with relayed(pem, layers(pem, depth)) as ends:
            ends.far.send(bulk(100_000))
            ends.far.sock.shutdown(socket.SHUT_WR)
            assert ends.client.read_to_end() == bulk(100_000)
            ends.client.send(b"late")
            ends.client.end()
            assert ends.far.read_to_end() == b"late"
            assert ends.outcome() == Outcome(4, 100_000, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_servers_end_within_a_record_ends_one_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth)) as ends:
            ends.far.sock.sendall(ends.far.seal(b"whole"))
            ends.far.sock.sendall(ends.far.seal(b"cut")[:-1])
            ends.far.sock.shutdown(socket.SHUT_WR)
            assert ends.client.read_to_end() == b"whole"

    def test_reset_of_the_server_resets_the_client(self, pem: Certificates) -> None:
        with relayed(pem, layers(pem, 1)) as ends:
            ends.far.send(b"first")
            assert ends.client.read(5) == b"first"
            reset(ends.far.sock)
            with pytest.raises(ConnectionResetError):
                ends.client.read_to_end()
            assert ends.outcome().ended == "reset"

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_malformed_record_resets_the_client(self, pem: Certificates, depth: int) -> None:
        with relayed(pem, layers(pem, depth)) as ends:
            ends.far.sock.sendall(b"\x17\x03\x03\0\x20" + bytes(32))
            with pytest.raises(ConnectionResetError):
                ends.client.read_to_end()
            assert ends.outcome().ended == "reset"

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_alert_in_one_segment_with_the_last_data_ends_the_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        """A server that waits for our alert sends no FIN: the descriptor tells nothing."""
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            ends.far.sock.sendall(ends.far.seal(b"last") + ends.far.ending())
            assert ends.client.read(4) == b"last"
            assert ends.client.read_to_end() == b""

    @pytest.mark.parametrize("depth", [1, 3])
    def test_alert_behind_more_data_than_the_client_takes_ends_the_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            sending = Task(
                ends.far.sock.sendall, ends.far.seal(bulk(16 * MEGABYTE)) + ends.far.ending()
            )
            assert ends.client.read_to_end() == bulk(16 * MEGABYTE)
            sending.result()

    @pytest.mark.parametrize("depth, ended", [(2, 1), (3, 1), (3, 2)])
    def test_alert_of_outer_layers_alone_ends_the_direction(
        self, pem: Certificates, depth: int, ended: int
    ) -> None:
        """A hop before the last one ends its TLS; the inner layers have no alert."""
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            ends.far.sock.sendall(ends.far.seal(b"last") + ends.far.ending(ended))
            assert ends.client.read(4) == b"last"
            assert ends.client.read_to_end() == b""

    @pytest.mark.parametrize("depth", [1, 2])
    def test_alert_after_the_last_data_ends_the_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            ends.far.send(b"last")
            assert ends.client.read(4) == b"last"
            ends.far.sock.sendall(ends.far.ending())
            assert ends.client.read_to_end() == b""


class TestEarlyData:
    """Hazard 62: the descriptor does not tell of bytes in one segment with the handshake."""

    @each_version
    @pytest.mark.parametrize("size", [1, RECORD, 40_000])
    def test_bytes_behind_the_handshake_are_read(
        self, pem: Certificates, version: ssl.TLSVersion, size: int
    ) -> None:
        with pair() as (stream, peer):
            accepting = Task(peer.secure, server(pem, version=version), bulk(size))
            tls.connect(stream, trusting(pem), "localhost")
            assert complete(stream.read_exactly(size)) == bulk(size)
            accepting.result()

    @each_version
    @pytest.mark.parametrize("size", [1, RECORD, 40_000])
    def test_bytes_behind_the_handshake_are_relayed(
        self, pem: Certificates, version: ssl.TLSVersion, size: int
    ) -> None:
        with pair() as (stream, peer), tcp_pair() as (ours, theirs):
            accepting = Task(peer.secure, server(pem, version=version), bulk(size))
            tls.connect(stream, trusting(pem), "localhost")
            accepting.result()
            stream.limit(None)
            relaying = Task(relay, Stream(ours), stream, LIMITS)
            assert Peer(theirs).read(size) == bulk(size)
            theirs.close()
            peer.sock.close()
            relaying.result()

    def test_bytes_behind_the_handshake_of_three_layers_are_relayed(
        self, pem: Certificates
    ) -> None:
        with pair() as (stream, peer), tcp_pair() as (ours, theirs):
            accepting = Task(
                lambda: (
                    [peer.secure(context) for context in layers(pem, 2)]
                    and peer.secure(server(pem, version=VERSIONS[0]), b"early")
                )
            )
            for _ in range(3):
                tls.connect(stream, trusting(pem), "localhost")
            accepting.result()
            stream.limit(None)
            relaying = Task(relay, Stream(ours), stream, LIMITS)
            assert Peer(theirs).read(5) == b"early"
            theirs.close()
            peer.sock.close()
            relaying.result()


class TestNesting:
    """TLS within TLS within TLS: no bytes are left on a layer of which no descriptor tells."""

    @pytest.mark.parametrize("depth", [2, 3])
    def test_nested_tls_carries_four_megabytes_in_each_direction(
        self, pem: Certificates, depth: int
    ) -> None:
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            exchange(ends, 4 * MEGABYTE, 4 * MEGABYTE)

    @pytest.mark.parametrize("up, down", [(4 * MEGABYTE, 0), (0, 4 * MEGABYTE)])
    def test_nested_tls_carries_four_megabytes_in_one_direction(
        self, pem: Certificates, up: int, down: int
    ) -> None:
        with relayed(pem, layers(pem, 3), LIMITS) as ends:
            exchange(ends, up, down)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize("record", [1, 7, 100])
    def test_nested_tls_carries_many_small_records(
        self, pem: Certificates, depth: int, record: int
    ) -> None:
        """Many inner records share an outer one, so that one receive brings all of them."""
        size = min(300_000, record * 6000)
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            exchange(ends, size, size, record)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize(
        "record", [RECORD - 1, RECORD, RECORD - 22, RECORD - 23, RECORD // 2 + 1]
    )
    def test_nested_tls_carries_records_near_the_largest(
        self, pem: Certificates, depth: int, record: int
    ) -> None:
        """A record takes 16384 bytes.

        With 22 bytes less the record, with header, type and tag, fits into one of the next layer.
        """
        with relayed(pem, layers(pem, depth), LIMITS) as ends:
            exchange(ends, 40 * record, 40 * record, record)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_one_receive_decrypts_all_whole_records(self, pem: Certificates, depth: int) -> None:
        """As much as one receive takes, cut at odd places."""
        with secured(pem, layers(pem, depth)) as (stream, peer):
            sock, unread = stream.detach()
            assert unread == b""
            buffer = memoryview(bytearray(syscalls.ROOM))
            for size in (1, 5000, 20_000, 33_000, 47_000, 60_000, 64_000):
                for cut in (1, 100, 17_000, 40_000):
                    assert in_two(sock, peer, bulk(size), cut, buffer) == bulk(size)

    def test_receive_fits_into_the_buffer_behind_the_rest_of_a_record(
        self, pem: Certificates
    ) -> None:
        """On as many layers as a configuration may have.

        A negative limit would be a huge one to recv(2), which would write beyond the buffer.
        """
        with secured(pem, layers(pem, TLS_LIMIT)) as (stream, _):
            sock: Any = stream.socket
            while isinstance(sock._sock, tls_socket.TlsSocket):
                sock = sock._sock
            assert (
                sock._receive_limit
                == tls_socket.RECEIVE_LIMIT - (TLS_LIMIT - 1) * tls_socket.RECORD
            )
            limit = sock._receive_limit
            assert 0 < limit < limit + TLS_LIMIT * tls_socket.RECORD < syscalls.ROOM

    def test_server_that_does_not_read_stops_one_direction_only(self, pem: Certificates) -> None:
        """Hazard 85.  Once it reads, all bytes arrive."""
        with relayed(pem, layers(pem, 3), LIMITS) as ends:
            size = 16 * MEGABYTE
            sending = Task(ends.client.exchange, bulk(size), RECORD, 0)
            ends.far.send(b"x" * 100)
            assert ends.client.sock.recv(100) == b"x" * 100
            assert ends.far.exchange(b"", RECORD, size) == digest(size)
            sending.result()


def in_two(sock: Any, peer: Peer, data: bytes, cut: int, buffer: memoryview) -> bytes:
    """Send `data` in two pieces; return what is read while the descriptor is readable."""
    sealed, received = peer.seal(data), b""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    for piece, milliseconds in ((sealed[:cut], 0), (sealed[cut:], 1000)):
        peer.sock.sendall(piece)
        while len(received) < len(data) and poll.poll(milliseconds):
            try:
                received += buffer[: sock.recv_into(buffer)]
            except BlockingIOError:
                continue
    return received


class TestSending:
    def test_writing_no_bytes_sends_nothing(self, pem: Certificates) -> None:
        with secured(pem, layers(pem, 1)) as (stream, peer):
            stream.write(b"")
            assert stream.write_some(b"") == 0
            stream.write(b"x")
            assert peer.read(1) == b"x"

    @pytest.mark.parametrize("depth", [1, 3])
    def test_write_to_a_server_that_does_not_read_meets_the_deadline(
        self, pem: Certificates, depth: int
    ) -> None:
        with secured(pem, layers(pem, depth)) as (stream, _):
            stream.limit(0.1)
            with pytest.raises(DeadlineError):
                stream.write(bulk(16 * MEGABYTE))

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_records_that_are_sent_in_pieces_arrive_once(
        self, pem: Certificates, depth: int
    ) -> None:
        """The socket takes little at a time."""
        with secured(pem, layers(pem, depth)) as (stream, peer):
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            writing = Task(stream.write, bulk(MEGABYTE))
            assert peer.exchange(b"", RECORD, MEGABYTE) == digest(MEGABYTE)
            writing.result()

    @each_version
    @pytest.mark.parametrize("depth, at", [(1, 0), (2, 0), (2, 1), (3, 2)])
    def test_alert_is_sent_as_soon_as_there_is_room_for_it(
        self,
        pem: Certificates,
        version: ssl.TLSVersion,
        depth: int,
        at: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The last data has filled the socket.  Without the alert the stream would look cut."""
        with relayed(pem, [server(pem, version=version)] * depth) as ends:
            ends.client.send(b"last")
            assert ends.far.read(4) == b"last"
            sent = no_room(monkeypatch, at)
            ends.client.end()
            assert ends.far.read_to_end() == b""
            assert ends.far.alerts() == [True] * depth
            assert sent[: at + 1] == [True] * at + [False]


def no_room(monkeypatch: pytest.MonkeyPatch, at: int) -> list[bool]:
    """Let the send with the number `at` find the socket full; return which sends did not."""
    sent: list[bool] = []
    real = syscalls.send

    def send(sock: socket.socket, data: bytes | memoryview) -> int:
        sent.append(len(sent) != at)
        return real(sock, data) if sent[-1] else 0

    monkeypatch.setattr(syscalls, "send", send)
    return sent


@each_version
def test_tls_client_resumes_the_session_of_its_server(version: ssl.TLSVersion) -> None:
    """The session is kept once the server has spoken, and not after it was resumed."""
    pem = certificates()
    server = tls.server_context(pem.path("server.pem"), pem.path("server.key"))
    server.maximum_version = version
    client = tls.TlsClient(tls.client_context(pem.path("ca.pem")), "localhost")
    for hours_later, is_resumed in ((0, False), (0, True), (0, True), (1, False), (0, True)):
        client._session_until -= hours_later * tls.SESSION_SECONDS
        with tcp_pair() as (ours, theirs):
            stream, peer = Stream(ours, limited=SECONDS), Peer(theirs)
            handshake = Task(peer.secure, server, b"hello")
            client.connect(stream)
            layer = handshake.result()
            assert complete(stream.read_exactly(5)) == b"hello"
            client.keep_session(stream)
            assert layer.tls.session_reused is is_resumed
            stream.write(b"and back")
            assert peer.pull() == b"and back"
            stream.close()
