"""The public address of a listener, which `announce: auto` tells clients.

A port mapping of the router counts first, then what STUN servers see.  Without either, and on a
machine that has the address itself, clients are told the local address of their connection.
"""

from __future__ import annotations

import threading

from netproxy.net.address import is_ipv6
from netproxy.public_address.changes import Change
from netproxy.typed import TYPE_CHECKING, Callable, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.networks import HostSet
    from netproxy.public_address.changes import Changes
    from netproxy.public_address.dialects import Port

AUTO = "auto"
"""The source of these addresses, as in the configuration."""
UNKNOWN = "no public address is known: the local one is announced"


class PublicAddressDependencies(NamedTuple):
    """What tells whether an address is public.  Thread: any; never blocks."""

    outside: HostSet
    """The hosts that are neither private nor of this machine's links."""
    is_own: Callable[[Address], bool]
    """Returns whether an address is one of this machine."""


class PublicAddress:
    """What `announce: auto` of one listening address tells.  A MappingFollower.  Thread: any."""

    def __init__(self, dependencies: PublicAddressDependencies, changes: Changes) -> None:
        self._dependencies = dependencies
        self._changes = changes
        # Guards all below, and the order of what is told; readers of `current`, which is replaced
        # as a whole, do not take it.  The calls under it wait for nothing.
        self._lock = threading.Lock()
        self._mapped: Address | None = None
        self._seen: dict[bool, tuple[Address, str]] = {}
        """By STUN servers, with their names; by whether it is IPv6."""
        self.current: tuple[Address, ...] = ()
        """The addresses to announce, at most one of each family; port 0 for the listener's."""
        self.publish: Callable[[Sequence[Address]], None] | None = None
        """Tells the other workers what is announced; None if there are none."""

    def mapped(self, port: Port, external: Address | None) -> None:
        """Note the mapping of a port (MappingFollower); that of TCP is for people alone."""
        if port.network != "udp":
            return
        with self._lock:
            self._mapped = external
        self._choose(ipv6=False)

    def seen(self, ipv6: bool, address: Address | None, servers: str) -> None:
        """Note the address that STUN servers see; None if they are asked no more."""
        with self._lock:
            if address is None:
                self._seen.pop(ipv6, None)
            else:
                self._seen[ipv6] = address, servers
        self._choose(ipv6)

    def begin(self) -> None:
        """Tell that nothing is known yet, unless something is."""
        self._choose(ipv6=False)

    def forget(self) -> None:
        """Forget what was found: it is announced no more."""
        with self._lock:
            self._mapped, self.current = None, ()
            self._seen.clear()

    def follow(self, addresses: Sequence[Address]) -> None:
        """Announce what another worker has found, and has told of."""
        self.current = tuple(addresses)

    def _choose(self, ipv6: bool) -> None:
        """Decide what is announced to clients of a family, and tell of a change."""
        with self._lock:
            address, why = self._decide(ipv6)
            others = [other for other in self.current if is_ipv6(other.host) != ipv6]
            before, self.current = self.current, (*others, *(() if address is None else (address,)))
            self._changes.note(Change(AUTO, ipv6, address, why))
            if self.publish is not None and self.current != before:
                self.publish(self.current)

    def _decide(self, ipv6: bool) -> tuple[Address | None, str]:
        seen, servers = self._seen.get(ipv6, (None, ""))
        mapped = None if ipv6 else self._mapped
        if mapped is not None:
            if seen is None or mapped.host in self._dependencies.outside:
                return mapped, "port mapping"
            # The router is behind another NAT: only the port that others see there may lead here.
            return seen, f"seen by {servers}, because the router's {mapped.host} is not public"
        if seen is None:
            return None, UNKNOWN
        if self._dependencies.is_own(seen):
            return None, f"{seen.host} is this machine's own: local addresses are announced"
        return seen, f"seen by {servers}"


class AutoAddress:
    """Announces the public address of a listener (handler.announce.AddressSource)."""

    may_block = False

    def __init__(self, public: PublicAddress, port: int) -> None:
        """`port`: the port to announce, 0 for the one that was found."""
        self._public = public
        self._port = port

    def addresses(self, local: Address) -> Sequence[Address]:
        """Return the public addresses."""
        if not self._port:
            return self._public.current
        return [address._replace(port=self._port) for address in self._public.current]
