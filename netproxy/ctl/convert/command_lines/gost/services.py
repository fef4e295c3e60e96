"""The services of gost: each -L becomes a listener."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.gost import tags
from netproxy.ctl.convert.command_lines.gost.access import deny, permitted_clients, skipped_logins
from netproxy.ctl.convert.command_lines.gost.details import set_details
from netproxy.ctl.convert.command_lines.gost.names import put_names, put_servers
from netproxy.ctl.convert.command_lines.gost.tunnels import Tunnels
from netproxy.ctl.convert.command_lines.gost.users import read_users
from netproxy.ctl.convert.command_lines.logins import Login
from netproxy.ctl.convert.draft.listeners import default_name, free_name, permit
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.chain import Chain
    from netproxy.ctl.convert.command_lines.gost.nodes import Endpoint, Node
    from netproxy.ctl.convert.command_lines.logins import Logins
    from netproxy.ctl.convert.draft.draft import Draft, Entry, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.source import Source

_PROXIES = {
    **{"": "sps", "auto": "sps", "http": "http", "socks": "socks5", "socks5": "socks5"},
    **{"socks4": "socks5", "socks4a": "socks5"},
}
"""The protocol of listeners for the proxies."""
_TRANSPARENT = {
    **dict.fromkeys(("red", "redir", "redirect"), "tcp"),
    **dict.fromkeys(("redu", "redirectu"), "udp"),
}
_FORWARDS = {"tcp": "tcp", "udp": "udp", "rtcp": "tcp", "rudp": "udp"}
_NO_UDP = "version 3 of gost relays UDP only with udp=true: delete `network` to serve UDP"
_PORTS_LIMIT = 100
"""Listeners of one range of ports: more are no configuration that people read."""
_ONE_TARGET = "a listener has one target: the first"
_OPTIONAL = "a client elsewhere that sends no login is refused, without being asked for one"


class Service(NamedTuple):
    """A listener, and what it comes from."""

    node: Node
    listener: Entry
    name: str
    chain: Chain
    serves_bind: bool
    """Whether BIND of SOCKS is allowed."""


class Services:
    """Adds the listeners of all commands."""

    def __init__(self, source: Source, draft: Draft, notes: Notes, logins: Logins) -> None:
        self._source, self._draft, self._notes, self._logins = source, draft, notes, logins
        self.services: list[Service] = []
        self._tunnels = Tunnels(draft, notes)

    def add(self, node: Node, chain: Chain) -> None:
        """Add the listener of a -L, or note why there is none."""
        put_names(node, self._draft)
        if node.flag("ignoreChain"):
            chain = chain.without_hops()
        if node.protocol in ("rtcp", "rudp") and chain.nodes:
            self._tunnels.add(node, chain)
            return
        settings = self._settings(node, chain)
        if settings is None:
            self._lose(node)
            return
        self._notes.carried(node.directive)
        for listen, target in self._ports(node):
            self._add(node, {**settings, "listen": listen, **target}, chain)

    def _add(self, node: Node, settings: dict[str, Value], chain: Chain) -> None:
        protocol = str(settings["protocol"])
        ordered = {key: settings[key] for key in ("protocol", "listen")} | settings
        name = free_name(self._draft, protocol, str(ordered["listen"]))
        if name != default_name(protocol, str(ordered["listen"])):
            ordered["name"] = name
        set_details(node, ordered, chain, self._draft, self._notes)
        listener = self._draft.listener(ordered, node.directive)
        logins = self._users(node, protocol)
        if not self._logins.add(listener, name, logins, node.directive):
            self._draft.listeners.remove(listener)
            return
        if ordered.get("network") == ["tcp"] and protocol in ("sps", "socks5"):
            listener.comments.append(_NO_UDP)
        if without := skipped_logins(node):
            self._skip(listener, name, without)
        clients, denied = permitted_clients(node)
        permit(listener, clients)
        deny(listener, denied, *node.origins("admission"))
        serves_bind = node.flag("bind") or protocol not in ("sps", "socks5")
        self.services.append(Service(node, listener, name, chain, serves_bind))

    def _skip(self, listener: Entry, name: str, without: list[str]) -> None:
        """Let clients of some networks connect without a login."""
        listener.settings["auth"] = "optional"
        conditions: dict[str, Value] = {"client": [*without], "user": "*"}
        self._draft.rule({"listener": name, "not": conditions, "via": "block"})
        self._notes.changed(None, _OPTIONAL)

    # -- parts

    def _settings(self, node: Node, chain: Chain) -> dict[str, Value] | None:
        """Return what a listener is; None if it cannot be one."""
        if node.protocol in _TRANSPARENT:
            return self._transparent(node)
        if node.protocol == "dns":
            return self._dns(node, chain)
        is_lost = node.protocol in tags.PROTOCOLS and node.protocol != "forward"
        if is_lost or node.transport not in ("", "tcp", "tls", *_FORWARDS):
            return None
        if node.targets:
            kind = _FORWARDS.get(node.protocol, "tcp")
            return {"protocol": kind}
        protocol = _PROXIES.get(node.protocol)
        return None if protocol is None else {"protocol": protocol}

    def _transparent(self, node: Node) -> dict[str, Value]:
        if _TRANSPARENT[node.protocol] == "udp":
            return {"protocol": "tproxy", "network": ["udp"]}
        settings: dict[str, Value] = {"protocol": "redirect"}
        if node.flag("tproxy"):
            settings = {"protocol": "tproxy", "network": ["tcp"]}
        if not node.flag("sniffing"):
            settings["sniff"] = []
        elif node.flag("sniffing.dialOriginalDst"):
            settings["sniff_dial"] = "address"
        else:
            settings["sniff_dial"] = "name"
        return settings

    def _dns(self, node: Node, chain: Chain) -> dict[str, Value] | None:
        """Return a listener for DNS, and set its servers."""
        mode = node.text("mode") or "udp"
        texts = [text for text in node.text("dns").split(",") if text]
        texts += [text for text in node.path.strip("/").split(",") if text]
        if mode not in ("udp", "tcp", "tls") or not texts:
            return None
        put_servers(node, texts, chain.whole, self._draft)
        if node.has("ttl"):
            node.changed("ttl", "answers are kept as long as their servers say")
        if mode == "tls":
            node.transport = "tls"
        return {"protocol": "dns", "network": ["udp" if mode == "udp" else "tcp"]}

    def _ports(self, node: Node) -> list[tuple[str, dict[str, Value]]]:
        """Return where a service listens, with the target of each address."""
        targets = node.targets if node.protocol not in ("dns", *_TRANSPARENT) else []
        places: list[tuple[str, dict[str, Value]]] = []
        for end in node.endpoints or []:
            try:
                ports = end.ports
                if not ports or not ports[0]:
                    raise ValueError
                places += self._pairs(node, end, targets) if targets else [(_listen(end), {})]
            except ValueError:
                self._notes.lost(node.directive, "has no port that clients can connect to")
        return places

    def _pairs(
        self, node: Node, end: Endpoint, targets: list[Endpoint]
    ) -> list[tuple[str, dict[str, Value]]]:
        """Return the ports of a service, each with its target."""
        spread = [(target.host, port) for target in targets for port in target.ports]
        if any(not 0 < port <= networks.LAST_PORT for _, port in spread):
            raise ValueError
        if len(end.ports) == 1 or len(spread) == 1:
            if len(spread) > 1:
                self._notes.changed(node.directive, _ONE_TARGET)
            return [(_listen(end), _target(*spread[0]))]
        pairs = list(zip(end.ports, spread, strict=False))
        if len(pairs) > _PORTS_LIMIT:
            self._notes.lost(node.directive, f"more than {_PORTS_LIMIT} ports with targets")
            return []
        if len(pairs) < len(end.ports):
            self._notes.changed(node.directive, "ports without a target are left out")
        return [(networks.listen_text(end.host, port), _target(*target)) for port, target in pairs]

    def _users(self, node: Node, protocol: str) -> list[Login]:
        """Return the users of a service, with those of its file."""
        users: list[Login] = []
        if protocol not in ("sps", "http", "socks5"):
            return users
        if node.users:
            users = [Login(*login, {}, (node.directive,)) for login in node.users]
        elif name := node.text("secrets"):
            users = read_users(self._source, name, node)
        elif node.login is not None:
            users = [Login(node.login[0], node.login[1], {}, (node.directive,))]
        return users

    def _lose(self, node: Node) -> None:
        """Note that a service is not carried, with its parameters."""
        why = tags.reason(node.protocol, node.transport)
        if node.protocol in ("tcp", "udp", "forward") and not node.targets:
            why = "has no target: the server at the end of the chain would name it"
        elif node.protocol == "dns":
            why = "is DNS without servers, or within HTTPS"
        self._notes.lost(node.directive, why, tags.ADVICE.get(node.protocol, ""))
        for key in node.keys():
            node.lost(key, "its listener is not carried")


def _listen(end: Endpoint) -> str:
    return networks.listen_text(end.host, networks.port_text(end.ports))


def _target(host: str, port: int) -> dict[str, Value]:
    return {"target": networks.listen_text(host or "127.0.0.1", port)}
