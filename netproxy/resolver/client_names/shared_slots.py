"""An array of slots in memory that all worker processes share.

It is made before the workers are forked.  Each slot has a checksum: a slot that is read while
another process writes it, or that was never written, counts as free.
Thread: any; nothing here blocks.  The caller sees to it that nobody else writes the same slot.
"""

from __future__ import annotations

import mmap
import struct

from netproxy.typed import Iterator

# The checksum is a hash of Python's, whose secret forked processes share: zlib would cost memory
# in every daemon.
_CHECKSUM = struct.Struct("=q")


class SharedSlots:
    """Slots of one size.  Only the pages that were used are real memory."""

    def __init__(self, count: int, size: int) -> None:
        """Make `count` free slots for contents of `size` bytes each."""
        self.count = count
        self._size = _CHECKSUM.size + size
        self._memory = mmap.mmap(-1, count * self._size)

    def read(self, index: int) -> bytes | None:
        """Return the content of a slot, None if it is free."""
        return _content(self._memory[index * self._size : (index + 1) * self._size])

    def raw(self, first: int, count: int) -> bytes:
        """Return the bytes of several slots, for contents(), or to look for a part in them."""
        return self._memory[first * self._size : (first + count) * self._size]

    def contents(self, raw: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield number and content of each slot in the bytes of several, except free ones."""
        for number, at in enumerate(range(0, len(raw), self._size)):
            content = _content(raw[at : at + self._size])
            if content is not None:
                yield number, content

    def write(self, index: int, content: bytes) -> None:
        """Write the content of a slot, which has the size of all contents."""
        at = index * self._size
        self._memory[at : at + self._size] = _CHECKSUM.pack(hash(content)) + content


def _content(slot: bytes) -> bytes | None:
    content = slot[_CHECKSUM.size :]
    return content if _CHECKSUM.unpack_from(slot)[0] == hash(content) else None
