"""The contract page: the types that the rooms hand to each other.

Whoever implements one of these protocols says so only by its shape; nothing
here holds state or does I/O.  Addresses of peers stay the raw sockaddr tuples
that the kernel gave; an Address is a target, its host canonical (protocol.host).
"""
from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Any, Callable, Hashable, Iterable, NamedTuple, Protocol, Sequence

from netproxy.errors import Reason

_MAPPED = b"\0" * 10 + b"\xff\xff"


class Address(NamedTuple):
    """A target: `host` is an IP literal in canonical text or a lower-case name; `port` 0-65535."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Passed(Address):
    """Where to listen by a socket that the service manager has bound: `host` says which, `port` is 0 or means nothing."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.host.partition(":")[2]

    def __str__(self) -> str:
        return self.host


def ip_text(packed: bytes) -> str:
    """Text of 4 or 16 bytes of address, v4-mapped unwrapped."""
    if len(packed) == 16 and packed.startswith(_MAPPED):
        packed = packed[12:]
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def pack_ip(host: str) -> bytes | None:
    """4 or 16 bytes of a canonical literal without scope, None for a name."""
    try:
        if ":" in host:
            return inet_pton(AF_INET6, host)
        # a canonical host that ends in a digit is an address: parse_host has turned the rest away
        return inet_pton(AF_INET, host) if host[-1:].isdigit() else None
    except OSError:
        return None


class Network(NamedTuple):
    """A network in CIDR notation: the first bits of its addresses as a number, and how many follow."""

    size: int               # bytes of its addresses: 4 or 16
    prefix: int
    shift: int              # bits behind the prefix

    @classmethod
    def parse(cls, text: str) -> Network:
        """ "10.0.0.0/8", or a single address; ValueError for anything else and for bits set behind the prefix.

        A network of v4-mapped addresses is that of the IPv4 addresses, as which they are looked for.
        """
        host, slash, bits_text = text.partition("/")
        packed = pack_ip(host)
        if packed is None or (slash and not (bits_text.isascii() and bits_text.isdigit() and len(bits_text) < 4)):
            raise ValueError(f"'{text}' is no network")
        shift = len(packed) * 8 - (int(bits_text) if slash else len(packed) * 8)
        value = int.from_bytes(packed, "big")
        if shift < 0 or (value >> shift) << shift != value:
            raise ValueError(f"'{text}' is no network: its prefix is too long, or bits behind it are set")
        if packed.startswith(_MAPPED) and shift <= 32:
            return cls(4, (value & 0xffffffff) >> shift, shift)
        return cls(len(packed), value >> shift, shift)

    def holds(self, host: str) -> bool:
        """Whether a literal address is in it, its scope ignored; a name never is."""
        packed = pack_ip(host.partition("%")[0])
        return packed is not None and len(packed) == self.size and int.from_bytes(packed, "big") >> self.shift == self.prefix


_LOOPBACK = (Network.parse("127.0.0.0/8"), Network.parse("::1"))


def is_loopback(host: str) -> bool:
    """Whether a literal address is this machine's own, as nobody else can reach it."""
    return any(network.holds(host) for network in _LOOPBACK)


TUNNEL_AGENT = "tunnel-agent"       # the listener of flows that the bridge of a tunnel asks its agent for


class Flow(NamedTuple):
    """Everything that a rule may look at."""

    network: str          # "tcp" or "udp"
    client: Address
    target: Address
    listener: str         # "" for what NetProxy itself wants: the way to another proxy
    user: str             # "" where nobody logged in
    addresses: tuple[Address, ...] = ()     # where the target is, found and allowed (Router); () while nobody has looked

    def to_hop(self, server: Address, network: str = "tcp") -> Flow:
        """What leads to another proxy: the client stays, its target's addresses and rules do not matter."""
        return Flow(network, self.client, server, "", self.user)


class Reader(Protocol):
    """What a codec reads from.  Both raise EndOfStream when the peer closes too early."""

    def read_exactly(self, count: int) -> bytes: ...

    def read_until(self, separator: bytes, limit: int) -> bytes:
        """Up to and including `separator`; LimitError when it is not within `limit` bytes."""


class Log(Protocol):
    def debug(self, message: str, *values: object) -> None: ...
    def info(self, message: str, *values: object) -> None: ...
    def warning(self, message: str, *values: object) -> None: ...
    def error(self, message: str, *values: object) -> None: ...
    def limited(self, key: Hashable, message: str, *values: object) -> None:
        """A warning, at most once a minute for each `key`."""
    def auth_failed(self, client: str, user: str, listener: str) -> None:
        """A login that was refused; `client` is its address, `user` what it called itself."""
    def exception(self, doing: str) -> None:
        """The exception being handled, with its traceback, as one record."""


class Counter(Protocol):
    def count(self, name: str, reason: str, amount: int = 1) -> None: ...


class Admission(Protocol):
    """Who may connect to a listener, and how many at once."""

    def enter(self, client: str) -> str:
        """Counts one connection of a client address in, or says in a word why not ("" is yes)."""

    def leave(self, client: str) -> None: ...


class Record(NamedTuple):
    """One finished connection or UDP session, for the access log."""

    flow: Flow
    way: str              # the dialer's name
    sent: int             # bytes, client to target
    received: int         # bytes, target to client: of forwarded HTTP what the client got, heads and framing with it
    seconds: float
    ended: str            # in the words of a log line: "closed", "idle", "connection refused"
    datagrams_sent: int = 0
    datagrams_received: int = 0
    number: int = 0       # of the Live that it was, 0 for what never lived


class Moved(NamedTuple):
    """What a flow has carried so far."""

    sent: int               # bytes, client to target
    received: int           # bytes, target to client
    datagrams_sent: int = 0
    datagrams_received: int = 0


class Live(Protocol):
    """A connection or a UDP session under way.  Asked from any thread."""

    flow: Flow
    number: int             # given by the observer, when it began
    dialer: Dialer
    started: float          # monotonic

    def moved(self) -> Moved: ...

    def idle(self) -> float:
        """Seconds since a byte or a datagram came from the client or went to it."""

    def kill(self) -> None:
        """It ends soon, and its record says that it was killed."""


class Observer(Protocol):
    def began(self, live: Live, dialled: float | None = None) -> None:
        """`dialled`: the seconds that its dial took, None where nothing was dialled or none was waited for."""

    def finished(self, record: Record) -> None: ...


class Dialer(Protocol):
    """A way out.  Wraps the dialer of the hop before it, so that a chain needs no engine.

    One that also has `begin(flow)` may be asked by who must not wait: it gives a net.connect.Dialling, or None where
    that is not enough, and raises DialError.
    """

    name: str
    carries: frozenset[str]     # of "tcp", "udp", "bind"
    refusal: Reason             # for what it does not carry
    symmetric: bool             # a packet connection of its reaches the flow's target alone
    takes_names: bool           # names go to a proxy as they are; else the flow's addresses are dialled

    def dial(self, flow: Flow) -> Any:
        """A net.stream.Stream connected to the flow's target; DialError."""

    def dial_packet(self, flow: Flow) -> PacketConn:
        """An open packet connection for all datagrams of one client; DialError."""

    def pinned(self, flow: Flow) -> Dialer:
        """The same way, with the choices that groups on it have made for a flow of datagrams; itself where there are none."""


class Route(NamedTuple):
    """A decision: the way out, and the flow with the addresses that were looked up for it."""

    dialer: Dialer
    flow: Flow


class Router(Protocol):
    """DialError for what may not be reached, or is not found."""

    def route(self, flow: Flow) -> Route:
        """May wait for a name."""

    def route_at_once(self, flow: Flow) -> Route | None:
        """Never waits: None where a name must be looked up first."""

    def ways(self, flow: Flow) -> Iterable[Dialer]:
        """All that a flow like this may take, wherever it goes."""


class Resolver(Protocol):
    def resolve(self, target: Address, seconds: float = ...) -> Sequence[Address]:
        """The addresses of a target, at least one; waits for them, `seconds` at the most.  DialError(NAME, TIMEOUT)."""

    def known(self, target: Address) -> Sequence[Address] | None:
        """The same without waiting: None where nobody has asked lately.  DialError(NAME) for what lately had none."""


class Gatekeeper(Protocol):
    """Which addresses may be reached."""

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Those of `addresses` that a flow may be dialled to, at least one; DialError(DENIED, LOOP)."""


class Run:
    """Datagrams of one length in one arena, in order, for one destination; only the last may be shorter.

    `offsets` are positions in the arena (a list, or a range), `length` bytes each, `last` that of the final one;
    `header` (net.datagram.Pinned) goes before each of them, or is None.
    """

    __slots__ = ("offsets", "length", "last", "header")

    def __init__(self, offsets: Sequence[int], length: int, last: int, header: Any = None) -> None:
        self.offsets = offsets
        self.length = length
        self.last = last
        self.header = header


# Datagrams from one peer, one after the other: where each begins in the arena (one place, or a range of them), the length
# of all, that of the last, which may be shorter, and the peer's key: whatever the socket finds cheapest; PacketConn.source
# explains it.
Span = tuple[Sequence[int], int, int, Hashable]


class Batch(NamedTuple):
    """What was there when a reader woke, in order of arrival.  Valid until the next receive into the arena."""

    arena: Any                  # net.datagram.Arena
    spans: Sequence[Span]


class PacketConn(Protocol):
    """The datagram twin of a stream: one upstream, many targets."""

    def prepare(self, flow: Flow) -> Any:
        """What send() takes as destination for the flow's target.  May block for a name that nobody has looked up; DialError."""

    def send(self, arena: Any, run: Run, destination: Any) -> None:
        """Never blocks, never raises; what cannot go is counted by reason."""

    def wait(self) -> bool:
        """Blocks until something may be received; False once closed."""

    def receive(self, arena: Any) -> Batch: ...

    def source(self, peer: Hashable) -> Address: ...

    def shutdown(self) -> None:
        """Wakes the thread in wait(); the descriptor stays until close()."""

    def close(self) -> None: ...


STARTING, SERVING, DRAINING = "starting", "serving", "draining"     # what the daemon says that it does

READABLE = 0x2001       # of a Pause: POLLIN, and POLLRDHUP, the end of what the peer sends


class Pause(NamedTuple):
    """What a handler returns that would only wait: its thread serves others meanwhile.

    `watched` are sockets with the events of poll(2) to wait for; it goes on with `resume(True)` when one of these or an
    error has come, with `resume(False)` after `seconds`, None for never.
    `expendable`: nothing is under way, so that a daemon that stops need not wait for it.
    Where nothing is `watched` a thread goes on at once.
    `step(descriptor, events)` goes on in place of `resume(True)`, where what is to be done never waits: the thread that
    watches does it itself, without waking another.
    """

    watched: Sequence[tuple[Any, int]]
    seconds: float | None
    resume: Callable[[bool], Pause | None]
    expendable: bool = False
    step: Callable[[int, int], Pause | None] | None = None


class Handler(Protocol):
    """Takes connections.  Blocks; owns the stream until it returns None.  A Pause means that it is not done yet.

    The stream comes with its handshake's deadline running (net.stream.Stream.limit).

    One that also has `attempt(stream, client)`, with the same outcome, gets by with no thread of a pool while nothing has
    to be waited for but the client (net.stream.Stream.attempt): that is asked first, and never blocks.
    """

    def handle(self, stream: Any, client: Address) -> Pause | None: ...


class PacketHandler(Protocol):
    """Takes datagrams.  Never blocks, never raises for bad input, keeps nothing of the arena."""

    def handle_packets(self, batch: Batch, local: Any) -> None:
        """`local` is the net.datagram.DatagramSocket they came in by, and by which replies leave."""


class Listener(Protocol):
    """A bound socket and the thread that reads it."""

    network: str                # "tcp" or "udp"
    address: Address
    handler: Any

    def start(self) -> None: ...
    def stop(self) -> None:
        """No new connection or datagram is taken after this returns."""


class Expirable(Protocol):
    def expire(self, now: float) -> Sequence[Callable[[], None]]:
        """What died by `now` (monotonic seconds), as calls that close it; made outside every lock."""


Reply = dict[Reason, int]       # the shape of each protocol's table of replies
