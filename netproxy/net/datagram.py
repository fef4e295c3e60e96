"""UDP sockets that receive and send batches: many datagrams a system call where the kernel can.

Receiving: the kernel hands over a train of equal datagrams from one peer as one
(UDP_GRO), and a wake-up takes all that is there already, never waiting for more.
Sending: neighbours of one length to one destination leave as one message that
the kernel cuts (UDP_SEGMENT); headers go between them as iovecs, nothing is copied.
A socket may be sent on from any thread; an Arena belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from typing import Callable, Hashable, Sequence

from netproxy.interfaces.addresses import Address
from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.services import Counter, Log
from netproxy.net.address import from_sockaddr, to_sockaddr

# Linux constants that the socket module of Python 3.10 and 3.11 does not name
SOL_UDP, UDP_SEGMENT, UDP_GRO = 17, 103, 104
IP_PKTINFO, SO_MEMINFO = 8, 55
IP_RECVERR, IPV6_RECVERR, MSG_ERRQUEUE = 11, 25, 0x2000

DATAGRAM_LIMIT = 65536  # one receive: UDP's largest, which a train of GRO also keeps to
SLOTS = 32  # receives a wake-up takes: more gain nothing, and it is the other flows' turn
PITCH = (
    DATAGRAM_LIMIT + 192
)  # between slots: not a power of two, or all slots fall into the same cache sets
ARENAS_KEPT = 64  # spare arenas held for the next wake-up; they hold only pages that were used
SEGMENTS_LIMIT = 64  # of one UDP_SEGMENT send: UDP_MAX_SEGMENTS of older kernels
SEGMENTED_BYTES = 65000  # of one such send: 65,535 less the largest IP and UDP headers
PLACES = tuple(
    (at,) for at in range(0, SLOTS * PITCH, PITCH)
)  # where in an arena each receive goes
_CONTROL = 192  # room for GRO and PKTINFO together
_SEGMENT = struct.Struct("=H")
_MEMINFO = struct.Struct("=9I")  # SK_MEMINFO_*: the last is the datagrams dropped
TRIES = 20  # of a send: each pending ICMP error eats one, and a wake-up may find as many as ERRORS_A_WAKE
# what such an error looks like; of a send's own errors these are met again by the second try, and then counted
ICMP_ERRORS = {
    errno.ECONNREFUSED: TRIES,
    errno.EHOSTUNREACH: TRIES,
    errno.ENOPROTOOPT: TRIES,
    errno.EPROTO: TRIES,
    errno.ENETUNREACH: 2,
    errno.EMSGSIZE: 2,
    errno.EACCES: 2,
}  # the tries of a send that meets it
ERRORS_A_WAKE = 16  # pending errors read at one wake-up

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


def drop_reason(code: int | None) -> str:
    """The word for an errno in a counter."""
    return _DROPS.get(code or 0, "other")


_ICMP_ORIGINS = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6
_ERROR_MESSAGES = ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR))


def span(place: tuple[int], length: int, stride: int, key: Hashable) -> Span:
    """What one receive brought: `length` bytes, a train of datagrams where GRO gave a `stride`."""
    if 0 < stride < length:
        offsets = range(place[0], place[0] + length, stride)
        return offsets, stride, place[0] + length - offsets[-1], key
    return place, length, length, key


class Arena:
    """Where one thread receives into, and sends from until its next receive."""

    __slots__ = ("memory", "view", "slots")

    def __init__(self, memory: bytearray | None = None) -> None:
        """`memory`: SLOTS * PITCH bytes; the kernel gives them pages as they are used."""
        self.memory = memory or bytearray(SLOTS * PITCH)
        self.view = memoryview(self.memory)
        self.slots = [
            (place, [self.view[place[0] : place[0] + DATAGRAM_LIMIT]]) for place in PLACES
        ]

    def put(self, data: bytes) -> Run:
        """A copy of one datagram at the start of the arena, as a run."""
        self.view[: len(data)] = data
        return Run([0], len(data), len(data))


class ArenaPool:
    """Arenas for threads that need one only while they are awake.  list.pop and append are atomic: no lock."""

    def __init__(self, make: Callable[[], Arena]) -> None:
        self._make = make
        self._spare: list[Arena] = []

    def take(self) -> Arena:
        try:
            return self._spare.pop()
        except IndexError:
            return self._make()

    def give(self, arena: Arena) -> None:
        if len(self._spare) < ARENAS_KEPT:
            self._spare.append(arena)


class PinnedHeader:
    """Bytes that go before datagrams again and again."""

    __slots__ = ("data", "address", "memory")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.address = 0  # of `memory`, once net.mmsg has pinned them
        self.memory: bytearray | None = None


class Destination:
    """Where to, and with which local address; made once, used for every send."""

    __slots__ = ("sockaddr", "control", "segment_limit")

    def __init__(self, sockaddr: tuple, control: list[tuple[int, int, bytes]]) -> None:
        self.sockaddr = sockaddr
        self.control = control
        self.segment_limit = (
            DATAGRAM_LIMIT  # bytes of a segment that the path there takes: learnt by failing
        )


class DatagramSocket:
    """A UDP socket.  Its peers' keys are sockaddrs, with more around them where the local side matters too."""

    __slots__ = (
        "socket",
        "address",
        "closed",
        "_first",
        "_keyed",
        "_tag",
        "_counter",
        "_segment_limit",
        "_overflow",
        "_log",
        "activated",
    )

    def __init__(
        self,
        sock: socket.socket,
        counter: Counter,
        log: Log,
        keyed: bool = False,
        tag: bytes = b"",
        trains: bool = True,
    ) -> None:
        """`keyed`: the local address that a datagram came to is part of its peer's key; `tag` as well.

        `trains`: send runs as one where the kernel can cut them.
        """
        self.socket = sock
        self.address = from_sockaddr(sock.getsockname())
        self.closed = False
        self.activated = (
            False  # by the service manager (net.passed): who waits looks at `closed` now and then
        )
        self._first = bytearray(1)
        self._keyed = keyed
        self._tag = tag
        self._counter = counter
        self._log = log
        self._segment_limit = (
            DATAGRAM_LIMIT if trains and enable(sock, SOL_UDP, UDP_SEGMENT, 0) else 0
        )
        self._overflow = 0

    def wait(self) -> bool:
        """Blocks until there is something to receive; False once shut down."""
        if not self.closed:
            try:  # a look at the first datagram: waits in one call, and for less than poll() costs
                self.socket.recv_into(self._first, 1, socket.MSG_PEEK)
            except OSError:
                self._read_errors()
        return not self.closed

    def _read_errors(self) -> None:
        """ICMP errors of earlier sends, each with the target it is about.  They end nothing (RFC 4787 REQ-12)."""
        for _ in range(ERRORS_A_WAKE):
            try:
                _, control, _, target = self.socket.recvmsg(
                    0, _CONTROL, MSG_ERRQUEUE | socket.MSG_DONTWAIT
                )
            except OSError:
                return
            # sock_extended_err: the errno, then who found it; what this machine found itself, send() has counted
            code, origin = next(
                (
                    (int.from_bytes(data[:4], sys.byteorder), data[4])
                    for level, kind, data in control
                    if (level, kind) in _ERROR_MESSAGES
                ),
                (0, 0),
            )
            if origin not in _ICMP_ORIGINS:
                continue
            self._counter.count("icmp", drop_reason(code))
            self._log.debug("%s answered by ICMP: %s", from_sockaddr(target), drop_reason(code))

    def receive_waiting(self, arena: Arena) -> Batch:
        """What is there, after waiting for the first of it; nothing once shut down.

        For a thread that keeps an arena to itself: one system call where wait() and receive() are two.
        """
        return self.receive(arena) if self.wait() else Batch(arena, [])

    def receive(self, arena: Arena) -> Batch:
        """All that is there, at most SLOTS receives of it; maybe nothing.  Does not block."""
        spans: list[Span] = []
        errors = 0
        receive = self.socket.recvmsg_into
        plain = not (self._keyed or self._tag)
        for place, slot in arena.slots:
            try:
                length, control, flags, peer = receive(slot, _CONTROL, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:  # an ICMP error of an earlier send, which wait() counts
                errors += 1
                if self.closed or error.errno == errno.EBADF or errors > ERRORS_A_WAKE:
                    break
                continue
            if not peer:  # shut down
                break
            if flags & socket.MSG_TRUNC:
                self._counter.count("drops", "truncated")
                continue
            if not control and plain:
                spans.append((place, length, length, peer))
            else:
                stride, local = self._read_control(control)
                key = peer if plain else (peer, local, self._tag)
                spans.append(span(place, length, stride, key))
        return Batch(arena, spans)

    def peer(self, key: Hashable) -> tuple:
        """The sockaddr in a peer's key."""
        return key[0] if self._keyed or self._tag else key

    def reply_destination(self, key: Hashable) -> Destination:
        """Where replies to this peer go: to its sockaddr, from the local address it has used."""
        if not (self._keyed or self._tag):
            return Destination(key, [])
        sockaddr, local, _ = key
        return Destination(sockaddr, [local] if local else [])

    def destination(self, target: Address) -> Destination:
        """ValueError for a name, or an address of a family that this socket does not have."""
        return self._make_destination(to_sockaddr(target, self.socket.family))

    def _make_destination(self, sockaddr: tuple) -> Destination:
        return Destination(sockaddr, [])

    def send(self, arena: Arena, run: Run, destination: Destination) -> None:
        """Never blocks, never raises; what cannot go is counted by reason."""
        offsets, length = run.offsets, run.length
        segment = length + (len(run.header.data) if run.header else 0)
        if len(offsets) == 1:
            self._send_each(arena, run, offsets, destination)
            return
        # a train cannot end with an empty datagram
        if segment > min(self._segment_limit, destination.segment_limit) or not (
            segment and (run.last or run.header)
        ):
            self._send_each(arena, run, offsets, destination)
            return
        most = max(1, min(SEGMENTS_LIMIT, SEGMENTED_BYTES // segment))
        for first in range(0, len(offsets), most):
            self._send_segmented(arena, run, offsets[first : first + most], segment, destination)

    def _send_segmented(
        self, arena: Arena, run: Run, offsets: Sequence[int], segment: int, destination: Destination
    ) -> None:
        if len(offsets) < 2 or segment > destination.segment_limit or not self._segment_limit:
            self._send_each(arena, run, offsets, destination)
            return
        view, length = arena.view, run.length
        parts = [view[at : at + length] for at in offsets]
        if offsets[-1] == run.offsets[-1]:
            parts[-1] = view[offsets[-1] : offsets[-1] + run.last]
        if run.header:
            parts = [part for payload in parts for part in (run.header.data, payload)]
        control = [*destination.control, (SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(segment))]
        outcome = self._send_message(parts, control, destination.sockaddr)
        if outcome:
            self._segmented_failed(arena, run, offsets, (outcome, segment), destination)

    def _segmented_failed(
        self,
        arena: Arena,
        run: Run,
        offsets: Sequence[int],
        failure: tuple[int, int],
        destination: Destination,
    ) -> None:
        """`failure`: the errno and the segment's length.  What the kernel cannot cut goes singly, now and from now on."""
        outcome, segment = failure
        if outcome == errno.EIO:  # the device cannot: never again
            self._segment_limit = 0
        elif outcome in (
            errno.EINVAL,
            errno.EMSGSIZE,
        ):  # longer than the path: not segments of that length
            destination.segment_limit = min(destination.segment_limit, segment - 1)
        if outcome in (errno.EIO, errno.EINVAL, errno.EMSGSIZE):
            self._send_each(arena, run, offsets, destination)
        else:
            self._counter.count("drops", drop_reason(outcome), len(offsets))

    def _send_each(
        self, arena: Arena, run: Run, offsets: Sequence[int], destination: Destination
    ) -> None:
        view = arena.view
        for at in offsets:
            payload = view[at : at + (run.last if at == run.offsets[-1] else run.length)]
            parts = [run.header.data, payload] if run.header else [payload]
            outcome = self._send_message(parts, destination.control, destination.sockaddr)
            if outcome:
                self._counter.count("drops", drop_reason(outcome))

    def _send_message(self, parts: list, control: list, sockaddr: tuple) -> int:
        """0 or the errno."""
        tries = 0
        while True:
            try:
                self.socket.sendmsg(parts, control, socket.MSG_DONTWAIT, sockaddr)
                return 0
            except OSError as error:
                outcome = error.errno or errno.EIO
            tries += 1
            if tries >= ICMP_ERRORS.get(outcome, 1):
                return outcome

    def count_overflow(self) -> None:
        """Counts what the kernel has dropped since the last call, for want of room in the receive buffer.

        Asked for now and then: a control message with each datagram (SO_RXQ_OVFL) would cost every one of them.
        """
        try:
            raw = self.socket.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size)
        except OSError:
            return  # an older kernel, or closed
        total = _MEMINFO.unpack(raw)[-1] if len(raw) == _MEMINFO.size else 0
        if total != self._overflow:
            self._counter.count(
                "drops", "receive buffer full", (total - self._overflow) % (1 << 32)
            )
            self._overflow = total

    def shutdown(self) -> None:
        """Ends wait() and receive() for good; the descriptor stays until close()."""
        self.closed = True
        if self.activated:
            return
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ENOTCONN, though it has woken the reader

    def close(self) -> None:
        self.closed = True
        self.count_overflow()
        self.socket.close()

    def _read_control(self, control: list) -> tuple[int, tuple | None]:
        """GRO's stride (0: none) and the control message that makes a reply leave from the address used."""
        stride, local = 0, None
        for level, kind, data in control:
            if level == SOL_UDP and kind == UDP_GRO:
                stride = int.from_bytes(data[:4], sys.byteorder)
            elif level == socket.IPPROTO_IP and kind == IP_PKTINFO:
                # in_pktinfo: index, the local address, the header's destination; no index: the route decides
                local = (level, kind, b"\0\0\0\0" + data[4:8] + b"\0\0\0\0")
            elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
                link_local = data[0] == 0xFE and data[1] & 0xC0 == 0x80
                local = (level, kind, data if link_local else data[:16] + b"\0\0\0\0")
        return stride, local


def enable(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Sets an option that an older kernel may lack."""
    try:
        sock.setsockopt(level, option, value)
    except OSError:
        return False
    return True
