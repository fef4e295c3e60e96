"""Good clients of every kind, each of which checks every byte that it gets.

A client has one conversation after the other: it connects, exchanges data and ends. Each
conversation has an outcome: served, or lost with the reason. A wait that takes longer than PATIENCE
is a loss. Datagrams may be lost on the way: a client sends each until its answer comes, up to TRIES
times.
"""

from __future__ import annotations

import random
import socket
import ssl
import struct
import threading
import time
from contextlib import ExitStack
from typing import Callable, Mapping, NamedTuple

from load import Process
from rig import Endpoint
from world import NOISE, STACK, World

from netproxy.interfaces.addresses import Address
from netproxy.protocol import capsule, connect_udp, uot
from tests.e2e.peers import ASSOCIATE, BIND, CONNECT, encode, exactly, read_address

# Seconds for each wait.
PATIENCE = 45.0
# How often a datagram is sent, and how many seconds its answer is waited for.
TRIES, RESEND = 30, 1.0
SIZES = (1, 60, 1200, 4000, 20_000, 60_000)
# No larger than what fits a packet: towards targets the daemon sends no fragments.
DATAGRAM_SIZES = (0, 1, 100, 1200, 1400)
BULK = 1 << 20
PIECE = 1 << 16
# Seconds between two conversations of a client, and the rest within a long one.
PAUSE = 0.5, 3.0
REST = 2.0, 8.0
LOGIN = b"alice", b"a password of alice"


class Wrong(Exception):
    """A client got other bytes than it should."""


class Site(NamedTuple):
    """Where the daemon and the servers behind it are."""

    host: str
    """The daemon's address for good clients."""
    ports: Mapping[str, int]
    """Ports of the daemon: main, tls, tcp, udp, dns, and of the agent: tunnel, tunnel_udp."""
    world: World
    authority: str
    """A PEM file: who has signed the certificate of the TLS listener."""


class Outcome(NamedTuple):
    """How a conversation has ended."""

    kind: str
    ports: tuple[int, ...]
    """The client's ports."""
    began: float
    """Monotonic seconds, which all processes share."""
    ended: float
    why: str
    """Why it was lost; "" if it was served."""
    wrong: bool = False
    """True if bytes were wrong."""


class Conversation:
    """One conversation: its sockets and its data."""

    def __init__(self, site: Site, choices: random.Random, stack: ExitStack) -> None:
        self.site = site
        self.choices = choices
        self._stack = stack
        self.ports: list[int] = []

    # -- connections

    def dial(self, name: str = "main") -> socket.socket:
        """Connect to a port of the daemon."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((self.site.host, self.site.ports[name]))
        self.ports.append(sock.getsockname()[1])
        return sock

    def socks5(
        self, command: int, target: Endpoint, sock: socket.socket, login: bool = False
    ) -> Endpoint:
        """Make a request, with the user's name and password if `login`. Return BND."""
        sock.sendall(b"\5\1\2" if login else b"\5\1\0")
        _same(exactly(sock, 2), b"\5\2" if login else b"\5\0")
        if login:
            sock.sendall(b"\1" + b"".join(bytes([len(part)]) + part for part in LOGIN))
            _same(exactly(sock, 2), b"\1\0")
        sock.sendall(bytes([5, command, 0]) + encode(target))
        return reply(sock)

    def noise(self, size: int) -> bytes:
        """Return some bytes."""
        at = self.choices.randrange(len(NOISE) - size)
        return NOISE[at : at + size]

    def echo(self, sock: socket.socket, size: int) -> None:
        """Send bytes to an echo server, and check what comes back."""
        for start in range(0, size, PIECE):
            data = self.noise(min(PIECE, size - start))
            sock.sendall(data)
            _same(exactly(sock, len(data)), data)

    def exchange(self, sock: socket.socket) -> None:
        """Exchange some messages, and end: what was sent before FIN comes back, then FIN."""
        for _ in range(self.choices.randint(1, 4)):
            self.echo(sock, self.choices.choice(SIZES))
        data = self.noise(self.choices.choice(SIZES))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        _same(exactly(sock, len(data)), data)
        _same(sock.recv(1), b"")

    # -- datagrams

    def datagrams(self, send: Callable[[bytes], object], receive: Callable[[], bytes]) -> None:
        """Send some datagrams, each until it comes back. `receive` raises TimeoutError.

        Those of others, and late copies, are left alone.
        """
        mark = self.choices.randbytes(8)
        for number in range(self.choices.randint(3, 8)):
            data = (
                mark + struct.pack("!I", number) + self.noise(self.choices.choice(DATAGRAM_SIZES))
            )
            for _ in range(TRIES):
                send(data)
                if self._comes_back(data, receive):
                    break
            else:
                raise TimeoutError("no answer to a datagram")

    @staticmethod
    def _comes_back(data: bytes, receive: Callable[[], bytes]) -> bool:
        deadline = time.monotonic() + RESEND
        while time.monotonic() < deadline:
            try:
                answer = receive()
            except (TimeoutError, ConnectionRefusedError):
                return False
            if answer[:12] == data[:12]:
                _same(answer, data)
                return True
        return False

    def udp_socket(self) -> socket.socket:
        """Return a UDP socket that waits for RESEND seconds."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(RESEND)
        return sock


def _same(received: bytes, expected: bytes) -> None:
    if received != expected:
        raise Wrong(f"{len(received)} bytes {received[:40]!r}, not {expected[:40]!r}")


def reply(sock: socket.socket) -> Endpoint:
    """Read a reply; return BND. Raises ConnectionError if the daemon refuses."""
    _, code, _ = exactly(sock, 3)
    bound = read_address(sock)
    if code:
        raise ConnectionError(f"SOCKS5 reply {code}")
    return bound


def head(sock: socket.socket) -> bytes:
    """Read the head of an HTTP response. Raises ConnectionError if it is no success."""
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        data += exactly(sock, 1)
    if data.split(b" ", 2)[1] not in (b"200", b"101"):
        raise ConnectionError(data.split(b"\r\n")[0].decode("latin-1"))
    return data


# -- kinds of clients: TCP


def socks5(talk: Conversation) -> None:
    """SOCKS5 CONNECT to a literal address."""
    sock = talk.dial()
    talk.socks5(CONNECT, talk.site.world.tcp, sock)
    talk.exchange(sock)


def named(talk: Conversation) -> None:
    """SOCKS5 CONNECT with a password, to a name that nobody has asked for before."""
    host, port = talk.site.world.tcp
    name = f"n{talk.choices.randrange(1 << 32)}.x{host.replace('.', '-')}.test"
    sock = talk.dial()
    talk.socks5(CONNECT, (name, port), sock, login=True)
    talk.exchange(sock)


def socks4(talk: Conversation) -> None:
    """SOCKS4 CONNECT."""
    host, port = talk.site.world.tcp
    sock = talk.dial()
    sock.sendall(struct.pack("!BBH4sx", 4, 1, port, socket.inet_aton(host)))
    answer = exactly(sock, 8)
    if answer[1] != 90:
        raise ConnectionError(f"SOCKS4 reply {answer[1]}")
    talk.exchange(sock)


def http_connect(talk: Conversation) -> None:
    """HTTP CONNECT."""
    sock = talk.dial()
    sock.sendall(b"CONNECT %b:%d HTTP/1.1\r\nHost: a\r\n\r\n" % _text(talk.site.world.tcp))
    head(sock)
    talk.exchange(sock)


def tls(talk: Conversation) -> None:
    """HTTP CONNECT within TLS. The end is that of TLS, which has no half-close."""
    context = ssl.create_default_context(cafile=talk.site.authority)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    with context.wrap_socket(talk.dial("tls"), server_hostname="localhost") as sock:
        sock.sendall(b"CONNECT %b:%d HTTP/1.1\r\nHost: a\r\n\r\n" % _text(talk.site.world.tcp))
        head(sock)
        for _ in range(talk.choices.randint(1, 4)):
            talk.echo(sock, talk.choices.choice(SIZES))


def http(talk: Conversation) -> None:
    """Requests to an origin, on one connection."""
    sock = talk.dial()
    for _ in range(talk.choices.randint(2, 6)):
        size = talk.choices.choice(SIZES)
        url = b"http://%b:%d/%d" % (*_text(talk.site.world.http), size)
        if talk.choices.random() < 0.5:
            body, more = b"", b""
            expected = NOISE[:size]
        else:
            body = expected = talk.noise(size)
            more = b"Content-Length: %d\r\n" % size
        method = b"POST" if more else b"GET"
        sock.sendall(b"%b %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (method, url, more) + body)
        length = int(head(sock).lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        _same(exactly(sock, length), expected)


def bulk(talk: Conversation) -> None:
    """A MiB each way."""
    sock = talk.dial()
    talk.socks5(CONNECT, talk.site.world.tcp, sock)
    talk.echo(sock, BULK)
    talk.exchange(sock)


def resting(talk: Conversation) -> None:
    """A connection that rests between two exchanges."""
    sock = talk.dial()
    talk.socks5(CONNECT, talk.site.world.tcp, sock)
    talk.echo(sock, talk.choices.choice(SIZES))
    time.sleep(talk.choices.uniform(*REST))
    talk.exchange(sock)


def forward(talk: Conversation) -> None:
    """The listener with a fixed TCP target."""
    talk.exchange(talk.dial("tcp"))


def bind(talk: Conversation) -> None:
    """SOCKS5 BIND, with a peer on the client's host."""
    control = talk.dial()
    bound = talk.socks5(BIND, (control.getsockname()[0], 0), control)
    with socket.create_connection(bound, PATIENCE) as peer:
        talk.ports.append(peer.getsockname()[1])
        reply(control)
        for near, far in ((control, peer), (peer, control)):
            data = talk.noise(talk.choices.choice(SIZES))
            near.sendall(data)
            _same(exactly(far, len(data)), data)


def chain(talk: Conversation) -> None:
    """Through two hops."""
    sock = talk.dial()
    talk.socks5(CONNECT, talk.site.world.tcp_chain, sock)
    talk.exchange(sock)


def group(talk: Conversation) -> None:
    """Through a group of upstreams, which may be down."""
    sock = talk.dial()
    talk.socks5(CONNECT, talk.site.world.tcp_group, sock)
    talk.exchange(sock)


def tunnel(talk: Conversation) -> None:
    """To a service of an agent, by a port that the agent has opened on the bridge."""
    talk.exchange(talk.dial("tunnel"))


# -- kinds of clients: datagrams


def _associated(talk: Conversation, target: Endpoint) -> None:
    control, sock = talk.dial(), talk.udp_socket()
    sock.bind((control.getsockname()[0], 0))
    talk.ports.append(sock.getsockname()[1])
    sock.connect(talk.socks5(ASSOCIATE, ("0.0.0.0", sock.getsockname()[1]), control))
    header = b"\0\0\0" + encode(target)

    def receive() -> bytes:
        data = sock.recv(65536)
        if data[:10] != header:
            raise Wrong(f"a datagram from {data[:10]!r}")
        return data[10:]

    talk.datagrams(lambda data: sock.send(header + data), receive)


def associate(talk: Conversation) -> None:
    """SOCKS5 UDP ASSOCIATE."""
    _associated(talk, talk.site.world.udp)


def associate_chain(talk: Conversation) -> None:
    """SOCKS5 UDP ASSOCIATE through a hop."""
    _associated(talk, talk.site.world.udp_chain)


def uot_stream(talk: Conversation) -> None:
    """UDP over TCP."""
    sock = talk.dial()
    talk.socks5(CONNECT, (uot.MAGIC, 0), sock)
    sock.sendall(uot.encode_request(uot.UotRequest(True, Address(*talk.site.world.udp))))
    frames = Frames(sock)

    def receive() -> bytes:
        frames.wait()
        (size,) = struct.unpack("!H", frames.take(2))
        return frames.take(size)

    talk.datagrams(lambda data: sock.sendall(struct.pack("!H", len(data)) + data), receive)


def connect_udp_stream(talk: Conversation) -> None:
    """UDP in HTTP (RFC 9298)."""
    sock = talk.dial()
    sock.sendall(connect_udp.encode_request(Address(*talk.site.world.udp), "a"))
    head(sock)
    frames = Frames(sock)

    def receive() -> bytes:
        frames.wait()
        if frames.take(1) != b"\0":
            raise Wrong("a capsule of another type")
        size = frames.varint()
        if frames.varint():
            raise Wrong("a capsule with another context")
        return frames.take(size - 1)

    talk.datagrams(lambda data: sock.sendall(capsule.datagram_header(len(data)) + data), receive)


class Frames:
    """Reads the frames of a stream."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._data = b""

    def wait(self) -> None:
        """Wait for the first byte of a frame. Raises TimeoutError after RESEND seconds."""
        self._socket.settimeout(RESEND)
        try:
            self._receive(1)
        finally:
            self._socket.settimeout(PATIENCE)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        self._receive(size)
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    def _receive(self, size: int) -> None:
        while len(self._data) < size:
            piece = self._socket.recv(65536)
            if not piece:
                raise EOFError("the stream has ended")
            self._data += piece

    def varint(self) -> int:
        """Return the next number (RFC 9000 section 16)."""
        first = self.take(1)
        more = self.take((1 << (first[0] >> 6)) - 1)
        return int.from_bytes(bytes((first[0] & 0x3F,)) + more, "big")


def _fixed(talk: Conversation, name: str) -> None:
    sock = talk.udp_socket()
    sock.connect((talk.site.host, talk.site.ports[name]))
    talk.ports.append(sock.getsockname()[1])
    talk.datagrams(sock.send, lambda: sock.recv(65536))


def forward_udp(talk: Conversation) -> None:
    """The listener with a fixed UDP target."""
    _fixed(talk, "udp")


def tunnel_udp(talk: Conversation) -> None:
    """To a UDP service of an agent."""
    _fixed(talk, "tunnel_udp")


def dns(talk: Conversation) -> None:
    """Queries to the dns listener: names that are fresh and names that are in the cache."""
    sock = talk.udp_socket()
    sock.connect((talk.site.host, talk.site.ports["dns"]))
    talk.ports.append(sock.getsockname()[1])
    for _ in range(talk.choices.randint(1, 5)):
        octets = bytes((192, 0, 2, talk.choices.randrange(256)))
        fresh = f"n{talk.choices.randrange(1 << 32)}" if talk.choices.random() < 0.5 else "kept"
        labels = (fresh, "x" + "-".join(map(str, octets)), "test")
        wire = b"".join(bytes((len(label),)) + label.encode() for label in labels)
        query = talk.choices.randbytes(2) + b"\1\0\0\1" + bytes(6) + wire + b"\0\0\1\0\1"
        for _ in range(TRIES):
            sock.send(query)
            if _is_answered(sock, query, octets):
                break
        else:
            raise TimeoutError("no answer to a query")


def _is_answered(sock: socket.socket, query: bytes, octets: bytes) -> bool:
    """Wait for the right answer. SERVFAIL is none: a resolver asks again."""
    try:
        while (answer := sock.recv(4096))[:2] != query[:2]:
            pass
    except (TimeoutError, ConnectionRefusedError):
        return False
    if answer[3] & 15 == 2:
        time.sleep(RESEND / 2)
        return False
    if not answer.endswith(octets) or answer[12 : len(query)] != query[12:]:
        raise Wrong(f"{answer.hex()} to {query.hex()}")
    return True


def _text(where: Endpoint) -> tuple[bytes, int]:
    return where[0].encode(), where[1]


KINDS: dict[str, Callable[[Conversation], None]] = {
    kind.__name__: kind
    for kind in (
        *(socks5, named, socks4, http_connect, tls, http, bulk, resting, forward, bind),
        *(chain, group, tunnel, associate, associate_chain, uot_stream, connect_udp_stream),
        *(forward_udp, tunnel_udp, dns),
    )
}


# -- the process


class GoodClients(Process):
    """A process with good clients, each on a thread of its own."""

    def __init__(self, begin: Callable[[], None] | None = None) -> None:
        """`begin` is called in the new process, to enter its namespace."""
        self._begin = begin
        super().__init__()

    def begin(self) -> None:
        if self._begin is not None:
            self._begin()

    # -- calls

    def try_all(self, site: Site) -> list[Outcome]:
        """Have a conversation of each kind. Return those that were lost."""
        outcomes = [converse(site, kind, random.Random(kind)) for kind in KINDS]
        return [outcome for outcome in outcomes if outcome.why]

    def start(self, site: Site, count: int) -> None:
        """Start `count` clients of each kind."""
        self._ends = threading.Event()
        # Guards _outcomes.
        self._lock = threading.Lock()
        self._outcomes: list[Outcome] = []
        threading.stack_size(STACK)
        self._threads = [
            threading.Thread(target=self._repeat, args=(site, kind, number), daemon=True)
            for kind in KINDS
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def report(self) -> list[Outcome]:
        """Return the outcomes since the last call."""
        with self._lock:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def end(self) -> list[Outcome]:
        """Let each client end its conversation. Return the last outcomes."""
        self._ends.set()
        for thread in self._threads:
            thread.join()
        return self.report()

    # -- in its process

    def _repeat(self, site: Site, kind: str, number: int) -> None:
        choices = random.Random(f"{kind} {number}")
        self._ends.wait(choices.uniform(0, PAUSE[1]))
        while not self._ends.is_set():
            outcome = converse(site, kind, choices)
            with self._lock:
                self._outcomes.append(outcome)
            self._ends.wait(choices.uniform(*PAUSE))


def converse(site: Site, kind: str, choices: random.Random) -> Outcome:
    """Have one conversation."""
    began, why, wrong = time.monotonic(), "", False
    with ExitStack() as stack:
        talk = Conversation(site, choices, stack)
        try:
            KINDS[kind](talk)
        except Wrong as error:
            why, wrong = f"wrong bytes: {error}", True
        except (OSError, EOFError) as error:
            why = f"{type(error).__name__}: {error}"
    return Outcome(kind, tuple(talk.ports), began, time.monotonic(), why, wrong)
