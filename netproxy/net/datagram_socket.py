"""UDP sockets that receive and send batches of datagrams.

BatchSocket uses the socket module: one recvmsg() for each slot of an arena, one
sendmsg() for each train or datagram.  net.mmsg.MmsgSocket replaces these calls by
faster ones and shares the rest: waiting, ICMP errors, counters, the end.
Thread: one receives, any may send.
"""

from __future__ import annotations

import errno
import socket
import struct

from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.services import refuse_dropped
from netproxy.net import datagram
from netproxy.net.address import from_sockaddr, to_sockaddr
from netproxy.net.datagram import (
    DATAGRAM_LIMIT,
    ERRORS_A_WAKE,
    ICMP_ERRORS,
    MSG_ERRQUEUE,
    SEGMENTED_BYTES,
    SEGMENTS_LIMIT,
    SOL_UDP,
    UDP_SEGMENT,
    Arena,
    Destination,
    drop_reason,
    refuse_not_sent,
    read_control,
    span,
)
from netproxy.typed import TYPE_CHECKING, Any, Generic, Sequence, TypeAlias, TypeVar

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import SocketAddress
    from netproxy.interfaces.services import Counter, Log
    from netproxy.net.datagram import ControlMessage, PeerKey

_CONTROL = 192
"""Bytes for the control messages of one receive: GRO and PKTINFO together."""
_PEEK = int(socket.MSG_PEEK)
_ERROR_FLAGS = MSG_ERRQUEUE | socket.MSG_DONTWAIT

_SEGMENT = struct.Struct("=H")
"""The data of the control message UDP_SEGMENT: the bytes of a train's datagrams."""

# The arena and the destination of one level of batching.
A = TypeVar("A", bound=Arena)
D = TypeVar("D", bound=Destination)


class BatchSocket(Generic[A, D]):
    """A UDP socket with the arenas and the destinations of its level of batching.

    The key of a peer is its sockaddr, or (sockaddr, local address, tag); see __init__.
    """

    __slots__ = (
        "socket",
        "address",
        "closed",
        "is_given",
        "_peeked",
        "plain_keys",
        "_tag",
        "counter",
        "_segment_limit",
        "_overflow",
        "_log",
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
        """Take over a bound socket.

        `keyed`: the local address that a datagram came to becomes part of its peer's key.
        `tag`, unless empty, becomes part of every key.  `trains`: send trains if the kernel can.
        """
        self.socket = sock
        self.address = from_sockaddr(sock.getsockname())
        self.closed = False
        self.is_given = False
        """True: never shut it down.  wait() looks at `closed` now and then (LOOK_SECONDS)."""
        self._peeked = bytearray(1)
        self.plain_keys = not (keyed or tag)
        self._tag = tag
        self.counter = counter
        self._log = log
        can_segment = trains and datagram.enable(sock, SOL_UDP, UDP_SEGMENT, 0)
        self._segment_limit = DATAGRAM_LIMIT if can_segment else 0
        """Bytes of a train's datagrams; 0: the kernel or the device cannot cut trains."""
        self._overflow = 0

    # -- receiving

    def wait(self) -> bool:
        """Block until something may be received; return False once shut down."""
        if not self.closed:
            try:
                # Peeking at a byte waits in one call, which costs less than poll().
                self.socket.recv_into(self._peeked, 1, _PEEK)
            except OSError:
                self._read_errors()
        return not self.closed

    def _read_errors(self) -> None:
        """Count and log pending ICMP errors.  They end nothing (RFC 4787 REQ-12)."""
        for _ in range(ERRORS_A_WAKE):
            try:
                _, messages, _, target = self.socket.recvmsg(0, _CONTROL, _ERROR_FLAGS)
            except OSError:
                return
            # Local errors have been counted by send().
            if code := datagram.icmp_errno(messages):
                reason = drop_reason(code)
                self.counter.count("icmp", reason)
                self._log.debug("%s answered by ICMP: %s", from_sockaddr(target), reason)

    def receive(self, arena: A) -> Batch:
        """Return what has arrived, at most SLOTS receives.  Does not block."""
        spans: list[Span] = []
        errors = 0
        receive = self.socket.recvmsg_into
        plain = self.plain_keys
        for place, slot in arena.slots:
            try:
                length, messages, flags, peer = receive(slot, _CONTROL, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                # An ICMP error of an earlier send; wait() counts it.
                errors += 1
                if self.closed or error.errno == errno.EBADF or errors > ERRORS_A_WAKE:
                    break
                continue
            if not peer:
                # The socket was shut down.
                break
            if flags & socket.MSG_TRUNC:
                refuse_dropped(self.counter, "truncated")
                continue
            if not messages and plain:
                spans.append((place, length, length, peer))
            else:
                stride, local = read_control(messages)
                key = peer if plain else (peer, local, self._tag)
                spans.append(span(place, length, stride, key))
        return Batch(arena, spans)

    def receive_waiting(self, arena: A) -> Batch:
        """Wait, then receive; return an empty batch once shut down.

        For a thread that has an arena of its own: net.mmsg needs one system call for both.
        """
        return self.receive(arena) if self.wait() else Batch(arena, [])

    # -- keys and destinations

    def peer(self, key: PeerKey) -> SocketAddress:
        """Return the sockaddr in the key of a peer."""
        sockaddr: SocketAddress = key if self.plain_keys else key[0]
        return sockaddr

    # The ignores: here D is Destination.  MmsgSocket makes its own destinations.
    def reply_destination(self, key: PeerKey) -> D:
        """Return where replies to a peer go: to its sockaddr, from the local address it used."""
        sockaddr, local = (key, None) if self.plain_keys else key[:2]
        return Destination([local] if local else [], sockaddr)  # type: ignore[return-value]

    def destination(self, target: Address) -> D:
        """Return the destination for a target.

        Raises ValueError for a name, and for an address of a family that the socket lacks.
        """
        sockaddr = to_sockaddr(target, self.socket.family)
        return Destination([], sockaddr)  # type: ignore[return-value]

    # -- sending

    def send(self, arena: A, run: Run, destination: D) -> None:
        """Send a run.  Never blocks, never raises; what cannot be sent is counted by reason."""
        offsets = run.offsets
        segment = run.length + (len(run.header.data) if run.header else 0)
        # A train cannot end with an empty datagram.
        if (
            len(offsets) == 1
            or segment > min(self._segment_limit, destination.segment_limit)
            or not (segment and (run.last or run.header))
        ):
            self._send_singly(arena, run, offsets, destination)
            return
        most = max(1, min(SEGMENTS_LIMIT, SEGMENTED_BYTES // segment))
        for first in range(0, len(offsets), most):
            self._send_segmented(arena, run, offsets[first : first + most], segment, destination)

    def _send_segmented(
        self, arena: A, run: Run, offsets: Sequence[int], segment: int, destination: D
    ) -> None:
        """Send the datagrams of a run at `offsets`, each `segment` bytes, in one message."""
        if len(offsets) < 2 or segment > destination.segment_limit or not self._segment_limit:
            self._send_singly(arena, run, offsets, destination)
            return
        view, length = arena.view, run.length
        parts: list[bytes | memoryview] = [view[at : at + length] for at in offsets]
        if offsets[-1] == run.offsets[-1]:
            parts[-1] = view[offsets[-1] : offsets[-1] + run.last]
        if run.header:
            parts = [part for payload in parts for part in (run.header.data, payload)]
        control = [*destination.control, (SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(segment))]
        code = self._send_message(parts, control, destination.sockaddr)
        if code:
            self._train_failed(arena, run, offsets, code, destination)

    def _send_singly(self, arena: A, run: Run, offsets: Sequence[int], destination: D) -> None:
        """Send the datagrams of a run at `offsets` in a message each."""
        view = arena.view
        for at in offsets:
            payload = view[at : at + (run.last if at == run.offsets[-1] else run.length)]
            parts = (run.header.data, payload) if run.header else (payload,)
            code = self._send_message(parts, destination.control, destination.sockaddr)
            if code:
                refuse_not_sent(self.counter, code, destination)

    def _send_message(
        self,
        parts: Sequence[bytes | memoryview],
        control: Sequence[ControlMessage],
        sockaddr: SocketAddress,
    ) -> int:
        """Send one message; return 0 or the errno."""
        tries = 0
        while True:
            try:
                self.socket.sendmsg(parts, control, socket.MSG_DONTWAIT, sockaddr)
                return 0
            except OSError as error:
                code = error.errno or errno.EIO
            tries += 1
            if tries >= ICMP_ERRORS.get(code, 1):
                return code

    def _train_failed(
        self, arena: A, run: Run, offsets: Sequence[int], code: int, destination: D
    ) -> None:
        """Handle the errno of a train: if it cannot be cut, send singly, now and from now on."""
        if code == errno.EIO:
            # The device cannot cut trains at all.
            self._segment_limit = 0
        elif code in (errno.EINVAL, errno.EMSGSIZE):
            # The path does not take datagrams of this length.
            segment = run.length + (len(run.header.data) if run.header else 0)
            destination.segment_limit = min(destination.segment_limit, segment - 1)
        else:
            refuse_not_sent(self.counter, code, destination, len(offsets))
            return
        self._send_singly(arena, run, offsets, destination)

    # -- counters and ends

    def count_overflow(self) -> None:
        """Count what the kernel has dropped since the last call: the receive buffer was full.

        Called once a second: a control message with each datagram (SO_RXQ_OVFL) would cost more.
        """
        total = datagram.dropped_by_kernel(self.socket)
        if total is not None and total != self._overflow:
            amount = (total - self._overflow) % (1 << 32)
            refuse_dropped(self.counter, "receive buffer full", amount)
            self._overflow = total

    def shutdown(self) -> None:
        """End wait() and receive() for good; the descriptor stays open until close()."""
        self.closed = True
        if self.is_given:
            return
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ENOTCONN; the reader is awake all the same

    def close(self) -> None:
        """Count the overflow and close the descriptor."""
        self.closed = True
        self.count_overflow()
        self.socket.close()


# Any: arenas and destinations of a UdpSocketFactory fit its sockets, whatever the level.
DatagramSocket: TypeAlias = BatchSocket[Any, Any]
