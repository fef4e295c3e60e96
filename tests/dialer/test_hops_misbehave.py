"""Proxies that misbehave: silence, single bytes, garbage, early ends, endless heads.

Hazards 61, 62 and 119.  Every test runs for every kind of hop.  Whatever a proxy does, a dial
ends within its time limit, with an error that names the hop and whose fault it is, and leaves
nothing open.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from netproxy.config.schema import HopConfig, UpstreamConfig, UpstreamTlsConfig
from netproxy.dialer.direct import TargetResolver
from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import PacketConn
from netproxy.interfaces.routing import Dialer
from netproxy.net import syscalls
from netproxy.net.stream import Stream
from netproxy.net.udp_sockets import UdpSocketFactory
from netproxy.relay.pipe import PipeLimits
from tests.net.test_tls_client import MEGABYTE, Peer, bulk, relay
from tests.net.test_tls_client import server as offering
from tests.dialer.doubles import make_factory
from tests.support.batches import cut as datagrams_of
from tests.support.certificates import Certificates, certificates
from tests.support.doubles import Counts, Lines
from tests.support.flows import tcp_to, udp_to
from tests.support.sockets import SECONDS, Task, read_to_end, reset, server, tcp_pair, wait_until

TARGET = Address("198.51.100.7", 443)
UOT = Address("sp.v2.udp-over-tcp.arpa", 443)
"""The magic name of UDP over TCP."""
HEAD = 0
"""Stands for a byte count: a head that ends with an empty line."""
LIMITS = PipeLimits(10 * SECONDS, 10 * SECONDS)
BOUND = 256 * 1024
"""Bytes that may be read of an endless head, read-ahead included."""
OK = b"HTTP/1.1 200 Connection established\r\n\r\n"
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n"
    b"Upgrade: connect-udp\r\nCapsule-Protocol: ?1\r\n\r\n"
)
GREETED = (3, b"\x05\x00")
REPLY = b"\x05\x00\x00\x01\x0a\x00\x00\x01\x1f\x90"

Play = Callable[[Peer], Any]


class Kind(NamedTuple):
    """A kind of hop and its handshake."""

    scheme: str
    steps: tuple[tuple[int, bytes], ...]
    """The byte count of each request, and the right answer."""
    first: bytes
    """The bytes b"first" from the target, as they come over the wire."""
    packets: bool = False
    """True if packet connections are dialled, not streams."""
    udp: str = "auto"

    @property
    def tls(self) -> bool:
        """True if the hop is within TLS."""
        return self.scheme == "https"

    @property
    def asked(self) -> str:
        """The target that the hop is asked for."""
        return str(UOT if self.udp == "uot" else TARGET)

    @property
    def http(self) -> bool:
        return self.scheme.startswith("http")

    def label(self, address: Address) -> str:
        """Return the hop's label in errors."""
        return f"'office' ({self.scheme}://{address})"


KINDS = {
    "socks4a": Kind("socks4a", ((9, b"\x00\x5a\x1f\x90\x0a\x00\x00\x01"),), b"first"),
    "socks5h": Kind("socks5h", (GREETED, (10, REPLY)), b"first"),
    "http": Kind("http", ((HEAD, OK),), b"first"),
    "connect-udp": Kind("http", ((HEAD, SWITCHED),), b"\x00\x06\x00first", True),
    "https": Kind("https", ((HEAD, OK),), b"first"),
    "uot": Kind(
        "socks5h", (GREETED, (30, REPLY)), b"\x00\xc6\x33\x64\x07\x01\xbb\x00\x05first", True, "uot"
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
each_socks5 = pytest.mark.parametrize(
    "kind", [KINDS["socks5h"], KINDS["uot"]], ids=["socks5h", "uot"]
)
each_http = pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS.values() if kind.http],
    ids=[name for name, kind in KINDS.items() if kind.http],
)
each_connect = pytest.mark.parametrize(
    "kind", [KINDS["http"], KINDS["https"]], ids=["http", "https"]
)

GARBAGE = {
    "text": b"SSH-2.0-OpenSSH_9.6\r\n\r\n" + b"x" * 300,
    "html": b"<html>\r\n\r\n" + b"x" * 300,
    "high": b"\xff" * 300 + b"\r\n\r\n",
    "ones": b"\x01" * 300 + b"\r\n\r\n",
    "alert": b"\x15\x03\x03\x00\x02\x02\x28" * 40 + b"\r\n\r\n",
    "http2": b"HTTP/2 200 OK\r\n\r\n" + b"x" * 300,
    "request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 300,
}


@pytest.fixture(scope="module")
def certs() -> Certificates:
    return certificates()


@pytest.fixture(scope="module")
def context(certs: Certificates) -> ssl.SSLContext:
    return offering(certs)


class Rig:
    """Scripted hops, and upstreams through them."""

    def __init__(
        self, target_resolver: TargetResolver, certs: Certificates, context: ssl.SSLContext
    ) -> None:
        self._datagrams = UdpSocketFactory(Counts(), Lines())
        self._factory = make_factory(target_resolver)
        self._certificates = certs
        self._context = context

    def upstream(self, kind: Kind, address: Address, seconds: float | None = None) -> Dialer:
        hop = HopConfig(
            kind.scheme,
            address,
            udp=kind.udp,
            timeout=seconds,
            tls=UpstreamTlsConfig(self._certificates.path("ca.pem")),
        )
        return self._factory.dialer(UpstreamConfig((hop,), "office"))

    def plays(self, kind: Kind, play: Play) -> Any:
        """Return a server that runs a script for each connection, within TLS if the kind has it."""

        def script(sock: socket.socket) -> None:
            peer = Peer(sock)
            if kind.tls:
                peer.secure(self._context)
            play(peer)

        return server(script)

    def fails(
        self, kind: Kind, address: Address, seconds: float | None = None, upstream: bool = True
    ) -> DialError:
        """Dial and return the error, which must name the hop and say whether it is at fault."""
        with pytest.raises(DialError) as caught:
            opened(kind, self.upstream(kind, address, seconds))
        error = caught.value
        assert (error.hop, error.upstream) == (kind.label(address), upstream)
        assert str(error).startswith(f"{kind.label(address)}: ")
        return error

    def first(self, kind: Kind, connection: Any, count: int) -> bytes:
        """Return the first bytes that come through a dialled connection, and close it."""
        first = self._first_datagrams if kind.packets else first_bytes
        return first(connection, count)

    def _first_datagrams(self, conn: PacketConn, count: int) -> bytes:
        arena, data = self._datagrams.arena(), b""
        try:
            while len(data) < count:
                assert Task(conn.wait).result()
                for datagram, peer in datagrams_of(conn.receive(arena)):
                    assert conn.source(peer) == TARGET
                    data += datagram
        finally:
            conn.close()
        return data


@pytest.fixture
def rig(target_resolver: TargetResolver, certs: Certificates, context: ssl.SSLContext) -> Rig:
    return Rig(target_resolver, certs, context)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The byte count of each read of a stream."""
    counts: list[int] = []
    real = syscalls.receive

    def receive(sock: socket.socket, limit: int) -> memoryview | None:
        data = real(sock, limit)
        counts.append(len(data or b""))
        return data

    monkeypatch.setattr(syscalls, "receive", receive)
    yield counts


def opened(kind: Kind, dialer: Dialer) -> Any:
    """Dial the target as the kind says."""
    return dialer.dial_packet(udp_to(TARGET)) if kind.packets else dialer.dial(tcp_to(TARGET))


def first_bytes(stream: Stream, count: int) -> bytes:
    """Return the first bytes that a client gets through a relay."""
    with tcp_pair() as (ours, theirs):
        relaying = Task(relay, Stream(ours), stream, LIMITS)
        data = Peer(theirs).read(count)
        theirs.shutdown(socket.SHUT_WR)
        read_to_end(theirs)
        relaying.result()
    return data


def read_request(peer: Peer, count: int) -> None:
    """Read a request of so many bytes."""
    if count != HEAD:
        peer.read(count)
        return
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += peer.read(1)


def steps(peer: Peer, kind: Kind, upto: int) -> None:
    """Do the first steps as they should be, and read the next request."""
    for count, answer in kind.steps[:upto]:
        read_request(peer, count)
        peer.send(answer)
    if upto < len(kind.steps):
        read_request(peer, kind.steps[upto][0])


def places(kind: Kind) -> list[tuple[int, int]]:
    """Return every place in every answer: the step, and the number of bytes before the place."""
    return [
        (step, cut) for step, (_, answer) in enumerate(kind.steps) for cut in range(len(answer))
    ]


def in_one_send(kind: Kind, behind: bytes, answer: bytes = b"") -> Play:
    """Return a script: all steps, bytes behind the last answer, then wait for the end."""

    def play(peer: Peer) -> None:
        steps(peer, kind, len(kind.steps) - 1)
        peer.send((answer or kind.steps[-1][1]) + behind)
        peer.read_to_end()
        peer.end()

    return play


class TestSilence:
    @each_kind
    @pytest.mark.parametrize("step", [0, 1])
    def test_silence_instead_of_an_answer_is_a_timeout(
        self, rig: Rig, kind: Kind, step: int
    ) -> None:
        """The dial ends at the hop's time limit."""

        def play(peer: Peer) -> None:
            steps(peer, kind, min(step, len(kind.steps) - 1))
            peer.read_to_end()

        # A proxy that has answered the login works: then the target is silent.
        of_target = kind.scheme == "socks5h" and step == 1
        with rig.plays(kind, play) as address:
            error = rig.fails(kind, address, 0.1, upstream=not of_target)
        assert error.reason is Reason.TIMEOUT and str(error).endswith(": timed out")
        assert (error.detail == kind.asked) is of_target

    @each_socks5
    @pytest.mark.parametrize("cut", range(1, len(REPLY)))
    def test_silence_within_the_socks5_reply_is_the_proxys_fault(
        self, rig: Rig, kind: Kind, cut: int
    ) -> None:
        """A proxy that has begun to answer, even with one byte, is at fault if it stops."""

        def play(peer: Peer) -> None:
            steps(peer, kind, 1)
            peer.send(REPLY[:cut])
            peer.read_to_end()

        with rig.plays(kind, play) as address:
            assert rig.fails(kind, address, 0.1).reason is Reason.TIMEOUT

    @each_kind
    def test_proxy_that_reads_nothing_is_a_timeout(self, rig: Rig, kind: Kind) -> None:
        """The proxy does not even make the TLS handshake."""
        with server(read_to_end) as address:
            error = rig.fails(kind, address, 0.1)
        assert error.reason is Reason.TIMEOUT and str(error).endswith(": timed out")

    @each_kind
    def test_silence_within_an_answer_is_a_timeout(self, rig: Rig, kind: Kind) -> None:
        def play(peer: Peer) -> None:
            steps(peer, kind, len(kind.steps) - 1)
            peer.send(kind.steps[-1][1][:-1])
            peer.read_to_end()

        with rig.plays(kind, play) as address:
            assert rig.fails(kind, address, 0.1).reason is Reason.TIMEOUT

    @each_http
    def test_endless_interim_responses_are_a_timeout(self, rig: Rig, kind: Kind) -> None:
        def play(peer: Peer) -> None:
            read_request(peer, HEAD)
            while True:
                peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

        with rig.plays(kind, play) as address:
            assert rig.fails(kind, address, 0.2).reason is Reason.TIMEOUT


class TestAnswer:
    @each_kind
    def test_answer_in_single_bytes_is_accepted(
        self, rig: Rig, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each read returns one byte, also within TLS records."""
        real = syscalls.receive
        monkeypatch.setattr(syscalls, "receive", lambda sock, limit: real(sock, 1))
        with rig.plays(kind, in_one_send(kind, kind.first)) as address:
            assert rig.first(kind, opened(kind, rig.upstream(kind, address)), 5) == b"first"

    @each_kind
    def test_bytes_in_the_segment_of_the_answer_are_delivered(self, rig: Rig, kind: Kind) -> None:
        """Hazard 62: the client gets them, although the socket is not readable any more."""
        with rig.plays(kind, in_one_send(kind, kind.first)) as address:
            assert rig.first(kind, opened(kind, rig.upstream(kind, address)), 5) == b"first"

    @each_kind
    def test_many_bytes_behind_the_answer_are_delivered(self, rig: Rig, kind: Kind) -> None:
        with rig.plays(kind, in_one_send(kind, kind.first * 3000)) as address:
            assert (
                rig.first(kind, opened(kind, rig.upstream(kind, address)), 15_000)
                == b"first" * 3000
            )

    @each_kind
    def test_answers_before_the_requests_are_accepted(self, rig: Rig, kind: Kind) -> None:
        """A proxy that answers in advance is strange and harmless."""

        def play(peer: Peer) -> None:
            peer.send(b"".join(answer for _, answer in kind.steps) + kind.first)
            peer.read_to_end()
            peer.end()

        with rig.plays(kind, play) as address:
            assert rig.first(kind, opened(kind, rig.upstream(kind, address)), 5) == b"first"

    @each_kind
    def test_megabytes_behind_the_answer_are_not_read_ahead(
        self, rig: Rig, kind: Kind, received: list[int]
    ) -> None:
        """Hazard 85: bytes that are not needed yet stay in the kernel."""

        def play(peer: Peer) -> None:
            in_one_send(kind, bulk(5 * MEGABYTE))(peer)

        with rig.plays(kind, play) as address:
            opened(kind, rig.upstream(kind, address)).close()
        assert sum(received) <= BOUND


class TestGarbage:
    @each_kind
    @pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
    def test_garbage_instead_of_an_answer_is_a_protocol_error(
        self, rig: Rig, kind: Kind, garbage: bytes
    ) -> None:
        for step in range(len(kind.steps)):

            def play(peer: Peer, step: int = step) -> None:
                steps(peer, kind, step)
                peer.send(garbage)
                peer.read_to_end()

            with rig.plays(kind, play) as address:
                error = rig.fails(kind, address)
            assert error.reason is Reason.PROTOCOL
            assert len(str(error)) < 200 and str(error).isprintable()

    @each_kind
    @pytest.mark.parametrize("garbage", [GARBAGE["text"], b"\0" * 300], ids=["text", "zeros"])
    def test_garbage_before_the_request_is_a_protocol_error(
        self, rig: Rig, kind: Kind, garbage: bytes
    ) -> None:
        """Also in the clear instead of TLS.  For SOCKS4 zeros are a refusal of unknown code."""

        def script(sock: socket.socket) -> None:
            sock.sendall(garbage + b"\r\n\r\n")
            read_to_end(sock)

        with server(script) as address:
            if kind.scheme == "socks4a" and not garbage[0]:
                with pytest.raises(DialError) as caught:
                    opened(kind, rig.upstream(kind, address))
                assert (caught.value.reason, caught.value.hop) == (
                    Reason.GENERAL,
                    kind.label(address),
                )
            else:
                assert rig.fails(kind, address).reason is Reason.PROTOCOL


class TestEarlyEnd:
    @each_kind
    def test_close_at_every_place_of_an_answer_is_an_error(self, rig: Rig, kind: Kind) -> None:
        left = iter(places(kind))

        def play(peer: Peer) -> None:
            step, cut = next(left)
            steps(peer, kind, step)
            peer.send(kind.steps[step][1][:cut])

        with rig.plays(kind, play) as address:
            for _ in places(kind):
                assert rig.fails(kind, address).reason in (Reason.PROTOCOL, Reason.GENERAL)
        assert next(left, None) is None

    @each_kind
    def test_reset_at_every_place_of_an_answer_is_an_error(self, rig: Rig, kind: Kind) -> None:
        left = iter(places(kind))

        def play(peer: Peer) -> None:
            step, cut = next(left)
            steps(peer, kind, step)
            peer.send(kind.steps[step][1][:cut])
            reset(peer.sock)

        with rig.plays(kind, play) as address:
            for _ in places(kind):
                assert rig.fails(kind, address).reason in (Reason.PROTOCOL, Reason.GENERAL)
        assert next(left, None) is None

    @each_kind
    def test_close_right_after_accept_is_an_error(self, rig: Rig, kind: Kind) -> None:
        """With and without unread bytes: a close with unread bytes is a reset."""
        for script in (
            lambda sock: None,
            reset,
            lambda sock: sock.shutdown(socket.SHUT_WR) or read_to_end(sock),
        ):
            with server(script) as address:
                assert rig.fails(kind, address).reason in (Reason.PROTOCOL, Reason.GENERAL)


class TestStatus:
    @each_connect
    @pytest.mark.parametrize(
        "fields",
        [
            b"Content-Length: 5\r\n",
            b"Content-Length: 0\r\n",
            b"Content-Length: x\r\nContent-Length: 7\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n",
        ],
    )
    @pytest.mark.parametrize("status", [200, 204, 299])
    def test_2xx_response_to_connect_has_no_body(
        self, rig: Rig, kind: Kind, status: int, fields: bytes
    ) -> None:
        """Hazard 61; RFC 9110 section 9.3.6: all bytes that follow are the target's."""
        answer = b"HTTP/1.1 %d OK\r\n%b\r\n" % (status, fields)
        with rig.plays(kind, in_one_send(kind, b"5\r\nfirst\r\n0\r\n\r\n", answer)) as address:
            assert (
                rig.first(kind, opened(kind, rig.upstream(kind, address)), 15)
                == b"5\r\nfirst\r\n0\r\n\r\n"
            )

    @each_http
    @pytest.mark.parametrize(
        "status, reason, upstream",
        [
            (302, None, False),
            (403, Reason.DENIED, False),
            (407, Reason.AUTHENTICATION, True),
            (502, None, False),
            (504, Reason.TIMEOUT, False),
        ],
    )
    @pytest.mark.parametrize("size", [0, 9, MEGABYTE])
    def test_error_response_with_a_body_closes_the_connection(
        self, rig: Rig, kind: Kind, status: int, reason: Reason | None, upstream: bool, size: int
    ) -> None:
        """Hazard 60: its body is not read, and nothing else is sent on that connection."""
        more: list[bytes] = []

        def play(peer: Peer) -> None:
            read_request(peer, HEAD)
            try:
                peer.send(
                    b"HTTP/1.1 %d Because\r\nContent-Length: %d\r\n\r\n" % (status, size)
                    + bulk(size)
                )
                more.append(peer.read_to_end())
            except ConnectionError:
                more.append(b"")

        with rig.plays(kind, play) as address:
            with pytest.raises(DialError) as caught:
                opened(kind, rig.upstream(kind, address))
        error = caught.value
        assert (error.upstream, error.hop) == (upstream, kind.label(address))
        assert (
            error.reason is reason
            or reason is None
            and error.reason in (Reason.GENERAL, Reason.UNSUPPORTED)
        )
        assert str(error).startswith(f"{kind.label(address)}: ") and f"{status} because" in str(
            error
        )
        wait_until(lambda: more)
        assert more == [b""]

    @pytest.mark.parametrize(
        "answer",
        [
            OK,
            b"HTTP/1.1 204 No Content\r\n\r\n",
            SWITCHED.replace(b"connect-udp", b"websocket").replace(
                b"Capsule-Protocol: ?1\r\n", b""
            ),
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: connect-udp\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            SWITCHED[:-2] + b"Content-Length: 5\r\n\r\n",
            SWITCHED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n",
        ],
    )
    def test_response_that_does_not_switch_is_a_protocol_error(
        self, rig: Rig, answer: bytes
    ) -> None:
        kind = KINDS["connect-udp"]
        with rig.plays(kind, in_one_send(kind, kind.first, answer)) as address:
            assert rig.fails(kind, address).reason is Reason.PROTOCOL

    @each_connect
    def test_101_response_to_connect_is_a_protocol_error(self, rig: Rig, kind: Kind) -> None:
        """The client has not asked for an upgrade."""
        with rig.plays(kind, in_one_send(kind, kind.first, SWITCHED)) as address:
            assert rig.fails(kind, address).reason is Reason.PROTOCOL


class TestEndlessHead:
    """Hazards 61 and 68: five megabytes of a head without an end."""

    @each_http
    @pytest.mark.parametrize(
        "head",
        [
            b"",
            b"HTTP/1.1 200 " + b"x" * 5,
            b"HTTP/1.1 200 OK\r\nA: ",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: connect-udp\r\nA: ",
        ],
        ids=["not-a-line", "status", "field", "field-of-a-switch"],
    )
    def test_endless_line_is_a_protocol_error(
        self, rig: Rig, kind: Kind, head: bytes, received: list[int]
    ) -> None:
        self.fails_early(rig, kind, head + b"x" * (5 * MEGABYTE), received)

    @each_http
    @pytest.mark.parametrize(
        "field",
        [b"A: b\r\n", b"A: " + b"b" * 8000 + b"\r\n", b"\r\n", b" folded\r\n"],
        ids=["short", "long", "empty", "folded"],
    )
    def test_endless_fields_are_a_protocol_error(
        self, rig: Rig, kind: Kind, field: bytes, received: list[int]
    ) -> None:
        begin = b"HTTP/1.1 200 OK\r\nA: b\r\n" if field != b"\r\n" else b""
        self.fails_early(rig, kind, begin + field * (5 * MEGABYTE // len(field)), received)

    def fails_early(self, rig: Rig, kind: Kind, data: bytes, received: list[int]) -> None:
        """Check that the dial fails long before the end of the data."""

        def play(peer: Peer) -> None:
            read_request(peer, HEAD)
            peer.send(data)
            peer.read_to_end()

        with rig.plays(kind, play) as address:
            assert rig.fails(kind, address).reason is Reason.PROTOCOL
        assert sum(received) <= BOUND
