"""The lists of goproxy: names and addresses that are refused, permitted, direct or blocked."""

from __future__ import annotations

import re

from netproxy.ctl.convert.command_lines.addresses import parse_networks, parse_targets
from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import ANY, CannotCombine, Match, both, negated, wanting
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.command_lines.goproxy.options import Options
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.draft.rule_list import RuleList

_NOBODY = ["127.0.0.1"]
_CLIENTS = "is not an address of clients"


def permitted_clients(options: Options) -> tuple[list[str] | None, list[str]]:
    """Return `clients` and `clients_deny` of a listener: None is everybody."""
    if options.has("--ip-allow"):
        options.unneeded("--ip-deny", "--ip-allow counts alone")
        return _clients(options, "--ip-allow") or _NOBODY, []
    return None, _clients(options, "--ip-deny")


def _clients(options: Options, name: str) -> list[str]:
    clients: list[str] = []
    for element in options.elements(name) or []:
        try:
            parsed = parse_networks(element)
        except ValueError:
            parsed = []
        clients += parsed
        if not parsed:
            options.lost(name, f"{element}: {_CLIENTS}")
    return clients


class Rules:
    """Adds the rules of a command's listeners."""

    def __init__(self, options: Options, listeners: Match, rules: RuleList) -> None:
        self._options, self._listeners, self._rules = options, listeners, rules

    def refuse(self) -> None:
        """Add what is refused: --only, --stop and --stop-port."""
        options = self._options
        if options.has("--only"):
            options.unneeded("--stop", "--only counts alone")
            permitted = self._targets("--only")
            # Nothing is permitted if the list cannot be read.
            self._add([ANY] if permitted is None else _others(permitted), "block", "--only")
        else:
            self._add(self._targets("--stop") or [], "block", "--stop")
        ports = []
        for text in options.elements("--stop-port") or []:
            try:
                ports.append(networks.port_text(networks.parse_port_range(text)))
            except ValueError as error:
                options.lost("--stop-port", str(error))
        if ports:
            self._add([wanting("port", ports)], "block", "--stop-port")

    def lead(self, parent: str, draft: Draft) -> str:
        """Add what goes direct and what through the parent; return the upstream of the rest."""
        options = self._options
        if parent == "direct" or options.flag("--always"):
            for name in ("-b", "-d", "--blocked", "--direct", "--intelligent", "-i"):
                options.unneeded(name, "everything goes one way")
            return parent
        self._add(self._suffixes("-b", "--blocked"), parent, "-b", "--blocked")
        self._add(self._suffixes("-d", "--direct"), "direct", "-d", "--direct")
        mode = options.text("--intelligent") or "parent"
        if mode == "intelligent":
            whole = both(self._listeners, ANY) or ANY
            rule = {**whole.settings("auto"), "upstream": parent}
            draft.rule(rule, *options.origins("--intelligent"))
        return "direct" if mode == "direct" else parent

    def _add(self, matches: Sequence[Match], via: str, *names: str) -> None:
        for match in matches:
            whole = both(match, self._listeners)
            if whole is not None:
                self._rules.add(whole, via, *self._options.origins(*names))

    def _targets(self, name: str) -> list[Match] | None:
        """Return the conditions of a list; None if it cannot be read."""
        elements = self._options.elements(name)
        if elements is None:
            return None
        targets = parse_targets(map(_wildcards, elements))
        for element in targets.unknown:
            self._options.lost(name, f"{element}: is neither an address nor a name")
        return targets.matches

    def _suffixes(self, *names: str) -> list[Match]:
        """Return the conditions of lists whose names stand for all below them as well."""
        matches: list[Match] = []
        for name in names:
            elements = self._options.elements(name) or []
            targets = parse_targets(map(_below, elements))
            matches += targets.matches
            for element in targets.unknown:
                self._options.lost(name, f"{element}: is neither an address nor a name")
        return matches


def _below(text: str) -> str:
    """Return the pattern of a name and of all names below it; an address stays."""
    is_plain = not re.search(r"[*?]", text) and not networks.is_network(text)
    return f".{text.lstrip('.')}" if is_plain else _wildcards(text)


def _others(permitted: Sequence[Match]) -> list[Match]:
    """Return the match of everything that is not permitted."""
    try:
        others = negated(permitted)
    except CannotCombine:
        return [ANY]
    return [] if others is None else [others]


def _wildcards(text: str) -> str:
    """Return a pattern of goproxy as rules have it: "**" is any part of a name, "*" of a label."""
    if re.fullmatch(r"\*\*\.[\w.-]+", text):
        return text[1:]
    if not re.search(r"[*?]", text) or re.fullmatch(r"[0-9.*?]+", text):
        return text
    parts = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    words = re.split(r"(\*\*|\*|\?)", text)
    return f"regex:^{''.join(parts.get(word) or re.escape(word) for word in words)}$"
