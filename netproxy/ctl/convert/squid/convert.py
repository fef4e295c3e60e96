"""Converts squid.conf: its part that makes squid a forward proxy."""

from __future__ import annotations

from netproxy.ctl.convert.draft.listeners import permit, tell_of_guarded_targets
from netproxy.ctl.convert.draft.rule_list import RuleList
from netproxy.ctl.convert.squid import peers, tags
from netproxy.ctl.convert.squid.access import (
    STRANGER,
    Decision,
    allowed_matches,
    decisions,
    last_resort,
)
from netproxy.ctl.convert.squid.acls import Acls
from netproxy.ctl.convert.squid.lines import Line, read_lines
from netproxy.ctl.convert.squid.logins import set_helper
from netproxy.ctl.convert.squid.ports import Ports, add_ports
from netproxy.ctl.convert.squid.settings import Settings, limit_clients
from netproxy.ctl.convert.terms.conditions import ANY, ANY_USER, CannotCombine, Match, both
from netproxy.typed import TYPE_CHECKING, Collection, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.source import Source
    from netproxy.ctl.convert.squid.peers import Route

_READ = (
    *("acl", "http_access", "http_port", "https_port", "auth_param", "proxy_protocol_access"),
    *("delay_pools", "delay_class", "delay_access", "delay_parameters"),
    *peers.TAGS,
)
"""The tags that have a reader of their own."""
_OPTIONAL = (
    "a client that sends no login is not asked for one: programs that send it have it, browsers not"
)


def convert(source: Source, draft: Draft, notes: Notes) -> None:
    """Fill the draft with what the file says."""
    lines: dict[str, list[Line]] = {}
    for line in read_lines(source, notes):
        lines.setdefault(line.tag, []).append(line)
    ports = add_ports([*lines.get("http_port", []), *lines.get("https_port", [])], draft, notes)
    acls = Acls(lines.get("acl", []), ports.names, notes)
    settings = Settings(draft, notes)
    for tag in lines:
        for line in lines[tag]:
            _note_tag(line, settings, lines.keys(), notes)
    access = _without_maxconn(lines.get("http_access", []), acls, draft, notes)
    found = list(decisions(access, acls, notes))
    allows_rest = last_resort(access) and not any(d.match.is_any for d in found)
    auth = _login(found, allows_rest)
    whole = _Access(found, auth, allows_rest)
    _permit_clients(whole, ports, notes)
    routes = peers.routes(lines, acls, draft, notes)
    if auth == "none":
        # Squid asks nobody for a login: no route is for a user.
        routes = [
            route._replace(match=route.match.without("user"))
            for route in routes
            if "user" not in route.match.wanted
        ]
    _add_rules(RuleList(draft, whole.clients), whole, routes, notes)
    users = _users([*(decision.match for decision in found), *(route.match for route in routes)])
    set_helper(lines.get("auth_param", []), users, draft, notes)
    settings.read_delay_pools(lines, acls)
    _trust_peers(lines.get("proxy_protocol_access", []), ports, acls, notes)
    acls.note_all()
    tell_of_guarded_targets(draft, notes)


def _note_tag(line: Line, settings: Settings, given: Collection[str], notes: Notes) -> None:
    """Carry or note a tag that needs no other one.  `given`: all tags of the file."""
    tag, directive = line.tag, line.directive
    if tag in _READ or settings.read(line):
        return
    if tag in tags.UNNEEDED:
        notes.unneeded(directive, tags.UNNEEDED[tag])
    elif tag in tags.PARTS:
        users = [user for user in tags.PARTS[tag] if user in given]
        if users:
            notes.lost(directive, f"belongs to {users[0]}, which is not carried")
        else:
            notes.unneeded(directive, f"has no effect without {' or '.join(tags.PARTS[tag])}")
    elif tag in tags.LOST and line.words[:1] != ("off",):
        notes.lost(directive, tags.LOST[tag])
    elif tag in tags.LOST:
        notes.unneeded(directive, "is off")
    else:
        notes.lost(directive, "is not a tag that is known")


# -- access


class _Access(NamedTuple):
    """What http_access says."""

    decisions: Sequence[Decision]
    auth: str
    """As `auth` of a listener has it."""
    allows_rest: bool
    """Whether flows are allowed that no decision is about."""

    @property
    def clients(self) -> tuple[str, ...]:
        """The networks of all clients that anything is allowed to; () for everybody."""
        allowed = [decision.match for decision in self.decisions if decision.allows]
        if self.allows_rest or not all("client" in match.wanted for match in allowed):
            return ()
        return tuple(dict.fromkeys(c for match in allowed for c in match.wanted["client"]))


def _without_maxconn(lines: Sequence[Line], acls: Acls, draft: Draft, notes: Notes) -> list[Line]:
    """Carry the lines that limit the connections of a client; return the others."""
    kept: list[Line] = []
    for line in lines:
        found = [acl for word in line.words[1:] if (acl := acls.find(word)) is not None]
        limits = [acl for acl in found if acl.kind == "maxconn"]
        numbers = [value for acl in limits for value in acl.values if value.isdigit()]
        if line.word != "deny" or not numbers:
            kept.append(line)
            continue
        limit_clients(draft, max(int(numbers[0]), 1), line)
        notes.carried(line.directive, *(entry.directive for acl in limits for entry in acl.lines))
        if len(line.words) > 2:
            notes.changed(line.directive, "counts for every client of the listeners")
    return kept


def _users(matches: Sequence[Match]) -> set[str]:
    """Return the users that matches name, with "*" for anybody."""
    parts = (part for match in matches for part in match)
    return {name for part in parts for name in part.get("user", ())}


def _login(found: Sequence[Decision], allows_rest: bool) -> str:
    """Return whether a login is required: it is if nothing is allowed without."""
    if not _users([decision.match for decision in found]):
        return "none"
    for decision in found:
        if decision.match == STRANGER and not decision.allows:
            return "required"
        if decision.allows and "user" not in decision.match.wanted:
            return "optional"
    return "optional" if allows_rest else "required"


def _permit_clients(access: _Access, ports: Ports, notes: Notes) -> None:
    """Set who may connect to the listeners, and whether a login is needed."""
    for entry in ports.entries:
        if entry.settings["protocol"] == "http" and access.auth != "none":
            entry.settings["auth"] = access.auth
        permit(entry, access.clients or None)
    if access.auth == "optional":
        notes.changed(None, _OPTIONAL)


def _add_rules(rules: RuleList, access: _Access, routes: Sequence[Route], notes: Notes) -> None:
    """Add the rules: what http_access decides, with the routes of what it allows."""
    for decision in access.decisions:
        match = decision.match
        if access.auth == "required":
            if ANY_USER in match.unwanted.get("user", ()):
                # There is nobody without a login.
                continue
            if match.wanted.get("user") == (ANY_USER,):
                wanted = {key: values for key, values in match.wanted.items() if key != "user"}
                match = match._replace(wanted=wanted)
        if decision.allows:
            _route(rules, match, decision.directive, routes, notes)
        else:
            rules.add(match, "block", decision.directive)
    if access.allows_rest:
        _route(rules, ANY, None, routes, notes)
    else:
        rules.close("block", "squid denies what no line allows")


def _route(
    rules: RuleList, match: Match, origin: Directive | None, routes: Sequence[Route], notes: Notes
) -> None:
    """Add what is allowed, with an upstream for each route."""
    for route in routes:
        try:
            routed = both(match, route.match)
        except CannotCombine as error:
            notes.lost(route.directive or origin, f"together with http_access: {error}")
            # The other routes are not for these flows.
            rules.add(match, "block", origin)
            return
        if routed is not None:
            rules.add(routed, route.via, origin, route.directive)


def _trust_peers(lines: Sequence[Line], ports: Ports, acls: Acls, notes: Notes) -> None:
    """Set the peers whose connections begin with a PROXY header."""
    trusted: list[str] = []
    for match, directive in allowed_matches(lines, acls, notes):
        if set(match.wanted) == {"client"} and not match.unwanted:
            trusted += match.wanted["client"]
        else:
            notes.lost(directive, "is not about networks alone")
    for entry in ports.entries:
        if trusted and entry in ports.with_header:
            entry.settings["proxy_protocol"] = [*trusted]
