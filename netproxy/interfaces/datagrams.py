"""Datagrams in batches: runs, arenas, sockets and the packet twin of a stream."""

from __future__ import annotations

from netproxy.typed import (
    TYPE_CHECKING,
    Any,
    Callable,
    Hashable,
    NamedTuple,
    Protocol,
    Sequence,
    TypeAlias,
)

if TYPE_CHECKING:
    # A sockaddr has 2 items for IPv4 and 4 for IPv6; only its own socket reads the rest.
    SocketAddress: TypeAlias = tuple[Any, ...]

    from netproxy.interfaces.accounts import Account
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.connections import Stream
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.services import Counter


class Header(Protocol):
    """Bytes that precede each datagram of a run."""

    data: bytes


class Run:
    """Datagrams of one length in one arena, in order, for one destination.

    Only the last datagram may be shorter.
    """

    __slots__ = ("offsets", "length", "last", "header")

    def __init__(
        self, offsets: Sequence[int], length: int, last: int, header: Header | None = None
    ) -> None:
        """Describe datagrams at `offsets` of an arena.

        `length` is the bytes of each but the last, `last` the bytes of the last one.
        `header` goes before each of them.
        """
        self.offsets = offsets
        self.length = length
        self.last = last
        self.header = header


Span: TypeAlias = tuple[Sequence[int], int, int, Hashable]
"""Datagrams from one peer: their offsets in the arena, the length of each but the last, the
length of the last, and the peer's key.  The key is whatever is cheapest for the socket;
`PacketConn.source` turns it into an address."""


class Arena(Protocol):
    """The memory that one thread receives into, and sends from until its next receive."""

    memory: bytearray
    view: memoryview

    def put(self, data: bytes) -> Run:
        """Copy one datagram to the start of the arena; return it as a run."""


class Batch:
    """The datagrams of one wake-up, in order of arrival.  Valid until the next receive."""

    __slots__ = ("arena", "spans")

    def __init__(self, arena: Arena, spans: Sequence[Span]) -> None:
        self.arena = arena
        self.spans = spans


class Destination(Protocol):
    """Where a socket sends to, prepared once and used for every send."""

    @property
    def sockaddr(self) -> SocketAddress:
        """The sockaddr of the target."""


class Deliverer(Protocol):
    """Delivers datagrams of a packet connection on threads of its own, besides receive()."""

    sink: Callable[[Batch], None] | None
    """Takes what comes; never blocks.  Set by who reads the connection."""

    def nudge(self) -> None:
        """Let wait() return True once, so that its thread does what the sink may not wait for."""


class PacketConn(Protocol):
    """The datagram twin of a stream: one upstream, many targets."""

    member: str
    """The member of a group that made the connection, "" without a group."""
    deliverer: Deliverer | None
    """None if all datagrams come by receive()."""

    @property
    def bound(self) -> Sequence[Address]:
        """The addresses that targets see, at most one of each family; none if they are unknown.

        The host is unspecified if only the port is known.
        """

    def reaches(self, target: Address) -> bool:
        """Return whether the connection is for a target: it may be for another one alone.

        Never blocks.
        """

    def prepare(self, flow: Flow) -> Destination:
        """Return the destination for the flow's target.

        May block for a name that has not been looked up.  Raises DialError.
        """

    def send(self, arena: Arena, run: Run, destination: Any) -> None:
        """Send a run.  Never blocks, never raises; what cannot be sent is counted by reason.

        `destination` is one that prepare() returned (each socket reads its own kind, hence Any).
        """

    def wait(self) -> bool:
        """Block until something may be received; return False once closed."""

    def receive(self, arena: Arena) -> Batch:
        """Return what has arrived.  Does not block."""

    def source(self, peer: Hashable) -> Address:
        """Return the address that the key of a span stands for."""

    def shutdown(self) -> None:
        """Wake the thread in wait(); the descriptor stays open until close()."""

    def close(self) -> None:
        """Close the descriptor.  Only the thread that waits may call this."""


class ReplySocket(Protocol):
    """What replies to a client leave by: a datagram socket, or the client's stream."""

    def reply_destination(self, key: Hashable) -> Destination | None:
        """Return where replies to a peer go, None for a stream, which has one peer.

        A datagram socket replies to the peer's sockaddr, from the local address it used.
        """

    def send(self, arena: Arena, run: Run, destination: Any) -> None:
        """Send a run, as PacketConn.send does."""


class DatagramSocket(ReplySocket, Protocol):
    """A socket that datagrams of clients come to, and by which replies leave."""

    address: Address

    def peer(self, key: Hashable) -> SocketAddress:
        """Return the sockaddr in the key of a peer."""


class PacketHandler(Protocol):
    """Handles datagrams of clients."""

    def handle_packets(self, batch: Batch, local: DatagramSocket) -> None:
        """Handle a batch that came to the socket `local`.

        Never blocks, never raises for bad input, keeps nothing of the arena.
        """


class Framing(Protocol):
    """The codec of one stream: how its frames begin and end."""

    payload_limit: int
    """Bytes."""

    def find(self, memory: bytearray, start: int, end: int) -> tuple[int, int, bytes | None] | None:
        """Return the frame that begins at `start`, if it is whole before `end`; else None.

        The result is where its payload begins, where it ends, and its raw address.  An address
        of None means that the frame is to be skipped: one without a payload, which may end beyond
        `end`, or a datagram whose meaning is unknown.  Raises ProtocolError.
        """

    def prefix(self, address: bytes, size: int) -> bytes:
        """Return what precedes a payload of `size` bytes."""

    def encode(self, target: Address) -> bytes:
        """Return a target as raw address.  Raises ValueError if the stream does not lead there."""

    def parse(self, address: bytes) -> Address:
        """Return the address in a raw one.  Raises ProtocolError."""


class Beside(Protocol):
    """Carries datagrams of a stream beside it, while it can (tunnel.path.flows)."""

    sink: Callable[[Batch], None] | None
    """Takes what has come beside the stream, on any thread; never blocks."""
    gone: Callable[[], None] | None
    """Called once the other end is gone, even if the stream has not ended."""
    attach: Callable[[Stream], bool] | None
    """Goes on with another stream in place of the present one, which may have failed; returns
    False, and leaves it to the caller, if that is not possible.  Any thread; never blocks."""

    def send(self, arena: Arena, run: Run, prefix: bytes) -> bool:
        """Send a run, each datagram behind `prefix`; return False to leave it to the stream."""

    def came_by_stream(self) -> None:
        """Note that datagrams have come by the stream."""

    def hold(self, has_failed: bool) -> bool:
        """Return whether the datagrams go on without the stream, which has ended."""

    def attached(self) -> None:
        """Note that there is a stream again."""

    def take_used(self) -> bool:
        """Return whether a datagram has passed beside the stream since the last call."""

    def close(self) -> None:
        """End with the stream.  May be called again."""


class DirectUpstream(Protocol):
    """Has datagrams go directly to the agents of an upstream (tunnel.direct.client)."""

    def wish(self) -> tuple[bytes, bytes] | None:
        """Return the field of a request that asks for it; None if it cannot be."""

    def connect(self, stream: Stream, target: Address, counter: Counter) -> PacketConn:
        """Return the packet connection of a request with that field; `counter`: of its flow.

        Raises DialError; then the stream is closed.
        """


class RelayedSession(Protocol):
    """A session whose datagrams may go directly (relay.session).  Thread: any."""

    flow: Flow
    conn: PacketConn
    account: Account

    def has_ended(self) -> bool:
        """Return whether the session has ended."""


class WishingStream(Protocol):
    """A client's stream whose datagrams are to go directly to an agent (handler.datagrams).

    Thread: any; never blocks.
    """

    identifier: bytes
    """What the client calls itself: random, the same for all of its streams."""
    port: int
    """The port that the stream has come to."""
    flow: Flow

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""

    def session(self) -> RelayedSession | None:
        """Return the session that relays its datagrams now; None while there is none."""

    def tell(self, data: bytes) -> None:
        """Send a message on the stream."""


class Introducer(Protocol):
    """Has clients and agents talk directly (tunnel.direct.bridge)."""

    def introduce(self, stream: WishingStream) -> None:
        """Let the datagrams of a stream go directly, if they go to an agent that permits it."""


class PacketDependencies(NamedTuple):
    """What packet connections through a proxy need of the daemon.  Thread: any."""

    watch: Callable[[Stream, Callable[[], None]], None]
    """watch(stream, call) makes the call once, on the poller's thread, when the stream is
    readable or has ended.  The call must not block."""
    submit: Callable[[Callable[[], None]], bool]
    """submit(task) runs a task that may block on another thread; False if the queue is full."""
    counter: Counter
