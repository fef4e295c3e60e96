"""Addresses and URLs as users write them, on the command line and in the file.

Pure functions.  A ValueError says what is wrong; because a URL may hold a password, no message
repeats one.
"""

from __future__ import annotations

import re

from netproxy.config.tree.node import Node
from netproxy.config.schema import HopConfig
from netproxy.config.units import parse_unix
from netproxy.interfaces.addresses import UNIX_PREFIX, ActivationAddress, Address, pack_ip
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.config.tree.problems import Problems

PLAIN_SCHEMES = ("direct", "block")
"""Hops that are no proxy, written without "://"."""
PROXY_SCHEMES = (
    *("socks4", "socks4a", "socks5", "socks5h", "http", "https"),
    *("socks5+tls", "socks5h+tls", "tunnel"),
)
HOP_SCHEMES = PLAIN_SCHEMES + PROXY_SCHEMES
PORT_LIMIT = 65535
# Expressions as text: `re` compiles them when they are first needed, which may be never.
# The server is host:port or, as in nginx, unix:/path: all schemes are the same for both.
_URL = r"([a-z][a-z0-9+.-]*)://((?:[^/?#]*@)?unix:[/@][^?#]*|[^/?#]*)/?(?:\?([^#]*))?\Z"
_UNIX_SERVER = r"(?:(.*)@)?(unix:[/@].*)\Z"
_ACTIVATION = r"systemd:[!-9;-~]{1,255}\Z"
_HOST_PORT = r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})(?:-([0-9]{1,5}))?\Z"
_SERVICE = r"tunnel://([A-Za-z0-9_-]{1,63})/([0-9]{1,5})/?\Z"
_WORD = r"[A-Za-z0-9_.-]{1,63}\Z"
_ESCAPE = r"%([0-9A-Fa-f]{2})"
AGENT_NAME = r"[A-Za-z0-9_-]{1,63}\Z"
# A last label that is a number makes an address: 10.0.0 is a mistake, not a name.
_NUMBER = r"(?:[0-9]+|0[xX][0-9a-fA-F]*)\Z"
HOST_NAME = rf"(?:[A-Za-z0-9_-]{{1,63}}\.)*(?!{_NUMBER})[A-Za-z0-9_-]{{1,63}}\Z"


# -- addresses


def parse_listen(text: str) -> tuple[Address, ...]:
    """Return the addresses of "host:port", ":port", "[v6]:port", "host:first-last".

    ":port" is the address "::", which stands for both families on a machine that has them, and
    "localhost" is 127.0.0.1.
    "systemd:NAME" is an ActivationAddress.  Raises ValueError for anything else.
    """
    # "systemd:80" is port 80 of a host with that name.
    if re.match(_ACTIVATION, text) and not text[8:].isdigit():
        return (ActivationAddress(text, 0),)
    match = re.match(_HOST_PORT, text)
    if not match or (match[1] is not None and ":" not in match[1]):
        raise ValueError(f"'{text}' is not an address to listen on {_listen_hint(text)}")
    first = int(match[3])
    last = int(match[4] or first)
    if max(first, last) > PORT_LIMIT:
        raise ValueError(f"'{text}': port {max(first, last)} is above {PORT_LIMIT}")
    if last < first:
        message = f"the range of ports ends before it begins (write {last}-{first})"
        raise ValueError(f"'{text}': {message}")
    host = match[1] or match[2] or "::"
    if host.lower() == "localhost":
        host = "127.0.0.1"
    return tuple(Address(host, port) for port in range(first, last + 1))


def _listen_hint(text: str) -> str:
    if text.isascii() and text.isdigit():
        return f"(write 127.0.0.1:{text} for this machine alone, :{text} for every address)"
    return with_brackets(text) or "(expected host:port, :port or [v6]:port)"


def with_brackets(text: str) -> str:
    """Return "(write [::1]:1080)" for an IPv6 address and a port without brackets, else ""."""
    host, _, port = text.rpartition(":")
    if ":" not in host or not port.isdigit():
        return ""
    if pack_ip(host) is None:
        return "(write an IPv6 address in brackets: [v6]:port)" if pack_ip(text) else ""
    return f"(write [{host}]:{port})"


def parse_host_port(text: str) -> Address:
    """Return the address of "host:port" with a port from 1 to 65535.

    Raises ValueError for anything else.  The message does not repeat the text.
    """
    match = re.match(_HOST_PORT, text)
    is_host = match and (_is_host(match[2]) if match[1] is None else pack_ip(match[1]) is not None)
    if not match or match[4] or not is_host or not 0 < int(match[3]) < 65536:
        hint = " (an IPv6 address in brackets: [v6]:port)" if with_brackets(text) else ""
        raise ValueError(f"must be host:port with a port between 1 and 65535{hint}")
    return Address((match[1] or match[2]).lower(), int(match[3]))


def parse_target(text: str) -> Address:
    """Return the address of "host:port", or that of a UNIX socket.  Raises ValueError."""
    return parse_unix(text) if text.startswith(UNIX_PREFIX) else parse_host_port(text)


def _is_host(text: str) -> bool:
    """Return whether a text is an IPv4 address or a name."""
    return bool(pack_ip(text) or re.match(HOST_NAME, text))


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
    """Return the hop of "direct", "block" or "scheme://[user:password@]server".

    The server is host:port or unix:/path.  A tunnel is "tunnel://agent", or "tunnel://agent/port"
    for one of the agent's services.  Raises ValueError for anything else, including a query.
    """
    if text in PLAIN_SCHEMES:
        return HopConfig(text)
    if service := re.match(_SERVICE, text):
        if not 0 < int(service[2]) <= PORT_LIMIT:
            raise ValueError(f"the port of a tunnel's service must be from 1 to {PORT_LIMIT}")
        return HopConfig("tunnel", Address(service[1], int(service[2])))
    match = re.match(_URL, text)
    if not match:
        # A word alone is no URL, and holds no password.
        subject = f"'{text}' is " if re.match(_WORD, text) else ""
        expected = "write scheme://host:port, direct or block"
        raise ValueError(f"{subject}not an upstream: {expected}{_why(text)}")
    scheme, authority, query = match.groups()
    _check_scheme(scheme)
    if query:
        raise ValueError("write what follows the '?' as keys beside the url")
    if scheme == "tunnel":
        if not re.match(AGENT_NAME, authority):
            raise ValueError(
                "a tunnel is written tunnel://NAME or tunnel://NAME/PORT, with the name of an agent"
            )
        return HopConfig(scheme, Address(authority, 0))
    credentials, _, server = authority.rpartition("@")
    if match := re.match(_UNIX_SERVER, authority):
        credentials, server = match[1] or "", _unescape(match[2])
    user, _, password = credentials.partition(":")
    user, password = _unescape(user), _unescape(password)
    _check_credentials(scheme, user, password)
    return HopConfig(scheme, parse_target(server), user, password)


def _why(text: str) -> str:
    """Return what an upstream's URL lacks; repeats nothing of it, which may be a password."""
    if "://" not in text and re.match(_HOST_PORT, text):
        return " (the scheme is missing: socks5://... or http://...)"
    if text.partition("://")[0].endswith("+unix"):
        return " (a UNIX socket is written scheme://unix:/path)"
    credentials, at, _ = text.partition("://")[2].rpartition("@")
    if at and any(char in credentials for char in "/?#"):
        return " (in a user name or password, / is written as %2F, ? as %3F, # as %23)"
    return ""


def _check_scheme(scheme: str) -> None:
    """Raise ValueError for an unknown scheme, with the scheme that was probably meant."""
    if scheme in PROXY_SCHEMES:
        return
    if scheme in PLAIN_SCHEMES:
        raise ValueError(f"write {scheme} without '://'")
    from netproxy.config.tree.hints import EDITS_LIMIT, suggestion  # late: only for errors

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


def hop_node(text: str, origin: Node) -> Node:
    """Return the mapping that a hop's URL with a query stands for.  Raises ValueError.

    `origin`: the node that the URL was written as.
    """
    url, _, query = text.partition("?")
    # An unescaped '?' in a password makes the rest of it the query.
    if "@" in query:
        raise ValueError(
            "a '?' in a user name or password is written as %3F, an '@' in a value as %40"
        )
    origin = origin._replace(key_place="")
    mapping = {"url": origin._replace(value=url)}
    _insert_query(mapping, query, origin)
    return origin._replace(value=mapping)


def listener_node(text: str, place: str) -> Node:
    """Return the mapping that a listener's URL on the command line stands for.

    Raises ValueError.
    The query parameters are the listener's keys; "a.b" is the key b of the mapping a.
    """
    match = re.match(_URL, text)
    if not match:
        raise ValueError(f"not a listener: write scheme://host:port{_listener_hint(text)}")
    scheme, authority, query = match.groups()
    if "@" in authority:
        raise ValueError("a listener's URL takes no user: write 'users' into a file")
    mapping = {"protocol": Node(scheme, place), "listen": Node(authority, place)}
    _insert_query(mapping, query or "", Node("", place))
    return Node(mapping, place)


def listener_nodes(urls: Sequence[str], problems: Problems) -> list[Node]:
    """Return the mappings of listeners' URLs on the command line; errors go to `problems`."""
    nodes = []
    for number, url in enumerate(urls):
        place = f"-l[{number}]"  # not the URL: it may hold a secret
        try:
            nodes.append(listener_node(url, place))
        except ValueError as error:
            problems.add(str(error), place)
    return nodes


def _listener_hint(text: str) -> str:
    """Return the URL that an address or a port alone probably means."""
    if text.isdigit():
        return f" (sps://127.0.0.1:{text} for this machine alone, sps://:{text} for others too)"
    return f" (sps://{text})" if re.match(_HOST_PORT, text) else ""


def _insert_query(mapping: dict[str, Node], query: str, origin: Node) -> None:
    for pair in filter(None, query.split("&")):
        key, _, value = pair.partition("=")
        text = _unescape(value)
        if "\0" in text:
            raise ValueError("a value contains a NUL character (%00)")
        values = [origin._replace(value=part) for part in text.split(",")]
        _insert(mapping, key.split("."), values, origin)


def _insert(mapping: dict[str, Node], keys: list[str], values: list[Node], origin: Node) -> None:
    """Insert one value, or a list of several."""
    for key in keys[:-1]:
        inner = mapping.setdefault(key, origin._replace(value={}))
        if not isinstance(inner.value, dict):
            raise ValueError(f"'{key}' is given twice")
        mapping = inner.value
    if keys[-1] in mapping:
        raise ValueError(f"'{keys[-1]}' is given twice")
    mapping[keys[-1]] = values[0] if len(values) == 1 else origin._replace(value=values)


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
