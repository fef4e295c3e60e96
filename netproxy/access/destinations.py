"""The addresses that clients may reach: special ranges, what the configuration says, own ports.

The table of ranges is our own, because the standard library's idea of "private" changes with
its version.  An IPv4 address within an IPv6 address (v4-mapped, NAT64, 6to4, Teredo) is judged
as both.  Addresses are judged after the lookup of their name, and only the permitted ones are
dialled.  Thread: any.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Callable, Iterable, Mapping, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, pack_ip
from netproxy.interfaces.networks import IpNetwork, any_holds

if TYPE_CHECKING:
    from netproxy.interfaces.addresses import Address
    from netproxy.interfaces.flows import Flow

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


_Ports = Mapping[tuple[str, int], frozenset[str]]  # (network, port) -> hosts


class OwnSockets:
    """The sockets that this daemon listens on: connecting to one of them would be a loop.

    Ports that the agents of tunnels have opened count for clients only.  An upstream or a name
    server that the configuration names at such a port is in the agent's network, and does not
    lead back by itself.  An unspecified host in a listening address is every local address.
    """

    def __init__(self, is_local: Callable[[str], bool]) -> None:
        """`is_local(host)` tells whether a literal address is one of this machine's."""
        self._is_local = is_local
        # Guards _sockets, _agents and the order of changes.  Readers take the two tables, which
        # are replaced as a whole, without the lock.
        self._lock = threading.Lock()
        self._sockets: list[tuple[str, Address]] = []
        self._agents: list[tuple[str, Address]] = []
        self._ports: _Ports = {}
        self._all_ports: _Ports = {}

    def set(self, sockets: Iterable[tuple[str, Address]]) -> None:
        """Replace the daemon's own sockets: network ("tcp" or "udp") and address of each."""
        with self._lock:
            self._sockets = list(sockets)
            self._ports = _by_port(self._sockets)
            self._renew()

    def register(self, network: str, address: Address) -> Callable[[], None]:
        """Add a port that an agent has opened; return the call that removes it again."""
        entry = network, address
        with self._lock:
            self._agents.append(entry)
            self._renew()
        return partial(self._unregister, entry)

    def _unregister(self, entry: tuple[str, Address]) -> None:
        with self._lock:
            self._agents.remove(entry)
            self._renew()

    def _renew(self) -> None:
        """Rebuild the table of all ports.  The caller holds the lock."""
        self._all_ports = _by_port(self._sockets + self._agents)

    def has_port(self, network: str, port: int, agents: bool = True) -> bool:
        """Return whether a port is in use on any address; `agents` includes those of agents."""
        return (network, port) in (self._all_ports if agents else self._ports)

    def holds(self, network: str, address: Address, agents: bool = True) -> bool:
        """Return whether an address leads to one of the sockets."""
        hosts = (self._all_ports if agents else self._ports).get((network, address.port))
        if hosts is None:
            return False
        listens_everywhere = any(map(_is_unspecified, hosts))
        host = address.host.partition("%")[0]
        for form in (host, *embedded_ipv4(host)):
            if form in hosts or _is_unspecified(form):
                return True
            if listens_everywhere and self._is_local(form):
                return True
        return False


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
            addresses = [address for address in addresses if policy.permits(address.host)]
            if not addresses:
                raise DialError(Reason.DENIED, str(flow.target))
        agents = bool(flow.listener)
        if not self._own.has_port(flow.network, flow.target.port, agents):
            return tuple(addresses)
        reachable = tuple(
            address for address in addresses if not self._own.holds(flow.network, address, agents)
        )
        if not reachable:
            raise DialError(Reason.LOOP, str(flow.target))
        return reachable


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


_ANYWHERE = DestinationPolicy()
_DEFAULT = DestinationPolicy(parse_networks(DEFAULT_DENY))


def _by_port(sockets: Iterable[tuple[str, Address]]) -> _Ports:
    ports: dict[tuple[str, int], frozenset[str]] = {}
    for network, address in sockets:
        key = network, address.port
        ports[key] = ports.get(key, frozenset()) | {address.host}
    return ports


def _is_unspecified(host: str) -> bool:
    packed = pack_ip(host)
    return packed is not None and not any(packed)
