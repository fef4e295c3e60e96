"""Reads where a listener listens, with the keys of a UNIX socket: `mode`, `owner` and `group`."""

from __future__ import annotations

import re

from netproxy.config.schema import ListenerConfig, SocketFileConfig
from netproxy.config.tree.node import MapReader
from netproxy.config.units import parse_unix
from netproxy.config.url import parse_listen
from netproxy.interfaces.addresses import UNIX_PREFIX, Address, UnixAddress
from netproxy.typed import Callable

PROTOCOLS = ("sps", "socks5", "http", "tcp")
"""The protocols that a UNIX socket can serve: those whose clients need no address."""
UNUSED_KEYS = ("announce", "clients", "clients_deny", "proxy_protocol")
"""Keys about addresses of clients, which a UNIX socket does not have."""
SOCKET_KEYS = (*UNUSED_KEYS, "network", "mode", "owner", "group")
"""Keys that matter for, or do not fit, a UNIX socket."""
_MODE = r"0?[0-7]{3}\Z"


def parse_listen_or_path(text: str) -> tuple[Address, ...]:
    """Return the addresses of parse_listen(), or the UnixAddress of "unix:/path".

    Raises ValueError.
    """
    return (parse_unix(text),) if text.startswith(f"{UNIX_PREFIX}/") else parse_listen(text)


def read_socket_file(section: MapReader) -> SocketFileConfig:
    """Take the keys of the file of a UNIX socket."""
    return SocketFileConfig(
        section.read("mode", _mode, SocketFileConfig().mode),
        section.read("owner", _number_of("user"), -1),
        section.read("group", _number_of("group"), -1),
    )


def with_socket_file(
    section: MapReader, listener: ListenerConfig, given: frozenset[str]
) -> ListenerConfig:
    """Return a listener without UDP if it is a UNIX socket; report keys that do not fit.

    `given`: the keys that its mapping has.
    """
    if not isinstance(listener.addresses[0], UnixAddress):
        for key in sorted(given & {"mode", "owner", "group"}):
            section.add_error(key, "is for UNIX sockets (listen: unix:/path)")
        return listener
    for key in sorted(given & set(UNUSED_KEYS)):
        hint = "" if key == "announce" else ": its clients have no address, see mode and group"
        section.add_error(key, f"has no meaning for a UNIX socket{hint}")
    if listener.protocol not in PROTOCOLS:
        message = f"a UNIX socket cannot serve the protocol {listener.protocol}"
        section.add_error("listen", f"{message} (it can {', '.join(PROTOCOLS)})")
    elif "network" not in given and listener.protocol != "http":
        listener = listener._replace(network=("tcp",))
    if "udp" in listener.bound_networks and "network" in given:
        section.add_error("network", "a UNIX socket serves tcp alone")
    return listener


def _mode(text: str) -> int:
    if not re.match(_MODE, text):
        raise ValueError(f"'{text}' is not a mode of a file (expected three digits, such as 0660)")
    return int(text, 8)


def _number_of(kind: str) -> Callable[[str], int]:
    """Return what parses the name or the number of a user or a group."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        import grp  # late: few configurations name one
        import pwd

        try:
            return pwd.getpwnam(text).pw_uid if kind == "user" else grp.getgrnam(text).gr_gid
        except (KeyError, ValueError):
            raise ValueError(f"there is no {kind} '{text}'") from None

    return parse
