"""The access lists of 3proxy's services, as rules: services with the same list share them."""

from __future__ import annotations

from netproxy.ctl.convert.draft.draft import is_user_name
from netproxy.ctl.convert.draft.listeners import permit
from netproxy.ctl.convert.draft.rule_list import RuleList
from netproxy.ctl.convert.terms.conditions import ANY, ANY_USER, CannotCombine, Match, both, wanting
from netproxy.ctl.convert.threeproxy.entries import LOCAL_USER, entry_matches
from netproxy.ctl.convert.threeproxy.parents import add_parents
from netproxy.typed import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.draft.draft import Draft
    from netproxy.ctl.convert.notes import Notes
    from netproxy.ctl.convert.threeproxy.entries import Entry
    from netproxy.ctl.convert.threeproxy.services import Service

_WITH_PASSWORD = {"strong", "cache", "cacheacl", "radius", "windows", "pam", "ldap", "useronly"}
_WITHOUT_LOGIN = ("tcp", "udp", "dns")
_OPTIONAL = (
    "a client that sends no login is not asked for one: programs that send it have it, browsers not"
)


def login(service: Service) -> str:
    """Return whether a service wants a login, as `auth` of a listener has it."""
    methods = set(service.state.auth)
    if service.protocol in _WITHOUT_LOGIN or not methods & _WITH_PASSWORD:
        return "none"
    return "optional" if methods & {"iponly", "none", "dnsname", "nbname"} else "required"


def add_rules(services: Sequence[Service], draft: Draft, notes: Notes) -> None:
    """Set who may connect to each listener, and add the rules of all access lists."""
    for service in services:
        auth = login(service)
        if service.protocol not in _WITHOUT_LOGIN and (auth != "none" or draft.users):
            service.listener.settings["auth"] = auth
        permit(service.listener, _clients(service))
        if auth == "optional":
            notes.changed(None, _OPTIONAL)
    rules = RuleList(draft)
    groups: dict[object, list[Service]] = {}
    for service in services:
        if service.protocol != "dns":
            groups.setdefault(_key(service), []).append(service)
    for group in groups.values():
        # Without others no rule needs to say whom it is about.
        names = [service.name for service in group] if len(groups) > 1 else []
        _add_group(group[0], wanting("listener", names) if names else ANY, rules, draft, notes)


def _key(service: Service) -> object:
    """Return what services have in common that have the same rules."""
    listed = tuple(entry.directive.number for entry in service.state.entries)
    return login(service), listed if _is_checked(service) else (), service.protocol


def _is_checked(service: Service) -> bool:
    """Return whether the access list of a service counts: without auth it does not."""
    return bool(service.state.entries) and bool(set(service.state.auth) - {"none"})


def _clients(service: Service) -> list[str] | None:
    """Return the networks of all clients that anything is allowed to; None for everybody."""
    if not _is_checked(service):
        return None
    found: list[str] = []
    for entry in service.state.entries:
        try:
            matches = entry_matches(entry, service.protocol) if entry.allows else []
        except CannotCombine:
            continue
        if not all("client" in match.wanted for match in matches):
            return None
        found += [client for match in matches for client in match.wanted["client"]]
    # A list that allows nobody anything still has a listener, whose rules refuse everything.
    return list(dict.fromkeys(found)) or ["127.0.0.1"]


def _add_group(
    service: Service, listeners: Match, rules: RuleList, draft: Draft, notes: Notes
) -> None:
    if not _is_checked(service):
        for entry in service.state.entries:
            notes.changed(entry.directive, "without auth 3proxy does not look at this list")
        return
    auth = login(service)
    for entry in service.state.entries:
        notes.carried(entry.directive)
        try:
            matches = [
                whole
                for match in entry_matches(entry, service.protocol)
                if (whole := both(_with_users(match, entry, auth), listeners)) is not None
            ]
        except CannotCombine as error:
            lost = "what it allows is refused" if entry.allows else "it denies no more"
            notes.lost(entry.directive, str(error), lost)
            continue
        via = add_parents(entry.parents, draft, notes) if entry.allows else "block"
        if not _can_match(entry, auth):
            notes.changed(entry.directive, "matches nobody: there is no login")
            continue
        for match in _associations(matches, service) if not entry.allows else ():
            rule = rules.add(match, "block", entry.directive)
            if rule is not None:
                rule.comments.append(
                    "UDP ASSOCIATE names no target: 3proxy refuses it here for all"
                )
        for match in matches:
            parents = [parent.directive for parent in entry.parents]
            rules.add(match, via, entry.directive, *parents)
    last = rules.add(listeners, "block")
    if last is not None:
        last.comments.append("3proxy denies what no entry allows")


def _associations(matches: Sequence[Match], service: Service) -> list[Match]:
    """Return the match of datagrams that an entry with a target refuses, whatever the target."""
    found = []
    for match in matches if service.protocol in ("socks5", "sps") else ():
        if not set(match.wanted) & {"ip", "domain", "port"}:
            continue
        whole = match
        for key in ("ip", "domain", "port"):
            whole = whole.without(key)
        udp = both(whole, wanting("command", ["udp"]))
        found += [udp] if udp is not None else []
    return found


def _can_match(entry: Entry, auth: str) -> bool:
    """Return whether anybody can be a user of an entry."""
    return not entry.users or auth != "none"


def _with_users(match: Match, entry: Entry, auth: str) -> Match:
    if not entry.users:
        return match
    names = [name for name in entry.users if name != LOCAL_USER]
    if wrong := [name for name in names if not is_user_name(name)]:
        raise CannotCombine(f"'{wrong[0]}' is not a name that a user can have")
    if LOCAL_USER in entry.users:
        if names:
            raise CannotCombine("users and clients without a login at once")
        return Match(match.wanted, {**match.unwanted, "user": (ANY_USER,)})
    return Match({"user": tuple(names), **match.wanted}, match.unwanted)
