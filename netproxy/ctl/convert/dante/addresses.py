"""Addresses in danted.conf: networks, names, interfaces, and ports with operators."""

from __future__ import annotations

import re
import socket

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.interfaces import Interface, find_interface
from netproxy.typed import NamedTuple

_PORT = re.compile(
    r"(=|eq|!=|neq|>=|ge|<=|le|>|gt|<|lt)?\s*([\w.]+)(?:\s*-\s*([\w.]+))?", re.IGNORECASE
)
_SIGNS = {"eq": "=", "neq": "!=", "ge": ">=", "le": "<=", "gt": ">", "lt": "<"}
_LIKE_INTERFACE = re.compile(r"(lo|eth|en|wl|br|tun|tap|ppp|bond|veth|wg|fxp|de|em|re|bge)[\w.:-]*")
LAST = 65535


class DanteAddress(NamedTuple):
    """What `from`, `to`, `via` or `internal` says."""

    hosts: tuple[str, ...] = ()
    """Networks; () for all addresses, or if it is a name."""
    name: str = ""
    """A pattern as `domain` of rules has it: a name, or ".example.org" for all below as well."""
    ports: tuple[str, ...] = ()
    """Ports and ranges; () for all."""
    interface: Interface | None = None
    """The interface that is named, with its addresses."""
    port_number: int = 0
    """The port, if it is a single one."""

    @property
    def is_any(self) -> bool:
        """True if it means every address and port."""
        return not (self.hosts or self.name or self.ports)


def parse_address(text: str) -> DanteAddress:
    """Parse "10.0.0.0/8 port 1-1023" or ".example.org port = http".  Raises ValueError."""
    host, port_text = (*re.split(r"\s+port\s*(?=[=!<>\s\d])", f"{text} ", maxsplit=1), "")[:2]
    host = host.strip()
    address = DanteAddress()
    if port_text.strip():
        ports = parse_ports(port_text.strip())
        number = ports[0] if len(ports) == 1 and len(ports[0]) == 1 else range(0)
        whole = len(ports) == 1 and len(ports[0]) >= LAST
        texts = () if whole else tuple(map(networks.port_text, ports))
        address = address._replace(ports=texts, port_number=number[0] if number else 0)
    if host in ("0/0", "*"):
        return address
    if networks.is_network(host):
        return address._replace(hosts=(networks.parse_network(host),))
    interface = find_interface(host)
    if interface is not None or _LIKE_INTERFACE.fullmatch(host):
        interface = interface or Interface(host, (), ())
        # A rule means the addresses of the interface, not the networks that they are in.
        return address._replace(hosts=interface.addresses, interface=interface)
    if not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*\.?", host):
        raise ValueError(f"'{host}' is not an address")
    return address._replace(name=host.rstrip("."))


def parse_ports(text: str) -> list[range]:
    """Return the ports of "= http", "1-1023", "ge 1024" or "!= 25".  Raises ValueError."""
    match = _PORT.fullmatch(text)
    if not match:
        raise ValueError(f"'port {text}' is not understood")
    sign = _SIGNS.get((match[1] or "=").lower(), match[1] or "=")
    first = _port_number(match[2])
    last = _port_number(match[3]) if match[3] else first
    whole = range(0, LAST + 1)
    spans = {
        "=": [range(first, last + 1)],
        "!=": [range(0, first), range(first + 1, LAST + 1)],
        ">=": [range(first, LAST + 1)],
        "<=": [range(0, first + 1)],
        ">": [range(first + 1, LAST + 1)],
        "<": [range(0, first)],
    }[sign]
    return [span for span in spans if span and span[0] in whole]


def _port_number(text: str) -> int:
    if text.isdigit():
        if int(text) > LAST:
            raise ValueError(f"port {text} is above {LAST}")
        return int(text)
    try:
        return socket.getservbyname(text.lower())
    except OSError:
        raise ValueError(f"the port '{text}' is not in /etc/services") from None
