"""`http_access` and other ordered lists of squid.conf: "allow" or "deny", and access lists.

All access lists of a line must match; the first line that matches decides.  If none does, the
opposite of the last line is done.
"""

from __future__ import annotations

from netproxy.ctl.convert.terms.conditions import ANY, ANY_USER, CannotCombine, Match, both, negated
from netproxy.typed import TYPE_CHECKING, Iterator, NamedTuple, Sequence

if TYPE_CHECKING:
    from netproxy.ctl.convert.notes import Directive, Notes
    from netproxy.ctl.convert.squid.acls import Acls
    from netproxy.ctl.convert.squid.lines import Line

STRANGER = Match({}, {"user": (ANY_USER,)})
ALTERNATIVES_LIMIT = 64
"""Rules that one line becomes; each "or" between different keys multiplies them."""


class Decision(NamedTuple):
    """What one line decides about some flows."""

    directive: Directive
    match: Match
    allows: bool


def decisions(
    lines: Sequence[Line], acls: Acls, notes: Notes, skipped: int = 0
) -> Iterator[Decision]:
    """Yield what the lines decide, in their order.

    `skipped`: the words of a line before "allow" or "deny".
    """
    for line in lines:
        words = line.words[skipped:]
        if not words or words[0] not in ("allow", "deny"):
            notes.lost(line.directive, "is neither allow nor deny")
            continue
        allows = words[0] == "allow"
        try:
            found = list(_line_decisions(line, words[1:], allows, acls))
        except CannotCombine as error:
            lost = "what it allowed is decided by later lines" if allows else "it denies no more"
            notes.lost(line.directive, str(error), lost)
            continue
        notes.carried(line.directive)
        yield from found


def _line_decisions(
    line: Line, terms: Sequence[str], allows: bool, acls: Acls
) -> Iterator[Decision]:
    matches = [ANY]
    for term in terms:
        is_negative, name = term.startswith("!"), term.removeprefix("!")
        if name in ("all",) and not is_negative:
            continue
        alternatives = acls.alternatives(name)
        acl = acls.find(name)
        if acl is not None and acl.kind == "proxy_auth":
            # Squid asks for a login as soon as it comes to such a list.
            for match in matches:
                stranger = both(match, STRANGER)
                if stranger is not None:
                    yield Decision(line.directive, stranger, False)
        if is_negative:
            inverse = negated(alternatives)
            alternatives = [] if inverse is None else [inverse]
        joined = (both(match, other) for match in matches for other in alternatives)
        matches = [match for match in joined if match is not None]
        if len(matches) > ALTERNATIVES_LIMIT:
            raise CannotCombine("too many combinations of its lists")
    for match in matches:
        yield Decision(line.directive, match, allows)


def last_resort(lines: Sequence[Line], skipped: int = 0) -> bool:
    """Return whether flows are allowed that no line decides about."""
    words = lines[-1].words[skipped:] if lines else ()
    return words[:1] == ("deny",) and words[1:] != ("all",)


def allowed_matches(
    lines: Sequence[Line], acls: Acls, notes: Notes, skipped: int = 0
) -> list[tuple[Match, Directive]]:
    """Return the matches that a list allows: each without those that are denied before it."""
    denied: list[Match] = []
    allowed: list[tuple[Match, Directive]] = []
    for decision in decisions(lines, acls, notes, skipped):
        if not decision.allows:
            denied.append(decision.match)
            continue
        try:
            rest = negated(denied)
            match = None if rest is None else both(decision.match, rest)
        except CannotCombine as error:
            notes.lost(decision.directive, str(error))
            continue
        if match is not None:
            allowed.append((match, decision.directive))
    return allowed
