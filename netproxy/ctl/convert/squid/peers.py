"""Where squid sends what it allows: directly, or to its parents; as rules of the configuration.

Squid prefers its parents for requests that it forwards, and the direct path for CONNECT, unless
never_direct, always_direct, prefer_direct or nonhierarchical_direct say otherwise.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

from netproxy.ctl.convert.draft.draft import Proxy, add_proxy
from netproxy.ctl.convert.squid.access import allowed_matches, last_resort
from netproxy.ctl.convert.terms import networks
from netproxy.ctl.convert.terms.conditions import ANY, Match, both, wanting
from netproxy.typed import TYPE_CHECKING, Mapping, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft, Value
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.squid.acls import Acls
    from netproxy.ctl.convert.squid.lines import Line

TAGS = (
    *("cache_peer", "cache_peer_access", "always_direct", "never_direct", "prefer_direct"),
    *("nonhierarchical_direct", "tcp_outgoing_address", "tcp_outgoing_mark"),
)
"""The tags that this module notes."""
_BALANCES = {
    **{"round-robin": "round-robin", "weighted-round-robin": "least-latency"},
    **{"carp": "hash-target", "sourcehash": "hash-client", "userhash": "hash-client"},
}
_HARMLESS = re.compile(
    r"(default|no-query|proxy-only|no-digest|no-netdb-exchange|background-ping|no-delay|"
    r"closest-only|htcp(=.*)?|multicast-responder|allow-miss|standby=\d+|basetime=\d+|ttl=\d+|"
    r"carp-key=.*|digest-url=.*|connect-fail-limit=\d+|weight=\d+|name=.*|login=.*|"
    r"round-robin|weighted-round-robin|carp|sourcehash|userhash|(tls|ssl)(-\w+=.*|cert=.*|key=.*)?|"
    r"(tls|ssl)(cert|key|cafile|flags|domain)=.*|connect-timeout=\d+|max-conn=\d+)"
)
_HTTP = wanting("command", ["http"])


class Route(NamedTuple):
    """The upstream of some flows."""

    match: Match
    via: str
    directive: Directive | None


class _Peer(NamedTuple):
    directive: Directive
    name: str
    upstream: str
    options: tuple[str, ...]


def routes(
    lines: Mapping[str, Sequence[Line]], acls: Acls, draft: Draft, notes: Notes
) -> list[Route]:
    """Return the routes, of which the first one that matches decides; the last one has all."""
    return _Routing(lines, acls, draft, notes).routes()


class _Routing:
    def __init__(
        self, lines: Mapping[str, Sequence[Line]], acls: Acls, draft: Draft, notes: Notes
    ) -> None:
        self._lines, self._acls, self._draft, self._notes = lines, acls, draft, notes
        self._peers = [peer for line in lines.get("cache_peer", ()) if (peer := self._peer(line))]

    def routes(self) -> list[Route]:
        direct = self._direct_routes()
        prefers_direct = self._is_on("prefer_direct", False)
        of_connect = not self._is_on("nonhierarchical_direct", True)
        always = self._allowed("always_direct")
        never = self._allowed("never_direct")
        found = [route for match, origin in always for route in _within(direct, match, origin)]
        groups = self._groups()
        for match, origin in never:
            found += [r for r in _within(groups, match, origin) if r.via != ""]
            if not groups or not groups[-1].match.is_any:
                found.append(Route(match, "block", origin))
        if groups:
            found += self._preferred(groups, prefers_direct, of_connect)
        elif self._lines.get("cache_peer"):
            self._notes.changed(
                None, "no parent could be carried: what squid sent to it goes direct"
            )
        return found + direct

    def _preferred(
        self, groups: Sequence[Route], prefers_direct: bool, of_connect: bool
    ) -> list[Route]:
        """Return the routes of flows that may go direct as well as to a parent."""
        found: list[Route] = []
        for route in groups:
            order = ["direct", route.via] if prefers_direct else [route.via, "direct"]
            group: dict[str, Value] = {"members": [*order], "balance": "failover"}
            via = self._draft.upstream(f"{route.via}-or-direct", group, route.directive)
            match = route.match if of_connect else both(route.match, _HTTP)
            if match is not None:
                found.append(Route(match, via, route.directive))
        if not of_connect:
            why = "squid sends GET to its parents, and POST and the like directly: here all of them"
            self._notes.changed(groups[0].directive, f"{why} go to the parents first")
        return found

    # -- parents

    def _peer(self, line: Line) -> _Peer | None:
        """Return a parent; None if it is none, or cannot be carried."""
        notes = self._notes
        if len(line.words) < 4 or not line.words[2].isdigit():
            notes.lost(line.directive, "is not a host, a type and two ports")
            return None
        host, kind, port, _, *options = line.words
        if kind != "parent":
            notes.unneeded(line.directive, f"a {kind} only has objects of a cache")
            return None
        if "originserver" in options:
            notes.lost(line.directive, "is a web server behind a reverse proxy", "use a web server")
            return None
        notes.carried(line.directive)
        for option in options:
            if not _HARMLESS.fullmatch(option):
                notes.lost(
                    line.directive, f"the option {option.partition('=')[0]} has no counterpart"
                )
        named = [option[5:] for option in options if option.startswith("name=")]
        tls = any(re.match("(tls|ssl)", option) for option in options)
        user, password = self._login(line, options)
        proxy = Proxy("https" if tls else "http", host, int(port), user, password)
        upstream = add_proxy(self._draft, notes, proxy, line.directive)
        if upstream != "block":
            self._set_options(upstream, options)
        return _Peer(line.directive, named[-1] if named else host, upstream, tuple(options))

    def _login(self, line: Line, options: Sequence[str]) -> tuple[str, str]:
        logins = [option[6:] for option in options if option.startswith("login=")]
        if not logins:
            return "", ""
        user, colon, password = unquote(logins[-1].replace("%%", "%25")).partition(":")
        if not colon or user in ("*", ""):
            why = "the login of the client is not passed on"
            self._notes.lost(line.directive, why, "write user:password into the upstream's URL")
            return "", ""
        return user, password

    def _set_options(self, upstream: str, options: Sequence[str]) -> None:
        """Set what the upstream has beside its URL."""
        entry = self._draft.upstreams[upstream]
        settings: dict[str, Value] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key == "connect-timeout" and value.isdigit():
                settings["timeout"] = f"{value}s"
            if key in ("sslcafile", "tls-cafile"):
                settings["tls"] = {"ca": value}
        if settings and isinstance(entry.value, str):
            entry.value = {"url": entry.value, **settings}

    def _groups(self) -> list[Route]:
        """Return the parents of flows, by cache_peer_access; the last route is for the rest."""
        restricted: list[tuple[Match, _Peer]] = []
        free: list[_Peer] = []
        for peer in self._peers:
            lines = [
                line for line in self._lines.get("cache_peer_access", ()) if line.word == peer.name
            ]
            if not lines or last_resort(lines, 1):
                free.append(peer)
            allowed = allowed_matches(lines, self._acls, self._notes, 1)
            restricted += [(match, peer) for match, _ in allowed]
        for line in self._lines.get("cache_peer_access", ()):
            if not self._notes.is_noted(line.directive):
                self._notes.unneeded(line.directive, "is about a peer that is not carried")
        found = [
            Route(match, self._order([*free, peer]), peer.directive) for match, peer in restricted
        ]
        return [*found, Route(ANY, self._order(free), free[0].directive)] if free else found

    def _order(self, peers: Sequence[_Peer]) -> str:
        """Return the upstream of several parents: those that share the load, then the others."""
        steps = [
            self._group(same)
            for rank in range(3)
            if (same := [peer for peer in peers if _rank(peer) == rank])
        ]
        if len(steps) == 1:
            return steps[0]
        group: dict[str, Value] = {"members": [*steps], "balance": "failover"}
        return self._draft.upstream("parents", group, *(peer.directive for peer in peers))

    def _group(self, peers: Sequence[_Peer]) -> str:
        """Return the upstream of parents that are chosen in the same way."""
        if len(peers) == 1:
            return peers[0].upstream
        options = [option for peer in peers for option in peer.options]
        balance = next((_BALANCES[option] for option in options if option in _BALANCES), "failover")
        weights = [_weight(peer) for peer in peers]
        members: list[Value] = [peer.upstream for peer in peers]
        if balance == "round-robin" and len(set(weights)) > 1:
            balance = "weighted"
            members = [
                {"via": peer.upstream, "weight": weight}
                for peer, weight in zip(peers, weights, strict=True)
            ]
        group: dict[str, Value] = {"members": members, "balance": balance}
        return self._draft.upstream("parents", group, *(peer.directive for peer in peers))

    # -- the direct path

    def _direct_routes(self) -> list[Route]:
        """Return the direct upstreams, by tcp_outgoing_address and tcp_outgoing_mark."""
        found: list[Route] = []
        for tag, key in (("tcp_outgoing_address", "bind"), ("tcp_outgoing_mark", "mark")):
            for line in self._lines.get(tag, ()):
                is_mark = re.fullmatch(r"0x[0-9a-fA-F]{1,8}|[1-9]\d{0,8}", line.word)
                if not (is_mark if key == "mark" else networks.is_host(line.word)):
                    self._notes.lost(line.directive, "is not an address or a mark")
                    continue
                # Written as lists of "allow" are.
                allow = line._replace(words=("allow", *line.words[1:]))
                matches = allowed_matches([allow], self._acls, self._notes)
                value: dict[str, Value] = {"url": "direct", key: line.word}
                via = self._draft.upstream(f"direct-{line.word}", value, line.directive)
                found += [Route(match, via, line.directive) for match, _ in matches]
        return [*found, Route(ANY, "direct", None)]

    # -- parts

    def _allowed(self, tag: str) -> list[tuple[Match, Directive]]:
        return allowed_matches(self._lines.get(tag, ()), self._acls, self._notes)

    def _is_on(self, tag: str, default: bool) -> bool:
        lines = self._lines.get(tag, ())
        self._notes.carried(*(line.directive for line in lines))
        return lines[-1].word == "on" if lines else default


def _within(found: Sequence[Route], match: Match, origin: Directive) -> list[Route]:
    """Return what of some routes is within a match."""
    within = [(both(route.match, match), route) for route in found]
    return [Route(m, route.via, route.directive or origin) for m, route in within if m is not None]


def _weight(peer: _Peer) -> int:
    weights = [option[7:] for option in peer.options if option.startswith("weight=")]
    return int(weights[-1]) if weights and weights[-1].isdigit() and int(weights[-1]) else 1


def _rank(peer: _Peer) -> int:
    """Return when squid looks at a parent: those that share the load first, `default` last."""
    if any(option in _BALANCES for option in peer.options):
        return 0
    return 2 if "default" in peer.options else 1
