"""frps: the bridge that agents connect to."""

from __future__ import annotations

import secrets

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.frp.settings import Table
    from netproxy.ctl.convert.notes import Notes

DEFAULT_PORT = 7000
AGENT = "frpc"
"""The name of the agent: frps does not know its clients by name."""
_PLAIN = (
    "agents connect without TLS, because no certificate is named",
    "make one (docs/TUNNELS.md says how), write tls; and tls:// and tls.ca for the agent",
)
_ONE_AGENT = (
    "frps knows no names: all clients of the token would be one agent",
    "write an agent with a token and ports of its own for each frpc",
)
_NO_TOKEN = (
    "frps has no token: every client may open ports; here the token is a new one, by chance",
    "write it into the file of the agent",
)
_VHOST = (
    "the names are in the files of the clients",
    "write a listener with protocol: sni, and a route for each name: via: tunnel://AGENT/PORT",
)


def convert_server(table: Table, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what frps does."""
    host = table.text("bindAddr", "0.0.0.0")
    port = table.number("bindPort") or DEFAULT_PORT
    origins = table.origins("bindAddr", "bindPort")
    listen = networks.listen_text(host.strip("[]"), port)
    tls = _tls(table)
    draft.put("tunnel.bridge.listen", listen if tls else f"tcp://{listen}", *origins)
    if tls:
        names = ("transport.tls.certFile", "transport.tls.keyFile")
        draft.put("tunnel.bridge.tls", tls, *table.origins(*names))
    else:
        notes.changed(None, *_PLAIN)
    table.flag("transport.tls.force", False)
    ports = _ports(table, table.text("proxyBindAddr", host).strip("[]"), notes)
    token = table.text("auth.token")
    if token:
        notes.changed(None, *_ONE_AGENT)
    else:
        # A known token would let everybody be an agent.
        token = secrets.token_hex(16)
        notes.changed(None, *_NO_TOKEN)
    origins = table.origins("auth.token", "allowPorts")
    draft.put(f"tunnel.bridge.agents.{AGENT}", {"token": token, "ports": ports}, *origins)
    draft.sections["tunnel"].comments.append("the token is a secret: better write !file")
    for key in ("vhostHTTPPort", "vhostHTTPSPort"):
        if table.has(key):
            table.take(key)
            for directive in table.origins(key):
                notes.changed(directive, *_VHOST)
    if table.has("maxPortsPerClient") and table.number("maxPortsPerClient"):
        table.lose("maxPortsPerClient", "an agent has the ports that are named")
    _metrics(table, draft, notes)


def _tls(table: Table) -> dict[str, Value]:
    certificate, key = table.text("transport.tls.certFile"), table.text("transport.tls.keyFile")
    authorities = table.text("transport.tls.trustedCaFile")
    if not certificate:
        return {}
    tls: dict[str, Value] = {"certificate": certificate}
    tls |= {"key": key} if key else {}
    return tls | ({"client_ca": authorities} if authorities else {})


def _ports(table: Table, host: str, notes: Notes) -> list[Value]:
    """Return the ports that agents may open: all above 1023 if none are named."""
    spans = [span.strip() for text in table.texts("allowPorts") for span in text.split(",")]
    for element in table.elements("allowPorts"):
        first, last = element.get("start") or element.get("single"), element.get("end")
        spans.append(f"{first}-{last}" if last else f"{first}")
    if not spans:
        notes.changed(None, "frps opens every port that a client asks for: here those above 1023")
        spans = ["1024-65535"]
    ports: list[Value] = []
    for span in spans:
        try:
            found = networks.parse_port_range(span)
        except ValueError:
            notes.lost(None, f"allowPorts: '{span}' is not a port or a range")
            continue
        for network in ("", "/udp"):
            # Ports below 1024 are named one by one.
            ports += [
                networks.listen_text(host, port) + network for port in found if 0 < port < 1024
            ]
            above = range(max(found.start, 1024), found.stop)
            if above:
                ports.append(networks.listen_text(host, networks.port_text(above)) + network)
    return ports


def _metrics(table: Table, draft: Draft, notes: Notes) -> None:
    """Carry the address of the dashboard, if this machine alone may ask."""
    port, host = table.number("webServer.port"), table.text("webServer.addr", "127.0.0.1")
    origins = table.origins("webServer.addr", "webServer.port")
    if not port or not networks.is_loopback(host):
        for directive in origins:
            why = "other machines need a token for the metrics"
            notes.changed(directive, why, "write metrics and metrics_token, and status_page")
        return
    draft.put("metrics", networks.listen_text(host, port), *origins)
