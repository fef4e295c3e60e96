"""Tells of each change of an address that a listener announces, once: by a record and a counter.

The address becomes one of the daemon's own, to which no client may be led.
"""

from __future__ import annotations

import threading

from netproxy.interfaces.addresses import Address
from netproxy.typed import TYPE_CHECKING, Callable, Collection, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.services import Counter, Log

COUNTER = "public_address"
"""The name of the counter; its reasons are events."""


class RegisterOwn(Protocol):
    """Adds a socket of the daemon itself: access.own_sockets.OwnSockets.register_everywhere."""

    def __call__(self, network: str, address: Address) -> Callable[[], None]:
        """Return the call that takes it back."""


class Observers(NamedTuple):
    """Who is told of announced addresses."""

    register_own: RegisterOwn
    log: Log
    counter: Counter


class Change(NamedTuple):
    """The address that a source has now."""

    source: str
    """ "interface eth0", or "auto"."""
    ipv6: bool
    """True if it is about clients that use IPv6."""
    address: Address | None
    """None for none.  Port 0 stands for the port of the listener."""
    why: str
    """In words: who says so, or why there is none."""
    is_fault: bool = False
    """True if there should be an address."""


class Bound(NamedTuple):
    """Where a listening address is bound."""

    networks: Sequence[str] = ()
    """Some of "tcp" and "udp"."""
    port: int = 0


class Changes:
    """The addresses that one listening address announces, by their source.  Thread: any."""

    def __init__(self, listener: str, observers: Observers) -> None:
        """`listener`: its name, for records."""
        self.bound = Bound()
        """Set when it serves."""
        self._listener = listener
        self._observers = observers
        # Guards _told and _removals.  The calls under it wait for nothing.
        self._lock = threading.Lock()
        self._told: dict[tuple[str, bool], Address | None] = {}
        """By the source, and whether it is about IPv6."""
        self._removals: dict[tuple[str, bool], list[Callable[[], None]]] = {}

    def note(self, change: Change) -> None:
        """Note which address a source has now; tell of it if it is another one than before."""
        key, address = (change.source, change.ipv6), change.address
        with self._lock:
            if key in self._told and self._told[key] == address:
                return
            before, self._told[key] = self._told.get(key), address
            removals = self._removals.pop(key, [])
            if address is not None:
                self._removals[key] = self._register(address)
            for remove in removals:
                remove()
        self._tell(change, before)

    def retain(self, sources: Collection[str]) -> None:
        """Forget the addresses of all other sources."""
        with self._lock:
            gone = [key for key in self._told if key[0] not in sources]
            for key in gone:
                del self._told[key]
                for remove in self._removals.pop(key, ()):
                    remove()

    def _register(self, address: Address) -> list[Callable[[], None]]:
        networks, port = self.bound
        own = address._replace(port=address.port or port)
        return [self._observers.register_own(network, own) for network in networks]

    def _tell(self, change: Change, before: Address | None) -> None:
        _, log, counter = self._observers
        was = f", it was {self._text(before)}" if before else ""
        if change.address is None:
            say = log.warning if change.is_fault or before else log.info
            say("listener '%s': %s%s", self._listener, change.why, was)
            if change.is_fault or before:
                counter.count(COUNTER, "lost")
            return
        address = self._text(change.address)
        log.info("listener '%s' announces %s (%s%s)", self._listener, address, change.why, was)
        counter.count(COUNTER, "changed" if before else "found")

    def _text(self, address: Address) -> str:
        return str(address._replace(port=address.port or self.bound.port))
