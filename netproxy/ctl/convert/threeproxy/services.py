"""The services of 3proxy: each becomes a listener, with the access list that is active then."""

from __future__ import annotations

import re

from netproxy.ctl.convert.draft.listeners import free_name
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Entry as DraftEntry, Value
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.threeproxy.entries import Entry
    from netproxy.ctl.convert.threeproxy.lines import Command

PROTOCOLS = {
    **{"proxy": "http", "httppr": "http", "socks": "socks5", "auto": "sps"},
    **{"tcppm": "tcp", "udppm": "udp", "dnspr": "dns"},
}
"""The protocol of listeners for each service."""
_PORTS = {"http": 3128, "socks5": 1080, "sps": 8080, "dns": 53}
_IGNORED = re.compile(
    r"-(n|a|a2|l.*|f.*|g.*|o[cslrR].*|s\d?|C1?|U\d?|t|d|b\d+|B\d+|T|u|u2|S\d+|x|46|64)"
)
_LOST = {
    "-R": "connections of other 3proxy services are not taken (see reverse tunnels)",
    "-r": "no connection is made to another service (see reverse tunnels)",
    "-a1": "fields of requests are not changed",
    "-Di": "a listener has an address, no interface",
    "-ni": "the service manager chooses the network namespace",
    "-ne": "the service manager chooses the network namespace",
}


class State(NamedTuple):
    """What the commands before a service have set."""

    auth: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    internal: str = ""
    external: str = ""
    maxconn: int = 0
    tls: tuple[tuple[str, str], ...] = ()
    """The keys of a listener's `tls`; () without TLS."""
    origins: tuple[Directive, ...] = ()
    """The commands that a listener comes from, except the entries."""


class Service(NamedTuple):
    """A listener, and who may do what there."""

    directive: Directive
    listener: DraftEntry
    name: str
    protocol: str
    state: State


def add_service(command: Command, state: State, draft: Draft, notes: Notes) -> Service | None:
    """Add the listener of a service; None if it cannot be one."""
    protocol = PROTOCOLS[command.name]
    options = [word for word in command.words if word.startswith("-")]
    places = [word for word in command.words if not word.startswith("-")]
    notes.carried(command.directive)
    values = _values(command, options, notes)
    port = values.get("p", "")
    settings: dict[str, Value] = {"protocol": protocol}
    if protocol in ("tcp", "udp"):
        if len(places) != 3 or not all(place.isdigit() for place in (places[0], places[2])):
            notes.lost(command.directive, "is not a port, a target and its port")
            return None
        port = places[0]
        settings["target"] = networks.listen_text(places[1], places[2])
    if port and not (port.isdigit() and 0 < int(port) <= networks.LAST_PORT):
        notes.lost(command.directive, "has no port")
        return None
    port = port or str(_PORTS[protocol])
    host = values.get("i", state.internal)
    is_path = host.startswith("unix:/")
    settings["listen"] = host if is_path else networks.listen_text(_host(host), port)
    if host.startswith("unix:@"):
        notes.lost(command.directive, "abstract sockets are not supported", "write unix:/PATH")
        return None
    if protocol in ("http", "sps"):
        settings["network"] = ["tcp"]
    name = free_name(draft, protocol, str(settings["listen"]))
    if name != f"{protocol}-{port}":
        settings["name"] = name
    _set_details(settings, values, state)
    listener = draft.listener(settings, *state.origins, command.directive)
    return Service(command.directive, listener, name, protocol, state)


def _host(host: str) -> str:
    return "" if host in ("0.0.0.0", "::") else host


def _values(command: Command, options: Sequence[str], notes: Notes) -> dict[str, str]:
    """Return the values of options: p, i, e, Ni, De and H."""
    values: dict[str, str] = {}
    for option in options:
        match = re.fullmatch(r"-(Ni|De|p|i|e)(.+)", option)
        lost = next((reason for start, reason in _LOST.items() if option.startswith(start)), "")
        if match and not lost:
            values.setdefault(match[1], match[2])
        elif option in ("-H", "-6", "-4"):
            values[option[1:]] = "yes"
        elif lost:
            notes.lost(command.directive, f"{option}: {lost}")
        elif option.startswith("-Ne"):
            notes.changed(command.directive, f"{option}: CONNECT is answered with the real address")
        elif not _IGNORED.fullmatch(option):
            notes.lost(command.directive, f"the option {option} is not supported")
    return values


def _set_details(settings: dict[str, Value], values: dict[str, str], state: State) -> None:
    protocol = settings["protocol"]
    external = values.get("De") or values.get("e") or state.external
    if external and external not in ("0.0.0.0", "::") and protocol != "dns":
        settings["bind"] = external
    if "Ni" in values and protocol in ("socks5", "sps"):
        settings["announce"] = values["Ni"]
    if "H" in values and protocol not in ("udp", "dns"):
        settings["proxy_protocol"] = [*networks.EVERYBODY]
    if state.maxconn and protocol != "udp":
        settings["limits"] = {"connections": state.maxconn}
    if state.tls and protocol not in ("udp", "dns"):
        settings["tls"] = dict(state.tls)
