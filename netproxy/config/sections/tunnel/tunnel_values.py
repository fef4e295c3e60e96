"""Ports, listening addresses and bridges of tunnels as users write them.

Pure functions; a ValueError says what is wrong.
"""

from __future__ import annotations

import re

from netproxy.config.tunnel_schema import PortConfig
from netproxy.config.url import AGENT_NAME, parse_host_port, parse_listen
from netproxy.interfaces.addresses import Address, pack_ip
from netproxy.typed import NamedTuple

PRIVILEGED_LIMIT = 1024
"""Ports below must be named one by one, and not as part of a range."""
AGENT_NAME_ERROR = "an agent's name has 1 to 63 letters, digits, '-' and '_'"
LOOPBACK = "127.0.0.1"
_PORT = r"(?:(?:\[([^\]]*)\]|([0-9.]+)):)?([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?\Z"


class BridgeListen(NamedTuple):
    """Where a bridge listens for agents."""

    addresses: tuple[Address, ...]
    is_plain: bool
    """True if the URL says that there is no TLS."""


class PathListen(NamedTuple):
    """Where a bridge listens for datagrams of agents."""

    addresses: tuple[Address, ...]
    """UDP ports of their own; without any, those of the listeners for agents."""


class BridgeUrl(NamedTuple):
    """A bridge as an agent names it."""

    server: Address
    is_plain: bool
    """As in BridgeListen."""


def parse_port(text: str) -> PortConfig:
    """Return the ports of "8022", "8053/udp", "0.0.0.0:8443", "[::1]:8000-8010/tcp".

    Without address they are on 127.0.0.1, without network TCP.  Raises ValueError.
    """
    match = re.match(_PORT, text)
    host = match and (match[1] or match[2] or LOOPBACK)
    if not match or not host or pack_ip(host) is None:
        expected = "(expected 8022, 8053/udp, 0.0.0.0:8443 or 8000-8010)"
        raise ValueError(f"'{text}' is not a port {expected}")
    first = int(match[3])
    last = int(match[4] or first)
    if not 0 < first <= last < 65536:
        raise ValueError(f"'{text}' is not a port or a range of ports between 1 and 65535")
    if first < last and first < PRIVILEGED_LIMIT:
        raise ValueError(f"'{text}': ports below {PRIVILEGED_LIMIT} must be named one by one")
    return PortConfig(match[5] or "tcp", host, first, last)


def parse_service_port(text: str) -> PortConfig:
    """Return the port of a service: a single port, without address.  Raises ValueError."""
    port = parse_port(text)
    if port.first != port.last or port.host != LOOPBACK or ":" in text:
        raise ValueError(f"'{text}' is not a port of the bridge (expected 8022 or 8053/udp)")
    return port


def parse_bridge_listen(text: str) -> BridgeListen:
    """Return the addresses of "host:port" or, without TLS, "tcp://host:port"; or ValueError."""
    is_plain = text.startswith("tcp://")
    return BridgeListen(parse_listen(text.removeprefix("tcp://")), is_plain)


def parse_path_listen(text: str) -> PathListen | None:
    """Return the addresses of "host:port", none for "true", None for "false".

    Raises ValueError.
    """
    if text in ("true", "false"):
        return PathListen(()) if text == "true" else None
    try:
        return PathListen(parse_listen(text))
    except ValueError as error:
        raise ValueError(f"'{text}' is not true, false or host:port") from error


def parse_bridge_url(text: str) -> BridgeUrl:
    """Return the bridge of "tls://host:port" or "tcp://host:port".  Raises ValueError."""
    scheme, separator, server = text.partition("://")
    if not separator or scheme not in ("tls", "tcp"):
        raise ValueError(f"'{text}' is not a bridge (expected tls://host:port)")
    return BridgeUrl(parse_host_port(server), scheme == "tcp")


def parse_agent_name(text: str) -> str:
    """Return a valid name of an agent.  Raises ValueError."""
    if not re.match(AGENT_NAME, text):
        raise ValueError(AGENT_NAME_ERROR)
    return text
