"""The parents of 3proxy's access lists: chains of proxies, one of each group by its weight."""

from __future__ import annotations

from netproxy.ctl.convert.draft.draft import BLOCKED, Proxy, add_proxy
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.threeproxy.entries import Parent

WHOLE = 1000
"""The weight of a whole group."""
_SCHEMES = {
    **{"http": "http", "connect": "http", "connect+": "http"},
    **{"socks4": "socks4", "socks4+": "socks4a", "socks5": "socks5", "socks5+": "socks5h"},
    **{"https": "https", "connects": "https", "connect+s": "https"},
    **{"socks5s": "socks5+tls", "socks5+s": "socks5h+tls"},
}
_LOCAL = ("http", "pop3", "ftp", "imap", "smtp", "admin", "tls")


def add_parents(parents: Sequence[Parent], draft: Draft, notes: Notes) -> str:
    """Return the upstream of the parents of an entry; "direct" if there are none."""
    steps: list[str] = []
    group: list[tuple[str, int]] = []
    header = False
    for parent in parents:
        notes.carried(parent.directive)
        if parent.kind == "ha":
            # The next parent gets a PROXY header.
            header = True
            continue
        if parent.host in ("0.0.0.0", "::") and not parent.port and parent.kind in _LOCAL:
            why = "is another service of 3proxy, which netproxyd does not need"
            notes.changed(parent.directive, why)
            continue
        group.append((_upstream(parent, header, draft, notes), parent.weight))
        header = False
        if sum(weight for _, weight in group) >= WHOLE:
            steps.append(_group(group, parent, draft))
            group = []
    if group:
        steps.append(_group(group, parents[-1], draft))
    if "block" in steps:
        return "block"
    if len(steps) < 2:
        return steps[0] if steps else "direct"
    chain: list[Value] = [*steps]
    return draft.upstream("chain", chain, *(parent.directive for parent in parents))


def _upstream(parent: Parent, header: bool, draft: Draft, notes: Notes) -> str:
    if parent.kind == "extip":
        value: dict[str, Value] = {"url": "direct", "bind": parent.host}
        return draft.upstream(f"direct-{parent.host}", value, parent.directive)
    scheme = _SCHEMES.get(parent.kind)
    if scheme is None or parent.host in ("0.0.0.0", "::", "*"):
        notes.lost(
            parent.directive, f"a parent {parent.kind} like this is not an upstream", BLOCKED
        )
        return "block"
    password = parent.password if scheme not in ("socks4", "socks4a") else ""
    proxy = Proxy(scheme, parent.host, parent.port, parent.user, password)
    name = add_proxy(draft, notes, proxy, parent.directive)
    entry = draft.upstreams.get(name)
    if header and entry is not None and isinstance(entry.value, str):
        entry.value = {"url": entry.value, "send_proxy": "v1"}
    return name


def _group(group: Sequence[tuple[str, int]], parent: Parent, draft: Draft) -> str:
    """Return the upstream of parents of which one is chosen by its weight."""
    names = [name for name, _ in group]
    if len(group) == 1 or "block" in names:
        return "block" if "block" in names else names[0]
    weights = {weight for _, weight in group}
    members: list[Value] = [*names]
    if len(weights) > 1:
        members = [{"via": name, "weight": weight} for name, weight in group]
    balance = "weighted" if len(weights) > 1 else "round-robin"
    value: dict[str, Value] = {"members": members, "balance": balance}
    return draft.upstream("parents", value, parent.directive)
