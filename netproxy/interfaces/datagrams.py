"""Datagrams in batches: runs, arenas, sockets and the packet twin of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Hashable, NamedTuple, Protocol, Sequence, TypeAlias

if TYPE_CHECKING:
    # A sockaddr has 2 items for IPv4 and 4 for IPv6; only its own socket reads the rest.
    SocketAddress: TypeAlias = tuple[Any, ...]

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


class Batch(NamedTuple):
    """The datagrams of one wake-up, in order of arrival.  Valid until the next receive."""

    arena: Arena
    spans: Sequence[Span]


class Destination(Protocol):
    """Where a socket sends to, prepared once and used for every send."""

    sockaddr: SocketAddress


class PacketConn(Protocol):
    """The datagram twin of a stream: one upstream, many targets."""

    member: str
    """The member of a group that made the connection, "" without a group."""

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


class PacketDependencies(NamedTuple):
    """What packet connections through a proxy need of the daemon.  Thread: any."""

    watch: Callable[[Stream, Callable[[], None]], None]
    """watch(stream, call) makes the call once, on the poller's thread, when the stream is
    readable or has ended.  The call must not block."""
    submit: Callable[[Callable[[], None]], bool]
    """submit(task) runs a task that may block on another thread; False if the queue is full."""
    counter: Counter
