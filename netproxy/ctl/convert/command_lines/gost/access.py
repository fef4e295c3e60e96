"""Who may connect to a service of gost, and which targets it leads where: admission and bypass."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.addresses import parse_networks, parse_targets
from netproxy.ctl.convert.command_lines.gost.permissions import read_permissions
from netproxy.ctl.convert.terms.conditions import ANY, CannotCombine, Match, both, negated
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.chain import Chain
    from netproxy.ctl.convert.command_lines.gost.nodes import Node
    from netproxy.ctl.convert.draft.draft import Entry, Value
    from netproxy.ctl.convert.draft.rule_list import RuleList
    from netproxy.ctl.convert.notes import Directive

_CLIENT_NAMES = "clients are known by their addresses, not by names"
_PORTS = "a list of what is permitted has ports: nothing behind it is led elsewhere"


def permitted_clients(node: Node) -> tuple[list[str] | None, list[str]]:
    """Return `clients` and `clients_deny` of a service: None is everybody."""
    text = node.text("admission")
    is_whitelist, texts = text.startswith("~"), _elements(text)
    clients: list[str] = []
    for element in texts:
        try:
            networks = parse_networks(element)
        except ValueError:
            networks = []
        clients += networks
        if not networks:
            effect = "it may not connect" if is_whitelist else "it may connect"
            node.lost("admission", f"{element}: {_CLIENT_NAMES}", effect)
    if is_whitelist:
        # A list that permits nobody still has a listener.
        return clients or ["127.0.0.1"], []
    return None, clients


def add_rules(node: Node, listener: Match, chain: Chain, rules: RuleList) -> None:
    """Add the rules of a service: what it refuses, and what leaves its chain on the way."""
    steps = [(node, "block")] if node.has("bypass") else []
    steps += [
        (hop, chain.via(number)) for number, hop in enumerate(chain.nodes) if hop.has("bypass")
    ]
    permissions = read_permissions(node)
    led = [(node, match, "block") for match in permissions.refused]
    for number, (owner, via) in enumerate(steps):
        is_last = number == len(steps) - 1 and permissions.permitted is None
        led += [(owner, *pair) for pair in _led(owner, via, chain.whole if is_last else "")]
    if permissions.permitted is not None:
        if any(via != "block" for _, _, via in led):
            node.lost("whitelist", _PORTS, "nothing is permitted")
            led = []
        led += [(node, match, chain.whole) for match in permissions.permitted if led or not steps]
        led.append((node, ANY, "block"))
    for owner, match, to in led:
        whole = both(match, listener)
        if whole is not None:
            rules.add(whole, to, *owner.origins("bypass", "whitelist", "blacklist"))


def _led(node: Node, via: str, rest: str) -> list[tuple[Match, str]]:
    """Return what a bypass leads to `via`.

    `rest`: the upstream of all others, "" if further conditions decide on them.
    """
    text = node.text("bypass")
    targets = parse_targets(_elements(text))
    for element in targets.unknown:
        effect = "it is not permitted" if text.startswith("~") else "it is not refused"
        node.lost("bypass", f"{element}: is neither an address nor a name", effect)
    if not text.startswith("~"):
        return [(match, via) for match in targets.matches]
    try:
        others = negated(targets.matches)
    except CannotCombine:
        if not rest:
            node.lost("bypass", _PORTS)
        return [*((match, rest or via) for match in targets.matches), (Match(), via)]
    return [(others, via)] if others is not None else []


def skipped_logins(node: Node) -> list[str]:
    """Return the networks whose clients need no login."""
    without = []
    for element in _elements(node.text("skipauth")):
        try:
            without += parse_networks(element)
        except ValueError:
            continue
    return without


def deny(entry: Entry, networks: Sequence[str], *origins: Directive) -> None:
    """Set the networks that may not connect."""
    if networks:
        denied: list[Value] = [*networks]
        entry.settings["clients_deny"] = denied
        entry.comes_from(*origins)


def _elements(text: str) -> list[str]:
    return [part.strip() for part in text.removeprefix("~").split(",") if part.strip()]
