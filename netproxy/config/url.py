"""Addresses and URLs as users write them, on the command line and in the file.

Pure functions.  A ValueError says what is wrong; because a URL may hold a password, no message
repeats one.
"""

from __future__ import annotations

import re

from netproxy.config.node import EDITS_LIMIT, Node, suggestion
from netproxy.config.schema import HopConfig
from netproxy.interfaces.addresses import ActivationAddress, Address, pack_ip

PLAIN_SCHEMES = ("direct", "block")
"""Hops that are no proxy, written without "://"."""
PROXY_SCHEMES = (
    *("socks4", "socks4a", "socks5", "socks5h", "http", "https"),
    *("socks5+tls", "socks5h+tls", "tunnel"),
)
HOP_SCHEMES = PLAIN_SCHEMES + PROXY_SCHEMES
# Expressions as text: `re` compiles them when they are first needed, which may be never.
_URL = r"([a-z][a-z0-9+.-]*)://([^/?#]*)/?(?:\?([^#]*))?\Z"
_ACTIVATION = r"systemd:[!-9;-~]{1,255}\Z"
_HOST_PORT = r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})(?:-([0-9]{1,5}))?\Z"
_ESCAPE = r"%([0-9A-Fa-f]{2})"
AGENT_NAME = r"[A-Za-z0-9_-]{1,63}\Z"
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\Z"


# -- addresses


def parse_listen(text: str) -> tuple[Address, ...]:
    """Return the addresses of "host:port", ":port", "[v6]:port", "host:first-last".

    ":port" is the address "::", which stands for both families on a machine that has them.
    "systemd:NAME" is an ActivationAddress.  Raises ValueError for anything else.
    """
    # "systemd:80" is port 80 of a host with that name.
    if re.match(_ACTIVATION, text) and not text[8:].isdigit():
        return (ActivationAddress(text, 0),)
    match = re.match(_HOST_PORT, text)
    if not match:
        raise ValueError(
            f"'{text}' is not an address to listen on (expected host:port, :port or [v6]:port)"
        )
    first = int(match[3])
    last = int(match[4] or first)
    if last > 65535 or last < first:
        raise ValueError(f"'{text}' is not a port or a range of ports between 0 and 65535")
    host = match[1] or match[2] or "::"
    return tuple(Address(host, port) for port in range(first, last + 1))


def parse_host_port(text: str) -> Address:
    """Return the address of "host:port" with a port from 1 to 65535.

    Raises ValueError for anything else.  The message does not repeat the text.
    """
    match = re.match(_HOST_PORT, text)
    is_host = match and (
        pack_ip(match[1]) is not None if match[1] else re.match(HOST_NAME, match[2])
    )
    if not match or match[4] or not is_host or not 0 < int(match[3]) < 65536:
        raise ValueError("must be host:port with a port between 1 and 65535")
    return Address((match[1] or match[2]).lower(), int(match[3]))


def parse_announce(text: str) -> Address:
    """Return the address of a host with or without port; without, the port is 0.

    Raises ValueError for anything else.
    """
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if pack_ip(bare) is not None or re.match(HOST_NAME, bare):
        return Address(bare.lower(), 0)
    try:
        return parse_host_port(text)
    except ValueError as error:
        raise ValueError(f"'{text}' is not an address, address:port or host name") from error


# -- URLs


def parse_hop(text: str) -> HopConfig:
    """Return the hop of "direct", "block" or "scheme://[user:password@]host:port".

    Raises ValueError for anything else, including a query.
    """
    if text in PLAIN_SCHEMES:
        return HopConfig(text)
    match = re.match(_URL, text)
    if not match:
        raise ValueError("not an upstream: write scheme://host:port, direct or block")
    scheme, authority, query = match.groups()
    _check_scheme(scheme)
    if query:
        raise ValueError("write what follows the '?' as keys beside the url")
    if scheme == "tunnel":
        if not re.match(AGENT_NAME, authority):
            raise ValueError("a tunnel is written tunnel://NAME, with the name of an agent")
        return HopConfig(scheme, Address(authority, 0))
    credentials, _, server = authority.rpartition("@")
    user, _, password = credentials.partition(":")
    user, password = _unescape(user), _unescape(password)
    _check_credentials(scheme, user, password)
    return HopConfig(scheme, parse_host_port(server), user, password)


def _check_scheme(scheme: str) -> None:
    """Raise ValueError for an unknown scheme, with the scheme that was probably meant."""
    if scheme in PROXY_SCHEMES:
        return
    if scheme in PLAIN_SCHEMES:
        raise ValueError(f"write {scheme} without '://'")
    hint = suggestion(scheme, HOP_SCHEMES, EDITS_LIMIT)
    expected = f" (expected one of {', '.join(PROXY_SCHEMES)})"
    raise ValueError(f"'{scheme}' is not an upstream scheme{hint or expected}")


def _check_credentials(scheme: str, user: str, password: str) -> None:
    """Raise ValueError for credentials that the protocol cannot carry."""
    lengths = len(user.encode()), len(password.encode())
    if scheme.startswith("socks5") and (bool(user) != bool(password) or max(lengths) > 255):
        # RFC 1929: both have 1 to 255 bytes.
        raise ValueError("SOCKS5 takes a user and a password of 1 to 255 bytes each")
    if scheme in ("socks4", "socks4a") and (password or lengths[0] > 255 or "\0" in user):
        raise ValueError("SOCKS4 takes a user of up to 255 bytes, and no password")


def hop_node(text: str, place: str) -> Node:
    """Return the mapping that a hop's URL with a query stands for.  Raises ValueError."""
    url, _, query = text.partition("?")
    # An unescaped '?' in a password makes the rest of it the query.
    if "@" in query:
        raise ValueError(
            "a '?' in a user name or password is written as %3F, an '@' in a value as %40"
        )
    mapping = {"url": Node(url, place)}
    _insert_query(mapping, query, place)
    return Node(mapping, place)


def listener_node(text: str, place: str) -> Node:
    """Return the mapping that a listener's URL stands for.  Raises ValueError.

    The query parameters are the listener's keys; "a.b" is the key b of the mapping a.
    """
    match = re.match(_URL, text)
    if not match:
        raise ValueError("not a listener: write scheme://host:port")
    scheme, authority, query = match.groups()
    if "@" in authority:
        raise ValueError("a listener's URL takes no user: write 'users' into a file")
    mapping = {"protocol": Node(scheme, place), "listen": Node(authority, place)}
    _insert_query(mapping, query or "", place)
    return Node(mapping, place)


def _insert_query(mapping: dict[str, Node], query: str, place: str) -> None:
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        text = _unescape(value)
        if "\0" in text:
            raise ValueError("a value contains a NUL character (%00)")
        _insert(mapping, key.split("."), _scalar_or_list(text, place), place)


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
    if "," not in value:
        return Node(value, place)
    return Node([Node(part, place) for part in value.split(",")], place)


def _unescape(text: str) -> str:
    """Return the text with its %-escapes decoded as UTF-8.  Raises ValueError."""
    try:
        raw = re.sub(_ESCAPE, _escaped_byte, text.encode().decode("latin-1"))
    except UnicodeEncodeError as error:
        # An argument of the command line with other bytes.
        raise ValueError("not UTF-8") from error
    try:
        return raw.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise ValueError("a %-escape is not UTF-8") from error


def _escaped_byte(match: re.Match[str]) -> str:
    return chr(int(match[1], 16))
