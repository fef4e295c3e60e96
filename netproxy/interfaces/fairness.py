"""Fair shares: what clients hold of something bounded, and which client yields first.

A client is an IPv4 address or an IPv6 network of 64 bits: whoever has one IPv6 address has
2^64 of them.  Pure; the caller holds a lock for each call.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, ip_text, pack_ip
from netproxy.typed import Generic, Protocol, TypeVar

Item = TypeVar("Item")

CLIENT_PREFIX = 8
"""Bytes of an IPv6 address that name a client: the smallest network that is given away."""
_LINK_LOCAL = 0xFE80 >> 6


def client_key(host: str) -> str:
    """Return what a client's host counts as: itself, or its IPv6 network such as "2001:db8::/64".

    All hosts of a link share the link-local network, so that each counts for itself there.
    """
    if ":" not in host:
        return host
    packed = pack_ip(host.partition("%")[0])
    if packed is None or int.from_bytes(packed[:2], "big") >> 6 == _LINK_LOCAL:
        return host
    if packed.startswith(V4_MAPPED_PREFIX):
        return ip_text(packed)
    return ip_text(packed[:CLIENT_PREFIX] + bytes(16 - CLIENT_PREFIX)) + "/64"


class FairTable(Generic[Item]):
    """Holds items of clients, at most `limit`.  Items must be hashable.

    At the limit the client that holds most yields its oldest item, which is the one most
    likely to be of no use any more.  Among equals, the client that has held so many for the
    longest time yields.
    """

    __slots__ = ("limit", "_items", "_holders", "_most", "_size")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # The items of each client, oldest first.
        self._items: dict[str, OrderedDict[Item, None]] = {}
        # The clients that hold so many items, in the order in which they came to hold them.
        self._holders: dict[int, OrderedDict[str, None]] = {}
        self._most = 0
        self._size = 0

    def __len__(self) -> int:
        """Return the number of items."""
        return self._size

    def held(self, client: str) -> int:
        """Return how many items a client holds."""
        return len(self._items.get(client, ()))

    @property
    def most(self) -> int:
        """The number of items of the client that holds most."""
        return self._most

    def items_of(self, client: str) -> list[Item]:
        """Return the items of a client, oldest first."""
        return list(self._items.get(client, ()))

    def holders(self, count: int) -> list[str]:
        """Return the clients that hold so many items."""
        return list(self._holders.get(count, ()))

    def put(self, client: str, item: Item) -> Item | None:
        """Add an item; return the item that had to yield, None if there was room.

        An item that yields is no longer held.  It may be the new one.
        """
        items = self._items.setdefault(client, OrderedDict())
        items[item] = None
        self._size += 1
        self._rank(client, len(items) - 1, len(items))
        if self._size <= self.limit:
            return None
        return self.take(next(iter(self._holders[self._most])))

    def yielding(self, count: int) -> list[Item]:
        """Return the items that yield first, at most `count`: the oldest of one client."""
        if not self._size:
            return []
        return list(islice(self._items[next(iter(self._holders[self._most]))], count))

    def take(self, client: str) -> Item:
        """Remove and return a client's oldest item.  Raises KeyError if it holds none."""
        item = next(iter(self._items[client]))
        self.remove(client, item)
        return item

    def remove(self, client: str, item: Item) -> None:
        """Remove an item.  Raises KeyError if the client does not hold it."""
        items = self._items[client]
        del items[item]
        self._size -= 1
        self._rank(client, len(items) + 1, len(items))
        if not items:
            del self._items[client]

    def clear(self) -> list[Item]:
        """Remove and return all items."""
        items = [item for items in self._items.values() for item in items]
        self._items.clear()
        self._holders.clear()
        self._most = self._size = 0
        return items

    def _rank(self, client: str, before: int, after: int) -> None:
        """Note that a client holds `after` items, one more or one less than `before`."""
        if after:
            self._holders.setdefault(after, OrderedDict())[client] = None
        self._most = max(self._most, after)
        if before:
            holders = self._holders[before]
            del holders[client]
            if not holders:
                del self._holders[before]
                self._most -= before == self._most


class ClientTask(Protocol):
    """Work for one client.  Exactly one of its two methods is called, once."""

    client: str
    """The client's host."""

    def run(self) -> None:
        """Do the work; may block."""

    def drop(self) -> None:
        """Give up: others need the room.  Must not block.  Thread: any."""


class FairSubmit(Protocol):
    """Takes tasks to a bounded pool of threads, which serves clients fairly."""

    def __call__(self, task: ClientTask, /) -> None:
        """Run a task on another thread, or drop it.  Does not block."""


class Claims:
    """The clients on whose behalf a piece of work waits that is done once for all of them.

    Each claim is a task of its client.  The first task that runs does the work, so that a
    client waits no longer than if it had asked alone.
    """

    __slots__ = ("_clients", "begun")

    def __init__(self) -> None:
        self._clients: set[str] = set()
        self.begun = False
        """True once a task does the work."""

    def add(self, client: str) -> bool:
        """Return True if a task for the client must be submitted."""
        if self.begun or client in self._clients:
            return False
        self._clients.add(client)
        return True

    def begin(self) -> bool:
        """Return True for the first task that runs: it does the work."""
        is_first, self.begun = not self.begun, True
        return is_first

    def drop(self, client: str) -> bool:
        """Note that a client's task was dropped; return True if nobody will do the work."""
        self._clients.discard(client)
        return not self._clients and not self.begun
