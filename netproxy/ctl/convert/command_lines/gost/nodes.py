"""Nodes of gost: what -L and -F name, with their parameters.

    [protocol+transport://][user:password@]host:port[,host:port][/target,target][?key=value&...]

Notes have no user names and no secrets.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote, unquote_plus

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes

ALIASES = {
    **{"cert": "certFile", "tls.certFile": "certFile", "key": "keyFile", "tls.keyFile": "keyFile"},
    **{"ca": "caFile", "tls.caFile": "caFile", "max_fails": "maxFails", "mark": "so_mark"},
    **{"fail_timeout": "failTimeout", "probe_resist": "probeResist", "keepalive": "keepAlive"},
    **{"ssh_key": "privateKeyFile", "tls.secure": "secure", "tls.serverName": "serverName"},
}
"""Other names of parameters: those of version 2, and those with a scope."""
_SCOPES = ("service", "listener", "handler", "hop", "node", "dialer", "connector")
# A parameter that means another thing without its scope.
_SCOPED = ("handler.proxyProtocol",)
SECRETS = re.compile(r"(?i)auth$|(?<!by)pass|secret$|token|tunnel|router|cipher")
_TRUE = ("1", "t", "true", "yes")


class Parameter(NamedTuple):
    """A parameter and its directive."""

    value: str
    directive: Directive


class Endpoint(NamedTuple):
    """A host and a port; the host is "" for any."""

    host: str
    port: str
    """A number or a range."""

    @property
    def ports(self) -> range:
        """The ports.  Raises ValueError if they are none."""
        return networks.parse_port_range(self.port)


class Node:
    """What one -L or -F says."""

    def __init__(self, text: str, directive: Directive, notes: Notes) -> None:
        self.directive = directive
        self._notes = notes
        place, _, query = text.strip().partition("?")
        scheme, rest = _split_scheme(place)
        rest = rest.partition("#")[0]
        authority, slash, path = rest.partition("/")
        credentials, at, server = authority.rpartition("@")
        self.path = f"/{path}" if slash else ""
        self.server = server
        self.protocol, self.transport = _layers(scheme.lower())
        user, colon, password = credentials.partition(":")
        self.login: tuple[str, str] | None = (unquote(user), unquote(password)) if at else None
        self.users: list[tuple[str, str]] = []
        """Several logins of a service, from a file of configuration."""
        self.others: list[Node] = []
        """The other nodes of a hop, if they are not alike."""
        self._parameters: dict[str, Parameter] = {}
        for pair in filter(None, re.split(r"[&;]", query)):
            key, _, value = pair.partition("=")
            self.add(unquote_plus(key), unquote_plus(value), directive)
        if self.login is None and (encoded := self.text("auth")):
            self.login = decoded_login(encoded)

    def add(self, key: str, value: str, place: Directive) -> None:
        """Add a parameter, which is a directive of its own."""
        shown = "***" if SECRETS.search(key) else value
        self.put(key, value, self._notes.directive(place.file, place.line, f"{key}={shown}"))

    def put(self, key: str, value: str, directive: Directive) -> None:
        """Add a parameter that has a directive."""
        scope, dot, rest = key.partition(".")
        name = rest if dot and scope in _SCOPES and key not in _SCOPED else key
        self._parameters[ALIASES.get(name, name)] = Parameter(value, directive)

    @property
    def scheme(self) -> str:
        """Its protocol and transport, as gost shows them."""
        return "+".join(filter(None, (self.protocol, self.transport)))

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where it listens, or the servers that it names."""
        return [parse_endpoint(text) for text in self.server.split(",") if text]

    @property
    def targets(self) -> list[Endpoint]:
        """The targets in its path."""
        return [parse_endpoint(unquote(text)) for text in self.path.strip("/").split(",") if text]

    def text(self, *keys: str) -> str:
        """Return the value of the first of the parameters that is given; it is carried then."""
        for key in keys:
            if key in self._parameters:
                parameter = self._parameters[key]
                if not self._notes.is_noted(parameter.directive):
                    self._notes.carried(parameter.directive)
                return parameter.value
        return ""

    def flag(self, key: str) -> bool:
        """Return the truth of a parameter, which is carried."""
        return self.text(key).lower() in _TRUE

    def number(self, key: str) -> int:
        """Return the number of a parameter, which is carried; 0 if it is none."""
        text = self.text(key)
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0

    def has(self, key: str) -> bool:
        """Return whether a parameter is given."""
        return key in self._parameters

    def keys(self) -> list[str]:
        """Return the names of all parameters."""
        return list(self._parameters)

    def origins(self, *keys: str) -> list[Directive]:
        """Return the directives of the parameters that are given."""
        return [self._parameters[key].directive for key in keys if key in self._parameters]

    def changed(self, key: str, why: str, advice: str = "") -> None:
        """Note a difference of a parameter."""
        for directive in self.origins(key):
            self._notes.changed(directive, why, advice)

    def lost(self, key: str, why: str, advice: str = "") -> None:
        """Note that a parameter is not carried."""
        for directive in self.origins(key):
            self._notes.lost(directive, why, advice)

    def unneeded(self, key: str, why: str) -> None:
        """Note that a parameter needs no setting."""
        for directive in self.origins(key):
            self._notes.unneeded(directive, why)

    def rest(self) -> list[str]:
        """Return the parameters that nothing has noted."""
        noted = self._notes.is_noted
        return [
            key for key, parameter in self._parameters.items() if not noted(parameter.directive)
        ]


def shown_node(text: str) -> str:
    """Return a node without its login and its parameters."""
    scheme, rest = _split_scheme(text.partition("?")[0])
    authority, slash, path = rest.partition("/")
    server = authority.rpartition("@")[2]
    start = f"{scheme}://" if scheme else ""
    return f"{start}{'***@' if '@' in authority else ''}{server}{slash}{path}"


def parse_endpoint(text: str) -> Endpoint:
    """Return the host and the port of "host:port"."""
    host, colon, port = text.strip().rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text.strip(), ""
    return Endpoint(host.strip("[]"), port)


def decoded_login(text: str) -> tuple[str, str] | None:
    """Return the user and the password of base64; None if it is none."""
    padded = text.strip() + "=" * (-len(text.strip()) % 4)
    try:
        plain = base64.b64decode(padded.replace("-", "+").replace("_", "/"), validate=True)
        user, colon, password = plain.decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (user, password) if colon or user else None


def _split_scheme(text: str) -> tuple[str, str]:
    """Return the scheme of a node, "" if it has none, and what follows."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    return (match[1], text[match.end() :]) if match else ("", text)


def _layers(scheme: str) -> tuple[str, str]:
    """Return the protocol and the transport; "" for what the scheme leaves open."""
    protocol, plus, transport = scheme.partition("+")
    if protocol == "https" and not plus:
        return "http", "tls"
    if plus:
        return protocol, transport
    if protocol in TRANSPORTS:
        return "", protocol
    return protocol, ""


TRANSPORTS = (
    *("tls", "mtls", "utls", "ws", "wss", "mws", "mwss", "kcp", "quic", "ssh", "h2", "h2c", "h3"),
    *("grpc", "pht", "phts", "ohttp", "otls", "obfs4", "ftcp", "icmp", "icmp6", "dtls", "mtcp"),
    *("wt", "http3"),
)
"""Schemes that are a transport alone: the protocol is then the one that gost takes by itself."""
