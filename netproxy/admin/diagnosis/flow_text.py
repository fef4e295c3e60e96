"""Reads a flow as people write it: a whole one, or a target alone, which it completes.  Pure."""

from __future__ import annotations

import re

from netproxy.errors import NetProxyError, ProtocolError
from netproxy.interfaces.addresses import Address
from netproxy.interfaces.flows import COMMANDS, Flow
from netproxy.protocol.host import parse_host
from netproxy.typed import TYPE_CHECKING, Iterable, NamedTuple

if TYPE_CHECKING:
    from netproxy.config.schema import Config

ANY_CLIENT = Address("127.0.0.1", 0)
"""The client of a flow that names none."""
EXAMPLE = "udp alice@192.168.1.5 -> example.com:443 on main"
PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443, "ftp": 21, "ssh": 22}
"""The ports of URLs without one."""
DEFAULT_PORT = 443
"""The port of a target without one: that of most flows, TCP and UDP."""
_FIXED = ("tcp", "udp", "dns", "tunnel", "sni")
"""Protocols of listeners whose clients name no target."""
# [tcp|udp|http|bind] [[[user@]client] ->] target [on listener]
_FLOW = re.compile(
    r"\s*(?:(tcp|udp|http|bind)\s+)?(?:(?:(?:([^@\s]+)@)?([^@\s>-]\S*)\s+)?->\s*)?"
    r"([^\s>]+?)(?:\s+on\s+(\S+))?\s*\Z"
)
# What stands behind the host of a URL, and before it for the server to log somebody in, is nothing
# that rules look at.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:[^/?#@]*@)?([^/?#@]+)(?:[/?#].*)?\Z")
_TARGET = re.compile(r"(\[[^\]]*\]|[^@:]+)(?::([0-9]{1,5}))?\Z")


class FlowError(NetProxyError):
    """A flow is not written as parse_flow() expects it, or names an unknown listener."""


class AskedFlow(NamedTuple):
    """A flow that somebody asks about."""

    flow: Flow
    """Its listener is "" if none was named."""
    scheme: str
    """That of the URL, in lower case; "" without one."""
    assumed: tuple[str, ...]
    """What was not said: "network tcp", "port 443"."""

    def on_default_listener(self, config: Config, entrances: Iterable[str]) -> AskedFlow:
        """Return the flow on the first listener that takes such flows, if it names none.

        Without one it is the first of `entrances`, the names of all that flows come in on.
        """
        flow = self.flow
        if flow.listener:
            return self
        fitting = [
            listener.name
            for listener in config.listeners
            if flow.network in listener.network and listener.protocol not in _FIXED
        ]
        name = next(iter((*fitting, *entrances)), "")
        assumed = (*self.assumed, f"listener {name}") if name else self.assumed
        return self._replace(flow=flow._replace(listener=name), assumed=assumed)


def parse_flow(text: str) -> AskedFlow:
    """Parse "udp alice@192.168.1.5 -> example.com:443 on main".

    The first word is the network, or "http" or "bind" for such a command over TCP.  All parts
    except the target may be left out, the arrow as well.  The target may be a URL, or lack its
    port.  Raises FlowError.
    """
    match = _FLOW.match(text)
    if not match:
        raise _not_a_flow()
    word, user, client, target, listener = match.groups()
    assumed = [] if word else ["network tcp"]
    scheme, host, port = _parse_target(target)
    if port is None:
        port = 80 if word == "http" else DEFAULT_PORT
        assumed.append(f"port {port}")
    if not client:
        assumed.append(f"client {ANY_CLIENT.host}")
    try:
        from_host = parse_host(client.encode(errors="replace")) if client else ANY_CLIENT.host
        address = Address(parse_host(host.encode(errors="replace")), port)
    except ProtocolError as error:
        raise FlowError(str(error)) from error
    network = "udp" if word == "udp" else "tcp"
    command = word if word in COMMANDS and network == "tcp" else "connect"
    flow = Flow(network, Address(from_host, 0), address, listener or "", user or "")
    return AskedFlow(flow._replace(command=command), scheme, tuple(assumed))


def _parse_target(text: str) -> tuple[str, str, int | None]:
    """Return the scheme of a URL or "", the host, and the port, None if there is none."""
    scheme, port = "", None
    if url := _URL.match(text):
        scheme, text = url[1].lower(), url[2]
        port = PORTS.get(scheme)
    if text.count(":") > 1 and not text.startswith("["):
        return scheme, text, port
    match = _TARGET.match(text)
    if not match or (match[2] and int(match[2]) > 65535):
        raise _not_a_flow()
    port = int(match[2]) if match[2] else port
    if scheme and port is None:
        raise FlowError(f"the port is missing (the scheme '{scheme}' has none of its own)")
    return scheme, match[1], port


def _not_a_flow() -> FlowError:
    return FlowError(f"not a flow (expected a target, or a whole flow such as '{EXAMPLE}')")
