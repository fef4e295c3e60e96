"""TLS towards a proxy: who is believed, and what is there on every layer: relayed, half-closed, cut, TLS in TLS in TLS.

The far end is a Peer: TLS on memory, as many layers as a test wants, one thread.
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

from netproxy.config.upstreams import TLS_LIMIT
from netproxy.errors import DeadlineError, ProtocolError, StreamError
from netproxy.net import syscalls, tls, tls_socket
from netproxy.net.stream import Stream
from netproxy.relay.pipe import Outcome, PipeLimits, pipe
from tests.support.certificates import Certificates, certificates
from tests.support.waits import run_to_end
from tests.support.sockets import SECONDS, Task, reset, tcp_pair

MEGABYTE = 1 << 20
RECORD = 16384  # bytes in clear that one record takes at the most
LIMITS = PipeLimits(idle=SECONDS, half_close=SECONDS)
NEVER_IDLE = PipeLimits(idle=60.0, half_close=60.0)
VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)


class Layer:
    """One end of TLS on memory."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.ended = False  # its peer's alert has come

    def drain(self) -> bytes:
        """What is there in clear."""
        found = []
        while not self.ended:
            try:
                piece = self.tls.read(65536)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLZeroReturnError:
                piece = b""
            self.ended = not piece
            found.append(piece)
        return b"".join(found)

    def seal(self, data: bytes, record: int = RECORD) -> bytes:
        """In records of `record` bytes."""
        for at in range(0, len(data), record):
            self.tls.write(data[at : at + record])
        return self.outgoing.read()

    def end(self) -> bytes:
        """The alert that there will be no more."""
        try:
            self.tls.unwrap()
        except (ssl.SSLWantReadError, ssl.SSLSyscallError):
            pass
        return self.outgoing.read()


class Peer:
    """The far end of a connection; its layers of TLS, the outermost first, are none to begin with."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.layers: list[Layer] = []
        self._unread = b""

    def secure(self, context: ssl.SSLContext, last_flight: bytes = b"") -> Layer:
        """The handshake of one more layer; `last_flight` goes in one send with the end of the handshake."""
        layer = Layer(context)
        layer.incoming.write(self._unread)
        self._unread = b""
        while True:
            try:
                layer.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._send(layer.outgoing.read())
                found = self.pull()
                assert found, "the client has left"
                layer.incoming.write(found)
            except ssl.SSLError:
                self._send(layer.outgoing.read())
                raise
        head = layer.outgoing.read()
        self._send(head + layer.seal(last_flight))
        self.layers.append(layer)
        self._unread = layer.drain()
        return layer

    def open(self, sealed: bytes) -> bytes:
        """What is in clear of bytes that came."""
        for layer in self.layers:
            layer.incoming.write(sealed)
            sealed = layer.drain()
        return sealed

    def seal(self, data: bytes, record: int = RECORD) -> bytes:
        """As it goes over the wire; `record` is that of the innermost layer."""
        for at, layer in enumerate(reversed(self.layers)):
            data = layer.seal(data, record if at == 0 else RECORD)
        return data

    def pull(self) -> bytes:
        """What is there in clear, at least a byte; b"" at the end."""
        found, self._unread = self._unread, b""
        while not found and not (self.layers and self.layers[-1].ended):
            sealed = self.sock.recv(65536)
            if not sealed:
                break
            found = self.open(sealed)
        return found

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
        """Whether each layer was told of its end, when TCP has ended; nothing else may have come."""
        while sealed := self.sock.recv(65536):
            assert not self.open(sealed)
        return [layer.ended for layer in self.layers]

    def send(self, data: bytes, record: int = RECORD) -> None:
        self.sock.sendall(self.seal(data, record))

    def ending(self, layers: int | None = None) -> bytes:
        """The alerts of all layers, or of so many outer ones, the innermost first, as they go over the wire."""
        sealed = b""
        for layer in reversed(self.layers[:layers]):
            sealed = layer.seal(sealed) + layer.end()
        return sealed

    def end(self) -> None:
        """Tells in TLS and in TCP that there is no more."""
        try:
            self.sock.sendall(self.ending())
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the client has left: that is its business

    def exchange(self, data: bytes, record: int, count: int) -> str:
        """Sends `data` in records of `record` bytes and reads `count` bytes at the same time; the hash of these."""
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
                found = self.open(sealed)
                digest.update(found)
                got += len(found)
        assert got == count
        return digest.hexdigest()

    def _send(self, data: bytes) -> None:
        """What a layer within the others has to say."""
        self.sock.sendall(self.seal(data))


@functools.cache
def bulk(size: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(size)


@functools.cache
def digest(size: int, seed: int = 7) -> str:
    return hashlib.sha256(bulk(size, seed)).hexdigest()


@pytest.fixture(scope="module")
def made() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def expired(made: Certificates, tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A server's context: its certificate is of the CA, but of yesterday."""
    return yesterdays(made, tmp_path_factory.mktemp("expired"))


def yesterdays(made: Certificates, directory: Path) -> ssl.SSLContext:
    names, certificate = directory / "names", directory / "expired.pem"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    sign = (
        "openssl",
        "x509",
        "-req",
        "-in",
        made.path("server.csr"),
        "-CA",
        made.path("ca.pem"),
        "-CAkey",
        made.path("ca.key"),
        "-set_serial",
        "77",
        "-extfile",
        names,
        "-out",
        certificate,
    )
    # what old versions of openssl take is refused by new ones, and the other way round
    for validity in (
        ("-days", "-1"),
        ("-not_before", "20200101000000Z", "-not_after", "20200102000000Z"),
    ):
        if not subprocess.run(
            (*sign, *validity), capture_output=True, stdin=subprocess.DEVNULL
        ).returncode:
            break
    return serving(str(certificate), made.path("server.key"))


def serving(certificate: str, key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def server(
    made: Certificates, name: str = "server", version: ssl.TLSVersion | None = None
) -> ssl.SSLContext:
    context = serving(made.path(f"{name}.pem"), made.path(f"{name}.key"))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@functools.cache
def believing(made: Certificates, **more: Any) -> ssl.SSLContext:
    return tls.client_context(made.path("ca.pem"), **more)


@contextmanager
def pair(seconds: float | None = SECONDS) -> Iterator[tuple[Stream, Peer]]:
    """Our stream, and who is at its other end; in clear."""
    with tcp_pair() as (ours, theirs):
        stream = Stream(ours, b"", seconds)
        try:
            yield stream, Peer(theirs)
        finally:
            stream.close()


@contextmanager
def secured(
    made: Certificates, contexts: Sequence[ssl.SSLContext]
) -> Iterator[tuple[Stream, Peer]]:
    """Behind as many handshakes, one within the other."""
    with pair() as (stream, peer):
        accepting = Task(lambda: [peer.secure(context) for context in contexts])
        for _ in contexts:
            tls.connect(stream, believing(made), "localhost")
        accepting.result()
        yield stream, peer


def refusal(context: ssl.SSLContext, offered: ssl.SSLContext, name: str = "localhost") -> str:
    """Why connect() does not go on; the server is told too."""
    with pair() as (stream, peer):
        accepting = Task(peer.secure, offered)
        with pytest.raises(ProtocolError) as caught:
            tls.connect(stream, context, name)
        stream.close()
        with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
            accepting.result()
    return str(caught.value)


def greet(context: ssl.SSLContext, offered: ssl.SSLContext, name: str = "localhost") -> Peer:
    """The handshake goes well, and so does what follows it; the other end as it was."""
    with pair() as (stream, peer):
        accepting = Task(peer.secure, offered)
        tls.connect(stream, context, name)
        accepting.result()
        stream.write(b"ping")
        assert peer.read(4) == b"ping"
        peer.send(b"pong")
        assert stream.read_exactly(4) == b"pong"
        assert not stream.plain
    return peer


class TestWhoIsBelieved:
    """HAZARDS 118."""

    @each_version
    @pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1"])
    def test_a_certificate_of_the_ca_for_that_name(
        self, made: Certificates, name: str, version: ssl.TLSVersion
    ) -> None:
        assert greet(believing(made), server(made, version=version), name).layers[
            0
        ].tls.version() == version.name.replace("_", ".")

    @pytest.mark.parametrize(
        "name, said",
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
    def test_one_for_another_name_is_refused(
        self, made: Certificates, name: str, said: str
    ) -> None:
        assert refusal(believing(made), server(made), name) == f"TLS: {said}"

    @each_version
    def test_one_of_its_own_is_refused(self, made: Certificates, version: ssl.TLSVersion) -> None:
        assert (
            refusal(believing(made), server(made, "stranger", version))
            == "TLS: self-signed certificate"
        )

    def test_one_that_has_expired_is_refused(
        self, made: Certificates, expired: ssl.SSLContext
    ) -> None:
        assert refusal(believing(made), expired) == "TLS: certificate has expired"

    def test_without_a_ca_the_systems_are_asked(self, made: Certificates) -> None:
        assert (
            refusal(tls.client_context(), server(made))
            == "TLS: unable to get local issuer certificate"
        )

    @pytest.mark.parametrize("name", ["localhost", "example.com", "127.0.0.2"])
    def test_insecure_believes_everybody(
        self, made: Certificates, expired: ssl.SSLContext, name: str
    ) -> None:
        for offered in (server(made), server(made, "stranger"), expired):
            greet(tls.client_context(insecure=True), offered, name)
            greet(believing(made, insecure=True), offered, name)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    @pytest.mark.parametrize("insecure", [False, True])
    def test_a_server_of_old_versions_alone_is_refused(
        self, made: Certificates, version: ssl.TLSVersion, insecure: bool
    ) -> None:
        offered = server(made)
        offered.set_ciphers("ALL:@SECLEVEL=0")
        offered.minimum_version, offered.maximum_version = version, version
        assert (
            refusal(believing(made, insecure=insecure), offered)
            == "TLS: TLSV1_ALERT_PROTOCOL_VERSION"
        )

    @pytest.mark.parametrize(
        "name, told",
        [("localhost", "localhost"), ("some.example.com", "some.example.com"), ("127.0.0.1", None)],
    )
    def test_the_name_is_told_the_server_and_an_address_is_not(
        self, made: Certificates, name: str, told: str | None
    ) -> None:
        """SNI, RFC 6066 section 3: literal addresses are not permitted there."""
        seen: list[str | None] = []
        offered = server(made)
        offered.sni_callback = lambda connection, name, context: seen.append(name)
        greet(believing(made, insecure=True), offered, name)
        assert seen == [told]


class TestOurCertificate:
    def asking(self, made: Certificates, version: ssl.TLSVersion) -> ssl.SSLContext:
        context = server(made, version=version)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(made.path("ca.pem"))
        return context

    @each_version
    def test_is_shown(self, made: Certificates, version: ssl.TLSVersion) -> None:
        context = believing(made, certificate=made.path("client.pem"), key=made.path("client.key"))
        shown: Any = greet(context, self.asking(made, version)).layers[0].tls.getpeercert()
        assert shown["subject"] == ((("commonName", "test client"),),)

    def test_may_be_in_one_file_with_its_key(self, made: Certificates, tmp_path: Path) -> None:
        both = tmp_path / "both.pem"
        both.write_text(
            Path(made.path("client.key")).read_text() + Path(made.path("client.pem")).read_text()
        )
        greet(believing(made, certificate=str(both)), self.asking(made, VERSIONS[1]))

    @pytest.mark.parametrize("shown", ["", "stranger"])
    def test_is_missed_in_words(self, made: Certificates, shown: str) -> None:
        """In TLS 1.2 the handshake fails; in 1.3 we hear of it when we read."""
        more = (
            {"certificate": made.path(f"{shown}.pem"), "key": made.path(f"{shown}.key")}
            if shown
            else {}
        )
        assert refusal(believing(made, **more), self.asking(made, VERSIONS[0])).startswith("TLS: ")
        with pair() as (stream, peer):
            accepting = Task(peer.secure, self.asking(made, VERSIONS[1]))
            tls.connect(stream, believing(made, **more), "localhost")
            with pytest.raises(StreamError, match="(?i)certificate|unknown.ca"):
                stream.peek()
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
def test_a_file_that_cannot_be_used_is_named(
    made: Certificates, ca: str, certificate: str, key: str, named: str
) -> None:
    with pytest.raises(ValueError) as caught:
        tls.client_context(
            made.path(ca), certificate and made.path(certificate), key and made.path(key)
        )
    assert named in str(caught.value) and "\n" not in str(caught.value)


class TestHandshake:
    def test_with_one_that_is_silent_meets_the_deadline(self, made: Certificates) -> None:
        """HAZARDS 119."""
        with pair(0.1) as (stream, _), pytest.raises(DeadlineError):
            tls.connect(stream, believing(made), "localhost")

    @pytest.mark.parametrize(
        "said",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"\5\0",
            b"\0" * 100,
            b"\x16\x03\x03",
        ],
    )
    def test_with_one_that_knows_no_tls(self, made: Certificates, said: bytes) -> None:
        with pair() as (stream, peer):
            peer.sock.sendall(said)
            peer.sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="^TLS: [A-Za-z]"):
                tls.connect(stream, believing(made), "localhost")

    def test_with_one_that_closes_or_resets(self, made: Certificates) -> None:
        with pair() as (stream, peer):
            peer.sock.shutdown(socket.SHUT_WR)
            with pytest.raises(ProtocolError, match="^TLS: "):
                tls.connect(stream, believing(made), "localhost")
        with pair() as (stream, peer):
            reset(peer.sock)
            with pytest.raises(StreamError, match="."):
                tls.connect(stream, believing(made), "localhost")

    def test_with_one_that_has_spoken_before(self, made: Certificates) -> None:
        """HAZARDS 120: nothing that came in clear counts as said within TLS."""
        with pair() as (stream, peer):
            peer.sock.sendall(b"xy")
            assert stream.read_exactly(1) == b"x"
            with pytest.raises(ProtocolError, match="plaintext before TLS"):
                tls.connect(stream, believing(made), "localhost")

    def test_with_one_that_drips(self, made: Certificates) -> None:
        """Byte by byte, each on its own."""
        with pair() as (stream, peer):
            far, near = socket.socketpair()
            with far, near:
                far.settimeout(SECONDS)
                within = Peer(far)
                accepting = Task(within.secure, server(made, version=VERSIONS[1]))
                connecting = Task(tls.connect, stream, believing(made), "localhost")
                near.setblocking(False)
                while not connecting.done:
                    carry(peer.sock, near)
                connecting.result()
                carry(peer.sock, near)
                accepting.result()


def carry(left: socket.socket, right: socket.socket) -> None:
    """What is there, one way and the other, to the left byte by byte."""
    poll = select.poll()
    for sock in (left, right):
        poll.register(sock, select.POLLIN)
    for descriptor, _ in poll.poll(20):
        if descriptor == left.fileno():
            right.sendall(left.recv(65536))
        else:
            for byte in right.recv(65536):
                left.sendall(bytes((byte,)))


class Relayed:
    """A client, and a far end behind a relay that has a thread of its own."""

    def __init__(self, client: Peer, far: Peer, task: Task) -> None:
        self.client, self.far, self._task = client, far, task

    def outcome(self) -> Outcome:
        return self._task.result()


def relay(client: Stream, upstream: Stream, limits: PipeLimits) -> Outcome:
    outcomes: list[Outcome] = []
    run_to_end(pipe(client, upstream, limits, outcomes.append))
    (outcome,) = outcomes
    return outcome


@contextmanager
def relayed(
    made: Certificates, contexts: Sequence[ssl.SSLContext], limits: PipeLimits = LIMITS
) -> Iterator[Relayed]:
    with tcp_pair() as (ours, theirs), secured(made, contexts) as (upstream, far):
        upstream.limit(None)
        one = Relayed(Peer(theirs), far, Task(relay, Stream(ours), upstream, limits))
        try:
            yield one
        finally:
            theirs.close()
            far.sock.close()
            one.outcome()


def both_ways(one: Relayed, up: int, down: int, record: int = RECORD) -> None:
    """Every byte arrives, while as much goes the other way."""
    sending = Task(one.far.exchange, bulk(down, 8), record, up)
    assert one.client.exchange(bulk(up), record, down) == digest(down, 8)
    assert sending.result() == digest(up)


def layers(made: Certificates, depth: int) -> list[ssl.SSLContext]:
    """The versions in turn, 1.3 the outermost."""
    return [server(made, version=VERSIONS[1 - at % 2]) for at in range(depth)]


class TestRelay:
    """HAZARDS 62, 82, 83, 84, 89."""

    @each_version
    def test_eight_megabytes_both_ways(self, made: Certificates, version: ssl.TLSVersion) -> None:
        with relayed(made, [server(made, version=version)]) as one:
            both_ways(one, 8 * MEGABYTE, 8 * MEGABYTE)
            one.client.end()
            assert one.far.read_to_end() == b""
            one.far.end()
            assert one.client.read_to_end() == b""
            assert one.outcome() == Outcome(8 * MEGABYTE, 8 * MEGABYTE, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_the_clients_end_leaves_the_other_direction(
        self, made: Certificates, depth: int
    ) -> None:
        with relayed(made, layers(made, depth)) as one:
            one.client.send(b"last")
            one.client.end()
            assert one.far.read_to_end() == b"last"
            assert one.far.alerts() == [True] * depth
            one.far.send(bulk(MEGABYTE))
            one.far.end()
            assert one.client.read_to_end() == bulk(MEGABYTE)
            assert one.outcome() == Outcome(4, MEGABYTE, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_the_far_end_leaves_the_other_direction(self, made: Certificates, depth: int) -> None:
        with relayed(made, layers(made, depth)) as one:
            one.far.send(b"last")
            one.far.end()
            assert one.client.read_to_end() == b"last"
            sending = Task(one.far.read_to_end)
            one.client.send(bulk(MEGABYTE))
            one.client.end()
            assert sending.result() == bulk(MEGABYTE)
            assert one.outcome() == Outcome(MEGABYTE, 4, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_an_end_in_tcp_alone_is_an_end(self, made: Certificates, depth: int) -> None:
        """Without an alert on any layer; what came before it arrives, and the other direction goes on."""
        with relayed(made, layers(made, depth)) as one:
            one.far.send(bulk(100_000))
            one.far.sock.shutdown(socket.SHUT_WR)
            assert one.client.read_to_end() == bulk(100_000)
            one.client.send(b"late")
            one.client.end()
            assert one.far.read_to_end() == b"late"
            assert one.outcome() == Outcome(4, 100_000, "closed")

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_an_end_within_a_record_is_an_end(self, made: Certificates, depth: int) -> None:
        with relayed(made, layers(made, depth)) as one:
            one.far.sock.sendall(one.far.seal(b"whole"))
            one.far.sock.sendall(one.far.seal(b"cut")[:-1])
            one.far.sock.shutdown(socket.SHUT_WR)
            assert one.client.read_to_end() == b"whole"

    def test_a_reset_is_passed_on(self, made: Certificates) -> None:
        with relayed(made, layers(made, 1)) as one:
            one.far.send(b"first")
            assert one.client.read(5) == b"first"
            reset(one.far.sock)
            with pytest.raises(ConnectionResetError):
                one.client.read_to_end()
            assert one.outcome().ended == "reset"

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_what_is_no_record_ends_the_relay(self, made: Certificates, depth: int) -> None:
        with relayed(made, layers(made, depth)) as one:
            one.far.sock.sendall(b"\x17\x03\x03\0\x20" + bytes(32))
            with pytest.raises(ConnectionResetError):
                one.client.read_to_end()
            assert one.outcome().ended == "reset"

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_the_alert_of_the_end_in_one_segment_with_the_last_data(
        self, made: Certificates, depth: int
    ) -> None:
        """As a server does that waits for our alert before it closes: no FIN comes, and the socket has nothing to tell."""
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            one.client.sock.settimeout(1.0)
            one.far.sock.sendall(one.far.seal(b"last") + one.far.ending())
            assert one.client.read(4) == b"last"
            assert one.client.read_to_end() == b""

    @pytest.mark.parametrize("depth", [1, 3])
    def test_that_with_more_data_before_it_than_the_client_takes_now(
        self, made: Certificates, depth: int
    ) -> None:
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            sending = Task(
                one.far.sock.sendall, one.far.seal(bulk(16 * MEGABYTE)) + one.far.ending()
            )
            assert one.client.read_to_end() == bulk(16 * MEGABYTE)
            sending.result()

    @pytest.mark.parametrize("depth, told", [(2, 1), (3, 1), (3, 2)])
    def test_that_of_outer_layers_alone(self, made: Certificates, depth: int, told: int) -> None:
        """A hop before the last one ends its TLS, and what is within it has no end of its own."""
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            one.client.sock.settimeout(1.0)
            one.far.sock.sendall(one.far.seal(b"last") + one.far.ending(told))
            assert one.client.read(4) == b"last"
            assert one.client.read_to_end() == b""

    @pytest.mark.parametrize("depth", [1, 2])
    def test_the_alert_of_the_end_behind_the_last_data(
        self, made: Certificates, depth: int
    ) -> None:
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            one.far.send(b"last")
            assert one.client.read(4) == b"last"
            one.far.sock.sendall(one.far.ending())
            assert one.client.read_to_end() == b""


class TestEarly:
    """HAZARDS 62: what comes right behind the handshake, in its very segment, no look at the socket tells of."""

    @each_version
    @pytest.mark.parametrize("size", [1, RECORD, 40_000])
    def test_is_read(self, made: Certificates, version: ssl.TLSVersion, size: int) -> None:
        with pair() as (stream, peer):
            accepting = Task(peer.secure, server(made, version=version), bulk(size))
            tls.connect(stream, believing(made), "localhost")
            assert stream.read_exactly(size) == bulk(size)
            accepting.result()

    @each_version
    @pytest.mark.parametrize("size", [1, RECORD, 40_000])
    def test_is_relayed(self, made: Certificates, version: ssl.TLSVersion, size: int) -> None:
        with pair() as (stream, peer), tcp_pair() as (ours, theirs):
            accepting = Task(peer.secure, server(made, version=version), bulk(size))
            tls.connect(stream, believing(made), "localhost")
            accepting.result()
            stream.limit(None)
            relaying = Task(relay, Stream(ours), stream, LIMITS)
            assert Peer(theirs).read(size) == bulk(size)
            theirs.close()
            peer.sock.close()
            relaying.result()

    def test_is_relayed_out_of_three_layers(self, made: Certificates) -> None:
        with pair() as (stream, peer), tcp_pair() as (ours, theirs):
            accepting = Task(
                lambda: (
                    [peer.secure(one) for one in layers(made, 2)]
                    and peer.secure(server(made, version=VERSIONS[0]), b"early")
                )
            )
            for _ in range(3):
                tls.connect(stream, believing(made), "localhost")
            accepting.result()
            stream.limit(None)
            relaying = Task(relay, Stream(ours), stream, LIMITS)
            assert Peer(theirs).read(5) == b"early"
            theirs.close()
            peer.sock.close()
            relaying.result()


class TestWithin:
    """TLS in TLS in TLS: nothing stays behind on a layer of which the socket does not tell."""

    @pytest.mark.parametrize("depth", [2, 3])
    def test_four_megabytes_both_ways(self, made: Certificates, depth: int) -> None:
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            both_ways(one, 4 * MEGABYTE, 4 * MEGABYTE)

    @pytest.mark.parametrize("up, down", [(4 * MEGABYTE, 0), (0, 4 * MEGABYTE)])
    def test_four_megabytes_one_way(self, made: Certificates, up: int, down: int) -> None:
        with relayed(made, layers(made, 3), NEVER_IDLE) as one:
            both_ways(one, up, down)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize("record", [1, 7, 100])
    def test_many_small_records(self, made: Certificates, depth: int, record: int) -> None:
        """Within the outer layers many share one record, so that a whole pull of them is there at once."""
        size = min(300_000, record * 6000)
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            both_ways(one, size, size, record)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    @pytest.mark.parametrize(
        "record", [RECORD - 1, RECORD, RECORD - 22, RECORD - 23, RECORD // 2 + 1]
    )
    def test_records_at_the_edge(self, made: Certificates, depth: int, record: int) -> None:
        """16384 bytes is what a record takes; with 22 bytes less it fits, header, type, tag and all, into one of the next layer."""
        with relayed(made, layers(made, depth), NEVER_IDLE) as one:
            both_ways(one, 40 * record, 40 * record, record)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_all_that_is_there_comes_without_another_look_at_the_socket(
        self, made: Certificates, depth: int
    ) -> None:
        """As much as one pull takes, cut at every odd place: what is whole is in clear after one receive."""
        with secured(made, layers(made, depth)) as (stream, peer):
            sock, unread = stream.detach()
            assert unread == b""
            buffer = memoryview(bytearray(syscalls.ROOM))
            for size in (1, 5000, 20_000, 33_000, 47_000, 60_000, 64_000):
                for cut in (1, 100, 17_000, 40_000):
                    assert in_two(sock, peer, bulk(size), cut, buffer) == bulk(size)

    def test_a_pull_fits_with_the_rest_of_a_record(self, made: Certificates) -> None:
        """What each layer gives at a time, and the rest of a record before it, is less than the next one's buffer.

        With as many layers as a configuration may have: a count below nothing is a huge one to recv(2), which then
        writes beyond the buffer.
        """
        with secured(made, layers(made, TLS_LIMIT)) as (stream, _):
            sock: Any = stream.socket
            while isinstance(sock._sock, tls_socket.TlsSocket):
                sock = sock._sock
            assert (
                sock._receive_limit
                == tls_socket.RECEIVE_LIMIT - (TLS_LIMIT - 1) * tls_socket.RECORD
            )
            limit = sock._receive_limit
            assert 0 < limit < limit + TLS_LIMIT * tls_socket.RECORD < syscalls.ROOM

    def test_a_far_end_that_stops_reading_holds_up_no_more_than_buffers(
        self, made: Certificates
    ) -> None:
        """HAZARDS 85, and then all arrives."""
        with relayed(made, layers(made, 3), NEVER_IDLE) as one:
            size = 16 * MEGABYTE
            sending = Task(one.client.exchange, bulk(size), RECORD, 0)
            one.far.send(b"x" * 100)
            assert one.client.sock.recv(100) == b"x" * 100  # the other way goes on meanwhile
            assert one.far.exchange(b"", RECORD, size) == digest(size)
            sending.result()


def in_two(sock: Any, peer: Peer, data: bytes, cut: int, buffer: memoryview) -> bytes:
    """Sends `data`, as it goes over the wire, in two pieces; reads when each is there, and only when the socket tells of some."""
    sealed, found = peer.seal(data), b""
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    for piece, patience in ((sealed[:cut], 0), (sealed[cut:], 1000)):
        peer.sock.sendall(piece)
        while len(found) < len(data) and poll.poll(patience):
            try:
                found += buffer[: sock.recv_into(buffer)]
            except BlockingIOError:
                continue
    return found


class TestSending:
    def test_nothing_is_nothing(self, made: Certificates) -> None:
        with secured(made, layers(made, 1)) as (stream, peer):
            stream.write(b"")
            assert stream.write_some(b"") == 0
            stream.write(b"x")
            assert peer.read(1) == b"x"

    @pytest.mark.parametrize("depth", [1, 3])
    def test_to_one_that_does_not_read_meets_the_deadline(
        self, made: Certificates, depth: int
    ) -> None:
        with secured(made, layers(made, depth)) as (stream, _):
            stream.limit(0.1)
            with pytest.raises(DeadlineError):
                stream.write(bulk(16 * MEGABYTE))

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_what_did_not_go_is_sent_once_and_whole(self, made: Certificates, depth: int) -> None:
        """Our socket takes little at a time: a record goes in pieces."""
        with secured(made, layers(made, depth)) as (stream, peer):
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            writing = Task(stream.write, bulk(MEGABYTE))
            assert peer.exchange(b"", RECORD, MEGABYTE) == digest(MEGABYTE)
            writing.result()

    @each_version
    @pytest.mark.parametrize("depth, at", [(1, 0), (2, 0), (2, 1), (3, 2)])
    def test_the_end_is_told_though_there_is_no_room_for_it_now(
        self,
        made: Certificates,
        version: ssl.TLSVersion,
        depth: int,
        at: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The last data has filled the socket, and an alert has to wait: without it a whole stream looks like a cut one."""
        with relayed(made, [server(made, version=version)] * depth) as one:
            one.client.send(b"last")
            assert one.far.read(4) == b"last"
            sent = no_room(monkeypatch, at)
            one.client.end()
            assert one.far.read_to_end() == b""
            assert one.far.alerts() == [True] * depth
            assert sent[: at + 1] == [True] * at + [False]


def no_room(monkeypatch: pytest.MonkeyPatch, at: int) -> list[bool]:
    """One send of our sockets finds them full, that with the number `at`; which of them did not."""
    sent: list[bool] = []
    real = syscalls.send

    def send(sock: socket.socket, data: bytes | memoryview) -> int:
        sent.append(len(sent) != at)
        return real(sock, data) if sent[-1] else 0

    monkeypatch.setattr(syscalls, "send", send)
    return sent


# -- the same server again


@each_version
def test_later_handshakes_with_a_server_are_shorter(version: ssl.TLSVersion) -> None:
    """What was agreed on is remembered once the server has spoken; a connection whose handshake was short is no news."""
    made = certificates()
    server = tls.server_context(made.path("server.pem"), made.path("server.key"))
    client = tls.client_context(made.path("ca.pem"))
    server.maximum_version = version
    acquaintance = tls.TlsClient(client, "localhost")
    for known in (False, True, True, "an hour later", True):
        if known == "an hour later":  # and it is news again
            acquaintance._session_until, known = 0.0, False
        with tcp_pair() as (ours, theirs):
            stream, peer = Stream(ours, limited=SECONDS), Peer(theirs)
            handshake = Task(peer.secure, server, b"hello")
            acquaintance.connect(stream)
            layer = handshake.result()
            assert stream.read_exactly(5) == b"hello"
            acquaintance.keep_session(stream)
            assert layer.tls.session_reused is known
            stream.write(b"and back")
            assert peer.pull() == b"and back"
            stream.close()
