"""UDP sockets on recvmmsg(2) and sendmsg(2) through ctypes: the fastest level of batching.

The calls are non-blocking and made through PyDLL, which keeps the interpreter's lock for the
microsecond that they take: releasing and taking it again would cost more.  net.mmsg_arena has the
memory that they work on.  Without ctypes, or in a C library without recvmmsg, this module cannot
be imported, and net.datagram_socket serves alone.  Thread: one receives, any may send.
"""

from __future__ import annotations

import ctypes
import errno
import socket
from array import array
from typing import TYPE_CHECKING, Any, Sequence

from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.interfaces.services import refuse_dropped
from netproxy.net.address import pack_sockaddr, to_sockaddr, unpack_sockaddr
from netproxy.net.datagram import (
    DATAGRAM_LIMIT,
    ERRORS_A_WAKE,
    ICMP_ERRORS,
    PLACES,
    SEGMENTED_BYTES,
    SEGMENTS_LIMIT,
    SLOT_OFFSETS,
    SLOTS,
    SOL_UDP,
    UDP_SEGMENT,
    PinnedHeader,
    refuse_not_sent,
    span,
)
from netproxy.net.datagram_socket import BatchSocket
from netproxy.net.mmsg_arena import (
    ENTRY_SIZE,
    MESSAGE,
    NAME_SIZE,
    SEGMENT,
    SEGMENT_SPACE,
    SOCKADDR_LENGTHS,
    MmsgArena,
    MmsgDestination,
    pin,
)

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import SocketAddress
    from netproxy.net.datagram import PeerKey

_MSG_WAITFORONE = 0x10000

_library = ctypes.PyDLL(None, use_errno=True)
_recvmmsg = _library.recvmmsg
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_sendmsg = _library.sendmsg
_sendmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_sendmsg.restype = ctypes.c_ssize_t
# The one call that may block: CDLL releases the interpreter's lock meanwhile.
_recvmmsg_waiting = ctypes.CDLL(None, use_errno=True).recvmmsg
_recvmmsg_waiting.argtypes = _recvmmsg.argtypes


class MmsgSocket(BatchSocket[MmsgArena, MmsgDestination]):
    """A UDP socket on recvmmsg and sendmsg.  The sockaddrs in its keys are raw bytes."""

    __slots__ = ("_fd", "_name_length")

    # Any: the parameters are those of BatchSocket.
    def __init__(self, *arguments: Any) -> None:
        """Take over a bound socket, as BatchSocket does."""
        super().__init__(*arguments)
        self._fd = self.socket.fileno()
        self._name_length = SOCKADDR_LENGTHS[self.socket.family]

    def close(self) -> None:
        """Count the overflow and close the descriptor."""
        # A call reads _fd in the expression that makes it, and the interpreter's lock is held
        # from there to the kernel.  So it uses the descriptor or -1, but never a descriptor
        # that was closed and is now another file's.
        self._fd = -1
        super().close()

    # -- receiving

    def receive(self, arena: MmsgArena) -> Batch:
        """Return what has arrived, at most SLOTS receives.  Does not block."""
        used = arena.used * ENTRY_SIZE
        arena.headers[:used] = arena.clean[:used]
        return self._batch(
            arena, _recvmmsg(self._fd, arena.headers_at, SLOTS, socket.MSG_DONTWAIT, None)
        )

    def receive_waiting(self, arena: MmsgArena) -> Batch:
        """Wait, then receive; return an empty batch once shut down."""
        used = arena.used * ENTRY_SIZE
        arena.headers[:used] = arena.clean[:used]
        return self._batch(
            arena, _recvmmsg_waiting(self._fd, arena.headers_at, SLOTS, _MSG_WAITFORONE, None)
        )

    def _batch(self, arena: MmsgArena, count: int) -> Batch:
        """Return what `count` received messages hold; -1: the call has failed."""
        if count <= 0:
            arena.used = 0
            if count < 0 and not self.closed:
                return self._receive_after_error(arena)
            return Batch(arena, [])
        arena.used = count
        if self.closed:
            # A socket that was shut down reads as empty datagrams.
            return Batch(arena, [])
        size = self._name_length
        if count == 1 and self._plain_keys and not arena.control_lengths[0]:
            # The shortest path, for a single datagram.
            length = arena.lengths[0]
            return Batch(arena, [(PLACES[0], length, length, bytes(arena.names[:size]))])
        lengths = arena.lengths[:count].tolist()
        controls = arena.control_lengths[:count].tolist()
        names = bytes(arena.names[: count * NAME_SIZE])
        if not self._plain_keys or any(controls) or max(lengths) >= DATAGRAM_LIMIT:
            return self._mixed_batch(arena, lengths, controls, names)
        length = lengths[0]
        if lengths.count(length) == count and names == names[:NAME_SIZE] * count:
            # All are of one peer and one length.
            return Batch(arena, [(SLOT_OFFSETS[:count], length, length, names[:size])])
        keys = [names[at : at + size] for at in range(0, count * NAME_SIZE, NAME_SIZE)]
        return Batch(arena, list(zip(PLACES, lengths, lengths, keys, strict=False)))

    def _mixed_batch(
        self, arena: MmsgArena, lengths: list[int], controls: list[int], names: bytes
    ) -> Batch:
        """Return what messages hold that may be trains, cut, or in need of a longer key.

        One item of `lengths`, of `controls` (the bytes of the control messages) and NAME_SIZE
        bytes of `names` belong to each message.
        """
        plain, tag, size = self._plain_keys, self._tag, self._name_length
        spans: list[Span] = []
        for slot, length in enumerate(lengths):
            stride, local = 0, None
            if controls[slot]:
                stride, local = arena.read_control(slot, controls[slot])
            name = names[slot * NAME_SIZE : slot * NAME_SIZE + size]
            key = name if plain else (name, local, tag)
            (start,) = place = PLACES[slot]
            if length >= DATAGRAM_LIMIT:
                # No datagram is that long: this one was cut.
                refuse_dropped(self._counter, "truncated")
            elif 0 < stride < length:
                offsets = range(start, start + length, stride)
                spans.append((offsets, stride, start + length - offsets[-1], key))
            else:
                spans.append((place, length, length, key))
        return Batch(arena, spans)

    def _receive_after_error(self, arena: MmsgArena) -> Batch:
        """Return an empty batch, or what waits behind the ICMP errors of earlier sends."""
        code = ctypes.get_errno()
        for _ in range(ERRORS_A_WAKE):
            if code in (errno.EAGAIN, errno.EBADF, errno.EINTR) or self.closed:
                break
            if _recvmmsg(self._fd, arena.headers_at, 1, socket.MSG_DONTWAIT, None) > 0:
                arena.used = 1
                stride, local = arena.read_control(0, arena.control_lengths[0])
                name = bytes(arena.names[: self._name_length])
                key = name if self._plain_keys else (name, local, self._tag)
                return Batch(arena, [span(PLACES[0], arena.lengths[0], stride, key)])
            code = ctypes.get_errno()
        return Batch(arena, [])

    # -- keys and destinations

    def peer(self, key: PeerKey) -> SocketAddress:
        """Return the sockaddr in the key of a peer."""
        return unpack_sockaddr(key if self._plain_keys else key[0])

    def reply_destination(self, key: PeerKey) -> MmsgDestination:
        """Return where replies to a peer go: to its sockaddr, from the local address it used."""
        name, local = (key, None) if self._plain_keys else key[:2]
        return MmsgDestination(unpack_sockaddr(name), [local] if local else [], name)

    def destination(self, target: Address) -> MmsgDestination:
        """Return the destination for a target.  Raises ValueError as BatchSocket does."""
        sockaddr = to_sockaddr(target, self.socket.family)
        return MmsgDestination(sockaddr, [], pack_sockaddr(sockaddr))

    # -- sending

    def send(self, arena: MmsgArena, run: Run, destination: MmsgDestination) -> None:
        """Send a run.  Never blocks, never raises; what cannot be sent is counted by reason."""
        offsets, header = run.offsets, run.header
        count = len(offsets)
        if count == 1:
            self._send_datagram(arena, run, offsets[0], run.last, destination)
            return
        segment = run.length + (len(header.data) if header else 0)
        # A train cannot end with an empty datagram.
        if segment > min(self._segment_limit, destination.segment_limit) or not (
            segment and (run.last or header)
        ):
            self._send_singly(arena, run, offsets, destination)
            return
        most = max(1, min(SEGMENTS_LIMIT, SEGMENTED_BYTES // segment))
        if 1 < count <= most:
            self._send_train(arena, run, offsets, destination)
            return
        for first in range(0, count, most):
            piece = offsets[first : first + most]
            # A train that has failed lowers the limits.
            can_cut = self._segment_limit and segment <= destination.segment_limit
            if can_cut and first + 1 < count:
                self._send_train(arena, run, piece, destination)
            else:
                self._send_singly(arena, run, piece, destination)

    def _send_train(
        self, arena: MmsgArena, run: Run, offsets: Sequence[int], destination: MmsgDestination
    ) -> None:
        """Send the datagrams of a run at `offsets`, at least two, in one message."""
        header: PinnedHeader | None = run.header  # type: ignore[assignment]  # there is no other
        count, length = len(offsets), run.length
        iovecs = arena.plain if header is None else arena.headed
        words, step = iovecs.words, iovecs.step
        if header is not None and iovecs.header is not header:
            words[0::4] = array("L", [header.address or pin(header)]) * SEGMENTS_LIMIT
            words[1::4] = array("L", [len(header.data)]) * SEGMENTS_LIMIT
            iovecs.header = header
        if iovecs.length != length:
            words[step - 1 :: step] = array("L", [length]) * SEGMENTS_LIMIT
            iovecs.length = length
        if not iovecs.places or iovecs.places[:count] != offsets:
            iovecs.fill(offsets)
        shorter = run.last != length and offsets[-1] == run.offsets[-1]
        if shorter:
            words[step * count - 1] = run.last
        control, used = arena.out_control, len(destination.packed_control)
        if used:
            control[:used] = destination.packed_control
        segment = length if header is None else length + words[1]
        SEGMENT.pack_into(control, used, SEGMENT.size, SOL_UDP, UDP_SEGMENT, segment)
        used += SEGMENT_SPACE
        to, control_at, parts = destination.name_at, arena.out_control_at, step * count // 2
        MESSAGE.pack_into(
            arena.out, 0, to, self._name_length, iovecs.address, parts, control_at, used, 0
        )
        failed = _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) < 0
        code = self._retry(arena) if failed else 0
        if shorter:
            words[step * count - 1] = length
        if code:
            self._train_failed(arena, run, offsets, code, destination)

    def _send_singly(
        self, arena: MmsgArena, run: Run, offsets: Sequence[int], destination: MmsgDestination
    ) -> None:
        final = run.offsets[-1]
        for offset in offsets:
            length = run.last if offset == final else run.length
            self._send_datagram(arena, run, offset, length, destination)

    def _send_datagram(
        self, arena: MmsgArena, run: Run, offset: int, length: int, destination: MmsgDestination
    ) -> None:
        """Send the `length` bytes at one offset of a run."""
        header: PinnedHeader | None = run.header  # type: ignore[assignment]  # there is no other
        iovecs = arena.plain if header is None else arena.headed
        words, step = iovecs.words, iovecs.step
        if header is not None and iovecs.header is not header:
            words[0] = header.address or pin(header)
            words[1] = len(header.data)
            iovecs.header = None
        words[step - 2] = arena.base + offset
        iovecs.places = None
        if iovecs.length != length:
            words[step - 1] = length
            iovecs.length = -1
        used = len(destination.packed_control)
        if used:
            arena.out_control[:used] = destination.packed_control
        to, control_at, parts = destination.name_at, arena.out_control_at, step // 2
        MESSAGE.pack_into(
            arena.out, 0, to, self._name_length, iovecs.address, parts, control_at, used, 0
        )
        failed = _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) < 0
        if failed and (code := self._retry(arena)):
            refuse_not_sent(self._counter, code, destination)

    def _retry(self, arena: MmsgArena) -> int:
        """Try a failed send again; return 0 or the errno.  Each pending ICMP error fails one."""
        code = ctypes.get_errno()
        tries = 1
        while tries < ICMP_ERRORS.get(code, 1):
            if _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) >= 0:
                return 0
            code = ctypes.get_errno()
            tries += 1
        return code
