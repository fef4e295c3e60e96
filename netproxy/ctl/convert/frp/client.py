"""frpc: the agent, and its proxies as services."""

from __future__ import annotations

import re

from netproxy.ctl.convert.frp.server import AGENT, DEFAULT_PORT
from netproxy.ctl.convert.frp.services import Services
from netproxy.ctl.convert.terms import networks
from netproxy.config.url import parse_hop
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.frp.settings import Table
    from netproxy.ctl.convert.notes import Notes

_PLAIN = (
    "the agent connects without TLS, because no authority is named that it could trust",
    "write tls:// and tls.ca with the bridge's certificate",
)
_NO_TOKEN = (
    "there is no token: the bridge will refuse the agent",
    "write the agent's token of the bridge, better as !file",
)
UNKNOWN_TOKEN = "write here the token of the bridge"


def convert_client(table: Table, proxies: Sequence[Table], draft: Draft, notes: Notes) -> None:
    """Fill the draft with what frpc does."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", table.text("user"))[:63] or AGENT
    host = table.text("serverAddr", "127.0.0.1").strip("[]")
    port = table.number("serverPort") or DEFAULT_PORT
    authorities = table.text("transport.tls.trustedCaFile")
    is_secure = table.flag("transport.tls.enable", True) and bool(authorities)
    scheme = "tls" if is_secure else "tcp"
    origins = table.origins("serverAddr", "serverPort")
    draft.put("tunnel.agent.bridge", f"{scheme}://{networks.listen_text(host, port)}", *origins)
    draft.put("tunnel.agent.name", name, *table.origins("user"))
    token = table.text("auth.token")
    draft.put("tunnel.agent.token", token or UNKNOWN_TOKEN)
    draft.sections["tunnel"].comments.append("the token is a secret: better write !file")
    if not token:
        notes.lost(None, *_NO_TOKEN)
    if is_secure:
        _put_tls(table, authorities, draft)
    else:
        notes.changed(None, *_PLAIN)
    _put_upstream(table, draft, notes)
    if server := table.text("dnsServer"):
        draft.put("dns.servers", [server], *table.origins("dnsServer"))
    protocol = table.text("transport.protocol", "tcp")
    if protocol != "tcp":
        for directive in table.origins("transport.protocol"):
            notes.changed(directive, "agents connect by TCP, within TLS if wanted")
    services = Services(name, draft, notes)
    wanted = table.texts("start")
    for proxy in proxies:
        services.add(proxy, wanted)
    services.finish()


def _put_tls(table: Table, authorities: str, draft: Draft) -> None:
    tls: dict[str, Value] = {"ca": authorities}
    for key, name in (
        ("certificate", "transport.tls.certFile"),
        ("key", "transport.tls.keyFile"),
        ("server_name", "transport.tls.serverName"),
    ):
        if text := table.text(name):
            tls[key] = text
    draft.put("tunnel.agent.tls", tls, *table.origins("transport.tls.trustedCaFile"))


def _put_upstream(table: Table, draft: Draft, notes: Notes) -> None:
    """Set the proxy or the local address by which the bridge is reached."""
    url, local = table.text("transport.proxyURL"), table.text("transport.connectServerLocalIP")
    if url:
        try:
            parse_hop(url.rstrip("/"))
        except ValueError as error:
            table.lose("transport.proxyURL", str(error), "the bridge is not reached directly")
            draft.put("tunnel.agent.upstream", "block")
            return
        draft.put("tunnel.agent.upstream", url.rstrip("/"), *table.origins("transport.proxyURL"))
    elif local and networks.is_host(local):
        value: dict[str, Value] = {"url": "direct", "bind": local}
        upstream = draft.upstream(f"direct-{local}", value)
        draft.put("tunnel.agent.upstream", upstream)
