"""Remembers which client was told which address for which name, by a dns listener.

The memory is shared by all worker processes, and is of fixed size.  It is split into sets of
WAYS slots, and an entry has its place in one of the sets.
Thread: any; nothing here blocks.
"""

from __future__ import annotations

import struct
import threading

from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, pack_ip
from netproxy.resolver.client_names.shared_slots import SharedSlots
from netproxy.typed import Iterator, NamedTuple, Sequence

SETS, WAYS = 1024, 8
"""8,192 entries in 2.4 MiB, of which only the pages in use are real memory."""
ADDRESSES_LIMIT = 16
"""Addresses of one answer that are remembered."""
# The end in monotonic seconds, client and address, the name.
_CONTENT = struct.Struct("=d16s16sB253s2x")


class _Entry(NamedTuple):
    """What a slot holds."""

    slot: int
    """The number of the slot within its set."""
    until: float
    client: bytes
    address: bytes
    name: bytes


class NameMemory:
    """The names that clients have asked for.  interfaces.routing.NameMemory."""

    def __init__(self, sets: int = SETS) -> None:
        self._sets = sets
        self._slots = SharedSlots(sets * WAYS, _CONTENT.size)
        # Held while a slot is written; other processes are kept apart by the checksums.
        self._lock = threading.Lock()

    def note(
        self, client: str, addresses: Sequence[str], name: str, until: float, now: float
    ) -> None:
        """Remember the name of addresses for a client until a time, in monotonic seconds."""
        packed_client, raw = _pack(client), name.encode("ascii")
        if packed_client is None or len(raw) > 253:
            return
        for address in addresses[:ADDRESSES_LIMIT]:
            packed = _pack(address)
            if packed is not None:
                with self._lock:
                    self._write(_Entry(0, until, packed_client, packed, raw), now)

    def find(self, client: str, address: str, now: float) -> str:
        """Return the name that a client last asked for and got an address, "" for none."""
        packed_client, packed = _pack(client), _pack(address)
        if packed_client is None or packed is None:
            return ""
        key = packed_client + packed
        held = self._slots.raw(self._first(key), WAYS)
        if key not in held:
            return ""
        for entry in self._entries(held, now):
            if entry.client == packed_client and entry.address == packed:
                return entry.name.decode("ascii")
        return ""

    def _first(self, key: bytes) -> int:
        """Return the first slot of a key's set."""
        # Strangers cannot choose the set: the hash has a secret, which forked processes share.
        return hash(key) % self._sets * WAYS

    def _write(self, entry: _Entry, now: float) -> None:
        """Write an entry.  Under the lock."""
        first, name = self._first(entry.client + entry.address), entry.name
        held = list(self._entries(self._slots.raw(first, WAYS), now))
        content = _CONTENT.pack(entry.until, entry.client, entry.address, len(name), name)
        self._slots.write(first + _place(held, entry), content)

    def _entries(self, held: bytes, now: float) -> Iterator[_Entry]:
        """Yield the entries of a set, except expired ones."""
        for slot, content in self._slots.contents(held):
            until, client, address, length, name = _CONTENT.unpack(content)
            if until > now:
                yield _Entry(slot, until, client, address, name[:length])


def _place(entries: Sequence[_Entry], new: _Entry) -> int:
    """Return the slot for a new entry.

    Without a free slot the client with the most entries in the set loses the one that ends first:
    so a client that asks for many names forgets its own.
    """
    for entry in entries:
        if (entry.client, entry.address) == (new.client, new.address):
            return entry.slot
    taken = {entry.slot for entry in entries}
    for slot in range(WAYS):
        if slot not in taken:
            return slot
    clients = [entry.client for entry in entries]
    return min(entries, key=lambda entry: (-clients.count(entry.client), entry.until)).slot


def _pack(host: str) -> bytes | None:
    """Return the 16 bytes of an address, None for anything else."""
    packed = pack_ip(host)
    return V4_MAPPED_PREFIX + packed if packed is not None and len(packed) == 4 else packed
