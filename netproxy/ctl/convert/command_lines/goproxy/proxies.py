"""The proxies of goproxy: http, socks and sps become listeners, -P their upstream."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.goproxy import listeners
from netproxy.ctl.convert.command_lines.goproxy.lists import Rules, permitted_clients
from netproxy.ctl.convert.command_lines.goproxy.parents import Parents
from netproxy.ctl.convert.command_lines.goproxy.users import read_users
from netproxy.ctl.convert.command_lines.gost.nodes import parse_endpoint
from netproxy.ctl.convert.command_lines.name_servers import OTHERS, add_servers
from netproxy.ctl.convert.draft.listeners import default_name, free_name, permit
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.command_lines.logins import Login, Logins
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value
    from netproxy.ctl.convert.draft.rule_list import RuleList
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.terms.conditions import Match

PROTOCOLS = {"http": "http", "socks": "socks5", "sps": "sps"}
_KINDS = {"http": "http", "socks": "socks", "sps": "http"}
_REDIRECTED = "serves connections that a rule of the kernel leads here, and no others"
_NO_UDP = "goproxy relays UDP only with --udp: delete `network` to serve UDP"


class Proxy(NamedTuple):
    """The listeners of one command."""

    options: Options
    names: list[str]
    entries: list[Entry]
    parent: str
    protocol: str


class Proxies:
    """Adds the listeners of proxies."""

    def __init__(self, draft: Draft, notes: Notes, logins: Logins) -> None:
        self._draft, self._notes, self._logins = draft, notes, logins
        self.proxies: list[Proxy] = []

    def add(self, options: Options) -> None:
        """Add the listeners of a command, or note why there are none."""
        try:
            ends = listeners.listener_ends(options)
            why = listeners.lost_reason(options)
        except ValueError as error:
            why = f"has no address to listen on: {error}"
        if why:
            lose(options, why, self._notes)
            return
        self._notes.carried(options.directive)
        protocol = self._protocol(options)
        parents = Parents(options, self._draft, self._notes)
        parent = parents.add(_KINDS[options.command])
        users = read_users(options, parents) if protocol != "redirect" else []
        put_servers(options, self._draft)
        names, entries = [], []
        for end in ends:
            settings = self._settings(options, protocol, end)
            entry, name = add_listener(options, settings, self._draft)
            if not self._logins.add(entry, name, users, options.directive):
                self._draft.listeners.remove(entry)
                return
            self._permit(entry, options, users)
            names.append(name)
            entries.append(entry)
        self.proxies.append(Proxy(options, names, entries, parent, protocol))

    def add_rules(self, proxy: Proxy, listeners_match: Match, rules: RuleList) -> None:
        """Add the rules of a command, and the upstream of its listeners."""
        lists = Rules(proxy.options, listeners_match, rules)
        lists.refuse()
        upstream = lists.lead(proxy.parent, self._draft)
        if upstream != "direct":
            for entry in proxy.entries:
                entry.settings["upstream"] = upstream

    @staticmethod
    def _protocol(options: Options) -> str:
        if options.command != "sps":
            return PROTOCOLS[options.command]
        if options.flag("--redir"):
            options.changed("--redir", _REDIRECTED)
            return "redirect"
        if options.flag("--disable-http"):
            return "socks5"
        return "http" if options.flag("--disable-socks") else "sps"

    @staticmethod
    def _settings(options: Options, protocol: str, end: Endpoint) -> dict[str, Value]:
        settings: dict[str, Value] = {"protocol": protocol, "listen": listen_text(end)}
        is_udp = options.flag("--udp") or options.has("--udp-port")
        if protocol in ("http", "socks5", "sps") and not is_udp:
            settings["network"] = ["tcp"]
        elif protocol in ("socks5", "sps"):
            port = options.text("--udp-port")
            if port.isdigit() and int(port) and port != end.port:
                settings["udp"] = {"relay_port": f"{port}-{port}"}
        if protocol == "redirect":
            settings["sniff"] = []
        return settings

    def _permit(self, entry: Entry, options: Options, users: list[Login]) -> None:
        clients, denied = permitted_clients(options)
        permit(entry, clients)
        if denied:
            entry.settings["clients_deny"] = [*denied]
        if entry.settings.get("network") == ["tcp"] and entry.settings["protocol"] != "http":
            entry.comments.append(_NO_UDP)


def add_listener(options: Options, settings: dict[str, Value], draft: Draft) -> tuple[Entry, str]:
    """Add a listener with what all commands have in common; return it and its name."""
    protocol, listen = str(settings["protocol"]), str(settings["listen"])
    name = free_name(draft, protocol, listen)
    if name != default_name(protocol, listen):
        settings["name"] = name
    if keys := listeners.tls_settings(options):
        settings["tls"] = keys
    if limits := listeners.limits(options):
        settings["limits"] = limits
    if protocol != "dns" and (bind := listeners.bind_of(options, parse_endpoint(listen))):
        settings["bind"] = bind
    return draft.listener(settings, options.directive, *options.origins("-p")), name


def put_servers(options: Options, draft: Draft) -> None:
    """Set the name servers of --dns-address."""
    texts = [text.strip() for text in options.text("--dns-address").split(",") if text.strip()]
    for problem in add_servers(draft, texts, "direct", options.origins("--dns-address")):
        if problem == OTHERS:
            options.changed("--dns-address", problem)
        else:
            options.lost("--dns-address", problem)


def listen_text(end: Endpoint) -> str:
    """Return an address to listen on."""
    return networks.listen_text(end.host, networks.port_text(end.ports))


def lose(options: Options, why: str, notes: Notes) -> None:
    """Note that a command and its options are not carried."""
    notes.lost(options.directive, why)
    options.lose_all(f"{options.command} is not carried")
