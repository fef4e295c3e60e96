"""Conditions of rules, as the other programs combine them: "and", "not", and lists of "or".  Pure.

A Match is what one rule of the configuration can say.  A condition with an "or" between different
keys is a list of them.
"""

from __future__ import annotations

import re

from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.draft.draft import Value
from netproxy.typed import Iterable, Mapping, NamedTuple, Sequence

ANY_USER = "*"
_UNCOMMON = {"hours": "times of the week", "domain_file": "files of names"}
_NETWORKS, _NAMES = ("client", "ip"), ("domain", "sni")


class CannotCombine(Exception):
    """No rule says what is wanted, in words."""


class Match(NamedTuple):
    """The conditions of one rule: all `wanted` keys must match, and no `unwanted` one."""

    wanted: Mapping[str, tuple[str, ...]] = {}
    unwanted: Mapping[str, tuple[str, ...]] = {}

    @property
    def is_any(self) -> bool:
        """True if every flow matches."""
        return not self.wanted and not self.unwanted

    @property
    def looks_at_target(self) -> bool:
        """True if it asks for the address of the target."""
        return "ip" in self.wanted or "ip" in self.unwanted

    def settings(self, via: str) -> dict[str, Value]:
        """Return the rule with this upstream."""
        rule: dict[str, Value] = {key: _value(values) for key, values in self.wanted.items()}
        if self.unwanted:
            rule["not"] = {key: _value(values) for key, values in self.unwanted.items()}
        return {**rule, "via": via}

    def without(self, key: str) -> Match:
        """Return the match without the condition of a key."""
        return Match(*({k: v for k, v in part.items() if k != key} for part in self))


ANY = Match()


def wanting(key: str, values: Iterable[str]) -> Match:
    """Return the match of flows with any of the values."""
    return Match({key: tuple(dict.fromkeys(values))})


def both(first: Match, second: Match) -> Match | None:
    """Return the match of the flows that match both; None if there are none.

    Raises CannotCombine.
    """
    wanted = dict(first.wanted)
    for key, values in second.wanted.items():
        wanted[key] = _common(key, wanted[key], values) if key in wanted else values
        if not wanted[key]:
            return None
    if "domain" in wanted and "domain_file" in wanted:
        # A rule takes them for one condition: a name in either matches.
        raise CannotCombine("names and a file of names at once")
    unwanted = dict(first.unwanted)
    for key, values in second.unwanted.items():
        unwanted[key] = tuple(dict.fromkeys((*unwanted.get(key, ()), *values)))
    if any(
        key in wanted and _covers_values(key, values, wanted[key])
        for key, values in unwanted.items()
    ):
        return None
    return Match(wanted, unwanted)


def covers(wider: Match, narrower: Match) -> bool:
    """Return whether one match surely has all flows of another one."""
    return not wider.unwanted and all(
        key in narrower.wanted and _covers_values(key, values, narrower.wanted[key])
        for key, values in wider.wanted.items()
    )


def _covers_values(key: str, wider: tuple[str, ...], narrower: tuple[str, ...]) -> bool:
    if key in _NETWORKS:
        return all(networks.covers(wider, network) for network in narrower)
    if key == "user" and ANY_USER in wider:
        return True
    if key in _NAMES:
        return all(any(covers_names(one, name) for one in wider) for name in narrower)
    return set(narrower) <= set(wider)


def every(matches: Iterable[Match]) -> Match | None:
    """Return the match of the flows that match all; None if there are none."""
    whole: Match | None = ANY
    for match in matches:
        if whole is None:
            return None
        whole = both(whole, match)
    return whole


def negated(alternatives: Sequence[Match]) -> Match | None:
    """Return the match of the flows that match none of the alternatives; None if there are none.

    Raises CannotCombine.
    """
    whole: Match | None = ANY
    for match in alternatives:
        if match.is_any:
            return None
        if len(match.wanted) + len(match.unwanted) != 1:
            raise CannotCombine("'not' of conditions that are joined by 'and'")
        whole = None if whole is None else both(whole, Match(match.unwanted, match.wanted))
    return whole


def _common(key: str, first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values that two conditions of one key have in common."""
    if set(first) == set(second):
        return first
    if key in _NETWORKS:
        return networks.intersect(first, second)
    if key == "port":
        return networks.intersect_ports(first, second)
    if key == "user" and ANY_USER in (*first, *second):
        return second if ANY_USER in first else first
    if key in _NAMES:
        return tuple(dict.fromkeys(name for a in first for b in second for name in _name(a, b)))
    if key in _UNCOMMON:
        raise CannotCombine(f"two {_UNCOMMON[key]} at once")
    return tuple(word for word in first if word in second)


def _name(first: str, second: str) -> Iterable[str]:
    """Yield the pattern of the names that match two patterns, nothing if there are none."""
    if covers_names(first, second):
        yield second
    elif covers_names(second, first):
        yield first
    elif first.startswith(("keyword:", "regex:")) or second.startswith(("keyword:", "regex:")):
        # An exact name, to which none of both applies, is in the branches above.
        if _is_exact(first) or _is_exact(second):
            return
        raise CannotCombine("two patterns of names at once")


def _is_exact(pattern: str) -> bool:
    return not pattern.startswith((".", "*.", "keyword:", "regex:"))


def covers_names(wider: str, narrower: str) -> bool:
    """Return whether a pattern surely matches all names that another one does."""
    if wider == narrower:
        return True
    name = narrower.removeprefix("*").removeprefix(".")
    if wider.startswith("keyword:"):
        return not narrower.startswith("regex:") and wider[8:] in name.removeprefix("keyword:")
    if wider.startswith("regex:"):
        return _is_exact(narrower) and bool(re.search(wider[6:], narrower, re.IGNORECASE))
    if narrower.startswith(("keyword:", "regex:")):
        return False
    if wider.startswith("*."):
        below = "." + name if narrower.startswith("*") else name
        return below.endswith(wider[1:]) and (narrower[0] != "." or name != wider[2:])
    if wider.startswith("."):
        return name == wider[1:] or name.endswith(wider)
    return False


def _value(values: tuple[str, ...]) -> Value:
    return values[0] if len(values) == 1 else list(values)
