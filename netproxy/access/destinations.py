"""Where clients may be led: ranges that are special, what the configuration denies and allows, and ourselves.

The table of ranges is our own, since the library's idea of "private" changes with
its version; an IPv4 address within an IPv6 one (v4-mapped, NAT64, 6to4, Teredo) is
judged as both.  Addresses are judged after their names were looked up, and those
that pass are the only ones dialled.  Immutable, but for our own sockets; any thread.
"""

from __future__ import annotations

import threading
from typing import Callable, Iterable, Mapping, NamedTuple, Sequence

from netproxy.errors import DialError, Reason
from netproxy.interfaces.addresses import V4_MAPPED_PREFIX, Address, pack_ip
from netproxy.interfaces.flows import Flow
from netproxy.interfaces.networks import IpNetwork

# RFC 6890 and its updates, by the names of the configuration
RANGES: Mapping[str, tuple[str, ...]] = {
    "loopback": ("127.0.0.0/8", "::1/128", "0.0.0.0/8", "::/128"),  # Linux takes 0.0.0.0 for itself
    "private": (
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "fc00::/7",
        "fec0::/10",
    ),
    "link-local": ("169.254.0.0/16", "fe80::/10"),
    # where clouds tell a machine its secrets
    "metadata": (
        "169.254.169.254/32",
        "fd00:ec2::254/128",
        "168.63.129.16/32",
        "100.100.100.200/32",
    ),
    "multicast": ("224.0.0.0/4", "ff00::/8", "255.255.255.255/32"),  # and broadcast
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
GUARD = (
    "loopback",
    "link-local",
    "metadata",
    "multicast",
)  # denied to clients of other machines unless the file says otherwise
_NAT64 = b"\0\x64\xff\x9b" + bytes(8)  # RFC 6052
_6TO4, _TEREDO = b"\x20\x02", b"\x20\x01\0\0"  # RFC 3056, RFC 4380


class Policy(NamedTuple):
    deny: tuple[IpNetwork, ...] = ()
    allow: tuple[IpNetwork, ...] = ()  # in spite of deny

    def permits(self, host: str) -> bool:
        forms = [host.partition("%")[0], *embedded(host)]
        return not any(_holds(self.deny, form) and not _holds(self.allow, form) for form in forms)


_Ports = Mapping[tuple[str, int], frozenset[str]]  # (network, port) -> hosts


class OwnSockets:
    """What this daemon itself listens on: nothing that comes in by one of its ports may go back to one.

    Ports that a tunnel's agents have opened are among it, as far as clients go.  What the file itself names, a proxy or a name
    server that an agent shows there, is dialled: it is in the agent's network, and its file does not lead back by itself.
    """

    def __init__(self, is_local: Callable[[str], bool]) -> None:
        """`is_local(host)`: whether a literal address is one of this machine's."""
        self._is_local = is_local
        self._lock = threading.Lock()  # guards _sockets, and one change of the others at a time
        self._ports: _Ports = {}  # replaced whole, as is the next
        self._all: _Ports = {}  # those of agents, too
        self._sockets: list[tuple[str, Address]] = []
        self._agents: list[tuple[str, Address]] = []

    def set(self, sockets: Iterable[tuple[str, Address]]) -> None:
        """(network, address) of each; an unspecified host is every local address."""
        with self._lock:
            self._sockets = list(sockets)
            self._ports = _by_port(self._sockets)
            self._renew()

    def register(self, network: str, address: Address) -> Callable[[], None]:
        """One more, which leads to an agent's service; until the call that is given back."""
        one = network, address
        with self._lock:
            self._agents.append(one)
            self._renew()

        def take_back() -> None:
            with self._lock:
                self._agents.remove(one)
                self._renew()

        return take_back

    def _renew(self) -> None:
        """Under the lock."""
        self._all = _by_port(self._sockets + self._agents)

    def has_port(self, network: str, port: int, agents: bool = True) -> bool:
        """`agents`: whether what leads to their services counts."""
        return (network, port) in (self._all if agents else self._ports)

    def holds(self, network: str, address: Address, agents: bool = True) -> bool:
        hosts = (self._all if agents else self._ports).get((network, address.port))
        if hosts is None:
            return False
        host = address.host.partition("%")[0]
        for form in (host, *embedded(host)):
            if (
                form in hosts
                or _unspecified(form)
                or (any(map(_unspecified, hosts)) and self._is_local(form))
            ):
                return True
        return False


class Destinations:
    """A Gatekeeper.  A flow of no listener is NetProxy's own, and only kept from coming back.

    A listener that nobody has told of yet is guarded; what is left of one that a reload has taken away keeps its policy.
    """

    def __init__(self, own: OwnSockets) -> None:
        self._own = own
        self._policies: Mapping[str, Policy] = {}  # replaced whole

    def configure(self, policies: Mapping[str, Policy]) -> None:
        """By listener's name, at the start and on a reload."""
        self._policies = {**self._policies, **policies}

    def permitted(self, flow: Flow, addresses: Sequence[Address]) -> tuple[Address, ...]:
        """DialError where none is left."""
        policy = self._policies.get(flow.listener) or (_GUARDED if flow.listener else _ANYWHERE)
        if policy.deny:
            addresses = [address for address in addresses if policy.permits(address.host)]
            if not addresses:
                raise DialError(Reason.DENIED, str(flow.target))
        clients = bool(flow.listener)
        if not self._own.has_port(
            flow.network, flow.target.port, clients
        ):  # which is that of all its addresses
            return tuple(addresses)
        reachable = tuple(
            address for address in addresses if not self._own.holds(flow.network, address, clients)
        )
        if not reachable:
            raise DialError(Reason.LOOP, str(flow.target))
        return reachable


def networks(names: Iterable[str]) -> tuple[IpNetwork, ...]:
    """Of names in RANGES and networks in CIDR notation; ValueError."""
    return tuple(IpNetwork.parse(text) for name in names for text in RANGES.get(name, (name,)))


def embedded(host: str) -> tuple[str, ...]:
    """The IPv4 addresses that an IPv6 address stands for or leads to."""
    if ":" not in host:
        return ()
    packed = pack_ip(host.partition("%")[0]) or bytes(16)
    found: list[bytes] = []
    if packed.startswith(V4_MAPPED_PREFIX) or (
        packed.startswith(bytes(12)) and packed[12:15] != bytes(3)
    ):
        found.append(packed[12:])  # v4-mapped, v4-compatible; ::1 and :: are neither
    elif packed.startswith(_NAT64):
        found.append(packed[12:])
    elif packed.startswith(_6TO4):
        found.append(packed[2:6])
    elif packed.startswith(_TEREDO):
        found += [packed[4:8], bytes(255 - byte for byte in packed[12:])]
    return tuple(".".join(map(str, one)) for one in found)


_ANYWHERE, _GUARDED = Policy(), Policy(networks(GUARD))


def _holds(networks: Iterable[IpNetwork], host: str) -> bool:
    packed = pack_ip(host) or b""
    size, value = len(packed), int.from_bytes(packed, "big")
    return any(one.size == size and value >> one.shift == one.prefix for one in networks)


def _by_port(sockets: Iterable[tuple[str, Address]]) -> _Ports:
    ports: dict[tuple[str, int], frozenset[str]] = {}
    for network, address in sockets:
        key = network, address.port
        ports[key] = ports.get(key, frozenset()) | {address.host}
    return ports


def _unspecified(host: str) -> bool:
    packed = pack_ip(host)
    return packed is not None and not any(packed)
