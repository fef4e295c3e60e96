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

from netproxy.net.address import unpack_sockaddr
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
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.datagrams import SocketAddress

LONG = struct.calcsize("@L")
"""Bytes of an address and of a size_t: the unit of iovecs and the alignment of messages."""

MESSAGE = struct.Struct("@PIPNPNi")
"""struct msghdr: name, its length, iovecs, their number, control, its length, flags."""

MESSAGE_SIZE = struct.calcsize("@PIPNPNi0P")

LONE = struct.Struct("@PIPNPNi0PPN")
"""A message header, then the iovec of one datagram: its address and its length."""

LONE_HEADED = struct.Struct("@PIPNPNi0PPNPN")
"""A message header, then the iovecs of a header and of the datagram behind it."""

ENTRY_SIZE = struct.calcsize("@PIPNPNi0PI0P")
"""Bytes of struct mmsghdr: a msghdr, then the length received."""

CONTROLS_LIMIT = 256
"""Control messages that an arena remembers: clients write to few addresses at a time."""

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
    """The iovecs of a train to be sent: for each datagram a header, if any, and a payload.

    They keep what the last train has written.  The attributes tell what that is.
    """

    __slots__ = (
        "words",
        "address",
        "step",
        "length",
        "header",
        "places",
        *("_base", "_addresses", "_memory"),
    )

    def __init__(self, base: int, step: int) -> None:
        """Describe datagrams of an arena at the address `base`.

        `step`: words for each datagram, 2 for a payload alone, 4 with a header before it.
        """
        self._base = base
        # The addresses of recent trains, by their offsets: trains lie at the same places of slots.
        self._addresses: dict[range, array[int]] = {}
        self._memory = bytearray(SEGMENTS_LIMIT * step * LONG)
        self.words = memoryview(self._memory).cast("L")
        """For each datagram: the header's address and length if `step` is 4; the payload's."""
        self.address = address_of(self._memory)
        self.step = step
        self.length = -1
        """The length that all payloads have; -1: there was no train yet."""
        self.header: PinnedHeader | None = None
        """The header that all datagrams have; None: they have none."""
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
            values = self._addresses.get(offsets)
            if values is None:
                values = array("L", range(base + offsets.start, base + offsets.stop, offsets.step))
                if len(self._addresses) >= 2 * SLOTS:
                    self._addresses.clear()
                self._addresses[offsets] = values
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
        "used",
        "lengths",
        "name_lengths",
        "control_lengths",
        "plain",
        "headed",
        "out",
        "out_at",
        "out_iovecs_at",
        "out_control",
        "out_control_at",
        *("_iovecs", "_clean", "_known"),
    )

    def __init__(self) -> None:
        """Lay everything out.

        Names ending in `_at` are addresses in the process, as C calls take them (c_void_p) or as
        numbers to be written into a structure.
        """
        memory = bytearray(SLOTS * PITCH)
        super().__init__(memory)
        self.base = address_of(memory)
        # bytearray() has written zeros into pages that may never be used.
        _release(self.base, len(memory))
        self.names = bytearray(SLOTS * NAME_SIZE)
        self.control = bytearray(SLOTS * CONTROL_SIZE)
        self._iovecs = bytearray(SLOTS * 2 * LONG)
        self.headers = bytearray(SLOTS * ENTRY_SIZE)
        self._known: dict[bytes, tuple[int, ControlMessage | None]] = {}
        self._lay_out_headers()
        self.headers_at = ctypes.c_void_p(address_of(self.headers))
        # The headers before a receive, which overwrites the lengths of names and control.
        self._clean = bytes(self.headers)
        self.used = 0
        """Headers that the last receive has overwritten."""
        words = memoryview(self.headers).cast("I")
        self.lengths = words[MESSAGE_SIZE // 4 :: ENTRY_SIZE // 4]
        self.name_lengths = words[LONG // 4 :: ENTRY_SIZE // 4]
        self.control_lengths = memoryview(self.headers).cast("L")[
            _CONTROL_LENGTH_AT // LONG :: ENTRY_SIZE // LONG
        ]
        self.plain, self.headed = Iovecs(self.base, 2), Iovecs(self.base, 4)
        self.out = bytearray(LONE_HEADED.size)
        out = address_of(self.out)
        self.out_at = ctypes.c_void_p(out)
        self.out_iovecs_at = out + MESSAGE_SIZE
        """Behind the message header: the iovecs of a lone datagram and its header."""
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

    def renew(self) -> None:
        """Undo what the last receive has overwritten in the headers, before the next one."""
        used = self.used
        if used == 1:
            self.name_lengths[0], self.control_lengths[0] = NAME_SIZE, CONTROL_SIZE
        elif used:
            self.headers[: used * ENTRY_SIZE] = self._clean[: used * ENTRY_SIZE]

    def has_one_control(self, lengths: list[int]) -> bool:
        """Return whether as many slots as there are `lengths` have the same control messages."""
        control, length = self.control, lengths[0]
        first, places = control[:length], range(0, len(lengths) * CONTROL_SIZE, CONTROL_SIZE)
        return lengths.count(length) == len(lengths) and all(
            control[at : at + length] == first for at in places
        )

    def read_control(self, slot: int, length: int) -> tuple[int, ControlMessage | None]:
        """Read the control messages of a slot, `length` bytes, as datagram.read_control() does."""
        at = slot * CONTROL_SIZE
        if length == _TRAIN_SPACE:
            _, level, kind, stride = _TRAIN.unpack_from(self.control, at)
            if level == SOL_UDP and kind == UDP_GRO:
                return stride, None
        packed = bytes(self.control[at : at + length])
        if packed not in self._known:
            if len(self._known) >= CONTROLS_LIMIT:
                self._known.clear()
            self._known[packed] = read_control(_unpack_control(packed))
        return self._known[packed]


class MmsgDestination(Destination):
    """A destination with its sockaddr and control messages as the kernel wants them."""

    __slots__ = ("name_at", "packed_control", "_name")

    def __init__(self, name: bytes, control: list[ControlMessage]) -> None:
        """`name` is the sockaddr as a struct sockaddr_in or sockaddr_in6."""
        super().__init__(control)
        # An array tells its address at less cost than ctypes, and dns listeners make a
        # destination for each answer.
        self._name = array("B", name)
        self.name_at, _ = self._name.buffer_info()
        self.packed_control = b"".join(map(_pack_control, control)) if control else b""

    @property
    def sockaddr(self) -> SocketAddress:
        """The sockaddr as a tuple."""
        return unpack_sockaddr(self._name.tobytes())


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


def _unpack_control(packed: bytes) -> list[ControlMessage]:
    messages, at = [], 0
    while at + CMSG.size <= len(packed):
        size, level, kind = CMSG.unpack_from(packed, at)
        if size < CMSG_SIZE:
            break
        messages.append((level, kind, packed[at + CMSG_SIZE : at + size]))
        at += -(-size // LONG) * LONG
    return messages


def _pack_control(message: ControlMessage) -> bytes:
    """Return a control message with its header, padded as CMSG_SPACE(3) says."""
    level, kind, data = message
    packed = CMSG.pack(CMSG_SIZE + len(data), level, kind).ljust(CMSG_SIZE, b"\0") + data
    return packed.ljust(-(-len(packed) // LONG) * LONG, b"\0")
