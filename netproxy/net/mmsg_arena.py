"""The memory of net.mmsg: arenas and destinations laid out as recvmmsg(2) and sendmsg(2) want them.

Message headers and iovecs are written once, in an arena's own memory; a call writes
only what differs from the call before.  Linux and its struct layouts, 32 and 64 bit.
Thread: an arena belongs to one thread at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
from array import array
from typing import TYPE_CHECKING, Sequence

from netproxy.net.datagram import (
    DATAGRAM_LIMIT,
    PITCH,
    SEGMENTS_LIMIT,
    SLOTS,
    SOL_UDP,
    UDP_GRO,
    Arena,
    ControlMessage,
    Destination,
    PinnedHeader,
    read_control,
)

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress

LONG = struct.calcsize("@L")
"""Bytes of an address and of a size_t: the unit of iovecs and the alignment of messages."""

MESSAGE = struct.Struct("@PIPNPNi")
"""struct msghdr: name, its length, iovecs, their number, control, its length, flags."""

MESSAGE_SIZE = struct.calcsize("@PIPNPNi0P")

ENTRY_SIZE = struct.calcsize("@PIPNPNi0PI0P")
"""Bytes of struct mmsghdr: a msghdr, then the length received."""

_CONTROL_LENGTH_AT = struct.calcsize("@PIPNP")

NAME_SIZE = 32
"""Bytes for a peer's sockaddr: sockaddr_in6 has 28."""

CONTROL_SIZE = 256
"""Bytes for the control messages of a datagram: GRO and PKTINFO together."""

CMSG = struct.Struct("@Nii")
"""struct cmsghdr: length including itself, level, type."""

CMSG_SIZE = -(-CMSG.size // LONG) * LONG

_TRAIN = struct.Struct("@Niii")
"""The control message of a GRO train: a cmsghdr, then the stride."""

_TRAIN_SPACE = -(-_TRAIN.size // LONG) * LONG

SEGMENT = struct.Struct("@NiiH")
"""The control message that has a train cut: a cmsghdr, then the bytes of each datagram."""

SEGMENT_SPACE = -(-SEGMENT.size // LONG) * LONG

SOCKADDR_LENGTHS = {socket.AF_INET: 16, socket.AF_INET6: 28}

_library = ctypes.PyDLL(None)
_library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Iovecs:
    """The iovecs of one message to be sent: for each datagram a header, if any, and a payload.

    They keep what the last send has written.  The attributes tell what that is.
    """

    __slots__ = ("words", "address", "step", "length", "header", "places", "_base", "_memory")

    def __init__(self, base: int, step: int) -> None:
        """Describe datagrams of an arena at the address `base`.

        `step`: words for each datagram, 2 for a payload alone, 4 with a header before it.
        """
        self._base = base
        self._memory = bytearray(SEGMENTS_LIMIT * step * LONG)
        self.words = memoryview(self._memory).cast("L")
        """For each datagram: the header's address and length if `step` is 4; the payload's."""
        self.address = address_of(self._memory)
        self.step = step
        self.length = -1
        """The length that all payloads have; -1: they differ."""
        self.header: PinnedHeader | None = None
        """The header that all datagrams have; None: they differ, or have none."""
        self.places: range | None = None
        """The offsets of the payloads if they are a range.

        The batches of one flow lie at the same offsets again and again.
        """

    def fill(self, offsets: Sequence[int]) -> None:
        """Write the addresses of the payloads at `offsets` of the arena."""
        base, step = self._base, self.step
        self.places = None
        if type(offsets) is range:
            if offsets.step == PITCH:
                # The next batch may be larger: write all slots.
                offsets = range(offsets.start, SLOTS * PITCH, PITCH)
            self.places = offsets
            values = array("L", range(base + offsets.start, base + offsets.stop, offsets.step))
        else:
            values = array("L", [base + offset for offset in offsets])
        first = step - 2
        self.words[first : first + step * (len(values) - 1) + 1 : step] = values


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
        "headed",
        "out",
        "out_at",
        "out_control",
        "out_control_at",
        "_iovecs",
    )

    def __init__(self) -> None:
        """Lay everything out.  Names ending in `_at` are addresses in the process."""
        memory = bytearray(SLOTS * PITCH)
        super().__init__(memory)
        self.base = address_of(memory)
        # bytearray() has written zeros into pages that may never be used.
        _release(self.base, len(memory))
        self.names = bytearray(SLOTS * NAME_SIZE)
        self.control = bytearray(SLOTS * CONTROL_SIZE)
        self._iovecs = bytearray(SLOTS * 2 * LONG)
        self.headers = bytearray(SLOTS * ENTRY_SIZE)
        self._lay_out_headers()
        self.headers_at = address_of(self.headers)
        self.clean = bytes(self.headers)
        """The headers before a receive, which overwrites the lengths of names and control."""
        self.used = 0
        """Headers that the last receive has overwritten."""
        self.lengths = memoryview(self.headers).cast("I")[MESSAGE_SIZE // 4 :: ENTRY_SIZE // 4]
        self.control_lengths = memoryview(self.headers).cast("L")[
            _CONTROL_LENGTH_AT // LONG :: ENTRY_SIZE // LONG
        ]
        self.plain, self.headed = Iovecs(self.base, 2), Iovecs(self.base, 4)
        self.out = bytearray(MESSAGE_SIZE)
        self.out_at = address_of(self.out)
        self.out_control = bytearray(CONTROL_SIZE)
        self.out_control_at = address_of(self.out_control)

    def _lay_out_headers(self) -> None:
        """Write the message headers and iovecs to receive into: one of each for each slot."""
        names, control = address_of(self.names), address_of(self.control)
        iovecs = address_of(self._iovecs)
        for slot in range(SLOTS):
            name_at, control_at = names + slot * NAME_SIZE, control + slot * CONTROL_SIZE
            iovec = slot * 2 * LONG
            struct.pack_into("@PN", self._iovecs, iovec, self.base + slot * PITCH, DATAGRAM_LIMIT)
            fields = (name_at, NAME_SIZE, iovecs + iovec, 1, control_at, CONTROL_SIZE, 0)
            MESSAGE.pack_into(self.headers, slot * ENTRY_SIZE, *fields)

    def read_control(self, slot: int, length: int) -> tuple[int, ControlMessage | None]:
        """Read the control messages of a slot, `length` bytes, as datagram.read_control() does."""
        at = slot * CONTROL_SIZE
        if length == _TRAIN_SPACE:
            _, level, kind, stride = _TRAIN.unpack_from(self.control, at)
            if level == SOL_UDP and kind == UDP_GRO:
                return stride, None
        messages, end = [], at + length
        while at + CMSG.size <= end:
            size, level, kind = CMSG.unpack_from(self.control, at)
            if size < CMSG_SIZE:
                break
            messages.append((level, kind, bytes(self.control[at + CMSG_SIZE : at + size])))
            at += -(-size // LONG) * LONG
        return read_control(messages)


class MmsgDestination(Destination):
    """A destination with its sockaddr and control messages as the kernel wants them."""

    __slots__ = ("name", "name_at", "packed_control")

    def __init__(self, sockaddr: SocketAddress, control: list[ControlMessage], name: bytes) -> None:
        """`name` is the sockaddr as a struct sockaddr_in or sockaddr_in6."""
        super().__init__(sockaddr, control)
        self.name = bytearray(name)
        self.name_at = address_of(self.name)
        self.packed_control = b"".join(map(_pack_control, control))


def pin(header: PinnedHeader) -> int:
    """Copy a header's bytes to an address where they stay; return the address."""
    header.memory = bytearray(header.data)
    header.address = address_of(header.memory)
    return header.address


def address_of(buffer: bytearray) -> int:
    """Return the address of a bytearray's memory, which must not be resized afterwards."""
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


def _release(address: int, length: int) -> None:
    """Give whole pages of private memory back to the kernel; they read as zeros afterwards."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + length) // mmap.PAGESIZE * mmap.PAGESIZE
    _library.madvise(first, end - first, mmap.MADV_DONTNEED)


def _pack_control(message: ControlMessage) -> bytes:
    """Return a control message with its header, padded as CMSG_SPACE(3) says."""
    level, kind, data = message
    packed = CMSG.pack(CMSG_SIZE + len(data), level, kind).ljust(CMSG_SIZE, b"\0") + data
    return packed.ljust(-(-len(packed) // LONG) * LONG, b"\0")
