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
from typing import Callable, NamedTuple

from conversation import PATIENCE, RESEND, SIZES, TRIES, Conversation, Frames, Site, Wrong
from conversation import head, reply, same
from load import Process
from rig import Endpoint
from world import NOISE, STACK

from netproxy.interfaces.addresses import Address
from netproxy.protocol import uot
from netproxy.protocol.http import capsule
from netproxy.protocol.http import connect_udp
from tests.e2e.peers import ASSOCIATE, BIND, CONNECT, encode, exactly

BULK = 1 << 20
# Seconds between two conversations of a client, and the rest within a long one.
PAUSE = 0.5, 3.0
REST = 2.0, 8.0


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
        same(exactly(sock, length), expected)


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
            same(exactly(far, len(data)), data)


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
