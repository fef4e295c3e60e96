"""The proxies of frpc: services of the agent, and routes that its bridge needs."""

from __future__ import annotations

from netproxy.ctl.convert.draft.writer import flow_text
from netproxy.ctl.convert.frp.plugins import stand_in
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.frp.settings import Table
    from netproxy.ctl.convert.notes import Notes

_VISITORS = "visitors are not carried: a rule with via: tunnel://AGENT leads to an agent's exit"
_UNKNOWN = {
    "stcp": _VISITORS,
    "sudp": _VISITORS,
    "xtcp": "there are no connections from peer to peer",
    "tcpmux": "names are told by TLS and HTTP, not by CONNECT",
}
_FIRST_NAMED_PORT = 20080
"""Ports of services that are reached by names alone begin here."""
ROUTES = "the bridge needs a listener with protocol: sni and these routes:"


class Services:
    """Makes services of proxies."""

    def __init__(self, agent: str, draft: Draft, notes: Notes) -> None:
        self._agent, self._draft, self._notes = agent, draft, notes
        self._services: dict[str, Value] = {}
        self._routes: list[str] = []

    def add(self, proxy: Table, wanted: Sequence[str]) -> None:
        """Add the service of a proxy.  `wanted`: the proxies that are started, [] for all."""
        name, kind = proxy.text("name"), proxy.text("type", "tcp")
        if proxy.text("role") == "visitor":
            proxy.lose_all(_UNKNOWN["stcp"])
        elif not proxy.flag("enabled", True) or (wanted and name not in wanted):
            for told in proxy.rest():
                self._notes.unneeded(told.directive, "the proxy is not started")
        elif kind in ("tcp", "udp"):
            self._add_port(proxy, kind)
        elif kind in ("http", "https"):
            self._add_named(proxy, kind)
        else:
            proxy.lose_all(_UNKNOWN.get(kind, f"the type {kind} is not known"))

    def finish(self) -> None:
        """Set the services, and tell the routes of the bridge."""
        if not self._services:
            # The daemon refuses an agent that has nothing to do.
            del self._draft.sections["tunnel"]
            self._notes.changed(None, "there is no agent, because it would have no services")
        else:
            self._draft.put("tunnel.agent.services", self._services)
        if self._routes:
            self._draft.remarks += [ROUTES, *(f"  - {route}" for route in self._routes)]

    def _add_port(self, proxy: Table, kind: str) -> None:
        """Add what clients reach by a port of the bridge."""
        remote = proxy.text("remotePort", "0")
        if proxy.has("plugin.type"):
            self._add_plugin(proxy, remote)
            return
        pairs = _port_pairs(proxy.text("localPort"), remote)
        if not pairs:
            proxy.lose_all("the bridge chooses no ports: write a remotePort")
            return
        host = proxy.text("localIP", "127.0.0.1").strip("[]")
        for local, port in pairs:
            key = f"{port}/udp" if kind == "udp" else port
            self._put(proxy, key, networks.listen_text(host, local))

    def _add_named(self, proxy: Table, kind: str) -> None:
        """Add what clients reach by a name: the bridge has the routes."""
        port = _FIRST_NAMED_PORT
        while str(port) in self._services:
            port += 1
        local = proxy.text("localPort")
        if proxy.has("plugin.type"):
            if not self._add_plugin(proxy, str(port)):
                return
        elif not local.isdigit() or not 0 < int(local) <= networks.LAST_PORT:
            proxy.lose_all("has no localPort")
            return
        else:
            host = proxy.text("localIP", "127.0.0.1").strip("[]")
            self._put(proxy, str(port), networks.listen_text(host, local))
        names = proxy.texts("customDomains")
        if names:
            condition: dict[str, Value] = {"sni" if kind == "https" else "host": [*names]}
            route = flow_text({**condition, "via": f"tunnel://{self._agent}/{port}"})
            self._routes.append(route)
            for directive in proxy.origins("customDomains"):
                self._notes.changed(directive, f"is a route of the bridge: {route}")

    def _add_plugin(self, proxy: Table, port: str) -> bool:
        """Add the service of a plug-in; return whether there is one."""
        is_port = port.isdigit() and 0 < int(port) <= networks.LAST_PORT
        target = stand_in(proxy, port, self._draft) if is_port else ""
        if not target:
            proxy.lose_all(f"the plug-in {proxy.text('plugin.type')} is not carried")
            return False
        self._put(proxy, port, target)
        return True

    def _put(self, proxy: Table, key: str, target: str) -> None:
        version = proxy.text("transport.proxyProtocolVersion")
        if version == "v1":
            for directive in proxy.origins("transport.proxyProtocolVersion"):
                self._notes.changed(directive, "is version 2 here")
        is_told = bool(version) and "/" not in key
        self._services[key] = {"target": target, "proxy_protocol": True} if is_told else target
        if proxy.flag("transport.useCompression", False):
            proxy.lose("transport.useCompression", "nothing is compressed")
        proxy.flag("transport.useEncryption", False)


def _port_pairs(local: str, remote: str) -> list[tuple[str, str]]:
    """Return the pairs of "6010-6012,6022" and the like; [] if they are not pairs."""
    try:
        spans = [
            [
                str(port)
                for part in text.split(",")
                for port in networks.parse_port_range(part.strip())
            ]
            for text in (local, remote)
        ]
    except ValueError:
        return []
    if len(spans[0]) != len(spans[1]) or "0" in spans[0] + spans[1]:
        return []
    return list(zip(*spans, strict=True))
