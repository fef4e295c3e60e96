"""Datagrams in memory, and what the kernel says about them.

Arenas hold datagrams, a Destination says where they go; functions read control messages
and errors.  A train is several datagrams that the kernel delivers, or accepts, as one:
UDP_GRO joins datagrams of one length from one peer, UDP_SEGMENT cuts a message into them.
The sockets are in net.datagram_socket and net.mmsg.
Thread: an arena belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys

from netproxy.interfaces.addresses import ip_text
from netproxy.interfaces.datagrams import Run, Span
from netproxy.interfaces.services import dropped
from netproxy.net.address import from_sockaddr
from netproxy.typed import TYPE_CHECKING, Any, Callable, Hashable, Sequence, TypeAlias

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import DatagramSocket, SocketAddress
    from netproxy.interfaces.services import Counter

# Linux constants that the socket module of Python 3.10 and 3.11 does not name
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
IP_PKTINFO, SO_MEMINFO = 8, 55
IP_RECVERR, IPV6_RECVERR, MSG_ERRQUEUE = 11, 25, 0x2000
IP_ORIGDSTADDR, IPV6_ORIGDSTADDR = 20, 74
ORIGINAL_TARGETS = ((socket.IPPROTO_IP, IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, IPV6_ORIGDSTADDR))
"""Options, and control messages, that have the address that a datagram was sent to."""
_ICMP_ORIGINS = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
_ERROR_MESSAGES = ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR))

_MEMINFO = struct.Struct("=9I")
"""SK_MEMINFO_*; the last value is the number of dropped datagrams."""

ERRORS_A_WAKE = 16
"""Pending ICMP errors that are read at one wake-up."""

_TRIES = 20
"""Tries of a send.  Each pending ICMP error fails one, and up to ERRORS_A_WAKE are pending."""

ICMP_ERRORS = {
    errno.ECONNREFUSED: _TRIES,
    errno.EHOSTUNREACH: _TRIES,
    errno.ENOPROTOOPT: _TRIES,
    errno.EPROTO: _TRIES,
    errno.ENETUNREACH: 2,
    errno.EMSGSIZE: 2,
    errno.EACCES: 2,
}
"""How often a send is tried that fails with an errno which may be that of an ICMP error.

The last three are also errors of the send itself: then the second try fails again.
"""

_DROPS = {
    errno.EMSGSIZE: "too big",
    errno.EAGAIN: "send buffer full",
    errno.ENOBUFS: "send buffer full",
    errno.ECONNREFUSED: "refused",
    errno.EPERM: "not permitted",
    errno.EACCES: "not permitted",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.EBADF: "closed",
}

ControlMessage: TypeAlias = tuple[int, int, bytes]
"""The level, type and data of a control message (cmsg(3))."""

PeerKey: TypeAlias = Any
"""The key of a peer in a span.  Any: only the socket that made it reads it."""

DATAGRAM_LIMIT = 65536
"""Bytes of one receive: no UDP datagram and no GRO train is longer."""

SLOTS = 32
"""Receives of one batch.  More would gain nothing, and other flows must have their turn."""

PITCH = DATAGRAM_LIMIT + 192
"""Bytes between two slots.  Not a power of two: all slots would share the same cache sets."""

SLOT_OFFSETS = range(0, SLOTS * PITCH, PITCH)
PLACES = tuple((offset,) for offset in SLOT_OFFSETS)
"""For each slot the offsets of a span that has one datagram."""

ARENAS_KEPT = 64
"""Spare arenas that a pool keeps; they hold only the pages that were used."""

SEGMENTS_LIMIT = 64
"""Datagrams of a train to be sent: UDP_MAX_SEGMENTS of older kernels."""

SEGMENTED_BYTES = 65000
"""Bytes of a train to be sent: 65,535 less the longest IP and UDP headers."""


def span(place: tuple[int], length: int, stride: int, key: Hashable) -> Span:
    """Return the span of one receive of `length` bytes at `place`.

    It is a train of datagrams of `stride` bytes if GRO gave a stride; 0: one datagram.
    """
    if 0 < stride < length:
        offsets = range(place[0], place[0] + length, stride)
        return offsets, stride, place[0] + length - offsets[-1], key
    return place, length, length, key


class Arena:
    """Memory that a thread receives into, and sends from until its next receive: SLOTS slots."""

    __slots__ = ("memory", "view", "slots")

    def __init__(self, memory: bytearray | None = None) -> None:
        """Use `memory`, SLOTS * PITCH bytes; the kernel supplies its pages as they are used."""
        self.memory = memory or bytearray(SLOTS * PITCH)
        self.view = memoryview(self.memory)
        self.slots = [
            (place, [self.view[place[0] : place[0] + DATAGRAM_LIMIT]]) for place in PLACES
        ]

    def put(self, data: bytes) -> Run:
        """Copy one datagram to the start of the arena; return it as a run."""
        self.view[: len(data)] = data
        return Run([0], len(data), len(data))


class ArenaPool:
    """Arenas for threads that need one only while they are awake.

    Thread: any.  list.pop and list.append are atomic, so that no lock is needed.
    """

    def __init__(self, make: Callable[[], Arena]) -> None:
        """Make new arenas with `make`."""
        self._make = make
        self._spare: list[Arena] = []

    def take(self) -> Arena:
        """Return a spare arena, or a new one."""
        try:
            return self._spare.pop()
        except IndexError:
            return self._make()

    def give(self, arena: Arena) -> None:
        """Give an arena back; at most ARENAS_KEPT are kept."""
        if len(self._spare) < ARENAS_KEPT:
            self._spare.append(arena)

    def release(self) -> None:
        """Let the spare arenas go, with the pages that long trains have used."""
        self._spare.clear()


class PinnedHeader:
    """Bytes that precede datagrams again and again."""

    __slots__ = ("data", "address", "memory")

    def __init__(self, data: bytes) -> None:
        """Hold `data`; net.mmsg_arena.pin() sets the rest before the first send."""
        self.data = data
        self.address = 0
        """The address of `memory` in the process; 0 until it is pinned."""
        self.memory: bytearray | None = None
        """A copy of `data` that is never resized, so that it stays at its address."""


class Destination:
    """A target's sockaddr and the control messages that choose the local address."""

    __slots__ = ("control", "segment_limit", "_sockaddr")

    def __init__(self, control: list[ControlMessage], sockaddr: SocketAddress = ()) -> None:
        """Send to `sockaddr` with `control`."""
        self._sockaddr = sockaddr
        self.control = control
        self.segment_limit = DATAGRAM_LIMIT
        """Bytes of a train's datagrams that the path takes; lowered when a send fails."""

    @property
    def sockaddr(self) -> SocketAddress:
        """The sockaddr."""
        return self._sockaddr


def read_control(messages: Sequence[ControlMessage]) -> tuple[int, ControlMessage | None]:
    """Return the stride of a GRO train (0: none) and what a reply needs to have its source.

    The latter is the control message that makes a reply leave from the local address that
    the datagram came to.  At a transparent socket it has the sockaddr that the client wrote to.
    """
    stride, local = 0, None
    for level, kind, data in messages:
        if level == SOL_UDP and kind == UDP_GRO:
            stride = int.from_bytes(data[:4], sys.byteorder)
        elif level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            # struct in_pktinfo: interface, local address, destination of the header.  Without
            # an interface the routing table decides.
            local = (level, kind, b"\0\0\0\0" + data[4:8] + b"\0\0\0\0")
        elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
            local = (level, kind, data if link_local else data[:16] + b"\0\0\0\0")
        elif (level, kind) in ORIGINAL_TARGETS:
            local = (level, kind, data)
    return stride, local


def reached_address(local: DatagramSocket, key: Hashable) -> Address:
    """Return the local address that the datagrams of a peer come to, by the peer's key."""
    destination = local.reply_destination(key)
    assert isinstance(destination, Destination)
    for level, _, data in destination.control:
        # What read_control() has made.
        if level == socket.IPPROTO_IP:
            return local.address._replace(host=ip_text(data[4:8]))
        interface = int.from_bytes(data[16:20], sys.byteorder)
        scope = f"%{interface}" if interface else ""
        return local.address._replace(host=ip_text(data[:16]) + scope)
    return local.address


def icmp_errno(messages: Sequence[ControlMessage]) -> int:
    """Return the errno of an ICMP error on the error queue (MSG_ERRQUEUE), 0 for another error."""
    for level, kind, data in messages:
        # struct sock_extended_err: the errno, then its origin.
        if (level, kind) in _ERROR_MESSAGES:
            return int.from_bytes(data[:4], sys.byteorder) if data[4] in _ICMP_ORIGINS else 0
    return 0


def dropped_by_kernel(sock: socket.socket) -> int | None:
    """Return how many datagrams the kernel has dropped, modulo 2^32, for want of receive buffer.

    None if an older kernel does not tell, or the socket is closed.
    """
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size)
    except OSError:
        return None
    dropped: int = _MEMINFO.unpack(raw)[-1] if len(raw) == _MEMINFO.size else 0
    return dropped


def drop_reason(code: int | None) -> str:
    """Return the reason that counters use for an errno."""
    return _DROPS.get(code or 0, "other")


def refuse_not_sent(
    counter: Counter, code: int | None, destination: Destination | None, amount: int = 1
) -> None:
    """Count and record `amount` datagrams that the kernel did not take, with an errno."""
    reason = drop_reason(code)
    if not counter.refuse_unrecorded("drops", reason, "", amount):
        asked = from_sockaddr(destination.sockaddr) if destination is not None else ""
        counter.refuse(dropped(reason, asked, errno.errorcode.get(code or 0, "")), amount)


def enable(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Set an option that an older kernel may lack; return whether it was set."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True


def report_local_address(sock: socket.socket, enabled: bool) -> None:
    """Let each receive tell the local address that the datagram came to (PKTINFO)."""
    if sock.family == socket.AF_INET6:
        enable(sock, socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, int(enabled))
    else:
        enable(sock, socket.IPPROTO_IP, IP_PKTINFO, int(enabled))


def count_repeats(memory: bytearray, at: int, header: int, stride: int, end: int) -> int:
    """Return how many frames behind the one at `at` have the same header, and so its length.

    `header` and `stride` are bytes: of the header, and of the whole frame.
    """
    room = (end - at) // stride - 1
    if room <= 0 or memory[at + stride : at + stride + header] != memory[at : at + header]:
        return 0
    for column in range(at, at + header):
        # Compare one byte of all headers: the first difference ends the row of equal frames.
        values = memory[column + stride : column + stride * (room + 1) : stride]
        room = min(room, len(values) - len(values.lstrip(memory[column : column + 1])))
    return room
