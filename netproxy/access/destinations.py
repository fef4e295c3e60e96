"""The addresses that clients may reach: special ranges, what the configuration says, own ports.

The table of ranges is our own, because the standard library's idea of "private" changes with
its version.  An IPv4 address within an IPv6 address (v4-mapped, NAT64, 6to4, Teredo) is judged
as both.  Addresses are judged after the lookup of their name, and only the permitted ones are
dialled.  Thread: any.
"""

from __future__ import annotations

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, pack_ip
from netproxy.interfaces.networks import IpNetwork, any_holds
from netproxy.interfaces.routing import ANY_ROUTE
from netproxy.typed import TYPE_CHECKING, Iterable, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.access.own_sockets import OwnSockets
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
        self._fake: Sequence[IpNetwork] = ()

    def configure(
        self, policies: Mapping[str, DestinationPolicy], fake: Sequence[IpNetwork] = ()
    ) -> None:
        """Apply a configuration: its policies by the listener's name, and its fake addresses."""
        self._policies = {**self._policies, **policies}
        self._fake = fake

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
        if self._fake:
            addresses = self._without_fake(flow, addresses)
        return self.without_own(flow, addresses) if self.is_own_port(flow) else tuple(addresses)

    def _without_fake(self, flow: Flow, addresses: Sequence[Address]) -> Sequence[Address]:
        """Return the addresses that lead to no fake address, at least one.

        A flow to a fake address has become one to its name: these are what a name server says.
        Raises DialError(LOOP).
        """
        policy = DestinationPolicy(tuple(self._fake))
        others = [address for address in addresses if policy.permits(address.host)]
        if not others:
            raise DialError(Reason.LOOP, str(flow.target), decided=f"dns.fake {self._fake[0]}")
        return others

    def is_own_port(self, flow: Flow) -> bool:
        """Return whether the daemon listens on the port of the flow's target, on any address."""
        own, key = self._own, (flow.network, flow.target.port)
        return key in own.ports or (bool(flow.listener) and key in own.agent_ports)

    def without_own(
        self, flow: Flow, addresses: Sequence[Address], selectors: RouteSelectors = ANY_ROUTE
    ) -> tuple[Address, ...]:
        """Return the addresses that do not lead to the daemon's own sockets, at least one.

        All addresses have the port of the flow's target.  `selectors`: of the socket that is to
        connect to them.  Raises DialError(LOOP).
        """
        if not self.is_own_port(flow):
            return tuple(addresses)
        agents = bool(flow.listener)
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
