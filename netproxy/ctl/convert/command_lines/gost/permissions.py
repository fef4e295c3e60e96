"""The lists of permissions of gost, version 2: "tcp,udp:*.example.com:80,443 bind:*:*"."""

from __future__ import annotations

from netproxy.ctl.convert.command_lines.addresses import parse_targets
from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import ANY, CannotCombine, Match, both, wanting
from netproxy.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.gost.nodes import Node

_ACTIONS = {
    **{"tcp": ("network", "tcp"), "udp": ("network", "udp")},
    **{"bind": ("command", "bind"), "rtcp": ("command", "bind")},
}


class Permissions(NamedTuple):
    """What a service refuses, and what it permits; None for everything else."""

    refused: list[Match]
    permitted: list[Match] | None


def read_permissions(node: Node) -> Permissions:
    """Return the conditions of `blacklist` and `whitelist`."""
    permitted = _matches(node, "whitelist") if node.has("whitelist") else None
    return Permissions(_matches(node, "blacklist"), permitted)


def _matches(node: Node, key: str) -> list[Match]:
    matches: list[Match] = []
    for text in node.text(key).split():
        parts = text.rsplit(":", 1)
        actions, _, hosts = parts[0].partition(":")
        try:
            matches += _combined(actions.split(","), hosts.split(","), parts[-1].split(","))
        except (ValueError, CannotCombine) as error:
            node.lost(key, f"{text}: {error}")
    return matches


def _combined(actions: list[str], hosts: list[str], ports: list[str]) -> list[Match]:
    """Return the conditions of one permission.  Raises ValueError and CannotCombine."""
    targets = parse_targets(host for host in hosts if host != "*")
    if targets.unknown or not all(hosts):
        raise ValueError("is not [actions]:[hosts]:[ports]")
    places = [ANY] if "*" in hosts else targets.matches
    if "*" not in ports:
        spans = [networks.port_text(networks.parse_port_range(port)) for port in ports]
        places = [match for place in places if (match := both(place, wanting("port", spans)))]
    known = [_ACTIONS[action] for action in actions if action in _ACTIONS]
    kinds = [ANY] if "*" in actions else [wanting(key, [word]) for key, word in known]
    return [match for kind in kinds for place in places if (match := both(kind, place))]
