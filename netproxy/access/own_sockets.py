"""The sockets that this daemon listens on: connecting to one of them would be a loop.

Thread: any.
"""

from __future__ import annotations

import threading
from functools import partial

from netproxy.access.destinations import embedded_ipv4
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.interfaces.routing import ANY_ROUTE
from netproxy.typed import TYPE_CHECKING, Callable, Iterable, Protocol

if TYPE_CHECKING:
    from netproxy.interfaces.routing import RouteSelectors

_Ports = dict[tuple[str, int], tuple[str, ...]]
"""Hosts by network and port; a host may be there several times."""


class IsLocal(Protocol):
    """Tells whether an address is this machine's: net.local.routes.KernelRoutes.is_local."""

    def __call__(self, network: str, address: Address, selectors: RouteSelectors, /) -> bool:
        """Return whether this machine itself receives what is sent to a literal address."""


Announce = Callable[[str, Address, bool], Callable[[], None]]
"""Tells of a socket as OwnSockets.register() is told; returns the call that takes it back."""


class OwnSockets:
    """The sockets that this daemon listens on: connecting to one of them would be a loop.

    Ports that the agents of tunnels have opened count for clients only.  An upstream or a name
    server that the configuration names at such a port is in the agent's network, and does not
    lead back by itself.  An unspecified host in a listening address is every local address.
    """

    def __init__(self, is_local: IsLocal) -> None:
        self._is_local = is_local
        # Guards all changes.  Readers look keys up without the lock: each change replaces a
        # value, or a table, as a whole.
        self._lock = threading.Lock()
        self._registered: dict[object, tuple[str, Address]] = {}
        """Those in `ports` that set() does not replace, by a key of their own."""
        self.ports: _Ports = {}
        """The sockets of the configuration, and what was registered."""
        self.agent_ports: _Ports = {}
        """The sockets that agents of tunnels have opened."""
        self.announce: Announce | None = None
        """Tells the other workers of this daemon; None if there are none."""

    def set(self, sockets: Iterable[tuple[str, Address]]) -> None:
        """Replace the sockets of the configuration: network ("tcp" or "udp") and address."""
        with self._lock:
            ports: _Ports = {}
            for network, address in (*sockets, *self._registered.values()):
                _add(ports, network, address)
            self.ports = ports

    def register(
        self, network: str, address: Address, of_agent: bool = False
    ) -> Callable[[], None]:
        """Add a socket that does not depend on the configuration.

        `of_agent` if an agent of a tunnel has opened it.  Returns the call that removes it.
        """
        key = object()
        with self._lock:
            if of_agent:
                _add(self.agent_ports, network, address)
                return partial(self._unregister_agent, network, address)
            self._registered[key] = network, address
            _add(self.ports, network, address)
        return partial(self._unregister, key)

    def register_everywhere(
        self, network: str, address: Address, of_agent: bool = False
    ) -> Callable[[], None]:
        """Add a socket as register() does, in all workers of this daemon."""
        remove = self.register(network, address, of_agent)
        if self.announce is None:
            return remove
        return partial(_call_both, self.announce(network, address, of_agent), remove)

    def _unregister(self, key: object) -> None:
        with self._lock:
            _remove(self.ports, *self._registered.pop(key))

    def _unregister_agent(self, network: str, address: Address) -> None:
        with self._lock:
            _remove(self.agent_ports, network, address)

    def holds(
        self,
        network: str,
        address: Address,
        agents: bool = True,
        selectors: RouteSelectors = ANY_ROUTE,
    ) -> bool:
        """Return whether a literal address leads to one of the sockets.

        `selectors`: of the socket that would connect to it.  Never waits.
        """
        key = network, address.port
        hosts = self.ports.get(key, ())
        if agents:
            hosts += self.agent_ports.get(key, ())
        if not hosts:
            return False
        host, _, scope = address.host.partition("%")
        forms = (host, *embedded_ipv4(host))
        if any(form in hosts or _is_unspecified(form) for form in forms):
            return True
        if not any(map(_is_unspecified, hosts)):
            return False
        if scope:
            # Only a link-local address has a scope, and there is no IPv4 address in it.
            return self._is_local(network, address, selectors)
        return any(
            self._is_local(network, Address(form, address.port), selectors) for form in forms
        )


def _call_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def _add(ports: _Ports, network: str, address: Address) -> None:
    key = network, address.port
    ports[key] = (*ports.get(key, ()), address.host.partition("%")[0])


def _remove(ports: _Ports, network: str, address: Address) -> None:
    """Remove what _add() has added, once."""
    key = network, address.port
    hosts = list(ports[key])
    hosts.remove(address.host.partition("%")[0])
    if hosts:
        ports[key] = tuple(hosts)
    else:
        del ports[key]


def _is_unspecified(host: str) -> bool:
    packed = pack_ip(host)
    return packed is not None and not any(packed)
