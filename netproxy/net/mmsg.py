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
import struct
from array import array

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
)
from netproxy.net.datagram_socket import BatchSocket
from netproxy.net.mmsg_arena import (
    LONE,
    LONE_HEADED,
    MESSAGE,
    NAME_SIZE,
    SEGMENT,
    SEGMENT_SPACE,
    SOCKADDR_LENGTHS,
    MmsgArena,
    MmsgDestination,
    pin,
)
from netproxy.typed import TYPE_CHECKING, Any, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.datagrams import SocketAddress
    from netproxy.net.datagram import PeerKey

_MSG_WAITFORONE = 0x10000
# An int: the conversion of an enumeration's member takes longer.
_NOW = int(socket.MSG_DONTWAIT)

# All parameters are ints and pointers.  An int of Python is passed as an int, a c_void_p as a
# pointer: without argtypes, whose conversions take longer than the rest of the call in Python.
_library = ctypes.PyDLL(None, use_errno=True)
_recvmmsg = _library.recvmmsg
_sendmsg = _library.sendmsg
_sendmsg.restype = ctypes.c_ssize_t
# The one call that may block: CDLL releases the interpreter's lock meanwhile.
_recvmmsg_waiting = ctypes.CDLL(None, use_errno=True).recvmmsg


class MmsgSocket(BatchSocket[MmsgArena, MmsgDestination]):
    """A UDP socket on recvmmsg and sendmsg.  The sockaddrs in its keys are raw bytes."""

    __slots__ = ("_fd", "_name_length", "_name")

    # Any: the parameters are those of BatchSocket.
    def __init__(self, *arguments: Any) -> None:
        """Take over a bound socket, as BatchSocket does."""
        super().__init__(*arguments)
        self._fd = self.socket.fileno()
        self._name_length = SOCKADDR_LENGTHS[self.socket.family]
        self._name = struct.Struct(f"{self._name_length}s")

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
        if arena.used:
            arena.renew()
        count = _recvmmsg(self._fd, arena.headers_at, SLOTS, _NOW, None)
        return self._lone(arena) if count == 1 else self._batch(arena, count)

    def receive_waiting(self, arena: MmsgArena) -> Batch:
        """Wait, then receive; return an empty batch once shut down."""
        arena.renew()
        count = _recvmmsg_waiting(self._fd, arena.headers_at, SLOTS, _MSG_WAITFORONE, None)
        return self._lone(arena) if count == 1 else self._batch(arena, count)

    def _lone(self, arena: MmsgArena) -> Batch:
        """Return what one received message holds: a datagram or a train."""
        arena.used = 1
        if self.closed:
            # A socket that was shut down reads as empty datagrams.
            return Batch(arena, [])
        length, control = arena.lengths[0], arena.control_lengths[0]
        (name,) = self._name.unpack_from(arena.names)
        if self.plain_keys and not control:
            return Batch(arena, [(PLACES[0], length, length, name)])
        return self._mixed_batch(arena, [length], [control], name)

    def _batch(self, arena: MmsgArena, count: int) -> Batch:
        """Return what `count` received messages hold, several; -1: the call has failed."""
        arena.used = max(0, count)
        if count < 0 and not self.closed:
            return self._receive_after_error(arena)
        if count <= 0 or self.closed:
            return Batch(arena, [])
        lengths, controls = arena.lengths[:count].tolist(), arena.control_lengths[:count].tolist()
        names, length, size = bytes(arena.names[: count * NAME_SIZE]), lengths[0], self._name_length
        are_alike = lengths.count(length) == count and names == names[:NAME_SIZE] * count
        if not self.plain_keys or any(controls) or max(lengths) >= DATAGRAM_LIMIT:
            key = self._common_key(arena, length, controls) if are_alike else None
            if key is None:
                return self._mixed_batch(arena, lengths, controls, names)
        elif are_alike:
            key = names[:size]
        else:
            keys = [names[at : at + size] for at in range(0, count * NAME_SIZE, NAME_SIZE)]
            return Batch(arena, list(zip(PLACES, lengths, lengths, keys, strict=False)))
        # All are of one peer and one length.
        return Batch(arena, [(SLOT_OFFSETS[:count], length, length, key)])

    def _common_key(self, arena: MmsgArena, length: int, controls: list[int]) -> PeerKey | None:
        """Return the key of datagrams of one name and length; None if there is none or a train."""
        stride, local = arena.read_control(0, controls[0])
        if 0 < stride < length or length >= DATAGRAM_LIMIT or not arena.has_one_control(controls):
            return None
        name = bytes(arena.names[: self._name_length])
        return name if self.plain_keys else (name, local, self._tag)

    def _mixed_batch(
        self, arena: MmsgArena, lengths: list[int], controls: list[int], names: bytes
    ) -> Batch:
        """Return what messages hold that may be trains, cut, or in need of a longer key.

        One item of `lengths`, of `controls` (the bytes of the control messages) and NAME_SIZE
        bytes of `names` belong to each message.
        """
        plain, tag, size = self.plain_keys, self._tag, self._name_length
        spans: list[Span] = []
        for slot, length in enumerate(lengths):
            stride, local = arena.read_control(slot, controls[slot])
            name = names[slot * NAME_SIZE : slot * NAME_SIZE + size]
            key = name if plain else (name, local, tag)
            (start,) = place = PLACES[slot]
            if length >= DATAGRAM_LIMIT:
                # No datagram is that long: this one was cut.
                refuse_dropped(self.counter, "truncated")
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
            if _recvmmsg(self._fd, arena.headers_at, 1, _NOW, None) > 0:
                return self._lone(arena)
            code = ctypes.get_errno()
        return Batch(arena, [])

    # -- keys and destinations

    def peer(self, key: PeerKey) -> SocketAddress:
        """Return the sockaddr in the key of a peer."""
        return unpack_sockaddr(key if self.plain_keys else key[0])

    def reply_destination(self, key: PeerKey) -> MmsgDestination:
        """Return where replies to a peer go: to its sockaddr, from the local address it used."""
        name, local = (key, None) if self.plain_keys else key[:2]
        return MmsgDestination(name, [local] if local else [])

    def destination(self, target: Address) -> MmsgDestination:
        """Return the destination for a target.  Raises ValueError as BatchSocket does."""
        return MmsgDestination(pack_sockaddr(to_sockaddr(target, self.socket.family)), [])

    # -- sending

    def send(self, arena: MmsgArena, run: Run, destination: MmsgDestination) -> None:
        """Send a run.  Never blocks, never raises; what cannot be sent is counted by reason."""
        if len(run.offsets) != 1:
            self._send_several(arena, run, destination)
            return
        # Any: there is no other class of headers than PinnedHeader.
        header: Any = run.header
        control = destination.packed_control
        used = len(control)
        if used:
            arena.out_control[:used] = control
        to, size, iovecs = destination.name_at, self._name_length, arena.out_iovecs_at
        control_at, at, length = arena.out_control_at, arena.base + run.offsets[0], run.last
        if header is None:
            LONE.pack_into(arena.out, 0, to, size, iovecs, 1, control_at, used, 0, at, length)
        else:
            parts = header.address or pin(header), len(header.data), at, length
            LONE_HEADED.pack_into(arena.out, 0, to, size, iovecs, 2, control_at, used, 0, *parts)
        failed = _sendmsg(self._fd, arena.out_at, _NOW) < 0
        if failed and (code := self._retry(arena)):
            refuse_not_sent(self.counter, code, destination)

    def _send_several(self, arena: MmsgArena, run: Run, destination: MmsgDestination) -> None:
        """Send a run that has not one datagram: in trains if they can be cut."""
        offsets, header = run.offsets, run.header
        count = len(offsets)
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
        failed = _sendmsg(self._fd, arena.out_at, _NOW) < 0
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
            self.send(arena, Run((offset,), length, length, run.header), destination)

    def _retry(self, arena: MmsgArena) -> int:
        """Try a failed send again; return 0 or the errno.  Each pending ICMP error fails one."""
        code = ctypes.get_errno()
        tries = 1
        while tries < ICMP_ERRORS.get(code, 1):
            if _sendmsg(self._fd, arena.out_at, _NOW) >= 0:
                return 0
            code = ctypes.get_errno()
            tries += 1
        return code
