"""Connections: readers, streams, and what a handler does with a connection.

A handler writes its handshake once, as a generator over the codecs.  The generator yields a
Need for everything that it cannot go on without: more bytes, a connection to a target, a call
that may block.  A driver (listener.handshake_driver) resumes the generator with the result: on
the poller's thread as long as nothing blocks, and on a pool thread from then on.
"""

from __future__ import annotations

import enum
import select

from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from socket import socket as TcpSocket
    from typing import Any, Callable, Generator, Sequence

    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import PortRoute
    from netproxy.interfaces.services import Trace
    from netproxy.interfaces.sockets import SocketCalls

T = TypeVar("T")

READABLE = select.POLLIN | 0x2000
"""Events to wait for: data, or the end of what the peer sends (POLLRDHUP)."""


class Descriptor(Protocol):
    """Anything that poll(2) can watch."""

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""


Watched: TypeAlias = "Sequence[tuple[Descriptor, int]]"
"""What to watch, each with the events of poll(2)."""

Ready: TypeAlias = Mapping[int, int]
"""Events by descriptor; empty when the time is up."""


NeedResult: TypeAlias = "Any"
"""What a handshake gets for a need.  Any: each need has its own result type."""


class Progress(enum.Enum):
    """How far a need has come without blocking."""

    PENDING = "pending"
    """Watch `watched()`, then call proceed()."""
    NEEDS_THREAD = "needs a thread"
    """Only block() can satisfy the need."""


class Need(Protocol):
    """Something that a handshake waits for.

    Only the thread that currently drives the handshake calls these methods.  Each may
    raise a NetProxyError, which the driver throws into the generator.
    """

    light: bool
    """True if the poller's thread may resume the generator once the need is satisfied."""

    def begin(self) -> NeedResult | Progress:
        """Return the result if it is there, else a Progress.  Never blocks."""

    def watched(self) -> tuple[Watched, float | None]:
        """Return what to watch, and for how many seconds (None: no limit)."""

    def proceed(self, ready: Ready) -> NeedResult | Progress:
        """Return the result, or PENDING, after an event or, if `ready` is empty, too late."""

    def block(self) -> NeedResult:
        """Return the result; may block."""


Steps: TypeAlias = "Generator[Need, NeedResult, T]"
"""A computation that yields needs and returns T."""


class Blocking:
    """The need for the result of a call that may block."""

    __slots__ = ("block",)

    light = False

    def __init__(self, call: Callable[[], NeedResult]) -> None:
        self.block = call

    def begin(self) -> Progress:
        """Return NEEDS_THREAD."""
        return Progress.NEEDS_THREAD

    def watched(self) -> tuple[Watched, float | None]:
        """Return nothing to watch."""
        return (), None

    def proceed(self, ready: Ready) -> Progress:
        """Return NEEDS_THREAD."""
        return Progress.NEEDS_THREAD


class Events:
    """The need for an event on some descriptors.  The result is a Ready, empty when too late."""

    __slots__ = ("_watched", "_seconds", "light", "idle")

    def __init__(
        self, watched: Watched, seconds: float | None, light: bool = False, idle: bool = False
    ) -> None:
        """Watch for at most `seconds`.  `idle`: as in Wait."""
        self._watched = watched
        self._seconds = seconds
        self.light = light
        self.idle = idle

    def begin(self) -> Progress:
        """Return PENDING."""
        return Progress.PENDING

    def watched(self) -> tuple[Watched, float | None]:
        """Return what was given."""
        return self._watched, self._seconds

    def proceed(self, ready: Ready) -> Ready:
        """Return the events."""
        return ready

    def block(self) -> NeedResult:
        """Not reached: the need never asks for a thread."""
        raise AssertionError


class Wait(NamedTuple):
    """What a connection without a running handshake waits for, while it holds no thread.

    With an empty `watched` a pool thread goes on at once.
    """

    watched: Watched
    seconds: float | None
    """After these seconds resume(False) is called; None: never."""
    resume: Callable[[bool], Wait | None]
    """Goes on, on a pool thread; its argument tells whether an event came in time."""
    idle: bool = False
    """True if nothing is in progress, so that a daemon that stops need not wait for it."""
    step: Callable[[int, int], Wait | None] | None = None
    """Goes on in place of resume(True), on the poller's thread: step(descriptor, events) must
    not block."""
    fixed: bool = False
    """True if `seconds` are the total; otherwise each event starts them again."""
    timed: bool = False
    """True if `step` goes on when the time is up as well, with the descriptor -1."""


class Reader(Protocol):
    """What a codec reads from.  Both methods raise EndOfStream if the peer closes too early."""

    def read_exactly(self, count: int) -> Steps[bytes]:
        """Read `count` bytes."""

    def read_until(self, separator: bytes, limit: int) -> Steps[bytes]:
        """Read up to and including `separator`.

        Raises LimitError if it is not within `limit` bytes.
        """


class Stream(Need, Reader, Protocol):
    """A connected socket with its unread bytes, and the need for more of them.

    net.stream.Stream is the implementation and has the full docstrings.
    """

    socket: TcpSocket
    light: bool
    """True if its bytes cost so little that the poller's thread may handle them."""
    plain: bool  # the peer's bytes are what the socket holds; False within TLS
    handshaking: bool  # until the client has said what it wants
    hang_up: int  # events after which nothing can reach the peer (interfaces.sockets.HANG_UP)
    deadline: float | None  # monotonic; None without a limit
    calls: SocketCalls[Any]
    """What reads and writes the socket.  Any: each kind of socket has its own calls."""
    trace: Trace | None
    """Writes the steps of the connection to the log, at level debug; None at any other."""
    member: str  # of the group that made the connection, "" without a group
    evicted: str
    """Why the daemon ends the connection, "" if it does not.  The record's flow empties it."""
    login: tuple[str, object] | None  # user and stamp of the client's last request
    port_route: PortRoute | None  # that an sni listener has chosen; None without one

    @property
    def open(self) -> bool:
        """False once closed."""

    def become(self, sock: TcpSocket, calls: SocketCalls[Any], unread: bytes = b"") -> None:
        """Go on with another socket and its unread bytes.  Any: as in calls."""

    def move_to(self, other: Stream) -> None:
        """Hand socket and unread bytes over; only close() may follow."""

    def replace(self, other: Stream) -> None:
        """Close the socket, and go on with that of another stream."""

    def limit(self, seconds: float | None) -> None:
        """Give everything that follows `seconds` in total; None: no limit."""

    def pace(self, seconds: float) -> None:
        """Give each single wait `seconds`."""

    def peek(self) -> Steps[int]:
        """Return the value of the next byte and leave it unread."""

    def read_some(self, limit: int) -> Steps[bytes]:
        """Read 1 to `limit` bytes as they come; b"" at the end of the stream."""

    def write_all(self, data: bytes) -> Steps[None]:
        """Send all of `data`."""

    def close_staged(self) -> Steps[None]:
        """Close so that the peer can read everything we wrote."""

    def reply(self, data: bytes) -> None:
        """Send the few bytes of a handshake without waiting."""

    def write(self, data: bytes) -> None:
        """Send all of `data`; blocks."""

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send as many bytes as go without waiting; return how many."""

    def unread(self) -> bytes:
        """Return the bytes that were read ahead."""

    def put_back(self, data: bytes) -> None:
        """Make bytes that were read unread again."""

    def read_ahead(self) -> bool:
        """Keep what has come; return False at the end of the stream."""

    def receive(self, limit: int) -> memoryview | bytes | None:
        """Return about `limit` bytes that are there, b"" at the end, None for nothing yet."""

    def wait(self, events: int) -> None:
        """Block until one of the events of poll(2)."""

    def skip(self) -> bool:
        """Drop what has come; return False if the stream has ended or failed."""

    def local_address(self) -> Address:
        """Return the local address.  Raises StreamError."""

    def peer_address(self) -> Address:
        """Return the peer's address.  Raises StreamError."""

    def detach(self) -> tuple[TcpSocket, bytes]:
        """Return the non-blocking socket and the unread bytes; only close() may follow."""

    def idle(self) -> float:
        """Return the seconds since a byte came or went.  Thread: any."""

    def shutdown(self) -> None:
        """End both directions: a thread that waits for the stream sees its end.  Thread: any."""

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on."""

    def on_close(self, call: Callable[[], None]) -> None:
        """Make a call, once, when the stream is closed."""

    def reset(self) -> None:
        """Close with RST, so that the peer cannot take a cut stream for a complete one."""

    def close(self) -> None:
        """Close the socket."""


Handshake: TypeAlias = "Steps[Wait | None]"
"""A handler at work on one connection.  It returns what the connection waits for afterwards,
None if the connection has ended."""


class Handler(Protocol):
    """Handles connections."""

    def handle(self, stream: Stream, client: Address) -> Handshake:
        """Handle a connection from `client`.  The handler owns the stream until the end.

        The deadline of the handshake is already running (Stream.limit).
        """
