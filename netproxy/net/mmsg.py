"""Batches of datagrams by recvmmsg(2) and sendmsg(2) through ctypes: the fast level of net.datagram.

The calls are non-blocking and made through PyDLL, which keeps the interpreter's
lock for the microsecond that they take: handing it over twice a call would cost
more than the call.  Message headers and iovecs are laid out once, in an arena's
own memory; a call only writes the addresses that change.  Linux and its struct
layouts, 32 and 64 bit; where ctypes is missing, net.datagram does without.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import socket
import struct
from array import array
from typing import Any, Hashable, Sequence

from netproxy.interfaces.datagrams import Batch, Run, Span
from netproxy.net.address import pack_sockaddr, unpack_sockaddr
from netproxy.net.datagram import (
    DATAGRAM_LIMIT,
    ICMP_ERRORS,
    PITCH,
    PLACES,
    SEGMENTED_BYTES,
    SEGMENTS_LIMIT,
    SLOTS,
    SOL_UDP,
    UDP_GRO,
    UDP_SEGMENT,
    Arena,
    ERRORS_A_WAKE,
    DatagramSocket,
    Destination,
    PinnedHeader,
    drop_reason,
    span,
)

_LONG = struct.calcsize("@L")  # an address, a size_t: the unit of iovecs
_MESSAGE = struct.Struct(
    "@PIPNPNi"
)  # struct msghdr: name, its length, iovecs, their number, control, its length, flags
_MESSAGE_SIZE = struct.calcsize("@PIPNPNi0P")
_ENTRY_SIZE = struct.calcsize("@PIPNPNi0PI0P")  # struct mmsghdr: a msghdr, then the length received
_CONTROL_LENGTH_AT = struct.calcsize("@PIPNP")
_NAME_SIZE = 32  # room for sockaddr_in6 (28)
_CONTROL_SIZE = 256  # room for GRO and PKTINFO together
_CMSG = struct.Struct("@Nii")  # struct cmsghdr: length with itself, level, type
_CMSG_SIZE = -(-_CMSG.size // _LONG) * _LONG
_TRAIN = struct.Struct("@Niii")  # the control message of a GRO train, alone
_TRAIN_SPACE = -(-_TRAIN.size // _LONG) * _LONG
_SEGMENT = struct.Struct("@NiiH")  # and the one that asks for a train to be cut
_SEGMENT_SPACE = -(-_SEGMENT.size // _LONG) * _LONG
_SOCKADDR_LENGTH = {socket.AF_INET: 16, socket.AF_INET6: 28}
_OFFSETS = range(0, SLOTS * PITCH, PITCH)

_library = ctypes.PyDLL(None, use_errno=True)
_recvmmsg = _library.recvmmsg
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
_MSG_WAITFORONE = 0x10000
_M_ARENA_MAX = -8
# The one call that may wait: it lets the interpreter's lock go meanwhile.
_recvmmsg_waiting = ctypes.CDLL(None, use_errno=True).recvmmsg
_recvmmsg_waiting.argtypes = _recvmmsg.argtypes
_library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_sendmsg = _library.sendmsg
_sendmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
_sendmsg.restype = ctypes.c_ssize_t


def _address(buffer: bytearray) -> int:
    """Where a bytearray's memory is; it must not be resized afterwards."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


class MmsgArena(Arena):
    """An arena with the message headers and iovecs to receive into it and to send from it."""

    __slots__ = (
        "base",
        "names",
        "control",
        "headers",
        "headers_at",
        "clean",
        "used",
        "lengths",
        "control_lengths",
        "plain",
        "plain_at",
        "plain_length",
        "plain_places",
        "headed",
        "headed_at",
        "headed_length",
        "headed_header",
        "headed_places",
        "out",
        "out_at",
        "out_control",
        "out_control_at",
        "_kept",
    )

    def __init__(self) -> None:
        memory = bytearray(SLOTS * PITCH)
        super().__init__(memory)
        self.base = _address(memory)
        _give_back(
            self.base, len(memory)
        )  # bytearray has written zeros into pages that may never be used
        self.names = bytearray(SLOTS * _NAME_SIZE)
        self.control = bytearray(SLOTS * _CONTROL_SIZE)
        iovecs = bytearray(SLOTS * 2 * _LONG)
        self.headers = bytearray(SLOTS * _ENTRY_SIZE)
        self.headers_at = _address(self.headers)
        for slot in range(SLOTS):
            struct.pack_into(
                "@PN", iovecs, slot * 2 * _LONG, self.base + slot * PITCH, DATAGRAM_LIMIT
            )
            _MESSAGE.pack_into(
                self.headers,
                slot * _ENTRY_SIZE,
                _address(self.names) + slot * _NAME_SIZE,
                _NAME_SIZE,
                _address(iovecs) + slot * 2 * _LONG,
                1,
                _address(self.control) + slot * _CONTROL_SIZE,
                _CONTROL_SIZE,
                0,
            )
        self.clean = bytes(self.headers)  # name and control lengths are overwritten by each receive
        self.used = 0
        self.lengths = memoryview(self.headers).cast("I")[_MESSAGE_SIZE // 4 :: _ENTRY_SIZE // 4]
        self.control_lengths = memoryview(self.headers).cast("L")[
            _CONTROL_LENGTH_AT // _LONG :: _ENTRY_SIZE // _LONG
        ]
        # iovecs of a run without header: payload, payload...; with one: header, payload, header, payload...
        plain, headed = bytearray(SEGMENTS_LIMIT * 2 * _LONG), bytearray(SEGMENTS_LIMIT * 4 * _LONG)
        self.plain, self.plain_at, self.plain_length = (
            memoryview(plain).cast("L"),
            _address(plain),
            -1,
        )
        self.headed, self.headed_at, self.headed_length = (
            memoryview(headed).cast("L"),
            _address(headed),
            -1,
        )
        self.headed_header: PinnedHeader | None = None
        # what places these hold, if they are a range: batches of one flow lie in the same places again and again
        self.plain_places: range | None = None
        self.headed_places: range | None = None
        self.out = bytearray(_MESSAGE_SIZE)
        self.out_at = _address(self.out)
        self.out_control = bytearray(_CONTROL_SIZE)
        self.out_control_at = _address(self.out_control)
        self._kept = (iovecs, plain, headed)

    def fill(
        self, iovecs: memoryview, first: int, step: int, offsets: Sequence[int]
    ) -> range | None:
        """Writes where datagrams begin into every `step`th word from `first`; the places that are there now, if a range."""
        base, places = self.base, None
        if type(offsets) is range:
            if offsets.step == PITCH:
                offsets = range(
                    offsets.start, SLOTS * PITCH, PITCH
                )  # all of them: the next batch may be larger
            places = offsets
            values = array("L", range(base + offsets.start, base + offsets.stop, offsets.step))
        else:
            values = array("L", [base + at for at in offsets])
        iovecs[first : first + step * (len(values) - 1) + 1 : step] = values
        return places


class MmsgDestination(Destination):
    """A destination whose sockaddr and control messages lie in memory as the kernel wants them."""

    __slots__ = ("name", "name_at", "packed_control")

    def __init__(self, sockaddr: tuple, control: list[tuple[int, int, bytes]], name: bytes) -> None:
        super().__init__(sockaddr, control)
        self.name = bytearray(name)
        self.name_at = _address(self.name)
        self.packed_control = b"".join(map(_pack_control, control))


class MmsgSocket(DatagramSocket):
    """Its peers' keys are the raw sockaddrs."""

    __slots__ = ("_fd", "_name_length")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fd = self.socket.fileno()
        self._name_length = _SOCKADDR_LENGTH[self.socket.family]

    def close(self) -> None:
        # A call reads _fd in the same expression that makes it, with the interpreter's lock held from there to the
        # kernel: it meets the descriptor or -1, never a descriptor that was closed and given to somebody else.
        self._fd = -1
        super().close()

    # -- receiving

    def receive(self, arena: MmsgArena) -> Batch:
        used = arena.used * _ENTRY_SIZE
        arena.headers[:used] = arena.clean[:used]
        return self._batch(
            arena, _recvmmsg(self._fd, arena.headers_at, SLOTS, socket.MSG_DONTWAIT, None)
        )

    def receive_waiting(self, arena: MmsgArena) -> Batch:
        used = arena.used * _ENTRY_SIZE
        arena.headers[:used] = arena.clean[:used]
        return self._batch(
            arena, _recvmmsg_waiting(self._fd, arena.headers_at, SLOTS, _MSG_WAITFORONE, None)
        )

    def _batch(self, arena: MmsgArena, count: int) -> Batch:
        """What `count` received messages hold."""
        if count <= 0:
            arena.used = 0
            return (
                self._receive_after_error(arena)
                if count < 0 and not self.closed
                else Batch(arena, [])
            )
        arena.used = count
        special = self._keyed or self._tag
        if (
            count == 1 and not special and not arena.control_lengths[0]
        ):  # a lone datagram takes the shortest way
            length = arena.lengths[0]
            return Batch(
                arena,
                [(PLACES[0], length, length, bytes(arena.names[: self._name_length]))]
                if not self.closed
                else [],
            )
        lengths = arena.lengths[:count].tolist()
        controls = arena.control_lengths[:count].tolist()
        size = self._name_length
        names = bytes(arena.names[: count * _NAME_SIZE])
        spans: list[Span] = []
        add = spans.append
        if not special and not any(controls) and max(lengths) < DATAGRAM_LIMIT:
            if self.closed:
                return Batch(arena, [])  # a socket that was shut down reads as empty datagrams
            length = lengths[0]
            if (
                lengths.count(length) == count and names == names[:_NAME_SIZE] * count
            ):  # one flow has it all
                return Batch(arena, [(_OFFSETS[:count], length, length, names[:size])])
            keys = [names[at : at + size] for at in range(0, count * _NAME_SIZE, _NAME_SIZE)]
            return Batch(arena, list(zip(PLACES, lengths, lengths, keys)))
        for slot in range(count):
            length, stride = lengths[slot], 0
            name = names[slot * _NAME_SIZE : slot * _NAME_SIZE + size]
            if special or controls[slot]:
                stride, key = self._read_slot(arena, slot, controls[slot], name)
            else:
                key = name
            if length >= DATAGRAM_LIMIT:  # no datagram is that long: this one was cut
                self._counter.count("drops", "truncated")
                continue
            add(span(PLACES[slot], length, stride, key))
        return Batch(arena, [] if self.closed else spans)

    def _receive_after_error(self, arena: MmsgArena) -> Batch:
        """Nothing there, or the ICMP error of an earlier send, behind which datagrams may wait."""
        code = ctypes.get_errno()
        for _ in range(ERRORS_A_WAKE):
            if code in (errno.EAGAIN, errno.EBADF, errno.EINTR) or self.closed:
                return Batch(arena, [])
            count = _recvmmsg(self._fd, arena.headers_at, 1, socket.MSG_DONTWAIT, None)
            if count > 0:
                arena.used = 1
                stride, key = self._read_slot(
                    arena, 0, arena.control_lengths[0], bytes(arena.names[: self._name_length])
                )
                return Batch(arena, [span(PLACES[0], arena.lengths[0], stride, key)])
            code = ctypes.get_errno()
        return Batch(arena, [])

    def _read_slot(
        self, arena: MmsgArena, slot: int, length: int, name: bytes
    ) -> tuple[int, Hashable]:
        """GRO's stride (0: none) and the peer's key."""
        at = slot * _CONTROL_SIZE
        if length == _TRAIN_SPACE and not (self._keyed or self._tag):
            _, level, kind, stride = _TRAIN.unpack_from(arena.control, at)
            if level == SOL_UDP and kind == UDP_GRO:
                return stride, name
        messages, end = [], at + length
        while at + _CMSG.size <= end:
            size, level, kind = _CMSG.unpack_from(arena.control, at)
            if size < _CMSG_SIZE:
                break
            messages.append((level, kind, bytes(arena.control[at + _CMSG_SIZE : at + size])))
            at += -(-size // _LONG) * _LONG
        stride, local = self._read_control(messages)
        return stride, (name, local, self._tag) if self._keyed or self._tag else name

    # -- sending

    def send(self, arena: MmsgArena, run: Run, destination: MmsgDestination) -> None:
        offsets = run.offsets
        count = len(offsets)
        if count == 1:
            self._send_one(arena, offsets[0], run.last, run.header, destination)
            return
        header = run.header
        segment = run.length + (len(header.data) if header else 0)
        if segment > min(self._segment_limit, destination.segment_limit) or not (
            segment and (run.last or header)
        ):
            self._send_each(arena, run, offsets, destination)
            return
        most = max(1, min(SEGMENTS_LIMIT, SEGMENTED_BYTES // segment))
        if count <= most:
            self._send_segmented(arena, run, offsets, segment, destination)
            return
        for first in range(0, count, most):
            self._send_segmented(arena, run, offsets[first : first + most], segment, destination)

    def _send_segmented(
        self,
        arena: MmsgArena,
        run: Run,
        offsets: Sequence[int],
        segment: int,
        destination: MmsgDestination,
    ) -> None:
        count = len(offsets)
        if count < 2 or segment > destination.segment_limit or not self._segment_limit:
            self._send_each(arena, run, offsets, destination)
            return
        header, length = run.header, run.length
        if header is None:
            iovecs, iovecs_at, step = arena.plain, arena.plain_at, 2
            if arena.plain_length != length:
                iovecs[1::2] = array("L", [length]) * SEGMENTS_LIMIT
                arena.plain_length = length
            if not arena.plain_places or arena.plain_places[:count] != offsets:
                arena.plain_places = arena.fill(iovecs, 0, 2, offsets)
        else:
            iovecs, iovecs_at, step = arena.headed, arena.headed_at, 4
            if arena.headed_header is not header:
                iovecs[0::4] = array("L", [header.address or pin(header)]) * SEGMENTS_LIMIT
                iovecs[1::4] = array("L", [len(header.data)]) * SEGMENTS_LIMIT
                arena.headed_header = header
            if arena.headed_length != length:
                iovecs[3::4] = array("L", [length]) * SEGMENTS_LIMIT
                arena.headed_length = length
            if not arena.headed_places or arena.headed_places[:count] != offsets:
                arena.headed_places = arena.fill(iovecs, 2, 4, offsets)
        shorter = run.last != length and offsets[-1] == run.offsets[-1]
        if shorter:
            iovecs[step * count - 1] = run.last
        control = destination.packed_control
        at = len(control)
        if at:
            arena.out_control[:at] = control
        _SEGMENT.pack_into(arena.out_control, at, _SEGMENT.size, SOL_UDP, UDP_SEGMENT, segment)
        _MESSAGE.pack_into(
            arena.out,
            0,
            destination.name_at,
            self._name_length,
            iovecs_at,
            step * count // 2,
            arena.out_control_at,
            at + _SEGMENT_SPACE,
            0,
        )
        outcome = (
            0 if _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) >= 0 else self._again(arena)
        )
        if shorter:
            iovecs[step * count - 1] = length
        if outcome:
            self._segmented_failed(arena, run, offsets, (outcome, segment), destination)

    def _send_one(
        self,
        arena: MmsgArena,
        offset: int,
        length: int,
        header: PinnedHeader | None,
        destination: MmsgDestination,
    ) -> None:
        if header is None:
            iovecs, iovecs_at, parts = arena.plain, arena.plain_at, 1
            arena.plain_places = None
            iovecs[0] = arena.base + offset
            if arena.plain_length != length:
                iovecs[1] = length
                arena.plain_length = -1
        else:
            iovecs, iovecs_at, parts = arena.headed, arena.headed_at, 2
            if arena.headed_header is not header:
                iovecs[0] = header.address or pin(header)
                iovecs[1] = len(header.data)
                arena.headed_header = None
            arena.headed_places = None
            iovecs[2] = arena.base + offset
            if arena.headed_length != length:
                iovecs[3] = length
                arena.headed_length = -1
        control = destination.packed_control
        at = len(control)
        if at:
            arena.out_control[:at] = control
        _MESSAGE.pack_into(
            arena.out,
            0,
            destination.name_at,
            self._name_length,
            iovecs_at,
            parts,
            arena.out_control_at,
            at,
            0,
        )
        if _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) < 0:
            outcome = self._again(arena)
            if outcome:
                self._counter.count("drops", drop_reason(outcome))

    def _send_each(
        self, arena: MmsgArena, run: Run, offsets: Sequence[int], destination: MmsgDestination
    ) -> None:
        final = run.offsets[-1]
        for at in offsets:
            self._send_one(
                arena, at, run.last if at == final else run.length, run.header, destination
            )

    def _again(self, arena: MmsgArena) -> int:
        """After a failed send: 0 if it went through now, else the errno.  A pending ICMP error eats one send."""
        code = ctypes.get_errno()
        tries = 1
        while tries < ICMP_ERRORS.get(code, 1):
            if _sendmsg(self._fd, arena.out_at, socket.MSG_DONTWAIT) >= 0:
                return 0
            code = ctypes.get_errno()
            tries += 1
        return code

    # -- keys and destinations

    def peer(self, key: Any) -> tuple:
        return unpack_sockaddr(key[0] if self._keyed or self._tag else key)

    def reply_destination(self, key: Any) -> MmsgDestination:
        if not (self._keyed or self._tag):
            return MmsgDestination(unpack_sockaddr(key), [], key)
        name, local, _ = key
        return MmsgDestination(unpack_sockaddr(name), [local] if local else [], name)

    def _make_destination(self, sockaddr: tuple) -> MmsgDestination:
        return MmsgDestination(sockaddr, [], pack_sockaddr(sockaddr))


def _give_back(address: int, length: int) -> None:
    """Whole pages of private memory: they cost nothing until they are used, and are zero then."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    _library.madvise(
        first, (address + length) // mmap.PAGESIZE * mmap.PAGESIZE - first, mmap.MADV_DONTNEED
    )


def share_one_heap() -> None:
    """Keeps glibc from giving each thread a heap of its own: here one thread runs at a time, and 500 sessions save a MiB."""
    try:
        _library.mallopt(_M_ARENA_MAX, 1)
    except AttributeError:
        pass  # another C library


def pin(header: PinnedHeader) -> int:
    """The address of a header's bytes, which stay where they are from here on."""
    header.memory = bytearray(header.data)
    header.address = _address(header.memory)
    return header.address


def _pack_control(message: tuple[int, int, bytes]) -> bytes:
    level, kind, data = message
    packed = _CMSG.pack(_CMSG_SIZE + len(data), level, kind).ljust(_CMSG_SIZE, b"\0") + data
    return packed.ljust(-(-len(packed) // _LONG) * _LONG, b"\0")
