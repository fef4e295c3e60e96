"""Fixed targets and DNS of goproxy: tcp, udp and dns become listeners."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.goproxy import listeners
from netproxy.ctl.convert.command_lines.goproxy.lists import permitted_clients
from netproxy.ctl.convert.command_lines.goproxy.parents import Parents
from netproxy.ctl.convert.command_lines.goproxy.proxies import add_listener, listen_text, lose
from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint, parse_endpoint
from netproxy.ctl.convert.command_lines.name_servers import OTHERS, add_servers
from netproxy.ctl.convert.draft.listeners import permit
from netproxy.ctl.convert.source import ConversionError
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes

PORTS_LIMIT = 100
"""Listeners of one command that have a target each: more are nothing that people read."""
_SERVERS = "1.1.1.1,8.8.8.8,9.9.9.9"
"""What goproxy asks if -q is not given."""
_TRANSPORT = "a target is reached by {}: bytes are passed on as they are"
_ONE_TARGET = "a listener has one target: the first"
_SYSTEM = (
    "a dns listener needs servers of its own, not those of the system",
    "write dns: {servers: [...]} and a listener with protocol: dns",
)


def add_forward(options: Options, draft: Draft, notes: Notes) -> None:
    """Add the listeners of tcp or udp."""
    network = options.command
    why = listeners.lost_reason(options)
    transport = options.text("-T") or network
    if not why and transport != network:
        why = f"-T {transport}: {_TRANSPORT.format(network.upper())}"
    if not why and options.has("--C"):
        why = "--C makes its bytes readable for goproxy alone"
    places = options.texts("-P")
    try:
        ends = listeners.listener_ends(options)
        pairs = _pairs(options, ends, places[0] if places else "")
    except ValueError as error:
        pairs, why = [], why or str(error)
    if why:
        lose(options, why, notes)
        return
    notes.carried(options.directive)
    if len(places) > 1:
        options.changed("-P", _ONE_TARGET)
    upstream = Parents(options, draft, notes).jumper()
    clients, denied = permitted_clients(options)
    for end, target in pairs:
        settings: dict[str, Value] = {"protocol": network, "listen": listen_text(end)}
        settings["target"] = target
        if upstream != "direct":
            settings["upstream"] = upstream
        entry, _ = add_listener(options, settings, draft)
        permit(entry, clients)
        if denied:
            entry.settings["clients_deny"] = [*denied]


def _pairs(options: Options, ends: list[Endpoint], place: str) -> list[tuple[Endpoint, str]]:
    """Return the ports with their targets.  Raises ValueError if there are none."""
    target = parse_endpoint(place.partition("?")[0])
    count = sum(len(end.ports) for end in ends)
    is_locked = options.flag("--lock-port") or (count == 1 and target.port != "0")
    if is_locked:
        if not target.port.isdigit() or not 0 < int(target.port) <= networks.LAST_PORT:
            raise ValueError("-P is not a target with a port")
        text = networks.listen_text(target.host or "127.0.0.1", target.port)
        return [(end, text) for end in ends]
    if count > PORTS_LIMIT:
        raise ValueError(f"more than {PORTS_LIMIT} ports, each with a target of its own")
    return [
        (Endpoint(end.host, str(port)), networks.listen_text(target.host or "127.0.0.1", port))
        for end in ends
        for port in end.ports
    ]


def add_dns(options: Options, draft: Draft, notes: Notes) -> None:
    """Add the listener of dns, and its servers."""
    parent = Parents(options, draft, notes).add("http")
    mode = options.text("--default") or ("proxy" if options.has("-P") else "direct")
    if mode == "system":
        notes.lost(options.directive, *_SYSTEM)
        options.lose_all("dns is not carried")
        return
    notes.carried(options.directive)
    texts = (options.text("-q") or _SERVERS).replace("#", ":").split(",")
    upstream = parent if mode == "proxy" else "direct"
    servers = [text.strip() for text in texts if text.strip()]
    for problem in add_servers(draft, servers, upstream, options.origins("-q")):
        if problem == OTHERS:
            options.changed("-q", problem)
        else:
            options.lost("-q", problem)
    _put_hosts(options, draft)
    try:
        ends = listeners.listener_ends(options)
    except ValueError as error:
        lose(options, str(error), notes)
        return
    clients, denied = permitted_clients(options)
    for end in ends:
        settings: dict[str, Value] = {"protocol": "dns", "listen": listen_text(end)}
        entry, _ = add_listener(options, settings, draft)
        permit(entry, clients)
        if denied:
            entry.settings["clients_deny"] = [*denied]


def _put_hosts(options: Options, draft: Draft) -> None:
    """Carry the file of addresses, as hosts(5) has them."""
    try:
        lines = options.elements("--hosts") or []
    except ConversionError as error:
        options.lost("--hosts", str(error))
        return
    hosts: dict[str, Value] = {}
    for line in lines:
        address, *names = line.split()
        for name in names:
            if "*" in name or not networks.is_host(address):
                options.lost("--hosts", f"{name}: has no fixed address that dns.hosts can have")
            else:
                known = hosts.setdefault(name.lower(), [])
                assert isinstance(known, list)
                known.append(address)
    if hosts:
        draft.put("dns.hosts", hosts, *options.origins("--hosts"))
