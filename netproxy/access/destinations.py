"""The addresses that clients may reach: special ranges, what the configuration says, own ports.

The table of ranges is our own, because the standard library's idea of "private" changes with
its version.  An IPv4 address within an IPv6 address (v4-mapped, NAT64, 6to4, Teredo) is judged
as both.  Addresses are judged after the lookup of their name, and only the permitted ones are
dialled.  Thread: any.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Callable, Iterable, Mapping, NamedTuple, Protocol, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, pack_ip
from netproxy.interfaces.networks import IpNetwork, any_holds
from netproxy.interfaces.routing import ANY_ROUTE

if TYPE_CHECKING:
    from netproxy.interfaces.flows import Flow
    from netproxy.interfaces.routing import RouteSelectors

RANGES: Mapping[str, tuple[str, ...]] = {
    # Linux takes 0.0.0.0 for this machine.
    "loopback": ("127.0.0.0/8", "::1/128", "0.0.0.0/8", "::/128"),
    "private": (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
        "fec0::/10",
    ),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    # Where clouds hand out a machine's credentials.
    "metadata": (
        "169.254.169.254/32",
        "fd00:ec2::254/128",
        "168.63.129.16/32",
        "100.100.100.200/32",
    ),
    # Broadcast included.
    "multicast": ("224.0.0.0/4", "ff00::/8", "255.255.255.255/32"),
    "reserved": (
        "240.0.0.0/4",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "2001:db8::/32",
        "100::/64",
    ),
}
"""Networks by their name in the configuration (RFC 6890 and its updates)."""
DEFAULT_DENY = ("loopback", "link-local", "metadata", "multicast")
"""Ranges that clients of other machines may not reach, unless the configuration says otherwise."""
_NAT64 = b"\0\x64\xff\x9b" + bytes(8)
"""RFC 6052."""
_6TO4 = b"\x20\x02"
"""RFC 3056."""
_TEREDO = b"\x20\x01\0\0"
"""RFC 4380."""


class DestinationPolicy(NamedTuple):
    """Which addresses the clients of one listener may reach."""

    deny: tuple[IpNetwork, ...] = ()
    allow: tuple[IpNetwork, ...] = ()
    """Exceptions to `deny`."""

    def permits(self, host: str) -> bool:
        """Return whether a literal address, and any address within it, may be reached."""
        forms = (host.partition("%")[0], *embedded_ipv4(host))
        return not any(
            any_holds(self.deny, form) and not any_holds(self.allow, form) for form in forms
        )

    def denying(self, host: str) -> str:
        """Return what forbids an address, for records: "destinations.deny 10.0.0.0/8 (private)"."""
        forms = (host.partition("%")[0], *embedded_ipv4(host))
        for network in self.deny:
            for form in forms:
                if any_holds((network,), form) and not any_holds(self.allow, form):
                    return f"destinations.deny {network}{_range_of(network)}"
        return ""


_Ports = dict[tuple[str, int], tuple[str, ...]]
"""Hosts by network and port; a host may be there several times."""


class IsLocal(Protocol):
    """Tells whether an address is this machine's: net.routes.KernelRoutes.is_local."""

    def __call__(self, network: str, address: Address, selectors: RouteSelectors, /) -> bool:
        """Return whether this machine itself receives what is sent to a literal address."""


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
        """Those in _ports that set() does not replace, by a key of their own."""
        self._ports: _Ports = {}
        self._agent_ports: _Ports = {}

    def set(self, sockets: Iterable[tuple[str, Address]]) -> None:
        """Replace the sockets of the configuration: network ("tcp" or "udp") and address."""
        with self._lock:
            ports: _Ports = {}
            for network, address in (*sockets, *self._registered.values()):
                _add(ports, network, address)
            self._ports = ports

    def register(
        self, network: str, address: Address, of_agent: bool = False
    ) -> Callable[[], None]:
        """Add a socket that does not depend on the configuration.

        `of_agent` if an agent of a tunnel has opened it.  Returns the call that removes it.
        """
        key = object()
        with self._lock:
            if of_agent:
                _add(self._agent_ports, network, address)
                return partial(self._unregister_agent, network, address)
            self._registered[key] = network, address
            _add(self._ports, network, address)
        return partial(self._unregister, key)

    def _unregister(self, key: object) -> None:
        with self._lock:
            _remove(self._ports, *self._registered.pop(key))

    def _unregister_agent(self, network: str, address: Address) -> None:
        with self._lock:
            _remove(self._agent_ports, network, address)

    def has_port(self, network: str, port: int, agents: bool = True) -> bool:
        """Return whether a port is in use on any address; `agents` includes those of agents."""
        key = network, port
        return key in self._ports or (agents and key in self._agent_ports)

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
        hosts = self._ports.get(key, ())
        if agents:
            hosts += self._agent_ports.get(key, ())
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


class Destinations:
    """Decides which addresses may be dialled (interfaces.routing.DestinationGuard).

    A flow without a listener is NetProxy's own and is only kept from coming back.  A listener
    without a policy has the default one.  A listener that a reload removes keeps its policy for
    the connections that are left.
    """

    def __init__(self, own: OwnSockets) -> None:
        self._own = own
        self._policies: Mapping[str, DestinationPolicy] = {}
        """Replaced as a whole."""

    def configure(self, policies: Mapping[str, DestinationPolicy]) -> None:
        """Apply the policies of a configuration, by the listener's name."""
        self._policies = {**self._policies, **policies}

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """Return the addresses that the flow may be dialled to, at least one.

        All addresses have the port of the flow's target.  Raises DialError(DENIED or LOOP).
        """
        policy = self._policies.get(flow.listener) or (_DEFAULT if flow.listener else _ANYWHERE)
        if policy.deny:
            permitted = [address for address in addresses if policy.permits(address.host)]
            if not permitted:
                decided = policy.denying(addresses[0].host)
                raise DialError(Reason.DENIED, str(flow.target), decided=decided)
            addresses = permitted
        return self.without_own(flow, addresses)

    def is_own_port(self, flow: Flow) -> bool:
        """Return whether the daemon listens on the port of the flow's target, on any address."""
        return self._own.has_port(flow.network, flow.target.port, bool(flow.listener))

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors = ANY_ROUTE
    ) -> tuple[Address, ...]:
        """Return the addresses that do not lead to the daemon's own sockets, at least one.

        All addresses have the port of the flow's target.  `selectors`: of the socket that is to
        connect to them.  Raises DialError(LOOP).
        """
        agents = bool(flow.listener)
        if not self._own.has_port(flow.network, flow.target.port, agents):
            return tuple(addresses)
        others = tuple(
            address
            for address in addresses
            if not self._own.holds(flow.network, address, agents, selectors)
        )
        if not others:
            raise DialError(Reason.LOOP, str(flow.target), decided=f"own port {flow.target.port}")
        return others


def parse_networks(names: Iterable[str]) -> tuple[IpNetwork, ...]:
    """Return the networks of names in RANGES and of CIDR texts.  Raises ValueError."""
    return tuple(IpNetwork.parse(text) for name in names for text in RANGES.get(name, (name,)))


def embedded_ipv4(host: str) -> tuple[str, ...]:
    """Return the IPv4 addresses that an IPv6 address contains or leads to."""
    if ":" not in host:
        return ()
    packed = pack_ip(host.partition("%")[0]) or bytes(16)
    # v4-compatible addresses (RFC 4291 section 2.5.5.1); ::1 and :: are none.
    is_compatible = packed.startswith(bytes(12)) and packed[12:15] != bytes(3)
    inner: list[bytes] = []
    if packed.startswith((V4_MAPPED_PREFIX, _NAT64)) or is_compatible:
        inner = [packed[12:]]
    elif packed.startswith(_6TO4):
        inner = [packed[2:6]]
    elif packed.startswith(_TEREDO):
        # The server, and the client with all bits inverted.
        inner = [packed[4:8], bytes(255 - byte for byte in packed[12:])]
    return tuple(".".join(map(str, address)) for address in inner)


def _range_of(network: IpNetwork) -> str:
    """Return " (private)" and the like for a network of RANGES, "" for any other."""
    names = (name for name in RANGES if network in parse_networks((name,)))
    return "".join(f" ({name})" for name in names)


_ANYWHERE = DestinationPolicy()
_DEFAULT = DestinationPolicy(parse_networks(DEFAULT_DENY))


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
