"""Name servers as gost and goproxy write them; netproxyd has the same ones for all listeners."""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Directive, Notes

ADVICE = "write a listener with protocol: dns, and dns: {servers: [...]}"
OTHERS = "name servers are the same for all listeners: those that are named first"
_SCHEMES = {"dot": "tls", "doh": "https"}
# "8.8.8.8:853/tls/dns.google", of gost version 2.
_OLD = re.compile(r"([^/]+)/(udp|tcp|tls|https)(?:/([\w.-]*))?\Z")


def add_servers(
    draft: Draft, texts: Sequence[str], upstream: str, origins: Sequence[Directive]
) -> list[str]:
    """Set the name servers, unless others are set already; return what is not carried."""
    servers: list[Value] = []
    problems: list[str] = []
    for text in texts:
        try:
            server = server_value(text)
        except ValueError as error:
            problems.append(str(error))
            continue
        if upstream != "direct":
            server = server if isinstance(server, dict) else {"url": server}
            server = {**server, "upstream": upstream}
        servers.append(server)
    section = draft.sections.get("dns")
    known = section.settings.get("servers") if section else None
    if known is None and servers:
        draft.put("dns.servers", servers, *origins)
    elif servers and known != servers:
        problems.append(OTHERS)
    return problems


def drop_dns(draft: Draft, notes: Notes) -> None:
    """Take listeners for DNS away that have no server to ask, or would ask themselves."""
    section = draft.sections.get("dns")
    servers = section.settings.get("servers") if section else None
    texts = [
        str(server.get("url") if isinstance(server, dict) else server)
        for server in (servers if isinstance(servers, list) else [])
    ]
    for entry in [entry for entry in draft.listeners if entry.settings["protocol"] == "dns"]:
        port = str(entry.settings["listen"]).rpartition(":")[2]
        if not texts or any(_is_own(text, port) for text in texts):
            draft.listeners.remove(entry)
            notes.lost(None, f"dns at {entry.settings['listen']}: has no server to ask", ADVICE)


def _is_own(text: str, port: str) -> bool:
    """Return whether a server is on this machine, at a port that a listener has."""
    host, _, number = text.rpartition("://")[2].rpartition(":")
    is_alone = networks.is_host(text)
    return networks.is_loopback(text if is_alone else host) and port == (
        "53" if is_alone else number
    )


def server_value(text: str) -> Value:
    """Return a name server as the configuration writes it.  Raises ValueError."""
    if match := _OLD.match(text):
        scheme = match[2]
        url = match[1] if scheme == "udp" else f"{scheme}://{match[1]}"
        if match[3]:
            return {"url": url, "tls": {"server_name": match[3]}}
        return url
    scheme, separator, rest = text.rpartition("://")
    if separator and scheme not in ("udp", "tcp", "tls", "https", "dot", "doh"):
        raise ValueError(f"{scheme}: is not a way to ask a name server")
    scheme = _SCHEMES.get(scheme, scheme)
    host = rest.partition("/")[0]
    if host.startswith(":"):
        raise ValueError("a name server needs an address")
    if scheme in ("", "udp", "tcp"):
        address = host.rpartition(":")[0] if not networks.is_host(host) else host
        if not networks.is_host(address.strip("[]")):
            raise ValueError(f"{host}: is not the address of a name server")
    return f"{scheme}://{rest}" if scheme not in ("", "udp") else rest
