"""Networks and ports as other programs write them, and what an ordered list of them permits.  Pure.

Results are texts as the configuration writes them.
"""

from __future__ import annotations

import ipaddress

from netproxy.typed import Iterable, Sequence, TypeAlias

Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

EVERYBODY = ("0.0.0.0/0", "::/0")
LAST_PORT = 65535
PORTS = range(LAST_PORT + 1)


def parse_network(text: str) -> str:
    """Return "10.0.0.0/8" for "10.1.2.3/8" or "10.0.0.0/255.0.0.0".  Raises ValueError."""
    host, slash, mask = text.partition("/")
    network = ipaddress.ip_network(f"{host.strip('[]')}{slash}{mask}", strict=False)
    return _shown(network)


def parse_span(first: str, last: str) -> list[str]:
    """Return the networks of all addresses from the first to the last.  Raises ValueError."""
    begin, end = ipaddress.ip_address(first.strip()), ipaddress.ip_address(last.strip())
    if isinstance(begin, ipaddress.IPv4Address) and isinstance(end, ipaddress.IPv4Address):
        return [_shown(network) for network in ipaddress.summarize_address_range(begin, end)]
    if isinstance(begin, ipaddress.IPv6Address) and isinstance(end, ipaddress.IPv6Address):
        return [_shown(network) for network in ipaddress.summarize_address_range(begin, end)]
    raise ValueError("an IPv4 and an IPv6 address are no range")


def is_network(text: str) -> bool:
    """Return whether a text is an address or a network."""
    try:
        parse_network(text)
    except ValueError:
        return False
    return True


def is_host(text: str) -> bool:
    """Return whether a text is a single address that something can be at."""
    return is_network(text) and "/" not in text and text not in ("0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Return whether a listener at this host serves this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen_text(host: str, port: int | str) -> str:
    """Return an address to listen on; "" is every address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def intersect(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Return the networks that both lists have in common."""
    common: list[str] = []
    for one in map(ipaddress.ip_network, first):
        for other in map(ipaddress.ip_network, second):
            if one.version == other.version and one.overlaps(other):
                common.append(_shown(max(one, other, key=_length)))
    return tuple(dict.fromkeys(common))


def covers(wider: Iterable[str], text: str) -> bool:
    """Return whether one of the networks contains another one."""
    network = ipaddress.ip_network(text)
    return any(_covers(ipaddress.ip_network(one), network) for one in wider)


def first_match(rules: Iterable[tuple[bool, str]]) -> list[str] | None:
    """Return `clients` for an ordered list of (permitted, network), whose first match decides.

    What is in no network is not permitted.  None if nobody is.  `clients` decides by the longest
    prefix: that is the same once those are left out that are within an earlier network.
    """
    kept: list[tuple[bool, Network]] = []
    for permitted, text in rules:
        network = ipaddress.ip_network(text)
        if not any(_covers(earlier, network) for _, earlier in kept):
            kept.append((permitted, network))
    # An exclusion needs a wider network that it is taken from.
    allowed = [network for permitted, network in kept if permitted]
    clients = [
        _shown(network) if permitted else f"!{_shown(network)}"
        for permitted, network in kept
        if permitted or any(_covers(wider, network) for wider in allowed)
    ]
    return clients if allowed else None


def parse_port_range(text: str) -> range:
    """Return the ports of "80" or "8000-8100".  Raises ValueError."""
    first, dash, last = text.partition("-")
    ports = range(int(first), int(last if dash else first) + 1)
    if not ports or ports[0] not in PORTS or ports[-1] not in PORTS:
        raise ValueError(f"'{text}' is not a port or a range")
    return ports


def port_text(ports: range) -> str:
    """Return "80" or "8000-8100"."""
    return str(ports[0]) if len(ports) == 1 else f"{ports[0]}-{ports[-1]}"


def intersect_ports(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Return the ports that both lists have in common."""
    common = []
    for one in map(parse_port_range, first):
        for other in map(parse_port_range, second):
            both = range(max(one.start, other.start), min(one.stop, other.stop))
            if both:
                common.append(port_text(both))
    return tuple(dict.fromkeys(common))


def _shown(network: Network) -> str:
    return (
        str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)
    )


def _covers(wider: Network, network: Network) -> bool:
    if isinstance(wider, ipaddress.IPv4Network):
        return isinstance(network, ipaddress.IPv4Network) and network.subnet_of(wider)
    return isinstance(network, ipaddress.IPv6Network) and network.subnet_of(wider)


def _length(network: Network) -> int:
    return network.prefixlen
