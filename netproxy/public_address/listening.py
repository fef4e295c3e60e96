"""What one listening address announces that is found while the daemon runs.

With several workers the first one asks, from the sockets of all, and tells the others.
"""

from __future__ import annotations

import time

from netproxy.net.address import is_ipv6, is_unspecified
from netproxy.public_address.changes import Bound, Changes
from netproxy.public_address.interface import InterfaceAddress
from netproxy.public_address.public import AUTO, AutoAddress, PublicAddress
from netproxy.public_address.search import Search
from netproxy.public_address.stun_port import StunPort
from netproxy.typed import TYPE_CHECKING, Collection, NamedTuple, Protocol, Sequence

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.net.datagram_socket import DatagramSocket
    from netproxy.public_address.changes import Observers
    from netproxy.public_address.dialects import Port
    from netproxy.public_address.public import PublicAddressDependencies
    from netproxy.public_address.servers import Servers


class Sharing(Protocol):
    """What the workers of a daemon tell each other about one listening address.

    Thread: any; never blocks.
    """

    @property
    def leads(self) -> bool:
        """True for the worker that asks."""

    def ask(self, server: Address, transaction: bytes) -> bool | None:
        """Have the worker ask that gets the server's answers; None if that is this one."""

    def answered(self, transaction: bytes, mapped: Address | None) -> None:
        """Tell the worker that asks of an answer."""

    def publish(self, addresses: Sequence[Address]) -> None:
        """Tell the others what is announced."""

    def publish_to(self, worker: int, addresses: Sequence[Address]) -> None:
        """Tell one of the others what is announced."""


class Settings(NamedTuple):
    """What a configuration says of a listening address."""

    bound: Bound
    interfaces: Collection[str] = ()
    """Those whose addresses are announced."""
    is_auto: bool = False
    """True if its public address is announced."""
    servers: Servers | None = None
    """The STUN servers to ask; None for none."""
    local: DatagramSocket | None = None
    """Its UDP socket."""


class ListeningAddress:
    """The found addresses of one listening address.

    It outlives a reload that keeps the listening address.
    """

    def __init__(
        self,
        listener: str,
        observers: Observers,
        dependencies: PublicAddressDependencies,
        sharing: Sharing | None,
    ) -> None:
        """`sharing`: None if this process is alone."""
        self.listener = listener
        self._observers = observers
        self._sharing = sharing
        self._changes = Changes(listener, observers)
        self.public = PublicAddress(dependencies, self._changes)
        self.public.publish = None if sharing is None else sharing.publish
        self.stun = StunPort(observers.counter)
        self.stun.answered = self._answered_here
        self._servers: Servers | None = None
        self._searches: Sequence[Search] = ()
        self._is_silent = self._is_auto = False

    def source(self, interface: str, port: int) -> InterfaceAddress | AutoAddress:
        """Return the source of an interface's address, or of the public one."""
        if interface:
            return InterfaceAddress(interface, self._changes)
        return AutoAddress(self.public, port)

    def commit(self, settings: Settings) -> None:
        """Announce what a configuration says from now on.  Thread: main."""
        self._changes.bound, self._is_auto = settings.bound, settings.is_auto
        sources = {f"interface {interface}" for interface in settings.interfaces}
        self._changes.retain(sources | ({AUTO} if settings.is_auto else set()))
        self.stun.local = settings.local
        servers = settings.servers if self._leads else None
        if _names(servers) != _names(self._servers):
            self._search(servers, settings.local)
        if not settings.is_auto:
            self.public.forget()
        elif self._leads:
            self.public.begin()
            for search in self._searches:
                # A user who reloads may know that the network has changed.
                search.ask_soon()
            self.tick(time.monotonic())

    def mapped(self, port: Port, external: Address | None) -> None:
        """Note the mapping of a port (mapping.MappingFollower)."""
        if self._is_auto:
            self.public.mapped(port, external)

    def tick(self, now: float) -> None:
        """Ask what is due.  Thread: the janitor's."""
        if self._servers is not None:
            self._servers.look_up(now)
        for search in self._searches:
            search.tick(now)

    def announced(self) -> list[Address]:
        """Return the public addresses that are announced.  Thread: any."""
        port = self._changes.bound.port
        return [address._replace(port=address.port or port) for address in self.public.current]

    def close(self) -> None:
        """Forget what was found: the address is not listened on any more."""
        # A reply may still be under way: its address is not ours any more.
        self._changes.bound = Bound()
        self._changes.retain(())
        self.stun.local, self._searches, self._servers = None, (), None

    # -- answers

    def ask(self, server: Address, transaction: bytes) -> bool:
        """Send a question from the socket that gets the answer (search.Asker)."""
        asked = None if self._sharing is None else self._sharing.ask(server, transaction)
        return self.stun.ask(server, transaction) if asked is None else asked

    def answered(self, transaction: bytes, mapped: Address | None) -> None:
        """Take an answer.  Thread: any."""
        now = time.monotonic()
        for search in self._searches:
            if search.answered(transaction, mapped, now):
                return

    def publish_to(self, worker: int) -> None:
        """Tell another worker what is announced."""
        if self._sharing is not None:
            self._sharing.publish_to(worker, self.public.current)

    def _answered_here(self, transaction: bytes, mapped: Address | None) -> None:
        """Take an answer that came to this process.  Thread: the listener's reader."""
        if self._sharing is None or self._sharing.leads:
            self.answered(transaction, mapped)
        else:
            self._sharing.answered(transaction, mapped)

    def _search(self, servers: Servers | None, local: DatagramSocket | None) -> None:
        """Ask other servers from now on."""
        for search in self._searches:
            self.public.seen(search.ipv6, None, "")
        families = () if servers is None or local is None else _families(local.address.host)
        self._servers = servers
        counter = self._observers.counter
        self._searches = [
            Search(ipv6, servers, self, counter, self._settled)
            for ipv6 in families
            if servers is not None
        ]

    def _settled(self, search: Search, changed: bool) -> None:
        """Announce what a round has found; tell if no server has answered."""
        searches = self._searches
        if search not in searches:
            # A reload has replaced it.
            return
        sources = ", ".join(map(str, search.sources))
        if changed and search.value is not None:
            hint = ", each sees another port" if not search.value.port else ""
            self.public.seen(search.ipv6, search.value, sources + hint)
        if search is not searches[0] or bool(sources) != self._is_silent:
            # Of IPv6 beside IPv4 nothing is said: few NATs have it.
            return
        self._is_silent = not sources
        if self._is_silent and self._servers is not None:
            names = ", ".join(map(str, self._servers.names))
            text = "listener '%s': no STUN server answers (%s)"
            self._observers.log.warning(text, self.listener, names)
        else:
            self._observers.log.info("listener '%s': %s answers again", self.listener, sources)

    @property
    def _leads(self) -> bool:
        return self._sharing is None or self._sharing.leads


def _names(servers: Servers | None) -> Sequence[Address]:
    return () if servers is None else servers.names


def _families(host: str) -> Sequence[bool]:
    """Return the address families of a socket's clients: whether each is IPv6."""
    if not is_ipv6(host):
        return (False,)
    return (False, True) if is_unspecified(host) else (True,)
