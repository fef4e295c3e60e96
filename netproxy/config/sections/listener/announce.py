"""Reads `announce`, `stun` and `port_mapping` of a listener: the address that clients are told."""

from __future__ import annotations

import re

from netproxy.config.schema import AnnounceConfig, ListenerConfig
from netproxy.config.sections.binds import INTERFACE
from netproxy.config.tree.node import MapReader, Node
from netproxy.config.url import parse_announce, parse_host_port
from netproxy.interfaces.addresses import Address, UnixAddress, pack_ip
from netproxy.interfaces.networks import IpNetwork, is_loopback
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.config.tree.problems import Problems

AUTO = "auto"
"""The public address, which is found by a port mapping or by STUN."""
PORT_MAPPINGS = ("pcp", "nat-pmp", "off")
STUN_PORT = 3478
"""RFC 8489 section 18.6."""
SERVERS_LIMIT = 4
"""STUN servers of a listener: two agree about a change, and two more may fail."""
WITH_ASSOCIATE = ("sps", "socks5")
"""Protocols whose clients are told a UDP port."""
_SOURCES = ("address", "interface")
_NO_SERVER = "set stun (a list of STUN servers), or port_mapping: pcp or nat-pmp"


class _Source(NamedTuple):
    """Where an announced address comes from."""

    address: Address
    """Without a host for an interface, and for AUTO."""
    interface: str = ""


def read_announcements(section: MapReader, problems: Problems) -> tuple[AnnounceConfig, ...]:
    """Take `announce` of a listener."""
    announcements = []
    for index, node in enumerate(section.items("announce")):
        path = f"announce[{index}]"
        if isinstance(node.value, dict):
            inner = MapReader(node, f"{section.path}.{path}", problems)
            clients = inner.values("clients", IpNetwork.parse)
            source = _read_source(inner, section, path)
            inner.finish()
        else:
            clients = ()
            alone = MapReader(Node({"announce": node}, node.place), section.path, problems)
            address = alone.read("announce", _address, None)
            source = None if address is None else _Source(address)
        if source is not None:
            announcements.append(AnnounceConfig(source.address, clients, source.interface))
    return tuple(announcements)


def _read_source(inner: MapReader, section: MapReader, path: str) -> _Source | None:
    """Take `address` or `interface` of one announcement; return None if it has an error."""
    given = [key for key in _SOURCES if inner.has(key)]
    if len(given) != 1:
        message = "has both address and interface" if given else "has no address (or interface)"
        section.add_error(path, message, inner.place)
    address = inner.read("address", _address, None)
    interface = inner.read("interface", _interface, "")
    if len(given) != 1:
        return None
    if address is not None:
        return _Source(address)
    return _Source(Address("", 0), interface) if interface else None


def read_servers(section: MapReader) -> tuple[Address, ...]:
    """Take `stun` of a listener."""
    servers = tuple(dict.fromkeys(section.values("stun", _server)))
    if len(servers) > SERVERS_LIMIT:
        section.add_error("stun", f"has {len(servers)} servers (at most {SERVERS_LIMIT})")
    return servers


def check_announcements(section: MapReader, listener: ListenerConfig) -> None:
    """Report what of `announce`, `stun` and `port_mapping` does not fit the listener."""
    for announce in listener.announce:
        _warn_of_misspelling(section, announce.address.host)
    if listener.port_mapping != "off":
        _check_mapping(section, listener)
    if not listener.is_auto:
        if listener.stun:
            section.add_error("stun", "is of use for announce: auto alone", given=("announce",))
        return
    if listener.protocol not in WITH_ASSOCIATE or "udp" not in listener.network:
        message = "auto is for listeners with SOCKS5 UDP: their clients alone are told an address"
        section.add_error("announce", message)
    elif listener.udp.relay_port != "shared":
        message = "auto finds the address of one port: use it with udp.relay_port: shared"
        section.add_error("announce", message)
    elif listener.is_local:
        message = "auto has no effect: only this machine reaches the listener"
        section.warn("announce", message)
    elif not listener.stun and listener.port_mapping == "off":
        message = f"auto has nobody to ask: {_NO_SERVER}"
        section.add_error("announce", message, given=("stun", "port_mapping"))


def _warn_of_misspelling(section: MapReader, host: str) -> None:
    """Warn of a name that is nearly "auto": any word is a host name."""
    if not host or "." in host or len(host) > 2 * len(AUTO):
        return
    from netproxy.config.tree.hints import EDITS_LIMIT, suggestion  # late: only for this

    if hint := suggestion(host, (AUTO,), EDITS_LIMIT):
        section.warn("announce", f"'{host}' is taken for the name of a host{hint}")


def _check_mapping(section: MapReader, listener: ListenerConfig) -> None:
    addresses = listener.addresses
    if any(isinstance(address, UnixAddress) for address in addresses):
        section.add_error("port_mapping", "has no meaning for a UNIX socket")
    elif listener.is_local:
        message = "others cannot reach the listener: listen on an address of the network"
        section.add_error("port_mapping", message)
    elif not any(map(can_be_mapped, addresses)):
        section.add_error("port_mapping", "is for IPv4: the listener has IPv6 addresses alone")


def can_be_mapped(address: Address) -> bool:
    """Return whether a router can map the port of a listening address: it has IPv4."""
    if is_loopback(address.host):
        return False
    packed = pack_ip(address.host)
    # "::" stands for both families.  A name, or a socket of the service manager, may have IPv4.
    return packed is None or len(packed) == 4 or not any(packed)


def _address(text: str) -> Address:
    """Return the address of "auto" or "auto:PORT", without a host, or that of another text."""
    host, _, port = text.partition(":")
    if host.lower() != AUTO:
        return parse_announce(text)
    return Address("", parse_host_port(text).port if port else 0)


def _server(text: str) -> Address:
    address = parse_announce(text)
    return address._replace(port=address.port or STUN_PORT)


def _interface(text: str) -> str:
    if not re.match(INTERFACE, text):
        raise ValueError(f"'{text}' is not the name of an interface")
    return text
