"""How gost looks names up: servers and fixed addresses, which netproxyd has once for all."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.name_servers import OTHERS, add_servers
from netproxy.ctl.convert.terms import networks
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.draft.draft import Draft, Value

_HOSTS = "fixed addresses of names are the same for all listeners"


def put_names(node: Node, draft: Draft) -> None:
    """Carry `resolver` and `hosts` of a service or a node."""
    if texts := [text for text in node.text("resolver").split(",") if text]:
        put_servers(node, texts, "direct", draft)
    if prefer := node.text("prefer"):
        draft.put("dns.prefer", prefer if prefer in ("ipv4", "ipv6") else "ipv4")
    hosts: dict[str, list[Value]] = {}
    for pair in filter(None, node.text("hosts").split(",")):
        name, _, address = pair.partition(":")
        if not networks.is_host(address):
            node.lost("hosts", f"{pair}: is not NAME:ADDRESS, or a file")
        elif name.startswith(".") or not name:
            node.lost("hosts", f"{name}: names below a name are not given addresses")
        else:
            hosts.setdefault(name.lower(), []).append(address)
    for name, addresses in hosts.items():
        section = draft.sections.get("dns")
        known = section.settings.get("hosts") if section else None
        if isinstance(known, dict) and known.get(name, addresses) != addresses:
            node.changed("hosts", _HOSTS)
        else:
            _put_host(draft, name, addresses, node)


def _put_host(draft: Draft, name: str, addresses: list[Value], node: Node) -> None:
    """Set the addresses of a name, which may have dots and so be no path of keys."""
    section = draft.sections.get("dns")
    if section is None or "hosts" not in section.settings:
        draft.put("dns.hosts", {}, *node.origins("hosts"))
    hosts = draft.sections["dns"].settings["hosts"]
    assert isinstance(hosts, dict)
    hosts[name] = addresses


def put_servers(node: Node, texts: Sequence[str], upstream: str, draft: Draft) -> None:
    """Set the name servers, unless others are set already."""
    key = "resolver" if node.has("resolver") else "dns"
    for problem in add_servers(draft, texts, upstream, node.origins(key) or [node.directive]):
        if problem == OTHERS:
            node.changed(key, problem)
        else:
            node.lost(key, problem)
