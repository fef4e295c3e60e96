"""Addresses and URLs as they stand in options and in the file.  Pure; ValueError says what is wrong.

A URL may hold a password, so that no message repeats one.
"""

from __future__ import annotations

import re

from netproxy.config.node import Node, suggestion
from netproxy.config.schema import HopConfig
from netproxy.interfaces.addresses import ActivationAddress, Address, pack_ip

HOP_SCHEMES = (
    "direct",
    "block",
    "socks4",
    "socks4a",
    "socks5",
    "socks5h",
    "http",
    "https",
    "socks5+tls",
    "socks5h+tls",
    "tunnel",
)
# As text: compiled where they are first needed.
_URL = r"([a-z][a-z0-9+.-]*)://([^/?#]*)/?(?:\?([^#]*))?\Z"
_PASSED = r"systemd:[!-9;-~]{1,255}\Z"
_HOST_PORT = r"(?:\[([^\]]*)\]|([^:\[\]]*)):(\d{1,5})(?:-(\d{1,5}))?\Z"
_ESCAPE = r"%([0-9A-Fa-f]{2})"
AGENT_NAME = r"[A-Za-z0-9_-]{1,63}\Z"
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\Z"


def parse_listen(text: str) -> tuple[Address, ...]:
    """host:port, :port (both families where the machine has them), [v6]:port, host:first-last, systemd:NAME."""
    if (
        re.match(_PASSED, text) and not text[8:].isdigit()
    ):  # a number is a port, of a host with that name
        return (ActivationAddress(text, 0),)
    match = re.match(_HOST_PORT, text)
    if not match:
        raise ValueError(
            f"'{text}' is no address to listen on: write host:port, :port or [v6]:port"
        )
    first = int(match[3])
    last = int(match[4] or first)
    if last > 65535 or last < first:
        raise ValueError(f"'{text}' names no ports between 0 and 65535")
    host = match[1] or match[2] or "::"
    return tuple(Address(host, port) for port in range(first, last + 1))


def parse_host_port(text: str) -> Address:
    """host:port with a port of 1 to 65535."""
    match = re.match(_HOST_PORT, text)
    known = match and (pack_ip(match[1]) is not None if match[1] else re.match(HOST_NAME, match[2]))
    if not match or match[4] or not known or not 0 < int(match[3]) < 65536:
        raise ValueError("not host:port with a port between 1 and 65535")
    return Address((match[1] or match[2]).lower(), int(match[3]))


def parse_announce(text: str) -> Address:
    """An address or a name, with a port or without (then 0)."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if pack_ip(bare) is not None or re.match(HOST_NAME, bare):
        return Address(bare.lower(), 0)
    try:
        return parse_host_port(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is no address, address:port or host name") from error


def parse_hop(text: str) -> HopConfig:
    """scheme://[user:password@]host:port, or just direct or block."""
    if text in ("direct", "block"):
        return HopConfig(text)
    match = re.match(_URL, text)
    if not match:
        raise ValueError("not an upstream: write scheme://host:port, direct or block")
    scheme, authority, query = match.groups()
    if scheme not in HOP_SCHEMES[2:]:
        raise ValueError(
            f"'{scheme}' is no scheme of an upstream" + suggestion(scheme, HOP_SCHEMES)
        )
    if query:
        raise ValueError("write what follows the '?' as keys beside the url")
    if scheme == "tunnel":
        if not re.match(AGENT_NAME, authority):
            raise ValueError("a tunnel is tunnel://NAME, with the name of an agent")
        return HopConfig(scheme, Address(authority, 0))
    credentials, _, server = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    user, password = _unescape(user), _unescape(password)
    if scheme.startswith("socks5") and (
        bool(user) != bool(password) or max(len(user.encode()), len(password.encode())) > 255
    ):
        raise ValueError("SOCKS5 takes a user and a password of 1 to 255 bytes each")
    if scheme in ("socks4", "socks4a") and (password or len(user.encode()) > 255 or "\0" in user):
        raise ValueError("SOCKS4 takes a user of up to 255 bytes, and no password")
    return HopConfig(scheme, parse_host_port(server), user, password)


def hop_node(text: str, place: str) -> Node:
    """An upstream's mapping from a URL with a query; ValueError."""
    url, _, query = text.partition("?")
    if "@" in query:  # and no message may repeat a part of a password
        raise ValueError(
            "a '?' in a user name or password is written as %3F, an '@' in a value as %40"
        )
    mapping = {"url": Node(url, place)}
    _insert_all(mapping, query, place)
    return Node(mapping, place)


def listener_node(text: str, place: str) -> Node:
    """A listener's mapping from a URL: its query parameters are the listener's keys, "a.b" for nested ones."""
    match = re.match(_URL, text)
    if not match:
        raise ValueError("not a listener: write scheme://host:port")
    scheme, authority, query = match.groups()
    if "@" in authority:
        raise ValueError("a listener's URL takes no user: write 'users' into a file")
    mapping = {"protocol": Node(scheme, place), "listen": Node(authority, place)}
    _insert_all(mapping, query or "", place)
    return Node(mapping, place)


def _insert_all(mapping: dict[str, Node], query: str, place: str) -> None:
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        _insert(mapping, key.split("."), _scalar_or_list(_unescape(value), place), place)


def _insert(mapping: dict[str, Node], keys: list[str], node: Node, place: str) -> None:
    for key in keys[:-1]:
        inner = mapping.setdefault(key, Node({}, place))
        if not isinstance(inner.value, dict):
            raise ValueError(f"'{key}' is given twice")
        mapping = inner.value
    if keys[-1] in mapping:
        raise ValueError(f"'{keys[-1]}' is given twice")
    mapping[keys[-1]] = node


def _scalar_or_list(value: str, place: str) -> Node:
    return (
        Node([Node(part, place) for part in value.split(",")], place)
        if "," in value
        else Node(value, place)
    )


def _unescape(text: str) -> str:
    raw = re.sub(_ESCAPE, lambda match: chr(int(match[1], 16)), text.encode().decode("latin-1"))
    try:
        return raw.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise ValueError("a %-escape is not UTF-8") from error
